"""Readers with and without AI: against a published analysis, brute force and simulation."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from imrcnn_d2.cli import agreement
from imrcnn_d2.evaluation.comparison import non_inferiority
from imrcnn_d2.evaluation.readers import (
    ReaderStudy,
    obuchowski_rockette,
    read_readers,
    reader_metrics,
)
from imrcnn_d2.utils.files import BadInputError


def test_the_published_example():
    """Van Dyke et al. 1993, spin-echo and cine MRI of 114 cases by five readers, as published with
    the R packages MRMCaov and RJafroc (empirical AUC, covariances by the jackknife)."""
    values = np.array(
        [
            [0.91964573, 0.85877617, 0.90386473, 0.97310789, 0.82979066],
            [0.94782609, 0.90531401, 0.92173913, 0.99935588, 0.92995169],
        ]
    )
    error, cov1, cov3 = 0.00080228827, 0.00034661371, 0.00023902837
    covariances = np.kron([[0, 1], [1, 0]], np.full((5, 5), cov3) + np.eye(5) * (cov1 - cov3))
    for i, cov2 in enumerate((0.00048396180, 0.00020418785)):
        block = np.full((5, 5), cov2) + np.eye(5) * (error - cov2)
        covariances[5 * i : 5 * i + 5, 5 * i : 5 * i + 5] = block
    metric = obuchowski_rockette(values, covariances, highest=1)
    expected = {"reader": 0.00153499935, "reader_modality": 0.00020040252, "error": error}
    expected |= {"cov1": cov1, "cov2": 0.00034407483, "cov3": cov3}
    assert metric.components == pytest.approx(expected, abs=1e-8)
    assert metric.means == pytest.approx((0.89703704, 0.94083736))
    difference = metric.difference
    assert (difference.estimate, difference.se) == pytest.approx((0.043800322, 0.020748618))
    assert (difference.df, difference.p) == pytest.approx((15.259675, 0.051665686), rel=1e-5)
    assert difference.low == pytest.approx(-0.00035885444, rel=1e-4)
    assert difference.high == pytest.approx(0.087959499)
    ends = np.array([[0.82522360, 0.96885048], [0.89413783, 0.98753689]])
    assert np.array(metric.intervals) == pytest.approx(ends, abs=1e-7)


def simulated(rng, readers=5, cases=100, effect=0.0, reader_sd=0.1, units=None):
    """Ratings as Roe and Metz (1997) have them: of readers, cases, both, modality and chance."""
    positive = np.arange(cases) < cases // 2

    def noise(sd, *shape):
        return sd * rng.normal(size=shape)

    rating = noise(0.5, cases) + noise(0.35, readers, cases) + noise(0.35, 2, 1, cases)
    rating = rating + noise(0.7, 2, readers, cases)
    gain = 1.2 + noise(reader_sd, readers) + noise(reader_sd / 2, 2, readers)
    gain += effect * np.array([[0], [1]])
    rating += positive * gain[..., None]
    unit = np.arange(cases) if units is None else rng.permutation(np.arange(cases) % units)
    return ReaderStudy(
        modalities=("without", "with"),
        readers=[f"reader {j}" for j in range(readers)],
        cases=[f"{n}.png" for n in range(cases)],
        positive=positive,
        unit=unit,
        rating=rating,
        lesions=positive * 2,
        hits=rng.integers(0, 3, rating.shape) * positive,
        false_marks=rng.poisson(0.3, rating.shape),
    )


@pytest.mark.parametrize("units", [None, 7])
def test_metrics_and_their_covariances(units):
    """Against scikit-learn's AUC and shares, of all cases and without each unit in turn."""
    study = simulated(np.random.default_rng(0), readers=3, cases=20, units=units)
    metrics = reader_metrics(study, positive_from=0.5)

    def by_hand(keep):
        truth, ratings = study.positive[keep], study.rating[..., keep].reshape(6, -1)
        lesions, cases = study.lesions[keep].sum(), keep.sum()
        return {
            "auc": [100 * roc_auc_score(truth, rating) for rating in ratings],
            "sensitivity": [100 * (rating[truth] >= 0.5).mean() for rating in ratings],
            "specificity": [100 * (rating[~truth] < 0.5).mean() for rating in ratings],
            "lesion_sensitivity": 100 * study.hits[..., keep].sum(axis=-1).ravel() / lesions,
            "false_marks": study.false_marks[..., keep].sum(axis=-1).ravel() / cases,
        }

    for name, expected in by_hand(np.ones(20, bool)).items():
        assert metrics[name].values.ravel() == pytest.approx(expected), name
        has_part = {"sensitivity": study.positive, "specificity": ~study.positive}
        has_part = has_part.get(name, study.lesions > 0 if "lesion" in name else study.rating[0, 0])
        without = [by_hand(study.unit != u)[name] for u in np.unique(study.unit[has_part != 0])]
        deviations = np.array(without) - np.mean(without, axis=0)
        covariances = (1 - 1 / len(without)) * deviations.T @ deviations
        components = metrics[name].components
        assert components["error"] == pytest.approx(np.diag(covariances).mean())
        assert components["cov1"] == pytest.approx(np.diag(covariances[:3, 3:]).mean())
        assert components["cov3"] == pytest.approx(
            covariances[:3, 3:][~np.eye(3, dtype=bool)].mean()
        )


def write_csv(study, path, changes=()):
    columns = ["reader", "modality", "case", "truth", "rating", "lesions", "hits", "false_marks"]
    rows = []
    for m, j, n in np.ndindex(study.rating.shape):
        marks = study.lesions[n], study.hits[m, j, n], study.false_marks[m, j, n]
        place = study.readers[j], study.modalities[m], study.cases[n], int(study.positive[n])
        rows.append(dict(zip(columns, (*place, study.rating[m, j, n], *marks), strict=True)))
    for row, column, value in changes:
        rows[row][column] = value
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_readers_are_better_with_ai(tmp_path, capsys, real_plots):
    study = simulated(np.random.default_rng(1), readers=4, cases=60, effect=1.5)
    table = write_csv(study, tmp_path / "ratings.csv")
    model = tmp_path / "model"
    model.mkdir()
    scores = [f"{case},{i / 60}\n" for i, case in enumerate(study.cases)]
    (model / "per_image.csv").write_text("file_name,score\n" + "".join(scores))
    (model / "froc.csv").write_text("fp_per_image,sensitivity\n0.1,40\n1,80\n")
    options = ["--positive-from", "0.6", "--margin", "5", "--model", str(model)]
    runs = {}
    for baseline in (None, "with"):
        out = tmp_path / str(baseline)
        more = ["--baseline", baseline] if baseline else []
        agreement.main(["--readers", str(table), "--output", str(out), *options, *more])
        runs[baseline] = json.loads((out / "readers.json").read_text())["metrics"]
        with Image.open(out / "readers.png") as image:
            assert image.width > 1.5 * image.height  # a panel of cases, and one of lesions
    printed = capsys.readouterr().out
    assert "4 readers, 60 cases, 30 with a lesion" in printed and "AUC (%)" in printed
    auc, reverse = runs[None]["auc"], runs["with"]["auc"]
    metric = reader_metrics(study)["auc"]
    assert auc["difference"] == pytest.approx(metric.difference.estimate) and auc["p"] < 0.05
    assert reverse["difference"] == pytest.approx(-auc["difference"])
    assert reverse["p"] == pytest.approx(auc["p"])
    assert auc["non_inferiority_p"] < 0.001 < 0.5 < reverse["non_inferiority_p"]
    assert "non_inferiority_p" not in runs[None]["false_marks"]  # which is not in points
    rows = list(csv.DictReader((tmp_path / "None" / "readers.csv").open()))
    assert len(rows) == 5 * 2 * 4
    for option in "--names=anna --dt=x.json --tau=0.5 --images=x --iou=0.3 --resamples=9".split():
        with pytest.raises(SystemExit) as error:
            agreement.main(["--readers", str(table), "--output", str(tmp_path / "x"), option])
        message = capsys.readouterr().err.splitlines()[-1]  # after argparse's usage
        assert error.value.code == 2 and option.split("=")[0] in message
    # Another set of images than the cases has other curves.
    (model / "per_image.csv").write_text("file_name,score\n" + "".join(scores[1:]))
    with pytest.raises(SystemExit):
        agreement.main(["--readers", str(table), "--output", str(tmp_path / "x"), *options])
    assert "per_image.csv" in (error := capsys.readouterr().err) and study.cases[0] in error


def test_yes_and_no_alone_are_enough(tmp_path):
    study = simulated(np.random.default_rng(2), readers=2, cases=12)
    study.rating[:] = study.rating > 0.6
    metrics = reader_metrics(read_readers(write_csv(study, tmp_path / "ratings.csv")))
    shares = (metrics[name].values for name in ("sensitivity", "specificity"))
    assert metrics["auc"].values == pytest.approx(sum(shares) / 2)


def test_readers_that_do_not_vary_show_nothing():
    """By rounding errors their variance is 1e-28 or so, with which p was 1e-16."""
    study = simulated(np.random.default_rng(2), cases=12)
    study.rating[:] = study.rating > 0.6
    for values in (study.rating, study.hits, study.false_marks):
        values[:] = values[:1]
    for name, metric in reader_metrics(study).items():
        alike = metric.difference
        assert alike.estimate == 0 and alike.p == 1, name
        assert np.isnan([alike.low, alike.high, non_inferiority(alike, 5)]).all(), name
    # All find everything with AI: that does not show that others would.
    study = simulated(np.random.default_rng(2), cases=12)
    study.rating[1] = study.positive
    for name in ("sensitivity", "specificity", "auc"):
        metric = reader_metrics(study, 0.5)[name]
        assert metric.means[1] == 100 and np.isnan(metric.intervals[1]).all(), name
        assert np.isfinite(metric.intervals[0]).all(), name
    # Both readers set one mark less, each in a case of their own.
    study = simulated(np.random.default_rng(0), readers=2, cases=12)
    study.false_marks[:] = study.false_marks[0, 0]
    study.false_marks[1, [0, 1], [0, 1]] -= 1
    difference = reader_metrics(study)["false_marks"].difference
    assert difference.estimate == pytest.approx(-1 / 12) and np.isnan(difference.p)


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ([(3, "rating", "high")], ("line 5", "high")),
        ([(3, "case", "0.png")], ("0.png", "reader 0")),
        ([(3, "truth", 0)], ("3.png", "truth")),
        ([(0, "hits", 3)], ("hits",)),
        ([(3, "modality", "third")], ("third", "two modalities")),
        ([(i, "truth", 1) for i in range(48)], ("truth",)),
    ],
)
def test_bad_tables(tmp_path, changes, texts):
    study = simulated(np.random.default_rng(3), readers=2, cases=12)
    path = write_csv(study, tmp_path / "ratings.csv", changes)
    with pytest.raises(BadInputError) as error:
        read_readers(path)
    assert all(text in str(error.value) for text in ("ratings.csv", *texts))


def test_a_threshold_that_parts_nothing(tmp_path):
    study = simulated(np.random.default_rng(3), readers=2, cases=12)
    with pytest.raises(ValueError, match="--positive-from 9"):
        reader_metrics(study, 9)
    with pytest.raises(BadInputError, match="'alone'"):
        read_readers(write_csv(study, tmp_path / "ratings.csv"), baseline="alone")


@pytest.mark.slow
@pytest.mark.parametrize("reader_sd", [0.0, 0.3])
def test_error_rate(reader_sd):
    """Readers and cases without a difference between the modalities: p < 0.05 in about 5 %; and at
    a difference of the margin, non-inferiority is claimed in about 5 %."""
    rng, studies = np.random.default_rng(0), 600
    metrics = [
        reader_metrics(simulated(rng, cases=80, reader_sd=reader_sd))["auc"] for _ in range(studies)
    ]
    differences = [metric.difference for metric in metrics]
    assert np.mean([d.p < 0.05 for d in differences]) <= 0.07
    covered = np.mean([d.low <= 0 <= d.high for d in differences])
    assert 0.93 <= covered <= 0.99
    lost = [
        reader_metrics(simulated(rng, cases=80, reader_sd=reader_sd, effect=-0.25))["auc"]
        for _ in range(studies)
    ]
    margin = -np.mean([metric.difference.estimate for metric in lost])
    assert np.mean([non_inferiority(m.difference, margin) < 0.05 for m in lost]) <= 0.07
