"""One trial: candidate → artifact → score and cost. Pure: what it needs is in its context."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoquant.calibration import Calibration, calibrate, channel_peaks, fixed_batch, rebatch
from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import Artifact, compress
from autoquant.compress.bank import Bank
from autoquant.compress.equalize import cross_layer_equalization, smooth, smoothed_tensors
from autoquant.compress.lower import lower
from autoquant.compress.prune import Evidence
from autoquant.compress.qat import starting
from autoquant.compress.qdq import mode, refusal, resolve
from autoquant.compress.rounding import ROUNDINGS
from autoquant.compress.structure import Structured
from autoquant.cost import CostModel, DeviceModel
from autoquant.cost.roofline import RooflineModel, kernel_of
from autoquant.cost.static import block_scale_bytes
from autoquant.cost.table import PRECISIONS, TableModel, from_profile, measure_device
from autoquant.errors import AutoquantError, CandidateError, HardwareError, TaskError
from autoquant.evaluate import Evaluator, divergence, pad
from autoquant.graph import PRODUCT, Graph, Layer
from autoquant.hardware import Hardware, load_hardware
from autoquant.result import Cost, Score, TrialResult
from autoquant.runtime import RUNTIMES, OnnxRuntime, Session, run_batches
from autoquant.search.coupling import forbidden_pairs, tied_groups
from autoquant.search.dimensions import Options, structural_options
from autoquant.search.variant import Variant, Variants, shapes
from autoquant.space import Rule, Space, load_space
from autoquant.task import Array, Split, Task, to_numpy
from autoquant.training import TrainingSettings

Say = Callable[[str], None]


def silent(_: str) -> None:
    """A `Say` that says nothing."""


# figures of a predicted cost that can have an upper bound
COST_LIMITS = ("size_bytes", "latency_ms", "energy_mj", "peak_memory_bytes", "stored_bytes")


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds; None is no bound. ``drop`` is in the metric's units, on validation.

    ``room``: `Hardware.room`, what the device's memory holds.
    """

    size_bytes: int | None = None
    latency_ms: float | None = None
    drop: float | None = None
    energy_mj: float | None = None
    peak_memory_bytes: int | None = None
    stored_bytes: int | None = None
    room: tuple[int, bool] | None = None

    def excess(self, predicted: Cost, drop: float | None) -> dict[str, float]:
        """Limit → how far it is passed (relative for costs; at most 0 is feasible)."""
        found = {}
        for name in COST_LIMITS:
            limit, value = getattr(self, name), getattr(predicted, name)
            if limit is not None and value is not None:
                found[name] = value / limit - 1
        if self.room is not None:
            size, with_weights = self.room
            needed = predicted.peak_memory_bytes + with_weights * predicted.weight_bytes
            found["room"] = needed / size - 1
        if self.drop is not None and drop is not None:
            found["drop"] = drop - self.drop
        return found


@dataclass(frozen=True, slots=True)
class Pick:
    """A solver's pick, or what has replaced one: its trial, its metric on validation, and its
    divergence on the second inputs."""

    trial: int
    accuracy: float
    second: float


@dataclass(frozen=True, slots=True)
class Against:
    """What a trial is compared with while it runs.

    ``origin``: what proposed its candidate. ``trial``, ``evidence``: the best member that costs
    no more in any objective; the trial stops where that is surely better. ``picks``: those that
    it would replace at about their cost.
    """

    origin: str = "sampler"
    trial: int | None = None
    evidence: str | None = None
    picks: tuple[Pick, ...] = ()


def closer_pick(picks: Sequence[Pick], accuracy: float, second: float | None) -> int | None:
    """The first pick that a candidate would replace by its metric, though the second inputs
    say that the pick is closer to float; None where they agree."""
    if second is None:
        return None
    return next((p.trial for p in picks if accuracy >= p.accuracy and second > p.second), None)


@dataclass(frozen=True)
class Context:
    """All that a trial needs, made once by `prepare`; pickles for workers.

    ``sample``: up to eight calibration inputs. ``probe``: calibration inputs to compare
    outputs on; images are mixed in pairs, since networks know their training images.
    ``expected``: the float network's outputs on them. ``inputs``: the calibration batches,
    which polishing runs. ``original``: the float network as it came; ``graph`` is what the
    space's rescalings made of it, and computes the same. ``tied``: groups of layers that take
    one choice; ``forbidden``: pairs of (layer, choice) that exclude each other. ``options``: what
    can be chosen beside the layers' bits, by dimension (`autoquant.search.dimensions`).
    ``variants``: the networks of other structures. ``rounds_by_moments``: weights are rounded
    against the second moments of their layers' inputs.
    ``gpus``: what a trial asks Ray for.
    """

    original: Graph
    graph: Graph
    calibration: Calibration
    bank: Bank
    hardware: Hardware
    cost: CostModel
    evaluator: Evaluator
    choices: Mapping[str, tuple[LayerChoice, ...]]
    limits: Limits
    baseline: Cost
    sample: tuple[Array, ...]
    probe: tuple[Array, ...]
    inputs: tuple[tuple[Array, ...], ...]
    expected: Array
    tied: tuple[tuple[str, ...], ...] = ()
    forbidden: tuple[tuple[tuple[str, LayerChoice], tuple[str, LayerChoice]], ...] = ()
    options: Options = field(default_factory=dict)
    variants: Variants | None = None
    rounds_by_moments: bool = True
    gpus: float = 0.0

    def second(self, session: Session, rows: int | None = None) -> float:
        """The divergence of an artifact's outputs on the second set of inputs, the probe, or on
        the first ``rows`` of it."""
        probe = tuple(array[:rows] for array in self.probe)
        outputs = _probed(session, probe, self.evaluator)
        return divergence(self.expected[:rows], outputs, self.evaluator.metric == "top1")

    def variant(self, candidate: Candidate) -> Variant:
        """The float network of a candidate's structure. Raises CandidateError."""
        if not candidate.is_structural:
            names = {x.name: (x.name,) for x in (*self.graph.layers, *self.graph.products)}
            return Variant(self, Structured(self.graph, names), (self.calibration, self.bank))
        if self.variants is None:
            raise CandidateError("this context was made without structures")
        return self.variants.get(self, candidate)

    def resolve(self, candidate: Candidate) -> Candidate:
        """The candidate as the original graph takes it; pieces keep their own choices."""
        found = {n: c for n, c in candidate.layers.items() if n in self.graph.by_name}
        pieces = {n: c for n, c in candidate.layers.items() if n not in found}
        if pieces and not candidate.is_structural:
            return resolve(self.graph, candidate)  # raises
        resolved = resolve(self.graph, replace(candidate, layers=found))
        return replace(resolved, layers={**resolved.layers, **pieces})

    def predict(self, candidate: Candidate) -> Cost:
        """What a candidate costs, before it is built."""
        if candidate.is_structural and self.variants is not None:
            found = self.variants.outline(self, candidate)
        else:
            found = self.variant(candidate)
        return found.estimate.predict(resolve(found.graph, found.structured.choices(candidate)))

    def built(self, candidate: Candidate) -> Variant:
        """The variant that a candidate's artifact is made of: after its training, if any."""
        found = self.variant(candidate)
        if TrainingSettings.from_dict(candidate.training).is_off or self.variants is None:
            return found
        return self.variants.trained(found, candidate)

    def compress(self, candidate: Candidate) -> Artifact:
        """The candidate's artifact, in this context's dialect, trained and polished if it says
        so. Its candidate is in the original's names."""
        resolved = self.resolve(candidate)
        found = self.built(resolved)
        artifact = found.compress(found.structured.choices(candidate), resolved.key)
        return Artifact(resolved, artifact.model)

    def cost_of(self, artifact: Artifact) -> Cost:
        """What an artifact is predicted to cost: `predict`, with all that is known by now."""
        found = self.built(artifact.candidate)
        choices = found.structured.choices(artifact.candidate)
        return found.cost.predict(resolve(found.graph, choices))

    def additive_cost(self, name: str) -> dict[str, tuple[float, ...]]:
        """What each choice of each layer adds to a cost, taken alone: its weights' bytes (with
        the scales of blocks, or in the entropy code for ``stored_bytes``), its ``bops``, or for
        ``latency_ms`` and ``energy_mj`` its kernel's (0 where no model knows)."""
        found = {}
        for layer, choices in self.choices.items():
            node = self.graph.by_name[layer]
            model = self.cost.latency
            if name == "bops":
                found[layer] = tuple(
                    float(node.macs * c.weight_bits * c.activation_bits) for c in choices
                )
            elif name == "stored_bytes":
                found[layer] = tuple(self.cost.file_size.coded_bytes(node, c) for c in choices)
            elif name not in ("latency_ms", "energy_mj"):
                found[layer] = tuple(
                    c.weight_bits * node.parameters / 8 + block_scale_bytes(node, c)
                    for c in choices
                )
            elif name == "latency_ms" and model is not None:
                found[layer] = tuple(model.layer_ms(self.graph, node, c) for c in choices)
            elif isinstance(model, RooflineModel):
                found[layer] = tuple(model.layer_mj(node, c) for c in choices)
            else:
                found[layer] = tuple(0.0 for _ in choices)
        return found


def prepare(
    task: Task,
    *,
    space: str | Space | Candidate = "mixed",
    hardware: str | Hardware = "onnxruntime-cpu",
    limits: Limits | None = None,
    batch: int = 1,
    threads: int = 1,
    evaluation_workers: int = 0,
    latency: bool = True,
    seed: int = 0,
    cache: Path | None = None,
    say: Say = silent,
    alone: Callable[..., Any] | None = None,
) -> Context:
    """Lower, calibrate, build the bank, score the float network and measure the device.

    ``space`` may be one candidate: then only what it needs is made.
    ``evaluation_workers``: batches evaluated at a time, 0 for one a core. ``latency=False``
    leaves latencies unpredicted. ``cache``: a run folder that keeps the weight bank; banks in
    the folders beside it are used too. ``say`` hears what is happening. ``alone`` calls what times
    kernels where nothing else runs; None for here. Raises UserError.
    """
    device = load_hardware(hardware)
    found_space = None if isinstance(space, Candidate) else load_space(space)
    calibration_split, validation = task.split("calibration"), task.split("validation")
    settings = found_space or Space(rules=(Rule(),))
    workers = evaluation_workers or os.cpu_count() or 1
    say("lowering the network to ONNX")
    original = lower(task)
    graph = _rescaled(original, settings, calibration_split, workers)
    is_structural = (settings if found_space else space).is_structural  # type: ignore[union-attr]
    if isinstance(space, Candidate):
        names = {n: c for n, c in space.layers.items() if n in graph.by_name or not is_structural}
        resolved = resolve(graph, replace(space, layers=names))
        for layer in graph.layers:
            if layer.kind != "Gather" and device.latency == "analytic":
                kernel_of(device, layer.name, layer.kind, resolved.choice(layer.name))
        choices: dict[str, tuple[LayerChoice, ...]] = {
            name: (choice,) for name, choice in resolved.layers.items()
        }
    else:
        assert found_space is not None
        offered = _effective(found_space.choices((*graph.layers, *graph.products)), graph)
        choices = _available(offered, graph, device)
    say(f"scoring the float network on {validation.samples:,} validation samples")
    evaluator = evaluator_for(task, graph, "validation", workers=workers, seed=seed)
    session = OnnxRuntime().open(float_model(original))
    evaluator.set_reference(session)
    say(f"calibrating on {calibration_split.samples:,} samples")
    rounds_by_moments = _needs_moments(settings.rounding, choices)
    calibration = calibrate(
        graph,
        calibration_split,
        method=settings.calibration,
        moments=is_structural or rounds_by_moments,
        widths=sorted({8, *(c.activation_bits for found in choices.values() for c in found)}),
        threads=workers,
    )
    bank = Bank(graph, settings.rounding, calibration)
    needed = [(graph.by_name[name], c) for name, found in choices.items() for c in found]
    if task.train is not None:
        needed += [(layer, starting(c)) for layer, c in needed if c.sparsity]
    _fill(bank, needed, workers, cache, say)
    evidence = None
    if is_structural:
        classes = task.metric == "top1"
        moments = dict(calibration.moments)
        evidence = Evidence(graph, moments, calibration_split.batches, classes, seed)
    options: dict[str, tuple[Any, ...]] = dict(settings.training.dimensions())
    if found_space is not None:
        options = {**structural_options(found_space, graph, device), **options}
    example = tuple(to_numpy(value)[:1] for value in task.example_inputs)
    probe = _probe(calibration_split, graph)
    expected = _probed(session, probe, evaluator)
    if device.runtime != "onnxruntime":
        say(f"comparing {device.runtime} with onnxruntime")
        _compare_runtimes(graph, calibration, bank, device, choices, probe, expected, evaluator)
    predictor: DeviceModel | None = None
    if latency and device.latency == "analytic":
        predictor = RooflineModel(graph, device, batch, threads)
    elif latency and device.model is not None:
        predictor = from_profile(device.model, batch, threads)
    elif latency:
        say("timing the kernels of this machine")
        table = _device_model(
            task, graph, calibration, bank, device, choices, batch, threads, alone
        )
        if evidence is not None and options:
            say("timing the kernels of other structures")
            others = shapes(graph, options, evidence, example)
            table = _run_alone(alone)(_timed, table, others, graph)
        say(
            f"latency model: {table.error:.1%} mean error on held-out mixes, "
            f"measured in {table.seconds:.0f} s"
        )
        predictor = table
    cost = CostModel(graph, device.dialect, predictor, bank)
    baseline = cost.baseline()
    climbs = task.train is not None and bool(settings.training.ladder())
    offered_steps = climbs or any(n.startswith("train:") for n in options)
    trains = offered_steps or (
        isinstance(space, Candidate) and not TrainingSettings.from_dict(space.training).is_off
    )
    if trains and task.train is None:
        raise TaskError(f"task {task.name!r} has no train data; give Task(…, train=…)")
    train = task.train if trains else None
    bare = replace(task, model="", calibration=(), validation=(), test=None, train=train)
    return Context(
        original=original,
        tied=tied_groups(graph, settings, choices),
        forbidden=forbidden_pairs(settings, graph, choices),
        options=options,
        variants=Variants(evidence, example, bare, cache and cache / "training"),
        rounds_by_moments=rounds_by_moments,
        graph=graph,
        calibration=calibration.without_moments(),
        bank=bank,
        hardware=device,
        cost=cost,
        evaluator=evaluator,
        choices=choices,
        limits=replace(limits or Limits(), room=device.room),
        baseline=baseline,
        sample=tuple(array[:8] for array in calibration_split.batches[0]),
        probe=probe,
        inputs=calibration_split.batches,
        expected=expected,
        gpus=task.gpus,
    )


def _rescaled(graph: Graph, settings: Space, split: Split, workers: int) -> Graph:
    """The network as the space's ``equalize`` and ``smooth`` rescale it."""
    if settings.equalize:
        graph = cross_layer_equalization(graph)
    if settings.smooth is not None:
        peaks = channel_peaks(graph, split, smoothed_tensors(graph), workers)
        graph = smooth(graph, peaks, settings.smooth)
    return graph


def _needs_moments(rounding: str, choices: Mapping[str, Sequence[LayerChoice]]) -> bool:
    """Whether any weight is rounded against the moments of its layer's inputs."""
    named = {c.rounding or rounding for found in choices.values() for c in found}
    return any(ROUNDINGS[name].needs_moments for name in named)


def _fill(
    bank: Bank,
    needed: Sequence[tuple[Layer, LayerChoice]],
    workers: int,
    cache: Path | None,
    say: Say,
) -> None:
    """Take what a run folder has of the bank, make the rest, and keep all of it there."""
    start, from_own, own = time.perf_counter(), 0, None
    if cache is not None:
        own = cache / f"bank-{bank.content_key()[:16]}.npz"
        from_own = bank.load(own)
        for path in sorted(cache.parent.glob(f"*/{own.name}")):
            if not bank.lacks(needed):
                break
            bank.load(path)
    entries, size = bank.build(needed, workers)
    took = time.perf_counter() - start
    said = f"weight bank: {entries} entries, {size / 1e6:.1f} MB, {took:.1f} s"
    if own is not None:
        said += f", {bank.loaded} from the cache"
        if entries > from_own:
            try:
                bank.save(own)
            except OSError as error:
                said += f", not saved ({error.strerror})"
    say(f"{said}, peak memory {peak_memory_mb():,.0f} MB")


def peak_memory_mb() -> float:
    """The most memory that this process has had resident so far; 0 where the system hides it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


def _probe(split: Split, graph: Graph) -> tuple[Array, ...]:
    """Inputs for divergences, from the first calibration batches of one shape."""
    first = split.batches[0]
    alike = [b for b in split.batches if [a.shape[1:] for a in b] == [a.shape[1:] for a in first]]
    largest = max((t.elements for t in graph.tensors.values()), default=1)
    rows = int(np.clip((32 << 20) // max(1, largest), 32, 512))
    joined = tuple(np.concatenate(parts)[:rows] for parts in zip(*alike, strict=True))
    if len(joined) == 1 and joined[0].ndim == 4 and joined[0].dtype == np.float32:
        mixed = 0.6 * joined[0] + 0.4 * joined[0][::-1, :, :, ::-1]
        return (mixed.astype(np.float32),)
    return joined


def _probed(session: Session, probe: tuple[Array, ...], evaluator: Evaluator) -> Array:
    """First outputs on the probe, in batches as large as the evaluator's."""
    rows = len(evaluator.batches[0][0])
    batches = rebatch([probe], rows)
    counts = [len(batch[0]) for batch in batches]
    if evaluator.fixed:
        batches = [tuple(pad(a, rows) for a in batch) for batch in batches]
    found = run_batches(session, batches, evaluator.workers)
    return np.concatenate(
        [np.asarray(outputs[0])[:count] for outputs, count in zip(found, counts, strict=True)]
    )


_WORSE = 3.0  # times as far from float as onnxruntime's answers: wrong, and no rounding


def _compare_runtimes(
    graph: Graph,
    calibration: Calibration,
    bank: Bank,
    hardware: Hardware,
    choices: Mapping[str, Sequence[LayerChoice]],
    probe: tuple[Array, ...],
    expected: Array,
    evaluator: Evaluator,
) -> None:
    """Whether the profile's runtime computes an int8 candidate as onnxruntime does, on ``probe``.

    Two runtimes round differently and are about equally far from the float network, by their
    outputs' divergence. Raises HardwareError where the answers are much farther: OpenVINO's are
    on processors without VNNI instructions.
    """
    int8 = {}
    for name, offered in choices.items():
        found = [c for c in offered if mode(graph.by_name[name], c) == "int8"]
        if found:
            int8[name] = max(found, key=lambda c: (c.activation_bits, c.weight_bits))
    candidate = Candidate(int8)
    model = compress(graph, candidate, calibration, bank, hardware.dialect).model
    runtime, classes = RUNTIMES[hardware.runtime](), evaluator.metric == "top1"

    def distance(session: Session) -> float:
        return divergence(expected, _probed(session, probe, evaluator), classes)

    known, own = distance(OnnxRuntime().open(model)), distance(runtime.open(model))
    own_float = distance(runtime.open(float_model(graph)))
    if not own <= _WORSE * known + own_float + 1e-6:
        raise HardwareError(
            f"{runtime.version} computes this network's int8 layers wrongly on this processor: on "
            f"calibration inputs its answers diverge from the float network's by {own:.3g}, "
            f"onnxruntime's for the same file by {known:.3g}; it needs VNNI instructions "
            "(avx512_vnni or avx_vnni), or use --hardware onnxruntime-cpu"
        )


def evaluator_for(
    task: Task, graph: Graph, split: str, *, workers: int = 0, seed: int = 0
) -> Evaluator:
    """An evaluator of the task's metric on one split."""
    fixed = fixed_batch(graph)
    return Evaluator(
        task.split(split),
        task.metric,
        task.metric_name,
        rows=fixed or _rows(graph),
        fixed=fixed is not None,
        workers=workers or os.cpu_count() or 1,
        seed=seed,
    )


def _rows(graph: Graph) -> int:
    """Samples a batch: large enough to be fast, small enough to stay in the caches."""
    largest = max((t.elements for t in graph.tensors.values()), default=1)
    return int(np.clip((4 << 20) // max(1, largest), 4, 256))


def float_model(graph: Graph) -> bytes:
    """The float network as a file."""
    return bytes(graph.model.SerializeToString(deterministic=True))


def latency_inputs(task: Task, graph: Graph, batch: int) -> list[Array]:
    """One batch of the example inputs at the size that latencies are measured for.

    Raises CandidateError where the graph is fixed to another batch.
    """
    fixed = fixed_batch(graph)
    if fixed is not None and fixed != batch:
        raise CandidateError(f"--batch {batch}: the ONNX file is fixed to a batch of {fixed}")
    return [np.repeat(to_numpy(value)[:1], batch, axis=0).copy() for value in task.example_inputs]


def _effective(
    choices: Mapping[str, tuple[LayerChoice, ...]], graph: Graph
) -> dict[str, tuple[LayerChoice, ...]]:
    """The space's choices as the graph takes them, without duplicates or float products."""
    result = {}
    for name, found in choices.items():
        kept = [resolve(graph, Candidate({name: c})).choice(name) for c in found]
        if graph.by_name[name].weight or not all(c.is_float for c in kept):
            result[name] = tuple(dict.fromkeys(kept))
    return result


def _available(
    choices: Mapping[str, tuple[LayerChoice, ...]], graph: Graph, hardware: Hardware
) -> dict[str, tuple[LayerChoice, ...]]:
    """The choices that the device can run. Raises HardwareError for a layer without any.

    onnxruntime on this machine runs all of them: in float, where it has no kernel.
    """
    result = {}
    for name, offered in choices.items():
        layer = graph.by_name[name]
        reasons = [refusal(layer, c, hardware.dialect) for c in offered]
        found = [c for c, reason in zip(offered, reasons, strict=True) if reason is None]
        if not found:
            raise HardwareError(
                f"hardware {hardware.name!r} has none of what the space offers layer {name!r}: "
                f"{reasons[0]}"
            )
        if hardware.latency == "measured":
            result[name] = tuple(found)
            continue
        kind = layer.kind
        kept = [
            c
            for c in found
            if kind in ("Gather", PRODUCT)
            or hardware.kernel(kind, c.weight_bits, c.activation_bits, c.dynamic) is not None
        ]
        if not kept:
            raise HardwareError(
                f"hardware {hardware.name!r} runs {hardware.pairs(kind)} on a {kind}, and the "
                f"space offers layer {name!r} {', '.join(map(str, found))}"
            )
        result[name] = tuple(kept)
    return result


def _device_model(
    task: Task,
    graph: Graph,
    calibration: Calibration,
    bank: Bank,
    hardware: Hardware,
    choices: Mapping[str, Sequence[LayerChoice]],
    batch: int,
    threads: int,
    alone: Callable[..., Any] | None,
) -> TableModel:
    modes = {mode(graph.by_name[name], c) for name, found in choices.items() for c in found}
    found: TableModel = _run_alone(alone)(
        measure_device,
        graph,
        calibration,
        bank,
        latency_inputs(task, graph, batch),
        dialect=hardware.dialect,
        runtime=hardware.runtime,
        precisions=[p for p in PRECISIONS if p == "float" or p in modes],
        threads=threads,
        products=any(not graph.by_name[name].weight for name in choices),
    )
    return found


def _timed(table: TableModel, graphs: Sequence[Graph], known: Graph) -> TableModel:
    """The model with the kernels of other structures of its network, in its precisions."""
    start = time.perf_counter()
    precisions = sorted({key.rpartition(" ")[2] for key in table.kernel_ms})
    table = table.timed(graphs, known, precisions)
    return replace(table, seconds=table.seconds + time.perf_counter() - start)


def _run_alone(alone: Callable[..., Any] | None) -> Callable[..., Any]:
    """What calls a measurement where nothing else runs."""
    return alone or (lambda function, *args, **options: function(*args, **options))


def run_trial(
    context: Context,
    candidate: Candidate,
    trial: int,
    seed: int = 0,
    save: Path | None = None,
    against: Against | None = None,
) -> TrialResult:
    """Compress, score and cost one candidate; ``save`` keeps the file. An error becomes a
    failed result, and what ``against`` beats is stopped."""
    against = against or Against()
    seconds: dict[str, float] = {}
    result = TrialResult(
        trial, candidate, "failed", seconds=seconds, seed=seed, origin=against.origin
    )

    def timed(stage: str, start: float) -> float:
        now = time.perf_counter()
        seconds[stage] = now - start
        return now

    try:
        clock = time.perf_counter()
        artifact = context.compress(candidate)
        predicted = context.cost_of(artifact)
        result = replace(
            result, candidate=artifact.candidate, predicted=predicted, sha256=artifact.sha256
        )
        if save is not None:
            artifact.save(save)
        clock = timed("compress", clock)
        if max(context.limits.excess(predicted, None).values(), default=0.0) > 0:
            return replace(result, status="infeasible")
        session = RUNTIMES[context.hardware.runtime]().open(artifact.model)
        clock = timed("open", clock)
        found = context.evaluator.assess(session, against.evidence)
        clock = timed("evaluate", clock)
        score, measured = found.score, {"size_bytes": artifact.size_bytes}
        result = replace(result, score=score, measured=measured, evidence=found.evidence)
        if found.stopped:
            return replace(result, status="stopped", why=f"dominated by trial {against.trial}")
        replaced = [pick for pick in against.picks if score.value >= pick.accuracy]
        if against.origin == "solver" or replaced:
            result = replace(result, second=context.second(session))
            timed("second", clock)
        if max(context.limits.excess(predicted, score.drop).values(), default=0.0) > 0:
            return replace(result, status="infeasible")
        better = closer_pick(replaced, score.value, result.second)
        if better is not None:
            why = f"trial {better} is closer to float on a second set of inputs"
            return replace(result, status="stopped", why=why)
        return replace(result, status="complete")
    except AutoquantError as error:
        trace = traceback.format_exc()
        return replace(result, status="failed", error=str(error), traceback=trace)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"  # noqa: PTH119
        reason = " ".join(str(error).split())[:300]
        return replace(
            result,
            status="failed",
            error=f"{type(error).__name__}: {reason} ({where})",
            traceback=traceback.format_exc(),
        )


@dataclass(frozen=True, slots=True)
class Scored:
    """One candidate built, predicted and scored."""

    artifact: Artifact
    predicted: Cost
    score: Score

    def to_dict(self) -> dict[str, Any]:
        """What ``autoquant compress --json`` prints."""
        return {
            "key": self.artifact.candidate.key,
            "predicted": self.predicted.to_dict(),
            "score": self.score.to_dict(),
        }


def score_candidate(
    task: Task,
    candidate: Candidate,
    *,
    hardware: str | Hardware = "onnxruntime-cpu",
    batch: int = 1,
    threads: int = 1,
    split: str = "validation",
    latency: bool = True,
    say: Say = silent,
) -> Scored:
    """Build, predict and score one candidate by the search's own path.

    Raises UserError.
    """
    context = prepare(
        task,
        space=candidate,
        hardware=hardware,
        batch=batch,
        threads=threads,
        latency=latency,
        say=say,
    )
    artifact = context.compress(candidate)
    evaluator = context.evaluator
    if split != "validation":
        evaluator = evaluator_for(task, context.graph, split)
        evaluator.set_reference(OnnxRuntime().open(float_model(context.original)))
    score = evaluator.score(RUNTIMES[context.hardware.runtime]().open(artifact.model))
    return Scored(artifact, context.cost_of(artifact), score)
