"""A web page for trying a model: drop images, see contours, move τ, download files.

    tools/demo_app.py
    tools/demo_app.py --weights output/imrcnn/model_best.pth --port 8080

Open the address that it prints. It answers this computer alone unless --host says otherwise, asks
nothing of any other, and keeps no image. Research use only, not for diagnosis.
"""

import argparse
import logging
import signal

from detectron2.utils.logger import setup_logger
from PIL import Image

from imrcnn_d2.cli.predict import predictor_arguments
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.utils.files import for_terminal

MAX_PIXELS = 48_000_000  # of an image; four times as many would take a minute and gigabytes


def main(argv=None):
    parser = argument_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        parser.error("--port is from 0, for a free one, to 65535")
    keep_freed_memory()
    setup_logger(name="imrcnn_d2").setLevel(logging.INFO)
    try:
        from imrcnn_d2.deploy.web.server import serve

        predictor = Predictor(
            args.config_file, args.weights, runtime=args.runtime, crop_view=args.crop_view
        )
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # by which `open_image` refuses images
        # As Ctrl-C does, so that the folder of uploads goes.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        serve(predictor, args.host, args.port)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {for_terminal(error)}\n")
    except ModuleNotFoundError as error:
        extra = "demo" if error.name in ("gradio", "uvicorn", "fastapi") else "deploy"
        parser.exit(1, f"{parser.prog}: this needs {error.name}: pip install -e '.[{extra}]'\n")
    except KeyboardInterrupt:
        parser.exit(130)


def argument_parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[predictor_arguments()],
    )
    parser.add_argument(
        "--weights",
        default="demo",
        help="file, URL, or the name of weights that come along (%(default)s)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (%(default)s); 0.0.0.0 lets in everybody on the network",
    )
    parser.add_argument(
        "--port", type=int, default=7860, help="to listen at (%(default)s); 0 takes a free one"
    )
    return parser
