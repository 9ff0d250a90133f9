"""The real networks and data that the benchmarks read, and batches made as they are asked for.

The folder is ``AUTOQUANT_DATA``, else ``../shared/data`` beside the repository. Decoded images
are kept in the user's cache folder, so that only the first load is slow.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from autoquant.cache import cache_folder, write_atomically
from autoquant.errors import TaskError
from autoquant.task import Array

REPOSITORY = Path(__file__).resolve().parents[2]


def data_path(*parts: str) -> Path:
    """A file or folder of the data. Raises TaskError where it is missing."""
    folder = Path(os.environ.get("AUTOQUANT_DATA") or REPOSITORY.parent / "shared" / "data")
    path = folder.joinpath(*parts)
    if not path.exists():
        raise TaskError(f"{path}: not found; set AUTOQUANT_DATA to the folder of the real data")
    return path


def loader(network: str) -> ModuleType:
    """Import ``models/NETWORK/loader.py``, without leaving bytecode beside it."""
    name = f"autoquant_benchmark_{network}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, data_path("models", network, "loader.py")
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            spec.loader.exec_module(module)
        finally:
            sys.dont_write_bytecode = before
        sys.modules[name] = module
    return sys.modules[name]


def cached_array(name: str, sources: Iterable[Path], make: Callable[[], Array]) -> Array:
    """``make()``, kept as .npy in the cache folder until a source changes; mapped, not read.

    Where the folder cannot be written, the array itself.
    """
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sources]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()[:12]
    path = cache_folder() / "benchmarks" / f"{name}-{digest}.npy"
    try:
        mapped: Array = np.load(path, mmap_mode="c")
    except (OSError, ValueError, EOFError):  # not there, or damaged
        array = make()
        try:
            write_atomically(path, lambda file: np.save(file, array))
            mapped = np.load(path, mmap_mode="c")
        except OSError:
            return array
    return mapped


class Batches(Sequence[Any]):
    """Batches of ``rows``, each made by ``make(rows of the batch)`` when it is asked for.

    A whole split as float32 can take most of a gigabyte, so it is not kept.
    """

    def __init__(self, make: Callable[[Array], Any], rows: Array, size: int) -> None:
        self.make, self.rows, self.size = make, rows, size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.size
        return self.make(self.rows[start : start + self.size])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


def chosen(total: int, count: int, seed: int) -> Array:
    """``count`` of ``total`` rows, in order, by seed."""
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
