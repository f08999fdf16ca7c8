"""What holds for all tests: nothing is asked of a network, whichever library is imported first."""
import os
import shutil

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def find_browser():
    "A Chromium of this machine, or None."
    return os.environ.get("CHROME") or next((b for n in ("chromium", "chromium-browser", "google-chrome", "chrome") if (b := shutil.which(n))), None)


@pytest.fixture(scope="module")  # of a module: its event loop must be gone when the next one has its own
def browser():
    "Headless Chromium."
    path = find_browser()
    if not path:
        if os.environ.get("BANTAM_BROWSER") == "required": pytest.fail("no Chromium found, and BANTAM_BROWSER=required")
        pytest.skip("no Chromium found; install one, or name it in CHROME")
    sync = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=path, headless=True, args=flags)
        yield b
        b.close()
