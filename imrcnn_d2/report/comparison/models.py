"""The values of a comparison: every model's metrics, and which of them differ."""

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations

import numpy as np

from imrcnn_d2.evaluation import model_figures, paired_difference
from imrcnn_d2.evaluation.comparison import (
    Difference,
    ModelMetrics,
    equivalence,
    fold_difference,
    holm,
    image_level_test,
    non_inferiority,
)
from imrcnn_d2.evaluation.detection.metrics import less_is_better, without_masks
from imrcnn_d2.evaluation.detection.operating_point import DEFAULT_TAU, score_threshold
from imrcnn_d2.evaluation.output import read_coco_records
from imrcnn_d2.evaluation.statistics import FEW, Bootstrap
from imrcnn_d2.report.runs import Run
from imrcnn_d2.task import Task
from imrcnn_d2.utils.files import file_sha256
from imrcnn_d2.utils.progress import tqdm

logger = logging.getLogger(__name__)
NAN = math.nan


# Config keys that may differ between the runs of one model.
OF_A_RUN = ("SEED", "OUTPUT_DIR", "DATASETS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
SETTINGS = ("tau", "iou_threshold", "iou_type")


@dataclass(frozen=True, eq=False)
class Gathered:
    """Runs that can be compared, by the label of their model; lists of runs differ by seed."""

    split: dict[str, list[Run]]  # on one test set
    folds: dict[str, list[list[Run]]]  # of a cross-validation, for each fold
    remarks: list[str]  # what a reader of the comparison must know

    @property
    def runs(self) -> list[tuple[str, Run]]:
        """Label and run, of all runs."""
        split = [(label, run) for label, runs in self.split.items() for run in runs]
        folds = [(label, run) for label, f in self.folds.items() for runs in f for run in runs]
        return split + folds

    def threshold(self, label: str | None = None) -> str:
        """The common score threshold of the runs of one model, else of all; "0.5 of mapped scores,
        0.7 of raw scores" where each is at the default of its kind of scores."""
        runs = [run for name, run in self.runs if label in (None, name)]
        taus = {f"{run.meta['tau']:.3g} of {_kind_of_scores(run)} scores": run for run in runs}
        if len({run.meta["tau"] for run in taus.values()}) == 1:
            return f"{runs[0].meta['tau']:.3g}"
        return ", ".join(sorted(taus))


def gather(runs: list[Run]) -> Gathered:
    """Group runs by the label given, else by model and backbone; check that they are comparable.

    Raises:
        ValueError: different test sets or settings, a fold missing, or two runs of one label that
            are of different models, or of the same seed and fold.
    """
    models = _models(runs)
    split, folds = {}, {}
    for label, members in models.items():
        if single := [run for run in members if run.fold is None]:
            split[label] = _seeds(label, single)
        if len(single) < len(members):
            folds[label] = _folds(label, [run for run in members if run.fold is not None])
    check_settings(runs, allow_defaults=True)
    check_test_sets(run for members in split.values() for run in members)
    _check_folds(folds)
    remarks = [remark for item in models.items() for remark in _config_remarks(*item)]
    if left_out := {run.record.get("left_out") for run in runs if run.fold} - {None}:
        remarks.append(
            f"Each fold leaves out a part of the data of its own ({', '.join(sorted(left_out))}): "
            "± over folds is mostly how these differ, and the t-test, which is for random folds of "
            "one size, is approximate."
        )
    return Gathered(split, folds, remarks)


def training_images(run: Run) -> int | None:
    """Images that a run was trained on, those for validation left out, from run.json or else from
    the train.json next to the test set. None where neither has it.
    """
    if sets := run.record.get("datasets"):
        names = run.settings.get("DATASETS.TRAIN") or list(sets)[:1]
        return sum(facts["images"] for name, facts in sets.items() if name in names) or None
    training = run.gt_path.with_name("train.json")
    if training.is_file() and training != run.gt_path:
        return len(read_coco_records(training)["images"]) or None
    return None


def _models(runs):
    """Runs by label, in the order given."""
    groups, keys = {}, {}
    for run in runs:
        key = run.name if run.labelled else (run.model, run.backbone)
        label = run.name if run.labelled else run.model
        several = len({other.backbone for other in runs if other.model == run.model}) > 1
        if not run.labelled and run.backbone and several:
            label = f"{run.model} {run.backbone}"
        if keys.setdefault(label, key) != key:
            raise ValueError(
                f"{groups[label][0].path} and {run.path} would both be named {label!r}: give one "
                "of them another NAME=PATH."
            )
        groups.setdefault(label, []).append(run)
    return groups


def _seeds(label, runs):
    """The runs of one model on one test set, by seed."""
    by_seed = {}
    for run in runs:
        first = by_seed.setdefault(run.seed, run)
        if first is not run:
            fold = f" of fold {run.fold['index']}" if run.fold else ""
            seed = "no known seed" if run.seed is None else f"seed {run.seed}"
            raise ValueError(
                f"{first.path} and {run.path} are both {label}{fold} with {seed}: give each once, "
                "or different models different names (NAME=PATH)."
            )
    return [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: (seed is None, seed or 0))]


def _folds(label, runs):
    """The runs of each fold."""
    number, by_index = runs[0].fold["of"], {}
    for run in runs:
        if run.fold["of"] != number:
            raise ValueError(
                f"{runs[0].path} is one of {number} folds, {run.path} one of {run.fold['of']}: "
                "compare runs of one cross-validation."
            )
        by_index.setdefault(run.fold["index"], []).append(run)
    missing = sorted(set(range(number)) - by_index.keys())
    if missing:
        raise ValueError(
            f"{label} lacks fold {', '.join(map(str, missing))} of {number}: train it, or leave "
            f"{label} out."
        )
    return [_seeds(label, by_index[index]) for index in sorted(by_index)]


def check_settings(runs: list[Run], *, allow_defaults: bool = False):
    """Raise ValueError for runs of different tasks, or with different thresholds. With
    ``allow_defaults`` the default of mapped scores and that of raw ones go together: a short
    training may have no map in one fold alone."""
    first, checked = runs[0], SETTINGS
    defaults = [score_threshold(DEFAULT_TAU, run.maps_scores) for run in runs]
    if allow_defaults and defaults == [run.meta.get("tau") for run in runs]:
        checked = SETTINGS[1:]
    for run in runs[1:]:
        pairs = {key: (first.meta.get(key), run.meta.get(key)) for key in checked}
        for key, (a, b) in {"task": (first.task.name, run.task.name), **pairs}.items():
            if a == b:
                continue
            remedy = "evaluate one of them again."
            if key in SETTINGS:
                option = f"--{key.replace('iou_threshold', 'iou').replace('_', '-')}"
                remedy = f"evaluate one of them again (imrcnn evaluate {option})."
            if key == "tau" and first.maps_scores != run.maps_scores:
                a, b = (f"{r.meta['tau']} of {_kind_of_scores(r)} scores" for r in (first, run))
                remedy += " Then trust what has no threshold, or is at tau_val: a mapped score is "
                remedy += "the probability of a hit, a raw one is not."
            raise ValueError(
                f"{first.path} was evaluated with {key} {a}, {run.path} with {b}: {remedy}"
            )


def _kind_of_scores(run):
    return "mapped" if run.maps_scores else "raw"


def check_test_sets(runs: Iterable[Run]):
    """Raise ValueError for runs whose ground truths differ."""
    hashes = {}
    for run in runs:
        hashes[run] = run.meta.get("gt_sha256") or file_sha256(run.gt_path)
        first = next(iter(hashes))
        if hashes[first] != hashes[run]:
            raise ValueError(
                f"{first.path} ({first.gt_path}) and {run.path} ({run.gt_path}) were evaluated on "
                "different test sets: give runs on one, or evaluate one of these again."
            )


def _check_folds(folds):
    """Every model has the same folds, and no image is tested in two of them."""
    first, *others = folds or [None]
    for label in others:
        if len(folds[first]) != len(folds[label]):
            raise ValueError(
                f"{first} has {len(folds[first])} folds, {label} has {len(folds[label])}: compare "
                "models on the same folds."
            )
    tested = {}
    for index, runs in enumerate(zip(*folds.values(), strict=True)):
        check_test_sets(run for seeds in runs for run in seeds)
        run = runs[0][0]
        for image in run.results.ground_truth.images:
            name = image.get("file_name", image["id"])
            if tested.setdefault(name, index) != index:
                raise ValueError(
                    f"{name} is tested in fold {tested[name]} and again in fold {index} "
                    f"({run.path}): the folds are not of one cross-validation, or one is given "
                    "twice."
                )


def _config_remarks(label, runs):
    """A remark if the configs of the runs of one model differ."""
    configs = [run.settings for run in runs if run.config]
    differing = [
        key
        for key in dict.fromkeys(key for config in configs for key in config)
        if not f"{key}.".startswith(tuple(f"{name}." for name in OF_A_RUN))
        and any(config.get(key) != configs[0].get(key) for config in configs)
    ]
    if not differing:
        return []
    remark = (
        f"The runs of {label} differ in more than seed and fold: {', '.join(differing)}. Name "
        "them apart (NAME=PATH) unless that is meant."
    )
    logger.warning(remark)
    return [remark]


@dataclass(frozen=True, kw_only=True)
class Test(Difference):
    """A test of the difference between two models: first minus second."""

    first: str  # label of a model
    second: str
    endpoint: str  # "group/metric"
    test: str  # how it was tested, for readers
    # What a small p shows: a "difference", or with a margin "non-inferiority" of the first model,
    # or "equivalence"; the interval is of 90 % for these two, which are one-sided.
    shows: str = "difference"
    p_holm: float = NAN  # adjusted by Holm's method; NaN for the primary comparison
    primary: bool = False  # of the pair and endpoint that were named beforehand

    @property
    def judged_p(self) -> float:
        """The p-value to compare with 0.05."""
        return self.p if self.primary else self.p_holm


@dataclass(frozen=True, eq=False)
class Comparison:
    """The metrics of models, by their labels, and how they differ."""

    gathered: Gathered
    models: dict[str, ModelMetrics]  # on one split
    folds: dict[str, list[ModelMetrics]]  # of a cross-validation, for each fold
    tests: list[Test]
    fold_tests: list[Test]  # one family with ``tests``: all but the primary one are adjusted
    n_train: float | None  # images that a fold's models were trained on, without those for
    n_test: float | None  # validation, and tested on: means over the folds
    settings: dict  # thresholds, the primary endpoint, and the bootstrap's
    remarks: list[str]  # what a reader must know

    @property
    def dataset(self) -> str:
        """The name of the (first) test set, see `Run.test_set`."""
        return self.gathered.runs[0][1].test_set

    @property
    def source(self) -> str | None:
        """What the annotations of the test set record as its data set, see `Run.source`."""
        return self.gathered.runs[0][1].source

    @property
    def task(self) -> Task:
        return self.gathered.runs[0][1].task

    @property
    def primary(self) -> str:
        """The primary endpoint, "group/metric"."""
        return self.settings["primary"]

    @property
    def family(self) -> int:
        """How many p-values are adjusted together."""
        return sum(math.isfinite(test.p_holm) for test in (*self.tests, *self.fold_tests))

    @property
    def seeds_of_folds(self) -> int | None:
        """How many runs each fold of each model has; None where that differs, or without folds."""
        numbers = {len(fold.runs) for folds in self.folds.values() for fold in folds}
        return numbers.pop() if len(numbers) == 1 else None

    @property
    def clustered(self) -> bool:
        """Some unit has several images."""
        metrics = next(iter(self.models.values())).metrics
        return metrics.num_units < len(metrics.unit_of_image)


def compare(
    gathered: Gathered,
    bootstrap: Bootstrap,
    *,
    primary: str | None = None,
    pair: str | None = None,
    baseline: str | None = None,
    margin: float | None = None,
    plan: float | None = None,
) -> Comparison:
    """Score all runs again, resample and test.

    Args:
        primary: the primary endpoint, "group/metric"; None for that of the task.
        pair: the two models whose difference of the primary endpoint, first minus second, is the
            primary comparison, "FIRST:SECOND" by their labels; None for the only pair. Without it,
            of several pairs none is.
        baseline: label of the model that all others are compared with; None for all pairs.
        margin: the smallest difference of the primary endpoint that would matter, in its unit;
            non-inferiority and equivalence are tested with it, and not without one.
        plan: a true difference of the primary endpoint, in its unit, for which `power_table` plans
            a further comparison.

    Raises:
        ValueError: test sets that differ, an unknown endpoint, pair or baseline, a margin or a
            planned difference that is not above 0, a plan without two models on one test set.
    """
    labels = list(dict.fromkeys([*gathered.split, *gathered.folds]))
    pairs, primary_pair = _pairs(labels, baseline, pair)
    for name, value in {"margin": margin, "planned difference": plan}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"The {name} is {value}: it must be above 0.")
    runs = [run for _, run in gathered.runs]
    task, meta = runs[0].task, runs[0].results.meta
    on_split = [run for seeds in gathered.split.values() for run in seeds]
    for run in tqdm(on_split, desc="Scoring", delay=2):
        runs[0].results.check_same_units(run.results, (str(runs[0].folder), str(run.folder)))
    models = {
        label: model_figures([run.results for run in seeds], bootstrap)
        for label, seeds in gathered.split.items()
    }
    folds = {
        label: [
            model_figures([run.results for run in seeds])
            for seeds in tqdm(of_label, desc=f"Folds of {label}", delay=2)
        ]
        for label, of_label in gathered.folds.items()
    }
    if primary is None:
        primary = task.primary
        if task.localises and not any(run.results.has_masks for run in runs):
            (primary,) = without_masks([primary])
    endpoints = task.endpoints(meta["classes"], meta.get("cancer_classes", ()))
    _check_primary(primary, models, folds, endpoints)
    endpoints = list(dict.fromkeys([primary, *endpoints]))
    n_train, n_test = _sizes(gathered.folds)
    keys = (*SETTINGS, "classes", "cancer_classes")
    settings = {key: meta[key] for key in keys if key in meta}
    if len({run.meta.get("tau") for run in runs}) > 1:
        settings["tau"] = None  # each run is at the default of its kind of scores
    settings.update(asdict(bootstrap), primary=primary, pair=primary_pair, baseline=baseline)
    settings.update(margin=margin, plan=plan)
    if models:
        settings["unit"] = next(iter(models.values())).metrics.units.kind
    tests, fold_tests = _split_tests(gathered.split, models, pairs, endpoints), []
    if n_train:
        fold_tests = _fold_tests(folds, (n_train, n_test), pairs, endpoints)
    if plan is not None and not of_primary(tests, primary):
        raise ValueError(
            f"There are no two models with {primary} on one test set, from whose spread a "
            "comparison could be planned: give such runs (not of folds)."
        )
    if margin is not None:
        tests += _margin_tests(tests, primary, margin)
        fold_tests += _margin_tests(fold_tests, primary, margin)
    tests, fold_tests = _adjusted(tests, fold_tests, primary_pair, primary)
    remarks = [*gathered.remarks, *(remark for run in runs for remark in run.remarks)]
    if task.localises:
        remarks += [*_mixed_scores(gathered), *_gaps(models, folds, primary)]
    remarks += [*_few_units(models), *_unknown(runs, bool(folds) and n_train is None)]
    return Comparison(
        gathered, models, folds, tests, fold_tests, n_train, n_test, settings, remarks
    )


def _check_primary(primary, models, folds, endpoints):
    group, _, metric = primary.partition("/")
    available = [groups for m in models.values() for groups in (m.resampled, m.values)]
    available += [fold.values for model in folds.values() for fold in model]
    if not all(metric in groups.get(group, ()) for groups in available):
        raise ValueError(
            f"The primary endpoint {primary!r} is not among the metrics that are resampled, such "
            f"as {', '.join(endpoints)}; COCO's AP, AP75, APs, APm and APl need --ci-all."
        )


def _sizes(folds):
    """Images that a fold's models were trained on, and tested on: means over the folds."""
    if not folds:
        return None, None
    runs = [seeds[0] for seeds in next(iter(folds.values()))]
    n_train = [training_images(run) for run in runs]
    n_test = float(np.mean([run.results.meta["images"] for run in runs]))
    return (None if None in n_train else float(np.mean(n_train))), n_test


def _pairs(labels, baseline, pair):
    """The pairs to compare, the later of the two given first: it is the newer model; and the one
    named beforehand, in its direction: ``pair``, else the only one, else None."""
    if baseline is not None and baseline not in labels:
        raise ValueError(f"There is no model {baseline!r} among {', '.join(labels)}.")
    pairs = [(b, a) for a, b in combinations(labels, 2)]
    if baseline is not None:
        pairs = [(label, baseline) for label in labels if label != baseline]
    if pair is None:
        return pairs, pairs[0] if len(pairs) == 1 else None
    for number, (a, b) in enumerate(pairs):
        if pair in (f"{a}:{b}", f"{b}:{a}"):
            pairs[number] = (a, b) if pair == f"{a}:{b}" else (b, a)
            return pairs, pairs[number]
    names = ", ".join(map(":".join, pairs)) or "none"
    raise ValueError(f"The primary pair {pair!r} is not among those that are compared: {names}.")


def _split_tests(split, models, pairs, endpoints):
    """Tests of the endpoints that both models have, and McNemar's test at image level, for each
    pair of models.
    """
    tests = []
    for pair in (pair for pair in pairs if models.keys() >= set(pair)):
        metrics, results = [models[k] for k in pair], [[r.results for r in split[k]] for k in pair]
        for endpoint in endpoints:
            group, metric = endpoint.split("/", 1)
            if all(_is_resampled(model, group, metric) for model in metrics):
                difference = paired_difference(*metrics, group, metric)
                sources = "images" if difference.of_checkpoints else "images, seeds"
                tests.append(_test(pair, endpoint, f"paired t ({sources})", difference))
        for prefix in ("", "tau_val."):
            outcome = image_level_test(*results, tau_val=bool(prefix))
            if outcome is not None:
                name = f"McNemar's exact, {outcome.only_first} : {outcome.only_second}"
                endpoint = "recognition/top1"
                if endpoint not in endpoints:
                    has_free = results[0][0].meta["lesion_free_images"]
                    endpoint = f"{prefix}image/{'accuracy' if has_free else 'recall'}"
                tests.append(_test(pair, endpoint, name, outcome))
    return tests


def _is_resampled(model, group, metric):
    return metric in model.resampled.get(group, ()) and not math.isnan(model.values[group][metric])


def _fold_tests(folds, sizes, pairs, endpoints):
    """Tests of the endpoints that are defined in every run of every fold, for each pair of models.
    ``sizes`` are the images of a fold for training and for testing.
    """
    tests = []
    for pair in (pair for pair in pairs if folds.keys() >= set(pair)):
        for endpoint in endpoints:
            group, metric = endpoint.split("/", 1)
            values = (
                [[run.get(group, {}).get(metric, NAN) for run in fold.runs] for fold in folds[k]]
                for k in pair
            )
            difference = fold_difference(*values, *sizes)
            if math.isfinite(difference.estimate):
                tests.append(_test(pair, endpoint, "corrected resampled t-test", difference))
    return tests


def _test(pair, endpoint, name, difference):
    parts = {field.name: getattr(difference, field.name) for field in fields(Difference)}
    return Test(**parts, first=pair[0], second=pair[1], endpoint=endpoint, test=name)


def of_primary(tests: list[Test], primary: str) -> list[Test]:
    """The difference of the primary endpoint of each pair. McNemar's test is not among them: that
    of the same metric precedes it."""
    by_pair = {}
    for test in tests:
        if test.endpoint == primary and test.shows == "difference":
            by_pair.setdefault((test.first, test.second), test)
    return list(by_pair.values())


def _margin_tests(tests, primary, margin):
    """Non-inferiority and equivalence of each pair by the primary endpoint."""
    added = []
    for test in of_primary(tests, primary):
        less = less_is_better(primary.partition("/")[2])
        better = replace(test, estimate=-test.estimate) if less else test
        low, high = test.interval(0.9)
        for shows, p in (
            ("non-inferiority", non_inferiority(better, margin)),
            ("equivalence", equivalence(test, margin)),
        ):
            name = f"{shows}, margin {margin:g}, 90 % interval"
            added.append(replace(test, shows=shows, test=name, p=p, low=low, high=high))
    return added


def _adjusted(tests, fold_tests, pair, endpoint):
    """Both lists with the primary comparison marked, on the same images where there is one, else
    over the folds; all other p-values are one family. What a margin adds to the primary comparison
    needs no adjustment: two models cannot be equal and differ by the margin, and equivalence is
    never shown without non-inferiority."""
    together, primary = [*tests, *fold_tests], {}
    for number, test in enumerate(together):
        if pair is not None and (test.first, test.second, test.endpoint) == (*pair, endpoint):
            primary.setdefault(test.shows, number)
    family = [number for number in range(len(together)) if number not in primary.values()]
    adjusted = dict(zip(family, holm([together[number].p for number in family]), strict=True))
    judged = [
        replace(test, p_holm=float(adjusted.get(n, NAN)), primary=n not in adjusted)
        for n, test in enumerate(together)
    ]
    return judged[: len(tests)], judged[len(tests) :]


def _gaps(models, folds, primary):
    """Remarks on models without the primary endpoint, or without an operating point."""
    group, _, metric = primary.partition("/")
    labels = dict.fromkeys([*models, *folds])
    members = {k: [*folds.get(k, ()), *([models[k]] if k in models else [])] for k in labels}
    undefined = [k for k in labels if any(math.isnan(m.values[group][metric]) for m in members[k])]
    without_point = [k for k in labels if any(None in m.taus for m in members[k])]
    remarks = []
    if undefined:
        remarks.append(
            f"The primary endpoint {primary} is undefined for {', '.join(undefined)}: choose "
            "--primary bbox/AP50_voc where there are boxes only, or lesion/iou without scores."
        )
    if without_point:
        remarks.append(
            f"No operating point of its own (tau_val): {', '.join(without_point)}. Evaluate again "
            "with imrcnn train --eval-only, or with imrcnn evaluate --tau-from."
        )
    return remarks


def _mixed_scores(gathered):
    """A remark where the scores of some runs only are mapped to probabilities."""
    texts = {}
    for kind in ("mapped", "raw"):
        runs = [(label, run) for label, run in gathered.runs if _kind_of_scores(run) == kind]
        if not runs:
            return []
        numbers = Counter(label for label, _ in runs)
        totals = Counter(label for label, _ in gathered.runs)
        models = [label for label, number in numbers.items() if number == totals[label]]
        models += [
            f"{number} of {totals[label]} runs of {label}"
            for label, number in numbers.items()
            if number < totals[label]
        ]
        texts[kind] = " and ".join(models), runs[0][1].meta["tau"]
    (mapped, tau), (raw, raw_tau) = texts.values()
    return [
        f"The scores are mapped to probabilities of a hit in {mapped} (threshold {tau:.3g}), but "
        f"not in {raw} (threshold {raw_tau:.3g} of raw scores): these thresholds mean different "
        "things. AP, AUROC and values at tau_val can be compared."
    ]


def _few_units(models):
    """A remark on a small test set."""
    for metrics in (model.metrics for model in models.values()):
        if metrics.num_units < FEW:
            return [
                f"There are only {metrics.units}: intervals and p-values are approximate below "
                f"{FEW}."
            ]
    return []


def _unknown(runs, sizes):
    """Remarks on what no file records; ``sizes``: of the folds' training sets are missing."""
    remarks = []
    if old := [str(run.path) for run in runs if not run.record]:
        remarks.append(
            f"Without run.json, so of unknown training, seed and fold: {', '.join(old)}. They go "
            "by the name given (NAME=PATH) or the folder's."
        )
    if sizes:
        remarks.append(
            "How many images the folds' models were trained on is not known (no run.json, no "
            "train.json next to the test set): the differences over folds are not tested."
        )
    return remarks
