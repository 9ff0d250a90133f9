from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from small_task import SPACE, context, profile, settings, task, uniform, write_task_file

from autoquant.candidate import Candidate
from autoquant.errors import RunError
from autoquant.result import TrialResult
from autoquant.search import executor as executors
from autoquant.search import search
from autoquant.search.executor import AHEAD, KILLS, Executor, InProcess, RayExecutor
from autoquant.search.trial import Context, prepare
from autoquant.tasks import load_task

CANDIDATES = [uniform(8), uniform(4, 8, 32), uniform(2), uniform(32), uniform(2, 8, 4)]

METRIC = """

import os
import signal


def accuracy(outputs, targets):
    folder = Path(__file__).parent
    for name, once in (("kill-once", True), ("kill", False)):
        if (folder / name).exists():
            if once:
                (folder / name).unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return float((outputs.argmax(1) == targets).mean())


def with_metric():
    from dataclasses import replace

    return replace(task(), metric=accuracy)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def cluster(small: Context) -> Iterator[RayExecutor]:
    """Starts Ray once; the other executors of this module join it."""
    executor = RayExecutor(small, 2)
    assert executor.started
    yield executor
    executor.close()
    assert not ray.is_initialized()


def outcome(executor: Executor, candidates: list[Candidate]) -> dict[int, TrialResult]:
    """All trials, as many at a time as there are slots."""
    results: dict[int, TrialResult] = {}
    waiting = list(enumerate(candidates))
    running = 0
    while waiting or running:
        while waiting and running < executor.slots:
            number, candidate = waiting.pop(0)
            executor.submit(candidate, number, 0)
            running += 1
        result = executor.wait()
        results[result.trial] = result
        running -= 1
    return results


def same(a: TrialResult, b: TrialResult) -> bool:
    return replace(a, seconds=None) == replace(b, seconds=None)


def test_ray_and_this_process_find_the_same(small: Context, cluster: RayExecutor) -> None:
    here = outcome(InProcess(small), CANDIDATES)
    there = outcome(cluster, CANDIDATES)
    assert cluster.workers == 2 and cluster.slots == 2 + AHEAD
    assert sorted(there) == sorted(here) == list(range(5))
    for number, result in here.items():
        assert result.status == "complete" and result.sha256
        assert same(result, there[number])


def test_results_carry_trial_seed_and_stages(small: Context) -> None:
    executor = InProcess(small)
    executor.submit(uniform(8), 7, 3)
    result = executor.wait()
    assert (result.trial, result.seed) == (7, 3)
    assert result.seconds is not None and set(result.seconds) == {"compress", "open", "evaluate"}
    executor.submit(uniform(8), 8, 3)
    executor.close()
    assert not executor.queue


def with_metric(folder: Path) -> Context:
    spec = write_task_file(folder, METRIC).replace(":task", ":with_metric")
    return prepare(load_task(spec), space=SPACE, hardware=profile())


def test_a_metric_of_a_task_file_reaches_the_workers(
    cluster: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = with_metric(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    here = outcome(InProcess(found), CANDIDATES[:2])
    executor = RayExecutor(found, 2)
    there = outcome(executor, CANDIDATES[:2])
    executor.close()
    assert ray.is_initialized()  # it was there before
    for number, result in here.items():
        assert result.score is not None and result.score.metric == "accuracy"
        assert same(result, there[number])


def test_what_a_neighbour_of_a_task_file_defines_reaches_the_workers(
    cluster: RayExecutor, tmp_path: Path
) -> None:
    (tmp_path / "neighbour_of_a_task.py").write_text(
        "class Halved:\n    def __call__(self, outputs, targets):\n"
        "        return float((outputs.argmax(1) == targets).mean()) / 2\n"
    )
    more = "\n\ndef halved():\n    from dataclasses import replace\n"
    more += (
        "    from neighbour_of_a_task import Halved\n    return replace(task(), metric=Halved())\n"
    )
    spec = write_task_file(tmp_path, more).replace(":task", ":halved")
    found = prepare(load_task(spec), space=SPACE, hardware=profile())
    here = outcome(InProcess(found), CANDIDATES[:2])
    executor = RayExecutor(found, 2)
    there = outcome(executor, CANDIDATES[:2])
    executor.close()
    for number, result in here.items():
        assert result.status == "complete" and same(result, there[number])


def test_a_trial_whose_worker_died_runs_again(cluster: RayExecutor, tmp_path: Path) -> None:
    found = with_metric(tmp_path)
    here = outcome(InProcess(found), CANDIDATES[:3])
    (tmp_path / "kill-once").touch()
    executor = RayExecutor(found, 2)
    there = outcome(executor, CANDIDATES[:3])
    executor.close()
    assert not (tmp_path / "kill-once").exists()
    assert all(same(result, there[number]) for number, result in here.items())


def test_a_trial_that_kills_every_worker_fails(cluster: RayExecutor, tmp_path: Path) -> None:
    found = with_metric(tmp_path)
    (tmp_path / "kill").touch()
    executor = RayExecutor(found, 1)
    result = outcome(executor, CANDIDATES[:1])[0]
    executor.close()
    assert result.status == "failed" and result.candidate == CANDIDATES[0]
    assert f"set aside: {KILLS} workers died" in str(result.error)


def test_a_search_on_ray_finds_what_one_in_this_process_does(
    cluster: RayExecutor, tmp_path: Path
) -> None:
    found = []
    for name, workers in (("here", 1), ("there", 2)):
        front = search(task(tmp_path), settings(tmp_path, name=name, workers=workers, trials=4))
        lines = (tmp_path / "runs" / name / "trials.jsonl").read_text().splitlines()
        assert len(lines) == 4
        found.append({m.key: (m.searched, m.predicted) for m in front.members})
    assert found[0] == found[1]  # four trials: the uniform candidates


def test_an_address_where_nothing_answers_is_one_line(
    small: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("nothing\nthere")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(RunError, match="cannot connect: nothing there") as caught:
        RayExecutor(small, 2, "10.0.0.1:6379")
    assert "--ray-address 10.0.0.1:6379" in str(caught.value)


def test_ray_that_does_not_start_is_one_line(
    small: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(RunError, match="--workers 2: Ray cannot start: no memory"):
        RayExecutor(small, 2)


def test_one_worker_is_this_process(small: Context) -> None:
    assert isinstance(executors.make(small, 1, None), InProcess)


def test_trials_do_not_carry_the_network_that_was_lowered(tmp_path: Path) -> None:
    """Its classes may be of a module that no worker can import."""
    found = context(tmp_path)
    assert found.variants is not None and found.variants.task.model == ""
