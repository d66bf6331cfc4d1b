"""Evaluation on plain arrays and COCO records: matching, metrics, intervals and evaluators.

`detection/` holds the detector's chain from files to results, and the table of metrics;
`classification` that of image classes. `statistics` has intervals, `comparison` the tests between
two models, `calibration` the map from scores to probabilities, `output` the files.
"""

from imrcnn_d2.evaluation.calibration import ScoreMap, Temperature
from imrcnn_d2.evaluation.classification import ClassificationResults, evaluate_classification
from imrcnn_d2.evaluation.comparison import (
    Difference,
    Plan,
    equivalence,
    model_figures,
    non_inferiority,
    paired_difference,
)
from imrcnn_d2.evaluation.detection.operating_point import (
    OperatingPoint,
    choose_operating_point,
)
from imrcnn_d2.evaluation.detection.results import LesionResults, evaluate_lesions
from imrcnn_d2.evaluation.evaluators import ClassificationEvaluator, LesionEvaluator
from imrcnn_d2.evaluation.statistics import Bootstrap

__all__ = [
    "Bootstrap",
    "ClassificationEvaluator",
    "ClassificationResults",
    "Difference",
    "LesionEvaluator",
    "LesionResults",
    "OperatingPoint",
    "Plan",
    "ScoreMap",
    "Temperature",
    "choose_operating_point",
    "equivalence",
    "evaluate_classification",
    "evaluate_lesions",
    "model_figures",
    "non_inferiority",
    "paired_difference",
]
