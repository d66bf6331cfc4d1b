"""Train or evaluate a detector or classifier: Detectron2's training script with our trainer."""

from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

import imrcnn_d2  # noqa: F401  (registers models and data sets)
from imrcnn_d2.engine import Trainer, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer
from imrcnn_d2.engine.config import is_classifier, load_training_config, register_root
from imrcnn_d2.engine.launch import locked_output
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.report.plots.draw_all import plot_test_results
from imrcnn_d2.report.plots.images import plot_test_grad_cams


def setup(args):
    # Quoted, so that a folder called 2024 stays a string.
    root = getattr(args, "data", "")  # absent from Detectron2's own parser
    data = ["DATASETS.ROOT", repr(root)] if root else []
    cfg = load_training_config(args.config_file, [*data, *args.opts], args.eval_only)
    register_root(cfg)
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
        results = Trainer.final_test(cfg, model, load_weights(checkpointer, path))
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
        model = trainer.evaluated_model
    if comm.is_main_process():
        plot_test_results(cfg.OUTPUT_DIR, cfg.DATASETS.TEST, tau=cfg.MODEL.IMRCNN.SCORE_THRESH)
        if is_classifier(cfg):
            plot_test_grad_cams(cfg, model)
        verify_results(cfg, results)
    return results
