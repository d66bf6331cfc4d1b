import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from imrcnn_d2.cli import evaluate, report


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The folder that tools/evaluate.py wrote."""
    tmp_path = tmp_path_factory.mktemp("evaluation")
    Image.new("RGB", (40, 40), (150, 80, 70)).save(tmp_path / "1.png")
    mask = np.zeros((40, 40), np.uint8, order="F")
    mask[5:20, 5:20] = 1
    rle = mask_util.encode(mask)
    record = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 15, 15], "iscrowd": 0, "area": 225}
    record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    gt = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 40}],
        "annotations": [{**record, "id": 1}],
        "categories": [{"id": 1, "name": "lesion"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(gt))
    (tmp_path / "dt.json").write_text(json.dumps([{**record, "score": 0.9}]))
    arguments = ["--gt", str(tmp_path / "gt.json"), "--dt", str(tmp_path / "dt.json")]
    evaluate.main([*arguments, "--output", str(tmp_path / "scores")])
    return tmp_path / "scores"


def test_page_and_card(evaluation, tmp_path, capsys):
    page, card = tmp_path / "out" / "report.html", tmp_path / "out" / "card.md"
    report.main([f"mine={evaluation}", "--output", str(page), "--card", str(card)])
    assert "mine" in page.read_text(encoding="utf-8")
    assert card.read_text(encoding="utf-8").startswith("# Model card: mine")
    assert capsys.readouterr().out.strip().endswith(f"Written: {page}, {card}")


def test_a_card_is_of_one_run(evaluation, tmp_path, capsys):
    page, card = tmp_path / "report.html", tmp_path / "card.md"
    with pytest.raises(SystemExit):
        arguments = [f"a={evaluation}", f"b={evaluation}", "--output", str(page)]
        report.main([*arguments, "--card", str(card)])
    assert "--card" in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.parametrize(
    "change, said",
    [(["--prevalence", "5", "--"], "prevalence is 5"), (["nowhere"], "nowhere does not exist")],
)
def test_bad_input_is_one_line(evaluation, tmp_path, capsys, change, said):
    page = tmp_path / "report.html"
    with pytest.raises(SystemExit) as stop:
        report.main(["--output", str(page), *change, str(evaluation)])
    assert stop.value.code
    assert said in capsys.readouterr().err
    assert not page.exists()
