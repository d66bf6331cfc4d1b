"""The analysis that PROTOCOL.md registers, on records."""

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from records import ENDPOINTS, Record
from scipy import stats

from imrcnn_d2.evaluation.comparison import (
    Difference,
    difference_by_t,
    difference_from_parts,
    equivalence,
    fold_difference,
    holm,
)
from imrcnn_d2.evaluation.statistics import Bootstrap, bootstrap_se, resampled_metrics
from imrcnn_d2.report.names import published_values

# Configs of the arms, the paper's in the order that it claims.
PAPER = {"mrcnn_lite": "MR-CNN", "ibmrcnn_lite": "IBMR-CNN", "imrcnn_lite": "IMR-CNN"}
ARMS = {**PAPER, "imrcnn_lite_residual": "IMR-CNN, residual"}
PAIRS = (
    ("imrcnn_lite", "mrcnn_lite"),
    ("ibmrcnn_lite", "mrcnn_lite"),
    ("imrcnn_lite", "ibmrcnn_lite"),
)
OURS = (("imrcnn_lite_residual", "mrcnn_lite"), ("imrcnn_lite_residual", "imrcnn_lite"))
PRIMARY = ("imrcnn_lite", "mrcnn_lite", "AP50_voc")
FOLDS, LEAST_SEEDS, MOST_SEEDS = 5, 2, 5
MINIMUM = len(PAPER) * FOLDS * LEAST_SEEDS
MARGINS = (1.0, 1.8)
LEVEL = 0.05
# Endpoint -> what the paper's table 3 has in its place.
_PUBLISHED = {"AP50_voc": "segm/AP50_voc", "IoU": "lesion/iou"}


class Mixed:
    """metric ~ arm + (1 | fold) + (1 | fold:arm), seeds as residual, of (A, K, N) values: arms,
    folds and seeds, two or more of each. The closed solution of a balanced design.

    Attributes:
        cells: (A, K) means over seeds.
        ms_cell, ms_seed: mean squares of fold:arm and of seeds.
        df: degrees of freedom of ms_cell.
    """

    def __init__(self, values: np.ndarray):
        arms, folds, self.seeds = values.shape
        self.cells, self.df = values.mean(axis=2), (arms - 1) * (folds - 1)
        centred = self.cells - self.cells.mean(axis=0) - self.cells.mean(axis=1, keepdims=True)
        self.ms_cell = self.seeds * ((centred + values.mean()) ** 2).sum() / self.df
        self.ms_seed = values.var(axis=2, ddof=1).mean()

    @property
    def seed_variance(self) -> float:
        return float(self.ms_seed)

    @property
    def cell_variance(self) -> float:
        return float(max(0.0, (self.ms_cell - self.ms_seed) / self.seeds))

    def difference(self, first: int, second: int) -> Difference:
        """Of two arms by their places, with Student's t."""
        se = math.sqrt(2 * self.ms_cell / (self.cells.shape[1] * self.seeds))
        means = self.cells.mean(axis=1)
        return difference_by_t(means[first] - means[second], se, self.df)


def power(se: float, df: float, effect: float) -> float:
    """Probability in [0, 1] that a two-sided t-test at 5 % finds a true difference, ``effect``."""
    t = stats.t.isf(LEVEL / 2, df)
    return float(stats.nct.sf(t, df, effect / se) + stats.nct.cdf(-t, df, effect / se))


def power_of_equivalence(se: float, df: float, margin: float) -> float:
    """Probability in [0, 1] that two one-sided tests at 5 % show a difference within ± ``margin``
    where the truth is 0: over the chi-squared distribution of the estimated variance."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    estimated = se * np.sqrt(stats.chi2.ppf((1 + nodes) / 2, df) / df)
    room = (margin - stats.t.isf(LEVEL, df) * estimated) / se
    shown = np.where(room > 0, 2 * stats.norm.cdf(room) - 1, 0)
    return float(weights @ shown / 2)


def verdict(difference: Difference, p: float, published: float) -> str:
    """What a test, whose ``p`` is adjusted, says of a published advantage."""
    high = difference.interval(1 - 2 * LEVEL)[1]
    if difference.estimate > 0 and p < LEVEL:
        return "held" if high >= published else "held, but smaller"
    return "not held" if high < published else "undecided"


@dataclass(frozen=True)
class Test:
    """A pair of arms and an endpoint."""

    first: str
    second: str
    endpoint: str
    difference: Difference  # of the mixed model
    p: float  # adjusted by Holm's method, but for the primary test and those of OURS
    by_folds: Difference  # Nadeau and Bengio's
    se_images: float
    published: float | None  # the advantage in the paper

    @property
    def primary(self) -> bool:
        return (self.first, self.second, self.endpoint) == PRIMARY

    @property
    def verdict(self) -> str:
        if self.published is None:
            return ""
        return verdict(self.difference, self.p, self.published)

    def equivalence(self, margin: float) -> float:
        """p of two one-sided tests."""
        return equivalence(self.difference, margin)

    def power(self, effect: float) -> float:
        return power(self.difference.se, self.difference.df, effect)

    def power_of_equivalence(self, margin: float) -> float:
        return power_of_equivalence(self.difference.se, self.difference.df, margin)


def resampled_means(records: list[Record], bootstrap_seed: int = 0) -> dict[str, np.ndarray]:
    """Endpoint -> (B,) means over records of runs on the same images."""
    bootstrap = Bootstrap(seed=bootstrap_seed)
    values = [resampled_metrics(record.metrics, bootstrap) for record in records]
    return {
        endpoint: np.mean([run[group][key] for run in values], axis=0)
        for endpoint, (group, key) in ENDPOINTS.items()
    }


class Study:
    """The records in a folder: CONFIG/foldK_seedS.json.gz; length/ with longer trainings,
    polypgen/ with the runs of fold 0 in other hospitals, placement/ with attention elsewhere.

    Attributes:
        records: by config, in the order of ARMS, fold and seed.
        longer: of the longer trainings, by config.
        hospitals: by centre and config, of each seed.
        placements: by where attention is, of each seed.
    """

    def __init__(self, folder: Path):
        records = {}
        for config in ARMS:
            for path in sorted((folder / config).glob("fold*_seed*.json.gz")):
                record = Record.read(path)
                records[config, record.content["fold"], record.content["seed"]] = record
        self.records = records
        paths = (folder / "length").glob("*/fold0_seed0.json.gz")
        self.longer = {path.parent.name: Record.read(path) for path in sorted(paths)}
        self.hospitals, self.placements = defaultdict(dict), {}
        for config in ARMS:
            for path in sorted((folder / "polypgen" / config).glob("*_seed*.json.gz")):
                record = Record.read(path)
                self.hospitals[record.content["centre"]].setdefault(config, []).append(record)
        for path in sorted((folder / "placement").glob("*/imrcnn_lite/fold0_seed*.json.gz")):
            self.placements.setdefault(path.parts[-3], []).append(Record.read(path))
        more = [*self.placements.values()]
        more += [runs for configs in self.hospitals.values() for runs in configs.values()]
        everything = chain(records.values(), self.longer.values(), *more)
        states = [record.content["git"] for record in everything]
        if len({str(state) for state in states}) > 1 or any(state["dirty"] for state in states):
            raise ValueError(f"{folder}: runs of several commits, or of changed files: {states}")
        keys = "fold", "splits_sha256", "gt_sha256"
        splits = {tuple(record.content[key] for key in keys) for record in records.values()}
        if len(splits) > len({fold for fold, *_ in splits}):
            raise ValueError(f"{folder}: runs of one fold with other images: {sorted(splits)}")
        self._values = cache(lambda *key: self.records[key].values)
        self._resampled = cache(self._resample)
        self._in_hospital = cache(lambda *key: resampled_means(self.hospitals[key[0]][key[1]]))

    @property
    def runs_of_minimum(self) -> int:
        """Finished runs of the MINIMUM."""
        return sum(arm in PAPER and seed < LEAST_SEEDS for arm, _, seed in self.records)

    @cached_property
    def seeds(self) -> int:
        """How many seeds, from 0 on, all folds of the paper's arms have."""
        return self._common_seeds(PAPER)

    def _common_seeds(self, arms):
        seeds = 0
        while all((arm, fold, seeds) in self.records for arm in arms for fold in range(FOLDS)):
            seeds += 1
        return seeds

    @property
    def complete(self) -> bool:
        return self.seeds >= LEAST_SEEDS

    @cached_property
    def arms(self) -> list[str]:
        """The arms of the analysis."""
        return [*ARMS] if self._common_seeds(ARMS) >= self.seeds else [*PAPER]

    def mixed(self, endpoint: str) -> Mixed:
        return Mixed(np.array([self._cells(arm, endpoint) for arm in self.arms]))

    def _cells(self, arm, endpoint):
        """A list of seeds for each fold."""
        seeds = range(self.seeds)
        return [[self._values(arm, k, s)[endpoint] for s in seeds] for k in range(FOLDS)]

    def _resample(self, arm, fold, seeds):
        """{endpoint: (B,) means over the seeds}; the same resamples for all arms."""
        return resampled_means([self.records[arm, fold, seed] for seed in range(seeds)], fold)

    def se_images(self, first, second, endpoint, folds=range(FOLDS), seeds=None) -> float:
        """Standard error of the difference over clusters of images, which are resampled within
        folds."""
        seeds, differences = seeds or self.seeds, []
        for fold in folds:
            pair = (self._resampled(arm, fold, seeds)[endpoint] for arm in (first, second))
            differences.append(np.subtract(*pair))
        units = sum(self.records[first, fold, 0].metrics.num_units for fold in folds)
        differences = np.mean(differences, axis=0)
        return bootstrap_se(differences[np.isfinite(differences)], units)

    @cached_property
    def tests(self) -> list[Test]:
        """The primary test, the others of the paper's pairs, then those of the residual arm."""
        planned = [(*pair, endpoint) for endpoint in ENDPOINTS for pair in PAIRS]
        if len(self.arms) == len(ARMS):
            planned += [(*pair, endpoint) for endpoint in ENDPOINTS for pair in OURS]
        values = {(row.model, row.figure): row.value for row in published_values("kvasir_seg", "3")}
        parts = [self._test(*key, values) for key in planned]
        p = {key: difference.p for key, (difference, *_) in zip(planned, parts, strict=True)}
        family = [key for key in planned if key != PRIMARY and key[:2] in PAIRS]
        p |= zip(family, map(float, holm([p[key] for key in family])), strict=True)
        return [
            Test(*key, difference, p[key], *rest)
            for key, (difference, *rest) in zip(planned, parts, strict=True)
        ]

    def _test(self, first, second, endpoint, values):
        mixed = self.mixed(endpoint)
        places = self.arms.index(first), self.arms.index(second)
        cells = [self._cells(arm, endpoint) for arm in (first, second)]
        records = [self.records[first, fold, 0].content for fold in range(FOLDS)]
        sizes = (
            np.mean([record["train_images"] for record in records]),
            np.mean([len(record["images"]) for record in records]),
        )
        published = None
        if (name := _PUBLISHED.get(endpoint)) and (first, second) in PAIRS:
            published = round(values[ARMS[first], name] - values[ARMS[second], name], 1)
        return (
            mixed.difference(*places),
            fold_difference(*cells, *sizes),
            self.se_images(first, second, endpoint),
            published,
        )

    @property
    def trend(self) -> float:
        """p of Page's test of the paper's order, one-sided, with folds as blocks."""
        places = [self.arms.index(arm) for arm in PAPER]
        return float(stats.page_trend_test(self.mixed("AP50_voc").cells[places].T).pvalue)

    @cached_property
    def seeds_needed(self) -> tuple[float, float, int] | None:
        """After fold 0: standard deviation over seeds, standard error over images, and the number
        of seeds by the protocol's rule; None before."""
        values = []
        for arm in PAPER:
            if not all((arm, 0, seed) in self.records for seed in range(3)):
                return None
            values.append([self._values(arm, 0, seed)["AP50_voc"] for seed in range(3)])
        variance = float(np.var(values, axis=1, ddof=1).mean())
        se = self.se_images(*PRIMARY, folds=[0], seeds=3)
        number = math.ceil(2 * variance / se**2)
        return math.sqrt(variance), se, min(max(number, LEAST_SEEDS), MOST_SEEDS)

    @property
    def gain_of_length(self) -> float | None:
        """Mean over two arms of how much validation AP50_voc a longer training adds; None before
        its runs are there."""
        gains = []
        for arm in ("imrcnn_lite", "mrcnn_lite"):
            if arm not in self.longer or (arm, 0, 0) not in self.records:
                return None
            last = (
                record.content["curves"]["validation"][-1]["segm/AP50_voc"]
                for record in (self.longer[arm], self.records[arm, 0, 0])
            )
            gains.append(float(np.subtract(*last)))
        return float(np.mean(gains))

    def in_hospital(self, centre: str, first: str, second: str, endpoint: str) -> Difference:
        """Of two arms with several seeds each, trained on fold 0, in a hospital of PolypGen."""
        runs = [self.hospitals[centre][arm] for arm in (first, second)]
        values = [[record.values[endpoint] for record in records] for records in runs]
        pair = (self._in_hospital(centre, arm)[endpoint] for arm in (first, second))
        samples, units = np.subtract(*pair), runs[0][0].metrics.num_units
        samples = samples[np.isfinite(samples)]
        return difference_from_parts(
            np.mean(values[0]) - np.mean(values[1]),
            bootstrap_se(samples, units),
            units,
            tuple(np.std(v, ddof=1) for v in values),
            tuple(map(len, values)),
            resamples=len(samples),
        )
