#!/usr/bin/env python
"""Write the record of a finished run: one small file from which its metrics can be computed again.

    python examples/kvasir_seg_study/records.py output/study/kvasir_seg/imrcnn_lite/seed0/fold0

It holds what was trained and with what, the curves, and each detection on the test images: raw
score, area and box of the mask, IoU with each lesion. A record is written to
runs/CONFIG/foldK_seedS.json.gz next to this script, or under --output; the same run gives the same
bytes. The record of a run without test images, such as one of another length, ends with its curves.
With --validation, a folder that imrcnn validate wrote for this run's weights, there is one record
per centre, CONFIG/CENTRE_seedS.json.gz, with the centre's images in place of the test images.
"""

import argparse
import gzip
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from imrcnn_d2.evaluation import OperatingPoint, ScoreMap
from imrcnn_d2.evaluation.detection.counts import LesionCounter
from imrcnn_d2.evaluation.detection.inputs import mask_areas, read_ground_truth, read_results
from imrcnn_d2.evaluation.detection.matching import overlaps
from imrcnn_d2.evaluation.detection.metrics import CURVE_IOU, DetectionMetrics
from imrcnn_d2.evaluation.detection.operating_point import PAPER_TAU
from imrcnn_d2.evaluation.output import RESULTS, read_metrics, read_run_record
from imrcnn_d2.utils.files import BadInputError, file_sha256, read_json, write_atomically

RECORDS = Path(__file__).parent / "runs"
MOST_BYTES = 100_000
# Endpoints of the study: name -> group and metric, of lesions at the threshold tau_val.
ENDPOINTS = {"AP50_voc": ("segm", "AP50_voc"), "IoU": ("lesion", "iou"), "F1": ("lesion", "f1")}
_KEPT = "model seed iterations config_sha256 git versions device precision hours splits_sha256"
# Of each validation: the metrics that are kept.
_VALIDATION = "segm/AP50_voc segm/AP tau_val.lesion/iou tau_val.lesion/f1 lesion/tau_val"


@dataclass(frozen=True)
class Record:
    """A record as written, and what follows from it."""

    content: dict

    @classmethod
    def read(cls, path: Path) -> "Record":
        """
        Raises:
            BadInputError: no gzipped JSON object.
        """
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
            return cls({**content})
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise BadInputError(path, f"is no record ({error})") from error

    @property
    def values(self) -> dict[str, float]:
        """The endpoints in percent, computed from the detections."""
        once = self.metrics.once()
        return {name: once[group][key] for name, (group, key) in ENDPOINTS.items()}

    @cached_property
    def metrics(self) -> DetectionMetrics:
        """Those of masks, ``lesion`` at tau_val; units are clusters of near-duplicates, or
        sequences. Metrics of boxes are approximate: a record has them to a tenth of a pixel."""
        images, annotations, records, ious = [], [], [], []
        for number, image in enumerate(self.content["images"]):
            facts = {"file_name": image["file_name"], "sequence_id": image["group"]}
            images.append({"id": number, **facts})
            ids = {"image_id": number, "category_id": 0}
            annotations += [{**ids, "area": area, "bbox": box} for area, *box in image["lesions"]]
            for score, _, *rest in image["detections"]:
                records.append({**ids, "score": score, "bbox": rest[:4]})
                ious.append(rest[4:])
        truth = {"images": images, "annotations": annotations}
        gt = read_ground_truth({**truth, "categories": [{"id": 0, "name": "lesion"}]})
        if self.content["score_map"]:
            records = ScoreMap(**self.content["score_map"]).map_records(records)
        detections = read_results(records, gt)
        pairs = overlaps(gt, detections, "bbox")  # the same pairs as of masks, in the same order
        place = pairs.gt - np.searchsorted(gt.regions.image, gt.regions.image[pairs.gt])
        iou = [ious[dt][lesion] for dt, lesion in zip(pairs.dt, place, strict=True)]
        pairs = replace(pairs, iou=np.array(iou, float))
        counter = LesionCounter(gt, detections, "segm", CURVE_IOU, pairs)
        above = counter.above(self.content["operating_point"]["tau"])
        paper = counter.matching.evaluated & (detections.raw_score >= PAPER_TAU)
        counts = {"": counter.per_image(above)}
        return DetectionMetrics(counter, {"": above}, counts, paper, {}, {})


def make_record(run: Path) -> dict:
    """What the record of an OUTPUT_DIR holds.

    Raises:
        ValueError: it is not finished, or its test has no operating point, or other annotations.
    """
    record = _training(run)
    tests = sorted(run.glob("inference/*_test/metrics.json"))
    if not tests:
        return {**record, "images": None}
    metrics = read_metrics(tests[0])
    meta, point = metrics["meta"], OperatingPoint.of_results(metrics.get("tau_val"))
    if point is None:
        raise ValueError(f"{tests[0]} has no tau_val: no threshold was chosen on validation images")
    if file_sha256(meta["gt"]) != meta["gt_sha256"]:
        raise ValueError(f"{meta['gt']} was changed after {run} was tested")
    return {
        **record,
        "gt_sha256": meta["gt_sha256"],
        "score_map": meta.get("score_map"),
        "operating_point": vars(point),
        "metrics": _endpoints({**metrics, "lesion": metrics["tau_val"]["lesion"]}),
        "images": _images(Path(meta["gt"]), tests[0].with_name(RESULTS)),
    }


def validation_records(run: Path, folder: Path) -> dict[str, dict]:
    """The record of each centre of what imrcnn validate wrote to a folder.

    Raises:
        ValueError: the run is not finished, or the validation is of other weights.
    """
    record, metrics = _training(run), read_metrics(folder / "metrics.json")
    predictions, coco = metrics["meta"]["predictions"], read_json(folder / "ground_truth.json")
    if predictions["weights_sha256"] != file_sha256(run / "model_best.pth"):
        raise ValueError(f"{folder} has predictions of other weights than {run}/model_best.pth")
    records = {}
    for centre, groups in metrics["by_group"]["centre"]["groups"].items():
        images = [image for image in coco["images"] if image["centre"] == centre]
        ids = {image["id"] for image in images}
        annotations = [a for a in coco["annotations"] if a["image_id"] in ids]
        truth = {**coco, "images": images, "annotations": annotations}
        records[centre] = {
            **record,
            "centre": centre,
            "score_map": predictions["score_map"],
            "operating_point": {"tau": metrics["meta"]["tau"]},
            "metrics": _endpoints(groups),
            "images": _images(truth, folder / "predictions/predictions.json", part=True),
        }
    return records


def _training(run):
    """What was trained and with what, and the curves."""
    facts = read_run_record(run / "run.json")
    if not facts["finished"]:
        raise ValueError(f"{run} is not finished: the same training goes on with --resume")
    record = {key: facts[key] for key in _KEPT.split()}
    record["fold"] = facts["fold"] and facts["fold"]["index"]
    data_sets = facts["datasets"].items()
    record["train_images"] = sum(d["images"] for name, d in data_sets if name.endswith("_train"))
    return {**record, "curves": _curves(run / "metrics.json")}


def _endpoints(groups):
    return {name: groups[group][key] for name, (group, key) in ENDPOINTS.items()}


def _images(truth, results, part=False):
    """Per image its name, size and group, its lesions as [area, x, y, width, height] and its
    detections as [raw score, area, x, y, width, height, IoU with each lesion]. With `part` results
    of other images are left out."""
    gt = read_ground_truth(truth)
    detections = read_results(results, gt, ignore_extra_images=part)
    pairs = overlaps(gt, detections, "segm")
    areas = mask_areas(detections.regions.masks).tolist()
    boxes = np.round(detections.regions.boxes, 1).tolist()
    images = [
        {
            "file_name": image["file_name"],
            "size": [image["width"], image["height"]],
            "group": image.get("group_id", image.get("sequence_id")),
            "lesions": [],
            "detections": [],
        }
        for image in gt.images
    ]
    for number, area, box in zip(gt.regions.image, gt.area.tolist(), gt.regions.boxes, strict=True):
        images[number]["lesions"].append([area, *box.tolist()])
    rows = [
        [float(f"{score:.7g}"), area, *box]
        for score, area, box in zip(detections.raw_score, areas, boxes, strict=True)
    ]
    for dt, iou in zip(pairs.dt, pairs.iou, strict=True):
        rows[dt].append(math.floor(iou * 1e6) / 1e6)  # below 0.5 stays below
    for number, row in zip(detections.regions.image, rows, strict=True):
        images[number]["detections"].append(row)
    return images


def _curves(path):
    """Of Detectron2's log: iteration and losses of each line, and each validation."""
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "iteration" in line:  # a resumed run logs some again: the last values hold
            lines.setdefault(line["iteration"], {}).update(line)
    names = sorted({key for line in lines.values() for key in line if "loss" in key})
    training = [line for line in lines.values() if "total_loss" in line]
    losses = {name: [_rounded(line.get(name)) for line in training] for name in names}
    validations = [
        {"iteration": line["iteration"], **{k: _rounded(line.get(k)) for k in _VALIDATION.split()}}
        for line in lines.values()
        if "segm/AP50_voc" in line
    ]
    losses = {"iteration": [line["iteration"] for line in training], **losses}
    return {"training": losses, "validation": validations}


def _rounded(value):
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def write_record(record: dict, path: Path) -> None:
    """
    Raises:
        ValueError: it is larger than MOST_BYTES.
    """
    text = json.dumps(record, separators=(",", ":"), sort_keys=True, allow_nan=False)
    packed = gzip.compress(text.encode(), mtime=0)
    if len(packed) > MOST_BYTES:
        raise ValueError(f"{path} would have {len(packed):,} bytes, of at most {MOST_BYTES:,}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, packed)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="OUTPUT_DIR: .../CONFIG/seedS/foldK")
    parser.add_argument("--output", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--validation", type=Path, help="folder of imrcnn validate")
    args = parser.parse_args(argv)
    if args.validation:
        records = validation_records(args.run, args.validation)
    else:
        record = make_record(args.run)
        records = {f"fold{record['fold']}": record}
    config = args.run.resolve().parents[1].name
    for name, record in records.items():
        path = args.output / config / f"{name}_seed{record['seed']}.json.gz"
        write_record(record, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
