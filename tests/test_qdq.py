from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import (
    CONVOLUTIONS,
    NETWORKS,
    ONE_LAYER,
    PRODUCTS,
    TRANSPOSED,
    Network,
    Weights,
    build,
    images,
    network,
    node,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from autoquant import runtime
from autoquant.candidate import ACTIVATION_BITS, WEIGHT_BITS, Candidate, LayerChoice
from autoquant.compress.bank import PLANES, Bank, QuantizedWeight
from autoquant.compress.qdq import (
    DIALECTS,
    Grid,
    assemble,
    grid,
    plan,
    resolve,
)
from autoquant.compress.readback import packed_weight, read_bits
from autoquant.errors import CandidateError, PackageError
from autoquant.graph import Layer
from autoquant.runtime import kernels
from autoquant.task import Array

INT8_KERNELS = {
    "Conv": ("QLinearConv",),
    "Gemm": ("QGemm",),
    "MatMul": ("MatMulIntegerToFloat", "QLinearMatMul"),
}
EIGHT = LayerChoice(8, 8)
FLOAT = LayerChoice()


def _kernels(model: onnx.ModelProto) -> Counter[str]:
    return kernels(model.SerializeToString())


def _bits(net: Network, model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    return read_bits(model, [layer.name for layer in net.graph.layers])


def _check_bits(net: Network, model: onnx.ModelProto, candidate: Candidate) -> None:
    """The file has the candidate's bits; float layers behind int8 ones read an 8-bit tensor."""
    candidate = net.resolved(candidate)
    where = plan(net.graph, candidate)
    expected = {}
    for layer in net.graph.layers:
        choice = candidate.choice(layer.name)
        bits = choice.activation_bits
        if bits == 32 and where.quantized_at_source(net.graph, layer.input):
            bits = 8
        expected[layer.name] = (choice.weight_bits, bits)
    assert _bits(net, model) == expected


def _relative_error(net: Network, model: onnx.ModelProto) -> float:
    """Root mean squared error over the standard deviation of the first output."""
    found, expected = net.run(model)[0], net.reference[0]
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float(np.sqrt(((found - expected) ** 2).mean()) / expected.std())


def _initializer(model: onnx.ModelProto, name: str) -> Array:
    (proto,) = (i for i in model.graph.initializer if i.name == name)
    return numpy_helper.to_array(proto)


# --- a simulation in NumPy -------------------------------------------------------------------


def _fake_quantize(x: Array, bits: int, symmetric: bool = False) -> tuple[Array, float]:
    """Round to the grid of the extremes of ``x`` (Jacob et al. 2018); returns its step too."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    levels = 2**bits - 1
    scale, zero, first, last = np.float32((high - low) / levels), 0, 0, levels
    if symmetric and low < 0:
        half = 2 ** (bits - 1)
        scale = np.float32(max(-low, high) / (half - 1))
        zero, first, last = half, 1 if bits < 8 else 0, levels
    else:
        zero = int(np.clip(np.round(-low / scale), 0, levels))
    q = np.clip(np.round(x / scale) + zero, first, last)  # in float32, as kernels do
    return ((q - zero) * scale).astype(np.float32), float(scale)


def _stored(net: Network, layer: Layer, choice: LayerChoice) -> Array:
    """The weight that the file stands for."""
    weight = net.graph.array(layer.weight)
    if choice.weight_bits == 32:
        return weight
    if choice.weight_bits == 16 and not choice.int16:
        return weight.astype(np.float16).astype(np.float32)
    return net.bank.get(layer, choice).dequantized()


def _simulate(net: Network, choice: LayerChoice) -> tuple[Array, float]:
    """The output of a one-layer network with quantized numbers in float arithmetic.

    Returns it with the difference that integer arithmetic may make.
    """
    (layer,) = net.graph.layers
    choice = net.resolved({layer.name: choice}).choice(layer.name)
    model = onnx.ModelProto()
    model.CopyFrom(net.graph.model)
    stored = _stored(net, layer, choice)
    for proto in model.graph.initializer:
        if proto.name == layer.weight:
            proto.CopyFrom(numpy_helper.from_array(stored, layer.weight))
    inputs, step = list(net.inputs), 0.0
    if choice.activation_bits < 32:
        inputs[0], step = _fake_quantize(inputs[0], choice.activation_bits, choice.symmetric)
    output = run(model, *inputs)[0]
    tolerance = 1e-4 * float(np.abs(output).max())
    is_int8 = choice.weight_bits <= 8 and choice.activation_bits <= 8
    if is_int8 and layer.kind in INT8_KERNELS:  # the bias is rounded
        tolerance += 0.5 * step * float(net.bank.get(layer, choice).scale.max())
    if is_int8 and layer.kind == "Conv":
        _, step = _fake_quantize(net.reference[0], 8)
        low, high = min(net.reference[0].min(), 0), max(net.reference[0].max(), 0)
        output = np.clip(output, low, high)
        tolerance += 0.5001 * step
    return output, tolerance


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (8, 32)])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_uint8_weights_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, dynamic: bool, bits: tuple[int, int]
) -> None:
    """As on x86 without VNNI: onnxruntime replaces every weight and its zero point."""
    net = NETWORKS[name]()
    dense = {x.name for x in net.graph.layers if x.kind in ("Gemm", "MatMul")}
    layers = {
        n: replace(c, dynamic=dynamic and n in dense and bits[1] == 8)
        for n, c in net.resolved(net.uniform(*bits)).layers.items()
    }
    model = net.assemble(layers)
    expected = net.run(model)
    monkeypatch.setattr(runtime, "saturates", lambda: True)
    for found, output in zip(net.run(model), expected, strict=True):
        np.testing.assert_allclose(found, output, rtol=0, atol=1e-5 * np.ptp(output))


@pytest.mark.parametrize("weight_bits", WEIGHT_BITS)
@pytest.mark.parametrize("name", ONE_LAYER)
def test_every_kind_at_every_width_computes_what_its_numbers_say(
    name: str, weight_bits: int
) -> None:
    net = NETWORKS[name]()
    (layer,) = net.graph.layers
    for activation_bits in ACTIVATION_BITS:
        choice = LayerChoice(weight_bits, activation_bits)
        model = net.assemble({layer.name: choice})
        expected, tolerance = _simulate(net, choice)
        np.testing.assert_allclose(
            net.run(model)[0], expected, rtol=0, atol=tolerance, err_msg=str(choice)
        )
        _check_bits(net, model, Candidate({layer.name: choice}))


@pytest.mark.parametrize("name", (*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS))
@pytest.mark.parametrize(
    "choice",
    [
        LayerChoice(8, 8, "tensor"),
        LayerChoice(3, 8, "tensor"),
        LayerChoice(8, 8, symmetric=True),
        LayerChoice(4, 6, symmetric=True),
        LayerChoice(8, 4, symmetric=True),
        LayerChoice(8, 16, symmetric=True),
        LayerChoice(16, 32, int16=True),
        LayerChoice(16, 32, "tensor", int16=True),
        LayerChoice(16, 16, int16=True),
        LayerChoice(4, 32, "tensor"),
    ],
    ids=str,
)
def test_every_kind_in_every_way_computes_what_its_numbers_say(
    name: str, choice: LayerChoice
) -> None:
    net = NETWORKS[name]()
    (layer,) = net.graph.layers
    model = net.assemble({layer.name: choice})
    expected, tolerance = _simulate(net, choice)
    np.testing.assert_allclose(net.run(model)[0], expected, rtol=0, atol=tolerance)
    _check_bits(net, model, Candidate({layer.name: choice}))


@pytest.mark.parametrize("granularity", ("channel", "tensor"))
@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6, 7, 8, 16))
def test_embeddings_are_exactly_their_stored_rows(bits: int, granularity: str) -> None:
    net = NETWORKS["embedding"]()
    (layer,) = net.graph.layers
    for choice in (
        LayerChoice(bits, 32, granularity),
        LayerChoice(bits, 32, granularity, int16=bits == 16),
    ):
        model = net.assemble({layer.name: choice})
        stored = _stored(net, layer, net.resolved({layer.name: choice}).choice(layer.name))
        assert np.array_equal(net.run(model)[0], stored[net.inputs[0]])


# --- accuracy of networks --------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_eight_bits_are_close_to_float(name: str) -> None:
    net = NETWORKS[name]()
    for extra in ({}, {"granularity": "tensor"}, {"symmetric": True}):
        assert _relative_error(net, net.assemble(net.uniform(8, 8, **extra))) < 0.05


@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_grows_as_bits_shrink(name: str) -> None:
    net = NETWORKS[name]()
    weights = [_relative_error(net, net.assemble(net.uniform(b, 32))) for b in (16, 8, 6, 4, 2)]
    assert weights == sorted(weights) and weights[0] < 1e-3
    if name != "embedding":
        activations = [
            _relative_error(net, net.assemble(net.uniform(32, b))) for b in (16, 8, 6, 4)
        ]
        assert activations == sorted(activations) and activations[0] < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_float_candidate_is_the_float_network(name: str) -> None:
    net = NETWORKS[name]()
    model = net.assemble(Candidate())
    for found, expected in zip(net.run(model), net.reference, strict=True):
        assert np.array_equal(found, expected)
    assert _kernels(model) == _kernels(net.graph.model)


@pytest.mark.parametrize("weight_bits", (2, 3, 8, 32))
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("name", ("residual", "chain", "text", "wide"))
def test_networks_at_every_width_load_and_say_their_bits(
    name: str, weight_bits: int, activation_bits: int
) -> None:
    net = NETWORKS[name]()
    candidate = net.uniform(weight_bits, activation_bits)
    model = net.assemble(candidate)
    assert all(np.isfinite(output).all() for output in net.run(model))
    _check_bits(net, model, candidate)


def test_inputs_and_outputs_keep_their_names_and_shapes() -> None:
    for name in ("residual", "text"):
        net = NETWORKS[name]()
        model = net.assemble(net.uniform(4, 8))
        assert model.graph.input == net.graph.model.graph.input
        assert model.graph.output == net.graph.model.graph.output
        for rows in (1, 3):
            outputs = run(model, *(x[:rows] for x in net.inputs))
            assert outputs[0].shape == (rows, *net.reference[0].shape[1:])


# --- the kernels that run --------------------------------------------------------------------


@pytest.mark.parametrize("bits", list(itertools.product((2, 3, 4, 5, 6, 7, 8), (4, 6, 8))), ids=str)
def test_int8_layers_run_in_int8(bits: tuple[int, int]) -> None:
    for name in (*CONVOLUTIONS, *PRODUCTS):
        net = NETWORKS[name]()
        (layer,) = net.graph.layers
        for granularity in ("channel", "tensor"):
            found = _kernels(net.assemble({layer.name: LayerChoice(*bits, granularity)}))
            assert sum(found[k] for k in INT8_KERNELS[layer.kind]) == 1, (name, granularity)
            assert not found & Counter({layer.kind: 1, "FusedConv": 1, "FusedGemm": 1})
            assert not {"Cast", "BitShift", "Split", "BitwiseAnd"} & set(found)  # folded at load


@pytest.mark.parametrize("weight_bits", (*PLANES, 8, 16))
def test_weight_only_layers_run_the_float_kernels(weight_bits: int) -> None:
    for name in (*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, "residual", "chain"):
        net = NETWORKS[name]()
        expected = _kernels(net.graph.model)
        assert _kernels(net.assemble(net.uniform(weight_bits, 32))) == expected
        assert _kernels(net.assemble(net.uniform(weight_bits, 32, int16=True))) == expected


def test_wider_activations_run_the_float_kernels() -> None:
    for name in (*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS):
        net = NETWORKS[name]()
        (layer,) = net.graph.layers
        for bits in ((8, 16), (32, 8), (16, 8), (32, 16)):
            found = _kernels(net.assemble(net.uniform(*bits)))
            assert not any(found[k] for ks in INT8_KERNELS.values() for k in ks), (name, bits)
            assert found[layer.kind] + found["FusedConv"] == 1


def test_every_mix_of_float_and_int8_runs_as_the_candidate_says() -> None:
    """Left alone, onnxruntime quantizes a float layer that stands between int8 ones."""
    net = NETWORKS["chain"]()
    names = [layer.name for layer in net.graph.layers]
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            found = _kernels(net.assemble(dict.fromkeys(chosen, EIGHT)))
            assert found["QLinearConv"] == count, chosen
            assert found["Conv"] + found["FusedConv"] == len(names) - count, chosen


@pytest.mark.parametrize("left_out", ("conv1", "conv2", "conv3", "fc"))
@pytest.mark.parametrize("choice", (FLOAT, LayerChoice(4, 32), LayerChoice(8, 16)), ids=str)
def test_one_layer_left_out_of_a_residual_network(left_out: str, choice: LayerChoice) -> None:
    net = NETWORKS["residual"]()
    layers = {x.name: choice if x.name == left_out else EIGHT for x in net.graph.layers}
    model = net.assemble(layers)
    found = _kernels(model)
    is_conv = left_out != "fc"
    assert found["QLinearConv"] == 3 - is_conv and found["QGemm"] == is_conv
    assert found["Conv"] + found["FusedConv"] == is_conv and found["Gemm"] == 1 - is_conv
    assert _relative_error(net, model) < (0.2 if choice.weight_bits == 4 else 0.05)
    _check_bits(net, model, Candidate(layers))


def test_a_residual_network_stays_in_int8() -> None:
    net = NETWORKS["residual"]()
    for extra in ({}, {"symmetric": True}, {"granularity": "tensor"}):
        found = _kernels(net.assemble(net.uniform(8, 8, **extra)))
        assert found["QLinearConv"] == 3 and found["QLinearAdd"] == 1 and found["QGemm"] == 1
        assert found["QLinearGlobalAveragePool"] == 1
        assert not {"Relu", "Clip", "Add", "Conv", "Gemm"} & set(found)
        assert found["QuantizeLinear"] == 1  # the input


def test_every_tensor_has_one_pair() -> None:
    net = NETWORKS["residual"]()
    model = net.assemble(net.uniform(8, 8))
    sources = [n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(set(sources)) == len(sources)
    (pair,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r1")
    readers = [n for n in model.graph.node if pair.output[0] in n.input]
    assert [n.op_type for n in readers] == ["DequantizeLinear"]
    users = [n.op_type for n in model.graph.node if readers[0].output[0] in n.input]
    assert sorted(users) == ["Add", "Conv"]


@pytest.mark.parametrize("after", (EIGHT, FLOAT, LayerChoice(8, 8, dynamic=True)), ids=str)
def test_a_gemm_with_relu_runs_in_int8_whatever_follows(after: LayerChoice) -> None:
    w = Weights()
    nodes = [
        node("Gemm", ["x", "a.weight", "a.bias"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "b.weight", "b.bias"], ["y"], transB=1),
    ]
    arrays = {"a.weight": w(6, 9), "a.bias": w.bias(6), "b.weight": w(4, 6), "b.bias": w.bias(4)}
    net = network(build(nodes, arrays, {"x": ["N", 9]}, ["y"]), images(9))
    model = net.assemble({"a": EIGHT, "b": after})
    found = _kernels(model)
    assert found["QGemm"] == (2 if after == EIGHT else 1) and not found["FusedGemm"]
    assert _relative_error(net, model) < 0.05


def test_matmuls_between_quantized_tensors_run_in_int8() -> None:
    w = Weights()
    nodes = [
        node("MatMul", ["x", "a"], ["h"], name="a"),
        node("MatMul", ["h", "b"], ["y"], name="b"),
    ]
    net = network(
        build(nodes, {"a": w(9, 6), "b": w(6, 4)}, {"x": ["N", 3, 9]}, ["y"]), images(3, 9)
    )
    found = _kernels(net.assemble(net.uniform(8, 8)))
    assert (found["QLinearMatMul"], found["MatMulIntegerToFloat"], found["MatMul"]) == (1, 1, 0)


def _two_convs(*middle: onnx.NodeProto, last: str, outputs: tuple[str, ...] = ("y",),
               **arrays: Any) -> Network:  # fmt: skip
    w = Weights(8)
    model = build(
        [
            node("Conv", ["x", "a.weight", "a.bias"], ["h"], pads=[1, 1, 1, 1]),
            *middle,
            node("Conv", [last, "b.weight", "b.bias"], ["y"]),
        ],
        {"a.weight": w(4, 3, 3, 3), "a.bias": w.bias(4), "b.weight": w(5, 4, 1, 1),
         "b.bias": w.bias(5), **arrays},
        {"x": ["N", 3, 6, 6]},
        outputs,
    )  # fmt: skip
    return network(model, images(3, 6, 6))


BOUNDS = [(0, 6), (0, 1), (0, 0.3337), (-1, 1), (-0.7, 1.3), (-0.01, 1), (-1, 0.01), (-10, 10)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_a_convolution_with_a_clip_is_one_kernel(bounds: tuple[float, float]) -> None:
    low, high = np.float32(bounds[0]), np.float32(bounds[1])
    net = _two_convs(node("Clip", ["h", "low", "high"], ["r"]), last="r", low=low, high=high)
    model = net.assemble(net.uniform(8, 8))
    found = _kernels(model)
    assert found["QLinearConv"] == 2 and not found["Clip"]
    assert _relative_error(net, model) < 0.05
    # onnxruntime 1.31 lets the grid exceed the bounds by half a step; do not lean on that
    (pair,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r")
    scale, zero = (_initializer(model, n).item() for n in pair.input[1:3])
    assert bounds[0] - 1e-6 <= -zero * scale and (255 - zero) * scale <= bounds[1] + 1e-6


def test_a_clip_at_any_bound_fuses() -> None:
    """Rounded to float32, 255 steps can lie beyond the bound that they were made of."""
    weight = np.full((1, 1, 1, 1), 100, np.float32)
    for high in np.linspace(0.11, 6, 25, dtype=np.float32):
        nodes = [node("Conv", ["x", "w"], ["h"]), node("Clip", ["h", "low", "high"], ["y"])]
        arrays = {"w": weight, "low": np.float32(0), "high": high}
        net = network(build(nodes, arrays, {"x": ["N", 1, 3, 3]}, ["y"]), images(1, 3, 3))
        found = _kernels(net.assemble(net.uniform(8, 8)))
        assert found["QLinearConv"] == 1 and not found["Clip"], high


@pytest.mark.parametrize("bounds", [(0.5, 2.0), (-2.0, -0.5)], ids=str)
def test_a_clip_that_excludes_zero_keeps_its_meaning(bounds: tuple[float, float]) -> None:
    low, high = np.float32(bounds[0]), np.float32(bounds[1])
    net = _two_convs(node("Clip", ["h", "low", "high"], ["r"]), last="r", low=low, high=high)
    model = net.assemble(net.uniform(8, 8))
    assert _kernels(model)["QLinearConv"] == 2
    assert _relative_error(net, model) < 0.05


def test_a_symmetric_grid_and_a_lopsided_clip_lose_no_accuracy() -> None:
    low, high = np.float32(-0.5), np.float32(2)
    net = _two_convs(node("Clip", ["h", "low", "high"], ["r"]), last="r", low=low, high=high)
    assert _relative_error(net, net.assemble(net.uniform(8, 8, symmetric=True))) < 0.05


def test_moving_nodes_carry_the_grid_of_their_input() -> None:
    net = _two_convs(
        node("Relu", ["h"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Transpose", ["p"], ["t"], perm=[0, 1, 3, 2]),
        last="t",
    )
    model = net.assemble(net.uniform(8, 8))
    found = _kernels(model)
    assert found["QLinearConv"] == 2 and not found["MaxPool"]
    assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] == 1  # ends of the graph
    grids = {
        n.input[0]: (n.input[1], n.input[2])
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }
    assert grids["r"] == grids["p"] == grids["t"]


def test_a_symmetric_request_reaches_the_tensor_that_the_grid_comes_from() -> None:
    net = _two_convs(node("Transpose", ["h"], ["t"], perm=[0, 1, 3, 2]), last="t")
    model = net.assemble({"a": EIGHT, "b": LayerChoice(8, 8, symmetric=True)})
    zeros = {
        n.input[0]: int(_initializer(model, n.input[2]))
        for n in model.graph.node
        if n.op_type == "QuantizeLinear"
    }
    assert zeros["h"] == zeros["t"] == 128
    assert zeros["x"] != 128


@pytest.mark.parametrize("first", (EIGHT, FLOAT, LayerChoice(4, 4)), ids=str)
@pytest.mark.parametrize("second", (EIGHT, FLOAT, LayerChoice(8, 4), LayerChoice(8, 16)), ids=str)
def test_a_tensor_may_be_an_output_and_be_read(first: LayerChoice, second: LayerChoice) -> None:
    net = _two_convs(node("Relu", ["h"], ["r"]), last="r", outputs=("r", "y"))
    model = net.assemble({"a": first, "b": second})
    outputs = net.run(model)
    assert [o.name for o in model.graph.output] == ["r", "y"]
    for found, expected in zip(outputs, net.reference, strict=True):
        limit = 0.5 if 4 in (first.weight_bits, second.activation_bits) else 0.05
        assert np.sqrt(((found - expected) ** 2).mean()) < limit * expected.std()
    count = sum(c.weight_bits <= 8 and c.activation_bits <= 8 for c in (first, second))
    assert _kernels(model)["QLinearConv"] == count


def test_a_sum_of_a_tensor_with_itself() -> None:
    net = _two_convs(node("Add", ["h", "h"], ["s"]), last="s")
    model = net.assemble(net.uniform(8, 8))
    assert _kernels(model)["QLinearAdd"] == 1 and _relative_error(net, model) < 0.05


def test_a_concatenation_and_a_product_stay_in_int8() -> None:
    for op, kernel, rest in (("Mul", "QLinearMul", {}), ("Concat", "QLinearConcat", {"axis": 2})):
        net = _two_convs(
            node("Relu", ["h"], ["r"]),
            node("MaxPool", ["r"], ["p"], kernel_shape=[1, 1]),
            node(op, ["r", "p"], ["s"], **rest),
            last="s",
        )
        model = net.assemble(net.uniform(8, 8))
        assert _kernels(model)[kernel] == 1, op
        assert _relative_error(net, model) < 0.05


def test_an_embedding_may_feed_an_int8_layer() -> None:
    net = NETWORKS["text"]()
    for weight_bits in (4, 8, 16, 32):
        model = net.assemble(
            {"words": LayerChoice(weight_bits), "query": EIGHT, "key": EIGHT, "head": EIGHT}
        )
        assert _relative_error(net, model) < (0.4 if weight_bits == 4 else 0.05)
        found = _kernels(model)
        assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == 2 and found["QGemm"] == 1


@pytest.mark.parametrize("bits", (*PLANES, 8))
def test_embeddings_stay_small_in_memory(bits: int) -> None:
    """The rows are made float after the look-up, not the table."""
    net = NETWORKS["embedding"]()
    found = _kernels(net.assemble(net.uniform(bits, 32)))
    assert found["Gather"] == 2 and found["Cast"] == found["Mul"] == 1


# --- dynamic ranges --------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ("channel", "tensor"))
@pytest.mark.parametrize("bits", (*PLANES, 8))
@pytest.mark.parametrize("name", PRODUCTS)
def test_dynamic_layers_take_their_range_at_run_time(
    name: str, bits: int, granularity: str
) -> None:
    net = NETWORKS[name]()
    (layer,) = net.graph.layers
    choice = LayerChoice(bits, 8, granularity, dynamic=True)
    model = net.assemble({layer.name: choice})
    found = _kernels(model)
    assert found["DynamicQuantizeMatMul"] + found["MatMulInteger"] == 1
    assert not found[layer.kind]
    expected, tolerance = _simulate(net, choice)
    np.testing.assert_allclose(net.run(model)[0], expected, rtol=0, atol=tolerance)
    _check_bits(net, model, Candidate({layer.name: choice}))
    larger = run(model, *(100 * x for x in net.inputs))[0]  # far beyond the calibrated range
    reference = run(net.graph.model, *(100 * x for x in net.inputs))[0]
    if bits == 8:
        assert np.sqrt(((larger - reference) ** 2).mean()) < 0.02 * reference.std()


def test_dynamic_layers_that_share_an_input_quantize_it_once() -> None:
    net = NETWORKS["text"]()
    dynamic = LayerChoice(8, 8, dynamic=True)
    model = net.assemble({"query": dynamic, "key": dynamic, "head": dynamic})
    ops = Counter(n.op_type for n in model.graph.node)
    assert ops["DynamicQuantizeLinear"] == 2
    assert _relative_error(net, model) < 0.05


# --- weights in the file ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", sorted(PLANES))
@pytest.mark.parametrize("name", NETWORKS)
def test_packed_weights_are_the_integers_of_the_bank(name: str, bits: int) -> None:
    net = NETWORKS[name]()
    for candidate in (net.uniform(bits, 8), net.uniform(bits, 32, granularity="tensor")):
        model = net.assemble(candidate)
        for layer in net.graph.layers:
            entry = net.bank.get(layer, net.resolved(candidate).choice(layer.name))
            stored = packed_weight(model, layer.name)
            assert stored is not None and np.array_equal(stored, entry.values)


def test_weights_of_other_widths_are_not_packed() -> None:
    net = NETWORKS["residual"]()
    model = net.assemble({"conv1": EIGHT, "conv2": LayerChoice(16), "conv3": LayerChoice(4, 8)})
    assert packed_weight(model, "conv1") is packed_weight(model, "conv2") is None
    assert packed_weight(model, "fc") is None and packed_weight(model, "conv3") is not None
    with pytest.raises(PackageError, match="no layer 'nothing'"):
        packed_weight(model, "nothing")


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_the_file_is_about_as_large_as_its_weights(bits: int) -> None:
    net = NETWORKS["wide"]()
    weights = sum(layer.parameters for layer in net.graph.layers) * bits / 8
    size = len(net.assemble(net.uniform(bits, 8)).SerializeToString())
    scales_and_names = 16 * 576 + 4000
    assert weights <= size <= weights + scales_and_names


def test_layers_that_share_a_weight_store_it_once() -> None:
    w = Weights()(24, 24)
    nodes = [
        node("Gemm", ["x", "fc.weight"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "fc.weight"], ["y"], transB=1),
    ]
    net = network(build(nodes, {"fc.weight": w}, {"x": ["N", 24]}, ["y"]), images(24))
    for bits, count in ((8, 1), (4, 1), (16, 1)):
        model = net.assemble(net.uniform(bits, 32))
        stored = [i for i in model.graph.initializer if np.prod(i.dims) > 200]
        assert len(stored) == count
        assert _relative_error(net, model) < 0.3
    mixed = net.assemble({"fc": LayerChoice(8, 8), "fc#2": LayerChoice(3, 8)})
    assert _bits(net, mixed) == {"fc": (8, 8), "fc#2": (3, 8)}
    assert packed_weight(mixed, "fc") is None and packed_weight(mixed, "fc#2") is not None


@pytest.mark.parametrize("choice", (EIGHT, LayerChoice(4, 8), LayerChoice(8, 32)), ids=str)
def test_a_weight_tied_along_both_axes(choice: LayerChoice) -> None:
    """As in an autoencoder whose decoder is its encoder, transposed."""
    w = Weights()
    nodes = [
        node("Gemm", ["x", "tied.weight", "a.bias"], ["h"], transB=1),
        node("Gemm", ["h", "tied.weight", "b.bias"], ["y"]),
    ]
    arrays = {"tied.weight": w(6, 10), "a.bias": w.bias(6), "b.bias": w.bias(10)}
    net = network(build(nodes, arrays, {"x": ["N", 10]}, ["y"]), images(10))
    model = net.assemble(dict.fromkeys(("tied", "tied#2"), choice))
    assert _relative_error(net, model) < (0.3 if choice.weight_bits == 4 else 0.03)
    if choice.activation_bits == 8:
        assert _kernels(model)["QGemm"] == 2
    for layer in net.graph.layers if choice.weight_bits == 4 else ():
        stored = packed_weight(model, layer.name)
        assert stored is not None and np.array_equal(stored, net.bank.get(layer, choice).values)


@pytest.mark.parametrize("op", ("Conv", "Gemm"))
@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("granularity", ("channel", "tensor"))
def test_a_channel_that_is_all_bias_keeps_it(op: str, bits: int, granularity: str) -> None:
    """Its bias does not fit 32 bits on the scale of its weights, and kernels know no other."""
    weight = Weights()(4, 12) if op == "Gemm" else Weights()(4, 3, 3, 3)
    if granularity == "channel":
        weight[1] *= 1e-10
    else:
        weight *= 1e-10
    bias = np.array([0.1, 2.0, -0.3, 0.0], np.float32)
    rest = {"transB": 1} if op == "Gemm" else {}
    shape = (12,) if op == "Gemm" else (3, 6, 6)
    nodes = [node(op, ["x", "c.weight", "c.bias"], ["y"], **rest)]
    net = network(
        build(nodes, {"c.weight": weight, "c.bias": bias}, {"x": ["N", *shape]}, ["y"]),
        images(*shape),
    )
    model = net.assemble({"c": LayerChoice(bits, 8, granularity)})
    assert sum(_kernels(model)[k] for k in INT8_KERNELS[op]) == 1
    output = net.run(model)[0]
    np.testing.assert_allclose(output[:, 1], np.broadcast_to(2, output[:, 1].shape), atol=0.03)
    assert _relative_error(net, model) < (0.2 if bits == 4 else 0.03)
    _check_bits(net, model, Candidate({"c": LayerChoice(bits, 8, granularity)}))


def test_large_weights_saturate_in_float16() -> None:
    weight = np.array([[1e6, -1e6, 0.5]], np.float32).T
    model = build([node("Gemm", ["x", "w"], ["y"])], {"w": weight}, {"x": ["N", 3]}, ["y"])
    net = network(model, images(3))
    found = net.run(net.assemble(net.uniform(16, 32)))[0]
    clipped = np.clip(weight, -65504, 65504)
    np.testing.assert_allclose(found, net.inputs[0] @ clipped, rtol=1e-3)


@pytest.mark.parametrize("kind", ("zero weight", "zero channel", "one channel", "one weight"))
def test_degenerate_weights(kind: str) -> None:
    weight = {
        "zero weight": np.zeros((4, 3, 3, 3), np.float32),
        "zero channel": Weights()(4, 3, 3, 3) * np.array([1, 0, 1, 1]).reshape(4, 1, 1, 1),
        "one channel": Weights()(1, 3, 3, 3),
        "one weight": np.full((1, 3, 1, 1), 0.5, np.float32),
    }[kind].astype(np.float32)
    nodes = [node("Conv", ["x", "c.weight", "c.bias"], ["y"])]
    arrays = {"c.weight": weight, "c.bias": Weights().bias(len(weight))}
    net = network(build(nodes, arrays, {"x": ["N", 3, 6, 6]}, ["y"]), images(3, 6, 6))
    for bits in (2, 4, 8):
        for granularity in ("channel", "tensor"):
            candidate = net.uniform(bits, 8, granularity=granularity)
            model = net.assemble(candidate)
            output = net.run(model)[0]
            assert np.isfinite(output).all() and _kernels(model)["QLinearConv"] == 1
            _check_bits(net, model, candidate)
            if bits == 8:
                assert np.abs(output - net.reference[0]).max() < 0.03 * np.ptp(net.reference[0])


def test_inputs_without_spread_do_no_harm() -> None:
    """Calibration data that is all zero still gives an artifact that runs."""
    net = NETWORKS["residual"]()
    silent = network(net.graph.model, np.zeros_like(net.inputs[0]))
    for bits in (4, 6, 8, 16):
        model = silent.assemble(silent.uniform(8, bits))
        assert np.isfinite(silent.run(model)[0]).all()
        assert np.isfinite(run(model, *net.inputs)[0]).all()


# --- candidates ------------------------------------------------------------------------------


def test_an_unknown_layer_is_named_with_the_nearest() -> None:
    net = NETWORKS["residual"]()
    with pytest.raises(CandidateError, match=r"unknown layer 'conv33'; did you mean 'conv3'"):
        resolve(net.graph, Candidate({"conv33": EIGHT}))


@pytest.mark.parametrize("name", ("conv2d", "transposed", "embedding"))
def test_dynamic_is_for_products(name: str) -> None:
    net = NETWORKS[name]()
    with pytest.raises(CandidateError, match="dynamic is for Gemm and MatMul"):
        net.resolved(net.uniform(8, 8, dynamic=True))


def test_resolving_drops_a_rounding_that_rounds_nothing() -> None:
    net = NETWORKS["text"]()
    found = net.resolved(net.uniform(4, 32, rounding="adaround"))
    assert found.choice("words").rounding is None  # an embedding has no moments
    assert found.choice("head").rounding == "adaround"
    wide = net.resolved(net.uniform(16, 32, rounding="adaround"))
    assert {c.rounding for c in wide.layers.values()} == {None}


def test_resolving_drops_what_has_no_effect() -> None:
    net = NETWORKS["text"]()
    layers = {
        "words": LayerChoice(8, 4, symmetric=True),
        "query": LayerChoice(16, 8, "tensor"),
        "key": LayerChoice(4, 32, symmetric=True, int16=True),
    }
    found = net.resolved(layers)
    assert dict(found.layers) == {
        "words": LayerChoice(8, 32),
        "query": LayerChoice(16, 8),
        "key": LayerChoice(4, 32),
        "head": FLOAT,
    }
    assert list(found.layers) == [layer.name for layer in net.graph.layers]
    assert net.resolved(found) == found


def test_two_spellings_of_one_network_are_one_file() -> None:
    net = NETWORKS["residual"]()
    first = net.assemble({"conv1": LayerChoice(4, 32, symmetric=True), "fc": EIGHT})
    second = net.assemble({"fc": EIGHT, "conv1": LayerChoice(4), "conv2": FLOAT})
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_a_dialect_that_is_not_there_is_refused() -> None:
    net = NETWORKS["gemm"]()
    for dialect in (*DIALECTS, "other"):
        candidate = net.resolved(net.uniform(8, 8))
        if dialect != "other":
            assemble(net.graph, candidate, net.calibration, net.bank, dialect)
        else:
            with pytest.raises(CandidateError, match=f"dialect '{dialect}'"):
                assemble(net.graph, candidate, net.calibration, net.bank, dialect)


def test_the_artifact_says_which_candidate_it_is() -> None:
    net = NETWORKS["gemm"]()
    candidate = net.resolved(net.uniform(4, 8))
    model = net.assemble(candidate)
    assert {p.key: p.value for p in model.metadata_props} == {"autoquant.candidate": candidate.key}


def test_assembling_leaves_graph_and_bank_alone() -> None:
    net = NETWORKS["residual"]()
    before = net.graph.model.SerializeToString(deterministic=True)
    entries = {
        layer.name: net.bank.get(layer, LayerChoice(4, 8)).values.copy()
        for layer in net.graph.layers
    }
    net.assemble(net.uniform(4, 4))
    assert net.graph.model.SerializeToString(deterministic=True) == before
    for layer in net.graph.layers:
        entry: QuantizedWeight = net.bank.get(layer, LayerChoice(4, 8))
        assert np.array_equal(entry.values, entries[layer.name])


some_choices = st.builds(
    LayerChoice,
    st.sampled_from(WEIGHT_BITS),
    st.sampled_from(ACTIVATION_BITS),
    granularity=st.sampled_from(("channel", "tensor")),
    symmetric=st.booleans(),
)


def _candidates(name: str) -> st.SearchStrategy[dict[str, LayerChoice]]:
    names = [layer.name for layer in NETWORKS[name]().graph.layers]
    return st.fixed_dictionaries(dict.fromkeys(names, some_choices))


@settings(max_examples=40)
@given(_candidates("wide"), st.data())
def test_fewer_weight_bits_never_make_the_file_larger(
    layers: dict[str, LayerChoice], data: st.DataObject
) -> None:
    net = NETWORKS["wide"]()
    layer = data.draw(st.sampled_from(sorted(layers)))
    old = layers[layer]
    fewer = [b for b in WEIGHT_BITS if b <= old.weight_bits]
    new = LayerChoice(
        data.draw(st.sampled_from(fewer)),
        old.activation_bits,
        granularity=old.granularity,
        symmetric=old.symmetric,
    )
    size = len(net.assemble(layers).SerializeToString())
    assert len(net.assemble({**layers, layer: new}).SerializeToString()) <= size


@settings(max_examples=60)
@given(_candidates("residual"))
def test_any_candidate_loads_and_is_what_it_says(layers: dict[str, LayerChoice]) -> None:
    net = NETWORKS["residual"]()
    model = net.assemble(layers)
    _check_bits(net, model, Candidate(layers))
    assert np.isfinite(net.run(model)[0]).all()
    found = _kernels(model)
    resolved = net.resolved(layers)
    int8 = [
        x.name
        for x in net.graph.layers
        if resolved.choice(x.name).weight_bits <= 8 and resolved.choice(x.name).activation_bits <= 8
    ]
    assert found["QLinearConv"] == sum(name != "fc" for name in int8)
    assert found["QGemm"] == ("fc" in int8)


@settings(max_examples=20)
@given(_candidates("residual"))
def test_assembling_is_deterministic_byte_for_byte(layers: dict[str, LayerChoice]) -> None:
    net = NETWORKS["residual"]()
    first = net.assemble(layers).SerializeToString(deterministic=True)
    fresh = Network(net.graph, net.inputs)  # a bank and a calibration of its own
    backwards = dict(reversed(layers.items()))
    assert fresh.assemble(backwards).SerializeToString(deterministic=True) == first


# --- grids -----------------------------------------------------------------------------------


@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from((4, 6, 8, 16)),
    st.booleans(),
)
def test_zero_is_exact_on_every_grid(a: float, b: float, bits: int, symmetric: bool) -> None:
    class Ranges:
        def range(self, tensor: str, bits: int) -> tuple[float, float]:
            return min(a, b, 0.0), max(a, b, 1e-6)

    found = grid(Ranges(), "x", bits, symmetric, "onnxruntime")  # type: ignore[arg-type]
    assert found.low <= found.zero_point <= found.high
    assert 0 <= found.low < found.high <= 2**bits - 1
    assert found.dtype == ("uint16" if bits == 16 else "uint8")
    assert np.isfinite(found.scale) and found.scale > 0
    low, high = found.real_range
    step = found.scale * 1.001
    assert low <= min(a, b, 0.0) + step and max(a, b, 1e-6) - step <= high
    if symmetric and min(a, b) < 0:
        assert found.zero_point == 2 ** (bits - 1)


def test_the_real_range_of_a_grid() -> None:
    assert Grid(0.5, 3, 0, 15, "uint8").real_range == (-1.5, 6.0)


# --- boundaries ------------------------------------------------------------------------------


def test_boundaries_count_the_elements_that_change_precision() -> None:
    net = NETWORKS["chain"]()
    each = 8 * 6 * 6

    def boundaries(**layers: LayerChoice) -> tuple[int, int]:
        candidate = net.resolved(layers)
        return plan(net.graph, candidate).boundaries(net.graph)

    assert boundaries() == (0, 0)
    assert boundaries(l0=EIGHT, l1=EIGHT, l2=EIGHT, l3=EIGHT, l4=EIGHT) == (each, each)
    assert boundaries(l1=EIGHT) == (each, each)
    assert boundaries(l1=EIGHT, l2=EIGHT) == (each, each)
    assert boundaries(l1=EIGHT, l3=EIGHT) == (2 * each, 2 * each)
    assert boundaries(l0=LayerChoice(4, 32)) == (0, 0)


# --- reading back ----------------------------------------------------------------------------


def test_read_bits_refuses_a_layer_that_is_not_there() -> None:
    net = NETWORKS["gemm"]()
    with pytest.raises(PackageError, match="no layer 'other'"):
        read_bits(net.assemble(Candidate()), ["other"])


def test_a_float_layer_behind_an_int8_one_reads_what_there_is() -> None:
    net = NETWORKS["chain"]()
    found = _bits(net, net.assemble({"l0": EIGHT, "l1": LayerChoice(4, 32), "l4": EIGHT}))
    assert found == {"l0": (8, 8), "l1": (4, 8), "l2": (32, 32), "l3": (32, 32), "l4": (8, 8)}


def test_read_bits_trusts_the_graph_and_not_the_name() -> None:
    """A candidate of 4 bits whose weight was put back to float is a file of 32 bits."""
    net = NETWORKS["gemm"]()
    model = net.assemble(net.uniform(4, 32))
    (layer,) = (n for n in model.graph.node if n.name == "fc")
    layer.input[1] = "float.weight"
    model.graph.initializer.append(
        numpy_helper.from_array(net.graph.array("fc.weight"), "float.weight")
    )
    assert read_bits(model, ["fc"]) == {"fc": (32, 32)}


def test_read_bits_refuses_weights_of_an_unknown_type() -> None:
    net = NETWORKS["gemm"]()
    model = net.assemble(Candidate())
    for proto in model.graph.initializer:
        if proto.name == "fc.weight":
            proto.CopyFrom(numpy_helper.from_array(np.zeros((12, 7)), "fc.weight"))
    with pytest.raises(PackageError, match="stored as DOUBLE"):
        read_bits(model, ["fc"])


def test_a_bank_is_not_tied_to_one_candidate() -> None:
    net = NETWORKS["residual"]()
    bank = Bank(net.graph)
    models = []
    for bits in (8, 4, 8):
        candidate = net.resolved(net.uniform(bits, 8))
        model = assemble(net.graph, candidate, net.calibration, bank)
        models.append(model.SerializeToString(deterministic=True))
    assert models[0] == models[2] != models[1]


# --- blocks and n-bit kernels ----------------------------------------------------------------


def _with_stored_weights(net: Network, candidate: Candidate) -> onnx.ModelProto:
    """The float graph with the weights that the file stands for."""
    model = onnx.ModelProto()
    model.CopyFrom(net.graph.model)
    stored = {
        layer.weight: _stored(net, layer, candidate.choice(layer.name))
        for layer in net.graph.layers
    }
    for proto in model.graph.initializer:
        if proto.name in stored:
            proto.CopyFrom(numpy_helper.from_array(stored[proto.name], proto.name))
    return model


@pytest.mark.parametrize("granularity", ("block32", "block64", "block128"))
@pytest.mark.parametrize("bits", (*PLANES, 8))
def test_block_scales_fold_into_float_weights(bits: int, granularity: str) -> None:
    net = NETWORKS["blocked"]()
    candidate = net.resolved(net.uniform(bits, 32, granularity=granularity))
    model = net.assemble(candidate)
    expected = run(_with_stored_weights(net, candidate), *net.inputs)[0]
    np.testing.assert_allclose(net.run(model)[0], expected, rtol=0, atol=1e-5)
    _check_bits(net, model, candidate)
    found = _kernels(model)
    float_kernels = _kernels(net.graph.model)
    assert found == float_kernels  # nothing of the unpacking is left at run time


@pytest.mark.parametrize("granularity", ("block32", "block64", "block128"))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_n_bit_kernels_run_on_packed_weights(bits: int, granularity: str) -> None:
    net = NETWORKS["blocked"]()
    names = ("first", "second", "third")  # two Gemms, transposed and not, and a MatMul
    for activation_bits in (32, 8):
        choice = LayerChoice(bits, activation_bits, granularity, nbits=True)
        candidate = net.resolved(dict.fromkeys(names, choice))
        model = net.assemble(candidate)
        found = _kernels(model)
        assert found["MatMulNBits"] == 3
        assert not (found["Gemm"] or found["MatMul"] or found["DequantizeLinear"])
        expected = run(_with_stored_weights(net, candidate), *net.inputs)[0]
        error = np.abs(net.run(model)[0] - expected).max() / expected.std()
        assert error < (1e-4 if activation_bits == 32 else 0.1)
        assert np.array_equal(net.run(model)[0], net.run(model)[0])
        _check_bits(net, model, candidate)
        assert all(candidate.choice(n).dynamic == (activation_bits == 8) for n in names)


@pytest.mark.parametrize("name", ("first", "second", "third"))
def test_what_an_n_bit_kernel_reads_is_what_the_bank_holds(name: str) -> None:
    net = NETWORKS["blocked"]()
    layer, choice = net.graph.by_name[name], LayerChoice(4, 32, "block32", nbits=True)
    read = packed_weight(net.assemble({name: choice}), name)
    assert read is not None
    assert np.array_equal(read, net.bank.get(layer, choice).matrix())


def test_a_file_with_n_bit_kernels_is_valid_onnx() -> None:
    source = NETWORKS["blocked"]().graph.model
    net = network(
        build(
            [node("Gemm", ["x", "fc.weight", "fc.bias"], ["y"], transB=1)],
            {"fc.weight": Weights()(8, 40), "fc.bias": Weights().bias(8)},
            {"x": ["N", 40]},
            ["y"],
        ),
        images(40),
    )
    model = net.assemble({"fc": LayerChoice(4, 8, "block32", nbits=True)})
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}
    shape = model.graph.output[0].type.tensor_type.shape  # the test's own model leaves it out
    shape.dim.add(dim_param="N")
    shape.dim.add(dim_value=8)
    onnx.checker.check_model(model, full_check=True)
    assert [o.domain for o in source.opset_import] == [""]
    assert [o.domain for o in net.assemble({}).opset_import] == [""]


def test_layers_that_share_a_weight_store_its_blocks_once() -> None:
    model = build(
        [
            node("MatMul", ["x", "w"], ["a"], name="first"),
            node("MatMul", ["a", "w"], ["y"], name="second"),
        ],
        {"w": Weights()(48, 48)},
        {"x": ["N", 48]},
        ["y"],
    )
    net = network(model, images(48))
    choice = LayerChoice(4, 32, "block32", nbits=True)
    written = net.assemble({"first": choice, "second": choice})
    assert sum(i.data_type == onnx.TensorProto.UINT8 for i in written.graph.initializer) == 1
    assert _kernels(written)["MatMulNBits"] == 2


@pytest.mark.parametrize("flag", ("nbits", "dynamic"))
def test_only_products_with_weights_have_such_kernels(flag: str) -> None:
    conv = NETWORKS["blocked"]()
    granularity = "block32" if flag == "nbits" else "channel"
    choice = LayerChoice(4, 8, granularity, **{flag: True})
    with pytest.raises(CandidateError, match=f"layer 'conv' is a Conv: {flag} is for"):
        conv.resolved({"conv": choice})


def test_another_dialect_has_no_n_bit_kernels() -> None:
    net = NETWORKS["blocked"]()
    candidate = net.resolved({"first": LayerChoice(4, 32, "block32", nbits=True)})
    with pytest.raises(CandidateError, match="layer 'first': nbits is for onnxruntime"):
        assemble(net.graph, candidate, net.calibration, net.bank, "openvino")


def test_one_block_a_channel_is_a_scale_a_channel() -> None:
    net = NETWORKS["blocked"]()
    layers = net.resolved(net.uniform(4, 32, granularity="block64")).layers
    found = {name: choice.granularity for name, choice in layers.items()}
    assert found["conv"] == "channel"  # 36 inputs
    assert found["first"] == found["second"] == found["third"] == "block64"


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_embeddings_take_blocks_of_a_row(bits: int) -> None:
    model = build(
        [node("Gather", ["table.weight", "ids"], ["y"])],
        {"table.weight": Weights()(20, 70)},
        {"ids": ["N", 4]},
        ["y"],
        indices=["ids"],
    )
    net = network(model, np.random.default_rng(2).integers(0, 20, (8, 4)))
    choice = LayerChoice(bits, 32, "block32")
    written = net.assemble({"table": choice})
    stored = net.bank.get(net.graph.layers[0], choice)
    assert stored.scale.shape == (20, 3)
    assert np.array_equal(net.run(written)[0], stored.dequantized()[net.inputs[0]])
    found = _kernels(written)
    assert found["Gather"] == 3 and found["Mul"] == 1  # of rows, not of the table
    assert _bits(net, written) == {"table": (bits, 32)}


# --- products of activations -----------------------------------------------------------------


def test_products_of_activations_run_in_int8() -> None:
    net = NETWORKS["attention"]()
    products = {p.name: LayerChoice(32, 8) for p in net.graph.products}
    assert list(products) == ["scores", "mix"]
    model = net.assemble(products)
    found = _kernels(model)
    assert found["MatMulIntegerToFloat"] == 2 and found["Softmax"] == 1
    assert found["MatMul"] + found["FusedMatMul"] == 4  # the layers with weights
    assert _relative_error(net, model) < 0.02
    assert read_bits(model, products) == dict.fromkeys(products, (32, 8))
    everything = net.assemble({**products, **net.uniform(8, 8).layers})
    found = _kernels(everything)
    assert not (found["MatMul"] or found["FusedMatMul"])
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == 6
    assert _relative_error(net, everything) < 0.05


def test_the_probabilities_of_a_softmax_have_the_grid_of_zero_to_one() -> None:
    net = NETWORKS["attention"]()
    model = net.assemble({"mix": LayerChoice(32, 8)})
    (pair,) = (n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "p")
    assert _initializer(model, pair.input[1]) == np.float32(1 / 255)
    assert _initializer(model, pair.input[2]) == 0


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("name", ("scores", "mix"))
def test_a_product_computes_what_its_grids_say(name: str, symmetric: bool) -> None:
    net = NETWORKS["attention"]()
    layer = net.graph.by_name[name]
    probe = onnx.ModelProto()
    probe.CopyFrom(net.graph.model)
    for tensor in (*layer.inputs, layer.output):
        probe.graph.output.append(onnx.ValueInfoProto(name=tensor))
    left, right = run(probe, *net.inputs)[1:3]
    right, _ = _fake_quantize(right, 8, symmetric)
    if name == "mix":
        left = np.round(left * 255) / 255
    else:
        left, _ = _fake_quantize(left, 8, symmetric)
    model = net.assemble({name: LayerChoice(32, 8, symmetric=symmetric)})
    model.graph.output.append(onnx.ValueInfoProto(name=layer.output))
    np.testing.assert_allclose(run(model, *net.inputs)[1], left @ right, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "choice", [LayerChoice(8, 8), LayerChoice(32, 16), LayerChoice(8, 8, dynamic=True)], ids=str
)
def test_a_product_has_no_other_choice(choice: LayerChoice) -> None:
    net = NETWORKS["attention"]()
    with pytest.raises(CandidateError, match="layer 'mix' is a product of two activations: it"):
        net.resolved({"mix": choice})


# --- activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("sign", (-1, 1))
@pytest.mark.parametrize("bits", (4, 6, 8, 16))
def test_a_range_on_one_side_uses_every_code(sign: int, bits: int) -> None:
    data = sign * np.abs(images(12))
    net = network(NETWORKS["gemm"]().graph.model, data)
    found = grid(net.calibration, "x", bits, False, "onnxruntime")
    assert found.zero_point == (0 if sign > 0 else 2**bits - 1)
    low, high = found.real_range
    assert (low, high) == pytest.approx((min(data.min(), 0), max(data.max(), 0)), rel=1e-5)
    model = net.assemble({"fc": LayerChoice(32, bits)})
    exact, _ = _fake_quantize(data, bits)
    expected = run(net.graph.model, exact)[0]
    np.testing.assert_allclose(net.run(model)[0], expected, rtol=0, atol=1e-4)
    wild = net.run(model)[0] - run(model, 3 * data)[0]  # beyond the grid: cut at its end
    assert np.abs(wild).max() > 0
    cut = run(net.graph.model, np.clip(_on(found, 3 * data), low, high).astype(np.float32))[0]
    np.testing.assert_allclose(run(model, 3 * data)[0], cut, rtol=0, atol=1e-4)


def _on(found: Grid, x: Array) -> Array:
    """Values on a grid without ends."""
    return np.round(x / np.float32(found.scale)) * np.float32(found.scale)
