"""What run.json holds; test_trainer.py has the record of a whole run."""

import hashlib
import shutil
import subprocess

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from imrcnn_d2.engine import load_config, run_record
from imrcnn_d2.engine.run_record import config_sha256, describe_model, git_state


@pytest.mark.parametrize(
    ("config", "opts", "expected"),
    [
        ("mrcnn_R_50", [], ("MR-CNN", "R-50")),
        ("ibmrcnn_R_101", [], ("IBMR-CNN", "R-101")),
        ("imrcnn_R_50", ["MODEL.MASK_ON", False], ("GeneralizedRCNN", "R-50")),
    ],
)
def test_names_of_models(config, opts, expected):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.TIMM.WEIGHTS", "", *opts]
    assert describe_model(build_model(load_config(f"configs/{config}.yaml", opts))) == expected
    assert describe_model(torch.nn.Linear(1, 1)) == ("Linear", "NoneType")


def test_the_hash_of_a_config_leaves_out_where_it_runs(tiny_cfg):
    before = config_sha256(tiny_cfg)
    tiny_cfg.OUTPUT_DIR, tiny_cfg.MODEL.DEVICE, tiny_cfg.DATASETS.ROOT = "elsewhere", "cuda", "x"
    assert config_sha256(tiny_cfg) == before and len(before) == 64
    assert tiny_cfg.OUTPUT_DIR == "elsewhere", "the config itself was changed"
    tiny_cfg.SOLVER.BASE_LR *= 2
    assert config_sha256(tiny_cfg) != before


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_state_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "imrcnn_d2" / "engine" / "run_record.py"
    module.parent.mkdir(parents=True)
    for file in (module, module.parents[1] / "__init__.py"):
        file.touch()
    monkeypatch.setattr(run_record, "__file__", str(module))
    assert git_state() is None, "no checkout"
    git("init")
    git("commit", "--allow-empty", "-m", "nothing of the package")
    assert git_state() is None, "a package installed inside another checkout"
    git("add", "imrcnn_d2")
    git("commit", "-m", "package")
    (tmp_path / "untracked").touch()
    assert git_state() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("changed")
    assert git_state()["dirty"]


def test_patients_crowds_and_rejects_of_a_prepared_fold(tmp_path):
    test_json = tmp_path / "annotations" / "test.json"
    test_json.parent.mkdir()
    test_json.write_text("{}")
    (tmp_path / "rejected.csv").write_text('file,reason\na.jpg,"two\nlines"\nb.jpg,torn\n')
    (tmp_path / "splits.json").write_text('{"sha256": "abc", "fold": 1, "folds": 5}')
    annotations = [{"iscrowd": 1}], [{"iscrowd": 0}, {}]
    records = [{"patient_id": "p", "annotations": group} for group in annotations]
    records.append({"patient_id": "q"})
    DatasetCatalog.register("fold", lambda: records)
    MetadataCatalog.get("fold").json_file = str(test_json)
    expected = {"gt": str(test_json), "gt_sha256": hashlib.sha256(b"{}").hexdigest(), "images": 3}
    expected |= {"lesion_free_images": 2, "lesions": 2, "patients": 2, "rejected": 2}
    assert run_record._dataset_facts("fold") == expected
    fold = {"splits_sha256": "abc", "fold": {"index": 1, "of": 5}}
    assert run_record._split_facts("fold") == fold
    DatasetCatalog.remove("fold")
    MetadataCatalog.remove("fold")
