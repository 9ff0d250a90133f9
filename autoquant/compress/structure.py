"""The structural part of a candidate: blocks dropped, channels pruned, layers factorized.

All of it happens on the float graph, in milliseconds: the network is lowered once. Names in a
candidate are those of the original graph; `Structured.pieces` says what became of each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from autoquant.calibration import Moments
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.blocks import split
from autoquant.compress.channels import Channels
from autoquant.compress.factorize import can_factorize, check, factorize, full_rank
from autoquant.compress.prune import Evidence, prune
from autoquant.errors import CandidateError, nearest
from autoquant.graph import Graph
from autoquant.task import Array


@dataclass(frozen=True, slots=True)
class Structured:
    """A float graph with the structure of a candidate.

    ``pieces``: original layer → names in ``graph``: one for what is as it was or narrower, two or
    three for a factorized layer, none for what was dropped.
    """

    graph: Graph
    pieces: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def choices(self, candidate: Candidate) -> Candidate:
        """The candidate in the names of ``graph``: a piece takes its layer's choice, or its own.

        What the original does not have, as a student's layers may be, takes the commonest choice
        of all. Raises CandidateError for a layer that neither has.
        """
        known = self.pieces.keys() | self.graph.by_name.keys()
        for name in candidate.layers:
            if name not in known:
                raise CandidateError(f"unknown layer {name!r}; {nearest(name, known)}")
        layers: dict[str, LayerChoice] = {}
        owner = {piece: name for name, found in self.pieces.items() for piece in found}
        every = list(candidate.layers.values())
        common = max(every, key=every.count, default=None)
        for layer in (*self.graph.layers, *self.graph.products):
            own = candidate.layers.get(layer.name)
            found = own or candidate.layers.get(owner.get(layer.name, ""))
            if found is None and layer.name not in owner and layer.weight:
                found = common
            if found is not None:
                layers[layer.name] = found
        return Candidate(layers, polish=candidate.polish, training=candidate.training)


def structured(
    graph: Graph,
    candidate: Candidate,
    evidence: Evidence,
    example: Sequence[Array],
    fitted: bool = True,
) -> Structured:
    """The graph with the candidate's structure; the same each time, outputs of the same shape.

    ``evidence``: of ``graph``, for saliencies and fits. ``fitted``: else the weights are any, and
    all shapes as they will be: enough for costs, in a fifth of the time. Raises CandidateError: an
    unknown group, layer or block (with the nearest name), a ratio that empties a group, a rank
    above the layer's.
    """
    names: dict[str, tuple[str, ...]] = {
        layer.name: (layer.name,) for layer in (*graph.layers, *graph.products)
    }
    for name, rank in candidate.rank.items():
        if name not in graph.by_name:
            raise CandidateError(f"unknown layer {name!r} in rank; {nearest(name, graph.by_name)}")
        check(graph.by_name[name], rank)
    _check_groups(evidence.channels, candidate)
    changed, moments = graph, dict(evidence.moments)
    if candidate.drop:
        changed = Graph.read(drop(graph, candidate.drop), example)
        names = {n: p if n in changed.by_name else () for n, p in names.items()}
    channels = evidence.channels if changed is graph else Channels(changed)
    pruning = {n: r for n, r in candidate.pruning.items() if r and n in channels.groups}
    if pruning:
        gone, model = prune(channels, pruning, candidate.importance, evidence, fitted)
        moments = {
            layer.name: _left(moments[layer.name], channels, layer.name, gone)
            for layer in changed.layers
            if layer.name in moments and layer.name in candidate.rank and fitted
        }
        changed = Graph.read(model, example)
    ranks = {n: r for n, r in candidate.rank.items() if _shrinks(changed, n, r)}
    if ranks:
        model, pieces = factorize(changed, ranks, moments, fitted)
        changed = Graph.read(model, example)
        names |= pieces
    for output in graph.outputs:
        if changed.tensors[output].shape != graph.tensors[output].shape:
            raise CandidateError(
                f"output {output!r} would have shape {changed.tensors[output].shape} in place of "
                f"{graph.tensors[output].shape}"
            )
    return Structured(changed, names)


def _check_groups(channels: Channels, candidate: Candidate) -> None:
    for name in candidate.pruning if any(candidate.pruning.values()) else ():
        if name not in channels.groups:
            raise CandidateError(
                f"unknown channel group {name!r}; {nearest(name, channels.groups)}"
            )


def _shrinks(graph: Graph, name: str, rank: int | str) -> bool:
    """Whether a layer is there still, and wide enough for its rank to be one."""
    layer = graph.by_name.get(name)
    if layer is None or not can_factorize(layer):
        return False
    try:
        check(layer, rank)
    except CandidateError:  # pruned below its rank: there is nothing to gain
        return False
    return isinstance(rank, str) or rank < full_rank(layer)


def _left(moments: Moments, channels: Channels, name: str, gone: set[int]) -> Moments:
    """The moments of the inputs that stay."""
    layer = channels.graph.by_name[name]
    kept = channels.kept(layer.weight, gone)
    if layer.group > 1:
        groups = len(moments.mean)
        stays = kept[0].reshape(groups, -1).any(axis=1)
        return replace(moments, second=moments.second[stays], mean=moments.mean[stays], kept={})
    stays = np.ones(1, bool)
    read = [k for i, k in enumerate(kept) if i != layer.channel_axis]
    if layer.kind == "ConvTranspose":
        read = read[:1]
    for part in read:
        stays = np.logical_and.outer(stays, part).reshape(-1)
    if stays.all():
        return moments
    return replace(
        moments,
        second=moments.second[:, stays][:, :, stays],
        mean=moments.mean[:, stays],
        kept={},
    )


# --- dropping --------------------------------------------------------------------------------


def droppable(graph: Graph) -> dict[str, tuple[str, str]]:
    """Blocks that can be left out: name → the tensors at their entry and exit.

    A block is the layers whose names share a prefix that ends in a number (``layer1.0``,
    ``encoder.3``): all that lies between two tensors of one shape through which everything passes.
    """
    blocks = split(graph)
    owner = [{_prefix(layer.name) for layer in block.layers} for block in blocks]
    found: dict[str, tuple[str, str]] = {}
    for name in dict.fromkeys(p for names in owner for p in names if p):
        index = [i for i, names in enumerate(owner) if name in names]
        first, last = index[0], index[-1]
        alone = all(names == {name} for names in owner[first : last + 1])
        if not alone or sum(len(blocks[i].layers) for i in index) < 2:
            continue
        entry, exit_ = blocks[first].source, blocks[last].target
        if last + 1 < len(blocks) and _belongs(graph, exit_, blocks[last + 1].source, name):
            exit_ = blocks[last + 1].source
        if not entry or exit_ in graph.outputs or entry in graph.hidden:
            continue
        if graph.tensors[entry] == graph.tensors[exit_]:
            found[name] = entry, exit_
    return found


def _prefix(name: str) -> str:
    """The shortest part of a dotted name that ends in a number."""
    parts = name.split(".")[:-1]
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return next(
        (".".join(parts[: i + 1]) for i, p in enumerate(parts) if i and p[-1:].isdigit()), ""
    )


def _belongs(graph: Graph, start: str, end: str, name: str) -> bool:
    """Whether what lies between two tensors has weights, all of them of a block."""
    weights, todo = [], [end]
    while todo:
        tensor = todo.pop()
        if tensor == start or tensor not in graph.producer:
            continue
        node = graph.nodes[graph.producer[tensor]]
        weights += [n for n in node.input if "." in n and n in graph.initializers]
        todo += node.input
    return bool(weights) and all(w.startswith(f"{name}.") for w in weights)


def drop(graph: Graph, names: Sequence[str]) -> onnx.ModelProto:
    """The graph's model without these blocks: what reads a block's exit reads its entry.

    Raises CandidateError for a block that there is not, and where no layer would be left.
    """
    known = droppable(graph)
    rename: dict[str, str] = {}
    for name in names:
        if name not in known:
            raise CandidateError(f"unknown block {name!r} in drop; {nearest(name, known)}")
        entry, exit_ = known[name]
        rename[exit_] = entry
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    for node in model.graph.node:
        for i, tensor in enumerate(node.input):
            while tensor in rename:
                tensor = rename[tensor]
            node.input[i] = tensor
    return model


def to_dict(graph: Graph) -> dict[str, Any]:
    """What ``autoquant inspect`` shows: channel groups, blocks, and the layers' full ranks."""
    return {
        "groups": [group.to_dict() for group in Channels(graph).groups.values()],
        "blocks": list(droppable(graph)),
        "ranks": {x.name: full_rank(x) for x in graph.layers if can_factorize(x)},
    }
