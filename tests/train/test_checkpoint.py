"""Checkpoints are whole or absent, whatever happens; and they carry the operating point."""

import hashlib
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from torch import nn

from imrcnn_d2.engine import Trainer, load_weights
from imrcnn_d2.engine.checkpoint import Checkpointer, damage
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.results import choose_operating_point


class State(dict):
    state_dict = dict.copy
    load_state_dict = dict.update


def checkpointer(folder, value=0.0, keep=None, model=None):
    model = model or nn.Linear(50, 50)
    nn.init.constant_(model.weight, value)
    return Checkpointer(model, str(folder), keep=keep, state=State(value=value))


def resume(folder):
    resumed = checkpointer(folder, -1.0)
    resumed.resume_or_load("", resume=True)
    return resumed.model.weight[0, 0].item(), resumed.checkpointables["state"]["value"]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def compress(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(10**6))


SPOILS = {
    **{"compressed": compress, "a bit": flip_a_bit, "half": halve, "gone": os.remove},
    "all": lambda path: path.write_bytes(b""),
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "no tensors": lambda path: torch.save({}, path),
}


@pytest.mark.parametrize("last", ["model_0000019", "model_final"])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, spoil, last):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    checkpointer(tmp_path, 2.0).save(last, iteration=19)
    assert resume(tmp_path) == (2.0, 2.0)
    spoil(tmp_path / f"{last}.pth")
    assert damage(tmp_path / f"{last}.pth")
    assert resume(tmp_path) == (1.0, 1.0)
    assert f"{last}.pth is damaged" in caplog.text
    halve(tmp_path / "model_0000009.pth")
    with pytest.raises(RuntimeError, match="model_0000009.pth: "):
        resume(tmp_path)


@pytest.mark.parametrize(
    "damaged, left, value",
    [
        ([], {"final": 29, "0000019": 19}, 29.0),
        ([], {"final": 29, "0000039": 39}, 39.0),  # trained on after its end
        (["final"], {"final": 29, "0000019": 19, "0000009": 9}, 19.0),
        ([], {"10000000": 10_000_000, "9999999": 9_999_999}, 10_000_000.0),
    ],
)
@pytest.mark.parametrize("tag", [None, b"", b"\xff\x00", b"../elsewhere.pth"])
def test_without_last_checkpoint_the_newest_is_resumed(tmp_path, damaged, left, value, tag):
    for name, iteration in left.items():
        checkpointer(tmp_path, float(iteration)).save(f"model_{name}", iteration=iteration)
    for name in damaged:
        flip_a_bit(tmp_path / f"model_{name}.pth")
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resume(tmp_path) == (value, value)
    assert checkpointer(tmp_path).has_checkpoint(), "the trainer would count from 0"


def test_what_is_not_this_training_is_not_resumed(tmp_path):
    path = tmp_path / "model_0000009.pth"
    torch.save({"model": nn.Linear(50, 50).state_dict()}, path)
    with pytest.raises(ValueError, match=f"{path.name} holds weights, .*state"):
        resume(tmp_path)
    for other in (nn.Linear(50, 50, bias=False), nn.Linear(50, 40), nn.Sequential(nn.Linear(9, 9))):
        saving = checkpointer(tmp_path)
        saving.model = other
        saving.save_iteration(9)
        with pytest.raises(ValueError, match=f"{path.name}: .*another architecture"):
            resume(tmp_path)
    checkpointer(tmp_path, float("nan")).save_iteration(9)
    for folder, again in ((tmp_path, True), (tmp_path / "new", False)):
        with pytest.raises(ValueError, match=f"{path.name}: weight holds NaN"):
            checkpointer(folder).resume_or_load(str(path), resume=again)


def test_the_latest_are_kept_and_the_best(tmp_path):
    checkpointer(tmp_path).write("model_best")
    for i in range(5):
        checkpointer(tmp_path, float(i), keep=2).save_iteration(10 * i)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000030.pth", "model_0000040.pth", "model_best.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000040.pth"
    # After a fallback, later checkpoints of the lost future may still lie there.
    checkpointer(tmp_path, 5.0, keep=2).save_iteration(20)
    assert resume(tmp_path) == (5.0, 5.0), "the checkpoint to resume from was deleted"


def test_a_fresh_start_puts_an_earlier_training_aside(tmp_path, caplog):
    def aside(*names):
        (folder,) = tmp_path.glob("earlier_*")
        assert not any(damage(folder / f"{name}.pth") for name in names)
        folder.rename(tmp_path / names[0])

    checkpointer(tmp_path, 1.0).write("model_best")
    assert resume(tmp_path) == (-1.0, -1.0), "the best is not to be resumed from"
    aside("model_best")
    earlier = checkpointer(tmp_path, 1.0)
    earlier.save_iteration(9)
    earlier.write("model_ema")
    fresh = checkpointer(tmp_path, 2.0)
    fresh.resume_or_load(str(tmp_path / "model_0000009.pth"), resume=False)  # from one of them
    assert fresh.model.weight[0, 0].item() == 1.0
    assert "earlier training" in caplog.text
    assert resume(tmp_path) == (-1.0, -1.0), "resumed from a training that is not this one"
    aside("model_0000009", "model_ema")


def test_a_failed_write_leaves_the_last_one_whole(tmp_path):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    failing = checkpointer(tmp_path, 2.0)
    failing.add_checkpointable("broken", State(value=lambda: None))  # cannot be pickled
    with pytest.raises(Exception, match="pickle"):
        failing.save_iteration(19)
    assert [p.name for p in tmp_path.glob("*.pth*")] == ["model_0000009.pth"]
    assert resume(tmp_path) == (1.0, 1.0)


def test_a_full_disk_leaves_the_last_one_whole(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can only be mounted as root")
    try:
        saving = checkpointer(tmp_path, 1.0, model=nn.Linear(300, 300))  # 0.36 MB: two fit
        saving.save_iteration(9)
        saving.save_iteration(19)
        path = re.escape(str(tmp_path / "model_0000029.pth"))
        with pytest.raises(OSError, match=f"{path} .*No space left.*--resume"):
            saving.save_iteration(29)
        names = ["model_0000009.pth", "model_0000019.pth"]
        assert sorted(p.name for p in tmp_path.glob("model_*")) == names
        assert saving.get_checkpoint_file() == str(tmp_path / names[1])
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def metrics_of(tmp_path, name):
    return json.loads((tmp_path / "output" / "inference" / name / "metrics.json").read_text())


def test_the_operating_point_of_validation_is_that_of_the_test(tiny_cfg, tiny_datasets, tmp_path):
    tiny_cfg.TEST.EVAL_PERIOD = tiny_cfg.SOLVER.MAX_ITER  # one validation, whose results stay
    tiny_cfg.DATASETS.VAL = (tiny_datasets["val"], tiny_datasets["train"])  # the first is used
    tiny_cfg.MODEL.IMRCNN.TAU_RULE = "recall>=50"
    results = Trainer(tiny_cfg).train()

    val = metrics_of(tmp_path, tiny_datasets["val"])
    gt = json.loads(Path(MetadataCatalog.get(tiny_datasets["val"]).json_file).read_text())
    folder = tmp_path / "output/inference" / tiny_datasets["val"]
    scored = evaluate_lesions(gt, folder / "coco_instances_results.json")
    best = tmp_path / "output" / "model_best.pth"
    point = torch.load(best, weights_only=True)["operating_point"]
    tau = choose_operating_point(scored, "recall>=50").tau
    assert point == {"tau": tau, "rule": "recall>=50", "dataset": tiny_datasets["val"]}
    assert "tau_val" not in val and val["meta"]["bootstrap"] is None

    test = metrics_of(tmp_path, tiny_datasets["test"])
    assert point.items() <= test["tau_val"].items()
    assert test["meta"]["bootstrap"]["resamples"] == 2000 and "recall_ci" in test["image"]
    assert test["meta"]["checkpoint"] == str(best)
    assert test["meta"]["checkpoint_sha256"] == hashlib.sha256(best.read_bytes()).hexdigest()
    assert "tau_val" not in results["lesion"], "no threshold is chosen on the test set"

    tiny_cfg.MODEL.IMRCNN.TAU_RULE = "precision"
    with pytest.raises(ValueError, match="'precision'"):
        Trainer(tiny_cfg)


@pytest.mark.slow
def test_a_checkpoint_without_operating_point_gives_no_tau_val(tiny_cfg, tiny_datasets, tmp_path):
    tiny_cfg.DATASETS.VAL = ()
    Trainer(tiny_cfg).train()
    test = metrics_of(tmp_path, tiny_datasets["test"])
    final = tmp_path / "output" / "model_final.pth"
    assert "tau_val" not in test and test["meta"]["checkpoint"] == str(final)

    loader = DetectionCheckpointer(Trainer.build_model(tiny_cfg))
    sha256 = hashlib.sha256(final.read_bytes()).hexdigest()
    for name, path, expected in ((str(final), str(final), sha256), ("", None, None)):
        weights = load_weights(loader, name)
        assert (weights.path, weights.sha256, weights.operating_point) == (path, expected, None)
