"""Train or evaluate a detector or classifier: Detectron2's training script with our trainer."""

import os

from detectron2.data import MetadataCatalog
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

import imrcnn_d2  # noqa: F401  (registers models and data sets)
from imrcnn_d2.engine import Trainer, load_config, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.engine.config import is_classifier
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.report.plots import draw_all, plot_test_grad_cams


def setup(args):
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only:
        cfg.MODEL.TIMM.WEIGHTS = ""  # MODEL.WEIGHTS has the whole model
    cfg.freeze()
    return cfg


def main(args):
    keep_freed_memory()
    cfg = setup(args)
    with locked_output(cfg.OUTPUT_DIR):
        default_setup(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg, args):
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


def draw_test_results(results, output_dir):
    """Draw the plots of each test set next to its files; ``results`` are by data set."""
    for name, scored in results.items():
        folder = os.path.join(output_dir, "inference", name)
        draw_all(scored, folder, MetadataCatalog.get(name).get("image_root", ""))
