"""Choose when detections in a video are an alarm, on validation procedures.

    imrcnn predict --weights demo --input val/images --output val_found
    imrcnn alarm-rule --gt val/annotations/test.json --dt val_found/predictions.json \\
        --false-alarms 1 --output alarm_rule.json
    imrcnn predict --weights demo --alarm-rule alarm_rule.json --input clips --output found

A rule is a score threshold τ, k and n: a detection is an alarm if its score is at least τ and its
track was detected so in k of the last n frames that the network saw. Of the rules with at most so
many false alarms per minute, the one that finds the most lesions is written, of equal ones the
soonest; next to it, FILE.csv has what all rules give. Lesions, false alarms and time to detection
are as in imrcnn evaluate --video, which takes --alarm-rule too: test it on other procedures.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from imrcnn_d2.cli import new_parser, one_line_errors, output_file
from imrcnn_d2.utils.files import csv_text, file_sha256, write_atomically


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if not args.false_alarms >= 0:
        parser.error("--false-alarms is a number of at least 0")
    with one_line_errors(parser):
        choose(args)


def choose(args: argparse.Namespace) -> None:
    """Choose, write and print a rule."""
    from imrcnn_d2.evaluation.alarms import candidates, choose_alarm_rule, weights_of
    from imrcnn_d2.evaluation.output import prediction_info
    from imrcnn_d2.evaluation.procedures import read_procedures, read_video_detections

    truth = read_procedures(args.gt, args.fps)
    detections = read_video_detections(args.dt, truth)
    info = prediction_info(detections.info) or {}
    known = candidates(truth, detections)
    chosen = choose_alarm_rule(known, args.false_alarms)
    rule = replace(
        chosen.rule,
        fps=float((truth.fps / truth.step).mean()),  # of the frames that are evaluated
        rule=f"false_alarms_per_minute<={args.false_alarms:g}",
        dataset=str(args.gt),
        gt_sha256=file_sha256(args.gt),
        weights_sha256=weights_of(info),
        score_map=info.get("score_map"),
    )
    write_atomically(args.output, rule.to_json())
    parts = "tau", "k", "n"
    rows = [{**{part: getattr(each.rule, part) for part in parts}, **vars(each)} for each in known]
    for row in rows:
        del row["rule"]
    table = args.output.with_suffix(".csv")
    write_atomically(table, csv_text(rows, parts))
    delay = f"after {chosen.seconds_to_detection:.2f} s on average, "
    print(
        f"{chosen.rule}: {chosen.lesion_sensitivity:.1f} % of {len(truth.lesions)} lesions found, "
        f"{delay if chosen.lesion_sensitivity > 0 else ''}"
        f"{chosen.false_alarms_per_minute:.2f} false alarms per minute"
    )
    print(f"Written to {args.output}; what all rules give to {table}")


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    help_ = "COCO annotations of validation procedures, as for imrcnn evaluate --video"
    add("--gt", required=True, type=Path, help=help_)
    add("--dt", required=True, type=Path, help="predictions.json, or COCO results, of all scores")
    help_ = "at most so many per minute (%(default)g)"
    add("--false-alarms", type=float, default=1.0, metavar="NUMBER", help=help_)
    help_ = "frames per second of the videos where --gt does not have it"
    add("--fps", type=float, help=help_)
    help_ = "the rule's file (%(default)s)"
    add("--output", type=output_file, default="alarm_rule.json", metavar="FILE", help=help_)
    return parser
