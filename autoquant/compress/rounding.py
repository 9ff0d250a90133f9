"""Weight quantizers: one weight matrix and what is known of its inputs → integers and scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from autoquant.calibration import Moments
from autoquant.candidate import block_size
from autoquant.task import Array


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest weight integer: all codes below 8 bits, symmetric from 8 on."""
    top = 2 ** (bits - 1)
    return (-top, top - 1) if bits < 8 else (1 - top, top - 1)


_PART_BYTES = 64 << 20  # of weights at a time


class Rounding(Protocol):
    """Weights and what is known of their inputs → integers and scales."""

    needs_moments: bool

    def __call__(
        self,
        weight: Array,
        bits: int,
        granularity: str,
        moments: Moments | None,
        mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """``weight``: (channels, n) float32, finite, laid out as `Moments` says. Returns
        integers of that shape (int16) and float32 scales of length ``channels``, or 1 for
        granularity ``tensor``, or of shape (channels, blocks) for blocks of n. ``mask``: of the
        weight's shape, False where the integer must be 0; None: nowhere."""
        ...


def blocks(rows: Array, size: int) -> Array:
    """(channels, n) → (channels · blocks, size), zeros where the last block is short."""
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
        self,
        weight: Array,
        bits: int,
        granularity: str,
        moments: Moments | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """See `Rounding`; the moments are not used."""
        low, high = integer_range(bits)
        scale = initial_scale(weight, bits, granularity)
        step = scale_of_weights(scale, weight.shape[1], block_size(granularity))
        values = np.clip(np.round(weight / step), low, high).astype(np.int16)
        return (values if mask is None else values * mask), scale


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


def weighted_scale(weight: Array, bits: int, granularity: str, moments: Moments) -> Array:
    """Scales of least error, each weight counted by the variance of its input."""
    diagonal = np.einsum("gkk->gk", moments.centred())
    floor = 1e-6 * diagonal.max(initial=1e-30) + 1e-30
    importance = np.maximum(diagonal, floor)
    groups, inputs = importance.shape
    if weight.shape[1] == inputs:
        owner = np.repeat(np.arange(groups), len(weight) // groups)
    else:  # every channel has a part in every group
        importance = np.repeat(importance, moments.taps(weight), axis=0).reshape(1, -1)
        owner = np.zeros(len(weight), np.int64)
    if granularity == "tensor":
        return initial_scale(weight, bits, granularity, importance[owner])
    step = max(1, _PART_BYTES // (32 * weight.shape[1]))
    parts = [slice(start, start + step) for start in range(0, len(weight), step)]
    found = [initial_scale(weight[p], bits, granularity, importance[owner[p]]) for p in parts]
    return np.concatenate(found)


@dataclass(frozen=True, slots=True)
class Hessian:
    """Damped second moments of some groups as torch tensors, inputs in the order of rounding.

    ``order``: input indices. ``damped``: (groups, K, K) float32, in that order and in units of
    ``unit``, by which the largest group has a mean diagonal of about 1. ``factor``: the upper
    Cholesky factor of its inverse, float32.
    """

    order: Any
    damped: Any
    factor: Any
    unit: float


def hessian(moments: Moments, damping: float, group: int | None = None) -> Hessian:
    """The Hessian of one group, or of all; kept with the moments: every width uses it.

    ``damping`` times the mean diagonal is added. Where that does not make it positive
    definite, it grows tenfold up to three times; then only the diagonal is left. Moments of
    zero count as white.
    """
    key = (damping, group)
    if key not in moments.kept:
        moments.kept[key] = _hessian(moments, damping, group)
    found: Hessian = moments.kept[key]
    return found


def _hessian(moments: Moments, damping: float, group: int | None) -> Hessian:
    import torch

    second = torch.from_numpy(moments.centred())
    if group is not None:
        second = second[group : group + 1]
    mean = second.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0.0)
    largest = float(mean.max())
    # a power of four changes no digit of the factors, and float32 holds the result
    unit = 4.0 ** round(np.log2(largest) / 2) if largest > 1e-300 else 1.0
    mean = (mean / unit).clamp_min(1e-10 if largest > 1e-300 else 1.0)
    order = None
    for attempt in range(5):
        h = second / unit
        diagonal = h.diagonal(dim1=1, dim2=2)
        if attempt == 4:
            h = torch.diag_embed(diagonal.clamp_min(0.0))
            diagonal = h.diagonal(dim1=1, dim2=2)
        diagonal += damping * 10.0 ** min(attempt, 3) * mean[:, None]
        if order is None:
            order = diagonal.sum(0).argsort(descending=True)
        h = h[:, order[:, None], order]
        lower, failed = torch.linalg.cholesky_ex(h)
        if failed.any():
            continue
        damped = h.float()
        del h
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed.any() and bool(torch.isfinite(upper).all()):
            break
    return Hessian(order, damped, upper.float(), unit)


def _parts(weight: Array, moments: Moments) -> list[tuple[int | None, slice]]:
    """(group, rows of `Moments.split`) to round at a time: None where all groups go together."""
    groups, inputs = moments.mean.shape
    taps = max(1, moments.taps(weight))
    rows = weight.size // (groups * inputs)
    step = max(1, _PART_BYTES // (16 * inputs * taps)) * taps  # whole channels
    alone = inputs > 64 and (groups == 1 or weight.shape[1] == inputs)
    return [
        (group, slice(start, min(start + step, rows)))
        for group in (range(groups) if alone else (None,))
        for start in range(0, rows, step)
    ]


class SecondOrder:
    """Round so that the layer's *output* changes least: ``tr((W − W_q) H (W − W_q)ᵀ)``.

    H is the (centred) second moment of the layer's inputs. Columns are rounded in the order of
    their moments, and each error is fed to the columns that follow (GPTQ, Frantar et al. 2022);
    then sweeps of coordinate descent move each integer to the best one given all others. The
    scale of a row starts at the least error weighted by the moments' diagonal, and before each
    of the last ``refits`` sweeps moves to the best one for the integers, the scales of blocks one
    after the other. Without moments, and for blocks of channels that have several vectors
    (`Moments.taps`), it falls back to `Nearest`.

    Memory: for K inputs, 16 K² bytes are kept with the moments (covariance in float64, Hessian
    and factor in float32), as much again while they are factored, and rows go in blocks of
    64 MB. A 4,096 × 4,096 layer with its corrections was measured at 0.77 GB above its weight
    and moments, in 41 s of one core; one scale a tensor needs no more.
    """

    needs_moments = True

    def __init__(self, damping: float = 0.01, sweeps: int = 2, refits: int = 3) -> None:
        self.damping, self.sweeps, self.refits = damping, sweeps, refits

    def __call__(
        self,
        weight: Array,
        bits: int,
        granularity: str,
        moments: Moments | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """See `Rounding`."""
        size = block_size(granularity)
        if moments is None or bits > 8 or (size and moments.taps(weight)):
            return Nearest()(weight, bits, granularity, moments, mask)
        scale = weighted_scale(weight, bits, granularity, moments)
        rows, taps = moments.split(weight), moments.taps(weight)
        row_scale = _scale_of_rows(scale, weight, moments)
        kept = None if mask is None else moments.split(mask)
        values = np.empty(rows.shape, np.int16)
        refits = 0 if granularity == "tensor" else self.refits
        for group, take in _parts(weight, moments):
            part = slice(None) if group is None else slice(group, group + 1)
            found = hessian(moments, self.damping, group)
            values[part, take], row_scale[part, take] = self._round(
                rows[part, take],
                row_scale[part, take],
                found,
                bits,
                refits,
                taps,
                size,
                None if kept is None else kept[part, take],
            )
        if granularity != "tensor":
            scale = _scale_of_channels(row_scale, weight, moments).reshape(scale.shape)
        return moments.join(values, weight), scale

    @np.errstate(all="ignore")  # a scale or a moment of zero moves nothing that counts
    def _round(
        self,
        rows: Array,
        scale: Array,
        found: Hessian,
        bits: int,
        refits: int,
        taps: int,
        size: int,
        kept: Array | None = None,
    ) -> tuple[Array, Array]:
        """Integers and scales of (groups, rows, K) weights under the Hessian of the groups.

        ``scale``: (groups, rows, blocks) for blocks of ``size`` inputs; 0 for one block.
        ``taps``: that many rows of every group share a scale; 0: none do. ``kept``: 0 where the
        integer must be 0; what such a weight did, the others make up for (SparseGPT, Frantar &
        Alistarh 2023).
        """
        import torch

        # matrix products in torch; columns, mostly short, in numpy views of the same memory
        damped, factor, order = found.damped, found.factor, found.order
        low, high = integer_range(bits)
        w = torch.from_numpy(np.array(rows, dtype=np.float32))[:, :, order]
        s = torch.from_numpy(np.array(scale, dtype=np.float32))
        owner = _owner(order, size)
        at, s_of = owner.tolist(), s.numpy()
        k = None if kept is None else np.array(kept, dtype=np.float32)[:, :, order.numpy()]
        hessian_of, factor_of = damped.numpy(), factor.numpy()
        diagonal = np.diagonal(hessian_of, axis1=1, axis2=2)
        left, q = w.clone(), torch.empty_like(w)
        left_of, q_of = left.numpy(), q.numpy()
        count = w.shape[2]
        for start in range(0, count, 128):
            end = min(start + 128, count)
            errors = torch.empty_like(left[:, :, start:end])
            for j in range(start, end):
                column, step = left_of[:, :, j], s_of[:, :, at[j]]
                best = _integers(column / step, low, high, None if k is None else k[:, :, j])
                q_of[:, :, j] = best
                error = (column - best * step) / factor_of[:, j, j, None]
                errors.numpy()[:, :, j - start] = error
                left_of[:, :, j:end] -= error[:, :, None] * factor_of[:, None, j, j:end]
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
        target = w @ damped
        for sweep in range(self.sweeps + refits):
            if sweep >= self.sweeps:  # the scale of least error for these integers
                s = _refit(q, s, target, damped, owner, taps)
                s_of = s.numpy()
            slope = (w - q * _of_columns(s, owner)) @ damped
            for start in range(0, count, 128):
                end = min(start + 128, count)
                moves = torch.zeros_like(q[:, :, start:end])
                local = slope[:, :, start:end].numpy().copy()
                for j in range(start, end):
                    scales, old = s_of[:, :, at[j]], q_of[:, :, j]
                    best = old + local[:, :, j - start] / (diagonal[:, j, None] * scales)
                    best = _integers(best, low, high, None if k is None else k[:, :, j])
                    move = best - old
                    if move.any():
                        move *= scales
                        q_of[:, :, j] = best
                        moves.numpy()[:, :, j - start] = move
                        local -= move[:, :, None] * hessian_of[:, None, j, start:end]
                slope -= moves @ damped[:, start:end]
        result = torch.empty_like(q)
        result[:, :, order] = q
        return result.numpy().astype(np.int16), s.numpy()


def _integers(values: Array, low: int, high: int, kept: Array | None) -> Array:
    """The nearest integers within a range, in place; 0 where ``kept`` is."""
    np.rint(values, out=values)
    np.maximum(values, low, out=values)
    np.minimum(values, high, out=values)
    if kept is not None:
        values *= kept
    return values


class AdaRound:
    """Learn for each weight whether it goes up or down (AdaRound, Nagel et al. 2020).

    The paper's rectified sigmoid and annealed regularizer, with Adam, but over
    ``tr((W − W_q) H (W − W_q)ᵀ)`` itself instead of sampled activations: its gradient is
    ``(W_q − W) H``, so no activation is kept and nothing is random. The scale is that of least
    weighted error; with a scale a channel or a block it moves to the best one for the integers
    at the end. A channel keeps the result of `Nearest` where that is no worse on the same
    objective. It falls back to `Nearest` where `SecondOrder` does. It costs ``iterations``
    products with H, some ten times as much as `SecondOrder` on wide layers.
    """

    needs_moments = True

    def __init__(
        self,
        damping: float = 0.01,
        iterations: int = 300,
        rate: float = 0.2,
        strength: float = 1.0,
    ) -> None:
        self.damping, self.iterations = damping, iterations
        self.rate, self.strength = rate, strength

    def __call__(
        self,
        weight: Array,
        bits: int,
        granularity: str,
        moments: Moments | None = None,
        mask: Array | None = None,
    ) -> tuple[Array, Array]:
        """See `Rounding`."""
        plain = Nearest()(weight, bits, granularity, moments, mask)
        size = block_size(granularity)
        if moments is None or bits > 8 or (size and moments.taps(weight)):
            return plain
        import torch

        scale = weighted_scale(weight, bits, granularity, moments)
        rows, taps = moments.split(weight), moments.taps(weight)
        row_scale = _scale_of_rows(scale, weight, moments)
        plain_scale = _scale_of_rows(plain[1], weight, moments)
        values, plain_values = np.empty(rows.shape, np.int16), moments.split(plain[0])
        kept = None if mask is None else moments.split(mask)
        errors = np.empty((2, *rows.shape[:2]))  # learned, nearest

        def tensor(array: Array) -> Any:
            return torch.from_numpy(np.array(array[part, take], dtype=np.float32))

        def error(q: Any, s: Any) -> Any:
            gap = w - q * _of_columns(s, owner)
            return _pooled(((gap @ found.damped) * gap).sum(2), taps).double() * found.unit

        for group, take in _parts(weight, moments):
            part = slice(None) if group is None else slice(group, group + 1)
            found = hessian(moments, self.damping, group)
            w, s = tensor(rows)[:, :, found.order], tensor(row_scale)
            owner = _owner(found.order, size)
            q = self._learn(w / _of_columns(s, owner), found.damped, *integer_range(bits))
            if kept is not None:
                q = q * tensor(kept)[:, :, found.order]
            if granularity != "tensor":  # the scale of least error for these integers
                s = _refit(q, s, w @ found.damped, found.damped, owner, taps)
            nearest = tensor(plain_values)[:, :, found.order]
            errors[0, part, take] = error(q, s)
            errors[1, part, take] = error(nearest, tensor(plain_scale))
            values[part, take] = q[:, :, found.order.argsort()].to(torch.int16).numpy()
            row_scale[part, take] = s.numpy()
        better = errors[0] < errors[1]
        if granularity == "tensor":
            better = np.full(better.shape, errors[0].sum() < errors[1].sum())
            scale = scale if better.any() else plain[1]
        else:
            row_scale = np.where(better[:, :, None], row_scale, plain_scale)
            scale = _scale_of_channels(row_scale, weight, moments).reshape(scale.shape)
        values = np.where(better[:, :, None], values, plain_values)
        return moments.join(values, weight), scale

    def _learn(self, x: Any, h: Any, low: int, high: int) -> Any:
        """Integers (float32) for (groups, rows, K) weights in units of their scales."""
        import torch

        floor = torch.floor(x)
        stretch, below = 1.2, -0.1  # the sigmoid is stretched to −0.1…1.1, then clipped
        v = torch.logit((x - floor - below) / stretch)
        first, second = torch.zeros_like(v), torch.zeros_like(v)
        warm = self.iterations // 5
        for i in range(self.iterations):
            sigmoid = torch.sigmoid(v)
            up = (sigmoid * stretch + below).clamp_(0.0, 1.0)
            q = floor + up
            slope = sigmoid.mul_(1 - sigmoid).mul_(stretch)
            slope[(up <= 0) | (up >= 1)] = 0.0
            gradient = (q.clamp(low, high) - x) @ h
            gradient[(q < low) | (q > high)] = 0.0
            if i >= warm:
                beta = 20.0 + (2.0 - 20.0) * (i - warm) / max(1, self.iterations - 1 - warm)
                side = 2 * up - 1
                pull = side.abs().pow_(beta - 1).mul_(side.sign_())
                gradient -= self.strength * beta * pull
            gradient *= slope
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square_(), 0.001)
            step = self.rate * (1 - 0.999 ** (i + 1)) ** 0.5 / (1 - 0.9 ** (i + 1))
            v.addcdiv_(first, second.sqrt().add_(1e-8), value=-step)
        up = torch.sigmoid(v) * stretch + below >= 0.5
        return (floor + up).clamp_(low, high)


def _pooled(values: Any, taps: int) -> Any:
    """(groups, rows) values, each replaced by the sum over all rows that share its scale.

    ``taps``: that many rows of every group do; 0: none.
    """
    if taps == 0:
        return values
    groups, rows = values.shape
    summed = values.reshape(groups, -1, taps).sum((0, 2))
    return summed.repeat_interleave(taps).expand(groups, rows)


def _refit(q: Any, s: Any, target: Any, hessian: Any, owner: Any, taps: int) -> Any:
    """Scales of least output error for fixed integers, one block of a row after the other.

    Tensors: q, target (groups, rows, K), s (groups, rows, blocks), hessian (groups, K, K);
    ``owner``: block of each of the K columns. ``target`` is the weights times the hessian.
    ``taps``: that many rows of every group share a scale, which then has one block.
    """
    import torch

    s, many = s.clone(), s.shape[2] > 1
    rest = target - (q * s[:, :, owner]) @ hessian if many else target
    for block in range(s.shape[2]):
        mine = (owner == block).nonzero()[:, 0] if many else slice(None)
        own = q[:, :, mine]
        pull = own @ hessian[:, mine]  # (groups, rows, K)
        norm = _pooled((pull[:, :, mine] * own).sum(2), taps)
        slope = _pooled((rest[:, :, mine] * own).sum(2), taps)
        fitted = slope / norm.clamp_min(1e-30) + (s[:, :, block] if many else 0.0)
        scale = torch.where((norm > 0) & (fitted > 0), fitted, s[:, :, block])
        if many:
            rest = rest - (scale - s[:, :, block])[:, :, None] * pull
        s[:, :, block] = scale
    return s


def _owner(order: Any, size: int) -> Any:
    """Block of each column, in the order of rounding; ``size`` 0: all are in one."""
    return order // size if size else order * 0


def _of_columns(s: Any, owner: Any) -> Any:
    """(groups, rows, blocks) scales shaped to multiply (groups, rows, K)."""
    return s[:, :, owner] if s.shape[2] > 1 else s


def _scale_of_rows(scale: Array, weight: Array, moments: Moments) -> Array:
    """Scales as a `Rounding` returns them → those of the rows, (groups, rows, blocks)."""
    if scale.ndim == 2:
        return scale.reshape(len(moments.mean), -1, scale.shape[1]).copy()
    return moments.by_row(np.broadcast_to(scale, len(weight)), weight)[:, :, None].copy()


def _scale_of_channels(rows: Array, weight: Array, moments: Moments) -> Array:
    """Undo `_scale_of_rows`, but for the shape: the scales that the rows of a channel share."""
    taps = moments.taps(weight)
    return np.ascontiguousarray(rows[0, ::taps] if taps else rows)


ROUNDINGS: dict[str, Rounding] = {
    "nearest": Nearest(),
    "second-order": SecondOrder(),
    "adaround": AdaRound(),
}
