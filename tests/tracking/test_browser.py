"""The pages of `ui` in a real browser, as a person sees them: Debian's Chromium without a window.

Without chromium and chromedriver these tests skip; `make browser` installs both where it can.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.builders import (
    CIFAR10,
    NUMERICS,
    ROOT,
    evaluate_answers,
    find_free_port,
    ignore_event,
    make_grey_images,
    make_result,
)
from tune_cifar.record.events import Stage
from tune_cifar.record.journal import Record, read_state
from tune_cifar.record.state import SearchState
from tune_cifar.record.store import search_folder
from tune_cifar.report.plots.evaluation import save_evaluation
from tune_cifar.search.driver import SearchDriver
from tune_cifar.space.select import load_space
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.upload import sync_search, upload_evaluation
from tune_cifar.train.recorded import make_header

pytestmark = pytest.mark.slow
# A loaded machine takes this long to draw a page.
PATIENCE_SECONDS = 120
# val_acc of each trial at the first rung and at the end; the sixth is stopped.
ACCS = [
    (0.30, 0.52),
    (0.31, 0.61),
    (0.33, 0.58),
    (0.35, 0.64),
    (0.36, 0.55),
    (0.12, 0.0),
    (0.37, 0.57),
]
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1400,1000",
    # Requests go to the page on loopback only.
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
NOT_YET = (
    NoSuchElementException,
    StaleElementReferenceException,
    ElementClickInterceptedException,
    ElementNotInteractableException,
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    """A search of s7 with its five searched knobs, in stages of 1 and 3 epochs, not trained."""
    space = load_space("s7", "cpu")
    budget = space.budget.model_copy(update={"trials": len(ACCS), "max_time_seconds": None})
    space = replace(space, budget=budget)
    storage = tmp_path_factory.mktemp("runs")
    command = "python -m tune_cifar search --space s7"
    header = make_header("search", "seen", space, 3, CIFAR10, NUMERICS, command)
    record = Record.create(search_folder(storage, "seen"), header)
    driver = SearchDriver(record, space, ignore_event)
    while (trial := driver.ask()) is not None:
        first, last = ACCS[trial.number]
        for stage, epoch, acc in [(1, 1, first), (3, 1, 0.2), (3, 2, 0.4), (3, 3, last)]:
            if not driver.report(trial.number, Stage(stage), make_result(epoch, acc)):
                break
    driver.finish()
    driver.record.close()
    return read_state(driver.record.state.folder)


class Browser:
    """A browser that waits for what it is to find."""

    def __init__(self) -> None:
        program, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if program is None or driver is None:
            pytest.skip("no chromium with its chromedriver here (make browser)")
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for option in OPTIONS:
            options.add_argument(option)
        # Selenium does not search the network for a driver with a path.
        self.driver = webdriver.Chrome(options=options, service=Service(executable_path=driver))

    def open(self, address: str) -> None:
        self.driver.get("about:blank")  # else a page that differs only in its fragment stays
        self.driver.get(address)

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        """Return the condition's value as soon as it is true; wait for missing elements."""
        waiting = WebDriverWait(self.driver, PATIENCE_SECONDS, 0.2, NOT_YET)
        return waiting.until(lambda _: condition(), f"{what}; the page: {self.driver.current_url}")

    def find(
        self, css: str, text: str | None = None, within: WebElement | None = None
    ) -> list[WebElement]:
        """Return the elements that exist now, if given only those with exactly this text."""
        found = (within or self.driver).find_elements(By.CSS_SELECTOR, css)
        if text is None:
            return found
        return [element for element in found if element.text.strip() == text]

    def click(self, css: str, text: str | None = None) -> None:
        def try_once() -> bool:
            for element in self.find(css, text):
                element.click()
                return True
            return False

        self.wait(try_once, f"{css} {text or ''} must be there to be clicked")

    def read_page(self) -> str:
        """Return the text of the page."""
        return str(self.find("body")[0].text)

    # The table of runs, whose left part has the names

    def list_runs(self) -> list[str]:
        """Return the names of the runs in the table, from the top."""
        rows = self.find(".ag-pinned-left-cols-container [role=row]")
        places = {int(row.get_attribute("row-index") or -1): row for row in rows}
        return [row.find_element(By.TAG_NAME, "a").text for _, row in sorted(places.items())]

    def read_column(self, column: str) -> list[str]:
        """Return a column's cells from the top."""
        rows = self.find(".ag-center-cols-container [role=row]")
        places = {int(row.get_attribute("row-index") or -1): row for row in rows}
        return [
            row.find_element(By.CSS_SELECTOR, f"[col-id='{column}']").text.strip()
            for _, row in sorted(places.items())
        ]

    def wait_for_runs(self, names: list[str]) -> None:
        what = f"the table must begin with {names}"
        self.wait(lambda: self.list_runs()[: len(names)] == names, what)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.driver.quit()


@contextmanager
def serve(*words: str) -> Iterator[dict[str, str]]:
    """Start `ui` in a process of its own; yield the links that it prints, by name."""
    command = [sys.executable, "-m", "tune_cifar", "ui", *words, "--port", str(find_free_port())]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        pattern = r"(.*): (http://127\.0\.0\.1:\d+)  \(Ctrl-C ends it\)\n"
        first = re.fullmatch(pattern, process.stdout.readline())
        assert first is not None
        links = {first[1]: first[2]}
        for _ in range(0 if "--optuna" in words else 2):
            pattern = rf"  (.*): ({re.escape(first[2])}\S+)\n"
            found = re.fullmatch(pattern, process.stdout.readline())
            assert found is not None
            links[found[1]] = found[2]
        yield links
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)


def test_a_search_is_found_sorted_compared_and_looked_into_in_mlflows_page(
    searched: SearchState, browser: Browser, tmp_path: Path
) -> None:
    storage, best = searched.storage, searched.best
    assert best is not None and searched.counts["complete"] == 6
    uri = make_tracking_uri(storage, None)
    sync_search(uri, storage, searched.folder)
    evaluation = evaluate_answers([0, 0, 2, 5, 5], [0, 0, 0, 3, 5])
    images, title = make_grey_images(5), "seen:3: 5 validation images"
    files = save_evaluation(evaluation, images, title, tmp_path / "judge")
    assert upload_evaluation(uri, storage, searched, best, evaluation.to_dict(), files) is None
    with serve("--storage", str(storage)) as links:
        assert list(links) == ["MLflow UI", "s7: Searches", "s7: Trials, best first (cpu)"]
        searches, trials = links["s7: Searches"], links["s7: Trials, best first (cpu)"]
        see_the_trials_nested_in_their_search(browser, searches)
        see_the_best_trial_first(browser, searches, searched)
        see_the_knobs_of_all_trials(browser, trials, searched)
        see_five_compared(browser, trials, searched)
        see_a_trials_curves_and_figures(browser, trials, best.number)


def see_the_trials_nested_in_their_search(browser: Browser, link: str) -> None:
    browser.open(link)
    browser.wait(lambda: browser.list_runs() == ["seen"], "the search must be there alone")
    # MLflow's assistant opens itself over the right of the page, once.
    browser.click("[data-component-id='mlflow.assistant.chat_panel.close']")
    trials = [f"{number:03d} seen" for number in reversed(range(len(ACCS)))]
    browser.click(".ag-pinned-left-cols-container [role=row] button")
    what = "the search must show its trials"
    browser.wait(lambda: sorted(browser.list_runs()[1:]) == sorted(trials), what)
    assert browser.list_runs()[0] == "seen"
    assert browser.read_column("metrics.`best_val_acc`")[0] == "0.64"
    assert browser.read_column("metrics.`gain_over_baseline`")[0] == "0.12"
    browser.click(".ag-pinned-left-cols-container [role=row] button")
    browser.wait(lambda: browser.list_runs() == ["seen"], "the trials must be hidden again")


def see_the_best_trial_first(browser: Browser, link: str, searched: SearchState) -> None:
    """A click on the head of val_acc sorts by it; then the runs are no longer nested."""
    browser.open(link)
    browser.wait_for_runs(["seen"])
    browser.click("[data-testid='sort-header-val_acc']")
    ranked = rank(searched)
    browser.wait_for_runs([*ranked, "seen"])  # the search itself has no val_acc
    accs = [float(text) for text in browser.read_column("metrics.`val_acc`")[:-1]]
    assert accs == sorted(accs, reverse=True) and accs[0] == 0.64


def see_the_knobs_of_all_trials(browser: Browser, link: str, searched: SearchState) -> None:
    """The view's chart has the searched knobs, and no others, in parallel coordinates."""
    browser.open(link)
    browser.wait_for_runs(rank(searched)[:6])  # runs without a score follow
    knobs = list(searched.header.distributions)
    first = searched.trials[int(rank(searched)[0].split()[0])]
    for knob in knobs:
        assert browser.read_column(f"params.`{knob}`")[0] == str(first.params[knob])
    browser.open(f"{link}&compareRunsMode=CHART")
    card = "[data-testid='experiment-view-compare-runs-card']"

    def read_card() -> str:
        return str(browser.find(card)[0].get_property("textContent")) if browser.find(card) else ""

    axes = (*knobs, "val_acc")
    browser.wait(lambda: all(name in read_card() for name in axes), f"a chart must show {axes}")
    assert read_card().startswith("Parallel Coordinates") and "momentum" not in read_card()


def see_five_compared(browser: Browser, link: str, searched: SearchState) -> None:
    browser.open(link)
    browser.wait_for_runs(rank(searched)[:6])
    for place in range(5):
        row = f".ag-pinned-left-cols-container [row-index='{place}']"
        browser.click(f"{row} .ag-selection-checkbox input")
    browser.click("[data-testid='runs-compare-button']")
    browser.wait(lambda: "Comparing 5 Runs" in browser.read_page(), "five runs must be compared")

    def read_axes() -> list[str]:
        return [axis.text for axis in browser.find(".parcoords .axis-title")]

    # MLflow takes the first three knobs that differ, by name, and the first metric.
    axes = browser.wait(read_axes, "axes must be drawn")
    assert axes == ["div_factor", "dropout", "final_div_factor", "val_acc"]
    text = browser.read_page()
    assert [name in text for name in rank(searched)] == [True] * 5 + [False] * 2


def see_a_trials_curves_and_figures(browser: Browser, link: str, number: int) -> None:
    browser.open(link)
    browser.click(".ag-pinned-left-cols-container [role=row] a", f"{number:03d} seen")
    command = f"python -m tune_cifar reproduce seen:{number}"
    browser.wait(lambda: command in browser.read_page(), "the note must have the command")
    browser.click("[role=tab]", "Model metrics")

    def count_points() -> int:
        """Of the curve of val_acc."""
        for card in browser.find("[data-testid='experiment-view-compare-runs-card']"):
            if card.text.splitlines()[:1] == ["val_acc"]:
                return len(browser.find(".scatterlayer .trace .points path", within=card))
        return 0

    browser.wait(lambda: count_points() == 4, "val_acc must have a point for each of the 4 epochs")
    browser.click("[role=tab]", "Artifacts")
    for name in ("judge", "validation", "confusion.png"):
        browser.click("[data-testid='artifact-tree-node']", name)

    def find_figures() -> list[WebElement]:
        return [img for img in browser.find("img") if img.get_property("naturalWidth") == 946]

    figures = browser.wait(find_figures, "the figure must be drawn in its own size")
    assert figures[0].is_displayed()


def rank(searched: SearchState) -> list[str]:
    """The names of the trials' runs by last val_acc, which is also the order of the scores here."""
    trials = sorted(searched.trials.values(), key=lambda trial: -(trial.val_acc or 0))
    return [f"{trial.number:03d} seen" for trial in trials]


def test_a_search_is_found_in_optuna_dashboards_page(
    searched: SearchState, browser: Browser
) -> None:
    with serve("--optuna", "--search", "seen", "--storage", str(searched.storage)) as links:
        browser.open(links["optuna-dashboard"])
        browser.wait(lambda: "seen" in browser.read_page(), "the search's name must be shown")
        browser.open(f"{links['optuna-dashboard']}/dashboard/studies/0")
        browser.wait(lambda: "History" in browser.read_page(), "the history must be shown")
        points = ".js-plotly-plot .scatterlayer .points path"
        browser.wait(lambda: len(browser.find(points)) >= 6, "the history must be drawn")
