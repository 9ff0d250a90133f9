"""What each choice of each layer costs in accuracy: the additive prior of the search.

An estimator gives the divergence of the outputs from the float network's for every choice of
every layer, one layer changed at a time. No labels are read, and validation is not touched.

====================  =====================================================================
``measured``          one artifact a layer and activation width runs in the runtime that scores
                      trials; other weight widths follow by the ratio of their errors
``measured-all``      every choice of every layer runs
``fisher``            one backward pass of the torch module (`fisher`)
``combined``          geometric mean of ``measured`` and ``fisher``
``bank``              error of the layer relative to its weights and input: nothing runs
====================  =====================================================================

All are in the units of `divergence`, and no value of a layer falls as its bits do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autoquant import evaluate
from autoquant.cache import cache_folder, write_atomically
from autoquant.calibration import rebatch
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.qdq import grid
from autoquant.errors import RunError, nearest
from autoquant.graph import Layer
from autoquant.result import TrialResult
from autoquant.runtime import RUNTIMES, Session, run_batches
from autoquant.search.trial import Context, Say, silent
from autoquant.task import Array, Task

if TYPE_CHECKING:
    import torch

Choices = Mapping[str, Sequence[LayerChoice]]
Table = Mapping[str, tuple[float, ...]]  # layer → divergence of each of its choices

AUTO = "auto"
FLOOR = 1e-9
RATE = 3e10  # multiply-accumulates a second that estimates of time reckon with
OPEN = 0.05  # seconds to assemble and open an artifact, likewise
PATIENCE = 120.0  # seconds beyond which ``auto`` leaves measuring to those who ask for it


@dataclass(frozen=True, slots=True)
class Request:
    """What an estimator may use: the context, the torch module where there is one.

    ``base``: the candidate that layers are changed from (default: float). ``notes`` hears
    what was done otherwise than asked.
    """

    context: Context
    module: torch.nn.Module | None = None
    base: Candidate = field(default_factory=Candidate)
    workers: int = 1
    notes: list[str] = field(default_factory=list)


class Unavailable(Exception):
    """The estimator cannot work on this network; says why."""


class Estimator(Protocol):
    """Divergences of all choices. To add one: a function and a line in ``ESTIMATORS``."""

    def __call__(self, request: Request) -> Table:
        """A value for every choice of every layer; raises Unavailable."""
        ...


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A table of divergences, how it was found, and what for (``key``)."""

    table: Table
    choices: Choices
    estimator: str
    seconds: float
    key: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The form of sensitivity.json: layer → choice → divergence under ``layers``."""
        named = {
            name: {str(c): v for c, v in zip(found, self.table[name], strict=True)}
            for name, found in self.choices.items()
        }
        return {
            "estimator": self.estimator,
            "seconds": self.seconds,
            "key": self.key,
            "notes": list(self.notes),
            "layers": named,
        }

    @classmethod
    def from_dict(cls, value: Any, choices: Choices) -> Sensitivity:
        """Read ``to_dict``'s form for the same choices. Raises RunError."""
        try:
            table = {
                name: tuple(float(value["layers"][name][str(c)]) for c in found)
                for name, found in choices.items()
            }
            return cls(
                table,
                choices,
                str(value["estimator"]),
                float(value["seconds"]),
                str(value["key"]),
                tuple(map(str, value["notes"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RunError(f"sensitivity.json does not fit this search: {reason}") from None


def sensitivity(context: Context, workers: int = 1) -> Table:
    """Divergence of every choice of every layer by the ``measured`` estimator."""
    return measured(Request(context, workers=workers))


def estimate(
    context: Context,
    task: Task | None = None,
    *,
    estimator: str = AUTO,
    base: Candidate | None = None,
    workers: int = 1,
    say: Say = silent,
) -> Sensitivity:
    """The sensitivity by an estimator of ``ESTIMATORS``; ``auto`` picks by what there is.

    ``task`` brings the torch module, which ``fisher`` and ``combined`` need; where they are
    not available, another one is taken and ``notes`` says so. ``base``: for the measured ones,
    the candidate that each layer is changed from. Tables are kept in the cache folder by all
    that they depend on. Raises RunError for an unknown name.
    """
    if estimator != AUTO and estimator not in ESTIMATORS:
        raise RunError(f"sensitivity {estimator!r}: {nearest(estimator, [AUTO, *ESTIMATORS])}")
    start = time.perf_counter()
    request = Request(context, _module(task), base or Candidate(), workers)
    key = content_key(context, estimator, base, request.module)
    path = cache_folder() / f"sensitivity-{key}.json"
    known = kept(path, context.choices)
    if known is not None:
        say(f"sensitivity of {len(context.choices)} layers: {known.estimator}, from the cache")
        return known
    chosen = _affordable(request) if estimator == AUTO else estimator
    guess = expected_seconds(request, chosen)
    say(f"sensitivity of {len(context.choices)} layers: {chosen}, about {guess:.0f} s")
    while True:
        try:
            table = ESTIMATORS[chosen](request)
            break
        except Unavailable as error:
            other = _FALLBACK[chosen]
            request.notes.append(f"{chosen}: {error}; {other} instead")
            chosen = other
    for note in request.notes:
        say(f"sensitivity: {note}")
    seconds = time.perf_counter() - start
    say(f"sensitivity: {seconds:.1f} s")
    found = Sensitivity(table, context.choices, chosen, seconds, key, tuple(request.notes))
    with contextlib.suppress(OSError):  # it can be made again
        write_atomically(path, lambda file: file.write(json.dumps(found.to_dict()).encode()))
    return found


def kept(path: Path, choices: Choices) -> Sensitivity | None:
    """What an earlier run left in the cache; None where there is nothing, or it is damaged."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return Sensitivity.from_dict(read, choices)
    except (OSError, ValueError, RunError):
        return None


def priors(
    context: Context, task: Task | None = None, *, workers: int = 1, say: Say = silent
) -> dict[str, Sensitivity]:
    """What a search starts from, by estimator: the parts of the mean where ``auto`` is
    ``combined``, so that the search can tell where they disagree; else ``auto`` alone."""
    chosen = _affordable(Request(context, _module(task), Candidate(), workers))
    names = ("measured", "fisher") if chosen == "combined" else (chosen,)
    found = [estimate(context, task, estimator=n, workers=workers, say=say) for n in names]
    return {result.estimator: result for result in found}


def content_key(
    context: Context,
    estimator: str = AUTO,
    base: Candidate | None = None,
    module: torch.nn.Module | None = None,
) -> str:
    """16 hex digits over what a sensitivity depends on: a stored one of this key still holds."""
    parts = {
        "graph": context.graph.fingerprint,
        "bank": [context.bank.content_key(), context.bank.rounding],
        "calibration": [context.calibration.method, context.calibration.samples],
        "module": None if module is None else repr(module),  # its weights are the graph's
        "dialect": context.hardware.dialect,
        "metric": context.evaluator.metric_name,
        "choices": {n: [c.to_dict() for c in found] for n, found in context.choices.items()},
        "estimator": estimator,
        "base": None if base is None else base.key,
    }
    return digest(parts, context.probe)


def digest(parts: Mapping[str, Any], probe: Sequence[Array]) -> str:
    """16 hex digits over plain values and the inputs that outputs are compared on."""
    found = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for array in probe:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def expected_seconds(request: Request, estimator: str) -> float:
    """A rough estimate of an estimator's time on one core, from MACs alone."""
    context = request.context
    rows, macs = context.probe[0].shape[0], context.graph.macs
    anchors = sum(len(_anchors(found)) for found in context.choices.values())
    every = sum(not c.is_float for found in context.choices.values() for c in found)
    widths = max((len(found) for found in context.choices.values()), default=0)
    run = rows * macs / RATE + OPEN
    backward = min(rows, 256) * macs * (2 + widths) / RATE
    seconds = {
        "measured": anchors * run,
        "measured-all": every * run,
        "fisher": backward,
        "combined": anchors * run + backward,
    }
    return float(seconds.get(estimator, 0.0))


def _affordable(request: Request) -> str:
    """The best estimator that the network allows within ``PATIENCE``."""
    names = ["combined", "fisher"] if request.module is not None else ["measured"]
    if len(request.base.layers):
        names = ["measured"]
    affordable = [n for n in names if expected_seconds(request, n) <= PATIENCE]
    return affordable[0] if affordable else names[-1]


def _module(task: Task | None) -> torch.nn.Module | None:
    return task.model if task is not None and hasattr(task.model, "forward") else None  # type: ignore[return-value]


# --- estimators ------------------------------------------------------------------------------


def measured(request: Request, names: Iterable[str] | None = None, every: bool = False) -> Table:
    """Each layer changed alone in the runtime, on ``context.probe``.

    One anchor a layer and activation width is run, in the middle of the weight widths; the
    others follow by the ratio of their errors (`relative_error`). ``every`` runs all choices.
    Around a base the anchor is the base's own choice, and values count from the layer's last.
    """
    context = request.context
    runtime = RUNTIMES[context.hardware.runtime]()
    batches = rebatch([context.probe], 32)
    classes = context.evaluator.metric == "top1"

    def outputs(candidate: Candidate) -> Array:
        session = runtime.open(context.compress(candidate).model)
        return _outputs(session, batches, request.workers)

    reference = outputs(Candidate())
    table = {}
    for name in names if names is not None else context.choices:
        choices, layer = context.choices[name], context.graph.by_name[name]
        floor, bits = 0.0, 4
        if request.base.layers:
            bits = request.base.choice(name).weight_bits
            best = Candidate({**request.base.layers, name: choices[-1]})
            floor = divergence(reference, outputs(best), classes)

        def found(choice: LayerChoice, name: str = name, floor: float = floor) -> float:
            candidate = Candidate({**request.base.layers, name: choice})
            return max(divergence(reference, outputs(candidate), classes) - floor, FLOOR)

        if every:
            values = [0.0 if c.is_float else found(c) for c in choices]
        else:
            anchors = {
                a: found(a) / relative_error(context, layer, a) for a in _anchors(choices, bits)
            }
            scale = {a.activation_bits: value for a, value in anchors.items()}
            values = [
                0.0 if c.is_float else scale[c.activation_bits] * relative_error(context, layer, c)
                for c in choices
            ]
        table[name] = monotone(choices, values)
    return table


def fisher(request: Request) -> Table:
    """Fisher-weighted output error; layers that the module does not show are measured."""
    found = _fisher(request)
    missing = [name for name in request.context.choices if name not in found]
    if missing:
        request.notes.append(
            f"fisher: no gradient for {', '.join(missing[:4])}"
            + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            + "; measured instead"
        )
        found |= measured(request, missing)
    return {
        name: monotone(choices, found[name]) for name, choices in request.context.choices.items()
    }


def combined(request: Request) -> Table:
    """Geometric mean of ``measured`` and ``fisher``, where a layer has both."""
    gradient, runs = _fisher(request), measured(request)
    table = {}
    for name, choices in request.context.choices.items():
        pairs = zip(runs[name], gradient.get(name, runs[name]), strict=True)
        table[name] = monotone(choices, [math.sqrt(a * b) for a, b in pairs])
    return table


def bank(request: Request) -> Table:
    """Error relative to weights and input, the same weight for every layer: nothing runs."""
    if request.base.layers:
        raise Unavailable("it does not know of a base")
    context = request.context
    return {
        name: monotone(
            choices,
            [
                0.0 if c.is_float else relative_error(context, context.graph.by_name[name], c)
                for c in choices
            ],
        )
        for name, choices in context.choices.items()
    }


def _fisher(request: Request) -> dict[str, tuple[float, ...]]:
    from autoquant.search.fisher import NoGradient, fisher_errors

    if request.module is None:
        raise Unavailable("the task has no torch module")
    if request.base.layers:
        raise Unavailable("gradients are those of the float network, not of a base")
    try:
        return fisher_errors(request.context, request.module)
    except NoGradient as error:
        raise Unavailable(str(error)) from None


ESTIMATORS: dict[str, Estimator] = {
    "combined": combined,
    "measured": measured,
    "measured-all": partial(measured, every=True),
    "fisher": fisher,
    "bank": bank,
}
_FALLBACK = {"combined": "measured", "fisher": "measured", "bank": "measured"}


# --- what they share -------------------------------------------------------------------------


def divergence(reference: Array, outputs: Array, classes: bool) -> float:
    """`evaluate.divergence`, but outputs that are not finite are infinitely far.

    ``reference``, ``outputs``: (samples, …).
    """
    if not np.isfinite(outputs).all():
        return float("inf")
    return evaluate.divergence(reference, outputs, classes)


def _outputs(session: Session, batches: Sequence[tuple[Array, ...]], workers: int) -> Array:
    found = run_batches(session, batches, workers)
    return np.concatenate([outputs[0] for outputs in found]).astype(np.float64)


def _anchors(choices: Sequence[LayerChoice], bits: int = 4) -> list[LayerChoice]:
    """For each activation width the choice nearest to ``bits``: low enough to be seen, high
    enough to be in the linear range."""
    coded = [c for c in choices if not c.is_float]
    found: dict[int, LayerChoice] = {}
    for choice in sorted(coded, key=lambda c: abs(c.weight_bits - bits)):
        found.setdefault(choice.activation_bits, choice)
    return list(found.values())


def relative_error(context: Context, layer: Layer, choice: LayerChoice) -> float:
    """Squared error that a choice adds to a layer's output, over the output's own variance.

    The weight's part is the bank's error over the mean squared weight, the input's the error of
    its grid on the calibration histogram over the input's variance; white inputs are assumed.
    A product of activations has two inputs and no weight.
    """
    error, total = FLOOR, 1.0
    if layer.weight:
        weight = context.graph.array(layer.weight)
        total = float((weight.astype(np.float64) ** 2).mean()) or 1.0
    if choice.weight_bits <= 8 or (choice.weight_bits == 16 and choice.int16):
        error += context.bank.get(layer, choice).error / total
    if choice.activation_bits < 32 and layer.kind != "Gather":
        error += sum(_input_error(context, tensor, choice) for tensor in layer.inputs)
    return error


def _input_error(context: Context, tensor: str, choice: LayerChoice) -> float:
    """Squared error of a grid on its tensor's histogram, over the tensor's variance."""
    centers, counts = context.calibration.histograms[tensor].centers()
    bits, dialect = choice.activation_bits, context.hardware.dialect
    made = grid(context.calibration, tensor, bits, choice.symmetric, dialect)
    codes = np.clip(np.round(centers / made.scale) + made.zero_point, made.low, made.high)
    gap = (codes - made.zero_point) * made.scale - centers
    share = counts / max(counts.sum(), 1)
    variance = float(share @ centers**2) - float(share @ centers) ** 2
    return min(float(share @ gap**2) / max(variance, 1e-12), 1.0)


def monotone(choices: Sequence[LayerChoice], values: Sequence[float]) -> tuple[float, ...]:
    """Fewer bits or zeros never look better: running maximum from the widest choice down.

    Choices of equal bits and zeros keep values of their own, and so does each rounding.
    """
    result = list(values)
    for i, low in enumerate(choices):
        for j, high in enumerate(choices):
            wider = (
                high.weight_bits >= low.weight_bits
                and high.activation_bits >= low.activation_bits
                and (not high.sparsity or high.sparsity == low.sparsity)
            )
            same = (high.weight_bits, high.activation_bits, high.sparsity) == (
                low.weight_bits,
                low.activation_bits,
                low.sparsity,
            )
            alike = (high.rounding, high.codebook) == (low.rounding, low.codebook)
            if wider and not same and alike:
                result[i] = max(result[i], values[j])
    return tuple(result)


def predicted(table: Table, choices: Choices, candidate: Candidate) -> float:
    """The prior's divergence of a candidate: the sum over its layers."""
    return sum(
        table[name][list(found).index(candidate.choice(name))] for name, found in choices.items()
    )


def rank_correlation(table: Table, choices: Choices, results: Sequence[TrialResult]) -> float:
    """Spearman's correlation of the prior with the measured drops of complete trials."""
    from scipy.stats import spearmanr

    done = [r for r in results if r.status == "complete" and r.score is not None]
    if len(done) < 3:
        return float("nan")
    guess = [predicted(table, choices, r.candidate) for r in done]
    return float(spearmanr(guess, [r.score.drop for r in done if r.score]).statistic)
