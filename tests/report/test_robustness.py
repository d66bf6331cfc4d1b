import numpy as np
import pytest

from imrcnn_d2.data.distortions import DISTORTIONS, SEVERITIES
from imrcnn_d2.report.plots import plot_distortions, plot_robustness


def document(values, clean=90, images=10, names=("jpeg", "rotation")):
    """Of two distortions, the second a point worse than the first."""
    rows = [{"distortion": "clean", "severity": 0, "level": None, "lesion/f1": clean}]
    for i, name in enumerate(names):
        for severity, value in zip(SEVERITIES, values, strict=True):
            own = None if value is None else value - i
            rows.append({"distortion": name, "severity": severity, "level": 1, "lesion/f1": own})
    for row in rows:
        row["lesion/fp_per_image"] = 0.5
    return {"meta": {"dataset_sha256": "a", "images": images, "seed": 0}, "rows": rows}


def test_a_panel_for_each_distortion_and_a_line_for_each_model(tmp_path):
    models = {"MR-CNN": document([80, 70, 60, 50, 40]), "IMR-CNN": document([85, 75, None, 0, 1])}
    figure = plot_robustness(models, tmp_path / "robustness.png")
    jpeg, rotation = figure.axes
    assert [axes.get_title() for axes in (jpeg, rotation)] == ["JPEG compression", "Rotation"]
    lines = [line for line in jpeg.lines if line.get_linestyle() != "None"]
    assert [line.get_label() for line in lines] == ["MR-CNN", "IMR-CNN"]
    assert lines[0].get_xdata().tolist() == [0, 1, 2, 3, 4, 5]
    assert lines[0].get_ydata().tolist() == [90, 80, 70, 60, 50, 40]
    assert np.isnan(lines[1].get_ydata()[3])
    assert len({line.get_color() for line in lines}) == 2
    assert rotation.lines[0].get_ydata().tolist() == [90, 79, 69, 59, 49, 39]
    ticks = [tick.get_text() for tick in jpeg.get_xticklabels()]
    assert ticks == ["none", "50", "30", "20", "10", "5"]
    assert jpeg.get_ylabel() == "lesion: f1 (%)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["MR-CNN", "IMR-CNN"]
    assert (tmp_path / "robustness.png").stat().st_size


def test_all_distortions_and_a_figure_that_is_no_percentage(tmp_path):
    models = {"a": document([1] * 5, names=tuple(DISTORTIONS))}
    figure = plot_robustness(models, tmp_path / "r.svg", metric="lesion/fp_per_image")
    shown = [axes.get_title() for axes in figure.axes if axes.axison]
    assert shown == [distortion.title for distortion in DISTORTIONS.values()]
    assert figure.axes[0].get_ylabel() == "lesion: fp_per_image"


def test_refused(tmp_path):
    models = {"a": document([1] * 5), "b": document([1] * 5, images=5)}
    with pytest.raises(ValueError, match=r"different images: images is {'a': 10, 'b': 5}"):
        plot_robustness(models, tmp_path / "r.png")
    with pytest.raises(ValueError, match="a has no metric 'segm/AP': there are lesion/f1, "):
        plot_robustness({"a": document([1] * 5)}, tmp_path / "r.png", metric="segm/AP")
    assert not list(tmp_path.iterdir())


def test_distortions_are_shown(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    figure = plot_distortions(image, tmp_path / "d.png")
    assert len(figure.axes) == len(DISTORTIONS) * 6
    assert np.array_equal(figure.axes[0].images[0].get_array(), image)
    half_turn = figure.axes[-1].images[0].get_array()
    assert np.array_equal(half_turn, image[::-1, ::-1])
