"""Artifact + split → Score: the artifact itself runs in its runtime, nothing is simulated.

A split can be evaluated in stages: every fourth batch, every second, all. After a stage an
artifact stops that is worse than a rival with 99 % confidence, by paired differences on the same
samples: a sign test over samples for top-1, a paired bootstrap for a callable metric.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoquant.calibration import rebatch
from autoquant.errors import ModelError, TaskError
from autoquant.result import Score
from autoquant.runtime import Session, run_batches
from autoquant.task import Array, Metric, Split

BOOTSTRAP = 200  # resamples for the standard error of a callable metric
CONFIDENCE = 0.99  # that a rival is better, for an artifact to stop
STAGES = (4, 2)  # every fourth batch, then every second, then all
_FIRST = 200  # samples of a stage, at least
_FAR = 1e6  # the divergence of outputs that are not finite
_LARGEST = 1 << 19  # results a split whose evidence is kept, at most
_ROWS = 4096  # of outputs at a time


@dataclass(frozen=True, slots=True)
class Reference:
    """The float network on one split: its metric, per-sample correctness, and outputs."""

    value: float
    standard_error: float
    correct: Array | None
    outputs: Array


@dataclass(frozen=True, slots=True)
class Assessment:
    """A score, and how it came about.

    ``stopped``: it is of a part of the split, on which a rival was better. ``evidence``: what
    others are compared with, as text; None for one that stopped, or of a very large split.
    """

    score: Score
    stopped: bool
    evidence: str | None


def divergence(
    reference: Array, outputs: Array, classes: bool, variance: float | None = None
) -> float:
    """Mean KL of the softmax for classes, else mean squared error over the reference's variance.

    ``reference``, ``outputs``: (samples, …), classes last. ``variance``: of the reference, where
    it is part of a larger one. Outputs that are not finite count as a million.
    """
    total = 0.0
    for at in range(0, len(outputs), _ROWS):
        p = reference[at : at + _ROWS].astype(np.float64)
        q = outputs[at : at + _ROWS].astype(np.float64)
        if not np.isfinite(q).all():
            return _FAR
        if classes:
            p, q = _log_softmax(p), _log_softmax(q)
            total += float((np.exp(p) * (p - q)).sum(-1).mean()) * len(q)
        else:
            total += float(((q - p) ** 2).mean()) * len(q)
    if not classes:
        spread = float(reference.astype(np.float64).var()) if variance is None else variance
        total /= max(spread, 1e-12)
    return min(max(total / max(len(outputs), 1), 0.0), _FAR)


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


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
            self.batches = [tuple(pad(a, rows) for a in batch) for batch in self.batches]
        self.rows = [a[0].shape[0] for a in rebatch(split.batches, rows)]
        self.reference: Reference | None = None
        self.variance = 1.0  # of the float network's outputs

    def outputs(self, session: Session, part: Sequence[int] | None = None) -> Array:
        """The first output over the whole split, or over some of its batches, concatenated.

        Raises ModelError where the model cannot run, or its output is not one row a sample.
        """
        chosen = range(len(self.batches)) if part is None else part
        batches = [self.batches[i] for i in chosen]
        try:
            results = run_batches(session, batches, self.workers)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"running the model on {self.split.name} failed: {reason}") from None
        parts = [np.asarray(out[0]) for out in results]
        shapes = sorted({p.shape for p in parts})
        for found, batch in zip(parts, batches, strict=True):
            if found.shape[:1] != batch[0].shape[:1] or found.shape[1:] != parts[0].shape[1:]:
                raise ModelError(
                    f"the first output on {self.split.name} must have a row a sample, all of one "
                    f"shape; it has {', '.join(map(str, shapes[:4]))}"
                )
        rows = [self.rows[i] for i in chosen]
        return np.concatenate([found[:count] for found, count in zip(parts, rows, strict=True)])

    def set_reference(self, session: Session) -> Reference:
        """Score the float network; every later score is compared with it.

        Raises TaskError where the metric fails, is NaN, or is far below chance.
        """
        outputs = self.outputs(session)
        targets = self._targets()
        where = f"{self.metric_name} of the float network on {self.split.name}"
        self.variance = float(outputs.astype(np.float64).var())
        if self.metric == "top1":
            correct = self._correct(outputs, targets)
            value, samples = float(correct.mean()), len(correct)
            chance = 1 / outputs.shape[-1]
            if value < chance - 4 * math.sqrt(chance * (1 - chance) / samples):
                raise TaskError(
                    f"{where} is {value:.4f}, below chance ({chance:.4f}): "
                    "check the labels and the preprocessing"
                )
            error = math.sqrt(value * (1 - value) / samples)
            self.reference = Reference(value, error, correct, outputs)
        else:
            value = self._value(outputs, targets, where)
            values = self._bootstrap(outputs, targets)
            self.reference = Reference(value, _spread(values), None, outputs)
        return self.reference

    def score(self, session: Session) -> Score:
        """Score an artifact against the reference. Raises TaskError where the metric fails."""
        return self.assess(session).score

    def assess(self, session: Session, rival: str | None = None) -> Assessment:
        """Score an artifact, in stages where there is the ``evidence`` of a rival.

        The score of the same artifact on the same samples is the same, however it came about.
        Raises TaskError where the metric fails.
        """
        assert self.reference is not None, "set_reference first"
        stages = self.stages()
        seen: dict[int, Array] = {}
        for number, part in enumerate(stages if rival is not None else ()):
            self._run(session, part, seen)
            outputs, rows, targets = self._part(part, seen)
            try:
                if self._beaten(outputs, rows, targets, str(rival), number, len(stages)):
                    return Assessment(self._score(outputs, rows, targets), True, None)
            except TaskError:  # a metric may need what a part lacks
                continue
        whole = list(range(len(self.batches)))
        self._run(session, whole, seen)
        outputs, rows, targets = self._part(whole, seen)
        score = self._score(outputs, rows, targets)
        return Assessment(score, False, self._evidence(outputs, seen))

    def stages(self) -> list[list[int]]:
        """The batches of each stage but the last; none where the split is too small."""
        per_target = max(1, sum(self.rows) // max(1, self.split.samples))
        if any(rows % per_target for rows in self.rows):
            return []
        found = []
        for step in STAGES if self.metric == "top1" else STAGES[:1]:
            part = list(range(0, len(self.batches), step))
            samples = sum(self.rows[i] for i in part) // per_target
            if samples >= _FIRST and len(part) < len(self.batches):
                found.append(part)
        return found

    def _run(self, session: Session, part: Sequence[int], seen: dict[int, Array]) -> None:
        """Outputs of the batches of a part that were not run before."""
        missing = [i for i in part if i not in seen]
        if not missing:
            return
        found, at = self.outputs(session, missing), 0
        for i in missing:
            seen[i] = found[at : at + self.rows[i]]
            at += self.rows[i]

    def _part(self, part: Sequence[int], seen: dict[int, Array]) -> tuple[Array, Array, Array]:
        """Outputs, rows of the split's outputs, and targets of some batches."""
        starts = np.concatenate([[0], np.cumsum(self.rows)])
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in part])
        per_target = max(1, sum(self.rows) // max(1, self.split.samples))
        targets = self._targets()
        if len(part) < len(self.batches):
            targets = targets[rows[::per_target] // per_target]
        return np.concatenate([seen[i] for i in part]), rows, targets

    def _score(self, outputs: Array, rows: Array, targets: Array) -> Score:
        base = self.reference
        assert base is not None
        whole = len(rows) == len(base.outputs)
        where = f"{self.metric_name} on {self.split.name}"
        reference = base.outputs if whole else base.outputs[rows]
        if self.metric == "top1":
            assert base.correct is not None
            correct = self._correct(outputs, targets)
            right = base.correct if whole else _grouped(base.correct, base.outputs)[rows].ravel()
            value, samples = float(correct.mean()), len(correct)
            error = math.sqrt(value * (1 - value) / samples)
            difference = right.astype(np.float64) - correct
            drop_error = float(difference.std() / math.sqrt(samples))
            drop = (base.value if whole else float(right.mean())) - value
        else:
            value = self._value(outputs, targets, where)
            values = self._bootstrap(outputs, targets)
            error = _spread(values)
            drop_error = _spread(self._bootstrap(reference, targets) - values)
            drop = (base.value if whole else self._value(reference, targets, where)) - value
        return Score(
            metric=self.metric_name,
            value=value,
            standard_error=error,
            drop=drop,
            drop_standard_error=drop_error,
            samples=self.split.samples if whole else len(targets),
            split=self.split.name,
            divergence=divergence(reference, outputs, self.metric == "top1", self.variance),
        )

    def _evidence(self, outputs: Array, seen: dict[int, Array]) -> str | None:
        """Top-1: which results were right, a bit each. Else: the metric of each stage and on
        its resamples, float32."""
        if not self.stages():
            return None
        if self.metric == "top1":
            correct = self._correct(outputs, self._targets())
            if correct.size > _LARGEST:
                return None
            return base64.b64encode(np.packbits(correct).tobytes()).decode()
        found = []
        for part in self.stages():
            some, _, targets = self._part(part, seen)
            try:
                value = self._value(some, targets, "")
            except TaskError:
                return None
            found.append(np.concatenate([[value], self._bootstrap(some, targets)]))
        return base64.b64encode(np.array(found, dtype=np.float32).tobytes()).decode()

    def _beaten(
        self, outputs: Array, rows: Array, targets: Array, rival: str, stage: int, stages: int
    ) -> bool:
        """Whether the rival is better on these samples, with the confidence of one look."""
        level = (1 - CONFIDENCE) / stages
        base = self.reference
        assert base is not None
        data = base64.b64decode(rival)
        if self.metric == "top1":
            assert base.correct is not None
            theirs = np.unpackbits(np.frombuffer(data, np.uint8))[: base.correct.size]
            correct = self._correct(outputs, targets).astype(np.float64)
            gap = _grouped(theirs, base.outputs)[rows] - correct.reshape(len(rows), -1)
            worse = gap.mean(axis=1)
            return float(worse.mean()) > 0 and _sign_test(worse) < level
        values = np.frombuffer(data, np.float32).reshape(-1, 1 + BOOTSTRAP)[stage]
        value = self._value(outputs, targets, "")
        gaps = values[1:] - self._bootstrap(outputs, targets)
        gaps = gaps[np.isfinite(gaps)]
        return len(gaps) > 1 and bool(values[0] > value) and float((gaps <= 0).mean()) < level

    def _targets(self) -> Array:
        assert self.split.targets is not None
        return self.split.targets

    def _correct(self, outputs: Array, targets: Array) -> Array:
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

    def _bootstrap(self, outputs: Array, targets: Array) -> Array:
        """The metric on resamples of the targets, the same resamples at every call."""
        assert callable(self.metric)
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


def _grouped(correct: Array, outputs: Array) -> Array:
    """(rows of the outputs, results a row)."""
    return correct.reshape(len(outputs), -1)


def _sign_test(differences: Array) -> float:
    """One-sided p-value that positive differences are no likelier than negative ones."""
    from scipy.special import bdtrc  # scipy.stats takes a second to import

    positive, negative = int((differences > 0).sum()), int((differences < 0).sum())
    return float(bdtrc(positive - 1, positive + negative, 0.5)) if positive else 1.0


def _spread(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1)) if len(finite) > 1 else math.nan


def pad(array: Array, rows: int) -> Array:
    """Repeat the last sample up to ``rows``."""
    missing = rows - array.shape[0]
    return np.concatenate([array, np.repeat(array[-1:], missing, 0)]) if missing else array
