import json
import re

import pytest
from rectangles import rectangle

from imrcnn_d2.cli import compare
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.output import write_evaluation


def region(image_id, x, width=10, **fields):
    return rectangle(image_id, x, 0, width, 10, **fields)


@pytest.fixture
def scored(tmp_path):
    """A function that scores detections in images 1..n, each with a lesion, into a folder."""

    def do(name, found, images=3):
        records = [
            {"id": i, "file_name": f"{i}.png", "height": 40, "width": 50}
            for i in range(1, images + 1)
        ]
        gt = {"images": records, "categories": [{"id": 1, "name": "polyp"}]}
        gt["annotations"] = [region(record["id"], 0) for record in records]
        paths = [tmp_path / f"gt{images}.json", tmp_path / f"{name}.json"]
        dt = [region(i, 0, 8, score=0.9 - i / 100) for i in found]
        for path, content in zip(paths, (gt, dt), strict=True):
            path.write_text(json.dumps(content))
        gt, dt = map(str, paths)
        write_evaluation(evaluate_lesions(gt, dt), tmp_path / name, gt=gt, dt=dt)
        return tmp_path / name

    return do


def test_compares_evaluations(scored, tmp_path, capsys):
    runs = [str(scored("one", [1])), f"better={scored('two', [1, 2])}"]
    out = tmp_path / "out"
    compare.main([*runs, "--output", str(out), "--resamples", "40", "--seed", "3"])
    printed = capsys.readouterr().out
    assert (out / "comparison.md").read_text() in printed
    assert str(out / "table_3.tex") in printed
    document = json.loads((out / "comparison.json").read_text())
    assert list(document["models"]) == ["one", "better"]
    assert (document["settings"]["resamples"], document["settings"]["seed"]) == (40, 3)
    primary = document["tests"][0]
    assert (primary["first"], primary["endpoint"]) == ("better", "segm/AP50_voc")
    assert primary["estimate"] == pytest.approx(100 / 3)


def test_options(scored, tmp_path):
    runs = [str(scored(name, found)) for name, found in (("a", [1]), ("b", [2]), ("c", [1, 2]))]
    options = ["--primary", "segm/AP", "--ci-all", "--baseline", "b", "--resamples", "20"]
    compare.main([*runs, "--output", str(tmp_path / "out"), *options])
    tests = json.loads((tmp_path / "out" / "comparison.json").read_text())["tests"]
    assert {(test["first"], test["second"]) for test in tests} == {("a", "b"), ("c", "b")}
    assert {test["endpoint"] for test in tests if test["primary"]} == {"segm/AP"}


def test_bad_input_is_named_and_writes_nothing(scored, tmp_path, capsys):
    one, other = str(scored("one", [1])), str(scored("other", [1], images=4))
    out = ["--output", str(tmp_path / "out")]
    for runs, message in (
        ([one, other], f"{one} .*different test sets"),
        ([one, str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([one, one], "one are both one with no known seed"),
    ):
        with pytest.raises(SystemExit) as stopped:
            compare.main([*runs, *out])
        assert stopped.value.code == 1
        error = capsys.readouterr().err.replace("\n", " ")
        assert re.search(message, error), error
    assert not (tmp_path / "out").exists()
