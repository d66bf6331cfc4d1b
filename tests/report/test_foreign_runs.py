"""Runs from elsewhere: whatever their files hold, a report states nothing untrue, or one line ends
it; no file is shown that is not the data set's own."""

import html
import json
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json
from PIL import Image

from imrcnn_d2.evaluation import Bootstrap
from imrcnn_d2.report import load_run
from imrcnn_d2.report.comparison import compare as compare_runs
from imrcnn_d2.report.comparison import gather, write_comparison
from imrcnn_d2.report.html import render_report
from imrcnn_d2.report.html.page import grad_cams
from imrcnn_d2.report.model_card import write_model_card
from imrcnn_d2.report.tables import latex_text, markdown_text
from imrcnn_d2.utils.files import BadInputError

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
OF_METRICS = {
    **{f"meta.{key}": (*BAD_VALUES, ...) for key in ("tau", "iou_threshold", "iou_type")},
    **{f"meta.{key}": (1, [], {}, True) for key in ("gt", "gt_sha256", "dt", "dataset", "task")},
    "meta.checkpoint_sha256": (1, []),
    "meta.bootstrap": ("x", [], {}, 1, {"resamples": 10**12, "seed": 0}, {"resamples": 2}),
    "meta.versions": ("x", [], {"torch": 1}),
    "meta": (None, "x", [], {}, ...),
    "tau_val": ("x", [], {}, {"tau": 2, "rule": "f1"}, {"tau": 0.5}, {"tau": 0.5, "rule": 1}),
    "tau_val.tau": (float("nan"), float("inf"), -0.1, 1.5, "0.5", None),
    "lesion": (None, "x", [], {"TP": "x"}, {"TP": {}}, ...),
    "segm": ("x", [], {"AP": "100"}, {"AP": float("nan")}),
}
OF_RUN = {
    **{key: (1, [], {}, True) for key in ("model", "backbone", "command", "device", "finished")},
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
        with pytest.raises(BadInputError) as caught:
            home.load()
        assert name in caught.value.file, (key, value)
        reason = caught.value.reason
        assert "is no JSON" in reason or key.rpartition(".")[2] in reason, (key, value)
        home.file(name).write_bytes(before)
    for content in CONTENTS:
        home.file(name).write_bytes(content)
        with pytest.raises(BadInputError, match=re.escape(name)):
            home.load()


def test_a_run_does_not_choose_how_long_a_report_takes(home, monkeypatch):
    monkeypatch.setattr("imrcnn_d2.report.runs.MOST_RESAMPLES", 7)
    home.change(METRICS, {"meta.bootstrap": {"resamples": 100_000, "seed": 0}})
    assert home.load().metrics["meta"]["bootstrap"]["resamples"] == 7


BOMB = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = [
    *(BOMB, "a: &a [*a]", "a: &a {b: *a}", "MODEL: []", "DATASETS: {TEST: 5}", "1", "a: [", ""),
    *("MODEL: !!python/object/apply:os.system ['x']", "a: !!timestamp x", "a: !!int ''"),
    *("MODEL: {BACKBONE: x}", "SOLVER: {MAX_ITER: x}", 'a: "\\ud800"', "? [1]\n: 2"),
    *("a: 2001-99-99", "a: {" * 5000, "# " + "x" * 300_000, "{}"),
]


def test_a_config_that_is_none_is_left_out(home):
    for text in CONFIGS:
        home.file("config.yaml").write_text(text)
        assert home.load().config == {}, text


def test_metrics_are_those_of_the_detections(home):
    """Not those of metrics.json, of which the page says that they are others."""
    true = everything(home)
    assert "other metrics" not in "".join(true)
    ours = json.loads(home.file(METRICS).read_text())
    for group in ("bbox", "segm", "lesion", "image", "patient"):
        ours[group] = {key: 98.765 if value else value for key, value in ours[group].items()}
        ours["tau_val"][group] = ours[group]
    ours["by_size"] = ours["undefined_shares"] = {"x": 98.765}
    ours["meta"] |= {"images": 98765, "lesions": 98765, "patients": None, "classes": ["x"]}
    ours["meta"]["lesion_free_images"] = 0
    home.file(METRICS).write_text(json.dumps(ours))
    texts = everything(home)
    for text, expected in zip(texts, true, strict=True):
        assert "98.8" not in text and "98,765" not in text and "98.77" not in text
        assert "metrics.json holds other metrics than its detections give" in text
        kept, values = (
            [line for line in page.splitlines() if re.search(r"\d\d\.\d \[", line)]
            for page in (expected, text)
        )
        assert values == kept and re.search(r"\d\d\.\d", expected)


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
    theirs = home.path / "download" / "data"
    shutil.copytree(home.path / "datasets/study/annotations", theirs / "annotations")
    (theirs / "images").symlink_to(secret.parent)
    gt = theirs / "annotations/test.json"
    home.change(METRICS, {"meta.gt": str(gt), "meta.dataset": "theirs_test"})
    run = home.load()
    assert run.gt_path == gt
    with pytest.raises(FileNotFoundError, match="--images"):
        _ = run.image_root
    page = render_report([run], home.path / "report.html")
    assert "No gallery" in page.read_text() and '"jpeg"' not in page.read_text()
    # The user may name any.
    named = home.load(images=secret.parent)
    assert named.image_root == secret.parent
    with pytest.raises(FileNotFoundError, match="nowhere"):
        home.load(images=home.path / "nowhere")


def test_a_run_cannot_name_any_ground_truth(home, secret):
    """Its content, names of patients among it, would be in the page."""
    private = shutil.copy(home.gt, secret.parent)
    home.change(METRICS, {"meta.gt": str(private), "meta.gt_sha256": ..., "meta.dataset": None})
    with pytest.raises(ValueError, match="sha256"):
        _ = home.load().gt_path
    home.change(METRICS, {"meta.dataset": "../study_test", "meta.gt": None})
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
    "a@b.cd", "[^1]", "\\", "C:\\a\\|b", "$x$", "===",
]  # fmt: skip
LATEX_COMMANDS = [r"\input{/etc/passwd}", r"\write18{id}", "a}{b", "^^5cinput", "a~b", "%x", "$$"]


def test_markdown_shows_data_as_data():
    markdown = pytest.importorskip("markdown_it").MarkdownIt().enable(["table", "strikethrough"])
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


def test_latex_shows_data_as_data():
    escaped = r"\\textbackslash\{\}|\\textascii(tilde|circum)\{\}|\\[&%$#_{}]"
    for text in LATEX_COMMANDS:
        assert not set(re.sub(escaped, "", latex_text(text))) & set("\\{}$&#^_%~")


def test_markup_in_names(home):
    """Of the model, the data set, classes, patients and paths, in page, card and comparison."""

    def edit(coco):
        coco["categories"][0]["name"] = coco["images"][0]["patient_id"] = HOSTILE

    home.change_data(edit)
    keys = ("meta.checkpoint_sha256", "meta.dataset", "tau_val.rule", "tau_val.dataset")
    home.change(METRICS, dict.fromkeys(keys, HOSTILE))
    home.change("run.json", dict.fromkeys(("model", "backbone", "device", "started"), HOSTILE))
    page, card, comparison = everything(home, HOSTILE)
    for text in (card, comparison):
        assert "<img" not in text and "](http:" not in text and "http://x" not in text
    assert "<img src=x" not in page


@pytest.fixture(scope="module")
def small(write_gt, write_run_in, tmp_path_factory):
    """A folder with a small prepared data set, ``data``, and ``runs/a``, ``runs/b`` on it; and by
    their paths in it the files to damage, as they are.
    """
    root = tmp_path_factory.mktemp("fuzzed")
    gt = write_gt(root / "data/annotations/test.json", images=4, per_patient=2)
    for name in ("train", "val"):
        shutil.copy(gt, gt.with_name(f"{name}.json"))
    (root / "data/splits.json").write_text(json.dumps({"ratio": [1, 1, 3], "seed": 1, "test": []}))
    (root / "data/rejected.csv").write_text("file,reason\na.png,mask is empty\n")
    (root / "data/test_evaluations.csv").write_text("date,what,sha256,output\n2026,w,aa,o\n")
    for name, model in (("a", "MR-CNN"), ("b", "IMR-CNN")):
        options = {"model": model, "tau_val": 0.6, "skill": 0.9, "bootstrap": Bootstrap(5)}
        write_run_in(root)(name, gt, **options)
    inner = f"inference/kvasir_seg_test/{METRICS}"
    damaged = [f"runs/a/{name}" for name in ("run.json", "config.yaml", inner)]
    names = "splits.json", "rejected.csv", "test_evaluations.csv", "annotations/train.json"
    damaged += [f"data/{name}" for name in names]
    return root, {name: (root / name).read_bytes() for name in damaged}


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
    name = data.draw(st.sampled_from(sorted(files)))
    path, out, before = root / name, root / "out", files[name]
    as_json = name.endswith(".json") and data.draw(st.integers(0, 3))
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
