"""The ask/tell loop: Optuna proposes, an executor runs, every finished trial is on disk."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.errors import CandidateError, RunError, nearest
from autoquant.front import Front, members_of, reference_point
from autoquant.result import Cost, TrialResult
from autoquant.search.coupling import conform
from autoquant.search.dimensions import Options, candidate_of, option_of
from autoquant.search.executor import Executor
from autoquant.search.run import RESERVE, append, without_password
from autoquant.search.sensitivity import FLOOR
from autoquant.search.solver import Table
from autoquant.search.structural import additive_costs
from autoquant.search.trial import Against, Context, Limits, Pick, Say, run_trial, silent

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler

    from autoquant.search.sampler import SurrogateSampler

SAMPLERS = ("surrogate", "tpe", "nsga2", "random")
SIGNALS = ("divergence", "metric")
NEAR = 1.05  # a pick's cost relative to that of a trial that may replace it, at most
_ADDITIVE = (
    "size_bytes",
    "weight_bytes",
    "average_weight_bits",
    "latency_ms",
    "bops",
    "stored_bytes",
)
_PATIENCE = 200  # proposals in a row without a new candidate before the space counts as done


DEATHS = 3  # drivers that may die while a candidate runs before it is set aside
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Callback:
    """What a search tells while it runs; override what is of interest."""

    def stage(self, text: str) -> None:
        """A preparation or verification step begins."""

    def start(
        self,
        study: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        done: Sequence[TrialResult],
    ) -> None:
        """Trials begin. ``study``: the content of study.yaml; ``layers``: as in `inspect`,
        each with the ``costs`` of its choices; ``done``: trials of the run that is resumed."""

    def trial(self, result: TrialResult) -> None:
        """A trial is finished and on disk."""

    def pace(self, workers: int, retries: int) -> None:
        """After each trial: how many can run at a time now, how many were started again."""

    def finish(self, front: Front) -> None:
        """The front is verified and written."""


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What the loop needs beside its context.

    ``signal``: what Optuna stores in the place of the accuracy, and samplers follow: the
    ``divergence`` of the outputs from the float network's (to be minimized), or the ``metric``.
    ``patience``: trials without a change of the front after which the search ends.
    """

    name: str
    folder: Path
    objectives: tuple[str, ...]
    trials: int
    timeout: float | None
    sampler: str | BaseSampler
    seed: int
    storage: str | None
    signal: str = "divergence"
    patience: int | None = None


def uniform_candidates(choices: Mapping[str, Sequence[LayerChoice]]) -> list[Candidate]:
    """Uniform candidates: float where the space has it, then every choice for all layers.

    A layer without that choice takes its nearest one (by bits).
    """
    offered = dict.fromkeys(c for found in choices.values() for c in found)
    uniform = [FLOAT] if FLOAT in offered else []
    uniform += sorted(
        (c for c in offered if not c.is_float),
        key=lambda c: (-min(c.weight_bits, 8), -c.activation_bits, -c.weight_bits),
    )
    result = []
    for choice in uniform:
        layers = {name: _nearest(choice, found) for name, found in choices.items()}
        result.append(Candidate(layers))
    return list(dict.fromkeys(result))


def _nearest(choice: LayerChoice, found: Sequence[LayerChoice]) -> LayerChoice:
    return min(
        found,
        key=lambda c: (
            c != choice,
            abs(c.weight_bits - choice.weight_bits),
            abs(c.activation_bits - choice.activation_bits),
            c.rounding != choice.rounding,
        ),
    )


def divergence_at(floor: float, told: Sequence[tuple[float, float]]) -> float | None:
    """The divergence that goes with an accuracy, by trials' (divergence, accuracy): between the
    largest that was as accurate and the next; None while no trial fell below it, or all did."""
    good = max((d for d, value in told if value >= floor and d > 0), default=None)
    beyond = [d for d, _ in told if good is not None and d > good]
    return math.sqrt(good * min(beyond)) if good is not None and beyond else None


class Study:
    """One Optuna study and its trials.jsonl.

    A finished trial is a line of trials.jsonl, synced to disk before Optuna hears of it; the
    file is the record, the storage the sampler's memory. ``first``: candidates that a new
    study runs before its sampler proposes any, each with what proposes it. ``priors``: tables
    of divergences for the default sampler, by name; ``structures``: the costs of options that
    have one and are no layer's (`structural_costs`). Old trials count under the limits of now.
    """

    def __init__(
        self,
        context: Context,
        settings: StudySettings,
        resume: bool,
        first: Callable[[], Sequence[tuple[str, Candidate]]] | None = None,
        priors: Mapping[str, Table] | None = None,
        say: Say = silent,
        structures: Mapping[str, Sequence[Cost]] | None = None,
    ) -> None:
        import optuna

        from autoquant.search.storage import open_storage

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.context, self.settings = context, settings
        self.path = settings.folder / "trials.jsonl"
        self.dimensions: Options = {**context.choices, **context.options}
        self.free = {n: c for n, c in self.dimensions.items() if len(c) > 1}
        self.fixed = {n: c[0] for n, c in self.dimensions.items() if len(c) == 1}
        self.priors = {} if priors is None else dict(priors)
        self.structures = {} if structures is None else dict(structures)
        told = read_trials(self.path, say) if resume else []
        self.results = [_judged(r, context.limits) for r in told]
        self.seen = {r.candidate.key: r.trial for r in self.results}
        self.leading = self._nondominated(self.results)
        self.picks = [r for r in self.results if _is_pick(r)]
        self._forget_evidence(range(len(self.results)))
        self.full: str | None = None  # the disk is: what could not be written
        self.new = 0  # trials of this session, from here
        self.still = 0  # trials since the front changed
        self.costs = {  # of a thousand old trials they would take seconds to predict again
            r.candidate.key: r.predicted
            for r in self.results
            if r.predicted is not None and not r.candidate.is_structural
        }
        self.end: float | None = None  # when the time for trials is up; set by the first `run`
        self.random = random.Random(settings.seed + len(self.results))
        self.storage, self.sync = open_storage(settings.storage, settings.folder, say)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.study = self._open(resume)
        except optuna.exceptions.DuplicatedStudyError:
            raise RunError(
                f"--storage {without_password(settings.storage or '')}: it has a study "
                f"{settings.name!r} already; choose another --name"
            ) from None
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            raise RunError(_cannot_write(settings.folder, error)) from None
        empty = not self.study.get_trials(deepcopy=False)
        self._recover(say)
        if resume and self.study.user_attrs.get("targets") != self._targets():
            self._rebuild()
        if first is not None and empty:
            for origin, candidate in first():
                if candidate.key not in self.seen:
                    self._enqueue(candidate, origin)
        self.new = len(self.results)
        self.sync()

    def _open(self, load: bool) -> optuna.Study:
        """Create or load the study; what it stores is in its metric names."""
        import optuna

        settings = self.settings
        by_metric = settings.signal == "metric"
        study = optuna.create_study(
            storage=self.storage,
            study_name=settings.name,
            directions=[
                "maximize" if n == "accuracy" and by_metric else "minimize"
                for n in settings.objectives
            ],
            sampler=self._sampler(),
            load_if_exists=load,
        )
        if not study.get_trials(deepcopy=False):
            names = ["divergence" if n == "accuracy" else n for n in settings.objectives]
            study.set_metric_names(list(settings.objectives) if by_metric else names)
            study.set_user_attr("targets", self._targets())
        return study

    def _targets(self) -> dict[str, Any]:
        """What the values and constraints that Optuna stores depend on."""
        return {"limits": asdict(self.context.limits), "signal": self.settings.signal}

    def _rebuild(self) -> None:
        """Limits or the signal changed: tell Optuna all trials anew; run those that a limit
        alone kept from being evaluated."""
        import optuna
        from optuna.trial import TrialState

        waiting = self.study.get_trials(states=(TrialState.WAITING,))
        optuna.delete_study(study_name=self.settings.name, storage=self.study._storage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.study = self._open(False)
        known = {r.trial: r for r in self.results}
        for number in range(max(known, default=-1) + 1):
            self._add(known.get(number))
        for trial in waiting:
            params = trial.system_attrs.get("fixed_params", {})
            self.study.enqueue_trial(params, user_attrs=trial.user_attrs)
        for result in self.results:
            if result.status != "infeasible" or result.score or result.predicted is None:
                continue
            if max(self.context.limits.excess(result.predicted, None).values(), default=0.0) <= 0:
                del self.seen[result.candidate.key]
                self._enqueue(result.candidate, result.origin or "sampler")

    def _enqueue(self, candidate: Candidate, origin: str) -> None:
        self.study.enqueue_trial(self._params(candidate), user_attrs={"origin": origin})

    def _sampler(self) -> BaseSampler:
        """A sampler by name, seeded anew at each resume where it keeps its own state, or the
        one that was given. Raises RunError."""
        given, seed = self.settings.sampler, self.settings.seed
        if not isinstance(given, str):
            return given
        if given.lower() == "surrogate":
            return self._surrogate()
        return _named_sampler(given, seed + len(self.results))

    def _surrogate(self) -> SurrogateSampler:
        from optuna.distributions import IntDistribution

        from autoquant.search.sampler import SurrogateSampler

        objectives, context = self.settings.objectives, self.context
        reference = context.evaluator.reference
        assert reference is not None
        noise = reference.standard_error
        noise = noise if math.isfinite(noise) and noise > 0 else 0.01 * abs(reference.value)
        by_metric = self.settings.signal == "metric"
        additive = [(i, n) for i, n in enumerate(objectives) if n in _ADDITIVE]
        if not additive:  # solve for bytes where no objective is a sum over layers
            index = next(i for i, n in enumerate(objectives) if n != "accuracy")
            additive = [(index, "weight_bytes")]
        return SurrogateSampler(
            space={n: IntDistribution(0, len(c) - 1) for n, c in self.free.items()},
            priors=[self._reached(table) for table in self.priors.values()],
            costs={i: additive_costs(context, self.structures, name) for i, name in additive},
            known=lambda p: [
                None if n == "accuracy" else float(getattr(self._cost(self._built(p)), n))
                for n in objectives
            ],
            excess=lambda p: context.limits.excess(self._cost(self._built(p)), None),
            learned=objectives.index("accuracy"),
            ideal=reference.value if by_metric else 0.0,
            noise=noise if by_metric else 0.0,
            worst=self._worst,
            initial=0,
            seed=self.settings.seed,
        )

    def _worst(self) -> float | None:
        """The signal where the front's hypervolume begins, or at the largest drop that the limits
        allow: what is worse counts nowhere."""
        reference, limits = self.context.evaluator.reference, self.context.limits
        assert reference is not None
        names = ("accuracy",)
        floor = reference_point(self.context.baseline, reference.value, names)["accuracy"]
        if limits.drop is not None:
            floor = max(floor, reference.value - limits.drop)
        if self.settings.signal == "metric":
            return floor
        scores = [r.score for r in self.results if r.score is not None]
        told = [(s.divergence or 0.0, reference.value - s.drop) for s in scores]
        return divergence_at(floor, told)

    def _reached(self, table: Table) -> dict[str, Sequence[float]]:
        """A prior as the sampler takes it. Its budgets end below what has no loss, which for
        layers is float; a structure left as it is has one too small to count."""
        return {
            n: table[n] if n in self.context.choices else [max(v, FLOOR) for v in table[n]]
            for n in self.free
            if n in table
        }

    def _built(self, params: Mapping[str, int]) -> Candidate:
        """The candidate of one index a dimension, with ties and forbidden pairs kept."""
        picked = {n: c[params[n]] for n, c in self.free.items()}
        found = {n: picked[n] if n in picked else self.fixed[n] for n in self.dimensions}
        return self._allowed(candidate_of(found))

    def _allowed(self, candidate: Candidate) -> Candidate:
        """With ties and forbidden pairs kept, and no structure beside a student."""
        context = self.context
        if candidate.student:
            candidate = replace(candidate, pruning={}, rank={}, drop=())
        return conform(candidate, context.choices, context.tied, context.forbidden)

    def recorded(self) -> list[TrialResult]:
        """The trials of trials.jsonl, judged by the limits of now: an interrupted study may
        not have got to count the last."""
        return [_judged(r, self.context.limits) for r in read_trials(self.path)]

    def _forget_evidence(self, indices: Iterable[int]) -> None:
        """What later trials are compared with is kept in memory for the front alone."""
        leading = {r.trial for r in self.leading}
        for i in indices:
            if self.results[i].evidence and self.results[i].trial not in leading:
                self.results[i] = replace(self.results[i], evidence=None)

    def _cost(self, candidate: Candidate) -> Cost:
        key = candidate.key
        if key not in self.costs:
            if len(self.costs) > 20_000:
                self.costs.clear()
            self.costs[key] = self.context.predict(candidate)
        return self.costs[key]

    def learned(self) -> dict[str, Any] | None:
        """What the surrogate makes of all trials, whichever sampler proposed them; None
        without a prior or with too few trials."""
        if not self.priors or not self.free:
            return None
        view = self._surrogate().view(self.study)
        return None if view is None else {"signal": self.settings.signal, **view}

    def _nondominated(self, results: Sequence[TrialResult]) -> list[TrialResult]:
        kept = {m.trial for m in members_of(results, self.settings.objectives)}
        return [r for r in results if r.trial in kept]

    def _against(self, candidate: Candidate, origin: str) -> Against:
        """The best member that costs no more, and the picks at about the same cost."""
        if origin in ("uniform", "polish"):
            return Against(origin)
        names = [n for n in self.settings.objectives if n != "accuracy"]
        own = self._cost(candidate)
        mine = [float(getattr(own, n)) for n in names]

        def costs(result: TrialResult) -> list[float]:
            return [float(getattr(result.predicted, n)) for n in names]

        best: TrialResult | None = None
        for result in self.leading:
            cheaper = all(a <= b for a, b in zip(costs(result), mine, strict=True))
            if cheaper and result.evidence and _value(result) > (-math.inf if best is None
                    else _value(best)):  # fmt: skip
                best = result
        picks = []
        for result in self.picks if origin != "solver" else ():
            assert result.second is not None
            near = [a <= b <= NEAR * a for a, b in zip(mine, costs(result), strict=True)]
            if all(near):
                picks.append(Pick(result.trial, _value(result), result.second))
        if best is None:
            return Against(origin, picks=tuple(picks))
        return Against(origin, best.trial, best.evidence, tuple(picks))

    def _recover(self, say: Say) -> None:
        """After a crash: tell what was not told; what ran is repeated, or set aside where it
        ran at the death of ``DEATHS`` drivers.

        A storage that lost trials of trials.jsonl gets them again, under their own numbers.
        """
        from optuna.trial import TrialState

        known = {r.trial: r for r in self.results}
        unfinished, stale = (TrialState.RUNNING, TrialState.WAITING), 0
        for trial in self.study.get_trials(deepcopy=False, states=unfinished):
            if trial.number in known:
                self._tell_anew(trial, known[trial.number])
            elif trial.state == TrialState.RUNNING:
                stale += 1
                self._repeat(trial, say)
        if stale:
            say(f"{stale} trials were running when the run ended: they run again")
        count = len(self.study.get_trials(deepcopy=False))
        lost = range(count, max(known, default=-1) + 1)
        if lost:
            say(f"{len(lost)} trials that the storage lost are told again from trials.jsonl")
        for number in lost:
            self._add(known.get(number))

    def _tell_anew(self, trial: optuna.trial.FrozenTrial, result: TrialResult) -> None:
        """Finish a trial that is in trials.jsonl, and that the storage has as unfinished."""
        from optuna.distributions import IntDistribution
        from optuna.trial import Trial, TrialState

        key = trial._trial_id
        if trial.state == TrialState.WAITING:
            self.study._storage.set_trial_state_values(key, state=TrialState.RUNNING)
        values = self._values(result)
        if values is None or result.predicted is None:
            self.study.tell(trial.number, state=TrialState.FAIL)
            return
        for name, index in self._params(result.candidate).items():
            if name not in trial.params:
                found = IntDistribution(0, len(self.free[name]) - 1)
                self.study._storage.set_trial_param(key, name, index, found)
        self._tell(Trial(self.study, key), result, values)

    def _repeat(self, trial: optuna.trial.FrozenTrial, say: Say) -> None:
        """Queue again what ran when a driver died, before it counts as failed."""
        from optuna.trial import TrialState

        params = trial.system_attrs.get("fixed_params", trial.params)
        deaths = trial.user_attrs.get("deaths", 0) + 1
        if set(params) == set(self.free) and self._built(params).key not in self.seen:
            if deaths < DEATHS:
                attributes = {**trial.user_attrs, "deaths": deaths}
                self.study.enqueue_trial(dict(params), user_attrs=attributes)
            else:
                say(f"trial {trial.number} is set aside: {deaths} drivers died while it ran")
                why = f"set aside: {deaths} drivers died while it ran"
                found = TrialResult(trial.number, self._built(params), "failed", error=why)
                self._write(replace(found, seed=self.settings.seed, seconds={}))
                self.seen[found.candidate.key] = trial.number
        self.study.tell(trial.number, state=TrialState.FAIL)

    def close(self) -> None:
        """Give up connections to a database."""
        self.storage.remove_session()
        backend = getattr(self.storage, "_backend", None)
        engine = getattr(backend, "engine", None)
        if engine is not None:
            engine.dispose()

    @property
    def timed_out(self) -> bool:
        """Whether the time that the settings give to trials is up."""
        return self.end is not None and time.monotonic() >= self.end

    def run(
        self, executor: Executor, callbacks: Sequence[Callback], total: int | None = None
    ) -> str:
        """Ask, run and tell until ``total`` trials (default: the settings'), time or candidates
        are used up, or Ctrl-C.

        Returns why it ended: ``trials``, ``timeout``, ``exhausted``, ``patience``,
        ``failing`` (most trials do), ``full`` (the disk; ``full`` says what it refused) or
        ``interrupted``.
        """
        settings = self.settings
        total = settings.trials if total is None else total
        if self.end is None and settings.timeout is not None:
            self.end = time.monotonic() + settings.timeout
        running: dict[int, optuna.trial.Trial] = {}
        reason = "trials"
        proposals = self._proposals(running)
        try:
            while True:
                while len(running) < executor.slots and reason == "trials":
                    if len(self.results) + len(running) >= total:
                        break
                    if self.timed_out:
                        reason = "timeout"
                        break
                    if settings.patience is not None and self.still >= settings.patience:
                        reason = "patience"
                        break
                    proposal = next(proposals, None)
                    if proposal is None:
                        reason = "exhausted"
                        break
                    trial, candidate = proposal
                    running[trial.number] = trial
                    self.seen[candidate.key] = trial.number
                    against = self._against(candidate, trial.user_attrs.get("origin", "sampler"))
                    executor.submit(candidate, trial.number, settings.seed, against)
                if not running:
                    return reason
                result = executor.wait()
                self._record(running[result.trial], result)
                del running[result.trial]
                for callback in callbacks:
                    callback.trial(result)
                    callback.pace(executor.workers, executor.retries)
                if self.failing:
                    reason = "failing"
                if self.full is not None:
                    return "full"
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as error:  # an executor's are results
            if not _is_of_storage(error):
                raise
            if self._make_room(error):
                return "full"
            raise RunError(_cannot_write(settings.folder, error)) from None
        finally:
            self._leave(running)

    @property
    def failing(self) -> bool:
        """Whether more than half of the last twenty trials of this session failed."""
        last = self.results[self.new :][-20:]
        return len(last) >= 10 and sum(r.status == "failed" for r in last) * 2 > len(last)

    def _leave(self, running: Mapping[int, optuna.trial.Trial]) -> None:
        """Queue again what is given up while it runs; where that fails, `_recover` does it."""
        from optuna.trial import TrialState

        recorded = {r.trial for r in self.results[self.new :]}
        try:
            for number, trial in running.items():
                if number not in recorded:
                    self.study.enqueue_trial(dict(trial.params), user_attrs=trial.user_attrs)
                    self.study.tell(number, state=TrialState.FAIL)
            self.sync()
        except Exception as error:
            if not _is_of_storage(error):
                raise

    def _make_room(self, error: Exception) -> bool:
        """Whether the disk is full and the run's reserve could be given up for what matters."""
        if getattr(error, "errno", None) not in _FULL:
            return False
        self.full = _cannot_write(self.settings.folder, error)
        reserve = self.settings.folder / RESERVE
        found = reserve.is_file()
        reserve.unlink(missing_ok=True)
        return found

    def _proposals(
        self, running: Mapping[int, optuna.trial.Trial]
    ) -> Iterator[tuple[optuna.trial.Trial, Candidate]]:
        """New candidates only: a duplicate is told as failed, then a neighbour is tried."""
        from optuna.trial import TrialState

        repeats = 0
        while repeats < _PATIENCE:
            trial = self.study.ask()
            candidate = self._candidate(trial)
            if candidate.key not in self.seen:
                repeats = 0
                yield trial, candidate
                continue
            repeats += 1
            trial.set_user_attr("duplicate_of", self.seen[candidate.key])
            self.study.tell(trial, state=TrialState.FAIL)
            neighbour = self._neighbour()
            if neighbour is None:
                return
            self._enqueue(neighbour, "neighbour")

    def _candidate(self, trial: optuna.trial.Trial) -> Candidate:
        """The trial's parameters: one ordinal index a dimension."""
        return self._built({n: trial.suggest_int(n, 0, len(c) - 1) for n, c in self.free.items()})

    def _params(self, candidate: Candidate) -> dict[str, int]:
        return {n: c.index(option_of(candidate, n, c)) for n, c in self.free.items()}

    def _neighbour(self) -> Candidate | None:
        """A new candidate near the front, moved along some dimensions; None if none is found."""
        members = members_of(self.results, self.settings.objectives)
        starts = [m.candidate for m in members] or [candidate_of(self.fixed)]
        names = list(self.free)
        for attempt in range(_PATIENCE if names else 0):
            start = self.random.choice(starts)
            picks = {n: option_of(start, n, c) for n, c in self.dimensions.items()}
            moves = min(len(names), 1 + attempt // 20)
            for name in self.random.sample(names, moves):
                picks[name] = self.random.choice(self.free[name])
            candidate = self._allowed(candidate_of(picks))
            if candidate.key not in self.seen and all(
                picks[n] in c for n, c in self.dimensions.items()
            ):
                return candidate
        return None

    def polish(self, candidates: Sequence[Candidate], workers: int) -> Iterator[TrialResult]:
        """Run the polished forms of candidates as trials of their own, here, and keep their
        files; ``workers`` at a time, in order."""
        first = len(self.study.get_trials(deepcopy=False))

        def run(index: int) -> TrialResult:
            number, found = first + index, replace(candidates[index], polish=True)
            save, seed = self._artifact(number), self.settings.seed
            return run_trial(self.context, found, number, seed, save, Against("polish"))

        with ThreadPoolExecutor(max(1, workers)) as pool:
            futures = [pool.submit(run, index) for index in range(len(candidates))]
            try:
                for future in futures:
                    result = future.result()
                    self._write(result)
                    self.seen[result.candidate.key] = result.trial
                    self._add(result)
                    yield result
            finally:
                for future in futures:
                    future.cancel()

    def train(self, candidates: Sequence[Candidate], executor: Executor) -> Iterator[TrialResult]:
        """Run candidates that train, which no sampler proposed, as trials of their own, and keep
        their files; yields each as it ends. Optuna hears of them in order: what it has not heard
        of when the driver dies, `_recover` tells it."""
        first = told = len(self.study.get_trials(deepcopy=False))
        running, submitted = 0, 0
        ended: dict[int, TrialResult] = {}
        while running or submitted < len(candidates):
            while submitted < len(candidates) and running < executor.slots:
                found, number = candidates[submitted], first + submitted
                save, seed = self._artifact(number), self.settings.seed
                executor.submit(found, number, seed, Against("training"), save)
                running, submitted = running + 1, submitted + 1
            result = executor.wait()
            running -= 1
            self._write(result)
            self.seen[result.candidate.key] = result.trial
            ended[result.trial] = result
            while told in ended:
                self._add(ended.pop(told))
                told += 1
            self.sync()
            yield result

    def _artifact(self, trial: int) -> Path:
        """Where the file of a trial is kept that could not be made again in a moment."""
        return self.settings.folder / "artifacts" / f"{trial}.onnx"

    def _add(self, result: TrialResult | None) -> None:
        """Let Optuna know of a trial that it was not asked for; None for one that is lost."""
        from optuna.distributions import IntDistribution
        from optuna.trial import TrialState, create_trial

        values = None if result is None else self._values(result)
        if result is None or result.predicted is None or values is None:
            self.study.add_trial(create_trial(state=TrialState.FAIL))
            return
        drop = None if result.score is None else result.score.drop
        self.study.add_trial(
            create_trial(
                params=self._params(result.candidate),
                distributions={n: IntDistribution(0, len(c) - 1) for n, c in self.free.items()},
                values=values,
                constraints=self.context.limits.excess(result.predicted, drop),
                user_attrs=self._attributes(result),
            )
        )

    def _values(self, result: TrialResult) -> list[float] | None:
        """Objective values as Optuna stores them; None for a trial without any.

        The float network's bound what was too costly to be evaluated. A metric of a part of
        the split counts by its drop against float on that part.
        """
        reference = self.context.evaluator.reference
        assert reference is not None
        score = result.score
        if result.status == "failed" or result.predicted is None:
            return None
        if self.settings.signal == "metric":
            first = reference.value if score is None else reference.value - score.drop
        elif score is not None and score.divergence is None:
            return None
        else:
            first = 0.0 if score is None else float(score.divergence or 0.0)
        return [
            first if n == "accuracy" else float(getattr(result.predicted, n))
            for n in self.settings.objectives
        ]

    @staticmethod
    def _attributes(result: TrialResult) -> dict[str, Any]:
        """What Optuna keeps beside the values: the score in the metric; whether it bounds."""
        if result.score is None:
            return {"bound": True}
        return {"accuracy": result.score.value, "samples": result.score.samples}

    def _write(self, result: TrialResult) -> None:
        """Add a finished trial's line to trials.jsonl, synced to disk, after its traceback."""
        line = json.dumps(result.to_dict(), separators=(",", ":"), allow_nan=True) + "\n"
        try:
            try:
                self._write_files(result, line)
            except OSError as error:
                if not self._make_room(error):
                    raise
                self._write_files(result, line)
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from None
        self.results.append(replace(result, traceback=None))
        if _is_pick(result):
            self.picks.append(result)
        before = {r.trial: len(self.results) - 1 for r in self.leading}
        if result.status == "complete":
            self.leading = self._nondominated([*self.leading, result])
        now = {r.trial for r in self.leading}
        self.still = self.still + 1 if now == set(before) else 0
        if result.trial not in now:
            self._forget_evidence([len(self.results) - 1])
        for trial in set(before) - now:  # dominated from now on
            self._artifact(trial).unlink(missing_ok=True)

    def _write_files(self, result: TrialResult, line: str) -> None:
        if result.traceback is not None:
            folder = self.settings.folder / "errors"
            folder.mkdir(exist_ok=True)
            (folder / f"{result.trial}.txt").write_text(result.traceback, encoding="utf-8")
        append(self.path, line, sync=True)

    def _record(self, trial: optuna.trial.Trial, result: TrialResult) -> None:
        """First the line, synced, then Optuna, synced."""
        from optuna.trial import TrialState

        self._write(result)
        values = self._values(result)
        if result.predicted is None or values is None:
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self._tell(trial, result, values)
        self.sync()

    def _tell(self, trial: optuna.trial.Trial, result: TrialResult, values: list[float]) -> None:
        assert result.predicted is not None
        for name, value in self._attributes(result).items():
            trial.set_user_attr(name, value)
        drop = result.score.drop if result.score is not None else None
        for name, value in self.context.limits.excess(result.predicted, drop).items():
            trial.set_constraint(name, value)
        self.study.tell(trial, values)


def _is_pick(result: TrialResult) -> bool:
    return result.status == "complete" and result.second is not None


def _is_of_storage(error: Exception) -> bool:
    from optuna.exceptions import StorageInternalError

    return isinstance(error, (OSError, StorageInternalError))


def _value(result: TrialResult) -> float:
    return -math.inf if result.score is None else result.score.value


def _judged(result: TrialResult, limits: Limits) -> TrialResult:
    """An evaluated trial under the limits of now, which may differ from those it ran under."""
    if result.status not in ("complete", "infeasible") or result.predicted is None:
        return result
    drop = None if result.score is None else result.score.drop
    if max(limits.excess(result.predicted, drop).values(), default=0.0) > 0:
        return replace(result, status="infeasible")
    return result if result.score is None else replace(result, status="complete")


def read_trials(path: Path, say: Say = silent, *, repair: bool = True) -> list[TrialResult]:
    """Finished trials of a run; a half-written last line is left out, and cut off to ``repair``.

    Raises RunError for a line in the middle that does not parse.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    results, good = [], 0
    for number, line in enumerate(lines, 1):
        try:
            results.append(TrialResult.from_dict(json.loads(line)))
            good += len(line)
        except (ValueError, KeyError, TypeError, CandidateError) as error:
            if number == len(lines):
                if repair:
                    os.truncate(path, good)
                    say(f"{path.name}: half a last line was cut off; its trial runs again")
                break
            raise RunError(f"{path}:{number}: not a trial: {type(error).__name__}") from None
    else:
        if repair and lines and not lines[-1].endswith(b"\n"):  # the next needs its own line
            append(path, "\n", sync=True)
    return results


def _cannot_write(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{path}: cannot be written: {reason}"


def check_sampler(name: str | BaseSampler) -> None:
    """Raises RunError for a name that is no sampler's."""
    if isinstance(name, str) and name.lower() != "surrogate":
        _named_sampler(name, 0)


def _named_sampler(name: str, seed: int) -> BaseSampler:
    """Any of Optuna's samplers that needs no more than a seed, by its class's name."""
    import optuna

    known = {
        n.lower(): getattr(optuna.samplers, n)
        for n in optuna.samplers.__all__
        if n.endswith("Sampler") and n != "BaseSampler"
    }
    asked = {"tpe": "tpesampler", "nsga2": "nsgaiisampler"}.get(name.lower(), name.lower())
    found = known.get(asked) or known.get(asked + "sampler")
    if found is None:
        names = [*SAMPLERS, *(n.removesuffix("sampler") for n in known)]
        raise RunError(f"--sampler {name!r}: {nearest(name, list(dict.fromkeys(names)))}")
    options: dict[str, Any] = {"seed": seed}
    if asked == "tpesampler":
        options["multivariate"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sampler: BaseSampler = found(**options)
        except (TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(f"--sampler {name!r}: needs more than a name: {reason}") from None
    return sampler
