"""The page in a real browser: drop, slider, download, refusal; and which hosts it requests."""

import json
import threading

import pytest
from chromium import TIMEOUT, chromium

from .conftest import TAU, save_image, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tab(site):
    """The open page; at the end, it has logged no errors and requested its server only."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(TIMEOUT)
        messages, requests = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(site.url)
        page.locator(".empty").wait_for()
        yield page
        page.close()
        # Gradio's own, of each stream that it closes
        assert [text for text in messages if text != "Method not implemented."] == []
        local = (site.url, "data:", f"blob:{site.url}")
        assert [url for url in requests if not url.startswith(local)] == []


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two images and a file that is none."""
    folder = tmp_path_factory.mktemp("dropped")
    (folder / "notes.txt").write_text("no image")
    return [*(save_image(folder / f"{n}.png", i) for i, n in enumerate("ab")), folder / "notes.txt"]


def drop(tab, *paths):
    """Drops files and waits until there are results."""
    tab.evaluate("document.querySelector('.cards')?.classList.add('old')")
    tab.set_input_files("input[type=file]", list(paths))
    tab.locator(".cards:not(.old)").wait_for()


def set_tau(tab, tau):
    """Moves the slider as a keyboard does."""
    tab.get_by_label("number input for Threshold τ").fill(str(tau))
    tab.keyboard.press("Enter")


@pytest.mark.story
def test_drop_slider_download(tab, site, predictor, paths):
    text = tab.locator("body").inner_text()
    for part in ("Research use only", "Not for diagnosis", "IMR-CNN", "τ of the weights"):
        assert part in text
    assert "imrcnn-d2 0.1.0" in text and "Gradio" not in text
    assert tab.get_by_role("button", name="COCO").is_disabled()
    drop(tab, *paths[:2])
    scores = [instances.scores.tolist() for instances in predictor(paths[:2])]
    before = len(site.forwards)
    for tau in (TAU, (scores[0][0] + scores[0][1]) / 2, 1, 0.05):
        tau = round(tau, 3)
        set_tau(tab, tau)
        counts = [sum(score >= tau for score in each) for each in scores]
        tab.wait_for_function(
            "counts => [...document.querySelectorAll('figure.card')]"
            ".every((figure, i) => Number(figure.dataset.shown) === counts[i])",
            arg=counts,
        )
        for figure, count in zip(tab.locator("figure.card").all(), counts, strict=True):
            for part in ("g", ".canvas .badge", "li"):  # contours, numbers, scores
                assert figure.locator(f"{part}:visible").count() == count
        tab.locator(f".summary dd >> nth=2 >> text='{sum(counts)}'").wait_for()
    assert len(site.forwards) == before
    for button, name in (("Masks", "masks.zip"), ("COCO", "predictions.json")):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=button).click()
        assert download.value.suggested_filename == name
    coco = json.loads(download.value.path().read_text())
    assert len(coco["annotations"]) == sum(map(len, scores)) and coco["info"]["tau"] == 0.05


def test_bad_files_are_refused_in_words_and_lost_sessions_end(tab, site, paths, tmp_path):
    drop(tab, paths[2])
    text = tab.locator(".card.failed").inner_text()
    assert "notes.txt" in text and "no readable image" in text
    assert tab.get_by_role("button", name="COCO").is_disabled()
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(51 * 2**20)
    tab.set_input_files("input[type=file]", tmp_path / "large.png")
    tab.get_by_text("exceed the maximum allowed size").wait_for()
    drop(tab, paths[0])
    assert tab.locator("figure.card").count() == 1
    site.state().clear()
    set_tau(tab, 0.3)
    tab.locator(".cards.forgotten").wait_for()
    drop(tab, *paths[:2])
    assert not tab.locator(".cards.forgotten").count()
    before = set(site.state())
    tab.reload()
    tab.locator(".empty").wait_for()
    wait_for(lambda: not before & set(site.state()))


def test_the_slider_is_moved_while_the_network_runs(tab, site, predictor, paths, monkeypatch):
    go_on, forward = threading.Event(), predictor.forward
    monkeypatch.setattr(predictor, "forward", lambda batch: go_on.wait(60) and forward(batch))
    set_tau(tab, 0.05)
    tab.set_input_files("input[type=file]", paths[1])
    tab.get_by_text("Looking").first.wait_for()
    set_tau(tab, 0.999)
    tab.wait_for_timeout(500)
    go_on.set()
    tab.locator("figure.card img[alt='b.png']").wait_for()
    tab.locator("figure.card[data-shown='0']").wait_for()
