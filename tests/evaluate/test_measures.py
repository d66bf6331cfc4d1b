import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.detection.results import OperatingPoint

POINT = OperatingPoint(0.3, "f1", "validation")


def all_figures(scored):
    """{group: {figure: value}} of results, as DetectionMetrics names them."""
    groups = {**scored.groups(), "froc": scored.froc, "calibration": scored.calibration}
    for group in ("lesion", "image", "patient"):
        if group in scored.tau_val:
            groups[f"tau_val.{group}"] = scored.tau_val[group]
    for scale, strata in scored.by_size.items():
        groups |= {f"by_size.{scale}.{name}": figures for name, figures in strata.items()}
    return groups | {f"by_class.{name}": figures for name, figures in scored.by_class.items()}


def copied(dataset, results, times, patients=None):
    """
    The data set and results with as many copies of each image as ``times`` says, in a row; each
    copy of a patient is a patient.
    """
    images, annotations, found = [], [], []
    for image in dataset["images"]:
        for copy in range(times[image["id"]]):
            # From a thousand on: ids in the order of the images.
            id_ = 1000 * image["id"] + copy
            images.append({**image, "id": id_})
            if patients:
                images[-1]["patient_id"] = f"{image['patient_id']}, {copy}"
            for records, copies in ((dataset["annotations"], annotations), (results, found)):
                own = [r for r in records if r["image_id"] == image["id"]]
                copies += [{**record, "image_id": id_} for record in own]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    return {**dataset, "images": images, "annotations": annotations}, found


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    times=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    num_classes=st.integers(1, 3),
    of_patients=st.booleans(),
)
def test_weights_are_copies_of_patients_or_images(
    random_case, seed, times, num_classes, of_patients
):
    """Every figure under weights is that of a data set which holds the copies."""
    dataset, results = random_case(seed, scores="distinct", num_classes=num_classes)
    ids = [image["id"] for image in dataset["images"]]
    patients = None
    if of_patients:
        patients = [(id_ - 1) // 2 for id_ in ids]
        times = [times[patient] for patient in patients]
        for image, patient in zip(dataset["images"], patients, strict=True):
            image["patient_id"] = patient
    scored = evaluate_lesions(dataset, results, operating_point=POINT)
    metrics = scored.metrics
    assert metrics.unit == ("patient" if of_patients else "image")
    weights = np.array([times[::2] if of_patients else times])
    weighted = metrics(weights, all_coco=True)
    copies = copied(dataset, results, dict(zip(ids, times, strict=True)), patients)
    expected = all_figures(evaluate_lesions(*copies, operating_point=POINT))
    expected["lesion"].pop("selection")
    assert expected.keys() == weighted.keys() or not any(times)
    for group, figures in expected.items():
        own = {name: float(values[0]) for name, values in weighted[group].items()}
        assert own == pytest.approx(figures, nan_ok=True), group


def test_once_is_what_the_results_say(random_case):
    scored = evaluate_lesions(*random_case(3), operating_point=POINT)
    once = scored.metrics.once(all_coco=True)
    for group, figures in all_figures(scored).items():
        figures = {name: value for name, value in figures.items() if name != "selection"}
        assert once[group] == pytest.approx(figures, nan_ok=True)


def test_a_class_that_a_resample_has_no_ground_truth_of_is_left_out(dataset, region):
    """A class is hit in image 1, another missed in image 2."""
    truth = dataset(
        2, [region(1, 0, 0, 10, 10), region(2, 0, 0, 10, 10, category_id=2)], classes=("a", "b")
    )
    results = [
        region(1, 0, 0, 10, 10, score=0.9),
        region(2, 20, 20, 10, 10, category_id=2, score=0.8),
    ]
    metrics = evaluate_lesions(truth, results).metrics
    weighted = metrics(np.array([[1, 1], [2, 0], [0, 2]]), all_coco=True)
    for name in ("AP", "AP50", "AP50_voc", "BEP"):
        assert weighted["segm"][name] == pytest.approx([50, 100, 0])


def test_without_scores_whatever_ranks_is_undefined(random_case, tmp_path):
    """The figures of a folder of masks: those at a threshold are as ever."""
    import pycocotools.mask as mask_util
    from PIL import Image

    dataset, results = random_case(5, num_classes=1)
    for image in dataset["images"]:
        own = [r["segmentation"] for r in results if r["image_id"] == image["id"]]
        union = mask_util.decode(mask_util.merge(own)) if own else np.zeros((40, 50), np.uint8)
        Image.fromarray(255 * union).save(tmp_path / image["file_name"])
    scored = evaluate_lesions(dataset, tmp_path)
    ranked = [scored.image["auroc"], *scored.froc.values()]
    ranked += [*scored.bbox.values(), *scored.segm.values()]
    assert np.isnan(ranked).all()
    assert scored.lesion["TP"] + scored.lesion["FN"] == scored.meta["lesions"]
    assert scored.image["miou"] > 0
    assert scored.curves == []
