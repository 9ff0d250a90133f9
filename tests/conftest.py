"""Tiny networks with fixed seeds, and what a search makes of each: graph, calibration, bank."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import settings
from onnx import TensorProto, helper, numpy_helper

from autoquant.calibration import Calibration, calibrate
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import assemble, resolve
from autoquant.graph import Graph
from autoquant.runtime import OnnxRuntime
from autoquant.task import Array, Split

pytest.register_assert_rewrite("contracts")
settings.register_profile("autoquant", deadline=None, derandomize=True)
settings.load_profile("autoquant")

node = helper.make_node
ROWS = 48  # samples of calibration data


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own at a new folder, of a size such as ``40m``; skips where none can be."""
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def build(
    nodes: Sequence[onnx.NodeProto],
    initializers: Mapping[str, Array],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Sequence[str],
    *,
    opset: int = 21,
    indices: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model whose ``inputs`` are float32, but int64 for those in ``indices``."""
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "test",
            [
                helper.make_tensor_value_info(
                    name, TensorProto.INT64 if name in indices else TensorProto.FLOAT, shape
                )
                for name, shape in inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in initializers.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    return model


def run(model: onnx.ModelProto, *inputs: Array) -> list[Array]:
    """The outputs of a model as a search runs it."""
    return OnnxRuntime().open(model.SerializeToString()).run(inputs)


class Weights:
    """Normal weights from one seed, scaled as a trained layer's."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *shape: int, fan_in: int | None = None) -> Array:
        fan_in = fan_in or int(np.prod(shape[1:])) or 1
        return (self.generator.normal(size=shape) * (2 / fan_in) ** 0.5).astype(np.float32)

    def bias(self, count: int) -> Array:
        return (self.generator.normal(size=count) * 0.3).astype(np.float32)


@dataclass(frozen=True)
class Network:
    """A graph with calibration data, and everything that assembling a candidate takes."""

    graph: Graph
    inputs: tuple[Array, ...]

    @functools.cached_property
    def split(self) -> Split:
        return Split("calibration", (self.inputs,), None, len(self.inputs[0]))

    @functools.cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.graph, self.split, method="minmax", threads=1)

    @functools.cached_property
    def bank(self) -> Bank:
        return Bank(self.graph)

    @functools.cached_property
    def reference(self) -> list[Array]:
        """The float network's outputs on the calibration data."""
        return run(self.graph.model, *self.inputs)

    def uniform(self, weight_bits: int, activation_bits: int, **rest: Any) -> Candidate:
        choice = LayerChoice(weight_bits, activation_bits, **rest)
        return Candidate({layer.name: choice for layer in self.graph.layers})

    def resolved(self, candidate: Candidate | Mapping[str, LayerChoice]) -> Candidate:
        if not isinstance(candidate, Candidate):
            candidate = Candidate(candidate)
        return resolve(self.graph, candidate)

    def assemble(self, candidate: Candidate | Mapping[str, LayerChoice]) -> onnx.ModelProto:
        return assemble(self.graph, self.resolved(candidate), self.calibration, self.bank)

    def run(self, model: onnx.ModelProto) -> list[Array]:
        return run(model, *self.inputs)


def network(model: onnx.ModelProto, *inputs: Array) -> Network:
    return Network(Graph.read(model, inputs), inputs)


def images(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype(np.float32)


def _one_conv(weight: Array, data: Array, op: str = "Conv", **attributes: Any) -> Network:
    channels = weight.shape[0]
    if op == "ConvTranspose":
        channels = weight.shape[1] * attributes.get("group", 1)
    model = build(
        [
            node(op, ["x", "conv.weight", "conv.bias"], ["c"], name="n0", **attributes),
            node("Relu", ["c"], ["y"], name="n1"),
        ],
        {"conv.weight": weight, "conv.bias": Weights(9).bias(channels)},
        {"x": ["N", *data.shape[1:]]},
        ["y"],
    )
    return network(model, data)


def conv1d() -> Network:
    return _one_conv(Weights()(6, 4, 3), images(4, 11), strides=[2], pads=[1, 0])


def conv2d() -> Network:
    return _one_conv(Weights()(8, 3, 3, 3), images(3, 8, 8), strides=[2, 2], pads=[1, 1, 1, 1])


def conv3d() -> Network:
    return _one_conv(Weights()(4, 2, 2, 3, 3), images(2, 4, 5, 5), pads=[0, 1, 1, 0, 1, 1])


def depthwise() -> Network:
    return _one_conv(Weights()(6, 1, 3, 3), images(6, 7, 7), group=6, pads=[1, 1, 1, 1])


def grouped() -> Network:
    return _one_conv(Weights()(8, 2, 3, 3), images(4, 6, 6), group=2)


def dilated() -> Network:
    return _one_conv(Weights()(5, 3, 3, 3), images(3, 9, 9), dilations=[2, 2], pads=[2, 2, 2, 2])


def transposed() -> Network:
    weight = Weights()(4, 3, 3, 3, fan_in=36)
    return _one_conv(weight, images(4, 5, 5), "ConvTranspose", strides=[2, 2])


def transposed_grouped() -> Network:
    weight = Weights()(4, 3, 2, 2, fan_in=8)
    return _one_conv(weight, images(4, 5, 5), "ConvTranspose", strides=[2, 2], group=2)


def _one_gemm(transposed: int) -> Network:
    shape = (7, 12) if transposed else (12, 7)
    model = build(
        [node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], name="n0", transB=transposed)],
        {"fc.weight": Weights()(*shape, fan_in=12), "fc.bias": Weights(9).bias(7)},
        {"x": ["N", 12]},
        ["y"],
    )
    return network(model, images(12))


def gemm() -> Network:
    return _one_gemm(0)


def gemm_transposed() -> Network:
    return _one_gemm(1)


def matmul() -> Network:
    model = build(
        [
            node("MatMul", ["x", "w"], ["m"], name="product"),
            node("Add", ["b", "m"], ["a"], name="n1"),
            node("Relu", ["a"], ["y"], name="n2"),
        ],
        {"w": Weights()(10, 6, fan_in=10), "b": Weights(9).bias(6)},
        {"x": ["N", 5, 10]},
        ["y"],
    )
    return network(model, images(5, 10))


def embedding() -> Network:
    model = build(
        [
            node("Gather", ["table.weight", "ids"], ["y"], name="n0"),
        ],
        {"table.weight": Weights()(13, 6, fan_in=2)},
        {"ids": ["N", 4]},
        ["y"],
        indices=["ids"],
    )
    return network(model, np.random.default_rng(2).integers(0, 13, (ROWS, 4)))


def residual() -> Network:
    """conv1+Relu → conv2 → Add with conv1's → Relu → depthwise+Clip → pool → Gemm."""
    w = Weights(3)
    model = build(
        [
            node("Conv", ["x", "conv1.weight", "conv1.bias"], ["c1"], pads=[1, 1, 1, 1]),
            node("Relu", ["c1"], ["r1"]),
            node("Conv", ["r1", "conv2.weight", "conv2.bias"], ["c2"], pads=[1, 1, 1, 1]),
            node("Add", ["c2", "r1"], ["s"]),
            node("Relu", ["s"], ["r2"]),
            node("Conv", ["r2", "conv3.weight", "conv3.bias"], ["c3"], group=8),
            node("Clip", ["c3", "zero", "six"], ["r3"]),
            node("GlobalAveragePool", ["r3"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
        ],
        {
            "conv1.weight": w(8, 3, 3, 3),
            "conv1.bias": w.bias(8),
            "conv2.weight": w(8, 8, 3, 3),
            "conv2.bias": w.bias(8),
            "conv3.weight": w(8, 1, 3, 3),
            "conv3.bias": w.bias(8),
            "fc.weight": w(5, 8),
            "fc.bias": w.bias(5),
            "zero": np.float32(0),
            "six": np.float32(6),
        },
        {"x": ["N", 3, 8, 8]},
        ["y"],
    )
    return network(model, images(3, 8, 8))


def chain() -> Network:
    """Five convolutions with a Relu each: room for float layers between int8 ones."""
    w = Weights(4)
    nodes, arrays, last = [], {}, "x"
    for i in range(5):
        arrays[f"l{i}.weight"], arrays[f"l{i}.bias"] = w(8, 8, 3, 3), w.bias(8)
        nodes += [
            node("Conv", [last, f"l{i}.weight", f"l{i}.bias"], [f"c{i}"], pads=[1, 1, 1, 1]),
            node("Relu", [f"c{i}"], [f"r{i}"]),
        ]
        last = f"r{i}"
    return network(build(nodes, arrays, {"x": ["N", 8, 6, 6]}, [last]), images(8, 6, 6))


def text() -> Network:
    """Two inputs: tokens through an embedding, MatMuls and a Gemm, and a float mask."""
    w = Weights(5)
    model = build(
        [
            node("Gather", ["words.weight", "ids"], ["e"]),
            node("MatMul", ["e", "query"], ["q0"], name="query"),
            node("Add", ["q0", "query_bias"], ["q"]),
            node("MatMul", ["e", "key"], ["k"], name="key"),
            node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
            node("MatMul", ["q", "kt"], ["a"], name="attention"),
            node("Mul", ["a", "mask"], ["am"]),
            node("MatMul", ["am", "e"], ["v"], name="mix"),
            node("ReduceMean", ["v", "axis"], ["m"], keepdims=0),
            node("Gemm", ["m", "head.weight", "head.bias"], ["y"], transB=1),
        ],
        {
            "words.weight": w(11, 8, fan_in=8),
            "query": w(8, 8),
            "query_bias": w.bias(8),
            "key": w(8, 8),
            "head.weight": w(3, 8),
            "head.bias": w.bias(3),
            "axis": np.array([1]),
        },
        {"ids": ["N", 4], "mask": ["N", 1, 4]},
        ["y"],
        indices=["ids"],
    )
    generator = np.random.default_rng(6)
    ids = generator.integers(0, 11, (ROWS, 4))
    mask = generator.integers(0, 2, (ROWS, 1, 4)).astype(np.float32)
    return network(model, ids, mask)


def wide() -> Network:
    """Layers with so many weights that their storage counts more than what names it."""
    w = Weights(7)
    model = build(
        [
            node("Conv", ["x", "a.weight", "a.bias"], ["c"], pads=[1, 1, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("Conv", ["r", "b.weight", "b.bias"], ["d"], pads=[1, 1, 1, 1]),
            node("Add", ["d", "r"], ["s"]),
            node("GlobalAveragePool", ["s"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
        ],
        {
            "a.weight": w(48, 48, 3, 3),
            "a.bias": w.bias(48),
            "b.weight": w(48, 48, 3, 3),
            "b.bias": w.bias(48),
            "fc.weight": w(480, 48),
            "fc.bias": w.bias(480),
        },
        {"x": ["N", 48, 2, 2]},
        ["y"],
    )
    return network(model, images(48, 2, 2))


def blocked() -> Network:
    """Layers with more inputs than a block of 32: 36, 80, 108, 70 and 96 of them."""
    w = Weights(8)
    model = build(
        [
            node("Conv", ["x", "conv.weight", "conv.bias"], ["c"]),
            node("ConvTranspose", ["c", "up.weight"], ["u"]),
            node("Flatten", ["u"], ["f"]),
            node("Gemm", ["f", "first.weight", "first.bias"], ["g"], transB=1),
            node("Gemm", ["g", "second.weight", "second.bias"], ["h"]),
            node("MatMul", ["h", "w"], ["m"], name="third"),
            node("Add", ["m", "b"], ["y"]),
        ],
        {
            "conv.weight": w(5, 4, 3, 3),
            "conv.bias": w.bias(5),
            "up.weight": w(5, 3, 4, 4, fan_in=20),
            "first.weight": w(70, 3 * 6 * 6),
            "first.bias": w.bias(70),
            "second.weight": w(70, 96, fan_in=70),
            "second.bias": w.bias(96),
            "w": w(96, 9),
            "b": w.bias(9),
        },
        {"x": ["N", 4, 5, 5]},
        ["y"],
    )
    return network(model, images(4, 5, 5))


def attention() -> Network:
    """One head over five tokens: two products of activations around a Softmax."""
    w = Weights(9)
    model = build(
        [
            node("MatMul", ["x", "query"], ["q"], name="query"),
            node("MatMul", ["x", "key"], ["k"], name="key"),
            node("MatMul", ["x", "value"], ["v"], name="value"),
            node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
            node("MatMul", ["q", "kt"], ["s"], name="scores"),
            node("Softmax", ["s"], ["p"], axis=-1),
            node("MatMul", ["p", "v"], ["a"], name="mix"),
            node("MatMul", ["a", "output"], ["y"], name="output"),
        ],
        {name: w(8, 8) for name in ("query", "key", "value", "output")},
        {"x": ["N", 5, 8]},
        ["y"],
    )
    return network(model, images(5, 8))


NETWORKS: dict[str, Callable[[], Network]] = {
    f.__name__: functools.cache(f)
    for f in (
        conv1d,
        conv2d,
        conv3d,
        depthwise,
        grouped,
        dilated,
        transposed,
        transposed_grouped,
        gemm,
        gemm_transposed,
        matmul,
        embedding,
        residual,
        chain,
        text,
        wide,
        blocked,
        attention,
    )
}
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "depthwise", "grouped", "dilated")
TRANSPOSED = ("transposed", "transposed_grouped")
PRODUCTS = ("gemm", "gemm_transposed", "matmul")
ONE_LAYER = (*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, "embedding")
