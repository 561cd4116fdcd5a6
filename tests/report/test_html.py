"""The report of a search, and its evaluation of the space."""

from __future__ import annotations

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from optuna.distributions import FloatDistribution, distribution_to_json

from tests.builders import (
    EVENTS,
    ROOT,
    SHAPES_INFO,
    invoke,
    make_header,
    make_result,
    make_resume,
    make_stages_driver,
    make_start,
    refuse,
    simulate_search,
    train_small,
    write_record,
)
from tune_cifar.cli.notebook import Run
from tune_cifar.errors import ConfigError
from tune_cifar.record.events import SearchEnded, Stage
from tune_cifar.record.journal import read_state
from tune_cifar.record.state import SearchState, TrialState
from tune_cifar.record.store import search_folder
from tune_cifar.record.test_log import TestEvaluation, add_test_evaluations, find_test_log
from tune_cifar.report.health import examine_space
from tune_cifar.report.html import _list_best, make_report, write_report
from tune_cifar.report.tables import make_importances, make_slices
from tune_cifar.schema import Numerics
from tune_cifar.space.layout import Range
from tune_cifar.space.reader import parse_space


def examine(state: SearchState) -> tuple[tuple[str, ...], str]:
    found = examine_space(state, make_slices(state), make_importances(state, num_resamples=20))
    return found.sentences, found.diff


def score_at_the_bottom(trial: TrialState, stage: int) -> float:
    """Return a score that rises as max_lr falls."""
    return 0.6 - 0.1 * math.log10(trial.full_config.max_lr / 3e-3)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> SearchState:
    return simulate_search(tmp_path_factory.mktemp("runs"), 30)


def test_a_narrower_range_is_proposed_around_the_best_and_the_files_own_values(
    searched: SearchState,
) -> None:
    sentences, diff = examine(searched)
    (added,) = (line for line in diff.splitlines() if line.startswith("+  max_lr"))
    low, high = (float(text) for text in re.findall(r"(?:low|high): ([^,}]+)", added))
    # 0.05 is the baseline and the best, 0.1 a point of the file.
    assert 3e-3 < low < 0.05 and 0.1 <= high < 1.0
    assert not any(sentence.startswith("max_lr") for sentence in sentences)


def test_the_proposal_is_a_space_file_that_differs_in_that_range_alone(
    searched: SearchState,
) -> None:
    _, diff = examine(searched)
    before = searched.header.space_text
    lines = diff.splitlines()
    removed = [line[1:] for line in lines if line.startswith("- ")]
    added = [line[1:] for line in lines if line.startswith("+ ")]
    after = before
    for old, new in zip(removed, added, strict=True):
        assert after.count(old) == 1
        after = after.replace(old, new)
    space = parse_space(after, Path("smoke.yaml"))
    assert isinstance(space.search["max_lr"], Range) and space.search["max_lr"].log


def test_best_trials_at_an_edge_are_reported_and_that_end_stays(tmp_path: Path) -> None:
    sentences, diff = examine(simulate_search(tmp_path, 30, score_at_the_bottom))
    (sentence,) = (found for found in sentences if found.startswith("max_lr"))
    where = "best trials lie in the lower tenth of its range, at 0.003"
    assert f"{where}; the best may lie beyond it." in sentence
    assert all("low: 3.0e-3" in line for line in diff.splitlines() if line.startswith("+  max_lr"))


def test_at_the_schemas_own_bound_nothing_lies_beyond(tmp_path: Path) -> None:
    state = simulate_search(tmp_path, 30, lambda trial, _: 0.6 - 2 * trial.full_config.dropout)
    sentences, _ = examine(state)
    (sentence,) = (found for found in sentences if found.startswith("dropout"))
    assert sentence.endswith("lie in the lower tenth of its range, at 0; nothing lies beyond it.")


def test_a_knob_without_effect_is_named_and_not_narrowed(searched: SearchState) -> None:
    importances = make_importances(searched, num_resamples=5)
    columns = ["importance", "low", "high"]
    importances.loc[importances["knob"] == "dropout", columns] = [0.01, 0.0, 0.05]
    found = examine_space(searched, make_slices(searched), importances)
    hint = "a pinned value would leave the trials to the other knobs."
    assert f"dropout: no effect was seen; {hint}" in found.sentences
    assert "+  dropout" not in found.diff


def test_a_knob_is_evaluated_by_the_trials_in_which_it_is_active(tmp_path: Path) -> None:
    """A constant schedule is best: of OneCycle's knobs the best trials say nothing."""

    def score(trial: TrialState, stage: int) -> float:
        config = trial.full_config
        return (0.6 if config.schedule == "constant" else 0.3) - config.dropout

    state = simulate_search(tmp_path, 40, score, name="s8")
    sentences, diff = examine(state)
    assert any(sentence.startswith("dropout: ") for sentence in sentences)
    changed = [line for line in diff.splitlines() if line.startswith(("+ ", "- "))]
    assert not re.search("pct_start|div_factor", "".join([*sentences, *changed]))


@pytest.mark.slow
def test_inactive_knobs_are_empty_in_the_report(tmp_path: Path) -> None:
    html = make_report(simulate_search(tmp_path, 30, name="s8"))
    cells = r'<td class="number">([^<]*)</td>'
    (row,) = re.findall(r"<tr><td>pct_start</td>.*</tr>", html)
    assert re.findall(cells, row)[0] == "", "the baseline's schedule is constant"
    rows = [
        re.findall(cells, row) for row in re.findall(r"<tr>(<td class=.number.>\d.*)</tr>", html)
    ]
    found = {row[3]: row[6:9] for row in rows if row[3] in ("constant", "onecycle")}
    assert found["constant"] == ["", "", ""] and all(found["onecycle"])
    assert not re.search("None|nan|NA", "".join(itertools.chain(*rows)))


def test_a_proposal_keeps_a_baseline_value_that_the_file_leaves_to_the_default(
    workplace: Path,
) -> None:
    """The best trials have another dropout than none."""
    text = (ROOT / "search_spaces" / "smoke.yaml").read_text().replace("  dropout: 0.01\n", "", 1)
    Path("smoke.yaml").write_text(text)

    def score(trial: TrialState, stage: int) -> float:
        return 0.8 - 2 * abs(trial.full_config.dropout - 0.08)

    _, diff = examine(simulate_search(workplace / "runs", 30, score, name="./smoke.yaml"))
    (added,) = (line for line in diff.splitlines() if line.startswith("+  dropout"))
    assert "low: 0.0, high: 0.1" in added


def test_few_trials_are_not_evaluated(tmp_path: Path) -> None:
    sentences, diff = examine(simulate_search(tmp_path, 11))
    rule = "11 scored trials are too few to evaluate the space; 12 are needed."
    assert sentences == (rule,) and diff == ""


class Page(HTMLParser):
    """The text that is shown without JavaScript, and what the page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.ids, self.fetched, self.open = "", [], [], []  # type: ignore[var-annotated]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        if "src" in found or tag == "link":
            self.fetched.append(found.get("src") or tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


@pytest.mark.slow
def test_the_report_has_every_part_and_needs_neither_network_nor_javascript(
    searched: SearchState,
) -> None:
    html = make_report(searched)
    page = Page(html)
    assert html.count("<svg") >= 8 and page.fetched == []
    assert len(page.ids) == len(set(page.ids)), "two figures share an id"
    titles = [
        "Configuration",
        "Figures",
        "The best trials",
        "Health of the space",
        "Failures",
        "To reproduce",
        "Environment",
    ]
    assert [title for title in titles if title in page.text] == titles
    best = searched.best
    assert best is not None and best.score is not None
    for words in (
        f"{100 * best.score:.2f} %",
        f"python -m tune_cifar reproduce {best.run_id}",
        "Where the time went",
        "None: no trial failed",
        searched.header.numerics.versions["torch"],
    ):
        assert words in page.text
    assert "NOT CIFAR-10" not in page.text


@pytest.mark.slow
def test_a_report_on_synthetic_data_says_so_and_nothing_in_a_record_becomes_markup(
    tmp_path: Path,
) -> None:
    state = simulate_search(tmp_path, 3)
    changes = {"data": SHAPES_INFO, "command": "search <b>&"}
    state.header = state.header.model_copy(update=changes)
    html = make_report(state)
    assert "NOT CIFAR-10 (shapes): these accuracies say nothing about CIFAR-10." in html
    assert "search &lt;b&gt;&amp;" in html and "search <b>" not in html


@pytest.mark.slow
def test_the_best_trial_is_evaluated_where_its_weights_and_the_data_are(
    tmp_path: Path, fp32: Numerics
) -> None:
    trained = train_small(tmp_path, fp32)
    distributions = {"max_lr": distribution_to_json(FloatDistribution(1e-3, 0.1, log=True))}
    changes = {"kind": "search", "distributions": distributions}
    trained.header = trained.header.model_copy(update=changes)
    path = tmp_path / "x.html"
    # The record names its data: where they are found, no `data` is needed.
    assert write_report(trained, path, None) is None
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for name in ("Confusion", "Classes", "Calibration", "Most confident mistakes", "Augmentation"):
        assert f"{name}." in page.text and f'aria-label="{name}"' in html
    assert "Not shown:" not in page.text and len(page.ids) == len(set(page.ids))
    missing = write_report(trained, path, str(tmp_path / "nowhere"))
    assert missing is not None and "nowhere" in missing
    page = Page(path.read_text(encoding="utf-8"))
    assert f"Not shown: {missing}" in page.text and "Confusion." not in page.text


def test_the_best_trials_are_those_of_the_highest_mean_of_replicates(
    tmp_path: Path, fp32: Numerics
) -> None:
    driver = make_stages_driver(tmp_path, fp32, replicates=2, trials=2)
    for number, accs in enumerate(((0.6, 0.8), (0.9, 0.7))):
        driver.ask()
        for stage in (Stage(1, 0), Stage(2, 0), Stage(3, 0), Stage(3, 1)):
            acc = accs[stage.replicate]
            for epoch in range(1, stage.length + 1):
                driver.report(number, stage, make_result(epoch, acc))
    driver.record.close()
    rows = _list_best(driver.record.state)
    assert [(row["trial"], row["val_acc"]) for row in rows] == [(1, 0.7), (0, 0.8)]
    assert [row["accuracy"] for row in rows] == pytest.approx([0.8, 0.7])


@pytest.mark.slow
def test_the_head_of_a_report_says_what_the_last_launch_took_and_whether_the_best_was_tested(
    tmp_path: Path,
) -> None:
    state = simulate_search(tmp_path / "one", 3, lambda trial, stage: 0.8 - 0.1 * trial.number)
    state.apply(make_resume())
    state.apply(SearchEnded(reason="interrupted", wall_seconds=90.0))
    text = " ".join(Page(make_report(state)).text.split())
    assert "ended after 1.5 minutes of its last launch (interrupted)" in text
    assert "No trial beat the baseline (80.00 %): there is no gain. Validation accuracy on" in text
    assert "by which this trial was chosen; it was not evaluated on the test set. " in text

    state = simulate_search(tmp_path / "two", 3, lambda trial, stage: 0.5 + 0.1 * trial.number)
    best, info = state.best, state.header.data
    assert best is not None
    what = (best.fingerprint, 0, best.run_id, info.name, 10_000, 0.77, 0.5, "test", info.digest)
    row = TestEvaluation("2026-02-02T12:00:00Z", "a commit", *what)
    add_test_evaluations(find_test_log(state.storage), [row])
    text = " ".join(Page(make_report(state)).text.split())
    assert "confirmed over seeds. Validation accuracy on" in text and "launch" not in text
    tested = "on the test set (10,000 images) it has 77.00 %, evaluated 2026-02-02."
    assert f"by which this trial was chosen; {tested} " in text


@pytest.mark.slow
def test_the_command_writes_the_report_into_the_run_store_and_replaces_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simulate_search(workplace / "runs", 3)
    path = workplace / "runs" / "reports" / "x.html"
    answer = invoke("report", "--search", "x", "--data", "nowhere")
    assert answer.exit_code == 0 and path.name in answer.stdout.replace("\n", "")
    first = path.read_text(encoding="utf-8")
    answer = invoke("report", "--search", "x", "--out", "mine.html", "--data", "nowhere", "--json")
    found = json.loads(answer.stdout)
    assert (found["search"], found["file"]) == ("x", "mine.html")
    assert "nowhere" in found["missing"]
    assert Path("mine.html").read_text(encoding="utf-8") == first
    state = read_state(search_folder(workplace / "runs", "x"))
    assert Run(state, data="nowhere").report() == path
    assert "Without the figures of images." in capsys.readouterr().err


def test_a_record_without_anything_to_report_is_refused(workplace: Path) -> None:
    write_record(workplace / "runs", make_header("t", kind="train", distributions={}), EVENTS)
    write_record(workplace / "runs", make_header("early"), [make_start(0)])
    rule = "only a search with ranges has a report, this is a single training."
    assert refuse(ConfigError, "report", "--search", "t") == f"t: {rule}"
    sentence = refuse(ConfigError, "report", "--search", "early")
    way_out = "Wait, or continue it: `search --name early --resume`."
    assert sentence == f"early: no trial has reached a rung yet. {way_out}"


def test_a_report_that_cannot_be_written_is_refused_in_a_sentence(
    searched: SearchState, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="the report cannot be written: File exists"):
        write_report(searched, tmp_path / "file" / "x.html", None)
