"""What a sweep says of runs whose files are damaged."""

import json
from pathlib import Path

import pytest

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.cross_validation import FoldRun, describe_runs
from imrcnn_d2.engine.run_record import config_sha256

OPTS = ("MODEL.DEVICE", "cpu")
FIGURES = {"segm": {"AP50_voc": 50.0}, "lesion": {"iou": 80.0, "f1": None}, "image": {}}
META = {"tau": 0.7, "iou_threshold": 0.5, "iou_type": "segm"}


@pytest.fixture
def run(tmp_path):
    """A run that has finished."""
    run = FoldRun(
        dataset="synthetic",
        config_file=Path("configs/imrcnn_lite.yaml").resolve(),
        seed=0,
        fold=0,
        folds=2,
        output=tmp_path,
        datasets=tmp_path / "datasets",
        opts=OPTS,
        num_gpus=1,
    )
    run.metrics_file.parent.mkdir(parents=True)
    run.log.write_text("the log\n")
    opts = [*OPTS, "DATASETS.ROOT", "synthetic", "SEED", "0", "OUTPUT_DIR", str(run.folder)]
    cfg = load_config(run.config_file, opts)
    record = {"config_sha256": config_sha256(cfg), "datasets": {}, "finished": "2026"}
    (run.folder / "run.json").write_text(json.dumps(record))
    run.metrics_file.write_text(json.dumps({**FIGURES, "meta": META}))
    return run


def test_a_finished_run(run):
    text, complete = describe_runs([run])
    assert complete and "50.0" in text and "n/a" in text


@pytest.mark.parametrize("name", ["metrics.json", "run.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"1", b"null", b'{"segm": 1, "lesion": 1}', b'{"datasets": 1, "finished": {}}']
    + [json.dumps({**FIGURES, "meta": META, "segm": {"AP50_voc": "x"}, "model": []}).encode()],
)
def test_damaged_files_of_a_run(run, name, content):
    path = run.metrics_file if name == "metrics.json" else run.folder / name
    path.write_bytes(content)
    text, complete = describe_runs([run])
    assert not complete
    assert "broken" in text and str(run.log) in text
