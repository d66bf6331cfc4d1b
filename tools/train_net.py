#!/usr/bin/env python3
"""Train or evaluate a detector: Detectron2's training script with our trainer."""

import logging
import os

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

import imrcnn_d2  # noqa: F401  (registers models and data sets)
from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.report.pictures import draw_pictures


def setup(args):
    cfg = load_config(args.config_file, args.opts)
    if args.eval_only:
        cfg.MODEL.TIMM.WEIGHTS = ""  # MODEL.WEIGHTS has the whole model
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def draw_test_pictures(cfg):
    for name in cfg.DATASETS.TEST:
        data = MetadataCatalog.get(name)
        pictures = draw_pictures(
            os.path.join(cfg.OUTPUT_DIR, "inference", name),
            data.json_file,
            data.get("image_root", ""),
            tau=cfg.MODEL.IMRCNN.SCORE_THRESH,
        )
        logging.getLogger("imrcnn_d2").info("Pictures: %s and %s", *pictures)


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train()
    if comm.is_main_process():
        draw_test_pictures(cfg)
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
