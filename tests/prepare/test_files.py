"""What others sent is opened only if it is a small file of a known kind, strict JSON or a table."""

import csv
import io
import json
import os
import re
import socket
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import EpsImagePlugin, Image

from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.data import images
from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.mapper import ClassificationMapper, LesionMapper
from imrcnn_d2.data.prepare.deidentify import Pseudonyms
from imrcnn_d2.data.prepare.duplicates import describe_image
from imrcnn_d2.data.prepare.metadata import read_metadata, read_table
from imrcnn_d2.data.prepare.splits import read_splits
from imrcnn_d2.evaluation.output import log_test_evaluation, read_test_log
from imrcnn_d2.report.html.page import embed
from imrcnn_d2.report.plots.images import plot_review_sheets, tile_sheet
from imrcnn_d2.utils import files
from imrcnn_d2.utils.files import BadInputError, Rejects, csv_line, csv_lines, csv_text, read_rows


def train(path, mapper):
    cfg = get_cfg()
    add_imrcnn_config(cfg)
    cfg.INPUT.SIZE = 32
    mapper(cfg, is_train=False)({"file_name": str(path), "annotations": []})


OPENERS = {
    **{name: getattr(images, name) for name in ("read_image", "read_mask", "read_values")},
    "inspect_image": images.inspect_image,
    "near_duplicates": describe_image,
    "report": embed,
    "detector": lambda path: train(path, LesionMapper),
    "classifier": lambda path: train(path, ClassificationMapper),
    "contact sheet": lambda path: tile_sheet("", [(path.parent, path.name, "")], {}),
    "review sheets": lambda path: plot_review_sheets(path.parent, path.parent.parent / "review"),
}
every_opener = pytest.mark.parametrize("opener", OPENERS.values(), ids=OPENERS)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def encoded(kind, mode="RGB", **options):
    stream = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert(mode).save(stream, format=kind, **options)
    return stream.getvalue()


@every_opener
@pytest.mark.parametrize("kind", images.IMAGE_FORMATS)
def test_formats_that_are_opened(folder, kind, opener):
    (folder / "a.png").write_bytes(encoded(kind))
    if opener is not OPENERS["read_values"]:
        opener(folder / "a.png")
    with images.open_image(folder / "a.png") as image:
        assert image.format == kind and image.size == (64, 48)


def png(width, height, mode="RGB"):
    """A PNG that claims another size."""
    data = encoded("PNG", mode)
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def resized(kind, width, height):
    """An image of 64x48 that claims another size in its header."""
    data = encoded(kind, no_jp2=True)
    for code in ("<2H", ">2H", "<2I", ">2I"):
        for old, new in (((64, 48), (width, height)), ((48, 64), (height, width))):
            if struct.pack(code, *old) in data and ("H" not in code or width < 2**16):
                return data.replace(struct.pack(code, *old), struct.pack(code, *new), 1)
    raise AssertionError(kind)


def jpeg(times):
    """A progressive JPEG with its last scan again and again: each takes time."""
    data = encoded("JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 1000)
    return data[:-2] + times * data[data.rindex(b"\xff\xda") : -2] + data[-2:]


def tiff(pages, tags):
    """A little-endian TIFF of so many pages, each of the same {tag: value}."""
    pairs = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    page = struct.pack("<H", len(tags)) + pairs
    places = (struct.pack("<I", 8 + i * (len(page) + 4)) for i in range(pages))
    return b"II*\0" + b"".join(place + page for place in places) + b"\0" * 4


WEBP = b"RIFF\x2a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + (16_000).to_bytes(3, "little") * 2
HOSTILE = {f"{kind}.jpg": encoded(kind) for kind in "EPS ICO PCX TGA DDS IM SGI".split()}
HOSTILE |= {
    "psd.jpg": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3) + b"\0" * 250,
    "svg.jpg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
    "large.png": png(9460, 9460),  # more than allowed, less than Pillow refuses
    "huge.png": png(2**31 - 1, 2**31 - 1),
    "bits.png": png(40_000, 40_000, "1"),
    "large.bmp": resized("BMP", 30_000, 30_000),
    "large.gif": resized("GIF", 65_000, 65_000),
    "large.jpg": resized("JPEG", 65_000, 65_000),
    "large.jp2": resized("JPEG2000", 1_000_000, 1_000_000),
    "large.pgm": b"P5 100000 100000 255\n",
    "large.tif": tiff(1, {256: 100_000, 257: 100_000, 262: 1, 273: 8}),
    "large.webp": WEBP + b"VP8L\x0c\0\0\0\x2f\0\0\0\0\0\x88\x88\x08\0\0\0",
    "slow.jpg": jpeg(100),
    "sparse.png": encoded("PNG"),
}
REASONS = r"is no readable image|has \d+x\d+ = \d+ pixels|is a JPEG of 1\d\d scans|has \d+ bytes"


@every_opener
@pytest.mark.parametrize("name", HOSTILE)
def test_other_formats_and_what_takes_memory_or_hours(folder, name, opener, monkeypatch):
    """None starts a program: Pillow would decode EPS with Ghostscript, where there is one."""
    program, ran = folder.parent / "gs", folder.parent / "ran"
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    path = folder / name
    path.write_bytes(HOSTILE[name])
    if name == "sparse.png":
        os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=f"{name}.*({REASONS})"):
        opener(path)
    assert not ran.exists()


def test_images_are_opened_in_one_place():
    root, opened = Path(images.__file__).parents[2], r"\bImage\.open\(|\bcv2\.imread|VideoCapture"
    paths = [*root.glob("imrcnn_d2/**/*.py"), *root.glob("benchmarks/*.py")]
    assert {p.name for p in paths if re.search(opened, p.read_text("utf-8"))} == {"images.py"}


def test_the_largest_image(folder, monkeypatch):
    path = folder / "a.png"
    for allowed, data in ((64 * 48, encoded("PNG")), (None, encoded("PNG")), (64 * 48, jpeg(5))):
        path.write_bytes(data)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
        images.open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pytest drops ours
    with pytest.raises(BadInputError, match=r"a.png: has 64x48 = 3072 pixels, more than the 3071"):
        images.open_image(path)


def test_pages_are_not_counted(folder):
    """Which takes quadratic time."""
    tags = {256: 4, 257: 4, 258: 8, 262: 1, 273: 0, 277: 1, 278: 4, 279: 16}
    (folder / "slow.tif").write_bytes(tiff(200_000, tags))
    began = time.process_time()
    with pytest.raises(BadInputError, match="slow.tif: holds several images"):
        images.read_image(folder / "slow.tif")
    assert time.process_time() - began < 5


READERS = {
    **{name: OPENERS[name] for name in ("inspect_image", "detector", "report")},
    "json": files.read_json,
    "table": lambda path: read_metadata(path, Rejects()),
    "splits": read_splits,
    "dicom": images.read_header,
    "coco": lambda path: read_coco(path, path.parent, Rejects()),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_never_ends_is_never_opened(folder, reader, monkeypatch):
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to("/dev/zero")
    monkeypatch.chdir(folder)  # sockets have short names
    socket.socket(socket.AF_UNIX).bind("socket.png")
    for path in (Path("/dev/zero"), *folder.iterdir()):
        assert not images.is_dicom(path)
        with pytest.raises(ValueError, match=f"{path.name}.* cannot be opened"):
            reader(path)


def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    def iterdir(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return map(folder.joinpath, os.listdir(folder))

    monkeypatch.setattr(Path, "iterdir", iterdir)
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").touch()
    with pytest.raises(BadInputError, match=f"{tmp_path}/closed: "):
        images.list_files(tmp_path, Rejects())
    rejects = Rejects("reject")
    assert images.list_files(tmp_path, rejects) == [tmp_path / "a.png"]
    assert [error.file for error in rejects.errors] == [str(tmp_path / "closed")]


def test_links_out_of_a_folder(tmp_path):
    """Links to files and folders inside it and outside, in circles, to nothing; and a pipe."""
    for name in "in/a/1.png in/.a/6.png in/.7.png out/b/2.png out/b/3.png out/4.png".split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    links = {"in/same.png": "a/1.png", "in/again": "a", "in/there": "../out/b"}
    links |= {"in/5.png": "../out/4.png", "in/gone.png": "nowhere.png"}
    links |= {"out/b/round": ".", "out/b/back": "../../in", "root": "in"}
    files.check_no_way_out(tmp_path / "in")
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    root = tmp_path / "root"
    with pytest.raises(BadInputError, match="(5.png|there): is a link"):
        files.check_no_way_out(root)
    for name in ("in", "in/a"):
        os.mkfifo(tmp_path / name / "pipe.png")
    with pytest.raises(BadInputError, match="pipe.png"):
        files.check_no_way_out(tmp_path / "in" / "a")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        images.list_files(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="5.png: is a link .*--follow-links"):
        images.list_files(root, Rejects())
    inside, refused = ["a/1.png", "same.png"], {"gone.png", "pipe.png", "a/pipe.png"}
    everything = ["5.png", *inside, "there/2.png", "there/3.png"]
    for follow, listed in ((False, inside), (True, everything)):
        rejects = Rejects("reject", follow_links=follow)
        paths = images.list_files(root, rejects)
        assert [path.relative_to(root).as_posix() for path in paths] == listed
        errors = {os.path.relpath(error.file, root) for error in rejects.errors}
        assert errors == (refused if follow else refused | {"5.png", "there"})
    for name in ("5.png", "there/2.png"):
        with pytest.raises(BadInputError, match=r"--follow-links"):
            images.path_inside(root, name, tmp_path)
        assert images.path_inside(root, name, tmp_path, follow_links=True) == root / name
    for name in ("same.png", "again/1.png", "none.png"):
        assert images.path_inside(root, name, tmp_path) == root / name


BAD_JSON = {b"{": "", b"": "", b'["\xff"]': "", b"[NaN]": "NaN", b"[1e999]": "1e999"}
BAD_JSON |= {b"[-1" + b"0" * 400 + b"]": "-1000000000000000000...", b'["\\ud800"]': "surrogates"}
BAD_JSON |= {b"[" * 100_000: "nested", b'[{"a": {"\\u0061": 1, "a": 2}}]': "'a' is there 2"}
BAD_JSON[b'{"annotations": [1], "x": 0, "annotations": []}'] = "'annotations' is there 2"


def test_json_that_is_strict_and_small(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, 2.5, "\\u00e9\\ud83d\\ude00", null]}', encoding="utf-8-sig")
    assert files.read_json(path) == {"a": [1, 2.5, "é😀", None]}
    for data, message in BAD_JSON.items():
        path.write_bytes(data)
        with pytest.raises(BadInputError, match=f"a.json: .*{message}"):
            files.read_json(path)
    path.write_text("[[], {}]")  # empty lists take many times the memory of their text
    for limit, number in (("_MOST_CONTAINERS", 3), ("_MOST_BYTES", 8)):
        monkeypatch.setattr(files, limit, number)
        assert files.read_json(path) == [[], {}]
        monkeypatch.setattr(files, limit, number - 1)
        with pytest.raises(BadInputError, match=f"a.json: .* than {number - 1}"):
            files.read_json(path)
        monkeypatch.undo()


def test_a_list_is_as_strict_record_by_record(tmp_path, monkeypatch):
    """Whatever the blocks of text are that it is read in."""
    path = tmp_path / "a.json"
    records = [{"a": [1, {"b": "]},é"}], "c": -2.5e-3}, {}, {"d": "😀\\"}]
    bad = {b"[": "", b"[{}": "", b"[{},]": "", b"[{} {}]": "", b"[{}] x": "Extra", b"{}": "list"}
    bad |= {b"[1]": "not an object", b'[{}, {"a": 1, "a": 2}]': "'a' is there 2.* item 1"}
    lists = {data[1:-1]: text for data, text in BAD_JSON.items() if data[:1] == b"["}
    bad |= {b'[{"a": ' + data + b"}]": message for data, message in lists.items()}
    for block in (7, 20, 2**20):
        monkeypatch.setattr(files, "_BLOCK", block)
        for text in ("[]", " [ ] ", json.dumps(records), f" {json.dumps(records, indent=1)}\n"):
            path.write_text(text, encoding="utf-8-sig")
            assert files.is_json_list(path)
            assert list(files.read_records(path, "")) == json.loads(text)
        for data, message in bad.items():
            path.write_bytes(data)
            with pytest.raises(BadInputError, match=f"a.json: .*{message}"):
                list(files.read_records(path, ""))
    monkeypatch.setattr(files, "_LONGEST_ITEM", 10)
    path.write_text(json.dumps(records))
    with pytest.raises(BadInputError, match="item 0 of the list"):
        monkeypatch.setattr(files, "_BLOCK", 8)
        list(files.read_records(path, ""))


FORMULAS = (
    "=cmd|' /C calc'!A0", "+1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'=1", "''+x", "-",
    "-1.5x", "=1,5", '="a"',
)  # fmt: skip
NUMBERS = ("-1.5", "+3", "-2e-5", "0", "-.5", "7.")
TEXTS = ("", "a.png", "'quoted'", "a=b", "'", " =1", "ü|x", "two\nlines")


def test_no_cell_is_a_formula_and_all_are_read_back(tmp_path):
    path = tmp_path / "table.csv"
    for text in (*FORMULAS, *NUMBERS, *TEXTS):
        (cells,) = csv.reader(io.StringIO(csv_line([text, 1]), newline=""))
        assert cells == [f"'{text}" if text in FORMULAS else text, "1"]
        table = csv_lines([("name", text or "x"), (text, "1")])
        path.write_text(table, encoding="utf-8", newline="")
        assert read_rows(path, ["name"]) == [{"name": text, text or "x": "1"}]
    values = [-1.5, -3, np.float64(-0.25), np.int64(-7), True, None, float("-inf")]
    assert csv_line(values) == "-1.5,-3,-0.25,-7,True,,-inf\n"
    for content in (b"", b"\xff\xfe", b"other\n1\n", b"name\na,b\n", b'name\n"' + b"a" * 140_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"table\.csv: "):
            read_rows(path, ["name"])


def test_all_tables_go_through_it(tmp_path):
    """Rejects, pseudonyms, evaluation files and the log of evaluations."""
    attack = '=HYPERLINK("http://x/", A1)'
    rejects = Rejects("reject")
    rejects.errors.append(BadInputError(attack, attack))
    rejects.write_csv(tmp_path / "rejected.csv")
    assert read_rows(tmp_path / "rejected.csv", []) == [{"file": attack, "reason": attack}]
    names = Pseudonyms(tmp_path / "key", tmp_path / "out")
    expected = {old: names("patient", old) for old in (attack, "'=1")}
    gt = tmp_path / "annotations" / "test.json"
    (tmp_path / "splits.json").write_text("{}")
    for _ in range(2):  # read and written again
        names.write_table()
        log_test_evaluation(gt, source="w", sha256=attack, output=tmp_path)
    assert {row["old"]: row["new"] for row in read_rows(names.table, ["old"])} == expected
    assert [entry["sha256"] for entry in read_test_log(gt)] == [attack, attack]
    (tmp_path / "per_image.csv").write_text(csv_text([{attack: -1.5, "name": attack}], []))
    assert read_table(tmp_path / "per_image.csv").rows[0].cells == {attack: "-1.5", "name": attack}
    tables = [*tmp_path.glob("*.csv")]
    assert len(tables) == 4 and names.table in tables
    for table in tables:
        with open(table, newline="", encoding="utf-8") as file:
            cells = [cell for row in csv.reader(file) for cell in row if cell not in NUMBERS]
        assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r"))]
