#!/usr/bin/env python
"""Write two prepared data sets of one: without a centre, to train on, and with its images alone.

    python examples/demo_weights/leave_out.py datasets/demo_sources C1 datasets/leave_out/C1

Images keep their split; those of the test split take part in neither, so that they stay unseen. The
folders are OUT/others, with train and val, and OUT/CENTRE, all of it test, for imrcnn validate.
"""

import sys
from pathlib import Path

from imrcnn_d2.data.images import link_or_copy
from imrcnn_d2.data.prepare.data_set import write_split_files
from imrcnn_d2.utils.files import read_json, staged


def main(sources: Path, centre: str, out: Path) -> None:
    contents = {s: read_json(sources / "annotations" / f"{s}.json") for s in ("train", "val")}
    images = [(split, image) for split, coco in contents.items() for image in coco["images"]]
    annotations = [a for coco in contents.values() for a in coco["annotations"]]
    with staged(out) as stage:
        for name, is_left_out in (("others", False), (centre, True)):
            chosen = [(s, i) for s, i in images if (i["centre"] == centre) == is_left_out]
            if not chosen:
                sys.exit(f"{centre}: no such centre, or the only one")
            splits = {"train": [], "val": [], "test": []}
            for split, image in chosen:
                splits["test" if is_left_out else split].append(image["file_name"])
            ids = {image["id"] for _, image in chosen}
            coco = {**contents["train"], "images": [image for _, image in chosen]}
            coco["annotations"] = [a for a in annotations if a["image_id"] in ids]
            folder = stage / name
            for _, image in chosen:
                target = folder / "images" / image["file_name"]
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(sources / "images" / image["file_name"], target)
            write_split_files(folder, splits, {"split_by": "centre"}, coco)
        stage.rename(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
