"""Quantization-aware training: a graph in torch, with the quantizers of its artifact.

The quantizers are those that `autoquant.compress.qdq` writes, at the same places: one grid a
tensor that its readers share, a layer and its Relu as one unit, sums on a grid of their own,
activations below 8 bits on their narrow grid after the 8-bit one of the kernel before. What comes
out, integers, scales, biases and ranges, makes the artifact by the usual path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant.calibration import Calibration
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.bank import (
    Bank,
    QuantizedWeight,
    as_rows,
    as_weight,
    broadcast_scale,
    kernel_positions,
    own_bias,
    takes_bias,
)
from autoquant.compress.qdq import (
    TENSORRT,
    Grid,
    from_softmax,
    mode,
    plan,
    resolve,
    tensor_grid,
    widths_read,
)
from autoquant.compress.rounding import integer_range
from autoquant.compress.sparsity import gradual, keep_mask, kmeans
from autoquant.compress.train import Adjust, GraphNetwork, History, Network, fit, teacher_of
from autoquant.graph import Graph, Layer, clamp_bounds
from autoquant.task import Array, Task, to_numpy
from autoquant.training import TrainingSettings

if TYPE_CHECKING:
    import torch

_LEAST = 1e-3  # a step is at least so much of what it was
_PRUNED = 0.5  # share of the steps in which weights are pruned
_MASKS = 40  # masks until then
_SHARE = 8  # one sample of so many says how an activation's step is to move


class Quantized(GraphNetwork):
    """A candidate's graph with the quantizers of its artifact, and what of them is learned.

    Weights are kept in units of their channel's size, biases of their output's, step sizes of
    the bank's and the calibration's: one learning rate suits all, however BatchNorm was folded.
    Weights that several layers share, embeddings and weights with scales by block stay as the
    bank has them.
    """

    def __init__(
        self,
        graph: Graph,
        candidate: Candidate,
        calibration: Calibration,
        bank: Bank,
        dialect: str,
        quantizer: str = "lsq",
    ) -> None:
        super().__init__(graph)
        self.candidate, self.calibration, self.bank = candidate, calibration, bank
        self.dialect, self.learns_steps = dialect, quantizer == "lsq"
        self.plan = plan(graph, candidate, dialect)
        self.grids: dict[tuple[str, int], _Activation] = {}
        self.nested = self._nested()
        self.tuned: dict[str, _Weight] = {}
        self.fixed: dict[str, Any] = {}
        self.shifts: dict[str, Any] = {}
        for layer in graph.layers:
            self._add(layer)
        self.read: dict[tuple[str, tuple[int, ...]], Any] = {}

    def _add(self, layer: Layer) -> None:
        import torch

        choice = self.candidate.choice(layer.name)
        is_free = layer.kind in ("Conv", "Gemm", "MatMul") and not self.bank.is_shared(layer)
        start = starting(choice) if is_free else choice
        entry = self.bank.get(layer, start) if choice.weight_bits <= 8 else None
        if is_free and (entry is None or not entry.block):
            unit = _rms(self.calibration, layer.output)
            self.tuned[layer.name] = _Weight(self.graph, layer, entry, unit, bool(choice.sparsity))
        elif entry is not None:
            self.fixed[layer.name] = torch.from_numpy(np.array(entry.dequantized()))
            if entry.shift is not None:
                bias = own_bias(self.graph, layer) + entry.shift
                self.shifts[layer.name] = torch.from_numpy(bias)

    def _nested(self) -> dict[str, int]:
        """Tensors that an int8 kernel makes and only narrow readers of one width read: their
        8-bit grid can divide the narrow one, so that rounding twice is rounding once."""
        graph, found = self.graph, {}
        if self.dialect == TENSORRT:
            return {}
        for tensor, widths in self.plan.narrow.items():
            alone = [t for t, root in self.plan.roots.items() if root == tensor] == [tensor]
            reads = {
                widths_read(graph, self.plan, self.candidate, index, tensor)
                for index in graph.consumers.get(tensor, ())
            }
            (bits,) = widths if len(widths) == 1 else (16,)
            if alone and bits < 8 and reads == {(8, bits)} and tensor not in graph.outputs:
                found[tensor] = bits
        return found

    def _grid(self, tensor: str, bits: int) -> _Activation:
        root = self.plan.roots.get(tensor, tensor)
        if (root, bits) not in self.grids:
            found = tensor_grid(self.graph, self.plan, self.calibration, root, bits, self.dialect)
            self.grids[root, bits] = _Activation(found, self.learns_steps and self._is_free(root))
        return self.grids[root, bits]

    def _is_free(self, root: str) -> bool:
        """Whether nothing but the values says how large the steps are."""
        graph = self.graph
        if from_softmax(graph, root):
            return False
        producer = graph.producer.get(root)
        bounds = (
            None if producer is None else clamp_bounds(graph.nodes[producer], graph.initializers)
        )
        return bounds is None or not np.isfinite(bounds[1])

    def _read(self, tensor: str, value: Any, index: int) -> Any:
        """What a node reads for a tensor."""
        widths = widths_read(self.graph, self.plan, self.candidate, index, tensor)
        if not widths or not value.is_floating_point():
            return value
        if tensor in self.nested:
            widths = widths[-1:]
        return self._on_grids(tensor, value, widths)

    def _on_grids(self, tensor: str, value: Any, widths: tuple[int, ...]) -> Any:
        key = (tensor, widths)
        if key not in self.read:
            for bits in widths:
                value = self._grid(tensor, bits)(value)
            self.read[key] = value
        return self.read[key]

    def __call__(self, inputs: tuple[Any, ...], taps: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """See `Network`."""
        weights = {**self.fixed, **{n: t.weight() for n, t in self.tuned.items()}}
        tuned = {n: self._bias(n, t) for n, t in self.tuned.items() if t.has_bias}
        try:
            output, kept = self.run(inputs, taps, weights, {**self.shifts, **tuned}, self._read)
            target = self.graph.outputs[0]
            if target in self.plan.roots and self.plan.quantized_at_source(self.graph, target):
                output = self._on_grids(target, output, (8,))
        finally:
            self.read = {}
        return output, kept

    def _bias(self, name: str, tuned: _Weight) -> Any:
        """A layer's bias; in int32 where its kernel has that, on the scale input × weight, which
        is coarse at few bits."""
        layer, bias = self.graph.by_name[name], tuned.bias()
        is_whole = layer.kind != "MatMul" and self.dialect != TENSORRT
        if not is_whole or self.plan.modes[name] != "int8" or tuned.entry is None:
            return bias
        grid = self._grid(layer.input, self.candidate.choice(name).activation_bits)
        scale = (tuned.steps() * grid.real_scale()).reshape(-1)
        return bias + ((bias / scale).round() * scale - bias).detach()

    def groups(self) -> list[dict[str, Any]]:
        """Weights, which decay; biases; step sizes."""
        self._touch()
        weights = [t.values for t in self.tuned.values()]
        others = [t.shift for t in self.tuned.values() if t.has_bias]
        others += [t.table for t in self.tuned.values() if t.table is not None]
        if self.learns_steps:
            others += [t.step for t in self.tuned.values() if t.step is not None]
            others += [g.step for g in self.grids.values() if g.step.requires_grad]
        return [
            {"params": weights, "unit": 1.0, "decays": True},
            {"params": others, "unit": 1.0, "decays": False},
        ]

    def _touch(self) -> None:
        """Make every grid that the graph reads."""
        for index, node in enumerate(self.graph.nodes):
            for name in node.input:
                if name in self.graph.tensors and name not in self.graph.initializers:
                    widths = widths_read(self.graph, self.plan, self.candidate, index, name)
                    for bits in widths[-1:] if name in self.nested else widths:
                        self._grid(name, bits)
        target = self.graph.outputs[0]
        if target in self.plan.roots and self.plan.quantized_at_source(self.graph, target):
            self._grid(target, 8)

    def weights(self) -> dict[str, Any]:
        """Layer → weight in units of its channel's size."""
        return {name: t.values for name, t in self.tuned.items()}

    def state(self) -> dict[str, Any]:
        """See `Network`."""
        self._touch()
        found = {}
        for name, tuned in self.tuned.items():
            found[f"{name}/weight"] = tuned.values
            if tuned.has_bias:
                found[f"{name}/bias"] = tuned.shift
            if tuned.step is not None:
                found[f"{name}/step"] = tuned.step
            if tuned.table is not None:
                found[f"{name}/table"] = tuned.table
        for (root, bits), grid in self.grids.items():
            found[f"{root}/{bits}"] = grid.step
        return found

    def result(self) -> tuple[Graph, Calibration, Bank]:
        """Graph, ranges and weights that make an artifact of what was learned."""
        ranges: dict[tuple[str, int], tuple[float, float]] = {}
        for (root, bits), grid in self.grids.items():
            if grid.step.requires_grad:
                low, high = grid.range()
                ranges[root, bits] = low, high
                if self.nested.get(root) == bits:
                    ranges[root, 8] = _dividing(low, high, bits)
        for root, bits in self.nested.items():
            if (root, bits) not in ranges:
                low, high = self._grid(root, bits).range()
                ranges[root, 8] = _dividing(low, high, bits)
        bank = self.bank.overlay()
        replaced: dict[str, Array] = {}
        for name, tuned in self.tuned.items():
            layer = self.graph.by_name[name]
            if tuned.entry is not None:
                bank.overrides[name] = tuned.quantized()
                continue
            replaced[layer.weight] = tuned.array()
            if layer.bias is not None and tuned.has_bias:
                shape = self.graph.array(layer.bias).shape
                replaced[layer.bias] = tuned.bias().detach().numpy().reshape(shape)
        graph = self.graph.with_arrays(replaced) if replaced else self.graph
        return graph, self.calibration.with_ranges(ranges), bank


def _dividing(low: float, high: float, bits: int) -> tuple[float, float]:
    """The range of an 8-bit grid with an odd number of steps in each of a narrow one: values
    rounded to it first round to the same narrow code, since no tie moves."""
    levels = 2**bits - 1
    steps = 255 // levels
    steps -= steps % 2 == 0
    step = (high - low) / levels / steps
    return low, low + 255 * step


class _Activation:
    """A grid whose step is learned, as a factor of the calibrated one."""

    def __init__(self, grid: Grid, is_free: bool) -> None:
        import torch

        self.scale = grid.scale
        self.low, self.high = grid.low - grid.zero_point, grid.high - grid.zero_point
        self.step = torch.ones(()).requires_grad_(is_free)

    def real_scale(self) -> float:
        """Its step in real values."""
        return self.scale * max(float(self.step.detach()), _LEAST)

    def range(self) -> tuple[float, float]:
        """The real values of its ends."""
        scale = self.real_scale()
        return self.low * scale, self.high * scale

    def __call__(self, value: Any) -> Any:
        """The value on the grid."""
        import torch

        if self.high - self.low > 255 and value.dtype == torch.bfloat16:
            return value  # finer than the type
        return rounded_to(value, self.step, self.scale, self.low, self.high)


class _Weight:
    """One layer's weight and bias as parameters; ``entry``: where it starts, None for float.

    A weight starts inside the cell of the code that the bank gave it, as near as that allows to
    where it was. The values of a codebook are learned too: each by the gradients of all weights
    that have it (Han et al. 2016, section 3), zero stays where ``keeps_zero``; rounded to int8 as
    they are stored.
    """

    def __init__(
        self,
        graph: Graph,
        layer: Layer,
        entry: QuantizedWeight | None,
        output_unit: float,
        keeps_zero: bool = False,
    ) -> None:
        import torch

        self.layer, self.entry, self.step, self.table = layer, entry, None, None
        weight = np.array(graph.array(layer.weight))
        axis, rank = layer.channel_axis, weight.ndim
        others = tuple(i for i in range(rank) if i != axis)
        self.unit = np.sqrt((weight.astype(np.float64) ** 2).mean(others, keepdims=True))
        self.unit = np.maximum(self.unit, 1e-8).astype(np.float32)
        if entry is not None:
            self.low, self.high = integer_range(8 if entry.table is not None else entry.bits)
            scale = broadcast_scale(entry.scale, entry.axis, rank)
            codes = entry.values.astype(np.float32)
            low, high = codes - 0.49, codes + 0.49
            if entry.table is not None:
                low, high = _cells(entry.values, entry.table.astype(np.float32))
                table = torch.from_numpy(entry.table.astype(np.float32))
                self.table = (table / self.high).requires_grad_()
                self.moves = torch.ones_like(table)
                if keeps_zero:
                    self.moves[table.abs().argmin()] = 0
            weight = np.clip(weight / scale, low, high) * scale
            self.scale = torch.from_numpy(np.array(scale))
            self.step = torch.ones_like(self.scale).requires_grad_()
            count = weight.size / self.scale.numel()
            self.slow = float((max(self.high, 1) / count) ** 0.5)
        self.values = torch.from_numpy((weight / self.unit).astype(np.float32)).requires_grad_()
        self.unit = torch.from_numpy(self.unit)
        self.has_bias = takes_bias(layer) if entry is not None else layer.bias is not None
        if self.has_bias:
            self.own, self.output_unit = own_bias(graph, layer), output_unit
            start = self.own if entry is None or entry.shift is None else self.own + entry.shift
            self.shift = torch.from_numpy((start / output_unit).astype(np.float32))
            self.shift.requires_grad_()

    def weight(self) -> Any:
        """The weight that the layer multiplies with (Esser et al. 2020)."""
        value = self.values * self.unit
        if self.step is None:
            return value
        step = self.step * self.slow
        step = (step + (self.step - step).detach()).clamp_min(_LEAST)  # gradient scale
        scale = self.scale * step
        if self.table is not None:
            return self._looked_up(value / scale) * scale
        codes = (value / scale).clamp(self.low, self.high)
        return (codes + (codes.round() - codes).detach()) * scale

    def _looked_up(self, codes: Any) -> Any:
        """The nearest values of the table; gradients go to these, and past them to the weights
        between its ends, which so change their place."""
        import torch

        table = self._values().sort().values
        fixed = table.detach()
        found = table[torch.bucketize(codes.detach(), 0.5 * (fixed[1:] + fixed[:-1]))]
        passed = codes.clamp(fixed[0], fixed[-1])
        return found + (passed - passed.detach())

    def _values(self) -> Any:
        """The table in int8 steps, as it is stored."""
        assert self.table is not None
        values = self.table * self.moves * self.high
        return (values + (values.round() - values).detach()).clamp(self.low, self.high)

    def cluster(self) -> None:
        """Find the table anew for the weights that are not zero now."""
        import torch

        assert self.table is not None
        with torch.no_grad():
            codes = (self.values * self.unit / self.steps()).numpy()
            count = int(self.moves.sum())
            centres = kmeans(codes[codes != 0], count) if codes.any() else np.zeros(1)
            padded = np.pad(centres, (0, count - len(centres)), mode="edge")
            found = torch.from_numpy(padded.astype(np.float32)) / self.high
            self.table[self.moves.bool()] = found.clamp(-1, 1)

    def steps(self) -> Any:
        """The scales of its codes, in the weight's rank."""
        assert self.step is not None
        return self.scale * self.step.detach().clamp_min(_LEAST)

    def bias(self) -> Any:
        """The bias that it adds."""
        return self.shift * self.output_unit

    def array(self) -> Array:
        """The float weight."""
        found: Array = (self.values * self.unit).detach().numpy()
        return found

    def quantized(self) -> QuantizedWeight:
        """What is stored."""
        assert self.entry is not None and self.step is not None
        scale = self.steps()
        codes, table = self.values.detach() * self.unit / scale, None
        if self.table is None:
            codes = codes.clamp(self.low, self.high).round()
        else:
            codes = self._looked_up(codes).detach()
            table = self._values().detach().sort().values.numpy().astype(np.int8)
        shift = self.bias().detach().numpy() - self.own if self.has_bias else None
        return replace(
            self.entry,
            values=codes.numpy().astype(np.int8),
            scale=np.ascontiguousarray(scale.numpy().reshape(-1)),
            shift=shift,
            table=table,
        )


def _cells(values: Array, table: Array) -> tuple[Array, Array]:
    """Between which values a weight has the place in a sorted table that ``values`` have."""
    places = np.searchsorted(table, values)
    middles = 0.5 * (table[1:] + table[:-1])
    low = np.concatenate([[-np.inf], middles + 0.01]).astype(np.float32)
    high = np.concatenate([middles - 0.01, [np.inf]]).astype(np.float32)
    return low[places], high[places]


def _is_gradual(choice: LayerChoice) -> bool:
    """Whether training makes its zeros bit by bit; those of a pattern are there from the start."""
    return bool(choice.sparsity) and not isinstance(choice.sparsity, str)


def starting(choice: LayerChoice) -> LayerChoice:
    """What the weights of a choice are in the bank before they train."""
    return replace(choice, sparsity=0.0) if _is_gradual(choice) else choice


class _Masks:
    """Keeps pruned weights at zero while they train: an `Adjust` (train, prune, retrain).

    A share of zeros grows over the first `_PRUNED` of the steps, by magnitude, in units of each
    channel's size; a pattern stays that of the start. Codebooks are found anew with each mask.
    """

    def __init__(self, network: Quantized) -> None:
        self.network = network
        choices = {name: network.candidate.choice(name) for name in network.tuned}
        self.choices = {name: c for name, c in choices.items() if c.sparsity}
        self.masks: dict[str, Any] = {}
        for name, choice in self.choices.items():
            if not _is_gradual(choice):
                self._choose(name, choice.sparsity)

    @property
    def is_gradual(self) -> bool:
        """Whether the masks of a step depend on how many there are."""
        return any(_is_gradual(choice) for choice in self.choices.values())

    def _choose(self, name: str, sparsity: float | str) -> None:
        import torch

        tuned = self.network.tuned[name]
        size = as_rows(tuned.values.detach().abs().numpy(), tuned.layer)
        mask = keep_mask(size, sparsity, kernel_positions(tuned.layer))
        self.masks[name] = torch.from_numpy(as_weight(mask, tuned.layer))

    def __call__(self, step: int, steps: int, weights: Mapping[str, Any]) -> None:
        """See `Adjust`."""
        end = max(1, int(_PRUNED * steps))
        is_due = step <= end and (step % max(1, end // _MASKS) == 0 or step == end)
        for name, choice in self.choices.items():
            is_new = _is_gradual(choice) and (is_due or name not in self.masks)
            if is_new:
                self._choose(name, gradual(float(choice.sparsity), step / end))
            weights[name].mul_(self.masks[name])
            if is_new and choice.codebook:
                self.network.tuned[name].cluster()


def _rms(calibration: Calibration, tensor: str) -> float:
    """Root mean square of a tensor over the calibration data; 1 where it is not known."""
    if tensor not in calibration.histograms:
        return 1.0
    centers, counts = calibration.histograms[tensor].centers()
    total = counts.sum()
    return max(float(np.sqrt((counts * centers**2).sum() / total)), 1e-6) if total else 1.0


@cache
def _rounding() -> Any:
    """The autograd function behind `rounded_to`; torch is imported when it is needed."""
    import torch

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, step: Any, scale: float, low: int, high: int) -> Any:
            scale *= max(float(step), _LEAST)
            rounded = x.mul(1 / scale).round_().clamp_(low, high).mul_(scale)
            ctx.save_for_backward(x, rounded)
            ctx.scale, ctx.bounds, ctx.step = scale, (low * scale, high * scale), float(step)
            ctx.slow = float((max(high, 1) / max(1, x.numel() // len(x))) ** 0.5)
            return rounded

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, rounded = ctx.saved_tensors
            passed = torch.ops.aten.hardtanh_backward(gradient, x, *ctx.bounds)
            of_step = None
            if ctx.needs_input_grad[1]:
                rows = -(-len(x) // _SHARE)  # of some samples: the sum is a third of the time
                share = (gradient[:rows] * rounded[:rows]).addcmul_(
                    passed[:rows], x[:rows], value=-1
                )
                whole = share.sum(dtype=torch.float32) * (len(x) / rows)
                of_step = whole * (ctx.slow / ctx.step)
            return passed, of_step, None, None, None

    return Rounding


def rounded_to(x: Any, step: Any, scale: float, low: int, high: int) -> Any:
    """``x`` on the grid of low…high times ``step · scale``.

    Backward, the gradient passes between the ends; that of ``step`` is Esser et al.'s (2020),
    scaled down by how many values share it. Written by hand: three times as fast as torch's own.
    """
    return _rounding().apply(x, step, scale, low, high)


@dataclass(frozen=True, slots=True)
class Trained:
    """What training made of a candidate: what `compress` needs, and how it went."""

    graph: Graph
    calibration: Calibration
    bank: Bank
    history: History


def train(
    graph: Graph,
    candidate: Candidate,
    calibration: Calibration,
    bank: Bank,
    dialect: str,
    task: Task,
    *,
    teacher: torch.nn.Module | Network | None = None,
    adjust: Adjust | None = None,
    checkpoints: Path | None = None,
) -> Trained:
    """Train the artifact of a resolved candidate as its ``training`` says; what is given stays
    as it is.

    ``teacher``, ``adjust``, ``checkpoints``: as in `finetune`; the teacher is ``graph`` itself
    where none is given. Raises CandidateError, TaskError, ModelError.
    """
    from autoquant.compress.network import Network as TorchForm
    from autoquant.compress.network import Normalized

    settings = TrainingSettings.from_dict(candidate.training)
    found = teacher_of(task, settings, teacher or GraphNetwork(graph))
    if settings.batch_norm == "live" and settings.teacher != "mutual" and _is_plain(candidate):
        module = TorchForm(graph, calibration)
        if module.norms:
            history = fit([Normalized(module)], found, task, settings, adjust, checkpoints)
            inputs = [to_numpy(value) for value in task.example_inputs]
            return Trained(Graph.read(module.model(), inputs), calibration, bank.overlay(), history)

    def network(chosen: Candidate) -> Quantized:
        return Quantized(graph, chosen, calibration, bank, dialect, settings.quantizer)

    networks = [network(candidate)]
    masks = _Masks(networks[0])

    def adjusted(step: int, steps: int, weights: Mapping[str, Any]) -> None:
        masks(step, steps, weights)
        if adjust is not None:
            adjust(step, steps, weights)

    if masks.is_gradual:
        checkpoints = None  # a longer run prunes more slowly: it continues no shorter one
    if settings.teacher == "mutual":
        networks.append(network(peer_of(graph, candidate)))
    history = fit(networks, found, task, settings, adjusted, checkpoints)
    return Trained(*networks[0].result(), history)


def _is_plain(candidate: Candidate) -> bool:
    """Whether every layer is float, with no zeros to keep."""
    return all(c.is_float and not c.sparsity for c in candidate.layers.values())


def train_pair(
    graph: Graph,
    candidates: tuple[Candidate, Candidate],
    calibration: Calibration,
    bank: Bank,
    dialect: str,
    task: Task,
) -> tuple[Trained, Trained]:
    """Train two resolved candidates of one network beside each other, each taught by the other
    (Zhang et al. 2018), as the first one's ``training`` says."""
    settings = replace(TrainingSettings.from_dict(candidates[0].training), teacher="mutual")
    one, two = (
        Quantized(graph, c, calibration, bank, dialect, settings.quantizer) for c in candidates
    )
    masks = [_Masks(one), _Masks(two)]

    def adjust(step: int, steps: int, _weights: Mapping[str, Any]) -> None:
        for mask in masks:
            mask(step, steps, mask.network.weights())

    history = fit([one, two], None, task, settings, adjust)
    return Trained(*one.result(), history), Trained(*two.result(), history)


def peer_of(graph: Graph, candidate: Candidate) -> Candidate:
    """The network that a candidate learns beside: its own at 8 bits, or float if it is that."""
    eight = LayerChoice(8, 8)
    quantized = [x.name for x in graph.layers if mode(x, candidate.choice(x.name)) == "int8"]
    layers = dict.fromkeys(quantized, eight)
    if all(candidate.choice(name) == eight for name in quantized):
        layers = {}
    return resolve(graph, Candidate(layers))
