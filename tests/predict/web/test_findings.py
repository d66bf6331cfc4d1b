"""What is found in an upload, and the files that are made of it."""

import io
import json
import zipfile

import numpy as np
import pycocotools.mask as mask_util
import pytest
from dicoms import PATIENT, write_dicom
from PIL import Image

from imrcnn_d2.deploy.batch import predict_files
from imrcnn_d2.deploy.web.page import (
    DOWNLOADS,
    _marks,
    captions,
    cards_html,
    download,
    find,
    unique_names,
)

from ..conftest import TAU, random_image


def uploaded(folder, name, seed):
    """An image on the server, and its name."""
    path = folder / f"upload{seed}"
    Image.fromarray(random_image(seed)).save(path, "PNG")
    return path, name


@pytest.fixture
def findings(predictor, tmp_path):
    return [
        find(predictor, *uploaded(tmp_path, name, seed))
        for seed, name in enumerate(("a.png", "a.jpg", "c.png"))
    ]


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_files_are_those_of_the_other_tool(predictor, findings, tmp_path):
    """The same images in a folder, by tools/predict.py."""
    for seed, finding in enumerate(findings):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(random_image(seed)).save(tmp_path / "in" / finding.name, "PNG")
    out = tmp_path / "out"
    predict_files(predictor, [tmp_path / "in"], out, save=["masks", "labelme"])
    findings = sorted(findings, key=lambda finding: finding.name)

    name, content = download(findings, "coco", TAU, predictor)
    assert name == "predictions.json"
    ours, theirs = json.loads(content), json.loads((out / name).read_text())
    assert ours == theirs and len(ours["annotations"]) > 3

    name, content = download(findings, "masks", TAU, predictor)
    masks = unzipped(content)
    assert name == "masks.zip"
    assert masks == {path.name: path.read_bytes() for path in (out / "masks").iterdir()}
    assert sorted(masks) == ["a.jpg.png", "a.png.png", "c.png"], "no two of one name"

    documents = unzipped(download(findings, "labelme", TAU, predictor)[1])
    for path in (out / "labelme").iterdir():
        ours, theirs = json.loads(documents.pop(path.name)), json.loads(path.read_text())
        assert ours.pop("imagePath") == theirs.pop("imagePath").split("/")[-1]
        assert ours == theirs
    assert not documents


def test_another_tau(predictor, findings):
    scores = [a["score"] for a in findings[0].annotations]
    tau = (scores[0] + scores[1]) / 2  # one is left
    name, content = download(findings[:1], "masks", tau, predictor)
    assert name == "a.png", "one file comes as it is"
    with Image.open(io.BytesIO(content)) as mask:
        first = mask_util.decode(findings[0].annotations[0]["segmentation"])
        assert (np.asarray(mask) == 255 * first).all() and first.any()
        assert json.loads(mask.text["Comment"])["tau"] == tau
    name, content = download(findings[:1], "labelme", tau, predictor)
    document = json.loads(content)
    assert name == "a.json" and document["predicted_by"]["tau"] == tau
    assert {shape["group_id"] for shape in document["shapes"]} <= {None, 1}
    coco = json.loads(download(findings[:1], "coco", tau, predictor)[1])
    assert len(coco["annotations"]) == len(scores) and coco["info"]["tau"] == tau
    assert captions(findings[:1], predictor, tau)[0]["shown"] == 1
    assert captions(findings[:1], predictor, 1.01)[0]["shown"] == 0
    assert f"highest score {scores[0]:.3f}" in captions(findings[:1], predictor, 1.01)[0]["html"]


def test_the_upload_is_gone_once_it_was_read(predictor, tmp_path):
    good = uploaded(tmp_path, "good.png", 0)
    assert find(predictor, *good).error is None
    bad = tmp_path / "bad"
    bad.write_bytes(b"no image")
    assert "is no readable image (of no known format" in find(predictor, bad, "b.jpg").error
    thin = tmp_path / "thin"
    Image.new("RGB", (3000, 1)).save(thin, "PNG")
    assert "too thin" in find(predictor, thin, "thin.png").error
    assert not list(tmp_path.iterdir())


def test_no_identifier_of_a_patient_is_shown_or_written(predictor, tmp_path):
    still = write_dicom(tmp_path / "1", random_image(0))
    burned = write_dicom(tmp_path / "2", random_image(1), BurnedInAnnotation="YES")
    frames = write_dicom(tmp_path / "3", np.stack([random_image(2), random_image(3)]))
    findings = [
        find(predictor, still, "Musterfrau_Erika.dcm"),
        find(predictor, burned, "scan.dcm"),
        find(predictor, frames, "KIS-4711.dcm"),
    ]
    assert findings[1].jpeg is None and findings[1].annotations
    assert "holds 2 or more frames" in findings[2].error
    made = [cards_html(findings, predictor, TAU).encode()]
    for kind in DOWNLOADS:
        name, content = download(findings, kind, TAU, predictor)
        made += [name.encode(), content]
        if content.startswith(b"PK"):
            made += [part for item in unzipped(content).items() for part in item]
    made = [part.encode() if isinstance(part, str) else part for part in made]
    for value in PATIENT.values():
        for word in value.split("^"):
            assert not [part for part in made if word.lower().encode() in part.lower()], word

    files = unzipped(download(findings, "labelme", TAU, predictor)[1])
    (document,) = (json.loads(content) for name, content in files.items() if "json" in name)
    with Image.open(io.BytesIO(files[document["imagePath"]])) as frame:
        assert (np.asarray(frame) == random_image(0)).all()
    assert len(files) == 2, "of the one that shows the patient's name nothing is written"
    with pytest.raises(ValueError, match="no image to write"):
        download(findings[1:], "labelme", TAU, predictor)


def test_names():
    names = ["a.jpg", "C:\\x\\a.jpg", "/etc/a.jpg", "a (2).jpg", "../..", "", "\0", "é.png"]
    unique = unique_names(names)
    assert unique[:3] == ["a.jpg", "a (2).jpg", "a (3).jpg"]
    assert len(set(unique)) == len(names)
    assert not any(set(name) & set("/\\\0") or name in ("", ".", "..") for name in unique)
    assert unique[-1] == "é.png"


def test_names_are_text(predictor, tmp_path):
    name = "<img src=x onerror=alert(1)>.png"
    finding = find(predictor, *uploaded(tmp_path, name, 0))
    bad = tmp_path / "bad"
    bad.write_bytes(b"")
    html = cards_html([finding, find(predictor, bad, name)], predictor, TAU)
    assert "<img src=x" not in html and html.count("&lt;img src=x") >= 3


def test_outlines_are_those_of_the_masks(predictor, findings):
    """Filled as a browser does it, but by Pillow."""
    finding = findings[0]
    for annotation, mark in zip(finding.annotations, _marks(finding), strict=True):
        mask = mask_util.decode(annotation["segmentation"]).astype(bool)
        contour = np.zeros_like(mask)
        for line in mark["path"].split("M")[1:]:
            points = np.array([p.split() for p in line.strip("Z").split("L")], int)
            assert mask[points[:, 1], points[:, 0]].all() or len(mark["path"].split("M")) > 2
            contour[points[:, 1], points[:, 0]] = True
        assert (contour & mask).sum() and 0 <= mark["left"] <= 100 and 0 <= mark["top"] <= 100
        ys, xs = np.nonzero(contour)
        my, mx = np.nonzero(mask)
        box = (xs.min(), xs.max(), ys.min(), ys.max())
        assert box == (mx.min(), mx.max(), my.min(), my.max())
