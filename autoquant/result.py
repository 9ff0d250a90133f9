"""What is known about a candidate: its score, its cost and how its trial went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from autoquant.candidate import Candidate

STATUSES = ("complete", "stopped", "infeasible", "failed")


@dataclass(frozen=True, slots=True)
class Score:
    """Accuracy of one artifact on one split.

    ``value`` is in the metric's own units, higher is better. ``drop`` is float minus this on
    the same samples, ``drop_standard_error`` its *paired* standard error: per-sample
    differences for a per-sample metric, a paired bootstrap for a callable one. An error that
    cannot be told is NaN, and null in JSON. ``divergence`` is that of the outputs from the
    float network's on the same samples (`autoquant.evaluate.divergence`), without labels.
    """

    metric: str
    value: float
    standard_error: float
    drop: float
    drop_standard_error: float
    samples: int
    split: str
    divergence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form of ``searched`` and ``verified`` in front.json (``value`` is ``accuracy``)."""
        return {
            "accuracy": self.value,
            "standard_error": _known(self.standard_error),
            "drop": self.drop,
            "drop_standard_error": _known(self.drop_standard_error),
            "samples": self.samples,
            "split": self.split,
            "metric": self.metric,
            "divergence": self.divergence,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Score:
        """Read ``to_dict``'s form."""
        optional = ("value", "metric", "divergence")
        rest = {f.name: d[f.name] for f in fields(cls) if f.name not in optional}
        for name in ("standard_error", "drop_standard_error"):
            rest[name] = math.nan if rest[name] is None else rest[name]
        metric, divergence = d.get("metric", "top1"), d.get("divergence")
        return cls(metric=metric, value=d["accuracy"], divergence=divergence, **rest)


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a candidate costs, for one sample where not said otherwise.

    ``size_bytes``: the ONNX file. ``weight_bytes``: weights of quantizable layers packed at
    their own bits. ``bops``: MACs × weight bits × activation bits.
    ``stored_bytes``: the file entropy-coded, as ``export --compressed`` stores it; None in records
    of before it was counted.
    ``peak_memory_bytes``: live activation tensors, maximum over the execution order.
    """

    latency_ms: float | None
    size_bytes: int
    weight_bytes: int
    average_weight_bits: float
    macs: int
    bops: int
    peak_memory_bytes: int
    energy_mj: float | None = None
    stored_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The form of ``predicted`` in front.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Cost:
        """Read ``to_dict``'s form; unknown fields are ignored."""
        return cls(**{f.name: d[f.name] for f in fields(cls) if f.name in d})


COST_NAMES = tuple(f.name for f in fields(Cost))


@dataclass(frozen=True, slots=True)
class Latency:
    """A measured latency and the settings that it belongs to.

    ``latency_ms`` is the minimum over interleaved rounds, ``latency_spread_ms`` the
    interquartile range of the rounds.
    """

    latency_ms: float
    latency_median_ms: float
    latency_spread_ms: float
    rounds: int
    batch: int
    threads: int
    runtime: str

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One finished trial: a line of ``trials.jsonl``.

    ``status``: complete; stopped (``why`` says by whom); infeasible (a limit is broken); failed
    (``error`` says why). ``seconds`` maps the stages of the trial to wall time. ``sha256`` is
    that of the artifact that was scored. ``origin`` proposed it: uniform, solver, sampler,
    neighbour, polish, or ``start RUN:TRIAL``. ``second`` is the divergence on a second set of
    inputs, where it was asked for. ``evidence``: what later trials are compared with
    (`autoquant.evaluate`). ``traceback``: of an exception; it has a file of its own.
    """

    trial: int
    candidate: Candidate
    status: str
    score: Score | None = None
    predicted: Cost | None = None
    measured: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] | None = None
    seed: int = 0
    error: str | None = None
    sha256: str | None = None
    origin: str | None = None
    why: str | None = None
    second: float | None = None
    evidence: str | None = None
    traceback: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The line's JSON form, without the ``traceback``."""
        return {
            "trial": self.trial,
            "key": self.candidate.key,
            "status": self.status,
            "candidate": self.candidate.to_dict(),
            "score": self.score and self.score.to_dict(),
            "predicted": self.predicted and self.predicted.to_dict(),
            "measured": None if self.measured is None else dict(self.measured),
            "seconds": sum((self.seconds or {}).values()),
            "stages": dict(self.seconds or {}),
            "seed": self.seed,
            "error": self.error,
            "sha256": self.sha256,
            "origin": self.origin,
            "why": self.why,
            "second": self.second,
            "evidence": self.evidence,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> TrialResult:
        """Read ``to_dict``'s form."""
        return cls(
            trial=d["trial"],
            candidate=Candidate.from_dict(d["candidate"]),
            status=d["status"],
            score=Score.from_dict(d["score"]) if d.get("score") else None,
            predicted=Cost.from_dict(d["predicted"]) if d.get("predicted") else None,
            measured=d.get("measured"),
            seconds=d.get("stages"),
            seed=d.get("seed", 0),
            error=d.get("error"),
            sha256=d.get("sha256"),
            origin=d.get("origin"),
            why=d.get("why"),
            second=d.get("second"),
            evidence=d.get("evidence"),
        )
