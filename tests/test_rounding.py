from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import Weights
from contracts.rounding import RoundingContract
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoquant.calibration import Moments
from autoquant.candidate import ROUNDING_NAMES
from autoquant.compress import rounding
from autoquant.compress.rounding import (
    ROUNDINGS,
    AdaRound,
    Nearest,
    SecondOrder,
    hessian,
    integer_range,
    least_squares_scale,
    scale_of_weights,
)
from autoquant.task import Array


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=list(ROUNDINGS))
class TestRoundings(RoundingContract):
    pass


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6, 7, 8, 16))
def test_integer_ranges(bits: int) -> None:
    low, high = integer_range(bits)
    assert high == 2 ** (bits - 1) - 1
    assert low == (-(2 ** (bits - 1)) if bits < 8 else -high)


# --- nearest ---------------------------------------------------------------------------------


def _error(rows: Array, scale: Array, bits: int) -> Array:
    low, high = integer_range(bits)
    code = np.clip(np.round(rows / scale[:, None]), low, high)
    return ((rows - code * scale[:, None]) ** 2).sum(axis=1)


rows_of_weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.floats(-4, 4, width=32).map(lambda v: float(np.float32(round(v, 3)))),
)


@given(rows_of_weights, st.sampled_from((2, 3, 4, 5, 6, 7, 8)))
def test_no_scale_is_worse_than_the_largest_weight_over_the_largest_integer(
    rows: Array, bits: int
) -> None:
    peak = np.abs(rows).max(axis=1)
    plain = np.where(peak > 0, peak, 1).astype(np.float32) / np.float32(integer_range(bits)[1])
    found = _error(rows, least_squares_scale(rows, bits), bits)
    assert (found <= _error(rows, plain, bits) * (1 + 1e-4) + 1e-9).all()


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6))
def test_the_scale_is_close_to_the_best_of_a_fine_search(bits: int) -> None:
    rows = Weights(2)(5, 64)
    best = np.full(len(rows), np.inf)
    peak = np.abs(rows).max(axis=1)
    for factor in np.linspace(0.02, 1.2, 2000):
        scale = (factor * peak / integer_range(bits)[1]).astype(np.float32)
        best = np.minimum(best, _error(rows, scale, bits))
    found = _error(rows, least_squares_scale(rows, bits), bits)
    assert found.sum() <= 1.08 * best.sum()


def test_weights_on_a_grid_are_exact() -> None:
    for bits in (2, 3, 4, 8):
        _, high = integer_range(bits)
        codes = np.arange(-high, high + 1)[None]
        values, scale = Nearest()((codes * 0.25).astype(np.float32), bits, "channel")
        np.testing.assert_allclose(values * scale[:, None], codes * 0.25, atol=1e-6)


def test_one_scale_a_tensor_is_that_of_all_weights_together() -> None:
    weight = Weights()(4, 10)
    values, scale = Nearest()(weight, 4, "tensor")
    flat, flat_scale = Nearest()(weight.reshape(1, -1), 4, "channel")
    assert np.array_equal(values.ravel(), flat.ravel()) and np.array_equal(scale, flat_scale)


# --- blocks ----------------------------------------------------------------------------------


def _moments(inputs: int) -> Moments:
    """Of correlated inputs, some much larger than others."""
    generator = np.random.default_rng(3)
    mix = generator.normal(size=(inputs, inputs)) * generator.uniform(0.1, 3, (inputs, 1))
    x = mix @ generator.normal(size=(inputs, 4 * inputs))
    return Moments((x @ x.T / x.shape[1])[None], x.mean(axis=1)[None], x.shape[1])


def _output_error(weight: Array, values: Array, step: Array, moments: Moments) -> float:
    gap = weight - values * step
    return float(((gap @ moments.centred()[0]) * gap).sum())


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize("name", ROUNDINGS)
def test_smaller_blocks_leave_less_error(name: str, bits: int) -> None:
    weight, moments, errors = Weights(3)(24, 200), _moments(200), []
    for granularity, block in (("channel", 0), ("block128", 128), ("block32", 32)):
        values, scale = ROUNDINGS[name](weight, bits, granularity, moments)
        step = scale_of_weights(scale, 200, block)
        errors.append(
            _output_error(weight, values, step, moments)
            if ROUNDINGS[name].needs_moments
            else float(((weight - values * step) ** 2).sum())
        )
    assert errors[0] > errors[2]
    if name != "adaround":  # its scale moves but once, so that larger blocks may not help it
        assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("bits", (2, 4))
@pytest.mark.parametrize("inputs", (20, 70))
def test_adaround_in_blocks_is_never_worse_than_nearest(inputs: int, bits: int) -> None:
    weight, moments = Weights(4)(12, inputs), _moments(inputs)
    h = moments.centred()[0]
    h = h + DAMPING * np.diag(h).mean() * np.eye(inputs)
    errors = []
    for name in ("adaround", "nearest"):
        values, scale = ROUNDINGS[name](weight, bits, "block32", moments)
        assert scale.shape == (12, -(-inputs // 32))
        gap = weight - values * scale_of_weights(scale, inputs, 32).astype(np.float64)
        errors.append(np.einsum("rk,rk->r", gap @ h, gap))
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert errors[0].sum() < 0.8 * errors[1].sum()


@pytest.mark.parametrize("name", ("second-order", "adaround"))
@pytest.mark.parametrize("layout", ("taps", "taps in groups"))
def test_blocks_of_a_channel_of_several_vectors_are_rounded_to_nearest(
    layout: str, name: str
) -> None:
    weight, moments = _layout(layout)
    found, plain = (ROUNDINGS[n](weight, 3, "block32", moments) for n in (name, "nearest"))
    assert all(np.array_equal(a, b) for a, b in zip(found, plain, strict=True))


def test_each_block_of_nearest_is_rounded_as_if_alone() -> None:
    weight = Weights(4)(5, 70)
    values, scale = Nearest()(weight, 3, "block32")
    assert scale.shape == (5, 3)
    for i, part in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):  # the last is short
        alone, own = Nearest()(weight[:, part], 3, "channel")
        assert np.array_equal(values[:, part], alone)
        assert np.array_equal(scale[:, i], own)


@pytest.mark.parametrize("granularity", ("block32", "block64"))
def test_refitting_the_scales_of_blocks_never_adds_error(granularity: str) -> None:
    weight, moments = Weights(5)(16, 150), _moments(150)
    errors = []
    for refits in (0, 3):
        values, scale = SecondOrder(refits=refits)(weight, 3, granularity, moments)
        step = scale_of_weights(scale, 150, int(granularity[5:]))
        errors.append(_output_error(weight, values, step, moments))
    assert errors[1] < errors[0]


def test_one_block_is_the_channel() -> None:
    weight, moments = Weights(6)(8, 60), _moments(60)
    by_channel = SecondOrder()(weight, 4, "channel", moments)
    by_block = SecondOrder()(weight, 4, "block64", moments)
    assert np.array_equal(by_channel[0], by_block[0])
    assert np.array_equal(by_channel[1], by_block[1][:, 0])


# --- against second moments ------------------------------------------------------------------

DAMPING = 0.01
LAYOUTS = {  # groups, K, columns of a weight of 8 channels
    "dense": (1, 20, 20),
    "grouped": (2, 9, 9),
    "wide groups": (2, 70, 70),
    "taps": (1, 12, 48),
    "taps in groups": (2, 6, 48),
}
LEARNED = ("second-order", "adaround")


def _inputs(groups: int, inputs: int, samples: int = 300, seed: int = 1) -> Moments:
    """Moments of correlated inputs with a mean."""
    generator = np.random.default_rng(seed)
    mix = np.eye(inputs) + 2.0 * generator.normal(size=(groups, inputs, inputs)) / inputs**0.5
    x = mix @ generator.normal(size=(groups, inputs, samples)) + 0.5
    return Moments(x @ x.transpose(0, 2, 1) / samples, x.mean(axis=2), samples)


def _layout(name: str) -> tuple[Array, Moments]:
    groups, inputs, columns = LAYOUTS[name]
    return Weights(3)(8, columns, fan_in=columns), _inputs(groups, inputs)


def _loss(weight: Array, result: tuple[Array, Array], moments: Moments) -> Array:
    """What a rounding minimizes, for each channel."""
    values, scale = result
    gap = moments.split(weight - values * scale[:, None].astype(np.float64))
    h = moments.centred()
    mean = np.einsum("gkk->gk", h).mean(axis=1)[:, None, None]
    h = h + DAMPING * mean * np.eye(h.shape[1])
    return moments.by_channel(np.einsum("grk,grk->gr", gap @ h, gap), weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_splits_into_rows_and_joins_again(layout: str) -> None:
    weight, moments = _layout(layout)
    rows = moments.split(weight)
    assert rows.shape[::2] == moments.mean.shape
    assert np.array_equal(moments.join(rows, weight), weight)
    ones = moments.by_row(np.arange(8.0), weight)
    assert ones.shape == rows.shape[:2]
    counted = moments.by_channel(ones, weight)
    assert np.array_equal(counted, np.arange(8.0) * counted[1])


@pytest.mark.parametrize("granularity", ("channel", "tensor"))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adaround_is_never_worse_than_nearest_on_its_own_objective(
    layout: str, bits: int, granularity: str
) -> None:
    weight, moments = _layout(layout)
    learned = _loss(weight, AdaRound()(weight, bits, granularity, moments), moments)
    plain = _loss(weight, Nearest()(weight, bits, granularity, moments), moments)
    if granularity == "channel":
        assert (learned <= plain * (1 + 1e-4)).all()
    assert learned.sum() <= plain.sum() * (1 + 1e-4)


def test_adaround_that_learns_nothing_is_nearest() -> None:
    weight, moments = _layout("dense")
    worst = AdaRound(iterations=1, rate=1e6)(weight, 4, "channel", moments)
    plain = Nearest()(weight, 4, "channel")
    assert (_loss(weight, worst, moments) <= _loss(weight, plain, moments) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_help(layout: str, name: str) -> None:
    weight, moments = _layout(layout)
    learned = _loss(weight, ROUNDINGS[name](weight, 3, "channel", moments), moments).sum()
    assert learned < 0.8 * _loss(weight, Nearest()(weight, 3, "channel"), moments).sum()


@pytest.mark.parametrize("name", LEARNED)
def test_taps_are_a_dense_layer_with_block_diagonal_moments(name: str) -> None:
    weight, moments = _layout("taps")
    second, mean = np.kron(np.eye(4), moments.centred()[0]), np.zeros((1, 48))
    dense = Moments(second[None], mean, moments.samples)
    values, scale = ROUNDINGS[name](weight, 3, "channel", moments)
    assert values.shape == weight.shape and scale.shape == (8,)
    expected = ROUNDINGS[name](weight, 3, "channel", dense)
    found = _loss(weight, (values, scale), dense).sum()
    assert found == pytest.approx(_loss(weight, expected, dense).sum(), rel=0.1)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_rows_change_nothing(
    monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    weight, moments = _layout(layout)
    whole = ROUNDINGS[name](weight, 3, "channel", moments)
    monkeypatch.setattr(rounding, "_PART_BYTES", 1)
    parts = ROUNDINGS[name](weight, 3, "channel", moments)
    assert np.array_equal(whole[0], parts[0])
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)


def test_widths_of_a_layer_share_one_factor() -> None:
    weight, moments = _layout("dense")
    first = SecondOrder()(weight, 3, "channel", moments)
    kept = hessian(moments, DAMPING, 0)
    SecondOrder()(weight, 4, "channel", moments)
    assert hessian(moments, DAMPING, 0) is kept
    fresh = SecondOrder()(weight, 3, "channel", _layout("dense")[1])
    assert all(np.array_equal(a, b) for a, b in zip(first, fresh, strict=True))


# --- moments that no data should give, and some does ------------------------------------------


def _degenerate(name: str) -> Moments:
    moments = _inputs(1, 20)
    second, mean = moments.second.copy(), moments.mean.copy()
    if name == "zero":
        second[:], mean[:] = 0, 0
    elif name == "one sample":
        second = mean[:, :, None] * mean[:, None, :]
    elif name == "equal inputs":
        second[:], mean[:] = 1.0, 0
    elif name == "dead inputs":
        second[:, ::2], second[:, :, ::2], mean[:, ::2] = 0, 0, 0
    elif name == "constant input":  # 1e6, with what float32 loses of its square
        mean[:, 3] = 1e6
        second[:, 3] = second[:, :, 3] = mean * 1e6
        second[:, 3, 3] = 1e12 - 6e4
    elif name == "outlier":
        second[:, 3, 3] = 1e12
    elif name == "indefinite":
        second -= np.eye(20) * 0.6 * np.linalg.eigvalsh(second[0])[-1]
    elif name == "slightly indefinite":
        covariance = moments.centred()[0]
        off = np.linalg.eigvalsh(covariance)[0] + 0.003 * np.diag(covariance).mean()
        second -= off * np.eye(20)
    elif name == "tiny":
        second, mean = second * 1e-30, mean * 1e-15
    elif name == "huge":
        second, mean = second * 1e60, mean * 1e30
    return Moments(second, mean, 1)


DEGENERATE = (
    "zero", "one sample", "equal inputs", "dead inputs", "constant input", "outlier",
    "indefinite", "slightly indefinite", "tiny", "huge",
)  # fmt: skip


@pytest.mark.parametrize("granularity", ("channel", "tensor"))
@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", LEARNED)
def test_any_moments_give_finite_weights_near_the_float_ones(
    name: str, case: str, granularity: str
) -> None:
    weight = Weights(3)(6, 20)
    weight[4] = 0
    for bits in (2, 4, 8):
        values, scale = ROUNDINGS[name](weight, bits, granularity, _degenerate(case))
        low, high = integer_range(bits)
        assert low <= values.min() and values.max() <= high
        assert np.isfinite(scale).all() and (scale > 0).all()
        restored = values * scale[:, None]
        assert not restored[4].any()
        assert np.abs(restored - weight).max() < 2.5 * np.abs(weight).max()


def test_damping_grows_until_the_factor_exists_and_then_only_the_diagonal_is_left() -> None:
    slightly = hessian(_degenerate("slightly indefinite"), 1e-5)
    assert np.isfinite(slightly.factor.numpy()).all()
    off = slightly.damped.numpy()[0]
    assert (off - np.diag(np.diag(off))).any()
    hopeless = hessian(_degenerate("indefinite"), 1e-5)
    off = hopeless.damped.numpy()[0]
    assert not (off - np.diag(np.diag(off))).any()
    assert np.isfinite(hopeless.factor.numpy()).all()


def test_a_constant_input_has_no_variance() -> None:
    covariance = _degenerate("constant input").centred()[0]
    assert not covariance[3].any() and not covariance[:, 3].any()
    assert (np.diag(covariance)[4:] > 0).all()


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_an_outlier_weight_leaves_the_other_channels_alone(name: str, bits: int) -> None:
    weight, moments = _layout("dense")
    before = ROUNDINGS[name](weight, bits, "channel", moments)
    weight[2, 5] = 1e6
    values, scale = ROUNDINGS[name](weight, bits, "channel", moments)
    others = [i for i in range(8) if i != 2]
    assert np.array_equal(values[others], before[0][others])
    restored = values[2, 5] * scale[2]
    assert np.isfinite(scale).all() and restored == pytest.approx(1e6, rel=0.35)


def test_the_names_of_candidates_are_those_of_the_roundings() -> None:
    assert tuple(ROUNDINGS) == ROUNDING_NAMES


# --- memory ----------------------------------------------------------------------------------

_WIDE = """
import re, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from autoquant.calibration import Moments
from autoquant.compress.bank import _weighted_error, output_spread, take_spread_and_mean
from autoquant.compress.rounding import ROUNDINGS


def peak_kib():
    # of this program alone: ru_maxrss starts from that of the process which launched it
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


rows, inputs = 1024, 4096
generator = np.random.default_rng(0)
torch.linalg.cholesky(torch.eye(8).double())
before = peak_kib()
weight = generator.standard_normal((rows, inputs), dtype=np.float32)
x = generator.standard_normal((inputs, 512), dtype=np.float32)
second = (x @ x.T).astype(np.float64)
second /= 512
moments = Moments(second[None], x.mean(axis=1, dtype=np.float64)[None], 512)
values, scale = ROUNDINGS["second-order"].__class__(sweeps=1, refits=1)(
    weight, 4, sys.argv[1], moments
)
scale, _ = take_spread_and_mean(values, scale, moments, *output_spread(weight, moments))
_weighted_error(weight, values * scale.reshape(-1, 1).astype(np.float64), moments)
print((peak_kib() - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("granularity", ("channel", "tensor"))
def test_a_wide_layer_takes_less_than_two_gigabytes(granularity: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _WIDE, granularity], capture_output=True, text=True, check=True
    )
    assert 0.1 < float(found.stdout) < 1.3  # GiB; 4,096 rows add at most 0.5
