from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    CONVOLUTIONS,
    NETWORKS,
    PRODUCTS,
    TRANSPOSED,
    Network,
    build,
    network,
    node,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_task import graph

from autoquant.calibration import (
    BINS,
    METHODS,
    WIDTHS,
    Histogram,
    calibrate,
    channel_peaks,
    fixed_batch,
    rebatch,
)
from autoquant.errors import ModelError, TaskError
from autoquant.graph import attributes
from autoquant.task import Array, Split

floats = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 60), elements=floats)


def _histogram(*batches: Array) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(np.asarray(batch, np.float32))
    return histogram


def _normal(count: int = 20_000, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


# --- histograms ------------------------------------------------------------------------------


@given(st.lists(arrays, min_size=1, max_size=4))
def test_extremes_are_exact_and_nothing_is_lost(batches: list[Array]) -> None:
    histogram = _histogram(*batches)
    joined = np.concatenate(batches)
    assert (histogram.minimum, histogram.maximum) == (joined.min(), joined.max())
    assert histogram.counts.sum() == joined.size
    assert histogram.limit >= np.abs(joined).max()


@given(arrays, st.integers(1, 20))
def test_a_larger_batch_doubles_the_limit_and_keeps_the_counts(
    batch: Array, doublings: int
) -> None:
    histogram = _histogram(batch)
    limit, counts = histogram.limit, histogram.counts.copy()
    histogram.add(np.array([limit * 1.5 * 2 ** (doublings - 1)], np.float32))
    assert histogram.limit == limit * 2**doublings
    assert histogram.counts.sum() == counts.sum() + 1
    half = BINS // 2
    if doublings == 1:  # every old bin is in the half of its pair
        merged = counts.reshape(-1, 2).sum(1)
        assert np.array_equal(histogram.counts[half // 2 : half // 2 + half], merged)


def test_the_order_of_batches_does_not_matter() -> None:
    a, b = _normal(300), 40 * _normal(300, 1)
    first, second = _histogram(a, b), _histogram(b, a)
    assert first.limit == second.limit
    # values on the border of two bins aside
    assert np.abs(first.counts - second.counts).sum() <= 4


def test_extremes_see_every_element_of_a_large_tensor() -> None:
    values = np.zeros(300_001, np.float32)
    values[123_456], values[7] = 9.0, -3.0  # too rare for any stride to meet
    histogram = _histogram(values)
    assert (histogram.minimum, histogram.maximum) == (-3.0, 9.0)
    assert histogram.counts.sum() < values.size


def test_what_is_not_finite_is_refused() -> None:
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            _histogram(np.array([1.0, value]))


# --- ranges ----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(arrays, st.sampled_from(METHODS), st.sampled_from((4, 6, 8, 16)))
def test_a_range_contains_zero_and_lies_inside_the_extremes(
    values: Array, method: str, bits: int
) -> None:
    low, high = _histogram(values).range(method, bits)
    assert low <= 0 <= high and math.isfinite(low) and math.isfinite(high)
    assert min(float(values.min()), 0) <= low
    assert high <= max(float(values.max()), 1e-6)


@given(arrays)
def test_minmax_is_exact(values: Array) -> None:
    low, high = _histogram(values).range("minmax", 8)
    if values.max() - values.min() > 1e-6:
        assert (low, high) == (min(values.min(), 0), max(values.max(), 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize(
    "values",
    [
        np.zeros(100),
        np.full(100, 5.0),
        np.full(100, -5.0),
        np.full(100, 1e-20),
        np.array([0.0] * 99_999 + [-1.0]),
        np.append(_normal(), 1e6),
        np.append(_normal(), -1e6),
        np.append(np.zeros(5000), [-1e6, 1e6]),
    ],
    ids=("zeros", "five", "minus five", "tiny", "one below", "high", "low", "both"),
)
def test_degenerate_tensors_have_a_usable_range(values: Array, bits: int, method: str) -> None:
    low, high = _histogram(values).range(method, bits)
    assert low <= 0 <= high and math.isfinite(high - low)
    assert min(values.min(), 0) <= low and high <= max(values.max(), 1e-6)
    if np.ptp(values) == 0 and abs(values[0]) == 5:
        assert (low, high) == ((0, 5) if values[0] > 0 else (-5, 0))


def test_a_histogram_without_values_has_a_usable_range() -> None:
    low, high = Histogram().range("mse", 8)
    assert low == 0 < high


def test_percentile_leaves_rare_values_out() -> None:
    values = np.append(_normal(100_000), [50.0, -60.0])
    low, high = _histogram(values).range("percentile", 8)
    assert -5.5 < low < -3 and 3 < high < 5.5


def _error(values: Array, low: float, high: float, bits: int) -> float:
    scale = (high - low) / (2**bits - 1)
    rounded = np.clip(np.round((values - low) / scale), 0, 2**bits - 1) * scale + low
    return float(((values - rounded) ** 2).mean())


@pytest.mark.parametrize("bits", (4, 6, 8))
def test_mse_clips_where_that_lowers_the_error(bits: int) -> None:
    values = np.random.default_rng(0).standard_t(3, 30_000).astype(np.float32)
    histogram = _histogram(values)
    clipped = _error(values, *histogram.range("mse", bits), bits)
    assert clipped < 0.95 * _error(values, *histogram.range("minmax", bits), bits)


def test_fewer_bits_clip_more() -> None:
    values = np.random.default_rng(0).standard_t(4, 30_000).astype(np.float32)
    widths = [np.ptp(_histogram(values).range("mse", bits)) for bits in (4, 6, 8, 16)]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_entropy_clips_a_long_tail() -> None:
    values = np.append(_normal(50_000), [30.0])
    low, high = _histogram(values).range("entropy", 8)
    assert high < 30 and high - low < 30


def test_sixteen_bits_take_everything() -> None:
    histogram = _histogram(np.append(_normal(), 100.0))
    for method in METHODS:
        assert histogram.range(method, 16)[1] == 100


# --- one pass over a network -----------------------------------------------------------------


def test_every_tensor_that_can_be_quantized_has_its_histogram() -> None:
    net = NETWORKS["residual"]()
    found = net.calibration.histograms
    assert set(found) == {"x", "r1", "c2", "s", "r2", "r3", "g", "f", "y"}  # not c1, c3: hidden
    assert (found["x"].minimum, found["x"].maximum) == (net.inputs[0].min(), net.inputs[0].max())
    assert found["r3"].minimum == 0 and found["r3"].maximum <= 6


def test_inputs_that_are_indices_have_none() -> None:
    assert set(NETWORKS["text"]().calibration.histograms) >= {"mask", "e"}
    assert "ids" not in NETWORKS["text"]().calibration.histograms


def test_outputs_are_those_of_the_float_network() -> None:
    net = NETWORKS["residual"]()
    (batches,) = net.calibration.outputs
    np.testing.assert_allclose(np.concatenate(batches), net.reference[0], rtol=1e-4, atol=1e-5)
    assert net.calibration.samples == len(net.inputs[0])


def test_what_is_kept_holds_no_memory_of_the_session() -> None:
    """A session's outputs keep its whole arena: 350 MB a structure of ResNet-20."""
    for batches in NETWORKS["residual"]().calibration.outputs:
        assert all(batch.flags.owndata for batch in batches)


def test_how_the_data_is_batched_does_not_matter() -> None:
    net = NETWORKS["residual"]()
    x = net.inputs[0]
    split = Split("calibration", tuple((x[i : i + 5],) for i in range(0, len(x), 5)), None, len(x))
    parts = calibrate(net.graph, split, method="minmax", moments=True, threads=1)
    whole = calibrate(net.graph, net.split, method="minmax", moments=True, threads=2)
    for name in whole.histograms:
        np.testing.assert_allclose(parts.range(name, 8), whole.range(name, 8), rtol=1e-4, atol=1e-6)
    for name, moments in whole.moments.items():
        assert parts.moments[name].samples == moments.samples
        np.testing.assert_allclose(parts.moments[name].second, moments.second, rtol=1e-3, atol=1e-4)


def test_a_range_belongs_to_a_tensor_and_bits() -> None:
    calibration = calibrate(NETWORKS["chain"]().graph, NETWORKS["chain"]().split, method="mse")
    four, eight = calibration.range("r0", 4), calibration.range("r0", 8)
    assert four[1] < eight[1]
    assert calibration.range("r0", 4) == four


def test_outputs_may_differ_in_a_dynamic_axis() -> None:
    net = NETWORKS["matmul"]()
    model = build(
        [node("MatMul", ["x", "w"], ["y"])],
        {"w": net.graph.array("w")},
        {"x": ["N", "S", 10]},
        ["y"],
    )
    free = network(model, net.inputs[0])
    batches = tuple((net.inputs[0][:4, :length],) for length in (2, 5, 3))
    found = calibrate(free.graph, Split("calibration", batches, None, 12))
    assert [b.shape for b in found.outputs[0]] == [(4, 2, 6), (4, 5, 6), (4, 3, 6)]
    assert found.samples == 12


def test_a_static_batch_is_kept() -> None:
    model = build(
        [node("Gemm", ["x", "w"], ["y"])],
        {"w": NETWORKS["gemm"]().graph.array("fc.weight")},
        {"x": [1, 12]},
        ["y"],
    )
    x = NETWORKS["gemm"]().inputs[0]
    net = network(model, x[:1])
    assert fixed_batch(net.graph) == 1 and fixed_batch(NETWORKS["gemm"]().graph) is None
    found = calibrate(net.graph, Split("calibration", ((x,),), None, len(x)))
    assert found.samples == len(x) and found.histograms["x"].maximum == x.max()


@pytest.mark.parametrize(("exact", "sizes"), [(False, [4, 3, 2]), (True, [4])])
def test_rebatch_splits_and_keeps_order(exact: bool, sizes: list[int]) -> None:
    a = np.arange(7)
    parts = rebatch([(a, -a), (a[:2], -a[:2])], 4, exact=exact)
    assert [len(p[0]) for p in parts] == sizes
    assert all(np.array_equal(p[0], -p[1]) for p in parts)
    if not exact:
        assert np.concatenate([p[0] for p in parts]).tolist() == [*a, *a[:2]]


def test_data_that_does_not_fit_is_a_task_error() -> None:
    net = NETWORKS["residual"]()
    wrong = Split("calibration", ((np.zeros((2, 1, 8, 8), np.float32),),), None, 2)
    with pytest.raises(TaskError, match="calibration data: the network cannot run it") as caught:
        calibrate(net.graph, wrong)
    assert "\n" not in str(caught.value)


def test_an_activation_that_overflows_is_named() -> None:
    model = build(
        [
            node("Gemm", ["x", "w"], ["h"]),
            node("Exp", ["h"], ["e"]),
            node("Gemm", ["e", "v"], ["y"]),
        ],
        {"w": np.eye(3, dtype=np.float32), "v": np.eye(3, dtype=np.float32)},
        {"x": ["N", 3]},
        ["y"],
    )
    net = network(model, np.zeros((1, 3), np.float32))
    split = Split("calibration", ((np.full((1, 3), 1e3, np.float32),),), None, 1)
    with pytest.raises(ModelError, match="'e' is NaN or infinite on the calibration data"):
        calibrate(net.graph, split)


def test_an_unknown_method_offers_what_is_close() -> None:
    net = NETWORKS["gemm"]()
    with pytest.raises(TaskError, match="did you mean 'entropy'"):
        calibrate(net.graph, net.split, method="entropie")


# --- second moments --------------------------------------------------------------------------


def _moments(net: Network) -> Any:
    found = calibrate(net.graph, net.split, moments=True, threads=1)
    return found.moments[net.graph.layers[0].name]


def _windows(net: Network) -> Array:
    """(groups, K, positions) by NumPy alone: what a layer's weights multiply."""
    (layer,) = net.graph.layers
    x = net.inputs[0].astype(np.float64)
    if layer.kind in ("Gemm", "MatMul"):
        return x.reshape(-1, x.shape[-1]).T[None]
    n, group = len(x), layer.group
    if layer.kind == "ConvTranspose":
        return np.moveaxis(x.reshape(n, group, x.shape[1] // group, -1), 0, 2).reshape(
            group, x.shape[1] // group, -1
        )
    found = attributes(net.graph.nodes[layer.node])
    rank = x.ndim - 2
    strides = found.get("strides", [1] * rank)
    dilations = found.get("dilations", [1] * rank)
    pads = found.get("pads", [0] * 2 * rank)
    x = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    columns = []
    for sample in x:
        for place in np.ndindex(*layer.output_shape[2:]):
            window = sample[
                (
                    slice(None),
                    *(
                        slice(p * s, p * s + (k - 1) * d + 1, d)
                        for p, s, d, k in zip(
                            place, strides, dilations, layer.weight_shape[2:], strict=True
                        )
                    ),
                )
            ]
            columns.append(window.reshape(group, -1))
    return np.stack(columns, axis=2)


@pytest.mark.parametrize("name", (*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS))
def test_second_moments_are_those_of_numpy(name: str) -> None:
    net = NETWORKS[name]()
    windows = _windows(net)
    moments = _moments(net)
    count = windows.shape[2]
    assert moments.samples == count
    expected = windows @ windows.transpose(0, 2, 1) / count
    np.testing.assert_allclose(moments.second, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.mean, windows.mean(axis=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", (*CONVOLUTIONS, *PRODUCTS))
def test_moments_predict_the_power_of_the_outputs(name: str) -> None:
    """E[(w·x)²] = w E[x xᵀ] wᵀ for the weight as it lies in the file: the order of K is right."""
    net = NETWORKS[name]()
    (layer,) = net.graph.layers
    source = net.graph.nodes[layer.node]
    model = build(
        [node(layer.kind, [layer.input, layer.weight], ["o"], **attributes(source))],
        {layer.weight: net.graph.array(layer.weight)},
        {layer.input: ["N", *layer.input_shape[1:]]},
        ["o"],
    )
    output = run(model, *net.inputs)[0].astype(np.float64)
    axis = 1 if layer.kind == "Conv" else -1
    channels = np.moveaxis(output, axis, 0).reshape(layer.channels, -1)
    moments = _moments(net)
    rows = np.moveaxis(net.graph.array(layer.weight), layer.channel_axis, 0)
    rows = rows.reshape(layer.group, layer.channels // layer.group, -1)
    power = np.einsum("gck,gkl,gcl->gc", rows, moments.second, rows).reshape(-1)
    np.testing.assert_allclose(power, (channels**2).mean(axis=1), rtol=1e-3)
    mean = np.einsum("gck,gk->gc", rows, moments.mean).reshape(-1)
    np.testing.assert_allclose(mean, channels.mean(axis=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("auto_pad", ("SAME_UPPER", "SAME_LOWER", "VALID"))
def test_moments_understand_automatic_padding(auto_pad: str) -> None:
    w = NETWORKS["conv2d"]().graph.array("conv.weight")
    x = NETWORKS["conv2d"]().inputs[0]
    model = build(
        [node("Conv", ["x", "conv.weight"], ["y"], strides=[2, 2], auto_pad=auto_pad)],
        {"conv.weight": w},
        {"x": ["N", 3, 8, 8]},
        ["y"],
    )
    net = network(model, x)
    rows = w.reshape(len(w), -1)
    power = np.einsum("ck,kl,cl->c", rows, _moments(net).second[0], rows)
    output = net.reference[0].astype(np.float64)
    np.testing.assert_allclose(power, (output**2).mean(axis=(0, 2, 3)), rtol=1e-3)


def test_embeddings_have_no_moments_and_none_are_made_unasked() -> None:
    net = NETWORKS["text"]()
    found = calibrate(net.graph, net.split, moments=True)
    assert set(found.moments) == {"query", "key", "head"}
    assert net.calibration.moments == {}


# --- ranges by the error downstream ----------------------------------------------------------


def _read_by(weight: Array, data: Array) -> Network:
    model = build(
        [node("MatMul", ["x", "w"], ["y"], name="l")], {"w": weight}, {"x": ["N", 8]}, "y"
    )
    return network(model, data)


def _spiky() -> tuple[Array, Array]:
    """Normal values with rare ones of 20 in channel 0; a weight for the 8 channels."""
    generator = np.random.default_rng(5)
    data = generator.normal(size=(4000, 8)).astype(np.float32)
    data[::400, 0] = 20.0
    return data, generator.normal(size=(8, 3)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_no_weight_reads_is_clipped(bits: int) -> None:
    data, weight = _spiky()
    weight[0] = 0.0
    net = _read_by(weight, data)
    found = calibrate(net.graph, net.split, method="downstream", threads=1)
    assert found.range("x", bits)[1] < 8 < calibrate(net.graph, net.split).range("x", 8)[1]


def test_what_weights_amplify_is_kept() -> None:
    data, weight = _spiky()
    weight[0] *= 30
    net = _read_by(weight, data)
    assert calibrate(net.graph, net.split).range("x", 4)[1] < 10
    found = calibrate(net.graph, net.split, method="downstream", threads=1)
    assert found.range("x", 4)[1] > 15


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", [*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS])
def test_the_outputs_are_no_worse_than_with_other_ranges(name: str, bits: int) -> None:
    net = NETWORKS[name]()
    tensor = net.graph.layers[0].input
    low = min(float(net.inputs[0].min()), 0.0)

    def error(method: str) -> float:
        """Of the layer's outputs, its input on the calibrated grid."""
        start, end = calibrate(net.graph, net.split, method=method, threads=1).range(tensor, bits)
        assert low <= start <= 0 <= end
        scale = (end - start) / (2**bits - 1)
        zero = round(-start / scale)
        steps = np.clip(np.round(net.inputs[0] / scale), -zero, 2**bits - 1 - zero)
        (found,) = run(net.graph.model, (steps * scale).astype(np.float32))
        return float(((found - net.reference[0]) ** 2).mean())

    found = error("downstream")  # judged without the Relu, on some positions
    assert found <= 1.1 * min(error("minmax"), error("mse"))


def test_readers_other_than_layers_count_too() -> None:
    """A skip connection needs what the layer beside it ignores."""
    data, weight = _spiky()
    weight[0] = 0.0
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="l"),
        node("MatMul", ["x", "v"], ["n"], name="k"),
        node("Concat", ["m", "n", "x"], ["y"], axis=1),
    ]
    model = build(nodes, {"w": weight, "v": weight[::-1].copy()}, {"x": ["N", 8]}, ["y"])
    net = network(model, data)
    assert calibrate(net.graph, net.split, method="downstream").range("x", 8)[1] > 15


def test_ranges_downstream_survive_without_moments() -> None:
    net = NETWORKS["residual"]()
    whole = calibrate(net.graph, net.split, method="downstream", moments=True, threads=1)
    sent = pickle.loads(pickle.dumps(whole.without_moments()))
    again = calibrate(net.graph, net.split, method="downstream", threads=1)
    for layer in net.graph.layers:
        for bits in WIDTHS:
            expected = whole.range(layer.input, bits)
            assert sent.range(layer.input, bits) == again.range(layer.input, bits) == expected


def test_products_of_activations_read_downstream_as_others_do() -> None:
    net = NETWORKS["attention"]()
    found = calibrate(net.graph, net.split, method="downstream", threads=1)
    assert len(net.graph.products) == 2
    for layer in net.graph.products:
        low, high = found.range(layer.input, 8)
        assert low <= 0 <= high and low < high


def test_a_width_that_was_not_asked_for_has_the_range_of_mse() -> None:
    net = NETWORKS["chain"]()
    found = calibrate(net.graph, net.split, method="downstream", widths=[8], threads=1)
    mse = calibrate(net.graph, net.split, method="mse", threads=1)
    assert found.range("r0", 4) == mse.range("r0", 4)
    assert found.range("r4", 8) == mse.range("r4", 8)  # no layer reads it


# --- largest magnitudes ----------------------------------------------------------------------


def test_peaks_are_those_of_every_sample() -> None:
    net = NETWORKS["text"]()
    found = channel_peaks(net.graph, net.split, ["e", "mask"], 1)
    words = net.graph.array("words.weight")[net.inputs[0]]
    np.testing.assert_array_equal(found["e"], np.abs(words).max(axis=(0, 1)))
    np.testing.assert_array_equal(found["mask"], np.abs(net.inputs[1]).max(axis=(0, 1)))
    assert channel_peaks(net.graph, net.split, []) == {}


def test_moments_are_the_same_for_any_number_of_threads() -> None:
    """A run that goes on where torch has other threads must find the same bytes."""
    found, before = [], torch.get_num_threads()
    images = np.random.default_rng(0).normal(size=(96, 2, 8, 8)).astype(np.float32)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            split = Split("calibration", ((images,),), None, len(images))
            found.append(calibrate(graph(), split, moments=True).moments)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, moments in found[0].items():
        for other in found[1:]:
            assert np.array_equal(moments.second, other[name].second), name
            assert np.array_equal(moments.mean, other[name].mean), name
