"""Files that would run code when they are loaded, planted wherever a tool of ours loads one."""

import json
import os
import pickle
import shutil
import sys

import pytest
import torch

from imrcnn_d2.cli import compare, cross_validate, evaluate, prepare_dataset, report
from imrcnn_d2.cli import train as train_command

LAZY = "configs/lazy/imrcnn_lite.py"
REFUSED = {
    "model.pkl": r"posix\.mkdir",
    "model.pth": r"posix\.mkdir",
    "model.pyth": r"posix\.mkdir",
    "model.safetensors": r"model\.safetensors cannot be read",
}


class Bait:
    """Creates a folder when it is unpickled."""

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
    pickle.loads(open(plant("model.pkl"), "rb").read())
    marker.rmdir()
    torch.load(plant("model.pth"), weights_only=False)
    marker.rmdir()


@pytest.fixture
def train(tiny_opts, tiny_datasets, tmp_path):
    """Runs the command with tiny settings, of a YAML or a lazy config."""
    lazy_opts = [
        f"train.output_dir={tmp_path / 'output'}",
        "train.device=cpu",
        "train.max_iter=1",
        "model.backbone.bottom_up.weights=''",
        "dataloader.train.num_workers=0",
        *(f"dataloader.{s}.dataset.names={name}" for s, name in tiny_datasets.items()),
        *(f"dataloader.{s}_evaluator.dataset_name={tiny_datasets[s]}" for s in ("val", "test")),
    ]

    def run(*arguments, opts=(), config="configs/imrcnn_lite.yaml"):
        parser = train_command.argument_parser()
        args = parser.parse_args(["--config-file", str(config), *arguments])
        args.opts = [*(lazy_opts if config == LAZY else map(str, tiny_opts)), *opts]
        train_command.run(args)

    return run


@pytest.mark.parametrize("name", REFUSED)
def test_weights_to_evaluate(train, plant, name):
    with pytest.raises(ValueError, match=REFUSED[name]):
        train("--eval-only", opts=["MODEL.WEIGHTS", plant(name)])
    with pytest.raises(ValueError, match=REFUSED[name]):
        train("--eval-only", config=LAZY, opts=[f"train.init_checkpoint={plant(name)}"])


@pytest.mark.slow
def test_weights_to_start_from(train, plant):
    with pytest.raises(ValueError, match=REFUSED["model.pkl"]):
        train(opts=["MODEL.WEIGHTS", plant("model.pkl")])
    with pytest.raises(ValueError, match=REFUSED["model.pth"]):
        train(config=LAZY, opts=[f"train.init_checkpoint={plant('model.pth')}"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--resume"], ["--resume", "--eval-only"]])
def test_a_checkpoint_to_resume_from(train, plant, tmp_path, arguments):
    plant("output/model_0000001.pth")
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(ValueError, match=r"model_0000001.pth.*posix\.mkdir"):
        train(*arguments)
    if "--eval-only" not in arguments:
        with pytest.raises(ValueError, match=r"model_0000001.pth.*posix\.mkdir"):
            train(*arguments, config=LAZY)


def test_a_checkpoint_to_resume_from_that_is_no_zip(train, plant, tmp_path):
    plant("output/model.pkl")
    (tmp_path / "output" / "last_checkpoint").write_text("model.pkl")
    with pytest.raises((RuntimeError, ValueError), match="model.pkl"):
        train("--resume")


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_weights_of_a_timm_backbone(train, plant, suffix):
    path, refused = plant(f"model.{suffix}"), REFUSED[f"model.{suffix}"]
    with pytest.raises(ValueError, match=refused):
        train(opts=["MODEL.TIMM.WEIGHTS", path])
    with pytest.raises(ValueError, match=refused):
        train(config=LAZY, opts=[f"model.backbone.bottom_up.weights={path}"])


def test_configs_and_overrides(train, plant, malicious_yaml, tmp_path, marker):
    based_on_it = tmp_path / "based_on_it.yaml"
    based_on_it.write_text(f"_BASE_: {malicious_yaml.name}\n")
    for config in (malicious_yaml, based_on_it):
        with pytest.raises(ValueError, match=rf"(?s){config.name}.*os\.mkdir"):
            train(config=config)
    # Taken as a text, which the config then refuses or uses as one.
    with pytest.raises((ValueError, AssertionError, OSError)):
        train(opts=["SOLVER.MAX_ITER", f"__import__('os').mkdir({str(marker)!r})"])
    proposals = f"('{plant('proposals.pkl')}',)"
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS"):
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


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A ground truth with one lesion, results that have it, and what evaluate makes of them."""
    folder = tmp_path_factory.mktemp("scored")
    lesion = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 15, 15], "area": 225, "iscrowd": 0}
    lesion["segmentation"] = [[5, 5, 20, 5, 20, 20, 5, 20]]
    gt = {
        "images": [{"id": 1, "file_name": "1.png", "width": 40, "height": 40}],
        "annotations": [{**lesion, "id": 1}],
        "categories": [{"id": 1, "name": "lesion"}],
    }
    gt_file, dt_file = folder / "gt.json", folder / "dt.json"
    gt_file.write_text(json.dumps(gt))
    dt_file.write_text(json.dumps([{**lesion, "score": 0.9}]))
    files = ["--gt", str(gt_file), "--dt", str(dt_file)]
    evaluate.main([*files, "--output", str(folder / "run"), "--resamples", "0"])
    return folder


def test_a_run_folder_with_a_malicious_config(scored, malicious_yaml, tmp_path):
    run, page = shutil.copytree(scored / "run", tmp_path / "run"), tmp_path / "report.html"
    malicious_yaml.rename(run / "config.yaml")
    report.main([str(run), "--output", str(page)])
    assert page.is_file() and "os.mkdir" not in page.read_text()


def test_pickles_as_results_runs_and_images(scored, plant, tmp_path, capsys):
    def refuses(tool, name, *arguments):
        with pytest.raises(SystemExit) as stop:
            tool.main([*map(str, arguments)])
        assert stop.value.code
        assert name in f"{stop.value.code} {capsys.readouterr().err}"

    gt, dt, planted = scored / "gt.json", scored / "dt.json", plant("planted.json")
    out = tmp_path / "out"
    refuses(evaluate, planted, "--gt", gt, "--dt", planted, "--output", out)
    refuses(evaluate, planted, "--gt", planted, "--dt", dt, "--output", out)
    refuses(evaluate, planted, "--gt", gt, "--dt", dt, "--tau-from", planted, dt, "--output", out)
    for name in ("metrics.json", "coco_instances_results.json"):
        run = shutil.copytree(scored / "run", tmp_path / name)
        plant(f"{name}/{name}")
        for tool in (report, compare):
            refuses(tool, name, f"a={run}", f"b={scored / 'run'}", "--output", out)
    for folder in ("images", "masks"):
        plant(f"data/{folder}/1.jpg")
    refuses(prepare_dataset, "1.jpg", "kvasir-seg", "--root", tmp_path / "data", "--out", out)
