"""Where things that can be made again are kept between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def cache_folder() -> Path:
    """The user's cache folder; it need not exist.

    ``AUTOQUANT_CACHE`` if set, else ``$XDG_CACHE_HOME/autoquant``, else ``~/.cache/autoquant``.
    """
    own = os.environ.get("AUTOQUANT_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autoquant"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Make ``path`` with what ``write(file)`` writes, or leave it as it was.

    Makes the folder. A reader, or another process that writes the same file, never sees half
    of it. Raises OSError where the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
