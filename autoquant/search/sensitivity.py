"""What each choice of each layer costs in accuracy: the additive prior of the search.

One artifact a layer is measured: that layer alone at an anchor choice, and the divergence of its
outputs from the float network's, in the runtime that scores trials. Other widths follow from the
anchor by the ratio of their weight errors in the bank, which are free: the divergence grows with
the squared error of the layer's output. No labels are read, and validation is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autoquant.calibration import rebatch
from autoquant.candidate import Candidate, LayerChoice
from autoquant.graph import Layer
from autoquant.result import TrialResult
from autoquant.runtime import RUNTIMES, Session, run_batches
from autoquant.search.trial import Context
from autoquant.task import Array

Table = Mapping[str, tuple[float, ...]]  # layer → divergence of each of its choices

_FLOOR = 1e-9


def sensitivity(context: Context, workers: int = 1) -> Table:
    """Divergence of every choice of every layer, one layer changed at a time.

    Evaluates one artifact a layer with choices on ``context.probe``. Values of a layer do not
    fall as its bits do.
    """
    runtime = RUNTIMES[context.hardware.runtime]()
    batches = rebatch([context.probe], 32)
    reference = _outputs(runtime.open(context.compress(Candidate()).model), batches, workers)
    table = {}
    for name, choices in context.choices.items():
        layer = context.graph.by_name[name]
        anchor = _anchor(choices)
        if anchor is None:
            table[name] = tuple(0.0 for _ in choices)
            continue
        model = context.compress(Candidate({name: anchor})).model
        outputs = _outputs(runtime.open(model), batches, workers)
        measured = max(divergence(reference, outputs, context.evaluator.metric == "top1"), _FLOOR)
        base = _error(context, layer, anchor)
        table[name] = _monotone(
            choices,
            [0.0 if c.is_float else measured * _error(context, layer, c) / base for c in choices],
        )
    return table


def divergence(reference: Array, outputs: Array, classes: bool) -> float:
    """Mean KL of the softmax for classes, else mean squared error over the reference's variance.

    ``reference``, ``outputs``: (samples, …). Not finite outputs count as infinitely far.
    """
    if not np.isfinite(outputs).all():
        return float("inf")
    if not classes:
        gap = ((outputs - reference) ** 2).mean()
        return float(gap / max(float(reference.var()), 1e-12))
    p, q = _log_softmax(reference), _log_softmax(outputs)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _outputs(session: Session, batches: Sequence[tuple[Array, ...]], workers: int) -> Array:
    found = run_batches(session, batches, workers)
    return np.concatenate([outputs[0] for outputs in found]).astype(np.float64)


def _anchor(choices: Sequence[LayerChoice]) -> LayerChoice | None:
    """A choice in the middle: low enough to be seen, high enough to be in the linear range."""
    coded = [c for c in choices if not c.is_float]
    return min(coded, key=lambda c: (abs(c.weight_bits - 4), -c.activation_bits), default=None)


def _error(context: Context, layer: Layer, choice: LayerChoice) -> float:
    """Relative squared error that a choice's weights and input add, in arbitrary units."""
    error, total = _FLOOR, 1.0
    if layer.weight:
        weight = context.graph.array(layer.weight)
        total = float((weight.astype(np.float64) ** 2).mean()) or 1.0
    if choice.weight_bits <= 8 or (choice.weight_bits == 16 and choice.int16):
        error += context.bank.get(layer, choice).error / total
    if choice.activation_bits < 32 and layer.kind != "Gather":
        error += 4.0 ** -(choice.activation_bits + 1)
    return error


def _monotone(choices: Sequence[LayerChoice], values: Sequence[float]) -> tuple[float, ...]:
    """Fewer bits never look better: running maximum from the widest choice down.

    Each rounding for itself.
    """
    result = list(values)
    for i, low in enumerate(choices):
        for j, high in enumerate(choices):
            wider = (
                high.weight_bits >= low.weight_bits and high.activation_bits >= low.activation_bits
            )
            same = (high.weight_bits, high.activation_bits) == (
                low.weight_bits,
                low.activation_bits,
            )
            if wider and not same and high.rounding == low.rounding:
                result[i] = max(result[i], values[j])
    return tuple(result)


def predicted(table: Table, choices: Mapping[str, Sequence[LayerChoice]], c: Candidate) -> float:
    """The prior's divergence of a candidate: the sum over its layers."""
    return sum(table[name][list(found).index(c.choice(name))] for name, found in choices.items())


def rank_correlation(
    table: Table, choices: Mapping[str, Sequence[LayerChoice]], results: Sequence[TrialResult]
) -> float:
    """Spearman's correlation of the prior with the measured drops of complete trials."""
    from scipy.stats import spearmanr

    done = [r for r in results if r.status == "complete" and r.score is not None]
    if len(done) < 3:
        return float("nan")
    guess = [predicted(table, choices, r.candidate) for r in done]
    return float(spearmanr(guess, [r.score.drop for r in done if r.score]).statistic)
