"""Find lesions in images, videos and DICOM files.

    imrcnn predict --weights output/imrcnn/model_best.pth --input images --output found --overlays
    imrcnn predict --weights demo --input 'clips/*.mp4' scan.dcm --output found --overlays --masks

writes predictions.json (COCO: all detections with their scores), results.json (the same as a COCO
results list), predictions.csv (one row per image) and the requested outputs; failed.csv lists the
inputs that could not be read. Overlays, masks, LabelMe files and the CSV have the detections with a
score of at least τ: the operating point that was chosen on validation data and is in the weights,
else TEST.SCORE_THRESH.

With --alarm-rule, detections in videos are linked to tracks; those that the rule makes alarms have
`alarm` true next to `track_id` in predictions.json, and a thick contour in the overlays.

The same command again goes on after an interruption, and predicts on new inputs only. Research use
only, not for diagnosis.

    imrcnn predict --engine ray --actors 16 --weights demo --input archive --output found

is for millions of images: processes of this machine, or of the Ray cluster at RAY_ADDRESS, write
Parquet files, one row per image, into predictions.parquet (pip install 'imrcnn-d2[ray]').
"""

import argparse
import logging
from pathlib import Path

from detectron2.utils.logger import setup_logger

from imrcnn_d2.cli import (
    WEIGHTS_HELP,
    add_tau,
    new_parser,
    one_line_errors,
    predictor_arguments,
    refuse_options,
)
from imrcnn_d2.utils.files import for_terminal


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.actors < 1 or not 0 <= (args.tau or 0) <= 1:
        parser.error("--batch-size and --actors are at least 1, and --tau from 0 to 1")
    save = [kind for kind in ("overlays", "masks", "labelme") if getattr(args, kind)]
    if args.engine == "ray" and (save or args.live):
        parser.error("--engine ray writes Parquet files: no --overlays, --masks, --labelme, --live")
    if args.live and (save or args.batch_size > 1):
        parser.error("--live writes live.mp4: no --overlays, --masks, --labelme or --batch-size")
    if args.engine != "ray":
        refuse_options(parser, args, ["actors"], "is for --engine ray")
    if args.live:
        refuse_options(parser, args, ["follow_links"], "is for --input")
    from imrcnn_d2.deploy import Predictor
    from imrcnn_d2.deploy.batch import FAILED, predict_files
    from imrcnn_d2.deploy.live import predict_live
    from imrcnn_d2.engine.train_step import keep_freed_memory

    keep_freed_memory()
    setup_logger(name="imrcnn_d2").setLevel(logging.INFO)
    names = ("weights", "runtime", "tau", "crop_view", "alarm_rule")
    arguments = {"config": args.config_file, **{name: getattr(args, name) for name in names}}
    options = {"batch_size": args.batch_size, "follow_links": args.follow_links}
    try:
        with one_line_errors(parser, extra="ray" if args.engine == "ray" else "deploy"):
            if args.engine == "ray":
                from imrcnn_d2.deploy.ray import predict_with_ray

                listed, options["actors"] = "rows with an error", args.actors
                done = predict_with_ray(arguments, args.input, args.output, **options)
            elif args.live:
                report_live(
                    predict_live(Predictor(**arguments), args.live, args.output), args.output
                )
                return
            else:
                listed, options["save"] = FAILED, save
                done = predict_files(Predictor(**arguments), args.input, args.output, **options)
    except KeyboardInterrupt:
        parser.exit(130, "Interrupted: the same command goes on where this one was\n")
    report(done, args.output, listed)
    if done.failed and not done.images and not done.skipped:
        parser.exit(1)


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, parents=[predictor_arguments()])
    add = parser.add_argument
    add("--weights", required=True, help=WEIGHTS_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="images, videos, DICOM files, folders of these, patterns such as 'clips/*.mp4'",
    )
    source.add_argument(
        "--live",
        metavar="DEVICE|URL",
        help="the newest frame of a camera (/dev/video0) or stream, until Ctrl-C; a video file is "
        "played at its speed. Writes live.mp4 and, with latencies, live.json",
    )
    links = "read through links in a folder that lead out of it, else left out"
    add("--follow-links", action="store_true", help=links)
    add("--output", required=True, type=Path, help="folder for the results")
    engine = "this process, or Ray's, for Parquet files (%(default)s)"
    add("--engine", choices=("local", "ray"), default="local", help=engine)
    add(
        "--actors",
        type=int,
        default=1,
        help="processes of --engine ray, each with the model, on one core or its share of the GPUs "
        "(%(default)s)",
    )
    add("--overlays", action="store_true", help="images with contours; of a video, a video")
    masks = "PNGs: 0 is background; one class is 255, several 1, 2, ..."
    add("--masks", action="store_true", help=masks)
    labelme = "LabelMe files, to correct by hand; of a video, of frames with detections"
    add("--labelme", action="store_true", help=labelme)
    batch_size = "images that the network sees at once (%(default)s)"
    add("--batch-size", type=int, default=1, help=batch_size)
    add_tau(parser, help="another score from which on a detection is positive")
    rule = "of imrcnn alarm-rule, with its own τ: which detections in videos and --live are alarms"
    add("--alarm-rule", type=Path, metavar="FILE", help=rule)
    return parser


def report(done, output, listed):
    """Print the numbers of inputs, and where failed ones are listed."""
    parts = [f"{done.images} images predicted"]
    if done.skipped:
        parts.append(f"{done.skipped} inputs were done before")
    if done.failed:
        parts.append(f"{len(done.failed)} inputs could not be read to their end: {listed}")
    print(f"{'; '.join(parts)}. Written to {output}")
    if done.kept:
        paths = [path.relative_to(output) for path in done.kept[:5]]
        names = ", ".join(for_terminal(path, one_line=True) for path in paths)
        more = f" and {len(done.kept) - 5} more" if len(done.kept) > 5 else ""
        print(f"Left as they are, since they are not as they were written: {names}{more}")


def report_live(live, output):
    latency = ", ".join(f"{name} {ms:.0f} ms" for name, ms in live["latency_ms"].items())
    print(
        f"{live['predicted']} of {live['received']} frames predicted, {live['dropped_percent']} % "
        f"dropped; from frame in to overlay out: {latency}. Written to {output}"
    )
