"""The ids that ground truth and results each gave on their own, paired by name."""

from pathlib import PurePosixPath

__all__ = ["with_ids_of"]


def with_ids_of(gt, results):
    """
    Args:
        gt (GroundTruth): whose ids are wanted.
        results (dict): COCO, with ``annotations`` and, where its ids were given independently,
            ``images`` and ``categories``.

    Returns:
        list[dict]: the annotations, with the ground truth's image and category ids. Records are
        paired by ``file_name`` (without folders if need be) and ``name``; ids of records without a
        name, or not listed, stay as they are.

    Raises:
        ValueError: on images and categories that the ground truth lacks, or has several times.
    """
    image_ids = _translation(results.get("images", ()), gt.images, "file_name", "image")
    if any(id_ is None for id_ in image_ids.values()):  # written with or without folders
        image_ids = _translation(
            results["images"], gt.images, "file_name", "image", lambda n: PurePosixPath(n).name
        )
    category_ids = _translation(results.get("categories", ()), gt.categories, "name", "category")
    translated = []
    for annotation in results["annotations"]:
        image, category = annotation["image_id"], annotation["category_id"]
        for what, id_, known in (
            ("image", image, image_ids),
            ("category", category, category_ids),
        ):
            if known.get(id_, id_) is None:
                raise ValueError(
                    f"The results have detections for {what} {id_}, which the ground truth lacks: "
                    f"no {what} record there has its name. Score them on the data they are for."
                )
        translated.append(
            {
                **annotation,
                "image_id": image_ids.get(image, image),
                "category_id": category_ids.get(category, category),
            }
        )
    return translated


def _translation(records, targets, field, what, simplify=lambda name: name):
    """{id in the results: id in the ground truth, or None} for the records that have a name."""
    ids = {}
    for target in targets:
        if field in target:
            ids.setdefault(simplify(target[field]), []).append(target["id"])
    translation = {}
    for record in records:
        if field in record:
            found = ids.get(simplify(record[field]), [None])
            if len(found) > 1:
                raise ValueError(
                    f"The {what} '{record[field]}' of the results could be any of the ground "
                    f"truth's ids {found}: give it the same {field} there and here."
                )
            translation[record["id"]] = found[0]
    return translation
