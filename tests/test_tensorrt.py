"""The dialect tensorrt: its graphs, their sizes, and what the checker names of others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from conftest import NETWORKS, Network, run
from onnx import TensorProto, numpy_helper

from autoquant.calibration import calibrate
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.qdq import assemble, plan, refusal, tensor_grid
from autoquant.compress.readback import read_bits, stored_weights
from autoquant.compress.rounding import integer_range
from autoquant.cost import CostModel
from autoquant.deploy.tensorrt import check_tensorrt
from autoquant.errors import CandidateError

EIGHT = LayerChoice(8, 8)


def candidate(net: Network, weight_bits: int, activation_bits: int) -> Candidate:
    """Every layer that takes it at these bits; others float, products at 8."""
    layers = {}
    for layer in net.graph.layers:
        choice = net.resolved({layer.name: LayerChoice(weight_bits, activation_bits)})
        found = choice.choice(layer.name)
        refused = refusal(layer, found, "tensorrt")
        layers[layer.name] = LayerChoice(32, 32) if refused else found
    layers |= {layer.name: LayerChoice(32, 8) for layer in net.graph.products}
    return net.resolved(layers)


def written(net: Network, found: Candidate, bank: Bank | None = None) -> onnx.ModelProto:
    return assemble(net.graph, found, net.calibration, bank or net.bank, "tensorrt")


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 4), (2, 6), (16, 8), (32, 8), (16, 32)])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_its_graphs_pass_the_checker_and_have_the_predicted_size(
    name: str, bits: tuple[int, int]
) -> None:
    net = NETWORKS[name]()
    found = candidate(net, *bits)
    model = written(net, found)
    assert check_tensorrt(model) == []
    size = len(compress(net.graph, found, net.calibration, net.bank, "tensorrt").model)
    cost = CostModel(net.graph, "tensorrt", bank=net.bank).predict(found)
    assert cost.size_bytes == pytest.approx(size, rel=0.01)
    if bits[0] != 8 or bits[1] != 8:
        return
    for reference, output in zip(net.reference, net.run(model), strict=True):
        assert np.sqrt(((reference - output) ** 2).mean()) <= 0.05 * reference.std()


@pytest.mark.parametrize("name", ["residual", "wide", "text"])
def test_the_size_knows_of_shifted_biases(name: str) -> None:
    net = NETWORKS[name]()
    calibration = calibrate(net.graph, net.split, method="mse", moments=True, threads=1)
    bank = Bank(net.graph, "second-order", calibration)
    found = candidate(net, 4, 8)
    size = len(compress(net.graph, found, calibration, bank, "tensorrt").model)
    cost = CostModel(net.graph, "tensorrt", bank=bank).predict(found)
    assert cost.size_bytes == pytest.approx(size, rel=0.01)


def test_low_bit_weights_are_int8_on_the_low_bit_grid() -> None:
    net = NETWORKS["residual"]()
    found = net.resolved(net.uniform(3, 8))
    model = written(net, found)
    weights = stored_weights(model, found.layers)
    low, high = integer_range(3)
    for layer in net.graph.layers:
        values = weights[layer.name]
        assert values.dtype == np.int8
        assert low <= values.min() and values.max() <= high
        assert np.array_equal(values, net.bank.get(layer, LayerChoice(3, 8)).values)
    assert read_bits(model, found.layers) == dict.fromkeys(found.layers, (8, 8))
    cost = CostModel(net.graph, "tensorrt", bank=net.bank).predict(found)
    assert cost.weight_bytes == sum(-(-x.parameters * 3 // 8) for x in net.graph.layers)


def test_biases_are_the_float_ones() -> None:
    net = NETWORKS["residual"]()
    model = written(net, net.resolved(net.uniform(8, 8)))
    for layer in net.graph.layers:
        node = next(n for n in model.graph.node if n.name == layer.name)
        assert node.input[2] == layer.bias


def test_both_inputs_of_a_residual_add_are_dequantized() -> None:
    net = NETWORKS["residual"]()
    model = written(net, net.resolved(net.uniform(8, 8)))
    producers = {name: n for n in model.graph.node for name in n.output}
    add = next(n for n in model.graph.node if n.op_type == "Add")
    assert [producers[name].op_type for name in add.input] == ["DequantizeLinear"] * 2
    scales = {
        float(numpy_helper.to_array(i)) for i in model.graph.initializer if i.name in
        {producers[name].input[1] for name in add.input}
    }  # fmt: skip
    assert len(scales) == 2  # each on its own grid


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_grids_are_symmetric_int8(bits: int) -> None:
    net = NETWORKS["residual"]()
    found = plan(net.graph, net.resolved(net.uniform(8, bits)), "tensorrt")
    for tensor in ("x", "r1", "r2"):
        low, high = net.calibration.range(tensor, bits)
        grid = tensor_grid(net.graph, found, net.calibration, tensor, bits, "tensorrt")
        assert (grid.dtype, grid.zero_point) == ("int8", 0)
        top = 2 ** (bits - 1) - 1 if tensor == "x" or bits == 8 else 2**bits - 1
        assert (grid.low, grid.high) == (-top if low < 0 else 0, top)
        assert grid.high * grid.scale == pytest.approx(max(high, -low), rel=1e-6)


def test_weights_of_a_float_product_are_int4_in_blocks() -> None:
    net = NETWORKS["wide"]()
    layer = net.graph.by_name["fc"]
    assert layer.parameters // layer.channels == 48
    other = NETWORKS["blocked"]()
    found = other.resolved({"third": LayerChoice(4, 32, "block32")})
    model = written(other, found)
    assert check_tensorrt(model) == []
    weight = next(i for i in model.graph.initializer if i.data_type == TensorProto.INT4)
    assert list(weight.dims) == [9, 96]
    entry = other.bank.get(other.graph.by_name["third"], LayerChoice(4, 32, "block32"))
    assert np.array_equal(stored_weights(model, ["third"])["third"], entry.matrix())
    assert read_bits(model, ["third"]) == {"third": (4, 32)}
    expected = other.run(other.assemble(found))[0]
    assert np.allclose(other.run(model)[0], expected, rtol=1e-4, atol=1e-4)
    size = len(compress(other.graph, found, other.calibration, other.bank, "tensorrt").model)
    cost = CostModel(other.graph, "tensorrt", bank=other.bank).predict(found)
    assert cost.size_bytes == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize(
    ("name", "layer", "choice", "reason"),
    [
        ("gemm", "fc", LayerChoice(8, 8, dynamic=True), "dynamic is not for TensorRT"),
        ("gemm", "fc", LayerChoice(8, 16), "TensorRT has no int16"),
        ("gemm", "fc", LayerChoice(16, 32, int16=True), "TensorRT has no int16"),
        ("gemm", "fc", LayerChoice(8, 32), "keeps weights of a float layer in 4 bits"),
        ("gemm", "fc", LayerChoice(4, 32), "in blocks"),
        ("blocked", "conv", LayerChoice(4, 32, "block32"), "of a Gemm or MatMul"),
        ("blocked", "first", LayerChoice(4, 32, "block32"), "divide the inputs"),
        ("blocked", "third", LayerChoice(4, 32, "block32", nbits=True), "nbits is for onnxruntime"),
        ("embedding", "table", LayerChoice(8, 32), "weights of a float layer"),
        ("transposed", "conv", LayerChoice(8, 8), "weights of a float layer"),
    ],
)
def test_what_it_does_not_have_is_refused(
    name: str, layer: str, choice: LayerChoice, reason: str
) -> None:
    net = NETWORKS[name]()
    with pytest.raises(CandidateError, match=f"layer '{layer}': .*{reason}"):
        written(net, net.resolved({layer: choice}))


# --- the checker on graphs that are wrong ----------------------------------------------------


def _find(model: onnx.ModelProto, op: str, output: str = "") -> onnx.NodeProto:
    return next(
        n for n in model.graph.node if n.op_type == op and (not output or n.output[0] == output)
    )


def _set(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for old in list(model.graph.initializer):
        if old.name == name:
            model.graph.initializer.remove(old)
    model.graph.initializer.append(numpy_helper.from_array(value, name))


def _own_zero(model: onnx.ModelProto, value: np.ndarray) -> None:
    _find(model, "QuantizeLinear", "x.q").input[2] = "own"
    _set(model, "own", value)


def _cast_weights(model: onnx.ModelProto) -> None:
    dequantize = _find(model, "DequantizeLinear", "conv1.w8.dq")
    cast = onnx.helper.make_node("Cast", [dequantize.input[0]], ["cast"], to=TensorProto.INT8)
    dequantize.input[0] = "cast"
    model.graph.node.insert(0, cast)


def _int_bias(model: onnx.ModelProto) -> None:
    _set(model, "b32", np.ones(8, np.int32))
    _set(model, "bs", np.ones(8, np.float32))
    model.graph.node.insert(
        0, onnx.helper.make_node("DequantizeLinear", ["b32", "bs"], ["b"], axis=0)
    )
    _find(model, "Conv").input[2] = "b"


def _float_input(model: onnx.ModelProto) -> None:
    _find(model, "Conv").input[0] = "x"


def _axis(model: onnx.ModelProto) -> None:
    node = _find(model, "DequantizeLinear", "conv2.w8.dq")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("axis", 1))


def _scale(model: onnx.ModelProto, value: np.ndarray) -> None:
    node = _find(model, "QuantizeLinear", "x.q")
    node.input[1] = "wrong"
    _set(model, "wrong", value)


def _no_zero(model: onnx.ModelProto) -> None:
    del _find(model, "QuantizeLinear", "x.q").input[2:]


def _domain(model: onnx.ModelProto) -> None:
    _find(model, "GlobalAveragePool").domain = "com.microsoft"


def _dynamic(model: onnx.ModelProto) -> None:
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    model.graph.node.append(node)


def _int4(model: onnx.ModelProto) -> None:
    from ml_dtypes import int4

    _set(model, "fc.w8", np.zeros((5, 8), int4))


@pytest.mark.parametrize(
    ("spoil", "problems"),
    [
        (lambda m: _own_zero(m, np.int8(3)), ["'x.q' (QuantizeLinear): the zero point is not 0"]),
        (lambda m: _own_zero(m, np.uint8(0)), ["'x.q' (QuantizeLinear): quantizes to uint8"]),
        (_no_zero, ["'x.q' (QuantizeLinear): quantizes to uint8, not int8: it has no zero"]),
        (_cast_weights, ["'conv1.w8.dq' (DequantizeLinear): dequantizes what a Cast made"]),
        (
            _int_bias,
            [
                "'b' (DequantizeLinear): dequantizes int32",
                "'conv1' (Conv): the bias is quantized; TensorRT adds float biases",
            ],
        ),
        (_float_input, ["'conv1' (Conv): int8 weights need int8 activations"]),
        (_axis, ["'conv2' (Conv): weights have their scales along axis 1"]),
        (
            lambda m: _scale(m, np.float32(0)),
            ["'x.q' (QuantizeLinear): scale 'wrong' is not"],
        ),
        (
            lambda m: _scale(m, np.ones(3, np.float32)),
            ["'x.q' (QuantizeLinear): activations have one scale a tensor"],
        ),
        (_domain, ["(GlobalAveragePool): TensorRT has no operators of the domain"]),
        (_dynamic, ["'q' (DynamicQuantizeLinear): TensorRT has no such operator"]),
        (
            _int4,
            [
                "'fc.w8.dq' (DequantizeLinear): int4 weights need blocks",
                "'fc' (Gemm): int4 weights are for float activations",
            ],
        ),
    ],
)
def test_the_checker_names_layer_and_reason(
    spoil: Callable[[onnx.ModelProto], None], problems: list[str]
) -> None:
    net = NETWORKS["residual"]()
    model = written(net, net.resolved(net.uniform(8, 8)))
    spoil(model)
    found = check_tensorrt(model)
    assert len(found) == len(problems), found
    for line, expected in zip(found, problems, strict=True):
        assert expected in line and line.startswith("layer ")


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 32)])
def test_the_checker_refuses_the_other_dialect(bits: tuple[int, int]) -> None:
    net = NETWORKS["residual"]()
    problems = check_tensorrt(net.assemble(net.uniform(*bits)))
    assert problems
    if bits == (8, 8):
        assert any("quantizes to uint8" in line for line in problems)
        assert any("'conv1' (Conv): the bias is quantized" in line for line in problems)
    else:
        assert any("(BitShift): TensorRT has no such operator" in line for line in problems)


def test_the_checker_takes_a_float_graph() -> None:
    net = NETWORKS["residual"]()
    assert check_tensorrt(net.graph.model) == []
    assert run(net.graph.model, *net.inputs)[0].shape == (48, 5)
