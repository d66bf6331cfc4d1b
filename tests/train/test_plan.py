"""A plan: a data set and a machine become a config, each value with its reason."""

import json
import math
import re
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from endoscope_frames import draw_frame
from PIL import Image

from imrcnn_d2.cli import plan as plan_command
from imrcnn_d2.cli import train
from imrcnn_d2.engine import Trainer, fingerprint, launch, load_config
from imrcnn_d2.engine.config import load_training_config
from imrcnn_d2.engine.plan import (
    TRAINING_SHARE,
    Facts,
    as_yaml,
    facts_of,
    make_plan,
    plan_record,
)
from imrcnn_d2.engine.run_record import config_sha256

KVASIR = Facts(
    images=600,
    validation_images=150,
    lesions=654,
    lesion_free=0.0,
    classes=["polyp"],
    masks=True,
    centres=0,
    patients=0,
    short_side=352,
    aspect=1.0,
    small_lesion=12.7,
    median_lesion=38.2,
    large_lesion=75.5,
    device="cpu",
    cores=2,
    memory=23.5,
    hours=24.0,
    step_seconds=0.8,
)
EGC = replace(
    KVASIR,
    **{"images": 672, "validation_images": 168, "lesions": 600, "lesion_free": 12.5},
    **{"short_side": 1080, "large_lesion": 60.0, "classes": ["early gastric cancer"]},
    **{"device": "cuda", "cores": 16, "memory": 80.0, "step_seconds": 0.5},
)
DEMO = {
    "weights": "demo",
    "weights_base": "imrcnn_lite.yaml",
    "weights_keys": {"MODEL.CBAM.REDUCTION": 16},
}


def values(facts):
    return {choice.key: choice.value for choice in make_plan(facts)}


def test_kvasir_on_a_laptop_gets_the_recipe_that_was_chosen_on_it():
    plan, recipe = values(KVASIR), load_config("imrcnn_lite.yaml", ["MODEL.DEVICE", "cpu"])
    assert plan["_BASE_"] == "imrcnn_lite.yaml"
    assert plan["INPUT.MIN_SIZE_TEST"] == recipe.INPUT.MIN_SIZE_TEST
    assert tuple(plan["INPUT.MIN_SIZE_TRAIN"]) == recipe.INPUT.MIN_SIZE_TRAIN
    assert plan["MODEL.ANCHOR_GENERATOR.SIZES"] == recipe.MODEL.ANCHOR_GENERATOR.SIZES
    assert plan["SOLVER.IMS_PER_BATCH"] == recipe.SOLVER.IMS_PER_BATCH
    assert plan["SOLVER.BASE_LR"] == recipe.SOLVER.BASE_LR
    assert plan["MODEL.TIMM.FREEZE_AT"] == recipe.MODEL.TIMM.FREEZE_AT
    assert plan["SOLVER.MAX_EPOCHS"] == 50


def test_egc_on_a_gpu_is_seen_at_its_own_size():
    plan = values(EGC)
    assert plan["_BASE_"] == "imrcnn_R_50.yaml"
    assert plan["INPUT.MIN_SIZE_TEST"] == 1024
    assert plan["MODEL.ANCHOR_GENERATOR.SIZES"] == [[32], [64], [128], [256], [512]]
    assert (plan["SOLVER.IMS_PER_BATCH"], plan["SOLVER.BASE_LR"]) == (16, 0.01)
    assert plan["SOLVER.MAX_EPOCHS"] == 50
    # The average is of a part of the 2,100 iterations: at least a hundred, but at most a tenth.
    assert plan["SOLVER.EMA_DECAY"] == pytest.approx(1 - 1 / 100)
    short = values(replace(KVASIR, hours=300 * KVASIR.step_seconds / TRAINING_SHARE / 3600))
    assert (short["SOLVER.MAX_ITER"], short["SOLVER.WARMUP_ITERS"]) == (300, 30)
    assert short["SOLVER.EMA_DECAY"] == pytest.approx(1 - 1 / 30, abs=1e-4)


@pytest.mark.parametrize("batch", [16, 8, 4, 2])
def test_the_rates_are_scaled_with_the_batch(batch):
    """Linear for SGD; the square root for AdamW (docs/scaling.md)."""
    sgd, adamw = EGC, replace(KVASIR, device="cuda", memory=4.0)
    rates = [values(replace(f, largest_batch=batch))["SOLVER.BASE_LR"] for f in (sgd, adamw)]
    assert rates[0] == pytest.approx(0.02 * batch / 16 / 2)
    assert rates[1] == pytest.approx(0.0005 * math.sqrt(batch / 4), rel=0.05)


def test_a_small_gpu_gets_a_smaller_batch_then_the_light_model():
    plans = [values(replace(EGC, memory=memory)) for memory in (80, 16, 8, 4)]
    assert [p["_BASE_"][7:-5] for p in plans] == ["R_50", "R_50", "R_50", "lite"]
    batches = [p["SOLVER.IMS_PER_BATCH"] for p in plans[:3]]
    assert batches == sorted(batches, reverse=True) and batches[0] > batches[2] >= 2


def test_small_lesions_get_more_pixels_or_smaller_anchors():
    tiny = {"small_lesion": 2.5, "large_lesion": 30.0}
    light = values(replace(KVASIR, **tiny, short_side=1080))
    assert light["INPUT.MIN_SIZE_TEST"] * 0.025 >= 16
    low_resolution = values(replace(KVASIR, **tiny))  # whose pixels are not made up
    assert low_resolution["INPUT.MIN_SIZE_TEST"] == 352
    assert low_resolution["MODEL.ANCHOR_GENERATOR.SIZES"][0] == [8]
    assert values(replace(EGC, **tiny | {"small_lesion": 1.5}))["MODEL.ANCHOR_GENERATOR.SIZES"] == [
        [16],
        [32],
        [64],
        [128],
        [256],
    ]


def test_large_lesions_are_not_enlarged_beyond_the_largest_anchor():
    plan = values(replace(EGC, large_lesion=90.0))
    assert 0.9 * plan["INPUT.MIN_SIZE_TEST"] == pytest.approx(512 * math.sqrt(2), rel=0.03)


def test_the_hours_bound_the_schedule():
    """20,000 images: 25 epochs are half a million images; two hours have fewer than one epoch."""
    many = replace(KVASIR, images=20_000, validation_images=2_000)
    assert values(replace(many, hours=200.0))["SOLVER.MAX_EPOCHS"] == 25
    plan = values(replace(many, hours=2.0))
    seconds = plan["SOLVER.MAX_ITER"] * many.step_seconds
    assert plan["SOLVER.MAX_EPOCHS"] == 0
    assert seconds == pytest.approx(TRAINING_SHARE * 2 * 3600, rel=0.01)
    # Validation, at a third of the cost of training, and a test as long fit into the rest.
    evaluations = plan["SOLVER.MAX_ITER"] // plan["TEST.EVAL_PERIOD"] + 1
    rest = (1 - TRAINING_SHARE) * 2 * 3600
    assert evaluations * 2_000 / 3 / 4 * many.step_seconds <= rest
    with pytest.raises(ValueError, match="--hours"):
        make_plan(replace(many, hours=0.02))


def test_few_images_are_seen_more_often():
    hundred, six = (values(replace(KVASIR, images=n, validation_images=n)) for n in (100, 6))
    assert hundred["SOLVER.MAX_EPOCHS"] * 100 == 12_000
    assert six["SOLVER.MAX_EPOCHS"] == 200 and six["SOLVER.IMS_PER_BATCH"] == 2


def test_fine_tuning_keeps_what_the_weights_know():
    plan, anew = values(replace(KVASIR, **DEMO)), values(KVASIR)
    assert (plan["_BASE_"], plan["MODEL.WEIGHTS"]) == ("imrcnn_lite.yaml", "demo")
    assert plan["MODEL.CBAM.REDUCTION"] == 16
    assert "MODEL.ANCHOR_GENERATOR.SIZES" not in plan
    assert plan["SOLVER.MAX_EPOCHS"] < anew["SOLVER.MAX_EPOCHS"]


def test_boxes_without_masks():
    assert values(replace(KVASIR, masks=False))["MODEL.MASK_ON"] is False
    assert "MODEL.MASK_ON" not in values(KVASIR)


@pytest.mark.parametrize(
    "facts", [KVASIR, EGC, replace(KVASIR, **DEMO)], ids=["cpu", "gpu", "demo"]
)
def test_a_plan_is_a_config_with_its_facts(facts, tmp_path):
    choices = make_plan(facts)
    text = as_yaml(facts, choices, "kvasir_seg")
    assert text == as_yaml(facts, make_plan(facts), "kvasir_seg")
    (tmp_path / "plan.yaml").write_text(text)
    cfg = load_config(tmp_path / "plan.yaml", ["MODEL.DEVICE", "cpu"])
    assert facts_of(cfg) == facts
    assert cfg.DATASETS.TRAIN == ("kvasir_seg_train",)
    # A reason on the line of every value.
    values_of = [line for line in text.splitlines() if re.match(r"\s*\w+: ", line)]
    assert len(values_of) >= len(choices)
    assert all(re.search(r"  # \w", line) for line in values_of)
    record = plan_record(cfg)
    assert record["choices"].keys() == {choice.key for choice in choices}
    json.dumps(record)
    # What the user changes is no choice of the plan any more.
    cfg.SOLVER.BASE_LR = 1.0
    assert record["choices"].keys() - plan_record(cfg)["choices"].keys() == {"SOLVER.BASE_LR"}
    # Its facts change nothing that is trained.
    before = config_sha256(cfg)
    cfg.PLAN.step_seconds = 9.0
    assert config_sha256(cfg) == before


def test_facts_of_another_version_are_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text("PLAN: {images: 3, colour: blue}\n")
    with pytest.raises(ValueError, match="PLAN.*colour"):
        facts_of(load_config(tmp_path / "plan.yaml", ["MODEL.DEVICE", "cpu"]))


def write_data(folder, sizes, boxes, classes=("polyp",), **image):
    """A prepared data set's annotations: images of (width, height), each with (w, h) boxes."""
    images, annotations = [], []
    for number, (width, height) in enumerate(sizes, 1):
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width} | image)
        images[-1]["height"] = height
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height)).save(folder / "images" / f"{number}.jpg")
        for w, h in boxes[number - 1]:
            square = [0, 0, w, 0, w, h, 0, h]
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1})
            annotations[-1] |= {"bbox": [0, 0, w, h], "segmentation": [square], "iscrowd": 0}
            annotations[-1] |= {"area": w * h}
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco))
    return str(folder)


def test_the_fingerprint_of_a_data_set(tmp_path):
    boxes = [[(20, 20)], [(10, 40), (80, 20)], [], []]
    sizes = [(200, 100), (100, 200), (100, 100), (400, 200)]
    facts = fingerprint.describe_data(write_data(tmp_path / "set", sizes, boxes, centre="C1"))
    sides = np.sqrt([400, 400, 1600])  # of images whose shorter side is 100
    assert (facts["images"], facts["lesions"], facts["lesion_free"]) == (4, 3, 50.0)
    assert facts["median_lesion"] == np.median(sides)
    assert facts["large_lesion"] == pytest.approx(np.percentile(sides, 95), abs=0.1)
    assert (facts["short_side"], facts["aspect"]) == (100, 2.0)
    assert (facts["centres"], facts["patients"], facts["classes"]) == (1, 0, ["polyp"])


def test_images_are_measured_as_a_network_sees_them(tmp_path):
    """A capture of the whole screen, whose view is a square of 452 pixels next to writing."""
    frame, view, _ = draw_frame("square", height=480, width=640)
    data = write_data(tmp_path / "set", [(640, 480)], [[(90, 90)]])
    Image.fromarray(frame).save(tmp_path / "set" / "images" / "1.jpg")
    facts = fingerprint.describe_data(data)
    side = np.sqrt(view.sum())
    assert facts["short_side"] == pytest.approx(side, abs=5)
    assert facts["aspect"] == pytest.approx(1, abs=0.02)
    assert facts["median_lesion"] == pytest.approx(100 * 90 / side, abs=0.5)


def test_what_cannot_be_planned(tmp_path):
    no_lesions = write_data(tmp_path / "none", [(64, 64)], [[]])
    with pytest.raises(ValueError, match="none.*no lesion"):
        fingerprint.describe_data(no_lesions)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fingerprint.describe_data(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no_such"):
        fingerprint.describe_weights("no_such.pth")


def test_packaged_weights_are_planned_with_their_own_network():
    facts = fingerprint.describe_weights("demo")
    assert facts["weights_base"] == "imrcnn_lite.yaml"
    assert facts["weights_keys"] == {"MODEL.CBAM.REDUCTION": 16}


def test_weights_of_a_timm_backbone_keep_their_colour_order(tmp_path):
    keys = ["MODEL.BACKBONE.NAME", "build_timm_pafpn_backbone", "INPUT.FORMAT", "RGB"]
    cfg = load_config("imrcnn_R_50.yaml", [*keys, "MODEL.DEVICE", "cpu"])
    torch.save({"model": {}, "config": cfg.dump()}, tmp_path / "model.pth")
    facts = fingerprint.describe_weights(str(tmp_path / "model.pth"))
    assert facts["weights_base"] == "imrcnn_R_50.yaml"
    assert facts["weights_keys"]["INPUT.FORMAT"] == "RGB"


def test_the_batch_is_halved_until_a_step_fits_into_a_gpu(tmp_path, monkeypatch):
    """On a made-up card: 10 GiB are free, an image takes 1.5, and 8 of them run out of memory."""
    tried = []

    def measure(function, config_file):
        cfg = load_training_config(config_file, ["MODEL.DEVICE", "cpu"])
        tried.append(cfg.SOLVER.IMS_PER_BATCH)
        if tried[-1] > 7:
            raise MemoryError
        return {"step_seconds": 0.3, "step_memory": 1 + 2.5 * tried[-1]}

    monkeypatch.setattr(fingerprint, "choose_device", lambda: "cuda")
    monkeypatch.setattr(fingerprint.torch.cuda, "mem_get_info", lambda: (10 * 2**30, 24 * 2**30))
    monkeypatch.setattr(fingerprint, "_in_process", measure)
    data = write_data(tmp_path / "set", [(320, 320)] * 200, [[(60, 60)]] * 200)
    facts = fingerprint.plan_training(data, tmp_path / "plan.yaml")
    assert tried[-1] == 2 and tried == sorted(tried, reverse=True)
    assert (facts.memory, facts.largest_batch, facts.step_memory) == (10.0, 2, 6.0)
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert content["_BASE_"] == "imrcnn_R_50.yaml" and content["SOLVER"]["IMS_PER_BATCH"] == 2
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["plan.yaml"]
    with pytest.raises(ValueError, match="--memory"):
        fingerprint.plan_training(data, tmp_path / "plan.yaml", memory=3.0)


@pytest.mark.parametrize(
    "arguments", [["--config-file", "imrcnn_lite.yaml", "--data", "x"], [], ["--data", "none"]]
)
def test_auto_that_cannot_be_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        train.main(["--auto", *arguments])
    assert ("--auto" if arguments != ["--data", "none"] else "none") in str(end.value)


def test_the_plan_command_refuses_what_is_no_time(capsys):
    with pytest.raises(SystemExit):
        plan_command.main(["--data", "x", "--hours", "-1"])
    assert "-1" in capsys.readouterr().err


def test_weights_is_short_for_the_key():
    args = train.argument_parser().parse_args(["--weights", "demo", "SEED", "1"])
    train._choose_weights(args)
    assert args.opts == ["MODEL.WEIGHTS", "demo", "SEED", "1"]
    lazy = ["--config-file", "lazy/imrcnn_lite.py", "--data", "synthetic"]
    for path in ("hf://user/repo", r"C:\new\a.pth", "/Müller (1)/lr=0.1, it's.pth"):
        args = train.argument_parser().parse_args([*lazy, "--weights", path, "train.device=cpu"])
        train._choose_weights(args)
        assert train._lazy_config(args).train.init_checkpoint == path


def test_iterations_for_a_config_of_epochs_are_refused(tiny_opts):
    at = tiny_opts.index("SOLVER.MAX_ITER")
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER.*SOLVER.MAX_EPOCHS 50"):
        load_training_config("imrcnn_R_50.yaml", tiny_opts[:at] + tiny_opts[at:])
    for key in ("SOLVER.MAX_ITER", "SOLVER.MAX_EPOCHS", "SOLVER.BASE_LR"):
        with pytest.raises(ValueError, match=f"{key}.*SOLVER.PHASES"):
            load_training_config("resnet50.yaml", [key, 3.0 if key.endswith("LR") else 3])
    epochs = [*tiny_opts, "SOLVER.MAX_EPOCHS", 3]  # with warm-up and periods
    assert load_training_config("imrcnn_lite.yaml", epochs).SOLVER.MAX_EPOCHS == 3
    at = epochs.index("SOLVER.CHECKPOINT_PERIOD")
    with pytest.raises(ValueError, match="SOLVER.CHECKPOINT_PERIOD in epochs"):
        load_training_config("imrcnn_lite.yaml", epochs[:at] + epochs[at + 2 :])


def test_epochs_are_iterations_before_processes_scale_them(tiny_cfg):
    """A config of two processes, trained by one: half the batch and rate, twice the iterations."""
    solver = tiny_cfg.SOLVER
    solver.MAX_EPOCHS, solver.REFERENCE_WORLD_SIZE, rate = 3, 2, solver.BASE_LR
    solver.WARMUP_ITERS = solver.CHECKPOINT_PERIOD = tiny_cfg.TEST.EVAL_PERIOD = 1
    cfg = Trainer(tiny_cfg).cfg
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (1, rate / 2)
    # 6 images in batches of 2: an epoch has 3 iterations, of single images 6.
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.WARMUP_ITERS) == (18, 6, 6)


def test_the_plan_of_a_job_that_is_running_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "LOCK_TIMEOUT", 0)
    monkeypatch.setattr(fingerprint, "plan_training", planned := Mock())
    folder = str(tmp_path / "run")
    with launch.locked_output(folder), pytest.raises(SystemExit, match=folder):
        train.main(["--auto", "--data", "synthetic", "OUTPUT_DIR", folder])
    assert not planned.called


@pytest.mark.slow
def test_plan_and_train_in_one_go(tmp_path, monkeypatch):
    """On real processes: the trial in its own, and the training in this one."""
    from imrcnn_d2.cli import prepare_dataset

    monkeypatch.chdir(tmp_path)
    data = ["--out", "views", "--ratio", "6:3:3"]
    prepare_dataset.main(["synthetic", "--num-images", "12", "--size", "64", *data])
    short = ["SOLVER.MAX_EPOCHS", "0", "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "2"]
    short += ["MODEL.TIMM.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0", "SOLVER.WARMUP_ITERS", "1"]
    train.main(["--auto", "--data", "views", *short])
    folder = tmp_path / "output" / "views" / "plan"
    record = json.loads((folder / "run.json").read_text())["plan"]
    assert record["facts"]["step_seconds"] > 0 and record["facts"]["step_memory"] > 0.1
    assert "INPUT.MIN_SIZE_TEST" in record["choices"]
    assert "SOLVER.MAX_EPOCHS" not in record["choices"]  # changed on the command line
    assert (folder / "plan.yaml").is_file() and (folder / "model_best.pth").is_file()
