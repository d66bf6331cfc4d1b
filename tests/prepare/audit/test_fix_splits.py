"""Splits are mended in a new folder, and only where they must be."""

import json

import pytest
from PIL import Image

from imrcnn_d2.data.prepare.data_set import write_fixed_splits, write_splits
from imrcnn_d2.data.prepare.splits import SPLITS, Item, make_splits, read_splits
from imrcnn_d2.utils.files import BadInputError


@pytest.fixture
def prepared(tmp_path):
    """A prepared data set of 20 images, every other one with a lesion, split 12:3:5 by image."""
    folder = tmp_path / "own"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = [f"{i:02}.png" for i in range(20)]
    for i, name in enumerate(names):
        Image.new("RGB", (20, 10), (10 * i, 0, 0)).save(folder / "images" / name)
    splits = make_splits([Item(name, i % 2) for i, name in enumerate(names)])
    for split, own in splits.items():
        images = [
            {"id": int(n[:2]), "file_name": n, "width": 20, "height": 10, "site": n} for n in own
        ]
        annotations = [
            {"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [0, 0, 5, 5]}
            for i in images
            if i["id"] % 2
        ]
        content = {"images": images, "annotations": annotations, "info": {"a": 1}, "categories": []}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    about = {"seed": 0, "split_by": "image", "fold": 1, "folds": 5}
    write_splits(folder / "splits.json", splits, about)
    return folder


def test_groups_are_brought_together(prepared, tmp_path):
    old = read_splits(prepared / "splits.json")
    before = {path: path.read_bytes() for path in prepared.rglob("*") if path.is_file()}
    crossing = [[old["train"][0], old["test"][0]], [old["train"][1], old["val"][0]]]
    within = old["train"][4:6]
    out = tmp_path / "fixed" / "own"
    moves = write_fixed_splits(prepared, out, [*crossing, within])

    new = read_splits(out / "splits.json")
    split_of = {name: split for split, names in new.items() for name in names}
    for group in (*crossing, within):
        assert len({split_of[name] for name in group}) == 1
    free = {name for group in crossing for name in group}
    for split, names in old.items():
        assert {split_of[name] for name in set(names) - free} <= {split}  # all others stay
        assert abs(len(new[split]) - len(names)) <= 1
    assert {m.name for m in moves} == {n for n in free if n not in old[split_of[n]]}
    for move in moves:
        assert move.name in old[move.source] and move.name in new[move.target]
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path for path in prepared.rglob("*") if path.is_file()) == sorted(before)


def test_the_new_folder_is_a_prepared_data_set(prepared, tmp_path):
    old = read_splits(prepared / "splits.json")
    group, out = [old["train"][0], old["test"][0]], tmp_path / "fixed"
    write_fixed_splits(prepared, out, [group])
    new, images, annotations = read_splits(out / "splits.json"), {}, {}
    for split in SPLITS:
        content = json.loads((out / "annotations" / f"{split}.json").read_text())
        assert [i["file_name"] for i in content["images"]] == new[split]
        assert {a["image_id"] for a in content["annotations"]} == {
            i["id"] for i in content["images"] if i["id"] % 2
        }
        assert content["info"] == {"a": 1}
        images |= {i["file_name"]: i for i in content["images"]}
        annotations |= {a["id"]: a for a in content["annotations"]}
    assert len(images) == 20 and len(annotations) == 10
    assert {name for name, image in images.items() if "group_id" in image} == set(group)
    assert all(image["site"] == name for name, image in images.items())
    for path in (prepared / "images").iterdir():
        assert (out / "images" / path.name).read_bytes() == path.read_bytes()
    settings = json.loads((out / "splits.json").read_text())
    assert settings["split_by"] == "group" and settings["seed"] == 0
    assert not {"fold", "folds"} & set(settings)  # these splits are no fold any more
    assert settings["fixed_from"] == json.loads((prepared / "splits.json").read_text())["sha256"]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_groups_of_before_stay_together(prepared, tmp_path):
    """DuplicateGroup across splits draw their old groups with them, and old numbers do not stay."""
    old = read_splits(prepared / "splits.json")
    a, b, c, d, alone = old["train"][:5]
    numbers = {a: 1, b: 1, c: 2, d: 2, alone: 3}

    def number(content):
        for image in content["images"]:
            if image["file_name"] in numbers:
                image["group_id"] = numbers[image["file_name"]]

    edit(prepared / "annotations" / "train.json", number)
    x, y = old["test"][:2]
    write_fixed_splits(prepared, tmp_path / "fixed", [[a, x], [c, y]])
    found = {}
    for split in SPLITS:
        content = json.loads((tmp_path / "fixed" / "annotations" / f"{split}.json").read_text())
        for image in content["images"]:
            if "group_id" in image:
                found.setdefault(image["group_id"], set()).add((split, image["file_name"]))
    assert sorted(sorted(name for _, name in own) for own in found.values()) == sorted(
        [sorted([a, b, x]), sorted([c, d, y])]
    )
    assert all(len({split for split, _ in own}) == 1 for own in found.values())


def test_nothing_to_mend(prepared, tmp_path):
    old = read_splits(prepared / "splits.json")
    assert write_fixed_splits(prepared, tmp_path / "fixed", [old["train"][:2]]) == []
    assert not (tmp_path / "fixed").exists()


def test_refused(prepared, tmp_path):
    old = read_splits(prepared / "splits.json")
    group = [old["train"][0], old["test"][0]]
    with pytest.raises(FileExistsError, match="choose another folder"):
        write_fixed_splits(prepared, prepared, [group])
    path = prepared / "annotations" / "test.json"
    content = json.loads(path.read_text())
    content["images"].append({"id": 99, "file_name": old["train"][0]})
    path.write_text(json.dumps(content))
    with pytest.raises(BadInputError, match="is in train and test"):
        write_fixed_splits(prepared, tmp_path / "fixed", [group])
    assert not (tmp_path / "fixed").exists()


@pytest.mark.parametrize(
    "key, change, told",
    [
        ("images", "id", "images has the id .* twice"),
        ("annotations", "id", "annotations has the id .* twice"),
        ("annotations", "image_id", "is of image 99, which no split has"),
    ],
)
def test_ids_that_do_not_tell_apart(prepared, tmp_path, key, change, told):
    old = read_splits(prepared / "splits.json")
    train = json.loads((prepared / "annotations" / "train.json").read_text())
    value = 99 if change == "image_id" else train[key][0]["id"]
    edit(
        prepared / "annotations" / "test.json",
        lambda content: content[key][0].update({change: value}),
    )
    with pytest.raises(BadInputError, match=told):
        write_fixed_splits(prepared, tmp_path / "fixed", [[old["train"][0], old["test"][0]]])
    assert not (tmp_path / "fixed").exists()
