"""What a search costs beside its trials: the driver at 2,000 trials, many workers, Ray's share.

    python benchmarks/scale.py             # about 12 minutes
    python benchmarks/scale.py driver      # one part: driver, workers, overhead, throughput

All with ResNet-20, its measured priors, the default sampler and the `mixed` space, on a device
whose latency is predicted (`cortex-a72`). Needs AUTOQUANT_DATA.

`driver`: 2,000 trials whose results are made up, so that nothing but asking, telling and logging
takes time; the memory of the process; then the run is opened again in a new process. `workers`: 64
and 512 of them, which sleep for times drawn from a log-normal distribution (sigma .5). Their clock
skips what all of them sleep; what the driver takes is real and counts. `overhead`: two Ray workers
and trials that sleep .45 s in the place of evaluating. `throughput`: two Ray workers, and two bare
processes that run the same candidates beside each other, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import heapq
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import RESULTS, record

from autoquant.candidate import Candidate
from autoquant.evaluate import Evaluator
from autoquant.result import TrialResult
from autoquant.search import _priors, first_candidates, mean_of
from autoquant.search.executor import RayExecutor, _ship_task_files, resident_bytes
from autoquant.search.status import RunLog
from autoquant.search.study import Study, StudySettings
from autoquant.search.trial import Against, Context, prepare, run_trial
from autoquant.tasks import load_task

TASK = f"{Path(__file__).parent / 'tasks' / 'cifar10.py'}:resnet20"
OBJECTIVES = ("accuracy", "latency_ms", "size_bytes")
PARTS = ("driver", "workers", "overhead", "throughput")
TRIALS = 2000
WARM = 6  # trials that start the workers, before the clock

REOPEN = """
import json, pickle, sys, time
from pathlib import Path
context, priors, folder, trials = pickle.loads(Path(sys.argv[1]).read_bytes())
sys.path.insert(0, sys.argv[2])
import optuna, scipy.optimize
from scale import opened
start = time.perf_counter()
study = opened(context, priors, folder, trials, resume=True)
middle = time.perf_counter()
next(study._proposals({}))
end = time.perf_counter()
print(json.dumps({"trials": len(study.results), "open_seconds": round(middle - start, 2),
                  "first_ask_seconds": round(end - middle, 2)}))
"""

BARE = """
import pickle, sys, time
from pathlib import Path
context, jobs = pickle.loads(Path(sys.argv[1]).read_bytes())
from autoquant.search.trial import Against, run_trial
run_trial(context, *jobs[0][:1], 0)
print("ready", flush=True)
sys.stdin.readline()
start = time.perf_counter()
for candidate, origin in jobs:
    assert run_trial(context, candidate, 0, 0, against=Against(origin)).status != "failed"
print(time.perf_counter() - start)
"""


def opened(context: Context, priors: Any, folder: Path, trials: int, resume: bool = False) -> Study:
    settings = StudySettings("scale", folder, OBJECTIVES, trials, None, "surrogate", 0, None)
    first = lambda: first_candidates(context, OBJECTIVES, priors, [])  # noqa: E731
    return Study(context, settings, resume, first=first, priors=priors)


class Simulated:
    """Workers that sleep, on a clock that skips the time in which all do nothing else.

    Results follow the priors' mean, times a log-normal of deviation .17 (how far
    sums of divergences were off when measured), on the pattern of a real one.
    """

    retries = 0

    def __init__(self, context: Context, table: Any, pattern: TrialResult, workers: int,
                 seconds: float) -> None:  # fmt: skip
        self.context, self.table, self.pattern = context, table, pattern
        self.slots = self.workers = workers
        self.seconds, self.random = seconds, random.Random(0)
        self.running: list[tuple[float, int, Candidate, Against | None]] = []
        self.skipped, self.made = 0.0, 0.0
        self.slept: list[tuple[float, float]] = []
        self.start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.start + self.skipped - self.made

    def driver(self) -> float:
        """Seconds that were neither slept nor spent on making results up."""
        return time.perf_counter() - self.start - self.made

    def submit(
        self,
        candidate: Candidate,
        trial: int,
        seed: int,
        against: Against | None = None,
        save: Path | None = None,
    ) -> None:
        took = self.seconds * self.random.lognormvariate(-0.125, 0.5)  # its mean is `seconds`
        now = self.now()
        self.slept.append((now, now + took))
        heapq.heappush(self.running, (now + took, trial, candidate, against))

    def wait(self) -> TrialResult:
        end, trial, candidate, against = heapq.heappop(self.running)
        self.skipped += max(0.0, end - self.now())
        before = time.perf_counter()
        found = self.made_up(candidate, trial, against)
        self.made += time.perf_counter() - before
        return found

    def made_up(self, candidate: Candidate, trial: int, against: Against | None) -> TrialResult:
        loss = sum(
            self.table[n][c.index(candidate.layers[n])]
            for n, c in self.context.choices.items()
            if n in candidate.layers
        )
        loss *= math.exp(0.17 * self.random.gauss(0, 1))
        score = self.pattern.score
        assert score is not None
        drop = min(0.8, 0.5 * loss)
        score = replace(score, value=score.value + score.drop - drop, drop=drop, divergence=loss)
        origin = None if against is None else against.origin
        predicted = self.context.predict(candidate)
        return replace(self.pattern, trial=trial, candidate=candidate, score=score,
                       predicted=predicted, origin=origin)  # fmt: skip

    def utilization(self) -> float:
        """The share of time in which workers slept, until the last trial began."""
        last = max(begin for begin, _ in self.slept)
        busy = sum(min(end, last) - begin for begin, end in self.slept)
        return busy / (self.workers * last)

    def close(self) -> None:
        self.running.clear()


@contextlib.contextmanager
def clocks(study: Study) -> Iterator[dict[str, float]]:
    """Seconds in the parts of the loop."""
    spent = dict.fromkeys(("ask", "candidate", "against", "write_and_tell"), 0.0)

    def timed(owner: Any, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                spent[part] += time.perf_counter() - start

        setattr(owner, name, wrapped)

    for owner, name, part in (
        (study.study, "ask", "ask"),
        (study, "_candidate", "candidate"),
        (study, "_against", "against"),
        (study, "_record", "write_and_tell"),
    ):
        timed(owner, name, part)
    yield spent


def pickled(found: Any) -> bytes:
    """With what the task's file defines."""
    from ray import cloudpickle

    _ship_task_files()
    result: bytes = cloudpickle.dumps(found)
    return result


def driver(context: Context, priors: Any, pattern: TrialResult, folder: Path) -> dict[str, Any]:
    """2,000 trials one at a time; then the run is opened again."""
    study = opened(context, priors, folder, TRIALS)
    log = RunLog(folder, TRIALS)
    log.start({"trials": TRIALS}, [], [])
    executor = Simulated(context, mean_of(priors), pattern, 1, 1.0)
    windows = []
    with clocks(study) as spent:
        for total in range(100, TRIALS + 1, 100):
            before, parts = executor.driver(), dict(spent)
            study.run(executor, [log], total)
            found = {
                "trials": total,
                "ms_a_trial": round(10 * (executor.driver() - before), 1),
                **{k: round(10 * (spent[k] - parts[k]), 1) for k in spent},
                "memory_mb": round(resident_bytes() / 1e6),
            }
            windows.append(found)
            print(found, flush=True)
    study.close()
    (folder / "context").write_bytes(pickled((context, priors, folder, TRIALS + 1)))
    done = subprocess.run(
        [sys.executable, "-c", REOPEN, str(folder / "context"), str(Path(__file__).parent)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = ("trials.jsonl", "study.journal")
    sizes = {n: round((folder / n).stat().st_size / 1e6, 2) for n in names}
    return {"windows": windows, "resume": json.loads(done.stdout), "megabytes": sizes}


def workers(context: Context, priors: Any, pattern: TrialResult, folder: Path) -> dict[str, Any]:
    """Many workers, with trials of several lengths."""
    found = {}
    for count, seconds, trials in ((64, 10, 640), (64, 60, 640), (512, 60, 1536), (512, 600, 1536)):
        name = f"{count} workers, {seconds} s"
        place = folder / name
        place.mkdir()
        study = opened(context, priors, place, trials)
        executor = Simulated(context, mean_of(priors), pattern, count, seconds)
        log = RunLog(place, trials)
        log.start({"trials": trials}, [], [])
        study.run(executor, [log], trials)
        found[name] = {
            "trials": trials,
            "hours": round(executor.now() / 3600, 3),
            "utilization": round(executor.utilization(), 3),
            "driver_share": round(executor.driver() / executor.now(), 3),
            "driver_ms_a_trial": round(1e3 * executor.driver() / trials, 1),
            "memory_mb": round(resident_bytes() / 1e6),
        }
        print(name, found[name], flush=True)
        study.close()
    return found


class Whole(RayExecutor):
    """Trials are compared with nothing, so that all of them take their whole time."""

    def submit(
        self,
        candidate: Candidate,
        trial: int,
        seed: int,
        against: Against | None = None,
        save: Path | None = None,
    ) -> None:
        origin = "sampler" if against is None else against.origin
        super().submit(candidate, trial, seed, Against(origin), save)


class Sleeping(Evaluator):
    """Every file has the same score, after some time."""

    found: Any
    seconds: float

    def assess(self, session: Any, evidence: str | None = None) -> Any:
        time.sleep(self.seconds)
        return self.found


def timed_trials(study: Study, executor: Any, log: RunLog, total: int) -> float:
    start = time.perf_counter()
    study.run(executor, [log], total)
    return time.perf_counter() - start


def overhead(context: Context, priors: Any, pattern: TrialResult, folder: Path) -> dict[str, Any]:
    """Wall time a trial and worker beyond the trial's own stages."""
    from autoquant.runtime import RUNTIMES

    session = RUNTIMES[context.hardware.runtime]().open(context.compress(pattern.candidate).model)
    found = context.evaluator.assess(session, None)
    evaluator = copy.copy(context.evaluator)
    evaluator.__class__ = Sleeping
    evaluator.found, evaluator.seconds = found, 0.45  # type: ignore[attr-defined]
    sleeping = replace(context, evaluator=evaluator)
    study = opened(context, priors, folder, 200)
    log = RunLog(folder, 200)
    log.start({"trials": 200}, [], [])
    executor = Whole(sleeping, 2)
    try:
        timed_trials(study, executor, log, WARM)
        seconds = timed_trials(study, executor, log, 106)
    finally:
        executor.close()
    results = study.results[WARM:]
    assert all(r.status != "failed" for r in results), results[0].error
    own = sum(sum((r.seconds or {}).values()) for r in results) / len(results)
    wall = 2 * seconds / len(results)
    return {
        "trials": len(results),
        "trial_seconds": round(own, 3),
        "wall_seconds_a_trial_and_worker": round(wall, 3),
        "overhead": round(wall / own - 1, 3),
    }


def bare(context: Context, jobs: list[tuple[Candidate, str]], folder: Path) -> float:
    """Seconds in which two processes, half of the candidates each, are done."""
    alone = replace(context, evaluator=_one_core(context), inputs=())
    processes = []
    for half in (0, 1):
        path = folder / f"jobs{half}"
        path.write_bytes(pickled((alone, jobs[half::2])))
        command = [sys.executable, "-c", BARE, str(path)]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return max(float(p.communicate()[0]) for p in processes)


def _one_core(context: Context) -> Any:
    evaluator = copy.copy(context.evaluator)
    evaluator.workers = 1
    return evaluator


def throughput(context: Context, priors: Any, pattern: TrialResult, folder: Path) -> dict[str, Any]:
    """Trials a minute of two workers of a search, and of two bare processes, in turns."""
    study = opened(context, priors, folder, 400)
    log = RunLog(folder, 400)
    log.start({"trials": 400}, [], [])
    executor = Whole(context, 2)
    rounds = []
    try:
        timed_trials(study, executor, log, WARM)
        for total in (WARM + 40, WARM + 80, WARM + 120):
            done = len(study.results)
            searching = timed_trials(study, executor, log, total)
            part = study.results[done:]
            alone = bare(context, [(r.candidate, r.origin or "sampler") for r in part], folder)
            found = {
                "trials": len(part),
                "search_trials_a_minute": round(60 * len(part) / searching, 1),
                "bare_trials_a_minute": round(60 * len(part) / alone, 1),
                "share": round(alone / searching, 3),
            }
            rounds.append(found)
            print(found, flush=True)
    finally:
        executor.close()
    searching = sum(r["trials"] / r["search_trials_a_minute"] for r in rounds)
    alone = sum(r["trials"] / r["bare_trials_a_minute"] for r in rounds)
    return {"rounds": rounds, "share": round(alone / searching, 3)}


def missed(found: dict[str, Any]) -> list[str]:
    result = []
    if "driver" in found:
        last, resume = found["driver"]["windows"][-1], found["driver"]["resume"]
        if last["ms_a_trial"] > 100:
            result.append(f"driver: {last['ms_a_trial']} ms a trial at {TRIALS}, bar 100")
        seconds = resume["open_seconds"] + resume["first_ask_seconds"]
        if seconds > 5:
            result.append(f"resume: {seconds} s, bar 5")
    if "overhead" in found and found["overhead"]["overhead"] > 0.1:
        result.append(f"overhead: {found['overhead']['overhead']}, bar .1")
    if "throughput" in found and found["throughput"]["share"] < 0.9:
        result.append(f"throughput: {found['throughput']['share']}, bar .9")
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=[], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    task = load_task(TASK)
    path = RESULTS / "scale.json"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        context = prepare(task, space="mixed", hardware="cortex-a72", cache=folder)
        priors = _priors(context, task, folder, False, print)
        print(f"prepared in {time.perf_counter() - start:.0f} s", flush=True)
        widest = [c[-1] for c in context.choices.values()]
        candidate = Candidate(dict(zip(context.choices, widest, strict=True)))
        pattern = run_trial(context, candidate, 0, against=Against("solver"))
        assert pattern.status == "complete", pattern.error
        found = json.loads(path.read_text()) if path.is_file() else {}
        found = {part: found[part] for part in PARTS if part in found}
        for part in given.parts or PARTS:
            place = folder / part
            place.mkdir()
            function: Callable[..., dict[str, Any]] = globals()[part]
            found[part] = function(context, priors, pattern, place)
            print(part, json.dumps(found[part]), flush=True)
    bars = missed(found)
    record("scale", {"search_seed": 0, **found, "missed": bars}, write=not given.no_record)
    print("missed:", bars or "nothing")


if __name__ == "__main__":
    main()
