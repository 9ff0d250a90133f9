"""The ask/tell loop: Optuna proposes, an executor runs, every finished trial is on disk."""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.errors import CandidateError, RunError, nearest
from autoquant.front import Front, members_of
from autoquant.result import TrialResult
from autoquant.search.coupling import conform
from autoquant.search.executor import Executor
from autoquant.search.trial import Context, run_trial

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "nsga2", "random")
_PATIENCE = 200  # proposals in a row without a new candidate before the space counts as done


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
        """Trials begin. ``study``: the content of study.yaml; ``layers``: as in `inspect`;
        ``done``: trials of the run that is resumed."""

    def trial(self, result: TrialResult) -> None:
        """A trial is finished and on disk."""

    def finish(self, front: Front) -> None:
        """The front is verified and written."""


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What the loop needs beside its context."""

    name: str
    folder: Path
    objectives: tuple[str, ...]
    trials: int
    timeout: float | None
    sampler: str | BaseSampler
    seed: int
    storage: str | None


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


class Study:
    """One Optuna study and its trials.jsonl.

    A finished trial is a line of trials.jsonl, synced to disk before Optuna hears of it; the
    file is the record, the storage the sampler's memory. ``first``: candidates that a new
    study runs before its sampler proposes any.
    """

    def __init__(
        self,
        context: Context,
        settings: StudySettings,
        resume: bool,
        first: Callable[[], Sequence[Candidate]] | None = None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.context, self.settings = context, settings
        self.path = settings.folder / "trials.jsonl"
        self.free = {n: c for n, c in context.choices.items() if len(c) > 1}
        self.fixed = {n: c[0] for n, c in context.choices.items() if len(c) == 1}
        self.results = read_trials(self.path) if resume else []
        self.seen = {r.candidate.key: r.trial for r in self.results}
        self.end: float | None = None  # when the time for trials is up; set by the first `run`
        self.random = random.Random(settings.seed + len(self.results))
        directions = ["maximize" if n == "accuracy" else "minimize" for n in settings.objectives]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.study = optuna.create_study(
                    storage=_storage(settings),
                    study_name=settings.name,
                    directions=directions,  # type: ignore[arg-type]
                    sampler=_sampler(settings, len(self.results)),
                    load_if_exists=resume,
                )
        except optuna.exceptions.DuplicatedStudyError:
            raise RunError(
                f"--storage {settings.storage}: it has a study {settings.name!r} already; "
                "choose another --name"
            ) from None
        except (OSError, optuna.exceptions.StorageInternalError) as error:
            raise RunError(_cannot_write(settings.folder, error)) from None
        self._recover()
        if first is not None and not self.study.get_trials(deepcopy=False):
            for candidate in first():
                self.study.enqueue_trial(self._params(candidate))

    def _recover(self) -> None:
        """After a crash: fail what is still running, repeat it, tell what was not told.

        A storage that lost trials of trials.jsonl gets them again, under their own numbers.
        """
        from optuna.trial import TrialState

        known = {r.trial: r for r in self.results}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            result = known.get(trial.number)
            if result is not None and result.status == "complete":
                self.study.tell(trial.number, self._values(result))
                continue
            self.study.tell(trial.number, state=TrialState.FAIL)
            if result is None and set(trial.params) == set(self.free):
                self.study.enqueue_trial(dict(trial.params))
        count = len(self.study.get_trials(deepcopy=False))
        for number in range(count, max(known, default=-1) + 1):
            self._add(known.get(number))

    @property
    def timed_out(self) -> bool:
        """Whether the time that the settings give to trials is up."""
        return self.end is not None and time.monotonic() >= self.end

    def run(
        self, executor: Executor, callbacks: Sequence[Callback], total: int | None = None
    ) -> str:
        """Ask, run and tell until ``total`` trials (default: the settings'), time or candidates
        are used up, or Ctrl-C.

        Returns why it ended: ``trials``, ``timeout``, ``exhausted`` or ``interrupted``.
        """
        from optuna.exceptions import StorageInternalError
        from optuna.trial import TrialState

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
                    proposal = next(proposals, None)
                    if proposal is None:
                        reason = "exhausted"
                        break
                    trial, candidate = proposal
                    running[trial.number] = trial
                    self.seen[candidate.key] = trial.number
                    executor.submit(candidate, trial.number, settings.seed)
                if not running:
                    return reason
                result = executor.wait()
                self._record(running.pop(result.trial), result)
                for callback in callbacks:
                    callback.trial(result)
        except KeyboardInterrupt:
            return "interrupted"
        except (OSError, StorageInternalError) as error:  # an executor's are results
            raise RunError(_cannot_write(settings.folder, error)) from None
        finally:
            with contextlib.suppress(OSError, StorageInternalError):  # the next --resume does it
                for number in running:
                    self.study.tell(number, state=TrialState.FAIL)

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
            self.study.enqueue_trial(self._params(neighbour))

    def _candidate(self, trial: optuna.trial.Trial) -> Candidate:
        """The trial's parameters: one ordinal index a layer."""
        layers = dict(self.fixed)
        for name, choices in self.free.items():
            layers[name] = choices[trial.suggest_int(name, 0, len(choices) - 1)]
        return self._allowed(Candidate({name: layers[name] for name in self.context.choices}))

    def _allowed(self, candidate: Candidate) -> Candidate:
        context = self.context
        return conform(candidate, context.choices, context.tied, context.forbidden)

    def _params(self, candidate: Candidate) -> dict[str, int]:
        return {n: list(c).index(candidate.choice(n)) for n, c in self.free.items()}

    def _neighbour(self) -> Candidate | None:
        """A new candidate near the front: one to three layers moved; None if none is found."""
        members = members_of(self.results, self.settings.objectives)
        starts = [m.candidate for m in members] or [Candidate(dict(self.fixed))]
        names = list(self.free)
        for attempt in range(_PATIENCE if names else 0):
            start = self.random.choice(starts)
            layers = {n: start.choice(n) for n in self.context.choices}
            moves = min(len(names), 1 + attempt // 20)
            for name in self.random.sample(names, moves):
                layers[name] = self.random.choice(self.free[name])
            candidate = self._allowed(Candidate(layers))
            if candidate.key not in self.seen and all(
                layers[n] in c for n, c in self.context.choices.items()
            ):
                return candidate
        return None

    def polish(self, candidate: Candidate) -> TrialResult:
        """Run the polished form of a candidate as a trial of its own, here, and keep its file."""
        number = len(self.study.get_trials(deepcopy=False))
        found = replace(candidate, polish=True)
        path = self.settings.folder / "artifacts" / f"{number}.onnx"
        result = run_trial(self.context, found, number, self.settings.seed, save=path)
        self._write(result)
        self.seen[result.candidate.key] = number
        self._add(result)
        return result

    def _add(self, result: TrialResult | None) -> None:
        """Let Optuna know of a trial that it was not asked for; None for one that is lost."""
        from optuna.distributions import IntDistribution
        from optuna.trial import TrialState, create_trial

        if result is None or result.status == "failed" or result.predicted is None:
            self.study.add_trial(create_trial(state=TrialState.FAIL))
            return
        drop = None if result.score is None else result.score.drop
        self.study.add_trial(
            create_trial(
                params=self._params(result.candidate),
                distributions={n: IntDistribution(0, len(c) - 1) for n, c in self.free.items()},
                values=self._values(result),
                constraints=self.context.limits.excess(result.predicted, drop),
            )
        )

    def _values(self, result: TrialResult) -> list[float]:
        """Objective values; float's metric bounds what was too costly to be evaluated."""
        reference = self.context.evaluator.reference
        assert reference is not None and result.predicted is not None
        accuracy = reference.value if result.score is None else result.score.value
        return [
            accuracy if n == "accuracy" else float(getattr(result.predicted, n))
            for n in self.settings.objectives
        ]

    def _write(self, result: TrialResult) -> None:
        """Add a finished trial's line to trials.jsonl, synced to disk."""
        line = json.dumps(result.to_dict(), separators=(",", ":"), allow_nan=True) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from None
        self.results.append(result)

    def _record(self, trial: optuna.trial.Trial, result: TrialResult) -> None:
        """First the line, synced, then Optuna."""
        from optuna.trial import TrialState

        self._write(result)
        if result.status == "failed" or result.predicted is None:
            self.study.tell(trial, state=TrialState.FAIL)
            return
        drop = result.score.drop if result.score is not None else None
        if result.score is None:
            trial.set_user_attr("accuracy_is_bound", True)
        excess = self.context.limits.excess(result.predicted, drop)
        for name, value in excess.items():
            trial.set_constraint(name, value)
        self.study.tell(trial, self._values(result))


def read_trials(path: Path) -> list[TrialResult]:
    """Finished trials of a run; a half-written last line is left out and cut off.

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
                os.truncate(path, good)
                break
            raise RunError(f"{path}:{number}: not a trial: {type(error).__name__}") from None
    else:
        if lines and not lines[-1].endswith(b"\n"):  # the next one needs a line of its own
            with path.open("ab") as file:
                file.write(b"\n")
    return results


def _cannot_write(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return f"{path}: cannot be written: {reason}"


def _storage(settings: StudySettings) -> Any:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if settings.storage is None:
        path = str(settings.folder / "study.journal")
        return optuna.storages.JournalStorage(JournalFileBackend(path))
    try:
        return optuna.storages.get_storage(settings.storage)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"--storage {settings.storage}: {reason}") from None


def _sampler(settings: StudySettings, done: int) -> BaseSampler:
    """A sampler by name, seeded anew at each resume, or the one that was given."""
    import optuna

    if not isinstance(settings.sampler, str):
        return settings.sampler
    seed = settings.seed + done
    name = settings.sampler.lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, warn_independent_sampling=False
            )
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
    raise RunError(f"--sampler {settings.sampler!r}: {nearest(settings.sampler, SAMPLERS)}")
