import pytest

from imrcnn_d2.report.html.tables import differences
from imrcnn_d2.report.runs import load_run


@pytest.fixture(scope="module")
def found(study_runs):
    return differences(list(study_runs.values()))


def test_differences_of_the_recorded_figures(found, study_runs):
    labels = {"AP50_voc, masks (primary)": ("segm", "AP50_voc"), "IoU, lesions": ("lesion", "iou")}
    checked = 0
    for models, figure, difference, interval, *_ in found["rows"]:
        if figure in labels:
            group, key = labels[figure]
            one, two = (study_runs[name].metrics[group][key] for name in models.split(" − "))
            assert difference == f"{one - two:+.1f}".replace("-", "−")
            low, high = (float(v.replace("−", "-")) for v in interval.strip("[]").split(","))
            assert low <= float(difference.replace("−", "-")) <= high
            checked += 1
    assert checked == 6
    assert len(found["rows"]) == 3 * 4
    assert len(found["all_rows"]) > len(found["rows"])
    assert found["note"].startswith("60 paired resamples of patients.")


def test_one_model_has_none(study_runs):
    assert differences([study_runs["MR-CNN"]]) is None


def test_seeds_are_one_model(write_gt, write_run, tmp_path):
    gt = write_gt(tmp_path / "gt.json")
    runs = [load_run(write_run(f"s{seed}", gt, seed=seed)) for seed in (1, 2)]
    assert differences(runs) is None
