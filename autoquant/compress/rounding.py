"""Weight quantizers: one weight matrix and what is known of its inputs → integers and scales."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from autoquant.calibration import Moments
from autoquant.candidate import block_size
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
        float32 scales of length ``channels``, or 1 for granularity ``tensor``, or of shape
        (channels, blocks) for blocks of K."""
        ...


def blocks(rows: Array, size: int) -> Array:
    """(channels, K) → (channels · blocks, size), zeros where the last block is short."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))
    return padded.reshape(-1, size)


def scale_of_weights(scale: Array, inputs: int, block: int) -> Array:
    """Scales shaped to multiply a (channels, ``inputs``) weight."""
    if block:
        return np.repeat(scale, block, axis=1)[:, :inputs]
    return scale.reshape(-1, 1)


class Nearest:
    """Round to nearest with, for each channel, the scale of least squared error."""

    needs_moments = False

    def __call__(
        self, weight: Array, bits: int, granularity: str, moments: Moments | None = None
    ) -> tuple[Array, Array]:
        """See `Rounding`; the moments are not used."""
        low, high = integer_range(bits)
        scale = initial_scale(weight, bits, granularity)
        step = scale_of_weights(scale, weight.shape[1], block_size(granularity))
        return np.clip(np.round(weight / step), low, high).astype(np.int16), scale


def initial_scale(
    weight: Array, bits: int, granularity: str, weights: Array | None = None
) -> Array:
    """`least_squares_scale` for each channel, for the tensor, or for each block of a channel."""
    block = block_size(granularity)
    if granularity == "channel":
        return least_squares_scale(weight, bits, weights)
    if block:
        heavy = None if weights is None else blocks(weights, block)
        return least_squares_scale(blocks(weight, block), bits, heavy).reshape(len(weight), -1)
    flat = None if weights is None else weights.reshape(1, -1)
    return least_squares_scale(weight.reshape(1, -1), bits, flat)


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
        scale = initial_scale(weight, bits, granularity, weighted)
        size = block_size(granularity)
        count = scale.shape[1] if size else 1
        row_scale = scale if size else np.broadcast_to(scale, len(weight))
        row_scale = row_scale.reshape(groups, -1, count).copy()
        values = np.empty(rows.shape, np.int16)
        block = max(1, self.block_bytes // (16 * inputs))
        refits = 0 if granularity == "tensor" else self.refits
        for group in range(groups) if inputs > 64 else (slice(None),):
            part = slice(group, group + 1) if isinstance(group, int) else group
            for start in range(0, rows.shape[1], block):
                take = slice(start, start + block)
                values[part, take], row_scale[part, take] = self._round(
                    rows[part, take], row_scale[part, take], second[part], bits, refits, size
                )
        if granularity != "tensor":
            scale = row_scale.reshape(scale.shape)
        return values.reshape(weight.shape), scale

    def _round(
        self, rows: Array, scale: Array, second: Array, bits: int, refits: int, size: int
    ) -> tuple[Array, Array]:
        """Integers and scales of (groups, rows, K) weights under (groups, K, K) moments.

        ``scale``: (groups, rows, blocks) for blocks of ``size`` inputs; 0 for one block.
        """
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
        owner = order // size if size else torch.zeros_like(order)  # block of a column
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
                step = s[:, :, owner[j]]
                q[:, :, j] = torch.clamp(torch.round(column / step), low, high)
                error = (column - q[:, :, j] * step) / factor[:, j, j, None]
                errors[:, :, j - start] = error
                left[:, :, j:end] -= error[:, :, None] * factor[:, None, j, j:end]
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        target = w @ hessian
        for sweep in range(self.sweeps + refits):
            if sweep >= self.sweeps:  # the scale of least error for these integers
                s = _refit(q, s, target, hessian, owner)
            slope = (w - q * s[:, :, owner]) @ hessian
            for start in range(0, count, 128):
                end = min(start + 128, count)
                moves = torch.zeros_like(q[:, :, start:end])
                local = slope[:, :, start:end].clone()
                for j in range(start, end):
                    scales = s[:, :, owner[j]]
                    step = local[:, :, j - start] / (diagonal[:, j, None] * scales)
                    best = torch.clamp(torch.round(q[:, :, j] + step), low, high)
                    move = (best - q[:, :, j]) * scales
                    q[:, :, j] = best
                    moves[:, :, j - start] = move
                    local -= move[:, :, None] * hessian[:, None, j, start:end]
                slope -= moves @ hessian[:, start:end]
        result = torch.empty_like(q)
        result[:, :, order] = q
        return result.numpy().astype(np.int16), s.numpy()


def _refit(q: Any, s: Any, target: Any, hessian: Any, owner: Any) -> Any:
    """Scales of least output error for fixed integers, one block of a row after the other.

    Tensors: q, target (groups, rows, K), s (groups, rows, blocks), hessian (groups, K, K);
    ``owner``: block of each of the K columns. ``target`` is the weights times the hessian.
    """
    import torch

    s, many = s.clone(), s.shape[2] > 1
    rest = target - (q * s[:, :, owner]) @ hessian if many else target
    for block in range(s.shape[2]):
        mine = (owner == block).nonzero()[:, 0] if many else slice(None)
        own = q[:, :, mine]
        pull = own @ hessian[:, mine]  # (groups, rows, K)
        norm = (pull[:, :, mine] * own).sum(2)
        slope = (rest[:, :, mine] * own).sum(2)
        fitted = slope / norm.clamp_min(1e-30) + (s[:, :, block] if many else 0.0)
        scale = torch.where((norm > 0) & (fitted > 0), fitted, s[:, :, block])
        if many:
            rest = rest - (scale - s[:, :, block])[:, :, None] * pull
        s[:, :, block] = scale
    return s


ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest(), "second-order": SecondOrder()}
