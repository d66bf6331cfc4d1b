#!/usr/bin/env python3
"""
Train or evaluate a model described by a LazyConfig, a Python file. Overrides in Hydra's grammar:
``train.max_iter=20``. A LazyConfig runs as Python code: load only files that you trust.
"""

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig
from detectron2.engine import default_argument_parser, default_setup, launch

import imrcnn_d2  # noqa: F401  (registers data sets)
from imrcnn_d2.engine import choose_device
from imrcnn_d2.engine.lazy import LazyTrainer, build_lazy_model, evaluate


def main(args):
    cfg = LazyConfig.load(args.config_file)
    if not cfg.train.device and not any(o.startswith("train.device=") for o in args.opts):
        cfg.train.device = choose_device()
    cfg = LazyConfig.apply_overrides(cfg, args.opts)
    default_setup(cfg, args)
    if args.eval_only:
        model = build_lazy_model(cfg)
        DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
        return evaluate(cfg, model, "test")
    trainer = LazyTrainer(cfg)
    trainer.resume_or_load(args.resume)
    return trainer.train()


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
