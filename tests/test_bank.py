from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NETWORKS, ONE_LAYER, ROWS, Network, Weights, build, images, network, node
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoquant.calibration import Moments, calibrate
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import rounding
from autoquant.compress.bank import (
    PLANES,
    Bank,
    QuantizedWeight,
    as_rows,
    as_weight,
    pack,
    storable_scale,
    unpack,
)
from autoquant.compress.qdq import assemble
from autoquant.compress.rounding import Nearest, SecondOrder, integer_range
from autoquant.errors import CandidateError, ModelError
from autoquant.task import Array, Split

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
            self,
            weight: Array,
            bits: int,
            granularity: str,
            moments: Moments | None = None,
            mask: Array | None = None,
        ) -> tuple[Array, Array]:
            seen.append((weight.shape, bits, granularity, moments))
            return super().__call__(weight, bits, granularity, moments, mask)

    monkeypatch.setitem(rounding.ROUNDINGS, "spy", Spy())
    net = NETWORKS["grouped"]()
    calibration = calibrate(net.graph, net.split, moments=True)
    Bank(net.graph, "spy", calibration).get(net.graph.layers[0], LayerChoice(4, 8))
    ((shape, bits, granularity, moments),) = seen
    assert (shape, bits, granularity) == ((8, 18), 4, "channel")
    assert moments is not None and moments.second.shape == (2, 18, 18)
    assert np.array_equal(moments.second, calibration.moments["conv"].second)
    assert np.array_equal(moments.mean, calibration.moments["conv"].mean)


# --- transposed convolutions and shared weights ----------------------------------------------


def _images(*shape: int) -> Array:
    """Correlated inputs with a mean, as they come out of a Relu."""
    white = images(*shape)
    mix = 2 * np.random.default_rng(5).normal(size=(shape[0], shape[0])) / shape[0] ** 0.5
    mixed = np.einsum("oc,nc...->no...", mix + np.eye(shape[0]), white)
    return np.asarray(np.maximum(mixed, 0) + 0.5, np.float32)


def _transposed(group: int = 1, **attributes: Any) -> Network:
    nodes = [node("ConvTranspose", ["x", "up.weight"], ["y"], group=group, **attributes)]
    weight = Weights()(8, 4, 3, 3, fan_in=72)
    model = build(nodes, {"up.weight": weight}, {"x": ["N", 8, 7, 7]}, ["y"])
    return network(model, _images(8, 7, 7))


def _gap(net: Network, rounding: str, bits: int, output: int = 0) -> Array:
    """Float output less the artifact's, in onnxruntime: weights alone are quantized."""
    bank = Bank(net.graph, rounding, calibrate(net.graph, net.split, moments=True))
    candidate = net.resolved(net.uniform(bits, 32))
    model = assemble(net.graph, candidate, net.calibration, bank)
    return net.reference[output] - net.run(model)[output]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_a_weight_becomes_rows_and_comes_back(name: str) -> None:
    net = NETWORKS[name]()
    (layer,) = net.graph.layers
    weight = net.graph.array(layer.weight)
    rows = as_rows(weight, layer)
    assert rows.shape == (layer.channels, layer.parameters // layer.channels)
    assert np.array_equal(as_weight(rows, layer), weight)
    taken = weight.take(1, axis=layer.channel_axis)
    assert np.array_equal(np.sort(rows[1]), np.sort(taken.reshape(-1)))


@pytest.mark.parametrize("group", (1, 2))
@pytest.mark.parametrize(
    "attributes",
    (
        {},
        {"strides": [2, 2]},
        {"strides": [2, 1], "pads": [1, 0, 1, 2], "output_padding": [1, 0]},
        {"dilations": [2, 2], "pads": [1, 1, 1, 1]},
        {"strides": [3, 3]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    ),
    ids=("plain", "strides", "pads", "dilations", "apart", "same"),
)
def test_a_transposed_convolution_is_rounded_by_its_inputs(
    attributes: dict[str, Any], group: int
) -> None:
    net = _transposed(group, **attributes)
    plain = _gap(net, "nearest", 3)
    for name in ("second-order", "adaround"):
        gap = _gap(net, name, 3)
        assert (gap**2).mean() < 0.8 * (plain**2).mean()
        mean = np.abs(gap.mean(axis=(0, 2, 3)))
        assert mean.max() < 0.2 * np.abs(plain.mean(axis=(0, 2, 3))).max() + 1e-3


def test_the_shift_of_a_transposed_convolution_counts_what_each_position_reaches() -> None:
    """Inputs that are all one: the mean output is known exactly, at the borders too."""
    nodes = [node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], pads=[1, 1, 0, 0])]
    model = build(nodes, {"w": Weights()(4, 3, 3, 3)}, {"x": ["N", 4, 5, 5]}, ["y"])
    net = network(model, np.ones((4, 4, 5, 5), np.float32))
    gap = _gap(net, "second-order", 2)
    assert np.abs(gap).max() > 0.01
    np.testing.assert_allclose(gap.mean(axis=(0, 2, 3)), 0, atol=1e-5)


@pytest.mark.parametrize("group", (1, 2))
def test_a_transposed_convolution_in_blocks_is_near_and_keeps_its_mean(group: int) -> None:
    net = _transposed(group, strides=[2, 2])
    (layer,) = net.graph.layers
    choice = LayerChoice(4, 32, "block32")
    bank = Bank(net.graph, "second-order", calibrate(net.graph, net.split, moments=True))
    model = assemble(
        net.graph, net.resolved(Candidate({layer.name: choice})), net.calibration, bank
    )
    gap = net.reference[0] - net.run(model)[0]
    entry = bank.get(layer, choice)
    assert entry.scale.shape == (4, 3) and entry.shift is not None
    weight = net.graph.array(layer.weight)
    assert np.abs(entry.dequantized() - weight).max() < entry.scale.max()
    shift = np.abs(entry.shift).max()
    assert np.abs(gap.mean(axis=(0, 2, 3))).max() < 0.05 * shift + 1e-3
    assert (gap**2).mean() < (_gap(net, "nearest", 3) ** 2).mean()


def _shared(kind: str) -> Network:
    """Two outputs from one weight, on inputs that differ."""
    w = Weights(8)
    arrays = {"w.weight": w(12, 12), "a": w.bias(12), "b": w.bias(12)}
    second = ["r", "w.weight", *(["b"] if kind != "one without a bias" else [])]
    nodes = [
        node("Gemm", ["x", "w.weight", "a"], ["y"], transB=1),
        node("Relu", ["y"], ["r"]),
        node("Gemm", second, ["z"], transB=0 if kind == "other axis" else 1),
    ]
    if kind == "one without a bias":
        nodes[2] = node("MatMul", ["r", "w.weight"], ["z"])
        nodes[0] = node("Gemm", ["x", "w.weight", "a"], ["y"], transB=0)
    model = build(nodes, arrays, {"x": ["N", 12]}, ["y", "z"])
    return network(model, _images(12))


@pytest.mark.parametrize("kind", ("alike", "other axis", "one without a bias"))
def test_layers_that_share_a_weight_are_rounded_by_all_their_inputs(kind: str) -> None:
    net = _shared(kind)
    assert (_gap(net, "second-order", 3, 0) ** 2).mean() < (_gap(net, "nearest", 3, 0) ** 2).mean()
    calibration = calibrate(net.graph, net.split, moments=True)
    bank = Bank(net.graph, "second-order", calibration)
    choice = LayerChoice(3, 32)
    bank.build([(layer, choice) for layer in net.graph.layers])
    first, second = (bank.get(layer, choice) for layer in net.graph.layers)
    assert (first.values is second.values) == (kind != "other axis")
    assert first.shift is not None
    assert (second.shift is None) == (kind == "one without a bias")
    for layer, entry in zip(net.graph.layers, (first, second), strict=True):
        gap = as_rows(net.graph.array(layer.weight) - entry.dequantized(), layer)
        lost = gap @ calibration.moments[layer.name].mean[0]
        if entry.shift is not None:
            np.testing.assert_allclose(entry.shift, lost, rtol=1e-3, atol=1e-5)
    again: Bank = pickle.loads(pickle.dumps(bank))
    assert again.get(net.graph.layers[0], choice).shift is not None


def test_a_tied_embedding_shares_the_integers_of_its_product() -> None:
    w = Weights(8)
    nodes = [
        node("Gather", ["table.weight", "ids"], ["e"]),
        node("Gemm", ["x", "table.weight"], ["y"], transB=1),
    ]
    model = build(
        nodes, {"table.weight": w(20, 12)}, {"ids": ["N"], "x": ["N", 12]}, ["e", "y"],
        indices=["ids"],
    )  # fmt: skip
    net = network(model, np.arange(ROWS) % 20, _images(12))
    assert (_gap(net, "second-order", 3, 1) ** 2).mean() < (_gap(net, "nearest", 3, 1) ** 2).mean()
    rows = (_gap(net, "second-order", 3, 0) ** 2).mean()
    assert rows < 2 * (_gap(net, "nearest", 3, 0) ** 2).mean()
    bank = Bank(net.graph, "second-order", calibrate(net.graph, net.split, moments=True))
    table, product = (bank.get(layer, LayerChoice(3, 32)) for layer in net.graph.layers)
    assert table.values is product.values
    assert table.shift is None and product.shift is not None


# --- saved by content ------------------------------------------------------------------------

WIDTHS = tuple(LayerChoice(bits, 8) for bits in (2, 4, 8))


def _filled(net: Network, rounding: str = "second-order") -> Bank:
    bank = Bank(net.graph, rounding, calibrate(net.graph, net.split, moments=True))
    bank.build([(layer, choice) for layer in net.graph.layers for choice in WIDTHS])
    return bank


@pytest.mark.parametrize("name", ("residual", "text", "transposed"))
def test_a_loaded_bank_makes_the_same_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = NETWORKS[name]()
    made = _filled(net)
    made.save(tmp_path / "bank.npz")
    loaded = Bank(net.graph, "second-order", calibrate(net.graph, net.split, moments=True))
    assert loaded.load(tmp_path / "bank.npz") == len(WIDTHS) * len(net.graph.layers)
    monkeypatch.setitem(rounding.ROUNDINGS, "second-order", SecondOrder())  # the same settings
    monkeypatch.setattr(SecondOrder, "__call__", None)  # nothing is rounded
    for choice in WIDTHS:
        candidate = net.resolved(Candidate({x.name: choice for x in net.graph.layers}))
        files = [
            assemble(net.graph, candidate, net.calibration, bank).SerializeToString()
            for bank in (made, loaded)
        ]
        assert files[0] == files[1]
        for layer in net.graph.layers:
            assert made.get(layer, choice).error == loaded.get(layer, choice).error


def test_a_loaded_bank_has_blocks(tmp_path: Path) -> None:
    net = NETWORKS["blocked"]()
    choices = [(x, LayerChoice(3, 32, "block32")) for x in net.graph.layers]
    made, loaded = (Bank(net.graph, "second-order", net.calibration) for _ in range(2))
    made.build(choices)
    made.save(tmp_path / "bank.npz")
    assert loaded.load(tmp_path / "bank.npz") == len(choices)
    for layer, choice in choices:
        before, after = made.get(layer, choice), loaded.get(layer, choice)
        assert after.block == 32 and np.array_equal(before.scale, after.scale)
        assert np.array_equal(before.dequantized(), after.dequantized())


def test_a_loaded_bank_gives_layers_that_share_a_weight_their_own_shifts(tmp_path: Path) -> None:
    net = _shared("alike")
    made, loaded = _filled(net), _filled(net)
    made.save(tmp_path / "bank.npz")
    loaded = Bank(net.graph, "second-order", calibrate(net.graph, net.split, moments=True))
    assert loaded.load(tmp_path / "bank.npz") == len(WIDTHS)
    for layer in net.graph.layers:
        before, after = made.get(layer, WIDTHS[0]).shift, loaded.get(layer, WIDTHS[0]).shift
        assert before is not None and after is not None and np.array_equal(before, after)


def test_a_file_that_is_damaged_or_of_another_content_is_not_taken(tmp_path: Path) -> None:
    net = NETWORKS["residual"]()
    made = _filled(net)
    path = tmp_path / "bank.npz"
    made.save(path)
    whole = path.read_bytes()
    fresh = Bank(net.graph, "second-order", made.calibration)
    assert fresh.load(tmp_path / "none.npz") == 0
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (b"", b"not a bank", whole[:100], whole[:middle], flipped):
        path.write_bytes(damaged)
        assert fresh.load(path) == 0, len(damaged)
    path.write_bytes(whole)
    fewer = Split("calibration", ((net.inputs[0][:5],),), None, 5)
    other = calibrate(net.graph, fewer, moments=True)
    assert Bank(net.graph, "second-order", other).load(path) == 0
    assert Bank(NETWORKS["chain"]().graph, "second-order", made.calibration).load(path) == 0
    assert Bank(net.graph, "second-order").load(path) == 0
    assert fresh.load(path) == len(WIDTHS) * len(net.graph.layers)


def test_the_content_knows_the_settings_of_the_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    net = NETWORKS["gemm"]()
    bank = _filled(net)
    before = bank.content_key()
    assert before == _filled(net).content_key()
    monkeypatch.setitem(rounding.ROUNDINGS, "second-order", SecondOrder(damping=0.02))
    assert bank.content_key() != before


def test_a_saved_bank_is_completed_with_what_it_lacks(tmp_path: Path) -> None:
    net = NETWORKS["residual"]()
    made = _filled(net)
    made.save(tmp_path / "bank.npz")
    bank = Bank(net.graph, "second-order", made.calibration)
    kept = bank.load(tmp_path / "bank.npz")
    wanted = [(layer, c) for layer in net.graph.layers for c in (*WIDTHS, LayerChoice(3, 8))]
    entries, _ = bank.build(wanted)
    assert entries == kept + len(net.graph.layers)


def test_roundings_of_one_layer_are_entries_of_their_own() -> None:
    net = NETWORKS["gemm"]()
    bank = _filled(net)
    (layer,) = net.graph.layers
    found = {name: bank.get(layer, LayerChoice(3, 8, rounding=name)) for name in rounding.ROUNDINGS}
    assert bank.get(layer, LayerChoice(3, 8)) is found["second-order"]
    values = [entry.values.tobytes() for entry in found.values()]
    assert len(set(values)) == len(values)
    assert found["nearest"].shift is None and found["adaround"].shift is not None


@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_moments_that_are_not_finite_are_an_error_that_names_the_layer(bad: float) -> None:
    net = NETWORKS["residual"]()
    calibration = calibrate(net.graph, net.split, moments=True)
    calibration.moments["conv2"].second[0, 1, 1] = bad
    bank = Bank(net.graph, "second-order", calibration)
    with pytest.raises(ModelError, match="'conv2'"):
        bank.build([(layer, WIDTHS[0]) for layer in net.graph.layers])


def test_an_unknown_rounding_offers_what_is_close() -> None:
    with pytest.raises(CandidateError, match="did you mean 'nearest'"):
        Bank(NETWORKS["gemm"]().graph, "nearst")


@pytest.mark.parametrize("rounding", ("nearest", "second-order", "adaround"))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_blocks_have_scales_of_their_own_along_the_inputs(rounding: str, bits: int) -> None:
    net = NETWORKS["blocked"]()
    found = calibrate(net.graph, net.split, moments=True, threads=1)
    bank = Bank(net.graph, rounding, found)
    for layer in net.graph.layers:
        entry = bank.get(layer, LayerChoice(bits, 32, "block32"))
        inputs = layer.parameters // layer.channels
        assert entry.scale.shape == (layer.channels, -(-inputs // 32))
        assert entry.values.shape == layer.weight_shape
        assert entry.half_scale and (entry.scale == entry.scale.astype(np.float16)).all()
        rows = np.moveaxis(entry.dequantized(), layer.channel_axis, 0).reshape(layer.channels, -1)
        steps = rows[:, 32:64] / entry.scale[:, 1:2]
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
        coarse = bank.get(layer, LayerChoice(bits, 32))
        learned = rounding == "adaround" and bits == 2  # up or down: it cannot leave its start
        if bits < 8 and layer.kind != "ConvTranspose" and not learned:
            assert entry.error < coarse.error * 1.1


def test_scales_that_a_half_cannot_hold_stay_as_they_are() -> None:
    scale = np.array([[1e-3, 0.3]], np.float32)
    assert (storable_scale(scale, 32) == scale.astype(np.float16)).all()
    for factor in (1e-4, 1e8):
        assert (storable_scale(scale * np.float32(factor), 32) == scale * factor).all()
    assert (storable_scale(scale[0], 0) == scale[0]).all()  # of channels: float32


@pytest.mark.parametrize("bits", (2, 4, 8))
def test_packed_blocks_are_the_integers_low_index_in_low_bits(bits: int) -> None:
    net = NETWORKS["blocked"]()
    layer = net.graph.by_name["second"]  # 96 channels of 70 inputs, along the second axis
    entry = Bank(net.graph).get(layer, LayerChoice(bits, 32, "block32"))
    packed = entry.packed_blocks()
    assert packed.shape == (96, 3, 32 * bits // 8) and packed.dtype == np.uint8
    for channel, index in ((0, 0), (5, 33), (95, 69)):
        byte = int(packed[channel, index // 32, index % 32 * bits // 8])
        code = byte >> (index * bits % 8) & (2**bits - 1)
        assert code - 2 ** (bits - 1) == entry.values[index, channel]
