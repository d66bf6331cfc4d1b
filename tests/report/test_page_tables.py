import dataclasses
import json

import pytest

from imrcnn_d2.report.html.tables import (
    cell,
    confusions,
    key_metrics,
    metric_tables,
    patient_table,
    screening,
    size_tables,
)
from imrcnn_d2.report.runs import load_run

MODELS = ("MR-CNN", "IBMR-CNN", "IMR-CNN")


@pytest.fixture(scope="module")
def runs(study_runs):
    return list(study_runs.values())


@pytest.fixture
def without(runs):
    """A function that returns the runs without a group of figures, as older runs are."""

    def do(*groups):
        return [
            dataclasses.replace(
                run, recorded={k: v for k, v in run.recorded.items() if k not in groups}
            )
            for run in runs
        ]

    return do


@pytest.mark.parametrize(
    "figures, name, text, interval, bar",
    [
        ({"iou": 81.25, "iou_ci": [70, 90.04]}, "iou", "81.2", "[70.0, 90.0]", [81.25, 70, 90.04]),
        ({"iou": 81.25}, "iou", "81.2", "", [81.25, 81.25, 81.25]),
        ({"iou": 81.25, "iou_ci": [None, None]}, "iou", "81.2", "", [81.25, 81.25, 81.25]),
        ({"iou": None, "iou_ci": [1, 2]}, "iou", "n/a", "", None),
        ({"iou": float("nan")}, "iou", "n/a", "", None),
        ({}, "iou", "n/a", "", None),
        ({"TP": 1234.0}, "TP", "1,234", "", None),
        ({"fp_per_image": 0.125, "fp_per_image_ci": [0, 1]}, "fp_per_image", "0.12",
         "[0.00, 1.00]", None),
    ],
)  # fmt: skip
def test_a_cell(figures, name, text, interval, bar):
    assert cell(figures, name) == {"text": text, "interval": interval, "bar": bar}


def document(study, model):
    return json.loads((study / f"runs/{model}/inference/study_test/metrics.json").read_text())


def test_key_figures_are_those_of_metrics_json(runs, study):
    cards = {card["title"]: card for card in key_metrics(runs)}
    assert list(cards) == ["Average precision", "Sensitivity", "Precision", "IoU"]
    for model, (name, found) in zip(MODELS, cards["Sensitivity"]["cells"], strict=True):
        lesion = document(study, model)["lesion"]
        low, high = lesion["recall_ci"]
        assert name == model
        assert found["text"] == f"{lesion['recall']:.1f}"
        assert found["interval"] == f"[{low:.1f}, {high:.1f}]"
    area = document(study, "IMR-CNN")["segm"]["AP50_voc"]
    assert cards["Average precision"]["cells"][2][1]["text"] == f"{area:.1f}"
    assert "score ≥ 0.7" in cards["IoU"]["hint"]


def test_figures_at_both_thresholds(runs, study):
    tables = {table["title"]: table for table in metric_tables(runs)}
    titles = ["Detection, over all scores"]
    titles += [
        f"{unit}{at}" for unit in ("Lesions", "Images", "Patients") for at in ("", ", τ_val")
    ]
    assert list(tables) == titles
    for title, group in (("Lesions", "lesion"), ("Images, τ_val", "image")):
        rows = {row["label"]: row["cells"] for row in tables[title]["rows"]}
        own = document(study, "MR-CNN")
        own = own["tau_val"] if "τ_val" in title else own
        label = "sensitivity (recall)" if group == "lesion" else "sensitivity"
        assert rows[label][0]["text"] == f"{own[group]['recall']:.1f}"
    rows = {row["label"]: row["cells"] for row in tables["Lesions, τ_val"]["rows"]}
    assert [found["text"] for found in rows["score threshold"]] == ["0.62"] * 3


def test_older_runs_have_fewer_tables_and_the_same_sizes(runs, without):
    titles = [table["title"] for table in metric_tables(without("tau_val", "patient"))]
    assert titles == ["Detection, over all scores", "Lesions", "Images", "Patients"]
    assert size_tables(without("by_size")) == size_tables(runs)


def test_sizes(runs):
    share, coco = size_tables(runs)
    assert [row["label"] for row in coco["rows"]] == ["small", "medium", "large"]
    lesions = runs[0].results.meta["lesions"]
    for table in (share, coco):
        assert sum(int(row["cells"][0]["text"]) for row in table["rows"]) == lesions
        assert len(table["columns"]) == 2 + 2 * len(runs)
        assert all(len(row["cells"]) == 1 + 2 * len(runs) for row in table["rows"])


def test_confusion_matrices(runs):
    for run, table in zip(runs, confusions(runs), strict=True):
        lesion = run.metrics["lesion"]
        (truth, (hits, missed)), (background, (alarms, nothing)) = table["rows"]
        assert (truth, background) == ("lesion", "background")
        assert [hits[0], missed[0]] == [f"{lesion['TP']:.0f}", f"{lesion['FN']:.0f}"]
        assert hits[1] == pytest.approx(lesion["recall"] / 100, abs=1e-3)
        assert alarms == (f"{lesion['FP']:.0f}", 0)
        assert nothing == ("–", 0)


def test_patients_with_most_errors_first(runs):
    table = patient_table(runs)
    truth = runs[0].results.ground_truth.images
    assert len(table["rows"]) == len({image["patient_id"] for image in truth})
    assert sum(row[1] for row in table["rows"]) == len(truth)
    counts = [[list(map(int, text.split(" / "))) for text in row[3:]] for row in table["rows"]]
    errors = [sum(fp + fn for _, fp, fn in own) for own in counts]
    assert errors == sorted(errors, reverse=True)
    for number, run in enumerate(runs):
        total = [sum(own[number][k] for own in counts) for k in range(3)]
        assert total == [run.metrics["lesion"][key] for key in ("TP", "FP", "FN")]
    assert len(patient_table(runs, most=2)["rows"]) == 2


def test_unknown_patients_are_said_to_be(write_gt, write_run, tmp_path):
    run = load_run(write_run("a", write_gt(tmp_path / "gt.json", images=6)))
    table = patient_table([run])
    assert table["rows"] == []
    assert "no patient_id" in table["notes"][0]


def test_screening(runs):
    table = screening(runs, [0.05])
    assert [(row["label"], row["hint"]) for row in table["rows"]] == [
        ("PPV at 5 %", "score ≥ 0.7"),
        ("NPV at 5 %", "score ≥ 0.7"),
        ("PPV at 5 %", "τ_val"),
        ("NPV at 5 %", "τ_val"),
    ]
    image = runs[0].metrics["image"]
    low, high = (
        0.05 * recall / (0.05 * recall + 0.95 * (100 - specificity)) * 100
        for recall, specificity in zip(image["recall_ci"], image["specificity_ci"], strict=True)
    )
    found = table["rows"][0]["cells"][0]
    assert found["interval"] == f"[{low:.1f}, {high:.1f}]"
    hits, alarms = 0.5 * image["recall"], 9.5 * (100 - image["specificity"])
    assert found["text"] == f"{100 * hits / (hits + alarms):.1f}"
    assert (
        f"{hits + alarms:.1f} raise an alarm, {hits:.1f} of them rightly" in table["sentences"][0]
    )
    assert f"{50 - hits:.1f} with a lesion raise none" in table["sentences"][0]


def test_no_screening_without_lesion_free_images(write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "gt.json", images=6)
    content = json.loads(gt.read_text())
    positive = {a["image_id"] for a in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in positive]
    gt.write_text(json.dumps(content))
    run = load_run(write_run("a", gt, dt=[]))
    table = screening([run], [0.05])
    assert table["rows"] == []
    assert "no image without a lesion" in table["missing"][0]
    with pytest.raises(ValueError, match="prevalence is 5"):
        screening([run], [5])
