import pytest
from matplotlib.figure import Figure
from PIL import Image

from imrcnn_d2.report.plots import style
from imrcnn_d2.report.plots.style import legend_label, save_figure


def test_the_suffix_is_the_format(tmp_path):
    figure = Figure(figsize=(2, 1))
    save_figure(figure, tmp_path / "new" / "a.png", dpi=100)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG"
        assert image.size == (200, 100)
    save_figure(figure, tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_size_is_bounded(tmp_path):
    save_figure(Figure(figsize=(400, 2)), tmp_path / "a.png", dpi=200)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (style.MOST_PIXELS, 40)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.nonsense"
    path.write_text("old")
    with pytest.raises(ValueError, match="nonsense"):
        save_figure(Figure(), path)
    assert path.read_text() == "old"


def test_colours_differ_in_lightness():
    """The four of an outline must not become one in grey; nor those of the first curves."""

    def lightness(colour):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    for colours in (
        [style.SKY, style.YELLOW, style.VERMILION],
        [style.BLUE, style.VERMILION, style.PURPLE],
    ):
        grey = sorted(map(lightness, colours))
        assert min(b - a for a, b in zip(grey, grey[1:], strict=False)) > 20


def test_names_are_shown_as_they_are(tmp_path):
    """``$`` begins no mathematics, and a name that begins with ``_`` is in the legend."""
    figure = Figure(figsize=(3, 2), layout="constrained")
    axes = figure.add_subplot(title=r"$\foo$")
    axes.plot([0, 1], label=legend_label(r"_$\foo$"))
    axes.set_yticks([0, 1], [r"$\foo$", r"$\bar$"])
    assert [text.get_text() for text in axes.legend().get_texts()] == [r" _$\foo$"]
    save_figure(figure, tmp_path / "a.png")
