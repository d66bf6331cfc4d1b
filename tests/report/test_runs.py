"""Runs as they are read, one's own and those of others."""

import html
import json
import logging
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from mutations import damaged_bytes, damaged_json
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.output import write_results
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare as compare_runs
from imrcnn_d2.report.comparison import gather, write_comparison
from imrcnn_d2.report.html import render_report
from imrcnn_d2.report.html.page import grad_cams
from imrcnn_d2.report.model_card import write_model_card
from imrcnn_d2.report.tables import latex_text, markdown_text
from imrcnn_d2.utils.files import BadInputError, file_sha256

RESULTS = "coco_instances_results.json"


@pytest.fixture
def gt(tmp_path, monkeypatch):
    """The test set of a prepared data set "kvasir_seg" of two images, in $IMRCNN_DATASETS."""
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "datasets"))
    root = tmp_path / "datasets" / "kvasir_seg"
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 50} for i in (1, 2)]
    content = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    content["annotations"] = [rectangle(i, 0, 0, 10, 10) for i in (1, 2)]
    path = root / "annotations" / "test.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def trained(gt, tmp_path):
    """A function that writes an OUTPUT_DIR with evaluations: one hit of IoU 0.8, one miss."""

    def do(*names, run=None, config=None, **meta):
        output = tmp_path / "runs" / "mine"
        dt = [rectangle(1, 0, 0, 8, 10, score=0.6)]
        results = evaluate_lesions(gt, dt, tau=0.5)
        for name in names:
            write_results(results, output / "inference" / name, dataset=name, **meta)
            (output / "inference" / name / RESULTS).write_text(json.dumps(dt))
        if run:
            (output / "run.json").write_text(json.dumps(run))
        if config:
            (output / "config.yaml").write_text(config)
        return output

    return do


def test_a_training_without_run_json_and_config(trained, gt, monkeypatch):
    output = trained("kvasir_seg_test", "kvasir_seg_val")
    run = load_run(output)
    assert (run.name, run.model, run.run_folder.name) == ("mine",) * 3
    assert run.dataset == run.folder.name == "kvasir_seg_test"
    assert (run.seed, run.fold, run.backbone) == (None,) * 3 and not run.record and not run.config
    assert run.gt_path == gt and run.image_root == gt.parent.parent / "images"
    # Scored again at the recorded threshold, 0.5, which the detection of 0.6 reaches.
    assert run.results.lesion["TP"] == run.metrics["lesion"]["TP"] == 1
    assert run.results.lesion["iou"] == pytest.approx(80) and run.results.tau_val is None
    path = output / "inference" / "kvasir_seg_test" / "metrics.json"
    metrics = json.loads(path.read_text())
    bootstrap = {"resamples": 20, "seed": 3, "all_coco": True, "unit": "image"}
    metrics["meta"]["bootstrap"], metrics["lesion"]["dice"] = bootstrap, None
    metrics["lesion"]["iou"] += 0.01
    path.write_text(json.dumps(metrics | {"tau_val": {"tau": 0.61, "rule": "f1", "dataset": "v"}}))
    changed = load_run(output)
    assert changed.results.tau_val["tau"] == 0.61 and changed.results.tau_val["dataset"] == "v"
    assert changed.results.tau_val["lesion"]["TP"] == 0 and changed.results.lesion["TP"] == 1
    assert changed.metrics["meta"]["bootstrap"] == bootstrap and not run.remarks
    assert "(lesion/iou, lesion/dice)" in changed.remarks[0]

    assert load_run(f"ours (300)={output}").name == "ours (300)"
    assert load_run(output, name="given").name == "given"
    monkeypatch.chdir(output)
    assert load_run(".").name == "mine"
    odd = output.with_name("lr=1e-5")
    output.rename(odd)
    assert load_run(str(odd)).name == "lr=1e-5"  # a folder, not a label
    (odd / "inference" / "kvasir_seg_test" / RESULTS).unlink()
    with pytest.raises(FileNotFoundError, match=RESULTS):
        _ = load_run(f"a={odd}").results


def test_run_json_and_config(trained, caplog):
    record = {"model": "IMR-CNN", "backbone": "R-50", "seed": 3, "fold": {"index": 1, "of": 5}}
    config = "DATASETS:\n  TEST: [theirs]\n  VAL: [kvasir_seg_test]\n"
    with caplog.at_level(logging.WARNING):
        run = load_run(trained("kvasir_seg_test", "theirs", run=record, config=config))
    assert "has not finished training" in caplog.text
    assert (run.dataset, run.model, run.backbone, run.seed) == ("theirs", "IMR-CNN", "R-50", 3)
    assert run.fold == {"index": 1, "of": 5}
    assert run.settings["DATASETS.VAL"] == ["kvasir_seg_test"]
    # The folder of an evaluation finds the training it is part of.
    inner = load_run(run.run_folder / "inference" / "kvasir_seg_test")
    assert (inner.name, inner.model, inner.dataset) == ("mine", "IMR-CNN", "kvasir_seg_test")


def test_an_evaluation_of_other_weights_is_not_of_the_training(trained):
    """Into whose OUTPUT_DIR `train --eval-only` put it; a run that was moved still is its own."""
    record = {"model": "IMR-CNN", "finished": "2026", "iterations": 4000}
    for output_dir, checkpoint, own in (
        ("output/mine", "/here/output/mine/model_best.pth", True),
        ("../runs/mine", "/there/runs/mine/model_best.pth", True),
        ("/x/mine", "/x/mine/model_best.pth", True),
        (".", "/x/mine/model_best.pth", True),
        ("output/mine", "/here/imrcnn_d2/weights/demo.safetensors", False),
        ("output/mine", "/here/output/other/model_best.pth", False),
    ):
        config = f"OUTPUT_DIR: {output_dir}\n"
        output = trained("a_test", run=record, config=config, checkpoint=checkpoint)
        assert load_run(output).record == (record if own else {}), checkpoint


def test_which_evaluation(trained, tmp_path):
    output = trained("kvasir_seg_val", config="DATASETS:\n  TEST: [kvasir_seg_test]\n")
    with pytest.raises(FileNotFoundError, match="kvasir_seg_test.*kvasir_seg_val"):
        load_run(output)  # validation is not taken for the test set
    (output / "config.yaml").unlink()
    assert load_run(output).folder.name == "kvasir_seg_val"  # but it is where there is no other
    with pytest.raises(FileNotFoundError, match="kvasir_seg_val, other_val"):
        load_run(trained("other_val"))
    trained("kvasir_seg_test", "other_test")
    with pytest.raises(ValueError, match="kvasir_seg_test, other_test"):
        load_run(output)
    assert load_run(output, dataset="other_test").folder.name == "other_test"
    with pytest.raises(FileNotFoundError, match="egc_test"):
        load_run(output, dataset="egc_test")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=str(folder)):
            load_run(folder)


def test_the_recorded_ground_truth(trained, gt, tmp_path):
    elsewhere, images = tmp_path / "elsewhere.json", gt.parents[1] / "images"
    elsewhere.write_bytes(gt.read_bytes())
    output = trained("kvasir_seg_test", gt=str(elsewhere), gt_sha256=file_sha256(gt))
    assert load_run(output).gt_path == elsewhere
    images.symlink_to(images.rename(tmp_path / "pixels"))  # among the user's own data sets
    assert load_run(output).image_root == images
    elsewhere.write_text(elsewhere.read_text() + "\n")  # changed: the prepared one was scored
    assert load_run(output).gt_path == gt
    elsewhere.unlink()
    assert load_run(output).gt_path == gt
    gt.write_text(gt.read_text() + "\n")
    with pytest.raises(ValueError, match=str(gt)):
        _ = load_run(output).gt_path
    gt.unlink()
    with pytest.raises(FileNotFoundError, match="elsewhere.json.*test.json"):
        _ = load_run(output).results


@pytest.mark.parametrize("masks", [False, True])
def test_results_scored_without_a_training(gt, tmp_path, masks):
    """Masks are not detections: those next to their metrics have scores that nobody predicted."""
    dt, scores, images = tmp_path / "dt", tmp_path / "scores", gt.parents[1] / "images"
    if masks:
        mask = Image.new("L", (50, 40))
        mask.paste(255, (0, 0, 10, 10))
        for folder in (dt, scores):
            folder.mkdir()
        for name in ("1.png", "2.png"):
            mask.save(dt / name)
        (scores / RESULTS).write_text("[]")
    else:
        dt.write_text(json.dumps([rectangle(1, 0, 0, 10, 10, score=0.9)]))
    write_results(evaluate_lesions(gt, dt), scores, gt=str(gt), dt=str(dt))
    run = load_run(scores)
    assert (run.name, run.dataset, run.run_folder, run.record) == ("scores", None, None, {})
    assert run.gt_path == gt and run.image_root == images
    assert run.results.lesion["TP"] == 1 + masks
    assert np.isnan(run.results.segm["AP50_voc"]) == masks
    images.rmdir()
    with pytest.raises(FileNotFoundError, match="images"):
        _ = load_run(scores).image_root
    dt.rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=str(dt)):
        _ = load_run(scores).results


METRICS, DETECTIONS = "metrics.json", "coco_instances_results.json"
HOSTILE = "<img src=x onerror=1>[a](http://x.y)|`=1`"


def everything(home, name="mine"):
    """Page, card and comparison of the run as texts."""
    out, run = home.path / "out", home.load(name)
    texts = [render_report([run], out / "report.html"), write_model_card(run, out / "card.md")]
    comparison = compare_runs(gather([run]), Bootstrap(20), primary="bbox/AP50_voc")
    texts.append(write_comparison(comparison, out / "comparison")[0])
    return [path.read_text(encoding="utf-8") for path in texts]


BAD_VALUES = ["x", [], {}, [1], True, -1, 1e400, float("nan"), 10**30]
NO_TEXT = (1, [], {}, True)
OF_METRICS = {
    **{f"meta.{key}": (*BAD_VALUES, ...) for key in ("tau", "iou_threshold", "iou_type")},
    **{f"meta.{key}": NO_TEXT for key in ("gt", "gt_sha256", "dt", "dataset", "task")},
    "meta.checkpoint_sha256": (1, []),
    "meta.bootstrap": ("x", [], {}, 1, {"resamples": 10**12, "seed": 0}, {"resamples": 2}),
    "meta.versions": ("x", [], {"torch": 1}),
    "meta.score_map": ("x", [1], {"slope": 1.0}, {"slope": "1", "offset": 0.0}),
    "meta": (None, "x", [], {}, ...),
    "tau_val": ("x", [], {}, {"tau": 2, "rule": "f1"}, {"tau": 0.5}, {"tau": 0.5, "rule": 1}),
    "tau_val.tau": (float("nan"), float("inf"), -0.1, 1.5, "0.5", None),
    "lesion": (None, "x", [], {"TP": "x"}, {"TP": {}}, ...),
    "segm": ("x", [], {"AP": "100"}, {"AP": float("nan")}),
}
OF_RUN = {
    **dict.fromkeys(("model", "backbone", "command", "device", "finished"), NO_TEXT),
    "seed": ("1", 1.5, [], True),
    "fold": (1, {}, {"index": 0}, {"index": 5, "of": 5}, {"index": 0, "of": 10**12}),
    "git": ("x", {"revision": 1}),
    "hours": ("x", float("nan")),
    "phases": ("x", [1], [{}], [{"name": "a", "lr": "x"}]),
    "datasets": ("x", [], {"a": 1}, {"a": {}}, {"a": {"images": "1"}}),
    "input": (1, {"size": []}),
}


CONTENTS = [b"", b"\xff\xfe", b"[]", b"1", b"{", b'{"a": 1', b"[" * 100_000, b"null", b"\0" * 99]


@pytest.mark.parametrize(("name", "table"), [(METRICS, OF_METRICS), ("run.json", OF_RUN)])
def test_files_and_values_of_another_kind(home, name, table):
    before = home.file(name).read_bytes()
    for key, value in ((key, value) for key, values in table.items() for value in values):
        home.change(name, {key: value})
        with pytest.raises(BadInputError, match=f"is no JSON|{key.rpartition('.')[2]}") as caught:
            home.load()
        assert name in caught.value.file, (key, value)
        home.file(name).write_bytes(before)
    for content in CONTENTS:
        home.file(name).write_bytes(content)
        with pytest.raises(BadInputError, match=re.escape(name)):
            home.load()


def test_a_run_does_not_choose_how_long_a_report_takes(home, monkeypatch):
    monkeypatch.setattr("imrcnn_d2.report.runs.MOST_RESAMPLES", 7)
    home.change(METRICS, {"meta.bootstrap": {"resamples": 100_000, "seed": 0}})
    assert home.load().metrics["meta"]["bootstrap"]["resamples"] == 7


BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in pairwise("abcdefghi"))
CONFIGS = [
    *(BOMB, "a: &a [*a]", "a: &a {b: *a}", "MODEL: []", "DATASETS: {TEST: 5}", "1", "a: [", ""),
    *("MODEL: !!python/object/apply:os.system ['x']", "a: !!timestamp x", "a: !!int ''"),
    *("MODEL: {TIMM: x}", "OUTPUT_DIR: [x]", 'a: "\\ud800"', "? [1]\n: 2"),
    *("a: 2001-99-99", "a: {" * 5000, "# " + "x" * 300_000, "{}"),
]


def test_a_config_that_is_none_is_left_out(home):
    for text in CONFIGS:
        home.file("config.yaml").write_text(text)
        assert home.load().config == {}, text


@pytest.mark.slow
def test_metrics_are_those_of_the_detections(home):
    """Not those of metrics.json, of which the page says that they are others."""
    true = everything(home)
    assert "other metrics" not in "".join(true)
    theirs = json.loads(home.file(METRICS).read_text())
    for group in ("bbox", "segm", "lesion", "image", "patient"):
        theirs[group] = {key: 12.343 if value else value for key, value in theirs[group].items()}
        theirs["tau_val"][group] = theirs[group]
    theirs["by_size"] = theirs["undefined_shares"] = {"x": 12.343}
    theirs["meta"] |= {"images": 12343, "lesions": 12343, "patients": None, "classes": ["x"]}
    theirs["meta"]["lesion_free_images"] = 0
    home.file(METRICS).write_text(json.dumps(theirs))
    for text, expected in zip(everything(home), true, strict=True):
        assert not re.search(r"12\.3|12,343", text) and re.search(r"\d\d\.\d", expected)
        assert "metrics.json holds other metrics than its detections give" in text
        values, kept = (re.findall(r"\d\d\.\d \[.{9}", page) for page in (text, expected))
        assert values == kept


@pytest.fixture
def secret(home):
    """An image of another patient, outside the data set; it is plain red."""
    path = home.path / "private" / "secret.png"
    path.parent.mkdir()
    Image.new("RGB", (96, 96), (255, 0, 0)).save(path)
    return path


def test_no_image_outside_the_data_set(home, secret):
    images = home.path / "datasets/study/images"
    (images / "link.png").symlink_to(secret)
    (images / "linked").symlink_to(secret.parent)
    places = str(secret), "../../../private/secret.png", "a/../../../../private/secret.png"
    for name in (*places, "link.png", "linked/secret.png"):
        home.change_data(lambda coco, name=name: coco["images"][0].update(file_name=name))
        with pytest.raises(BadInputError, match="leads out"):
            render_report([home.load()], home.path / "report.html")
        assert not (home.path / "report.html").exists()


def test_a_run_cannot_name_a_folder_of_images(home, secret):
    """Nor a link to one next to a ground truth that came with it."""
    home.change(METRICS, {"meta.image_root": str(secret.parent)})
    assert home.load().image_root == home.path / "datasets/study/images"
    theirs = shutil.copytree(home.gt.parent, home.path / "download/data/annotations")
    (theirs.parent / "images").symlink_to(secret.parent)
    home.change(METRICS, {"meta.gt": str(theirs / "test.json"), "meta.dataset": "theirs_test"})
    run = home.load()
    assert run.gt_path == theirs / "test.json"
    with pytest.raises(FileNotFoundError, match="--images"):
        _ = run.image_root
    page = render_report([run], home.path / "report.html").read_text()
    assert "No gallery" in page and '"jpeg"' not in page
    assert home.load(images=secret.parent).image_root == secret.parent  # the user may name any
    with pytest.raises(FileNotFoundError, match="nowhere"):
        home.load(images=home.path / "nowhere")


def test_a_run_cannot_name_any_ground_truth(home, secret):
    """Its content, names of patients among it, would be in the page."""
    private = shutil.copytree(home.gt.parent, secret.parent / "study/annotations") / "test.json"
    home.change(METRICS, {"meta.gt": str(private), "meta.gt_sha256": ..., "meta.dataset": None})
    with pytest.raises(ValueError, match="sha256"):
        _ = home.load().gt_path
    shutil.copy(home.gt, home.gt.with_name("other.json"))
    for dataset in ("../private/study_test", "study_other"):
        home.change(METRICS, {"meta.dataset": dataset, "meta.gt": None})
        with pytest.raises(FileNotFoundError):
            _ = home.load().gt_path


def test_a_plot_of_the_run_that_is_a_link(home, secret):
    folder = home.path / "run/inference/study_test"
    (folder / "grad_cam.png").symlink_to(secret)
    with pytest.raises(BadInputError, match="leads out"):
        grad_cams([home.load()])


MARKUP = [
    "[a](http://x.y)", "![a](http://x.y/a.png)", "[a]: http://x.y", "<http://x.y>", "http://x.y",
    "https://x.y/?a=b", "www.x.y", "<script>alert(1)</script>", "<img src=x>", "a | b", "`code`",
    "**b**", "__b__", "~~b~~", "# h", "- a", "1. a", "> q", "&lt;b&gt;", "a\n\n# b", "\\[a](x)",
    "a@b.cd", "[^1]", "\\", "C:\\a\\|b", "$x$", "===", "1) a",
]  # fmt: skip
LATEX_COMMANDS = [r"\input{/etc/passwd}", r"\write18{id}", "a}{b", "^^5cinput", "a~b", "%x", "$$"]


def test_markdown_shows_data_as_data():
    markdown = MarkdownIt().enable(["table", "strikethrough"])
    for text in MARKUP:
        escaped, shown = markdown_text(text), html.escape(" ".join(text.split()), quote=False)
        for line in (escaped, f"- {escaped}", f"x {escaped} y"):
            rendered = markdown.render(line)
            assert set(re.findall(r"<(\w+)", rendered)) <= {"p", "ul", "li"}
            assert shown in rendered.replace("&quot;", '"')
        cells = markdown.render(f"| a | b |\n|---|---|\n| {escaped} | c |")
        assert re.findall(r"<(\w+)", cells)[-3:] == ["tr", "td", "td"]
        # GitHub makes links of addresses without a mark.
        assert not re.search(r"http://|https://|www\.|(?<!\\)@", escaped)
    assert markdown_text("\x1b[31mred").isprintable()


def test_latex_shows_data_as_data():
    escaped = r"\\textbackslash\{\}|\\textascii(tilde|circum)\{\}|\\[&%$#_{}]"
    for text in LATEX_COMMANDS:
        assert not set(re.sub(escaped, "", latex_text(text))) & set("\\{}$&#^_%~")
    assert [latex_text(text) for text in ("[2]", "*", "a[2]")] == ["{}[2]", "{}*", "a[2]"]


def test_markup_in_names(home):
    """Of the model, the data set, classes, patients and paths, in page, card and comparison."""

    def edit(coco):
        coco["categories"][0]["name"] = coco["images"][0]["patient_id"] = HOSTILE

    home.change_data(edit)
    keys = ("meta.checkpoint_sha256", "meta.dataset", "tau_val.rule", "tau_val.dataset")
    home.change(METRICS, dict.fromkeys(keys, HOSTILE))
    home.change("run.json", dict.fromkeys(("model", "backbone", "device", "started"), HOSTILE))
    page, *texts = everything(home, HOSTILE)
    assert not re.search(r"<img|\]\(http:|http://x", "".join(texts)) and "<img src=x" not in page


@pytest.fixture(scope="module")
def small(write_gt, write_run_in, tmp_path_factory):
    """A folder with a small data set and two runs on it, and the files to damage, by path."""
    root = tmp_path_factory.mktemp("fuzzed")
    gt = write_gt(root / "data/annotations/test.json", images=4, per_patient=2)
    for name in ("train", "val"):
        shutil.copy(gt, gt.with_name(f"{name}.json"))
    (root / "data/splits.json").write_text(json.dumps({"ratio": [1, 1, 3], "seed": 1, "test": []}))
    (root / "data/rejected.csv").write_text("file,reason\na.png,mask is empty\n")
    (root / "data/test_evaluations.csv").write_text("date,what,sha256,output\n2026,w,aa,o\n")
    for name in "ab":
        options = {"model": name, "tau_val": 0.6, "skill": 0.9, "bootstrap": Bootstrap(5)}
        write_run_in(root)(name, gt, **options)
    names = [*root.glob("data/*.*"), root / "data/annotations/train.json"]
    names += [*root.glob("runs/a/*.*"), root / f"runs/a/inference/kvasir_seg_test/{METRICS}"]
    return root, {str(path.relative_to(root)): path.read_bytes() for path in names}


@pytest.mark.fuzz
@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=max(60, settings().max_examples // 10),
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
def test_damaged_files_of_runs(small, data):
    root, files = small
    name, before = data.draw(st.sampled_from(sorted(files.items())))
    path, out = root / name, root / "out"
    as_json = path.suffix == ".json" and data.draw(st.integers(0, 3))
    kind = damaged_json(json.loads(before)) if as_json else damaged_bytes(before)
    path.write_bytes(data.draw(kind))
    try:
        runs = [load_run(root / "runs" / run) for run in "ab"]
        write_model_card(runs[0], out / "card.md")
        comparison = compare_runs(gather(runs), Bootstrap(5), primary="bbox/AP50_voc")
        write_comparison(comparison, out)
        render_report(runs, out / "report.html")
    except (FileNotFoundError, ValueError) as error:
        # Ours: of no subclass that Python or a library raises, and one that can be shown.
        assert type(error) in (BadInputError, FileNotFoundError, ValueError), repr(error)
        assert str(root) in str(error)
        str(error).encode()
    finally:
        path.write_bytes(before)
