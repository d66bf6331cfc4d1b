"""Evaluation on plain arrays and COCO records: matching, metrics, intervals and evaluators.

`detection/` holds the detector's chain from files to results, and the table of metrics;
`classification` that of image classes. `statistics` has the bootstrap and the tests, `comparison`
and `subgroups` what is built on them, `output` the files that are written and read.
"""

from imrcnn_d2.evaluation.classification import ClassificationResults, evaluate_classification
from imrcnn_d2.evaluation.comparison import model_figures, paired_difference
from imrcnn_d2.evaluation.detection.results import (
    LesionResults,
    OperatingPoint,
    choose_operating_point,
    evaluate_lesions,
)
from imrcnn_d2.evaluation.evaluators import ClassificationEvaluator, LesionEvaluator
from imrcnn_d2.evaluation.statistics import Bootstrap

__all__ = [
    "Bootstrap",
    "ClassificationEvaluator",
    "ClassificationResults",
    "LesionEvaluator",
    "LesionResults",
    "OperatingPoint",
    "choose_operating_point",
    "evaluate_classification",
    "evaluate_lesions",
    "model_figures",
    "paired_difference",
]
