"""Two actors give what one process gives, also when one of them is killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from dicoms import PATIENT, write_dicom
from PIL import Image

from imrcnn_d2.cli import predict
from imrcnn_d2.deploy import Predictor
from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.runtimes.check import compare_records

from .conftest import TAU, random_image

pq = pytest.importorskip("pyarrow.parquet", reason="the ray extra is not installed")
ray = pytest.importorskip("ray", reason="the ray extra is not installed")
pytestmark = pytest.mark.slow  # it starts processes

IMAGES = 40


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def folder(image_folder, bad_files):
    """Images, a DICOM sequence, and files that cannot be read."""
    for seed in range(IMAGES):
        Image.fromarray(random_image(seed, 300, 400)).save(image_folder / f"{seed:03d}.png")
    frames = np.stack([random_image(2), random_image(3)])
    write_dicom(image_folder / "KIS-4711.jpg", frames, FrameTime="40")
    return image_folder


def actors():
    """Process ids of the actors of this process's cluster."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_text()
        except OSError:  # it has ended
            continue
    return [
        process
        for process, name in names.items()
        if name.startswith("ray::MapWorker") and parents.get(parents[process]) == os.getpid()
    ]


def parts(output):
    return list((output / "predictions.parquet").glob("*.parquet"))


def rows(output):
    found = pq.read_table(output / "predictions.parquet").to_pylist()
    return sorted(found, key=lambda row: row["file_name"])


def test_an_actor_is_killed(cluster, predictor, tiny_run, folder, bad_files, tmp_path, capsys):
    written_then = []

    def kill():
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not written_then:
            if parts(tmp_path / "two") and len(there := actors()) == 2:
                os.kill(there[0], signal.SIGKILL)
                written_then.append(len(parts(tmp_path / "two")))
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    command = ["--engine", "ray", "--actors", 2, "--weights", tiny_run / "model_best.pth"]
    command += ["--input", folder, "--output", tmp_path / "two", "--batch-size", 3]
    predict.main([str(part) for part in command])
    assert 0 < written_then[0] < len(parts(tmp_path / "two"))
    printed = capsys.readouterr().out

    done = predict_files(predictor, [folder], tmp_path / "one")
    message = f"{done.images} images predicted; {len(done.failed)} inputs could not be read"
    assert message in printed
    one = json.loads((tmp_path / "one" / "predictions.json").read_text())
    two = rows(tmp_path / "two")
    images = [row for row in two if row["error"] is None]
    assert [row["file_name"] for row in images] == [image["file_name"] for image in one["images"]]
    annotations, detections = [], []
    for row, image in zip(images, one["images"], strict=True):
        annotations.append([a for a in one["annotations"] if a["image_id"] == image["id"]])
        columns = zip(row["boxes"], row["scores"], row["masks"], strict=True)
        names = ("bbox", "score", "segmentation")
        detections.append([{"category_id": 1, **dict(zip(names, d, strict=True))} for d in columns])
        assert len(detections[-1]) == len(annotations[-1])
        for key in ("width", "height", "frame", "time"):
            assert row[key] == image.get(key)
        assert set(row["classes"]) == {"polyp"}
        assert (row["tau"], row["weights_sha256"]) == (TAU, predictor.metadata["weights_sha256"])
    # How fp32 sums are ordered, so their last digits, depends on batch size, threads and processor
    # (with AMX, scores differed by 1.7e-6). A wrong weight or image changes far more than this.
    sizes = [(image["height"], image["width"]) for image in one["images"]]
    differences = compare_records(annotations, detections, sizes, TAU)
    assert differences.detections > IMAGES
    assert not differences.exceeded(lost=0, unmatched=0, score=1e-4, box=1e-2, mask_iou=0.99)
    failed = [(row["file_name"], row["error"]) for row in two if row["error"] is not None]
    assert failed == done.failed
    assert {name for name, _ in failed} == bad_files.keys()
    content = b"".join(path.read_bytes() for path in parts(tmp_path / "two"))
    for value in (*PATIENT.values(), hashlib.sha256(b"KIS-4711.jpg").hexdigest()[:16]):
        assert value.encode() not in content

    # What failed, has changed or is new, and nothing else.
    before = {path: path.read_bytes() for path in parts(tmp_path / "two")}
    Image.fromarray(random_image(7)).save(folder / "cut.png")
    Image.fromarray(random_image(8, 50, 50)).save(folder / "003.png")
    Image.fromarray(random_image(9)).save(folder / "new.png")
    predict.main([str(part) for part in command])
    # those of the video that is cut off are done once more
    film = sum(row["frame"] is not None and row["file_name"].startswith("cut") for row in two)
    before_it = len({row["input"] for row in two}) - len(failed) - 1
    assert f"{3 + film} images predicted; {before_it} inputs were done before" in (
        capsys.readouterr().out
    )
    again = rows(tmp_path / "two")
    assert len(again) == len(two) + 1
    assert len({(row["file_name"], row["error"]) for row in again}) == len(again)
    sizes = {row["file_name"]: row["width"] for row in again}
    assert (sizes["cut.png"], sizes["003.png"], sizes["new.png"]) == (80, 50, 80)
    assert any(path.exists() and path.read_bytes() == old for path, old in before.items())


def test_a_cluster_of_its_own_listens_to_this_machine_alone():
    """Also where another one is announced here: whoever can write to /tmp could do so."""
    code = """
import glob, json, os
from pathlib import Path
from imrcnn_d2.deploy import ray as ray_engine

def descendants(process):
    yield process
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in path.read_text().split():
            yield from descendants(int(child))

with ray_engine._cluster():
    processes = list(descendants(os.getpid()))
    inodes = {os.path.basename(os.path.realpath(path))
              for process in processes for path in glob.glob(f"/proc/{process}/fd/*")}
    lines = [line.split() for kind in ("tcp", "tcp6")
             for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    print(json.dumps([line[1].split(":")[0] for line in lines
                      if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]))
"""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: there are sockets in it
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env={**env, "RAY_TMPDIR": folder}, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout)
    # as the kernel writes 127.0.0.1, ::ffff:127.0.0.1 and ::1
    loopback = "0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000"
    assert len(addresses) > 3 and set(addresses) <= set(loopback)


def test_two_runs_do_not_mix(tiny_run, image_folder, tmp_path, monkeypatch):
    from imrcnn_d2.deploy import ray as ray_engine

    weights = {"config": None, "weights": tiny_run / "model_best.pth"}
    refused = []

    def another(left, make, actors):
        monkeypatch.setattr(ray_engine, "_predict", lambda *args: 0)
        with pytest.raises(ValueError, match=str(tmp_path / "out")) as error:
            ray_engine.predict_with_ray(weights, [image_folder], tmp_path / "out")
        refused.append(error)
        with pytest.raises(ValueError, match=str(tmp_path / "out")):
            predict_files(Predictor(**weights), [image_folder], tmp_path / "out")
        return 0

    monkeypatch.setattr(ray_engine, "_predict", another)
    ray_engine.predict_with_ray(weights, [image_folder], tmp_path / "out")
    assert len(refused) == 1


def test_what_its_actors_die_of_is_listed_and_tried_again(
    tiny_run, image_folder, tmp_path, monkeypatch
):
    from imrcnn_d2.deploy import ray as ray_engine

    tried = []
    monkeypatch.setattr(
        ray_engine, "_predict", lambda left, make, actors: tried.append([*left]) or 0
    )
    write_dicom(image_folder / "KIS-4711.png", random_image(0))
    weights = {"config": None, "weights": tiny_run / "model_best.pth"}
    for _ in range(2):
        done = ray_engine.predict_with_ray(weights, [image_folder], tmp_path / "out")
        found = rows(tmp_path / "out")
        assert [(row["file_name"], row["error"]) for row in found] == done.failed
        assert len(found) == len(tried[0]) > 2
        assert {row["error"] for row in found} == {ray_engine.LOST}
    assert tried[0] == tried[1]
    assert not any("4711" in row["file_name"] for row in found)
