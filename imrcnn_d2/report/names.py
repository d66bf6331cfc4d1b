"""Names of metrics for readers, and the published values with the remarks that go with them."""

from dataclasses import dataclass

from imrcnn_d2.evaluation.detection.metrics import METRICS
from imrcnn_d2.evaluation.detection.operating_point import PAPER_TAU

LEVELS = {"lesion": "lesions", "image": "images", "patient": "patients"}


def metric_label(name: str) -> str:
    """The label of a metric, or the name of one that the table of metrics does not have."""
    return METRICS[name].label if name in METRICS else name


def metric_name(endpoint: str) -> str:
    """The name of "group/metric" for readers, such as "IoU (masks)"."""
    group, _, metric = endpoint.partition("/")
    label = metric_label(metric)
    if group == "recognition":
        if metric not in METRICS:
            name, _, class_name = metric.partition("_")
            return f"{metric_label(name)} of {class_name}"
        return label + (", mean of classes" if metric in ("f1", "auroc") else "")
    if group == "cancer":
        return f"{'sensitivity' if metric == 'recall' else label} (cancer against benign)"
    at = " at tau_val" if group.startswith("tau_val.") else ""
    group = group.removeprefix("tau_val.")
    if group == "video":
        return f"{label}{at}"
    cases = {"segm": "masks", "bbox": "boxes", "unique_lesion": "unique lesions", **LEVELS}
    cases = {"paper": "as the paper", **cases}.get(group, group)
    cases = {"iou": "masks", "iou_box": "boxes"}.get(metric, cases)
    return f"{label} ({cases}){at}"


def threshold_name(tau: float, mapped: bool, scored: bool = True) -> str:
    """A threshold in words: of scores as the network gives them, or of those that the map in the
    weights made of them. Detections without scores have none."""
    if not scored:
        return "all detections, without scores"
    return f"{'mapped ' if mapped else ''}score ≥ {tau:.3g}"


# In these words also where no map is: the paper's is always of the network's scores.
PAPER_THRESHOLD = f"raw score ≥ {PAPER_TAU:g}"


CITATION = (
    "Zhang et al., Early gastric cancer detection and lesion segmentation based on deep learning "
    "and gastroscopic images, Sci Rep 14:7847, 2024, doi 10.1038/s41598-024-58361-8"
)
PAPER_DATA = ("egc", "kvasir_seg")  # "source" of their annotations' info

_AP = (
    "The paper does not say how AP was computed, nor whether of masks or boxes: read as the area "
    "under the all-point precision-recall curve at IoU 0.5 (AP50_voc)."
)
_IOU = (
    "Read as the mean IoU of matched pairs; the paper's Table 2 speaks of boxes, so masks and "
    "boxes are given here."
)
_OPEN = (
    "The paper leaves open the depth of the backbone, the optimizer and what '100 iterations' are "
    "(read as epochs)."
)
_SPLIT = "Its random split 12:3:5 is not published: the test images differ from those here."
_FOLDS = "Five folds, ± is the population sd; the paper's folds are not published."
_TABLE_5 = (
    "Score threshold 0.7, as the paper's 'threshold 0.7' is read, and TN as images without a false "
    "alarm: TP 286, FN 14, FP 22 and TN 270 in 280 images give all five percentages to the digit."
)


@dataclass(frozen=True)
class Published:
    """A published value in percent."""

    data: str  # one of PAPER_DATA
    model: str
    table: str  # "3" (one split), "4" (five folds) or "5" (operating point)
    figure: str  # the endpoint that stands in for it here, "group/metric"
    value: float
    sd: float | None = None  # population sd over folds, percentage points
    remarks: tuple[str, ...] = ()  # what to know before comparing


# AP and IoU, in Table 4 with their deviations.
_TABLE_3 = (
    ("egc", "MR-CNN", 90.7, 78.3),
    ("egc", "IBMR-CNN", 91.5, 78.8),
    ("egc", "IMR-CNN", 93.5, 79.1),
    ("kvasir_seg", "MR-CNN", 89.8, 83.2),
    ("kvasir_seg", "IBMR-CNN", 90.7, 84.5),
    ("kvasir_seg", "IMR-CNN", 91.6, 84.6),
)
_TABLE_4 = (
    ("MR-CNN", (90.6, 0.4), (78.4, 0.2)),
    ("IBMR-CNN", (91.5, 0.4), (78.8, 0.3)),
    ("IMR-CNN", (93.5, 0.5), (79.0, 0.3)),
)
# Table 4 by training, in percent: model and endpoint -> five values.
PUBLISHED_TRAININGS = {
    ("MR-CNN", "segm/AP50_voc"): (91.2, 90.6, 90.3, 90.8, 89.9),
    ("IBMR-CNN", "segm/AP50_voc"): (91.3, 90.8, 91.6, 92.0, 91.8),
    ("IMR-CNN", "segm/AP50_voc"): (93.7, 93.5, 93.1, 94.2, 92.9),
    ("MR-CNN", "lesion/iou"): (78.2, 78.5, 78.1, 78.7, 78.6),
    ("IBMR-CNN", "lesion/iou"): (79.3, 78.4, 79.0, 78.7, 78.8),
    ("IMR-CNN", "lesion/iou"): (79.5, 78.9, 78.8, 78.6, 79.2),
}


def _rows():
    for data, model, ap, iou in _TABLE_3:
        yield Published(data, model, "3", "segm/AP50_voc", ap, remarks=(_AP, _SPLIT, _OPEN))
        yield Published(data, model, "3", "lesion/iou", iou, remarks=(_IOU, _SPLIT, _OPEN))
    for model, ap, iou in _TABLE_4:
        yield Published("egc", model, "4", "segm/AP50_voc", *ap, remarks=(_AP, _FOLDS, _OPEN))
        yield Published("egc", model, "4", "lesion/iou", *iou, remarks=(_IOU, _FOLDS, _OPEN))
    table_5 = {"precision": 92.9, "recall": 95.3, "accuracy": 93.9, "specificity": 92.5, "f1": 94.1}
    for metric, value in table_5.items():
        remarks = (_TABLE_5, _SPLIT, _OPEN)
        yield Published("egc", "IMR-CNN", "5", f"paper/{metric}", value, remarks=remarks)


def published_values(source: str | None, tables: str) -> list[Published]:
    """The values of tables such as "3" or "345" for the data set that annotations record as their
    source, see `Run.source`; empty where the paper has none.
    """
    return [row for row in _rows() if row.table in tables and row.data == source]


CLASSIFICATION_CITATION = (
    "Gastric image recognition by transfer learning (VGG19, ResNet50, Inception-V3), Academic "
    "Journal of Naval Medical University, 2019"
)
MODEL = "ResNet50"  # its best
# By a word of the class's name.
ACCURACY = {"cancer": 93.0, "ulcer": 92.0, "gastritis": 88.0}
REMARKS = (
    "Per-class accuracy is read as the share of that class's 150 test images that were "
    "predicted as it; the values are of ResNet50, the best of its three models.",
    "Trained on 1,851, 1,969 and 2,018 images of gastric cancer, gastric ulcer and chronic "
    "gastritis. The images are not public: those here differ, and so does their difficulty.",
    "With 150 images of a class, 93 % has a 95 % interval of about 88 to 97 % (Clopper-Pearson).",
)


def published_accuracy(dataset: str | None, classes: list[str]) -> dict[str, float]:
    """Accuracy in percent by class; empty unless the data set, by its registered name, is of
    gastric images and has just the three classes, each known by a word of its name.
    """
    if not (dataset or "").startswith("gastric_recognition_") or len(classes) != len(ACCURACY):
        return {}
    words = ((name, word) for word in ACCURACY for name in classes if word in name.casefold())
    values = {name: ACCURACY[word] for name, word in words}
    return values if len(values) == len(ACCURACY) else {}
