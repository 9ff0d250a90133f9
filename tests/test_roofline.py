"""The analytic device model: arithmetic on profiles that are made up, and the shipped ones."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import NETWORKS
from hypothesis import given
from hypothesis import strategies as st
from small_task import LAYERS, SPACE, settings, task, uniform

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.qdq import plan
from autoquant.cost import CostModel
from autoquant.cost.roofline import Operator, RooflineModel, operators
from autoquant.document import builtin
from autoquant.errors import CandidateError, HardwareError, NoFeasibleMember
from autoquant.hardware import Hardware, load_hardware
from autoquant.search import search
from autoquant.search.trial import Limits, prepare
from autoquant.space import Space

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import zoo

INT8 = LayerChoice(8, 8)
ANALYTIC = sorted(
    name for name in builtin("hardware_profiles") if load_hardware(name).latency == "analytic"
)
# One convolution of 8000 MACs, 100 weights, 200 elements in and 80 out, between two others.
CONV = Operator("conv", ((200, -1),), 80, 8000, "a", "Conv", "a", 100)
CHAIN = (
    CONV,
    Operator("conv", ((80, 0),), 80, 8000, "b", "Conv", "b", 100),
    Operator("dense", ((80, 1),), 10, 800, "c", "Gemm", "c", 800),
)


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "source": "made up"}


def kernel(weights: int, activations: int, conv: float, **rest: Any) -> dict[str, Any]:
    rates = {"conv": figure(conv)} | {k: figure(v) for k, v in rest.pop("rates", {}).items()}
    pair = {"weight_bits": weights, "activation_bits": activations, "source": "made up"}
    return {**pair, "rates": rates, **rest}


def device(*kernels: dict[str, Any], **figures: Any) -> Hardware:
    fields = {k: figure(v) if isinstance(v, (int, float)) else v for k, v in figures.items()}
    return Hardware.model_validate(
        {"name": "made-up", "latency": "analytic", "kernels": kernels, "device": fields}
    )


def memory(**figures: float) -> dict[str, Any]:
    return {name: figure(value) for name, value in figures.items()}


def ms(hardware: Hardware, *choices: LayerChoice, batch: int = 1, threads: int = 1) -> float:
    work = CHAIN[: len(choices)]
    by_name = dict(zip("abc", choices, strict=False))
    return RooflineModel(work, hardware, batch, threads).predict(by_name.__getitem__)[0]


# --- what a layer takes ----------------------------------------------------------------------


def test_a_layer_takes_the_longest_of_arithmetic_and_each_memory() -> None:
    fast = kernel(8, 8, 2.0)
    assert ms(device(fast, clock_mhz=10), INT8) == pytest.approx(8000 / 2 / 10e6 * 1e3)
    assert ms(device(fast), INT8) == pytest.approx(8000 / 2 * 1e-6)  # a cycle is a nanosecond
    chip = memory(bytes=1e6, gb_s=0.01)
    assert ms(device(fast, on_chip=chip), INT8) == pytest.approx((200 + 80 + 100) / 1e7 * 1e3)
    split = device(
        fast, on_chip=chip, off_chip=memory(gb_s=0.001), on_chip_holds="activations"
    )  # the weights come through the slower one, at the same time
    assert ms(split, INT8) == pytest.approx(100 / 1e6 * 1e3)


def test_shapes_outputs_operators_and_the_inference_have_their_own_figures() -> None:
    hardware = device(
        kernel(8, 8, 2.0, rates={"dense": 0.5, "depthwise": 0.25}),
        output_cycles=3,
        operator_us=7,
        inference_us=100,
    )
    base = 100e-3 + 7e-3
    assert ms(hardware, INT8) == pytest.approx(base + (4000 + 240) * 1e-6)
    dense = Operator("dense", ((80, -1),), 10, 800, "c", "Gemm", "c", 800)
    depthwise = Operator("depthwise", ((80, -1),), 80, 720, "d", "Conv", "d", 9)
    for op, cycles in ((dense, 1600 + 30), (depthwise, 2880 + 240)):
        found = RooflineModel((op,), hardware).predict(lambda _: INT8)[0]
        assert found == pytest.approx(base + cycles * 1e-6)


def test_narrower_weights_run_on_the_next_kernel_and_move_as_they_are_stored() -> None:
    kernels = (kernel(8, 8, 2.0), kernel(4, 8, 4.0), kernel(32, 32, 1.0, format="float32"))
    quick = device(*kernels)
    assert ms(quick, LayerChoice(3, 8)) == ms(quick, LayerChoice(4, 8)) == 8000 / 4 * 1e-6
    assert ms(quick, LayerChoice(5, 6)) == ms(quick, INT8) == 8000 / 2 * 1e-6
    assert ms(quick, LayerChoice(4, 16)) == ms(quick, FLOAT) == 8000 * 1e-6
    only_weights = {"off_chip": memory(gb_s=1e-4), "on_chip": memory(bytes=1000)}
    slow = device(
        kernel(8, 8, 2.0), stored_weight_bits=[4], on_chip_holds="activations", **only_weights
    )
    seconds = {bits: ms(slow, LayerChoice(bits, 8)) * 1e-3 * 1e5 for bits in (2, 3, 4, 6, 8)}
    assert seconds == pytest.approx({2: 50, 3: 50, 4: 50, 6: 100, 8: 100})  # bytes


def test_a_change_of_precision_costs_a_pass_over_the_tensor() -> None:
    hardware = device(
        kernel(8, 8, 2.0), kernel(8, 16, 2.0), off_chip=memory(gb_s=1000), operator_us=5
    )
    wide = LayerChoice(8, 16)
    same, mixed = ms(hardware, INT8, INT8), ms(hardware, INT8, wide)
    assert ms(hardware, wide, wide) == same
    assert mixed - same == pytest.approx(5e-3 + 80 * (1 + 2) / 1e12 * 1e3)
    assert ms(hardware, INT8, wide, INT8) - ms(hardware, INT8, INT8, INT8) == pytest.approx(
        2 * (mixed - same)
    )


def test_weights_that_do_not_fit_on_the_chip_stream_every_time() -> None:
    def loaded(size: float) -> float:
        hardware = device(kernel(8, 8, 1e9), on_chip=memory(bytes=size), off_chip=memory(gb_s=1e-3))
        return ms(hardware, INT8, INT8, INT8)

    assert loaded(1280) == pytest.approx(0, abs=1e-3)  # 1000 bytes of weights, 280 around a layer
    assert loaded(780) == pytest.approx(500 / 1e6 * 1e3, rel=1e-3)
    assert loaded(280) == pytest.approx(1000 / 1e6 * 1e3, rel=1e-3)


def test_a_batch_shares_the_weights_and_threads_share_the_work() -> None:
    hardware = device(kernel(8, 8, 2.0), cores=4)
    assert ms(hardware, INT8, batch=6) == pytest.approx(6 * ms(hardware, INT8))
    assert ms(hardware, INT8, threads=4) == pytest.approx(ms(hardware, INT8) / 4)
    with pytest.raises(HardwareError, match="--threads 5: 'made-up' has 4 cores"):
        ms(hardware, INT8, threads=5)
    streaming = device(kernel(8, 8, 1e9), off_chip=memory(gb_s=1e-3))
    assert ms(streaming, INT8, batch=2) == pytest.approx((2 * 280 + 100) / 1e6 * 1e3)


def test_a_bit_serial_kernel_makes_every_bit_pay() -> None:
    hardware = device(kernel(16, 16, 1.0, bit_serial=True, pj_per_mac=figure(2)))

    def cost(weights: int, activations: int) -> tuple[float, float]:
        model = RooflineModel((CONV,), hardware)
        found, energy = model.predict(lambda _: LayerChoice(weights, activations))
        assert energy is not None
        return found, energy

    for weights, activations in ((2, 4), (3, 8), (5, 8), (8, 8), (16, 16)):
        share = weights * activations / 256
        assert cost(weights, activations) == pytest.approx(
            (8000 * share * 1e-6, 2 * 8000 * share * 1e-9)
        )


def test_energy_is_work_traffic_and_the_power_of_the_whole_time() -> None:
    hardware = device(
        kernel(8, 8, 2.0, pj_per_mac=figure(3)),
        on_chip=memory(bytes=280, pj_per_byte=1),
        off_chip=memory(pj_per_byte=50),
        active_mw=20,
    )
    found, energy = RooflineModel((CONV,), hardware).predict(lambda _: INT8)
    assert energy == pytest.approx((3 * 8000 + 280 + 50 * 100) * 1e-9 + found * 1e-3 * 20)
    batch = RooflineModel((CONV,), hardware, batch=1).predict(lambda _: INT8)[1]
    assert batch == energy
    assert RooflineModel((CONV,), device(kernel(8, 8, 2.0))).predict(lambda _: INT8)[1] is None


@given(
    st.lists(st.sampled_from([(2, 8), (3, 8), (4, 8), (6, 4), (8, 8), (8, 16)]), min_size=3),
    st.integers(0, 2),
)
def test_fewer_bits_never_take_longer_where_kernels_are_as_fast(
    pairs: list[tuple[int, int]], index: int
) -> None:
    hardware = device(
        kernel(16, 16, 1.0, bit_serial=True, pj_per_mac=figure(1)),
        on_chip=memory(bytes=400, gb_s=0.1, pj_per_byte=1),
        off_chip=memory(gb_s=0.01, pj_per_byte=9),
    )
    choices = [LayerChoice(*pair) for pair in pairs[:3]]
    narrower = list(choices)
    narrower[index] = LayerChoice(2, choices[index].activation_bits)
    assert ms(hardware, *narrower) <= ms(hardware, *choices)


# --- what runs on a device -------------------------------------------------------------------


def test_a_pair_that_the_device_lacks_is_an_error_that_lists_what_it_has() -> None:
    hardware = device(kernel(8, 8, 1.0), kernel(4, 8, 1.0, kinds=["Conv"]))
    with pytest.raises(CandidateError) as caught:
        ms(hardware, INT8, LayerChoice(8, 16))
    assert str(caught.value) == (
        "layer 'b' (Conv): 8/16 does not run on hardware 'made-up'; it has 8/8, 4/8"
    )
    with pytest.raises(CandidateError, match=r"layer 'c' \(Gemm\): float .* it has 8/8$"):
        ms(hardware, INT8, INT8, FLOAT)
    dynamic = LayerChoice(8, 8, dynamic=True)
    with pytest.raises(CandidateError, match="8/8 dynamic does not run"):
        ms(hardware, INT8, INT8, dynamic)
    ranged = device(kernel(8, 8, 1.0), kernel(8, 8, 0.5, dynamic=True, kinds=["Gemm"]))
    assert ms(ranged, INT8, INT8, dynamic) - ms(ranged, INT8, INT8, INT8) == pytest.approx(8e-4)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_operators_are_the_layers_and_what_stands_between(name: str) -> None:
    graph = NETWORKS[name]().graph
    found = operators(graph)
    assert [op.layer for op in found if op.layer] == [layer.name for layer in graph.layers]
    assert sum(op.macs for op in found) == graph.macs
    assert all(source < i for i, op in enumerate(found) for _, source in op.inputs)


def test_a_residual_network_keeps_its_joins_and_loses_its_relus() -> None:
    found = operators(NETWORKS["residual"]().graph)
    shapes = [op.shape for op in found]
    assert shapes == ["conv", "conv", "other", "depthwise", "other", "dense"]
    assert found[2].inputs == ((512, 1), (512, 0))
    assert found[5].inputs == ((8, 4),)  # through the Flatten


def test_a_graph_and_a_candidate_are_what_a_cost_model_predicts() -> None:
    network = NETWORKS["residual"]()
    hardware = device(kernel(8, 8, 2.0), kernel(16, 16, 1.0), active_mw=10)
    model = RooflineModel(network.graph, hardware)
    cost = CostModel(network.graph, "onnxruntime", model)
    candidate = network.resolved(network.uniform(8, 8))
    found = cost.predict(candidate)
    where = plan(network.graph, candidate)
    assert found.latency_ms == model.latency_ms(network.graph, candidate, where)
    assert found.latency_ms == pytest.approx(model.predict(lambda _: INT8)[0])
    assert found.energy_mj == pytest.approx(found.latency_ms * 1e-3 * 10)
    layers = [model.layer_ms(network.graph, layer, INT8) for layer in network.graph.layers]
    assert sum(layers) == pytest.approx(found.latency_ms)
    energies = [model.layer_mj(layer, INT8) for layer in network.graph.layers]
    assert sum(energies) == pytest.approx(found.energy_mj)
    baseline = cost.baseline()  # there is no float kernel: the widest
    assert baseline.size_bytes > found.size_bytes
    assert baseline.latency_ms == pytest.approx(2 * found.latency_ms)
    again = pickle.loads(pickle.dumps(model))
    assert again.predict(lambda _: INT8) == model.predict(lambda _: INT8)


def test_a_measured_profile_has_no_analytic_model() -> None:
    with pytest.raises(HardwareError, match="'onnxruntime-cpu' has no analytic model"):
        RooflineModel(CHAIN, load_hardware("onnxruntime-cpu"))


# --- the shipped profiles --------------------------------------------------------------------


@pytest.mark.parametrize("name", ANALYTIC)
def test_a_shipped_profile_predicts_every_pair_that_it_has(name: str) -> None:
    hardware = load_hardware(name)
    model = RooflineModel(zoo.resnet8(), hardware)
    for found in hardware.kernels:
        if found.kinds is None:
            choice = LayerChoice(found.weight_bits, found.activation_bits)
            took, energy = model.predict(lambda _, choice=choice: choice)
            assert 0 < took < 2000 and (energy is None or energy > 0)
    assert model.widest()[0] > 0
    assert math.isnan(model.error) or 0 < model.error < 0.5


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("ic_resnet8", 12501632),
        ("kws_dscnn", 2656768),
        ("vww_mbv1_025", 7489664),
        ("ad_fcae", 264192),
        ("vww_live", 3742091),  # without channels that are zero in the reference weights
        ("resnet50", 4089184256),
        ("mobilenet_v2_1.0_224", 300774272),
    ],
)
def test_the_networks_of_the_benchmark_have_the_published_macs(name: str, macs: int) -> None:
    assert sum(op.macs for op in zoo.NETWORKS[name]()) == macs


@pytest.mark.parametrize(
    ("profile", "published"),
    [  # MLPerf Tiny keyword spotting, which set none of the profiles
        ("cortex-m4-cmsis-nn", 99.656),
        ("cortex-m4-x-cube-ai", 43.187),
        ("cortex-m7-x-cube-ai", 11.318),
    ],
)
def test_keyword_spotting_takes_what_was_published(profile: str, published: float) -> None:
    found = RooflineModel(zoo.dscnn(), load_hardware(profile)).predict(lambda _: INT8)[0]
    assert found == pytest.approx(published, rel=0.15)


# --- searches --------------------------------------------------------------------------------

NPU = device(kernel(8, 8, 2.0), kernel(4, 8, 4.0), active_mw=100, error=0.2)


def test_a_search_never_proposes_what_the_device_lacks(tmp_path: Path) -> None:
    context = prepare(task(tmp_path), space=SPACE, hardware=NPU)
    assert {str(c) for found in context.choices.values() for c in found} == {"2/8", "4/8", "8/8"}
    only_float = Space.model_validate({"rules": [{"layers": "*", "float": True}]})
    with pytest.raises(HardwareError, match="runs 8/8, 4/8 on a Conv, and the space offers"):
        prepare(task(tmp_path), space=only_float, hardware=NPU)
    by_hand = Candidate({**uniform(8).layers, "second": LayerChoice(8, 16)})
    with pytest.raises(CandidateError, match=r"layer 'second' .* it has 8/8, 4/8"):
        prepare(task(tmp_path), space=by_hand, hardware=NPU)
    with pytest.raises(CandidateError, match=r"layer 'first' .*: float does not run"):
        prepare(task(tmp_path), space=Candidate(), hardware=NPU)


def test_an_analytic_latency_is_predicted_and_never_measured_here(tmp_path: Path) -> None:
    objectives = ("accuracy", "latency_ms", "energy_mj", "size_bytes")
    front = search(
        task(tmp_path),
        settings(tmp_path, hardware=NPU, objectives=objectives, trials=12, max_energy_mj=1.0),
    )
    assert front.objectives == objectives and front.baseline["latency_error"] == 0.2
    assert front.baseline["latency_ms"] is None
    for member in front.members:
        assert set(member.candidate.layers) == set(LAYERS)
        assert member.verified is not None and member.verified["split"] == "test"
        assert member.verified["latency_ms"] is None
        assert member.latency_ms == member.predicted.latency_ms
        assert member.predicted.energy_mj is not None and 0 < member.predicted.energy_mj < 1
    slowest = max(m.objective("latency_ms") for m in front.members)
    assert slowest <= front.baseline["predicted"]["latency_ms"]
    from autoquant.report import front_markdown

    assert "±20%" in front_markdown(front.to_dict())
    assert not (tmp_path / "runs" / front.run / "latency.json").exists()


def test_limits_of_energy_memory_and_room_count(tmp_path: Path) -> None:
    cost = prepare(task(tmp_path), space=uniform(8), hardware=NPU).baseline
    assert cost.energy_mj is not None
    limits = Limits(energy_mj=cost.energy_mj / 2, peak_memory_bytes=2 * cost.peak_memory_bytes)
    assert limits.excess(cost, None) == pytest.approx({"energy_mj": 1.0, "peak_memory_bytes": -0.5})
    both = cost.peak_memory_bytes + cost.weight_bytes
    assert Limits(room=(both, True)).excess(cost, None) == {"room": 0.0}
    assert Limits(room=(cost.peak_memory_bytes // 2, False)).excess(cost, None) == {"room": 1.0}
    tight = device(kernel(8, 8, 1.0), on_chip=memory(bytes=300))
    with pytest.raises(NoFeasibleMember, match="satisfies the limits"):
        search(task(tmp_path), settings(tmp_path, hardware=tight, trials=4))


def test_a_limit_that_nothing_predicts_is_an_error(tmp_path: Path) -> None:
    quiet = device(kernel(8, 8, 1.0))
    with pytest.raises(HardwareError, match=r"--max-energy-mj: .* does not predict energy_mj"):
        search(task(tmp_path), settings(tmp_path, hardware=quiet, max_energy_mj=1.0))


def test_a_pattern_of_zeros_is_faster_where_the_profile_says_so() -> None:
    half, pattern = LayerChoice(8, 8, sparsity=0.5), LayerChoice(8, 8, sparsity="2:4")
    plain = device(kernel(8, 8, 2.0))
    assert ms(plain, INT8) == ms(plain, pattern) == ms(plain, half)
    gain = {"pattern": "2:4", "speedup": figure(1.6)}
    sparse = device(kernel(8, 8, 2.0, sparse=gain))
    assert ms(sparse, INT8) == ms(sparse, half) == ms(plain, INT8)
    assert ms(sparse, pattern) == pytest.approx(ms(plain, INT8) / 1.6)
    other = LayerChoice(8, 8, sparsity="1:4")
    assert ms(sparse, other) == ms(sparse, INT8)
    slow = memory(bytes=1e6, gb_s=1e-4)  # the weights that move are half, and two bits for each
    bound = device(kernel(8, 8, 1e6, sparse=gain), on_chip=slow)
    saved = ms(bound, INT8) - ms(bound, pattern)
    assert saved == pytest.approx(100 * (8 - (4 + 1)) / 8 / 1e5 * 1e3)


def test_depthwise_layers_gain_nothing_from_a_pattern() -> None:
    gain = {"pattern": "2:4", "speedup": figure(1.6)}
    work = (Operator("depthwise", ((200, -1),), 80, 8000, "a", "Conv", "a", 100),)
    model = RooflineModel(work, device(kernel(8, 8, 2.0, sparse=gain)))
    pattern = LayerChoice(8, 8, sparsity="2:4")
    assert model.predict(lambda _: pattern) == model.predict(lambda _: INT8)


def test_a_sparse_layer_is_faster_on_the_shipped_profile_that_has_the_pattern() -> None:
    net = NETWORKS["residual"]()
    model = RooflineModel(net.graph, load_hardware("nvidia-a100"))
    layer = net.graph.layers[1]
    pattern = LayerChoice(8, 8, sparsity="2:4")
    assert model.layer_ms(net.graph, layer, pattern) < model.layer_ms(net.graph, layer, INT8)
