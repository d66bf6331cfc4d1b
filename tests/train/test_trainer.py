"""A training run from its first iteration to its metrics; interrupted, recorded, in folds."""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2.utils.visualizer import Visualizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from imrcnn_d2 import engine
from imrcnn_d2.cli import train
from imrcnn_d2.data.catalog import register_lesion_dataset
from imrcnn_d2.engine import Trainer, hooks, load_config, load_weights, run_record
from imrcnn_d2.engine.checkpoint import Weights
from imrcnn_d2.engine.cross_validation import FoldRun, describe_runs
from imrcnn_d2.engine.hooks import EXIT_INTERRUPTED, SIGNALS, Interruption, interruptible
from imrcnn_d2.engine.run_record import config_sha256, describe_model, git_state

from .conftest import changed, load
from .test_chaos import facts
from .test_checkpoint import flip_a_bit


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


@pytest.fixture
def weights(output):
    """A function: stem of a file -> the state of a model in it."""
    return lambda stem: load(output / f"{stem}.pth")["model"]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def scripted(tiny_cfg, monkeypatch):
    """A function: a trainer whose validations give these scores, and whose test gives 0."""

    def make(*scores, resume=False):
        remaining = list(scores)

        def evaluate(cfg, model, split, weights=None):
            score = remaining.pop(0) if split == "val" else 0.0
            # At the fixed threshold the order is the other one.
            at_tau_val = {"selection": score, "f1": score}
            return {"lesion": {"selection": 100 - score}, "tau_val.lesion": at_tau_val}, {}

        monkeypatch.setattr(Trainer, "evaluate", staticmethod(evaluate))
        trainer = Trainer(tiny_cfg)
        trainer.resume_or_load(resume)
        trainer.remaining = remaining
        return trainer

    return make


def test_what_a_run_leaves(tiny_cfg, tiny_datasets, output, weights, monkeypatch):
    loader = Mock(wraps=Trainer.build_test_loader)
    monkeypatch.setattr(Trainer, "build_test_loader", loader)
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    evaluated = [call.args[1] for call in loader.call_args_list]
    assert set(results) >= {"bbox", "segm", "lesion", "image"}
    assert all(type(v) is float for group in results.values() for v in group.values())
    assert evaluated.count(tiny_datasets["test"]) == 1 and evaluated[-1] == tiny_datasets["test"]
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    test_folder = output / "inference" / tiny_datasets["test"]
    assert (test_folder / "per_image.csv").is_file() and (test_folder / "pr_curve.csv").is_file()
    metrics = read(test_folder / "metrics.json")
    assert metrics["image"]["TN"] + metrics["image"]["FP"] == 1, "image 3 of 5 has no lesion"
    assert not changed(weights("model_best"), trainer.model.state_dict())
    logged = (output / "metrics.json").read_text()
    assert "lesion/selection" in logged and "total_loss" in logged
    events = EventAccumulator(str(output), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"], "no sample predictions for TensorBoard"

    run = read(output / "run.json")
    expected = {"model": "IMR-CNN", "backbone": "tf_efficientnet_lite0", "seed": 0, "fold": None}
    expected |= {"precision": "fp32", "precision_seconds": None}  # too short to choose
    expected |= {"device": "cpu", "iterations": 4, "config_sha256": config_sha256(tiny_cfg)}
    assert run.items() >= (expected | {"splits_sha256": None}).items()
    assert run["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert run["command"].startswith("python ") and sys.argv[-1] in run["command"]
    start, end = (datetime.fromisoformat(run[key]) for key in ("started", "finished"))
    assert 0 < run["hours"] * 3600 <= (end - start).total_seconds() + 1
    counts = {"train": (6, 2, 4), "val": (4, 1, 3), "test": (5, 1, 4)}  # a disc in two of three
    assert list(run["datasets"]) == [tiny_datasets[split] for split in counts]
    for split, expected in counts.items():
        data = run["datasets"][tiny_datasets[split]]
        assert (data["images"], data["lesion_free_images"], data["lesions"]) == expected
        assert data["gt_sha256"] == hashlib.sha256(Path(data["gt"]).read_bytes()).hexdigest()
        assert data["patients"] is data["rejected"] is None


def test_sample_predictions_are_of_the_scores_that_the_threshold_is_of(
    tiny_cfg, tiny_datasets, monkeypatch
):
    """Without a map, the paper's 0.7 of raw scores; with that of the last validation, 0.5."""
    loader, plotted = Trainer.build_test_loader(tiny_cfg, tiny_datasets["val"]), []
    boxes = Boxes(torch.tensor([[1.0, 1, 9, 9]] * 3))
    instances = Instances((96, 96), scores=torch.tensor([0.9, 0.75, 0.6]), pred_boxes=boxes)
    instances.pred_classes = torch.zeros(3, dtype=torch.int64)
    draw = Visualizer.draw_instance_predictions

    def recorded(self, kept):
        plotted.append(kept.scores.tolist())
        return draw(self, kept)

    monkeypatch.setattr(Visualizer, "draw_instance_predictions", recorded)
    output = [{"instances": instances}]
    model = Mock(side_effect=lambda batch: copy.deepcopy(output), training=False)
    hook = hooks.SamplePredictions(model, loader, tiny_datasets["val"], 1, 0.5)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=2, storage=storage)
        hook.after_step()
        assert plotted == [pytest.approx([0.9, 0.75])] * 4
        plotted.clear()
        storage.put_scalars(**{"score_map/slope": 1.0, "score_map/offset": -2.0})
        hook.after_step()
        assert plotted == [pytest.approx([9 / (9 + math.e**2)])] * 4
        plotted.clear()
        storage.iter = 1  # a later one, without a map
        hook.after_step()
        assert plotted == [pytest.approx([0.9, 0.75])] * 4
        sample, (lesion, *_) = next(sample for sample in hook._samples if sample[1])
        box = {key: value for key, value in lesion.items() if key != "segmentation"}
        hook._samples = [(sample, [lesion, box])]  # a mask is not known of all
        hook.after_step()
        assert lesion["segmentation"] and len(plotted) == 5


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        *(((50.0, 40.0), 1), ((40.0, 50.0), 3)),
        pytest.param((25.0, 25.0), 3, marks=pytest.mark.slow),
        pytest.param((math.nan, math.nan), None, marks=pytest.mark.slow),
    ],
)
def test_the_best_weights_are_kept_and_tested(scripted, output, weights, scores, kept):
    output.mkdir()
    (output / "model_best.pth").write_bytes(b"of an earlier run")
    trainer = scripted(*scores)
    trainer.train()
    saved = {i: weights(f"model_000000{i}") for i in (1, 3)}
    assert changed(saved[1], saved[3])
    assert not changed(saved[kept or 3], trainer.model.state_dict()), "other weights were tested"
    if kept:
        assert not changed(weights("model_best"), saved[kept])
    final = load(output / "model_final.pth")
    assert not changed(final["model"], saved[3])
    state = {"best_score": max(scores) if kept else None, "best_iter": kept}
    state["best_metric"] = "tau_val.lesion/selection"
    assert final["trainer"]["hooks"]["BestCheckpointer"] == state


def test_the_best_weights_are_those_of_a_named_metric(scripted, tiny_cfg, output):
    tiny_cfg.TEST.BEST_METRIC = "lesion/selection"
    scripted(50.0, 40.0).train()
    best = load(output / "model_best.pth")
    assert (best["best_score"], best["best_iter"]) == (60.0, 3)


@pytest.mark.slow
def test_a_resume_by_another_metric_chooses_anew(scripted, tiny_cfg, output, caplog):
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.TEST.BEST_METRIC = 4, "lesion/selection"
    scripted(50.0, 40.0).train()
    tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.TEST.BEST_METRIC = 6, "tau_val.lesion/f1"
    scripted(30.0, resume=True).train()
    best = load(output / "model_best.pth")
    assert (best["best_score"], best["best_iter"]) == (30.0, 5), "of another metric"
    assert "lesion/selection" in caplog.text


@pytest.mark.slow
def test_a_resume_keeps_the_best_and_adds_its_hours(scripted, tiny_cfg, output, weights):
    tiny_cfg.SOLVER.MAX_ITER = 2
    scripted(50.0).train()
    first, run = weights("model_best"), read(output / "run.json")
    state = load(output / "model_final.pth")
    record = state["trainer"]["hooks"]["RunRecord"]
    assert record["started"] == run["started"] and 0 < record["hours"] <= run["hours"]
    record.update(started="2000-01-01T00:00:00+00:00", hours=5.0)
    assert state["training_images"]
    state["training_images"] = ["0123456789abcdef" * 5]  # kept, not made again
    torch.save(state, output / "model_final.pth")

    tiny_cfg.SOLVER.MAX_ITER = 4
    trainer = scripted(45.0, resume=True)
    assert trainer.start_iter == 2
    trainer.train()
    assert not changed(weights("model_best"), first), "a worse validation is kept"
    assert not changed(first, trainer.model.state_dict())
    run = read(output / "run.json")
    assert run["started"] == "2000-01-01T00:00:00+00:00"
    assert 5 < run["hours"] < 5.1 and run["iterations"] == 4
    assert load(output / "model_final.pth")["training_images"] == ["0123456789abcdef" * 5]


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [flip_a_bit, os.remove])
@pytest.mark.parametrize("more", [0, 2])
def test_lost_checkpoints(scripted, tiny_cfg, output, weights, caplog, spoil, more):
    scripted(50.0, 40.0).train()
    final = output / "model_final.pth"
    expected = facts(load(final))
    spoil(final)
    scripted(resume=True).train()
    assert facts(load(final)) == expected, "it is written anew"
    spoil(output / "model_best.pth")
    tiny_cfg.SOLVER.MAX_ITER += more
    trainer = scripted(30.0, resume=True)
    trainer.train()
    assert not trainer.remaining, "no validation chose"
    assert "model_best.pth" in caplog.text
    best = load(output / "model_best.pth")
    assert (best["best_score"], best["best_iter"]) == (30.0, 3 + more)
    assert not changed(best["model"], weights("model_final"))
    assert (output / "model_best.pth.damaged").is_file() == (spoil is flip_a_bit)


def test_the_average_of_the_weights_is_tested(scripted, tiny_cfg, output, weights):
    """In bf16 and channels-last, on the CPU."""
    tiny_cfg.SOLVER.EMA_DECAY = 0.5
    tiny_cfg.SOLVER.AMP.PRECISION, tiny_cfg.MODEL.CHANNELS_LAST = "bf16", True
    trainer = scripted(40.0, 50.0)
    start = copy.deepcopy(trainer.model.state_dict())
    stem = trainer.model.backbone.bottom_up.body.conv_stem.weight
    assert stem.is_contiguous(memory_format=torch.channels_last)
    trainer.train()
    final, averaged = load(output / "model_final.pth"), weights("model_best")
    assert all(value.isfinite().all() for value in final["model"].values())
    assert changed(start, final["model"]) == changed(averaged, final["model"]) != set()
    state = final["trainer"]["hooks"]["EMA"]
    assert not changed(averaged, {k: state[f"module.{k}"] for k in averaged})
    assert not (output / "model_ema.pth").exists()


@pytest.mark.parametrize("decay", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_without_validation_the_last_weights_are_tested(tiny_cfg, output, weights, decay):
    name = "model_ema" if decay else "model_final"
    tiny_cfg.SOLVER.EMA_DECAY = decay
    tiny_cfg.DATASETS.VAL = ()
    assert "lesion" in Trainer(tiny_cfg).train()
    assert not (output / "model_best.pth").exists()
    assert bool(changed(weights(name), weights("model_final"))) == (decay > 0)
    (test,) = map(read, output.glob("inference/*/metrics.json"))
    path = str(output / f"{name}.pth")
    assert "tau_val" not in test and test["meta"]["checkpoint"] == path
    loader = DetectionCheckpointer(Trainer.build_model(tiny_cfg))
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    facts = {"iterations": tiny_cfg.SOLVER.MAX_ITER, "crop_to_view": tiny_cfg.INPUT.CROP_TO_VIEW}
    facts["classes"] = ("lesion",)
    assert load_weights(loader, path) == Weights(path, sha256, **facts)
    assert load_weights(loader, "") == Weights(None, None, None)


@pytest.fixture
def changed_set(tiny_datasets, tmp_path):
    """A function: registers the training set "changed" with other lists in its COCO file."""

    def register(**lists):
        DatasetCatalog.get(tiny_datasets["train"])  # its file is known once it was read
        metadata = MetadataCatalog.get(tiny_datasets["train"])
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({**read(Path(metadata.json_file)), **lists}))
        register_lesion_dataset("changed", path, metadata.image_root)
        return ("changed",)

    yield register
    DatasetCatalog.remove("changed")
    MetadataCatalog.remove("changed")


@pytest.mark.parametrize("lists", [{"images": [], "annotations": []}, {"annotations": []}])
def test_without_validation_images_or_annotations_the_remedy_is_named(tiny_cfg, changed_set, lists):
    tiny_cfg.DATASETS.VAL = changed_set(**lists)
    with pytest.raises(ValueError, match=r"changed\.json.*--ratio.*DATASETS\.VAL"):
        Trainer(tiny_cfg)


def test_without_test_images_and_periodic_checkpoints(tiny_cfg, output, changed_set):
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.DATASETS.TEST = changed_set(images=[], annotations=[])
    trainer = Trainer(tiny_cfg)
    assert trainer.train() == {} and trainer.test_results == {}
    assert read(output / "run.json")["finished"]
    assert trainer.final_weights.path == str(output / "model_best.pth")
    names = {path.name for path in output.glob("*.pth")}
    assert names == {"model_best.pth", "model_final.pth"}


def test_without_any_annotation_it_trains_with_a_warning(tiny_cfg, changed_set, caplog):
    tiny_cfg.DATASETS.TRAIN, tiny_cfg.SOLVER.MAX_ITER = changed_set(annotations=[]), 1
    Trainer(tiny_cfg).train()
    assert "changed" in "".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")


def test_a_warm_up_that_takes_all_iterations_is_warned_of(tiny_cfg, caplog):
    tiny_cfg.SOLVER.WARMUP_ITERS = tiny_cfg.SOLVER.MAX_ITER
    Trainer(tiny_cfg)
    assert "SOLVER.WARMUP_ITERS" in caplog.text


def test_a_run_that_breaks_has_no_end(tiny_cfg, output, monkeypatch):
    monkeypatch.setattr(Trainer, "run_step", Mock(side_effect=RuntimeError("out of something")))
    tiny_cfg.SEED = -1
    trainer = Trainer(tiny_cfg)
    with pytest.raises(RuntimeError, match="out of something"):
        trainer.train()
    run = read(output / "run.json")
    assert run["started"] and run["finished"] is None
    assert run["seed"] == trainer._trainer.seed >= 0  # that was chosen for -1
    trainer = Trainer(tiny_cfg)
    trainer._hooks.insert(0, Mock(before_train=Mock(side_effect=ValueError("torn file"))))
    with pytest.raises(ValueError, match="torn file"):
        trainer.train()


def test_classes_in_another_order_are_refused(tiny_classifier_cfg, monkeypatch, caplog):
    """A model knows them by their position alone."""
    names, (val,) = engine.trainer.class_names, tiny_classifier_cfg.DATASETS.VAL
    monkeypatch.setattr(
        engine.trainer, "class_names", lambda name: names(name)[:: -1 if name == val else 1]
    )
    with pytest.raises(ValueError, match=f"{val}.*another order.*--classes"):
        Trainer(tiny_classifier_cfg)
    engine.trainer.check_class_order(val, names(val), ["EGC", "ulcer", "gastritis"], "a.pth")
    assert "a.pth" in caplog.text and "by position" in caplog.text


def test_an_evaluation_needs_weights_of_these_classes(tiny_classifier_opts, monkeypatch):
    command = ["--config-file", "efficientnet_lite0.yaml", "--eval-only"]
    args = train.argument_parser().parse_args([*command, *map(str, tiny_classifier_opts)])
    with pytest.raises(SystemExit, match="--eval-only evaluates weights"):
        train.run(args)
    args.opts += ["MODEL.WEIGHTS", "a.pth"]
    reversed_ = Weights("a.pth", classes=("gastritis", "ulcer", "cancer"))
    monkeypatch.setattr(engine, "load_weights", lambda checkpointer, path: reversed_)
    with pytest.raises(SystemExit, match="a.pth has them in another order"):
        train.run(args)


def test_a_wrong_number_of_classes_is_reported(tiny_cfg, tiny_classifier_cfg):
    tiny_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    tiny_classifier_cfg.MODEL.CLASSIFIER.update(NUM_CLASSES=4, CLASS_WEIGHTS=None)
    with pytest.raises(ValueError, match="ROI_HEADS.NUM_CLASSES is 80; .* 1$"):
        Trainer(tiny_cfg)
    with pytest.raises(ValueError, match="CLASSIFIER.NUM_CLASSES is 4; .* 3$"):
        Trainer(tiny_classifier_cfg)


def interrupted(cfg, iteration, number, moment="before_step", resume=False):
    """The trainer after a signal in an iteration, before its step or after all else in it."""

    def send():
        if trainer.iter == iteration:
            os.kill(os.getpid(), number)

    trainer, hook = Trainer(cfg), HookBase()
    setattr(hook, moment, send)
    trainer.resume_or_load(resume)
    trainer.register_hooks([hook])
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == EXIT_INTERRUPTED == 75
    return trainer


@pytest.fixture
def former():
    """What handles the signals before a test, and has to after it."""

    def end(number, frame):
        raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in SIGNALS}
    yield end
    assert all(signal.getsignal(number) is end for number in SIGNALS)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [SIGNALS[0], pytest.param(SIGNALS[1], marks=pytest.mark.slow)])
def test_it_finishes_the_iteration_saves_and_leaves(tiny_cfg, output, former, number):
    tiny_cfg.SOLVER.CHECKPOINT_PERIOD = tiny_cfg.TEST.EVAL_PERIOD = 1000
    interrupted(tiny_cfg, 1, number)
    last = output / "last_checkpoint"
    assert last.read_text() == "model_0000001.pth"
    resumed = interrupted(tiny_cfg, 3, number, resume=True)  # the last iteration
    assert resumed.start_iter == 2 and last.read_text() == "model_0000003.pth"
    again = Trainer(tiny_cfg)
    again.resume_or_load(resume=True)
    assert "lesion" in again.train()


def test_a_request_after_the_last_iteration_ends_before_the_test(tiny_cfg, output, former):
    tiny_cfg.SOLVER.MAX_ITER = 1
    interrupted(tiny_cfg, 0, signal.SIGTERM, "after_step")
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert not list(output.glob("inference/*_test")), "the test set was evaluated all the same"


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_iterations_a_request_ends_at_once(former, caplog, number):
    with pytest.raises(ValueError, match="of the training"), interruptible():
        raise ValueError("of the training")
    assert signal.getsignal(number) is former, "an error restores the handlers"
    with pytest.raises(SystemExit) as ended, interruptible():
        os.kill(os.getpid(), number)
        pytest.fail("it went on")
    assert ended.value.code == EXIT_INTERRUPTED and "--resume" in caplog.text
    os.kill(os.getpid(), number)  # the same request, while the process ends
    for number in SIGNALS:
        signal.signal(number, former)


def test_a_second_request_ends_the_process_at_once(monkeypatch, former):
    hook = Interruption(checkpointer=None)
    hook.trainer = SimpleNamespace(iter=3, max_iter=9)
    hook.before_train()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)  # the same request, delivered twice
    monkeypatch.setattr(hooks, "SAME_REQUEST", -1.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    hook.after_train()


def test_names_of_models():
    laterals = ["MODEL.PAFPN.ATTENTION_BEFORE", ("top_down",)]
    for config, opts, name, backbone in (
        *(("mrcnn_R_50", [], "MR-CNN", "R-50"), ("ibmrcnn_R_101", [], "IBMR-CNN", "R-101")),
        ("imrcnn_R_50", ["MODEL.MASK_ON", False], "GeneralizedRCNN", "R-50"),
        ("imrcnn_R_50", laterals, "IMR-CNN", "R-50"),
        ("imrcnn_R_50_residual", [], "IMR-CNN (residual)", "R-50"),
    ):
        with torch.device("meta"):  # without memory
            model = build_model(
                load_config(f"configs/{config}.yaml", ["MODEL.DEVICE", "meta", *opts])
            )
        assert describe_model(model) == (name, backbone)
    assert describe_model(torch.nn.Linear(1, 1)) == ("Linear", "NoneType")


def test_the_hash_of_a_config_leaves_out_where_it_runs(tiny_cfg):
    before = config_sha256(tiny_cfg)
    tiny_cfg.OUTPUT_DIR, tiny_cfg.MODEL.DEVICE, tiny_cfg.DATASETS.ROOT = "elsewhere", "cuda", "x"
    assert config_sha256(tiny_cfg) == before and len(before) == 64
    assert tiny_cfg.OUTPUT_DIR == "elsewhere", "the config itself was changed"
    tiny_cfg.SOLVER.BASE_LR *= 2
    assert config_sha256(tiny_cfg) != before


@pytest.mark.parametrize("key, value", [("PAFPN.FORM", "affine"), ("CBAM.GATE", "residual")])
def test_what_version_0_1_had_in_place_of_the_neck_is_not_trained(tiny_opts, key, value):
    cfg = load_config("configs/imrcnn_lite.yaml", [*tiny_opts, f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=f"MODEL.{key} '{value}'.*MODEL.PAFPN.FORM"):
        Trainer(cfg)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_state_of_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *arguments]
        return subprocess.check_output(command, text=True).strip()

    module = tmp_path / "imrcnn_d2" / "engine" / "run_record.py"
    module.parent.mkdir(parents=True)
    module.touch()
    (module.parents[1] / "__init__.py").touch()
    monkeypatch.setattr(run_record, "__file__", str(module))
    assert git_state() is None, "no checkout"
    git("init")
    git("commit", "--allow-empty", "-m", "nothing of the package")
    assert git_state() is None, "a package installed inside another checkout"
    git("add", "imrcnn_d2")
    git("commit", "-m", "package")
    (tmp_path / "untracked").touch()
    assert git_state() == {"revision": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("changed")
    assert git_state()["dirty"]


def test_patients_crowds_and_rejects_of_a_prepared_fold(tmp_path):
    test_json = tmp_path / "annotations" / "test.json"
    test_json.parent.mkdir()
    test_json.write_text("{}")
    (tmp_path / "rejected.csv").write_text('file,reason\na.jpg,"two\nlines"\nb.jpg,torn\n')
    splits = {"sha256": "abc", "fold": 1, "folds": 5, "left_out": "centre=Rome"}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    annotations = [{"iscrowd": 1}], [{"iscrowd": 0}, {}]
    records = [{"patient_id": "p", "annotations": group} for group in annotations]
    records.append({"patient_id": "q"})
    DatasetCatalog.register("fold", lambda: records)
    MetadataCatalog.get("fold").json_file = str(test_json)
    expected = {"gt": str(test_json), "gt_sha256": hashlib.sha256(b"{}").hexdigest(), "images": 3}
    expected |= {"lesion_free_images": 2, "lesions": 2, "patients": 2, "rejected": 2}
    assert run_record._dataset_facts("fold") == expected
    fold = {"splits_sha256": "abc", "fold": {"index": 1, "of": 5}, "left_out": "centre=Rome"}
    assert run_record._split_facts("fold") == fold
    DatasetCatalog.remove("fold")
    MetadataCatalog.remove("fold")


METRICS = {"lesion": {"iou": 80.0, "f1": None}, "image": {}}
METRICS["segm"] = {"AP50_voc": 50.0, "AP": 40.0}
METRICS["meta"] = {"tau": 0.7, "iou_threshold": 0.5, "iou_type": "segm"}


@pytest.fixture
def run(tmp_path):
    """A run that has finished."""
    opts = ("MODEL.DEVICE", "cpu")
    config, data = Path("configs/imrcnn_lite.yaml").resolve(), tmp_path / "datasets"
    run = FoldRun("synthetic", config, 0, 0, 2, tmp_path, data, opts, 1)
    run.metrics_file.parent.mkdir(parents=True)
    run.log.write_text("the log\n")
    opts = [*opts, "DATASETS.ROOT", "synthetic", "SEED", "0", "OUTPUT_DIR", str(run.folder)]
    hashed = config_sha256(load_config(config, opts))
    record = {"config_sha256": hashed, "datasets": {}, "finished": "2026"}
    (run.folder / "run.json").write_text(json.dumps(record))
    run.metrics_file.write_text(json.dumps(METRICS))
    return run


def test_a_run_that_started_from_other_weights_is_finished(run):
    run = replace(run, opts=(*run.opts, "MODEL.WEIGHTS", "demo"))
    command = ["--config-file", str(run.config_file), "--data", "synthetic", *run._overrides()]
    trained = train._config(train.argument_parser().parse_args(command))
    record = {"config_sha256": config_sha256(trained), "datasets": {}, "finished": "2026"}
    (run.folder / "run.json").write_text(json.dumps(record))
    assert run.state() == "finished"


def test_models_of_one_architecture_are_compared_by_their_configs(run, monkeypatch):
    other = replace(run, config_file=run.config_file.with_stem("other"))
    shutil.copytree(run.folder, other.folder)
    monkeypatch.setattr(FoldRun, "state", lambda self: "finished")
    (record := run.folder / "run.json").write_text('{"model": "IMR-CNN", "backbone": "R-50"}')
    (other.folder / "run.json").write_text('{"model": "IBMR-CNN", "backbone": "R-50"}')
    assert f"imrcnn compare {run.folder} {other.folder}" in describe_runs([run, other])[0]
    shutil.copyfile(record, other.folder / "run.json")
    named = f"{run.config_file.stem}={run.folder} other={other.folder}"
    assert f"imrcnn compare {named}" in describe_runs([run, other])[0]


@pytest.mark.parametrize("name", ["metrics.json", "run.json"])
def test_damaged_files_of_a_run(run, name):
    text, complete = describe_runs([run])
    assert complete and "50.0" in text and "n/a" in text
    wrong = [{**METRICS, "segm": {"AP50_voc": "x"}, "model": []}, {"datasets": 1, "finished": {}}]
    wrong += [[], 1, None, {"segm": 1, "lesion": 1}]
    for content in ("", *map(json.dumps, wrong)):
        (run.metrics_file if name == "metrics.json" else run.folder / name).write_text(content)
        text, complete = describe_runs([run])
        assert not complete and "broken" in text and str(run.log) in text, content
