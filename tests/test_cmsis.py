"""C headers: compiled on this machine and run against onnxruntime."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import NETWORKS, Network, Weights, build, images, network, node, run
from onnx import numpy_helper

from autoquant.candidate import LayerChoice
from autoquant.compress.qdq import assemble
from autoquant.deploy.cmsis import header_files, multiplier_and_shift
from autoquant.errors import RunError

COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler on this machine")


def pooled() -> Network:
    """A convolution, both kinds of pooling, a flattening of (C, H, W), and a hidden product."""
    w = Weights(11)
    model = build(
        [
            node("Conv", ["x", "conv.weight", "conv.bias"], ["c"], strides=[2, 1],
                 pads=[1, 0, 1, 1]),
            node("Relu", ["c"], ["r"]),
            node("MaxPool", ["r"], ["m"], kernel_shape=[2, 2], strides=[1, 1]),
            node("AveragePool", ["m"], ["a"], kernel_shape=[2, 3], strides=[1, 2]),
            node("Flatten", ["a"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["h"], transB=1),
            node("Relu", ["h"], ["hr"]),
            node("Gemm", ["hr", "out.weight", "out.bias"], ["y"]),
        ],
        {
            "conv.weight": w(6, 3, 3, 2),
            "conv.bias": w.bias(6),
            "fc.weight": w(10, 6 * 2 * 3),
            "fc.bias": w.bias(10),
            "out.weight": w(10, 4, fan_in=10),
            "out.bias": w.bias(4),
        },
        {"x": ["N", 3, 8, 9]},
        ["y"],
    )  # fmt: skip
    return network(model, images(3, 8, 9))


ALL = {**NETWORKS, "pooled": pooled}


def compiled(model: onnx.ModelProto, folder: Path) -> Path:
    """The program of ``main.c``, built without a warning."""
    for name, data in header_files(model).items():
        (folder / name).write_bytes(data)
    assert COMPILER is not None
    command = [COMPILER, "-std=c99", "-O1", "-Wall", "-Werror", "main.c", "-lm", "-o", "model"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "model"


def executed(program: Path, inputs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    data = np.ascontiguousarray(inputs, np.float32).tobytes()
    done = subprocess.run([program], input=data, capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.float32).reshape(shape)


def output_step(model: onnx.ModelProto) -> float:
    """The scale of the output's grid."""
    last = next(n for n in model.graph.node if n.output[0] == model.graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    return float(
        numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == last.input[1]))
    )


@needs_compiler
@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "depthwise", "grouped", "dilated"])
def test_one_layer_is_within_one_step(name: str, dialect: str, tmp_path: Path) -> None:
    net = NETWORKS[name]()
    candidate = net.resolved(net.uniform(8, 8))
    model = assemble(net.graph, candidate, net.calibration, net.bank, dialect)
    expected = net.run(model)[0]
    found = executed(compiled(model, tmp_path), net.inputs[0], expected.shape)
    steps = np.round((found - expected) / output_step(model))
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 0.02
    assert len(np.unique(expected)) > 20


@needs_compiler
@pytest.mark.parametrize("name", ["gemm", "gemm_transposed"])
def test_a_last_product_is_its_accumulators(name: str, tmp_path: Path) -> None:
    net = NETWORKS[name]()
    model = net.assemble(net.uniform(4, 8))
    expected = net.run(model)[0]
    found = executed(compiled(model, tmp_path), net.inputs[0], expected.shape)
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (3, 8)])
@pytest.mark.parametrize("name", ["residual", "pooled", "wide", "chain"])
def test_networks_agree(name: str, bits: tuple[int, int], tmp_path: Path) -> None:
    net = ALL[name]()
    model = net.assemble(net.uniform(*bits))
    expected = net.run(model)[0]
    found = executed(compiled(model, tmp_path), net.inputs[0], expected.shape)
    rows = len(expected)
    assert np.abs(found - expected).mean() <= 0.025 * np.abs(expected).mean()
    assert np.abs(found - expected).max() <= 0.05 * np.ptp(expected)
    first, second = expected.reshape(rows, -1), found.reshape(rows, -1)
    margin = np.sort(first)[:, -1] - np.sort(first)[:, -2]
    clear = margin > 0.02 * np.ptp(expected)
    assert clear.sum() >= rows // 4 or name == "chain"
    assert np.array_equal(first.argmax(1)[clear], second.argmax(1)[clear])


def stages(model: onnx.ModelProto) -> list[onnx.ModelProto]:
    """The part of a graph from each 8-bit tensor to the one that is made of it alone."""
    producers = {name: n for n in model.graph.node for name in n.output}
    initializers = {i.name for i in model.graph.initializer}
    found = []
    for last in model.graph.node:
        if last.op_type != "DequantizeLinear" or not last.input[0].endswith(".q"):
            continue
        todo, sources = [producers[last.input[0]].input[0]], set()
        while todo:
            name = todo.pop()
            made = producers.get(name)
            if made is None or (made.op_type == "DequantizeLinear" and made.input[0] in producers):
                if made is not None and made.input[0].endswith(".q"):
                    sources.add(made.input[0])
            elif name not in initializers:
                todo += made.input
        if len(sources) != 1:
            continue
        (source,) = sources
        part = onnx.ModelProto()
        part.CopyFrom(model)
        needed, nodes = {last.output[0]}, []
        for made in reversed(model.graph.node):
            if needed & set(made.output):
                nodes.append(made)
                needed |= set(made.input) if source not in made.output else set(made.input[1:])
        del part.graph.node[:], part.graph.input[:], part.graph.output[:]
        part.graph.node.extend(nodes[::-1])
        entry = producers[source].input[0]
        shapes = onnx.shape_inference.infer_shapes(model).graph
        known = {v.name: v for v in (*shapes.value_info, *shapes.input, *shapes.output)}
        part.graph.input.append(known[entry])
        part.graph.output.append(
            onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None)
        )
        found.append(part)
    return found


@needs_compiler
@pytest.mark.parametrize("name", ["residual", "pooled"])
def test_every_requantization_is_within_one_step(name: str, tmp_path: Path) -> None:
    """Each layer alone, on the inputs that onnxruntime has there."""
    net = ALL[name]()
    model = net.assemble(net.uniform(8, 8))
    parts, checked = stages(model), 0
    assert len(parts) >= 4
    for i, part in enumerate(parts):
        entry = part.graph.input[0].name
        whole = onnx.ModelProto()
        whole.CopyFrom(model)
        if entry != "x":
            whole.graph.output.append(part.graph.input[0])
        values = run(whole, *net.inputs)[-1] if entry != "x" else net.inputs[0]
        expected = run(part, values)[0]
        folder = tmp_path / str(i)
        folder.mkdir()
        found = executed(compiled(part, folder), values, expected.shape)
        assert np.abs(np.round((found - expected) / output_step(part))).max() <= 1
        checked += 1
    assert checked == len(parts)


@needs_compiler
def test_narrow_activations_are_requantized(tmp_path: Path) -> None:
    net = NETWORKS["chain"]()
    layers = dict(net.uniform(8, 8).layers) | {"l2": LayerChoice(8, 4)}
    model = net.assemble(layers)
    expected = net.run(model)[0]
    found = executed(compiled(model, tmp_path), net.inputs[0], expected.shape)
    assert np.abs(found - expected).mean() <= 0.02 * np.abs(expected).mean()


def test_the_files_are_the_same_every_time() -> None:
    net = NETWORKS["residual"]()
    model = net.assemble(net.uniform(4, 8))
    assert header_files(model) == header_files(model)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 0.3, 0.5, 1 - 1e-12, 1.0, 7.25])
def test_multipliers_have_31_bits(scale: float) -> None:
    multiplier, shift = multiplier_and_shift(scale)
    assert 0 <= multiplier < 2**31
    assert multiplier * 2.0 ** (shift - 31) == pytest.approx(scale, rel=1e-9, abs=2**-31)


@pytest.mark.parametrize(
    ("name", "layer", "choice", "reason"),
    [
        ("residual", "conv2", LayerChoice(32, 32), "layer 'conv2' (Conv): it does not compute"),
        ("residual", "conv2", LayerChoice(4, 32), "layer 'conv2' (Conv): it does not compute"),
        ("residual", "conv2", LayerChoice(8, 16), "layer 'conv2' (Conv): it does not compute"),
        ("conv3d", "conv", LayerChoice(8, 8), "not (N, C, H, W)"),
        ("text", "head", LayerChoice(8, 8), "one input and one output"),
        ("matmul", "w", LayerChoice(8, 8), "a product"),
    ],
)
def test_what_has_no_s8_kernel_is_named(
    name: str, layer: str, choice: LayerChoice, reason: str
) -> None:
    net = NETWORKS[name]()
    layers = dict(net.uniform(8, 8).layers) | {layer: choice}
    layers = {n: c for n, c in layers.items() if n in net.graph.by_name}
    with pytest.raises(RunError) as error:
        header_files(net.assemble(layers))
    assert reason in str(error.value)


def test_the_package_holds_the_c_files() -> None:
    files = header_files(NETWORKS["conv2d"]().assemble(NETWORKS["conv2d"]().uniform(8, 8)))
    assert set(files) == {"model.h", "autoquant_ref.h", "main.c"}
