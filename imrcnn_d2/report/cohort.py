"""Patients, images and lesions of each split, and what was left out."""

from collections import Counter
from pathlib import PurePath

from imrcnn_d2.evaluation.output import read_coco_records, read_split_settings
from imrcnn_d2.report.runs import Run
from imrcnn_d2.utils.files import read_rows

SPLITS = {"train": "Training", "val": "Validation", "test": "Test"}


def cohort(run: Run) -> dict:
    """Count what a run's prepared data set holds, as STARD's flow of participants asks: its splits,
    and what was excluded (None where only the test set is there). ``reasons`` are pairs of reason
    and count, ``rejected`` of file and reason; ``settings`` are of the split.

    Raises:
        ValueError: a file of the data set is damaged.
    """
    tested = run.gt_path
    root = tested.parent.parent
    record = root / "splits.json"
    prepared = tested.parent.name == "annotations" and record.is_file()
    files = [root / "annotations" / f"{name}.json" for name in SPLITS] if prepared else [tested]
    contents = {path: read_coco_records(path) for path in files}
    patients = [_patients(content) for content in contents.values()]
    splits = [
        {"name": SPLITS.get(path.stem, path.stem), "tested": path == tested, **_count(content)}
        for path, content in contents.items()
    ]
    data = {
        "splits": splits,
        "images": sum(split["images"] for split in splits),
        "patients": len(set().union(*patients)) or None,
    }
    if not prepared:
        data |= {"offered": None, "excluded": None, "reasons": [], "rejected": [], "settings": {}}
        note = (
            f"Only these are known: {tested.name} does not lie in a prepared data set, so there is "
            "no record of training images, or of what was excluded."
        )
        return {**data, "caption": "The images that were evaluated.", "notes": [note]}
    rejected = _rejected(root / "rejected.csv")
    reasons = Counter(reason.partition(":")[0] for _, reason in rejected).most_common()
    data |= {"offered": data["images"] + len(rejected), "excluded": len(rejected)}
    settings = {k: v for k, v in read_split_settings(record).items() if k not in SPLITS}
    data |= {"reasons": reasons, "rejected": rejected, "settings": settings}
    description = (contents[tested].get("info") or {}).get("description")
    caption = _caption(settings, bool(data["patients"]))
    data["caption"] = f"{caption} Annotations: {description}." if description else caption
    shared = sum(map(len, patients)) - (data["patients"] or 0)
    note = f"Patients are in more than one split ({shared} times): metrics may be too good."
    return {**data, "notes": [note] if shared else []}


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
        "patients": len(_patients(content)) or None,
    }


def _patients(content):
    return {i["patient_id"] for i in content["images"] if i.get("patient_id") is not None}


def _rejected(path):
    """File name and reason of each; there is no file where nothing was rejected."""
    if not path.is_file():
        return []
    # Of a de-identified data set the list has numbers instead of names.
    rows = read_rows(path, ("reason",))
    return [(PurePath(r.get("file") or r.get("number", "")).name, r["reason"]) for r in rows]


def _caption(settings, patients_known):
    split_by = settings.get("split_by")
    if "fold" in settings:
        caption = f"Fold {settings['fold']} of {settings.get('folds', '?')}"
    elif split_by == "prefix":
        caption = "Split as the file names state"
    else:
        ratio = ":".join(str(part) for part in settings.get("ratio") or ())
        caption = f"Split at random{f' {ratio}' if ratio else ''}"
        if "test_per_class" in settings:
            caption += f", {settings['test_per_class']} test images of each class"
    if split_by != "prefix":
        caption += f", seed {settings.get('seed', 'not recorded')}"
    if split_by == "patient":
        return f"{caption}; images of one patient are in one split."
    if split_by == "group":
        return (
            f"{caption}; near-duplicates, and images of one patient where known, are in one split."
        )
    several = ", so that one patient’s images can be in several splits" if patients_known else ""
    return f"{caption}; image by image{several}."
