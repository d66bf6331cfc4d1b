"""Who was in: patients, images and lesions of each split, and what was left out."""

from collections import Counter
from pathlib import PurePath

from imrcnn_d2.evaluation.output import read_coco_records, read_split_settings
from imrcnn_d2.report.runs import Run
from imrcnn_d2.utils.files import read_rows

__all__ = ["cohort"]


SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}


def cohort(run: Run) -> dict:
    """
    Count what a run's prepared data set holds, as STARD's flow of participants asks.

    Returns:
        ``splits`` (list of dicts with name, tested, images, lesion_free, lesions, classes
        (how many of each) and patients, None where they are not known), ``images`` and
        ``patients`` (over all splits), ``offered`` and ``excluded`` (images; None where only the
        test set is there), ``reasons`` (list of (reason, count)), ``rejected`` (list of (file,
        reason)), ``settings`` (dict, how the split was made), ``caption`` (str) and ``notes``
        (list[str], what is missing).

    Raises:
        ValueError: a file of the data set is damaged.
    """
    tested = run.gt_path
    root = tested.parent.parent
    record = root / "splits.json"
    prepared = tested.parent.name == "annotations" and record.is_file()
    files = [root / "annotations" / f"{name}.json" for name in SPLITS] if prepared else [tested]
    contents = {path: read_coco_records(path) for path in files}
    splits = [
        {"name": SPLITS.get(path.stem, path.stem), "tested": path == tested, **_count(content)}
        for path, content in contents.items()
    ]
    if not prepared:
        return {
            "splits": splits,
            **{"images": splits[0]["images"], "patients": splits[0]["patients"]},
            **{"offered": None, "excluded": None, "reasons": [], "rejected": [], "settings": {}},
            "caption": "The images that were evaluated.",
            "notes": [
                f"Only these are known: {tested.name} does not lie in a prepared data set, so "
                "there is no record of training images, or of what was excluded."
            ],
        }
    patients = {patient for content in contents.values() for patient in _patients(content)}
    rejected = _rejected(root / "rejected.csv")
    reasons = Counter(reason.partition(":")[0] for _, reason in rejected)
    images = sum(split["images"] for split in splits)
    settings = {k: v for k, v in read_split_settings(record).items() if k not in SPLITS}
    return {
        "splits": splits,
        "images": images,
        "patients": len(patients) or None,
        "offered": images + len(rejected),
        "excluded": len(rejected),
        "reasons": reasons.most_common(),
        "rejected": rejected,
        "settings": settings,
        "caption": _caption(settings, bool(patients), contents[tested]),
        "notes": _overlap_note(contents),
    }


def _count(content):
    lesions = [a for a in content.get("annotations") or () if not a.get("iscrowd")]
    images = content["images"]
    return {
        "images": len(images),
        "lesion_free": len(images) - len({a["image_id"] for a in lesions}),
        "lesions": len(lesions),
        "classes": {
            category["name"]: sum(a["category_id"] == category["id"] for a in lesions)
            for category in content.get("categories") or ()
        },
        "patients": len(_patients(content)) or None,
    }


def _patients(content):
    return {i["patient_id"] for i in content["images"] if i.get("patient_id") is not None}


def _rejected(path):
    """[(file name, reason)]; no file where nothing was rejected."""
    if not path.is_file():
        return []
    # Of a de-identified data set the list has numbers instead of names.
    rows = read_rows(path, ("reason",))
    names = (PurePath(row.get("file") or row.get("number", "")).name for row in rows)
    return [(name, row["reason"]) for name, row in zip(names, rows, strict=True)]


def _caption(settings, patients_known, tested):
    ratio = ":".join(str(part) for part in settings.get("ratio") or ())
    if "fold" in settings:
        caption = f"Fold {settings['fold']} of {settings.get('folds', '?')}"
    elif settings.get("split_by") == "prefix":
        caption = "Split as the file names state"
    else:
        caption = f"Split at random{f' {ratio}' if ratio else ''}"
        if "test_per_class" in settings:
            caption += f", {settings['test_per_class']} test images of each class"
    if settings.get("split_by") != "prefix":
        caption += f", seed {settings.get('seed', 'not recorded')}"
    if settings.get("split_by") == "patient":
        caption += "; images of one patient are in one split."
    elif settings.get("split_by") == "group":
        caption += "; near-duplicates, and images of one patient where known, are in one split."
    else:
        caption += "; image by image" + (
            ", so that one patient’s images can be in several splits." if patients_known else "."
        )
    description = (tested.get("info") or {}).get("description")
    return f"{caption} Annotations: {description}." if description else caption


def _overlap_note(contents):
    """[a note], if patients, where known, are in several splits."""
    by_split = [_patients(content) for content in contents.values()]
    shared = sum(len(patients) for patients in by_split) - len(set().union(*by_split))
    if not shared:
        return []
    return [f"Patients are in more than one split ({shared} times): metrics may be too good."]
