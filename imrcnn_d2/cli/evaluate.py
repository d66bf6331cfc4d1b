"""Score COCO results, or a folder of masks, against COCO ground truth: no model needed.

    imrcnn evaluate --gt annotations/test.json --dt predictions.json --output scores/
    imrcnn evaluate --recognition --gt annotations/test.json --dt probabilities.json --output ...
    imrcnn evaluate --gt test.json --dt test_dt.json --tau-from val.json val_dt.json --output ...
    imrcnn evaluate --gt test.json --dt test_dt.json --by centre --by size_mm:5,10,20 --output ...
    imrcnn evaluate --video --gt procedures.json --dt predictions.json --output ...

prints the metrics with their 95 % intervals, in percent but for counts, fp_per_image and hd95
(pixels); n/a is undefined. It writes metrics.json, tables (CSV) and plots (PNG); with --images also
contact_sheet.png, images spread from the best to the worst, and contact_sheet_worst.png.
Images and classes of predictions.json are matched by file_name and name; a single class matches a
single class of another name, which metrics.json states. Masks are PNGs named as their images: 0 is
background, all else is the lesion; with several classes, 1, 2, ... are the categories by ascending
id. They have no scores, so that metrics made of scores are undefined.
With --recognition, the classes of whole images are scored: --dt is a list of {image_id, scores},
the probabilities of the classes by ascending category id.
With --video, the frames of whole procedures are scored as TRUE-Colon does: lesions found and how
soon, false alarms per minute. Images have sequence_id and frame, annotations lesion_id; an alarm is
a detection of at least tau whose "alarm", where the file has one, is true.
"""

import argparse
from pathlib import Path

from imrcnn_d2.cli import add_tau, new_parser, one_line_errors, refuse_options
from imrcnn_d2.utils.files import file_sha256, regular_file, write_atomically


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if not args.video and (args.fps or args.against):
        parser.error("--fps and --against are for --video")
    if args.alarm_rule and (args.tau is not None or args.tau_from or not args.video):
        parser.error("--alarm-rule is for --video, and has its own τ: no --tau or --tau-from")
    if args.tau_rule and not args.tau_from:
        parser.error("--tau-rule is how --tau-from chooses: give --tau-from too")
    of_lesions = ("tau", "tau_from", "iou", "iou_type", "ci_all", "ignore_extra_images")
    if args.recognition:
        refuse_options(parser, args, of_lesions, "is for lesions, not for --recognition")
    with one_line_errors(parser):
        if args.video:
            score_video(args)
        else:
            (score_classification if args.recognition else score_lesions)(args)


def score_lesions(args: argparse.Namespace) -> None:
    """Score, write, plot and print the lesions of images."""
    from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
    from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
    from imrcnn_d2.evaluation.output import RESULTS, prediction_info, write_detections
    from imrcnn_d2.evaluation.subgroups import parse_by, with_groups
    from imrcnn_d2.report.plots import draw_all

    iou = 0.5 if args.iou is None else args.iou
    options = {"iou_threshold": iou, "iou_type": args.iou_type}
    extra = {"ignore_extra_images": args.ignore_extra_images}
    point, mapped = None, None
    if args.tau_from:
        point, mapped = operating_point(args, {**options, **extra})
    gt = read_ground_truth(args.gt)
    detections = read_results(args.dt, gt, **extra)
    if mapped not in (None, detections.mapped):
        raise ValueError(
            f"Only one of {args.dt} and {args.tau_from[1]} has a raw_score: a threshold of mapped "
            "scores says nothing of raw ones. Give two files of the same weights."
        )
    info = prediction_info(detections.info)
    tau = threshold(args.tau, detections, info)
    columns = [parse_by(text) for text in args.by]
    bootstrap = None
    if args.resamples:
        bootstrap = Bootstrap(args.resamples, args.seed, all_coco=args.ci_all)
    resampled = {"operating_point": point, "bootstrap": bootstrap}
    results = evaluate_lesions(gt, detections, tau=tau, **resampled, **options)
    results = with_groups(results, columns, **resampled)
    write_detections(args.output / RESULTS, results.detections, results.ground_truth)
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
    print(f"Percent, but for counts; [95 % interval] over {results.metrics.units}.\n")
    print_calibration(results)
    print_subgroups(results)
    print_written(args.output, paths)


def score_video(args: argparse.Namespace) -> None:
    """Score, write, plot and print the alarms in procedures."""
    from imrcnn_d2.evaluation import Bootstrap, video
    from imrcnn_d2.evaluation.alarms import AlarmRule, with_alarms
    from imrcnn_d2.evaluation.output import prediction_info
    from imrcnn_d2.evaluation.procedures import read_procedures, read_video_detections
    from imrcnn_d2.evaluation.subgroups import parse_by
    from imrcnn_d2.evaluation.true_colon import true_colon_result
    from imrcnn_d2.report.plots import draw_all
    from imrcnn_d2.report.tables import video_differences_table
    from imrcnn_d2.utils.files import csv_text, strict_json

    bootstrap = None
    if args.resamples:
        bootstrap = Bootstrap(args.resamples, args.seed, all_coco=args.ci_all)
    options = {"iou_threshold": args.iou or 0.0, "iou_type": args.iou_type}
    rule = args.tau_rule or video.MATCHED_RULE
    truth, validation = read_procedures(args.gt, args.fps), None
    if args.against and len(args.against) != 1 + bool(args.tau_from):
        raise ValueError(
            "--against takes the second model's results, and with --tau-from also its results on "
            f"that validation set; {len(args.against)} files are given."
        )
    if args.tau_from:
        check_no_test_set(args)
        validation = read_procedures(args.tau_from[0], args.fps)

    alarm_rule = None if args.alarm_rule is None else AlarmRule.of_file(args.alarm_rule)
    if alarm_rule is not None and alarm_rule.gt_sha256 == file_sha256(args.gt):
        raise ValueError(f"{args.gt}: --alarm-rule was chosen on it: give other procedures")

    def evaluated(dt, val_dt, alarm_rule=None, **resampled):
        detections = read_video_detections(dt, truth, args.ignore_extra_images)
        info, point = prediction_info(detections.info), None
        if alarm_rule is None:
            tau = threshold(args.tau, detections, info)
        else:
            alarm_rule.check_weights(info or {})
            print(f"Alarms are those of {args.alarm_rule}: {alarm_rule}.\n")
            tau, detections = alarm_rule.tau, with_alarms(alarm_rule, truth, detections)
        if validation is not None:
            known = read_video_detections(val_dt, validation, args.ignore_extra_images)
            if known.mapped != detections.mapped:
                raise ValueError(
                    f"One of {dt} and {val_dt} has mapped scores, the other raw ones: a threshold "
                    "of the one says nothing of the other. Predict both with the same weights"
                )
            if known.alarm.all() != detections.alarm.all():
                raise ValueError(
                    f"One of {dt} and {val_dt} has detections that an alarm rule makes no alarm, "
                    "the other has none: --tau-from needs both with the rule, or both without"
                )
            scored = video.evaluate_video(validation, known, tau=tau, **options)
            point = video.match_operating_point(scored, rule, str(args.tau_from[0]))
        at = {"tau": tau, "operating_point": point}
        return video.evaluate_video(truth, detections, **at, **options, **resampled), info

    results, info = evaluated(
        args.dt,
        args.tau_from and args.tau_from[1],
        alarm_rule,
        bootstrap=bootstrap,
        by=[parse_by(text) for text in args.by],
    )
    paths = [*write_and_log(results, args, info)]
    paths += draw_all(results, args.output)
    protocol = true_colon_result(results)
    if protocol is not None:
        paths.append(args.output / "true_colon.json")
        write_atomically(paths[-1], strict_json(protocol))
    print_video(results)
    if args.against:
        second, _ = evaluated(args.against[0], args.against[-1])
        table = video_differences_table(video.compare_videos(results, second, bootstrap))
        paths.append(args.output / "comparison.csv")
        write_atomically(paths[-1], csv_text(table.data.to_dict("records"), list(table.data)))
        print(table.markdown())
    print_written(args.output, paths)


def print_video(results):
    from imrcnn_d2.report.names import threshold_name
    from imrcnn_d2.report.tables import metrics_table

    meta, mapped = results.meta, results.outcomes.detections.mapped
    regions = {"segm": "masks", "bbox": "boxes"}[meta["iou_type"]]
    overlap = f"an IoU > {meta['iou_threshold']:g}" if meta["iou_threshold"] else "any overlap"
    names = {"video": threshold_name(meta["tau"], mapped), "detection": "all scores"}
    if (point := results.operating_point) is not None:
        names["tau_val.video"] = f"{threshold_name(point.tau, mapped)} ({point.rule})"
    values = results.compared()
    groups = {name: values[group] for group, name in names.items()}
    intervals = {name: results.intervals.get(group) for group, name in names.items()}
    print(metrics_table(groups, intervals), end="\n\n")
    print(
        f"Percent, but for counts, minutes, frames, seconds and rates; [95 % interval] "
        f"over {results.metrics.units}; hit: {overlap} of {regions}.\n"
    )
    if point is not None:
        print(f"The second threshold was chosen on {point.dataset}.\n")
    print_subgroups(results)


def threshold(tau, detections, info):
    """The score threshold: ``tau`` if it is given, else the one that the predictions state, else
    the default for such scores. A line says which."""
    from imrcnn_d2.evaluation.detection.operating_point import DEFAULT_TAU, score_threshold

    stated = (info or {}).get("tau")
    if tau is not None:
        line = None
        if stated not in (None, tau):
            line = f"The predictions state τ {stated:.4g}; they are evaluated at {tau:g}."
    elif stated is not None:
        tau = stated
        line = f"Score threshold {tau:.4g}, as the predictions state: --tau sets another."
    else:
        tau = score_threshold(DEFAULT_TAU, detections.mapped)
        kind = "as the network gives them"
        if detections.mapped:
            kind = "that a map made probabilities of a hit"
        line = f"Score threshold {tau:g}, of scores {kind}: --tau sets another."
    if line and detections.scored:
        print(line, end="\n\n")
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
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--recognition", action="store_true", help="score the classes of whole images"
    )
    kind.add_argument("--video", action="store_true", help="score whole procedures, see above")
    parser.add_argument(
        "--fps", type=float, help="frames per second of the videos where --gt does not have it"
    )
    parser.add_argument(
        "--alarm-rule",
        type=Path,
        metavar="FILE",
        help="with --video: which detections of --dt are alarms, of imrcnn alarm-rule, with its own"
        " threshold; predictions of frames have no alarms, those of videos may have some already",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=Path,
        metavar=("DT", "VAL_DT"),
        help="with --video: a second model's results, and those on the set of --tau-from; both "
        "models are compared, paired over procedures",
    )
    tau = (
        "score threshold (default: the one that predictions.json states; of other results 0.7, or "
        "0.5 for those with a raw_score, whose score is a probability)"
    )
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
        help="how --tau-from chooses: f1 (default), or a limit such as 'recall>=95' (percent), "
        "'fp_per_image<=0.1' or 'risk<=0.05', the expected share of a patient's lesions missed; "
        "with --video 'fpr<=4.5' (default, percent of clean frames with an alarm) or "
        "'false_alarms_per_minute<=2'",
    )
    parser.add_argument(
        "--iou",
        type=float,
        help="least overlap of a hit (0.5); with --video, what it is above (0: any overlap)",
    )
    parser.add_argument(
        "--iou-type",
        choices=("segm", "bbox"),
        default="segm",
        help="match lesions by masks (default; by boxes where a side has no masks) or by boxes",
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
        "--images",
        type=Path,
        help="folder that file_name is relative to, for contact sheets and imrcnn report",
    )
    parser.add_argument(
        "--ignore-extra-images",
        action="store_true",
        help="leave out detections in images that --gt lacks; metrics.json lists these images",
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    return parser


def operating_point(args, options):
    """The threshold chosen on the validation set of --tau-from; whether it is of mapped scores."""
    from imrcnn_d2.evaluation import evaluate_lesions
    from imrcnn_d2.evaluation.detection.operating_point import choose_operating_point

    check_no_test_set(args)
    gt, dt = args.tau_from
    results = evaluate_lesions(gt, dt, **options)
    point = choose_operating_point(results, args.tau_rule or "f1", str(gt))
    return point, results.detections.mapped


def check_no_test_set(args):
    """
    Raises:
        ValueError: the validation set of --tau-from is what is to be scored.
    """
    gt = args.tau_from[0]
    if file_sha256(regular_file(gt)) == file_sha256(regular_file(args.gt)):
        raise ValueError(
            f"--tau-from {gt} is the ground truth to be scored: a threshold is never chosen on a "
            "test set. Give a validation set."
        )


def print_lesions(results):
    from imrcnn_d2.report.names import PAPER_THRESHOLD, threshold_name
    from imrcnn_d2.report.tables import metrics_table

    groups = results.groups()
    curves = {name: groups.pop(name) for name in ("bbox", "segm")}
    paper = {"paper": groups.pop("paper")}
    print(metrics_table(curves, results.intervals), end="\n\n")
    scored = results.detections.scored
    regions = {"segm": "masks", "bbox": "boxes"}[results.meta["iou_type"]]
    if results.ground_truth.regions.masks is None:
        regions = "boxes (the ground truth has no masks)"
    print(
        "Percent, but for counts, fp_per_image and hd95 (pixels); [95 % interval] over "
        f"{results.metrics.units}; hit: {regions} of IoU ≥ {results.meta['iou_threshold']:g}.\n"
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
