"""Samplers compared: what a search of a given number of trials finds.

    python benchmarks/sampling.py                         # about an hour on each of two cores
    python benchmarks/sampling.py --trials 60 --seeds 1 --configurations default tpe-cold

ResNet-20 in the `mixed` space, validation accuracy against packed weight bytes. Each sampler runs
warm (after the first trials of a search: uniform candidates and exact solutions) and cold (after
neither); ``default`` is the surrogate, ``solver`` the exact curve alone, with as many points as
there are trials. Every configuration follows the divergence on validation; ``default-metric``
follows the accuracy. The default knows, as from `--max-drop`, that five points are the limit. A
seed (``n`` in the record says how many) draws the calibration images and seeds the sampler. As in
a search, what a sampler proposes replaces a candidate at about its cost only if the second inputs
agree.

After 25, 50, 100 and 200 trials: the hypervolume on validation and, of the same members, on the
test split (reference point: float's accuracy less five points there, half the bytes of 8-bit
weights; 1 is float's accuracy at no bytes), and the accuracy at no more than 2.5, 3 and 4 average
bits of the member that is best on validation, there and on the test split. ``curse``: how much
larger the members' drops are on the test split than on validation, in the mean (winner's curse);
``curse_error``: the mean standard error of a drop on validation. The test split is read for the
report alone. Scores are kept by candidate in a temporary folder, so that configurations
share them, and a run of some configurations keeps the record's others. Then the same on a made-up
problem of 60 layers whose prior is wrong and whose layers interact. Needs AUTOQUANT_DATA for the
networks.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from record import RESULTS, record

sys.path.insert(0, str(Path(__file__).parent / "tasks"))

from autoquant.candidate import Candidate
from autoquant.front import hypervolume, nondominated
from autoquant.runtime import OnnxRuntime
from autoquant.search import first_candidates, mean_of
from autoquant.search.sampler import SurrogateSampler
from autoquant.search.sensitivity import priors
from autoquant.search.solver import curve
from autoquant.search.study import NEAR, divergence_at, uniform_candidates
from autoquant.search.trial import Pick, closer_pick, evaluator_for, float_model, prepare

AFTER = (25, 50, 100, 200)
BITS = (2.5, 3.0, 4.0)
DROP = 0.05  # of accuracy: the side of the box, and where the default's gains end
SPLITS = ("validation", "test")
NETWORKS = ("resnet20", "efficientnet_lite0")
CONFIGURATIONS = (
    "default", "default-metric", "default-no-prior", "solver",
    "tpe-warm", "tpe-cold", "nsga2-warm", "nsga2-cold", "random-warm", "random-cold",
)  # fmt: skip


class Problem:
    """One network: candidates, their scores (kept on disk), and their bytes."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        import cifar10
        import imagenet

        self.task = getattr(imagenet if name == "efficientnet_lite0" else cifar10, name)(seed=seed)
        self.context = prepare(self.task, space="mixed", latency=False)
        self.choices = self.context.choices
        self.test = evaluator_for(self.task, self.context.graph, "test")
        self.test.set_reference(OnnxRuntime().open(float_model(self.context.graph)))
        found = priors(self.context, self.task, workers=1)
        self.priors = {name: result.table for name, result in found.items()}
        self.prior = mean_of(self.priors)
        self.costs = self.context.additive_cost("weight_bytes")
        self.weights = sum(x.parameters for x in self.context.graph.layers)
        self.folder = folder / f"{name}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.names = [n for n, c in self.choices.items() if len(c) > 1]
        reference = self.context.evaluator.reference
        assert reference is not None
        self.float = reference.value
        assert self.test.reference is not None
        self.gap = self.test.reference.value - self.float

    def candidate(self, params: Mapping[str, int]) -> Candidate:
        return Candidate({n: c[params.get(n, 0)] for n, c in self.choices.items()})

    def params(self, candidate: Candidate) -> dict[str, int]:
        return {n: list(self.choices[n]).index(candidate.choice(n)) for n in self.names}

    def bytes(self, params: Mapping[str, int]) -> float:
        return sum(self.costs[n][params.get(n, 0)] for n in self.choices)

    def score(self, candidate: Candidate, split: str = "validation") -> dict[str, float]:
        path = self.folder / f"{candidate.key}-{split}.json"
        if not path.is_file():
            session = OnnxRuntime().open(self.context.compress(candidate).model)
            evaluator = self.context.evaluator if split == "validation" else self.test
            score = evaluator.score(session)
            found = {"accuracy": score.value, "divergence": score.divergence}
            found |= {"drop": score.drop, "error": score.drop_standard_error}
            if split == "validation":
                found["second"] = self.context.second(session)
            path.write_text(json.dumps(found))
        found: dict[str, float] = json.loads(path.read_text())
        return found


def first(problem: Problem) -> list[Candidate]:
    """What a search of two objectives runs before its sampler proposes."""
    objectives = ("accuracy", "weight_bytes")
    found = first_candidates(problem.context, objectives, problem.priors, [])
    return [candidate for _, candidate in found]


def sampler(name: str, problem: Problem, seed: int, found: Mapping[str, Candidate]):
    """``found``: the candidates so far, which say what a loss is in accuracy."""
    import optuna

    if name.startswith("tpe"):
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if name.startswith("nsga2"):
        return optuna.samplers.NSGAIISampler(seed=seed)
    if not name.startswith("default"):
        return optuna.samplers.RandomSampler(seed=seed)
    metric = name == "default-metric"
    assert problem.context.evaluator.reference is not None
    tables = [] if name == "default-no-prior" else list(problem.priors.values())
    floor = problem.float - DROP

    def worst() -> float | None:
        told = [problem.score(c) for c in found.values()]
        return divergence_at(floor, [(s["divergence"], s["accuracy"]) for s in told])

    return SurrogateSampler(
        space=space(problem),
        priors=[{n: t[n] for n in problem.names} for t in tables],
        costs={1: problem.costs},
        known=lambda p: (None, problem.bytes(p)),
        ideal=problem.float if metric else 0.0,
        noise=problem.context.evaluator.reference.standard_error if metric else 0.0,
        worst=(lambda: floor) if metric else worst,
        initial=0,
        seed=seed,
    )


def space(problem: Problem):
    from optuna.distributions import IntDistribution

    return {n: IntDistribution(0, len(problem.choices[n]) - 1) for n in problem.names}


def trials(problem: Problem, name: str, seed: int, count: int) -> list[Candidate]:
    """The distinct candidates that a configuration evaluates, in order."""
    import optuna

    if name == "solver":
        found = uniform_candidates(problem.choices)
        found += curve(problem.choices, problem.prior, problem.costs, count - len(found))
        return list(dict.fromkeys(found))
    metric = name == "default-metric"
    found: dict[str, Candidate] = {}
    study = optuna.create_study(
        directions=["maximize" if metric else "minimize", "minimize"],
        sampler=sampler(name, problem, seed, found),
    )
    if not name.endswith("cold"):
        for candidate in first(problem):
            study.enqueue_trial(problem.params(candidate))
    for _ in range(4 * count):  # samplers may repeat themselves
        if len(found) == count:
            break
        trial = study.ask(space(problem))
        candidate = problem.candidate(trial.params)
        found.setdefault(candidate.key, candidate)
        scored = problem.score(candidate)
        value = scored["accuracy" if metric else "divergence"]
        study.tell(trial, [value, problem.bytes(trial.params)])
    return list(found.values())


def agreed(problem: Problem, found: Sequence[Candidate], cold: bool) -> list[Candidate]:
    """Without those that a search would stop since the second inputs speak against them."""
    uniform = set(uniform_candidates(problem.choices))
    begun = set() if cold else set(first(problem))
    kept: list[Candidate] = []
    picks: list[tuple[float, Pick]] = []
    for number, candidate in enumerate(found):
        score, cost = problem.score(candidate), problem.bytes(problem.params(candidate))
        near = [p for at, p in picks if cost <= at <= NEAR * cost]
        replaced = [p for p in near if score["accuracy"] >= p.accuracy]
        proposed = candidate not in begun
        if proposed and closer_pick(replaced, score["accuracy"], score["second"]) is not None:
            continue
        kept.append(candidate)
        if candidate in begun - uniform or (proposed and replaced):
            picks.append((cost, Pick(number, score["accuracy"], score["second"])))
    return kept


def figures(problem: Problem, found: Sequence[Candidate]) -> dict[str, object]:
    """Hypervolume on validation, and accuracy on both splits at the budgets of bits."""
    points = np.array(
        [[-problem.score(c)["accuracy"], problem.bytes(problem.params(c))] for c in found]
    )
    corner = np.array([DROP - problem.float, problem.weights / 2])
    box = DROP * problem.weights / 2
    result: dict[str, object] = {"hypervolume": hypervolume(points, corner) / box}
    tested = []
    for bits in BITS:
        fitting = np.flatnonzero(points[:, 1] <= bits / 8 * problem.weights)
        if not len(fitting):
            result[f"at_{bits}_bits"] = None
            continue
        best = fitting[np.argmin(points[fitting, 0])]
        test = problem.score(found[best], "test")["accuracy"]
        result[f"at_{bits}_bits"] = {"validation": -points[best, 0], "test": test}
        tested.append((-points[best, 0], test))
    front = np.flatnonzero(nondominated(points))
    result["members"] = len(front)
    chosen, tested_too = ([problem.score(found[i], x) for i in front] for x in SPLITS)
    tests = np.array(
        [[-t["accuracy"], points[i, 1]] for t, i in zip(tested_too, front, strict=True)]
    )
    gaps = [t["drop"] - v["drop"] for v, t in zip(chosen, tested_too, strict=True)]
    result["curse"] = float(np.mean(gaps))
    result["curse_error"] = float(np.mean([v["error"] for v in chosen]))
    result["test_hypervolume"] = hypervolume(tests, corner - [problem.gap, 0]) / box
    return result


def summary(rows: Sequence[Mapping[str, object]], key: Callable[[Mapping[str, object]], object]):
    values = [key(r) for r in rows]
    numbers = [float(v) for v in values if v is not None]  # type: ignore[arg-type]
    if not numbers:
        return None
    return {"mean": float(np.mean(numbers)), "spread": float(np.ptp(numbers)), "n": len(numbers)}


def network(name: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    problems = [Problem(name, folder, seed) for seed in range(options.seeds)]
    result: dict[str, object] = {"float": problems[0].float, "weights": problems[0].weights}
    after = sorted({n for n in AFTER if n < options.trials} | {options.trials})
    for configuration in options.configurations:
        rows: dict[int, list[dict[str, object]]] = {}
        for seed, problem in enumerate(problems):
            start = time.process_time()
            if configuration == "solver":
                runs = {n: trials(problem, "solver", seed, n) for n in after}
            else:
                whole = trials(problem, configuration, seed, options.trials)
                cold = configuration.endswith("cold")
                runs = {n: agreed(problem, whole[:n], cold) for n in after}
            for count, found in runs.items():
                rows.setdefault(count, []).append(figures(problem, found))
            spent = time.process_time() - start
            last = rows[max(rows)][-1]["hypervolume"]
            print(f"{name} {configuration} seed {seed}: {last:.4f}, {spent:.0f} s", flush=True)
        result[configuration] = {
            str(count): {
                "hypervolume": summary(found, lambda r: r["hypervolume"]),
                "test_hypervolume": summary(found, lambda r: r["test_hypervolume"]),
                **{
                    f"{split}_at_{bits}_bits": summary(
                        found,
                        lambda r, b=bits, s=split: (
                            None if r[f"at_{b}_bits"] is None else r[f"at_{b}_bits"][s]
                        ),
                    )
                    for bits in BITS
                    for split in SPLITS
                },
                **{
                    name: summary(found, lambda r, name=name: r[name])
                    for name in ("members", "curse", "curse_error")
                },
            }
            for count, found in rows.items()
        }
    return result


# --- a made-up problem ------------------------------------------------------------------------


def made_up(layers: int, seed: int, error: float = 0.8):
    """Prior, costs and a noisy loss of ``layers`` layers: the prior of a layer is off by a
    factor of about e^error, and neighbours interact."""
    generator = np.random.default_rng(seed)
    bits = np.array([2.0, 3.0, 4.0, 6.0, 8.0])
    true = np.exp(1.5 * generator.normal(size=layers))[:, None] * 4.0 ** -(bits - 2)
    wrong = generator.normal(size=(layers, 1)) + 0.3 * generator.normal(size=(layers, 5))
    prior = np.maximum.accumulate((true * np.exp(error * wrong))[:, ::-1], axis=1)[:, ::-1]
    true, prior = true / true[:, 0].sum(), prior / prior[:, 0].sum()
    pairs = 0.9 * np.abs(generator.normal(size=layers)) * (generator.random(layers) < 0.3)
    sizes = np.exp(generator.normal(size=layers))
    costs = sizes[:, None] / sizes.sum() * bits
    names = [f"layer{i}" for i in range(layers)]

    def loss(params: Mapping[str, int]) -> float:
        own = true[np.arange(layers), [params[n] for n in names]]
        return float(own.sum() + (pairs * 2 * np.sqrt(own * np.roll(own, 1))).sum())

    return (
        {n: tuple(map(float, p)) for n, p in zip(names, prior, strict=True)},
        {n: tuple(map(float, c)) for n, c in zip(names, costs, strict=True)},
        loss,
    )


def synthetic(options: argparse.Namespace) -> dict[str, object]:
    """Hypervolume of the root of the loss over average bits, and the time of an ask."""
    import optuna
    from optuna.distributions import IntDistribution

    from autoquant.search.sampler import GRID, exact

    result: dict[str, object] = {}
    for configuration in ("default", "solver", "tpe-warm", "tpe-cold"):
        rows: dict[int, list[dict[str, object]]] = {}
        for seed in range(options.seeds):
            prior, costs, loss = made_up(60, seed)
            names = list(prior)
            noise = np.random.default_rng(seed + 1000)
            dims = {n: IntDistribution(0, 4) for n in names}

            def cost(params: Mapping[str, int], costs=costs) -> float:
                return sum(costs[n][params[n]] for n in costs)

            picks = exact([np.array(prior[n]) for n in names], [np.array(costs[n]) for n in names])

            def warm(count: int, picks=picks, names=names) -> list[dict[str, int]]:
                at = np.unique(np.geomspace(1, GRID + 1, count).astype(int) - 1)
                return [dict(zip(names, map(int, picks[i]), strict=True)) for i in at]

            def volume(points: Sequence[tuple[float, float]]) -> float:
                found = np.array(points)
                found[:, 0] = np.sqrt(found[:, 0])
                return hypervolume(found, np.array([1.0, 8.0])) / 6.0

            points, spent = [], 0.0
            if configuration == "solver":
                for count in AFTER:
                    found = [(loss(p), cost(p)) for p in warm(count)]
                    rows.setdefault(count, []).append({"hypervolume": volume(found)})
                continue
            found_sampler = (
                optuna.samplers.TPESampler(seed=seed, multivariate=True)
                if configuration.startswith("tpe")
                else SurrogateSampler(
                    space=dims,
                    priors=[prior],
                    costs={1: costs},
                    known=lambda p, cost=cost: (None, cost(p)),
                    initial=0,
                    seed=seed,
                )
            )
            study = optuna.create_study(directions=["minimize"] * 2, sampler=found_sampler)
            for params in warm(20) if configuration != "tpe-cold" else ():
                study.enqueue_trial(params)
            for number in range(1, options.trials + 1):
                start = time.process_time()
                trial = study.ask(dims)
                spent += time.process_time() - start
                true = loss(trial.params)
                study.tell(trial, [true * np.exp(0.05 * noise.normal()), cost(trial.params)])
                points.append((true, cost(trial.params)))
                if number in AFTER or number == options.trials:
                    row = {"hypervolume": volume(points), "ask_ms": 1e3 * spent / number}
                    rows.setdefault(number, []).append(row)
        result[configuration] = {
            str(count): {
                "hypervolume": summary(found, lambda r: r["hypervolume"]),
                "ask_ms": summary(found, lambda r: r.get("ask_ms")),
            }
            for count, found in rows.items()
        }
        print(json.dumps({configuration: result[configuration]}), flush=True)
    return result


def ask_ms(layers: int = 60, count: int = 2000) -> float:
    """CPU time of an ask after 2,000 trials: the median of nine."""
    import optuna
    from optuna.distributions import IntDistribution

    prior, costs, loss = made_up(layers, 0)
    dims = {n: IntDistribution(0, 4) for n in prior}

    def cost(params: Mapping[str, int]) -> float:
        return sum(costs[n][params[n]] for n in costs)

    generator = np.random.default_rng(0)
    study = optuna.create_study(
        directions=["minimize"] * 2,
        sampler=SurrogateSampler(
            space=dims, priors=[prior], costs={1: costs},
            known=lambda p: (None, cost(p)), initial=0, seed=0,
        ),
    )  # fmt: skip
    for _ in range(count):
        centre = generator.integers(0, 5)
        picked = np.clip(centre + generator.integers(-1, 2, layers), 0, 4)
        params = dict(zip(dims, map(int, picked), strict=True))
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=dims, values=[loss(params), cost(params)]
            )
        )
    times = []
    for _ in range(10):
        start = time.process_time()
        trial = study.ask(dims)
        times.append(1e3 * (time.process_time() - start))
        study.tell(trial, [loss(trial.params), cost(trial.params)])
    return float(np.median(times[1:]))


def behind(name: str, found: Mapping[str, object]) -> list[str]:
    """Where another configuration has more of the test split's hypervolume than the default."""
    rows: dict[str, dict[str, dict[str, dict[str, float]]]] = {
        n: v
        for n, v in found.items()
        if n in CONFIGURATIONS  # type: ignore[misc]
    }
    kind, said = "test_hypervolume", []
    ours = rows.get("default", {})
    for other, counts in rows.items():
        for count in sorted(set(ours) & set(counts), key=int) if other != "default" else ():
            mine, theirs = ours[count][kind], counts[count][kind]
            if mine["mean"] < theirs["mean"]:
                said.append(
                    f"{name} after {count}: default {mine['mean']:.3f} "
                    f"(range {mine['spread']:.3f}), "
                    f"{other} {theirs['mean']:.3f} ({theirs['spread']:.3f})"
                )
    cold = rows.get("tpe-cold", {})
    if "25" in ours and "200" in cold:
        early, late = ours["25"][kind]["mean"], cold["200"][kind]["mean"]
        if early <= late:
            said.append(f"{name}: default after 25 {early:.3f}, cold TPE after 200 {late:.3f}")
    return said


def known() -> dict[str, dict[str, object]]:
    """What the record has, since networks and configurations may run one by one."""
    path = RESULTS / "sampling.json"
    found: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.is_file() else {}
    return {n: v for n, v in found.items() if n not in ("environment", "missed")}


def main() -> None:
    """Networks, the made-up problem, the bars, the record."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=["resnet20"], choices=NETWORKS)
    parser.add_argument("--configurations", nargs="*", default=list(CONFIGURATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where scores are kept; default temporary")
    parser.add_argument("--no-synthetic", action="store_true")
    options = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name in options.networks:
            found[name] = network(name, options, folder)
            print(json.dumps({name: found[name]}), flush=True)
    more: dict[str, object] = {}
    if not options.no_synthetic:
        more = {"synthetic": synthetic(options), "ask_ms_at_2000_trials": ask_ms()}
    before = known()  # now, since other runs may have written meanwhile
    result = {**before, **{n: {**before.get(n, {}), **v} for n, v in found.items()}, **more}
    missed = [x for name in NETWORKS if name in result for x in behind(name, result[name])]
    asked = result.get("ask_ms_at_2000_trials", 0.0)
    if asked > 60:
        missed.append(f"ask takes {asked:.0f} ms, bar 60")
    record("sampling", {**result, "missed": missed})
    print("missed:", missed or "nothing")


if __name__ == "__main__":
    main()
