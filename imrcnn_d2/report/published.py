"""What Zhang et al. published, with what has to be said beside each value."""

from dataclasses import dataclass

__all__ = ["CITATION", "PAPER_DATA", "Published", "published_values"]

CITATION = (
    "Zhang et al., Early gastric cancer detection and lesion segmentation based on deep learning "
    "and gastroscopic images, Sci Rep 14:7847, 2024, doi 10.1038/s41598-024-58361-8"
)

# Data sets of the paper, by the beginning of the registered name.
PAPER_DATA = {"kvasir_seg": "Kvasir-SEG", "egc": "the paper's own early gastric cancer images"}

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
_TABLE_5 = "Score threshold 0.7, as the paper's 'threshold 0.7' is read."
_NOT_COMPARABLE = (
    "Not comparable: the paper's five percentages fit no whole counts below 296 regions and need "
    "about one 'normal region' per lesion, where a test split of 280 images holds about 35 healthy "
    "ones."
)


@dataclass(frozen=True)
class Published:
    """
    Attributes:
        data (str): key of PAPER_DATA.
        model (str): "MR-CNN", "IBMR-CNN" or "IMR-CNN".
        table (str): "3" (one split), "4" (five folds) or "5" (operating point).
        figure (str): what stands in for it here, group/figure.
        value (float): in percent.
        sd (float or None): population sd over folds, percentage points.
        comparable (bool): False where no figure of ours means the same.
        remarks (tuple[str, ...]): what to know before comparing.
    """

    data: str
    model: str
    table: str
    figure: str
    value: float
    sd: float | None = None
    comparable: bool = True
    remarks: tuple = ()


def _rows():
    for data, table in {
        "egc": {"MR-CNN": (90.7, 78.3), "IBMR-CNN": (91.5, 78.8), "IMR-CNN": (93.5, 79.1)},
        "kvasir_seg": {"MR-CNN": (89.8, 83.2), "IBMR-CNN": (90.7, 84.5), "IMR-CNN": (91.6, 84.6)},
    }.items():
        for model, (ap, iou) in table.items():
            yield Published(data, model, "3", "segm/AP50_voc", ap, remarks=(_AP, _SPLIT, _OPEN))
            yield Published(data, model, "3", "lesion/iou", iou, remarks=(_IOU, _SPLIT, _OPEN))
    for model, ap, iou in (
        ("MR-CNN", (90.6, 0.4), (78.4, 0.2)),
        ("IBMR-CNN", (91.5, 0.4), (78.8, 0.3)),
        ("IMR-CNN", (93.5, 0.5), (79.0, 0.3)),
    ):
        yield Published("egc", model, "4", "segm/AP50_voc", *ap, remarks=(_AP, _FOLDS, _OPEN))
        yield Published("egc", model, "4", "lesion/iou", *iou, remarks=(_IOU, _FOLDS, _OPEN))
    for figure, value in {
        "precision": 92.9,
        "recall": 95.3,
        "accuracy": 93.9,
        "specificity": 92.5,
        "f1": 94.1,
    }.items():
        comparable = figure not in ("accuracy", "specificity")
        yield Published(
            "egc",
            "IMR-CNN",
            "5",
            f"lesion/{figure}",
            value,
            comparable=comparable,
            remarks=(_TABLE_5, _SPLIT, _OPEN) if comparable else (_NOT_COMPARABLE,),
        )


def published_values(dataset, table):
    """
    Args:
        dataset (str or None): registered name, such as "kvasir_seg_test".
        table (str): "3", "4" or "5".

    Returns:
        list[Published]: those for the data set; empty where the paper has none.
    """
    if not dataset:
        return []
    return [row for row in _rows() if row.table == table and dataset.startswith(f"{row.data}_")]
