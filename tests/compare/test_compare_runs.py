import logging

import pytest

from imrcnn_d2.report.comparison.models import gather, training_images
from imrcnn_d2.report.runs import load_run


@pytest.fixture
def gt(tmp_path, write_gt):
    return write_gt(tmp_path / "data" / "annotations" / "test.json", images=6)


@pytest.fixture
def folds(tmp_path, write_gt):
    """Ground truths of three folds, other images in each."""
    return [
        write_gt(tmp_path / f"fold{i}" / "test.json", images=4, first=1 + 4 * i) for i in range(3)
    ]


def names(groups):
    """{label: names of the runs' folders}."""
    return {label: [run.run_folder.name for run in runs] for label, runs in groups.items()}


def test_seeds_of_a_model_belong_together(gt, write_run):
    runs = [
        load_run(write_run("a", gt, seed=2)),
        load_run(write_run("b", gt, model="MR-CNN")),
        load_run(write_run("c", gt, seed=1)),
    ]
    gathered = gather(runs)
    assert names(gathered.split) == {"IMR-CNN": ["c", "a"], "MR-CNN": ["b"]}
    assert not gathered.folds and not gathered.remarks


def test_backbones_are_told_apart(gt, write_run):
    runs = [
        load_run(write_run("a", gt)),
        load_run(write_run("b", gt, backbone="R-101")),
        load_run(write_run("c", gt, model="MR-CNN")),
    ]
    assert list(gather(runs).split) == ["IMR-CNN R-50", "IMR-CNN R-101", "MR-CNN"]


def test_labels_group_as_they_are_given(gt, write_run):
    paths = [write_run(name, gt, seed=seed) for seed, name in enumerate("abc")]
    runs = [load_run(f"x={paths[0]}"), load_run(f"y={paths[1]}"), load_run(f"x={paths[2]}")]
    assert names(gather(runs).split) == {"x": ["a", "c"], "y": ["b"]}
    old = load_run(write_run("old", gt, run_json=False))
    assert names(gather([old]).split) == {"old": ["old"]}
    with pytest.raises(ValueError, match="'IMR-CNN'"):
        gather([load_run(f"IMR-CNN={paths[0]}"), load_run(paths[1])])


def test_a_seed_given_twice(gt, write_run):
    runs = [load_run(write_run(name, gt, seed=7)) for name in "ab"]
    with pytest.raises(ValueError, match="runs/a and .*runs/b are both IMR-CNN with seed 7"):
        gather(runs)
    old = [load_run(f"x={write_run(name, gt, run_json=False)}") for name in "cd"]
    with pytest.raises(ValueError, match="both x with no known seed"):
        gather(old)


def test_different_test_sets_are_refused_by_name(gt, write_run, write_gt, tmp_path):
    other = write_gt(tmp_path / "other.json", images=9)
    runs = [load_run(write_run("a", gt)), load_run(write_run("b", other, model="MR-CNN"))]
    with pytest.raises(ValueError, match="(?s)runs/a .*test.json.*runs/b .*other.json.*different"):
        gather(runs)


def test_different_settings_are_refused(gt, write_run):
    runs = [load_run(write_run("a", gt)), load_run(write_run("b", gt, model="MR-CNN", tau=0.5))]
    with pytest.raises(ValueError, match="runs/a was evaluated with tau 0.7, .*runs/b with 0.5"):
        gather(runs)


def test_configs_that_differ_are_remarked(gt, write_run, caplog):
    runs = [load_run(write_run(f"{seed}", gt, seed=seed, lr=seed)) for seed in (1, 2)]
    with caplog.at_level(logging.WARNING):
        (remark,) = gather(runs).remarks
    assert "IMR-CNN differ in more than seed and fold: SOLVER.BASE_LR." in remark
    assert remark in caplog.text


def test_folds(folds, write_run):
    runs = [
        load_run(write_run(f"{model}{i}{seed}", path, model=model, seed=seed, fold=(i, 3)))
        for model, seeds in (("IMR-CNN", (0, 1)), ("MR-CNN", (0,)))
        for i, path in reversed(list(enumerate(folds)))
        for seed in seeds
    ]
    gathered = gather(runs)
    assert not gathered.split
    assert [[run.run_folder.name for run in seeds] for seeds in gathered.folds["IMR-CNN"]] == [
        ["IMR-CNN00", "IMR-CNN01"],
        ["IMR-CNN10", "IMR-CNN11"],
        ["IMR-CNN20", "IMR-CNN21"],
    ]
    assert len(gathered.folds["MR-CNN"]) == 3
    assert training_images(runs[0]) == 64


def test_folds_and_one_split_together(folds, gt, write_run):
    runs = [load_run(write_run(f"f{i}", path, fold=(i, 3))) for i, path in enumerate(folds)]
    gathered = gather([*runs, load_run(write_run("one", gt))])
    assert names(gathered.split) == {"IMR-CNN": ["one"]}
    assert len(gathered.folds["IMR-CNN"]) == 3


def test_folds_missing_or_doubled(folds, write_run):
    runs = [load_run(write_run(f"{i}", path, fold=(i, 3))) for i, path in enumerate(folds)]
    with pytest.raises(ValueError, match=r"IMR-CNN lacks fold 1 of 3 \(there are 0, 2\)"):
        gather([runs[0], runs[2]])
    with pytest.raises(ValueError, match="runs/1 and .*runs/again are both IMR-CNN of fold 1 with"):
        gather([*runs, load_run(write_run("again", folds[1], fold=(1, 3)))])
    with pytest.raises(ValueError, match="runs/0 is one of 3 folds, .*runs/of5 one of 5"):
        gather([*runs, load_run(write_run("of5", folds[1], fold=(1, 5), seed=1))])
    twice = load_run(write_run("twice", folds[1], fold=(2, 3)))
    with pytest.raises(ValueError, match="png is tested in fold 1 and again in fold 2"):
        gather([*runs[:2], twice])


def test_models_on_other_folds(folds, write_run):
    def train(model, order):
        return [
            load_run(write_run(f"{model}{i}", folds[at], model=model, fold=(i, len(order))))
            for i, at in enumerate(order)
        ]

    ours = train("IMR-CNN", [0, 1, 2])
    with pytest.raises(ValueError, match="IMR-CNN has 3 folds, MR-CNN has 2"):
        gather([*ours, *train("MR-CNN", [0, 1])])
    with pytest.raises(ValueError, match="different test sets"):
        gather([*ours, *train("IBMR-CNN", [0, 2, 1])])


def test_training_images_of_a_run_without_a_record(gt, write_run, write_gt):
    run = load_run(write_run("old", gt, run_json=False))
    assert training_images(run) is None
    write_gt(gt.with_name("train.json"), images=15)
    assert training_images(run) == 15
