#!/usr/bin/env python
"""Write two prepared data sets of one: without a centre, to train on, and with its images alone.

    python examples/demo_weights/leave_out.py datasets/demo_sources C1 datasets/leave_out/C1

Images keep their split; those of the test split take part in neither, so that they stay unseen. The
folders are OUT/others, with train and val, and OUT/CENTRE, all of it test, for imrcnn validate.
"""

import json
import sys
from pathlib import Path

from imrcnn_d2.data.images import link_or_copy
from imrcnn_d2.data.prepare.data_set import write_splits
from imrcnn_d2.utils.files import read_json, staged

SPLITS = ("train", "val")


def write(out: Path, images: Path, contents: dict[str, dict]) -> None:
    """Write a prepared data set of these COCO contents by split, with links to the images."""
    with staged(out) as stage:
        names = {s: [image["file_name"] for image in c["images"]] for s, c in contents.items()}
        write_splits(stage / "splits.json", names, {"split_by": "centre"})
        for split, content in contents.items():
            for name in names[split]:
                target = stage / "images" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy((images / name).resolve(), target)
            path = stage / "annotations" / f"{split}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
        stage.rename(out)


def of(contents: list[dict], centre: str, inside: bool) -> dict:
    """One COCO content of all images of the centre, or of all others."""
    images = [i for c in contents for i in c["images"] if (i["centre"] == centre) == inside]
    ids = {image["id"] for image in images}
    annotations = [a for c in contents for a in c["annotations"] if a["image_id"] in ids]
    if not images:
        sys.exit(f"{centre}: no such centre, or the only one")
    return {**contents[0], "images": images, "annotations": annotations}


def main(sources: Path, centre: str, out: Path) -> None:
    contents = {s: read_json(sources / "annotations" / f"{s}.json") for s in SPLITS}
    others = {split: of([content], centre, False) for split, content in contents.items()}
    others["test"] = {**others["val"], "images": [], "annotations": []}
    out.mkdir(parents=True)
    write(out / "others", sources / "images", others)
    only = {**dict.fromkeys(SPLITS, others["test"]), "test": of([*contents.values()], centre, True)}
    write(out / centre, sources / "images", only)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
