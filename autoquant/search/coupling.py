"""What the graph and the space say about layers together: ties, forbidden pairs, boundaries."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.qdq import _JOINS, _MOVES, _POOLS, INT8_KINDS, _unit_end, mode
from autoquant.cost.table import TableModel
from autoquant.errors import SpaceError
from autoquant.graph import PRODUCT, Graph, Layer
from autoquant.search.solver import Boundary, Choices, Forbidden, Ties, shared_choices
from autoquant.space import Space

_THROUGH = ("Relu", "Clip", "Add")  # a sum goes on through these


def tied_groups(graph: Graph, space: Space, choices: Choices) -> tuple[tuple[str, ...], ...]:
    """Groups of layers that ``space.tie`` gives one choice, in graph order; groups that meet
    become one. Raises SpaceError for a pattern without two layers, or without a common choice."""
    found: list[set[str]] = []
    for item in space.tie:
        groups = [set(g) for g in _named(graph, item)]
        if isinstance(item, tuple) and len(groups[0]) < 2:
            raise SpaceError(
                f"space {space.name!r}: tie {', '.join(item)} matches "
                f"{', '.join(groups[0]) or 'no layer'}; a group needs two layers"
            )
        for group in groups:
            for other in [g for g in found if g & group]:
                found.remove(other)
                group |= other
            found.append(group)
    order = list(graph.by_name)
    groups_ = sorted((sorted(g, key=order.index) for g in found), key=lambda g: order.index(g[0]))
    for group_ in groups_:
        shared_choices(choices, group_)
    return tuple(map(tuple, groups_))


def _named(graph: Graph, item: str | tuple[str, ...]) -> list[list[str]]:
    if item == "residual":
        return residual_partners(graph)
    if item == "attention":
        return attention_projections(graph)
    return [[x.name for x in graph.layers if any(fnmatchcase(x.name, p) for p in item)]]


def residual_partners(graph: Graph) -> list[list[str]]:
    """Layers whose outputs meet in an Add, directly or through further Adds."""
    owner = _owners(graph)

    def sources(tensor: str) -> list[str]:
        index = graph.producer.get(tensor)
        if index is None:
            return []
        if index in owner:
            return [owner[index].name]
        if graph.nodes[index].op_type not in _THROUGH:
            return []
        return [s for name in graph.nodes[index].input for s in sources(name)]

    groups = []
    for index, node in enumerate(graph.nodes):
        if node.op_type == "Add" and index not in owner:
            group = list(dict.fromkeys(s for name in node.input for s in sources(name)))
            if len(group) > 1:
                groups.append(group)
    return groups


def attention_projections(graph: Graph) -> list[list[str]]:
    """Products that read the same tensor: query, key and value."""
    readers: dict[str, list[str]] = defaultdict(list)
    for layer in graph.layers:
        if layer.kind in ("MatMul", "Gemm"):
            readers[layer.input].append(layer.name)
    return [group for group in readers.values() if len(group) > 1]


def forbidden_pairs(
    space: Space, graph: Graph, choices: Choices
) -> tuple[tuple[tuple[str, LayerChoice], tuple[str, LayerChoice]], ...]:
    """Every pair of choices of two layers that ``space.forbid`` rules out.

    Raises SpaceError for a side that no choice satisfies.
    """
    found = []
    for index, sides in enumerate(space.forbid):
        first, second = (
            [(n, c) for n, held in choices.items() for c in held if side.matches(n, c)]
            for side in sides
        )
        for side, held in zip(sides, (first, second), strict=True):
            if not held:
                raise SpaceError(
                    f"space {space.name!r}: forbid {index + 1}: no layer that matches "
                    f"{side.layers} has such a choice"
                )
        found += [(a, b) for a in first for b in second if a[0] != b[0]]
    return tuple(dict.fromkeys(found))


def conform(
    candidate: Candidate, choices: Choices, tied: Ties = (), forbidden: Forbidden = ()
) -> Candidate:
    """The candidate as ties and forbidden pairs allow it; itself where it keeps to them.

    A tied group takes its first layer's choice, or the nearest that all of it has. Of a
    forbidden pair the second layer takes the next of its choices that breaks none, upwards
    first. Where no choice of a pair's second layer helps, the pair stays.
    """
    layers = dict(candidate.layers)
    groups = {name: tuple(group) for group in tied for name in group}
    for group in dict.fromkeys(groups.values()):
        wanted = candidate.choice(group[0])
        found = nearest_choice(wanted, shared_choices(choices, group))
        layers.update(dict.fromkeys(group, found))
    for (first, low), (second, high) in forbidden:
        if layers.get(first, FLOAT) != low or layers.get(second, FLOAT) != high:
            continue
        group = groups.get(second, (second,))
        shared = shared_choices(choices, group)
        start = shared.index(high)
        moves = [
            {**layers, **dict.fromkeys(group, c)} for c in (*shared[start + 1 :], *shared[:start])
        ]
        layers = next((moved for moved in moves if not breaks(moved, forbidden)), layers)
    return candidate.normalized(layers) if layers != candidate.layers else candidate


def breaks(layers: Mapping[str, LayerChoice], forbidden: Forbidden) -> bool:
    """Whether choices by layer are a forbidden pair (layers left out are float)."""
    return any(
        layers.get(first, FLOAT) == low and layers.get(second, FLOAT) == high
        for (first, low), (second, high) in forbidden
    )


def nearest_choice(wanted: LayerChoice, offered: Sequence[LayerChoice]) -> LayerChoice:
    """The choice itself, or that of the nearest bits."""
    return min(
        offered,
        key=lambda c: (
            abs(c.weight_bits - wanted.weight_bits),
            abs(c.activation_bits - wanted.activation_bits),
            c != wanted,
        ),
    )


def _owners(graph: Graph) -> dict[int, Layer]:
    """Node → the layer to whose unit it belongs."""
    return {i: layer for layer in graph.layers for i in (layer.node, *layer.absorbed)}


# --- boundaries ------------------------------------------------------------------------------


def boundaries(graph: Graph, choices: Choices, latency: TableModel) -> list[Boundary]:
    """What conversions between int8 and float add to ``latency_ms``, for `solve_exact`.

    The latency model's coefficients times the elements of each tensor, where `Plan.boundaries`
    would count it, for 8-bit inputs. Its constant and the kernels are not part of it.
    """
    held: dict[tuple[str, bool], frozenset[int]] = {}
    for layer in (*graph.layers, *graph.products):
        offered = choices.get(layer.name, (FLOAT,))
        int8 = {i for i, c in enumerate(offered) if mode(layer, c) == "int8"}
        held[layer.name, True] = frozenset(int8)
        held[layer.name, False] = frozenset(range(len(offered))) - int8
    found = []
    for tensor, directions in conversions(graph).items():
        for name, cases in zip(("to_int8", "to_float"), directions, strict=True):
            possible = [
                [(layer, held[layer, value]) for layer, value in sorted(case) if layer in choices]
                for case in cases
                if all(held[literal] for literal in case)
            ]
            cost = latency.coefficients.get(name, 0.0) / 1e6 * graph.tensors[tensor].elements
            cost += latency.coefficients.get(f"{name} each", 0.0)
            if possible and cost > 0:
                found.append(Boundary(possible, cost))
    return found


Literals = frozenset[tuple[str, bool]]  # layers that run in int8 (True) and that do not
Cases = tuple[Literals, ...]  # any of them holds


@dataclass(frozen=True, slots=True)
class _When:
    """When something holds, and when it does not, by which layers run in int8."""

    true: Cases
    false: Cases

    def __or__(self, other: _When) -> _When:
        return _When(_smallest({*self.true, *other.true}), _both(self.false, other.false))

    def __and__(self, other: _When) -> _When:
        return _When(_both(self.true, other.true), _smallest({*self.false, *other.false}))

    def __invert__(self) -> _When:
        return _When(self.false, self.true)


def _both(first: Cases, second: Cases) -> Cases:
    joined = {a | b for a in first for b in second}
    return _smallest({c for c in joined if not any((n, not held) in c for n, held in c)})


def _smallest(cases: set[Literals]) -> Cases:
    """Cases that no smaller one covers, in a fixed order."""
    kept = [c for c in cases if not any(other < c for other in cases)]
    return tuple(sorted(kept, key=lambda c: (len(c), sorted(c))))


_NEVER = _When((), (frozenset(),))


def conversions(graph: Graph) -> dict[str, tuple[Cases, Cases]]:
    """Tensor → when it is converted to int8, and when to float, as `plan` decides it."""
    owner = _owners(graph)

    def int8(layer: Layer) -> _When:
        if layer.kind not in (*INT8_KINDS, PRODUCT):
            return _NEVER
        held, other = (frozenset({(layer.name, value)}) for value in (True, False))
        return _When((held,), (other,))

    def ends(index: int) -> str:
        return str(graph.nodes[_unit_end(graph, index)].output[0])

    joins = {i for i, node in enumerate(graph.nodes) if node.op_type in _JOINS and i not in owner}
    finished = {ends(i): i for i in joins}

    def moves(index: int) -> bool:
        node = graph.nodes[index]
        return index not in owner and node.op_type in (*_MOVES, *_POOLS)

    @functools.cache
    def made(tensor: str) -> _When:
        """When the tensor comes out of an int8 kernel."""
        index = graph.producer.get(tensor)
        if index is None:
            return _NEVER
        if tensor in finished:
            inputs = graph.nodes[finished[tensor]].input
            return functools.reduce(operator.and_, map(available, inputs))
        if index in owner:
            layer = owner[index]
            relu = [graph.nodes[i].op_type for i in layer.absorbed] == ["Relu"]
            quantizes = layer.kind == "Conv" or (layer.kind == "Gemm" and relu)
            return int8(layer) if quantizes and tensor == layer.output else _NEVER
        if moves(index):
            return available(graph.nodes[index].input[0]) & wanted(tensor)
        return _NEVER

    @functools.cache
    def available(tensor: str) -> _When:
        """When a join may take the tensor on a grid."""
        index = graph.producer.get(tensor)
        if index is not None and moves(index):
            found = available(graph.nodes[index].input[0])
        else:
            found = made(tensor)
        return functools.reduce(operator.or_, map(int8, readers(tensor)), found)

    @functools.cache
    def wanted(tensor: str) -> _When:
        """When a reader needs the tensor on a grid."""
        found = functools.reduce(operator.or_, map(int8, readers(tensor)), _NEVER)
        for index in graph.consumers.get(tensor, ()):
            if index in joins:
                found |= made(ends(index))
            elif moves(index):
                found |= available(tensor) & wanted(graph.nodes[index].output[0])
        return found

    def readers(tensor: str) -> list[Layer]:
        indices = graph.consumers.get(tensor, ())
        found = [graph.by_node[i] for i in indices if i in graph.by_node]
        return [layer for layer in found if tensor in layer.inputs]

    def float_read(tensor: str) -> _When:
        """When a reader takes the tensor in float."""
        found = ~_NEVER if tensor in graph.outputs else _NEVER
        for index in graph.consumers.get(tensor, ()):
            if index in graph.by_node:
                found |= ~int8(graph.by_node[index])
            elif index in joins:
                found |= ~made(ends(index))
            elif moves(index):
                found |= ~made(graph.nodes[index].output[0])
            else:
                found |= ~_NEVER
        return found

    inner = graph.hidden | {graph.nodes[i].output[0] for i in joins} - finished.keys()
    return {
        tensor: (
            (wanted(tensor) & ~made(tensor)).true,
            (made(tensor) & float_read(tensor)).true,
        )
        for tensor, kind in graph.tensors.items()
        if tensor not in inner and kind.dtype == "float32"
    }
