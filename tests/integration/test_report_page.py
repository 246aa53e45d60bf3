"""A report in a real browser: it stands alone, its slider works by mouse and keyboard, it can be read on a telephone
and with a screen reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from browser import Page, browser, no_browser
from report_store import PROMPT, finished, log_scores, published, report_bench
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from trackers import small_scenes

from crism_mlops.reports.content import compose
from crism_mlops.reports.document import Format
from crism_mlops.reports.writing import write_report
from crism_mlops.studies.storage import open_store

pytestmark = pytest.mark.skipif(no_browser() is not None, reason=str(no_browser()))
WIDE, NARROW = (1600, 1000), (400, 800)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two studies with all that a report can hold, as a file."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        bench = report_bench(folder, patch)
        masks = np.random.default_rng(1)
        scenes = [replace(scene, carbonate=masks.random((48, 48)) > 0.6) for scene in small_scenes(14, 48)]
        search = {"data.variant": {"choice": ["pnr", "bpn"]}, "train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
        finished(bench, scenes=scenes, search=search)
        finished(bench, scenes=scenes, study="second", seed=2, trials=2)
        run_id = bench.tracker.start(f"<b>{PROMPT}</b>", "evaluation", {"crism.study": "second"}, {})
        log_scores(bench.tracker, run_id, 9.0)
        published(bench.tracker)
        document = compose(bench.tracker, ["small", "second"], open_store(bench.storage, 0.0))
    (path,) = write_report(document, Format.html, folder / "report.html")
    return path


@pytest.fixture
def wide(report: Path) -> Iterator[Page]:
    with browser(*WIDE) as page:
        page.open(report.as_uri())
        yield page


def cut(page: Page) -> str:
    """Where the first slider divides truth and prediction."""
    return str(
        page.script("return getComputedStyle(document.querySelector('.stack')).getPropertyValue('--cut').trim()")
    )


def test_nothing_is_asked_for_and_nothing_complains(wide: Page, report: Path) -> None:
    assert "small and second" in wide.driver.title
    assert wide.broken_images() == []
    assert len(wide.all(".gallery img")) == 2 * 3 * 5
    asked = {url for url in wide.requests() if not url.startswith(("data:", "about:"))}
    assert asked == {report.as_uri()}
    assert wide.errors() == []
    wide.screenshot("report-wide")
    wide.script("document.querySelector('.gallery').scrollIntoView()")
    wide.screenshot("report-scenes")


def test_the_slider_follows_keyboard_and_mouse(wide: Page) -> None:
    slider = wide.all(".compare input")[0]
    assert cut(wide) == "50%"
    wide.script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", slider)
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert cut(wide) == "53%"
    assert slider.get_attribute("aria-valuetext") == "53 % truth, 47 % prediction"
    slider.send_keys(Keys.END)
    assert cut(wide) == "100%"
    stack = wide.all(".stack")[0]
    quarter = -int(stack.size["width"]) // 4
    ActionChains(wide.driver).move_to_element(stack).click_and_hold().move_by_offset(quarter, 0).release().perform()
    assert abs(float(cut(wide).rstrip("%")) - 25.0) <= 2.0
    assert slider.get_attribute("value") == cut(wide).rstrip("%")
    # The others stay where they are.
    assert wide.script("return document.querySelectorAll('.stack')[1].style.getPropertyValue('--cut')") == "50%"


def test_a_column_sorts_its_table_both_ways(wide: Page) -> None:
    table = "[id='small'] table"

    def column(index: int) -> list[str]:
        return [cell.text.split("\n")[0] for cell in wide.all(f"{table} tbody td:nth-child({index})")]

    heads = [button.text for button in wide.all(f"{table} th button")]
    index = heads.index("learning rate") + 1
    before = column(index)
    button = wide.all(f"{table} th button")[index - 1]
    button.send_keys(Keys.ENTER)
    assert column(index) == sorted(before, key=float)
    assert wide.all(f"{table} th")[index - 1].get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.ENTER)
    assert column(index) == sorted(before, key=float, reverse=True)


def test_it_can_be_read_on_a_telephone(report: Path) -> None:
    with browser(*NARROW) as page:
        page.open(report.as_uri())
        # Nothing is wider than the page but what scrolls by itself.
        assert page.script("return document.documentElement.scrollWidth") == NARROW[0]
        sizes = page.script(
            "return [...document.querySelectorAll('p, li, td, th, figcaption, h1, h2, h3, h4')]"
            ".filter(e => e.offsetParent && e.innerText.trim())"
            ".map(e => parseFloat(getComputedStyle(e).fontSize))"
        )
        assert min(sizes) >= 12.0
        assert not page.all("nav li")[0].is_displayed()
        page.click("nav summary")
        assert page.all("nav li")[0].is_displayed()
        widths = page.script(
            "return [...document.querySelectorAll('.stack')].map(e => e.getBoundingClientRect().width)"
        )
        assert min(widths) > 300
        page.screenshot("report-narrow")
        page.script("document.querySelector('.gallery article').scrollIntoView()")
        page.screenshot("report-narrow-scenes")
        assert page.errors() == []


@pytest.mark.parametrize(
    ("size", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light")], ids=["wide", "dark", "narrow"]
)
def test_axe_finds_nothing(report: Path, size: tuple[int, int], scheme: str) -> None:
    with browser(*size) as page:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        page.open(report.as_uri())
        page.script((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
        page.driver.set_script_timeout(120)
        found = page.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; axe.run().then(r => done(r.violations))"
        )
        told = [(v["id"], v["help"], [n["html"][:120] for n in v["nodes"]][:3]) for v in found]
        page.screenshot(f"report-{scheme}-{size[0]}")
        assert told == []
