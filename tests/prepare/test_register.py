"""Names in the catalogs, found on disk only when loaded, with what the file says."""

import json
import logging
import os

import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from processes import run_script

from imrcnn_d2.data import catalog as register
from imrcnn_d2.data.formats import read_coco
from imrcnn_d2.data.prepare.data_set import SplitOptions, prepare_dataset
from imrcnn_d2.utils.files import Rejects

NAMES = [
    f"{d}_{s}"
    for d in ("kvasir_seg", "egc", "synthetic", "lesion_free")
    for s in ("train", "val", "test")
]


@pytest.fixture
def prepared(coco_folder, tmp_path, monkeypatch):
    """Returns a function that prepares own data, all in train, as $IMRCNN_DATASETS/`dataset`."""

    def make(dataset, edit=lambda coco: None):
        rejects = Rejects()
        source = read_coco(*coco_folder(edit), rejects)
        out = tmp_path / "sets" / dataset
        prepare_dataset(source, out, SplitOptions(ratio=(1, 0, 0)), rejects)
        monkeypatch.setenv("IMRCNN_DATASETS", str(out.parent))
        return out

    return make


@pytest.fixture
def scratch_name():
    """A data set name that is forgotten after the test."""
    yield "scratch_lesions"
    for catalog in (DatasetCatalog, MetadataCatalog):
        if "scratch_lesions" in catalog:
            catalog.remove("scratch_lesions")


def test_import_registers_and_touches_no_disk(tmp_path):
    script = tmp_path / "names.py"
    script.write_text(
        "import imrcnn_d2\n"
        "from detectron2.data import DatasetCatalog, MetadataCatalog\n"
        f"for name in {NAMES}:\n"
        "    assert name in DatasetCatalog\n"
        "    print(name, MetadataCatalog.get(name).thing_classes, "
        "MetadataCatalog.get(name).evaluator_type)\n"
    )
    run = run_script(script, env={**os.environ, "IMRCNN_DATASETS": str(tmp_path / "none")})
    assert run.returncode == 0, run.stderr
    lesion = "['lesion']"
    classes = {"kvasir": "['polyp']", "egc": "['early gastric cancer']", "synthetic": lesion}
    classes["lesion"] = lesion
    expected = [f"{name} {classes[name.split('_')[0]]} coco" for name in NAMES]
    assert run.stdout.splitlines() == expected
    assert not (tmp_path / "none").exists()


def test_registering_again_changes_nothing():
    before = {name: DatasetCatalog[name] for name in NAMES}
    register._register_prepared()
    assert {name: DatasetCatalog[name] for name in NAMES} == before


def test_loading(prepared):
    def edit(coco):
        coco["images"][0].update(patient_id="p", centre="X", height=40)
        coco["annotations"][0].update(lesion_id="l")

    out = prepared("egc", edit)
    records = DatasetCatalog.get("egc_train")
    assert [r["file_name"] for r in records] == [
        str(out / "images" / f"{i}.png") for i in (1, 2, 3)
    ]
    assert [len(r["annotations"]) for r in records] == [1, 1, 0]  # lesion-free images are kept
    assert (records[0]["patient_id"], records[0]["centre"]) == ("p", "X")
    assert "patient_id" not in records[1]
    assert [r["image_id"] for r in records] == [1, 2, 3]
    assert records[0]["annotations"][0]["lesion_id"] == "l"
    assert records[0]["annotations"][0]["category_id"] == 0
    metadata = MetadataCatalog.get("egc_train")
    assert metadata.json_file == str(out / "annotations" / "train.json")
    assert metadata.image_root == str(out / "images")
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0}
    assert DatasetCatalog.get("egc_train") == records


def test_the_file_decides_the_classes(prepared, caplog):
    def edit(coco):
        coco["categories"] = [{"id": 7, "name": "ulcer"}, {"id": 3, "name": "cancer"}]
        for annotation, category in zip(coco["annotations"], (7, 3), strict=True):
            annotation["category_id"] = category

    prepared("egc", edit)
    metadata = MetadataCatalog.get("egc_train")  # held by others before loading
    with caplog.at_level(logging.WARNING, "imrcnn_d2"):
        records = DatasetCatalog.get("egc_train")
    assert metadata.thing_classes == ["cancer", "ulcer"]
    assert [r["annotations"][0]["category_id"] for r in records[:2]] == [1, 0]
    assert "MODEL.ROI_HEADS.NUM_CLASSES must be 2" in caplog.text


def test_root_is_read_when_loading(prepared, tmp_path, monkeypatch):
    out = prepared("synthetic")
    DatasetCatalog.get("synthetic_train")
    (tmp_path / "elsewhere").mkdir()
    out.rename(tmp_path / "elsewhere" / "synthetic")
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path / "elsewhere"))
    DatasetCatalog.get("synthetic_train")
    root = MetadataCatalog.get("synthetic_train").image_root
    assert root == str(tmp_path / "elsewhere" / "synthetic" / "images")

    monkeypatch.delenv("IMRCNN_DATASETS")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "datasets")
    assert len(DatasetCatalog.get("synthetic_train")) == 3


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("kvasir_seg_val", "tools/prepare_dataset.py kvasir-seg --root DIR --out"),
        ("egc_test", "tools/prepare_dataset.py coco --annotations FILE --images DIR --out"),
        ("synthetic_train", "tools/prepare_dataset.py synthetic --num-images 160 --size 256 --out"),
    ],
)
def test_missing_data_names_path_and_command(tmp_path, monkeypatch, name, command):
    monkeypatch.setenv("IMRCNN_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        DatasetCatalog.get(name)
    dataset, split = name.rsplit("_", 1)
    assert str(error.value).startswith(str(tmp_path / dataset / "annotations" / f"{split}.json"))
    assert command in str(error.value)


def test_own_name(coco_folder, scratch_name):
    json_file, images = coco_folder()
    coco = json.loads(json_file.read_text())
    coco["annotations"][0].update(iscrowd=0, area=200)
    json_file.write_text(json.dumps(coco))
    register.register_lesion_dataset(scratch_name, json_file, images, ["guess"])
    metadata = MetadataCatalog.get(scratch_name)
    assert (metadata.thing_classes, metadata.evaluator_type) == (["guess"], "coco")
    records = DatasetCatalog.get(scratch_name)
    assert metadata.thing_classes == ["early gastric cancer"]
    polygons = records[0]["annotations"][0]["segmentation"]
    assert mask_util.area(mask_util.frPyObjects(polygons, 40, 60)).sum() == 200
    with pytest.raises(AssertionError, match="already registered"):
        register.register_lesion_dataset(scratch_name, json_file, images)


def test_own_name_with_missing_files(coco_folder, tmp_path, scratch_name):
    json_file, _ = coco_folder()
    register.register_lesion_dataset(scratch_name, json_file, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder. Check the path"):
        DatasetCatalog.get(scratch_name)


@pytest.fixture
def three_kinds(coco_folder, scratch_name):
    """Names: ours with two lesions and a lesion-free image, a list alike, a list of one image."""
    json_file, images = coco_folder()
    register.register_lesion_dataset(scratch_name, json_file, images)
    records = list(DatasetCatalog.get(scratch_name))
    others = {"scratch_list": records, "scratch_lesion_free": records[2:]}
    for name, content in others.items():
        DatasetCatalog.register(name, lambda content=content: content)
        MetadataCatalog.get(name).thing_classes = ["early gastric cancer"]
    yield scratch_name, *others
    for name in others:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_data_sets_are_joined_and_filtered(three_kinds):
    ours, theirs, lesion_free = three_kinds
    records = DatasetCatalog.get(ours)
    assert register.load_datasets([ours]) is records
    for names in ([ours, theirs], [theirs, ours]):
        assert list(register.load_datasets(names)) == [*records, *records]
        assert list(register.load_datasets(names, filter_empty=True)) == 2 * records[:2]
    with pytest.raises(ValueError, match=f"{lesion_free} holds no images with lesions"):
        register.load_datasets([ours, lesion_free], filter_empty=True)


def test_data_sets_that_are_joined_have_the_same_classes(three_kinds):
    MetadataCatalog.get("scratch_list").thing_classes.append("ulcer")
    with pytest.raises(ValueError, match="thing_classes"):
        register.load_datasets(three_kinds[:2])


def test_stock_loaders_take_a_registered_data_set(three_kinds):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (three_kinds[0],), (three_kinds[0],)
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 1
    cfg.INPUT.MIN_SIZE_TRAIN = (40,)
    batch = next(iter(build_detection_train_loader(cfg)))
    assert [sample["image"].shape[-2:] for sample in batch] == [(40, 60)] * 2
    evaluated = [
        sample["image_id"] for (sample,) in build_detection_test_loader(cfg, three_kinds[0])
    ]
    assert evaluated == [1, 2, 3]
