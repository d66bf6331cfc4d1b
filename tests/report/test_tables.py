"""Tables in all formats, the model card, and what is known of a data set."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.data.prepare.synthetic import generate
from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.evaluation.calibration import ScoreMap
from imrcnn_d2.evaluation.comparison import corrected_resampled_t_test
from imrcnn_d2.evaluation.detection.metrics import METRICS, less_is_better, table_metrics
from imrcnn_d2.evaluation.output import log_test_evaluation
from imrcnn_d2.report import load_run
from imrcnn_d2.report.cohort import cohort
from imrcnn_d2.report.comparison import compare, gather, write_comparison
from imrcnn_d2.report.html import render_report, tables
from imrcnn_d2.report.model_card import write_model_card
from imrcnn_d2.report.names import (
    PUBLISHED_TRAININGS,
    metric_name,
    published_accuracy,
    published_values,
)
from imrcnn_d2.report.tables import Table, format_value, metrics_table, p_text, write_table
from imrcnn_d2.utils.files import Rejects

NAN = float("nan")


def test_a_table_of_groups():
    groups = {
        "lesion": {"TP": 12.0, "precision": 100 / 3, "iou": NAN},
        "image": {"TP": 3.0, "precision": 100.0, "auroc": 97.256},
    }
    intervals = {"image": {"auroc": (95, 99.005), "precision": (NAN, NAN)}}
    assert metrics_table(groups, intervals).splitlines() == [
        "|           |   lesion |                image |",
        "|:----------|---------:|---------------------:|",
        "| TP        |       12 |                    3 |",
        "| precision |    33.33 |               100.00 |",
        "| iou       |      n/a |                      |",
        "| auroc     |          | 97.26 [95.00, 99.00] |",
    ]


def test_values():
    for arguments, sd, text in (
        (("iou", 87.66, (NAN, NAN)), NAN, "87.7"),
        (("iou", NAN, (1, 2)), None, "n/a"),
        (("TP", 12.0), NAN, "12"),
        (("TP", 12.5), None, "12.5"),
        (("iou", -0.04), None, "0.0"),
        (("", -1.26, (-3, 0.5)), None, "−1.3 [−3.0, 0.5]"),
        (("iou", 87.66, (83, 91)), 0.44, "87.7 ± 0.4 [83.0, 91.0]"),
        (("TP", 8.0), 1.5, "8.0 ± 1.5"),
    ):
        assert format_value(*arguments, sd=sd) == text
    assert [p_text(p) for p in (NAN, 0.0009, 0.001, 1)] == ["n/a", "<0.001", "0.001", "1.000"]


def test_the_three_files(tmp_path):
    cells = pd.DataFrame({"model": ["a_b & c", "d|e"], "AP50_voc": ["87.7 ± 0.4", "1.50 †"]})
    data = pd.DataFrame({"model": ["a_b & c", "d|e"], "value": [87.71234567891234, NAN]})
    table = Table("table_9", "50 % of AP50_voc, τ ≥ 0.7", cells, data, ("p < 5 %", "Second."))
    paths = markdown, csv, latex = write_table(table, tmp_path / "new")
    assert [path.name for path in paths] == [f"table_9.{kind}" for kind in ("md", "csv", "tex")]
    assert pd.read_csv(csv).equals(data)
    assert markdown.read_text().splitlines() == [
        "**50 % of AP50_voc, τ ≥ 0.7**",
        "",
        "| model   |   AP50_voc |",
        "|:--------|-----------:|",
        "| a_b & c | 87.7 ± 0.4 |",
        r"| d\|e    |     1.50 † |",
        "",
        "- p < 5 %",
        "- Second.",
    ]
    text = latex.read_text()
    opened = re.findall(r"\\begin\{(\w+)\}", text)
    assert text.isascii() and opened == re.findall(r"\\end\{(\w+)\}", text)[::-1]
    for line in (
        r"\begin{tabular}{lr}",
        r"\caption{50 \% of AP50\_voc, $\tau$ $\geq$ 0.7}",
        r"model & AP50\_voc \\",
        r"a\_b \& c & 87.7 $\pm$ 0.4 \\",
        r"d$|$e & 1.50 \dag{} \\",
        *(r"\footnotesize\raggedright", r"\par p $<$ 5 \%"),
        *(r"\toprule", r"\midrule", r"\bottomrule"),
    ):
        assert line in text.splitlines()


def test_names():
    for endpoint, name in (
        ("segm/AP50_voc", "AP50_voc (masks)"),
        ("lesion/iou_box", "IoU (boxes)"),
        ("tau_val.lesion/f1", "F1 (lesions) at tau_val"),
        ("image/auroc", "AUROC (images)"),
        ("patient/recall", "recall (patients)"),
        ("froc/mean", "mean (froc)"),
        ("recognition/auroc", "AUROC, mean of classes"),
        ("recognition/accuracy_early cancer", "accuracy of early cancer"),
        ("cancer/recall", "sensitivity (cancer against benign)"),
    ):
        assert metric_name(endpoint) == name


def test_of_false_alarms_errors_and_delays_less_is_better():
    less = {name for name in METRICS if less_is_better(name)}
    assert less >= {"FP", "fp_per_image", "hd95", "ece", "fpr", "false_alarms_per_minute"}
    assert "seconds_to_detection" in less
    assert not less & {"TP", "recall", "f1", "AP50_voc", "selection", "auroc", "persistence", "n"}


def published(source, table):
    rows = published_values(source, table)
    return {(row.model, row.figure): (row.value, row.sd) for row in rows}


def test_published_values_of_the_data_set():
    kvasir, egc = published("kvasir_seg", "3"), published("egc", "4")
    assert kvasir["IMR-CNN", "segm/AP50_voc"] == (91.6, None) and len(kvasir) == 6
    assert egc["MR-CNN", "segm/AP50_voc"] == (90.6, 0.4) and len(egc) == 6
    assert published("egc", "3")["IMR-CNN", "lesion/iou"] == (79.1, None)
    # The paper has neither folds nor an operating point for Kvasir-SEG.
    assert not published("kvasir_seg", "4") and not published("kvasir_seg", "5")
    for source in (None, "", "synthetic", "kvasir_seg_test", "egc2"):
        assert not any(published_values(source, table) for table in "345")


def test_the_published_table_5_follows_from_whole_counts():
    values = published("egc", "5")
    assert {figure.partition("/")[0] for _, figure in values} == {"paper"}
    # 300 lesions in 280 images, of which 270 are without a false alarm.
    expected = table_metrics(tp=286, fp=22, fn=14, tn=270)
    for (_, figure), (value, _) in values.items():
        assert round(expected[figure.partition("/")[2]], 1) == value
    assert len(values) == 5


def test_what_the_published_table_4_shows():
    values = published("egc", "4")
    for row, folds in PUBLISHED_TRAININGS.items():
        mean, sd = np.mean(folds), np.std(folds)
        assert values[row] == pytest.approx((mean, sd), abs=0.06)
    difference = {}
    for figure in ("segm/AP50_voc", "lesion/iou"):
        imr, mr = (np.array(PUBLISHED_TRAININGS[model, figure]) for model in ("IMR-CNN", "MR-CNN"))
        # Of 1,120 images a fifth each for testing and for validation.
        difference[figure] = corrected_resampled_t_test(imr - mr, n_train=672, n_test=224)
    ap, iou = difference["segm/AP50_voc"], difference["lesion/iou"]
    assert round(ap.estimate, 1) == 2.9 and ap.p < 0.001
    assert (round(iou.estimate, 1), round(iou.p, 2)) == (0.6, 0.19)


def test_published_accuracy_is_of_that_data_only():
    classes = ["gastric cancer", "gastric ulcer", "chronic gastritis"]
    assert published_accuracy("gastric_recognition_test", classes)["gastric ulcer"] == 92
    assert published_accuracy("own_test", classes) == published_accuracy(None, classes) == {}
    capitals = [name.title() for name in classes]
    assert published_accuracy("gastric_recognition_val", capitals)["Gastric Cancer"] == 93
    for names in (["polyp", "ulcer", "gastritis"], [*classes, "normal"]):
        assert published_accuracy("gastric_recognition_test", names) == {}


OPEN = "*to be filled in by the authors*"


@pytest.fixture
def run(home):
    return home.load("MR-CNN")


@pytest.fixture
def write(run, tmp_path):
    """A function that returns the text of the run's card, with some of its fields changed."""

    def do(**fields):
        card = write_model_card(dataclasses.replace(run, **fields), tmp_path / "card.md")
        return card.read_text(encoding="utf-8")

    return do


def rows(text, title):
    """Cells of the tables' rows under a heading."""
    part = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_results_at_both_thresholds_and_data(run, write):
    text, meta = write(), run.results.meta
    shown = {row[0]: row[1:] for row in rows(text, "Results")}
    groups = run.metrics["lesion"], run.metrics["tau_val"]["lesion"]
    expected = ["{:.1f} [{:.1f}, {:.1f}]".format(g["recall"], *g["recall_ci"]) for g in groups]
    assert shown["sensitivity (recall): lesions that were found"] == expected
    assert "score ≥ 0.62 (τ_val)" in text and "60 resamples of patients" in text
    assert "Clopper and Pearson" in text
    assert "not a medical device" in text
    numbers = [meta[key] for key in ("images", "patients", "lesions", "lesion_free_images")]
    assert rows(text, "Data")[-1] == ["Test", *map(str, numbers)]
    assert "3 of 43 images (2: mask is empty; 1: duplicate)" in text


def test_a_card_says_what_its_scores_mean(write_gt, write_run, tmp_path):
    """Of scores that a map made probabilities of, and of others; without lesion-free images."""
    gt = write_gt(tmp_path / "gt.json", images=12)
    content = json.loads(gt.read_text())
    positive = {annotation["image_id"] for annotation in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in positive]
    gt.write_text(json.dumps(content))
    texts, runs = {}, {}
    for name, options in (
        ("mapped", {"score_map": ScoreMap(0.5, -1, "polyps_val"), "tau": 0.5, "tau_val": 0.4}),
        ("raw", {"tau_val": 0.8}),
    ):
        folder = write_run(name, gt, bootstrap=Bootstrap(20), **options)
        run = runs[name] = load_run(f"IMR-CNN of {name}={folder}")
        texts[name] = write_model_card(run, tmp_path / "card.md").read_text(encoding="utf-8")
        if name == "mapped":
            before, after = run.metrics["calibration_raw"], run.metrics["calibration"]
            lesion = run.metrics["lesion"]
    facts = dict(row for row in rows(texts["mapped"], "Model and training") if len(row) == 2)
    assert facts["Map of scores"] == "σ(0.5 · logit(score) − 1), fitted on polyps_val"
    assert facts["Score threshold τ"] == "0.5 of the mapped score"
    for words in (
        f"error is {before['ece']:.1f} before the map and {after['ece']:.1f} after it",
        "At a mapped score ≥ 0.5 precision is "
        "{precision:.1f} [{precision_ci[0]:.1f}, {precision_ci[1]:.1f}] and recall {recall:.1f} "
        "[{recall_ci[0]:.1f}, {recall_ci[1]:.1f}].".format(**lesion),
        "| | mapped score ≥ 0.5 | mapped score ≥ 0.4 (τ_val) |",
        "| | raw score ≥ 0.7 |",
        "| | before the map | after it |",
    ):
        assert words in texts["mapped"]
    shown = {row[0]: row[1:] for row in rows(texts["mapped"], "Results")}
    assert [cell.split()[0] for cell in shown["Brier score"]] == [
        f"{group['brier']:.1f}" for group in (before, after)
    ]
    reason = "undefined: the test set has no image without a lesion"
    assert shown[f"specificity: {reason}"] == ["–", "–"]
    assert shown[f"AUROC: {reason}"] == ["–", ""]  # over all scores
    assert "| | score ≥ 0.7 | score ≥ 0.8 (τ_val) |" in texts["raw"]
    at = "mapped score ≥ 0.5 (IMR-CNN of mapped), score ≥ 0.7 (IMR-CNN of raw)"
    assert tables.at_threshold(list(runs.values())) == at
    assert "mapped" not in texts["raw"] and "| | raw score ≥ 0.7 |\n" in texts["raw"]


def test_a_card_begins_with_what_the_hub_lists_and_names_no_folder_of_this_machine(run, write):
    command = "imrcnn train --data '/home/me/my data' OUTPUT_DIR /mnt/disk/out AP/IoU https://a/b"
    text = write(record={**run.record, "command": command})
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["pipeline_tag"] == "image-segmentation" and head["license"] == "other"
    (results,) = head["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in results["metrics"]}
    assert results["dataset"]["name"] == run.dataset
    assert values["recall"] == round(run.metrics["lesion"]["recall"], 2)
    assert values["AP50_voc"] == round(run.metrics["segm"]["AP50_voc"], 2)
    assert not [part for part in ("/home", "/mnt", str(run.folder)) if part in text]
    assert "AP/IoU" in text and "_DIR out " in text


# What no run can know.
UNKNOWN = {"CLAIM": ("3", "33", "36", "44"), "TRIPOD+AI": ("3c", "14", "17", "18a")}


@pytest.mark.parametrize("title, number, last", [("CLAIM", 44, 44), ("TRIPOD+AI", 52, 27)])
def test_every_item_is_filled_in_or_open(write, title, number, last):
    text = write()
    _, *table = rows(text, title)
    items = {int(re.match(r"\d+", row[0])[0]): row for row in table}
    assert len(table) == number and list(items) == list(range(1, last + 1))
    filled = sum(row[2] != OPEN for row in table)
    assert all(row[2] for row in table) and 10 < filled < number - 10
    assert f"{filled} of {number} items" in text.split(f"\n## {title}\n")[1].split("\n\n")[0]
    assert {row[2] for row in table if row[0] in UNKNOWN[title]} == {OPEN}


def test_evaluated_weights_state_the_iterations_of_their_training(run, write):
    evaluated = {**run.recorded, "meta": {**run.meta, "iterations": 4000}}
    answers = {row[0]: row[2] for row in rows(write(record={}, recorded=evaluated), "CLAIM")}
    assert answers["25"] == "4000 iterations."


def test_what_is_not_recorded_stays_open(write):
    text = write(record={}, config={})
    answers = {row[0]: row[2] for row in rows(text, "CLAIM")}
    assert {answers[item] for item in ("1", "22", "24", "25", "26", "42")} == {OPEN}
    assert "not recorded" not in text.split("\n## CLAIM\n")[1]
    assert "no record of the training" in text


def test_weights_that_no_validation_chose(run, write):
    config = {**run.config, "DATASETS": {**run.config["DATASETS"], "VAL": []}}
    answers = {row[0]: row[2] for row in rows(write(config=config), "CLAIM")}
    assert answers["26"] == "The last weights: there were no validation data."


def test_patients_who_all_have_a_lesion(write_gt, write_run, tmp_path):
    run = load_run(write_run("a", write_gt(tmp_path / "gt.json", images=11, per_patient=3)))
    assert run.results.meta["lesion_free_images"]
    card = write_model_card(run, tmp_path / "card.md").read_text(encoding="utf-8")
    assert "specificity: undefined: the test set has no patient without a lesion" in card
    assert "no image without a lesion" not in card


def test_looks_at_the_test_set_are_counted_and_text_is_no_markup(run, write, tmp_path):
    assert "No evaluation of this test set is on record" in write()
    for number in "01":
        source = {"source": tmp_path / f"{number}.pth", "sha256": number * 64}
        log_test_evaluation(run.gt_path, **source, output=tmp_path)
    text = write(record={**run.record, "command": "a | b\n<script>"})
    assert ["Command", "a \\| b &lt;script>"] in rows(text, "Model and training")
    assert "2 times on record" in text
    assert [row[2] for row in rows(text, "Looks at the test set")[1:]] == ["0" * 16, "1" * 16]


def test_a_prepared_data_set(study, study_runs):
    folder, data = study / "datasets" / "study", cohort(study_runs["MR-CNN"])
    assert [split["name"] for split in data["splits"]] == ["Training", "Validation", "Test"]
    assert [split["tested"] for split in data["splits"]] == [False, False, True]
    all_patients = set()
    for name, split in zip(("train", "val", "test"), data["splits"], strict=True):
        coco = json.loads((folder / "annotations" / f"{name}.json").read_text())
        images, annotations = coco["images"], coco["annotations"]
        numbers = [split[key] for key in ("images", "lesions", "lesion_free", "patients")]
        lesion_free = len(images) - len({annotation["image_id"] for annotation in annotations})
        patients = {image["patient_id"] for image in images}
        assert numbers == [len(images), len(annotations), lesion_free, len(patients)]
        all_patients |= patients
    assert (data["images"], data["patients"]) == (40, len(all_patients))
    assert (data["offered"], data["excluded"], data["notes"]) == (43, 3, [])
    assert data["reasons"] == [("mask is empty", 2), ("duplicate", 1)]
    assert data["rejected"][2] == ("2.jpg", "duplicate: same content as a.jpg")
    assert "1:1:3, seed 0; images of one patient are in one split" in data["caption"]


def test_nothing_but_the_test_set(home, tmp_path):
    """In a folder of another name next to a splits.json, or in annotations/ without one."""
    (tmp_path / "splits.json").write_text("{}")
    for folder in ("given", "given/annotations"):
        (tmp_path / folder).mkdir()
        alone = shutil.copy(home.gt, tmp_path / folder / "alone.json")
        home.change("metrics.json", {"meta.gt": str(alone)})
        data = cohort(home.load())
        assert [split["name"] for split in data["splits"]] == ["alone"]
        assert data["offered"] is None and "alone.json" in data["notes"][0]


def test_a_patient_in_two_splits_and_a_crowd(home):
    before, coco = cohort(home.load()), json.loads(home.gt.read_text())
    patient = coco["images"][0]["patient_id"]
    train = "annotations/train.json"
    home.change_data(lambda content: content["images"][0].update(patient_id=patient), train)
    home.change_data(lambda content: content["annotations"][0].update(iscrowd=1))
    data = cohort(home.load())
    assert len(before["notes"]) == 0 and "more than one split (1 " in data["notes"][0]
    assert data["splits"][2]["lesions"] == before["splits"][2]["lesions"] - 1


def update(content, fields):
    """Set fields; ... removes one."""
    content.update(fields)
    for name in [name for name, value in content.items() if value is ...]:
        del content[name]


def test_how_the_data_were_split(home):
    group, common = {"split_by": "group"}, {"ratio": [1, 1, 3], "seed": 4}
    home.change_data(lambda content: content.update(info={"description": "by hand"}))
    for settings, expected in (
        ({"split_by": "image"}, "Split at random 1:1:3, seed 4; image by image, so that one"),
        (group, "Split at random 1:1:3, seed 4; near-duplicates, and images of"),
        ({"split_by": "prefix"}, "Split as the file names state;"),
        ({**group, "test_per_class": 9}, "Split at random 1:1:3, 9 test images of each class, se"),
        ({**group, "fold": 1, "folds": 5}, "Fold 1 of 5, seed 4; near-dup"),
        (
            {"split_by": "image", "fold": ..., "folds": ..., "test_per_class": ...},
            "Split at random",
        ),
        (
            {"split_by": "patient", "left_out": "centre=Rome"},
            "The test images are all of centre=Rome; the others were split at random, seed 4; ima",
        ),
        (
            {**group, "left_out": "centre=Rome", "fold": 1, "folds": 5},
            "Fold 1 of 5: the test images are all of centre=Rome; the others",
        ),
        ({"left_out": ..., "fold": ..., "folds": ..., "split_by": "image"}, "Split at random"),
        ({"given": 30}, "Split at random 1:1:3, seed 4, but for 30 of 40 images, which a list"),
        ({"given": 40}, "Split as a list of files gave it."),
        (
            {**group, "fixed_from": "f" * 64, "given": 40},
            "Split as a list of files gave it, then c",
        ),
    ):
        home.change_data(lambda content, new=settings: update(content, common | new), "splits.json")
        caption = cohort(home.load())["caption"]
        assert caption.startswith(expected) and caption.endswith(". Annotations: by hand.")


def test_numbers_of_rejected_files_and_no_patients(home):
    reasons = "7,mask is empty\n8,annotation 3: listed twice\n9,annotation 5: listed twice\n"
    (home.gt.parents[1] / "rejected.csv").write_text(f"number,reason\n{reasons}")
    for path in home.gt.parent.iterdir():
        path.write_text(path.read_text().replace("patient_id", "sequence_id"))
    home.change_data(lambda content: None)
    data = cohort(home.load())
    assert data["rejected"][0] == ("7", "mask is empty")
    assert data["reasons"] == [("listed twice", 2), ("mask is empty", 1)]
    assert data["patients"] is data["splits"][2]["patients"] is None
    card = write_model_card(home.load(), home.path / "card.md").read_text()
    assert "Patients are not known" in card and "take sequences for independent" in card


def test_splits_that_were_given(tmp_path):
    """What `--splits` assigned was not split at random: splits.json counts it."""
    rendered, lists = tmp_path / "rendered", {"train": ["00000.png"], "val": [], "test": []}
    rendered.mkdir()
    source = generate(rendered, 8, 64)
    samples = list(source.samples)
    lists["train"], lists["val"] = (
        [s.file_name for s in part] for part in (samples[:6], samples[6:])
    )
    for number, earlier in ((8, lists), (6, {**lists, "val": []})):
        options = SplitOptions(split_by="image", earlier=earlier)
        out = tmp_path / str(number)
        prepare_dataset(dataclasses.replace(source, samples=samples), out, options, Rejects())
        assert json.loads((out / "splits.json").read_text())["given"] == number


def test_patients_of_some_images_only(home):
    """How many images have an id is stated wherever patients are."""

    def forget(content):
        for image in content["images"][1:]:
            del image["patient_id"]

    home.change_data(forget)
    run, data = home.load("MR-CNN"), cohort(home.load())
    number, total = len(run.results.ground_truth.images), data["images"]
    assert data["splits"][2]["patients_text"] == f"1 patient known, of 1 of the {number} images"
    known = total - number + 1
    assert data["patients_text"].endswith(f" known, of {known} of the {total} images")
    assert "of one patient, where known, are in one split" in data["caption"]
    page = render_report([run], home.path / "report.html").read_text()
    units = f"1 patient, {number - 1} images of unknown patients"
    assert "no patient_id" not in page and f"95 % interval], over {units}" in page
    assert page.count(f"1 patient known, of 1 of the {number} images") == 2  # its split, by patient
    card = write_model_card(run, home.path / "card.md").read_text()
    assert rows(card, "Data")[-1][2] == "1 (of 1 images)"
    comparison = compare(gather([run]), Bootstrap(10))
    text = write_comparison(comparison, home.path / "comparison")[0].read_text()
    assert f"1 patient known, of 1 of the {number} images" in text


def test_a_split_that_is_not_there(home):
    """A test set passed on without the training annotations is reported, and the gap named."""
    (home.gt.parent / "train.json").unlink()
    data = cohort(home.load())
    assert [split["name"] for split in data["splits"]] == ["Validation", "Test"]
    assert data["offered"] is None and "train.json" in data["notes"][0]
    render_report([home.load()], home.path / "report.html")
    other = shutil.copy(home.gt, home.gt.with_name("external.json"))  # next to the three
    home.change("metrics.json", {"meta.gt": str(other)})
    assert [split["name"] for split in cohort(home.load())["splits"]] == ["external"]


def test_whether_the_test_set_is_external(home):
    """The card of weights from elsewhere does not claim that their test set is one."""
    splits = json.loads((home.gt.parents[1] / "splits.json").read_text())["sha256"]
    for sha256, answers in ((splits, ("split of the same", OPEN)), ("e" * 64, (OPEN, "no split"))):
        home.change("run.json", {"splits_sha256": sha256})
        card = write_model_card(home.load(), home.path / "card.md").read_text()
        items = {row[0]: row[2] for row in rows(card, "CLAIM")}
        assert all(a in items[n] for n, a in zip(("32", "33"), answers, strict=True))
    home.change_data(lambda content: content.update(left_out="centre=Rome"), "splits.json")
    home.change("run.json", {"splits_sha256": splits})
    card = write_model_card(home.load(), home.path / "card.md").read_text()
    items = {row[0]: row[2] for row in rows(card, "CLAIM")}
    assert items["32"] == OPEN and "centre=Rome were left out of training" in items["33"]
    assert "all images of centre=Rome, of which none was in training" in card
    home.change("run.json", {"splits_sha256": ...})
    card = write_model_card(home.load(), home.path / "card.md").read_text()
    items = {row[0]: row[2] for row in rows(card, "CLAIM")}
    assert items["32"] == items["33"] == OPEN and "is not recorded" in card
