"""Channels that go together: what is tied to what, and that leaving them out is zeroing them."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
import torch
from conftest import Weights, build, node, run

from autoquant.compress.channels import Channels
from autoquant.compress.lower import lower
from autoquant.graph import Graph
from autoquant.task import Array, Task

IMAGE = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
WORDS = np.random.default_rng(1).normal(size=(2, 5, 16)).astype(np.float32)


def conv(name: str, source: str, target: str, **attributes: object) -> onnx.NodeProto:
    return node("Conv", [source, f"{name}.weight", f"{name}.bias"], [target], **attributes)


@functools.cache
def convolutions() -> Graph:
    """A stem of 16 channels with a residual block, a depthwise and a grouped convolution, a padded
    shortcut to 24 channels, and two branches that are joined."""
    w, same = Weights(3), {"pads": [1, 1, 1, 1]}
    shapes = {
        "stem": (16, 3, 3, 3),
        "inner": (12, 16, 3, 3),
        "back": (16, 12, 3, 3),
        "depth": (16, 1, 3, 3),
        "group": (24, 4, 3, 3),
        "left": (8, 24, 1, 1),
        "right": (6, 24, 1, 1),
    }
    weights = {f"{n}.weight": w(*s) for n, s in shapes.items()}
    weights |= {f"{n}.bias": w.bias(s[0]) for n, s in shapes.items()}
    weights |= {
        "pads": np.array([0, 4, 0, 0, 0, 4, 0, 0]),
        "head.weight": w(5, 14),
        "head.bias": w.bias(5),
    }
    model = build(
        [
            conv("stem", "x", "s0", **same),
            node("Relu", ["s0"], ["s"]),
            conv("inner", "s", "i0", **same),
            node("Relu", ["i0"], ["i"]),
            conv("back", "i", "b", **same),
            node("Add", ["b", "s"], ["sum"]),
            conv("depth", "sum", "d0", group=16, **same),
            node("Relu", ["d0"], ["d"]),
            conv("group", "d", "g", group=4, **same),
            node("Pad", ["d", "pads"], ["p"]),
            node("Add", ["g", "p"], ["wide"]),
            conv("left", "wide", "l"),
            conv("right", "wide", "r"),
            node("Concat", ["l", "r"], ["both"], axis=1),
            node("Relu", ["both"], ["a"]),
            node("GlobalAveragePool", ["a"], ["m"]),
            node("Flatten", ["m"], ["f"]),
            node("Gemm", ["f", "head.weight", "head.bias"], ["y"], transB=1),
        ],
        weights,
        {"x": ["N", 3, 8, 8]},
        ["y"],
    )
    return Graph.read(model, [IMAGE])


@functools.cache
def attention() -> Graph:
    """A transformer layer of 16 channels, four heads and a hidden width of 24; its output is the
    stream. The query, key and value of a second one are one product, split in three."""
    w = Weights(4)
    weights: dict[str, Array] = {
        name: w(16, 16, fan_in=16) for name in ("q.weight", "k.weight", "v.weight", "o.weight")
    }
    weights |= {"qkv.weight": w(16, 48, fan_in=16), "o2.weight": w(16, 16, fan_in=16)}
    weights |= {"fc1.weight": w(16, 24, fan_in=16), "fc2.weight": w(24, 16, fan_in=24)}
    weights |= {"norm.weight": np.ones(16, np.float32), "norm.bias": np.zeros(16, np.float32)}
    weights |= {"fc1.bias": w.bias(24), "scale": np.float32([0.5])}
    weights |= {"heads": np.array([0, 0, 4, 4]), "stream": np.array([0, 0, 16])}
    weights |= {"three": np.array([0, 0, 3, 4, 4]), "thirds": np.array([1, 1, 1])}
    weights |= {"axis": np.array([2])}

    def block(q: str, k: str, v: str, out: str, to: str) -> list[onnx.NodeProto]:
        return [
            node("Transpose", [q], [f"{to}q"], perm=[0, 2, 1, 3]),
            node("Transpose", [k], [f"{to}k"], perm=[0, 2, 3, 1]),
            node("Transpose", [v], [f"{to}v"], perm=[0, 2, 1, 3]),
            node("MatMul", [f"{to}q", f"{to}k"], [f"{to}s"], name=f"{to}.scores"),
            node("Mul", [f"{to}s", "scale"], [f"{to}t"]),
            node("Softmax", [f"{to}t"], [f"{to}p"], axis=-1),
            node("MatMul", [f"{to}p", f"{to}v"], [f"{to}c"], name=f"{to}.context"),
            node("Transpose", [f"{to}c"], [f"{to}m"], perm=[0, 2, 1, 3]),
            node("Reshape", [f"{to}m", "stream"], [f"{to}r"]),
            node("MatMul", [f"{to}r", out], [f"{to}o"]),
        ]

    model = build(
        [
            *(node("MatMul", ["x", f"{n}.weight"], [n]) for n in "qkv"),
            *(node("Reshape", [n, "heads"], [f"{n}h"]) for n in "qkv"),
            *block("qh", "kh", "vh", "o.weight", "first"),
            node("Add", ["x", "firsto"], ["z"]),
            node("MatMul", ["z", "qkv.weight"], ["all"]),
            node("Reshape", ["all", "three"], ["split"]),
            node("Split", ["split", "thirds"], ["q3", "k3", "v3"], axis=2),
            *(node("Squeeze", [f"{n}3", "axis"], [f"{n}s"]) for n in "qkv"),
            *block("qs", "ks", "vs", "o2.weight", "second"),
            node("Add", ["z", "secondo"], ["u"]),
            node("LayerNormalization", ["u", "norm.weight", "norm.bias"], ["n"], axis=-1),
            node("MatMul", ["n", "fc1.weight"], ["h0"]),
            node("Add", ["h0", "fc1.bias"], ["h1"]),
            node("Relu", ["h1"], ["h"]),
            node("MatMul", ["h", "fc2.weight"], ["y"]),
        ],
        weights,
        {"x": ["N", "T", 16]},
        ["y"],
    )
    return Graph.read(model, [WORDS])


def zeroed(channels: Channels, gone: set[int]) -> onnx.ModelProto:
    """The whole network, but nothing reads the channels with these labels."""
    model = onnx.ModelProto()
    model.CopyFrom(channels.graph.model)
    weights = {x.weight: x.channel_axis for x in channels.graph.layers}
    for proto in model.graph.initializer:
        if proto.name in weights:
            array = onnx.numpy_helper.to_array(proto).copy()
            for axis, kept in enumerate(channels.kept(proto.name, gone)):
                if axis != weights[proto.name]:
                    array[(slice(None),) * axis + (~kept,)] = 0
            proto.CopyFrom(onnx.numpy_helper.from_array(array, proto.name))
    return model


def test_groups_are_named_after_the_first_layer_that_makes_them() -> None:
    found = {n: (g.units, g.makers, g.readers) for n, g in Channels(convolutions()).groups.items()}
    assert found == {
        # the same of four groups of four inputs, and of four groups of six outputs, go together;
        # the shortcut joins the two: every second channel
        "stem": (2, ("stem", "back", "depth", "group"), ("inner", "group", "left", "right")),
        "inner": (12, ("inner",), ("back",)),
        "left": (8, ("left",), ("head",)),
        "right": (6, ("right",), ("head",)),
    }


def test_heads_go_with_their_query_key_and_value() -> None:
    found = {n: (g.units, g.size, g.makers) for n, g in Channels(attention()).groups.items()}
    assert found == {
        "q": (4, 4, ("q", "k", "v")),
        "qkv": (4, 12, ("qkv",)),
        "fc1": (24, 1, ("fc1",)),
    }


@pytest.mark.parametrize("make", [convolutions, attention])
def test_leaving_channels_out_is_reading_them_as_zero(make: object) -> None:
    graph = make()  # type: ignore[operator]
    channels, data = Channels(graph), IMAGE if graph is convolutions() else WORDS
    generator = np.random.default_rng(2)
    gone: set[int] = set()
    for name, group in channels.groups.items():
        count = int(generator.integers(1, group.units))
        some = set(generator.choice(group.labels, count, replace=False).tolist())
        gone |= some
        smaller = Graph.read(channels.without(some), [data])
        assert smaller.macs < graph.macs, name
        expected = run(zeroed(channels, some), data)[0]
        np.testing.assert_allclose(run(smaller.model, data)[0], expected, atol=2e-5, err_msg=name)
    smaller = Graph.read(channels.without(gone), [data])
    expected = run(zeroed(channels, gone), data)[0]
    np.testing.assert_allclose(run(smaller.model, data)[0], expected, atol=2e-5)
    longer = np.concatenate([data, data, data])  # the batch stays free
    assert len(run(smaller.model, longer)[0]) == len(longer)


def test_an_unknown_operator_keeps_what_it_touches() -> None:
    graph = convolutions()
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    relu = next(n for n in model.graph.node if n.output[0] == "i")
    relu.op_type = "ThresholdedRelu"
    changed = Channels(Graph.read(model, [IMAGE]))
    assert "inner" not in changed.groups and "left" in changed.groups


class Mixed(torch.nn.Module):
    """Residual, depthwise and joined convolutions, as torch-pruning traces them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.inner = torch.nn.Conv2d(8, 12, 1)
        self.depth = torch.nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.back = torch.nn.Conv2d(12, 8, 1)
        self.left = torch.nn.Conv2d(8, 4, 1)
        self.right = torch.nn.Conv2d(8, 6, 1)
        self.head = torch.nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.depth(self.inner(x)).relu())
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        found: torch.Tensor = self.head(x.mean((2, 3)))
        return found


def test_groups_are_those_of_torch_pruning() -> None:
    import torch_pruning as pruning

    torch.manual_seed(0)
    module, data = Mixed().eval(), torch.from_numpy(IMAGE)
    graph = lower(Task("mixed", module, (data,), [data], [(data, np.zeros(2, np.int64))]))
    trace = pruning.DependencyGraph().build_dependency(module, data)
    names = {m: n for n, m in module.named_modules()}
    expected = set()
    for group in trace.get_all_groups(ignored_layers=[module.head]):
        made = {
            names[d.target.module]
            for d, _ in group
            if trace.is_out_channel_pruning_fn(d.handler) and d.target.module is not module.norm
            and d.target.module in names
        }  # fmt: skip
        expected.add(frozenset(made))
    assert {frozenset(g.makers) for g in Channels(graph).groups.values()} == expected
