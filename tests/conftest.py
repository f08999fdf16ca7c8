"""What holds for all tests: nothing is asked of a network, whichever library is imported first."""
import os
import shutil
import time

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


def find_browser():
    "A Chromium of this machine, or None."
    return os.environ.get("CHROME") or next(
        (b for n in ("chromium", "chromium-browser", "google-chrome",
                     "chrome") if (b := shutil.which(n))), None)


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def chromium():
    "Path of a browser; without one the test is skipped, or fails where CI asks for it."
    path = find_browser()
    if not path:
        if os.environ.get("BANTAM_BROWSER") == "required":
            pytest.fail("no Chromium found, and BANTAM_BROWSER=required")
        pytest.skip("no Chromium found; install one, or name it in CHROME")
    pytest.importorskip("playwright.sync_api")
    return path


# of a module: its event loop must be gone when the next one has its own
@pytest.fixture(scope="module")
def browser(chromium):
    "Headless Chromium."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield b
        b.close()


def pytest_collection_modifyitems(items):
    """For several workers: the tests of a file share what they have made, so they stay together;
    each notebook stands alone, and the notebooks fill the gaps at the end."""
    alone = [i for i in items if i.path.name == "test_notebooks.py"]
    rest = [i for i in items if i.path.name != "test_notebooks.py"]
    for item in rest: item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items[:] = rest + alone


def until(true, seconds=10):
    "Wait for something that another thread does."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(.005)
