"""The run folder: made, resumed and written so that a reader never sees half a file."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import platform
import re
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from autoquant import document
from autoquant.errors import RunError
from autoquant.front import Front
from autoquant.hardware import Hardware, LatencyModel
from autoquant.runtime import describe

LOCK = ".lock"
RESERVE = ".reserve"  # given up when the disk is full, so that the front can still be written
RESERVED_BYTES = 16 << 20  # a report is 5 MB, and MLflow gets one too
BEAT = 10.0  # seconds
SILENCE = 60.0  # seconds
_SAME_ON_RESUME = (
    *("task", "space", "hardware", "objectives", "batch", "threads", "seed", "start_from"),
)


@dataclass(slots=True)
class Run:
    """A run folder, new or continued."""

    name: str
    folder: Path
    content: dict[str, Any]
    fresh: bool
    lock: Lock
    seconds: float = 0.0

    @property
    def latency(self) -> Path:
        """Where the run keeps its latency model: one run, one model."""
        return self.folder / "latency.json"

    def hardware(self, profile: Hardware) -> Hardware:
        """The profile with the latency model of the run that is resumed."""
        if profile.model is None and self.latency.is_file():
            model = document.read(self.latency, LatencyModel, RunError)
            return profile.model_copy(update={"model": model})
        return profile

    def write(self, environment: Mapping[str, Any]) -> None:
        """Write study.yaml and environment.json."""
        text = yaml.safe_dump(self.content, sort_keys=False, allow_unicode=True)
        write_text(self.folder / "study.yaml", text)
        write_json(self.folder / "environment.json", environment)

    def discard(self) -> None:
        """Remove a new folder that never got to hold a trial."""
        if self.fresh:
            for path in self.folder.iterdir():
                if path.is_file() or path.is_symlink():
                    path.unlink()
            self.folder.rmdir()

    def release(self) -> None:
        """Give up the room that was kept for the end."""
        (self.folder / RESERVE).unlink(missing_ok=True)

    def close(self) -> None:
        """Let another driver have the run."""
        self.release()
        self.lock.release()


class Lock:
    """One driver a run: the operating system's lock on a file that says whose it is.

    It is gone with its process, however that ends. Another machine's may not be seen through a
    shared file system; its owner touches the file every ``BEAT`` seconds, and counts as dead
    after ``SILENCE``. Raises RunError where another driver is alive.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        try:
            self.file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            _flock(self.file)
        except OSError as error:
            owner = read_owner(self.path)
            self.file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise RunError(f"{self.path}: cannot be locked: {error.strerror}") from None
            raise RunError(f"run {folder.name!r} is being written by {_named(owner)}") from None
        owner, mine = read_owner(self.path), _owner()
        silent = time.time() - self.path.stat().st_mtime
        if owner and owner.get("host") != mine["host"] and silent < SILENCE:
            self.file.close()
            raise RunError(
                f"run {folder.name!r} is being written by {_named(owner)}, last heard of "
                f"{silent:.0f} s ago; if that is dead, wait {SILENCE - silent:.0f} s"
            )
        self.file.truncate(0)
        self.file.write(json.dumps(mine).encode())
        self.stopped = threading.Event()
        self.beats = threading.Thread(target=self._beat, daemon=True)
        self.beats.start()

    def _beat(self) -> None:
        while not self.stopped.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the run free."""
        if not self.stopped.is_set():
            self.stopped.set()
            self.beats.join()
            with contextlib.suppress(OSError):
                self.file.truncate(0)
            self.file.close()


def _flock(file: IO[bytes]) -> None:
    """Raises OSError where another open file has the lock."""
    try:
        import fcntl
    except ImportError:  # Windows: the owner's name and its heartbeat have to do
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_alive(folder: Path) -> bool:
    """Whether a driver works on the run, here or on a machine that shares the folder."""
    path = folder / LOCK
    owner = read_owner(path)
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return time.time() - path.stat().st_mtime < SILENCE
    try:
        with path.open("rb") as file:
            _flock(file)
    except OSError:
        return True
    return False


def read_owner(path: Path) -> dict[str, Any]:
    """Who wrote a lock file: host, pid, since when; empty where nobody holds it."""
    try:
        found = json.loads(path.read_bytes() or b"{}")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _owner() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": now}


def _named(owner: Mapping[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"


def open_run(base: Path, name: str, content: dict[str, Any], resume: bool) -> Run:
    """Make the run folder, or check that the one to resume fits ``content``, what study.yaml
    is to hold. Raises RunError."""
    folder = base / name
    if resume:
        path = folder / "study.yaml"
        if not path.is_file():
            raise RunError(f"--resume: there is no run {name!r} under {base}")
        try:
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunError(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(before, dict):
            raise RunError(f"{path}: expected the fields of a search")
        if content.get("start_from") is None:
            content["start_from"] = before.get("start_from")
        for key in _SAME_ON_RESUME:
            if before.get(key) != json.loads(json.dumps(content.get(key))):
                raise RunError(
                    f"--resume: {key} differs from {path}; "
                    "give the same one, or choose another --name"
                )
        try:
            seconds = Front.read(folder).seconds
        except RunError:  # none yet, or damaged: it is written anew
            seconds = 0.0
        return _locked(Run(name, folder, content, False, Lock(folder), seconds))
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        if folder.exists():
            raise RunError(
                f"run {name!r} exists in {base}: add --resume to continue it, or another --name"
            ) from None
        raise RunError(f"{folder}: cannot be made: {error.strerror}") from None
    return _locked(Run(name, folder, content, True, Lock(folder)))


def _locked(run: Run) -> Run:
    """The run, with room kept for its end. Raises RunError."""
    try:
        with (run.folder / RESERVE).open("wb") as file:
            file.write(bytes(RESERVED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        run.close()
        run.discard()
        raise RunError(f"{run.folder}: {error.strerror}: a run needs some 20 MB") from None
    return run


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once. Raises RunError."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Replace a text file at once. Raises RunError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def append(path: Path, text: str, *, sync: bool) -> None:
    """Add whole lines to a file, or nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        data = memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            if before < os.fstat(file.fileno()).st_size:
                file.truncate(before)
            raise


def without_password(url: str) -> str:
    """A URL for files and messages; ``***`` stands for its password."""
    return re.sub(r"(://[^:/@]+):[^@]*@", r"\1:***@", url)


def describe_environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and manifests."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in (
        *("autoquant", "numpy", "torch", "onnx", "onnxscript", "openvino", "optuna", "ray"),
        "mlflow",
    ):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **describe(),
        "versions": versions,
    }
