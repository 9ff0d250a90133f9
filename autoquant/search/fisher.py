"""Fisher-weighted output error of every layer, from one backward pass of the torch module.

``½ · mean over samples of Σ g²·ΔY²``: g is the gradient of the log-likelihood with respect to a
layer's output, its label drawn from the network itself (the diagonal of the true Fisher matrix:
Kunstner et al. 2019), ΔY what a choice changes of that output. The sum estimates the KL
divergence that the choice causes, so that no label is read and nothing is run quantized.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant.calibration import rebatch
from autoquant.candidate import LayerChoice
from autoquant.compress.bank import broadcast_scale
from autoquant.compress.qdq import grid
from autoquant.graph import Graph, Layer
from autoquant.search.trial import Context
from autoquant.task import Array

if TYPE_CHECKING:
    import torch

SAMPLES = 256  # probe inputs at most
_ROWS = 32  # of them at a time
_FIT = 1e-3  # relative error within which a folded weight is the module's, scaled by channel

Part = tuple[str, LayerChoice]  # "weight" or "input", and the choice reduced to what it changes


class NoGradient(Exception):
    """The module gives no gradient for any layer; says why."""


@dataclass(frozen=True, slots=True)
class _Change:
    """What a choice changes of a module's call: its weight and bias, or its input's grid."""

    weight: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    grid: tuple[float, int, int, int] | None = None


def fisher_errors(
    context: Context, module: torch.nn.Module, seed: int = 0
) -> dict[str, tuple[float, ...]]:
    """Layer → estimated divergence of each of its choices; layers without a gradient lack.

    Weights and inputs count apart and add. Raises NoGradient where no layer has one.
    """
    import torch

    try:
        copied = copy.deepcopy(module).cpu().eval().requires_grad_(False)
    except Exception as error:
        raise NoGradient(f"the module cannot be copied ({type(error).__name__})") from None
    for part in copied.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # type: ignore[assignment]  # what a hook holds must stay as it was
    layers = _matched(context.graph, copied)
    if not layers:
        raise NoGradient("no layer of the graph is a parameter of the module")
    sums: dict[str, dict[Part, float]] = defaultdict(lambda: defaultdict(float))
    tape = _Tape(context, layers, sums)
    handles = [m.register_forward_hook(tape.record) for m in {found.module for found in layers}]
    generator = torch.Generator().manual_seed(seed)
    samples = 0
    try:
        for batch in rebatch([tuple(a[:SAMPLES] for a in context.probe)], _ROWS):
            tape.calls.clear()
            with torch.enable_grad():
                output = copied(*map(torch.from_numpy, batch))
                loss = _log_likelihood(output, context.evaluator.metric == "top1", generator)
                loss.backward()  # type: ignore[no-untyped-call]
            samples += batch[0].shape[0]
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise NoGradient(f"its backward pass failed: {type(error).__name__}: {reason}") from None
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, parts in sums.items():
        if name in tape.lost:
            continue
        choices = context.choices[name]
        found[name] = tuple(sum(parts[p] for p in _parts(c)) / samples for c in choices)
    if not found or not np.isfinite([v for values in found.values() for v in values]).all():
        raise NoGradient("its gradients are not finite" if found else "no layer was reached")
    return found


@dataclass(frozen=True, slots=True)
class _Matched:
    """A graph layer, the module that computes it, and the factor of each output channel that
    folding (batch normalization, Gemm's alpha) put into the graph's weight."""

    layer: Layer
    module: torch.nn.Module
    factor: Array
    transposed: bool


def _matched(graph: Graph, module: torch.nn.Module) -> list[_Matched]:
    """Layers whose weight is a module's own ``weight``, scaled by output channel.

    ``g·ΔY`` is the same before and after a scaling by channel, so that batch normalization
    needs no hook of its own.
    """
    modules = dict(module.named_modules())
    found = []
    for layer in graph.layers:
        for name in (layer.weight, f"{layer.name.partition('#')[0]}.weight"):
            owner, _, kind = name.rpartition(".")
            own = getattr(modules.get(owner), "weight", None) if kind == "weight" else None
            if own is None or not hasattr(own, "detach"):
                continue
            transposed = layer.kind == "MatMul" or (
                layer.kind == "Gemm" and layer.channel_axis == 1
            )
            weight, axis = graph.array(layer.weight), layer.channel_axis
            if transposed:
                weight, axis = weight.T, 0
            factor = _factor(weight, own.detach().numpy(), axis)
            if factor is not None:
                found.append(_Matched(layer, modules[owner], factor, transposed))
                break
    return found


def _factor(folded: Array, own: Array, axis: int) -> Array | None:
    """The scale of each channel of ``own`` that gives ``folded``; None where none does."""
    if folded.shape != own.shape or own.dtype != np.float32:
        return None
    rows = np.moveaxis(folded, axis, 0).reshape(folded.shape[axis], -1).astype(np.float64)
    base = np.moveaxis(own, axis, 0).reshape(rows.shape).astype(np.float64)
    factor = (rows * base).sum(1) / np.maximum((base**2).sum(1), 1e-30)
    gap = np.linalg.norm(rows - factor[:, None] * base)
    return factor if gap <= _FIT * np.linalg.norm(rows) else None


class _Tape:
    """Forward hooks that wait for a layer's gradient, then add up ``½ Σ g²·ΔY²``."""

    def __init__(
        self,
        context: Context,
        layers: list[_Matched],
        sums: dict[str, dict[Part, float]],
    ) -> None:
        self.sums = sums
        self.lost: set[str] = set()  # layers whose input was changed in place behind them
        self.calls: dict[torch.nn.Module, int] = defaultdict(int)
        self.layers: dict[torch.nn.Module, list[_Matched]] = defaultdict(list)
        self.changes: dict[str, dict[Part, _Change]] = {}
        for found in layers:
            self.layers[found.module].append(found)
            self.changes[found.layer.name] = {
                part: _change(context, found, part)
                for choice in context.choices[found.layer.name]
                for part in _parts(choice)
            }

    def record(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The n-th call of a module is the n-th layer that shares its weight.

        No weight or input asks for gradients: they start at the first layers' outputs.
        """
        import torch

        if not torch.is_grad_enabled() or not isinstance(output, torch.Tensor):
            return output
        uses, index = self.layers[module], self.calls[module]
        self.calls[module] += 1
        if index >= len(uses) or len(inputs) != 1:
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_() + 0  # may be changed in place
        found, x = uses[index], inputs[0].detach()
        version = x._version

        def add(gradient: torch.Tensor) -> None:
            weight = gradient.square().reshape(-1)
            if x._version != version:
                self.lost.add(found.layer.name)
            with torch.no_grad():
                for part, change in self.changes[found.layer.name].items():
                    gap = _gap(found, x, change)
                    error = 0.5 * torch.dot(gap.square_().reshape(-1), weight).item()
                    self.sums[found.layer.name][part] += error

        output.register_hook(add)
        return output


def _gap(found: _Matched, x: torch.Tensor, change: _Change) -> torch.Tensor:
    """ΔY of a module's output: it is linear in its weight, and in its input."""
    import torch

    weight = change.weight if change.weight is not None else found.module.weight
    if change.grid is not None:
        scale, zero, low, high = change.grid
        x = (torch.clamp(torch.round(x / scale) + zero, low, high) - zero) * scale - x
    given = {"weight": weight}
    if getattr(found.module, "bias", None) is not None:
        given["bias"] = torch.zeros_like(found.module.bias)  # type: ignore[arg-type]
    gap: torch.Tensor = torch.func.functional_call(found.module, given, (x,))  # type: ignore[arg-type]
    if change.shift is not None:
        rank = gap.ndim - 2 if found.layer.kind.startswith("Conv") else 0
        gap = gap + change.shift.reshape(-1, *[1] * rank)
    return gap


def _parts(choice: LayerChoice) -> list[Part]:
    """What a choice changes: the weight, the input, both or nothing."""
    found = []
    if choice.weight_bits < 32:
        reduced = LayerChoice(
            choice.weight_bits,
            granularity=choice.granularity,
            int16=choice.int16,
            rounding=choice.rounding,
        )
        found.append(("weight", reduced))
    if choice.activation_bits < 32:
        reduced = LayerChoice(32, choice.activation_bits, symmetric=choice.symmetric)
        found.append(("input", reduced))
    return found


def _change(context: Context, found: _Matched, part: Part) -> _Change:
    import torch

    layer, (kind, choice) = found.layer, part
    if kind == "input":
        made = grid(
            context.calibration,
            layer.input,
            choice.activation_bits,
            choice.symmetric,
            context.hardware.dialect,
        )
        return _Change(grid=(made.scale, made.zero_point, made.low, made.high))
    weight, shift = context.graph.array(layer.weight), None
    if choice.weight_bits == 16 and not choice.int16:
        gap = weight.astype(np.float16).astype(np.float32) - weight
    else:
        entry = context.bank.get(layer, choice)
        gap, shift = entry.dequantized() - weight, entry.shift
    axis = layer.channel_axis
    if found.transposed:
        gap, axis = gap.T, 0
    used = np.abs(found.factor) > 1e-12
    inverse = np.where(used, 1 / np.where(used, found.factor, 1.0), 0.0)
    scaled = gap * broadcast_scale(inverse, axis, gap.ndim)
    if shift is not None:  # of all groups of a transposed convolution
        shift = (shift * np.tile(inverse, len(shift) // len(inverse))).astype(np.float32)
    return _Change(
        weight=torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32)),
        shift=None if shift is None else torch.from_numpy(shift),
    )


def _log_likelihood(output: Any, classes: bool, generator: torch.Generator) -> torch.Tensor:
    """Log-likelihood of labels drawn from the outputs, or a random projection of the outputs.

    Scaled so that ½E[(g·ΔY)²] is what `sensitivity.divergence` measures of the first output.
    """
    import torch
    from torch.utils._pytree import tree_flatten

    values: torch.Tensor = tree_flatten(output)[0][0]
    if not classes:
        spread = float(values.detach().var(unbiased=False).clamp_min(1e-12))
        random = torch.randn(values.shape, generator=generator)
        scale = (2 / (values[0].numel() * spread)) ** 0.5
        projected: torch.Tensor = (values * random).sum() * scale
        return projected
    flat = values.log_softmax(-1).reshape(-1, values.shape[-1])
    labels = torch.multinomial(flat.detach().exp(), 1, generator=generator)
    positions = flat.shape[0] // values.shape[0]
    drawn: torch.Tensor = flat.gather(1, labels).sum() / positions**0.5
    return drawn
