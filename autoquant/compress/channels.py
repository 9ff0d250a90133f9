"""Channels of a float graph that go together, and the graph without some of them.

Every index of every axis gets a label; an operator says which labels are one: a convolution reads
the channels that its input has, a sum adds like to like, a reshape to heads makes one label of a
head's channels. What shares a label is removed together or not at all. Labels of graph inputs and
outputs, and of what an unknown operator touches, stay. Labels that the same axes have form a
`ChannelGroup`, named after the first layer that makes its channels (dependency graphs: Fang et al.
2023, DepGraph; here on the ONNX graph, so that files and reshapes to heads are covered).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from autoquant.graph import Graph, attributes
from autoquant.task import Array

_STAYS = 0  # the label of what cannot be removed
Axes = list[Array]  # one array of labels for each axis

_SAME = (
    *("Relu", "Clip", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSwish", "HardSigmoid", "LeakyRelu"),
    *("Elu", "Selu", "Celu", "Sqrt", "Exp", "Log", "Neg", "Abs", "Cast", "Identity", "Dropout"),
    *("Reciprocal", "Softplus", "Softsign", "Mish", "Not", "Sign", "Floor", "Ceil", "Round"),
)
_ELEMENTWISE = (
    *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean", "Where", "PRelu"),
    *("And", "Or", "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual"),
)
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare")
_POOLS = ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that can be removed, unit by unit.

    ``labels``: a unit each, in the order of the first layer's channels. ``size``: channels of that
    layer that a unit has (32 for a head of 32). ``makers``: layers whose outputs are among them,
    ``readers``: those that take them as inputs. ``members``: the (initializer, axis) pairs.
    """

    name: str
    labels: tuple[int, ...]
    size: int
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    members: tuple[tuple[str, int], ...]

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.labels)

    def to_dict(self) -> dict[str, Any]:
        """What ``autoquant inspect --json`` shows of a group."""
        return {
            "name": self.name,
            "units": self.units,
            "channels": self.units * self.size,
            "makers": list(self.makers),
            "readers": list(self.readers),
        }


class Channels:
    """The labels of a graph, traced once. ``axes``: by tensor or initializer, for each axis."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        trace = _Trace(graph)
        self.labels = len(trace.parent)
        self.axes = {name: [trace.roots(a) for a in axes] for name, axes in trace.axes.items()}

    @cached_property
    def groups(self) -> dict[str, ChannelGroup]:
        """By name, in graph order."""
        held: dict[int, set[tuple[str, int]]] = defaultdict(set)
        for name in self.graph.initializers:
            for axis, labels in enumerate(self.axes.get(name, ())):
                for label in np.unique(labels):
                    held[int(label)].add((name, axis))
        made: dict[frozenset[tuple[str, int]], list[tuple[str, Array]]] = {}
        taken: set[int] = {_STAYS}
        for layer in self.graph.layers:
            labels = self.axes[layer.weight][_made_axis(layer.kind, layer.channel_axis)]
            for label in dict.fromkeys(labels.tolist()):
                if label not in taken:
                    taken.add(label)
                    made.setdefault(frozenset(held[label]), []).append((layer.name, label))
        found: dict[str, ChannelGroup] = {}
        for members, units in made.items():
            first, count = units[0][0], 2
            name = first
            while name in found:
                name, count = f"{first}#{count}", count + 1
            layer = self.graph.by_name[first]
            own = self.axes[layer.weight][_made_axis(layer.kind, layer.channel_axis)]
            found[name] = ChannelGroup(
                name,
                tuple(int(label) for _, label in units),
                int((own == units[0][1]).sum()),
                tuple(x.name for x in self.graph.layers if self._has(x, members, made=True)),
                tuple(x.name for x in self.graph.layers if self._has(x, members, made=False)),
                tuple(sorted(members)),
            )
        return {n: g for n, g in found.items() if g.units > 1}

    @staticmethod
    def _has(layer: Any, members: Collection[tuple[str, int]], made: bool) -> bool:
        axis = _made_axis(layer.kind, layer.channel_axis)
        return any(name == layer.weight and (a == axis) is made for name, a in members)

    def kept(self, name: str, gone: Collection[int]) -> list[Array]:
        """For each axis of a tensor or initializer, whether each index stays."""
        stays = np.ones(self.labels, bool)
        stays[list(gone)] = False
        return [stays[labels] for labels in self.axes[name]]

    def without(self, gone: Collection[int]) -> onnx.ModelProto:
        """The graph's model without what has these labels; other weights are unchanged."""
        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        arrays: dict[str, Array] = {}
        for proto in model.graph.initializer:
            if proto.name not in self.axes:
                continue
            kept = self.kept(proto.name, gone)
            if all(k.all() for k in kept):
                continue
            array = self.graph.array(proto.name)
            array = np.ascontiguousarray(array[np.ix_(*kept)])
            proto.CopyFrom(numpy_helper.from_array(array, proto.name))
        for node in model.graph.node:
            for position, value in self._settings(node, gone).items():
                if isinstance(position, str):
                    kept_attributes = [a for a in node.attribute if a.name != position]
                    del node.attribute[:]
                    node.attribute.extend(kept_attributes)
                    if value is not None:
                        node.attribute.append(helper.make_attribute(position, value))
                    continue
                name = f"{node.output[0]}.{position}"
                arrays[name] = value
                while len(node.input) <= position:
                    node.input.append("")
                node.input[position] = name
        model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
        return model

    def _settings(self, node: onnx.NodeProto, gone: Collection[int]) -> dict[int | str, Any]:
        """Attributes (by name) and inputs (by position) of a node that counts of channels set."""
        edit = _EDITS.get(node.op_type)
        touched = [n for n in (*node.input, *node.output) if n in self.axes]
        if edit is None or all(k.all() for n in touched for k in self.kept(n, gone)):
            return {}
        return edit(self, node, gone)


def _made_axis(kind: str, channel_axis: int) -> int:
    """The axis of a layer's weight along which its output's channels lie."""
    return 1 if kind == "Gather" else channel_axis


# --- what counts of channels set in a node ---------------------------------------------------

_Edit = Callable[[Channels, onnx.NodeProto, Collection[int]], dict[int | str, Any]]


def _conv_groups(c: Channels, node: onnx.NodeProto, gone: Collection[int]) -> dict[int | str, Any]:
    groups = int(attributes(node).get("group", 1))
    inputs = c.axes[node.input[0]][1]
    if groups == 1 or groups != len(inputs):
        return {}
    return {"group": int(c.kept(node.input[0], gone)[1].sum())}


def _new_shape(c: Channels, node: onnx.NodeProto, gone: Collection[int]) -> dict[int | str, Any]:
    """A reshape's constant with the new counts; a computed shape becomes one that copies."""
    before, after = c.axes[node.input[0]], c.axes[node.output[0]]
    counts = [int(k.sum()) for k in c.kept(node.output[0], gone)]
    if node.input[1] in c.graph.initializers:
        given = c.graph.array(node.input[1]).tolist()
        made = [n if v > 0 else v for n, v in zip(counts, given, strict=True)]
        return {1: np.array(made, np.int64)}
    made, same = [], True
    for i, count in enumerate(counts):
        same = same and i < len(before) and np.array_equal(before[i], after[i])
        made.append(0 if same else count)
    return {1: np.array(made, np.int64), "allowzero": None}  # a zero copies


def _new_slice(c: Channels, node: onnx.NodeProto, gone: Collection[int]) -> dict[int | str, Any]:
    arrays = [c.graph.array(n).reshape(-1).tolist() for n in list(node.input)[1:3]]
    rank = len(c.axes[node.input[0]])
    axes = list(range(len(arrays[0])))
    if len(node.input) > 3 and node.input[3]:
        axes = [a % rank for a in c.graph.array(node.input[3]).reshape(-1).tolist()]
    kept = c.kept(node.input[0], gone)
    starts, ends = [], []
    for axis, start, end in zip(axes, *arrays, strict=True):
        low, high, _ = slice(start, end).indices(len(kept[axis]))
        if kept[axis].all():
            low, high = start, end
        else:
            low, high = int(kept[axis][:low].sum()), int(kept[axis][:high].sum())
        starts.append(low)
        ends.append(high)
    return {1: np.array(starts, np.int64), 2: np.array(ends, np.int64)}


def _new_split(c: Channels, node: onnx.NodeProto, gone: Collection[int]) -> dict[int | str, Any]:
    axis = int(attributes(node).get("axis", 0)) % len(c.axes[node.input[0]])
    sizes = [int(c.kept(name, gone)[axis].sum()) for name in node.output]
    return {"num_outputs": None, 1: np.array(sizes, np.int64)}


def _new_pad(c: Channels, node: onnx.NodeProto, gone: Collection[int]) -> dict[int | str, Any]:
    rank = len(c.axes[node.output[0]])
    pads = _full_pads(c.graph, node, rank)
    kept = c.kept(node.output[0], gone)
    for axis in range(rank):
        if not kept[axis].all():
            low, high = pads[axis], pads[rank + axis]
            pads[axis] = int(kept[axis][:low].sum())
            pads[rank + axis] = int(kept[axis][len(kept[axis]) - high :].sum())
    return {1: np.array(pads, np.int64), **({3: None} if len(node.input) > 3 else {})}


def _full_pads(graph: Graph, node: onnx.NodeProto, rank: int) -> list[int]:
    """Pads before each axis, then after each."""
    given = graph.array(node.input[1]).tolist()
    if len(node.input) < 4 or not node.input[3]:
        return [int(v) for v in given]
    axes = [a % rank for a in graph.array(node.input[3]).reshape(-1).tolist()]
    pads = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        pads[axis], pads[rank + axis] = int(given[i]), int(given[len(axes) + i])
    return pads


_EDITS: dict[str, _Edit] = {
    "Conv": _conv_groups,
    "Reshape": _new_shape,
    "Expand": _new_shape,
    "Slice": _new_slice,
    "Split": _new_split,
    "Pad": _new_pad,
}


# --- tracing ---------------------------------------------------------------------------------


class _Unknown(Exception):
    """An operator, or a use of one, that labels do not pass."""


class _Trace:
    """Labels as they are made, with a disjoint-set forest over them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parent = [_STAYS]
        self.axes: dict[str, Axes] = {}
        for name in graph.inputs:
            self.axes[name] = self._still(graph.tensors[name].shape)
        for node in graph.nodes:
            self._node(node)
        for name in graph.outputs:
            self._fix(self.axes.get(name, []))

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def roots(self, labels: Array) -> Array:
        return np.array([self.find(int(x)) for x in labels], np.int64)

    def fresh(self, count: int) -> Array:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def join(self, first: Array, second: Array) -> None:
        """Make labels one, index by index."""
        if len(first) != len(second):
            raise _Unknown
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            a, b = self.find(a), self.find(b)
            if a != b:
                self.parent[max(a, b)] = min(a, b)

    def tie(self, labels: Array) -> int:
        """Make all of these one label."""
        self.join(labels[:-1], labels[1:])
        return self.find(int(labels[0]))

    def still(self, count: int) -> Array:
        return np.zeros(count, np.int64)

    def _still(self, shape: Sequence[int]) -> Axes:
        return [self.still(n) for n in shape]

    def _fix(self, axes: Axes) -> None:
        for labels in axes:
            self.join(labels, self.still(len(labels)))

    def of(self, name: str) -> Axes:
        """The labels of a tensor; an initializer's come to be when it is first read."""
        if name not in self.axes:
            if name in self.graph.initializers:
                shape = self.graph.initializers[name].dims
                self.axes[name] = [self.fresh(n) if n > 1 else self.still(n) for n in shape]
            elif name in self.graph.tensors:
                self.axes[name] = self._still(self.graph.tensors[name].shape)
            else:
                raise _Unknown
        return self.axes[name]

    def _node(self, node: onnx.NodeProto) -> None:
        rule = _RULES.get(node.op_type)
        try:
            if rule is None or any(a.HasField("g") for a in node.attribute):
                raise _Unknown
            found = rule(self, node)
            for name, axes in zip(node.output, found, strict=False):
                if name in self.graph.tensors:
                    shape = self.graph.tensors[name].shape
                    if tuple(map(len, axes)) != tuple(shape):
                        raise _Unknown
                    self.axes[name] = axes
        except (_Unknown, KeyError, IndexError):
            for name in node.input:
                if name and (name in self.axes or name in self.graph.initializers):
                    self._fix(self.of(name))
            for name in node.output:
                if name in self.graph.tensors:
                    self.axes[name] = self._still(self.graph.tensors[name].shape)

    def constant(self, name: str) -> list[int]:
        """An initializer of whole numbers."""
        if name not in self.graph.initializers:
            raise _Unknown
        return [int(v) for v in self.graph.array(name).reshape(-1)]


def _conv(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    x, weight = t.of(node.input[0]), t.of(node.input[1])
    if node.input[1] not in t.graph.initializers:
        raise _Unknown
    group, made, inputs = int(attributes(node).get("group", 1)), weight[0], x[1]
    for spatial in weight[2:]:
        t.join(spatial, t.still(len(spatial)))
    if group == 1:
        t.join(weight[1], inputs)
    elif group == len(inputs):  # depthwise: each channel goes with the outputs that it makes
        t.join(made, np.repeat(inputs, len(made) // group))
    else:  # the same of each group, so that groups stay alike
        for labels in (inputs.reshape(group, -1), made.reshape(group, -1)):
            for row in labels[1:]:
                t.join(labels[0], row)
        t.join(weight[1], inputs[: len(weight[1])])
    if len(node.input) > 2 and node.input[2]:
        t.join(t.of(node.input[2])[0], made)
    shape = t.graph.tensors[node.output[0]].shape
    return [[x[0], made, *(t.still(n) for n in shape[2:])]]


def _conv_transpose(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    x, weight = t.of(node.input[0]), t.of(node.input[1])
    if int(attributes(node).get("group", 1)) != 1:
        raise _Unknown
    for spatial in weight[2:]:
        t.join(spatial, t.still(len(spatial)))
    t.join(weight[0], x[1])
    if len(node.input) > 2 and node.input[2]:
        t.join(t.of(node.input[2])[0], weight[1])
    shape = t.graph.tensors[node.output[0]].shape
    return [[x[0], weight[1], *(t.still(n) for n in shape[2:])]]


def _gemm(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    found = attributes(node)
    x, weight = t.of(node.input[0]), t.of(node.input[1])
    x = x[::-1] if found.get("transA", 0) else x
    weight = weight[::-1] if found.get("transB", 0) else weight
    t.join(x[1], weight[0])
    if len(node.input) > 2 and node.input[2]:
        bias = t.of(node.input[2])
        if bias and len(bias[-1]) > 1:
            t.join(bias[-1], weight[1])
    return [[x[0], weight[1]]]


def _matmul(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    a, b = t.of(node.input[0]), t.of(node.input[1])
    if min(len(a), len(b)) < 2:
        raise _Unknown
    t.join(a[-1], b[-2])
    return [[*_broadcast(t, [a[:-2], b[:-2]]), a[-2], b[-1]]]


def _broadcast(t: _Trace, parts: Sequence[Axes]) -> Axes:
    """Labels of what several arrays are broadcast to."""
    rank, found = max(map(len, parts)), []
    for axis in range(-rank, 0):
        lines = [p[axis] for p in parts if len(p) >= -axis]
        wide = [line for line in lines if len(line) > 1] or lines[:1]
        for line in wide[1:]:
            t.join(wide[0], line)
        found.append(wide[0])
    return found


def _elementwise(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    return [_broadcast(t, [t.of(name) for name in node.input])]


def _same(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    return [t.of(node.input[0])]


def _softmax(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    over = axes[int(attributes(node).get("axis", -1))]
    t.join(over, t.still(len(over)))
    return [axes]


def _layer_norm(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    first = int(attributes(node).get("axis", -1)) % len(axes)
    for name in list(node.input)[1:]:
        if name:
            for own, given in zip(t.of(name), axes[first:], strict=True):
                t.join(own, given)
    return [axes]


def _channel_norm(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    for name in list(node.input)[1:]:
        t.join(t.of(name)[0], axes[1])
    return [axes]


def _pool(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    shape = t.graph.tensors[node.output[0]].shape
    return [[*axes[:2], *(t.still(n) for n in shape[2:])]]


def _reduce(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes, found = t.of(node.input[0]), attributes(node)
    given = found.get("axes")
    if given is None and len(node.input) > 1 and node.input[1]:
        given = t.constant(node.input[1])
    over = {a % len(axes) for a in given} if given is not None else set(range(len(axes)))
    kept: Axes = []
    for i, labels in enumerate(axes):
        if i not in over:
            kept.append(labels)
            continue
        t.join(labels, t.still(len(labels)))
        if found.get("keepdims", 1):
            kept.append(t.still(1))
    return [kept]


def _transpose(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    return [[axes[i] for i in attributes(node).get("perm", range(len(axes))[::-1])]]


def _reshape(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    """Axes that are kept, split (the first part has the labels) or merged."""
    axes = t.of(node.input[0])
    shape = t.graph.tensors[node.output[0]].shape
    found: Axes = []
    i = j = 0
    while i < len(axes) or j < len(shape):
        before, after = axes[i : i + 1], list(shape[j : j + 1])
        i, j = i + len(before), j + len(after)
        while _size(before) != int(np.prod(after)):
            if _size(before) < np.prod(after) and i < len(axes):
                before, i = [*before, axes[i]], i + 1
            elif j < len(shape):
                after, j = [*after, shape[j]], j + 1
            else:
                raise _Unknown
        found += _regrouped(t, before, after)
    return [found]


def _size(axes: Axes) -> int:
    return int(np.prod([len(a) for a in axes]))


def _regrouped(t: _Trace, before: Axes, after: Sequence[int]) -> Axes:
    wide = [a for a in before if len(a) > 1]
    sizes = [n for n in after if n > 1]
    if len(wide) <= 1 and len(sizes) <= 1:  # the same, but for axes of one
        return [wide[0] if n > 1 else t.still(n) for n in after]
    if len(wide) == 1:  # split
        labels = wide[0].reshape(after)
        # of three parts, the first of them three, the second has the heads: query, key and value
        carrier = 1 if len(after) == 3 and after[0] == 3 else list(after).index(sizes[0])
        lines = np.moveaxis(labels, carrier, 0).reshape(after[carrier], -1)
        tied = np.array([t.tie(line) for line in lines])
        return [tied if k == carrier else t.still(n) for k, n in enumerate(after)]
    if len(sizes) == 1:  # merged
        moving = [k for k, a in enumerate(before) if any(t.find(int(x)) != _STAYS for x in a)]
        if len(moving) > 1:
            raise _Unknown
        count = [len(a) for a in before]
        line = before[moving[0]] if moving else before[0]
        at = moving[0] if moving else 0
        spread = np.broadcast_to(
            line.reshape([-1 if k == at else 1 for k in range(len(count))]), count
        )
        merged = spread.reshape(-1)
        return [merged if n > 1 else t.still(n) for n in after]
    raise _Unknown


def _flatten(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axis = int(attributes(node).get("axis", 1))
    axes = t.of(node.input[0])
    shape = t.graph.tensors[node.output[0]].shape
    first, second = axes[:axis], axes[axis:]
    return [[*_regrouped(t, first, shape[:1]), *_regrouped(t, second, shape[1:])]]


def _concat(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    parts = [t.of(name) for name in node.input]
    axis = int(attributes(node)["axis"]) % len(parts[0])
    found: Axes = []
    for i in range(len(parts[0])):
        if i == axis:
            found.append(np.concatenate([p[i] for p in parts]))
            continue
        for other in parts[1:]:
            t.join(parts[0][i], other[i])
        found.append(parts[0][i])
    return [found]


def _split(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    axis = int(attributes(node).get("axis", 0)) % len(axes)
    found, start = [], 0
    for name in node.output:
        count = t.graph.tensors[name].shape[axis]
        part = axes[axis][start : start + count]
        found.append([part if i == axis else a for i, a in enumerate(axes)])
        start += count
    return found


def _slice(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = list(t.of(node.input[0]))
    starts, ends = (t.constant(name) for name in list(node.input)[1:3])
    extra = [*list(node.input)[3:], "", ""]
    where = t.constant(extra[0]) if extra[0] else list(range(len(starts)))
    steps = t.constant(extra[1]) if extra[1] else [1] * len(starts)
    for axis, start, end, step in zip(where, starts, ends, steps, strict=True):
        labels = axes[axis]
        if step != 1:
            t.join(labels, t.still(len(labels)))
        axes[axis] = labels[slice(start, end if end > -(1 << 31) else None, step)]
    return [axes]


def _pad(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    """Padding of channels makes channels that can go, too."""
    axes = t.of(node.input[0])
    if attributes(node).get("mode", b"constant") != b"constant":
        raise _Unknown
    t.constant(node.input[1])
    pads, rank = _full_pads(t.graph, node, len(axes)), len(axes)
    found: Axes = []
    for i, labels in enumerate(axes):
        low, high = pads[i], pads[rank + i]
        if min(low, high) < 0:
            raise _Unknown
        known = (t.find(int(x)) == _STAYS for x in labels)
        make = t.still if (low or high) and all(known) else t.fresh
        found.append(np.concatenate([make(low), labels, make(high)]).astype(np.int64))
    return [found]


def _gather(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes, indices = t.of(node.input[0]), t.of(node.input[1])
    axis = int(attributes(node).get("axis", 0)) % len(axes)
    t.join(axes[axis], t.still(len(axes[axis])))
    return [[*axes[:axis], *indices, *axes[axis + 1 :]]]


def _unsqueeze(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    shape = t.graph.tensors[node.output[0]].shape
    where = {a % len(shape) for a in t.constant(node.input[1])}
    rest = iter(axes)
    return [[t.still(1) if i in where else next(rest) for i in range(len(shape))]]


def _squeeze(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    axes = t.of(node.input[0])
    if len(node.input) > 1 and node.input[1]:
        where = {a % len(axes) for a in t.constant(node.input[1])}
    else:
        where = {i for i, a in enumerate(axes) if len(a) == 1}
    return [[a for i, a in enumerate(axes) if i not in where]]


def _expand(t: _Trace, node: onnx.NodeProto) -> list[Axes]:
    shape = t.graph.tensors[node.output[0]].shape
    return [_broadcast(t, [t.of(node.input[0]), [t.still(n) for n in shape]])]


_RULES: dict[str, Callable[[_Trace, onnx.NodeProto], list[Axes]]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _channel_norm,
    "InstanceNormalization": _channel_norm,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Resize": _pool,
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_POOLS, _pool),
}
