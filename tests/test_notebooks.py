"""The notebooks of analysis/: short, without outputs, and executed on the recorded sample."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

from tune_cifar.record.journal import read_state
from tune_cifar.record.store import search_folder
from tune_cifar.tracking.address import make_tracking_uri
from tune_cifar.tracking.upload import sync_search

ANALYSIS = Path(__file__).parent.parent / "analysis"
OWN = "04_own_network.ipynb"
# Those that read a recorded search.
NOTEBOOKS = sorted(path.name for path in ANALYSIS.glob("*.ipynb") if path.name != OWN)
SEARCH, COMPARE, BEST = NOTEBOOKS
SAMPLES = sorted(path.parent for path in ANALYSIS.glob("sample/searches/*/record.jsonl"))
JUPYTER_PARTS = ("RUNTIME", "CONFIG", "DATA")
# One process of pytest-xdist runs them all.
ONE_KERNEL = pytest.mark.xdist_group("notebooks")
# Pictures of a figure, as a front end shows them.
PNG = "image/png"


def read_notebook(name: str, folder: Path = ANALYSIS) -> Any:
    return nbformat.read(folder / name, as_version=4)


def list_code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parse_code(cell: Any) -> ast.Module:
    lines = [line for line in cell.source.splitlines() if not line.startswith("%")]
    return ast.parse("\n".join(lines))


def find_parameters(notebook: Any) -> Any:
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    (cell,) = cells
    return cell


def test_there_are_three_notebooks_of_a_search_and_one_that_searches() -> None:
    assert (ANALYSIS / OWN).exists()
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
    nodes: Any = parse_code(first).body
    values = {ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in nodes}
    assert values["storage"] == "sample"
    named = values.get("searches") or [values["search"]]
    assert set(named) <= {folder.name for folder in SAMPLES}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_number_of_a_search_stands_in_the_prose(name: str) -> None:
    """It would be wrong for another search. (70 % explains what a confidence means.)"""
    cells = [cell for cell in read_notebook(name).cells if cell.cell_type == "markdown"]
    prose = "\n".join(cell.source for cell in cells)
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
    """Copy analysis/ as a fresh clone has it."""
    ignored = shutil.ignore_patterns(".ipynb_checkpoints")
    return Path(shutil.copytree(ANALYSIS, folder / "analysis", ignore=ignored))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncKernelManager]:
    """A kernel for one notebook after another: its imports take longer than they do."""
    folder = str(tmp_path_factory.mktemp("jupyter"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("IPYTHONDIR", *(f"JUPYTER_{part}_DIR" for part in JUPYTER_PARTS)):
            patch.setenv(variable, folder)
        patch.delenv("MPLBACKEND", raising=False)
        manager = AsyncKernelManager()
        run_sync(manager.start_kernel)()
        yield manager
        run_sync(manager.shutdown_kernel)(now=True)


def run_notebook(notebook: Any, folder: Path, kernel: AsyncKernelManager, **parameters: Any) -> Any:
    """Execute a notebook in its own folder, with these parameters instead of its own.

    The kernel forgets first what earlier notebooks have defined.
    """
    cell = find_parameters(notebook)
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in parameters.items())
    data = os.environ.get("TUNE_CIFAR_DATA", "")
    lines = ("%reset -f", "import os", f"os.chdir({str(folder)!r})", "%env TUNE_CIFAR_DATA=" + data)
    first = nbformat.v4.new_code_cell("\n".join((*lines, "del os")))
    notebook.cells.insert(0, first)
    client = NotebookClient(notebook, km=kernel, timeout=600)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    notebook.cells.remove(first)
    return notebook


def read_outputs(notebook: Any, kind: str) -> list[str]:
    """Return all outputs of a MIME type; printed text counts as text/plain."""
    outputs = list_outputs(notebook)
    shown = [output.data[kind] for output in outputs if kind in output.get("data", {})]
    printed = [output.text for output in outputs if output.output_type == "stream"]
    return shown + (printed if kind == "text/plain" else [])


def list_outputs(notebook: Any) -> list[Any]:
    return [output for cell in list_code(notebook) for output in cell.outputs]


def check_is_clean(notebook: Any) -> None:
    """Check that there is no warning, and no figure as text instead of a picture."""
    for output in list_outputs(notebook):
        assert output.get("name") != "stderr", output.text
        data = output.get("data", {})
        assert "Figure" not in str(data.get("text/plain")) or PNG in data


@pytest.mark.slow
@ONE_KERNEL
@pytest.mark.parametrize("search", [folder.name for folder in SAMPLES])
def test_the_search_notebook_runs_for_any_recorded_search(
    search: str, tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    folder = copy_analysis(tmp_path)
    notebook = run_notebook(read_notebook(SEARCH), folder, kernel, search=search)
    check_is_clean(notebook)
    assert len(read_outputs(notebook, PNG)) == 7
    state = read_state(ANALYSIS / "sample" / "searches" / search)
    assert state.best is not None and state.best.score is not None
    text = "\n".join(read_outputs(notebook, "text/plain"))
    assert f"python -m tune_cifar confirm --search {search}" in text and "one seed, best of" in text
    assert f"{100 * state.best.score:.2f}%" in "\n".join(read_outputs(notebook, "text/html"))


@pytest.mark.slow
@ONE_KERNEL
def test_the_table_of_trials_is_the_same_from_mlflow(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    folder = copy_analysis(tmp_path)
    storage, uri = folder / "sample", make_tracking_uri(tmp_path, None)
    sync_search(uri, storage, search_folder(storage, SAMPLES[0].name))
    notebook = read_notebook(SEARCH, folder)
    place = [cell.id for cell in notebook.cells].index("table")
    table = notebook.cells[place]
    again = nbformat.v4.new_code_cell(f"tracking_uri = None\n{table.source}")
    notebook.cells = [*notebook.cells[: place + 1], again]
    run_notebook(notebook, folder, kernel, search=SAMPLES[0].name, tracking_uri=uri)
    check_is_clean(notebook)
    tables = [cell.outputs[0].data["text/html"] for cell in (table, again)]
    uploaded, recorded = (re.sub(r"T_[0-9a-f]{5}", "", html) for html in tables)
    assert uploaded == recorded and "sampler" in recorded


@pytest.mark.slow
@ONE_KERNEL
def test_the_comparison_notebook_has_a_picture_for_each_group(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    notebook = run_notebook(read_notebook(COMPARE), copy_analysis(tmp_path), kernel)
    check_is_clean(notebook)
    assert len(read_outputs(notebook, PNG)) == 2
    tables = "\n".join(read_outputs(notebook, "text/html"))
    assert all(folder.name in tables for folder in SAMPLES) and "EVA6 session 7" in tables


@pytest.mark.slow
@ONE_KERNEL
@pytest.mark.parametrize("has_data", [True, False], ids=["with CIFAR-10", "without"])
def test_the_best_model_notebook_shows_mistakes_as_pictures_where_cifar10_is(
    has_data: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: AsyncKernelManager,
    request: pytest.FixtureRequest,
) -> None:
    if has_data:
        request.getfixturevalue("cifar10")
    else:
        monkeypatch.setenv("TUNE_CIFAR_DATA", str(tmp_path))
    notebook = run_notebook(read_notebook(BEST), copy_analysis(tmp_path), kernel)
    check_is_clean(notebook)
    assert len(read_outputs(notebook, PNG)) == 6 + has_data
    text = "\n".join(read_outputs(notebook, "text/plain"))
    assert ("No pictures, only the table above: " in text) != has_data


@pytest.mark.slow
@ONE_KERNEL
def test_the_notebook_of_an_own_network_searches_and_confirms(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    """In a kernel with a running event loop; the table is updated in place."""
    notebook = read_notebook(OWN)
    nbformat.validate(notebook)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in list_code(notebook))
    (tmp_path / "analysis").mkdir()
    for cell in list_code(notebook):  # a worker's start costs more than its trials
        cell.source = cell.source.replace("data=data", "data=data, max_concurrent=1")
        cell.source = cell.source.replace("seeds=3, top=1", "seeds=2, top=1, max_concurrent=1")
    settings = {"train_size": 120, "val_size": 50, "batch_size": 5}
    run_notebook(notebook, tmp_path / "analysis", kernel, trials=2, settings=settings)
    text = "\n".join(read_outputs(notebook, "text/plain"))
    assert "identical\n" in text and "wide-cpu-" in text
    tables = "\n".join(read_outputs(notebook, "text/html"))
    assert "model_args.width" in tables and "all trials</p><table>" in tables
    (report,) = (tmp_path / "runs" / "reports").glob("*.html")
    assert report.name in text


LONG_SEARCH = """
import os, tune_cifar
os.chdir({folder!r})
sizes = {{"train_size": 120, "val_size": 50, "batch_size": 10}}
run = tune_cifar.run_search(
    "smoke", data="shapes", tier="cpu", settings=sizes, trials=5000, max_concurrent=1
)
print(run.state.finished.reason, run.state.is_finished, len(run.trials) > 0)
"""


@pytest.mark.slow
@ONE_KERNEL
def test_the_interrupt_of_a_kernel_ends_a_search_in_order(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    """And the cells after it go on with what is done."""
    shown: list[str] = []

    def on_output(message: dict[str, Any]) -> None:
        content = message["content"]
        text = content.get("data", {}).get("text/html") or content.get("text", "")
        if "1 complete" in text and not any("1 complete" in before for before in shown):
            run_sync(kernel.interrupt_kernel)()
        shown.extend([text] if text else [])

    client = kernel.blocking_client()
    client.start_channels()
    try:
        code = LONG_SEARCH.format(folder=str(tmp_path))
        reply = client.execute_interactive(code, output_hook=on_output, timeout=300)
    finally:
        client.stop_channels()
    assert reply["content"]["status"] == "ok", shown[-1]
    assert shown[-1] == "interrupted False True\n" and "; interrupted</p><table>" in shown[-2]
    assert any("stopping after the running epochs" in text for text in shown)
