from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import NETWORKS, Weights, build, images, node, run
from onnx import TensorProto, helper, numpy_helper

from autoquant.errors import ModelError
from autoquant.graph import Graph, clamp_bounds, normalize
from autoquant.task import Array


def _read(model: onnx.ModelProto, *inputs: Array) -> Graph:
    """Read a model and check that normalizing left its outputs as they were."""
    graph = Graph.read(model, inputs)
    for a, b in zip(run(model, *inputs), run(graph.model, *inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return graph


def _ops(graph: Graph) -> list[str]:
    return [n.op_type for n in graph.nodes]


# --- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "macs", "output_shape", "axis", "group"),
    [
        ("conv1d", "Conv", 5 * 6 * 4 * 3, (1, 6, 5), 0, 1),
        ("conv2d", "Conv", 16 * 8 * 3 * 9, (1, 8, 4, 4), 0, 1),
        ("conv3d", "Conv", 75 * 4 * 2 * 18, (1, 4, 3, 5, 5), 0, 1),
        ("depthwise", "Conv", 49 * 6 * 9, (1, 6, 7, 7), 0, 6),
        ("grouped", "Conv", 16 * 8 * 2 * 9, (1, 8, 4, 4), 0, 2),
        ("dilated", "Conv", 81 * 5 * 3 * 9, (1, 5, 9, 9), 0, 1),
        ("transposed", "ConvTranspose", 25 * 4 * 3 * 9, (1, 3, 11, 11), 1, 1),
        ("transposed_grouped", "ConvTranspose", 25 * 4 * 3 * 4, (1, 6, 10, 10), 1, 2),
        ("gemm", "Gemm", 12 * 7, (1, 7), 1, 1),
        ("gemm_transposed", "Gemm", 12 * 7, (1, 7), 0, 1),
        ("matmul", "MatMul", 5 * 10 * 6, (1, 5, 6), 1, 1),
        ("embedding", "Gather", 0, (1, 4, 6), 0, 1),
    ],
)
def test_a_layer_of_every_kind(
    name: str, kind: str, macs: int, output_shape: tuple[int, ...], axis: int, group: int
) -> None:
    graph = NETWORKS[name]().graph
    (layer,) = graph.layers
    assert (layer.kind, layer.macs, layer.output_shape) == (kind, macs, output_shape)
    assert (layer.channel_axis, layer.group) == (axis, group)
    assert layer.input_shape[0] == 1 and layer.output_shape[0] == 1
    assert layer.weight_shape == graph.array(layer.weight).shape
    assert layer.parameters == graph.array(layer.weight).size
    assert layer.channels == layer.weight_shape[axis]
    assert graph.macs == macs
    assert (layer.bias is None) == (kind == "Gather")


def test_the_relu_behind_a_layer_belongs_to_it() -> None:
    for name in ("conv2d", "transposed", "matmul"):
        graph = NETWORKS[name]().graph
        (layer,) = graph.layers
        assert layer.output == "y"
        assert [graph.nodes[i].op_type for i in layer.absorbed][-1] == "Relu"


def test_the_bias_add_of_a_matmul_belongs_to_it() -> None:
    (layer,) = NETWORKS["matmul"]().graph.layers
    assert layer.bias == "b" and len(layer.absorbed) == 2


def test_layers_of_a_network() -> None:
    graph = NETWORKS["residual"]().graph
    assert [layer.name for layer in graph.layers] == ["conv1", "conv2", "conv3", "fc"]
    assert [layer.output for layer in graph.layers] == ["r1", "c2", "r3", "y"]
    assert graph.inputs == ("x",) and graph.outputs == ("y",)
    assert graph.nodes[graph.producer["s"]].op_type == "Add"
    assert len(graph.consumers["r1"]) == 2
    assert graph.tensors["r2"].shape == (1, 8, 8, 8)
    assert graph.tensors["r2"].elements == 512


def test_several_inputs_and_products_of_activations() -> None:
    graph = NETWORKS["text"]().graph
    assert graph.inputs == ("ids", "mask")
    assert [layer.name for layer in graph.layers] == ["words", "query", "key", "head"]
    assert graph.tensors["ids"].dtype == "int64"
    assert graph.other_macs == 2 * 4 * 4 * 8  # q·kᵀ and a·v over four tokens of eight
    assert graph.macs == 2 * 4 * 8 * 8 + 8 * 3 + graph.other_macs


def _conv(*tail: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **arrays: Any) -> Graph:
    model = build(
        [node("Conv", ["x", "c.weight", "c.bias"], ["h"]), *tail],
        {"c.weight": Weights()(4, 3, 3, 3), "c.bias": Weights(1).bias(4), **arrays},
        {"x": ["N", 3, 6, 6]},
        outputs,
    )
    return _read(model, images(3, 6, 6))


def test_a_relu_beside_another_reader_is_not_absorbed() -> None:
    graph = _conv(node("Relu", ["h"], ["r"]), node("Add", ["r", "h"], ["y"]))
    assert graph.layers[0].absorbed == () and graph.layers[0].output == "h"


def test_a_relu_behind_an_output_is_not_absorbed() -> None:
    graph = _conv(node("Relu", ["h"], ["y"]), outputs=("h", "y"))
    assert graph.layers[0].absorbed == ()


@pytest.mark.parametrize(("low", "high", "absorbed"), [(0, 6, 1), (-1, 1, 1), (1, 2, 0)])
def test_a_clip_is_absorbed_if_zero_is_inside(low: float, high: float, absorbed: int) -> None:
    """An 8-bit grid contains zero, so it can only stand for such a Clip."""
    graph = _conv(node("Clip", ["h", "l", "u"], ["y"]), l=np.float32(low), u=np.float32(high))
    assert len(graph.layers[0].absorbed) == absorbed


def test_clamp_bounds() -> None:
    arrays = {"l": np.float32(-2), "u": np.float32(3)}
    protos = {n: numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()}
    assert clamp_bounds(node("Relu", ["x"], ["y"]), protos) == (0, math.inf)
    assert clamp_bounds(node("Clip", ["x", "l", "u"], ["y"]), protos) == (-2, 3)
    assert clamp_bounds(node("Clip", ["x", "", "u"], ["y"]), protos) == (-math.inf, 3)
    assert clamp_bounds(node("Clip", ["x", "l"], ["y"]), protos) == (-2, math.inf)
    assert clamp_bounds(node("Clip", ["x", "other"], ["y"]), protos) is None
    assert clamp_bounds(node("Sigmoid", ["x"], ["y"]), protos) is None


def test_an_optional_bias_left_empty_is_no_bias() -> None:
    weight = Weights()(4, 3, 3, 3)
    model = build(
        [node("Conv", ["x", "c.weight", ""], ["y"])],
        {"c.weight": weight},
        {"x": ["N", 3, 6, 6]},
        ["y"],
    )
    assert _read(model, images(3, 6, 6)).layers[0].bias is None


# --- names -----------------------------------------------------------------------------------


def _shared() -> Graph:
    w = Weights()
    model = build(
        [
            node("Gemm", ["x", "fc.weight"], ["a"], name="first", transB=1),
            node("Relu", ["a"], ["r"]),
            node("Gemm", ["r", "fc.weight"], ["b"], name="second", transB=1),
            node("MatMul", ["b", "const"], ["c"], name="third"),
            node("MatMul", ["c", "const2"], ["y"]),
        ],
        {"fc.weight": w(5, 5), "const": w(5, 4), "const2": w(4, 2)},
        {"x": ["N", 5]},
        ["y"],
    )
    return _read(model, images(5))


def test_layers_are_named_by_their_weight_else_by_their_node() -> None:
    graph = _shared()
    assert [layer.name for layer in graph.layers] == ["fc", "fc#2", "third", "y"]
    for layer in graph.layers:
        assert graph.nodes[layer.node].name == layer.name
        assert graph.by_name[layer.name] is layer and graph.by_node[layer.node] is layer


def test_a_shared_weight_is_one_array() -> None:
    first, second, *_ = _shared().layers
    assert first.weight == second.weight == "fc.weight"


def test_names_are_unique_even_where_nodes_share_theirs() -> None:
    w = Weights()
    model = build(
        [
            node("MatMul", ["x", "a"], ["h"], name="same"),
            node("Relu", ["h"], ["r"], name="same"),
            node("MatMul", ["r", "b"], ["y"], name="same"),
        ],
        {"a": w(4, 4), "b": w(4, 4)},
        {"x": ["N", 4]},
        ["y"],
    )
    graph = Graph.read(model, (images(4),))  # onnxruntime refuses the file as it is
    names = [n.name for n in graph.nodes]
    assert len(set(names)) == len(names) == 3


def test_arrays_cannot_be_changed() -> None:
    graph = NETWORKS["gemm"]().graph
    with pytest.raises(ValueError, match="read-only"):
        graph.array("fc.weight")[0, 0] = 1


# --- normalizing -----------------------------------------------------------------------------


def _norm(count: int, seed: int = 5) -> dict[str, Array]:
    g = np.random.default_rng(seed)
    return {
        "gamma": g.uniform(0.5, 2, count).astype(np.float32),
        "beta": g.normal(size=count).astype(np.float32),
        "mean": g.normal(size=count).astype(np.float32),
        "variance": g.uniform(0.1, 2, count).astype(np.float32),
    }


NORM = ["gamma", "beta", "mean", "variance"]


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("op", ("Conv", "ConvTranspose"))
def test_batch_normalization_folds_into_a_convolution(op: str, bias: bool) -> None:
    shape = (4, 3, 3, 3) if op == "Conv" else (3, 4, 3, 3)
    inputs = ["x", "c.weight", "c.bias"] if bias else ["x", "c.weight"]
    model = build(
        [
            node(op, inputs, ["h"]),
            node("BatchNormalization", ["h", *NORM], ["n"], epsilon=0.01),
            node("Relu", ["n"], ["y"]),
        ],
        {"c.weight": Weights()(*shape), "c.bias": Weights(1).bias(4), **_norm(4)},
        {"x": ["N", 3, 6, 6]},
        ["y"],
    )
    graph = _read(model, images(3, 6, 6))
    assert _ops(graph) == [op, "Relu"]
    assert graph.layers[0].name == "c" and graph.layers[0].bias is not None


def test_batch_normalization_of_what_others_read_stays() -> None:
    graph = _conv(
        node("BatchNormalization", ["h", *NORM], ["n"]),
        node("Add", ["n", "h"], ["y"]),
        **_norm(4),
    )
    assert "BatchNormalization" in _ops(graph)


def test_a_weight_that_two_convolutions_share_is_not_folded() -> None:
    w = Weights()
    model = build(
        [
            node("Conv", ["x", "c.weight"], ["a"]),
            node("BatchNormalization", ["a", *NORM], ["n"]),
            node("Conv", ["n", "c.weight"], ["y"]),
        ],
        {"c.weight": w(3, 3, 3, 3), **_norm(3)},
        {"x": ["N", 3, 8, 8]},
        ["y"],
    )
    assert "BatchNormalization" in _ops(_read(model, images(3, 8, 8)))


def test_a_folded_bias_does_not_take_a_name_that_is_in_use() -> None:
    w = Weights()
    model = build(
        [
            node("Conv", ["x", "c", "c_bias"], ["a"]),
            node("BatchNormalization", ["a", *NORM], ["n"]),
            node("Conv", ["n", "d", "c_bias"], ["y"]),
        ],
        {"c": w(4, 3, 3, 3), "d": w(4, 4, 3, 3), "c_bias": w.bias(4), **_norm(4)},
        {"x": ["N", 3, 8, 8]},
        ["y"],
    )
    assert _ops(_read(model, images(3, 8, 8))) == ["Conv", "Conv"]


def _padded(pads: list[int], *rest: str, **attributes: Any) -> Graph:
    arrays = {
        "c.weight": Weights()(4, 3, 3, 3),
        "pads": np.array(pads),
        "zero": np.float32(0),
        "one": np.float32(1),
    }
    model = build(
        [
            node("Pad", ["x", "pads", *rest], ["p"], **attributes),
            node("Conv", ["p", "c.weight"], ["y"], pads=[0, 1, 0, 1]),
        ],
        arrays,
        {"x": ["N", 3, 6, 6]},
        ["y"],
    )
    return _read(model, images(3, 6, 6))


@pytest.mark.parametrize("rest", ((), ("zero",)))
def test_a_zero_pad_folds_into_the_convolution(rest: tuple[str, ...]) -> None:
    graph = _padded([0, 0, 1, 0, 0, 0, 2, 3], *rest)
    assert _ops(graph) == ["Conv"]
    assert graph.layers[0].output_shape == (1, 4, 7, 9)


@pytest.mark.parametrize(
    ("pads", "rest", "attributes"),
    [
        ([0, 0, 1, 1, 0, 0, 1, 1], ("one",), {}),
        ([0, 0, 1, 1, 0, 0, 1, 1], (), {"mode": "reflect"}),
        ([0, 0, -1, 0, 0, 0, 0, 0], (), {}),
    ],
)
def test_another_pad_stays(
    pads: list[int], rest: tuple[str, ...], attributes: dict[str, str]
) -> None:
    assert _ops(_padded(pads, *rest, **attributes)) == ["Pad", "Conv"]


def test_a_pad_that_others_read_stays() -> None:
    model = build(
        [
            node("Pad", ["x", "pads"], ["p"]),
            node("Conv", ["p", "c.weight"], ["h"], pads=[1, 1, 1, 1]),
            node("Add", ["h", "p"], ["y"]),
        ],
        {"c.weight": Weights()(3, 3, 3, 3), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])},
        {"x": ["N", 3, 6, 6]},
        ["y"],
    )
    assert "Pad" in _ops(_read(model, images(3, 6, 6)))


@pytest.mark.parametrize(
    ("axes", "keepdims", "pooled"),
    [([2, 3], 1, True), ([-1, -2], 1, True), ([2, 3], 0, False), ([1, 2], 1, False)],
)
def test_a_spatial_mean_becomes_a_pool(axes: list[int], keepdims: int, pooled: bool) -> None:
    graph = _conv(
        node("Relu", ["h"], ["r"]),
        node("ReduceMean", ["r", "axes"], ["y"], keepdims=keepdims),
        axes=np.array(axes),
    )
    assert ("GlobalAveragePool" in _ops(graph)) == pooled


def test_identities_and_dropouts_and_constants_go() -> None:
    value = numpy_helper.from_array(Weights()(4, 3, 3, 3), "ignored")
    model = build(
        [
            node("Constant", [], ["c.weight"], value=value),
            node("Constant", [], ["one"], value_float=1.5),
            node("Constant", [], ["shape"], value_ints=[0, -1]),
            node("Identity", ["x"], ["i"]),
            node("Conv", ["i", "c.weight"], ["h"]),
            node("Dropout", ["h"], ["d"]),
            node("Mul", ["d", "one"], ["m"]),
            node("Reshape", ["m", "shape"], ["f"]),
            node("Identity", ["f"], ["y"]),
        ],
        {"unused": np.ones(3, np.float32)},
        {"x": ["N", 3, 6, 6]},
        ["y"],
    )
    graph = _read(model, images(3, 6, 6))
    assert _ops(graph) == ["Conv", "Mul", "Reshape", "Identity"]  # the last makes the output
    assert "unused" not in graph.initializers
    assert graph.layers[0].name == "c"


@pytest.mark.parametrize("transposed", (0, 1))
def test_the_factors_of_a_gemm_fold(transposed: int) -> None:
    w = Weights()
    model = build(
        [
            node("Gemm", ["x", "w", "b"], ["h"], alpha=2.0, beta=0.5, transB=transposed),
            node("Gemm", ["h", "w", "b"], ["y"], alpha=0.25, beta=3.0, transB=transposed),
        ],
        {"w": w(5, 5), "b": w.bias(5)},
        {"x": ["N", 5]},
        ["y"],
    )
    graph = _read(model, images(5))
    assert len(graph.layers) == 2
    assert graph.layers[0].weight != graph.layers[1].weight


@pytest.mark.parametrize("shape", ((), (1,), (1, 7), (7,)))
def test_a_gemm_bias_of_any_shape_keeps_the_outputs(shape: tuple[int, ...]) -> None:
    bias = np.ones(shape, np.float32)
    model = build(
        [node("Gemm", ["x", "w", "b"], ["h"]), node("MatMul", ["h", "v"], ["y"])],
        {"w": Weights()(5, 7), "b": bias, "v": Weights()(7, 2)},
        {"x": ["N", 5]},
        ["y"],
    )
    found = _read(model, images(5)).by_name
    assert ("h" in found) == (bias.size == 7)


def _older(opset: int) -> onnx.ModelProto:
    w = Weights()
    mean = {"axes": [2, 3]} if opset < 18 else {}
    arrays = {} if opset < 18 else {"axes": np.array([2, 3])}
    return build(
        [
            node("Pad", ["x", "pads"], ["p"]),
            node("Conv", ["p", "c.weight"], ["h"]),
            node("BatchNormalization", ["h", *NORM], ["n"]),
            node("Clip", ["n", "zero", "six"], ["r"]),
            node("ReduceMean", ["r", *arrays], ["g"], keepdims=1, **mean),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
        ],
        {
            "c.weight": w(4, 3, 3, 3),
            "fc.weight": w(5, 4),
            "fc.bias": w.bias(5),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "zero": np.float32(0),
            "six": np.float32(6),
            **arrays,
            **_norm(4),
        },
        {"x": ["N", 3, 6, 6]},
        ["y"],
        opset=opset,
    )


@pytest.mark.parametrize("opset", (11, 13, 17, 21, 23))
def test_files_of_other_opsets_are_read(opset: int) -> None:
    graph = _read(_older(opset), images(3, 6, 6))
    assert _ops(graph) == ["Conv", "Clip", "GlobalAveragePool", "Flatten", "Gemm"]
    assert [layer.name for layer in graph.layers] == ["c", "fc"]
    versions = [o.version for o in graph.model.opset_import if not o.domain]
    assert versions == [max(opset, 21)]


def test_normalizing_twice_changes_nothing() -> None:
    once = Graph.read(_older(17), (images(3, 6, 6),))
    twice = Graph.read(once.model, (images(3, 6, 6),))
    assert once.fingerprint == twice.fingerprint
    assert once.layers == twice.layers


def test_the_given_model_is_left_alone() -> None:
    model = _older(17)
    before = model.SerializeToString()
    normalize(model)
    assert model.SerializeToString() == before


def test_weights_listed_as_inputs_are_no_inputs() -> None:
    model = _older(13)
    model.ir_version = 3
    for proto in model.graph.initializer:
        model.graph.input.append(
            helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims))
        )
    assert Graph.read(model, (images(3, 6, 6),)).inputs == ("x",)


def test_a_static_batch_of_one_is_read(tmp_path: Path) -> None:
    model = build(
        [node("Conv", ["x", "c.weight"], ["y"])],
        {"c.weight": Weights()(4, 3, 3, 3)},
        {"x": [1, 3, 6, 6]},
        ["y"],
    )
    path = tmp_path / "static.onnx"
    onnx.save(model, path)
    graph = Graph.read(path, (images(3, 6, 6),))  # of a longer example one sample is used
    assert graph.layers[0].output_shape == (1, 4, 4, 4)


# --- pickling --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("residual", "text"))
def test_a_graph_pickles(name: str) -> None:
    net = NETWORKS[name]()
    again: Graph = pickle.loads(pickle.dumps(net.graph))
    assert again.layers == net.graph.layers and again.tensors == net.graph.tensors
    assert again.fingerprint == net.graph.fingerprint and again.macs == net.graph.macs
    for a, b in zip(run(again.model, *net.inputs), net.reference, strict=True):
        assert np.array_equal(a, b)


def test_the_fingerprint_sees_the_weights() -> None:
    first, second = _older(21), _older(21)
    array = numpy_helper.to_array(second.graph.initializer[0]).copy()
    array.reshape(-1)[0] += 1
    second.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(array, second.graph.initializer[0].name)
    )
    x = images(3, 6, 6)
    same = Graph.read(_older(21), (x,)).fingerprint
    assert Graph.read(first, (x,)).fingerprint == same != Graph.read(second, (x,)).fingerprint


# --- what cannot be read ---------------------------------------------------------------------


def _gemm(weight: Array, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    model = build([node("Gemm", ["x", "w"], ["y"])], {"w": weight}, {"x": ["N", 5]}, ["y"])
    model.graph.input[0].type.tensor_type.elem_type = dtype
    return model


def _quantized() -> onnx.ModelProto:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("Gemm", ["d", "w"], ["y"]),
    ]
    arrays = {"s": np.float32(0.1), "z": np.uint8(128), "w": Weights()(5, 3)}
    return build(nodes, arrays, {"x": ["N", 5]}, ["y"])


def _fixed_batch() -> onnx.ModelProto:
    return build([node("Gemm", ["x", "w"], ["y"])], {"w": Weights()(5, 3)}, {"x": [8, 5]}, ["y"])


def _infinite() -> onnx.ModelProto:
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Exp", ["h"], ["y"])]
    return build(nodes, {"w": np.full((5, 3), 1e6, np.float32)}, {"x": ["N", 5]}, ["y"])


def _unknown_operator() -> onnx.ModelProto:
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("NoSuchOperator", ["h"], ["y"])]
    return build(nodes, {"w": Weights()(5, 3)}, {"x": ["N", 5]}, ["y"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_gemm(Weights()(5, 3).astype(np.float16), TensorProto.FLOAT16), "'w' is float16"),
        (_gemm(Weights()(5, 3).astype(np.float64), TensorProto.DOUBLE), "'w' is double"),
        (_gemm(np.full((5, 3), np.nan, np.float32)), "'w' contains NaN"),
        (_gemm(np.full((5, 3), np.inf, np.float32)), "'w' contains NaN or infinity"),
        (_quantized(), "already quantized (QuantizeLinear"),
        (_fixed_batch(), "'x' has a fixed batch of 8"),
        (_infinite(), "output 'y' is NaN or infinite"),
        (_unknown_operator(), "NoSuchOperator"),
        (build([node("Relu", ["x"], ["y"])], {}, {"x": ["N", 5]}, ["y"]), "no layer to quantize"),
        (build([], {}, {"x": ["N", 5]}, ["x"]), "no nodes"),
        (build([node("Gemm", ["x", "w"], ["y"])], {"w": Weights()(5, 3)}, {"x": ["N", 5]}, ["y"],
               opset=27), "opset 27"),
        (build([node("Gemm", ["x", "w"], ["y"])], {"w": Weights()(6, 3)}, {"x": ["N", "C"]}, ["y"]),
         "running it on example_inputs failed"),
        (build([node("Gemm", ["x", "u"], ["y"])], {}, {"x": ["N", 5], "u": ["N", 5]}, ["y"]),
         "2 inputs (x, u), but example_inputs has 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_model_that_cannot_be_used_is_one_line(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        Graph.read(model, (images(5),))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", (b"", b"no model", b"\x08\x0a\x12\x03"))
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.onnx") as caught:
        Graph.read(path, (images(5),))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx"):
        Graph.read(tmp_path / "none.onnx", (images(5),))
