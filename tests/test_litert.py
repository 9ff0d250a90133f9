"""TFLite files: run by the LiteRT interpreter and compared with onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import NETWORKS
from test_cmsis import ALL

from autoquant.deploy.litert import TFLITE, tflite_files
from autoquant.errors import RunError

interpreter = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="pip install 'autoquant[litert]'"
)


def executed(data: bytes, inputs: np.ndarray) -> np.ndarray:
    """Outputs of the rows of ``inputs`` (N, C, …), by the kernels without delegates."""
    found: Any = interpreter.Interpreter(
        model_content=data,
        experimental_op_resolver_type=interpreter.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    found.allocate_tensors()
    (entry,), (result,) = found.get_input_details(), found.get_output_details()
    rows = []
    for row in inputs:
        wide = row.reshape(row.shape[0], *([1] * (3 - row.ndim)), *row.shape[1:])
        found.set_tensor(entry["index"], wide.transpose(1, 2, 0)[None])
        found.invoke()
        value = found.get_tensor(result["index"])[0]
        rows.append(value.transpose(2, 0, 1) if value.ndim == 3 else value)
    return np.stack(rows)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "depthwise", "dilated"])
def test_one_layer_is_within_one_step(name: str) -> None:
    net = NETWORKS[name]()
    model = net.assemble(net.uniform(8, 8))
    expected = net.run(model)[0]
    found = executed(tflite_files(model)[TFLITE], net.inputs[0]).reshape(expected.shape)
    step = np.diff(np.unique(expected)).min()
    assert np.abs(np.round((found - expected) / step)).max() <= 1
    assert (np.abs(found - expected) > step / 2).mean() < 0.02
    assert len(np.unique(expected)) > 20


@pytest.mark.parametrize("name", ["gemm", "gemm_transposed"])
def test_a_last_product_is_its_accumulators(name: str) -> None:
    net = NETWORKS[name]()
    model = net.assemble(net.uniform(4, 8))
    expected = net.run(model)[0]
    found = executed(tflite_files(model)[TFLITE], net.inputs[0])
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [(8, 8), (3, 8)])
@pytest.mark.parametrize("name", ["residual", "pooled", "wide", "chain"])
def test_networks_agree(name: str, bits: tuple[int, int]) -> None:
    net = ALL[name]()
    model = net.assemble(net.uniform(*bits))
    expected = net.run(model)[0]
    found = executed(tflite_files(model)[TFLITE], net.inputs[0]).reshape(expected.shape)
    assert np.abs(found - expected).mean() <= 0.025 * np.abs(expected).mean()
    assert np.abs(found - expected).max() <= 0.05 * np.ptp(expected)


@pytest.mark.parametrize(
    ("name", "bits", "message"),
    [
        ("grouped", (8, 8), "groups has no TFLite form"),
        ("chain", (32, 32), "does not compute in int8"),
        ("attention", (8, 8), "layer"),
    ],
)
def test_what_it_cannot_say_is_named(name: str, bits: tuple[int, int], message: str) -> None:
    net = NETWORKS[name]()
    with pytest.raises(RunError, match=message):
        tflite_files(net.assemble(net.uniform(*bits)))


def test_two_files_are_equal() -> None:
    net = NETWORKS["residual"]()
    model = net.assemble(net.uniform(8, 8))
    assert tflite_files(model) == tflite_files(model)
