"""Encodings of artifacts: they say the grids of the QDQ file, and its outputs follow from them."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from conftest import NETWORKS, Network
from onnx import numpy_helper

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.qdq import assemble, plan, tensor_grid
from autoquant.compress.readback import stored_weights
from autoquant.deploy.encodings import encodings, encodings_files, requantized
from autoquant.errors import RunError

NAMES = ("residual", "chain", "wide", "conv1d", "conv3d", "matmul", "gemm", "attention", "text")


def mixed(net: Network, *bits: tuple[int, int]) -> Candidate:
    """The layers in turn at these bits; embeddings stay float."""
    layers = {
        layer.name: LayerChoice(*(bits[i % len(bits)] if layer.kind != "Gather" else (32, 32)))
        for i, layer in enumerate(net.graph.layers)
    }
    return net.resolved(layers)


def integers(model: onnx.ModelProto, name: str, found: list[dict], axis: int) -> np.ndarray:
    """A float weight on its encodings, as a converter rounds it."""
    weight = next(i for i in model.graph.initializer if i.name == name)
    values = numpy_helper.to_array(weight)
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    scale = np.float32([e["scale"] for e in found]).reshape(shape if len(found) > 1 else [])
    low, high = found[0]["offset"], found[0]["offset"] + 2 ** found[0]["bitwidth"] - 1
    return np.clip(np.round(values / scale), low, high)


@pytest.mark.parametrize(
    "bits", [((8, 8),), ((3, 8), (8, 8)), ((4, 4), (8, 8)), ((8, 16), (5, 8)), ((4, 32), (2, 6))]
)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_weights_follow_from_the_encodings(
    name: str, bits: tuple[tuple[int, int], ...]
) -> None:
    net = NETWORKS[name]()
    found = mixed(net, *bits)
    artifact = net.assemble(found)
    model, document = encodings(artifact)
    assert not {n.op_type for n in model.graph.node} & {"QuantizeLinear", "DequantizeLinear"}
    stored = stored_weights(artifact, found.layers)
    nodes = {node.name: node for node in model.graph.node}
    for layer in net.graph.layers:
        choice = found.choice(layer.name)
        if choice.weight_bits > 8:
            continue
        entries = document["param_encodings"][nodes[layer.name].input[1]]
        assert {e["bitwidth"] for e in entries} == {choice.weight_bits}
        assert len(entries) in (1, layer.channels)
        values = integers(model, nodes[layer.name].input[1], entries, layer.channel_axis)
        assert np.array_equal(values, stored[layer.name])
    for expected, output in zip(
        net.run(artifact), net.run(requantized(model, document)), strict=True
    ):
        scale = max(
            (e[0]["scale"] for n, e in document["activation_encodings"].items()), default=0.0
        )
        assert np.abs(expected - output).mean() <= 0.02 * np.abs(expected).mean() + 0.02 * scale


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activation_encodings_are_the_grids(bits: int, dialect: str) -> None:
    net = NETWORKS["residual"]()
    found = net.resolved(net.uniform(8, bits))
    model = assemble(net.graph, found, net.calibration, net.bank, dialect)
    _, document = encodings(model)
    planned = plan(net.graph, found, dialect)
    for tensor in ("x", "r1", "r2"):
        grid = tensor_grid(net.graph, planned, net.calibration, tensor, bits, dialect)
        name = tensor if bits == 8 else f"{tensor}.clip{bits}"
        (entry,) = document["activation_encodings"][name]
        assert entry["bitwidth"] == bits and entry["dtype"] == "int"
        assert np.float32(entry["scale"]) == np.float32(grid.scale)
        assert entry["min"] == entry["offset"] * entry["scale"]
        low, high = grid.real_range
        assert entry["min"] <= low + 1e-6 and entry["max"] >= high - 1e-6
        if dialect == "onnxruntime":
            assert entry["offset"] == -grid.zero_point


def test_a_tensor_on_two_grids_has_two_names() -> None:
    net = NETWORKS["residual"]()
    found = net.resolved({"conv1": LayerChoice(8, 8), "conv2": LayerChoice(8, 16)})
    model, document = encodings(net.assemble(found))
    assert document["activation_encodings"]["r1"][0]["bitwidth"] == 8
    assert document["activation_encodings"]["r1.dq16"][0]["bitwidth"] == 16
    assert [n.op_type for n in model.graph.node if "r1.dq16" in n.output] == ["Identity"]


def test_the_files_are_the_same_every_time() -> None:
    net = NETWORKS["residual"]()
    artifact = net.assemble(net.uniform(4, 8))
    first, second = encodings_files(artifact), encodings_files(artifact)
    assert first == second and set(first) == {"float.onnx", "model.encodings"}
    assert json.loads(first["model.encodings"])["version"] == "0.6.1"


@pytest.mark.parametrize(
    ("name", "choice", "reason"),
    [
        ("gemm", LayerChoice(8, 8, dynamic=True), "DynamicQuantizeLinear"),
        ("blocked", LayerChoice(4, 32, "block32", nbits=True), "MatMulNBits"),
        ("blocked", LayerChoice(4, 32, "block32"), "scales of blocks"),
        ("embedding", LayerChoice(8, 32), "stored embeddings"),
    ],
)
def test_what_the_format_lacks_is_named(name: str, choice: LayerChoice, reason: str) -> None:
    net = NETWORKS[name]()
    layer = "first" if name == "blocked" else net.graph.layers[0].name
    with pytest.raises(RunError, match=reason) as error:
        encodings(net.assemble({layer: choice}))
    assert str(error.value).startswith("layer ")
