"""A prediction from file to masks, ours against Detectron2's and torchvision's.

For benchmarks/benchmark.py.
"""

import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image as read_image_as
from detectron2.engine import DefaultPredictor
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.analysis import FlopCountAnalysis
from machine import memory
from model_benchmark import stock_config
from sides import environment, started
from torchvision.models.detection import maskrcnn_resnet50_fpn
from tqdm import tqdm

from imrcnn_d2.cli.export import calibration_images
from imrcnn_d2.data.images import open_image, read_image
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.outputs import LEAST_SCORE, compare_records
from imrcnn_d2.deploy.runtimes import EXPORTS
from imrcnn_d2.engine.train_step import keep_freed_memory
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.operating_point import PAPER_TAU

STOCK, TORCHVISION = "Detectron2", "torchvision R-50"
# Our runtimes: on the trained file, or on one exported from it.
TORCH = {"torch": "torch", "torch bf16": "torch-bf16"}
EXPORTED = {
    "ONNX Runtime": ("onnx", "fp32"),
    "OpenVINO": ("openvino", "fp32"),
    "OpenVINO bf16": ("openvino", "bf16"),
    "OpenVINO int8": ("openvino", "int8"),
}
SIDE, PRODUCTS = 2048, 7  # matrices whose product gives the limit, and how often it is timed
IN_A_ROW = 4  # images that a side predicts in each turn
FEW = 10  # images that int8 is fitted to if accuracy does not count

# Variables that restrict libraries to the instructions of an ordinary hospital PC.
ISA = {
    "native": {},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}


def compare_predictions(
    cfg: CfgNode,
    weights: str,
    *,
    isa: str,
    bf16: bool,
    threads: int,
    runs: int,
    accuracy: int | None,
    peers: dict[str, tuple] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Predict with every side, each in a process of its own, in turns on the test images.

    Without `weights` they are random. `bf16` adds the runtimes in bf16, ten times as slow as fp32
    where it is emulated. Each side has `runs` turns of `IN_A_ROW` images, after one for warming up;
    the first image of a turn is not timed: it finds the processor idle, which costs half as much
    again. Results are compared on `accuracy` images. Return, for each side, median ms per image
    (wall, processor, and of wall the network's call and the rest: reading, resizing, pasting
    masks), the medians of how many times less than Detectron2's they are, the peak MiB, and
    AP50_voc and iou or, for random weights, the largest differences from Detectron2's detections;
    and `limit`. `peers` (builder and its arguments) are other networks, only timed.
    """
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    images = [record["file_name"] for record in records]
    with tempfile.TemporaryDirectory() as folder, environment(threads, ISA[isa]):
        few = None if weights and accuracy is None else FEW
        builders, best = _sides(cfg, weights, Path(folder), bf16, threads, few)
        hows = {n: (_Predicting, *how) for n, how in {**builders, **(peers or {})}.items()}
        with started(hows) as sides:
            seconds = _time_in_turns(sides, images, runs)
            compared = {name: sides[name] for name in builders if name != TORCHVISION}
            results = _results(compared, images[:accuracy])
            sizes = {name: side.ask("largest_size") for name, side in sides.items()}
    metrics = {}
    for name in sides:
        (clock, processor, network), (their_clock, their_processor, their_network) = (
            zip(*seconds[side], strict=True) for side in (name, STOCK)
        )
        rest = [whole - part for whole, part in zip(clock, network, strict=True)]
        metrics[name] = {
            "ms": 1000 * statistics.median(clock),
            "times as fast": _ratio(their_clock, clock),
            "network ms": 1000 * statistics.median(network),
            "network, times as fast": _ratio(their_network, network),
            "rest ms": 1000 * statistics.median(rest),
            "processor ms": 1000 * statistics.median(processor),
            "times less processor time": _ratio(their_processor, processor),
            "MiB at most": sizes[name],
        }
        if name not in compared:
            continue
        if weights:
            metrics[name] |= _accuracy(cfg, records[:accuracy], results[name])
        else:
            metrics[name] |= _agreement(images[:accuracy], results[STOCK], results[name])
    return metrics, best


class _Predicting:
    """One of the compared predictors."""

    def __init__(self, build: Callable, *args):
        """`build(*args)` returns a predictor, path of an image -> Instances, perhaps with a
        `network`, which is `_Timed`.
        """
        keep_freed_memory()
        self._predict = build(*args)

    def seconds(self, paths):
        """Of each prediction but the first: wall, processor, and its network's, NaN if it is not
        known.
        """
        return [self._seconds(path) for path in paths][1:]

    def _seconds(self, path):
        start = time.perf_counter(), time.process_time()
        self._predict(path)
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        return *seconds, getattr(getattr(self._predict, "network", None), "seconds", math.nan)

    def records(self, path):
        instances = self._predict(path)
        if instances.has("raw_scores"):  # Detectron2 has no map of scores
            instances.scores = instances.raw_scores
        return instances_to_coco_json(instances.to("cpu"), path)

    def largest_size(self):
        """Peak memory of this process in MiB; NaN except on Linux."""
        return memory().get("peak", math.nan)


def _sides(cfg, weights, folder, bf16, threads, few):
    """Builder and arguments of each side, with files written to `folder`; and the limit."""
    ours, exported = (
        {name: how for name, how in known.items() if bf16 or "bf16" not in name}
        for known in (TORCH, EXPORTED)
    )
    config = folder / "config.yaml"
    config.write_text(cfg.dump(), encoding="utf-8")
    loaded = load_model(config, weights or _random_weights(cfg, folder), device="cpu")
    trained = folder / "model.pth"  # Detectron2 reads no safetensors
    torch.save({"model": loaded.model.state_dict()}, trained)
    sides = {
        STOCK: (_stock, cfg, str(trained)),
        TORCHVISION: (_torchvision, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        **{name: (_ours, config, trained, runtime) for name, runtime in ours.items()},
    }
    prepare = Predictor(config, trained, device="cpu").prepare
    calibration = calibration_images(cfg)[:few]
    calibration = [prepare(read_image(path)) for path in calibration]
    for name, (format, precision) in tqdm(exported.items(), desc="Exporting", leave=False):
        path = folder / f"{precision}.{format}"
        EXPORTS[format].export(
            loaded,
            path,
            example=calibration[0],
            precision=precision,
            calibration=calibration if precision == "int8" else (),
        )
        sides[name] = _ours, None, path, None
    return sides, limit(loaded.model, calibration[0], threads)


def _random_weights(cfg, folder):
    """Random weights whose detections differ: with Detectron2's initial last layers all scores are
    nearly equal, and ties decide which boxes are kept. Here their outputs on an image get zero mean
    and a given spread, as in LSUV (Mishkin & Matas, ICLR 2016).
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    heads = model.roi_heads
    spreads = {
        model.proposal_generator.rpn_head.objectness_logits: 1.0,
        model.proposal_generator.rpn_head.anchor_deltas: 0.2,
        heads.box_predictor.cls_score: 1.0,
        heads.box_predictor.bbox_pred: 1.0,
        **({heads.mask_head.predictor: 2.0} if heads.mask_on else {}),
    }
    for layer, spread in spreads.items():
        layer.register_forward_hook(_Spread(spread))
    image = read_image_as(DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[0]["file_name"], "BGR")
    with torch.no_grad():
        model([{"image": torch.as_tensor(image.transpose(2, 0, 1).copy())}])
    path = folder / "random.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


class _Spread:
    """A hook that rescales a layer once, by its first output (N, C, ...)."""

    def __init__(self, spread):
        self._spread = spread

    def __call__(self, layer, inputs, output):
        if self._spread is None:
            return output
        axes = [axis for axis in range(output.dim()) if axis != 1]
        factor = self._spread / output.std(axes)
        shift = -output.mean(axes) * factor
        layer.weight.mul_(factor.reshape(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias.mul_(factor).add_(shift)
        self._spread = None
        return layer(*inputs)


class _Timed:
    """A function that remembers how long its last call took."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *args):
        start = time.perf_counter()
        result = self._function(*args)
        self.seconds = time.perf_counter() - start
        return result


def _stock(cfg, weights):
    cfg = stock_config(cfg)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.WEIGHTS = weights, "cpu", ""
    predictor = DefaultPredictor(cfg)
    model = predictor.model
    network = _Timed(partial(model.inference, do_postprocess=False))

    def in_parts(inputs):
        sizes = [tuple(item["image"].shape[1:]) for item in inputs]
        return model._postprocess(network(inputs), inputs, sizes)

    predictor.model = in_parts

    def predict(path):
        return predictor(read_image_as(path, "BGR"))["instances"]

    predict.network = network
    return predict


def _torchvision(smallest, largest):
    model = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=smallest, max_size=largest
    ).eval()

    @torch.inference_mode()
    def predict(path):
        image = torch.from_numpy(read_image(Path(path))).permute(2, 0, 1) / 255
        output = model([image])[0]
        return Instances(
            tuple(image.shape[1:]),
            pred_boxes=Boxes(output["boxes"]),
            scores=output["scores"],
            pred_classes=output["labels"] - 1,
            pred_masks=output["masks"][:, 0] > 0.5,
        )

    return predict


def _ours(config, weights, runtime):
    predictor = Predictor(config, weights, runtime=runtime, device="cpu")
    predictor.network = predictor.forward = _Timed(predictor.forward)
    return predictor


def _time_in_turns(sides, images, runs):
    seconds = {name: [] for name in sides}
    names = list(sides)
    for i in tqdm(range(runs + 1), desc="Timing", unit="turn"):
        turn = i % len(names)
        row = [images[(IN_A_ROW * i + k) % len(images)] for k in range(IN_A_ROW)]
        for name in names[turn:] + names[:turn]:
            taken = sides[name].ask("seconds", row)
            if i:  # the first turn sets up kernels
                seconds[name].extend(taken)
    return seconds


def _ratio(numerators, denominators):
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _results(sides, images):
    """Records of each side: (images, detections)."""
    results = {name: [] for name in sides}
    with tqdm(total=len(sides) * len(images), desc="Comparing", unit="image") as bar:
        for name, side in sides.items():
            for path in images:
                results[name].append(side.ask("records", path))
                bar.update()
    return results


def _accuracy(cfg, records, results):
    """AP50_voc and iou of masks, percent."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    ids = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
    chosen = {record["image_id"] for record in records}
    gt = json.loads(Path(metadata.json_file).read_text(encoding="utf-8"))
    gt["images"] = [image for image in gt["images"] if image["id"] in chosen]
    gt["annotations"] = [a for a in gt["annotations"] if a["image_id"] in chosen]
    detections = [
        {
            **detection,
            "image_id": record["image_id"],
            "category_id": ids[detection["category_id"]],
        }
        for record, predicted in zip(records, results, strict=True)
        for detection in predicted
    ]
    metrics = evaluate_lesions(gt, detections, tau=PAPER_TAU)
    return {"AP50_voc": metrics.segm["AP50_voc"], "iou": metrics.lesion["iou"]}


def _agreement(images, reference, results):
    """The largest differences of detections; see :class:`Differences`."""
    sizes = [open_image(Path(path)).size[::-1] for path in images]
    differences = compare_records(reference, results, sizes, LEAST_SCORE)
    score, box, mask_iou = differences.largest()
    return {
        "detections": differences.detections,
        "in one only, %": 100 * differences.unmatched / max(differences.detections, 1),
        "scores differ by": score,
        "boxes differ by, %": box,
        "masks overlap": mask_iou,
    }


def limit(model, image, threads):
    """Multiply-adds of the network in G, those per second of a product of large fp32 matrices, and
    the ms that the network would take at that rate, without reading, resizing and pasting masks.

    `image` is (C, H, W) uint8, as the network sees it.
    """
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = FlopCountAnalysis(model, ([{"image": image}],))
        counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        needed = counted.total() / 1e9
    rate = product_rate(torch.float32, threads) / 1e9
    return {"G multiply-adds": needed, "G a second": rate, "ms at best": 1000 * needed / rate}


def product_rate(dtype: torch.dtype, threads: int) -> float:
    """Multiply-adds per second of a product of large matrices."""
    matrix = torch.rand(SIDE, SIDE).to(dtype)
    seconds, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    for _ in range(PRODUCTS + 2):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return SIDE**3 / statistics.median(seconds[2:])  # without the warm-up
