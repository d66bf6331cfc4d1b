"""A web page for trying a model: drop images, see the contours of lesions, move τ, download files.

    imrcnn demo-app
    imrcnn demo-app --weights output/imrcnn/model_best.pth --port 8080

Open the address that it prints. It answers this computer alone unless --host says otherwise, asks
nothing of any other, and keeps no image. Research use only, not for diagnosis.
"""

import argparse
import logging
import signal

from detectron2.utils.logger import setup_logger
from PIL import Image

from imrcnn_d2.cli import WEIGHTS_HELP, new_parser, one_line_errors, predictor_arguments

MAX_PIXELS = 48_000_000  # of an image; four times as many would take a minute and gigabytes


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error("--port is from 0, for a free one, to 65535")
    from imrcnn_d2.deploy import Predictor
    from imrcnn_d2.engine.train_step import keep_freed_memory

    keep_freed_memory()
    setup_logger(name="imrcnn_d2").setLevel(logging.INFO)
    try:
        with one_line_errors(parser, extra="demo"):
            from imrcnn_d2.deploy.web import serve

        with one_line_errors(parser, extra="deploy"):
            options = {"runtime": args.runtime, "crop_view": args.crop_view}
            predictor = Predictor(args.config_file, args.weights, **options)
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # by which `open_image` refuses images
            # As Ctrl-C does, so that the folder of uploads is removed.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            serve(predictor, args.host, args.port)
    except KeyboardInterrupt:
        parser.exit(130)


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, parents=[predictor_arguments()])
    parser.add_argument("--weights", default="demo", help=f"{WEIGHTS_HELP} (%(default)s)")
    host = "address to listen at (%(default)s); 0.0.0.0 lets in everybody on the network"
    parser.add_argument("--host", default="127.0.0.1", help=host)
    port = "to listen at (%(default)s); 0 takes a free one"
    parser.add_argument("--port", type=int, default=7860, help=port)
    return parser
