"""run.json says what was trained, on what and with what."""

import hashlib
import json
import shutil
import subprocess
import sys
from datetime import datetime

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from imrcnn_d2.engine import Trainer, load_config
from imrcnn_d2.engine import run_record as provenance
from imrcnn_d2.engine.run_record import config_sha256, describe_model, git_state


def run_json(tmp_path):
    return json.loads((tmp_path / "output" / "run.json").read_text())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("mrcnn_R_50", ("MR-CNN", "R-50")),
        ("ibmrcnn_R_101", ("IBMR-CNN", "R-101")),
        ("imrcnn_lite", ("IMR-CNN", "tf_efficientnet_lite0")),
    ],
)
def test_models_are_named_as_in_the_paper(config, expected):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", ""]
    assert describe_model(build_model(load_config(f"configs/{config}.yaml", opts))) == expected


def test_other_models_are_named_by_their_class():
    cfg = load_config("configs/imrcnn_R_50.yaml", ["MODEL.DEVICE", "cpu"])
    cfg.MODEL.MASK_ON = False
    assert describe_model(build_model(cfg)) == ("GeneralizedRCNN", "R-50")
    assert describe_model(torch.nn.Linear(1, 1)) == ("Linear", "NoneType")


def test_the_hash_of_a_config_leaves_out_where_it_runs(tiny_cfg):
    hashed = config_sha256(tiny_cfg)
    assert len(hashed) == 64
    tiny_cfg.OUTPUT_DIR, tiny_cfg.MODEL.DEVICE = "elsewhere", "cuda"
    assert config_sha256(tiny_cfg) == hashed
    assert tiny_cfg.OUTPUT_DIR == "elsewhere", "the config itself was changed"
    tiny_cfg.SOLVER.BASE_LR *= 2
    assert config_sha256(tiny_cfg) != hashed


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_state_of_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "imrcnn_d2"
    (package / "engine").mkdir(parents=True)
    module = package / "engine" / "provenance.py"
    for file in (module, package / "__init__.py"):
        file.touch()
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert git_state() is None, "no checkout"
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "nothing of the package")
    assert git_state() is None, "a package installed inside another checkout"
    git(tmp_path, "add", "imrcnn_d2")
    git(tmp_path, "commit", "-m", "package")
    revision = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").touch()
    assert git_state() == {"revision": revision, "dirty": False}
    module.write_text("changed")
    assert git_state() == {"revision": revision, "dirty": True}


def test_a_run_leaves_its_record(tiny_cfg, tiny_datasets, tmp_path):
    trainer = Trainer(tiny_cfg)
    trainer.train()
    run = run_json(tmp_path)
    assert (run["model"], run["backbone"]) == ("IMR-CNN", "tf_efficientnet_lite0")
    assert (run["seed"], run["device"], run["iterations"]) == (0, "cpu", 4)
    assert run["config_sha256"] == config_sha256(tiny_cfg)
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["command"].startswith("python ") and sys.argv[-1] in run["command"]
    start, end = (datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    assert 0 < run["hours"] * 3600 <= (end - start).total_seconds() + 1
    # As conftest.py draws them: a disc in two images of three.
    counts = {"train": (6, 2, 4), "val": (4, 1, 3), "test": (5, 1, 4)}
    assert list(run["datasets"]) == [tiny_datasets[split] for split in counts]
    for split, expected in counts.items():
        facts = run["datasets"][tiny_datasets[split]]
        assert (facts["images"], facts["lesion_free_images"], facts["lesions"]) == expected
        with open(facts["gt"], "rb") as file:
            assert facts["gt_sha256"] == hashlib.sha256(file.read()).hexdigest()
        assert facts["patients"] is None and facts["rejected"] is None
    assert run["splits_sha256"] is None and run["fold"] is None


@pytest.mark.slow
def test_a_resumed_run_keeps_its_start_and_adds_its_hours(tiny_cfg, tmp_path):
    tiny_cfg.SOLVER.MAX_ITER = 2
    Trainer(tiny_cfg).train()
    first = run_json(tmp_path)
    checkpoint = tmp_path / "output" / "model_final.pth"
    state = torch.load(checkpoint, weights_only=True)
    record = state["trainer"]["hooks"]["RunRecord"]
    assert record["started"] == first["started"]
    assert 0 < record["hours"] <= first["hours"]
    record.update(started="2000-01-01T00:00:00+00:00", hours=5.0)
    torch.save(state, checkpoint)

    tiny_cfg.SOLVER.MAX_ITER = 4
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    second = run_json(tmp_path)
    assert second["started"] == "2000-01-01T00:00:00+00:00"
    assert 5 < second["hours"] < 5.1
    assert second["iterations"] == 4


def test_a_run_that_breaks_has_no_end(tiny_cfg, tmp_path):
    class Breaking(Trainer):
        def run_step(self):
            raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        Breaking(tiny_cfg).train()
    run = run_json(tmp_path)
    assert run["started"] and run["finished"] is None


def test_patients_crowds_and_rejects_of_a_prepared_fold(tiny_datasets, tmp_path, monkeypatch):
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    (annotations / "test.json").write_text("{}")
    (tmp_path / "rejected.csv").write_text('file,reason\na.jpg,"two\nlines"\nb.jpg,torn\n')
    splits = {"sha256": "abc", "fold": 1, "folds": 5}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    records = [
        {"patient_id": "p", "annotations": [{"iscrowd": 1}]},
        {"patient_id": "p", "annotations": [{"iscrowd": 0}, {}]},
        {"patient_id": "q"},
    ]
    name = f"{tiny_datasets['test']}_records"
    DatasetCatalog.register(name, lambda: records)
    provenance.MetadataCatalog.get(name).json_file = str(annotations / "test.json")
    facts = provenance._dataset_facts(name)
    assert facts.pop("gt_sha256") == hashlib.sha256(b"{}").hexdigest()
    assert facts == {
        "gt": str(annotations / "test.json"),
        "images": 3,
        "lesion_free_images": 2,
        "lesions": 2,
        "patients": 2,
        "rejected": 2,
    }
    fold = {"index": 1, "of": 5}
    assert provenance._split_facts(name) == {"splits_sha256": "abc", "fold": fold}
    DatasetCatalog.remove(name)
    provenance.MetadataCatalog.remove(name)
