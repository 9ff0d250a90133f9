"""How a search goes: its pace, its log file, and what a live or dead run has come to."""

from __future__ import annotations

import collections
import datetime
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import RunError
from autoquant.front import Front, find_run, members_of
from autoquant.result import TrialResult
from autoquant.search.run import LOCK, is_alive, read_owner, write_text
from autoquant.search.study import Callback, read_trials

LOG, STATUS = "search.log", "status.json"
_WINDOW = 50  # trials that a pace is taken over


class Pace:
    """Trials a minute over the last trials, and the time left at that."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self.workers, self.retries = 0, 0
        self.times = collections.deque([time.monotonic()], maxlen=_WINDOW + 1)

    def tick(self) -> None:
        """A trial is finished."""
        self.done += 1
        self.times.append(time.monotonic())

    @property
    def trials_per_minute(self) -> float | None:
        """None before the first trial."""
        took = self.times[-1] - self.times[0]
        return 60 * (len(self.times) - 1) / took if took > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """For the trials that are to come; None before the first."""
        rate = self.trials_per_minute
        return None if not rate else max(0, self.total - self.done) / rate * 60

    def to_dict(self) -> dict[str, Any]:
        """What status.json holds of it."""
        return {
            "workers": self.workers,
            "retries": self.retries,
            "trials_per_minute": self.trials_per_minute,
            "seconds_left": self.seconds_left,
        }

    def __str__(self) -> str:
        parts = [f"{self.workers} worker" + "s" * (self.workers != 1)] if self.workers else []
        if self.trials_per_minute is not None:
            parts.append(f"{self.trials_per_minute:.3g} trials/min")
        if self.retries:
            parts.append("1 retry" if self.retries == 1 else f"{self.retries} retries")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RunLog(Callback):
    """Writes search.log, a line a stage and a trial, and status.json, at most once a second.

    Both are for people and for `status`; a disk that refuses them stops nothing.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.now = folder, ""
        self.pace_of = Pace(total, 0)
        self.written = 0.0

    def stage(self, text: str) -> None:
        """A line, and the stage of status.json."""
        self.now = text
        self._log(text)
        self._status(force=True)

    def start(
        self,
        study: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        done: Sequence[TrialResult],
    ) -> None:
        """Trials begin."""
        self.pace_of = Pace(study["trials"], len(done))
        self.stage(f"{study['trials']} trials over {len(layers)} layers, {len(done)} done before")

    def trial(self, result: TrialResult) -> None:
        """A line: number, status, score, and how fast it goes."""
        self.pace_of.tick()
        score = "" if result.score is None else f" {result.score.value:.4f}"
        why = "" if result.error is None else f" ({result.error})"
        self._log(f"trial {result.trial} {result.status}{score}{why}; {self.pace_of}")

    def pace(self, workers: int, retries: int) -> None:
        """Keep status.json up to date."""
        first = not self.pace_of.workers
        self.pace_of.workers, self.pace_of.retries = workers, retries
        self._status(force=first)

    def finish(self, front: Front) -> None:
        """The last line."""
        self.stage(f"finished: {len(front.members)} members of the front")

    def _log(self, text: str) -> None:
        stamp = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
        try:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(f"{stamp} {text}\n")
        except OSError:
            return

    def _status(self, force: bool = False) -> None:
        if not force and time.monotonic() - self.written < 1:
            return
        self.written = time.monotonic()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        document = {"time": now, "stage": self.now, **self.pace_of.to_dict()}
        try:
            write_text(self.folder / STATUS, json.dumps(document) + "\n", sync=False)
        except RunError:
            return


def status(run: str | Path, runs_dir: str | Path = "runs") -> dict[str, Any]:
    """What a run has come to, read without touching it: whether its driver lives, its trials by
    status, the members of the front so far, its pace when it was last heard of.

    Raises RunError where there is no such run.
    """
    folder = find_run(run, runs_dir)
    try:
        study = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
        total, objectives = int(study["trials"]), tuple(study["objectives"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise RunError(f"{folder / 'study.yaml'}: does not say what the run is") from None
    results = read_trials(folder / "trials.jsonl", repair=False)
    counts = Counter(r.status for r in results)
    alive = is_alive(folder)
    last: dict[str, Any] = {}
    try:
        last = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = {}
    verified = (folder / "front.json").is_file()
    state = "running" if alive else "finished" if verified else "dead"
    if not alive and verified and len(results) < total:
        state = "ended early"
    errors = [r for r in results if r.status == "failed"]
    return {
        "run": folder.name,
        "state": state,
        "owner": read_owner(folder / LOCK) if alive else None,
        "last_heard_of": last.get("time"),
        "stage": last.get("stage"),
        "trials": len(results),
        "total": total,
        **{name: counts[name] for name in ("complete", "stopped", "infeasible", "failed")},
        "members": len(members_of(results, objectives)),
        "last_error": None if not errors else errors[-1].error,
        **{
            name: last.get(name)
            for name in ("workers", "retries", "trials_per_minute", "seconds_left")
        },
    }
