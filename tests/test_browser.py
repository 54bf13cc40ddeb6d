"""The page of `dtnh report` in a real browser: what only a browser can tell.

Chromium and its driver are Debian's `chromium` and `chromium-driver`; `.ci/run`
installs them, where there is no Chrome either.
"""

import os
import pathlib
import shutil

import pytest
from report_runs import write_runs

from dtnh_jax import plots
from dtnh_jax.finetune.reports.html_report import page, read_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",  # the check may run as root
    "--disable-dev-shm-usage",  # small in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [pytest.mark.e2e]
if os.environ.get("CI") != "true":  # there it has to be
    pytestmark += [
        pytest.mark.skipif(
            not (CHROMIUM and DRIVER), reason="needs Chromium and its driver"
        )
    ]


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
    """A page of two runs, one with a real figure; their folders have long names."""
    folder = tmp_path_factory.mktemp("a_long_name_" * 8)
    runs = write_runs(folder)
    figure = plots.accuracy_by_method({"fine-tuning": [0.5, 0.6], "l2_sp": [0.7]})
    figure.savefig(runs[1] / "accuracy.png")
    file = folder / "report.html"
    file.write_text(page([read_run(run) for run in runs]), encoding="utf-8")
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
    tiny, (is_complete, natural, shown) = sizes
    assert tiny == [True, 3, 3]
    assert is_complete
    # Never enlarged, and on a telephone not so small that its labels can not be read.
    assert 500 < shown <= natural == 1050


def test_nothing_is_wider_than_the_window(browser, width):
    scrolled = "return document.documentElement.scrollWidth"
    assert browser.execute_script(scrolled) <= width
    edges = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, p, figcaption, .scroll')].map("
        "  x => [x.scrollWidth, x.clientWidth, x.className]"
        ").filter(x => x[1])"
    )
    assert len(edges) > 20
    assert all(inner <= outer or name == "scroll" for inner, outer, name in edges)


def test_a_wide_table_scrolls_and_keeps_the_names_of_its_rows(browser, width):
    before, left, after, moved = browser.execute_script(
        "const box = document.querySelector('.scroll');"
        "const row = box.querySelector('tbody tr');"
        "const lefts = () => [...row.cells].map(x => x.getBoundingClientRect().left);"
        "const before = lefts(); box.scrollLeft = 100;"
        "return [before, box.getBoundingClientRect().left, lefts(), box.scrollLeft]"
    )
    assert moved == 100
    assert before[0] == after[0] == left
    assert after[1] == pytest.approx(before[1] - 100, abs=1)


def test_every_row_is_a_line_that_can_be_seen(browser, width):
    rows = browser.execute_script(
        "return [...document.querySelectorAll('section > figure tr, body > figure tr')]"
        ".map(x => [x.cells[0].innerText, x.getBoundingClientRect().height])"
    )
    assert [name for name, _ in rows] == [
        *("method", *["fine-tuning", "l2_sp+dtnh"] * 2),
        *("option", "--scope", "--steps"),
        *("method", "fine-tuning", "l2_sp+dtnh") * 2,
    ]
    assert all(24 < height < 48 for _, height in rows)  # 24: one line, 48: two
    for heading in browser.find_elements("css selector", "h1, h2, figcaption"):
        is_folded = heading.find_elements("xpath", "ancestor::details")
        assert heading.is_displayed() or is_folded


def test_all_text_stands_out_from_what_is_behind_it(browser, width):
    colours = browser.execute_script(
        "const channels = x => x.match(/[\\d.]+/g).map(Number);"
        "const behind = x => { for (; x; x = x.parentElement) {"
        "  const colour = channels(getComputedStyle(x).backgroundColor);"
        "  if (colour[3] !== 0) return colour } };"
        "return [...document.body.querySelectorAll('*')].filter("
        "  x => [...x.childNodes].some(y => y.nodeType === 3 && y.data.trim())"
        ").map(x => [x.innerText, channels(getComputedStyle(x).color), behind(x)])"
    )
    assert len(colours) > 100

    def luminance(colour):
        linear = (
            x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4
            for x in (channel / 255 for channel in colour[:3])
        )
        return sum(x * y for x, y in zip((0.2126, 0.7152, 0.0722), linear))

    for text, *pair in colours:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 7, text  # WCAG's level AAA


def test_options_unfold(browser, width):
    summary = browser.find_element("tag name", "summary")
    table = browser.find_element("css selector", "details table")
    assert not table.is_displayed()
    summary.click()
    assert table.is_displayed()
    assert "l2_sp+dtnh" in table.text


def test_the_best_method_is_marked(browser, width):
    rows = browser.execute_script(
        "const style = x => getComputedStyle(x);"
        "return [...document.querySelectorAll('body > figure tbody tr')].map(x => ["
        "  x.className, ...new Set([...x.cells].map("
        "    y => style(y).backgroundColor + style(y).fontWeight))])"
    )
    assert all(len(looks) == 1 for _, *looks in rows)  # one for all cells of a row
    (best,) = {look for name, look in rows if name}
    (other,) = {look for name, look in rows if not name}
    assert best != other
    colours = {look.partition(")")[0] for look in (best, other)}
    weights = {look.partition(")")[2] for look in (best, other)}
    assert len(colours) == len(weights) == 2  # never by colour alone
