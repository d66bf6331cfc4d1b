"""A prediction from file to masks, ours against Detectron2's and torchvision's.

For benchmarks/benchmark.py.
"""

import contextlib
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
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
from model_benchmark import stock_config
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
FEW = 20  # images that int8 is fitted to if the weights are random

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
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Predict with every side, each in a process of its own, in turns on the test images.

    Without `weights` they are random. `bf16` adds the runtimes in bf16, ten times as slow as fp32
    where it is emulated. Each side is timed on `runs` images, after two for warming up, and its
    results are compared on `accuracy` images. Return, for each side, median ms per image (wall and
    processor), the medians of how many times less than Detectron2's they are, the peak MiB, and
    AP50_voc and iou or, for random weights, the largest differences from Detectron2's detections;
    and `limit`.
    """
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    images = [record["file_name"] for record in records]
    threaded = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder, _environment({**threaded, **ISA[isa]}):
        builders, best = _sides(cfg, weights, Path(folder), bf16, threads)
        sides = {name: Side(*how) for name, how in builders.items()}
        try:
            seconds = _time_in_turns(sides, images, runs)
            results = _results(sides, images[:accuracy])
            sizes = {name: side.ask("size") for name, side in sides.items()}
        finally:
            for side in sides.values():
                side.stop()
    metrics = {}
    for name in sides:
        (clock, processor), (their_clock, their_processor) = (
            zip(*seconds[side], strict=True) for side in (name, STOCK)
        )
        metrics[name] = {
            "ms": 1000 * statistics.median(clock),
            "times as fast": _ratio(their_clock, clock),
            "processor ms": 1000 * statistics.median(processor),
            "times less processor time": _ratio(their_processor, processor),
            "MiB at most": sizes[name],
        }
        if name == TORCHVISION:
            continue
        if weights:
            metrics[name] |= _accuracy(cfg, records[:accuracy], results[name])
        else:
            metrics[name] |= _agreement(images[:accuracy], results[STOCK], results[name])
    return metrics, best


class Side:
    """One of the compared predictors, in a process that waits for its turns."""

    def __init__(self, build: Callable, *args):
        """`build(*args)` returns a predictor: path of an image -> Instances."""
        self._args = args
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, build, args), daemon=True)
        self._process.start()
        other.close()

    def ask(self, quantity, path=None):
        """Return the "seconds" of a prediction (wall and processor), its "records", or the
        process's peak "size" in MiB.
        """
        try:
            self._pipe.send((quantity, path))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"The process of {self._args} ended: perhaps there was too little memory"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self):
        self._process.terminate()
        self._process.join()


def _serve(pipe, build, args):
    predict = None
    with contextlib.suppress(EOFError):
        while True:
            quantity, path = pipe.recv()
            try:
                if predict is None:
                    keep_freed_memory()
                    predict = build(*args)
                pipe.send(_answer(predict, quantity, path))
            except Exception as error:
                pipe.send(error)


def _answer(predict, quantity, path):
    if quantity == "size":
        return _largest_size()
    start = time.perf_counter(), time.process_time()
    instances = predict(path)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds if quantity == "seconds" else instances_to_coco_json(instances.to("cpu"), path)


def _largest_size():
    """Peak memory of this process in MiB; NaN except on Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return math.nan
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**10


def _sides(cfg, weights, folder, bf16, threads):
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
    calibration = calibration_images(cfg)[: None if weights else FEW]
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


def _stock(cfg, weights):
    cfg = stock_config(cfg)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.TIMM.WEIGHTS = weights, "cpu", ""
    predictor = DefaultPredictor(cfg)
    return lambda path: predictor(read_image_as(path, "BGR"))["instances"]


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
    return Predictor(config, weights, runtime=runtime, device="cpu")


def _time_in_turns(sides, images, runs):
    seconds = {name: [] for name in sides}
    names = list(sides)
    for i in tqdm(range(runs + 2), desc="Timing", unit="image"):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            taken = sides[name].ask("seconds", images[i % len(images)])
            if i >= 2:  # the first calls set up kernels
                seconds[name].append(taken)
    return seconds


def _ratio(numerators, denominators):
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _results(sides, images):
    """Records of each side but torchvision's, which has other weights: (images, detections)."""
    ours = {name: side for name, side in sides.items() if name != TORCHVISION}
    results = {name: [] for name in ours}
    with tqdm(total=len(ours) * len(images), desc="Comparing", unit="image") as bar:
        for name, side in ours.items():
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
            "score": detection.get("raw_score", detection["score"]),
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


@contextlib.contextmanager
def _environment(values):
    """Set variables for processes that are started within."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def limit(model, image, threads):
    """Multiply-adds of the network in G, those per second of a product of large fp32 matrices, and
    the ms that the network would take at that rate, without reading, resizing and pasting masks.

    `image` is (C, H, W) uint8, as the network sees it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counted = FlopCountAnalysis(model, ([{"image": image}],))
            counted.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            needed = counted.total() / 1e9
            rate = SIDE**3 / _product_seconds() / 1e9
    finally:
        torch.set_num_threads(before)
    return {"G multiply-adds": needed, "G a second": rate, "ms at best": 1000 * needed / rate}


def _product_seconds():
    matrix = torch.rand(SIDE, SIDE)
    seconds = []
    for _ in range(PRODUCTS + 2):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])  # without the warm-up
