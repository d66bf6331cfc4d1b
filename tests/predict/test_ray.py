"""Parquet files: each input once, whichever actor dies; two actors give what one process gives."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from dicoms import PATIENT, write_dicom

from imrcnn_d2.cli import predict
from imrcnn_d2.deploy import predict_files
from imrcnn_d2.deploy.batch import Item, signature
from imrcnn_d2.deploy.inputs import Frame, Source
from imrcnn_d2.deploy.outputs import compare_records

from .conftest import TAU, random_image, read_coco, save_image, wait_for

pq = pytest.importorskip("pyarrow.parquet", reason="the ray extra is not installed")
ray = pytest.importorskip("ray", reason="the ray extra is not installed")
import psutil  # noqa: E402  (ray brings it)

from imrcnn_d2.deploy import ray as ray_engine  # noqa: E402
from imrcnn_d2.deploy.ray import Parts, image_row, input_row, write_part  # noqa: E402

RUN = {"tau": 0.5, "weights_sha256": "ab", "version": "1", "config_sha256": "c", "classes": ["x"]}
LESION = {"category_id": 1, "bbox": [1.5, 2.0, 3.25, 4.0], "score": 0.75, "area": 12.0}
LESION["segmentation"] = RLE = {"size": [6, 8], "counts": "31o04L"}
FRAME = Frame(np.zeros((6, 8, 3), np.uint8))


def item(path, **fields):
    path.touch()
    source = Source(path, path.name, "image")
    return Item(source, signature(source), **fields)


@pytest.fixture
def items(tmp_path):
    """Three images and one that cannot be read."""
    images = [item(tmp_path / f"{name}.png", frame=FRAME) for name in "abc"]
    return [*images, item(tmp_path / "bad.png", error="is torn")]


def write(folder, items):
    rows = [input_row(i) if i.frame is None else image_row(i, [LESION], ["x"]) for i in items]
    write_part(folder, RUN, [item.source for item in items], rows)


def names(folder):
    return sorted(pq.read_table(folder)["file_name"].to_pylist())


def test_the_columns_of_a_row(items, tmp_path):
    write(tmp_path / "out", [items[0], items[3]])
    (part,) = (tmp_path / "out").iterdir()
    image, bad = pq.read_table(part).to_pylist()
    shared = {"tau": 0.5, "weights_sha256": "ab", "version": "1", "frame": None}
    lesions = {"boxes": [[1.5, 2.0, 3.25, 4.0]], "classes": ["x"], "areas": [12.0], "masks": [RLE]}
    first = {"file_name": "a.png", "width": 8, "height": 6, "error": None, "scores": [0.75]}
    assert image.items() >= {**first, **lesions, **shared, "probabilities": None}.items()
    expected = {"file_name": "bad.png", "error": "is torn", "width": None, "scores": None}
    assert bad.items() >= {**expected, **shared}.items()
    assert json.loads(pq.read_schema(part).metadata[b"imrcnn_d2"]) == RUN
    nothing = image_row(items[0], [], ["x"])
    assert nothing["boxes"] == nothing["masks"] == nothing["scores"] == []
    classified = [{"category_id": 1, "score": 0.75, "probabilities": [0.75, 0.25]}]
    row = image_row(items[0], classified, ["x", "y"])
    assert (row["classes"], row["probabilities"]) == (["x"], [0.75, 0.25])
    assert "boxes" not in row and "masks" not in row


def test_tracks_and_alarms_are_columns(items, tmp_path):
    alarm, below = (
        {**LESION, "track_id": 3, "alarm": True},
        {**LESION, "score": 0.1, "alarm": False},
    )
    rows = [image_row(items[0], [alarm, below], ["x"])]
    write_part(tmp_path / "out", RUN, [items[0].source], rows)
    (row,) = pq.read_table(tmp_path / "out").to_pylist()
    assert row["tracks"] == [3, None] and row["alarms"] == [True, False]


def test_inputs_are_done_whole_and_once(items, tmp_path):
    def done():
        parts = Parts(folder, RUN)
        return [parts.is_done(item.source) for item in items]

    folder = tmp_path / "out"
    write(folder, items[:2])
    write(folder, items[1:3])
    write(folder, items[3:])
    assert names(folder) == ["a.png", "b.png", "b.png", "bad.png", "c.png"]
    (folder / "part-0.parquet.tmp").write_bytes(b"half")
    assert done() == [True, True, True, False]
    assert names(folder) == ["a.png", "b.png", "bad.png", "c.png"]
    assert Parts(folder, RUN).failed() == [("bad.png", "is torn")]
    assert not any(path.suffix == ".tmp" for path in folder.iterdir())
    Parts(folder, RUN).drop([items[0].source, items[3].source], [])
    assert names(folder) == ["b.png", "c.png"] and done() == [False, True, True, False]
    items[1].source.path.write_bytes(b"changed")
    items[2].source.path.unlink()
    assert done() == [False] * 4
    pytest.raises(ValueError, Parts, folder, {**RUN, "tau": 0.25}).match(r"tau \(0.5, now 0.25\)")


@pytest.mark.parametrize("number, size", [(1, 1), (8, 1), (9, 2), (2047, 256), (5000, 256)])
def test_the_inputs_of_a_file(number, size):
    """Each once, at least four files for each of two actors; a video has its own."""
    images = [Source(Path(f"{n}.png"), f"{n}.png", "image") for n in range(number)]
    film = Source(Path("v.mp4"), "v.mp4", "video")
    video, *others = ray_engine._shards([*images, film], 2)
    assert video == [film] and sum(others, []) == images
    assert {len(shard) for shard in others[:-1]} | {len(others[0])} == {size}


def test_frames_and_failed_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "ROWS", 4)
    film, folder = item(tmp_path / "v.mp4", frame=FRAME), tmp_path / "out"
    frames = [replace(film, frame=FRAME._replace(number=number)) for number in range(10)]

    def rows():
        yield image_row(frames[0], [LESION], ["x"])
        raise KeyError

    with pytest.raises(KeyError):
        write_part(folder, RUN, [film.source], rows())
    assert not list(folder.iterdir()), "a file that breaks off is not there"
    write(folder, [*frames, replace(film, frame=None, error="is cut off")])
    (part,) = folder.iterdir()
    assert pq.ParquetFile(part).num_row_groups == 3
    assert pq.read_table(part)["frame"].to_pylist() == [*range(10), None]
    failed = [item(tmp_path / f"dicom-{n}.dcm", error="is torn") for n in range(2)]
    no_utf8 = b"\xff.png".decode(errors="surrogateescape")
    failed.append(Item(Source(Path(tmp_path, no_utf8), no_utf8, "image"), None, error="e"))
    write(folder, failed)
    Parts(folder, RUN).drop([], [failed[1].source])  # the first of them is gone
    expected = [("\\udcff.png", "e"), ("dicom-1.dcm", "is torn"), ("v.mp4", "is cut off")]
    assert Parts(folder, RUN).failed() == expected


def rewritten(part, table, metadata=None):
    """The file with another table or metadata."""
    metadata = {b"imrcnn_d2": json.dumps(RUN)} if metadata is None else metadata
    pq.write_table(table.replace_schema_metadata(metadata), part)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda p, t, m=m: rewritten(p, t, {b"imrcnn_d2": m}) for m in ("[]", "'x'", "[" * 10**5)),
        lambda p, t: rewritten(p, t, {}),
        lambda p, t: rewritten(p, t.drop_columns(["signature"])),
        lambda p, t: rewritten(p, t.append_column("more", t["time"])),
        lambda p, t: rewritten(p, t.set_column(0, "file_name", [[None] * len(t)]).cast(t.schema)),
        lambda p, t: p.write_bytes(b"PAR1" + bytes(40) + b"PAR1"),
        lambda p, t: p.write_bytes(p.read_bytes()[:-20]),
    ],
)
def test_what_was_not_written_here_is_named_and_stays(items, tmp_path, change):
    folder = tmp_path / "out"
    write(folder, items)
    (part,) = folder.iterdir()
    change(part, pq.read_table(part))
    (folder / "mine.tmp").touch()
    before = part.read_bytes()
    pytest.raises(ValueError, Parts, folder, RUN).match(re.escape(str(folder)))
    assert part.read_bytes() == before and (folder / "mine.tmp").exists()


IMAGES = 40


def actors():
    """Process ids of the actors of this process's cluster."""
    processes = psutil.Process().children(recursive=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        return [each.pid for each in processes if "ray::MapWorker" in "".join(each.cmdline())]
    return []


def parts(output):
    return list((output / "predictions.parquet").glob("*.parquet"))


def rows(output):
    table = pq.read_table(output / "predictions.parquet").to_pylist()
    return sorted(table, key=lambda row: row["file_name"])


@pytest.mark.slow
def test_an_actor_is_killed(
    request, predictor, weights, image_folder, bad_files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    request.addfinalizer(ray.shutdown)
    for seed in range(IMAGES):
        save_image(image_folder / f"{seed:03d}.png", seed, 300, 400)
    frames = np.stack([random_image(2), random_image(3)])
    write_dicom(image_folder / "KIS-4711.jpg", frames, FrameTime="40")
    output, written_then = tmp_path / "two", []

    def kill():
        wait_for(lambda: parts(output) and len(actors()) == 2, 600)
        os.kill(actors()[0], signal.SIGKILL)
        written_then.append(len(parts(output)))

    threading.Thread(target=kill, daemon=True).start()
    command = [*"--engine ray --actors 2 --batch-size 3 --weights".split(), str(weights)]
    command += ["--input", str(image_folder), "--output", str(output)]
    predict.main(command)
    assert 0 < written_then[0] < len(parts(output))
    printed = capsys.readouterr().out
    done = predict_files(predictor, [image_folder], tmp_path / "one")
    assert f"{done.images} images predicted; {len(done.failed)} inputs could" in printed
    coco, table = read_coco(tmp_path / "one"), rows(output)
    images = [row for row in table if row["error"] is None]
    annotations, detections = [], []
    keys = ("category_id", "bbox", "score", "segmentation")
    for row, image in zip(images, coco["images"], strict=True):
        assert {**row, "id": image["id"]}.items() >= image.items()
        annotations.append([a for a in coco["annotations"] if a["image_id"] == image["id"]])
        columns = zip(row["boxes"], row["scores"], row["masks"], strict=True)
        detections.append([dict(zip(keys, (1, *values), strict=True)) for values in columns])
    # How fp32 sums are ordered, so their last digits, depends on batch size, threads and processor
    # (with AMX, scores differed by 1.7e-6). A wrong weight or image changes far more than this.
    sizes = [(image["height"], image["width"]) for image in coco["images"]]
    differences = compare_records(annotations, detections, sizes, TAU)
    assert differences.detections > IMAGES
    assert not differences.exceeded(lost=0, unmatched=0, score=1e-4, box=1e-2, mask_iou=0.99)
    failed = [(row["file_name"], row["error"]) for row in table if row["error"] is not None]
    assert failed == done.failed and {name for name, _ in failed} == bad_files.keys()
    content = b"".join(path.read_bytes() for path in parts(output))
    for value in (*PATIENT.values(), hashlib.sha256(b"KIS-4711.jpg").hexdigest()[:16]):
        assert value.encode() not in content

    # What failed, has changed or is new, and nothing else.
    for name, size in (("cut.png", ()), ("003.png", (50, 50)), ("new.png", ())):
        save_image(image_folder / name, 7, *size)
    predict.main(command)
    # those of the video that is cut off are done once more
    film = sum(row["frame"] is not None and row["file_name"].startswith("cut") for row in table)
    before_it = len({row["input"] for row in table}) - len(failed) - 1
    printed = capsys.readouterr().out
    assert f"{3 + film} images predicted; {before_it} inputs were done before" in printed
    widths = {(row["file_name"], row["error"]): row["width"] for row in rows(output)}
    assert [widths[f"{name}.png", None] for name in ("cut", "003", "new")] == [80, 50, 80]
    assert len(rows(output)) == len(widths)


LISTENERS = """
import json
from imrcnn_d2.deploy import ray as ray_engine
import psutil

with ray_engine._cluster():
    this = psutil.Process()
    sockets = [each for process in (this, *this.children(recursive=True))
               for each in process.net_connections() if each.status == psutil.CONN_LISTEN]
    print(json.dumps([each.laddr.ip for each in sockets]))
"""


@pytest.mark.slow
def test_a_cluster_of_its_own_listens_to_this_machine_alone():
    """Also where another one is announced here: whoever can write to /tmp could do so."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: there are sockets in it
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command, env = [sys.executable, "-c", LISTENERS], {**env, "RAY_TMPDIR": folder}
        addresses = json.loads(subprocess.check_output(command, env=env, timeout=300))
    assert len(addresses) > 3 and set(addresses) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_runs_do_not_mix_and_what_actors_die_of_is_listed(
    predictor, weights, image_folder, tmp_path, monkeypatch
):
    arguments, output = {"config": None, "weights": weights}, tmp_path / "out"
    lost, refused = [], re.escape(str(output))

    def lose(left, *_):
        """All inputs are lost; another run cannot begin in the meantime."""
        lost.append([*left])
        for run in (
            partial(ray_engine.predict_with_ray, arguments),
            partial(predict_files, predictor),
        ):
            pytest.raises(ValueError, run, [image_folder], output).match(refused)
        return 0

    monkeypatch.setattr(ray_engine, "_predict", lose)
    write_dicom(image_folder / "KIS-4711.png", random_image(0))
    for _ in range(2):
        done = ray_engine.predict_with_ray(arguments, [image_folder], output)
        table = rows(output)
        assert [(row["file_name"], row["error"]) for row in table] == done.failed
        assert len(table) == len(lost[0]) > 2
        assert {row["error"] for row in table} == {ray_engine.LOST}
    assert lost[0] == lost[1]
    assert not any("4711" in row["file_name"] for row in table)
