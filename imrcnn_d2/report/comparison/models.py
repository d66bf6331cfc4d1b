"""The numbers of a comparison: every model's metrics, and which of them differ."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import numpy as np
from tqdm import tqdm

from imrcnn_d2.evaluation.classification import check_same_images
from imrcnn_d2.evaluation.comparison import (
    ModelMetrics,
    check_same_units,
    image_level_test,
    model_figures,
    paired_difference,
)
from imrcnn_d2.evaluation.detection.metrics import ENDPOINTS, PRIMARY, endpoints_of
from imrcnn_d2.evaluation.output import read_coco_records
from imrcnn_d2.evaluation.statistics import Bootstrap, corrected_resampled_t_test, holm
from imrcnn_d2.report.runs import Run
from imrcnn_d2.utils.files import file_sha256

__all__ = [
    "Comparison",
    "Gathered",
    "Test",
    "bootstrap_tests",
    "compare",
    "flat_config",
    "fold_tests",
    "gather",
    "training_images",
]

logger = logging.getLogger(__name__)


# Config keys that may differ between the runs of one model.
OF_A_RUN = ("SEED", "OUTPUT_DIR", "DATASETS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
SETTINGS = ("tau", "iou_threshold", "iou_type")


@dataclass(frozen=True, eq=False)
class Gathered:
    """
    Attributes:
        split: runs on one test set by model, which differ by seed.
        folds: runs of a cross-validation by model: for each fold, by its index, the runs that
            differ by seed.
        remarks: what a reader of the comparison must know.
    """

    split: dict[str, list[Run]]
    folds: dict[str, list[list[Run]]]
    remarks: list[str]


def gather(runs: list[Run]) -> Gathered:
    """
    Group runs by the label given, else by model and backbone, and check that they can be compared.

    Raises:
        ValueError: different test sets or settings; a seed or a fold given twice, a fold missing;
            one label for different models. Both runs are named.
    """
    models = _models(runs)
    split, folds = {}, {}
    for label, own in models.items():
        single = [run for run in own if run.fold is None]
        if single:
            split[label] = _seeds(label, single)
        if len(single) < len(own):
            folds[label] = _folds(label, [run for run in own if run.fold is not None])
    _check_tasks(runs)
    _check_settings(runs)
    _check_test_sets(run for own in split.values() for run in own)
    _check_folds(folds)
    remarks = [remark for label, own in models.items() for remark in _config_remarks(label, own)]
    return Gathered(split, folds, remarks)


def training_images(run: Run) -> int | None:
    """
    Images that a run was trained on, those for validation left out, from run.json or else from the
    train.json next to the test set. None where neither has it.
    """
    facts = list(((run.run or {}).get("datasets") or {}).items())
    if facts:
        names = ((run.config or {}).get("DATASETS") or {}).get("TRAIN") or [facts[0][0]]
        return sum(about["images"] for name, about in facts if name in names) or None
    training = run.gt_path.with_name("train.json")
    if training.is_file() and training != run.gt_path:
        return len(read_coco_records(training)["images"]) or None
    return None


def _where(run):
    return str(run.run_folder or run.folder)


def _models(runs):
    """{label: runs}, in the order given."""
    backbones = {}
    for run in runs:
        backbones.setdefault(run.model, {})[run.backbone] = None
    groups, keys = {}, {}
    for run in runs:
        key = run.name if run.labelled else (run.model, run.backbone)
        several = run.backbone and len(backbones[run.model]) > 1
        label = (
            run.name if run.labelled else f"{run.model} {run.backbone}" if several else run.model
        )
        if keys.setdefault(label, key) != key:
            raise ValueError(
                f"{_where(groups[label][0])} and {_where(run)} would both be named {label!r}: "
                "give one of them another NAME=PATH."
            )
        groups.setdefault(label, []).append(run)
    return groups


def _seeds(label, runs):
    """The runs of one model on one test set, by seed."""
    by_seed = {}
    for run in runs:
        if run.seed in by_seed:
            of_fold = f" of fold {run.fold['index']}" if run.fold else ""
            seed = "no known seed" if run.seed is None else f"seed {run.seed}"
            raise ValueError(
                f"{_where(by_seed[run.seed])} and {_where(run)} are both {label}{of_fold} with "
                f"{seed}: give each once, or different models different names (NAME=PATH)."
            )
        by_seed[run.seed] = run
    return [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: (seed is None, seed or 0))]


def _folds(label, runs):
    """[runs that differ by seed] of each fold."""
    number = runs[0].fold["of"]
    by_index = {}
    for run in runs:
        if run.fold["of"] != number:
            raise ValueError(
                f"{_where(runs[0])} is one of {number} folds, {_where(run)} one of "
                f"{run.fold['of']}: compare runs of one cross-validation."
            )
        by_index.setdefault(run.fold["index"], []).append(run)
    missing = sorted(set(range(number)) - by_index.keys())
    if missing:
        raise ValueError(
            f"{label} lacks fold {', '.join(map(str, missing))} of {number} (there are "
            f"{', '.join(map(str, sorted(by_index)))}): train it, or leave {label} out."
        )
    return [_seeds(label, by_index[index]) for index in sorted(by_index)]


def _check_tasks(runs):
    for run in runs[1:]:
        if run.task != runs[0].task:
            raise ValueError(
                f"{_where(runs[0])} is of {runs[0].task}, {_where(run)} of {run.task}: these have "
                "no metrics in common."
            )


def _check_settings(runs):
    for run in runs[1:]:
        for key in SETTINGS:
            ours, theirs = (one.meta.get(key) for one in (runs[0], run))
            if ours != theirs:
                raise ValueError(
                    f"{_where(runs[0])} was evaluated with {key} {ours}, {_where(run)} with "
                    f"{theirs}: evaluate one of them again."
                )


def _sha256(run):
    return run.meta.get("gt_sha256") or file_sha256(run.gt_path)


def _check_test_sets(runs):
    first = None
    for run in runs:
        first = first or run
        if _sha256(first) != _sha256(run):
            raise ValueError(
                f"{_where(first)} ({first.dataset}, {first.gt_path}) and {_where(run)} "
                f"({run.dataset}, {run.gt_path}) were evaluated on different test sets: their "
                "metrics cannot be compared."
            )


def _check_folds(folds):
    """Every model has the same folds, and no image is tested in two of them."""
    labels = list(folds)
    for label in labels[1:]:
        ours, theirs = len(folds[labels[0]]), len(folds[label])
        if ours != theirs:
            raise ValueError(
                f"{labels[0]} has {ours} folds, {label} has {theirs}: compare models on the same "
                "folds."
            )
    tested = {}
    for index, runs in enumerate(zip(*folds.values(), strict=True)):
        _check_test_sets(run for seeds in runs for run in seeds)
        run = runs[0][0]
        for image in run.results.ground_truth.images:
            name = image.get("file_name", image["id"])
            if tested.setdefault(name, index) != index:
                raise ValueError(
                    f"{name} is tested in fold {tested[name]} and again in fold {index} "
                    f"({_where(run)}): the folds are not of one cross-validation, or one is "
                    "given twice."
                )


def _config_remarks(label, runs):
    """[what differs between the configs of the runs of one model]."""
    flat = [flat_config(run.config) for run in runs if run.config]
    keys = dict.fromkeys(key for config in flat for key in config)
    differing = [
        key
        for key in keys
        if not any(key == of or key.startswith(f"{of}.") for of in OF_A_RUN)
        and any(config.get(key) != flat[0].get(key) for config in flat)
    ]
    if not differing:
        return []
    remark = (
        f"The runs of {label} differ in more than seed and fold: {', '.join(differing)}. Name "
        "them apart (NAME=PATH) unless that is meant."
    )
    logger.warning(remark)
    return [remark]


def flat_config(config, prefix=""):
    """dict: of nested dicts one, such as {"MODEL.MASK_ON": value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flat_config(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class Test:
    """
    One difference between two models.

    Attributes:
        first, second: labels of the models.
        endpoint: "group/metric".
        estimate, low, high: first minus second, with its 95 % interval.
        p: two-sided.
        p_holm: adjusted by Holm's method; NaN for the primary endpoint.
        primary: the one endpoint that is not adjusted.
        test: its name.
        undefined_share: of the resamples, left out.
    """

    first: str
    second: str
    endpoint: str
    estimate: float
    low: float
    high: float
    p: float
    p_holm: float
    primary: bool
    test: str
    undefined_share: float


def _pairs(labels, baseline):
    """The pairs to compare, the later of the two given first: it is the newer model."""
    if baseline is None or baseline not in labels:
        return [(b, a) for a, b in combinations(labels, 2)]
    return [(label, baseline) for label in labels if label != baseline]


def _endpoints(primary, endpoints, has):
    """The primary endpoint and those of ``endpoints`` for which ``has(group, metric)``."""
    chosen = dict.fromkeys([primary, *endpoints])
    return [endpoint for endpoint in chosen if has(*endpoint.split("/", 1))]


def bootstrap_tests(
    split: dict[str, list[Run]],
    models: dict[str, ModelMetrics],
    primary: str,
    baseline: str | None,
    endpoints: Sequence[str] = ENDPOINTS,
) -> list[Test]:
    """
    Paired bootstrap of the endpoints, and McNemar's test at image level, for each pair of models;
    runs and metrics are by label. ``primary`` and ``baseline`` are as for :func:`compare`.
    """
    tests = []
    for first, second in _pairs(list(models), baseline):
        pair = models[first], models[second]

        def has(group, metric, pair=pair):
            return all(
                metric in model.resampled.get(group, ())
                and not math.isnan(model.values[group][metric])
                for model in pair
            )

        for endpoint in _endpoints(primary, endpoints, has):
            difference = paired_difference(*pair, *endpoint.split("/", 1))
            tests.append(_test(first, second, endpoint, difference, "paired bootstrap", primary))
        results = [[run.results for run in split[label]] for label in (first, second)]
        for prefix in ("", "tau_val."):
            outcome = image_level_test(*results, tau_val=bool(prefix))
            if outcome is not None:
                classifiers = "recognition" in pair[0].values
                endpoint = "recognition/top1" if classifiers else f"{prefix}image/accuracy"
                difference = paired_difference(*pair, *endpoint.split("/", 1))
                name = f"McNemar's exact, {outcome.only_first} : {outcome.only_second}"
                test = _test(first, second, endpoint, difference, name, primary)
                tests.append(replace(test, p=outcome.p))
    return _adjusted(tests)


def fold_tests(
    folds: dict[str, list[ModelMetrics]],
    n_train: float,
    n_test: float,
    primary: str,
    baseline: str | None,
    endpoints: Sequence[str] = ENDPOINTS,
) -> list[Test]:
    """
    Corrected resampled t-test of the endpoints that are defined in every fold, for each pair of
    models. ``n_train`` and ``n_test`` are the images of a fold for training and for testing.
    """
    tests = []
    for first, second in _pairs(list(folds), baseline):

        def of_folds(group, metric, pair=(first, second)):
            """(2, k) values of the two models; NaN where a fold has none."""
            return np.array(
                [
                    [fold.values.get(group, {}).get(metric, np.nan) for fold in folds[label]]
                    for label in pair
                ]
            )

        def has(group, metric, of_folds=of_folds):
            return np.isfinite(of_folds(group, metric)).all()

        for endpoint in _endpoints(primary, endpoints, has):
            one, two = of_folds(*endpoint.split("/", 1))
            difference = corrected_resampled_t_test(one - two, n_train, n_test)
            name = "corrected resampled t-test"
            tests.append(_test(first, second, endpoint, difference, name, primary))
    return _adjusted(tests)


def _test(first, second, endpoint, difference, name, primary):
    return Test(
        first=first,
        second=second,
        endpoint=endpoint,
        **asdict(difference),
        p_holm=math.nan,
        primary=endpoint == primary,
        test=name,
    )


def _adjusted(tests):
    """All but those of the primary endpoint are one family of tests."""
    family = [test for test in tests if not test.primary]
    adjusted = iter(holm([test.p for test in family]))
    return [test if test.primary else replace(test, p_holm=float(next(adjusted))) for test in tests]


@dataclass(frozen=True, eq=False)
class Comparison:
    """
    Attributes:
        gathered: the runs.
        models: on one split, by label; empty without such runs.
        folds: of a cross-validation, one per fold.
        tests, fold_tests: the differences.
        n_train, n_test: images that a fold's models were trained on (without those for validation)
            and tested on, means over the folds.
        primary: the primary endpoint, "group/metric".
        settings: thresholds, and the bootstrap's.
        remarks: what a reader must know.
    """

    gathered: Gathered
    models: dict[str, ModelMetrics]
    folds: dict[str, list[ModelMetrics]]
    tests: list[Test]
    fold_tests: list[Test]
    n_train: float | None
    n_test: float | None
    primary: str
    settings: dict
    remarks: list[str]

    @property
    def runs(self) -> list[tuple[str, Run]]:
        """Label and run, of all runs."""
        split = [(label, run) for label, runs in self.gathered.split.items() for run in runs]
        return split + [
            (label, run)
            for label, folds in self.gathered.folds.items()
            for runs in folds
            for run in runs
        ]

    @property
    def dataset(self) -> str | None:
        """The name of the (first) test set."""
        return self.runs[0][1].dataset

    @property
    def task(self) -> str:
        """ "lesions" or "recognition"."""
        return self.runs[0][1].task

    @property
    def clustered(self) -> bool:
        """Some patient has several images."""
        metrics = next(iter(self.models.values())).metrics
        return metrics.unit == "patient" and metrics.num_units < len(metrics.unit_of_image)


def compare(
    gathered: Gathered,
    bootstrap: Bootstrap,
    *,
    primary: str | None = None,
    baseline: str | None = None,
) -> Comparison:
    """
    Score all runs again, resample and test.

    Args:
        primary: the primary endpoint, "group/metric"; None for that of PRIMARY.
        baseline: label of the model that all others are compared with; None for all pairs.

    Raises:
        ValueError: test sets that differ, an unknown endpoint or baseline.
    """
    labels = list(dict.fromkeys([*gathered.split, *gathered.folds]))
    if baseline is not None and baseline not in labels:
        raise ValueError(f"There is no model {baseline!r} among {', '.join(labels)}.")
    runs = [run for seeds in gathered.split.values() for run in seeds]
    every = runs + [run for own in gathered.folds.values() for seeds in own for run in seeds]
    task, meta = every[0].task, every[0].results.meta
    check = check_same_units if task == "lesions" else check_same_images
    for run in tqdm(runs, desc="Scoring", delay=2):
        check(runs[0].results, run.results, (str(runs[0].folder), str(run.folder)))
    models = {
        label: model_figures([run.results for run in seeds], bootstrap)
        for label, seeds in gathered.split.items()
    }
    folds = {
        label: [
            model_figures([run.results for run in seeds])
            for seeds in tqdm(own, desc=f"Folds of {label}", delay=2)
        ]
        for label, own in gathered.folds.items()
    }
    endpoints = endpoints_of(task, meta["classes"], meta.get("cancer_classes", ()))
    primary = primary or PRIMARY[task]
    _check_primary(primary, models, folds, endpoints)
    n_train, n_test = _sizes(gathered.folds)
    keys = ("tau", "iou_threshold", "iou_type", "classes", "cancer_classes")
    settings = {key: meta[key] for key in keys if key in meta}
    settings.update(asdict(bootstrap), primary=primary, baseline=baseline)
    if models:
        settings["unit"] = next(iter(models.values())).metrics.unit
    return Comparison(
        gathered=gathered,
        models=models,
        folds=folds,
        tests=bootstrap_tests(gathered.split, models, primary, baseline, endpoints),
        fold_tests=(
            fold_tests(folds, n_train, n_test, primary, baseline, endpoints) if n_train else []
        ),
        n_train=n_train,
        n_test=n_test,
        primary=primary,
        settings=settings,
        remarks=[
            *gathered.remarks,
            *(remark for run in every for remark in run.remarks),
            *(_gaps(models, folds, primary) if task == "lesions" else []),
            *_unknown(every, bool(folds) and n_train is None),
        ],
    )


def _check_primary(primary, models, folds, endpoints):
    group, _, metric = primary.partition("/")
    available = [model.resampled for model in models.values()]
    available += [fold.values for model in folds.values() for fold in model]
    if all(metric in groups.get(group, ()) for groups in available):
        return
    raise ValueError(
        f"The primary endpoint {primary!r} is not among the metrics that are resampled. Give "
        f"GROUP/METRIC as metrics.json has them, such as {', '.join(endpoints)}; COCO's AP, AP75, "
        "APs, APm and APl need --ci-all."
    )


def _sizes(folds):
    """Images that a fold's models were trained on, and tested on: means over the folds."""
    if not folds:
        return None, None
    runs = [seeds[0] for seeds in next(iter(folds.values()))]
    n_train = [training_images(run) for run in runs]
    n_test = float(np.mean([run.results.meta["images"] for run in runs]))
    return (None if None in n_train else float(np.mean(n_train))), n_test


def _gaps(models, folds, primary):
    """[remarks on models that lack what is to be tested, or what others have]."""
    group, _, metric = primary.partition("/")
    every = [*((label, [model]) for label, model in models.items()), *folds.items()]
    undefined = [k for k, seeds in every if any(math.isnan(m.values[group][metric]) for m in seeds)]
    without_point = [k for k, seeds in every if any(None in m.taus for m in seeds)]
    remarks = []
    if undefined:
        remarks.append(
            f"The primary endpoint {primary} is undefined for {_listed(undefined)}: choose "
            "--primary bbox/AP50_voc where there are boxes only, or lesion/iou without scores."
        )
    if without_point:
        remarks.append(
            f"No operating point of its own (tau_val): {_listed(without_point)}. Evaluate again "
            "with tools/train_net.py --eval-only, or with tools/evaluate.py --tau-from."
        )
    return remarks


def _listed(labels):
    return ", ".join(dict.fromkeys(labels))


def _unknown(runs, sizes):
    """[remarks on what no file records]; ``sizes``: of the folds' training sets are missing."""
    remarks = []
    old = [str(run.run_folder or run.folder) for run in runs if run.run is None]
    if old:
        remarks.append(
            f"Without run.json, so of unknown model, seed and fold: {', '.join(old)}. They go by "
            "the name given (NAME=PATH) or the folder's."
        )
    if sizes:
        remarks.append(
            "How many images the folds' models were trained on is not known (no run.json, no "
            "train.json next to the test set): the differences over folds are not tested."
        )
    return remarks
