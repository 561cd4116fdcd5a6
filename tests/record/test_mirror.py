"""A search's copy elsewhere: complete, up to date, brought back."""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.builders import find_free_port, make_events, write_search
from tune_cifar.errors import ConfigError, RecordError
from tune_cifar.record import mirror
from tune_cifar.record.files import write_atomically
from tune_cifar.record.journal import RECORD_FILE, read_state
from tune_cifar.record.mirror import (
    Mirror,
    check_is_free,
    copy_search,
    list_mirrored,
    restore_search,
)

OLD, NEW = (f"trials/0003/checkpoints/checkpoint-000{number}.pt" for number in (1, 2))
KEPT = "trials/0001/weights.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_search(tmp_path / "runs", "s7-1", 1, make_events()).folder
    for name in (OLD, KEPT, "trials/0003/error.txt"):
        write_atomically(folder / name, name.encode())
    (folder / "owner.json").write_text("{}")
    return folder


@pytest.fixture(params=["file", "s3", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield (tmp_path / "mirror").as_uri()
        return
    serve, *drivers = {
        "s3": (serve_s3, "s3fs"),
        "gs": (serve_gs, "gcsfs", "gcp_storage_emulator"),
    }[request.param]
    missing = [driver for driver in drivers if importlib.util.find_spec(driver) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (make services)")
    yield from serve()


def serve_s3() -> Iterator[str]:
    """An S3 server on loopback with an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    port = find_free_port()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    # What an earlier server of this process had is still there.
    requests.post(f"http://127.0.0.1:{port}/moto-api/reset", timeout=60).raise_for_status()
    variables = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, text in variables.items():
            patch.setenv(name, text)
        boto3.client("s3").create_bucket(Bucket="searches")
        yield "s3://searches/mine"
    server.stop()


def serve_gs() -> Iterator[str]:
    """An emulator of Google's object store on loopback with an empty bucket."""
    from gcp_storage_emulator.server import create_server

    port = find_free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="searches")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield "gs://searches/mine"
    server.stop()


def list_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_search_comes_back_as_it_was(
    folder: Path, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = mirror._copy(folder, url, None)
    assert set(copied) == {RECORD_FILE, OLD, KEPT, "trials/0003/error.txt"}
    names = list(copied)
    assert names[-1] == RECORD_FILE, "what it names is there before the record is"
    assert names.index(KEPT) < names.index(OLD), "a checkpoint does not come without weights"
    assert list_mirrored(url) == ["s7-1"]
    # A restore that was killed has left a file that the search no longer has.
    write_atomically(tmp_path / "elsewhere" / ".new-s7-1" / NEW, b"old")
    restored = restore_search(url, "s7-1", tmp_path / "elsewhere")
    wanted = list_files(folder)
    del wanted["owner.json"]
    assert list_files(restored) == wanted
    assert read_state(restored).counts == read_state(folder).counts
    assert not [entry for entry in caplog.records if entry.name.startswith(("gcsfs", "s3fs"))]


def test_only_what_changed_is_copied_and_what_is_gone_here_goes_there(
    folder: Path, url: str, tmp_path: Path
) -> None:
    before = mirror._copy(folder, url, None)
    (folder / OLD).unlink()
    write_atomically(folder / NEW, b"newer")
    after = mirror._copy(folder, url, before)
    assert {name: look for name, look in after.items() if before.get(name) != look}.keys() == {NEW}
    files = list_files(restore_search(url, "s7-1", tmp_path / "elsewhere"))
    assert OLD not in files and files[NEW] == b"newer"
    # Without knowing what is there, as after a restart.
    write_atomically(folder / OLD, b"again")
    (folder / NEW).unlink()
    assert copy_search(folder, url) == 4
    files = list_files(restore_search(url, "s7-1", tmp_path / "further"))
    assert NEW not in files and files[OLD] == b"again"


def test_another_search_of_the_same_name_is_left_as_it_is(
    folder: Path, url: str, tmp_path: Path
) -> None:
    """Such as one that was begun again on a machine that had lost the first."""
    check_is_free(url, "s7-1", tmp_path)
    copy_search(folder, url)
    other = write_search(tmp_path / "new", "s7-1", 2, make_events()).folder
    problem = f"^{re.escape(url)}: s7-1 cannot be copied: another search named s7-1 is there"
    with pytest.raises(RecordError, match=problem):
        copy_search(other, url)
    restored = restore_search(url, "s7-1", tmp_path / "elsewhere")
    assert (restored / RECORD_FILE).read_bytes() == (folder / RECORD_FILE).read_bytes()
    assert (restored / OLD).exists()
    rule = "`mirror` must have no search of the new one's name, got s7-1. Bring it back: "
    with pytest.raises(ConfigError, match=rule) as caught:
        check_is_free(url, "s7-1", tmp_path / "my runs")
    command = f"searches restore {url} s7-1 --storage '{tmp_path}/my runs' (then --continue)"
    assert command in str(caught.value)


def test_a_mirror_that_does_not_answer_refuses_no_name(tmp_path: Path) -> None:
    (tmp_path / "mirror").write_text("in the way")
    check_is_free((tmp_path / "mirror").as_uri(), "s7-1", tmp_path)
    check_is_free("ftp://127.0.0.1:9/x", "s7-1", tmp_path)


def test_what_changes_during_a_copy_leaves_a_search_that_can_be_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record may not name what comes later, nor a checkpoint go before its successor."""
    url, list_files_now = (tmp_path / "mirror").as_uri(), mirror._list_files
    before = mirror._copy(folder, url, None)
    written = (folder / RECORD_FILE).read_bytes()

    def list_then_change(folder: Path) -> list[Path]:
        paths = list_files_now(folder)
        (folder / RECORD_FILE).write_bytes(written + b"a later line")
        (folder / OLD).unlink()
        write_atomically(folder / NEW, b"newer")
        return paths

    with monkeypatch.context() as patch:
        patch.setattr(mirror, "_list_files", list_then_change)
        after = mirror._copy(folder, url, before)
    copy = tmp_path / "mirror" / "s7-1"
    assert (copy / RECORD_FILE).read_bytes() == written
    assert (copy / OLD).exists() and not (copy / NEW).exists()
    mirror._copy(folder, url, after)
    assert (copy / RECORD_FILE).read_bytes() == written + b"a later line"
    assert not (copy / OLD).exists() and (copy / NEW).exists()


def test_what_is_not_there_is_said_with_what_is(folder: Path, url: str, tmp_path: Path) -> None:
    copy_search(folder, url)
    with pytest.raises(RecordError, match=r"no search named 'other' is there\. Known: s7-1"):
        restore_search(url, "other", tmp_path / "elsewhere")
    with pytest.raises(RecordError, match="a search of this name is here already"):
        restore_search(url, "s7-1", tmp_path / "runs")
    assert not list((tmp_path / "elsewhere").rglob("*"))


def test_a_mirror_follows_while_it_is_open_and_is_complete_at_its_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "EVERY_SECONDS", 0.05)
    copy = tmp_path / "mirror" / "s7-1"
    with Mirror(folder, (tmp_path / "mirror").as_uri()) as running:
        wait_for(copy / RECORD_FILE)
        write_atomically(folder / NEW, b"newer")
        wait_for(copy / NEW)
        write_atomically(folder / KEPT, b"the last word")
    assert running.fault is None
    assert (copy / KEPT).read_bytes() == b"the last word"


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_a_mirror_that_is_away_is_completed_when_it_is_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "EVERY_SECONDS", 0.05)
    place = tmp_path / "mirror"
    place.write_text("in the way: no folder can be made")
    with Mirror(folder, place.as_uri()) as running:
        time.sleep(0.5)
        place.unlink()
        wait_for(place / "s7-1" / RECORD_FILE)
    assert running.fault is None


def test_a_mirror_that_stays_away_is_a_sentence_with_the_command_that_completes_it(
    folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "mirror"
    place.write_text("in the way")
    begin = time.monotonic()
    with Mirror(folder, place.as_uri()) as running:
        running.end_seconds = 1.0  # as after a second Ctrl-C
    assert time.monotonic() - begin < 10
    assert running.fault is not None
    command = f"searches mirror s7-1 {place.as_uri()} --storage {tmp_path}/runs"
    assert running.fault.endswith(f"Complete it: python -m tune_cifar {command}")


def test_a_password_in_an_address_is_in_no_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        list_mirrored("ftp://user:secret@127.0.0.1:9/x")
    assert "secret" not in str(caught.value) and "***@" in str(caught.value)


def test_no_credentials_are_written_into_the_environment() -> None:
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ
