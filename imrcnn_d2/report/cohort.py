"""Patients, images and lesions of each split, and what was left out."""

import re
from collections import Counter
from pathlib import PurePath

from imrcnn_d2.data.formats.coco import without_empty_ids
from imrcnn_d2.evaluation.output import read_coco_records, read_split_settings
from imrcnn_d2.report.runs import Run
from imrcnn_d2.report.tables import plural
from imrcnn_d2.utils.files import read_rows

SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}
_OF_ANNOTATION = re.compile(r"^(annotation \S+|an annotation without id): ")


def patients_text(images: list[dict]) -> str:
    """How many patients the records of images name, and of how many images they do."""
    ids = [image["patient_id"] for image in images if image.get("patient_id") is not None]
    if not ids:
        return "patients not known (no patient_id)"
    patients = plural(len(set(ids)), "patient")
    if len(ids) == len(images):
        return patients
    return f"{patients} known, of {len(ids):,} of the {len(images):,} images"


def cohort(run: Run) -> dict:
    """Count what a run's prepared data set holds, as STARD's flow of participants asks: its splits,
    and what was excluded (None where only the test set is there). ``reasons`` are pairs of reason
    and count, ``rejected`` of file and reason; ``settings`` are of the split; ``patients_text`` is
    that of all images, and of each split.

    Raises:
        ValueError: a file of the data set is damaged.
    """
    tested = run.gt_path
    root = tested.parent.parent
    record = root / "splits.json"
    files = [root / "annotations" / f"{name}.json" for name in SPLITS]
    prepared = tested in files and record.is_file()
    missing = [path.name for path in files if not path.is_file()]
    files = [path for path in files if path.is_file()] if prepared else [tested]
    contents = {path: read_coco_records(path) for path in files}
    for content in contents.values():
        content["images"] = [*map(without_empty_ids, content["images"])]
    images = [image for content in contents.values() for image in content["images"]]
    patients = [_patients(content["images"]) for content in contents.values()]
    splits = [
        {"name": SPLITS.get(path.stem, path.stem), "tested": path == tested, **_count(content)}
        for path, content in contents.items()
    ]
    data = {
        "splits": splits,
        "images": len(images),
        "patients": len(_patients(images)) or None,
        "patients_text": patients_text(images),
    }
    if not prepared:
        data |= {"offered": None, "excluded": None, "reasons": [], "rejected": [], "settings": {}}
        note = (
            f"Only these are known: {tested.name} is no split of a prepared data set, so there is "
            "no record of training images, or of what was excluded."
        )
        return {**data, "caption": "The images that were evaluated.", "notes": [note]}
    rejected = _rejected(root / "rejected.csv")
    reasons = [_OF_ANNOTATION.sub("", reason).partition(":")[0] for _, reason in rejected]
    reasons = Counter(reasons).most_common()
    data |= {"offered": data["images"] + len(rejected), "excluded": len(rejected)}
    settings = {k: v for k, v in read_split_settings(record).items() if k not in SPLITS}
    data |= {"reasons": reasons, "rejected": rejected, "settings": settings}
    description = (contents[tested].get("info") or {}).get("description")
    identified = sum(split["identified"] for split in splits)
    caption = _caption(settings, len(images), identified)
    data["caption"] = f"{caption} Annotations: {description}." if description else caption
    notes = []
    if missing:
        data |= {"offered": None, "excluded": None}
        notes.append(
            f"Not counted: {', '.join(missing)} of {root / 'annotations'}, which does not exist."
        )
    if shared := sum(map(len, patients)) - (data["patients"] or 0):
        notes.append(
            f"Patients are in more than one split ({shared} times): metrics may be too good."
        )
    return {**data, "notes": notes}


def is_external(run: Run, settings: dict) -> bool | None:
    """Whether a model was trained on other splits than those with these ``settings``; None where
    that is not recorded.
    """
    hashes = run.record.get("splits_sha256"), settings.get("sha256")
    return None if None in hashes else hashes[0] != hashes[1]


def _count(content):
    lesions = [a for a in content.get("annotations") or () if not a.get("iscrowd")]
    categories = Counter(a["category_id"] for a in lesions)
    names = {c["name"]: categories[c["id"]] for c in content.get("categories") or ()}
    images = content["images"]
    return {
        "images": len(images),
        "lesion_free": len(images) - len({a["image_id"] for a in lesions}),
        "lesions": len(lesions),
        "classes": names,
        "patients": len(_patients(images)) or None,
        "identified": sum(image.get("patient_id") is not None for image in images),
        "patients_text": patients_text(images),
    }


def _patients(images):
    return {i["patient_id"] for i in images if i.get("patient_id") is not None}


def _rejected(path):
    """File name and reason of each; there is no file where nothing was rejected."""
    if not path.is_file():
        return []
    # Of a de-identified data set the list has numbers instead of names.
    rows = read_rows(path, ("reason",))
    return [(PurePath(r.get("file") or r.get("number", "")).name, r["reason"]) for r in rows]


def _caption(settings, images, identified):
    """How the images were split, of which so many have a patient_id."""
    split_by, given = settings.get("split_by"), settings.get("given") or 0
    seed = f", seed {settings.get('seed', 'not recorded')}"
    fold = f"Fold {settings['fold']} of {settings.get('folds', '?')}" if "fold" in settings else ""
    if left_out := settings.get("left_out"):
        caption = f"{fold}{': t' if fold else 'T'}he test images are all of {left_out}"
        caption += f"; the others were split at random{seed}"
    elif fold:
        caption = f"{fold}{seed}"
    elif split_by == "prefix":
        caption = "Split as the file names state"
    elif given >= images:
        caption = "Split as a list of files gave it"
    else:
        ratio = ":".join(str(part) for part in settings.get("ratio") or ())
        caption = f"Split at random{f' {ratio}' if ratio else ''}"
        if "test_per_class" in settings:
            caption += f", {settings['test_per_class']} test images of each class"
        caption += seed
        if given:
            caption += f", but for {given:,} of {images:,} images, which a list of files assigned"
    if "fixed_from" in settings:
        caption += ", then corrected"
    if split_by == "patient":
        known = "" if identified == images else ", where known,"
        return f"{caption}; images of one patient{known} are in one split."
    if split_by == "group":
        return (
            f"{caption}; near-duplicates, and images of one patient where known, are in one split."
        )
    if given >= images:
        return f"{caption}."
    several = ", so that one patient’s images can be in several splits" if identified else ""
    return f"{caption}; image by image{several}."
