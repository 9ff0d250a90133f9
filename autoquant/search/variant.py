"""Float networks of other structures: what a candidate's structural part makes of the task's.

A variant has a graph, a calibration, a bank and a cost model of its own, each made when it is
first needed. The evaluator and the limits are the context's: drops count from the original.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.calibration import Calibration, calibrate
from autoquant.candidate import Candidate
from autoquant.compress import Artifact, compress
from autoquant.compress.bank import Bank
from autoquant.compress.channels import ChannelGroup
from autoquant.compress.lower import lower
from autoquant.compress.polish import polish
from autoquant.compress.prune import Evidence, first_rows, units_removed
from autoquant.compress.qdq import resolve
from autoquant.compress.structure import Structured, structured
from autoquant.cost import CostModel, DeviceModel
from autoquant.cost.roofline import RooflineModel
from autoquant.cost.table import TableModel, extended
from autoquant.errors import CandidateError, TaskError
from autoquant.graph import Graph
from autoquant.runtime import RUNTIMES
from autoquant.task import Array, Split, Task

if TYPE_CHECKING:
    from autoquant.search.trial import Context

KEPT = 32  # variants with their banks that a process holds
CALIBRATED = 256  # inputs at most that a variant is calibrated on
OUTLINES, OUTLINE_BYTES = 1024, 256 << 20  # structures that are known for costs, at most
SHAPES = 36  # structures whose kernels are timed before a search, at most, beside ranks


@dataclass(frozen=True)
class Variant:
    """One float network under a context.

    ``given``: calibration and bank, where they were made beforehand or by training.
    """

    context: Context
    structured: Structured
    given: tuple[Calibration, Bank] | None = None

    @property
    def graph(self) -> Graph:
        """Its float graph."""
        return self.structured.graph

    @property
    def is_original(self) -> bool:
        """Whether it is the context's own network, untrained."""
        return self.given is not None and self.given[1] is self.context.bank

    @cached_property
    def calibration(self) -> Calibration:
        """Ranges, and moments where its weights are rounded against them."""
        if self.given is not None:
            return self.given[0]
        context = self.context
        known = context.calibration
        batches = first_rows(context.inputs, CALIBRATED)
        return calibrate(
            self.graph,
            Split("calibration", tuple(batches), None, sum(len(b[0]) for b in batches)),
            method=known.method,
            moments=context.rounds_by_moments,
            widths=sorted({8, *(c.activation_bits for f in context.choices.values() for c in f)}),
            threads=context.evaluator.workers,
        )

    @cached_property
    def bank(self) -> Bank:
        """Its weights, rounded as they are asked for."""
        if self.given is not None:
            return self.given[1]
        return Bank(self.graph, self.context.bank.rounding, self.calibration)

    @cached_property
    def latency(self) -> DeviceModel | None:
        """The context's model of the device, for this graph."""
        model, context = self.context.cost.latency, self.context
        if self.graph is context.graph or model is None:
            return model
        if isinstance(model, RooflineModel):
            return RooflineModel(self.graph, context.hardware, model.batch, model.threads)
        return (
            extended(model, self.graph, context.graph) if isinstance(model, TableModel) else model
        )

    @cached_property
    def estimate(self) -> CostModel:
        """Costs before weights are rounded: files may come out some bytes larger."""
        if self.is_original:
            return self.context.cost
        return CostModel(self.graph, self.context.hardware.dialect, self.latency)

    @cached_property
    def cost(self) -> CostModel:
        """Costs as they will be; rounds the weights that it has to know of."""
        if self.is_original:
            return self.context.cost
        return CostModel(self.graph, self.context.hardware.dialect, self.latency, self.bank)

    def compress(self, candidate: Candidate, key: str) -> Artifact:
        """The artifact of a candidate in the names of this graph; ``key``: what the file says it
        was made for. A polished one has the bank's weights where polishing did not bring it
        closer to float on the second inputs."""
        dialect, workers = self.context.hardware.dialect, self.context.evaluator.workers
        found = resolve(self.graph, candidate)
        bank = self.bank
        if self.given is None:
            bank.build([(self.graph.by_name[n], c) for n, c in found.layers.items()], workers)
        if candidate.polish and candidate.training:
            raise CandidateError("a trained candidate is not polished: it has learned more")
        plain = compress(self.graph, candidate, self.calibration, bank, dialect, key)
        if not candidate.polish:
            return plain
        inputs = self.context.inputs
        bank = polish(self.graph, found, self.calibration, bank, inputs, dialect, workers)
        polished = compress(self.graph, candidate, self.calibration, bank, dialect, key)
        runtime = RUNTIMES[self.context.hardware.runtime]()
        return min(
            (polished, plain), key=lambda made: self.context.second(runtime.open(made.model))
        )

    def trained(self, candidate: Candidate, task: Task, checkpoints: Path | None) -> Variant:
        """What training makes of a candidate in the names of this graph, taught by the float
        network as it came where the settings say ``float``."""
        from autoquant.compress.qat import train
        from autoquant.compress.train import GraphNetwork

        found = resolve(self.graph, candidate)
        result = train(
            self.graph,
            found,
            self.calibration,
            self.bank,
            self.context.hardware.dialect,
            task,
            teacher=GraphNetwork(self.context.graph),
            checkpoints=checkpoints,
        )
        structured = replace(self.structured, graph=result.graph)
        return Variant(self.context, structured, (result.calibration, result.bank))


@dataclass
class Variants:
    """The variants of a context: structures by key, the latest kept; pickles without them.

    ``evidence``: None where the context was prepared for no structure. ``task``: the task with no
    data but what it trains on, and that only where training is offered. ``checkpoints``: the
    folder where a longer training finds the shorter one that it continues.
    """

    evidence: Evidence | None
    example: tuple[Array, ...]
    task: Task
    checkpoints: Path | None = None
    outlines: OrderedDict[str, Variant] = field(default_factory=OrderedDict)
    held: OrderedDict[str, Variant] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        names = ("evidence", "example", "task", "checkpoints")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def get(self, context: Context, candidate: Candidate) -> Variant:
        """The variant of a candidate's structure. Raises CandidateError."""
        key = candidate.structure.key
        with self.lock:
            found = self.held.get(key)
            if found is None:
                found = Variant(context, self._made(context.graph, candidate))
                self.held[key] = found
            self.held.move_to_end(key)
            while len(self.held) > KEPT:
                self.held.popitem(last=False)
            return found

    def trained(self, variant: Variant, candidate: Candidate) -> Variant:
        """A variant after a candidate's training; the latest are kept."""
        key = candidate.key
        with self.lock:
            found = self.held.get(key)
        if found is None:
            if self.task.train is None:
                raise TaskError(f"task {self.task.name!r} has no train data; give Task(…, train=…)")
            found = variant.trained(
                variant.structured.choices(candidate), self.task, self.checkpoints
            )
        with self.lock:
            self.held[key] = found
            self.held.move_to_end(key)
            while len(self.held) > KEPT:
                self.held.popitem(last=False)
        return found

    def outline(self, context: Context, candidate: Candidate) -> Variant:
        """As `get`, for costs: weights are not fitted, so that many structures can be compared.
        Students are lowered, which takes seconds, and kept for their trial."""
        if candidate.student:
            return self.get(context, candidate)
        key = candidate.structure.key
        with self.lock:
            found = self.held.get(key) or self.outlines.get(key)
            if found is None:
                found = Variant(context, self._made(context.graph, candidate, fitted=False))
                self.outlines[key] = found
                most = OUTLINE_BYTES // max(4 * sum(x.parameters for x in context.graph.layers), 1)
                while len(self.outlines) > min(max(most, KEPT), OUTLINES):
                    self.outlines.popitem(last=False)
            return found

    def _made(self, graph: Graph, candidate: Candidate, fitted: bool = True) -> Structured:
        if self.evidence is None:
            raise CandidateError(
                "this run was prepared for the network as it is: the space offers no structure"
            )
        if not candidate.student:
            return structured(graph, candidate, self.evidence, self.example, fitted)
        if candidate.pruning or candidate.rank or candidate.drop:
            raise CandidateError("a student is neither pruned, factorized nor shortened")
        found = lower(student(self.task, candidate.student))
        names = {x.name: (x.name,) if x.name in found.by_name else () for x in graph.layers}
        return Structured(found, names)


def shapes(
    graph: Graph, options: Mapping[str, Sequence[Any]], evidence: Evidence, example: Sequence[Array]
) -> list[Graph]:
    """Graphs whose layers have the channel counts and the ranks that ``options`` offer: what a
    device model times before a search, since the time of a kernel goes in steps with its channels.

    A layer's inputs and outputs belong to two channel groups as a rule: of groups that meet in a
    layer one has the first and one the second of two levels, and every pair of levels makes a
    graph, `SHAPES` of them at most. Ranks come a level at a time, on channels as they are.
    """
    channels = evidence.channels
    pruned = {n[6:]: o for n, o in options.items() if n.startswith("prune:") and len(o) > 1}
    parity = _parity([channels.groups[n] for n in pruned])
    levels = max(map(len, pruned.values()), default=1)
    count = min(levels, int(SHAPES**0.5))
    steps = [i / max(1, count - 1) for i in range(count)]  # 0: most pruned, 1: least
    found = []
    for pair in itertools.product(steps, steps if any(parity.values()) else steps[:1]):
        gone: set[int] = set()
        for name, offered in pruned.items():
            ratio = offered[round(pair[parity[name]] * (len(offered) - 1))]
            group = channels.groups[name]
            gone.update(group.labels[: units_removed(group, ratio)])
        if gone:
            found.append(Graph.read(channels.without(gone), example))
    ranks = {n[5:]: o for n, o in options.items() if n.startswith("rank:") and len(o) > 1}
    for level in range(max(map(len, ranks.values()), default=1)):
        picks = {n: o[min(level, len(o) - 1)] for n, o in ranks.items()}
        candidate = Candidate(rank={n: r for n, r in picks.items() if r is not None})
        if candidate.rank:
            found.append(structured(graph, candidate, evidence, example).graph)
    return found


def _parity(groups: Sequence[ChannelGroup]) -> dict[str, int]:
    """0 or 1 for each group, such that two that meet in a layer differ where they can."""
    found: dict[str, int] = {}
    for group in groups:
        met = [
            found[other.name]
            for other in groups
            if other.name in found
            and (set(group.makers) & set(other.readers) or set(group.readers) & set(other.makers))
        ]
        found[group.name] = int(met.count(0) > met.count(1))
    return found


def student(task: Task, options: Any) -> Task:
    """The task with its student in the network's place. Raises CandidateError."""
    import torch

    if task.student is None:
        raise CandidateError(f"task {task.name!r} has no student factory; give Task(…, student=…)")
    try:
        module = task.student(**options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CandidateError(
            f"task {task.name!r}: student({_listed(options)}) raised {type(error).__name__}: "
            f"{reason}"
        ) from None
    if not isinstance(module, torch.nn.Module):
        raise CandidateError(
            f"task {task.name!r}: student({_listed(options)}) returned {type(module).__name__}; "
            "it must be a torch.nn.Module"
        )
    return replace(task, model=module.eval())


def _listed(options: Any) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
