from __future__ import annotations

import functools

import pytest
from conftest import NETWORKS, Network, Weights, build, images, network, node
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoquant.calibration import Calibration, calibrate
from autoquant.candidate import (
    ACTIVATION_BITS,
    GRANULARITIES,
    NBITS,
    WEIGHT_BITS,
    Candidate,
    LayerChoice,
    block_size,
)
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.coding import stored_bytes
from autoquant.compress.qdq import plan
from autoquant.cost import CostModel, static
from autoquant.result import Cost


@functools.cache
def wide() -> Network:
    """Layers so large that names and scales hardly count: 36,864 and 640 weights."""
    w = Weights(2)
    model = build(
        [
            node("Conv", ["x", "a.weight", "a.bias"], ["a"], pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["ar"]),
            node("Conv", ["ar", "b.weight"], ["b"], pads=[1, 1, 1, 1]),
            node("Relu", ["b"], ["br"]),
            node("GlobalAveragePool", ["br"], ["g"]),
            node("Flatten", ["g"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
        ],
        {
            "a.weight": w(64, 3, 3, 3),
            "a.bias": w.bias(64),
            "b.weight": w(64, 64, 3, 3),
            "fc.weight": w(10, 64),
            "fc.bias": w.bias(10),
        },
        {"x": ["N", 3, 6, 6]},
        ["y"],
    )
    return network(model, images(3, 6, 6))


ALL = {**NETWORKS, "wide": wide}


@functools.cache
def calibrated(name: str) -> Calibration:
    """As a search calibrates: ranges by the mean squared error, second moments."""
    found = ALL[name]()
    return calibrate(found.graph, found.split, method="mse", moments=True, threads=1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Candidate]:
    """The name of a network and any candidate of it."""
    name = draw(st.sampled_from(sorted(ALL)))
    found = ALL[name]()
    layers = {}
    for layer in found.graph.layers:
        weight = draw(st.sampled_from(WEIGHT_BITS))
        activation = draw(st.sampled_from(ACTIVATION_BITS))
        is_dense = layer.kind in ("Gemm", "MatMul")
        dynamic = is_dense and weight <= 8 and activation == 8
        granularity = draw(st.sampled_from(GRANULARITIES))
        is_block = bool(block_size(granularity))
        nbits = is_dense and is_block and weight in NBITS and activation in (8, 32)
        nbits = nbits and draw(st.booleans())
        if is_block and not nbits and max(weight, activation) <= 8:
            granularity = "channel"
        layers[layer.name] = LayerChoice(
            weight,
            activation,
            granularity=granularity,
            symmetric=draw(st.booleans()),
            dynamic=dynamic and draw(st.booleans()),
            int16=draw(st.booleans()),
            nbits=nbits,
        )
    for layer in found.graph.products:
        layers[layer.name] = LayerChoice(32, draw(st.sampled_from((8, 32))))
    return name, found.resolved(layers)


def predict(found: Network, candidate: Candidate) -> Cost:
    return CostModel(found.graph, "onnxruntime", bank=found.bank).predict(found.resolved(candidate))


@given(cases(), st.sampled_from(["onnxruntime", "openvino"]))
@settings(max_examples=120, deadline=None)
def test_the_predicted_size_is_that_of_the_file(case: tuple[str, Candidate], dialect: str) -> None:
    (name, candidate), found = case, ALL[case[0]]()
    if any(c.nbits for c in candidate.layers.values()):
        dialect = "onnxruntime"  # no other has such a kernel
    artifact = compress(found.graph, candidate, calibrated(name), found.bank, dialect)
    model = CostModel(found.graph, dialect, bank=found.bank)
    # to 1 %, but for a constant of equal value in a file of a kilobyte
    close = pytest.approx(artifact.size_bytes, rel=0.01, abs=16)
    assert model.predict(candidate).size_bytes == close


@pytest.mark.parametrize("name", ["residual", "text", "wide", "transposed", "transposed_grouped"])
@pytest.mark.parametrize("bits", [(3, 8), (8, 8), (4, 32), (5, 16), (32, 8), (16, 32)])
def test_the_predicted_size_knows_of_shifted_biases(name: str, bits: tuple[int, int]) -> None:
    found = ALL[name]()
    bank = Bank(found.graph, "second-order", calibrated(name))
    candidate = found.resolved(found.uniform(*bits))
    artifact = compress(found.graph, candidate, calibrated(name), bank, "onnxruntime")
    predicted = CostModel(found.graph, "onnxruntime", bank=bank).predict(candidate)
    assert predicted.size_bytes == pytest.approx(artifact.size_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["residual", "text", "transposed"])
@pytest.mark.parametrize("bits", [(3, 8), (8, 8), (4, 32)])
def test_the_predicted_size_knows_of_the_rounding_in_the_names(
    name: str, bits: tuple[int, int]
) -> None:
    found = ALL[name]()
    bank = Bank(found.graph, "nearest", calibrated(name))
    sizes = []
    for rounding in (None, "second-order"):
        candidate = found.resolved(found.uniform(*bits, rounding=rounding))
        artifact = compress(found.graph, candidate, calibrated(name), bank, "onnxruntime")
        predicted = CostModel(found.graph, "onnxruntime", bank=bank).predict(candidate)
        assert predicted.size_bytes == pytest.approx(artifact.size_bytes, rel=0.006)
        sizes.append(artifact.size_bytes)
    assert sizes[0] < sizes[1]


def test_a_shared_weight_is_stored_and_counted_once() -> None:
    w = Weights(1)
    model = build(
        [
            node("MatMul", ["x", "shared"], ["a"], name="first"),
            node("MatMul", ["a", "shared"], ["y"], name="second"),
        ],
        {"shared": w(32, 32)},
        {"x": ["N", 32]},
        ["y"],
    )
    found = network(model, images(32))
    for bits in (4, 8, 16, 32):
        candidate = found.resolved(found.uniform(bits, 32))
        artifact = compress(found.graph, candidate, found.calibration, found.bank, "onnxruntime")
        predicted = predict(found, candidate)
        assert predicted.weight_bytes == 32 * 32 * bits // 8
        assert predicted.size_bytes == pytest.approx(artifact.size_bytes, rel=0.01)
    mixed = predict(found, Candidate({"first": LayerChoice(4, 32), "second": LayerChoice(8, 32)}))
    assert mixed.weight_bytes == 32 * 32  # the wider one is stored


def test_weights_and_bops_by_hand() -> None:
    # conv1 8·3·9 on 8×8, conv2 8·8·9 on 8×8, conv3 8·1·9 on 6×6, fc 5·8
    found = NETWORKS["residual"]()
    weights = {"conv1": 216, "conv2": 576, "conv3": 72, "fc": 40}
    macs = {"conv1": 216 * 64, "conv2": 576 * 64, "conv3": 72 * 36, "fc": 40}
    bits = {"conv1": (8, 8), "conv2": (3, 8), "conv3": (32, 32), "fc": (4, 32)}
    cost = predict(found, Candidate({n: LayerChoice(*b) for n, b in bits.items()}))
    assert cost.macs == sum(macs.values())
    assert cost.bops == sum(macs[n] * w * a for n, (w, a) in bits.items())
    assert cost.weight_bytes == 216 + 216 + 4 * 72 + 20
    assert cost.average_weight_bits == pytest.approx(
        sum(weights[n] * w for n, (w, _) in bits.items()) / sum(weights.values())
    )


def test_average_bits_are_exactly_those_of_a_uniform_candidate() -> None:
    for bits in WEIGHT_BITS:
        cost = predict(wide(), wide().uniform(bits, 32))
        assert cost.average_weight_bits == pytest.approx(bits, rel=1e-3)


def test_products_of_activations_count_in_macs_and_bops() -> None:
    found = NETWORKS["text"]()  # 4 tokens of width 8: query and key 256 each, two products 128
    cost = predict(found, found.uniform(8, 8))
    assert found.graph.other_macs == 2 * 4 * 4 * 8
    assert cost.macs == 2 * 4 * 8 * 8 + 8 * 3 + 2 * 128
    assert cost.bops == (2 * 4 * 8 * 8 + 8 * 3) * 64 + 2 * 128 * 1024


def test_peak_memory_by_hand() -> None:
    # x 192, after conv1, conv2 and the sum 512 each, after conv3 288
    found = NETWORKS["residual"]()
    floats = predict(found, Candidate()).peak_memory_bytes
    assert floats == 4 * (512 + 512 + 512)  # both inputs of the sum and the sum
    int8 = predict(found, found.uniform(8, 8)).peak_memory_bytes
    assert int8 == 512 + 512 + 512
    # the float conv2 between int8 layers: its input in both forms, its output float, which
    # makes the sum float
    mixed = {n: LayerChoice(8, 8) for n in ("conv1", "conv3", "fc")}
    peak = predict(found, Candidate(mixed)).peak_memory_bytes
    assert peak == 512 * (1 + 4) + 4 * 512 + 4 * 512


@pytest.mark.parametrize("name", ["residual", "chain", "wide"])
def test_8_bit_activations_take_less_memory_than_float(name: str) -> None:
    found = ALL[name]()
    floats = predict(found, Candidate()).peak_memory_bytes
    assert predict(found, found.uniform(8, 8)).peak_memory_bytes < floats


@given(cases(), st.data())
@settings(max_examples=60, deadline=None)
def test_fewer_weight_bits_never_raise_weights_or_bops(
    case: tuple[str, Candidate], data: st.DataObject
) -> None:
    found, candidate = ALL[case[0]](), case[1]
    name = data.draw(st.sampled_from(sorted(x.name for x in found.graph.layers)))
    choice = candidate.choice(name)
    fewer = [b for b in WEIGHT_BITS if b < choice.weight_bits]
    assume(fewer)
    less = LayerChoice(data.draw(st.sampled_from(fewer)), choice.activation_bits)
    before = predict(found, candidate)
    after = predict(found, candidate.normalized({**candidate.layers, name: less}))
    assert after.weight_bytes < before.weight_bytes
    assert after.bops <= before.bops
    assert after.average_weight_bits < before.average_weight_bits
    assert after.macs == before.macs


def test_fewer_weight_bits_make_the_file_smaller() -> None:
    sizes = [predict(wide(), wide().uniform(bits, 8)).size_bytes for bits in WEIGHT_BITS]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert sizes[WEIGHT_BITS.index(4)] < 0.6 * sizes[WEIGHT_BITS.index(8)]
    assert sizes[WEIGHT_BITS.index(3)] < 0.8 * sizes[WEIGHT_BITS.index(4)]


def test_weight_bits_alone_do_not_change_the_memory_of_activations() -> None:
    found = NETWORKS["residual"]()
    peaks = {predict(found, found.uniform(bits, 8)).peak_memory_bytes for bits in range(2, 9)}
    assert len(peaks) == 1


def test_without_a_latency_model_the_latency_is_unknown() -> None:
    found = NETWORKS["residual"]()
    cost = predict(found, found.uniform(8, 8))
    assert cost.latency_ms is None and cost.energy_mj is None


def test_a_plan_holds_every_tensor_in_the_forms_that_are_read() -> None:
    found = NETWORKS["residual"]()
    candidate = found.resolved({"conv2": LayerChoice(8, 4)})
    where = plan(found.graph, candidate)
    # r1 is float for the sum and on a grid of 4 bits for conv2, whose int8 output is read as
    # float too; the sum is float
    assert static.peak_memory_bytes(found.graph, where) == 512 * (4 + 1) + 512 * (1 + 4) + 512 * 4


def test_products_count_with_the_bits_of_their_inputs() -> None:
    found = NETWORKS["attention"]()
    macs = {layer.name: layer.macs for layer in found.graph.products}
    assert macs == {"scores": 5 * 5 * 8, "mix": 5 * 5 * 8}
    before = predict(found, Candidate())
    after = predict(found, Candidate({"mix": LayerChoice(32, 8)}))
    assert before.bops - after.bops == macs["mix"] * (32 * 32 - 8 * 8)
    assert (before.weight_bytes, before.macs) == (after.weight_bytes, after.macs)


def test_blocks_store_a_half_for_each_of_them() -> None:
    found = NETWORKS["blocked"]()
    layer = found.graph.by_name["second"]  # 96 channels of 70 inputs
    assert static.block_scale_bytes(layer, LayerChoice(4, 32, "block32")) == 2 * 96 * 3
    assert static.block_scale_bytes(layer, LayerChoice(4, 32)) == 0


@pytest.mark.parametrize("bits", [3, 4, 6, 8, 16, 32])
def test_the_entropy_coded_size_is_predicted(bits: int) -> None:
    found = wide()
    candidate = found.resolved(found.uniform(bits, 8 if bits <= 8 else 32))
    artifact = compress(found.graph, candidate, found.calibration, found.bank, "onnxruntime")
    predicted = CostModel(found.graph, "onnxruntime", bank=found.bank).predict(candidate)
    assert predicted.stored_bytes == pytest.approx(stored_bytes(artifact.model), rel=0.04)


def test_without_weights_their_entropy_is_bounded() -> None:
    found = wide()
    for choice in (LayerChoice(4, 8), LayerChoice(4, 8, sparsity=0.75)):
        candidate = found.resolved(dict.fromkeys([x.name for x in found.graph.layers], choice))
        known = CostModel(found.graph, "onnxruntime", bank=found.bank).predict(candidate)
        before = CostModel(found.graph, "onnxruntime").predict(candidate)
        assert known.stored_bytes is not None and before.stored_bytes is not None
        assert known.stored_bytes < 1.02 * before.stored_bytes < 1.5 * known.stored_bytes
