"""Validate a model on data of other hospitals, with nothing chosen on them.

    imrcnn validate --weights demo --data datasets/cvc_clinicdb --output validation
    imrcnn validate --weights output/imrcnn/model_best.pth --data clinic_a clinic_b --output ... \\
        --by device --by size_mm:5,10,20
    imrcnn validate --weights demo --images clinic/images --masks clinic/masks --output validation

Weights, threshold and map of scores stay as they are stored: the threshold is the operating point
that was chosen on validation data of the training, else TEST.SCORE_THRESH. All images of a prepared
data set take part, whatever their split, by centre; a data set without centres is one. An empty
mask says that its image has no lesion.

Data that the weights were trained on, or chosen by, are refused, by hashes of their images' pixels
that weights carry; near-duplicates, such as the same images at another size, are reported.

It prints a table by centre, and writes validation.html, validation.md and the tables (CSV, LaTeX);
metrics.json; ground_truth.json and predictions/predictions.json, for imrcnn evaluate and imrcnn
compare. The same command again goes on after an interruption. Research use only, not for diagnosis.
"""

import argparse
import json
import logging
import os
import textwrap
from pathlib import Path

from detectron2.utils.logger import setup_logger

from imrcnn_d2.cli import WEIGHTS_HELP, new_parser, one_line_errors, predictor_arguments
from imrcnn_d2.cli.evaluate import print_subgroups
from imrcnn_d2.utils.files import BadInputError, csv_lines, few, for_terminal, write_atomically

logger = logging.getLogger(__name__)

GROUND_TRUTH, FOLDER, SEEN = "ground_truth.json", "predictions", "training_images.csv"


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if bool(args.data) == bool(args.images) or bool(args.images) != bool(args.masks):
        parser.error("give --data, or --images and --masks")
    setup_logger(name="imrcnn_d2").setLevel(logging.INFO)
    try:
        with one_line_errors(parser, extra="deploy"):
            validate(args)
    except KeyboardInterrupt:
        parser.exit(130, "Interrupted: the same command goes on where this one was\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, parents=[predictor_arguments()])
    add = parser.add_argument
    add("--weights", required=True, help=WEIGHTS_HELP)
    folders = {"action": "extend", "nargs": "+", "metavar": "DIR", "type": Path, "default": []}
    add("--data", help="prepared data sets: folders or short names", **folders)
    add("--images", help="folders of images, in place of --data", **folders)
    add("--masks", help="folders of their masks, in the same order", **folders)
    add(
        "--by",
        action="append",
        default=[],
        metavar="COLUMN",
        help="subgroups, as of imrcnn evaluate: a field of images or annotations, such as device, "
        "or size_mm:5,10,20; may be given several times",
    )
    add(
        "--allow-training-data",
        action="store_true",
        help="go on with images that the weights were trained on, which every table then says",
    )
    add("--output", required=True, type=Path, help="folder for the results")
    return parser


def validate(args: argparse.Namespace) -> None:
    """Check the data, predict, evaluate by centre, write and print."""
    from imrcnn_d2.data.catalog import prepared_folder
    from imrcnn_d2.data.external import read_folders, read_prepared
    from imrcnn_d2.data.images import check_utf8
    from imrcnn_d2.deploy import Predictor
    from imrcnn_d2.deploy.batch import PREDICTIONS, predict_files
    from imrcnn_d2.deploy.inputs import find_inputs
    from imrcnn_d2.engine.train_step import keep_freed_memory
    from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
    from imrcnn_d2.evaluation.detection.inputs import read_ground_truth, read_results
    from imrcnn_d2.evaluation.output import (
        RESULTS,
        log_test_evaluation,
        prediction_info,
        write_detections,
        write_evaluation,
    )
    from imrcnn_d2.evaluation.subgroups import By, group_values, parse_by, with_groups
    from imrcnn_d2.report.validation import Validation, findings, write_validation

    columns = [By("centre", each=True)]
    columns += [by for by in map(parse_by, args.by) if by.column != "centre"]
    keep_freed_memory()
    options = {"runtime": args.runtime, "crop_view": args.crop_view}
    predictor = Predictor(args.config_file, args.weights, **options)
    if not predictor.task.localises:
        raise ValueError(
            f"{args.weights}: a classifier finds no lesions. Evaluate it on a prepared data set "
            "with imrcnn train --eval-only"
        )
    if args.data:
        data = read_prepared(args.data, predictor.classes)
    else:
        data = read_folders(args.images, args.masks, predictor.classes)
    marks = check_unseen(data.paths, predictor.training_images, args)
    root, sources = find_inputs(data.paths)
    if dicom := [source.path for source in sources if source.kind == "dicom"]:
        raise BadInputError(
            dicom[0],
            "is DICOM, whose name and pixels may be a patient's: prepare the data with imrcnn "
            "prepare-dataset masks --all-test, and give it as --data",
        )
    names = {source.path: source.name for source in sources}
    for image, path in zip(data.coco["images"], data.paths, strict=True):
        image["file_name"] = names[Path(os.path.abspath(path))]
        check_utf8(image["file_name"], path)
    truth, predictions = args.output / GROUND_TRUTH, args.output / FOLDER / PREDICTIONS
    gt = read_ground_truth(data.coco, truth)
    for by in columns:
        group_values(gt, by)  # to fail before the prediction if at all
    write_atomically(truth, json.dumps(data.coco))

    done = predict_files(predictor, data.paths, args.output / FOLDER)
    if done.failed:
        listed = few([f"{name} ({reason})" for name, reason in done.failed], separator="; ")
        raise ValueError(f"{len(done.failed)} images cannot be predicted: {listed}")
    detections = read_results(predictions, gt, ignore_extra_images=True)
    bootstrap = Bootstrap()
    results = evaluate_lesions(gt, detections, tau=predictor.tau, bootstrap=bootstrap)
    results = with_groups(results, columns, bootstrap=bootstrap)

    write_detections(args.output / RESULTS, detections, gt)
    info = {"predictions": prediction_info(detections.info), "image_root": root}
    write_evaluation(results, args.output, gt=truth, dt=predictions, **info)
    digest = predictor.metadata["weights_sha256"]
    for folder in map(prepared_folder, args.data):
        test = folder / "annotations" / "test.json"
        log_test_evaluation(test, source=args.weights, sha256=digest, output=args.output)
    texts = {
        "title": f"External validation of {predictor.metadata['model']}",
        "facts": described(predictor, data, args),
        "marks": marks,
        "notes": data.notes,
    }
    validation = Validation.of(results, **texts)
    page, *_ = write_validation(validation, args.output, image_root=root)
    print_subgroups(results)
    for text in (*marks, *findings(validation)):
        print(for_terminal(textwrap.fill(text, 100)), end="\n\n")
    print(f"Written: {page}")


def check_unseen(paths, hashes, args):
    """The marks of the tables, if any: what is known of the images and the weights' training. Files
    that the training had are listed in OUTPUT/training_images.csv.

    Raises:
        ValueError: there are some, unless --allow-training-data.
    """
    from imrcnn_d2.data.training_images import seen_in_training

    if hashes is None:
        text = "%s does not say which images it was trained on: make sure that none of these is"
        logger.warning(text, args.weights)
        return ["The weights do not say which images they were trained on."]
    seen, listed = seen_in_training(paths, hashes), args.output / SEEN
    if not any(seen):
        return []
    rows = [(path, kind) for kind, files in seen._asdict().items() for path in files]
    write_atomically(listed, csv_lines([("file", "training image"), *rows]))
    marks, same, alike = [], *(f"{len(files)} of {len(paths)} images" for files in seen)
    if seen.same:
        if not args.allow_training_data:
            raise ValueError(
                f"{args.weights} was trained on {same}, or chosen by them, so this is no external "
                f"validation: {few(seen.same)}; all in {listed}. Leave them out (the test split of "
                "its own data is evaluated by imrcnn train --eval-only), or go on with "
                "--allow-training-data, which every table then says"
            )
        marks.append(f"The weights were trained on {same} of these data, or chosen by them.")
    if seen.alike:
        text = "%s are near-duplicates of images that %s was trained on: %s; all in %s"
        logger.warning(text, alike, args.weights, few(seen.alike), listed)
        marks.append(f"{alike} are near-duplicates of images that the weights were trained on.")
    return marks


def described(predictor, data, args):
    """What is known of the weights and the data, for the page."""
    from imrcnn_d2.report.names import threshold_name

    facts, point, score_map = predictor.metadata, predictor.operating_point, predictor.score_map
    threshold = threshold_name(predictor.tau, score_map is not None)
    if point is None:
        threshold += ", TEST.SCORE_THRESH of the config"
    else:
        threshold += f", stored in the weights: chosen by {point.rule} on {point.dataset}"
    mapping = "none: scores are as the network gives them"
    if score_map is not None:
        mapping = f"stored in the weights: fitted on {score_map.dataset}"
    folders = args.data or args.images
    return {
        "Weights": f"{args.weights}, sha256 {facts['weights_sha256']}",
        "Model": f"{facts['model']}, backbone {facts['backbone']}, runtime {facts['runtime']}",
        "Threshold": threshold,
        "Map of scores": mapping,
        "Data": f"{', '.join(map(str, folders))}: {len(data.paths)} images",
    }
