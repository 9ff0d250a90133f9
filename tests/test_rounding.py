from __future__ import annotations

import numpy as np
import pytest
from conftest import Weights
from contracts.rounding import RoundingContract
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoquant.calibration import Moments
from autoquant.compress.rounding import (
    ROUNDINGS,
    Nearest,
    SecondOrder,
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
    assert errors[0] > errors[1] > errors[2]


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
