"""Write a config for a data set and this machine, with the reason of each choice on its line.

    imrcnn plan --data DIR --output plan.yaml
    imrcnn train --config-file plan.yaml

A few iterations are timed on this machine: plan where you train. `imrcnn train --auto` does both.
"""

import argparse
import math
from pathlib import Path

from imrcnn_d2.cli import WEIGHTS_HELP, new_parser, one_line_errors, output_file


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    from detectron2.utils.logger import setup_logger

    from imrcnn_d2.engine.fingerprint import plan_training

    setup_logger(name="imrcnn_d2")
    with one_line_errors(parser):
        plan_training(args.data, args.output, args.weights, args.memory, args.hours)
    print(args.output.read_text())
    print(f"Written to {args.output}. Next: imrcnn train --config-file {args.output}")


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="a prepared data set")
    parser.add_argument("--output", type=output_file, default=Path("plan.yaml"), metavar="FILE")
    parser.add_argument(
        "--weights", default="", help=f"plan a fine-tuning of these: {WEIGHTS_HELP}"
    )
    parser.add_argument(
        "--memory",
        type=_positive,
        metavar="GiB",
        help="that the training may take; by default the GPU's free memory or the machine's",
    )
    parser.add_argument(
        "--hours", type=_positive, default=24.0, help="that the training may take (default: 24)"
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
