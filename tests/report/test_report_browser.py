"""The page in a real browser, as a reader opens it: from the disk."""

import csv

import pytest
from chromium import chromium, opened

from imrcnn_d2.report.html import render_report

pytestmark = pytest.mark.slow

MODELS = ("MR-CNN", "IBMR-CNN", "IMR-CNN")


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def report(study_runs, tmp_path_factory):
    runs = [study_runs[name] for name in MODELS]
    return render_report(runs, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture
def page(browser, report):
    with opened(browser, report) as tab:
        yield tab


@pytest.fixture(scope="module")
def outcomes(study):
    """{file name: [row of per_image.csv of each model]}."""
    tables = {}
    for model in MODELS:
        path = study / "runs" / model / "inference" / "study_test" / "per_image.csv"
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                tables.setdefault(row["file_name"], []).append(row)
    return tables


def names(page):
    """File names of the tiles, in their order."""
    return page.eval_on_selector_all(
        ".tiles button", "tiles => tiles.map(tile => tile.querySelector('.name').firstChild.data)"
    )


def total(rows, *keys):
    return sum(int(row[key]) for row in rows for key in keys)


FILTERS = {
    "all": lambda rows: True,
    "hits": lambda rows: total(rows, "TP"),
    "alarms": lambda rows: total(rows, "FP"),
    "missed": lambda rows: total(rows, "FN"),
    "clear": lambda rows: rows[0]["n_gt"] == "0" and any(row["FP"] == "0" for row in rows),
    "disagree": lambda rows: len({(row["TP"], row["FP"], row["FN"]) for row in rows}) > 1,
}


@pytest.mark.parametrize("key", FILTERS)
def test_filters_show_the_images_that_per_image_csv_says(page, outcomes, key):
    wanted = {name for name, rows in outcomes.items() if FILTERS[key](rows)}
    assert 0 < len(wanted) < len(outcomes) or key == "all"
    page.locator(f"input[value={key}]").check(force=True)
    assert set(names(page)) == wanted
    assert len(names(page)) == len(wanted)
    assert page.locator(f"[data-count={key}]").inner_text() == str(len(wanted))
    assert page.locator(".status").inner_text() == f"{len(wanted)} of {len(outcomes)} images shown"


def test_one_model_is_judged_alone(page, outcomes):
    page.locator("select[name=model]").select_option(label="IBMR-CNN")
    page.locator("input[value=alarms]").check(force=True)
    wanted = {name for name, rows in outcomes.items() if int(rows[1]["FP"])}
    assert set(names(page)) == wanted
    assert wanted != {name for name, rows in outcomes.items() if total(rows, "FP")}


def test_worst_first(page, outcomes):
    def badness(name):
        rows = outcomes[name]
        overlaps = [float(row["union_iou"]) for row in rows if row["union_iou"]]
        mean = sum(overlaps) / len(overlaps) if overlaps else 100
        return -total(rows, "FP", "FN"), round(mean, 1)

    found = [badness(name) for name in names(page)]
    assert found == sorted(found)
    assert len(set(found)) > 5


@pytest.mark.parametrize("key, column, falling", [
    ("iou-low", "union_iou", False),
    ("iou-high", "union_iou", True),
    ("score-low", "score", False),
    ("score-high", "score", True),
])  # fmt: skip
def test_sorting_by_a_figure_of_one_model(page, outcomes, key, column, falling):
    page.locator("select[name=model]").select_option(label="MR-CNN")
    page.locator("select[name=sort]").select_option(value=key)
    values = [outcomes[name][0][column] for name in names(page)]
    known = [float(value) for value in values if value]
    assert values[len(known) :] == [""] * (len(values) - len(known))  # undefined ones at the end
    assert known == sorted(known, reverse=falling)
    assert len(set(known)) > 5


def test_the_gallery_and_the_dialog_by_keyboard_alone(page):
    order = names(page)
    page.locator("input[name=contours]").focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.querySelector('.name').firstChild.data"
    assert page.evaluate(focused) == order[0]
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == order[1]
    page.keyboard.press("End")
    assert page.evaluate(focused) == order[-1]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    place = order.index(page.evaluate(focused))
    tiles = page.locator(".tiles li")
    assert tiles.nth(place).bounding_box()["y"] > tiles.first.bounding_box()["y"]
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == order[0]

    page.keyboard.press("Enter")
    dialog, name = page.locator("dialog"), page.locator("#viewer-name")
    assert dialog.get_attribute("open") is not None
    assert name.inner_text() == order[0]
    page.keyboard.press("ArrowLeft")  # there is none before the first
    assert name.inner_text() == order[0]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert name.inner_text() == order[2]
    assert page.locator(".viewer-place").inner_text().startswith(f"3 of {len(order)}")
    page.keyboard.press("End")
    assert name.inner_text() == order[-1]
    page.keyboard.press("Escape")
    assert dialog.get_attribute("open") is None
    page.wait_for_function(f"last => {focused} === last", arg=order[-1])
    page.keyboard.press("Shift+Tab")  # the gallery is one stop
    assert page.evaluate("document.activeElement.name") == "contours"


def test_a_click_enlarges(page, outcomes):
    first = names(page)[0]
    small = page.locator(".tiles button svg").first.bounding_box()
    page.locator(".tiles button").first.click()
    panels = page.locator("dialog svg")
    assert panels.count() == 4
    assert panels.first.bounding_box()["width"] > 1.5 * small["width"]
    labels = [panels.nth(i).get_attribute("aria-label") for i in range(4)]
    rows = outcomes[first]
    assert labels[0].startswith("Ground truth: ")
    for model, row, label in zip(MODELS, rows, labels[1:], strict=True):
        assert label.startswith(f"{model}: ")
        assert (f"{row['FP']} false alarm" in label) == (row["FP"] != "0")
        assert (f"{row['FN']} missed lesion" in label) == (row["FN"] != "0")
    page.get_by_role("button", name="Next").click()
    assert page.locator("#viewer-name").inner_text() == names(page)[1]
    page.get_by_role("button", name="Close").click()
    assert page.locator("dialog").get_attribute("open") is None


def test_contours_can_be_taken_away(page):
    contours = page.locator(".tiles .contours").first
    assert contours.is_visible()
    page.locator("input[name=contours]").uncheck()
    assert not contours.is_visible()


def test_tiles_are_drawn_when_they_come_near(page):
    drawn = "document.querySelectorAll('.tiles button:has(svg)').length"
    number = page.locator(".tiles li").count()
    page.wait_for_timeout(100)
    assert page.evaluate(drawn) < number
    last = page.locator(".tiles button").last
    last.scroll_into_view_if_needed()
    last.locator("svg").first.wait_for()
    loaded = """button => Promise.all([...button.querySelectorAll('image')].map(async image => {
        const photo = new Image(); photo.src = image.href.baseVal;
        await photo.decode(); return photo.naturalWidth; }))"""
    assert last.evaluate(loaded) == [96] * 4


def test_an_outline_lies_on_its_lesion(page, study_runs):
    """Filled, and half a pixel wider, contours cover what the masks do."""
    counts = page.evaluate(
        """() => {
          const data = JSON.parse(document.getElementById('gallery-data').textContent);
          return data.images.map(image => image.truth.map(d => {
            const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
            canvas.translate(.5, .5); canvas.lineJoin = 'round';
            canvas.fill(new Path2D(d), 'evenodd'); canvas.stroke(new Path2D(d));
            const pixels = canvas.getImageData(0, 0, image.width, image.height).data;
            let area = 0;
            for (let i = 3; i < pixels.length; i += 4) area += pixels[i] > 127;
            return area;
          }));
        }"""
    )
    truth = study_runs[MODELS[0]].results.ground_truth
    areas = [[] for _ in truth.images]
    for image, area in zip(truth.regions.image, truth.area, strict=True):
        areas[image].append(area)
    for ours, theirs in zip(counts, areas, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05, abs=8)


def test_text_of_the_data_is_no_markup(page):
    hostile = [name for name in names(page) if "hacked" in name]
    assert len(hostile) == 2
    for name in hostile:
        page.locator(".tiles button", has_text=name).click()
        assert page.locator("#viewer-name").inner_text() == name
        page.keyboard.press("Escape")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img:not([src^='data:image/svg+xml'])").count() == 0


def test_paper_gets_the_first_tiles_and_says_so(page):
    page.emulate_media(media="print")
    visible = [tile.is_visible() for tile in page.locator(".tiles li").all()]
    assert visible == [True] * 12 + [False] * (len(visible) - 12)
    note = page.locator("[data-print]")
    assert note.is_visible()
    assert note.inner_text().startswith(f"Printed: the first 12 of {len(visible)} images")
    assert not page.locator(".controls").is_visible()
    assert page.locator(".tiles li").nth(11).locator("svg").count() == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out(page, scheme):
    """Contrast of at least 4.5 to 1 (WCAG 2.2 AA) of all text that the page shows."""
    page.emulate_media(color_scheme=scheme)
    poor = page.evaluate(
        """() => {
          const parse = (colour) => {
            const canvas = new OffscreenCanvas(1, 1).getContext('2d');
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
          };
          const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
          const behind = (node) => {
            for (; node; node = node.parentElement) {
              const colour = parse(getComputedStyle(node).backgroundColor);
              if (colour[3] > 250) return colour;
            }
            return [255, 255, 255, 255];
          };
          const found = [];
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walker.nextNode()) {
            const node = walker.currentNode.parentElement;
            if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
            const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))];
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (ratio < 4.5) found.push([walker.currentNode.data.trim().slice(0, 40), ratio]);
          }
          return found;
        }"""
    )
    assert poor == []


def test_every_control_has_a_name(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, img, [role=img], nav, form')]
          .filter(node => !(node.getAttribute('aria-label') || node.textContent.trim()
            || node.getAttribute('alt') || node.labels?.[0]?.textContent.trim()))
          .map(node => node.outerHTML.slice(0, 100))"""
    )
    assert nameless == []
    levels = page.eval_on_selector_all("h1, h2, h3", "nodes => nodes.map(node => +node.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    landmarks = ("header", "nav", "main", "footer")
    assert [page.locator(f"body {name}").count() for name in landmarks] == [1] * 4


def test_a_narrow_window_does_not_scroll_sideways(page):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
