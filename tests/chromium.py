"""Pages in a real browser, as a reader opens them."""

import contextlib
import shutil

import pytest

__all__ = ["TIMEOUT", "chromium"]

TIMEOUT = 300_000  # milliseconds: on a busy machine all takes longer


@contextlib.contextmanager
def chromium():
    """Debian's chromium, driven by playwright; nothing is downloaded. Skips where it is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on the PATH (apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=TIMEOUT
        )
        yield browser
        browser.close()
