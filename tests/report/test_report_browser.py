"""The page in a real browser, as a reader opens it: from the disk."""

import csv

import pytest
from chromium import chromium, opened
from report.conftest import HOSTILE_NAMES

from imrcnn_d2.report.html import render_report

pytestmark = pytest.mark.slow
IS_OPEN = "document.querySelector('dialog').open"


@pytest.fixture(scope="module")
def started(study_runs, tmp_path_factory):
    """The browser and the page's path."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    with chromium() as browser:
        yield browser, render_report(list(study_runs.values()), path)


@pytest.fixture
def page(started):
    with opened(*started) as tab:
        yield tab


@pytest.fixture(scope="module")
def outcomes(study_runs):
    """{file name: [row of per_image.csv of each model]}."""
    tables = {}
    for run in study_runs.values():
        text = (run.folder / "per_image.csv").read_text(encoding="utf-8")
        for row in csv.DictReader(text.splitlines()):
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
    "hits": lambda rows: total(rows, "TP"),
    "alarms": lambda rows: total(rows, "FP"),
    "missed": lambda rows: total(rows, "FN"),
    "clear": lambda rows: rows[0]["n_gt"] == "0" and any(row["FP"] == "0" for row in rows),
    "disagree": lambda rows: len({(row["TP"], row["FP"], row["FN"]) for row in rows}) > 1,
}


def test_filters_show_the_images_that_per_image_csv_says(page, outcomes):
    assert sorted(names(page)) == sorted(outcomes)
    for key, keeps in FILTERS.items():
        expected = {name for name, rows in outcomes.items() if keeps(rows)}
        assert 0 < len(expected) < len(outcomes)
        page.locator(f"input[value={key}]").check(force=True)
        assert sorted(names(page)) == sorted(expected), key
        assert page.locator(f"[data-count={key}]").inner_text() == str(len(expected))
        status = page.locator(".status").inner_text()
        assert status == f"{len(expected)} of {len(outcomes)} images shown"
    page.locator("select[name=model]").select_option(label="IBMR-CNN")  # judged alone
    page.locator("input[value=alarms]").check(force=True)
    assert set(names(page)) == {name for name, rows in outcomes.items() if int(rows[1]["FP"])}


def test_a_centre_alone(page, outcomes):
    """The filter by centre holds for the counts of the others too."""
    for centre in ("Bonn", "Rome"):
        page.locator("select[name=centre]").select_option(label=centre)
        expected = {name for name, rows in outcomes.items() if rows[0]["centre"] == centre}
        assert set(names(page)) == expected and 0 < len(expected) < len(outcomes)
        alarms = {name for name in expected if total(outcomes[name], "FP")}
        assert page.locator("[data-count=alarms]").inner_text() == str(len(alarms))
    page.locator("input[value=alarms]").check(force=True)
    assert set(names(page)) == alarms
    assert page.locator("#centres table").count() == 3


def test_sorting(page, outcomes):
    def badness(name):
        rows = outcomes[name]
        overlaps = [float(row["union_iou"]) for row in rows if row["union_iou"]]
        mean = sum(overlaps) / len(overlaps) if overlaps else 100
        return -total(rows, "FP", "FN"), round(mean, 1)

    typical = names(page)  # from the middle of the order to its ends
    page.locator("select[name=sort]").select_option(value="worst")
    order = [badness(name) for name in names(page)]
    assert order == sorted(order) and len(set(order)) > 5
    distances = [abs(names(page).index(name) - (len(order) - 1) / 2) for name in typical]
    assert distances == sorted(distances)
    page.locator("select[name=model]").select_option(label="MR-CNN")
    for column, key in (("union_iou", "iou"), ("score", "score")):
        for direction in ("low", "high"):
            page.locator("select[name=sort]").select_option(value=f"{key}-{direction}")
            values = [outcomes[name][0][column] for name in names(page)]
            known = [float(value) for value in values if value]
            assert values[len(known) :] == [""] * (len(values) - len(known))  # undefined: last
            assert known == sorted(known, reverse=direction == "high")
            assert len(set(known)) > 5


def test_the_gallery_and_the_dialog_by_keyboard_alone(page):
    order, name = names(page), page.locator("#viewer-name")
    focused = "document.activeElement.querySelector('.name').firstChild.data"
    page.locator("input[name=contours]").focus()
    for key, place in (("Tab", 0), ("ArrowRight", 1), ("End", -1), ("Home", 0)):
        page.keyboard.press(key)
        assert page.evaluate(focused) == order[place]
    page.keyboard.press("ArrowDown")
    tiles = page.locator(".tiles li")
    below = tiles.nth(order.index(page.evaluate(focused))).bounding_box()
    assert below["y"] > tiles.first.bounding_box()["y"]
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) == order[0]

    # There is none before the first.
    for key, place in (("Enter", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("ArrowRight", 2)):
        page.keyboard.press(key)
        assert page.evaluate(IS_OPEN) and name.inner_text() == order[place]
    assert page.locator(".viewer-place").inner_text().startswith(f"3 of {len(order)}")
    page.keyboard.press("End")
    assert name.inner_text() == order[-1]
    page.keyboard.press("Escape")
    assert not page.evaluate(IS_OPEN)
    page.wait_for_function(f"last => {focused} === last", arg=order[-1])
    page.keyboard.press("Shift+Tab")  # the gallery is one stop
    assert page.evaluate("document.activeElement.name") == "contours"


def test_a_click_enlarges(page, outcomes, study_runs):
    first, second, *_ = names(page)
    small = page.locator(".tiles button svg").first.bounding_box()
    page.locator(".tiles button").first.click()
    panels = page.locator("dialog svg")
    assert panels.count() == 4
    assert panels.first.bounding_box()["width"] > 1.5 * small["width"]
    assert panels.first.get_attribute("aria-label").startswith("Ground truth: ")
    for i, (model, row) in enumerate(zip(study_runs, outcomes[first], strict=True), 1):
        label = panels.nth(i).get_attribute("aria-label")
        assert label.startswith(f"{model}: ")
        assert (f"{row['FP']} false alarm" in label) == (row["FP"] != "0")
        assert (f"{row['FN']} missed lesion" in label) == (row["FN"] != "0")
    page.get_by_role("button", name="Next").click()
    assert page.locator("#viewer-name").inner_text() == second
    page.get_by_role("button", name="Close").click()
    assert not page.evaluate(IS_OPEN)


def test_tiles_are_filled_when_they_come_near_and_contours_can_be_hidden(page):
    page.wait_for_timeout(100)
    filled = page.locator(".tiles button:has(svg)").count()
    assert filled < page.locator(".tiles li").count()
    last = page.locator(".tiles button").last
    last.scroll_into_view_if_needed()
    last.locator("svg").first.wait_for()
    loaded = """button => Promise.all([...button.querySelectorAll('image')].map(async image => {
        const photo = new Image(); photo.src = image.href.baseVal;
        await photo.decode(); return photo.naturalWidth; }))"""
    assert last.evaluate(loaded) == [96] * 4
    contours = page.locator(".tiles .contours").first
    assert contours.is_visible()
    page.locator("input[name=contours]").uncheck()
    assert not contours.is_visible()


def test_text_of_the_data_is_no_markup(page):
    assert set(HOSTILE_NAMES) < set(names(page))
    for name in HOSTILE_NAMES:
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
    assert note.is_visible() and f"the first 12 of {len(visible)} images" in note.inner_text()
    assert not page.locator(".controls").is_visible()
    assert page.locator(".tiles li").nth(11).locator("svg").count() == 4


WORDS_OF_POOR_CONTRAST = """() => {
    const parse = (colour) => {
        const canvas = new OffscreenCanvas(1, 1).getContext('2d');
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (rgb) => rgb.slice(0, 3).map(v => v / 255)
        .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const background = (node) => {
        const colour = node ? parse(getComputedStyle(node).backgroundColor) : [255, 255, 255, 255];
        return colour[3] > 250 ? colour : background(node.parentElement);
    };
    const poor = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
        if (!text || !node.checkVisibility()) continue;
        const [a, b] = [light(parse(getComputedStyle(node).color)), light(background(node))];
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < 4.5) poor.push([text.slice(0, 40), ratio]);
    }
    return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out(page, scheme):
    """Contrast of at least 4.5 to 1 (WCAG 2.2 AA) of all text that the page shows."""
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate(WORDS_OF_POOR_CONTRAST) == []


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
    page.set_viewport_size({"width": 400, "height": 800})  # it does not scroll sideways
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
