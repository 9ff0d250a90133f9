"""The run folder: its lock, whole lines, real full disks."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from autoquant.errors import RunError
from autoquant.search.run import (
    LOCK,
    RESERVE,
    SILENCE,
    Lock,
    append,
    is_alive,
    open_run,
    read_owner,
    without_password,
    write_json,
)

HOLDER = """
import sys, time
from pathlib import Path
from autoquant.search.run import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_driver_is_told_who_has_the_run(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    assert is_alive(tmp_path)
    with pytest.raises(RunError, match=f"is being written by process {holder.pid} on ") as caught:
        Lock(tmp_path)
    assert "\n" not in str(caught.value)
    assert read_owner(tmp_path / LOCK)["pid"] == holder.pid  # the refused one changed nothing


def test_a_killed_driver_has_no_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert not is_alive(tmp_path)
    lock = Lock(tmp_path)
    assert read_owner(tmp_path / LOCK)["pid"] == os.getpid() and is_alive(tmp_path)
    lock.release()
    assert not is_alive(tmp_path) and not read_owner(tmp_path / LOCK)


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with pytest.raises(RunError, match=f"process {os.getpid()} on"):
        Lock(tmp_path)
    lock.release()
    Lock(tmp_path).release()


def test_another_machine_counts_as_alive_while_it_is_heard_of(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": "elsewhere", "pid": 3, "since": "then"}))
    assert is_alive(tmp_path)
    with pytest.raises(RunError, match="by process 3 on elsewhere, since then, last heard of"):
        Lock(tmp_path)
    old = time.time() - SILENCE - 1
    os.utime(path, (old, old))
    assert not is_alive(tmp_path)
    Lock(tmp_path).release()


def test_a_run_keeps_room_for_its_end_and_gives_it_back(tmp_path: Path) -> None:
    run = open_run(tmp_path, "one", {}, resume=False)
    assert (run.folder / RESERVE).stat().st_size > 1 << 20
    run.close()
    assert not (run.folder / RESERVE).exists()


@contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses to let files grow beyond a page, as a full disk or a quota does; pytest's
    own log too, so that no test may end inside."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    append(path, "a" * 3999 + "\n", sync=True)
    with small_files(), pytest.raises(OSError) as caught:
        append(path, "b" * 999 + "\n", sync=True)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "a" * 3999 + "\n"


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    write_json(path, {"members": []})
    with (
        small_files(),
        pytest.raises(RunError, match=r"front\.json: cannot be written: File too large"),
    ):
        write_json(path, {"members": ["x" * 9000]})
    assert json.loads(path.read_text()) == {"members": []}
    assert [p.name for p in tmp_path.iterdir()] == ["front.json"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:se:cret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:///a/b.db", "sqlite:///a/b.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
