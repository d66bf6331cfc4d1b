"""How plots are saved; matrices, metrics by group, and images with contours, by hand."""

import json

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from rectangles import rectangle

from imrcnn_d2.data.catalog import register_classification_dataset
from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.engine import load_config
from imrcnn_d2.evaluation import Bootstrap, ClassificationEvaluator, evaluate_lesions
from imrcnn_d2.evaluation.detection.counts import ConfusionMatrix
from imrcnn_d2.evaluation.detection.inputs import Regions
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.modeling import ImageClassifier
from imrcnn_d2.report import plots
from imrcnn_d2.report.tables import groups_table


def coco(number, annotations=(), size=(40, 50), **fields):
    """A COCO dict of images 1, 2, ...; ``fields`` have a value for each image."""
    images = [
        {"id": i, "file_name": f"{i}.png", "height": size[0], "width": size[1]}
        | {key: values[i - 1] for key, values in fields.items()}
        for i in range(1, number + 1)
    ]
    annotations = [{**annotation, "id": i} for i, annotation in enumerate(annotations, 1)]
    categories = [{"id": 1, "name": "polyp"}]
    return {"images": images, "categories": categories, "annotations": annotations}


def test_figures_are_saved_at_a_bounded_size_with_names_as_they_are(tmp_path):
    """``$`` begins no mathematics, and a name that begins with ``_`` is in the legend."""
    figure = Figure(figsize=(2, 1), layout="constrained")
    axes = figure.add_subplot(title=r"$\foo$")
    axes.plot([0, 1], label=plots.style.legend_label(r"_$\foo$"))
    axes.set_yticks([0, 1], [r"$\foo$", r"$\bar$"])
    assert [text.get_text() for text in axes.legend().get_texts()] == [r" _$\foo$"]
    path = tmp_path / "new" / "a.png"
    for saved, dpi, size in (
        (figure, 100, (200, 100)),
        (Figure(figsize=(400, 2)), 200, (plots.style.MOST_PIXELS, 40)),
    ):
        plots.style.save_figure(saved, path, dpi=dpi)
        with Image.open(path) as image:
            assert (image.format, image.size) == ("PNG", size)
    plots.style.save_figure(figure, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


OF_DETECTOR = ["confusion_matrix", "pr_curve", "froc", "calibration", "thresholds"]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((0.9, 0.4), OF_DETECTOR), ((), OF_DETECTOR), ((None, None), ["confusion_matrix"])],
)
def test_all_plots_of_a_detector(scores, expected, tmp_path):
    box = {"category_id": 1, "bbox": [0, 0, 10, 10]}
    data = coco(2, [{**box, "image_id": i} for i in (1, 2)], centre="AA")
    dt = [{**box, "image_id": 1, "score": score} for score in scores]
    results = evaluate_lesions(data, dt, iou_type="bbox")
    paths = plots.draw_all(results, tmp_path)
    assert [path.stem for path in paths] == expected
    assert all(np.asarray(Image.open(path).convert("L")).std() > 5 for path in paths)
    for i in (1, 2):
        Image.new("RGB", (50, 40)).save(tmp_path / f"{i}.png")
    paths = plots.draw_all(with_groups(results, [By("centre")]), tmp_path, tmp_path)
    assert [path.stem for path in paths] == [*expected, "by_centre", "contact_sheet"]


def test_confusion_matrix(tmp_path):
    counts = np.array([[6, 1, 1], [0, 0, 0], [3, 2, np.nan]])
    matrix = ConfusionMatrix(["cancer", "ulcer", "background"], counts)
    matrices = {"a": matrix, "b": matrix}
    figure = plots.matrices.plot_confusion_matrix(matrices, tmp_path / "matrix.svg")
    axes, other = figure.axes
    assert (axes.get_title(), other.get_title()) == ("a", "b")
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert (cells[0, 0], cells[1, 0]) == ("6\n75.0 %", "1\n12.5 %")  # x is the prediction
    assert (cells[0, 1], cells[0, 2]) == ("0", "3")
    assert (2, 2) not in cells and len(axes.patches) == 1
    assert [tick.get_text() for tick in axes.get_yticklabels()] == matrix.classes
    (shade,) = [child for child in axes.get_children() if isinstance(child, AxesImage)]
    assert shade.get_array()[0].tolist() == [0.75, 0.125, 0.125]
    assert not shade.get_array()[1:].any()


def cells(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_table_and_plot_of_groups(tmp_path):
    """Centre A finds 2 of 3, B its only lesion; one lesion-free image each, a false alarm in B."""
    lesions = [rectangle(i, 0, 0, 10, 10, paris="Is") for i in (1, 2, 3, 5)]
    dt = [rectangle(i, 0, 0, 10, 10, score=0.9) for i in (1, 2, 5, 6)]
    bootstrap = Bootstrap(200)
    whole = evaluate_lesions(coco(6, lesions, centre="AAAABB"), dt, bootstrap=bootstrap)
    grouped = with_groups(whole, [By("centre"), By("paris")], bootstrap=bootstrap)
    rows = cells(groups_table(grouped, "centre"))
    assert rows[""] == ["all", "A", "B"]
    assert rows["images"] == ["6", "4", "2"] and rows["lesions"] == ["4", "3", "1"]
    assert [cell.split()[0] for cell in rows["lesion recall"]] == ["75.00", "66.67", "100.00"]
    assert [cell.split()[0] for cell in rows["image specificity"]] == ["50.00", "100.00", "0.00"]
    low, high = grouped.by_group["centre"].groups["A"].intervals["lesion"]["recall"]
    assert rows["lesion recall"][1] == f"66.67 [{low:.2f}, {high:.2f}]"
    rows = cells(groups_table(grouped, "paris"))
    assert rows[""] == ["all", "Is"] and "lesion precision" not in rows
    figure = plots.curves.plot_groups(grouped, "centre", tmp_path / "by.png")
    axes = figure.axes[2]
    assert axes.get_title() == "recall (lesions)"
    assert figure.axes[-1].get_title() == "specificity (images)"
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["all\n4 lesions, 6 images", "A\n3 lesions, 4 images", "B\n1 lesion, 2 images"]
    dots = [line for line in axes.lines if line.get_marker() in ("o", "D")]
    points = [(*dot.get_xdata(), *dot.get_ydata()) for dot in dots]
    assert points == [(75, 0), (pytest.approx(200 / 3), 1), (100, 2)]
    assert any(list(line.get_xdata()) == [low, high] for line in axes.lines)


def test_groups_with_unknown_patients_and_undefined_metrics(tmp_path):
    data = coco(3, [rectangle(i, 0, 0, 10, 10) for i in (1, 2, 3)], centre="AAB")
    data["images"][0]["patient_id"] = data["images"][1]["patient_id"] = "p"
    whole = with_groups(evaluate_lesions(data, []), [By("centre")])
    assert cells(groups_table(whole, "centre"))["patients"] == ["", "1", ""]
    figure = plots.curves.plot_groups(whole, "centre", tmp_path / "by.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert "specificity (images)" not in titles and "recall (lesions)" in titles


def test_contours_run_through_the_outermost_pixels():
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[3:9, 5:17] = 1
    mask[5:7, 8:12] = 0  # a hole
    nothing, boxes = np.zeros(1, int), np.array([[5.0, 3, 12, 6]])
    regions = Regions(nothing, nothing, boxes, [mask_util.encode(mask)])
    lines = sorted(plots.images.region_contours(regions, 0), key=len)
    assert all((line[0] == line[-1]).all() for line in lines)
    assert [line.min(axis=0).tolist() for line in lines] == [[7, 4], [5, 3]]
    assert [line.max(axis=0).tolist() for line in lines] == [[12, 7], [16, 8]]
    (line,) = plots.images.region_contours(Regions(nothing, nothing, boxes, None), 0)  # of a box
    assert line.min(axis=0).tolist() == [4.5, 2.5] and line.max(axis=0).tolist() == [16.5, 8.5]


def test_choice_of_images_over_several_models():
    # The sum of errors counts first, then the mean of the overlaps that are defined.
    nan, counts = np.nan, [((0, 90), (0, 80)), ((1, 90), (1, 90)), ((0, np.nan), (0, np.nan))]
    counts += [((2, 90), (0, 50)), ((0, 10), (0, nan))]
    rows = [[{"FP": fp, "FN": 0, "union_iou": iou} for fp, iou in models] for models in counts]
    for most, chosen in ((9, [3, 1, 4, 0, 2]), (2, [3, 1]), (4, [3, 1, 4, 2])):
        assert plots.images.choose_images(rows, most) == chosen


SIZE = (60, 60)


def square(image_id, x, y, size=20, **fields):
    return rectangle(image_id, x, y, size, size, size=SIZE, **fields)


@pytest.fixture
def sheet(tmp_path):
    """A function that plots the contact sheet of COCO data, at a threshold of 0.7."""

    def do(number, annotations, results, name="{}.png", **options):
        data = coco(number, annotations, SIZE)
        for image in data["images"]:
            image["file_name"] = name.format(image["id"])
            Image.new("RGB", SIZE, (120, 120, 120)).save(tmp_path / image["file_name"])
        scored = evaluate_lesions(data, results)
        return plots.images.plot_contact_sheet(scored, tmp_path, tmp_path / "sheet.png", **options)

    return do


def contours(axes):
    """(left, top, right, bottom) of the lines in a tile, by kind."""
    kinds = {to_rgb(line["color"]): kind for kind, line in plots.images.CONTOURS.items()}
    boxes = {}
    for line in axes.lines:
        xy = line.get_xydata()
        box = (*xy.min(axis=0).tolist(), *xy.max(axis=0).tolist())
        boxes.setdefault(kinds[to_rgb(line.get_color())], []).append(box)
    return boxes


def tiles(figure):
    return [axes for axes in figure.axes if axes.images]


def test_four_kinds_of_contours_where_they_belong(sheet, tmp_path):
    lesions = [square(1, 0, 0), square(1, 30, 0), square(1, 0, 40, 15, iscrowd=1)]
    # Of the last two one lies in the crowd and counts nowhere, one is below the threshold.
    places = (2, 0, 20, 0.9), (30, 30, 20, 0.8), (2, 42, 10, 0.95), (30, 0, 20, 0.6)
    results = [square(1, *place, score=score) for *place, score in places]
    figure = sheet(1, lesions, results)
    (tile,) = tiles(figure)
    assert contours(tile) == {
        "ground truth": [(0, 0, 19, 19)],
        "missed lesion": [(30, 0, 49, 19)],
        "hit": [(2, 0, 21, 19)],
        "false alarm": [(30, 30, 49, 49)],
    }
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(plots.images.CONTOURS)
    for key in ("color", "linestyle"):
        assert len({line[key] for line in plots.images.CONTOURS.values()}) == 4
    # 360 of 400 pixels are in common, 40 more the detection's alone; all else adds to the union.
    expected = 100 * 360 / (20 * 20 * 2 + 40 + 400)
    assert tile.get_title() == f"1.png\nscore 0.90 · IoU {expected:.0f} %"
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for line in plots.images.CONTOURS.values():
        distance = np.abs(pixels - 255 * np.array(to_rgb(line["color"]))).max(axis=2)
        assert (distance < 12).sum() > 50


def test_boxes_alone(sheet):
    lesions, results = [square(1, 0, 0), square(2, 0, 0)], [square(1, 0, 0, score=0.9)]
    for record in (*lesions, *results):
        del record["segmentation"]
    missed, hit = tiles(sheet(2, lesions, results))  # the worst first
    assert missed.get_title() == "2.png\nscore 0.00 · missed"
    assert hit.get_title() == "1.png\nscore 0.90 · box IoU 100 %"
    assert contours(hit)["hit"] == [(-0.5, -0.5, 19.5, 19.5)]
    (missed,) = tiles(sheet(2, lesions, results, max_images=1))
    assert missed.get_title().startswith("2.png")


def test_titles_and_images_that_are_not_there(sheet, tmp_path):
    figure = sheet(1, [], [], name="a_very_long_name_{}_of_a_file_that_is_no_use_in_a_title.png")
    first, second = tiles(figure)[0].get_title().split("\n")
    assert len(first) == 30 and first.startswith("a_very_lon") and first.endswith("title.png")
    assert second == "no lesion · score 0.00"
    assert figure.get_suptitle() == "1 of 1 images, worst first; detections with score ≥ 0.7"
    assert not tiles(sheet(0, [], []))
    scored = evaluate_lesions(coco(1, [], SIZE), [])
    with pytest.raises(FileNotFoundError, match="1.png"):
        plots.images.plot_contact_sheet(scored, tmp_path, tmp_path / "sheet.png")


def test_contact_sheet_of_real_images(kvasir_352, tmp_path):
    """Masks of the data set itself as ground truth, shifted by some pixels as detections."""
    data, results = coco(3), []
    for image, path in zip(data["images"], sorted((kvasir_352 / "images").iterdir()), strict=False):
        with Image.open(kvasir_352 / "masks" / path.name) as stored:
            mask = (np.asarray(stored.convert("L")) > 127).astype(np.uint8)
        image |= {"file_name": path.name, "height": len(mask), "width": len(mask[0])}
        for records, shift in ((data["annotations"], 0), (results, 4)):
            rle = mask_util.encode(np.asfortranarray(np.roll(mask, shift, axis=1)))
            record = {"image_id": image["id"], "category_id": 1, "segmentation": rle}
            records.append(record if records is not results else record | {"score": 0.9})
    sheet = evaluate_lesions(data, results), kvasir_352 / "images", tmp_path / "sheet.png"
    figure = plots.images.plot_contact_sheet(*sheet)
    assert [set(contours(tile)) for tile in tiles(figure)] == [{"ground truth", "hit"}] * 3


def test_distortions_are_shown(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    axes = plots.plot_distortions(image, tmp_path / "d.png").axes
    assert len(axes) == len(DISTORTIONS) * 6
    assert np.array_equal(axes[0].images[0].get_array(), image)
    assert np.array_equal(axes[-1].images[0].get_array(), image[::-1, ::-1])  # half a turn


def test_review_sheets_show_every_image(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(23):
        Image.new("RGB", (500, 400), (0, 10 * i, 255 - 10 * i)).save(images / f"{i:02d}.png")
    sheets = plots.plot_review_sheets(images, tmp_path / "sheets")
    assert [sheet.name for sheet in sheets] == ["sheet_001.jpg", "sheet_002.jpg"]
    first, second = (np.asarray(Image.open(sheet)).astype(int) for sheet in sheets)
    assert first.shape == (4 * 368, 5 * 352, 3) and second.shape == (368, 5 * 352, 3)
    for i in (0, 7, 19, 22):
        sheet, place = (first, i) if i < 20 else (second, i - 20)
        y, x = 368 * (place // 5) + 140, 352 * (place % 5) + 176
        assert abs(sheet[y, x] - (0, 10 * i, 255 - 10 * i)).max() < 6
        assert (sheet[y + 212 : y + 226, x - 172 : x] < 100).any(), "its name"
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        plots.plot_review_sheets(images, tmp_path / "sheets")


CLASSES = ["cancer", "ulcer", "gastritis"]


def test_grad_cam_of_confident_misses_and_spread_hits():
    outcomes = [("cancer", score) for score in (0.5, 0.9, 0.6, 0.7, 0.8)]
    outcomes += [("ulcer", score) for score in (0.4, 0.95, 0.6)]
    rows = [{"label": "cancer", "predicted": name, "score": str(s)} for name, s in outcomes]
    chosen = plots.images.choose_hits_and_misses(rows, CLASSES, 2)
    scores = [[float(row["score"]) for row in kind] for kind in chosen["cancer"]]
    assert scores == [[0.9, 0.5], [0.95, 0.6]]
    assert chosen["ulcer"] == ([], []), "ulcer was predicted, but none is there"


@pytest.fixture
def evaluated(tmp_path):
    """The config of an evaluation of six images, a model, and the folder of the evaluation."""
    rng = np.random.default_rng(0)
    content = coco(6, [{"image_id": i, "category_id": (i - 1) // 2 + 1} for i in range(1, 7)])
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    name = f"grad_cam_{tmp_path.name}"
    register_classification_dataset(name, tmp_path / "coco.json", tmp_path)
    opts = [*("MODEL.DEVICE", "cpu"), *("MODEL.TIMM.NAME", "resnet18"), *("INPUT.SIZE", 64)]
    opts += [*("DATASETS.TEST", (name,)), *("OUTPUT_DIR", str(tmp_path))]
    cfg = load_config("configs/resnet50.yaml", opts)
    folder = tmp_path / "inference" / name
    evaluator = ClassificationEvaluator(name, output_dir=str(folder))
    for i in range(1, 7):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
        evaluator.process([{"image_id": i}], [{"scores": torch.tensor([0.5, 0.3, 0.2])}])
    evaluator.evaluate()
    yield cfg, ImageClassifier("resnet18", 3, input_size=64), folder
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_grad_cam_is_next_to_the_evaluation_or_there_is_a_hint(evaluated, monkeypatch, caplog):
    cfg, model, folder = evaluated
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr("imrcnn_d2.report.plots.images.find_spec", lambda name: None)
        plots.plot_test_grad_cams(cfg, model)
    assert "pip install grad-cam" in caplog.text
    pytest.importorskip("pytorch_grad_cam", reason="the grad-cam package is not installed")
    cfg.INPUT.SIZE = 224
    plots.plot_test_grad_cams(cfg, ImageClassifier("vit_tiny_patch16_224", 3))
    assert "vit_tiny_patch16_224" in caplog.text
    assert not (folder / "grad_cam.png").exists()
    cfg.INPUT.SIZE = 64
    plots.plot_test_grad_cams(cfg, model)
    image = cv2.imread(str(folder / "grad_cam.png"))
    assert image.shape[1] > image.shape[0] > 300
    assert np.unique(image.reshape(-1, 3), axis=0).shape[0] > 1000, "images and heat, in colour"
