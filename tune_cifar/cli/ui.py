"""`ui`: pages in a browser, of MLflow or of optuna-dashboard."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from tune_cifar.cli import options
from tune_cifar.cli.terminal import say, stdout

# Links to MLflow's views; a space has two or three.
MAX_LINKS = 12


def ui(
    optuna: Annotated[
        bool,
        typer.Option(
            "--optuna",
            help="optuna-dashboard, on a copy of the recorded searches as they stand now.",
        ),
    ] = False,
    search: Annotated[
        str | None, typer.Option("--search", help="With --optuna: only this search.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=1, max=65535, help="Default: 5077 for MLflow, or a free one."),
    ] = None,
    tracking_uri: options.TrackingUri = None,
    storage: options.Storage = None,
) -> None:
    """Start the MLflow UI on loopback, or optuna-dashboard. Ctrl-C ends it.

    Example: python -m tune_cifar ui
    """
    from tune_cifar.record.store import find_storage

    if search is not None and not optuna:
        raise typer.BadParameter("--search goes with --optuna; the MLflow UI shows all searches.")
    if optuna and tracking_uri is not None:
        raise typer.BadParameter("--tracking-uri is MLflow's; --optuna reads the records.")
    folder = find_storage(storage)
    # A closed terminal and `kill` end it as Ctrl-C does: nothing of it stays behind.
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        if optuna:
            _serve_optuna(folder, search, port)
        else:
            _serve_mlflow(folder, tracking_uri, port)
    except KeyboardInterrupt:
        say("ended")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve_mlflow(storage: Path, tracking_uri: str | None, port: int | None) -> None:
    """Serve MLflow's UI; print its address and a link for each saved view of a space."""
    from tune_cifar.tracking.address import make_tracking_uri
    from tune_cifar.tracking.server import list_views, run_ui, stop_ui

    uri, process = make_tracking_uri(storage, tracking_uri), None
    try:
        with stdout().status("starting MLflow's UI ..."):
            process, address = run_ui(uri, port)
            views = list_views(uri)
        say(f"MLflow UI: {address}  (Ctrl-C ends it)")
        for name, link in list(views.items())[:MAX_LINKS]:
            say(f"  {name}: {address}{link}")
        raise typer.Exit(process.wait())
    finally:
        if process is not None:
            stop_ui(process)


def _serve_optuna(storage: Path, search: str | None, port: int | None) -> None:
    from tune_cifar.record.store import load_searches
    from tune_cifar.report.dashboard import check_dashboard, make_studies, open_dashboard

    check_dashboard()
    with stdout().status("starting optuna-dashboard ..."):
        server = open_dashboard(make_studies(load_searches(storage, search=search)), port)
    with server:
        say(f"optuna-dashboard: http://127.0.0.1:{server.server_port}  (Ctrl-C ends it)")
        server.serve_forever()
