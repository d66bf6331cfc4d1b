"""Checkpoints are whole or absent, whatever happens while they are written."""

import os
import subprocess

import pytest
import torch
from torch import nn

from imrcnn_d2.engine.checkpoint import Checkpointer, damage


class State:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def checkpointer(folder, value=0.0, keep=None):
    model = nn.Linear(50, 50)
    nn.init.constant_(model.weight, value)
    return Checkpointer(model, str(folder), keep=keep, state=State(value))


def resume(folder):
    resumed = checkpointer(folder, -1.0)
    resumed.resume_or_load("", resume=True)
    return resumed.model.weight[0, 0].item(), resumed.checkpointables["state"].value


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [flip_a_bit, cut_short, lambda p: p.write_bytes(b""), os.remove])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, spoil):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    checkpointer(tmp_path, 2.0).save_iteration(19)
    assert resume(tmp_path) == (2.0, 2.0)
    spoil(tmp_path / "model_0000019.pth")
    assert resume(tmp_path) == (1.0, 1.0)
    assert "model_0000019.pth is damaged" in caplog.text


def test_the_end_can_be_damaged_too(tmp_path):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    checkpointer(tmp_path, 2.0).save("model_final")
    assert resume(tmp_path) == (2.0, 2.0)
    flip_a_bit(tmp_path / "model_final.pth")
    assert resume(tmp_path) == (1.0, 1.0)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    for iteration in (9, 19):
        checkpointer(tmp_path).save_iteration(iteration)
        cut_short(tmp_path / f"model_{iteration:07d}.pth")
    with pytest.raises(RuntimeError, match="No checkpoint .* is whole: model_0000019.pth: "):
        resume(tmp_path)


def test_a_changed_bit_is_found_by_the_checksum(tmp_path):
    checkpointer(tmp_path).save_iteration(0)
    path = tmp_path / "model_0000000.pth"
    assert damage(path) is None
    flip_a_bit(path)
    assert "checksum" in damage(path)


def test_the_latest_are_kept_and_the_best(tmp_path):
    for i in range(5):
        kept = checkpointer(tmp_path, float(i), keep=2)
        kept.save_iteration(10 * i)
        if i == 0:
            kept.write("model_best")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last_checkpoint", "model_0000030.pth", "model_0000040.pth", "model_best.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000040.pth"


def test_the_checkpoint_resumed_from_is_never_deleted(tmp_path):
    # After a fallback, later checkpoints of the lost future may still lie there.
    checkpointer(tmp_path).save_iteration(80)
    checkpointer(tmp_path).save_iteration(90)
    checkpointer(tmp_path, 5.0, keep=2).save_iteration(70)
    assert resume(tmp_path) == (5.0, 5.0)


def test_a_fresh_start_puts_an_earlier_training_aside(tmp_path, caplog):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    fresh = checkpointer(tmp_path, 2.0)
    fresh.resume_or_load("", resume=False)
    assert "earlier training" in caplog.text
    assert resume(tmp_path) == (-1.0, -1.0), "resumed from a training that is not this one"
    (aside,) = tmp_path.glob("earlier_*")
    assert damage(aside / "model_0000009.pth") is None


def test_a_failed_write_leaves_the_last_one_whole(tmp_path):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    failing = checkpointer(tmp_path, 2.0)
    failing.add_checkpointable("broken", State(lambda: None))  # cannot be pickled
    with pytest.raises(Exception, match="pickle"):
        failing.save_iteration(19)
    assert [p.name for p in tmp_path.glob("*.pth*")] == ["model_0000009.pth"]
    assert resume(tmp_path) == (1.0, 1.0)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small file system can only be mounted as root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_one_whole(small_disk):
    model = nn.Linear(300, 300)  # 0.36 MB: two fit, three do not
    saving = Checkpointer(model, str(small_disk))
    saving.save_iteration(9)
    saving.save_iteration(19)
    with pytest.raises(OSError, match="could not be written .*No space left.* MiB are free") as e:
        saving.save_iteration(29)
    assert "--resume" in str(e.value)
    assert sorted(p.name for p in small_disk.glob("model_*")) == [
        "model_0000009.pth",
        "model_0000019.pth",
    ]
    last = saving.get_checkpoint_file()
    assert last.endswith("model_0000019.pth")
    assert torch.equal(torch.load(last, weights_only=True)["model"]["weight"], model.weight)
