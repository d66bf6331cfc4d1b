"""What every command that predicts is asked."""

import argparse
from pathlib import Path

from imrcnn_d2.deploy.runtimes.runtime import RUNTIMES

__all__ = ["predictor_arguments"]


def predictor_arguments():
    """
    Returns:
        argparse.ArgumentParser: for ``parents``: ``--config-file``, ``--runtime`` and
        ``--crop-view``, as :class:`Predictor` takes them.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--config-file",
        type=Path,
        help="what the weights were trained with; not needed for files of tools/export.py, nor "
        "where training left its config.yaml beside them",
    )
    parser.add_argument(
        "--runtime",
        choices=(*RUNTIMES, "auto"),
        help="what runs the network (torch, or what an exported file is for); auto takes what is "
        "fastest here",
    )
    parser.add_argument(
        "--crop-view",
        action="store_true",
        help="show the network the endoscope's view only, without banners and insets, as data "
        "prepared with --deidentify are; results are of the whole frame",
    )
    return parser
