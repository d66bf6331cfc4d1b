"""Checkpoints are whole or absent, whatever happens while they are written."""

import os
import subprocess
import zipfile

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


SPOILS = {
    "a bit": flip_a_bit,
    "half": cut_short,
    "all": lambda path: path.write_bytes(b""),
    "gone": os.remove,
    "an empty archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "no tensors": lambda path: torch.save({}, path),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, spoil):
    checkpointer(tmp_path, 1.0).save_iteration(9)
    checkpointer(tmp_path, 2.0).save_iteration(19)
    assert resume(tmp_path) == (2.0, 2.0)
    spoil(tmp_path / "model_0000019.pth")
    assert resume(tmp_path) == (1.0, 1.0)
    assert "model_0000019.pth is damaged" in caplog.text


def test_a_compressed_part_is_damage_and_not_inflated(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(10**6))
    assert "compressed" in damage(tmp_path / "a.pth")


def test_no_training_starts_from_nan(tmp_path):
    model = torch.nn.Linear(1, 1)
    torch.save({"weight": torch.tensor([[torch.nan]]), "bias": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth: weight holds NaN"):
        Checkpointer(model).resume_or_load(str(tmp_path / "a.pth"), resume=False)


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


@pytest.mark.parametrize(
    ("damaged", "left", "value"),
    [
        ([], {"model_final": 29, "model_0000019": 19}, 29.0),
        ([], {"model_final": 29, "model_0000039": 39}, 39.0),  # trained on after its end
        (["model_final"], {"model_final": 29, "model_0000019": 19, "model_0000009": 9}, 19.0),
        ([], {"model_10000000": 10_000_000, "model_9999999": 9_999_999}, 10_000_000.0),
    ],
)
@pytest.mark.parametrize("tag", [None, b"", b"\xff\x00", b"../elsewhere.pth"])
def test_without_last_checkpoint_the_newest_is_resumed(tmp_path, damaged, left, value, tag):
    for name, iteration in left.items():
        checkpointer(tmp_path, float(iteration)).save(name, iteration=iteration)
    for name in damaged:
        flip_a_bit(tmp_path / f"{name}.pth")
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resume(tmp_path) == (value, value)
    assert checkpointer(tmp_path).has_checkpoint(), "the trainer would count from 0"


def test_what_is_not_this_training_is_not_resumed(tmp_path):
    torch.save({"model": nn.Linear(50, 50).state_dict()}, tmp_path / "model_0000009.pth")
    with pytest.raises(ValueError, match="model_0000009.pth holds weights, .*state"):
        resume(tmp_path)
    saving = checkpointer(tmp_path)
    for other in (nn.Linear(50, 50, bias=False), nn.Linear(50, 40), nn.Sequential(nn.Linear(9, 9))):
        saving.model = other
        saving.save_iteration(9)
        with pytest.raises(ValueError, match="model_0000009.pth: .*another architecture"):
            resume(tmp_path)
    checkpointer(tmp_path, float("nan")).save_iteration(9)
    with pytest.raises(ValueError, match="model_0000009.pth: weight holds NaN"):
        resume(tmp_path)


def test_a_final_file_that_is_missing_or_damaged_is_written_anew(tmp_path):
    saved = checkpointer(tmp_path, 1.0)
    saved.save("model_final", iteration=9)
    before = (tmp_path / "model_final.pth").stat().st_mtime_ns
    saved.renew_final(9)
    assert (tmp_path / "model_final.pth").stat().st_mtime_ns == before
    for spoil in (flip_a_bit, os.remove):
        spoil(tmp_path / "model_final.pth")
        saved.renew_final(9)
        assert damage(tmp_path / "model_final.pth") is None
        assert resume(tmp_path) == (1.0, 1.0)


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
    earlier = checkpointer(tmp_path, 1.0)
    earlier.save_iteration(9)
    for name in ("model_best", "model_ema"):
        earlier.write(name)
    fresh = checkpointer(tmp_path, 2.0)
    fresh.resume_or_load(str(tmp_path / "model_0000009.pth"), resume=False)  # from one of them
    assert fresh.model.weight[0, 0].item() == 1.0
    assert "earlier training" in caplog.text
    assert resume(tmp_path) == (-1.0, -1.0), "resumed from a training that is not this one"
    (aside,) = tmp_path.glob("earlier_*")
    for name in ("model_0000009", "model_best", "model_ema"):
        assert damage(aside / f"{name}.pth") is None


def test_the_best_of_a_training_without_checkpoints_is_not_written_over(tmp_path):
    checkpointer(tmp_path, 1.0).write("model_best")
    assert resume(tmp_path) == (-1.0, -1.0)
    (aside,) = tmp_path.glob("earlier_*/model_best.pth")
    assert damage(aside) is None


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
