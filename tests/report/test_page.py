"""The page of a report, of detectors and of classifiers."""

import base64
import dataclasses
import io
import json
import math
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from chromium import chromium, opened
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from recognition_runs import draw_classes, prepare_classes, write_classifier

from imrcnn_d2.cli import evaluate, report
from imrcnn_d2.evaluation import Bootstrap, evaluate_classification
from imrcnn_d2.evaluation.calibration import ScoreMap, Temperature
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare, gather
from imrcnn_d2.report.html import page, render_report, tables
from imrcnn_d2.report.html.page import classification_gallery
from imrcnn_d2.report.model_card import write_model_card
from imrcnn_d2.report.plots.images import region_contours
from imrcnn_d2.report.tables import p_text, summary
from imrcnn_d2.utils.files import strict_json


@pytest.fixture(scope="module")
def runs(study_runs):
    return list(study_runs.values())


@pytest.fixture(scope="module")
def text(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert render_report(runs, path) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture
def show(tmp_path):
    """A function that returns the text of the page of runs."""
    path = tmp_path / "report.html"
    return lambda runs, **options: render_report(runs, path, **options).read_text(encoding="utf-8")


def test_what_must_be_stated(text, runs, parse):
    tree, sections = parse(text)
    words = " ".join(" ".join(tree.itertext()).split())
    assert words.count("Research use only, not a medical device.") == 2
    assert "2: mask is empty" in sections["data"] and "43 images offered" in sections["data"]
    assert "PPV at 0.5 %" in sections["screening"]
    assert "IMR-CNN − MR-CNN" in sections["results"]
    assert "All 24 test images" in sections["gallery"] and text.count('"jpeg"') == 24
    # Markup in the names of images stays text.
    scripts = ["".join(script.itertext()) for script in tree.iter("script")]
    assert len(scripts) == text.count("</script>") == 2
    names = [image["name"] for image in json.loads(scripts[0])["images"]]
    assert "</script><script>hacked=1</script>.jpg" in names


def recorded(run, *without, **groups):
    """A run whose metrics.json has these groups, or lacks some, as of older versions."""
    kept = {key: value for key, value in run.recorded.items() if key not in without}
    return dataclasses.replace(run, recorded={**kept, **groups})


def test_metrics_by_centre_with_their_number_of_cases(text, runs, parse):
    section = parse(text)[1]["centres"]
    names = [image["centre"] for image in runs[0].results.ground_truth.images]
    lesions = [image["n_gt"] for image in runs[0].results.per_image]
    for centre in ("Bonn", "Lyon", "Rome"):
        number = sum(n for n, name in zip(lesions, names, strict=True) if name == centre)
        assert f"{centre} {names.count(centre)} images, {number} lesion" in section
    assert section.count("mapped") == 0 and section.count("score ≥ 0.62") == 3  # tau_val
    assert "†" in section and f"n {names.count('Bonn')}" in section


@pytest.mark.slow
def test_older_runs_lack_records(runs, show, parse):
    old = dataclasses.replace(recorded(runs[0], "tau_val"), record={}, config={})
    text = show([recorded(old, meta={**old.meta, "bootstrap": None}), runs[2]], max_images=5)
    sections = parse(text)[1]
    for missing in ("no run.json", "evaluated without intervals", "no threshold chosen"):
        assert f"MR-CNN: {missing}" in sections["results"]
    assert ", IMR-CNN:" not in sections["results"]
    assert text.count('"jpeg"') == 5 and "5 of 24 test images" in sections["gallery"]
    meta = {key: old.meta[key] for key in ("tau", "iou_threshold", "iou_type", "gt", "gt_sha256")}
    old = recorded(old, meta=meta)
    shown, unknown = page.known_facts(page.facts([old], {}))
    known = {label for label, _ in shown}
    assert known == {
        *("Data set", "Ground truth, sha256", "Map of scores", "Score threshold τ", "Hit"),
        "Intervals",
    }
    assert "seed; fold; iterations" in unknown and not known & set(unknown.split("; "))
    assert page.config_differences([old, runs[2]]) == []
    without_points = tables.metric_tables([recorded(run, "tau_val") for run in runs])
    titles = ["Detection, over all scores", "Lesions", "Images", "Patients", "Unique lesions"]
    titles += ["Calibration", "As the paper’s Table 5"]
    assert [table["title"] for table in without_points] == titles
    assert tables.size_tables([recorded(r, "by_size") for r in runs]) == tables.size_tables(runs)


def test_runs_that_do_not_belong_together(runs, write_gt, write_run, tmp_path):
    output, first = tmp_path / "report.html", runs[0]
    other = load_run(write_run("a", write_gt(tmp_path / "gt.json")))
    stricter = recorded(dataclasses.replace(first, name="x"), meta={**first.meta, "tau": 0.5})
    for run, fault in ((first, "'MR-CNN'"), (other, "test sets"), (stricter, "tau 0.7.* 0.5")):
        with pytest.raises(ValueError, match=fault):
            render_report([first, run], output)
    assert not output.exists()


def test_what_cannot_be_given_is_stated(write_gt, write_run, tmp_path, show, parse):
    """No detections, patients, images or lesion-free images."""
    gt = write_gt(tmp_path / "gt.json", images=6)
    content = json.loads(gt.read_text())
    positive = {a["image_id"] for a in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in positive]
    gt.write_text(json.dumps(content))
    text = show([load_run(write_run("a", gt, dt=[]))])
    assert "<script" not in text
    sections = parse(text)[1]
    words = {"gallery": "No gallery: ", "patients": "no patient_id"}
    words["results"] = "Specificity undefined: the test set has no image without a lesion IMR-CNN –"
    words |= dict.fromkeys(("curves", "screening"), "no image without a lesion")
    for name, text in words.items():
        assert text in sections[name]


def test_facts(runs):
    table = {label: values for label, *values in page.facts(runs[::2], {"sha256": "e" * 64})}
    assert table["Model"] == ["MR-CNN", "IMR-CNN"]
    expected = {
        "Backbone": "tf_efficientnet_lite0",
        "Seed": "3",
        "Code revision": "0123abc, with uncommitted changes",
        "Split, sha256": "e" * 16 + "…",
        "Weights, sha256": "c" * 16 + "…",
        "τ chosen on validation": "0.62 (f1, on kvasir_seg_val)",
        "Intervals": "over patients; 60 resamples, seed 0",
        "Training": "0.25 h, finished 2026-01-01T10:15:00",
    }
    assert {label: table[label][0] for label in expected} == expected
    assert "torch " in table["Versions"][0]
    suppressed = recorded(runs[0], tau_val={**runs[0].recorded["tau_val"], "suppress_parts": True})
    (point,) = dict(page.facts([suppressed], {}))["τ chosen on validation"].split(";")[1:]
    assert "left out" in point
    going_on = dataclasses.replace(runs[0], record={**runs[0].record, "finished": None})
    assert dict(page.facts([going_on], {}))["Training"].endswith("not finished")
    assert page.config_differences(runs[::2]) == [["MODEL.PAFPN.ATTENTION", "", "cbam"]]


def test_evaluated_weights_are_not_their_evaluation_s_config(runs, show, parse):
    """`train --eval-only` leaves a config of no training: its iterations and seed are not the
    weights', and it names parts of the model, which the evaluation names itself."""
    model = {"META_ARCHITECTURE": "GeneralizedRCNN", "BACKBONE": {"NAME": "build_timm_backbone"}}
    config = {"MODEL": model, "SOLVER": {"MAX_ITER": 1000}, "SEED": 77}
    run = dataclasses.replace(runs[0], record={}, config=config)
    meta = {**run.meta, "model": "IMR-CNN", "backbone": "lite0", "tau": 0.7000000001}
    meta["checkpoint"] = "/some/place/demo.safetensors"
    section = parse(show([recorded(run, meta=meta)]))[1]["run"].partition("Configuration of")[0]
    for words in ("Model IMR-CNN", "Backbone lite0", "Weights demo.safetensors", "τ 0.7 "):
        assert words in section
    assert not re.search("1000|77|GeneralizedRCNN|build_|/some", section)
    assert section.count("ot recorded") == 1 and "; iterations;" in section


@pytest.mark.slow
def test_evaluated_predictions_name_their_model(home, parse):
    """`imrcnn evaluate` of a predictions.json, and of a list of results that names nothing."""
    info = {"model": "IMR-CNN", "backbone": "lite0", "weights_sha256": "a1" * 32, "tau": 0.956366}
    info |= {"runtime": "torch", "version": "0.1.0", "config_sha256": "b2" * 32, "year": 2026}
    info["score_map"] = {"slope": 0.849, "offset": 2.9, "dataset": None}
    results = json.loads(home.file("coco_instances_results.json").read_text())
    coco = json.loads(home.gt.read_text())
    coco["annotations"] = [{"id": i, **result} for i, result in enumerate(results, 1)]
    texts = {}
    for name, content in (("named", {**coco, "info": info}), ("list", results)):
        dt, out = home.path / f"{name}.json", home.path / name
        dt.write_text(json.dumps(content))
        options = ["--gt", home.gt, "--dt", dt, "--output", out, "--resamples", "0"]
        evaluate.main([*map(str, options)])
        dt.unlink()  # metrics.json has its info
        report.main([str(out), "--output", str(out / "r.html"), "--card", str(out / "c.md")])
        texts[name] = parse((out / "r.html").read_text())[1]["run"]
    for words in (
        "IMR-CNN",
        "lite0",
        "a1a1a1a1",
        "b2b2b2b2",
        "torch",
        "0.956 ",
        "σ(0.849 · logit(score) + 2.9) ",
        "study/annotations/",
    ):
        assert words in texts["named"]
    assert "IMR-CNN" not in texts["list"] and "Not recorded: model; backbone; seed" in texts["list"]
    for name, text in texts.items():
        assert text.count("ot recorded") == 1
        assert "config.yaml" not in (home.path / name / "c.md").read_text()


def test_a_cell():
    for name, value, limits, text, interval, bar in (
        ("iou", 81.25, [70, 90.04], "81.2", "[70.0, 90.0]", [81.25, 70, 90.04]),
        ("iou", 81.25, [None, None], "81.2", "", [81.25, 81.25, 81.25]),
        ("iou", None, [1, 2], "–", "", None),
        ("iou", math.nan, None, "–", "", None),
        ("TP", 1234.0, None, "1,234", "", None),
        ("fp_per_image", 0.125, [0, 1], "0.12", "[0.00, 1.00]", None),
    ):
        cell = tables.cell({name: value, f"{name}_ci": limits}, name)
        assert cell == {"text": text, "interval": interval, "bar": bar}


def test_values_are_those_of_metrics_json(runs, study):
    def document(model):
        return json.loads((study / f"runs/{model}/inference/study_test/metrics.json").read_text())

    # On top the values at the threshold of the evaluation, as in the matrices and the gallery.
    average, sensitivity, specificity, _, alarms, _ = tables.key_metrics(runs)
    for i, run in enumerate(runs):
        metrics = document(run.name)
        for card, group, key, digits in (
            (sensitivity, metrics["lesion"], "recall", 1),
            (specificity, metrics["image"], "specificity", 1),
            (alarms, metrics["lesion"], "fp_per_image", 2),
        ):
            name, shown = card["cells"][i]
            ci, limits = group[f"{key}_ci"], ""
            if None not in ci:  # all resamples agree
                limits = "[{:.{d}f}, {:.{d}f}]".format(*ci, d=digits)
            texts = run.name, f"{group[key]:.{digits}f}", limits
            assert (name, shown["text"], shown["interval"]) == texts
    at = "score ≥ 0.7"
    both = tables.key_threshold(runs)
    assert (
        both.startswith(f"{at} (fixed: TEST.SCORE_THRESH or --tau). ") and "(τ_val) is 0.62" in both
    )
    without = tables.key_threshold([recorded(run, "tau_val") for run in runs])
    assert without.startswith(f"{at} (fixed") and "τ_val" not in without
    area = document("IMR-CNN")["segm"]["AP50_voc"]
    assert average["cells"][2][1]["text"] == f"{area:.1f}"

    rows_of = {table["title"]: table["rows"] for table in tables.metric_tables(runs)}
    units = ("Lesions", "Images", "Patients", "Unique lesions")
    titles = [f"{unit}{at}" for unit in units for at in ("", ", τ_val")]
    last = ["Calibration", "As the paper’s Table 5"]
    assert list(rows_of) == ["Detection, over all scores", *titles, *last]
    metrics = document("MR-CNN")
    for title, label, value in (
        ("Lesions", "sensitivity (recall)", metrics["lesion"]["recall"]),
        ("Images, τ_val", "sensitivity", metrics["tau_val"]["image"]["recall"]),
        (last[0], "Brier score", metrics["calibration"]["brier"]),
        (last[1], "specificity", metrics["paper"]["specificity"]),
    ):
        rows = {row["label"]: row["cells"] for row in rows_of[title]}
        assert rows[label][0]["text"] == f"{value:.1f}"
    assert rows_of["Images, τ_val"][0]["cells"][0]["text"] == "0.62"


def test_sizes_and_matrices(runs):
    tables_of_sizes = tables.size_tables(runs)
    assert [row["label"] for row in tables_of_sizes[1]["rows"]] == ["small", "medium", "large"]
    for table in tables_of_sizes:
        lesions = sum(int(row["cells"][0]["text"]) for row in table["rows"])
        assert lesions == runs[0].results.meta["lesions"]
        widths = {len(table["columns"]) - 1, *(len(row["cells"]) for row in table["rows"])}
        assert widths == {1 + 2 * len(runs)}
    for run, table in zip(runs, tables.confusions(runs), strict=True):
        lesion = run.metrics["lesion"]
        (truth, (hits, missed)), (background, (alarms, nothing)) = table["rows"]
        assert (truth, background) == ("lesion", "background")
        counts = [f"{lesion[key]:.0f}" for key in ("TP", "FN", "FP")]
        assert [hits[0], missed[0], alarms[0], nothing[0]] == [*counts, "–"]
        assert [hits[2], alarms[2], nothing[2]] == pytest.approx([lesion["recall"] / 100, 0, 0])


def test_patients_with_most_errors_first(runs):
    table = tables.patient_table(runs)
    images = runs[0].results.ground_truth.images
    assert len(table["rows"]) == len({image["patient_id"] for image in images})
    assert sum(row[1] for row in table["rows"]) == len(images)
    counts = np.array([[row.split(" / ") for row in rows[3:]] for rows in table["rows"]], int)
    errors = counts[..., 1:].sum(axis=(1, 2))
    assert (np.diff(errors) <= 0).all()
    for run, total in zip(runs, counts.sum(axis=0).tolist(), strict=True):
        assert total == [run.metrics["lesion"][key] for key in ("TP", "FP", "FN")]
    assert len(tables.patient_table(runs, most=2)["rows"]) == 2


def test_screening(runs):
    table = tables.screening(runs, [0.05])
    points = [(label, at) for at in ("score ≥ 0.7", "τ_val") for label in ("PPV", "NPV")]
    rows = [(row["label"], row["hint"]) for row in table["rows"]]
    assert rows == [(f"{label} at 5 %", at) for label, at in points]
    image = runs[0].metrics["image"]
    ends = zip(image["recall_ci"], image["specificity_ci"], strict=True)
    low, high = (tables.predictive_values(*end, 0.05)[0] for end in ends)
    shown = table["rows"][0]["cells"][0]
    assert shown["interval"] == f"[{low:.1f}, {high:.1f}]"
    hits, alarms = 0.5 * image["recall"], 9.5 * (100 - image["specificity"])
    assert shown["text"] == f"{100 * hits / (hits + alarms):.1f}"
    expected = f"{hits + alarms:.1f} raise an alarm, {hits:.1f} of them rightly; {50 - hits:.1f} w"
    assert expected in table["sentences"][0]


@given(st.tuples(*[st.integers(1, 50)] * 4))
def test_at_its_own_prevalence_a_table_has_its_own_predictive_values(counts):
    tp, fp, fn, tn = counts
    sensitivity, specificity = 100 * tp / (tp + fn), 100 * tn / (tn + fp)
    values = tables.predictive_values(sensitivity, specificity, (tp + fn) / sum(counts))
    assert values == pytest.approx((100 * tp / (tp + fp), 100 * tn / (tn + fn)))


def test_undefined_predictive_values():
    undefined = math.nan, math.nan
    assert tables.predictive_values(90, math.nan, 0.05) == pytest.approx(undefined, nan_ok=True)
    never_an_alarm = pytest.approx((math.nan, 95), nan_ok=True)
    assert tables.predictive_values(0, 100, 0.05) == never_an_alarm
    for prevalence in (0, 1, -0.1, 5, math.nan):
        with pytest.raises(ValueError, match=f"prevalence is {prevalence}"):
            tables.predictive_values(90, 90, prevalence)


def test_differences_are_those_of_a_comparison(runs):
    table = tables.differences(runs)
    compared = compare(gather(runs), Bootstrap(60)).tests
    for row, test in zip(table["all_rows"], compared, strict=True):
        models, metric, difference, interval, p, name = (cell.replace("−", "-") for cell in row)
        assert (models, name) == (f"{test.first} - {test.second}", test.test)
        limits = ", ".join(f"{limit:+.1f}" for limit in (test.low, test.high))
        numbers = f"{test.estimate:+.1f}", "–" if "nan" in limits else f"[{limits}]"
        assert (difference, interval.replace("\u00a0", " ")) == numbers
        # The primary endpoint's as it is, all others adjusted.
        assert test.primary == metric.endswith("(primary)")
        assert p == p_text(test.p if test.primary else test.p_holm).replace("<", "< ")
    assert len(table["rows"]) == 3 * 4 < len(table["all_rows"])
    assert table["note"].startswith("60 paired resamples of patients.")
    assert tables.differences(runs[:1]) is None


@pytest.mark.slow
def test_runs_of_one_fold_are_reported(write_gt, write_run, tmp_path, show, parse):
    gt = write_gt(tmp_path / "gt.json", images=6)
    runs = [load_run(write_run(name, gt, model=name, fold=(0, 3))) for name in ("MR", "IMR")]
    assert parse(show(runs[:1]))[1]["run"].count("0 of 3") == 1
    assert "IMR − MR" in parse(show(runs))[1]["results"]


def words(plot):
    """All text in a plot."""
    svg = base64.b64decode(plot["source"].removeprefix("data:image/svg+xml;base64,")).decode()
    return " ".join(re.findall(r"<text[^>]*>([^<]*)<", svg))


def test_all_curves_of_all_models(runs, text, parse):
    plots = page.curve_plots(runs)
    assert set(plots) == {"pr", "froc", "roc", "calibration", "thresholds"}
    assert all(run.name in words(plot) for plot in plots.values() for run in runs)
    values = {"pr": ("segm", "AP50_voc"), "froc": ("froc", "mean"), "roc": ("image", "auroc")}
    alternatives = " ".join(image.get("alt") for image in parse(text)[0].iter("img"))
    for key, (group, metric) in {**values, "calibration": ("calibration", "ece")}.items():
        known = "; ".join(f"{run.name}: {run.metrics[group][metric]:.1f}" for run in runs)
        assert plots[key]["known"] == known and f". {known}." in alternatives
    assert 500 < plots["pr"]["width"] < 700


def test_scores_before_and_after_their_map(write_gt, write_run, tmp_path, parse, show):
    score_map = ScoreMap(0.5, -1, "polyps_val")
    options = {"score_map": score_map, "tau": 0.5, "tau_val": 0.4}
    run = load_run(f"mine={write_run('a', write_gt(tmp_path / 'gt.json'), **options)}")
    plots, text = page.curve_plots([run]), show([run])
    for name, threshold in (
        ("pr", "operating point, mapped score ≥ 0.5"),
        ("froc", "operating point, mapped score ≥ 0.5"),
        ("thresholds", "Mapped score threshold"),
    ):
        assert threshold in words(plots[name])
    for name, group in (("before the map", "calibration_raw"), ("after it", "calibration")):
        values = run.metrics[group]
        legend = f"mine, {name}: ECE {values['ece']:.1f} %, Brier {values['brier']:.1f} %"
        assert legend in words(plots["calibration"])
    records = json.loads((run.folder / "coco_instances_results.json").read_text())
    for group, key in (("calibration_raw", "raw_score"), ("calibration", "score")):
        mean = 100 * np.mean([record[key] for record in records])
        assert run.metrics[group]["mean_score"] == pytest.approx(mean)
        assert run.recorded[group]["mean_score"] == pytest.approx(mean)
    sections, at = parse(text)[1], "mapped score ≥ 0.5"
    eces = [run.metrics[group]["ece"] for group in ("calibration_raw", "calibration")]
    assert "no map of scores" not in sections["curves"]
    raw = load_run(f"raw={write_run('b', write_gt(tmp_path / 'gt.json'), tau_val=0.4)}")
    assert "raw: no map of scores is recorded" in parse(show([raw]))[1]["curves"]
    both = summary(run.results)
    assert (
        "mapped score ≥ 0.4 (tau_val" in both and "mapped score ≥ 0.5 (TEST.SCORE_THRESH)" in both
    )
    for name, expected in (
        ("results", f"matrices and test images: {at} (fixed"),
        ("results", "chosen on validation data (τ_val) is 0.4"),
        ("metrics", f"Lesions {at}"),
        ("metrics", "As the paper’s Table 5 raw score ≥ 0.7"),
        ("metrics", "expected calibration error before the map {:.1f}".format(*eces)),
        ("metrics", "expected calibration error after it {1:.1f}".format(*eces)),
        ("curves", f"mine, {at}"),
        ("curves", "Before and after the map"),
        ("run", "Map of scores σ(0.5 · logit(score) − 1), fitted on polyps_val"),
    ):
        assert expected in sections[name]


def test_boxes_alone_of_two_classes(write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "gt.json", images=6, classes=("polyp", "cancer"))
    for i in range(1, 7):
        Image.new("RGB", (60, 60)).save(tmp_path / f"{i}.png")
    run = load_run(f"mine={write_run('a', gt, boxes=True, skill=1)}", images=tmp_path)
    text = words(page.curve_plots([run])["pr"])
    assert "mine, polyp" in text and "mine, cancer" in text
    gallery = page.lesion_gallery([run])
    assert gallery["overlap"] == "box IoU"
    hits = [outcome for entry in gallery["images"] for outcome in entry["runs"] if outcome["tp"]]
    assert hits and None not in [outcome["iou"] for outcome in hits]
    of_class = {table["title"]: table["rows"] for table in tables.metric_tables([run])}
    for name in ("polyp", "cancer"):
        cells = {row["label"]: row["cells"][0] for row in of_class[f"Class: {name}"]}
        assert cells["sensitivity (recall)"] == tables.cell(run.metrics["by_class"][name], "recall")
    card = write_model_card(run, tmp_path / "card.md").read_text(encoding="utf-8")
    assert "### Class: cancer" in card and "Deep learning: object detection." in card
    assert "Dice" not in card and "mIoU" not in card and "| Boxes with scores" in card


def test_masks_without_scores_have_the_metrics_of_masks(write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "gt.json", images=6)
    keys = "image_id", "category_id", "bbox", "segmentation"
    truth = json.loads(gt.read_text())["annotations"]
    dt = [{"score": None} | {key: annotation[key] for key in keys} for annotation in truth]
    folder = write_run("a", gt, dt=dt) / "inference" / "kvasir_seg_test"
    content = json.loads((folder / "metrics.json").read_text())
    content["meta"]["dt"] = str(folder / "coco_instances_results.json")
    (folder / "metrics.json").write_text(json.dumps(content))
    runs = [load_run(folder)]
    of_curves, at_tau, *others = tables.metric_tables(runs)
    assert "≥" not in at_tau["caption"] + tables.key_threshold(runs)
    rows = [row for table in (of_curves, at_tau, *others) for row in table["rows"]]
    shown = {row["label"]: row["cells"][0] for row in rows}
    for label in ("Dice", "IoU", "mIoU", "mDice", "IoU, all lesions"):
        assert shown[label]["text"] == "100.0", label
    assert shown["AP50"]["text"] == "–"


def test_the_command(home, capsys):
    run, output, card = (home.path / name for name in ("run", "out/report.html", "card.md"))
    for arguments, named in (
        (["--card", card, f"a={run}", f"b={run}"], "--card"),
        (["--prevalence", "5", "--", run], "prevalence is 5"),
        (["nowhere", run], "nowhere"),
        ([run / "run.json"], "run.json is no folder"),
        (["--max-images", "-3", run], "--max-images -3"),
        (["--output", home.path, run], f"{home.path} is a folder"),
        (["--card", run / "run.json" / "card.md", run], "run.json is a file"),
    ):
        with pytest.raises(SystemExit) as stop:
            report.main(["--output", *map(str, (output, *arguments))])
        error = capsys.readouterr().err
        assert stop.value.code and named in error.splitlines()[-1]
        assert not output.exists() and not card.exists()
    report.main(["--output", str(output), f"mine={run}", "--card", str(card)])
    assert "mine" in output.read_text(encoding="utf-8")
    assert card.read_text(encoding="utf-8").startswith("---\nlibrary_name: imrcnn-d2\n")
    assert f"{output}, {card}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def gallery(runs):
    return page.lesion_gallery(runs)


def photo(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry["jpeg"])))


def polygons(path):
    """The (K, 2) corners of an SVG path of straight lines."""
    parts = ([point.split(",") for point in line.split("L")] for line in path.split("Z")[:-1])
    return [np.array([[x.lstrip("M"), y] for x, y in part], np.float32) for part in parts]


def test_gallery_of_all_images_with_their_outcomes(runs, gallery):
    assert gallery["runs"] == [run.name for run in runs]
    assert gallery["total"] == len(gallery["images"]) == len(runs[0].results.per_image)
    for position, entry in enumerate(gallery["images"]):
        for run, outcome in zip(runs, entry["runs"], strict=True):
            row = run.results.per_image[position]
            for key, column in (("name", "file_name"), ("patient", "patient_id")):
                assert entry[key] == row[column]
            assert [outcome[key.lower()] == row[key] for key in ("TP", "FP", "FN")] == [True] * 3
            assert outcome["score"] == pytest.approx(row["score"], abs=1e-4)
            assert (len(entry["truth"]), len(outcome["missed"])) == (row["n_gt"], row["FN"])
            assert outcome["hits"].count("M") >= row["TP"]
            assert bool(outcome["alarms"]) == (row["FP"] > 0)
            iou = pytest.approx(row["union_iou"], abs=0.01) if row["n_gt"] else None
            assert outcome["iou"] == iou
    json.dumps(gallery, allow_nan=False)


def test_contours_are_off_by_half_a_pixel_at_most(runs, gallery):
    truth = runs[0].results.ground_truth
    corners = 0
    for region, position in enumerate(truth.regions.image):
        of_image = np.flatnonzero(truth.regions.image == position).tolist()
        shown = polygons(gallery["images"][position]["truth"][of_image.index(region)])
        for ours, exact in zip(shown, region_contours(truth.regions, region), strict=True):
            points = [tuple(map(float, point)) for point in exact]
            distances = [abs(cv2.pointPolygonTest(ours[:, None], p, True)) for p in points]
            assert max(distances) <= page.CLOSENESS + 1e-6
            corners += len(ours) / len(exact)
    assert corners < 0.6 * len(truth.regions.image)  # and they are simpler for it


def test_photos_are_turned_and_without_metadata(study, gallery):
    folder = study / "datasets/study/images"
    (entry,) = (e for e in gallery["images"] if Image.open(folder / e["name"]).getexif())
    embedded = photo(entry)
    assert not embedded.getexif()
    with Image.open(folder / entry["name"]) as stored:
        on_its_side = np.asarray(stored.convert("RGB"), int)
    upright = np.rot90(on_its_side, k=-1)
    far = [np.abs(np.asarray(embedded) - pixels).mean() for pixels in (upright, on_its_side)]
    assert far[0] < 6 and far[1] > 12


def test_large_and_missing_images(study, tmp_path):
    run = load_run(study / "runs" / "MR-CNN", images=tmp_path)
    with pytest.raises(FileNotFoundError, match="hacked"):
        page.lesion_gallery([run])
    for image in run.results.ground_truth.images:
        path = tmp_path / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(study / "datasets/study/images" / image["file_name"]) as small:
            small.resize((1152, 576)).save(path)
    (entry,) = page.lesion_gallery([run], max_images=1)["images"]
    assert (entry["width"], entry["height"]) == (1152, 576)
    assert photo(entry).size == (512, 256)
    assert page.embed(path)[2] == 1152 / 512  # of its contours' closeness
    line = np.array([[0, 0], [50, 0.9], [99, 0], [99, 99], [0, 99], [0, 0]])
    assert [page.svg_path([line], scale).count("L") for scale in (1, 2)] == [4, 3]


HOSTILE = "</script><img src=x onerror=hacked=1>.png"


@pytest.fixture(scope="module")
def class_runs(tmp_path_factory):
    """Two classifiers on 36 images, one with a hostile name and one of a known patient."""
    root = tmp_path_factory.mktemp("classification_page")
    raw = draw_classes(root / "raw", (24, 24, 24))
    out = prepare_classes(raw, root / "gastric_recognition", ratio=(1, 1, 2)).out
    gt = out / "annotations" / "test.json"
    content = json.loads(gt.read_text())
    first, second = content["images"][:2]
    (out / "images" / HOSTILE).parent.mkdir(exist_ok=True)
    (out / "images" / first["file_name"]).rename(out / "images" / HOSTILE)
    first["file_name"], second["patient_id"] = HOSTILE, "P-7"
    gt.write_text(json.dumps(content))
    return [
        load_run(write_classifier(root / "runs" / name, gt, skill=skill, backbone=name))
        for name, skill in (("vgg19.tv_in1k", 0.5), ("resnet50", 1.0))
    ]


@pytest.fixture(scope="module")
def class_page(class_runs, tmp_path_factory):
    return render_report(class_runs, tmp_path_factory.mktemp("class_page") / "report.html")


def test_the_page_is_sound_and_has_the_values_of_the_evaluation(class_runs, class_page, parse):
    tree, sections = parse(class_page.read_text(encoding="utf-8"))
    assert len(list(tree.iter("img"))) == 2
    top = sections["results"]
    for run in class_runs:
        metrics = run.metrics["recognition"]
        low, high = metrics["balanced_accuracy_ci"]
        assert f"{metrics['balanced_accuracy']:.1f} [{low:.1f}, {high:.1f}]" in top
        assert f"{run.metrics['cancer']['specificity']:.1f}" in top
        for name in run.metrics["meta"]["classes"]:
            assert f"{metrics[f'accuracy_{name}']:.1f}" in top
            assert f"{metrics[f'precision_{name}']:.1f}" in sections["metrics"]
        for row in run.results.confusion.rows():
            for count in row:
                assert f"{count} {100 * count / sum(row):.1f} %" in sections["confusion"]
    assert "Score threshold" not in sections["run"] and "lesion" not in sections["data"]
    for name, words in (
        ("results", "ResNet50, published"),
        ("results", "ResNet50 − VGG19 balanced accuracy (primary)"),
        ("run", "224 × 224 pixels"),
        ("run", "pre-training: head for 30 iterations at a rate of 0.001"),
        ("data", "72 images offered"),
        ("data", "12 gastric cancer"),
    ):
        assert words in sections[name]


def test_what_is_undefined_of_a_class_has_no_reason_of_detectors():
    """None of four images is of the third class, and none is predicted as the second."""
    names = ("cancer", "ulcer", "gastritis")
    truth = {
        "images": [{"id": i} for i in range(4)],
        "annotations": [{"image_id": i, "category_id": 1 + i // 2} for i in range(4)],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
    }
    results = [{"image_id": i, "scores": [0.9, 0.05, 0.05]} for i in range(4)]
    document = json.loads(strict_json(evaluate_classification(truth, results).document()))
    shown = tables.class_metric_tables([SimpleNamespace(metrics=document)], names, [])
    rows = {(table["title"], row["label"]): row for table in shown for row in table["rows"]}
    assert rows["Class: ulcer", "precision"]["cells"][0]["text"] == "–"
    assert rows["Class: gastritis", "AUROC"]["cells"][0]["text"] == "–"
    assert not any("detections" in row["hint"] for row in rows.values())


def test_probabilities_before_and_after_a_temperature(class_runs, tmp_path, show, parse):
    temperature, gt = Temperature(2.5, "gastric_val"), class_runs[0].gt_path
    run = load_run(write_classifier(tmp_path / "run", gt, temperature=temperature))
    sections = parse(show([run]))[1]
    assert "Temperature 2.5, fitted on gastric_val" in sections["run"]
    plot = words(page._class_plots([run])["calibration"])
    for when, group in (("before the map", "calibration_raw"), ("after it", "calibration")):
        ece = run.metrics[group]["ece"]
        assert f"expected calibration error {when} {ece:.1f} " in sections["metrics"]
        assert f"{when}: ECE {ece:.1f} %" in plot


def test_the_gallery_of_a_large_test_set_is_cut(class_runs, tmp_path):
    text = render_report(class_runs, tmp_path / "report.html", max_images=10).read_text(
        encoding="utf-8"
    )
    assert text.count('"jpeg"') == 10 and "10 of 36 test images" in text
    truth = class_runs[0].results.ground_truth
    of_truth = sum(run.results.probability[range(36), truth.label] for run in class_runs)
    names = {image["name"] for image in classification_gallery(class_runs, 10)["images"]}
    assert {truth.images[i]["file_name"] for i in of_truth.argsort()[:5]} <= names
    assert len(names) == 10


@pytest.mark.slow
def test_in_a_browser(class_runs, class_page):
    right = [[bool(r) for r in run.results.right()] for run in class_runs]
    with chromium() as browser, opened(browser, class_page) as tab:
        assert tab.evaluate("window.hacked") is None
        tiles = tab.locator(".tiles > li")

        def shown(choice):
            tab.check(f"input[name=show][value={choice}]", force=True)
            return tiles.count()

        assert shown("all") == 36
        wrong = sum(not all(pair) for pair in zip(*right, strict=True))
        assert shown("wrong") == wrong and shown("right") == 36 - wrong
        first, second = (run.results.probability.argmax(axis=1) for run in class_runs)
        assert shown("disagree") == (first != second).sum()
        tab.select_option("select[name=model]", "1")
        assert shown("wrong") == right[1].count(False)
        shown("all")
        tab.select_option("select[name=label]", "2")
        assert tab.locator(".tiles .panel > b").all_inner_texts() == ["gastric ulcer"] * 12

        tab.locator(".tiles button").first.click()
        tab.keyboard.press("End")
        assert tab.locator(".viewer-place").inner_text().startswith("12 of 12")
        assert tab.locator("dialog .verdict").count() == 2
        tab.keyboard.press("Escape")
        assert not tab.locator("dialog").is_visible()
        printed = tab.locator("[data-print]").text_content()
        assert "12 of 12 images (All, gastric ulcer, ResNet50, typical first)" in printed
        tab.set_viewport_size({"width": 400, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
