"""Optuna's storage by URL, and a journal file that a dead driver may have left damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock

from autoquant.errors import RunError
from autoquant.search.run import append, without_password

JOURNAL = "study.journal"


class _Unlocked(BaseJournalFileLock):
    """No lock: the run's own keeps other drivers away."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Journal(JournalFileBackend):
    """Optuna's journal file, synced when `sync` asks for it and not once a parameter.

    What is written survives the death of the process at once, that of the machine from the
    next `sync`. A line that does not fit on the disk is taken back.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Unlocked())
        self.path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Add lines. Raises OSError."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        append(self.path, lines, sync=False)

    def sync(self) -> None:
        """Wait until the file is on the disk. Raises OSError."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def open_storage(
    url: str | None, folder: Path, say: Callable[[str], None]
) -> tuple[BaseStorage, Callable[[], None]]:
    """The storage, and what puts what it was told on the disk. Raises RunError.

    ``url``: None for a journal file in the run folder, ``journal:///path``, or SQLAlchemy's
    (``sqlite:///path``, ``postgresql://…``), which commit every call.
    """
    if url is None or url.startswith("journal://"):
        path = folder / JOURNAL if url is None else Path(url.removeprefix("journal://"))
        _repair(path, say)
        try:
            backend = Journal(path)
        except OSError as error:
            raise RunError(f"--storage {url}: {error.strerror}") from None
        return JournalStorage(backend), backend.sync
    try:
        return get_storage(url), lambda: None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"--storage {without_password(url)}: {reason}") from None


def _repair(path: Path, say: Callable[[str], None]) -> None:
    """Cut off half a last line; set a journal aside that is damaged before it."""
    for lock in path.parent.glob(f"{path.name}.lock*"):  # of a version that locked the journal
        lock.unlink(missing_ok=True)
    if not path.is_file():
        return
    good = 0
    with path.open("rb") as file:
        for line in file:
            try:
                whole = line.endswith(b"\n") and isinstance(json.loads(line), dict)
            except ValueError:
                whole = False
            if not whole:
                break
            good += len(line)
        else:
            return
        rest = file.read()
    if not rest:
        os.truncate(path, good)
        say(f"{path.name}: half a last line was cut off")
        return
    aside = path.with_name(path.name + ".damaged")
    path.replace(aside)
    say(f"{path.name} is damaged: kept as {aside.name}, and made anew from trials.jsonl")
