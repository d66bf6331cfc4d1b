"""
Train or evaluate a model described by a LazyConfig, a Python file. Overrides in Hydra's grammar:
``train.max_iter=20``. A LazyConfig runs as Python code: load only files that you trust.
"""

from detectron2.config import LazyConfig
from detectron2.engine import default_setup
from detectron2.utils import comm

import imrcnn_d2  # noqa: F401  (registers data sets)
from imrcnn_d2.cli.train import draw_test_results
from imrcnn_d2.engine import choose_device, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.engine.trainer import LazyTrainer, build_lazy_model, evaluate


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
    with locked_output(cfg.train.output_dir):
        default_setup(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg, args):
    if args.eval_only:
        model = build_lazy_model(cfg)
        weights = load_weights(Checkpointer(model, whole=True), cfg.train.init_checkpoint)
        metrics, results = evaluate(cfg, model, "test", weights)
    else:
        trainer = LazyTrainer(cfg)
        trainer.resume_or_load(args.resume)
        metrics, results = trainer.train(), trainer.test_results
    if comm.is_main_process():
        draw_test_results(results, cfg.train.output_dir)
    return metrics
