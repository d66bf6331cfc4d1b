#!/usr/bin/env python
"""
Detectron2's Mask R-CNN in Detectron2's DefaultTrainer, scored by our LesionEvaluator.

    python examples/lesion_evaluator.py datasets/kvasir_seg [KEY VALUE ...]
"""

import argparse
import os

from detectron2 import model_zoo
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.utils.logger import setup_logger

from imrcnn_d2.evaluation import LesionEvaluator


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return LesionEvaluator(dataset_name, tau=0.7, output_dir=folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train Mask R-CNN and count lesions.")
    parser.add_argument("data", help="folder with images/ and annotations/{train,val}.json")
    parser.add_argument("opts", nargs="*", help="config keys and values")
    args = parser.parse_args(argv)

    for split in ("train", "val"):
        json_file = f"{args.data}/annotations/{split}.json"
        register_coco_instances(f"mine_{split}", {}, json_file, f"{args.data}/images")

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", trained=True)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine_train",), ("mine_val",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False  # lesion-free images take part
    cfg.INPUT.MASK_FORMAT = "bitmask"  # masks are RLE
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 4, 0.0025, 3000
    cfg.SOLVER.STEPS = (2000, 2700)
    cfg.OUTPUT_DIR = "output/lesion_evaluator"
    cfg.merge_from_list(args.opts)

    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    setup_logger(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer.train()


if __name__ == "__main__":
    main()
