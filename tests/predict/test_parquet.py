"""A folder of Parquet files: whole files, each input once, and no run among another's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from imrcnn_d2.deploy.batch import Item
from imrcnn_d2.deploy.inputs import Frame, Source

pq = pytest.importorskip("pyarrow.parquet", reason="the ray extra is not installed")
from imrcnn_d2.deploy.ray import Parts, image_row, input_row, write_part  # noqa: E402

RUN = {"tau": 0.5, "weights_sha256": "ab", "version": "1", "config_sha256": "c", "classes": ["x"]}
FOUND = [
    {
        "category_id": 1,
        "bbox": [1.5, 2.0, 3.25, 4.0],
        "score": 0.75,
        "segmentation": {"size": [6, 8], "counts": "31o04L"},
        "area": 12.0,
    }
]


def item(path, name=None, **fields):
    path.touch()
    source = Source(path, name or path.name, "image")
    status = path.stat()
    return Item(source, [status.st_size, status.st_mtime_ns], **fields)


@pytest.fixture
def items(tmp_path):
    """Three images and one that cannot be read."""
    frame = Frame(np.zeros((6, 8, 3), np.uint8))
    images = [item(tmp_path / f"{name}.png", frame=frame) for name in "abc"]
    return [*images, item(tmp_path / "bad.png", error="is torn")]


def write(folder, items):
    rows = [input_row(i) if i.frame is None else image_row(i, FOUND, ["x"]) for i in items]
    write_part(folder, RUN, [item.source for item in items], rows)


def names(folder):
    return sorted(pq.read_table(folder)["file_name"].to_pylist())


def test_what_a_row_says(items, tmp_path):
    write(tmp_path / "out", [items[0], items[3]])
    (part,) = (tmp_path / "out").iterdir()
    image, bad = pq.read_table(part).to_pylist()
    assert (image["file_name"], image["width"], image["height"]) == ("a.png", 8, 6)
    assert (image["boxes"], image["scores"]) == ([[1.5, 2.0, 3.25, 4.0]], [0.75])
    assert (image["classes"], image["areas"]) == (["x"], [12.0])
    assert image["masks"] == [{"size": [6, 8], "counts": "31o04L"}]
    assert (image["tau"], image["weights_sha256"], image["version"]) == (0.5, "ab", "1")
    assert image["error"] is None and image["probabilities"] is None and image["frame"] is None
    assert (bad["file_name"], bad["error"]) == ("bad.png", "is torn")
    assert bad["width"] is None and bad["scores"] is None and bad["tau"] == 0.5
    assert json.loads(pq.read_schema(part).metadata[b"imrcnn_d2"]) == RUN
    nothing = image_row(items[0], [], ["x"])
    assert nothing["boxes"] == nothing["masks"] == nothing["scores"] == []
    classified = [{"category_id": 1, "score": 0.75, "probabilities": [0.75, 0.25]}]
    row = image_row(items[0], classified, ["x", "y"])
    assert (row["classes"], row["probabilities"]) == (["x"], [0.75, 0.25])
    assert "boxes" not in row and "masks" not in row


def test_done_is_what_is_there_whole_and_unchanged(items, tmp_path):
    folder = tmp_path / "out"
    write(folder, items[:2])
    write(folder, items[2:])
    (folder / "part-0.parquet.tmp").write_bytes(b"half")
    parts = Parts(folder, RUN)
    assert [parts.is_done(item.source) for item in items] == [True, True, True, False]
    assert parts.failed() == [("bad.png", "is torn")]
    assert not any(path.suffix == ".tmp" for path in folder.iterdir())
    items[1].source.path.write_bytes(b"changed")
    assert not Parts(folder, RUN).is_done(items[1].source)
    items[2].source.path.unlink()
    assert not Parts(folder, RUN).is_done(items[2].source)


def test_dropped_rows_leave_the_others(items, tmp_path):
    folder = tmp_path / "out"
    write(folder, items[:2])
    write(folder, items[2:])
    Parts(folder, RUN).drop([items[0].source, items[2].source, items[3].source], [])
    assert names(folder) == ["b.png"]
    (part,) = folder.iterdir()
    assert json.loads(pq.read_schema(part).metadata[b"imrcnn_d2"]) == RUN
    assert [Parts(folder, RUN).is_done(item.source) for item in items] == [
        False,
        True,
        False,
        False,
    ]


def test_an_input_in_two_files_is_left_in_one(items, tmp_path):
    folder = tmp_path / "out"
    write(folder, items[:2])
    write(folder, items[1:3])
    assert names(folder) == ["a.png", "b.png", "b.png", "c.png"]
    Parts(folder, RUN)
    assert names(folder) == ["a.png", "b.png", "c.png"]


def test_frames_of_one_input_are_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("imrcnn_d2.deploy.ray.ROWS", 4)
    frames = [
        item(tmp_path / "v.mp4", frame=Frame(np.zeros((6, 8, 3), np.uint8), number))
        for number in range(10)
    ]
    end = replace(frames[0], frame=None, error="is cut off")
    write(tmp_path / "out", [*frames, end])
    (part,) = (tmp_path / "out").iterdir()
    assert pq.ParquetFile(part).num_row_groups == 3
    table = pq.read_table(part)
    assert table["frame"].to_pylist() == [*range(10), None]
    assert Parts(tmp_path / "out", RUN).failed() == [("v.mp4", "is cut off")]


def test_a_file_that_breaks_off_is_not_there(items, tmp_path):
    def rows():
        yield image_row(items[0], FOUND, ["x"])
        raise KeyError

    with pytest.raises(KeyError):
        write_part(tmp_path / "out", RUN, [items[0].source], rows())
    assert not list((tmp_path / "out").iterdir())


def test_of_another_run_or_damaged(items, tmp_path):
    folder = tmp_path / "out"
    write(folder, items[:1])
    with pytest.raises(ValueError, match=r"another run: it differs in tau \(0.5, now 0.25\)"):
        Parts(folder, {**RUN, "tau": 0.25})
    (part,) = folder.iterdir()
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{part.name} is damaged"):
        Parts(folder, RUN)


def rewritten(part, table, run=RUN):
    """The file with another table, as of us."""
    pq.write_table(table.replace_schema_metadata({b"imrcnn_d2": json.dumps(run)}), part)


@pytest.mark.parametrize(
    "change",
    [
        lambda part, table: rewritten(part, table, run=[]),
        lambda part, table: rewritten(part, table, run="x"),
        lambda part, table: rewritten(part, table.drop_columns(["signature"])),
        lambda part, table: rewritten(part, table.append_column("more", table["time"])),
        lambda part, table: rewritten(
            part, table.set_column(0, "file_name", [[None] * len(table)]).cast(table.schema)
        ),
        lambda part, table: pq.write_table(table.replace_schema_metadata({}), part),
        lambda part, table: pq.write_table(
            table.replace_schema_metadata({b"imrcnn_d2": b"[" * 10**5}), part
        ),
        lambda part, table: part.write_bytes(b"PAR1" + bytes(40) + b"PAR1"),
    ],
)
def test_what_was_not_written_here_is_named_and_stays(items, tmp_path, change):
    folder = tmp_path / "out"
    write(folder, items)
    (part,) = folder.iterdir()
    change(part, pq.read_table(part))
    (folder / "mine.tmp").touch()
    before = part.read_bytes()
    with pytest.raises(ValueError, match=f"{folder}"):
        Parts(folder, RUN)
    assert part.read_bytes() == before and (folder / "mine.tmp").exists()


def test_what_failed_and_is_gone_is_not_listed(tmp_path):
    failed = [item(tmp_path / f"dicom-{n}.dcm", error="is torn") for n in range(2)]
    write(tmp_path / "out", failed)
    now = failed[1].source
    Parts(tmp_path / "out", RUN).drop([], [now])
    assert Parts(tmp_path / "out", RUN).failed() == [(now.name, "is torn")]


def test_a_name_that_is_no_utf8(tmp_path):
    name = b"\xff.png".decode(errors="surrogateescape")
    source = Source(Path(tmp_path, name), name, "image")
    write_part(tmp_path / "out", RUN, [source], [input_row(Item(source, None, error="e"))])
    assert names(tmp_path / "out") == ["\\udcff.png"]
    assert Parts(tmp_path / "out", RUN).failed() == [("\\udcff.png", "e")]
