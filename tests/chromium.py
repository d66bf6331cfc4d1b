"""Pages in a real browser, as a reader opens them."""

import contextlib
import shutil

import pytest

TIMEOUT = 300_000  # milliseconds: on a busy machine all takes longer


@contextlib.contextmanager
def chromium():
    """Debian's chromium, driven by playwright; nothing is downloaded. Skips where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the PATH (apt-get install chromium)")
    options = {"executable_path": path, "args": ["--no-sandbox"], "timeout": TIMEOUT}
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(**options)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, path):
    """A page on the disk, in a tab; fails if it logs anything or asks for anything but itself."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    logged, requested = [], []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert logged == []
    others = [url for url in requested if not url.startswith(("data:", "blob:"))]
    assert others == [path.as_uri()]
    context.close()
