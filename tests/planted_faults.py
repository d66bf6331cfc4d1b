"""A data set with faults in it, whose places are known."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from imrcnn_d2.data.masks import annotation_from_mask
from imrcnn_d2.data.prepare.synthetic import render_view

SIZE = 192
CATEGORIES = [{"id": 1, "name": "polyp"}, {"id": 2, "name": "ulcer"}]


def _render(patient):
    """The image of a patient, and the masks of its lesions."""
    return render_view(SIZE, seed=7, patient=patient, view=0)


class Planted:
    """Builds the data set in a folder; holds its faults (kind, names) and the clean images."""

    def __init__(self, folder):
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir(parents=True)
        self.faults, self.clean, self._splits, self._count = [], [], {}, 0

    def add(self, image=None, masks=(), split="train", name=None, **fields):
        """Add an image, a synthetic one where none is given; return its COCO record."""
        self._count += 1
        if image is None:
            image, masks = _render(self._count)
        name = name or f"{self._count:03}.jpg"
        quality = {"quality": 95} if name.endswith("jpg") else {}
        Image.fromarray(image).save(self.images / name, **quality)
        height, width = image.shape[:2]
        record = {"id": self._count, "file_name": name, "width": width, "height": height, **fields}
        content = self._splits.setdefault(split, {"images": [], "annotations": []})
        content["images"].append(record)
        for mask in masks:
            self.annotate(record, split, **annotation_from_mask(mask))
        return record

    def annotate(self, record, split="train", **annotation):
        number = sum(len(part["annotations"]) for part in self._splits.values()) + 1
        fields = {"id": number, "image_id": record["id"], "category_id": 1, "iscrowd": 0}
        self._splits[split]["annotations"].append({**fields, **annotation})

    def fault(self, kind, *records):
        """Note what is wrong with these images."""
        self.faults.append((kind, tuple(record["file_name"] for record in records)))

    def write(self):
        """Write the annotations; return their files by split."""
        files = {split: self.folder / f"{split}.json" for split in self._splits}
        for split, content in self._splits.items():
            files[split].write_text(json.dumps({**content, "categories": CATEGORIES}))
        return files

    def plant_all(self, clean):
        """Plant at least one fault of each kind, among so many images without one."""
        for i in range(clean):
            split = ("train", "val", "test")[i % 3]
            self.clean.append(self.add(split=split, patient_id=f"p{i}")["file_name"])
        self._plant_files()
        self._plant_annotations()
        self._plant_duplicates()
        self._plant_overlays()
        self.fault("class_imbalance")

    def _plant_files(self):
        for kind, spoil in (
            ("missing_file", Path.unlink),
            ("unreadable", lambda path: path.write_bytes(path.read_bytes()[:2000])),
            ("unreadable", lambda path: path.write_text("no image")),
        ):
            record = self.add()
            spoil(self.images / record["file_name"])
            self.fault(kind, record)
        record = self.add()
        record["width"], record["height"] = 2 * SIZE, SIZE + 30
        self.fault("wrong_size", record)
        for kind, change in (
            ("colour", lambda i: np.repeat(i.mean(axis=2, keepdims=True), 3, axis=2)),
            ("colour", lambda i: i[..., ::-1]),
            ("colour", lambda i: i * [0.35, 1.4, 0.9]),
            ("black_frame", lambda i: i * 0.04),
            ("blur", lambda i: cv2.GaussianBlur(_cut(i), (0, 0), SIZE / 60)),
            ("blur", lambda i: cv2.filter2D(_cut(i), -1, np.full((15, 15), 1 / 225))),
            ("overexposed", lambda i: i * 6 + 20 * (i > 30)),
            ("text_outside_view", lambda i: _with_text(i, "DOE, JANE", "ID 1234567")),
            ("text_outside_view", lambda i: _with_text(i, "12/03/1950")),
        ):
            image, masks = _render(self._count + 1)
            image = _cut(change(image.astype(np.float32)))
            self.fault(kind, self.add(image, masks if image.shape[1] == SIZE else ()))

    def _plant_annotations(self):
        def polygon(*points):
            return {"segmentation": [[float(v) for point in points for v in point]]}

        middle, far = SIZE / 2, SIZE * 0.7
        a, b, c, d = (middle, middle), (far, middle), (far, far), (middle, far)
        corner = np.zeros((SIZE, SIZE), bool)
        corner[:20, :20] = True
        for kind, annotation in (
            ("malformed", {"segmentation": [[1.0, 2.0, 3.0]]}),
            ("malformed", {**polygon(a, b, c, d), "category_id": 9}),
            ("malformed", {"segmentation": {"size": [5, 5], "counts": [25]}}),
            ("empty", {}),
            ("empty", polygon((900, 900), (950, 900), (950, 950))),
            ("tiny", polygon(a, (middle + 3, middle), (middle, middle + 3))),
            ("outside_view", annotation_from_mask(corner)),
            ("self_crossing", polygon(a, c, b, d)),
        ):
            record = self.add()
            self.annotate(record, **annotation)
            self.fault(kind, record)
        image, masks = _render(10_000)
        record = self.add(image, masks)
        again = cv2.dilate(masks[0].astype(np.uint8), np.ones((3, 3))) > 0
        self.annotate(record, **annotation_from_mask(again))
        self.fault("overlapping", record)

    def _plant_duplicates(self):
        first, second = self.add(), self.add(split="test")
        shutil.copy(self.images / first["file_name"], self.images / second["file_name"])
        self.fault("exact_duplicate", first, second)
        self.fault("contradicting_labels", first, second)  # masks of another image
        first = self.add(name="first.png")
        with Image.open(self.images / "first.png") as image:
            second = self.add(np.asarray(image), split="val", name="second.png")
            image.save(self.images / "second.png", compress_level=0)
        self.fault("exact_duplicate", first, second)
        self.fault("contradicting_labels", first, second)  # without a mask
        for change in (
            lambda image: image.resize((SIZE * 2 // 3, SIZE * 2 // 3)),
            ImageOps.mirror,
            lambda image: image.transpose(Image.Transpose.ROTATE_90),
            _reframed,
        ):
            first = self.add()
            with Image.open(self.images / first["file_name"]) as image:
                second = self.add(np.asarray(change(image)), split="test")
            self.fault("near_duplicate", first, second)
            self.fault("contradicting_labels", first, second)
        views = [self.add(split=split, patient_id="again") for split in ("train", "test", "test")]
        self.fault("patient_across_splits", *views)

    def _plant_overlays(self):
        """A processor's lines in all images of a centre, and a name in one of them."""
        for i in range(6):
            image, masks = _render(20_000 + i)
            lines = ["GASTRO UNIT", "SCOPE 123"]
            record = self.add(_with_text(image, *lines), centre="north")
            if i == 0:
                self.fault("overlay", record)
        image = _with_text(_render(21_000)[0], *lines)
        cv2.putText(image, "DOE, JANE", (4, 150), 0, 0.45, (220, 220, 220), 1)
        self.fault("text_outside_view", self.add(image, centre="north"))


def _cut(image):
    return np.clip(image, 0, 255).astype(np.uint8)


def _with_text(image, *lines):
    """The image with a black margin, and writing in it."""
    canvas = np.pad(_cut(image), ((0, 0), (110, 0), (0, 0)))
    for i, line in enumerate(lines):
        cv2.putText(canvas, line, (4, 40 + 24 * i), 0, 0.45, (220, 220, 220), 1)
    return canvas


def _reframed(image):
    screen = Image.new("RGB", (SIZE * 5 // 4, SIZE), "black")
    screen.paste(image.resize((SIZE * 9 // 10, SIZE * 9 // 10)), (SIZE // 4, SIZE // 20))
    return screen
