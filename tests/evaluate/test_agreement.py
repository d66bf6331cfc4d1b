"""Annotators who agree or not, and annotations that models contradict."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rectangles import rectangles
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters
from statsmodels.stats.inter_rater import fleiss_kappa as reference_fleiss

from imrcnn_d2.cli import agreement as command
from imrcnn_d2.evaluation import Bootstrap, evaluate_lesions
from imrcnn_d2.evaluation.annotator_agreement import (
    PAIR_METRICS,
    agreement,
    cohen_kappa,
    fleiss_kappa,
    read_annotator,
    read_model,
    write_agreement,
)
from imrcnn_d2.evaluation.label_errors import LabelError, find_label_errors, pool_label_errors
from imrcnn_d2.report.agreement import plot_agreement


def compare(*data, model=None, **options):
    """Agreement of annotators a, b, c ..."""
    annotators = [read_annotator(name, gt) for name, gt in zip("abcdef", data, strict=False)]
    return agreement(annotators, model, **options)


def compare_two(*data, **options):
    return compare(*data, **options).values["a vs b"]


@pytest.fixture
def two(dataset):
    """Four images: a shared lesion of IoU 0.8, one of a; one of b; two of IoU 0.6 and 1; none."""
    a = rectangles("1 0 0 10 10; 1 20 0 10 10; 3 0 0 10 10; 3 20 0 10 10")
    b = rectangles("1 0 0 10 8; 2 0 0 10 10; 3 20 0 10 10; 3 0 0 6 10")
    return dataset(4, a), dataset(4, b)


def test_worked_example(two):
    unions = np.array([80 / 200, 0, 160 / 200])  # the fourth image has no lesion
    expected = {
        "f1": 100 * 6 / 8,  # 3 pairs of 4 and 4 lesions
        "iou": 100 * (0.8 + 0.6 + 1) / 3,
        "dice": 100 * (1.6 / 1.8 + 1.2 / 1.6 + 1) / 3,
        "union_iou": 100 * unions.mean(),
        "union_dice": 100 * (2 * unions / (1 + unions)).mean(),
        "same_call": 75,
        "kappa": cohen_kappa_score([1, 0, 1, 0], [1, 1, 1, 0]),
    }
    assert compare_two(*two) == pytest.approx(expected)
    assert compare_two(*two, iou_threshold=1)["f1"] == 100 * 2 / 8


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_nobody_comes_first(random_case, seed):
    """Metrics are the same the other way round, whatever overlaps what, and 100 with oneself; where
    a has lesions, the overlap of unions is the evaluation's mIoU of b."""
    data, results = random_case(seed)
    other = {**data, "annotations": [{**r, "id": i} for i, r in enumerate(results)]}
    assert compare_two(data, other) == pytest.approx(compare_two(other, data), nan_ok=True)
    data["annotations"] = [a for a in data["annotations"] if not a["iscrowd"]]
    annotated = {a["image_id"] for a in data["annotations"]}
    if not annotated:
        return
    same = compare_two(data, data)
    assert [same[f] for f in ("f1", "iou", "dice", "union_dice")] == pytest.approx([100] * 4)
    results = [r for r in results if r["image_id"] in annotated]
    image = evaluate_lesions(data, [{**r, "score": 1.0} for r in results]).image
    values = compare_two(data, {**data, "annotations": results})
    assert values["union_iou"] == pytest.approx(image["miou"])
    assert values["union_dice"] == pytest.approx(image["mdice"])


def test_as_many_pairs_as_there_can_be(dataset, region):
    """The overlaps are 16/24 and 16/24 of a's first lesion, 12/28 and 4/36 of its second."""
    a = dataset(1, [region(1, 10, 0, 20, 10), region(1, 22, 0, 20, 10)])
    b = dataset(1, [region(1, 14, 0, 20, 10), region(1, 6, 0, 20, 10)])
    values = compare_two(a, b, iou_threshold=12 / 28)
    assert (values["f1"], values["iou"]) == (100, pytest.approx(100 * (16 / 24 + 12 / 28) / 2))
    assert compare_two(a, b)["f1"] == 50
    # Three pairs of IoU 3/17 are more than two that are the same.
    a, b = (dataset(1, [region(1, x + d, 0, 10, 10) for x in (0, 7, 14)]) for d in (0, 7))
    values = compare_two(a, b, iou_threshold=0.1)
    assert (values["f1"], values["iou"]) == (100, pytest.approx(100 * 3 / 17))


def reference_kappa(a, b):
    return cohen_kappa_score(a, b, labels=[False, True])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_cohen_kappa_is_scikit_learns(answers):
    a, b = np.array(answers).T
    kappa = cohen_kappa(sum(a & b), sum(a & ~b), sum(b & ~a), sum(~a & ~b))
    assert kappa == pytest.approx(reference_kappa(a, b), nan_ok=True)


@settings(deadline=None)
@given(st.integers(3, 6), st.data())
def test_fleiss_kappa_is_statsmodels(raters, data):
    row = st.lists(st.booleans(), min_size=raters, max_size=raters)
    answers = np.array(data.draw(st.lists(row, min_size=1, max_size=20)))
    yes = answers.sum(axis=1)
    pairs = (yes * (yes - 1) + (raters - yes) * (raters - yes - 1)) / 2
    kappa = fleiss_kappa(len(answers), yes.sum(), pairs.sum(), raters)
    if 0 < yes.sum() < answers.size:
        assert kappa == pytest.approx(reference_fleiss(aggregate_raters(answers.astype(int))[0]))
    else:
        assert np.isnan(kappa)


def calls(dataset, region, answers):
    """An annotator that sees a lesion in image i where answers[i]."""
    return dataset(len(answers), [region(i, 0, 0, 9, 9) for i, yes in enumerate(answers, 1) if yes])


@pytest.mark.parametrize("raw, tau, number", [(None, 0.7, 1), (0.9, 0.5, 2)])
def test_the_threshold_of_a_model_is_that_of_such_scores(dataset, region, raw, tau, number):
    """0.7 of scores as a network gives them, 0.5 of probabilities, which have a raw score too."""
    fields = {} if raw is None else {"raw_score": raw}
    results = [region(1, 20 * n, 0, 9, 9, score=s) | fields for n, s in enumerate((0.8, 0.6, 0.4))]
    for option, expected in ((None, number), (0.3, 3)):
        model = read_model("net", results, option, read_annotator("a", dataset(1)))
        assert (model.tau, len(model.truth.regions.image)) == (option or tau, expected)


def test_three_annotators_and_a_model(dataset, region):
    rng = np.random.default_rng(0)
    truth = rng.random(40) < 0.6
    answers = [truth ^ (rng.random(40) < 0.2) for _ in range(4)]
    a, b, c, m = (calls(dataset, region, row) for row in answers)
    results = [{**r, "score": 0.5} for r in m["annotations"]] + [region(1, 0, 0, 9, 9, score=0.4)]
    model = read_model("net", results, 0.5, read_annotator("a", a))
    result = compare(a, b, c, model=model, bootstrap=Bootstrap(200))
    values = result.values
    assert result.model == "net" and result.meta["lesions"]["net"] == answers[3].sum()
    assert list(values)[:6] == ["a vs b", "a vs c", "a vs net", "b vs c", "b vs net", "c vs net"]
    for name in PAIR_METRICS:
        among = np.mean([values[p][name] for p in ("a vs b", "a vs c", "b vs c")])
        with_net = np.mean([values[f"{p} vs net"][name] for p in "abc"])
        means = [values[group][name] for group in ("annotators", "model", "difference")]
        assert means == pytest.approx([among, with_net, with_net - among])
    for group, raters in (("annotators", answers[:3]), ("with_model", answers)):
        table = aggregate_raters(np.array(raters).astype(int).T)[0]
        assert values[group]["fleiss_kappa"] == pytest.approx(reference_fleiss(table))
    low, high = result.intervals["difference"]["kappa"]
    assert low < values["difference"]["kappa"] < high


def test_intervals_resample_patients(dataset, region, t_interval):
    answers = np.random.default_rng(1).random((2, 30)) < 0.5
    a, b = (calls(dataset, region, row) for row in answers)
    for image in a["images"]:
        image["patient_id"] = image["id"] // 3
    bootstrap = Bootstrap(300, 2)
    result = compare(a, b, bootstrap=bootstrap)
    assert result.meta["patients"] == 11
    (weights,) = bootstrap.weights(11)
    kappas = []
    for sample in weights:
        images = np.repeat(np.arange(30), sample[np.arange(1, 31) // 3])
        kappas.append(reference_kappa(*answers[:, images]))
    expected = t_interval(reference_kappa(*answers), kappas, 11, -1, 1)
    assert result.intervals["a vs b"]["kappa"] == pytest.approx(expected)


def test_the_plot_states_the_units(two, tmp_path):
    for image in two[0]["images"]:
        image["sequence_id"] = image["id"] % 2
    figure = plot_agreement(compare(*two, bootstrap=Bootstrap(5)), tmp_path / "agreement.png")
    assert "sequences" in figure.get_suptitle()


def test_perfect_agreement_has_exact_intervals_of_shares(dataset, region):
    data = calls(dataset, region, [True] * 6 + [False] * 4)
    intervals = compare(data, data, bootstrap=Bootstrap(50)).intervals["a vs b"]
    low = 0.025 ** (1 / 6)
    assert intervals["f1"] == pytest.approx((100 * 2 * low / (1 + low), 100))
    assert intervals["same_call"] == pytest.approx((100 * 0.025**0.1, 100))
    assert np.isnan(intervals["kappa"]).all()
    nothing = compare_two(dataset(3), dataset(3))
    assert nothing.pop("same_call") == 100 and np.isnan(list(nothing.values())).all()


def test_images_are_matched_by_name(dataset, region, two, tmp_path):
    """Other ids and another order change nothing; images that not all have are reported."""
    a, b = two
    expected = compare_two(a, b)
    size = {"height": 40, "width": 50}
    for record in b["images"]:
        record["id"] = 50 - record["id"]
    for record in b["annotations"]:
        record["image_id"] = 50 - record["image_id"]
    b["images"].append({"id": 1, "file_name": "new.png", **size})
    b["annotations"].append(region(1, 0, 0, 5, 5))
    a["images"].insert(0, {"id": 99, "file_name": "old.png", **size})
    result = compare(a, b, bootstrap=Bootstrap(20))
    assert result.missing == {"new.png": ["a"], "old.png": ["b"]}
    assert result.values["a vs b"] == pytest.approx(expected)
    assert [image["file_name"] for image in result.images] == ["1.png", "2.png", "3.png", "4.png"]
    assert result.annotators[1].truth.regions.image.tolist() == [0, 1, 2, 2]  # as Regions has it
    names = {path.name for path in write_agreement(result, tmp_path)}
    assert names == {"agreement.json", "agreement.csv", "per_image.csv", "missing.csv"}
    missing = (tmp_path / "missing.csv").read_text()
    assert missing == "file_name,missing_in\nnew.png,a\nold.png,b\n"
    document = json.loads((tmp_path / "agreement.json").read_text())
    pair = document["agreement"]["a vs b"]
    assert document["undefined_shares"] == result.undefined_shares != {}
    assert (pair["matched"], pair["only_a"], pair["only_b"], pair["both"]) == (3, 1, 1, 2)
    with open(tmp_path / "agreement.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert [float(row[key]) for key in ("f1_low", "f1_high")] == pair["f1_ci"]
    with open(tmp_path / "per_image.csv", newline="") as file:
        first, second, *_ = csv.DictReader(file)
    columns = ("file_name", "lesions_a", "lesions_b", "matched", "iou")
    assert [first[c] for c in columns] == ["1.png", "2", "1", "1", "80.0"]
    assert [second[c] for c in columns] == ["2.png", "0", "1", "0", ""]


def test_classes_and_crowds(dataset, region):
    """Of several, lesions of one class are compared; single ones need no common name."""
    a = dataset(1, [region(1, 0, 0, 9, 9), region(1, 20, 0, 9, 9, 2)], classes=("x", "y"))
    b = dataset(1, [region(1, 0, 0, 9, 9), region(1, 20, 0, 9, 9, 1)], classes=("y", "x"))
    assert compare_two(a, b)["f1"] == 50  # the second is x to a, y to b
    lone = dataset(1, [region(1, 0, 0, 9, 9)], classes=("z",))
    assert compare(a, lone).notes == ["a has no class z", "b has no class x, y"]
    crowd = region(1, 20, 0, 9, 9, iscrowd=1)
    other = dataset(1, [region(1, 0, 0, 9, 9), crowd], classes=("polyp",))
    result = compare(other, lone)
    assert [result.values["a vs b"][name] for name in ("f1", "union_iou")] == [100, 100]
    assert result.notes == ["a: 1 crowd regions left out"]


def test_a_prediction_file_has_its_images(dataset, region, two, tmp_path):
    """What imrcnn predict writes: images that it did not see are not predicted as lesion-free."""
    results = dataset(4, [region(3, 0, 0, 10, 10, score=0.9)])
    results["images"] = results["images"][2:]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(results))
    for source in (results, path):
        model = read_model("net", source, 0.5, read_annotator("a", two[0]))
        result = compare(two[0], model=model)
        assert list(result.missing) == ["1.png", "2.png"]
        assert result.values["a vs net"]["f1"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["images"].clear() or b["annotations"].clear(), "a: 1.png, b: None"),
        (lambda b: b["images"][1].update(file_name="1.png"), "b: .*'1.png'"),
        (lambda b: b["images"][0].update(height=41), r"1\.png is \(50, 41\).*\(50, 40\) in a"),
        (lambda b: b["annotations"][0].pop("segmentation"), "b: .*mask"),
    ],
)
def test_what_cannot_be_compared(dataset, region, change, message):
    a, b = (dataset(2, [region(2, 0, 0, 9, 9)]) for _ in "ab")
    change(b)
    with pytest.raises(ValueError, match=message):
        compare(a, b)
    alone = read_annotator("a", a)
    for wrong in ([alone], [alone, alone]):
        with pytest.raises(ValueError, match="'a'"):
            agreement(wrong)
    with pytest.raises(ValueError, match="iou_threshold is 0"):
        compare(a, a, iou_threshold=0)


@pytest.fixture
def files(dataset, region, tmp_path):
    """Paths of three annotators of three images, of a model's results, and of the images."""
    for name, images, marked in (("anna", 4, (1, 2)), ("ben", 3, (1, 3)), ("eva", 3, (1, 2, 3))):
        content = dataset(images, [region(i, 0, 0, 10, 10) for i in marked])
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    results = [region(2, 0, 0, 10, 8, score=0.9), region(1, 0, 0, 10, 10, score=0.3)]
    (tmp_path / "dt.json").write_text(json.dumps(results))
    for i in (1, 2, 3):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def run(files, *options, annotators=("anna", "ben", "eva")):
    paths = [files / f"{name}.json" for name in annotators]
    arguments = ["--annotations", *paths, "--output", files / "out", "--resamples", 50, *options]
    command.main([str(argument) for argument in arguments])
    return json.loads((files / "out" / "agreement.json").read_text())


def test_command_with_a_model(files, capsys, real_plots):
    options = ("--dt", files / "dt.json", "--tau", 0.5, "--model-name", "net", "--images", files)
    document = run(files, *options)
    printed = capsys.readouterr().out
    pairs = document["agreement"]
    assert pairs["anna vs ben"]["f1"] == 50
    assert pairs["anna vs net"]["f1"] == pytest.approx(200 / 3)
    assert pairs["anna vs net"]["iou"] == pytest.approx(80)
    assert {"annotators", "model", "difference", "with_model"} <= set(pairs)
    assert document["missing"] == {"4.png": ["ben", "eva"]}  # the results are of Anna's images
    assert document["meta"]["tau"] == 0.5 and document["meta"]["lesions"]["net"] == 1
    assert "4.png: not in ben, eva" in printed and "| anna vs net" in printed
    for name in ("agreement.csv", "per_image.csv", "missing.csv", "agreement.png"):
        assert (files / "out" / name).stat().st_size and name in printed
    with Image.open(files / "out" / "disagreements.png") as image:
        image.load()


def test_command_without_a_model(files, capsys):
    document = run(files, "--iou", 0.9, annotators=("ben", "eva"))
    assert list(document["agreement"]) == ["ben vs eva", "annotators"]
    assert "fleiss" not in capsys.readouterr().out
    assert not (files / "out" / "disagreements.png").exists()
    document = run(files, "--names", "A", "B", annotators=("anna", "ben"))
    assert "A vs B" in document["agreement"]
    for folder in ("one", "two"):
        (files / folder).mkdir()
        (files / folder / "labels.json").write_bytes((files / "ben.json").read_bytes())
    document = run(files, annotators=("one/labels", "two/labels"))
    assert document["meta"]["annotators"] == [f"{files}/one/labels", f"{files}/two/labels"]


def test_errors_end_the_command_without_a_traceback(files, capsys):
    for annotators, options, message in (
        (("anna", "none"), (), "none.json"),
        (("anna", "ben"), ("--names", "A"), "1 --names"),
        (("anna", "dt"), (), "dt.json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(files, *options, annotators=annotators)
        assert stopped.value.code == 1 and message in capsys.readouterr().err
    assert not (files / "out").exists()


BOX = 10, 10, 20, 10  # x, y, width, height
MISSED, FITS, FORGOTTEN = "unmatched_outline", "badly_fitting_outline", "unlabelled_lesion"
# Annotations, detections as (score, box), and the errors as (kind, score, IoU).
CASES = {
    "a perfect hit": ([BOX], [(0.9, BOX)], [(FITS, 0, 1)]),
    "160 of 200 pixels": ([BOX], [(0.9, (10, 10, 16, 10))], [(FITS, 0.9 * 2 * 0.2, 0.8)]),
    "one error in the wrong place": ([BOX], [(0.9, (20, 10, 20, 10))], [(FITS, 0.9, 1 / 3)]),
    "an alarm goes to the annotation that it meets best": (
        [(2, 10, 20, 10), (24, 10, 20, 10)],  # 8 and 10 of 20 columns
        [(0.9, (14, 10, 20, 10))],
        [(MISSED, 1 - 0.9 / 4, 1 / 4), (FITS, 0.9, 1 / 3)],
    ),
    "whichever the file has first": (
        [(24, 10, 20, 10), (2, 10, 20, 10)],
        [(0.9, (14, 10, 20, 10))],
        [(FITS, 0.9, 1 / 3), (MISSED, 1 - 0.9 / 4, 1 / 4)],
    ),
    "nothing near": ([BOX], [], [(MISSED, 1, 0)]),
    "weak detections": ([BOX], [(0.3, BOX), (0.1, (10, 10, 10, 10))], [(MISSED, 0.7, 1)]),
    "a confident detection without an annotation": (
        [BOX],
        [(0.9, BOX), (0.8, (35, 25, 10, 10)), (0.6, (0, 0, 5, 5))],
        [(FITS, 0, 1), (FORGOTTEN, 0.8, 0)],
    ),
    "what lies within an annotation is no forgotten lesion": (
        [(30, 28, 5, 5), BOX],
        [(0.95, BOX), (0.8, (25, 12, 4, 4)), (0.9, (14, 17, 4, 4))],  # three quarters of the last
        [(MISSED, 1, 0), (FITS, 0, 1), (FORGOTTEN, 0, 0), (FORGOTTEN, 0.9 * 0.25, 0)],
    ),
    "a tenth is an overlap": ([BOX], [(0.9, (10, 10, 2, 10))], [(FITS, 0.9, 0.1)]),
    "of equal overlaps the higher score": (
        [BOX],
        [(0.8, (10, 10, 5, 10)), (0.9, (25, 10, 5, 10))],
        [(FITS, 0.9, 0.25), (FORGOTTEN, 0, 0)],
    ),
    "scores above 1": (
        [BOX, (20, 10, 20, 10)],
        [(9, (10, 10, 16, 10)), (9, (0, 0, 5, 5))],
        [(FITS, 0.4, 0.8), (MISSED, 0, 0.2), (FORGOTTEN, 1, 0)],
    ),
}


def errors_of(dataset, region, boxes, detected, crowds=(), iou_type="segm"):
    annotations = [region(1, *box) for box in boxes]
    annotations += [region(1, *box, iscrowd=1) for box in crowds]
    results = [region(1, *box, score=score) for score, box in detected]
    if iou_type == "bbox":
        results = [{k: v for k, v in result.items() if k != "segmentation"} for result in results]
    data = dataset(2, [*annotations, region(2, 0, 0, 50, 40)])  # the lesion of another image
    errors = find_label_errors(evaluate_lesions(data, results, iou_type=iou_type))
    return [error for error in errors if error.image == 0]


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("name", CASES)
def test_errors_of_an_image(dataset, region, name, iou_type):
    boxes, detected, expected = CASES[name]
    errors = errors_of(dataset, region, boxes, detected, iou_type=iou_type)
    assert [error.kind for error in errors] == [kind for kind, _, _ in expected]
    values = [(error.score, error.iou) for error in errors]
    assert values == [(pytest.approx(score), pytest.approx(iou)) for _, score, iou in expected]
    for error in errors:
        assert (error.region is None) == (error.kind == FORGOTTEN)
        assert (error.detection is None) == (error.kind == MISSED and not error.iou)


def test_crowds_are_no_errors_and_hide_what_is_in_them(dataset, region):
    assert errors_of(dataset, region, [], [], crowds=[BOX]) == []
    assert errors_of(dataset, region, [], [(0.9, (12, 12, 5, 5))], crowds=[BOX]) == []
    (half,) = errors_of(dataset, region, [], [(0.8, (25, 10, 20, 10))], crowds=[BOX])
    assert half.score == pytest.approx(0.8 * 0.75)


def test_models_are_pooled_by_their_mean():
    def missed(score, region=0):
        return LabelError(MISSED, score, 3, region, None, 0.0)

    def alarm(score, detection):
        return LabelError(FORGOTTEN, score, 4, None, detection, 0.0)

    first = [alarm(0.9, 0), alarm(0.9, 1), missed(0.4), missed(1.0, 1)]
    second = [missed(0.5), missed(0.9, 1)]
    pooled = pool_label_errors([first, second])
    assert [(error.region, pytest.approx(error.score), model) for error, model in pooled] == [
        *((1, 0.95, 0), (0, 0.45, 1), (None, 0.45, 0))
    ]
    assert pooled[2][0].detection == 0
