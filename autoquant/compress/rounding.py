"""Weight quantizers: one weight matrix and what is known of its inputs → integers and scales."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from autoquant.calibration import Moments
from autoquant.task import Array


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest weight integer: all codes below 8 bits, symmetric from 8 on."""
    top = 2 ** (bits - 1)
    return (-top, top - 1) if bits < 8 else (1 - top, top - 1)


class Rounding(Protocol):
    """Weights and what is known of their inputs → integers and scales."""

    needs_moments: bool

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None
    ) -> tuple[Array, Array]:
        """``weight``: (channels, K) float32. Returns integers of that shape (int16) and
        float32 scales of length ``channels``, or 1 for granularity ``tensor``."""
        ...


class Nearest:
    """Round to nearest with, for each channel, the scale of least squared error."""

    needs_moments = False

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None = None
    ) -> tuple[Array, Array]:
        """See `Rounding`; the moments are not used."""
        rows = weight if granularity == "channel" else weight.reshape(1, -1)
        scale = least_squares_scale(rows, bits)
        low, high = integer_range(bits)
        values = np.clip(np.round(rows / scale[:, None]), low, high).astype(np.int16)
        return values.reshape(weight.shape), scale


def least_squares_scale(rows: Array, bits: int, weights: Array | None = None) -> Array:
    """Scale of every row with the least (weighted) squared rounding error.

    A search over clip points, each refined to the least-squares scale of its integers.
    ``weights``: importance of each element, shape of ``rows``.
    """
    low, high = integer_range(bits)
    peak = np.abs(rows).max(axis=1)
    peak = np.where(peak > 1e-30, peak, 1.0).astype(np.float32)
    if bits >= 8:
        return peak / high
    target = rows if weights is None else rows * weights
    best = np.ones(len(rows), np.float32)
    least = np.full(len(rows), np.inf)
    for factor in np.linspace(1.0, {2: 0.125, 3: 0.35, 4: 0.5}.get(bits, 0.7), 28):
        scale = np.float32(factor) * peak / np.float32(high)
        code = np.clip(np.round(rows / scale[:, None]), low, high)
        heavy = code if weights is None else code * weights
        norm = np.einsum("ij,ij->i", code, heavy)  # the least-squares scale for these codes
        fitted = np.einsum("ij,ij->i", code, target) / np.maximum(norm, 1e-30)
        scale = np.where((norm > 0) & (fitted > 0), fitted, scale).astype(np.float32)
        code = np.clip(np.round(rows / scale[:, None]), low, high)
        gap = (rows - code * scale[:, None]) ** 2
        error = (gap if weights is None else gap * weights).sum(axis=1)
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(np.float32)


class SecondOrder:
    """Round so that the layer's *output* changes least: ``tr((W − W_q) H (W − W_q)ᵀ)``.

    H is the (centred) second moment of the layer's inputs. Columns are rounded in the order of
    their moments, and each error is fed to the columns that follow (GPTQ, Frantar et al. 2022);
    then sweeps of coordinate descent move each integer to the best one given all others. The
    scale of a row starts at the least error weighted by the moments' diagonal, and before each
    of the last ``refits`` sweeps moves to the best one for the integers. Without moments it
    falls back to `Nearest`. Memory: rows go in blocks of at most ``block_bytes``; for K inputs
    the rest is a few K×K matrices of float32 (4,096 wide: under 1 GB in all).
    """

    needs_moments = True

    def __init__(
        self,
        damping: float = 0.01,
        sweeps: int = 2,
        refits: int = 3,
        block_bytes: int = 64 << 20,
    ) -> None:
        self.damping, self.sweeps, self.refits = damping, sweeps, refits
        self.block_bytes = block_bytes

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None = None
    ) -> tuple[Array, Array]:
        """See `Rounding`."""
        if moments is None or bits > 8:
            return Nearest()(weight, bits, granularity, moments)
        groups, inputs = moments.mean.shape
        second = moments.centred()
        rows = weight.reshape(groups, -1, inputs)
        diagonal = np.einsum("gkk->gk", second)
        floor = 1e-6 * diagonal.max(initial=1e-30) + 1e-30
        importance = np.maximum(diagonal, floor)[:, None, :]
        weighted = np.broadcast_to(importance, rows.shape).reshape(weight.shape)
        if granularity == "channel":
            scale = least_squares_scale(weight, bits, weighted)
        else:
            flat = (weight.reshape(1, -1), bits, weighted.reshape(1, -1))
            scale = least_squares_scale(*flat)
        row_scale = np.broadcast_to(scale, len(weight)).reshape(groups, -1).copy()
        values = np.empty(rows.shape, np.int16)
        block = max(1, self.block_bytes // (16 * inputs))
        refits = self.refits if granularity == "channel" else 0
        for group in range(groups) if inputs > 64 else (slice(None),):
            part = slice(group, group + 1) if isinstance(group, int) else group
            for start in range(0, rows.shape[1], block):
                take = slice(start, start + block)
                values[part, take], row_scale[part, take] = self._round(
                    rows[part, take], row_scale[part, take], second[part], bits, refits
                )
        if granularity == "channel":
            scale = row_scale.reshape(-1)
        return values.reshape(weight.shape), scale

    def _round(
        self, rows: Array, scale: Array, second: Array, bits: int, refits: int
    ) -> tuple[Array, Array]:
        """Integers and scales of (groups, rows, K) weights under (groups, K, K) moments."""
        import torch

        low, high = integer_range(bits)
        w = torch.from_numpy(np.array(rows, dtype=np.float32))
        s = torch.from_numpy(np.array(scale, dtype=np.float32))
        h = torch.from_numpy(np.array(second))
        mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
        h = h + torch.diag_embed((self.damping * mean)[:, None].expand(-1, h.shape[1]))
        order = h.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True)
        h = h[:, order][:, :, order]
        w = w[:, :, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        hessian = h.float()
        left = w.clone()
        q = torch.empty_like(w)
        count = w.shape[2]
        for start in range(0, count, 128):
            end = min(start + 128, count)
            errors = torch.empty_like(left[:, :, start:end])
            for j in range(start, end):
                column = left[:, :, j]
                q[:, :, j] = torch.clamp(torch.round(column / s), low, high)
                error = (column - q[:, :, j] * s) / factor[:, j, j, None]
                errors[:, :, j - start] = error
                left[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        target = w @ hessian
        for sweep in range(self.sweeps + refits):
            if sweep >= self.sweeps:  # the scale of least error for these integers
                norm = ((q @ hessian) * q).sum(2)
                fitted = (target * q).sum(2) / norm.clamp_min(1e-30)
                s = torch.where((norm > 0) & (fitted > 0), fitted, s)
            slope = (w - q * s[:, :, None]) @ hessian
            for start in range(0, count, 128):
                end = min(start + 128, count)
                moves = torch.zeros_like(q[:, :, start:end])
                local = slope[:, :, start:end].clone()
                for j in range(start, end):
                    step = local[:, :, j - start] / (diagonal[:, j, None] * s)
                    best = torch.clamp(torch.round(q[:, :, j] + step), low, high)
                    move = (best - q[:, :, j]) * s
                    q[:, :, j] = best
                    moves[:, :, j - start] = move
                    local -= move[:, :, None] * hessian[:, None, j, start:end]
                slope -= moves @ hessian[:, start:end]
        result = torch.empty_like(q)
        result[:, :, order] = q
        return result.numpy().astype(np.int16), s.numpy()


ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest(), "second-order": SecondOrder()}
