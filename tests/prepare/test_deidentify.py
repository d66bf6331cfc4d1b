"""Images, annotations and fields of a data set that is de-identified."""

import json
from dataclasses import replace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from endoscope_frames import draw_frame
from PIL import Image

from imrcnn_d2.data.endoscope_view import find_view
from imrcnn_d2.data.formats import Sample, Source, read_coco
from imrcnn_d2.data.images import inspect_image, read_image
from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.deidentify import Pseudonyms, deidentified, parse_keep
from imrcnn_d2.utils.files import BadInputError, Rejects


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


def run(source, names, tmp_path, rejects=None, keep=None):
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
    (sample,), source = run(
        frames(["within"]), names, tmp_path, keep={"site": frozenset(["antrum"]), "size_mm": (0, 9)}
    )
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


# Dates in ways that no pattern finds all of, and what else may tell of a person.
TELLING = (
    *(
        "20120812",
        20120812,
        20120812.0,
        "2012-8-2",
        "1964_08_12",
        "8/2/12",
        "1 Aug 2012",
        "3märz64",
    ),
    *(240131, 120864, 1700000000, 45000, 45000.5, "45000", "240131", "1700000000"),
    *("12 août 1964", "12. elokuuta", "昭和39年8月12日", "ayer", "am Tag nach Neujahr"),
    *(
        "2012\u20108\u20102",
        "2012\u20138\u20132",
        "\uff12\uff10\uff11\uff12\uff10\uff18\uff11\uff12",
    ),
    *("Frau Muster", "antrum 12.08.1964", "ANTRUM", True, -1, 61, "12", ["antrum"], {"a": 12}),
)


@pytest.mark.parametrize("value", TELLING)
@pytest.mark.parametrize("rule", ["antrum,corpus", "0:60"])
@pytest.mark.parametrize("of_annotation", [False, True])
def test_values_that_nobody_named(names, tmp_path, value, rule, of_annotation):
    record = {"note": value}
    source = small(tmp_path, *(({}, record) if of_annotation else (record,)))
    keep = parse_keep([f"note={rule}"], [], source)
    with pytest.raises(BadInputError, match=r"a.png: note is .*, which"):
        run(source, names, tmp_path, keep=keep)


def test_values_that_pass(names, tmp_path):
    fields = {"size_mm": 4.5, "site": "antrum", "kind": "0-IIa, flat", "grade": 2, "seen": True}
    fields |= {"none": None, "free": "12 août", "low": -3.0, "day": 45000, "ratio": "1:2"}
    texts = ["size_mm=0:6e1", "site=corpus,antrum", 'kind=0-Is,"0-IIa, flat"', "grade=1,2"]
    texts += ["seen=true,false", "none=a", "low=-3:-3", "day=40000:50000", "ratio=1:2,"]
    source = small(tmp_path, {"lesion_id": "0", **fields}, fields)
    ((kept,), source) = run(
        source, names, tmp_path, keep=parse_keep(texts, ["free", "odd"], source)
    )
    for record in (kept.fields, kept.annotations[0]):
        assert {name: record[name] for name in fields} == fields
    assert "passed as they are, NOT examined: free, odd" in source.notes


def test_a_field_without_its_values(frames, names, tmp_path):
    """The error names the ways there are, with values of the field, and they work."""
    for text in ("size_mm", "size_mm="):
        with pytest.raises(ValueError, match=r"--keep size_mm .*--keep-as-is size_mm") as error:
            parse_keep(["site=antrum", text], [], frames(["within"]))
    listed, ranged = (f"size_mm={rule}" for rule in ("4.5", "4.5:4.5"))
    assert f"--keep {listed}" in str(error.value) and f"--keep {ranged}" in str(error.value)
    for texts, as_is in (([listed], []), ([ranged], []), ([], ["size_mm"])):
        keep = parse_keep(texts, as_is, frames(["within"]))
        (sample,), _ = run(frames(["within"]), names, tmp_path, keep=keep)
        assert sample.fields["size_mm"] == 4.5
    with pytest.raises(ValueError, match="site is named twice"):
        parse_keep(["site=antrum"], ["site"], frames(["within"]))


@pytest.mark.parametrize("rule", ["note=0:9999", "note=4711,P1,of P1", None])
@pytest.mark.parametrize(
    ("patient", "note"),
    [
        *(("P1", "of P1"), ("P1", "P1"), ("4711", 4711.0), ("4711", 4711), ("004711", 4711)),
        ("M\u00fcller", "of Mu\u0308ller"),
    ],
)
def test_an_annotation_does_not_tell_the_patient(names, tmp_path, patient, note, rule):
    source = small(tmp_path, {"patient_id": patient}, {"note": note})
    keep = parse_keep([rule] if rule else [], [] if rule else ["note"], source)
    with pytest.raises(BadInputError, match=r"note is .*, (an id|which)"):
        run(source, names, tmp_path, keep=keep)


@pytest.mark.parametrize("field", ["patient_id", "area", "width", "group_id"])
def test_what_is_made_anew_is_never_kept(names, tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} cannot be kept"):
        run(small(tmp_path, {}), names, tmp_path, keep={field: None})


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
    categories = [{"id": 1, "name": "polyp", "supercategory": "ward 7"}]
    (kept,), new = run(Source([sample], categories, {}), names, tmp_path)
    assert "names of classes pass as they are: polyp, ward 7" in new.notes
    assert [a["iscrowd"] for a in kept.annotations] == [0], "it lay outside the view"
    sample.annotations, sample.label = [{"category_id": 1}], 1
    (kept,), _ = run(Source([sample], source.categories, {}), names, tmp_path)
    assert kept.annotations == [{"category_id": 1}] and kept.label == 1
