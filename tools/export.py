#!/usr/bin/env python
"""Write a trained model as one file that needs nothing else to predict with.

    tools/export.py --format safetensors --precision fp16 --weights output/imrcnn/model_best.pth \\
        --images datasets/kvasir_seg/images --output imrcnn.safetensors

The file holds weights, config, class names and τ, and is taken by MODEL.WEIGHTS too. It is
compared with the original on real images; the largest differences are printed, and where one is
above its bound no file is written. With fp32 nothing may differ; with fp16 the bounds are 0.02 for
scores, 1 % of the image for boxes and an overlap of 0.97 for masks; 3 % of the detections may be in
one of the two only (of two that overlap, a rounding decides which one stays), but none that counts.
"""

import argparse
import math
import os
import tempfile
from pathlib import Path

from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.agreement import compare_predictors
from imrcnn_d2.deploy.artifact import PRECISIONS, write_safetensors
from imrcnn_d2.deploy.inputs import find_inputs
from imrcnn_d2.deploy.loading import load_model

BOUNDS = {
    "fp32": {"unmatched": 0, "score": 0, "box": 0, "mask_iou": 1},
    "fp16": {"unmatched": 3, "score": 0.02, "box": 1, "mask_iou": 0.97},
}

MOST_IMAGES = 50  # that are compared; spread evenly over those given


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--format", choices=("safetensors",), required=True, help="of the file")
    parser.add_argument("--config-file", type=Path, help="as for tools/predict.py")
    parser.add_argument("--weights", required=True, help="the trained model")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="fp16 has half the size (fp32)"
    )
    parser.add_argument(
        "--images", required=True, nargs="+", metavar="PATH", help="what to compare on; 50 at most"
    )
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    args = parser.parse_args(argv)
    if args.output.suffix != f".{args.format}":
        parser.error(f"--output {args.output} must end with .{args.format}")
    try:
        export(args)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def export(args):
    """Write the file beside its place, compare, and move it there."""
    images = [source.path for source in find_inputs(args.images)[1] if source.kind == "image"]
    if not images:
        raise ValueError("--images names no image to compare on")
    images = images[:: math.ceil(len(images) / MOST_IMAGES)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        path = Path(folder) / args.output.name
        loaded = load_model(args.config_file, args.weights)
        write_safetensors(loaded, path, precision=args.precision)
        original = Predictor(args.config_file, args.weights)
        agreement = compare_predictors(original, Predictor(None, path), images)
        print(
            f"On {agreement.images} images, {agreement.detections} detections, "
            f"{agreement.unmatched} of them in one of the two only: largest difference of a score "
            f"{agreement.score:.2g}, of a box {agreement.box:.2g} % of the image; smallest overlap "
            f"of masks {agreement.mask_iou:.4f}"
        )
        if exceeded := agreement.exceeded(**BOUNDS[args.precision]):
            raise ValueError(f"{args.output} was not written: {'; '.join(exceeded)}")
        os.replace(path, args.output)
    print(f"Written: {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
