"""How long the two reference searches take, and what a trial spends beside evaluating.

    python benchmarks/search_time.py         # about 4 minutes on two cores

The default search (mnist) and 60 trials of ResNet-20 in the `mixed` space on 2,000 validation
images, each through the command line in a fresh process with MLflow on. "Overhead" is the wall
time of the trials less the time in which they evaluate (validation, and the second inputs where a
pick is at stake): asking, assembling, opening the session, telling, writing and logging. Polished
trials, which refit weights, are counted apart. The ResNet-20 part needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record

RESNET20 = str(Path(__file__).parent / "tasks" / "cifar10.py:resnet20")


class Clock:
    """Notes when trials begin and end, from inside the process of the search."""

    SOURCE = """
import json, sys, time
import autoquant
marks = []
class Clock(autoquant.Callback):
    def start(self, study, layers, done):
        marks.append((time.perf_counter(), False))
    def trial(self, result):
        marks.append((time.perf_counter(), result.candidate.polish))
options = json.loads(sys.argv[1])
front = autoquant.search(options.pop("task"), callbacks=[Clock()], **options)
wall, polishing = (
    sum(b[0] - a[0] for a, b in zip(marks, marks[1:]) if b[1] is polish) for polish in (False, True)
)
print(json.dumps({"wall": wall, "polishing": polishing, "members": len(front.members)}))
"""


def measure(task: str, trials: int, folder: str) -> dict[str, object]:
    """One search in a fresh process."""
    options = {"task": task, "trials": trials, "name": "timed", "runs_dir": folder, "seed": 0}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", Clock.SOURCE, json.dumps(options)],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    text = (Path(folder) / "timed" / "trials.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    stages = [line["stages"] for line in lines if not line["candidate"]["polish"]]
    polishing = [line["stages"] for line in lines if line["candidate"]["polish"]]
    evaluating = sum(s.get("evaluate", 0.0) + s.get("second", 0.0) for s in stages)
    count = len(stages)
    return {
        "seconds": round(seconds, 1),
        "trials": len(lines),
        "polished": len(polishing),
        "polish_seconds": round(found["polishing"], 1),
        "members": found["members"],
        "trial_ms": round(1e3 * found["wall"] / count, 1),
        "evaluate_ms": round(1e3 * evaluating / count, 1),
        "compress_ms": round(1e3 * sum(s.get("compress", 0.0) for s in stages) / count, 1),
        "open_ms": round(1e3 * sum(s.get("open", 0.0) for s in stages) / count, 1),
        "overhead_ms": round(1e3 * (found["wall"] - evaluating) / count, 1),
    }


def main() -> None:
    """Both searches, the bars, the record."""
    searches, missed = {}, []
    for name, task, trials in (("mnist", "mnist", 60), ("resnet20", RESNET20, 60)):
        with tempfile.TemporaryDirectory() as folder:
            found = measure(task, trials, folder)
        searches[name] = found
        print(json.dumps({name: found}), flush=True)
        if found["seconds"] > 180:
            missed.append(f"{name}: {found['seconds']} s, bar 180")
        if found["overhead_ms"] > 100:
            missed.append(f"{name}: {found['overhead_ms']} ms a trial beside evaluation, bar 100")
        if name == "mnist" and found["members"] < 5:
            missed.append(f"{name}: {found['members']} members, bar 5")
    record("search_time", {"searches": searches, "missed": missed})
    print("missed:", missed or "nothing")


if __name__ == "__main__":
    main()
