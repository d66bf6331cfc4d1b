"""What a sweep reports of runs whose files are damaged."""

import json
from pathlib import Path

import pytest

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.cross_validation import FoldRun, describe_runs
from imrcnn_d2.engine.run_record import config_sha256

META = {"tau": 0.7, "iou_threshold": 0.5, "iou_type": "segm"}
LESION = {"iou": 80.0, "f1": None}
METRICS = {"meta": META, "segm": {"AP50_voc": 50.0}, "lesion": LESION, "image": {}}


@pytest.fixture
def run(tmp_path):
    """A run that has finished."""
    opts = ("MODEL.DEVICE", "cpu")
    config, data = Path("configs/imrcnn_lite.yaml").resolve(), tmp_path / "datasets"
    run = FoldRun("synthetic", config, 0, 0, 2, tmp_path, data, opts, 1)
    run.metrics_file.parent.mkdir(parents=True)
    run.log.write_text("the log\n")
    opts = [*opts, "DATASETS.ROOT", "synthetic", "SEED", "0", "OUTPUT_DIR", str(run.folder)]
    hashed = config_sha256(load_config(config, opts))
    record = {"config_sha256": hashed, "datasets": {}, "finished": "2026"}
    (run.folder / "run.json").write_text(json.dumps(record))
    run.metrics_file.write_text(json.dumps(METRICS))
    return run


@pytest.mark.parametrize("name", ["metrics.json", "run.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"1", b"null", b'{"segm": 1, "lesion": 1}', b'{"datasets": 1, "finished": {}}']
    + [json.dumps({**METRICS, "segm": {"AP50_voc": "x"}, "model": []}).encode()],
)
def test_damaged_files_of_a_run(run, name, content):
    text, complete = describe_runs([run])
    assert complete and "50.0" in text and "n/a" in text
    path = run.metrics_file if name == "metrics.json" else run.folder / name
    path.write_bytes(content)
    text, complete = describe_runs([run])
    assert not complete
    assert "broken" in text and str(run.log) in text
