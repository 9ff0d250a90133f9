"""Latency and energy of a device that is not here, from the numbers in its profile.

A layer takes the longest of its arithmetic, its traffic with the memory on the chip and its
traffic with the memory behind it (the roofline of Williams et al. 2009, one roof a memory
level), plus what the device spends on every operator. The arithmetic runs at the rate of the
next kernel that the device has, the weights move at the bits that it stores. Between kernels
of different activation widths stands a conversion, which reads and writes the tensor once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.qdq import Plan
from autoquant.errors import CandidateError, HardwareError
from autoquant.graph import Graph, Layer
from autoquant.hardware import Hardware, Kernel, Memory

_FREE = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Relu", "Clip", "Dropout"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator as a device sees it, for one sample.

    ``shape``: conv, pointwise, depthwise or dense for a layer, product (of activations), lookup
    (an embedding) or other. ``layer``, ``kind`` and ``weight`` are empty where it is no layer.
    ``inputs``: (elements, index of the operator that wrote them, -1 for the network's input).
    ``outputs``: elements written. ``weights``: their number.
    """

    shape: str
    inputs: tuple[tuple[int, int], ...]
    outputs: int
    macs: int = 0
    layer: str = ""
    kind: str = ""
    weight: str = ""
    weights: int = 0

    @property
    def elements(self) -> int:
        """Activations read and written."""
        return self.outputs + sum(count for count, _ in self.inputs)


def operators(graph: Graph) -> tuple[Operator, ...]:
    """What runs on a device, in order: layers with what they absorb, and the other operators.

    Relus belong to what is in front of them; reshapes cost nothing.
    """
    layers = {layer.node: layer for layer in graph.layers}
    absorbed = {i for layer in graph.layers for i in layer.absorbed}
    found: list[Operator] = []
    writers: dict[str, int] = {}  # tensor → operator that wrote it
    for index, node in enumerate(graph.nodes):
        layer = layers.get(index)
        if index in absorbed:
            continue
        reads = [n for n in node.input if n in graph.tensors and n not in graph.initializers]
        if layer is not None:
            reads, writes = [layer.input], [layer.output]
        else:
            writes = [n for n in node.output if n in graph.tensors]
        integers = all(graph.tensors[n].dtype != "float32" for n in writes)
        if layer is None and (node.op_type in _FREE or integers):
            source = next((writers[n] for n in reads if n in writers), -1)
            writers |= dict.fromkeys(node.output, source)
            continue
        inputs = tuple((graph.tensors[n].elements, writers.get(n, -1)) for n in reads)
        outputs = sum(graph.tensors[n].elements for n in writes)
        if layer is not None:
            operator = Operator(
                _shape(layer),
                inputs,
                outputs,
                layer.macs,
                layer.name,
                layer.kind,
                layer.weight,
                layer.parameters,
            )
        else:
            product = node.op_type == "MatMul" and len(reads) == 2
            macs = outputs * graph.tensors[reads[0]].shape[-1] if product else 0
            operator = Operator("product" if macs else "other", inputs, outputs, macs)
        writers |= dict.fromkeys([*node.output, *writes], len(found))
        found.append(operator)
    return tuple(found)


def _shape(layer: Layer) -> str:
    """The class whose rate a layer runs at."""
    if layer.kind == "Gather":
        return "lookup"
    if layer.kind in ("Gemm", "MatMul"):
        return "dense"
    if layer.group > 1 and layer.weight_shape[1] == 1:
        return "depthwise"
    return "pointwise" if math.prod(layer.weight_shape[2:]) == 1 else "conv"


def kernel_of(hardware: Hardware, layer: str, kind: str, choice: LayerChoice) -> Kernel:
    """The kernel that a choice runs on. Raises CandidateError that lists the pairs there are."""
    found = hardware.kernel(kind, choice.weight_bits, choice.activation_bits, choice.dynamic)
    if found is None:
        raise CandidateError(
            f"layer {layer!r} ({kind}): {choice} does not run on hardware {hardware.name!r}; "
            f"it has {hardware.pairs(kind)}"
        )
    return found


@dataclass(frozen=True, slots=True)
class _Work:
    """An operator on its kernel: seconds of arithmetic, bytes by level, picojoules."""

    compute: float
    near: float
    far: float
    stored: float
    width: int
    energy: float


class RooflineModel:
    """Predicts one network on one analytic profile, at a batch and a thread count.

    Raises HardwareError for more threads than the device has cores; CandidateError, from its
    methods, for a pair of widths that it does not have. Well under a millisecond for 100 layers.
    """

    def __init__(
        self, work: Sequence[Operator] | Graph, hardware: Hardware, batch: int = 1, threads: int = 1
    ) -> None:
        device = hardware.device
        if device is None:
            raise HardwareError(f"hardware {hardware.name!r} has no analytic model")
        cores = None if device.cores is None else int(device.cores.value)
        if cores is not None and threads > cores:
            raise HardwareError(f"--threads {threads}: {hardware.name!r} has {cores} cores")
        self.operators = operators(work) if isinstance(work, Graph) else tuple(work)
        self.hardware, self.device, self.batch, self.threads = hardware, device, batch, threads
        clock = 1e9 if device.clock_mhz is None else device.clock_mhz.value * 1e6
        self.cycles = clock * (1 if cores is None else threads)  # a second, over the cores
        near = device.on_chip or device.off_chip or Memory()
        far = device.off_chip or near
        self.near_speed, self.far_speed = _speed(near), _speed(far)
        self.near_pj, self.far_pj = _pj(near), _pj(far)
        self.capacity = math.inf
        if device.on_chip is not None and device.off_chip is not None:
            assert device.on_chip.bytes is not None
            self.capacity = device.on_chip.bytes.value
        self.output_cycles = 0.0 if device.output_cycles is None else device.output_cycles.value
        self.overhead = 0.0 if device.operator_us is None else device.operator_us.value * 1e-6
        once = device.inference_us
        self.once = 0.0 if once is None else once.value * 1e-6
        self.counted = bool(device.active_mw or hardware.kernels[0].pj_per_mac)
        self.by_layer = {op.layer: i for i, op in enumerate(self.operators) if op.layer}
        self._known: dict[tuple[int, LayerChoice | None], _Work] = {}
        self._last: tuple[Candidate, tuple[float, float | None]] | None = None

    @property
    def error(self) -> float:
        """`Device.error`; NaN where nobody has compared it with a device."""
        return math.nan if self.device.error is None else self.device.error.value

    def latency_ms(self, graph: Graph, candidate: Candidate, plan: Plan) -> float:
        """Predicted milliseconds of one batch of a resolved candidate."""
        return self._both(candidate)[0]

    def energy_mj(self, graph: Graph, candidate: Candidate, plan: Plan) -> float | None:
        """Predicted millijoules of one sample; None where the profile has no energies."""
        return self._both(candidate)[1]

    def _both(self, candidate: Candidate) -> tuple[float, float | None]:
        """`predict`, once for a candidate whose latency and energy are asked one after another."""
        last = self._last
        if last is None or last[0] is not candidate:
            last = self._last = (candidate, self.predict(candidate.choice))
        return last[1]

    def layer_ms(self, graph: Graph, layer: Layer, choice: LayerChoice) -> float:
        """What a layer takes at a choice, the other layers' weights stored as it is."""
        return self._layer(layer, choice)[0] * 1e3

    def layer_mj(self, layer: Layer, choice: LayerChoice) -> float:
        """The energy of one sample that goes with `layer_ms`."""
        seconds, picojoules = self._layer(layer, choice)
        return (picojoules * 1e-9 + seconds * self._watts * 1e3) / self.batch

    def widest(self) -> tuple[float, float | None]:
        """`predict` with every layer on the widest kernel: float, where the device has it."""
        return self.predict(None)

    def predict(self, choice: Callable[[str], LayerChoice] | None) -> tuple[float, float | None]:
        """(ms of a batch, mJ of a sample or None); without ``choice``, on the widest kernels."""
        done, stored, seen = [], 0.0, set()
        widths: list[int] = []
        seconds, picojoules = self.once, 0.0
        conversions: dict[tuple[int, int, int, int], None] = {}
        for index, op in enumerate(self.operators):
            if op.layer:
                work = self._work(index, None if choice is None else choice(op.layer))
                if op.weight not in seen:
                    seen.add(op.weight)
                    stored += work.stored
                width = work.width
            else:
                width = max((widths[i] for _, i in op.inputs if i >= 0), default=32)
                work = self._other(op, width)
            if width:
                for elements, source in op.inputs:
                    if source >= 0 and widths[source] not in (0, width):
                        conversions[source, elements, widths[source], width] = None
            widths.append(width or max((widths[i] for _, i in op.inputs if i >= 0), default=32))
            done.append(work)
        streamed = self._streamed(stored, max((w.near for w in done), default=0.0))
        for work in done:
            took, energy = self._time(work, streamed)
            seconds += took
            picojoules += energy
        for _, elements, before, after in conversions:
            moved = self._moved(elements * (before + after) / 8 * self.batch)
            took, energy = self._time(_Work(0.0, *moved, 0.0, after, 0.0), 0.0)
            seconds += took
            picojoules += energy
        total = picojoules * 1e-9 + seconds * self._watts * 1e3
        return seconds * 1e3, total / self.batch if self.counted else None

    @property
    def _watts(self) -> float:
        return 0.0 if self.device.active_mw is None else self.device.active_mw.value * 1e-3

    def _streamed(self, stored: float, taken: float) -> float:
        """Share of the weights that comes from behind the chip, where tensors take their room."""
        if self.capacity == math.inf or not stored:
            return 0.0
        if self.device.on_chip_holds == "activations":
            return 1.0
        return min(1.0, max(0.0, 1 - (self.capacity - taken) / stored))

    def _time(self, work: _Work, streamed: float) -> tuple[float, float]:
        """(seconds, picojoules) of an operator, what runs for all of the time left out."""
        near = work.near + work.stored * (1 - streamed)
        far = work.far + work.stored * streamed
        seconds = max(work.compute, near / self.near_speed, far / self.far_speed)
        return seconds + self.overhead, work.energy + near * self.near_pj + far * self.far_pj

    def _moved(self, size: float) -> tuple[float, float]:
        """Bytes of activations by level: on the chip where they fit."""
        return (size, 0.0) if size <= self.capacity else (0.0, size)

    def _layer(self, layer: Layer, choice: LayerChoice) -> tuple[float, float]:
        work = self._work(self.by_layer[layer.name], choice)
        share = layer.parameters / max(1, sum(op.weights for op in self.operators))
        return self._time(work, self._streamed(work.stored / max(share, 1e-12), work.near))

    def _other(self, op: Operator, width: int) -> _Work:
        """Products of activations at the rate of the widest kernel; the rest only moves."""
        compute = op.outputs * self.batch * self.output_cycles / self.cycles
        if op.macs:
            kernel = self._widest("MatMul")
            assert kernel.rates is not None
            compute += op.macs * self.batch / (kernel.rates.of("dense").value * self.cycles)
        moved = self._moved(op.elements * width / 8 * self.batch)
        return _Work(compute, *moved, 0.0, width, 0.0)

    def _widest(self, kind: str) -> Kernel:
        found = [k for k in self.hardware.kernels if k.runs(kind)]
        if not found:
            raise HardwareError(f"hardware {self.hardware.name!r} has no kernel for {kind}")
        return max(found, key=lambda k: (k.activation_bits, k.weight_bits))

    def _work(self, index: int, choice: LayerChoice | None) -> _Work:
        known = self._known.get((index, choice))
        if known is None:
            known = self._known[index, choice] = self._make(self.operators[index], choice)
        return known

    def _make(self, op: Operator, choice: LayerChoice | None) -> _Work:
        if op.shape == "lookup":  # rows of a table, as they are stored
            bits = 32 if choice is None else choice.weight_bits
            moved = self._moved(op.outputs * bits / 8 * self.batch)
            return _Work(0.0, *moved, 0.0, 0, 0.0)
        if choice is None:
            kernel = self._widest(op.kind)
        else:
            kernel = kernel_of(self.hardware, op.layer, op.kind, choice)
        assert kernel.rates is not None
        macs = op.macs * self.batch
        weight_bits, width = kernel.moved
        share = 1.0
        if kernel.bit_serial and choice is not None:
            share = choice.weight_bits * choice.activation_bits / (weight_bits * width)
            weight_bits, width = choice.weight_bits, choice.activation_bits
        elif choice is not None and choice.weight_bits < weight_bits:
            kept = [b for b in self.device.stored_weight_bits if b >= choice.weight_bits]
            weight_bits = min([*kept, weight_bits])
        resting, speedup = float(weight_bits), 1.0
        sparse = None if op.shape == "depthwise" else kernel.sparse  # one input has no pattern
        if sparse is not None and choice is not None and choice.sparsity == sparse.pattern:
            share_kept, places = sparse.share
            resting, speedup = share_kept * weight_bits + places, sparse.speedup.value
        energy = 0.0 if kernel.pj_per_mac is None else kernel.pj_per_mac.value * macs * share
        near, far = self._moved(op.elements * width / 8 * self.batch)
        busy = macs * share / speedup / kernel.rates.of(op.shape).value
        busy += op.outputs * self.batch * self.output_cycles
        return _Work(
            busy / self.cycles,
            near,
            far,
            op.weights * resting / 8,
            width,
            energy,
        )


def _speed(memory: Memory) -> float:
    """Bytes a second; without a figure, memory is no bound."""
    return math.inf if memory.gb_s is None else memory.gb_s.value * 1e9


def _pj(memory: Memory) -> float:
    return 0.0 if memory.pj_per_byte is None else memory.pj_per_byte.value
