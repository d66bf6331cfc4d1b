"""Score COCO results, or a folder of masks, against COCO ground truth: no model needed.

    imrcnn evaluate --gt annotations/test.json --dt predictions.json --output scores/
    imrcnn evaluate --recognition --gt annotations/test.json --dt probabilities.json --output ...
    imrcnn evaluate --gt test.json --dt test_dt.json --tau-from val.json val_dt.json --output ...
    imrcnn evaluate --gt test.json --dt test_dt.json --by centre --by size_mm:5,10,20 --output ...

prints the metrics with their 95 % intervals, in percent but for counts, fp_per_image and hd95
(pixels); n/a is undefined. It writes metrics.json, tables (CSV) and plots (PNG); with --images also
contact_sheet.png, images spread from the best to the worst, and contact_sheet_worst.png.
Images and classes of predictions.json are matched by file_name and name; a single class matches a
single class of another name, which metrics.json states. Masks are PNGs named as their images: 0 is
background, all else is the lesion; with several classes, 1, 2, ... are the categories by ascending
id. They have no scores, so that metrics made of scores are undefined.
With --recognition, the classes of whole images are scored: --dt is a list of {image_id, scores},
the probabilities of the classes by ascending category id.
"""

import argparse
import json
from pathlib import Path

from imrcnn_d2.cli import add_tau, new_parser, one_line_errors
from imrcnn_d2.utils.files import file_sha256, read_json, regular_file, write_atomically


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        (score_classification if args.recognition else score_lesions)(args)


def score_lesions(args: argparse.Namespace) -> None:
    """Score, write, plot and print the lesions of images."""
    from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
    from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
    from imrcnn_d2.evaluation.output import RESULTS, coco_results, prediction_info
    from imrcnn_d2.evaluation.subgroups import parse_by, with_groups
    from imrcnn_d2.report.plots import draw_all

    options = {"iou_threshold": args.iou, "iou_type": args.iou_type}
    extra = {"ignore_extra_images": args.ignore_extra_images}
    point = operating_point(args, {**options, **extra}) if args.tau_from else None
    gt = read_ground_truth(args.gt)
    content = args.dt if args.dt.is_dir() else read_json(args.dt)
    detections = read_results(content, gt, args.dt, **extra)
    info = prediction_info(content)
    tau = threshold(args.tau, detections, info)
    columns = [parse_by(text) for text in args.by]
    bootstrap = None
    if args.resamples:
        bootstrap = Bootstrap(args.resamples, args.seed, all_coco=args.ci_all)
    resampled = {"operating_point": point, "bootstrap": bootstrap}
    results = evaluate_lesions(gt, detections, tau=tau, **resampled, **options)
    results = with_groups(results, columns, **resampled)
    detections = coco_results(results.detections, results.ground_truth)
    write_atomically(args.output / RESULTS, json.dumps(detections))
    paths = [*write_and_log(results, args, info), args.output / RESULTS]
    paths += draw_all(results, args.output, args.images)
    print_lesions(results)
    print_written(args.output, paths)


def score_classification(args: argparse.Namespace) -> None:
    """Score, write, plot and print the classes of whole images."""
    from imrcnn_d2.evaluation import Bootstrap, evaluate_classification
    from imrcnn_d2.evaluation.output import CLASSIFICATION_RESULTS
    from imrcnn_d2.evaluation.subgroups import parse_by, with_groups
    from imrcnn_d2.report.plots import draw_all
    from imrcnn_d2.report.tables import metrics_table

    bootstrap = Bootstrap(args.resamples, args.seed) if args.resamples else None
    columns = [parse_by(text) for text in args.by]
    results = evaluate_classification(args.gt, args.dt, bootstrap=bootstrap)
    results = with_groups(results, columns, bootstrap=bootstrap)
    copy = args.output / CLASSIFICATION_RESULTS
    write_atomically(copy, args.dt.read_bytes())
    paths = [*write_and_log(results, args), copy]
    paths += draw_all(results, args.output)
    print(metrics_table(results.groups(), results.intervals), end="\n\n")
    print_calibration(results)
    print_subgroups(results)
    print_written(args.output, paths)


def threshold(tau, detections, info):
    """The score threshold: ``tau`` if it is given, else the default for such scores, which is
    printed, as is another one that the predictions state."""
    from imrcnn_d2.evaluation.detection.operating_point import DEFAULT_TAU, score_threshold

    lines = []
    if tau is None:
        tau = score_threshold(DEFAULT_TAU, detections.mapped)
        kind = "as the network gives them"
        if detections.mapped:
            kind = "that a map made probabilities of a hit"
        lines.append(f"Score threshold {tau:g}, of scores {kind}: --tau sets another.")
    stated = (info or {}).get("tau")
    if stated is not None and stated != tau:
        lines.append(f"The predictions state τ {stated:.4g}; they are evaluated at {tau:g}.")
    if lines and detections.scored:
        print(*lines, end="\n\n")
    return tau


def write_and_log(results, args, info=None):
    """The files of the evaluation, which is recorded next to a test set; ``info`` is of
    `prediction_info`."""
    from imrcnn_d2.evaluation.output import log_test_evaluation, write_evaluation

    sources = {"gt": args.gt, "dt": args.dt, "predictions": info}
    paths = write_evaluation(results, args.output, **sources, image_root=args.images)
    sha256 = file_sha256(args.dt) if args.dt.is_file() else None
    log_test_evaluation(args.gt, source=args.dt, sha256=sha256, output=args.output)
    return paths.values()


def print_written(output, paths):
    print(f"Written to {output}: {', '.join(path.name for path in paths)}")


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--gt", required=True, type=Path, help="COCO instance annotations")
    parser.add_argument(
        "--dt",
        required=True,
        type=Path,
        help="COCO results: a list, or a COCO file whose annotations have a score; or a folder of "
        "masks, one PNG for each image",
    )
    parser.add_argument(
        "--recognition", action="store_true", help="score the classes of whole images"
    )
    tau = "score threshold (0.7; 0.5 for results with a raw_score, whose score is a probability)"
    add_tau(parser, help=tau)
    parser.add_argument(
        "--tau-from",
        nargs=2,
        type=Path,
        metavar=("VAL_GT", "VAL_DT"),
        help="choose a second threshold on a validation set; its metrics form the group tau_val",
    )
    parser.add_argument(
        "--tau-rule",
        default="f1",
        help="how --tau-from chooses: f1 (default), or a limit such as 'recall>=95' (percent), "
        "'fp_per_image<=0.1' or 'risk<=0.05', the expected share of a patient's lesions missed",
    )
    parser.add_argument("--iou", type=float, default=0.5, help="least overlap of a hit (0.5)")
    parser.add_argument(
        "--iou-type",
        choices=("segm", "bbox"),
        default="segm",
        help="match lesions by masks (default) or by boxes",
    )
    parser.add_argument(
        "--resamples", type=int, default=2000, help="of the bootstrap (2000); 0: no intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.add_argument(
        "--ci-all", action="store_true", help="intervals of COCO's AP, AP75, APs, APm, APl too"
    )
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="metrics for each value of a field of the images or of the annotations, such as "
        "centre; of numbers with the limits of bins, such as size_mm:5,10,20, or centre:each; may "
        "be given several times",
    )
    parser.add_argument(
        "--images", type=Path, help="folder that file_name is relative to, for contact sheets"
    )
    parser.add_argument(
        "--ignore-extra-images",
        action="store_true",
        help="leave out detections in images that --gt lacks; metrics.json lists these images",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    return parser


def operating_point(args, options):
    """The threshold chosen on the validation set of --tau-from."""
    from imrcnn_d2.evaluation import evaluate_lesions
    from imrcnn_d2.evaluation.detection.operating_point import choose_operating_point

    gt, dt = args.tau_from
    if file_sha256(regular_file(gt)) == file_sha256(regular_file(args.gt)):
        raise ValueError(
            f"--tau-from {gt} is the ground truth to be scored: a threshold is never chosen on a "
            "test set. Give a validation set."
        )
    return choose_operating_point(evaluate_lesions(gt, dt, **options), args.tau_rule, str(gt))


def print_lesions(results):
    from imrcnn_d2.report.names import PAPER_THRESHOLD, threshold_name
    from imrcnn_d2.report.tables import metrics_table

    groups = results.groups()
    curves = {name: groups.pop(name) for name in ("bbox", "segm")}
    paper = {"paper": groups.pop("paper")}
    print(metrics_table(curves, results.intervals), end="\n\n")
    scored = results.detections.scored
    regions = {"segm": "masks", "bbox": "boxes"}[results.meta["iou_type"]]
    print(
        "Percent, but for counts, fp_per_image and hd95 (pixels); [95 % interval]; hit: "
        f"{regions} of IoU ≥ {results.meta['iou_threshold']:g}.\n"
    )
    mapped = results.detections.mapped
    at = f"At a {threshold_name(results.meta['tau'], mapped)}:"
    print(at if scored else "Of all masks, which have no scores:")
    print(metrics_table(groups, results.intervals), end="\n\n")
    if results.tau_val:
        names = [name for name in groups if name in results.tau_val]
        intervals = {name: results.intervals.get(f"tau_val.{name}") for name in names}
        at = f"At a {threshold_name(results.tau_val['tau'], mapped)} (tau_val), "
        print(at + "chosen on {dataset} by {rule}:".format(**results.tau_val))
        print(metrics_table({name: results.tau_val[name] for name in names}, intervals), end="\n\n")
    print(f"As the paper, at a {PAPER_THRESHOLD}, TN = images without FP:")
    print(metrics_table(paper, results.intervals), end="\n\n")
    print_subgroups(results)
    if not scored:
        return
    print(metrics_table({"froc": results.froc}, results.intervals), end="\n\n")
    print_calibration(results)


def print_calibration(results):
    """Print the calibration of the scores and, where they were mapped, of those before."""
    from imrcnn_d2.report.tables import metrics_table

    groups = {"calibration_raw": results.calibration_raw, "calibration": results.calibration}
    groups = {name: values for name, values in groups.items() if values is not None}
    print(metrics_table(groups, results.intervals), end="\n\n")


def print_subgroups(results):
    """Print the headline metrics of each group of images."""
    from imrcnn_d2.report.tables import groups_table

    for column in results.by_group:
        print(f"By {column}:\n{groups_table(results, column)}\n")
