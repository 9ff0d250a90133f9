"""What structures cost in accuracy and save of each figure: priors beside those of bits.

Of the dimensions ``prune:``, ``rank:`` and ``drop:`` (`dimensions`), each option alone on the
float network: its divergence, in the units of `sensitivity`, and its predicted cost with all
layers at the middle of the bits that they are offered, where fronts lie. Nothing is rounded or
calibrated. Both are additive: a sampler and a solver take them as they take a layer's choices.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoquant.cache import cache_folder, write_atomically
from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.factorize import full_rank
from autoquant.compress.qdq import resolve
from autoquant.compress.structure import Structured, structured
from autoquant.errors import AutoquantError
from autoquant.graph import Layer
from autoquant.result import Cost
from autoquant.runtime import OnnxRuntime
from autoquant.search.dimensions import IMPORTANCE, Options, candidate_of
from autoquant.search.sensitivity import (
    FLOOR,
    OPEN,
    PATIENCE,
    RATE,
    Sensitivity,
    digest,
    kept,
)
from autoquant.search.trial import Context, Say, float_model, silent

KINDS = ("prune", "rank", "drop")
ROWS = 256  # of the probe that structures run on: their divergences are large
_MEASURED = 3  # options of one dimension that run; those between follow
_MADE = 0.05  # seconds to change a graph and read it, that estimates of time reckon with


def structural_dimensions(context: Context) -> dict[str, tuple[Any, ...]]:
    """The dimensions of a context that can have a prior here, with their options."""
    return {
        name: options
        for name, options in context.options.items()
        if name.partition(":")[0] in KINDS and len(options) > 1
    }


def structural_sensitivity(context: Context, say: Say = silent) -> Sensitivity:
    """The divergence of every option of ``prune:``, ``rank:`` and ``drop:``, alone on float.

    Its table is by dimension: 0 for an option that leaves the network as it is, else from at
    most three of a kind that run on the first `ROWS` of the probe, the others between them
    (logarithm linear in what is removed); the more compressed never looks better. Dimensions
    beyond the time that a prior may take, by estimate, and those whose options cannot be made
    are left out, and ``notes`` says so. Tables are kept in the cache folder by what they depend on.
    """
    start = time.perf_counter()
    everything = structural_dimensions(context)
    chosen, guess = _affordable(context, everything)
    key = _key(context, chosen)
    path = cache_folder() / f"structures-{key}.json"
    read = kept(path, chosen)
    if read is not None:
        say(f"sensitivity of {len(read.table)} structural dimensions: from the cache")
        return read
    notes = []
    if len(chosen) < len(everything):
        left = [n for n in everything if n not in chosen]
        notes.append(f"no prior for {_listed(left)}: more than {PATIENCE:.0f} s in all")
    if chosen:
        say(f"sensitivity of {len(chosen)} structural dimensions: about {guess:.0f} s")
    table = {}
    for name, options in chosen.items():
        try:
            table[name] = _divergences(context, name, options)
        except (AutoquantError, np.linalg.LinAlgError) as error:
            notes.append(f"no prior for {name}: {error}")
    for note in notes:
        say(f"sensitivity: {note}")
    seconds = time.perf_counter() - start
    if chosen:
        say(f"sensitivity of structures: {seconds:.1f} s")
    done = {n: chosen[n] for n in table}
    found = Sensitivity(table, done, "structures", seconds, key, tuple(notes))
    if done == chosen:
        with contextlib.suppress(OSError):  # it can be made again
            write_atomically(path, lambda file: file.write(json.dumps(found.to_dict()).encode()))
    return found


def structural_costs(context: Context, names: Sequence[str]) -> dict[str, tuple[Cost, ...]]:
    """The predicted cost of every option of some dimensions, alone, before weights are rounded.

    The layers are at `middle`; a piece of a factorized one takes its layer's choice. Dimensions
    that the device cannot predict are left out.
    """
    layers = {name: middle(choices) for name, choices in context.choices.items()}
    found = {}
    for name in names:
        with contextlib.suppress(AutoquantError, np.linalg.LinAlgError):
            found[name] = tuple(
                _cost(context, Candidate(layers), name, option) for option in context.options[name]
            )
    return found


def additive_costs(
    context: Context, structures: Mapping[str, Sequence[Cost]], name: str
) -> dict[str, tuple[float, ...]]:
    """`Context.additive_cost` with structures beside the layers: what each option adds to the
    cheapest of its dimension, never negative. ``structures``: from `structural_costs`.

    Bits a weight do not fall with the weights that go: there structures add nothing.
    """
    found = context.additive_cost(name)
    for dimension, costs in structures.items():
        values = [float(getattr(cost, name) or 0.0) for cost in costs]
        if name == "average_weight_bits":
            values = [0.0] * len(costs)
        found[dimension] = tuple(value - min(values) for value in values)
    return found


def middle(choices: Sequence[LayerChoice]) -> LayerChoice:
    """The choice in the middle of the bits offered, float aside; of two, that of fewer bits."""
    coded = sorted(
        (c for c in choices if not c.is_float), key=lambda c: (c.weight_bits, c.activation_bits)
    )
    return coded[(len(coded) - 1) // 2] if coded else FLOAT


# --- one dimension ---------------------------------------------------------------------------


def _divergences(context: Context, name: str, options: Sequence[Any]) -> tuple[float, ...]:
    """Of each option of a dimension, by the rules of `structural_sensitivity`."""
    values = dict.fromkeys(range(len(options)), 0.0)
    for indices in _kinds(context, name, options):
        run = _thinned(indices)
        found = [
            max(context.second(_session(_made(context, name, options[i])), ROWS), FLOOR)
            for i in run
        ]
        worst = np.maximum.accumulate(found[::-1])[::-1]  # options go from most compressed to least
        at = [_amount(options[i]) for i in run]
        order = np.argsort(at)
        for i in indices:
            between = np.interp(
                _amount(options[i]), np.array(at)[order], np.log(np.array(worst)[order])
            )
            values[i] = float(np.exp(between))
    return tuple(values.values())


def _kinds(context: Context, name: str, options: Sequence[Any]) -> list[list[int]]:
    """Indices of the options that change the network, those that can be compared together:
    ratios, ranks, polyadic ranks and ``separable`` are no amounts of one thing."""
    found: dict[str, list[int]] = {}
    for i, option in enumerate(options):
        if _changes(context, name, option):
            kind = option.partition(":")[0] if isinstance(option, str) else ""
            found.setdefault(kind, []).append(i)
    return list(found.values())


def _changes(context: Context, name: str, option: Any) -> bool:
    """Whether an option leaves the network other than it is."""
    kind, _, layer = name.partition(":")
    if kind == "rank" and type(option) is int and layer in context.graph.by_name:
        return option < full_rank(context.graph.by_name[layer])
    return candidate_of({name: option}).is_structural


def _thinned(indices: Sequence[int]) -> list[int]:
    """The extremes and one in the middle."""
    if len(indices) <= _MEASURED:
        return list(indices)
    return [indices[0], indices[len(indices) // 2], indices[-1]]


def _amount(option: Any) -> float:
    """What options of a kind differ by: a ratio, or a rank."""
    if isinstance(option, str):
        return float(option.partition(":")[2] or 0)
    return float(option)


def _alone(context: Context, name: str, option: Any) -> Candidate:
    """The candidate that differs from float by one structural change."""
    return candidate_of({**_importance(context), name: option})


def _made(context: Context, name: str, option: Any) -> Structured:
    """The float network with one structural change; not kept among the context's variants."""
    assert context.variants is not None and context.variants.evidence is not None
    alone = _alone(context, name, option)
    return structured(context.graph, alone, context.variants.evidence, context.variants.example)


def _importance(context: Context) -> dict[str, Any]:
    return {n: options[-1] for n, options in context.options.items() if n == IMPORTANCE}


def _session(found: Structured) -> Any:
    return OnnxRuntime().open(float_model(found.graph))  # as what it is compared with


def _cost(context: Context, base: Candidate, name: str, option: Any) -> Cost:
    assert context.variants is not None
    found = context.variants.outline(context, _alone(context, name, option))
    return found.estimate.predict(resolve(found.graph, found.structured.choices(base)))


# --- time and cache --------------------------------------------------------------------------


def _affordable(context: Context, dimensions: Options) -> tuple[dict[str, tuple[Any, ...]], float]:
    """The dimensions, in order, that can be measured within ``PATIENCE``, and the seconds.

    By estimate and not by the clock, so that the same search has the same prior anywhere.
    """
    found, total = {}, 0.0
    evidence = None if context.variants is None else context.variants.evidence
    groups = {} if evidence is None else evidence.channels.groups
    for name, options in dimensions.items():
        kind, _, which = name.partition(":")
        changed: Sequence[str] = ()
        if kind == "rank":
            changed = (which,)
        elif kind == "prune" and which in groups:
            changed = groups[which].readers
        count = sum(len(_thinned(indices)) for indices in _kinds(context, name, options))
        seconds = count * _seconds(context, [context.graph.by_name[n] for n in changed])
        if total + seconds <= PATIENCE:
            found[name] = options
            total += seconds
    return found, total


def _seconds(context: Context, changed: Sequence[Layer]) -> float:
    """About what one structure takes: to make, with a fit of the layers that it changes to the
    moments of their inputs, to open and to run."""
    inputs = [x.parameters / max(1, x.channels) for x in changed if x.group == 1]
    fits = float(sum(n**3 for n in inputs))
    rows = min(ROWS, context.probe[0].shape[0])
    return _MADE + OPEN + (fits + float(rows * context.graph.macs)) / RATE


def _key(context: Context, dimensions: Options) -> str:
    """What the table depends on, with the probe in the place of the calibration data."""
    evidence = None if context.variants is None else context.variants.evidence
    parts = {
        "graph": context.graph.fingerprint,
        "calibration": context.calibration.samples,
        "seed": None if evidence is None else evidence.seed,
        "metric": context.evaluator.metric_name,
        "options": {name: list(map(str, found)) for name, found in dimensions.items()},
        "importance": _importance(context),
        "rows": ROWS,
    }
    return digest(parts, context.probe)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
