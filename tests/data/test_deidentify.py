"""Images, annotations and fields of a data set that is de-identified."""

import json
from dataclasses import replace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from endoscope_frames import draw_frame
from PIL import Image

from imrcnn_d2.data.coco import read_coco
from imrcnn_d2.data.deidentify import deidentified
from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.data.images import inspect_image, read_image
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare import Sample, Source
from imrcnn_d2.data.pseudonyms import Pseudonyms
from imrcnn_d2.data.rejects import BadInputError, Rejects


@pytest.fixture
def frames(tmp_path):
    """A COCO file of two patients' frames: with a lesion within, beyond and outside the view."""
    images = tmp_path / "images"
    images.mkdir()
    lesions = {"within": (350, 200), "beyond": (560, 200), "outside": (20, 20)}
    records, annotations = [], []
    for i, (name, (x, y)) in enumerate(lesions.items(), 1):
        frame, _, _ = draw_frame("disc", inset="map", seed=i)
        Image.fromarray(frame).save(images / f"Muster_{name}.png")
        about = {"patient_id": "P1", "site": "antrum", "size_mm": 4.5, "date": "2012-08-01"}
        records.append({"id": i, "file_name": f"Muster_{name}.png", **about})
        box = [x, y, 120, 60]
        polygon = [[x, y, x + 120, y, x + 120, y + 60, x, y + 60]]
        annotation = {"id": i, "image_id": i, "category_id": 1, "segmentation": polygon}
        annotations.append({**annotation, "bbox": box, "lesion_id": "L1", "note": "Frau Muster"})
    content = {
        "info": {"contributor": "Dr. Arzt"},
        "licenses": [{"name": "Klinik"}],
        "images": records,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cancer", "keypoints": ["Arzt"]}],
    }

    def read(kept=lesions):
        ids = [i for i, name in enumerate(lesions, 1) if name in kept]
        for key, of in (("images", "id"), ("annotations", "image_id")):
            content[key] = [record for record in content[key] if record[of] in ids]
        (tmp_path / "own.json").write_text(json.dumps(content))
        return read_coco(tmp_path / "own.json", images, Rejects())

    return read


@pytest.fixture
def names(tmp_path):
    return Pseudonyms(tmp_path / "key", tmp_path / "out")


def run(source, names, tmp_path, rejects=None, keep=()):
    source = deidentified(source, tmp_path / "new", names, rejects or Rejects(), keep)
    return list(source.samples), source


def test_the_picture_and_its_lesion_move_together(frames, names, tmp_path):
    (sample,), source = run(frames(["within"]), names, tmp_path)
    old = read_image(tmp_path / "images" / "Muster_within.png")
    new = read_image(sample.image.path)
    view = find_view(old)
    x0, y0, x1, y1 = view.box
    assert (sample.image.width, sample.image.height) == (x1 - x0, y1 - y0)
    assert x0 > 100 and new.shape[1] < old.shape[1]
    assert (new == np.where(view.mask[..., None], old, 0)[y0:y1, x0:x1]).all()
    (annotation,) = sample.annotations
    assert annotation["bbox"] == [350 - x0, 200 - y0, 120, 60]
    assert annotation["area"] == 120 * 60 and annotation["iscrowd"] == 0
    mask = mask_util.decode(annotation["segmentation"])
    assert mask.shape == new.shape[:2]
    assert mask[200 - y0 : 260 - y0, 350 - x0 : 470 - x0].all()
    assert "were cut" not in "".join(source.notes)


def test_names_and_fields(frames, names, tmp_path):
    (sample,), source = run(frames(["within"]), names, tmp_path, keep=["site", "size_mm"])
    assert sample.file_name == names.of_file("Muster_within.png") == sample.image.path.name
    assert sample.fields == {"patient_id": names("patient", "P1"), "site": "antrum", "size_mm": 4.5}
    (annotation,) = sample.annotations
    assert annotation["lesion_id"] == names("lesion", "L1") and "note" not in annotation
    assert source.categories == [{"id": 1, "name": "cancer"}] and not source.extra
    assert "Arzt" not in json.dumps(source.info)
    assert "fields left out: contributor, date, licenses, note" in source.notes
    assert names.table.exists()


def test_a_lesion_beyond_the_view_is_cut(frames, names, tmp_path):
    (sample,), source = run(frames(["beyond"]), names, tmp_path)
    assert 0 < sample.annotations[0]["area"] < 0.9 * 120 * 60
    mask = mask_util.decode(sample.annotations[0]["segmentation"])
    blanked = ~read_image(sample.image.path)[mask > 0].any(axis=1)
    assert blanked.mean() < 0.01
    assert "1 lesions reached beyond the view and were cut" in source.notes


def test_a_lesion_outside_the_view_is_bad_input(frames, names, tmp_path):
    rejects = Rejects("reject")
    samples, _ = run(frames(), names, tmp_path, rejects)
    assert len(samples) == 2
    (error,) = rejects.errors
    assert error.file.endswith("Muster_outside.png")
    assert "lies outside the endoscope's view" in error.reason
    with pytest.raises(BadInputError, match="lies outside"):
        run(frames(), names, tmp_path)


def small(tmp_path, fields, of_class=None):
    """A data set of one small image."""
    frame, _, _ = draw_frame("disc", height=120, width=160)
    Image.fromarray(frame).save(tmp_path / "a.png")
    annotations = [{"category_id": 1, **of_class}] if of_class else []
    return Source([Sample("a.png", inspect_image(tmp_path / "a.png"), annotations, fields)], [], {})


DATES = (
    *("20120812", 20120812, 20120812.0, "20120812123000", "201208121230", "2012-08-12 12:30"),
    *("2012-8-2", "2012 08 01", "1964_08_12", "2012:08:12", "8/2/12", "08.2012", "2012-08"),
    *("1 Aug 2012", "1. August", "Aug-12", "3märz64"),
)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("seen 12.08.2012", "a date or free text"),
        *((date, "a date or free text") for date in DATES),
        ("a polyp that was seen before and has grown", "a date or free text"),
        ("P1", "an id, which cannot pass"),
        ("p1 x", "an id, which cannot pass"),
        (["P1"], "is a list, which cannot pass"),
    ],
)
def test_values_that_tell_too_much(names, tmp_path, value, reason):
    source = small(tmp_path, {"patient_id": "P1", "site": value})
    with pytest.raises(BadInputError, match=reason):
        run(source, names, tmp_path, keep=["site"])


def test_values_that_pass(names, tmp_path):
    values = [4.5, 12, 0.12345678, 3.14159265, "0-IIa", "4.5 mm", "marker 3", "mayo 2", True, None]
    fields = {f"f{i}": value for i, value in enumerate(values)}
    source = small(tmp_path, {"lesion_id": "0", **fields}, fields)
    ((kept,), _) = run(source, names, tmp_path, keep=fields)
    for record in (kept.fields, kept.annotations[0]):
        assert [record[name] for name in fields] == values


@pytest.mark.parametrize(("patient", "note"), [("P1", "of P1"), ("4711", 4711.0), ("4711", 4711)])
def test_an_annotation_does_not_tell_the_patient(names, tmp_path, patient, note):
    source = small(tmp_path, {"patient_id": patient}, {"note": note})
    with pytest.raises(BadInputError, match=r"note is .*, an id, which cannot pass"):
        run(source, names, tmp_path, keep=["note"])


@pytest.mark.parametrize("field", ["patient_id", "area", "width", "group_id"])
def test_what_is_made_anew_is_never_kept(names, tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} cannot be kept"):
        run(small(tmp_path, {}), names, tmp_path, keep=[field])


def test_dark_images_and_copies(frames, names, tmp_path):
    source = frames(["within"])
    (sample,) = source.samples
    dark = tmp_path / "dark.png"
    Image.new("RGB", (60, 40), (2, 2, 2)).save(dark)
    beside = tmp_path / "copy.png"
    changed = read_image(sample.image.path).copy()
    changed[5:15, 5:15] = 255  # another date beside the view
    Image.fromarray(changed).save(beside)
    more = [Sample(p.name, inspect_image(p), []) for p in (dark, beside)]
    source.samples = [sample, *more]
    rejects = Rejects("reject")
    samples, _ = run(source, names, tmp_path, rejects)
    assert len(samples) == 1
    assert [error.reason.split(",")[0] for error in rejects.errors] == [
        "nothing in it is lit",
        "duplicate: cropped",
    ]


def test_two_images_of_one_name(names, tmp_path, frames):
    """The first is kept as it is, also where its file was linked before the second came."""
    source = frames(["within", "beyond"])
    first, second = (
        replace(s, file_name=f"0.{e}") for s, e in zip(source.samples, ("dcm", "png"), strict=True)
    )
    first.image = replace(first.image, needs_conversion=True)
    source.samples = [first, second]
    rejects = Rejects("reject")
    ((kept, before),) = (
        (sample, read_image(sample.image.path))
        for sample in deidentified(source, tmp_path / "new", names, rejects).samples
    )
    assert (read_image(kept.image.path) == before).all()
    (error,) = rejects.errors
    assert error.file.endswith("Muster_beyond.png")
    assert error.reason.startswith("duplicate: 0.png was already made from")
    assert error.reason.endswith("Muster_within.png")


def test_classes_and_crowds(names, tmp_path, frames):
    source = frames(["within"])
    (sample,) = source.samples
    crowd = np.zeros((480, 640), bool)
    crowd[10:30, 10:30] = True
    crowd = annotation_from_mask(crowd, iscrowd=1)
    sample.annotations.append(crowd)
    (kept,), _ = run(Source([sample], source.categories, {}), names, tmp_path)
    assert [a["iscrowd"] for a in kept.annotations] == [0], "it lay outside the view"
    sample.annotations, sample.label = [{"category_id": 1}], 1
    (kept,), _ = run(Source([sample], source.categories, {}), names, tmp_path)
    assert kept.annotations == [{"category_id": 1}] and kept.label == 1
