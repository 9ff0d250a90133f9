"""A search: prepare, run trials, verify the front, write the run folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant.calibration import fixed_batch
from autoquant.candidate import ACTIVATION_BITS, WEIGHT_BITS, Candidate, LayerChoice
from autoquant.compress import Artifact
from autoquant.compress.coding import stored_bytes
from autoquant.compress.polish import is_tuned
from autoquant.compress.qdq import INT8_KINDS
from autoquant.cost.table import TableModel, to_profile
from autoquant.errors import HardwareError, NoFeasibleMember, RunError, nearest
from autoquant.evaluate import Evaluator
from autoquant.front import (
    Front,
    Member,
    best_of,
    check_objectives,
    members_of,
    reference_point,
    relative_hypervolume,
)
from autoquant.hardware import Hardware, load_hardware
from autoquant.result import Latency, TrialResult
from autoquant.runtime import RUNTIMES, OnnxRuntime, measure
from autoquant.search import executor as executors
from autoquant.search.first import first_candidates, mean_of
from autoquant.search.run import Run, describe_environment, open_run, without_password, write_json
from autoquant.search.sensitivity import Sensitivity
from autoquant.search.sensitivity import priors as priors_of
from autoquant.search.solver import Table
from autoquant.search.start import moved, read_start
from autoquant.search.status import RunLog
from autoquant.search.structural import (
    structural_costs,
    structural_dimensions,
    structural_sensitivity,
)
from autoquant.search.study import (
    SIGNALS,
    Callback,
    Study,
    StudySettings,
    check_sampler,
)
from autoquant.search.trial import (
    COST_LIMITS,
    Context,
    Limits,
    evaluator_for,
    float_model,
    latency_inputs,
    prepare,
)
from autoquant.space import Rule, Space, load_space
from autoquant.task import Task

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

__all__ = ["Callback", "SearchSettings", "search"]

POLISHED = 2  # members of the front that a search polishes, and one for each hundred trials
OBJECTIVES = ("accuracy", "latency_ms", "size_bytes")
_COST_LIMITS = tuple(f"max_{name}" for name in COST_LIMITS)
_NOT_MEASURED = dict.fromkeys(("latency_ms", "latency_median_ms", "latency_spread_ms"))


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """Everything about a search but the task: what study.yaml holds.

    ``trials`` is the total, with ``resume`` too. ``timeout`` in seconds is for the trials.
    ``batch`` and ``threads`` are those of latencies. ``workers`` above 1, or a
    ``ray_address``, runs trials as Ray tasks. ``evaluation_threads``: batches that one trial
    evaluates at a time, 0 for one a core (one with Ray); scores do not depend on it.
    ``ray_address`` with one worker takes every core of the cluster. ``trial_timeout`` in seconds
    and ``trial_memory`` in bytes end a trial that takes more; trials then run as Ray tasks.
    ``storage``: ``journal:///path``, ``sqlite:///path``, ``postgresql://…``; None for a journal
    file in the run folder. ``polish``: up to a
    tenth of the trials refit low-bit members of the front, each a trial of its own.
    ``sampler``: surrogate (`autoquant.search.sampler`), tpe, nsga2, random, another of Optuna's
    by its class's name, or a sampler. ``signal``: what it follows, the ``divergence`` of the
    outputs from the float network's, which needs no labels, or the ``metric``; the front is
    always in the metric. ``patience``: trials without a change of the front that end the
    search. ``fix``: layers kept at one choice, as ``PATTERN=4/8`` or ``PATTERN=float``.
    ``start_from``: ``RUN`` or ``RUN:TRIAL``, whose front or trial a new study runs first, each
    layer at the nearest choice that there is now.
    Limits, sampler and patience may change with ``resume``.
    """

    space: str | Path | Space = "mixed"
    hardware: str | Path | Hardware = "onnxruntime-cpu"
    objectives: Sequence[str] = OBJECTIVES
    trials: int = 60
    timeout: float | None = None
    max_size_bytes: int | None = None
    max_latency_ms: float | None = None
    max_drop: float | None = None
    max_energy_mj: float | None = None
    max_peak_memory_bytes: int | None = None
    max_stored_bytes: int | None = None
    batch: int = 1
    threads: int = 1
    workers: int = 1
    evaluation_threads: int = 0
    ray_address: str | None = None
    trial_timeout: float | None = None
    trial_memory: int | None = None
    storage: str | None = None
    sampler: str | BaseSampler = "surrogate"
    signal: str = "divergence"
    patience: int | None = None
    fix: Sequence[str] = ()
    start_from: str | None = None
    seed: int = 0
    name: str | None = None
    runs_dir: str | Path = "runs"
    resume: bool = False
    polish: bool = True

    def __post_init__(self) -> None:
        for name in ("trials", "batch", "threads", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RunError(f"--{name} is {value!r}; it must be a whole number of at least 1")
        if isinstance(self.evaluation_threads, bool) or self.evaluation_threads < 0:
            raise RunError(
                f"--evaluation-threads is {self.evaluation_threads!r}; it must be 0 or more"
            )
        for name in ("timeout", "trial_timeout", "trial_memory", *_COST_LIMITS):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RunError(f"--{name.replace('_', '-')} is {value!r}; it must be above 0")
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            raise RunError(f"--patience is {self.patience!r}; it must be a whole number above 0")
        check_sampler(self.sampler)
        if self.signal not in SIGNALS:
            raise RunError(f"--signal {self.signal!r}: {nearest(str(self.signal), SIGNALS)}")
        if self.resume and self.name is None:
            raise RunError("--resume needs --name: which run to continue")
        if self.name is not None and (not self.name or "/" in self.name or self.name[0] == "."):
            raise RunError(f"--name {self.name!r}: give a plain folder name")

    def fixed_space(self) -> Space:
        """The space, with a last rule for each of ``fix``. Raises SpaceError, RunError."""
        space = load_space(self.space)
        rules = tuple(_fixed(text) for text in self.fix)
        missing = tuple(rule for rule in rules if rule not in space.rules[-len(rules) :])
        return space.model_copy(update={"rules": (*space.rules, *missing)})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML; spaces (with what is fixed) and profiles in full."""
        space, hardware = self.fixed_space(), load_hardware(self.hardware)
        return {
            "space": space.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "hardware": hardware.model_dump(mode="json", exclude_defaults=True),
            "objectives": list(self.objectives),
            "trials": self.trials,
            "timeout": self.timeout,
            "max_size_bytes": self.max_size_bytes,
            "max_latency_ms": self.max_latency_ms,
            "max_drop": self.max_drop,
            "max_energy_mj": self.max_energy_mj,
            "max_peak_memory_bytes": self.max_peak_memory_bytes,
            "max_stored_bytes": self.max_stored_bytes,
            "batch": self.batch,
            "threads": self.threads,
            "workers": self.workers,
            "evaluation_threads": self.evaluation_threads,
            "ray_address": self.ray_address,
            "trial_timeout": self.trial_timeout,
            "trial_memory": self.trial_memory,
            "storage": None if self.storage is None else without_password(self.storage),
            "sampler": self.sampler if isinstance(self.sampler, str) else repr(self.sampler),
            "signal": self.signal,
            "patience": self.patience,
            "start_from": self.start_from,
            "seed": self.seed,
            "polish": self.polish,
            "name": self.name,
        }


def _fixed(text: str) -> Rule:
    """``PATTERN=4/8`` or ``PATTERN=float`` as a rule. Raises RunError."""
    pattern, _, choice = text.rpartition("=")
    bits = choice.split("/")
    try:
        if not pattern:
            raise ValueError
        if choice == "float":
            return Rule.model_validate({"layers": pattern, "float": True})
        weight, activation = map(int, bits)
        return Rule(layers=pattern, weight_bits=(weight,), activation_bits=(activation,))
    except ValueError:
        raise RunError(
            f"--fix {text!r}: give PATTERN=WEIGHT/ACTIVATION bits such as 'head*=8/8' (weights "
            f"{_listed(WEIGHT_BITS)}; activations {_listed(ACTIVATION_BITS)}), or PATTERN=float"
        ) from None


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def search(
    task: Task,
    settings: SearchSettings | None = None,
    *,
    source: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Front:
    """Search for the Pareto front of one task. Everything lands in ``runs_dir/name``.

    ``source``: how the task was named on the command line, for study.yaml. Raises UserError
    before trials start, NoFeasibleMember where no trial satisfies the limits; trials that
    fail are recorded and the search goes on. Ctrl-C ends it with the front so far.
    """
    settings = settings or SearchSettings()
    started = time.perf_counter()
    objectives = check_objectives(settings.objectives)
    start = [] if settings.start_from is None else _read_start(settings)
    run = _open(task, settings, source or {"task": task.name})
    callbacks = (RunLog(run.folder, settings.trials), *callbacks)
    with contextlib.ExitStack() as stack:
        stack.callback(run.close)
        return _searched(task, settings, run, objectives, start, callbacks, stack, started)


def _searched(
    task: Task,
    settings: SearchSettings,
    run: Run,
    objectives: tuple[str, ...],
    start: Sequence[tuple[str, Candidate]],
    callbacks: Sequence[Callback],
    stack: contextlib.ExitStack,
    started: float,
) -> Front:
    def say(text: str) -> None:
        for callback in callbacks:
            callback.stage(text)

    try:
        run.write(describe_environment())  # first: a run that dies while preparing can be resumed
        alone = stack.enter_context(executors.connected(settings.ray_address))
        context = prepare(
            task,
            space=settings.fixed_space(),
            hardware=run.hardware(load_hardware(settings.hardware)),
            limits=Limits(
                settings.max_size_bytes,
                settings.max_latency_ms,
                settings.max_drop,
                settings.max_energy_mj,
                settings.max_peak_memory_bytes,
                stored_bytes=settings.max_stored_bytes,
            ),
            batch=settings.batch,
            threads=settings.threads,
            evaluation_workers=settings.evaluation_threads,
            seed=settings.seed,
            cache=run.folder,
            say=say,
            alone=alone,
        )
        _check_predicted(objectives, settings, context)
        start = moved(start, context.choices, context.options)
        priors = _priors(context, task, run.folder, settings.resume, say)
        known = structural_dimensions(context).keys() & next(iter(priors.values())).keys()
        structures = structural_costs(context, [n for n in context.options if n in known])
        study = Study(
            context,
            StudySettings(
                name=run.name,
                folder=run.folder,
                objectives=objectives,
                trials=settings.trials,
                timeout=settings.timeout,
                sampler=settings.sampler,
                seed=settings.seed,
                storage=settings.storage,
                signal=settings.signal,
                patience=settings.patience,
            ),
            settings.resume,
            first=lambda: first_candidates(context, objectives, priors, start, structures),
            priors=priors,
            say=say,
            structures=structures,
        )
    except BaseException:
        run.discard()
        raise
    stack.callback(study.close)
    _save_inputs(context, run.folder / "inputs.npz")
    if isinstance(context.cost.latency, TableModel):
        write_json(run.latency, to_profile(context.cost.latency).model_dump(mode="json"))
    layers = _described(context)
    for callback in callbacks:
        callback.start(run.content, layers, tuple(study.results))
    _trials(study, context, settings, objectives, callbacks, say)
    run.release()
    learned = study.learned()
    if learned is not None:
        write_json(run.folder / "learned.json", learned)
    results = study.recorded()  # Ctrl-C may come between a line and its use
    front = _front(task, settings, context, results, objectives, run, say, alone)
    front = replace(front, seconds=run.seconds + time.perf_counter() - started)
    write_json(run.folder / "front.json", front.to_dict())
    for callback in callbacks:
        callback.finish(front)
    if not front.members:
        raise NoFeasibleMember(_why_none(run.name, results))
    return front


def _open(task: Task, settings: SearchSettings, source: Mapping[str, Any]) -> Run:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = settings.name or f"{task.name}-{settings.fixed_space().name}-{stamp}"
    content = {**source, **settings.to_dict(), "name": name}
    return open_run(Path(settings.runs_dir), name, content, settings.resume)


def _check_predicted(objectives: Sequence[str], settings: SearchSettings, context: Context) -> None:
    asked = {name: "objectives" for name in objectives if name != "accuracy"}
    limits = [name for name in _COST_LIMITS if getattr(settings, name) is not None]
    asked |= {name.removeprefix("max_"): name.replace("_", "-") for name in limits}
    for name, option in asked.items():
        if getattr(context.baseline, name) is None:
            raise HardwareError(
                f"--{option}: hardware {context.hardware.name!r} does not predict {name}"
            )


def _priors(
    context: Context, task: Task, folder: Path, resume: bool, say: Callable[[str], None]
) -> dict[str, Table]:
    """Tables of divergences by name: those of the run that is resumed, or measured now.

    Structures are in all of them alike, and are measured for a run that was begun without.
    sensitivity.json shows the tables' geometric mean to people.
    """
    path = folder / "priors.json"
    found = _stored_priors(path, context) if resume else {}
    dimensions = structural_dimensions(context)
    if found and all(n in table for n in dimensions for table in found.values()):
        return found
    structures = structural_sensitivity(context, say) if dimensions else None
    beside: Table = {} if structures is None else structures.table
    if found:
        found = {name: {**table, **beside} for name, table in found.items()}
        write_json(path, found)
        return found
    estimates = priors_of(context, task, workers=os.cpu_count() or 1, say=say)
    found = {name: {**r.table, **beside} for name, r in estimates.items()}
    write_json(path, found)
    shown = Sensitivity(
        {name: tuple(values) for name, values in mean_of(found).items()},
        context.choices,
        " and ".join(found),
        sum(result.seconds for result in estimates.values()),
        next(iter(estimates.values())).key,
        tuple(note for result in estimates.values() for note in result.notes),
    )
    about = shown.to_dict()
    if structures is not None:
        about["structures"] = structures.to_dict()["layers"]
        about["seconds"] += structures.seconds
        about["notes"] += structures.notes
    write_json(folder / "sensitivity.json", about)
    return found


def _stored_priors(path: Path, context: Context) -> dict[str, Table]:
    """What an earlier session left in priors.json; empty where it does not fit this network."""
    layers = {n: len(c) for n, c in context.choices.items()}
    sizes = {**layers, **{n: len(o) for n, o in structural_dimensions(context).items()}}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Table] = {
            k: {n: tuple(map(float, v)) for n, v in t.items()} for k, t in read.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    for table in found.values():
        own = {n: len(v) for n, v in table.items()}
        if not layers.keys() <= own.keys() or any(sizes.get(n) != own[n] for n in own):
            return {}
    return found


def _read_start(settings: SearchSettings) -> list[tuple[str, Candidate]]:
    """What ``start_from`` names; nothing where a run is resumed, which has run it."""
    assert settings.start_from is not None
    return [] if settings.resume else read_start(settings.start_from, settings.runs_dir)


def _described(context: Context) -> list[dict[str, Any]]:
    """The layers with what each of their choices adds to the file and the latency, alone."""
    size, latency = context.additive_cost("size_bytes"), context.additive_cost("latency_ms")
    timed = context.cost.latency is not None
    found = []
    for layer in (*context.graph.layers, *context.graph.products):
        if layer.name not in context.choices:  # a product that stays float
            found.append(layer.to_dict())
            continue
        each = zip(context.choices[layer.name], size[layer.name], latency[layer.name], strict=True)
        costs = {str(c): {"size_bytes": b, "latency_ms": t if timed else None} for c, b, t in each}
        found.append({**layer.to_dict(), "costs": costs})
    return found


def _trials(
    study: Study,
    context: Context,
    settings: SearchSettings,
    objectives: Sequence[str],
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
) -> None:
    """The sampler's trials, then polished members of the front; ``trials`` is the sum."""
    most = min(POLISHED + settings.trials // 100, settings.trials // 10)
    rungs = settings.fixed_space().training.ladder()
    if rungs and (context.variants is None or context.variants.task.train is None):
        say("the task has no train data: candidates stay untrained")
        rungs = []
    reserve = most if settings.polish else 0
    ladder = _climbers(rungs, settings.trials // 3)
    reserve += sum(ladder)
    if len(study.results) >= settings.trials:
        return
    bounds = executors.Bounds(settings.trial_timeout, settings.trial_memory)
    executor = executors.make(context, settings.workers, settings.ray_address, bounds)
    with contextlib.closing(executor):
        reason = _run(study, executor, settings, callbacks, settings.trials - reserve)
        if reserve == 0 or reason in ("timeout", "interrupted", "failing", "full"):
            return
        going = not ladder or _climb(study, executor, settings, callbacks, say, rungs, ladder)
        if going and _polish(study, context, settings, objectives, callbacks, say, most):
            _run(study, executor, settings, callbacks, settings.trials)


def _climbers(rungs: Sequence[Mapping[str, Any]], most: int) -> list[int]:
    """Candidates on each rung, about half as many on the next, ``most`` in all: successive
    halving (Jamieson & Talwalkar 2016)."""
    shares = [0.5**i for i in range(len(rungs))]
    return [max(1, int(most * s / sum(shares))) for s in shares][: max(most, 0)]


def _climb(
    study: Study,
    executor: executors.Executor,
    settings: SearchSettings,
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    rungs: Sequence[Mapping[str, Any]],
    ladder: Sequence[int],
) -> bool:
    """Train the better candidates for a few steps and the best of those for more, ranked by all
    objectives; whether the search goes on."""
    seen = {r.candidate.key for r in study.results}
    trained = [r for r in study.results if r.candidate.training]
    found = [r for r in study.results if not r.candidate.training and not r.candidate.polish]
    for rung, most in zip(rungs, ladder, strict=False):
        able = [r for r in found if r.status in ("complete", "infeasible")]
        found = best_of(sorted(able, key=lambda r: r.trial), study.settings.objectives)
        wanted = [replace(r.candidate, training=dict(rung)) for r in found[:most]]
        fresh = [c for c in wanted if c.key not in seen]
        fresh = fresh[: max(0, settings.trials - len(study.results))]
        keys = {c.key for c in wanted}
        if fresh:
            say(f"training {len(fresh)} candidates for {rung['steps']} steps")
        try:
            for result in study.train(fresh, executor):
                trained.append(result)
                for callback in callbacks:
                    callback.trial(result)
                    callback.pace(executor.workers, executor.retries)
                if study.timed_out:
                    return False
        except KeyboardInterrupt:
            return False
        found = [r for r in trained if r.candidate.key in keys]
    return study.full is None


def _polish(
    study: Study,
    context: Context,
    settings: SearchSettings,
    objectives: Sequence[str],
    callbacks: Sequence[Callback],
    say: Callable[[str], None],
    reserve: int,
) -> bool:
    """Polish members of the front; whether the search goes on."""
    most = min(reserve, settings.trials - len(study.results))
    chosen = [] if study.timed_out else _worth_polishing(study, context, objectives, most)
    workers = (os.cpu_count() or 1) if is_tuned(context.graph) else 1
    if chosen:
        numbers = ", ".join(str(member.trial) for member in chosen)
        say(f"polishing {len(chosen)} members of the front (trials {numbers})")
    try:
        for result in study.polish([m.candidate for m in chosen], workers):
            for callback in callbacks:
                callback.trial(result)
            if study.timed_out:
                break
    except KeyboardInterrupt:
        return False
    return study.full is None


def _worth_polishing(
    study: Study, context: Context, objectives: Sequence[str], most: int
) -> list[Member]:
    """Members with low bits that are above the reference point, spread over the sizes."""
    reference = context.evaluator.reference
    assert reference is not None
    floor = reference_point(context.baseline, reference.value, ("accuracy",))["accuracy"]
    seen = {r.candidate.key for r in study.results}
    found = [
        m
        for m in members_of(study.results, objectives)
        if m.searched.value > floor
        and m.predicted.average_weight_bits <= 6
        and not m.candidate.polish
        and not m.candidate.training
        and replace(m.candidate, polish=True).key not in seen
    ]
    found.sort(key=lambda m: m.predicted.size_bytes)
    if len(found) <= most:
        return found
    return [found[round(i)] for i in np.linspace(0, len(found) - 1, max(most, 0))]


def _run(
    study: Study,
    executor: executors.Executor,
    settings: SearchSettings,
    callbacks: Sequence[Callback],
    total: int,
) -> str:
    """Trials up to a total; returns why it ended, and says so."""
    if len(study.results) >= total:
        return "trials"
    reason = study.run(executor, callbacks, total)
    last = next((r.error for r in reversed(study.results) if r.status == "failed"), None)
    said = {
        "failing": f"stopped: most of the last trials failed, one with: {last} (errors/ has more)",
        "full": f"stopped: {study.full}; make room and go on with --resume",
        "timeout": "time is up",
        "exhausted": "no new candidate is left in this space",
        "patience": f"the front has not changed for {settings.patience} trials",
        "interrupted": "interrupted; verifying the front so far (again to leave at once)",
    }
    if reason in said:
        for callback in callbacks:
            callback.stage(said[reason])
    return reason


def _why_none(name: str, results: Sequence[TrialResult]) -> str:
    failed = [r for r in results if r.status == "failed"]
    if results and len(failed) == len(results):
        return f"run {name!r}: all {len(results)} trials failed, the last with: {failed[-1].error}"
    if not results:
        return f"run {name!r}: no trial was finished"
    options = ", ".join(f"--{limit.replace('_', '-')}" for limit in _COST_LIMITS)
    return (
        f"run {name!r}: none of {len(results)} trials satisfies the limits; "
        f"loosen {options} or --max-drop, or widen the space"
    )


# --- verification ----------------------------------------------------------------------------


def _front(
    task: Task,
    settings: SearchSettings,
    context: Context,
    results: Sequence[TrialResult],
    objectives: Sequence[str],
    run: Run,
    say: Any,
    alone: executors.Alone,
) -> Front:
    reference = context.evaluator.reference
    assert reference is not None
    corner = reference_point(context.baseline, reference.value, objectives)
    members = members_of(results, objectives)
    volume = relative_hypervolume(members, corner, reference.value)
    model = float_model(context.original)
    baseline: dict[str, Any] = {
        "accuracy": reference.value,
        "test_accuracy": None,
        "latency_ms": None,
        "size_bytes": len(model),
        "predicted": context.baseline.to_dict(),
        "latency_error": _known_error(context),
    }
    if members:
        say(f"verifying {len(members)} members of the front")
        if context.hardware.latency == "analytic":
            say(f"latencies are predictions for {context.hardware.name}; none is measured here")
        members = _verify(
            task, settings, context, results, members, run.folder, baseline, alone, say
        )
    return Front(
        run=run.name,
        task=task.name,
        hardware=context.hardware.name,
        objectives=tuple(objectives),
        reference_point=corner,
        hypervolume=volume,
        trials=len(results),
        seconds=0.0,
        baseline=baseline,
        members=tuple(members),
        folder=run.folder,
    )


def _known_error(context: Context) -> float | None:
    """How far predicted latencies are off, as a share; None where nobody has measured it."""
    model = context.cost.latency
    return None if model is None or math.isnan(model.error) else model.error


def _verify(
    task: Task,
    settings: SearchSettings,
    context: Context,
    results: Sequence[TrialResult],
    members: Sequence[Member],
    folder: Path,
    baseline: dict[str, Any],
    alone: executors.Alone,
    say: Callable[[str], None],
) -> list[Member]:
    """Rebuild every member's file, score it on the test split and measure its latency.

    ``baseline`` gets what the float network measures and, under ``uniform_int8``, what all
    layers at 8/8 do: test score, size, latency in the same rounds. The latency of an analytic
    device stays null: this machine's would be another device's. Where ``stored_bytes`` is asked
    for, the file is entropy-coded and its size is a figure of the member.
    """
    is_coded = "stored_bytes" in settings.objectives or settings.max_stored_bytes is not None
    here = context.hardware.latency == "measured"
    runtime = RUNTIMES[context.hardware.runtime]()
    hashes = {r.trial: r.sha256 for r in results}
    test = _test_evaluator(task, context)
    original = float_model(context.original)
    if test is not None:
        baseline["test_accuracy"] = test.set_reference(OnnxRuntime().open(original)).value
    models: dict[str, bytes] = {}
    if here:
        int8 = _uniform_int8(context)
        models = {"float": original, "int8": context.compress(int8).model}
        beside: dict[str, Any] = {"size_bytes": len(models["int8"]), "predicted_latency_ms": None}
        if test is not None:
            beside |= test.score(runtime.open(models["int8"])).to_dict()
        with contextlib.suppress(HardwareError):  # a space without int8: its kernels were not timed
            beside["predicted_latency_ms"] = context.predict(int8).latency_ms
        baseline["uniform_int8"] = beside
    scores: dict[int, dict[str, Any]] = {}
    for member in members:
        path = folder / "artifacts" / f"{member.trial}.onnx"
        artifact = _kept(path, member, hashes[member.trial])
        if artifact is None and (member.candidate.polish or member.candidate.training):
            say(f"{path.name} is missing or damaged: made again")
        artifact = artifact or context.compress(member.candidate)
        if artifact.sha256 != hashes[member.trial]:
            raise RunError(
                f"trial {member.trial}: the rebuilt file differs from the one that was scored; "
                "the network, the data or a library changed since: start a new run"
            )
        artifact.save(path)
        if here:
            models[str(member.trial)] = artifact.model
        found = member.searched
        if test is not None:
            found = test.score(runtime.open(artifact.model))
        scores[member.trial] = found.to_dict()
        if is_coded:
            scores[member.trial]["stored_bytes"] = stored_bytes(artifact.model)
    times: dict[str, Mapping[str, Any]] = {}
    if here:
        inputs = latency_inputs(task, context.graph, settings.batch)
        found_times = alone(_timed, context.hardware.runtime, models, inputs, settings.threads)
        times = {key: time.to_dict() for key, time in found_times.items()}
        baseline.update(times["float"])
        baseline["uniform_int8"] |= times["int8"]
    _remove_old_artifacts(folder / "artifacts", {m.trial for m in members})
    return [
        replace(
            member,
            verified={
                **scores[member.trial],
                **times.get(str(member.trial), _NOT_MEASURED),
            },
            artifact=f"artifacts/{member.trial}.onnx",
            folder=folder,
        )
        for member in members
    ]


def _timed(
    name: str, models: Mapping[str, bytes], inputs: Sequence[Any], threads: int
) -> Mapping[str, Latency]:
    """The latencies of models, measured side by side."""
    runtime = RUNTIMES[name]()
    sessions = {key: runtime.open(model, threads, inputs) for key, model in models.items()}
    return measure(sessions, inputs, threads=threads, runtime=runtime.name, seconds=0.5)


def _uniform_int8(context: Context) -> Candidate:
    """Every layer that has an int8 kernel at 8/8."""
    layers = [x.name for x in context.graph.layers if x.kind in INT8_KINDS]
    return Candidate(dict.fromkeys(layers, LayerChoice(8, 8)))


def _kept(path: Path, member: Member, sha256: str | None) -> Artifact | None:
    """A polished or trained member's file, if it is whole: making it again would take its time."""
    if not (member.candidate.polish or member.candidate.training) or not path.is_file():
        return None
    artifact = Artifact(member.candidate, path.read_bytes())
    return artifact if artifact.sha256 == sha256 else None


def _test_evaluator(task: Task, context: Context) -> Evaluator | None:
    if task.test is None:
        return None
    return evaluator_for(task, context.graph, "test", seed=context.evaluator.seed)


def _remove_old_artifacts(folder: Path, members: set[int]) -> None:
    """Files of members that a longer search has left behind."""
    for path in folder.glob("*.onnx"):
        if path.stem.isdigit() and int(path.stem) not in members:
            path.unlink()


def _save_inputs(context: Context, path: Path) -> None:
    """Up to eight calibration samples under the graph's input names, for packages."""
    rows = fixed_batch(context.graph) or 8
    arrays = dict(zip(context.graph.inputs, context.sample, strict=True))
    try:
        np.savez(path, allow_pickle=False, **{n: a[:rows] for n, a in arrays.items()})
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None
