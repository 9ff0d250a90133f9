"""Artifact + split → Score: the artifact itself runs in its runtime, nothing is simulated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autoquant.calibration import rebatch
from autoquant.errors import ModelError, TaskError
from autoquant.result import Score
from autoquant.runtime import Session, run_batches
from autoquant.task import Array, Metric, Split

BOOTSTRAP = 200  # resamples for the standard error of a callable metric


@dataclass(frozen=True, slots=True)
class Reference:
    """The float network on one split: its metric, per-sample correctness or outputs."""

    value: float
    standard_error: float
    correct: Array | None
    outputs: Array | None


class Evaluator:
    """Scores artifacts on one split, always beside the float network on the same samples.

    ``rows`` is the largest batch, ``fixed`` says that the model takes no other. Batches run
    ``workers`` at a time, each on one thread: the score does not depend on ``workers``.
    """

    def __init__(
        self,
        split: Split,
        metric: str | Metric,
        metric_name: str,
        *,
        rows: int = 256,
        fixed: bool = False,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        self.split, self.metric, self.metric_name = split, metric, metric_name
        self.workers, self.seed, self.fixed = workers, seed, fixed
        per_target = sum(b[0].shape[0] for b in split.batches) // max(1, split.samples)
        rows = rows if fixed else max(per_target, rows - rows % per_target)
        self.batches = rebatch(split.batches, rows)
        if fixed:
            self.batches = [tuple(_pad(a, rows) for a in batch) for batch in self.batches]
        self.rows = [a[0].shape[0] for a in rebatch(split.batches, rows)]
        self.reference: Reference | None = None

    def outputs(self, session: Session) -> Array:
        """The first output over the whole split, concatenated.

        Raises ModelError where the model cannot run, or its output is not one row a sample.
        """
        try:
            results = run_batches(session, self.batches, self.workers)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"running the model on {self.split.name} failed: {reason}") from None
        parts = [np.asarray(out[0]) for out in results]
        shapes = sorted({p.shape for p in parts})
        for part, batch in zip(parts, self.batches, strict=True):
            if part.shape[:1] != batch[0].shape[:1] or part.shape[1:] != parts[0].shape[1:]:
                raise ModelError(
                    f"the first output on {self.split.name} must have a row a sample, all of one "
                    f"shape; it has {', '.join(map(str, shapes[:4]))}"
                )
        return np.concatenate([part[:rows] for part, rows in zip(parts, self.rows, strict=True)])

    def set_reference(self, session: Session) -> Reference:
        """Score the float network; every later score is compared with it.

        Raises TaskError where the metric fails, is NaN, or is far below chance.
        """
        outputs = self.outputs(session)
        targets = self._targets()
        where = f"{self.metric_name} of the float network on {self.split.name}"
        if self.metric == "top1":
            correct = self._correct(outputs)
            value, samples = float(correct.mean()), len(correct)
            chance = 1 / outputs.shape[-1]
            if value < chance - 4 * math.sqrt(chance * (1 - chance) / samples):
                raise TaskError(
                    f"{where} is {value:.4f}, below chance ({chance:.4f}): "
                    "check the labels and the preprocessing"
                )
            error = math.sqrt(value * (1 - value) / samples)
            self.reference = Reference(value, error, correct, None)
        else:
            value = self._value(outputs, targets, where)
            values = self._bootstrap(outputs)
            self.reference = Reference(value, _spread(values), None, outputs)
        return self.reference

    def score(self, session: Session) -> Score:
        """Score an artifact against the reference. Raises TaskError where the metric fails."""
        assert self.reference is not None, "set_reference first"
        outputs = self.outputs(session)
        base = self.reference
        where = f"{self.metric_name} on {self.split.name}"
        if self.metric == "top1":
            assert base.correct is not None
            correct = self._correct(outputs)
            value, samples = float(correct.mean()), len(correct)
            error = math.sqrt(value * (1 - value) / samples)
            difference = base.correct.astype(np.float64) - correct
            drop_error = float(difference.std() / math.sqrt(samples))
        else:
            assert base.outputs is not None
            value = self._value(outputs, self._targets(), where)
            values = self._bootstrap(outputs)
            error = _spread(values)
            drop_error = _spread(self._bootstrap(base.outputs) - values)
        return Score(
            metric=self.metric_name,
            value=value,
            standard_error=error,
            drop=base.value - value,
            drop_standard_error=drop_error,
            samples=self.split.samples,
            split=self.split.name,
        )

    def _targets(self) -> Array:
        assert self.split.targets is not None
        return self.split.targets

    def _correct(self, outputs: Array) -> Array:
        targets = self._targets()
        if outputs.ndim < 2:
            raise TaskError(f"top1 needs outputs (samples, classes), not {outputs.shape}")
        if targets.dtype.kind not in "iub" or targets.shape != outputs.shape[:-1]:
            raise TaskError(
                f"{self.split.name}: top1 needs integer labels of shape "
                f"{outputs.shape[:-1]}, not {targets.dtype} of {targets.shape}"
            )
        if targets.size and (targets.min() < 0 or targets.max() >= outputs.shape[-1]):
            raise TaskError(
                f"{self.split.name}: labels go from {targets.min()} to {targets.max()}, "
                f"but the network has {outputs.shape[-1]} outputs"
            )
        known = ~np.isnan(outputs).any(-1)  # an output that is NaN is wrong
        return np.asarray((outputs.argmax(-1) == targets) & known).reshape(-1)

    def _value(self, outputs: Array, targets: Array, where: str) -> float:
        assert callable(self.metric)
        try:
            value = float(self.metric(outputs, targets))
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise TaskError(f"{where}: the metric raised {reason}") from error
        if not math.isfinite(value):
            raise TaskError(f"{where} is {value}")
        return value

    def _bootstrap(self, outputs: Array) -> Array:
        """The metric on resamples of the targets, the same resamples at every call."""
        assert callable(self.metric)
        targets = self._targets()
        count = len(targets)
        grouped = outputs.reshape(count, outputs.shape[0] // count, *outputs.shape[1:])
        generator = np.random.default_rng(self.seed)
        values = []
        for _ in range(BOOTSTRAP):
            rows = generator.integers(0, count, count)
            sample = grouped[rows].reshape(outputs.shape)
            try:
                values.append(float(self.metric(sample, targets[rows])))
            except Exception:
                values.append(math.nan)  # a resample may lack what the metric needs
        return np.asarray(values)


def _spread(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else math.nan


def _pad(array: Array, rows: int) -> Array:
    """Repeat the last sample up to ``rows``."""
    missing = rows - array.shape[0]
    return np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing else array
