from __future__ import annotations

import functools
import pickle

import numpy as np
import pytest
from conftest import NETWORKS, ROWS, Network, Weights, build, images, network, node, run

from autoquant.calibration import calibrate, channel_peaks
from autoquant.candidate import LayerChoice
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.equalize import (
    LIMIT,
    cross_layer_equalization,
    homogeneous_pairs,
    smooth,
    smoothed_tensors,
)
from autoquant.graph import Graph
from autoquant.task import Array


def _skewed(*shape: int, seed: int, axis: int = 0) -> Array:
    """Weights whose channels differ by up to a factor of 30."""
    factors = np.exp(np.random.default_rng(seed).uniform(-1.7, 1.7, shape[axis]))
    laid = factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return (Weights(seed)(*shape) * laid).astype(np.float32)


@functools.cache
def separable() -> Network:
    """Conv+Relu → depthwise → LeakyRelu → MaxPool → grouped Conv+Relu → pool → Gemm."""
    nodes = [
        node("Conv", ["x", "a.weight", "a.bias"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "d.weight", "d.bias"], ["d"], group=8, pads=[1, 1, 1, 1]),
        node("LeakyRelu", ["d"], ["dr"], alpha=0.1),
        node("MaxPool", ["dr"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["p", "g.weight", "g.bias"], ["g"], group=2),
        node("Relu", ["g"], ["gr"]),
        node("Flatten", ["gr"], ["f"]),
        node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
    ]
    w = Weights(8)
    arrays = {
        "a.weight": _skewed(8, 3, 3, 3, seed=1),
        "a.bias": w.bias(8),
        "d.weight": _skewed(8, 1, 3, 3, seed=2),
        "d.bias": w.bias(8),
        "g.weight": _skewed(6, 4, 3, 3, seed=3),
        "g.bias": w.bias(6),
        "fc.weight": w(5, 24),
        "fc.bias": w.bias(5),
    }
    return network(build(nodes, arrays, {"x": ["N", 3, 8, 8]}, ["y"]), images(3, 8, 8))


def _attention(width: int = 8, heads: int = 2, *, decomposed: bool = False) -> Network:
    """A post-norm block: skip connections read what the normalizations make."""
    w = Weights(11)
    split = np.array([0, 0, heads, width // heads])
    arrays: dict[str, Array] = {"split": split, "join": np.array([0, 0, width])}
    arrays["last"], arrays["tiny"] = np.array([-1]), np.float32(1e-5)

    def norm(source: str, name: str) -> list[object]:
        gain = np.exp(np.random.default_rng(len(arrays)).normal(size=width) * 1.2)
        arrays[f"{name}.gain"], arrays[f"{name}.shift"] = gain.astype(np.float32), w.bias(width)
        if not decomposed:
            names = [source, f"{name}.gain", f"{name}.shift"]
            return [node("LayerNormalization", names, [name], axis=-1)]
        return [
            node("ReduceMean", [source, "last"], [f"{name}.m"], keepdims=1),
            node("Sub", [source, f"{name}.m"], [f"{name}.c"]),
            node("Mul", [f"{name}.c", f"{name}.c"], [f"{name}.s"]),
            node("ReduceMean", [f"{name}.s", "last"], [f"{name}.v"], keepdims=1),
            node("Add", [f"{name}.v", "tiny"], [f"{name}.e"]),
            node("Sqrt", [f"{name}.e"], [f"{name}.d"]),
            node("Div", [f"{name}.c", f"{name}.d"], [f"{name}.n"]),
            node("Mul", [f"{name}.n", f"{name}.gain"], [f"{name}.g"]),
            node("Add", [f"{name}.g", f"{name}.shift"], [name]),
        ]

    def linear(source: str, name: str, inputs: int, outputs: int) -> list[object]:
        arrays[f"{name}_w"], arrays[f"{name}_b"] = w(inputs, outputs), w.bias(outputs)
        return [
            node("MatMul", [source, f"{name}_w"], [f"{name}.m"], name=name),
            node("Add", [f"{name}.m", f"{name}_b"], [name]),
        ]

    nodes = norm("x", "n1")
    for name in "qkv":
        nodes += linear("n1", name, width, width)
        nodes.append(node("Reshape", [name, "split"], [f"{name}h"]))
        order = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes.append(node("Transpose", [f"{name}h"], [f"{name}t"], perm=order))
    nodes += [
        node("MatMul", ["qt", "kt"], ["scores"]),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "vt"], ["mixed"]),
        node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "join"], ["joined"]),
        *linear("joined", "out", width, width),
        node("Add", ["n1", "out"], ["s1"]),
        *norm("s1", "n2"),
        *linear("n2", "fc1", width, 12),
        node("Relu", ["fc1"], ["r"]),
        *linear("r", "fc2", 12, width),
        node("Add", ["n2", "fc2"], ["y"]),
    ]
    model = build(nodes, arrays, {"x": ["N", "S", width]}, ["y"])  # type: ignore[arg-type]
    return network(model, images(5, width))


@functools.cache
def attention() -> Network:
    return _attention()


@functools.cache
def decomposed() -> Network:
    return _attention(decomposed=True)


ALL = {**NETWORKS, "separable": separable, "attention": attention, "decomposed": decomposed}


def _close(net: Network, rewritten: Graph, *inputs: Array) -> None:
    given = inputs or net.inputs
    for before, after in zip(
        run(net.graph.model, *given), run(rewritten.model, *given), strict=True
    ):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def _names(graph: Graph) -> list[tuple[str, str, str, str]]:
    return [(layer.name, layer.kind, layer.weight, layer.output) for layer in graph.layers]


def _smoothed(net: Network, alpha: float) -> Graph:
    peaks = channel_peaks(net.graph, net.split, smoothed_tensors(net.graph), 1)
    return smooth(net.graph, peaks, alpha)


def _pairs(net: Network) -> list[tuple[str, str]]:
    return [(p.writer.name, p.reader.name) for p in homogeneous_pairs(net.graph)]


# --- the function is preserved -----------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_equalizing_changes_no_output_and_no_name(name: str) -> None:
    net = ALL[name]()
    rewritten = cross_layer_equalization(net.graph)
    _close(net, rewritten)
    assert _names(rewritten) == _names(net.graph)
    assert set(rewritten.tensors) == set(net.graph.tensors)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["attention", "decomposed", "separable", "text", "matmul"])
def test_smoothing_changes_no_output_and_no_name(name: str, alpha: float) -> None:
    net = ALL[name]()
    rewritten = _smoothed(net, alpha)
    _close(net, rewritten)
    assert _names(rewritten) == _names(net.graph)


@pytest.mark.parametrize("name", ["attention", "decomposed"])
def test_other_batches_and_lengths_are_preserved_too(name: str) -> None:
    net = ALL[name]()
    data = np.random.default_rng(4).normal(size=(3, 11, 8)).astype(np.float32)
    _close(net, cross_layer_equalization(net.graph), data)
    _close(net, _smoothed(net, 0.5), data)


def test_the_graph_that_is_given_stays_as_it_was() -> None:
    net = attention()
    before = net.graph.model.SerializeToString()
    cross_layer_equalization(net.graph)
    _smoothed(net, 0.5)
    assert net.graph.model.SerializeToString() == before


def test_both_are_deterministic_and_pickle() -> None:
    net = attention()
    once, again = _smoothed(net, 0.5), _smoothed(net, 0.5)
    assert once.fingerprint == again.fingerprint != net.graph.fingerprint
    assert pickle.loads(pickle.dumps(once)).fingerprint == once.fingerprint


# --- equalization ------------------------------------------------------------------------------


def test_pairs_go_through_what_is_homogeneous() -> None:
    assert _pairs(separable()) == [("a", "d"), ("d", "g"), ("g", "fc")]
    assert _pairs(attention()) == [("v", "out"), ("fc1", "fc2")]


def test_skip_connections_and_other_clips_end_a_pair() -> None:
    """conv1 is read by an Add too, conv2 is summed, conv3 ends in a Clip to 6."""
    assert _pairs(NETWORKS["residual"]()) == []


@pytest.mark.parametrize("name", ["separable", "attention"])
def test_the_two_ranges_of_a_channel_become_equal(name: str) -> None:
    graph = cross_layer_equalization(ALL[name]().graph)
    for pair in homogeneous_pairs(graph):
        rows = np.moveaxis(graph.array(pair.writer.weight), pair.writer.channel_axis, 0)
        made = np.abs(rows).reshape(len(rows), -1).max(axis=1)
        weight = np.abs(graph.array(pair.reader.weight))
        if pair.reader.kind == "Conv":
            parts = weight.reshape(pair.reader.group, -1, *weight.shape[1:])
            per_input = parts.max(axis=(1, *range(3, parts.ndim))).reshape(-1)
        else:
            per_input = weight.max(axis=pair.reader.channel_axis)
        read = np.zeros(len(made))
        np.maximum.at(read, pair.channel, per_input)
        np.testing.assert_allclose(made, read, rtol=1e-2)


def _two(middle: list[object], weight: Array, bias: Array, outputs: list[str]) -> Network:
    nodes = [node("Conv", ["x", "a.weight", "a.bias"], ["a"]), *middle]
    nodes.append(node("Conv", ["m", "b.weight"], ["y"]))
    arrays = {"a.weight": weight, "a.bias": bias, "b.weight": Weights(2)(3, 4, 1, 1)}
    model = build(nodes, arrays, {"x": ["N", 2, 4, 4]}, outputs)  # type: ignore[arg-type]
    return network(model, images(2, 4, 4))


def test_a_tensor_that_is_an_output_is_left_alone() -> None:
    middle = [node("Relu", ["a"], ["m"])]
    weight, bias = Weights(1)(4, 2, 1, 1), Weights().bias(4)
    assert _pairs(_two(middle, weight, bias, ["y"])) == [("a", "b")]
    assert _pairs(_two(middle, weight, bias, ["y", "m"])) == []


@pytest.mark.parametrize("op", ["Sigmoid", "Gelu", "Tanh"])
def test_other_activations_end_a_pair(op: str) -> None:
    net = _two([node(op, ["a"], ["m"])], Weights(1)(4, 2, 1, 1), Weights().bias(4), ["y"])
    assert _pairs(net) == []
    assert cross_layer_equalization(net.graph) is net.graph


def test_dead_channels_stay_and_small_ones_are_scaled_within_the_limit() -> None:
    weight = Weights(1)(4, 2, 1, 1)
    weight[0], weight[1] = 0.0, weight[1] * 1e-7
    net = _two([node("Relu", ["a"], ["m"])], weight, np.ones(4, np.float32), ["y"])
    rewritten = cross_layer_equalization(net.graph)
    _close(net, rewritten)
    bias = rewritten.array("a.bias")
    assert bias[0] == 1.0
    assert bias[1] == pytest.approx(LIMIT)


def test_a_weight_that_two_layers_share_is_left_alone() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="one"),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "w"], ["y"], name="two"),
    ]
    net = network(build(nodes, {"w": Weights()(6, 6)}, {"x": ["N", 3, 6]}, ["y"]), images(3, 6))
    assert _pairs(net) == []


# --- smoothing ---------------------------------------------------------------------------------


def test_tensors_to_smooth_are_norms_and_homogeneous_pairs() -> None:
    assert smoothed_tensors(attention().graph) == ["n1", "n2", "joined", "r"]
    assert smoothed_tensors(decomposed().graph) == ["n1", "n2", "joined", "r"]
    assert smoothed_tensors(NETWORKS["text"]().graph) == []


def test_alpha_one_evens_out_the_activations() -> None:
    net = attention()
    rewritten = _smoothed(net, 1.0)
    after = channel_peaks(rewritten, net.split, ["n1", "n2", "joined", "r"], 1)
    for peaks in after.values():
        np.testing.assert_allclose(peaks[peaks > 0], 1.0, rtol=1e-4)


def test_factors_are_those_of_the_paper() -> None:
    net = attention()
    peaks = channel_peaks(net.graph, net.split, ["n1"], 1)["n1"]
    weight = np.max([np.abs(net.graph.array(f"{n}_w")).max(axis=1) for n in "qkv"], axis=0)
    scale = np.sqrt(peaks / weight)
    rewritten = _smoothed(net, 0.5)
    for name in "qk":  # v also makes a pair with the output projection
        expected = net.graph.array(f"{name}_w") * scale[:, None]
        np.testing.assert_allclose(rewritten.array(f"{name}_w"), expected, rtol=1e-5)
    shift = net.graph.array("n1.shift") / scale
    np.testing.assert_allclose(rewritten.array("n1.shift"), shift, rtol=1e-5)


def test_a_skip_connection_reads_the_tensor_scaled_back() -> None:
    net = attention()
    rewritten = _smoothed(net, 0.5)
    skip = next(n for n in rewritten.nodes if n.output[0] == "s1")
    assert list(skip.input) == ["n1.restored", "out"]
    added = [n.op_type for n in rewritten.nodes if n.output[0] not in net.graph.tensors]
    assert added == ["Mul", "Mul"]
    assert rewritten.tensors["n1.restored"] == net.graph.tensors["n1"]


def test_an_outlier_channel_costs_less_after_smoothing() -> None:
    """One channel of a normalization is 40 times the others: their 8 bits are spent on it."""
    w = Weights(3)
    gain = np.ones(16, np.float32)
    gain[5] = 40.0
    arrays = {"gain": gain, "shift": w.bias(16), "w": w(16, 8), "b": w.bias(8)}
    arrays["w"][5] /= 40
    nodes = [
        node("LayerNormalization", ["x", "gain", "shift"], ["n"], axis=-1),
        node("MatMul", ["n", "w"], ["m"], name="layer"),
        node("Add", ["m", "b"], ["y"]),
    ]
    net = network(build(nodes, arrays, {"x": ["N", 4, 16]}, ["y"]), images(4, 16))

    def error(graph: Graph) -> float:
        calibration = calibrate(graph, net.split, method="minmax", threads=1)
        candidate = net.resolved({"layer": LayerChoice(8, 8)})
        made = compress(graph, candidate, calibration, Bank(graph), "onnxruntime")
        import onnx

        (found,) = run(onnx.ModelProto.FromString(made.model), *net.inputs)
        return float(((found - net.reference[0]) ** 2).mean())

    assert error(_smoothed(net, 0.5)) < error(net.graph) / 4


@pytest.mark.parametrize("name", ["separable", "attention"])
def test_rewritten_networks_quantize(name: str) -> None:
    net = ALL[name]()
    rewritten = cross_layer_equalization(net.graph)
    peaks = channel_peaks(rewritten, net.split, smoothed_tensors(rewritten), 1)
    rewritten = smooth(rewritten, peaks, 0.5)
    other = Network(rewritten, net.inputs)
    (found,) = other.run(other.assemble(net.uniform(8, 8)))
    (exact,) = net.reference
    assert found.shape == (ROWS, *exact.shape[1:])
    assert ((found - exact) ** 2).mean() < 0.01 * exact.var()
