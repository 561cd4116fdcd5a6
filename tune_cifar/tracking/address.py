"""MLflow's address: make, check and read it. The only module that knows how a path is escaped."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from tune_cifar.errors import ConfigError, did_you_mean, hide_credentials

if TYPE_CHECKING:
    from sqlalchemy import URL

# A run store's own database.
OWN_DATABASE = "mlflow.db"
# Databases that MLflow takes beside SQLite.
DATABASES = ("postgresql", "mysql", "mssql")
KNOWN = ("http", "https", "sqlite", *DATABASES)
RULE = "`tracking_uri` must be http://HOST:PORT of an MLflow server, or sqlite:///PATH"
# An address without its scheme: a host, its port, perhaps a path.
HOST_AND_PORT = re.compile(r"(?:[\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]+(?:/\S*)?")


def make_tracking_uri(storage: Path, option: str | None) -> str:
    """Return the tracking address: the option, else a SQLite file in the run store.

    Raises:
        ConfigError: when no MLflow can have this address.
    """
    return check_address(option) if option else make_sqlite_uri(storage / OWN_DATABASE)


def make_sqlite_uri(path: Path) -> str:
    """Return the address of a SQLite file, from which SQLAlchemy reads exactly this path.

    Raises:
        ConfigError: when there is none.
    """
    from sqlalchemy import URL

    return _render_sqlite(URL.create("sqlite", database=str(path)))


def find_sqlite_file(tracking_uri: str) -> Path | None:
    """Return the database file of a SQLite address, None for a server's."""
    if not tracking_uri.startswith(("sqlite:", "sqlite+")):
        return None
    from sqlalchemy import make_url

    return Path(make_url(tracking_uri).database or "")


def check_address(uri: str) -> str:
    """Check an address that a user gives; return it as MLflow reads it. Nothing is asked.

    Raises:
        ConfigError: when no MLflow can have it; with the right form, without credentials.
    """
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  (raises ValueError when it is no number)
    except ValueError:  # its message may hold a part of a password
        raise ConfigError(f"{RULE}, got {_show(uri)}.") from None
    engine = parts.scheme.partition("+")[0]
    if engine in ("http", "https"):
        _check_server(uri, parts)
        return uri
    if engine == "sqlite":
        return _check_sqlite(uri)
    if engine in DATABASES:
        _check_driver(uri, parts.scheme)
        return uri
    # A plugin of MLflow brings a scheme of its own.
    if parts.scheme in {found.name for found in entry_points(group="mlflow.tracking_store")}:
        return uri
    raise ConfigError(f"{RULE}, got {_show(uri)}.{_find_right_form(uri, parts.scheme)}")


def _find_right_form(uri: str, scheme: str) -> str:
    """Return what to give instead of an address of no known scheme, with a space before it."""
    if HOST_AND_PORT.fullmatch(uri):
        return f" Give http://{uri}."
    if scheme.startswith("databricks") or uri == "databricks" or scheme == "uc":
        return " Databricks is not supported: its experiments are paths of a workspace."
    if scheme in ("", "file"):
        return " MLflow keeps runs in folders no longer. Leave it out for the run store's own."
    return did_you_mean(scheme, KNOWN)


def _check_server(uri: str, parts: SplitResult) -> None:
    """Refuse a server's address without a host, or with what a browser shows after it."""
    if not parts.hostname or re.search(r"\s", uri):
        raise ConfigError(f"{RULE}, got {_show(uri)}.")
    if parts.query or parts.fragment or "#" in uri:
        right = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        hint = f"Give {hide_credentials(right)}."
        raise ConfigError(f"{RULE}, without what follows ? or #, got {_show(uri)}. {hint}")


def _check_sqlite(uri: str) -> str:
    """Return a SQLite file's address; refuse one that is in memory, or in another form."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        raise ConfigError(f"{RULE}, got {_show(uri)}.") from None
    if "?" in uri:
        rule = "`tracking_uri` must have %3F for a ? in the path of a SQLite file"
        raise ConfigError(f"{rule}, got {_show(uri)}.")
    database = url.database or ""
    is_file = database and not url.host and not database.startswith((":memory:", "file:"))
    if not is_file or url.drivername not in ("sqlite", "sqlite+pysqlite"):
        rule = "`tracking_uri` must lead to a file, sqlite:///PATH (an absolute one: four slashes)"
        raise ConfigError(f"{rule}, got {_show(uri)}.")
    return _render_sqlite(url)


def _check_driver(uri: str, scheme: str) -> None:
    """Refuse a database whose driver is not installed; MLflow would try for minutes."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
        url.get_dialect().import_dbapi()
    except ImportError as exc:
        problem = f"`tracking_uri`: {scheme} needs the module {exc.name}, not installed here"
        raise ConfigError(f"{problem}. Install it, or name another: {scheme}+DRIVER://.") from exc
    except (ArgumentError, ValueError):  # of an unknown driver, too
        rule = f"`tracking_uri` must be {scheme}://USER:PASSWORD@HOST/DATABASE"
        raise ConfigError(f"{rule} with a driver of SQLAlchemy, got {_show(uri)}.") from None
    if not url.host:
        rule = f"`tracking_uri` must be {scheme}://USER:PASSWORD@HOST/DATABASE"
        raise ConfigError(f"{rule}, got {_show(uri)}.")


def _render_sqlite(url: URL) -> str:
    """Return a SQLite address: the plain one if it is read as it is meant, else an escaped one.

    The escaped one names the driver: MLflow makes the folders of a `sqlite:///` address as it
    stands, escapes and all.

    Raises:
        ConfigError: when neither leads to this path.
    """
    from sqlalchemy import make_url

    path = url.database or ""
    rule = "the path of MLflow's database must fit into an address"
    try:
        path.encode()
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{path!r}: {rule}, got one that is not UTF-8. Rename it.") from exc
    escaped = url.set(drivername="sqlite+pysqlite").render_as_string()
    for uri in (f"sqlite:///{path}", escaped):
        if make_url(uri).database == path:
            return uri
    raise ConfigError(f"{path!r}: {rule}. Rename its folder, or upgrade SQLAlchemy to 2.1.")


def _show(uri: str) -> str:
    """Return an address in quotes for a message; of a malformed one nothing before an @."""
    shown = hide_credentials(uri)
    if "@" in shown and not shown.startswith("sqlite:") and "***@" not in shown:
        shown = f"***@{shown.rpartition('@')[2]}"
    return repr(shown)
