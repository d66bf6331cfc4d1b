#!/usr/bin/env python
"""Write trained weights with a part of the neck reset.

    python examples/kvasir_seg_study/without.py attention model_best.pth without_attention.pth

attention: every gate is 1, or 1/2 with MODEL.CBAM.GATE "sigmoid", whatever the image. bottom_up:
nothing comes from the level below. The fall of the metrics shows how much the trained network
relies on the part.
"""

import argparse
import re
from pathlib import Path

import torch

PARTS = {
    "attention": re.compile(r"cbam\d\.(channel\.mlp\.2|spatial\.conv)\.weight$"),
    "bottom_up": re.compile(r"pan_down\d\.(weight|bias)$"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("weights", type=Path, help="checkpoint of a run")
    parser.add_argument("output", type=Path, help="checkpoint to write")
    args = parser.parse_args(argv)
    model = torch.load(args.weights, map_location="cpu", weights_only=True)["model"]
    reset = [name for name in model if PARTS[args.part].search(name)]
    if not reset:
        parser.error(f"{args.weights} has no {args.part} to reset")
    for name in reset:
        model[name].zero_()
    torch.save({"model": model}, args.output)
    print(f"{args.output}: {len(reset)} tensors set to zero")


if __name__ == "__main__":
    main()
