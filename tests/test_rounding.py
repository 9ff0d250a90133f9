from __future__ import annotations

import numpy as np
import pytest
from conftest import Weights
from contracts.rounding import RoundingContract
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoquant.compress.rounding import ROUNDINGS, Nearest, integer_range, least_squares_scale
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
