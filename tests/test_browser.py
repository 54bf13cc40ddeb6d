"""The page of `dtnh report` in a real browser: what only a browser can tell.

Chromium and its driver are Debian's `chromium` and `chromium-driver`; `.ci/run`
installs them, where there is no Chrome either.
"""

import os
import pathlib
import shutil

import pytest
from report_runs import write_runs

from dtnh_jax.finetune.html_report import page, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",  # the check may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
if os.environ.get("CI") != "true":  # there it has to be
    pytestmark = pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Chromium and its driver"
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert CHROMIUM, "chromium has to be installed"
    assert DRIVER, "chromium-driver has to be installed"
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    file = folder / "report.html"
    runs = [read_run(run) for run in write_runs(folder)]
    file.write_text(page(runs), encoding="utf-8")
    return file


@pytest.fixture(params=[1280, 390], ids=["desk", "telephone"])
def width(request, browser, file):
    """Opens the page from disk in a window of that width."""
    size = {"width": request.param, "height": 900, "deviceScaleFactor": 1}
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", size | {"mobile": request.param < 500}
    )
    browser.get(pathlib.Path(file).as_uri())
    return request.param


def test_it_opens_from_disk_without_a_complaint(browser, width):
    assert browser.execute_script("return innerWidth") == width
    assert browser.title == "Runs of dtnh"
    assert browser.get_log("browser") == []
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map(x => x.name)"
    )
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_every_picture_is_drawn(browser, width):
    sizes = browser.execute_script(
        "return [...document.images].map(x => [x.complete, x.naturalWidth, x.width])"
    )
    assert sizes == [[True, 3, 3]] * 2


def test_nothing_is_wider_than_the_window(browser, width):
    scrolled = "return document.documentElement.scrollWidth"
    assert browser.execute_script(scrolled) <= width
    tables = browser.execute_script(
        "return [...document.querySelectorAll('table')].map(x => {"
        "  const box = x.getBoundingClientRect();"
        "  return [box.left, box.right, box.height, x.rows.length] })"
    )
    assert len(tables) == 6
    for left, right, height, rows in tables:
        assert 0 <= left < right <= width
        assert height > 20 * rows  # lines of text, none on top of another


def test_options_unfold(browser, width):
    summary = browser.find_element("tag name", "summary")
    table = browser.find_element("css selector", "details table")
    assert not table.is_displayed()
    summary.click()
    assert table.is_displayed()
    assert "l2_sp+dtnh" in table.text


def test_the_best_method_is_marked(browser, width):
    colours = browser.execute_script(
        "const of = x => getComputedStyle(x).backgroundColor;"
        "return [...document.querySelectorAll('tbody tr')].map("
        "  x => [x.className, of(x.cells[0])])"
    )
    best = {colour for name, colour in colours if name == "best"}
    others = {colour for name, colour in colours if not name}
    assert len(best) == 1
    assert others
    assert not best & others
