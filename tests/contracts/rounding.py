"""What every entry of ``ROUNDINGS`` must do. Parametrize a subclass over ``rounding``."""

from __future__ import annotations

import numpy as np
import pytest

from autoquant.calibration import Moments
from autoquant.candidate import block_size
from autoquant.compress.rounding import Rounding, integer_range, scale_of_weights
from autoquant.task import Array

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
GRANULARITIES = ("channel", "tensor", "block32")
SCALES = {"channel": (6,), "tensor": (1,), "block32": (6, 2)}  # of `_weight`


def _weight(rows: int = 6, columns: int = 40) -> Array:
    generator = np.random.default_rng(0)
    return generator.normal(size=(rows, columns)).astype(np.float32) * 0.1


def _moments(columns: int = 40) -> Moments:
    x = np.random.default_rng(1).normal(size=(columns, 400)) + 0.3
    return Moments((x @ x.T / 400)[None], x.mean(axis=1)[None], 400)


def _restored(rounding: Rounding, weight: Array, bits: int, granularity: str) -> Array:
    moments = _moments(weight.shape[1])
    values, scale = rounding(weight, bits, granularity, moments)
    return values * scale_of_weights(scale, weight.shape[1], block_size(granularity))


class RoundingContract:
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("bits", BITS)
    def test_integers_fit_the_width_and_scales_are_positive(
        self, rounding: Rounding, bits: int, granularity: str
    ) -> None:
        weight = _weight()
        values, scale = rounding(weight, bits, granularity, _moments())
        low, high = integer_range(bits)
        assert values.shape == weight.shape
        assert np.issubdtype(values.dtype, np.signedinteger)
        assert low <= values.min() and values.max() <= high
        assert scale.dtype == np.float32
        assert scale.shape == SCALES[granularity]
        assert np.isfinite(scale).all() and (scale > 0).all()

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_more_bits_are_closer_to_the_weight(self, rounding: Rounding, granularity: str) -> None:
        weight = _weight()
        errors = [
            float(((_restored(rounding, weight, bits, granularity) - weight) ** 2).sum())
            for bits in BITS
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[BITS.index(8)] < 1e-3 * float((weight**2).sum())

    @pytest.mark.parametrize("bits", BITS)
    def test_a_channel_of_zeros_stays_zero(self, rounding: Rounding, bits: int) -> None:
        weight = _weight()
        weight[2] = 0.0
        restored = _restored(rounding, weight, bits, "channel")
        assert not restored[2].any()
        assert restored[1].any()

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_a_weight_of_zeros_stays_zero(self, rounding: Rounding, granularity: str) -> None:
        assert not _restored(rounding, np.zeros((3, 8), np.float32), 4, granularity).any()

    def test_it_is_deterministic_and_leaves_the_weight_alone(self, rounding: Rounding) -> None:
        weight = _weight()
        before = weight.copy()
        first = rounding(weight, 3, "channel", _moments())
        again = rounding(weight, 3, "channel", _moments())
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert np.array_equal(weight, before)

    @pytest.mark.parametrize("bits", (2, 4, 8))
    def test_it_scales_with_the_weight(self, rounding: Rounding, bits: int) -> None:
        """A weight in other units (a power of two, so exactly) gets the same integers."""
        weight = _weight()
        values, scale = rounding(weight, bits, "channel", _moments())
        larger, scale_larger = rounding(weight * 8, bits, "channel", _moments())
        assert np.array_equal(values, larger)
        assert np.allclose(scale_larger, scale * 8)

    def test_channels_do_not_depend_on_each_other(self, rounding: Rounding) -> None:
        weight = _weight()
        values, scale = rounding(weight, 4, "channel", _moments())
        part, part_scale = rounding(weight[3:], 4, "channel", _moments())
        assert np.array_equal(values[3:], part)
        assert np.allclose(scale[3:], part_scale)

    def test_an_outlier_channel_does_not_spoil_the_others(self, rounding: Rounding) -> None:
        weight = _weight()
        weight[0] *= 1e6
        restored = _restored(rounding, weight, 8, "channel")
        assert np.abs(restored[1:] - weight[1:]).max() < np.abs(weight[1:]).max() / 100
