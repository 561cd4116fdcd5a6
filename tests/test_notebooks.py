"""The notebooks of analysis/: thin, stripped, and running on the recorded sample from a fresh copy."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.tracking.upload import make_tracking_uri, sync_search

ANALYSIS = Path(__file__).parent.parent / "analysis"
NOTEBOOKS = sorted(path.name for path in ANALYSIS.glob("*.ipynb"))
SEARCH, COMPARE, BEST = NOTEBOOKS
SAMPLES = sorted(path.parent for path in ANALYSIS.glob("sample/searches/*/record.jsonl"))
# Pictures of a figure, as a front end shows them.
PNG = "image/png"


def read_notebook(name: str, folder: Path = ANALYSIS) -> Any:
    return nbformat.read(folder / name, as_version=4)


def list_code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parse_code(cell: Any) -> ast.Module:
    return ast.parse(
        "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
    )


def find_parameters(notebook: Any) -> Any:
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


def test_there_are_three_notebooks() -> None:
    assert NOTEBOOKS == ["01_search.ipynb", "02_compare.ipynb", "03_best_model.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid_and_holds_no_function_no_class_and_no_output(name: str) -> None:
    notebook = read_notebook(name)
    nbformat.validate(notebook)
    for cell in list_code(notebook):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        assert not [node for node in ast.walk(parse_code(cell)) if isinstance(node, kinds)], cell.id
        assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_parameters_are_the_first_code_and_nothing_but_plain_values(name: str) -> None:
    notebook = read_notebook(name)
    first = find_parameters(notebook)
    assert first is list_code(notebook)[0]
    values = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in parse_code(first).body
    }
    assert values["storage"] == "sample"
    named = values.get("searches") or [values["search"]]
    assert set(named) <= {folder.name for folder in SAMPLES}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_number_of_a_search_stands_in_the_prose(name: str) -> None:
    """It would be wrong for another search: accuracies come from calls. (70 % explains what a confidence means.)"""
    prose = "\n".join(
        cell.source for cell in read_notebook(name).cells if cell.cell_type == "markdown"
    )
    assert set(re.findall(r"[\d.]+ ?%", prose)) <= {"70 %"}


def test_the_sample_is_small_holds_text_alone_and_names_no_place_and_no_machine() -> None:
    files = [path for path in ANALYSIS.glob("sample/**/*") if path.is_file()]
    assert {path.name for path in files} == {"record.jsonl", "judgement.json"}
    assert sum(path.stat().st_size for path in files) < 300_000
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(?:home|root|tmp|work|Users)/|\"/|file:|@", text), path


@pytest.mark.parametrize("folder", SAMPLES, ids=lambda folder: folder.name)
def test_the_sample_is_of_finished_searches_on_cifar10_with_a_best_trial(folder: Path) -> None:
    state = read_state(folder)
    assert state.is_finished and state.header.data.name == "cifar10" and state.best is not None


def copy_analysis(folder: Path) -> Path:
    """As a fresh clone has it."""
    shutil.copytree(
        ANALYSIS, folder / "analysis", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    return folder / "analysis"


def run_notebook(
    notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, **parameters: Any
) -> Any:
    """The notebook, executed in its own folder with these parameters in the place of those that are there."""
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(variable, str(folder.parent / "jupyter"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    cell = find_parameters(notebook)
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def read_outputs(notebook: Any, kind: str) -> list[str]:
    """All outputs of a MIME type; what was printed counts as text/plain."""
    outputs = [output for cell in list_code(notebook) for output in cell.outputs]
    shown = [output.data[kind] for output in outputs if "data" in output and kind in output.data]
    return shown + [
        output.text for output in outputs if output.output_type == "stream" and kind == "text/plain"
    ]


def check_is_clean(notebook: Any) -> None:
    """No warning, and no figure that stands there as text instead of as a picture."""
    outputs = [output for cell in list_code(notebook) for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert not [
        output
        for output in outputs
        if "Figure" in str(output.get("data", {}).get("text/plain")) and PNG not in output.data
    ]


@pytest.mark.slow
@pytest.mark.parametrize("search", [folder.name for folder in SAMPLES])
def test_the_search_notebook_tells_of_any_recorded_search(
    search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = run_notebook(
        read_notebook(SEARCH), copy_analysis(tmp_path), monkeypatch, search=search
    )
    check_is_clean(notebook)
    assert len(read_outputs(notebook, PNG)) == 7
    state = read_state(ANALYSIS / "sample" / "searches" / search)
    assert state.best is not None and state.best.score is not None
    told = "\n".join(read_outputs(notebook, "text/plain"))
    assert f"python -m tune_cifar confirm --search {search}" in told and "one seed, best of" in told
    assert f"{100 * state.best.score:.2f}%" in "\n".join(read_outputs(notebook, "text/html"))


@pytest.mark.slow
def test_the_table_of_trials_is_the_same_from_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_analysis(tmp_path)
    storage, uri = folder / "sample", make_tracking_uri(tmp_path, None)
    sync_search(uri, storage, read_state(search_folder(storage, SAMPLES[0].name)))
    notebook = read_notebook(SEARCH, folder)
    (place,) = (place for place, cell in enumerate(notebook.cells) if cell.id == "table")
    table = notebook.cells[place]
    again = nbformat.v4.new_code_cell(f"tracking_uri = None\n{table.source}")
    notebook.cells = [*notebook.cells[: place + 1], again]
    run_notebook(notebook, folder, monkeypatch, search=SAMPLES[0].name, tracking_uri=uri)
    check_is_clean(notebook)
    shipped, recorded = (
        re.sub(r"T_[0-9a-f]{5}", "", cell.outputs[0].data["text/html"]) for cell in (table, again)
    )
    assert shipped == recorded and "sampler" in recorded


@pytest.mark.slow
def test_the_comparison_notebook_has_a_picture_for_each_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = run_notebook(read_notebook(COMPARE), copy_analysis(tmp_path), monkeypatch)
    check_is_clean(notebook)
    assert len(read_outputs(notebook, PNG)) == 2
    tables = "\n".join(read_outputs(notebook, "text/html"))
    assert all(folder.name in tables for folder in SAMPLES) and "EVA6 session 7" in tables


@pytest.mark.slow
@pytest.mark.parametrize("has_data", [True, False], ids=["with CIFAR-10", "without"])
def test_the_best_model_notebook_shows_mistakes_as_pictures_where_cifar10_is(
    has_data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if has_data:
        request.getfixturevalue("cifar10")
    else:
        monkeypatch.setenv("TUNE_CIFAR_DATA", str(tmp_path))
    notebook = run_notebook(read_notebook(BEST), copy_analysis(tmp_path), monkeypatch)
    check_is_clean(notebook)
    assert len(read_outputs(notebook, PNG)) == 6 + has_data
    told = "\n".join(read_outputs(notebook, "text/plain"))
    assert ("No pictures here, the table above is all: " in told) != has_data
