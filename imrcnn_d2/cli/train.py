"""Train or evaluate a detector or classifier: Detectron2's training script with our trainer.

    imrcnn train --config-file configs/imrcnn_lite.yaml --data DIR
    imrcnn train --config-file configs/lazy/imrcnn_lite.py --data DIR train.max_iter=1000

A config file is YAML, with overrides as KEY VALUE, or a LazyConfig (.py), with overrides in Hydra's
grammar. A LazyConfig runs as Python code: load only files that you trust.
"""

import argparse
from pathlib import Path

from detectron2.engine.defaults import default_argument_parser


def main(argv: list[str] | None = None) -> None:
    args = argument_parser().parse_args(argv)
    from imrcnn_d2.engine.launch import launch_script

    launch_script(run, args)


def argument_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser()
    parser.add_argument(
        "--data",
        default="",
        metavar="DIR",
        help="folder of a prepared data set, or a short name such as kvasir_seg for one in "
        "$IMRCNN_DATASETS",
    )
    return parser


def run(args: argparse.Namespace) -> dict:
    """One process of a training or evaluation; returns the metrics of the final test."""
    from detectron2.engine import default_setup
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from imrcnn_d2.engine import Trainer, load_weights
    from imrcnn_d2.engine.checkpoint import Checkpointer
    from imrcnn_d2.engine.launch import locked_output
    from imrcnn_d2.engine.train_step import keep_freed_memory
    from imrcnn_d2.engine.trainer import LazyTrainer
    from imrcnn_d2.report.plots import plot_test_grad_cams
    from imrcnn_d2.task import Task

    keep_freed_memory()
    lazy = args.config_file.endswith(".py")
    cfg, trainer_class = (_lazy_config(args), LazyTrainer) if lazy else (_config(args), Trainer)
    output_dir = trainer_class.output_dir(cfg)
    with locked_output(output_dir):
        default_setup(cfg, args)
        if args.eval_only:
            model = trainer_class.build_model(cfg)
            checkpointer = Checkpointer(model, output_dir, whole=True)
            resumed = args.resume and checkpointer.has_checkpoint()
            initial = cfg.train.init_checkpoint if lazy else cfg.MODEL.WEIGHTS
            path = checkpointer.get_checkpoint_file() if resumed else initial
            weights = load_weights(checkpointer, path)
            metrics, results = trainer_class.final_test(cfg, model, weights)
        else:
            trainer = trainer_class(cfg)
            trainer.resume_or_load(args.resume)
            metrics, results = trainer.train(), trainer.test_results
            model = trainer.evaluated_model
        if comm.is_main_process():
            plot_test_results(results, output_dir)
            if not lazy:
                if not Task.of(cfg).localises:
                    plot_test_grad_cams(cfg, model)
                verify_results(cfg, metrics)
    return metrics


def _config(args):
    from imrcnn_d2.engine.config import find_config, load_training_config, register_root

    file = args.config_file and (find_config(args.config_file) or args.config_file)
    # Quoted, so that a folder called 2024 stays a string.
    data = ["DATASETS.ROOT", repr(args.data)] if args.data else []
    cfg = load_training_config(file, [*data, *args.opts], args.eval_only)
    register_root(cfg)
    if args.eval_only:
        cfg.MODEL.TIMM.WEIGHTS = ""  # MODEL.WEIGHTS has the whole model
    cfg.freeze()
    # default_setup logs the file's text, which names of earlier versions do not have.
    args.config_file = str(file) if Path(file).is_file() else ""
    return cfg


def _lazy_config(args):
    from detectron2.config import LazyConfig

    from imrcnn_d2.data.catalog import SHORT_NAMES, data_set_name, register_data_set
    from imrcnn_d2.engine import choose_device

    cfg = LazyConfig.load(args.config_file)
    if not cfg.train.device and not any(o.startswith("train.device=") for o in args.opts):
        cfg.train.device = choose_device()
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    if data := args.data or cfg.train.get("dataset", ""):
        register_data_set(data)
        cfg.train.dataset = data_set_name(data)
    elif cfg.dataloader.train.dataset.names == "_train":
        raise ValueError(
            f"{args.config_file} names no data set: add --data DIR or train.dataset=DIR, a folder "
            f"that `imrcnn prepare-dataset` wrote or one of {', '.join(SHORT_NAMES)}"
        )
    return cfg


def plot_test_results(results: dict, output_dir: str) -> None:
    """Write the plots of each test set next to its files; `results` are by data set."""
    from detectron2.data import MetadataCatalog

    from imrcnn_d2.report.plots import draw_all

    for name, scored in results.items():
        folder = Path(output_dir, "inference", name)
        draw_all(scored, folder, MetadataCatalog.get(name).get("image_root", ""))
