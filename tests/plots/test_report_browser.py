"""The report in headless Chromium with real clicks: it sorts, filters and compares samples, and runs no hostile
script."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from plots.report.__main__ import main
from plots.report.text import inert
from tests.plots.sample_results import BYTES_READ, EVIL, SCORES, write

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs chromium and chromedriver: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    results = write(tmp_path_factory.mktemp("results"))
    assert main([str(results)]) == 0
    return (results / "report" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = BROWSER or ""
    profile: Path = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1300,900",
        f"--user-data-dir={profile}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Chrome, address: str) -> Chrome:
    browser.get("about:blank")  # another hash alone would not load the page again
    browser.get(address)
    return browser


def rows(page: Chrome) -> list[list[str]]:
    """The visible cells of the leaderboard."""
    found = page.find_elements(By.CSS_SELECTOR, "#runs tbody tr")
    return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th,td")] for row in found if row.is_displayed()]


def column(page: Chrome, heading: str) -> int:
    heads = page.find_elements(By.CSS_SELECTOR, "#runs thead th")
    return next(i for i, head in enumerate(heads) if head.text.split(" ")[0] == heading)


def sort(page: Chrome, heading: str) -> None:
    page.find_elements(By.CSS_SELECTOR, "#runs thead th button")[column(page, heading)].click()


def choose(page: Chrome, field: str, text: str) -> None:
    Select(page.find_element(By.ID, field)).select_by_visible_text(text)


def ours(page: Chrome) -> list[str]:
    """The methods of the visible rows in order, without the hostile method."""
    return [name for row in rows(page) if (name := row[0].split(" ")[0]) in SCORES]


def test_clicking_a_heading_sorts_by_its_numbers_both_ways(page: Chrome) -> None:
    choose(page, "filter-benchmark", "needle")
    by_bytes = sorted(BYTES_READ, key=lambda method: -BYTES_READ[method])
    sort(page, "read")
    assert ours(page) == by_bytes  # dearest first, then the other way
    sort(page, "read")
    assert ours(page) == by_bytes[::-1]
    sort(page, "method")
    assert ours(page) == sorted(SCORES)


def test_cells_show_the_means_of_the_records(page: Chrome) -> None:
    choose(page, "filter-benchmark", "needle")
    place = column(page, "score")
    shown = {row[0].split(" ")[0]: row[place] for row in rows(page)}
    for method, scores in SCORES.items():
        assert shown[method] == f"{sum(scores) / len(scores):.1f}"


def test_filters_hide_rows_and_panels_and_can_be_cleared(page: Chrome) -> None:
    assert len(rows(page)) == 7
    choose(page, "filter-benchmark", "ruler")
    assert len(rows(page)) == 3
    panels = page.find_elements(By.CSS_SELECTOR, "[data-panel]")
    assert {panel.get_attribute("data-benchmark") for panel in panels if panel.is_displayed()} == {"ruler"}
    choose(page, "filter-budget", "10 %")
    assert sorted(ours(page)) == ["h2o", "pqcache"]
    page.find_element(By.ID, "filter-text").send_keys("PQC")
    assert ours(page) == ["pqcache"]
    assert page.find_element(By.ID, "filter-count").text == "1 of 7 rows"
    page.find_element(By.ID, "filter-clear").click()
    assert len(rows(page)) == 7


def test_an_address_keeps_the_view(page: Chrome) -> None:
    choose(page, "filter-benchmark", "ruler")
    sort(page, "TPOT")
    before, address = rows(page), page.current_url
    page.get("about:blank")
    page.get(address)
    assert rows(page) == before
    assert ours(page) == ["full", "h2o", "pqcache"]


def test_two_methods_stand_side_by_side_on_one_sample(page: Chrome) -> None:
    choose(page, "sample-place", "ruler on tiny")
    choose(page, "sample-task", "vt")
    choose(page, "sample-left", "full")
    choose(page, "sample-right", "pqcache, 10 %")
    page.find_element(By.ID, "sample-next").click()

    def answer(side: str) -> tuple[str, str]:
        card = page.find_element(By.ID, f"answer-{side}")
        return card.find_element(By.TAG_NAME, "strong").text, card.find_element(By.TAG_NAME, "pre").text

    assert answer("left") == ("100.0", "full says 100.0")
    assert answer("right") == ("0.0", "pqcache says 0.0")
    assert "42" in page.find_element(By.ID, "sample-about").text
    page.find_element(By.ID, "sample-differ").click()
    assert page.find_element(By.ID, "sample-count").text == "1 of 1"  # of both samples of vt, scores differ in one


def test_text_of_models_is_shown_and_never_run(page: Chrome) -> None:
    places = Select(page.find_element(By.ID, "sample-place"))
    places.select_by_visible_text("needle on tiny")
    tasks = Select(page.find_element(By.ID, "sample-task"))
    (evil,) = [option.text for option in tasks.options if "script" in option.text]
    tasks.select_by_visible_text(evil)
    hostile = Select(page.find_element(By.ID, "sample-left"))
    (label,) = [option.text for option in hostile.options if "script" in option.text]
    hostile.select_by_visible_text(label)
    assert page.find_element(By.CSS_SELECTOR, "#answer-left pre").text == inert(EVIL) + "\nsecond line"
    assert page.title == "pqbench report"
    page.execute_script(
        "const s = document.createElement('script');"
        "s.textContent = \"document.title = 'owned'\"; document.body.append(s);"
    )
    assert page.title == "pqbench report"  # even a script that got in would not run


def test_a_phone_scrolls_tables_and_not_the_page(page: Chrome) -> None:
    page.set_window_size(390, 844)
    try:
        width, visible = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        table, frame = page.execute_script(
            "const t = document.getElementById('runs'); return [t.offsetWidth, t.parentElement.clientWidth]"
        )
    finally:
        page.set_window_size(1300, 900)
    assert width <= visible
    assert table > frame


def test_the_page_loads_without_complaint(page: Chrome) -> None:
    page.get_log("browser")  # what earlier tests left
    page.refresh()
    assert page.get_log("browser") == []
