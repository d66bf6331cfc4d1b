"""Train or evaluate a detector or classifier: Detectron2's training script with our trainer.

    imrcnn train --config-file configs/kvasir_seg/imrcnn_lite.yaml OUTPUT_DIR output/imrcnn
    imrcnn train --config-file configs/lazy/imrcnn_lite.py train.max_iter=1000

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
    return default_argument_parser()


def run(args: argparse.Namespace) -> dict:
    """One process of a training or evaluation; returns the metrics of the final test."""
    from imrcnn_d2.engine.train_step import keep_freed_memory

    keep_freed_memory()
    lazy = args.config_file.endswith(".py")
    return _run_lazy_config(args) if lazy else _run_yaml_config(args)


def _run_yaml_config(args):
    from detectron2.engine import default_setup
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from imrcnn_d2.engine import Trainer, load_config, load_weights
    from imrcnn_d2.engine.checkpoint import Checkpointer
    from imrcnn_d2.engine.config import is_classifier
    from imrcnn_d2.engine.launch import locked_output
    from imrcnn_d2.report.plots import plot_test_grad_cams

    cfg = load_config(args.config_file, args.opts)
    if args.eval_only:
        cfg.MODEL.TIMM.WEIGHTS = ""  # MODEL.WEIGHTS has the whole model
    cfg.freeze()
    with locked_output(cfg.OUTPUT_DIR):
        default_setup(cfg, args)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR, whole=True)
            resumed = args.resume and checkpointer.has_checkpoint()
            path = checkpointer.get_checkpoint_file() if resumed else cfg.MODEL.WEIGHTS
            metrics, results = Trainer.final_test(cfg, model, load_weights(checkpointer, path))
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            metrics, results = trainer.train(), trainer.test_results
            model = trainer.evaluated_model
        if comm.is_main_process():
            draw_test_results(results, cfg.OUTPUT_DIR)
            if is_classifier(cfg):
                plot_test_grad_cams(cfg, model)
            verify_results(cfg, metrics)
    return metrics


def _run_lazy_config(args):
    from detectron2.config import LazyConfig
    from detectron2.engine import default_setup
    from detectron2.utils import comm

    from imrcnn_d2.engine import choose_device, load_weights
    from imrcnn_d2.engine.checkpoint import Checkpointer
    from imrcnn_d2.engine.launch import locked_output
    from imrcnn_d2.engine.trainer import LazyTrainer, build_lazy_model, evaluate

    cfg = LazyConfig.load(args.config_file)
    if not cfg.train.device and not any(o.startswith("train.device=") for o in args.opts):
        cfg.train.device = choose_device()
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    with locked_output(cfg.train.output_dir):
        default_setup(cfg, args)
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


def draw_test_results(results: dict, output_dir: str) -> None:
    """Draw the plots of each test set next to its files; `results` are by data set."""
    from detectron2.data import MetadataCatalog

    from imrcnn_d2.report.plots import draw_all

    for name, scored in results.items():
        folder = Path(output_dir, "inference", name)
        draw_all(scored, folder, MetadataCatalog.get(name).get("image_root", ""))
