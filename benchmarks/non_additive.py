"""Where costs and losses are no sums over layers: what trials add to the solver's answer.

    python benchmarks/non_additive.py pruning      # half an hour
    python benchmarks/non_additive.py boundaries   # an hour and a half

``pruning``: ResNet-20, bits and pruned channel groups together without training, accuracy
against bit operations. ``boundaries``: EfficientNet-Lite0 in the `int8` space, accuracy against
predicted latency, where a layer in another precision than its neighbours pays for both of its
ends; one device model measured at the start.

Each seed (calibration images and sampler) is searched three times with as many trials: by the
``default`` sampler, by ``tpe`` after the same first candidates, and by the ``solver`` alone, whose
candidates are exact under the prior's mean: bits and structures together, or with what
conversions cost. All three are given the drop of five points as their limit. The figure is the
hypervolume of the front on the test split, as a share of the box from float's accuracy less five
points at float's cost (``boundaries``) or half of what 8-bit layers cost (``pruning``) to float's
accuracy at no cost; beside it the same on validation after 25, 50 and all trials. Missed is said
where the default is not ahead by more than the larger range over seeds; ``ahead`` has the
differences seed by seed, whose range is another: a seed draws the calibration images of all three
searches. Needs AUTOQUANT_DATA.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from record import RESULTS, record

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler

import autoquant
import cifar10
import imagenet
from autoquant.candidate import Candidate, LayerChoice
from autoquant.front import Front, hypervolume
from autoquant.search.dimensions import IMPORTANCE, option_of
from autoquant.search.first import at_latencies, first_candidates, mean_of
from autoquant.search.sensitivity import priors
from autoquant.search.solver import joint_curve
from autoquant.search.structural import (
    additive_costs,
    structural_costs,
    structural_dimensions,
    structural_sensitivity,
)
from autoquant.search.study import read_trials
from autoquant.search.trial import Context, prepare
from autoquant.space import Space
from autoquant.task import Task

AFTER = (25, 50)
PRUNING = Space.model_validate(
    {
        "name": "pruning",
        "rules": [{"weight_bits": [2, 3, 4, 6, 8], "activation_bits": 8}],
        "pruning": [{"ratios": [0, 0.125, 0.25, 0.375, 0.5]}],
        "importance": ["activation"],
    }
)
CASES = {"pruning": "bops", "boundaries": "latency_ms"}
DROP = 0.05  # of accuracy: the side of the box, and the limit that every search is given


class Solved(BaseSampler):
    """Proposes candidates that are given, in their order."""

    def __init__(self, picks: Sequence[Mapping[str, int]]) -> None:
        self.left, self.number, self.pick = iter(picks), -1, dict(picks[0])

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Any, trial: Any, param_name: str, param_distribution: BaseDistribution
    ) -> int:
        if trial.number != self.number:
            self.number, self.pick = trial.number, dict(next(self.left))
        return self.pick[param_name]


def solved(
    context: Context, task: Task, case: str, trials: int
) -> tuple[list[dict[str, int]], int]:
    """Exact solutions beside the first candidates of a search, and how many they are in all:
    ``trials``, or as many as there are."""
    cost = CASES[case]
    found = priors(context, task, workers=1)
    structures: dict[str, Any] = {}
    table = {name: dict(r.table) for name, r in found.items()}
    if structural_dimensions(context):
        beside = structural_sensitivity(context).table
        table = {name: {**t, **beside} for name, t in table.items()}
        structures = structural_costs(context, list(beside))
    first = first_candidates(context, ("accuracy", cost), table, [], structures)
    begun = {c.key for _, c in first}
    if trials <= len(begun):
        raise SystemExit(f"--trials {trials}: a search begins with {len(begun)}; give more")
    prior, options = mean_of(table), context.options
    fixed = {n: o for n, o in options.items() if n == IMPORTANCE or len(o) > 1}
    costs = additive_costs(context, structures, cost)
    new: list[Candidate] = []
    for points in (trials, 3 * trials):
        if structures:
            made = joint_curve(context.choices, fixed, prior, costs, points, context.tied)
        else:
            made = at_latencies(context, prior, points)
        new = [c for c in made if c.key not in begun]
        if len(new) >= trials - len(begun):
            break
    at = np.linspace(0, len(new) - 1, min(trials - len(begun), len(new))).round().astype(int)
    dimensions: dict[str, tuple[Any, ...]] = {**context.choices, **options}
    picks = [
        {n: list(c).index(option_of(new[i], n, tuple(c))) for n, c in dimensions.items()}
        for i in dict.fromkeys(at.tolist())
    ]
    return picks, len(begun) + len(picks)


class Case:
    """A network, its space and its cost, for one seed; the device model is all seeds'."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed, self.folder, self.cost = name, seed, folder, CASES[name]
        pruned = name == "pruning"
        self.task = (cifar10.resnet20 if pruned else imagenet.efficientnet_lite0)(seed=seed)
        self.space: str | Space = PRUNING if pruned else "int8"
        path = folder / f"{name}-device.yaml"
        if not path.is_file():
            autoquant.profile(self.task, path, space=self.space)
        self.hardware = str(path)
        self.context = prepare(self.task, space=self.space, hardware=self.hardware, seed=seed)
        choice = LayerChoice(8, 8) if pruned else LayerChoice()
        layers = dict.fromkeys(self.context.choices, choice)
        whole = float(getattr(self.context.predict(Candidate(layers)), self.cost))
        self.corner = whole / 2 if pruned else whole

    def search(self, sampler: str | BaseSampler, label: str, trials: int) -> Front:
        """A search, or what the folder has of it."""
        done = self.folder / f"{self.name}-{label}-{self.seed}"
        if (done / "front.json").is_file():
            return Front.read(done)
        return autoquant.search(
            self.task,
            space=self.space,
            hardware=self.hardware,
            objectives=["accuracy", self.cost],
            max_drop=DROP,
            trials=trials,
            sampler=sampler,
            seed=self.seed,
            name=f"{self.name}-{label}-{self.seed}",
            runs_dir=self.folder,
            polish=False,
            tracking=False,
        )

    def volume(self, accuracy: Sequence[float], cost: Sequence[float], top: float) -> float:
        """Of points whose float network has the accuracy ``top``, as a share of the box."""
        points = np.array([[-a, c] for a, c in zip(accuracy, cost, strict=True)]).reshape(-1, 2)
        corner = np.array([DROP - top, self.corner])
        return hypervolume(points, corner) / (DROP * self.corner)

    def figures(self, front: Front) -> dict[str, Any]:
        """Hypervolumes of a finished search."""
        assert front.folder is not None
        results = read_trials(front.folder / "trials.jsonl")
        reference = self.context.evaluator.reference
        assert reference is not None
        found: dict[str, Any] = {"members": len(front.members), "trials": len(results)}
        for count in (*AFTER, len(results)):
            done = [r for r in results if r.status == "complete" and r.trial < count]
            label = str(count) if count in AFTER else "all"
            accuracy = [r.score.value for r in done if r.score is not None]
            cost = [float(getattr(r.predicted, self.cost)) for r in done if r.score is not None]
            found[f"validation_after_{label}"] = self.volume(accuracy, cost, reference.value)
        accuracy = [float((m.verified or {})["accuracy"]) for m in front.members]
        cost = [float(getattr(m.predicted, self.cost)) for m in front.members]
        found["test"] = self.volume(accuracy, cost, float(front.baseline["test_accuracy"]))
        return found


def one(case: Case, trials: int) -> dict[str, Any]:
    """The three searches of a seed."""
    picks, known = solved(case.context, case.task, case.name, trials)
    samplers: dict[str, str | BaseSampler] = {
        "default": "surrogate",
        "solver": Solved(picks),
        "tpe": "tpe",
    }
    rows = {}
    for label, sampler in samplers.items():
        count = known if label == "solver" else trials
        rows[label] = case.figures(case.search(sampler, label, count))
        print(case.name, case.seed, label, rows[label], flush=True)
    return rows


def judged(seeds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Means, ranges, and where the default is not ahead by more than a range."""
    summary: dict[str, Any] = {}
    for label in ("default", "solver", "tpe"):
        values = [s[label]["test"] for s in seeds.values()]
        summary[label] = {"mean": float(np.mean(values)), "range": float(np.ptp(values))}
    ours, missed, ahead = summary["default"], [], {}
    for label in ("solver", "tpe"):
        gaps = [s["default"]["test"] - s[label]["test"] for s in seeds.values()]
        mean, spread = float(np.mean(gaps)), float(np.ptp(gaps))
        ahead[label] = {"mean": mean, "range": spread, "by_seed": gaps}
        if mean <= max(ours["range"], summary[label]["range"]):
            missed.append(f"default is ahead of {label} by {mean:.4f}, at least {min(gaps):.4f}")
    return {"test_hypervolume": summary, "ahead": ahead, "missed": missed}


def main() -> None:
    """Seeds one by one, each written when it is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument(
        "--folder", type=Path, help="of the runs, which are not run again; default temporary"
    )
    options = parser.parse_args()
    path = RESULTS / "non_additive.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(options.first, options.seeds):
            rows = one(Case(options.case, seed, folder), options.trials)
            document = json.loads(path.read_text()) if path.is_file() else {}
            known = {n: v for n, v in document.items() if n != "environment"}
            seeds = known.get(options.case, {}).get("seeds", {}) | {str(seed): rows}
            found = {"trials": options.trials, **judged(seeds), "seeds": seeds}
            record("non_additive", {**known, options.case: found})
            print(json.dumps(judged(seeds)))


if __name__ == "__main__":
    main()
