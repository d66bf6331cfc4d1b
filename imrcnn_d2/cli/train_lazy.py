"""
Train or evaluate a model described by a LazyConfig, a Python file. Overrides in Hydra's grammar:
``train.max_iter=20``. A LazyConfig runs as Python code: load only files that you trust.
"""

from detectron2.config import LazyConfig
from detectron2.engine import default_setup
from detectron2.utils import comm

import imrcnn_d2  # noqa: F401  (registers data sets)
from imrcnn_d2.data.catalog import SHORT_NAMES, data_set_name, register_data_set
from imrcnn_d2.engine import choose_device, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.engine.trainer import LazyTrainer, build_lazy_model, evaluate
from imrcnn_d2.report.plots.draw_all import plot_test_results


def main(args):
    keep_freed_memory()
    if not args.config_file.endswith(".py"):  # Detectron2 would run what a YAML file's tags name
        raise ValueError(
            f"{args.config_file!r}: a LazyConfig is a .py file; YAML goes to tools/train_net.py"
        )
    cfg = LazyConfig.load(args.config_file)
    if not cfg.train.device and not any(o.startswith("train.device=") for o in args.opts):
        cfg.train.device = choose_device()
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    _register_data_set(cfg, getattr(args, "data", ""))
    with locked_output(cfg.train.output_dir):
        default_setup(cfg, args)
        return train_or_evaluate(cfg, args)


def _register_data_set(cfg, data):
    """The data set of --data or train.dataset, whose splits the config then names."""
    if data := data or cfg.train.get("dataset", ""):
        register_data_set(data)
        cfg.train.dataset = data_set_name(data)
    elif cfg.dataloader.train.dataset.names == "_train":
        raise ValueError(
            "No data set is named: add --data DIR or train.dataset=DIR, where DIR is a folder that "
            f"tools/prepare_dataset.py wrote, or one of {', '.join(SHORT_NAMES)}"
        )


def train_or_evaluate(cfg, args):
    if args.eval_only:
        model = build_lazy_model(cfg)
        weights = load_weights(Checkpointer(model, whole=True), cfg.train.init_checkpoint)
        results = evaluate(cfg, model, "test", weights)
    else:
        trainer = LazyTrainer(cfg)
        trainer.resume_or_load(args.resume)
        results = trainer.train()
    if comm.is_main_process():
        evaluator = cfg.dataloader.test_evaluator
        plot_test_results(cfg.train.output_dir, [evaluator.dataset_name], tau=evaluator.tau)
    return results
