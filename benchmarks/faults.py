"""Searches whose workers, nodes and drivers are killed at random, against one left in peace.

    python benchmarks/faults.py              # ten rounds of 200 trials, about 25 minutes
    python benchmarks/faults.py --first 4    # go on after four recorded rounds

Each round is a search of the built-in task on a cluster of two nodes (`ray.cluster_utils.Cluster`,
loopback). SIGKILL ends a worker in the middle of a trial, a node with all its processes (another
takes its place), and the driver (started again with --resume), twice each, at moments drawn from
the round's seed. The undisturbed run has the same search seed, in one process. Counted are
trials whose line vanished or changed, candidates that finished twice, scores that differ from the
undisturbed run's for the same candidate, and the hypervolume.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import RESULTS, record

KILLS = ("worker", "node", "driver") * 2
OPTIONS = ["--hardware", "cortex-a72", "--no-polish"]


def search(folder: Path, name: str, trials: int, *more: str) -> subprocess.Popen[bytes]:
    base = [sys.executable, "-m", "autoquant", "search", "mnist", "--runs-dir", str(folder)]
    fixed = ["--name", name, "--trials", str(trials), "--seed", "0", *OPTIONS, *more]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen([*base, *fixed], stdout=log, stderr=log)


def lines(folder: Path, name: str) -> list[str]:
    path = folder / name / "trials.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [line for line in found if line.endswith("\n")]


def busy_workers() -> list[int]:
    """Processes below this one in which a trial runs: the cluster is started from here."""
    found, parents = [], {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text()
        except OSError:
            continue
        name, rest = stat.split("(", 1)[1].rsplit(")", 1)
        parents[int(path.name)] = int(rest.split()[1])
        if name.startswith("ray::_remote"):
            found.append(int(path.name))

    def below(process: int) -> bool:
        while process > 1 and process != os.getpid():
            process = parents.get(process, 0)
        return process == os.getpid()

    return [process for process in found if below(process)]


def disturbed(folder: Path, name: str, trials: int, seed: int, cluster: Any) -> dict[str, Any]:
    generator = random.Random(seed)
    kills = list(KILLS)
    generator.shuffle(kills)
    moments = sorted(generator.sample(range(trials // 20, trials * 19 // 20), len(kills)))
    address = ["--ray-address", cluster.address, "--workers", "2"]
    driver = search(folder, name, trials, *address)
    seen: list[str] = []
    lost = drivers = workers = nodes = 0
    start = time.monotonic()
    while driver.poll() is None:
        if time.monotonic() - start > 3600:
            driver.kill()
            raise SystemExit(f"round {name}: no end after an hour, see {folder / name}.log")
        now = lines(folder, name)
        lost += sum(a != b for a, b in zip(seen, now, strict=False)) + max(0, len(seen) - len(now))
        seen = now
        if not moments or len(now) < moments[0]:
            time.sleep(0.02)
            continue
        kind = kills[len(kills) - len(moments)]
        if kind == "worker":
            found = busy_workers()
            if not found:
                continue
            os.kill(generator.choice(found), signal.SIGKILL)
            workers += 1
        elif kind == "node":
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
            cluster.add_node(num_cpus=1)
            nodes += 1
        else:
            driver.kill()
            driver.wait()
            seen = lines(folder, name)
            driver = search(folder, name, trials, "--resume", *address)
            drivers += 1
        moments.pop(0)
    if driver.returncode:
        raise SystemExit((folder / f"{name}.log").read_text()[-2000:])
    now = lines(folder, name)
    lost += sum(a != b for a, b in zip(seen, now, strict=False)) + max(0, len(seen) - len(now))
    return {
        "killed": {"workers": workers, "nodes": nodes, "drivers": drivers},
        "finished_trials_lost": lost,
        "seconds": round(time.monotonic() - start, 1),
    }


def compared(folder: Path, name: str, calm: str) -> dict[str, Any]:
    here = [json.loads(line) for line in lines(folder, name)]
    there = {t["key"]: t for t in map(json.loads, lines(folder, calm))}
    keys = [t["key"] for t in here]
    shared = [
        (t, there[t["key"]])
        for t in here
        if t["status"] == "complete" and there.get(t["key"], t)["status"] == "complete"
        and t["key"] in there
    ]  # fmt: skip
    fields = ("candidate", "score", "predicted", "sha256")
    volumes = [
        json.loads((folder / n / "front.json").read_text())["hypervolume"] for n in (name, calm)
    ]
    return {
        "trials": len(here),
        "failed": sum(t["status"] == "failed" for t in here),
        "run_twice": len(keys) - len(set(keys)),
        "shared": len(shared),
        "different": sum(any(a[f] != b[f] for f in fields) for a, b in shared),
        "hypervolume_ratio": round(volumes[0] / volumes[1], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="go on after N rounds")
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "token").write_text("0" * 64)
        os.environ |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_health_check_period_ms": "1000",  # a dead node is noticed in 5 s, not 15
        }
        from ray.cluster_utils import Cluster

        if search(folder, "calm", given.trials).wait():
            raise SystemExit((folder / "calm.log").read_text()[-2000:])
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        path = RESULTS / "faults.json"
        rounds = json.loads(path.read_text())["rounds"][: given.first] if given.first else []
        try:
            for number in range(given.first, given.rounds):
                found = disturbed(folder, f"round{number}", given.trials, number, cluster)
                found |= compared(folder, f"round{number}", "calm")
                rounds.append(found)
                print(number, json.dumps(found), flush=True)
                write(rounds, not given.no_record)
        finally:
            cluster.shutdown()


def write(rounds: list[dict[str, Any]], keep: bool) -> None:
    """The record, after every round."""
    total = {
        k: sum(r[k] for r in rounds)
        for k in ("finished_trials_lost", "run_twice", "different", "shared", "failed")
    }
    volumes = [r["hypervolume_ratio"] for r in rounds]
    missed = [k for k in ("finished_trials_lost", "run_twice", "different") if total[k]]
    missed += ["hypervolume"] * (min(volumes) < 0.99)
    figures = {
        **total,
        "hypervolume_ratio": [min(volumes), max(volumes)],
        "search_seed": 0,
        "rounds": rounds,
        "missed": missed,
    }
    record("faults", figures, write=keep)


if __name__ == "__main__":
    main()
