"""The ask/tell loop, with an executor that makes scores up: nothing is built or run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from small_task import SPACE, TWO, context, uniform

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.errors import RunError
from autoquant.result import Score, TrialResult
from autoquant.search import study as studies
from autoquant.search.study import (
    SAMPLERS,
    Callback,
    Study,
    StudySettings,
    divergence_at,
    read_trials,
    uniform_candidates,
)
from autoquant.search.trial import Against, Context, Limits

OBJECTIVES = ("accuracy", "latency_ms", "size_bytes")
FREE = {name: (FLOAT, LayerChoice(8, 8), LayerChoice(4, 8)) for name in "abc"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """64 candidates: four choices for each of three layers."""
    return context(tmp_path_factory.mktemp("small"), SPACE)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """8 candidates: two choices for each of three layers."""
    return context(tmp_path_factory.mktemp("eight"), TWO)


class Fake:
    """Up to ``slots`` trials at a time, the latest first; wider weights score better.

    ``before`` hears of every trial that is about to finish, and may raise.
    """

    def __init__(
        self,
        context: Context,
        slots: int = 1,
        before: Callable[[TrialResult], TrialResult | None] = lambda _: None,
    ) -> None:
        self.context, self.slots, self.before = context, slots, before
        self.workers, self.retries = slots, 0
        self.queue: list[tuple[Candidate, int, int]] = []
        self.against: dict[int, Against | None] = {}
        self.most = 0

    def submit(
        self,
        candidate: Candidate,
        trial: int,
        seed: int,
        against: Against | None = None,
        save: Path | None = None,
    ) -> None:
        self.queue.append((candidate, trial, seed))
        self.against[trial] = against
        self.most = max(self.most, len(self.queue))

    def wait(self) -> TrialResult:
        candidate, trial, seed = self.queue.pop()
        predicted = self.context.cost.predict(candidate)
        value = predicted.average_weight_bits / 64
        score = Score("top1", value, 0.01, 0.1, 0.01, 96, "validation", 0.5 - value)
        result = TrialResult(trial, candidate, "complete", score, predicted, seed=seed)
        return self.before(result) or result

    def close(self) -> None:
        self.queue.clear()


def settings(folder: Path, **changes: Any) -> StudySettings:
    fields: dict[str, Any] = {
        "name": "one",
        "folder": folder,
        "objectives": OBJECTIVES,
        "trials": 12,
        "timeout": None,
        "sampler": "tpe",
        "seed": 0,
        "storage": None,
    }
    return StudySettings(**{**fields, **changes})


def open_study(
    context: Context,
    folder: Path,
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **changes: Any,
) -> Study:
    """A study that starts with the uniform candidates, as a search's does."""
    first = lambda: [("uniform", c) for c in uniform_candidates(context.choices)]  # noqa: E731
    return Study(context, settings(folder, **changes), resume, first, say=say)


def keys(results: Sequence[TrialResult]) -> list[str]:
    return [r.candidate.key for r in results]


# --- first candidates -------------------------------------------------------------------------


def test_uniform_candidates_go_from_float_down() -> None:
    found = uniform_candidates(FREE)
    assert [c.choice("a") for c in found] == [FLOAT, LayerChoice(8, 8), LayerChoice(4, 8)]
    assert all(len(set(c.layers.values())) == 1 for c in found)


def test_a_layer_without_the_choice_takes_the_nearest() -> None:
    choices: Mapping[str, Sequence[LayerChoice]] = {
        "a": (LayerChoice(2, 8), LayerChoice(8, 8)),
        "b": (LayerChoice(4, 8),),
        "c": (LayerChoice(8, 4), LayerChoice(8, 8), FLOAT),
    }
    found = {str(c.choice("c")): c for c in uniform_candidates(choices)}
    assert found["float"].choice("a") == LayerChoice(8, 8)
    assert found["8/4"].choice("a") == LayerChoice(8, 8)
    assert all(c.choice("b") == LayerChoice(4, 8) for c in found.values())
    assert len(keys_of := {c.key for c in uniform_candidates(choices)}) == len(
        uniform_candidates(choices)
    ), keys_of


def test_a_new_study_runs_the_uniform_candidates_first(small: Context, tmp_path: Path) -> None:
    study = open_study(small, tmp_path, trials=6)
    assert study.run(Fake(small), []) == "trials"
    assert [r.candidate for r in study.results[:4]] == [uniform(b) for b in (32, 8, 4, 2)]


# --- trials -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [*SAMPLERS, "TPE"])
def test_every_sampler_runs_as_many_trials_as_asked(
    small: Context, tmp_path: Path, sampler: str
) -> None:
    study = open_study(small, tmp_path, sampler=sampler, trials=20)
    assert study.run(Fake(small), []) == "trials"
    assert len(set(keys(study.results))) == len(study.results) == 20
    assert [r.to_dict() for r in read_trials(tmp_path / "trials.jsonl")] == [
        r.to_dict() for r in study.results
    ]


def test_any_sampler_of_optuna_will_do(small: Context, tmp_path: Path) -> None:
    sampler = optuna.samplers.RandomSampler(seed=3)
    study = open_study(small, tmp_path, sampler=sampler)
    assert study.run(Fake(small), []) == "trials" and study.study.sampler is sampler


@pytest.mark.parametrize("sampler", ["NSGAIIISampler", "qmc", "nsgaii"])
def test_samplers_of_optuna_go_by_their_names(small: Context, tmp_path: Path, sampler: str) -> None:
    study = open_study(small, tmp_path, sampler=sampler, trials=6)
    assert study.run(Fake(small), []) == "trials"
    assert type(study.study.sampler).__name__.lower().startswith(sampler.lower()[:3])


def test_a_sampler_that_needs_more_than_a_name_is_an_error(small: Context, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--sampler 'grid': needs more than a name") as caught:
        open_study(small, tmp_path, sampler="grid")
    assert "\n" not in str(caught.value)


def test_an_unknown_sampler_is_an_error(small: Context, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--sampler 'tpa': did you mean 'tpe'"):
        open_study(small, tmp_path, sampler="tpa")


def test_an_exhausted_space_ends_the_search(eight: Context, tmp_path: Path) -> None:
    study = open_study(eight, tmp_path, trials=50)
    assert study.run(Fake(eight), []) == "exhausted"
    assert len(study.results) == 8 and len(set(keys(study.results))) == 8


@pytest.mark.parametrize("slots", [1, 3])
def test_no_candidate_runs_twice(small: Context, tmp_path: Path, slots: int) -> None:
    started: list[str] = []
    executor = Fake(small, slots)
    submit = executor.submit

    def spy(*given: Any) -> None:
        started.append(given[0].key)
        submit(*given)

    executor.submit = spy  # type: ignore[method-assign]
    study = open_study(small, tmp_path, trials=50)
    assert study.run(executor, []) == "trials"
    assert len(started) == len(set(started)) == 50
    assert executor.most == slots


def test_a_space_of_one_candidate_is_one_trial(small: Context, tmp_path: Path) -> None:
    fixed = replace(small, choices={n: c[-1:] for n, c in small.choices.items()})
    study = open_study(fixed, tmp_path)
    assert study.run(Fake(fixed), []) == "exhausted"
    assert [r.candidate for r in study.results] == [uniform(32)]


def test_the_same_seed_asks_for_the_same_candidates(small: Context, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        study = open_study(small, tmp_path / name, seed=seed, trials=30)
        study.run(Fake(small), [])
        found.append(keys(study.results))
    assert found[0] == found[1] != found[2]


def test_a_trial_is_on_disk_before_anyone_hears_of_it(small: Context, tmp_path: Path) -> None:
    class Reader(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def trial(self, result: TrialResult) -> None:
            lines = (tmp_path / "trials.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["trial"] == result.trial
            self.seen.append(result.trial)

    reader = Reader()
    study = open_study(small, tmp_path)
    study.run(Fake(small, slots=2), [reader])
    assert reader.seen == [r.trial for r in study.results] and len(reader.seen) == 12


def test_failed_trials_are_recorded_and_the_search_goes_on(small: Context, tmp_path: Path) -> None:
    def fail(result: TrialResult) -> TrialResult | None:
        if result.candidate == uniform(4):
            return replace(result, status="failed", score=None, predicted=None, error="broken")
        return None

    study = open_study(small, tmp_path)
    assert study.run(Fake(small, before=fail), []) == "trials"
    failed = [r for r in read_trials(tmp_path / "trials.jsonl") if r.status == "failed"]
    assert [(r.candidate, r.error) for r in failed] == [(uniform(4), "broken")]
    assert len(study.results) == 12
    state = study.study.trials[failed[0].trial].state
    assert state == optuna.trial.TrialState.FAIL


def test_a_broken_limit_is_a_constraint_for_optuna(small: Context, tmp_path: Path) -> None:
    largest = small.cost.predict(uniform(8)).size_bytes
    limited = replace(small, limits=Limits(size_bytes=largest))

    def check(result: TrialResult) -> TrialResult | None:
        if result.predicted is not None and result.predicted.size_bytes > largest:
            return replace(result, status="infeasible", score=None)
        return None

    study = open_study(limited, tmp_path, trials=20)
    assert study.run(Fake(limited, before=check), []) == "trials"
    infeasible = [r for r in study.results if r.status == "infeasible"]
    assert infeasible
    told = study.study.trials
    for result in study.results:
        assert result.predicted is not None
        (value,) = told[result.trial].constraints.values()
        assert (value > 0) == (result.status == "infeasible")
        assert value == pytest.approx(result.predicted.size_bytes / largest - 1)
    assert limited.evaluator.reference is not None
    for result in infeasible:  # not evaluated: no divergence is the bound
        assert told[result.trial].values[0] == 0.0
        assert told[result.trial].user_attrs["bound"]


# --- signals, rivals, patience ----------------------------------------------------------------


@pytest.mark.parametrize("signal", ["divergence", "metric"])
def test_what_optuna_stores_is_recorded(small: Context, tmp_path: Path, signal: str) -> None:
    study = open_study(small, tmp_path, sampler="surrogate", signal=signal)
    study.run(Fake(small), [])
    first = "divergence" if signal == "divergence" else "accuracy"
    assert study.study.metric_names == [first, "latency_ms", "size_bytes"]
    assert study.study.user_attrs["targets"]["signal"] == signal
    for result in study.results:
        told = study.study.trials[result.trial]
        assert result.score is not None and result.predicted is not None
        wanted = result.score.divergence
        if signal == "metric":  # as float's, less the drop on the same samples
            assert small.evaluator.reference is not None
            wanted = small.evaluator.reference.value - result.score.drop
        assert told.values == [wanted, result.predicted.latency_ms, result.predicted.size_bytes]
        assert told.user_attrs["accuracy"] == result.score.value


def prior(context: Context) -> dict[str, dict[str, tuple[float, ...]]]:
    table = {n: tuple(2.0**-c.weight_bits for c in f) for n, f in context.choices.items()}
    return {"made up": table}


def test_with_a_prior_the_surrogate_learns_and_says_what(small: Context, tmp_path: Path) -> None:
    study = Study(small, settings(tmp_path, sampler="surrogate"), False, priors=prior(small))
    assert study.learned() is None
    study.run(Fake(small), [])
    learned = study.learned()
    assert learned is not None and learned["signal"] == "divergence"
    assert set(learned["layers"]) == set(small.choices) and learned["trials"] == 12
    assert len(set(keys(study.results))) == 12


def test_a_divergence_is_of_use_while_the_metric_is() -> None:
    told = [(0.01, 0.91), (0.2, 0.83), (0.8, 0.70), (3.2, 0.2), (0.0, 0.9)]
    assert divergence_at(0.8, told) == pytest.approx(0.4)
    assert divergence_at(0.8, told[:2]) is None and divergence_at(0.95, told) is None
    assert divergence_at(0.8, []) is None


@pytest.mark.parametrize("signal", ["divergence", "metric"])
def test_the_sampler_hears_where_the_front_begins(
    small: Context, tmp_path: Path, signal: str
) -> None:
    def falls(result: TrialResult) -> TrialResult:
        assert result.score is not None and result.score.divergence is not None
        return replace(result, score=replace(result.score, drop=result.score.divergence / 2))

    study = open_study(small, tmp_path, sampler="surrogate", signal=signal)
    study.run(Fake(small, before=falls), [])
    assert small.evaluator.reference is not None
    reference = small.evaluator.reference.value
    worst = study._surrogate().worst
    assert worst is not None
    if signal == "metric":
        assert worst() == pytest.approx(0.9 * reference)
        return
    seen = sorted({r.score.divergence for r in study.results if r.score and r.score.divergence})
    good = [d for d in seen if d <= 0.2 * reference]
    assert worst() == pytest.approx((good[-1] * seen[len(good)]) ** 0.5)
    limited = replace(small, limits=Limits(drop=good[-1] / 2 - 1e-9))
    study = Study(limited, study.settings, True)
    assert limited.evaluator.reference is not None and len(good) > 1
    assert study._worst() == pytest.approx((good[-2] * good[-1]) ** 0.5)


def test_a_trial_is_compared_with_the_best_member_that_costs_no_more(
    small: Context, tmp_path: Path
) -> None:
    def keep(result: TrialResult) -> TrialResult:
        return replace(result, evidence=f"of {result.trial}")

    executor = Fake(small, before=keep)
    study = open_study(small, tmp_path, trials=20)
    study.run(executor, [])
    names = ("latency_ms", "size_bytes")
    compared = 0
    for number, against in executor.against.items():
        assert against is not None
        if against.origin == "uniform":
            assert against.trial is None and against.evidence is None
        if against.trial is None:
            continue
        compared += 1
        by_trial = {r.trial: r for r in study.results}
        own, rival = by_trial[number].predicted, by_trial[against.trial].predicted
        assert against.evidence == f"of {against.trial}"
        assert all(getattr(rival, n) <= getattr(own, n) for n in names)
    assert compared


def test_trials_with_second_inputs_stand_for_trials_at_their_cost(
    small: Context, tmp_path: Path
) -> None:
    def is_seen(trial: int) -> bool:
        return trial < 4 or trial % 2 == 0

    def second(result: TrialResult) -> TrialResult:
        assert executor.against[result.trial] is not None
        origin = "solver" if result.trial < 4 else "sampler"
        return replace(result, origin=origin, second=0.1 if is_seen(result.trial) else None)

    executor = Fake(small, before=second)
    first = lambda: [("solver", c) for c in uniform_candidates(small.choices)]  # noqa: E731
    study = Study(small, settings(tmp_path, trials=30), False, first)
    study.run(executor, [])
    by_trial, refined = {r.trial: r for r in study.results}, set()
    for number, against in executor.against.items():
        assert against is not None
        if number < 4:
            assert against.origin == "solver" and not against.picks
        for pick in against.picks:
            own, other = by_trial[number].predicted, by_trial[pick.trial].predicted
            assert own is not None and other is not None
            assert is_seen(pick.trial) and pick.trial < number and pick.second == 0.1
            assert pick.accuracy == by_trial[pick.trial].score.value  # type: ignore[union-attr]
            assert own.size_bytes <= other.size_bytes <= 1.05 * own.size_bytes
            refined.add(pick.trial >= 4)
    assert refined == {True, False}


def test_stopped_trials_are_told_and_are_no_members(small: Context, tmp_path: Path) -> None:
    def stop(result: TrialResult) -> TrialResult | None:
        if result.trial % 4 or result.score is None:
            return None
        return replace(result, status="stopped", score=replace(result.score, samples=24))

    study = open_study(small, tmp_path, sampler="surrogate", trials=16)
    assert study.run(Fake(small, before=stop), []) == "trials"
    stopped = [r for r in study.results if r.status == "stopped"]
    assert len(stopped) == 4
    for result in stopped:
        told = study.study.trials[result.trial]
        assert told.state == optuna.trial.TrialState.COMPLETE and told.user_attrs["samples"] == 24
    assert not {r.trial for r in stopped} & {r.trial for r in study.leading}


def test_a_front_that_does_not_move_ends_the_search(small: Context, tmp_path: Path) -> None:
    def worse(result: TrialResult) -> TrialResult | None:
        if result.trial < 4 or result.score is None:
            return None
        return replace(result, score=replace(result.score, value=-1.0))

    study = open_study(small, tmp_path, trials=60, patience=7)
    assert study.run(Fake(small, before=worse), []) == "patience"
    sizes = {r.predicted.size_bytes for r in study.leading if r.predicted}
    assert len(study.results) < 30 and sizes
    last = max(r.trial for r in study.leading)
    assert len(study.results) == last + 1 + 7


# --- limits that change -----------------------------------------------------------------------


def within(context: Context) -> Callable[[TrialResult], TrialResult | None]:
    """Judge as a trial does: what is too large is not evaluated."""

    def judge(result: TrialResult) -> TrialResult | None:
        assert result.predicted is not None
        excess = max(context.limits.excess(result.predicted, None).values(), default=0.0)
        return replace(result, status="infeasible", score=None) if excess > 0 else None

    return judge


def test_old_trials_count_under_the_limits_of_now(small: Context, tmp_path: Path) -> None:
    sizes = sorted(small.cost.predict(uniform(b)).size_bytes for b in (2, 4, 8, 32))
    tight = replace(small, limits=Limits(size_bytes=sizes[1]))
    loose = replace(small, limits=Limits(size_bytes=sizes[2]))
    study = open_study(loose, tmp_path, sampler="surrogate", trials=15)
    study.run(Fake(loose, before=within(loose)), [])
    unscored = [r for r in study.results if r.score is None]
    assert unscored

    study = open_study(tight, tmp_path, resume=True, sampler="surrogate", trials=18)
    assert len(study.results) == 15
    for result in study.results:
        assert result.predicted is not None
        feasible = result.predicted.size_bytes <= sizes[1]
        assert result.status == ("complete" if feasible else "infeasible")
        (excess,) = study.study.trials[result.trial].constraints.values()
        assert (excess <= 0) == feasible
        assert {r.trial for r in study.leading} <= {
            r.trial for r in study.results if r.status == "complete"
        }
    assert study.run(Fake(tight, before=within(tight)), []) == "trials"

    again = open_study(small, tmp_path, resume=True, sampler="surrogate", trials=30)
    assert all(not t.constraints for t in again.study.trials)
    assert again.run(Fake(small), []) == "trials"
    repeated = [r for r in again.results if r.candidate == unscored[0].candidate]
    assert [r.status for r in repeated] == ["infeasible", "complete"]
    lines = [json.loads(x) for x in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == len(again.results) == 30


def test_candidates_that_wait_are_not_lost_when_limits_change(
    small: Context, tmp_path: Path
) -> None:
    open_study(small, tmp_path, trials=2).run(Fake(small), [])
    limited = replace(small, limits=Limits(drop=0.05))
    study = open_study(limited, tmp_path, resume=True, trials=4)
    assert study.run(Fake(limited), []) == "trials"
    assert [r.candidate for r in study.results] == [uniform(b) for b in (32, 8, 4, 2)]
    origins = [t.user_attrs.get("origin") for t in study.study.trials[2:]]
    assert origins == ["uniform", "uniform"]
    for trial in study.study.trials[:2]:
        assert trial.constraints["drop"] == pytest.approx(0.05)


# --- the end of time --------------------------------------------------------------------------


def test_a_timeout_lets_what_runs_finish(
    small: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(studies, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    study = open_study(small, tmp_path, trials=50, timeout=5.0)
    assert study.run(Fake(small, slots=2), []) == "timeout"
    assert 2 <= len(study.results) <= 6
    assert not study.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))


def test_ctrl_c_ends_cleanly_and_can_be_resumed(small: Context, tmp_path: Path) -> None:
    def interrupt(result: TrialResult) -> None:
        if result.trial == 5:
            raise KeyboardInterrupt

    study = open_study(small, tmp_path)
    assert study.run(Fake(small, slots=2, before=interrupt), []) == "interrupted"
    done = len(study.results)
    assert 0 < done < 12
    assert not study.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    again = open_study(small, tmp_path, resume=True)
    assert len(again.results) == done
    assert again.run(Fake(small), []) == "trials"
    assert len(set(keys(again.results))) == len(again.results) == 12


def test_trials_are_a_total(small: Context, tmp_path: Path) -> None:
    open_study(small, tmp_path, trials=6).run(Fake(small), [])
    for total, more in ((10, 4), (10, 0), (7, 0)):
        study = open_study(small, tmp_path, resume=True, trials=total)
        before = len(study.results)
        assert study.run(Fake(small), []) == "trials"
        assert len(study.results) - before == more
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["key"] for line in lines}) == 10


# --- after a crash ----------------------------------------------------------------------------


def crash(context: Context, folder: Path, at: int) -> tuple[Path, TrialResult]:
    """A copy of the run folder as it is while trial number ``at`` runs, and that trial."""
    run, copy = folder / "run", folder / "copy"
    run.mkdir()
    lost = []

    def snapshot(result: TrialResult) -> None:
        if result.trial == at:
            shutil.copytree(run, copy)
            lost.append(result)

    open_study(context, run).run(Fake(context, before=snapshot), [])
    return copy, lost[0]


@pytest.mark.parametrize("tail", ["nothing", "half a line", "a line", "a line without its end"])
def test_after_a_crash_at_most_the_running_trial_is_repeated(
    small: Context, tmp_path: Path, tail: str
) -> None:
    folder, lost = crash(small, tmp_path, 7)
    path = folder / "trials.jsonl"
    before = read_trials(path)
    line = json.dumps(lost.to_dict())
    tails = {"nothing": "", "half a line": line[: len(line) // 2], "a line": line + "\n"}
    with path.open("a") as file:
        file.write(tails.get(tail, line))
    study = open_study(small, folder, resume=True)
    kept = tail.startswith("a line")
    assert keys(study.results) == keys([*before, lost] if kept else before)
    assert study.run(Fake(small), []) == "trials"
    assert len(set(keys(study.results))) == len(study.results) == 12
    assert len({r.trial for r in study.results}) == 12
    assert keys(read_trials(path)) == keys(study.results)
    repeated = study.results[len(before)]
    assert repeated.candidate.key == lost.candidate.key  # asked for again, and first
    assert (repeated.trial == lost.trial) == kept
    states = {t.number: t.state.name for t in study.study.trials}
    assert states[lost.trial] == ("COMPLETE" if kept else "FAIL")
    assert "RUNNING" not in states.values()


def test_a_crash_while_several_trials_run_loses_none(small: Context, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()

    def snapshot(result: TrialResult) -> None:
        if result.trial == 6 and not copy.exists():
            shutil.copytree(run, copy)

    open_study(small, run).run(Fake(small, slots=3, before=snapshot), [])
    before = read_trials(copy / "trials.jsonl")
    study = open_study(small, copy, resume=True)
    assert study.run(Fake(small, slots=3), []) == "trials"
    assert keys(study.results)[: len(before)] == keys(before)
    assert len(set(keys(study.results))) == len(study.results) == 12


def test_a_resumed_study_predicts_no_old_trial_again(
    small: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_study(small, tmp_path, trials=8).run(Fake(small), [])
    again = open_study(small, tmp_path, resume=True, trials=12)

    def refuse(context: Context, candidate: Candidate) -> Any:
        raise AssertionError(candidate)

    monkeypatch.setattr(Context, "predict", refuse)
    assert len(again.results) == 8
    for result in again.results:
        assert again._cost(result.candidate) == result.predicted


def test_a_damaged_line_in_the_middle_is_an_error(small: Context, tmp_path: Path) -> None:
    open_study(small, tmp_path, trials=3).run(Fake(small), [])
    path = tmp_path / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("{}\n", "nonsense\n", "[1]\n", "3\n"):
        path.write_text(lines[0] + damaged + lines[2])
        with pytest.raises(RunError, match=r"trials\.jsonl:2: not a trial"):
            read_trials(path)


def test_reading_does_not_change_what_is_whole(small: Context, tmp_path: Path) -> None:
    open_study(small, tmp_path, trials=3).run(Fake(small), [])
    path = tmp_path / "trials.jsonl"
    text = path.read_bytes()
    assert len(read_trials(path)) == 3 and path.read_bytes() == text
    assert read_trials(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("lost", ["all", "the last"])
def test_a_storage_that_lost_trials_gets_them_again(
    small: Context, tmp_path: Path, lost: str
) -> None:
    tight = replace(small, limits=Limits(size_bytes=small.cost.predict(uniform(8)).size_bytes))

    def judge(result: TrialResult) -> TrialResult | None:
        if result.trial == 2:
            return replace(result, status="failed", score=None, predicted=None, error="broken")
        assert result.predicted is not None
        excess = max(tight.limits.excess(result.predicted, None).values())
        return replace(result, status="infeasible", score=None) if excess > 0 else None

    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()

    def snapshot(result: TrialResult) -> TrialResult | None:
        if result.trial == 9:
            shutil.copytree(run, copy)
        return judge(result)

    whole = open_study(tight, run)
    whole.run(Fake(tight, before=snapshot), [])
    shutil.copy(run / "trials.jsonl", copy)
    if lost == "all":
        (copy / "study.journal").unlink()
    study = open_study(tight, copy, resume=True, trials=15)
    for before, after in zip(whole.results, study.results, strict=True):
        old, new = whole.study.trials[before.trial], study.study.trials[after.trial]
        if new.state == old.state == optuna.trial.TrialState.COMPLETE:
            assert (new.params, new.values) == (old.params, old.values)
            assert new.constraints == old.constraints
        else:
            assert new.state == optuna.trial.TrialState.FAIL
    assert study.run(Fake(tight), []) == "trials"
    assert len({r.trial for r in study.results}) == len(set(keys(study.results))) == 15


# --- a full disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 2])
def test_a_full_disk_ends_with_one_line_and_can_be_resumed(
    small: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(result: TrialResult) -> None:
        if result.trial == 5:
            monkeypatch.setattr(os, "fsync", full)

    study = open_study(small, tmp_path)
    with pytest.raises(RunError, match="No space left on device") as caught:
        study.run(Fake(small, slots, before=fill), [])
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    done = len(read_trials(tmp_path / "trials.jsonl"))
    assert done >= 3  # what is not synced does not count
    again = open_study(small, tmp_path, resume=True)
    assert len(again.results) == done
    assert again.run(Fake(small, slots), []) == "trials"
    assert len(set(keys(again.results))) == len(again.results) == 12


def test_a_full_disk_between_trials_ends_with_one_line(
    small: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(small, tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(study.study, "ask", full)
    with pytest.raises(RunError, match="No space left on device"):
        study.run(Fake(small), [])


# --- storage ----------------------------------------------------------------------------------


def test_sqlite_keeps_a_study_and_resumes_it(small: Context, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(small, tmp_path, storage=url, trials=6)
    assert study.run(Fake(small), []) == "trials"
    again = open_study(small, tmp_path, resume=True, storage=url, trials=9)
    assert again.run(Fake(small), []) == "trials"
    assert len(set(keys(again.results))) == 9
    assert not (tmp_path / "study.journal").exists()
    stored = optuna.load_study(study_name="one", storage=url)
    complete = stored.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(complete) == 9


def test_a_name_that_the_storage_has_is_an_error(small: Context, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    open_study(small, tmp_path, storage=url, trials=2).run(Fake(small), [])
    (tmp_path / "new").mkdir()
    with pytest.raises(RunError, match="'one'") as caught:
        open_study(small, tmp_path / "new", storage=url)
    assert "--storage" in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////dev/null/x.db", "redis://"])
def test_a_storage_that_cannot_be_opened_is_one_line(
    small: Context, tmp_path: Path, url: str
) -> None:
    with pytest.raises(RunError, match="--storage") as caught:
        open_study(small, tmp_path, storage=url)
    assert "\n" not in str(caught.value)
