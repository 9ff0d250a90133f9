"""One search over bits, pruning and training beside searches of one thing and a chain of two.

    python benchmarks/joint.py [--seeds 3] [--trials 30] [--steps 40 160]   # 20 minutes a seed

ResNet-20, objectives accuracy, latency and size, the same trials and the same training steps for
each: ``bits`` (`mixed`), ``pruning`` (channel groups, all layers at 8/8), ``chain`` (half of both
for float networks with pruned channels, whose knee is trained and is then the network of a search
over bits), ``joint`` (bits and channel groups at once). In all of them candidates are searched
untrained, then the better ones train for the first number of steps, the better half of those for
the second, taught by the float network.

For each: the hypervolume of the front (test accuracy, latency predicted by one device model
measured at the start, size), as a share of the box from a tenth under float's accuracy and a
tenth over float's costs. A seed draws the calibration images and seeds sampler and training.
Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from record import RESULTS, record

import autoquant
from autoquant.compress.lower import lower
from autoquant.cost.table import extended, from_profile, to_profile
from autoquant.front import Front, box_of, hypervolume
from autoquant.hardware import load_hardware
from autoquant.space import Space
from autoquant.task import Task

sys.path.insert(0, str(Path(__file__).parent / "tasks"))
import cifar10

OBJECTIVES = ["accuracy", "latency_ms", "size_bytes"]
BITS = {"weight_bits": [2, 3, 4, 6, 8], "activation_bits": 8, "float": True}
EIGHT = {"weight_bits": 8, "activation_bits": 8}
PRUNING = [{"ratios": [0, 0.125, 0.25, 0.375, 0.5]}]


def space(name: str, rule: dict[str, Any] | None, prune: bool, steps: list[int]) -> Space:
    """A space whose candidates train by halving."""
    training = {"halving": True, "steps": steps, "learning_rate": 0.003, "batch_size": 64}
    fields: dict[str, Any] = {
        "name": name,
        "rules": [rule or {"float": True}],
        "training": training,
    }
    if prune:
        fields |= {"pruning": PRUNING, "importance": "activation"}
    return Space.model_validate(fields)


class Run:
    """One seed's searches with what they share."""

    def __init__(self, seed: int, options: argparse.Namespace, folder: Path) -> None:
        self.seed, self.options, self.folder = seed, options, folder
        self.task = cifar10.resnet20(seed=seed)
        self.hardware = folder / "device.yaml"
        if not self.hardware.is_file():
            whole = space("joint", BITS, True, options.steps)
            autoquant.profile(self.task, self.hardware, space=whole)
        self.steps = 0

    def search(
        self,
        name: str,
        space: Space,
        trials: int,
        task: Task | None = None,
        hardware: Path | None = None,
    ) -> Front:
        front = autoquant.search(
            task or self.task,
            space=space,
            hardware=str(hardware or self.hardware),
            objectives=OBJECTIVES,
            trials=trials,
            name=f"{name}-{self.seed}",
            runs_dir=self.folder,
            seed=self.seed,
            polish=False,
            tracking=False,
        )
        lines = (self.folder / f"{name}-{self.seed}" / "trials.jsonl").read_text().splitlines()
        found = [json.loads(line)["candidate"].get("training") or {} for line in lines]
        self.steps += sum(int(t.get("steps", 0)) for t in found)
        return front

    def chain(self, rule: dict[str, Any]) -> Front:
        """Pruned float networks, then bits of the trained knee."""
        steps, half = self.options.steps, self.options.trials // 2
        first = self.search("chain-pruning", space("pruning", None, True, steps), half)
        trained = [m for m in first.members if m.candidate.training and m.candidate.pruning]
        chosen = replace(first, members=tuple(trained or first.members)).knee()
        assert first.folder is not None
        file = first.folder / str(chosen.artifact)
        task = replace(self.task, model=file, teacher=self.task.model)
        known = load_hardware(str(self.hardware))
        assert known.model is not None
        model = from_profile(known.model, 1, 1)
        model = extended(model, lower(task), lower(self.task))  # as for structures in `joint`
        device = self.folder / "device-chain.yaml"
        changed = known.model_copy(update={"model": to_profile(model)})
        fields = changed.model_dump(mode="json", exclude_defaults=True)
        device.write_text(yaml.safe_dump(fields))
        found = space("bits", rule, False, steps)
        training = found.training.model_copy(update={"teacher": ("task",)})
        whole = found.model_copy(update={"training": training})
        return self.search("chain", whole, half, task, device)


def points(front: Front) -> np.ndarray:
    """(members, 3): minus the test accuracy, predicted ms, bytes."""
    return np.array(
        [
            [-float((m.verified or {})["accuracy"]), m.predicted.latency_ms, m.predicted.size_bytes]
            for m in front.members
        ],
        float,
    )


def one(seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every configuration of a seed."""
    run, rows = Run(seed, options, folder), {}
    corner = ideal = None
    for name in ("bits", "pruning", "chain", "joint"):
        start, run.steps = time.perf_counter(), 0
        if name == "chain":
            front = run.chain(BITS)
        else:
            rule = EIGHT if name == "pruning" else BITS
            found = space(name, rule, name != "bits", options.steps)
            front = run.search(name, found, options.trials)
        if corner is None:
            accuracy = float(front.baseline["test_accuracy"])
            reference = {**front.reference_point, "accuracy": 0.9 * accuracy}
            corner, ideal = box_of(reference, accuracy)
        assert ideal is not None
        found_points = points(front)
        rows[name] = {
            "hypervolume": hypervolume(found_points, corner) / float(np.prod(corner - ideal)),
            "members": len(front.members),
            "trials": front.trials,
            "training_steps": run.steps,
            "seconds": round(time.perf_counter() - start, 1),
            "points": [[round(float(v), 4) for v in p] for p in found_points],
        }
        print(seed, name, {k: v for k, v in rows[name].items() if k != "points"}, flush=True)
    return rows


def main() -> None:
    """Seeds one by one, each written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--steps", type=int, nargs=2, default=[40, 160])
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    path = RESULTS / "joint.json"
    for seed in range(options.first, options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows = one(seed, options, Path(folder))
        seeds = json.loads(path.read_text())["seeds"] if path.is_file() else {}
        seeds[str(seed)] = rows
        summary = {}
        for name in seeds[str(seed)]:
            values = [s[name]["hypervolume"] for s in seeds.values()]
            summary[name] = {"mean": float(np.mean(values)), "spread": float(np.ptp(values))}
        best = max(summary, key=lambda n: summary[n]["mean"])
        figures = {"network": "resnet20", "trials": options.trials, "steps": options.steps}
        record("joint", {**figures, "hypervolume": summary, "highest": best, "seeds": seeds})
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
