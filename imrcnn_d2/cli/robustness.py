"""Evaluate a detector on blurred, badly lit, compressed and turned copies of a data set.

    imrcnn robustness --weights output/imrcnn/model_best.pth --dataset kvasir_seg_test --output r/
    imrcnn robustness --plot MR-CNN=r/mrcnn IMR-CNN=r/imrcnn --output comparison/

The first writes robustness.json and robustness.csv, one row per distortion and severity with all
metrics of an evaluation, and robustness.png; the same command again goes on after an interruption.
The second plots several models in one figure. Metrics are in percent but for counts and
fp_per_image. distortions.jpg shows an image at every severity.
"""

import argparse
import logging
import os
from itertools import chain
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from imrcnn_d2.cli import (
    WEIGHTS_HELP,
    add_crop_view,
    add_tau,
    new_parser,
    one_line_errors,
    refuse_options,
)
from imrcnn_d2.data.catalog import check_registered, data_set_name, register_data_set
from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.data.images import read_image
from imrcnn_d2.utils.files import file_sha256, for_terminal, lock_folder


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.weights and not args.dataset:
        parser.error("--weights needs --dataset")
    if args.plot:
        of_model = ("dataset", "config_file", "tau", "crop_view")
        of_evaluation = ("distortions", "num_images", "seed", "batch_size")
        options = (*of_model, *of_evaluation)
        refuse_options(parser, args, options, "is for --weights, not for --plot")
    positive = args.batch_size > 0 and (args.num_images is None or args.num_images > 0)
    if not positive or not 0 <= (args.tau or 0) <= 1:
        parser.error("--batch-size and --num-images are at least 1, and --tau from 0 to 1")
    setup_logger(name="imrcnn_d2").setLevel(logging.INFO)
    with one_line_errors(parser):
        from imrcnn_d2.report.plots import plot_robustness

        documents = read_documents(args.plot) if args.plot else evaluate(args)
        plot = args.output / "robustness.png"
        plot_robustness(documents, plot, metric=args.figure)
    for name, document in documents.items():
        print(for_terminal(f"{name}: {args.figure}"))
        print(summary(document, args.figure))
    print(f"Written: {plot}")


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--config-file", type=Path, help="as for imrcnn predict")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", help=WEIGHTS_HELP)
    plot = "plot results that are there, as DIR or NAME=DIR, in one figure"
    source.add_argument("--plot", nargs="+", metavar="DIR", help=plot)
    add("--dataset", help="folder of a prepared data set, or a registered one such as egc_test")
    add("--output", required=True, type=Path, help="folder for the results")
    add(
        "--distortions",
        nargs="+",
        choices=DISTORTIONS,
        default=list(DISTORTIONS),
        help="which ones (all); others can be added later",
    )
    add("--num-images", type=int, help="evaluate a random choice of so many (all)")
    add("--seed", type=int, default=0, help="of that choice and the distortions")
    tau = (
        "score from which on detections are positive (the operating point in the weights, else "
        "TEST.SCORE_THRESH)"
    )
    add_tau(parser, help=tau)
    add_crop_view(parser)
    add("--batch-size", type=int, default=1, help="images that the network sees at once (1)")
    metric = "the metric that is plotted and printed (%(default)s)"
    add("--figure", default="lesion/f1", help=metric)
    return parser


def evaluate(args):
    """{name of the model: document}; the evaluation is logged next to a test set."""
    from imrcnn_d2.deploy import Predictor
    from imrcnn_d2.deploy.outputs import records
    from imrcnn_d2.engine.config import register_root
    from imrcnn_d2.evaluation.output import log_test_evaluation
    from imrcnn_d2.evaluation.robustness import evaluate_robustness, load_coco
    from imrcnn_d2.report.plots import plot_distortions

    options = {"tau": args.tau, "crop_view": args.crop_view}
    predictor = Predictor(args.config_file, args.weights, **options)
    if not predictor.task.localises:
        raise ValueError(f"{args.weights}: a classifier finds no lesions")
    register_root(predictor.cfg)
    if os.path.isdir(args.dataset):
        register_data_set(args.dataset)
        args.dataset = f"{data_set_name(args.dataset)}_test"
    check_registered([args.dataset])
    DatasetCatalog.get(args.dataset)  # sets the metadata
    metadata = MetadataCatalog.get(args.dataset)
    ground_truth = load_coco(metadata.json_file)
    category_ids = sorted(category["id"] for category in ground_truth.dataset["categories"])
    if len(category_ids) != len(predictor.classes):
        raise ValueError(
            f"{args.weights} knows the classes {predictor.classes}, but {args.dataset} has "
            f"{len(category_ids)}: choose the data set that it was trained for"
        )

    def predict(images):
        outputs = predictor.in_batches(map(predictor.load, images), args.batch_size)
        results = [records(predictor, output, *frame) for frame, output in outputs]
        for record in chain.from_iterable(results):
            record["category_id"] = category_ids[record["category_id"] - 1]
        return results

    meta = {key: value for key, value in predictor.metadata.items() if key != "tau"}
    meta |= {"dataset": args.dataset, "dataset_sha256": file_sha256(metadata.json_file)}
    names = ("distortions", "num_images", "seed", "batch_size")
    options = {"tau": predictor.tau, "meta": meta, **{n: getattr(args, n) for n in names}}
    folders = metadata.image_root, args.output
    lock = lock_folder(args.output, "--output")
    try:
        document = evaluate_robustness(predict, ground_truth, *folders, **options)
    finally:
        lock.release()
    digest = predictor.metadata["weights_sha256"]
    log_test_evaluation(metadata.json_file, source=args.weights, sha256=digest, output=args.output)
    first = min(ground_truth.dataset["images"], key=lambda image: image["id"])
    example = read_image(Path(metadata.image_root) / first["file_name"])
    plot_distortions(example, args.output / "distortions.jpg", seed=(args.seed, first["id"]))
    return {predictor.metadata["model"]: document}


def read_documents(folders):
    """{name: document} of the folders of --plot."""
    from imrcnn_d2.evaluation.output import read_robustness
    from imrcnn_d2.evaluation.robustness import ROBUSTNESS

    documents = {}
    for text in folders:
        name, _, folder = ("", "", text) if Path(text).exists() else text.rpartition("=")
        document = read_robustness(Path(folder) / ROBUSTNESS)
        name = name or document["meta"]["model"]
        if name in documents:
            raise ValueError(f"two models are called {name}: give names as NAME=DIR")
        documents[name] = document
    return documents


def summary(document, metric):
    """A table, one row per distortion, severity rising to the right."""
    rows = {}
    for row in document["rows"]:
        rows.setdefault(row["distortion"], []).append(row[metric])
    clean = rows.pop("clean", [None])
    table = [[name, *clean, *values] for name, values in rows.items()]
    headers = ["", "none", *range(1, max(map(len, table), default=2) - 1)]
    return tabulate(table, headers, floatfmt=".1f", missingval="n/a")
