from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from conftest import NETWORKS, build, node
from contracts.runtime import RuntimeContract

from autoquant.errors import ModelError
from autoquant.runtime import (
    RUNTIMES,
    OnnxRuntime,
    Runtime,
    describe,
    kernels,
    measure,
    optimized_graph,
    run_batches,
)
from autoquant.runtime_openvino import is_installed
from autoquant.task import Array

here = pytest.mark.skipif(not is_installed(), reason="pip install 'autoquant[openvino]'")


@pytest.mark.parametrize(
    "runtime",
    [
        pytest.param(make(), id=name, marks=here if name.startswith("openvino") else ())
        for name, make in RUNTIMES.items()
    ],
)
class TestRuntimes(RuntimeContract):
    @pytest.fixture(autouse=True)
    def _processor(self, runtime: Runtime) -> None:
        """Skips what this processor cannot do."""
        try:
            runtime.open(
                build([node("Relu", ["x"], ["y"])], {}, {"x": ["N", 4]}, ["y"]).SerializeToString()
            )
        except ModelError as error:
            if "this processor has no" not in str(error):
                raise
            pytest.skip(str(error))


class Recorder:
    """A session that takes its time and remembers the order of the calls."""

    input_names = ("x",)

    def __init__(self, name: str, calls: list[str], seconds: float = 0.0) -> None:
        self.name, self.calls, self.seconds = name, calls, seconds

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.calls.append(self.name)
        time.sleep(self.seconds)
        return [inputs[0] * 2]


def test_batches_come_back_in_order_for_any_number_of_workers() -> None:
    class Slow(Recorder):
        def run(self, inputs: Sequence[Array]) -> list[Array]:
            time.sleep(0.002 * (8 - float(inputs[0][0])))  # the first take longest
            return [inputs[0] * 2]

    batches = [[np.full(3, float(i))] for i in range(8)]
    for workers in (1, 4, 100):
        outputs = run_batches(Slow("a", []), batches, workers)
        assert [out[0][0] for out in outputs] == [2.0 * i for i in range(8)]


def test_a_latency_is_the_minimum_and_says_how_it_was_made() -> None:
    calls: list[str] = []
    sessions = {"fast": Recorder("fast", calls, 0.001), "slow": Recorder("slow", calls, 0.004)}
    inputs = [np.zeros((3, 2), np.float32)]
    found = measure(sessions, inputs, threads=2, seconds=0.0, min_rounds=5)
    assert found["fast"].latency_ms < 3.0 < found["slow"].latency_ms
    for latency in found.values():
        assert 0.9 <= latency.latency_ms <= latency.latency_median_ms
        assert latency.latency_spread_ms >= 0
        assert (latency.rounds, latency.batch, latency.threads) == (5, 3, 2)
        assert latency.runtime == "onnxruntime"


def test_rounds_are_interleaved() -> None:
    """A machine that slows down must slow every session, not the last one."""
    calls: list[str] = []
    sessions = {name: Recorder(name, calls) for name in "abc"}
    measure(sessions, [np.zeros(1)], threads=1, seconds=0.0, min_rounds=4)
    order = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert order == list("abc") * 5  # a first run each, then four rounds


def test_time_is_spent_within_the_bounds_on_rounds() -> None:
    found = measure({"a": Recorder("a", [])}, [np.zeros(1)], threads=1, seconds=10.0, max_rounds=30)
    assert found["a"].rounds == 30


def test_sums_of_int8_products_do_not_saturate() -> None:
    """Nor without VNNI, where they would unless told not to."""
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        node("MatMulInteger", ["q", "w", "zero", "none"], ["sum"]),
        node("Cast", ["sum"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    weights = {"w": np.full((8, 3), 127, np.int8), "none": np.zeros((), np.int8)}
    model = build(nodes, weights, {"x": ["N", 8]}, ["y"])
    found = OnnxRuntime().open(model.SerializeToString()).run([np.full((2, 8), 255, np.float32)])
    np.testing.assert_array_equal(found[0], 8 * 255 * 127)


def test_kernels_are_those_that_run() -> None:
    model = build(
        [
            node("Identity", ["x"], ["i"]),
            node("Gemm", ["i", "w"], ["y"]),
        ],
        {"w": np.ones((3, 2), np.float32)},
        {"x": ["N", 3]},
        ["y"],
    ).SerializeToString()
    assert dict(kernels(model)) == {"Gemm": 1}
    assert [n.op_type for n in optimized_graph(model).graph.node] == ["Gemm"]


def test_a_model_can_be_run_as_it_stands_in_the_file() -> None:
    net = NETWORKS["conv2d"]()
    data = net.graph.model.SerializeToString()
    plain = OnnxRuntime().open(data, optimize=False).run(net.inputs)[0]
    np.testing.assert_allclose(plain, net.reference[0], rtol=1e-4, atol=1e-5)


def test_kernel_times_name_operator_and_node() -> None:
    net = NETWORKS["gemm"]()
    found = OnnxRuntime().kernel_times(net.graph.model.SerializeToString(), net.inputs, runs=3)
    assert list(found) == ["Gemm/fc"]
    assert 0 <= found["Gemm/fc"] < 1000


def test_the_machine_is_described() -> None:
    found = describe()
    assert set(found) >= {"cpu", "cores", "system", "onnxruntime"}
    assert all(found.values()) and int(found["cores"]) >= 1
