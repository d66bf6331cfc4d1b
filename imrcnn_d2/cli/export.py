"""Write a trained model as one file that needs nothing else to predict with.

    imrcnn export --format safetensors --precision fp16 --weights output/imrcnn/model_best.pth \\
        --images datasets/kvasir_seg/images --output imrcnn.safetensors
    imrcnn export --format openvino --weights output/imrcnn/model_best.pth \\
        --images datasets/kvasir_seg/images --output imrcnn.openvino
    imrcnn export --format safetensors --weights old.pth --score-map datasets/my_clinic \\
        --images datasets/my_clinic/images --output new.safetensors

The file holds the network, config, class names, τ and the map of scores, if the weights have one,
and imrcnn predict takes it as --weights. --score-map fits one to the validation images of a
prepared data set, in place of any that the weights have; a τ in the weights is converted.
safetensors are weights, which MODEL.WEIGHTS takes too; onnx and openvino are for the runtimes of
these names (pip install 'imrcnn-d2[deploy]'), for any number and size of images. int8 is
fitted to training images, those of the config's DATASETS.TRAIN unless others are given.

The file is compared with the original on real images; the differences are printed with their
bounds, and where one is above its bound no file is written. Those of bf16 and int8 hold for most
detections, not for each.
"""

import argparse
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from imrcnn_d2.cli import WEIGHTS_HELP, add_crop_view, new_parser, one_line_errors, output_file

# What may differ: detections in one of the two only, in percent of all, those above τ and any;
# scores, boxes in percent of the image's longer side, overlap of masks. Of two boxes that suppress
# each other, bf16 and int8 may take the other one: these bounds hold for a share of the detections.
BOUNDS = {
    "exact": {"lost": 0, "unmatched": 0, "score": 0, "box": 0, "mask_iou": 1},
    "fp32": {"lost": 0, "unmatched": 1, "score": 0.001, "box": 0.05, "mask_iou": 0.999},
    "fp16": {"lost": 0, "unmatched": 3, "score": 0.02, "box": 1, "mask_iou": 0.97},
    "bf16": {"lost": 0, "unmatched": 5, "score": 0.1, "box": 3, "mask_iou": 0.9, "share": 0.9},
    "int8": {"lost": 2, "unmatched": 10, "score": 0.25, "box": 5, "mask_iou": 0.85, "share": 0.95},
}
MOST_IMAGES = 50  # that are compared
MOST_CALIBRATION = 300


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if args.output.suffix != args.format.suffix:
        parser.error(f"--output {args.output} must end with {args.format.suffix}")
    try:
        args.format.check_precision(args.precision)
    except ValueError as error:
        parser.error(str(error))
    if args.calibration and args.precision != "int8":
        parser.error("--calibration is for --precision int8")
    with one_line_errors(parser, extra="deploy"):
        export(args)


def runtime_of(form: str):
    """The `Runtime` that writes files of a format, for --format."""
    from imrcnn_d2.deploy.runtimes import EXPORTS

    if form not in EXPORTS:
        raise argparse.ArgumentTypeError(f"{form!r} is none of {', '.join(EXPORTS)}")
    return EXPORTS[form]


def argument_parser() -> argparse.ArgumentParser:
    bounds = (
        f"{name}: {b['unmatched']} % of the detections in one of the two only ({b['lost']} % and "
        f"above τ), scores {b['score']}, boxes {b['box']} % of the image, overlap of "
        f"masks {b['mask_iou']}"
        + (f"; each for {100 * b['share']:.0f} % of the detections" if "share" in b else "")
        for name, b in BOUNDS.items()
    )
    epilog = "bounds (exact: of safetensors in fp32):\n  " + "\n  ".join(bounds)
    parser = new_parser(__doc__, epilog=epilog)
    add = parser.add_argument
    form = "of the file: safetensors, onnx or openvino"
    add("--format", type=runtime_of, metavar="NAME", required=True, help=form)
    add("--config-file", type=Path, help="as for imrcnn predict")
    add("--weights", required=True, help=f"the trained model: {WEIGHTS_HELP}")
    add(
        "--precision",
        choices=sorted(set(BOUNDS) - {"exact"}),
        default="fp32",
        help="fp16 has half the size (safetensors), bf16 is faster where the processor has such "
        "arithmetic, int8 has a third of the size and is faster still (openvino) (fp32)",
    )
    images = f"what to compare on; {MOST_IMAGES} at most"
    add("--images", required=True, nargs="+", metavar="PATH", help=images)
    score_map = "fit a map from scores to probabilities of a hit to the val split of this prepared "
    score_map += "data set, its folder or a short name"
    add("--score-map", metavar="DIR", help=score_map)
    calibration = f"images to fit int8 to, none that it is tested on; {MOST_CALIBRATION} at most"
    add("--calibration", nargs="+", metavar="PATH", help=calibration)
    add_crop_view(parser)
    add("--output", required=True, type=output_file, help="the file to write")
    return parser


def export(args):
    """Write the file next to its place, compare, and move it there."""
    from imrcnn_d2.deploy import Predictor, load_model
    from imrcnn_d2.deploy.runtimes import Runtime
    from imrcnn_d2.deploy.runtimes.torch import TorchRuntime
    from imrcnn_d2.utils.progress import tqdm

    runtime = args.format
    exact = args.precision in runtime.exact_precisions
    images = find_images(args.images, MOST_IMAGES, "--images")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as folder:
        path = Path(folder) / args.output.name
        options = {"device": "cpu", "crop_view": args.crop_view}
        loaded = load_model(args.config_file, args.weights, **options)
        if isinstance(loaded.model, Runtime):
            raise ValueError(f"{args.weights} is an export already: name the original weights")
        source = args.config_file, args.weights
        if args.score_map:
            mapped = with_score_map(loaded, args.score_map)
            source = None, Path(folder) / "mapped.safetensors"
            TorchRuntime.export(mapped, source[1])
            loaded = load_model(*source, **options)
        original = Predictor(*source, **options)
        int8 = args.precision == "int8"
        fitted = calibration_images(loaded.cfg, args.calibration) if int8 else ()
        bar = tqdm(fitted, desc="Reading images", disable=not fitted)
        example, *calibration = (original.load(path)[1] for path in (images[0], *bar))
        options = {"precision": args.precision, "calibration": calibration}
        runtime.export(loaded, path, example=example, **options)
        exported = Predictor(None, path, device="cpu")
        differences = runtime.check(original, exported, images)
        if not differences.detections:
            raise ValueError("No detections on --images: name images with lesions to compare on")
        bounds = BOUNDS["exact" if exact else args.precision]
        print(comparison(differences, bounds))
        if exceeded := differences.exceeded(**bounds):
            raise ValueError(f"{args.output} was not written: {'; '.join(exceeded)}")
        os.replace(path, args.output)
    print(f"Written: {args.output}, {args.output.stat().st_size / 1e6:.1f} MB")


def with_score_map(loaded, data):
    """The model with a map of scores that is fitted to the validation images of a prepared data
    set; its operating point is converted."""
    from detectron2.data import DatasetCatalog
    from detectron2.evaluation import inference_on_dataset

    from imrcnn_d2.data import training_images
    from imrcnn_d2.data.catalog import data_set_name, load_datasets
    from imrcnn_d2.engine import Trainer
    from imrcnn_d2.evaluation import LesionEvaluator, ScoreMap
    from imrcnn_d2.task import Task
    from imrcnn_d2.utils.progress import tqdm

    task, weights, point = Task.of(loaded.cfg), loaded.weights, loaded.weights.operating_point
    if not task.localises:
        raise ValueError(f"{weights.path} is a classifier: --score-map is for detectors")
    task.register(data)
    name = f"{data_set_name(data)}_val"
    load_datasets([name])  # refuses one without images
    # It keeps the scores as they are: no threshold is chosen of mapped ones.
    evaluator = LesionEvaluator(name, operating_point=point, distributed=False)
    loader = tqdm(Trainer.build_test_loader(loaded.cfg, name), desc="Validation", unit="image")
    inference_on_dataset(loaded.model, loader, evaluator)
    scores = evaluator.results.metrics.calibration
    score_map = ScoreMap.fit(scores.score, scores.hit, name)
    if score_map is None:
        raise ValueError(
            f"{name}: the detections of {weights.path} all hit a lesion, or none does, so no map "
            "of scores can be fitted: name a data set with more validation images"
        )
    if point is not None:
        raw_tau = weights.score_map.inverse()(point.tau) if weights.score_map else point.tau
        point = replace(point, tau=float(score_map(raw_tau)))
        print(f"τ {raw_tau:.4g} of raw scores is {point.tau:.4g} of mapped ones.")
    detections = int(evaluator.results.matching.evaluated.sum())
    print(
        f"Map of scores, fitted to {detections} detections in {name}: slope {score_map.slope:.4g}, "
        f"offset {score_map.offset:.4g}."
    )
    weights = replace(weights, score_map=score_map, operating_point=point)
    metadata = dict(loaded.metadata)
    if hashes := metadata.get(training_images.KEY):
        fitted = [record["file_name"] for record in DatasetCatalog.get(name)]
        metadata[training_images.KEY] = sorted({*hashes, *training_images.training_hashes(fitted)})
    return replace(loaded, weights=weights, metadata=metadata)


def comparison(differences, bounds):
    """What was compared, and which differences are bounded."""
    share = bounds.get("share", 1)
    score, box, mask_iou = differences.largest(share)
    lines = [
        f"On {differences.images} images, {differences.detections} detections, "
        f"{differences.unmatched} of them in one of the two only (bound {bounds['unmatched']} %), "
        f"{differences.lost} of these above τ (bound {bounds['lost']} %).",
        f"{'All' if share == 1 else f'{100 * share:.0f} %'} of the others: scores differ by at "
        f"most {score:.2g} (bound {bounds['score']}), boxes by {box:.2g} % of the image (bound "
        f"{bounds['box']} %), masks overlap by at least {mask_iou:.4f} (bound "
        f"{bounds['mask_iou']}).",
    ]
    if share < 1:
        score, box, mask_iou = differences.largest()
        lines.append(
            f"The rest is not bounded: scores differ by up to {score:.2g}, boxes by {box:.2g} %, "
            f"masks overlap by {mask_iou:.4f} or more."
        )
    return "\n".join(lines)


def calibration_images(cfg, paths=None):
    """Paths of images among the inputs `paths`, by default of the training set."""
    from detectron2.data import DatasetCatalog

    from imrcnn_d2.engine.config import register_root

    if paths:
        return find_images(paths, MOST_CALIBRATION, "--calibration")
    register_root(cfg)
    try:
        records = [record for name in cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name)]
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            "int8 is fitted to training images, and those of the config cannot be read "
            f"({error}): name images with --calibration"
        ) from error
    images = [Path(record["file_name"]) for record in records]
    return images[:: max(1, math.ceil(len(images) / MOST_CALIBRATION))]


def find_images(paths, most, option):
    """At most so many images among the inputs, spread evenly over them."""
    from imrcnn_d2.deploy.inputs import find_inputs

    images = [source.path for source in find_inputs(paths)[1] if source.kind == "image"]
    if not images:
        raise ValueError(f"{option} names no image")
    return images[:: math.ceil(len(images) / most)]
