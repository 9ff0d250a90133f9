"""Compression: a candidate of a graph becomes an ONNX artifact."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from autoquant.calibration import Calibration
from autoquant.candidate import Candidate
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import assemble, resolve
from autoquant.graph import Graph

__all__ = ["Artifact", "compress"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """The file that is scored and ships. ``candidate`` is resolved: every layer has a choice."""

    candidate: Candidate
    model: bytes

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.model)

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.model)
        return path


def compress(
    graph: Graph,
    candidate: Candidate,
    calibration: Calibration,
    bank: Bank,
    dialect: str,
    key: str = "",
) -> Artifact:
    """Assemble a candidate: names checked, weights from the bank, ranges from calibration.

    ``graph`` has the candidate's structure already. ``key``: what the file says it was made for,
    where the candidate is not in its own names. The same inputs give the same bytes. Raises
    CandidateError.
    """
    resolved = resolve(graph, candidate)
    model = assemble(graph, resolved, calibration, bank, dialect, key)
    return Artifact(resolved, model.SerializeToString(deterministic=True))
