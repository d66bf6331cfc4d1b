"""Cross-validation: a prepared data set as one data set a fold, with the same images."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from imrcnn_d2.data.json_files import read_json
from imrcnn_d2.data.output_folder import first_difference, staged, write_json
from imrcnn_d2.data.prepare import KEPT_TOGETHER, fold_settings, write_splits
from imrcnn_d2.data.splits import SPLITS, Item, make_folds

__all__ = ["strata_of", "write_folds"]


def write_folds(prepared: Path, count: int) -> list[Path]:
    """Writes ``<prepared>.folds<count>/fold<i>/<name>/`` beside a prepared data set, once.

    Each is a prepared data set of its own: annotations with the ids of the original, a splits.json
    with ``fold`` and ``folds``, and ``images`` as a relative link to the original's. The folds are
    those of `make_folds` with the seed and the ``split_by`` of the original. What is already there
    stays as it is if it is what would be written.

    Args:
        prepared: folder of the prepared data set; its name is the data set's.
        count: how many folds, at least 2.

    Returns:
        for each fold the folder to use as ``$IMRCNN_DATASETS``.

    Raises:
        FileNotFoundError: no prepared data set.
        FileExistsError: other folds are there, e.g. of an earlier state of the data.
        ValueError: fewer than 2 folds, or so many that one has no image to train, validate or test.
    """
    if not (prepared / "splits.json").is_file():
        raise FileNotFoundError(
            f"{prepared}: no prepared data set is there (no splits.json). Make it with "
            "tools/prepare_dataset.py, or set IMRCNN_DATASETS to the folder that it lies in."
        )
    settings = fold_settings(_read(prepared / "splits.json"))
    parts = [_read(prepared / "annotations" / f"{split}.json") for split in SPLITS]
    images = sorted((i for part in parts for i in part["images"]), key=lambda i: i["file_name"])
    annotations = sorted((a for part in parts for a in part["annotations"]), key=lambda a: a["id"])
    strata = strata_of(annotations)
    unit = KEPT_TOGETHER.get(settings["split_by"])
    items = [Item(i["file_name"], strata.get(i["id"], False), i.get(unit)) for i in images]
    folds = make_folds(items, count, settings["seed"])
    empty = [f"fold {i}'s {s}" for i, fold in enumerate(folds) for s in SPLITS if not fold[s]]
    if empty:
        raise ValueError(
            f"{count} folds of {prepared} ({len(items)} images, kept together by "
            f"{settings['split_by']}) leave nothing for {', '.join(empty)}: take fewer folds"
        )

    out = prepared.with_name(f"{prepared.name}.folds{count}")
    with staged(out) as stage:
        for i, fold in enumerate(folds):
            folder = stage / f"fold{i}" / prepared.name
            folder.mkdir(parents=True)
            (folder / "images").symlink_to(Path("..", "..", "..", prepared.name, "images"))
            write_splits(folder / "splits.json", fold, {**settings, "fold": i, "folds": count})
            for split, names in fold.items():
                wanted = set(names)
                own = [image for image in images if image["file_name"] in wanted]
                ids = {image["id"] for image in own}
                of_fold = [a for a in annotations if a["image_id"] in ids]
                content = {**parts[0], "images": own, "annotations": of_fold}
                write_json(folder / "annotations" / f"{split}.json", content)
            if (prepared / "rejected.csv").is_file():
                shutil.copyfile(prepared / "rejected.csv", folder / "rejected.csv")
        if out.exists():
            difference = first_difference(stage, out)
            if difference is not None:
                raise FileExistsError(
                    f"{out}: holds folds of other data ({difference} would change). Remove it to "
                    f"make the folds of {prepared} as it is now, and all runs on the old ones."
                )
        else:
            os.replace(stage, out)
    return [out / f"fold{i}" for i in range(count)]


def strata_of(annotations: Iterable[Mapping]) -> dict:
    """What splits get their share of, by image id; images without a lesion are left out.

    Of classified images, which have no boxes, it is the class; else that there is a lesion.
    """
    return {
        annotation["image_id"]: True if "bbox" in annotation else annotation["category_id"]
        for annotation in annotations
        if not annotation.get("iscrowd")
    }


def _read(path: Path) -> dict:
    return read_json(path)
