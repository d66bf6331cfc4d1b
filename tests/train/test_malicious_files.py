"""Files that would run code when they are loaded, planted wherever a tool of ours loads one."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from detectron2.engine import default_argument_parser

from imrcnn_d2.cli import compare, cross_validate, evaluate, prepare_dataset, report
from imrcnn_d2.cli import train as train_command

YAML = "configs/synthetic/imrcnn_lite.yaml"
LAZY = "configs/lazy/imrcnn_lite.py"


class Bait:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A path that must not exist when a test has ended."""
    path = tmp_path / "the_planted_code_ran"
    yield path
    assert not path.exists()


@pytest.fixture
def plant(tmp_path, marker):
    """Writes a malicious checkpoint of the format that its suffix names; returns its path."""

    def write(name):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"model": {"w": Bait(marker)}, "__author__": "x", "model_state": {}}
        if path.suffix in (".pth", ".pyth"):
            content["model"]["v"] = torch.zeros(1)  # what has no tensors is no checkpoint
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        return str(path)

    return write


@pytest.fixture
def malicious_yaml(tmp_path, marker):
    path = tmp_path / "malicious.yaml"
    path.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{marker}"]\n')
    return path


def test_the_bait_works(plant, marker):
    for name in ("model.pkl", "model.pth"):
        path = plant(name)
        load = torch.load if name.endswith("pth") else lambda f, **_: pickle.load(open(f, "rb"))
        load(path, weights_only=False)
        assert marker.is_dir()
        marker.rmdir()


@pytest.fixture
def train(tiny_opts):
    """Starts train_net.py's main with tiny settings."""

    def start(*arguments, opts=(), config=YAML):
        args = default_argument_parser().parse_args(["--config-file", str(config), *arguments])
        args.opts = [*map(str, tiny_opts), *opts]
        train_command.run(args)

    return start


@pytest.fixture
def train_lazily(tiny_datasets, tmp_path):
    """Starts lazyconfig_train_net.py's main with tiny settings."""

    def start(*arguments, overrides=(), config=LAZY):
        args = default_argument_parser().parse_args(["--config-file", str(config), *arguments])
        args.opts = [
            f"train.output_dir={tmp_path / 'output'}",
            "train.device=cpu",
            "train.max_iter=1",
            "model.backbone.bottom_up.weights=''",
            "dataloader.train.num_workers=0",
            *(f"dataloader.{s}.dataset.names={name}" for s, name in tiny_datasets.items()),
            *(f"dataloader.{s}_evaluator.dataset_name={tiny_datasets[s]}" for s in ("val", "test")),
            *overrides,
        ]
        train_command.run(args)

    return start


REFUSED = {
    "model.pkl": r"posix\.mkdir",
    "model.pth": r"posix\.mkdir",
    "model.pyth": r"posix\.mkdir",
    "model.safetensors": "cannot be read as a safetensors file",
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_to_evaluate(train, plant, name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        train("--eval-only", opts=["MODEL.WEIGHTS", plant(name)])


def test_weights_to_evaluate_of_a_lazy_config(train_lazily, plant):
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        train_lazily("--eval-only", overrides=[f"train.init_checkpoint={plant('model.pth')}"])


@pytest.mark.slow
def test_weights_to_start_from(train, train_lazily, plant):
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        train(opts=["MODEL.WEIGHTS", plant("model.pkl")])
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        train_lazily(overrides=[f"train.init_checkpoint={plant('model.pth')}"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--resume"], ["--resume", "--eval-only"]])
def test_a_checkpoint_to_resume_from(train, train_lazily, plant, tmp_path, arguments):
    plant("output/model_0000001.pth")
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ValueError, match=r"model_0000001.pth.*posix\.mkdir"):
        train(*arguments)
    if "--eval-only" not in arguments:
        with pytest.raises(ValueError, match=r"model_0000001.pth.*posix\.mkdir"):
            train_lazily(*arguments)


def test_a_checkpoint_to_resume_from_that_is_no_zip(train, plant, tmp_path):
    plant("output/model.pkl")
    (tmp_path / "output" / "last_checkpoint").write_text("model.pkl")
    with pytest.raises((RuntimeError, ValueError), match="model.pkl"):
        train("--resume")


@pytest.mark.parametrize("name", ["timm.pth", "timm.safetensors", "timm.pkl"])
def test_weights_of_a_timm_backbone(train, train_lazily, plant, name):
    path = plant(name)
    said = REFUSED[name.replace("timm", "model")]
    with pytest.raises(ValueError, match=said):
        train(opts=["MODEL.TIMM.WEIGHTS", path])
    with pytest.raises(ValueError, match=said):
        train_lazily(overrides=[f"model.backbone.bottom_up.weights={path}"])


def test_a_yaml_config(train, malicious_yaml, tmp_path):
    based_on_it = tmp_path / "based_on_it.yaml"
    based_on_it.write_text(f"_BASE_: {malicious_yaml.name}\n")
    for config in (malicious_yaml, based_on_it):
        with pytest.raises(ValueError, match=rf"(?s){config.name}.*no plain YAML.*os\.mkdir"):
            train(config=config)


def test_values_on_the_command_line(train, marker):
    # Taken as a text, which the config then refuses or uses as one.
    with pytest.raises((ValueError, AssertionError, OSError)):
        train(opts=["SOLVER.MAX_ITER", f"__import__('os').mkdir({str(marker)!r})"])


def test_precomputed_proposals(train, plant):
    proposals = f"('{plant('proposals.pkl')}',)"
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS is True.*pickles"):
        train(opts=["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", proposals])


def test_a_config_of_the_cross_validation(malicious_yaml, tmp_path, monkeypatch, capsys):
    arguments = ["+malicious=malicious", "--config-dir", str(tmp_path), "--cfg", "job"]
    (tmp_path / "malicious").mkdir()
    malicious_yaml.rename(tmp_path / "malicious" / "malicious.yaml")
    monkeypatch.setattr(sys, "argv", ["tools/cross_validate.py", "model=mrcnn_lite", *arguments])
    with pytest.raises(SystemExit) as stop:
        cross_validate.main()
    assert stop.value.code
    assert "python/object/apply:os.mkdir" in capsys.readouterr().err


def test_a_cross_validation_does_not_write_through_links(tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "kvasir_seg").symlink_to(tmp_path / "outside")
    arguments = ["model=mrcnn_lite", "dataset=kvasir_seg", f"output={tmp_path / 'output'}"]
    monkeypatch.setattr(sys, "argv", ["tools/cross_validate.py", *arguments])
    assert "output/kvasir_seg: is a link" in cross_validate.main()
    assert not (tmp_path / "outside").exists()


def coco(folder):
    """A ground truth with one lesion and results that find it."""
    lesion = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 15, 15], "area": 225, "iscrowd": 0}
    lesion["segmentation"] = [[5, 5, 20, 5, 20, 20, 5, 20]]
    gt = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 40}],
        "annotations": [{**lesion, "id": 1}],
        "categories": [{"id": 1, "name": "lesion"}],
    }
    (folder / "gt.json").write_text(json.dumps(gt))
    (folder / "dt.json").write_text(json.dumps([{**lesion, "score": 0.9}]))
    return str(folder / "gt.json"), str(folder / "dt.json")


def test_results_to_score(plant, tmp_path, capsys):
    gt, dt = coco(tmp_path)
    planted = plant("planted.json")
    for arguments in (
        ["--gt", gt, "--dt", planted],
        ["--gt", planted, "--dt", dt],
        ["--gt", gt, "--dt", dt, "--tau-from", planted, dt],
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*arguments, "--output", str(tmp_path / "scores")])
        assert stop.value.code
        assert "planted.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    gt, dt = coco(folder)
    evaluate.main(["--gt", gt, "--dt", dt, "--output", str(folder / "run"), "--resamples", "0"])
    return folder / "run"


@pytest.fixture
def run(scored, tmp_path):
    """A folder that tools/evaluate.py wrote, to put malicious files into."""
    return shutil.copytree(scored, tmp_path / "run")


def test_a_run_folder_with_a_malicious_config(run, malicious_yaml, tmp_path):
    malicious_yaml.rename(run / "config.yaml")
    page = tmp_path / "report.html"
    report.main([str(run), "--output", str(page)])
    assert page.is_file() and "os.mkdir" not in page.read_text()


@pytest.mark.parametrize("tool", [report, compare])
@pytest.mark.parametrize("name", ["metrics.json", "coco_instances_results.json"])
def test_a_run_folder_with_pickles(run, scored, plant, tmp_path, capsys, tool, name):
    plant(f"run/{name}")
    with pytest.raises(SystemExit) as stop:
        tool.main([f"a={run}", f"b={scored}", "--output", str(tmp_path / "out")])
    assert stop.value.code
    assert name in capsys.readouterr().err


def test_images_that_are_pickles(plant, tmp_path, capsys):
    for folder in ("images", "masks"):
        plant(f"data/{folder}/1.jpg")
    with pytest.raises(SystemExit) as stop:
        prepare_dataset.main(
            ["kvasir-seg", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
        )
    assert "1.jpg" in f"{stop.value.code} {capsys.readouterr()}"
