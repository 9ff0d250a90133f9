from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import NETWORKS, Network

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.qdq import mode, plan
from autoquant.cost import CostModel, table
from autoquant.cost.table import (
    PRECISIONS,
    TableModel,
    extended,
    from_profile,
    measure_device,
    precision,
    signature,
    to_profile,
)
from autoquant.errors import HardwareError
from autoquant.hardware import Hardware, LatencyModel, load_hardware
from autoquant.runtime import OnnxRuntime
from autoquant.task import Array

MEASURED = ("float", "int8", "dynamic")
KERNEL = {"weight_bits": 8, "activation_bits": 8, "source": "made up for a test"}


def one(found: Network, rows: int = 1) -> list[Array]:
    """One batch of inputs."""
    return [array[:rows] for array in found.inputs]


def device(found: Network, rows: int = 1, threads: int = 1) -> TableModel:
    return measure_device(
        found.graph,
        found.calibration,
        found.bank,
        one(found, rows),
        dialect="onnxruntime",
        precisions=MEASURED,
        threads=threads,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQUANT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def measured(cache: Path) -> dict[str, TableModel]:
    """Two networks, measured in turn into one cache."""
    return {name: device(NETWORKS[name]()) for name in ("residual", "text")}


@pytest.mark.parametrize("name", ["residual", "text"])
def test_the_table_has_the_kernels_of_every_layer(
    measured: dict[str, TableModel], name: str
) -> None:
    graph, model = NETWORKS[name]().graph, measured[name]
    wanted = set()
    for layer in graph.layers:
        if layer.kind != "Gather":
            kinds = MEASURED if layer.kind in ("Gemm", "MatMul") else MEASURED[:2]
            wanted |= {signature(graph, layer, kind) for kind in kinds}
    assert set(model.kernel_ms) == wanted
    assert all(time > 0 for time in model.kernel_ms.values())


@pytest.mark.parametrize("name", ["residual", "text"])
def test_predictions_are_positive_and_finite(measured: dict[str, TableModel], name: str) -> None:
    found, model = NETWORKS[name](), measured[name]
    assert all(value >= 0 for value in model.coefficients.values())
    assert model.mixes > 5 and 0 <= model.error < 10
    costs = CostModel(found.graph, "onnxruntime", model)
    for bits in ((8, 8), (3, 8), (4, 4), (4, 32), (32, 8), (16, 16)):
        predicted = costs.predict(found.resolved(found.uniform(*bits))).latency_ms
        assert predicted is not None and 0 < predicted < 1e3
    products = {
        layer.name: LayerChoice(8, 8, dynamic=True)
        for layer in found.graph.layers
        if layer.kind in ("Gemm", "MatMul")
    }
    predicted = costs.predict(found.resolved(Candidate(products))).latency_ms
    assert predicted is not None and predicted > 0


def test_a_kernel_that_is_in_the_cache_is_not_measured_again(
    measured: dict[str, TableModel], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> dict[str, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(OnnxRuntime, "kernel_times", refuse)
    for name, model in measured.items():
        assert device(NETWORKS[name]()).kernel_ms == model.kernel_ms
    (path,) = cache.glob("kernels-*.json")
    known = json.loads(path.read_text())
    assert set(known) == {key for model in measured.values() for key in model.kernel_ms}
    with pytest.raises(AssertionError, match="measured again"):  # another batch is another table
        device(NETWORKS["residual"](), rows=2)


def test_a_damaged_cache_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(OnnxRuntime, "kernel_times", lambda *_, **__: {"QLinearConv/x": 0.25})
    found = NETWORKS["chain"]()
    first = device(found).kernel_ms
    assert set(first.values()) == {0.25}
    (path,) = tmp_path.glob("kernels-*.json")
    for text in ("", "{", "[1]", '{"a": 1', '{"a": null}'):
        path.write_text(text)
        assert device(found).kernel_ms == first
        assert set(json.loads(path.read_text())) == set(first)


def test_a_cache_that_cannot_be_written_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(OnnxRuntime, "kernel_times", lambda *_, **__: {"QLinearConv/x": 0.25})
    assert device(NETWORKS["chain"]()).kernel_ms


def test_conversions_do_not_count_as_the_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    times = {
        "QuantizeLinear/a": 1.0, "QLinearConv/conv_token_1": 0.5, "ReorderOutput/b": 2.0,
        "DequantizeLinear/c": 4.0, "Transpose/d": 8.0,
    }  # fmt: skip
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(OnnxRuntime, "kernel_times", lambda *_, **__: times)
    assert set(device(NETWORKS["chain"]()).kernel_ms.values()) == {0.5}


def test_equal_layers_share_a_kernel_and_others_do_not() -> None:
    graph = NETWORKS["chain"]().graph
    keys = {signature(graph, layer, "int8") for layer in graph.layers}
    assert len(keys) == 1  # five alike
    graph = NETWORKS["residual"]().graph
    assert len({signature(graph, layer, "int8") for layer in graph.layers}) == 4
    layer = graph.layers[0]
    assert signature(graph, layer, "int8") != signature(graph, layer, "float")


def test_what_runs_is_what_is_looked_up() -> None:
    assert [precision(mode) for mode in ("float", "int8", "dynamic", "weight-only")] == [
        "float", "int8", "dynamic", "float",
    ]  # fmt: skip


# --- the formula ------------------------------------------------------------------------------


def made_up(found: Network, **coefficients: float) -> TableModel:
    graph = found.graph
    times = {
        signature(graph, layer, p): value
        for layer in graph.layers
        for p, value in (("float", 1.0), ("int8", 0.25))
    }
    return TableModel(times, coefficients, 0.0, 8, 1, 1)


def test_a_latency_is_kernels_and_boundaries() -> None:
    found = NETWORKS["chain"]()  # five layers, tensors of 8·6·6 = 288 elements
    model = made_up(found, float=1.0, int8=2.0, to_int8=10.0, to_float=100.0, constant=1000.0)

    def latency(*widths: int) -> float:
        layers = {f"l{i}": LayerChoice(w, 8 if w < 32 else 32) for i, w in enumerate(widths)}
        candidate = found.resolved(Candidate(layers))
        where = plan(found.graph, candidate)
        return model.latency_ms(found.graph, candidate, where)

    million = 288 / 1e6
    assert latency(32, 32, 32, 32, 32) == pytest.approx(5 + 1000)
    assert latency(8, 8, 8, 8, 8) == pytest.approx(5 * 0.5 + 110 * million + 1000)
    assert latency(3, 2, 8, 4, 8) == pytest.approx(latency(8, 8, 8, 8, 8))
    assert latency(32, 8, 8, 32, 32) == pytest.approx(3 + 2 * 0.5 + 110 * million + 1000)
    assert latency(8, 32, 8, 32, 8) == pytest.approx(2 + 3 * 0.5 + 330 * million + 1000)


def test_weight_only_layers_run_in_float() -> None:
    found = NETWORKS["chain"]()
    costs = CostModel(found.graph, "onnxruntime", made_up(found, float=1.0, int8=1.0))
    stored = costs.predict(found.resolved(found.uniform(4, 32)))
    assert stored.latency_ms == costs.predict(found.resolved(Candidate())).latency_ms == 5.0


NAMES = ("float", "int8", "to_int8", "constant")


def _made(wanted: Array, rows: int = 24) -> tuple[Array, Array]:
    generator = np.random.default_rng(0)
    matrix = generator.uniform(0.1, 2, (rows, 4)) * np.array([1, 1, 1, 0])
    matrix[:, 3] = 1.0
    return matrix, matrix @ wanted


def test_the_fit_finds_the_coefficients_of_exact_times() -> None:
    wanted = np.array([1.2, 0.8, 0.4, 0.05])
    matrix, times = _made(wanted)
    np.testing.assert_allclose(table._fit(matrix, times, NAMES) @ matrix.T, times, rtol=2e-3)
    np.testing.assert_allclose(table._fit(matrix, times, NAMES), wanted, rtol=0.03, atol=0.01)
    negative = table._fit(matrix, matrix @ np.array([1.0, -0.1, 0.1, 0.1]), NAMES)
    assert (negative >= 0).all()


def test_a_disturbed_mix_hardly_moves_the_fit() -> None:
    matrix, times = _made(np.array([1.2, 0.8, 0.4, 0.05]))
    disturbed = times.copy()
    disturbed[3] *= 2
    found = matrix @ table._fit(matrix, disturbed, NAMES)
    np.testing.assert_allclose(np.delete(found, 3), np.delete(times, 3), rtol=0.03)


def test_what_no_mix_tells_stays_as_it_usually_is() -> None:
    matrix = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 1.0]])
    found = table._fit(matrix, np.array([1.3, 2.5]), NAMES)
    assert found[1] == pytest.approx(1.0) and found[2] == pytest.approx(0.3)


def test_held_out_mixes_are_none_of_the_fit() -> None:
    layers = [x for x in NETWORKS["residual"]().graph.layers if x.kind != "Gather"]
    fitted = table._mixes(layers, ["int8"], 0)
    assert len(fitted) == len(set(fitted)) > 8
    assert fitted[0] == Candidate() and len(fitted[1].layers) == len(layers)
    held = table._held_out(layers, ["int8"], 8, 1)
    assert (
        held == table._held_out(layers, ["int8"], 8, 1) != table._held_out(layers, ["int8"], 8, 2)
    )


def test_kernels_of_other_structures(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timed` measures what is missing, once; `extended` scales the nearest kernel by MACs."""
    known, other = NETWORKS["chain"](), NETWORKS["residual"]()
    bare = TableModel({}, {"float": 1.0}, 0.0, 8, 1, 1)
    model = bare.timed([known.graph], known.graph)
    assert len(model.kernel_ms) == 2 and all(t > 0 for t in model.kernel_ms.values())
    full = model.timed([other.graph], known.graph)
    assert set(full.kernel_ms) > set(model.kernel_ms)
    monkeypatch.setattr(table, "_kernel_time", None)
    both = [known.graph, other.graph]
    assert full.timed(both[1:], known.graph) == bare.timed(both, known.graph) == full
    layer = known.graph.layers[0]
    key = signature(known.graph, layer, "float")
    shapes = f"{list(layer.input_shape)} {list(layer.weight_shape)}"
    wide = TableModel({key.replace(shapes, "[1, 16, 6, 6] [16, 16, 3, 3]"): 1.0}, {}, 0.0, 8, 1, 1)
    found = extended(wide, known.graph, known.graph).kernel_ms[key]
    assert found == pytest.approx(math.prod(layer.weight_shape) / (16 * 16 * 9))


def test_kernels_timed_on_a_slower_day_are_in_proportion(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, other = NETWORKS["chain"](), NETWORKS["residual"]()
    monkeypatch.setattr(table, "_kernel_time", lambda *_: 0.2)
    bare = TableModel({}, {"float": 1.0}, 0.0, 8, 1, threads=3)  # nothing of it is in the cache
    model = bare.timed([known.graph], known.graph)
    assert set(model.kernel_ms.values()) == {0.2}
    monkeypatch.setattr(table, "_kernel_time", lambda *_: 0.3)
    found = model.timed([other.graph], known.graph).kernel_ms
    fresh = [value for key, value in found.items() if key not in model.kernel_ms]
    assert fresh and fresh == pytest.approx([0.2] * len(fresh))


def test_a_layer_without_a_kernel_is_an_error_that_names_it() -> None:
    model = made_up(NETWORKS["chain"](), float=1.0, int8=1.0)
    other = NETWORKS["residual"]()
    candidate = other.resolved(Candidate())
    with pytest.raises(HardwareError, match=r"'conv1' \(float\).*autoquant profile"):
        model.latency_ms(other.graph, candidate, plan(other.graph, candidate))


# --- profiles ---------------------------------------------------------------------------------


def test_a_model_goes_through_a_profile(measured: dict[str, TableModel], tmp_path: Path) -> None:
    found, model = NETWORKS["residual"](), measured["residual"]
    profile = Hardware.model_validate(
        {"kernels": [KERNEL], "model": to_profile(model).model_dump(mode="json")}
    )
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(profile.model_dump(mode="json", exclude_defaults=True)))
    again = load_hardware(path)
    assert again.name == "here" and again.model is not None
    assert from_profile(again.model, 1, 1) == model
    assert again.model.source and again.model.cpu and "onnxruntime" in again.model.runtime
    candidate = found.resolved(found.uniform(4, 8))
    where = plan(found.graph, candidate)
    read = from_profile(again.model, 1, 1).latency_ms(found.graph, candidate, where)
    assert read == model.latency_ms(found.graph, candidate, where)


def test_an_unknown_error_is_left_out_of_a_profile() -> None:
    model = TableModel({}, {}, math.nan, 3, 1, 1)
    stored = to_profile(model)
    assert stored.error is None
    assert math.isnan(from_profile(stored, 1, 1).error)


@pytest.mark.parametrize(("batch", "threads"), [(2, 1), (1, 2)])
def test_a_profile_is_for_one_batch_and_thread_count(batch: int, threads: int) -> None:
    model = LatencyModel(
        cpu="none", runtime="none", batch=1, threads=1, kernel_ms={}, coefficients={}, source="-"
    )
    with pytest.raises(HardwareError, match=f"not {batch} and {threads}"):
        from_profile(model, batch, threads)


def test_n_bit_kernels_are_timed_as_they_run(measured: dict[str, TableModel], cache: Path) -> None:
    found = NETWORKS["text"]()
    names = ["nbits4b32", "nbits4b32a8", "nbits2b128", "nbits8b64a8"]
    for name in names:
        choice = PRECISIONS[name]
        assert mode(found.graph.by_name["query"], choice) == precision(name) == name
        assert found.resolved({"query": choice}).choice("query") == choice  # as a search has it
    model = measure_device(
        found.graph,
        found.calibration,
        found.bank,
        one(found),
        dialect="onnxruntime",
        precisions=("float", "nbits4b32", "nbits4b32a8"),
    )
    query = found.graph.by_name["query"]
    keys = {name: signature(found.graph, query, name) for name in ("float", *names[:2])}
    assert all(0 < model.kernel_ms[key] < 10 for key in keys.values())
    assert len(set(keys.values())) == 3
    layers = dict.fromkeys(("query", "key"), PRECISIONS["nbits4b32"])
    predicted = CostModel(found.graph, "onnxruntime", model).predict(
        found.resolved({**layers, "head": FLOAT})
    )
    assert predicted.latency_ms is not None and predicted.latency_ms > 0
    assert model.layer_ms(found.graph, query, PRECISIONS["nbits4b32"]) >= 0
    with pytest.raises(HardwareError, match=r"no kernel for layer .query. .nbits4b64."):
        CostModel(found.graph, "onnxruntime", model).predict(
            found.resolved({"query": PRECISIONS["nbits4b64"]})
        )


def test_products_of_activations_are_timed_where_they_can_be_int8(cache: Path) -> None:
    found = NETWORKS["attention"]()

    def timed(products: bool) -> TableModel:
        return measure_device(
            found.graph,
            found.calibration,
            found.bank,
            one(found),
            dialect="onnxruntime",
            products=products,
        )

    without, model = timed(False), timed(True)
    mix = found.graph.by_name["mix"]
    keys = {signature(found.graph, mix, name) for name in ("float", "int8")}
    assert keys <= set(model.kernel_ms) and not keys & set(without.kernel_ms)
    assert all(model.kernel_ms[key] > 0 for key in keys)
    eight = found.resolved({"mix": LayerChoice(32, 8)})
    plain = found.resolved({})
    for device_model, candidate in ((model, eight), (model, plain), (without, plain)):
        costs = CostModel(found.graph, "onnxruntime", device_model)
        assert (costs.predict(candidate).latency_ms or 0) > 0
    with pytest.raises(HardwareError, match="no kernel for layer 'mix'"):
        CostModel(found.graph, "onnxruntime", without).predict(eight)
    assert without.layer_ms(found.graph, mix, FLOAT) == 0.0
