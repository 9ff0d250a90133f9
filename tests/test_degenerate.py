"""Networks and data that break statistics: a finite file comes out, or an error with a name."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import pytest
from conftest import ROWS, Network, Weights, build, images, network, node, run

from autoquant.calibration import Calibration, calibrate
from autoquant.candidate import ROUNDING_NAMES, Candidate
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.polish import polish
from autoquant.errors import ModelError
from autoquant.graph import Graph
from autoquant.task import Array, Split

_POLISH = sys.modules[polish.__module__]
DATA = ("plain", "zero", "constant", "constant channel", "dead channel", "one sample", "outlier")
WEIGHTS = ("outlier", "row of zeros", "all zero", "tiny", "dead relu")


def _network(data: Array, change: str = "") -> Network:
    """Conv+Relu → depthwise → transposed → mean → Gemm, with one weight changed."""
    w = Weights(13)
    arrays: dict[str, Array] = {
        "a.weight": w(6, 3, 3, 3),
        "a.bias": w.bias(6),
        "b.weight": w(6, 1, 3, 3),
        "b.bias": w.bias(6),
        "c.weight": w(6, 4, 2, 2, fan_in=24),
        "c.bias": w.bias(4),
        "d.weight": w(5, 4),
        "d.bias": w.bias(5),
    }
    if change == "outlier":
        arrays["a.weight"][1, 1, 1, 1] = arrays["d.weight"][2, 2] = 1e6
    elif change == "row of zeros":
        arrays["a.weight"][1] = arrays["b.weight"][2] = arrays["d.weight"][3] = 0
        arrays["c.weight"][:, 1] = 0
    elif change == "all zero":
        arrays["b.weight"][:] = arrays["d.weight"][:] = 0
    elif change == "tiny":
        arrays["a.weight"] *= np.float32(1e-12)
    elif change == "dead relu":
        arrays["a.bias"][:] = -1e3
    nodes = [
        node("Conv", ["x", "a.weight", "a.bias"], ["a"], pads=[1, 1, 1, 1]),
        node("Relu", ["a"], ["ar"]),
        node("Conv", ["ar", "b.weight", "b.bias"], ["b"], group=6),
        node("ConvTranspose", ["b", "c.weight", "c.bias"], ["c"], strides=[2, 2]),
        node("GlobalAveragePool", ["c"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "d.weight", "d.bias"], ["y"], transB=1),
    ]
    return network(build(nodes, arrays, {"x": ["N", 3, 6, 6]}, ["y"]), data)


def _data(name: str) -> Array:
    x = images(3, 6, 6)
    if name == "zero":
        x[:] = 0
    elif name == "constant":
        x[:] = 0.7
    elif name == "constant channel":
        x[:, 1] = 1e3
    elif name == "dead channel":
        x[:, 1] = 0
    elif name == "one sample":
        x = x[:1]
    elif name == "outlier":
        x[3, 0, 2, 2] = 1e6
    return x


def _calibrated(net: Network) -> Calibration:
    return calibrate(net.graph, net.split, moments=True, threads=1)


def _check(net: Network, rounding: str) -> Mapping[tuple[int, int], float]:
    """Relative error of every width's artifact in onnxruntime; all of them finite."""
    calibration = _calibrated(net)
    bank = Bank(net.graph, rounding, calibration)
    reference = net.reference[0]
    found = {}
    for bits in ((2, 8), (4, 8), (8, 32)):
        candidate = net.resolved(net.uniform(*bits))
        artifact = compress(net.graph, candidate, calibration, bank, "onnxruntime")
        outputs = net.run(_model(artifact.model))[0]
        assert np.isfinite(outputs).all(), bits
        gap = np.abs(outputs - reference).max()
        found[bits] = float(gap / max(np.abs(reference).max(), 1e-6))
    return found


def _model(data: bytes):  # type: ignore[no-untyped-def]
    import onnx

    return onnx.ModelProto.FromString(data)


@pytest.mark.parametrize("rounding", ROUNDING_NAMES)
@pytest.mark.parametrize("name", DATA)
def test_any_calibration_data_gives_a_finite_file(name: str, rounding: str) -> None:
    errors = _check(_network(_data(name)), rounding)
    assert errors[8, 32] < 0.1  # weights alone, at 8 bits


@pytest.mark.parametrize("rounding", ROUNDING_NAMES)
@pytest.mark.parametrize("change", WEIGHTS)
def test_any_finite_weights_give_a_finite_file(change: str, rounding: str) -> None:
    errors = _check(_network(images(3, 6, 6), change), rounding)
    assert errors[8, 32] < (1.0 if change == "outlier" else 0.1)


@pytest.mark.parametrize("tuned", (True, False))
@pytest.mark.parametrize("name", DATA)
def test_polishing_any_calibration_data_gives_a_finite_file(
    name: str, tuned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_POLISH, "BATCH", 2)
    monkeypatch.setattr(_POLISH, "STEPS", 20)
    if not tuned:
        monkeypatch.setattr(_POLISH, "WORK", 0.0)
    net = _network(_data(name))
    calibration = _calibrated(net)
    bank = Bank(net.graph, "second-order", calibration)
    candidate = net.resolved(net.uniform(2, 8))
    polished = polish(net.graph, candidate, calibration, bank, [net.inputs], "onnxruntime")
    assert polished.overrides
    artifact = compress(net.graph, candidate, calibration, polished, "onnxruntime")
    assert np.isfinite(net.run(_model(artifact.model))[0]).all()


@pytest.mark.parametrize("rounding", ("second-order", "adaround"))
def test_one_vector_for_calibration_keeps_a_gemm_close(rounding: str) -> None:
    """A Gemm that saw one vector: its covariance is zero, its bias takes what is lost."""
    w = Weights(2)
    model = build(
        [node("Gemm", ["x", "w.weight", "b"], ["y"], transB=1)],
        {"w.weight": w(7, 16), "b": w.bias(7)},
        {"x": ["N", 16]},
        ["y"],
    )
    one = images(16)[:1]
    net = Network(Graph.read(model, [one]), (one,))
    bank = Bank(net.graph, rounding, _calibrated(net))
    candidate = net.resolved(net.uniform(3, 32))
    artifact = compress(net.graph, candidate, net.calibration, bank, "onnxruntime")
    np.testing.assert_allclose(net.run(_model(artifact.model))[0], net.reference[0], atol=1e-4)
    many = images(16)
    exact, coarse = run(model, many)[0], run(_model(artifact.model), many)[0]
    assert ((exact - coarse) ** 2).mean() < 0.3 * exact.var()


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_weights_that_are_not_finite_are_an_error_that_names_them(bad: float) -> None:
    model = build(
        [node("Gemm", ["x", "w.weight"], ["y"])],
        {"w.weight": np.where(np.eye(4) > 0, bad, 1).astype(np.float32)},
        {"x": ["N", 4]},
        ["y"],
    )
    with pytest.raises(ModelError, match=r"'w\.weight' contains NaN or infinity"):
        Graph.read(model, [images(4)])


def test_a_weight_that_turned_bad_after_reading_is_named_by_its_layer() -> None:
    net = _network(images(3, 6, 6))
    broken = net.graph.array("b.weight").copy()
    broken[0, 0, 0, 0] = np.nan
    net.graph._arrays["b.weight"] = broken
    bank = Bank(net.graph, "second-order", _calibrated(_network(images(3, 6, 6))))
    with pytest.raises(ModelError, match="layer 'b': its weight contains NaN"):
        compress(net.graph, net.uniform(4, 8), net.calibration, bank, "onnxruntime")


def test_inputs_whose_squares_overflow_are_an_error_that_names_the_layer() -> None:
    w = Weights(2)
    model = build(
        [
            node("Gemm", ["x", "w.weight"], ["h"], transB=1),
            node("Gemm", ["h", "v.weight"], ["y"], transB=1),
        ],
        {"w.weight": w(4, 4) * np.float32(1e-22), "v.weight": w(4, 4)},
        {"x": ["N", 4]},
        ["y"],
    )
    net = network(model, images(4) * np.float32(1e22))
    with pytest.raises(ModelError, match="layer 'w': the squares of its inputs overflow"):
        _calibrated(net)


def test_one_broken_layer_does_not_stop_the_others() -> None:
    net = _network(images(3, 6, 6))
    calibration = _calibrated(net)
    calibration.moments["a"].second[:] = np.nan
    bank = Bank(net.graph, "second-order", calibration)
    others = Candidate({n: c for n, c in net.uniform(4, 8).layers.items() if n != "a"})
    artifact = compress(net.graph, net.resolved(others), calibration, bank, "onnxruntime")
    assert np.isfinite(net.run(_model(artifact.model))[0]).all()
    with pytest.raises(ModelError, match="layer 'a'"):
        compress(net.graph, net.uniform(4, 8), calibration, bank, "onnxruntime")


def test_the_data_of_these_tests_is_what_they_say() -> None:
    assert len(_data("one sample")) == 1 and ROWS > 1
    split = Split("calibration", ((_data("dead channel"),),), None, ROWS)
    net = _network(_data("plain"))
    moments = calibrate(net.graph, split, moments=True).moments["a"]
    assert (np.diag(moments.second[0]) == 0).sum() == 9
