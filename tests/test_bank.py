from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import NETWORKS, ONE_LAYER, Weights, build, images, network, node
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoquant.calibration import Moments, calibrate
from autoquant.candidate import LayerChoice
from autoquant.compress import rounding
from autoquant.compress.bank import PLANES, Bank, QuantizedWeight, pack, unpack
from autoquant.compress.rounding import Nearest, integer_range
from autoquant.errors import CandidateError
from autoquant.task import Array

# --- packing ---------------------------------------------------------------------------------


@st.composite
def integers(draw: st.DrawFn) -> tuple[Array, int]:
    bits = draw(st.sampled_from(sorted(PLANES)))
    low, high = integer_range(bits)
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    return draw(hnp.arrays(np.int8, shape, elements=st.integers(low, high))), bits


@given(integers())
def test_what_is_packed_unpacks(case: tuple[Array, int]) -> None:
    values, bits = case
    planes = pack(values, bits)
    again = unpack(planes, bits, values.size)
    assert again.dtype == np.int8
    assert np.array_equal(again.reshape(values.shape), values)


@given(integers())
def test_packed_integers_take_their_bits(case: tuple[Array, int]) -> None:
    """Every width is real: ``bits`` bytes for eight weights, and no more."""
    values, bits = case
    planes = pack(values, bits)
    assert sum(PLANES[bits]) == bits
    assert sum(plane.nbytes for plane in planes) == -(-values.size // 8) * bits
    assert all(plane.dtype == np.uint8 and plane.shape[1] == 1 for plane in planes)


def test_the_layout_is_the_documented_one() -> None:
    """High bits first, low index in low bits: −4 −3 −2 −1 0 1 2 3 are the codes 0…7."""
    two, one = pack(np.arange(-4, 4), 3)
    assert two.ravel().tolist() == [0b01010000, 0b11111010]
    assert one.ravel().tolist() == [0b10101010]


# --- the bank --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_LAYER)
@pytest.mark.parametrize("granularity", ("channel", "tensor"))
def test_entries_lie_as_the_weight_lies(name: str, granularity: str) -> None:
    net = NETWORKS[name]()
    (layer,) = net.graph.layers
    weight = net.graph.array(layer.weight)
    for bits in (2, 4, 7, 8):
        entry = net.bank.get(layer, LayerChoice(bits, 32, granularity))
        assert (entry.bits, entry.axis) == (bits, layer.channel_axis)
        assert entry.values.shape == weight.shape and entry.values.dtype == np.int8
        assert len(entry.scale) == (layer.channels if granularity == "channel" else 1)
        peaks = np.abs(np.moveaxis(weight, layer.channel_axis, 0)).reshape(layer.channels, -1)
        if bits == 8:
            peak = peaks.max(1) if granularity == "channel" else peaks.max(keepdims=True)[0]
            np.testing.assert_allclose(entry.scale, peak / 127, rtol=1e-6)
            assert np.abs(entry.dequantized() - weight).max() <= entry.scale.max() * 0.5001


def test_sixteen_bits_are_wide() -> None:
    net = NETWORKS["conv2d"]()
    (layer,) = net.graph.layers
    entry = net.bank.get(layer, LayerChoice(16, 32, int16=True))
    assert entry.values.dtype == np.int16
    np.testing.assert_allclose(entry.dequantized(), net.graph.array(layer.weight), atol=2e-5)


def test_the_planes_hold_the_values() -> None:
    entry = QuantizedWeight(np.arange(-4, 4, dtype=np.int8), np.ones(1, np.float32), 3, 0)
    assert np.array_equal(unpack(entry.planes, 3, 8), entry.values)
    assert entry.planes is entry.planes


def test_an_entry_is_made_once() -> None:
    net = NETWORKS["chain"]()
    bank = Bank(net.graph)
    layer = net.graph.layers[0]
    first = bank.get(layer, LayerChoice(4, 8))
    assert bank.get(layer, LayerChoice(4, 32)) is first  # activations do not matter
    assert bank.get(layer, LayerChoice(3, 8)) is not first
    assert bank.get(layer, LayerChoice(4, 8, "tensor")) is not first


def test_build_makes_what_the_choices_need() -> None:
    net = NETWORKS["chain"]()
    bank = Bank(net.graph)
    wanted = [
        (layer, LayerChoice(bits, activation))
        for layer in net.graph.layers
        for bits, activation in ((2, 8), (8, 8), (8, 32), (16, 32), (32, 32), (32, 8))
    ]
    count, size = bank.build(wanted, workers=2)
    assert count == 2 * len(net.graph.layers)  # float and float16 need none
    assert size == 2 * sum(layer.parameters for layer in net.graph.layers)


def test_the_bank_is_safe_in_several_threads() -> None:
    net = NETWORKS["residual"]()
    bank = Bank(net.graph)
    layer = net.graph.layers[1]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bank.get(layer, LayerChoice(4, 8)), range(32)))
    assert len({id(entry) for entry in found}) == 1


def test_layers_that_share_a_weight_share_its_integers() -> None:
    w = Weights()(5, 5)
    nodes = [
        node("Gemm", ["x", "fc.weight"], ["h"], transB=1),
        node("Gemm", ["h", "fc.weight"], ["i"], transB=1),
        node("Gemm", ["i", "fc.weight"], ["y"]),
    ]
    net = network(build(nodes, {"fc.weight": w}, {"x": ["N", 5]}, ["y"]), images(5))
    first, second, other_axis = (net.bank.get(x, LayerChoice(4, 8)) for x in net.graph.layers)
    assert first is second
    assert other_axis.axis == 1 != first.axis  # the same weight, but scales for other channels


def test_a_bank_pickles_with_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS["residual"]()
    bank = Bank(net.graph, calibration=net.calibration)
    layer = net.graph.layers[0]
    before = bank.get(layer, LayerChoice(3, 8))
    again: Bank = pickle.loads(pickle.dumps(bank))

    def fails(*_: Any) -> Any:
        raise AssertionError("it was there")

    monkeypatch.setitem(rounding.ROUNDINGS, "nearest", fails)
    after = again.get(again.graph.layers[0], LayerChoice(3, 8))
    assert np.array_equal(after.values, before.values)
    assert np.array_equal(after.scale, before.scale)


def test_a_rounding_gets_the_moments_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy(Nearest):
        def __call__(
            self, weight: Array, bits: int, granularity: str, moments: Moments | None = None
        ) -> tuple[Array, Array]:
            seen.append((weight.shape, bits, granularity, moments))
            return super().__call__(weight, bits, granularity, moments)

    monkeypatch.setitem(rounding.ROUNDINGS, "spy", Spy())
    net = NETWORKS["grouped"]()
    calibration = calibrate(net.graph, net.split, moments=True)
    Bank(net.graph, "spy", calibration).get(net.graph.layers[0], LayerChoice(4, 8))
    ((shape, bits, granularity, moments),) = seen
    assert (shape, bits, granularity) == ((8, 18), 4, "channel")
    assert moments is not None and moments.second.shape == (2, 18, 18)
    assert np.array_equal(moments.second, calibration.moments["conv"].second)
    assert np.array_equal(moments.mean, calibration.moments["conv"].mean)


def test_an_unknown_rounding_offers_what_is_close() -> None:
    with pytest.raises(CandidateError, match="did you mean 'nearest'"):
        Bank(NETWORKS["gemm"]().graph, "nearst")
