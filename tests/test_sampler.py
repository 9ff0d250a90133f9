"""The default sampler, by itself: Optuna's conformance tests, and what it is there for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

from autoquant.front import hypervolume
from autoquant.search.sampler import SurrogateSampler, _gap, exact

BITS = np.array([2.0, 3.0, 4.0, 6.0, 8.0])
Params = Mapping[str, int]


class TestConformance(BasicSamplerTestCase, MultiObjectiveSamplerTestCase, RelativeSamplerTestCase):
    """All that Optuna ships but ``SingleOnlySamplerTestCase``, which is for samplers that
    refuse several objectives."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: SurrogateSampler(seed=0)


class Problem:
    """Layers whose prior is wrong by factors of about e, and of which some act together."""

    def __init__(self, layers: int = 16, seed: int = 0, error: float = 1.0) -> None:
        generator = np.random.default_rng(seed)
        self.names = [f"layer{i}" for i in range(layers)]
        true = np.exp(1.5 * generator.normal(size=layers))[:, None] * 4.0 ** -(BITS - 2)
        wrong = true * np.exp(error * generator.normal(size=(layers, 1)))
        sizes = np.exp(generator.normal(size=layers))
        self.true, prior = true / true[:, 0].sum(), wrong / wrong[:, 0].sum()
        costs = sizes[:, None] / sizes.sum() * BITS
        self.pairs = np.abs(generator.normal(size=layers)) * (generator.random(layers) < 0.3)
        self.prior = {n: tuple(map(float, p)) for n, p in zip(self.names, prior, strict=True)}
        self.costs = {n: tuple(map(float, c)) for n, c in zip(self.names, costs, strict=True)}
        self.space: dict[str, BaseDistribution] = {n: IntDistribution(0, 4) for n in self.names}

    def loss(self, params: Params) -> float:
        own = self.true[np.arange(len(self.names)), [params[n] for n in self.names]]
        return float(own.sum() + (self.pairs * 2 * np.sqrt(own * np.roll(own, 1))).sum())

    def cost(self, params: Params) -> float:
        return sum(self.costs[n][params[n]] for n in self.names)

    def sampler(self, **changes: Any) -> SurrogateSampler:
        options: dict[str, Any] = {
            "space": self.space,
            "priors": [self.prior],
            "costs": {1: self.costs},
            "known": lambda p: (None, self.cost(p)),
            "seed": 0,
        }
        return SurrogateSampler(**{**options, **changes})

    def study(self, sampler: BaseSampler) -> optuna.Study:
        return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)

    def run(self, study: optuna.Study, count: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(count):
            trial = study.ask(self.space)
            found.append((self.loss(trial.params), self.cost(trial.params)))
            study.tell(trial, found[-1])
        return found


def volume(points: Sequence[tuple[float, float]]) -> float:
    found = np.array(points)
    return hypervolume(np.column_stack([np.sqrt(found[:, 0]), found[:, 1]]), np.array([1.0, 8.0]))


def asked(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(t.params.values()) for t in study.get_trials(deepcopy=False)]


# --- what it finds ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_the_solver_where_the_prior_is_wrong(seed: int) -> None:
    problem = Problem(seed=seed)
    found = problem.run(problem.study(problem.sampler()), 45)
    picks = exact(
        [np.array(problem.prior[n]) for n in problem.names],
        [np.array(problem.costs[n]) for n in problem.names],
    )
    budgets = np.geomspace(1, len(picks), 45).astype(int) - 1
    alone = [dict(zip(problem.names, map(int, picks[i]), strict=True)) for i in budgets]
    solver = volume([(problem.loss(p), problem.cost(p)) for p in alone])
    assert volume(found) > solver + 0.05 and solver > volume(found[:20])


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_of_no_use_is_not_looked_for(seed: int) -> None:
    problem, worst = Problem(seed=seed), 0.03

    def inside(found: Sequence[tuple[float, float]]) -> float:
        return volume([(loss / worst, cost) for loss, cost in found])

    everywhere = problem.run(problem.study(problem.sampler()), 45)
    found = problem.run(problem.study(problem.sampler(worst=lambda: worst)), 45)
    assert inside(found) > inside(everywhere) + 0.05
    assert sum(loss > 2 * worst for loss, _ in everywhere[20:]) > 8
    assert not any(loss > 2 * worst for loss, _ in found[20:])
    unknown = problem.run(problem.study(problem.sampler(worst=lambda: None)), 25)
    assert unknown == everywhere[:25]


def test_it_beats_optuna_without_a_prior_too() -> None:
    problem = Problem(layers=8)
    ours = problem.run(problem.study(problem.sampler(priors=[])), 60)
    theirs = problem.run(problem.study(optuna.samplers.RandomSampler(seed=0)), 60)
    assert volume(ours) > volume(theirs)


def test_it_follows_a_metric_with_noise() -> None:
    problem = Problem()
    study = optuna.create_study(
        directions=["maximize", "minimize"],
        sampler=problem.sampler(ideal=0.9, noise=0.005),
    )
    noise = np.random.default_rng(0)
    points = []
    for _ in range(45):
        trial = study.ask(problem.space)
        points.append((problem.loss(trial.params), problem.cost(trial.params)))
        accuracy = 0.9 - 0.5 * points[-1][0] + 0.005 * noise.normal()
        study.tell(trial, [accuracy, points[-1][1]])
    assert volume(points) > volume(points[:20]) + 0.02


def test_a_space_of_every_kind_of_choice() -> None:
    """Bits with a prior; a ratio, a rank, a rate and a scheme without one."""
    problem = Problem(layers=6)
    space = {
        **problem.space,
        "ratio": FloatDistribution(0.0, 1.0),
        "rate": FloatDistribution(1e-5, 1e-1, log=True),
        "rank": IntDistribution(1, 400, log=True),
        "scheme": CategoricalDistribution(["a", "b", "c"]),
    }

    def penalty(params: Mapping[str, Any]) -> float:
        far = (params["ratio"] - 0.3) ** 2 + (np.log10(params["rate"]) + 3) ** 2 / 9
        return float(np.exp(2 * far + (params["scheme"] != "b")))

    study = problem.study(problem.sampler(space=space))
    for _ in range(60):
        trial = study.ask(space)
        value = problem.loss(trial.params) * penalty(trial.params)
        study.tell(trial, [value, problem.cost(trial.params)])
    late = [t.params for t in study.trials[48:]]
    assert np.mean([penalty(p) for p in late]) < 1.2 < 2 < penalty(study.trials[0].params)
    assert all(1 <= p["rank"] <= 400 and 1e-5 <= p["rate"] <= 1e-1 for p in late)


def test_one_objective() -> None:
    study = optuna.create_study(sampler=SurrogateSampler(seed=0))
    study.optimize(
        lambda t: (t.suggest_float("x", -5, 5) - 1) ** 2 + abs(t.suggest_int("n", 0, 9) - 7), 40
    )
    assert study.best_value < 0.3


def test_objectives_that_nobody_knows_are_learned() -> None:
    space: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(0, 1) for i in range(3)}
    found = []
    for make in (SurrogateSampler, optuna.samplers.RandomSampler):
        volumes = []
        for seed in range(3):
            study = optuna.create_study(
                directions=["minimize", "maximize"], sampler=make(seed=seed)
            )
            for _ in range(40):
                trial = study.ask(space)
                x = np.array(list(trial.params.values()))
                study.tell(trial, [((x - 0.2) ** 2).sum(), -((x - 0.8) ** 2).sum()])
            points = np.array([[t.values[0], -t.values[1]] for t in study.trials])
            volumes.append(hypervolume(points, np.array([1.5, 1.5])))
        found.append(np.mean(volumes))
    assert found[0] > found[1]


def test_a_loss_of_zero_and_one_that_broke_do_not_mislead() -> None:
    problem = Problem(error=0.5)
    study = problem.study(problem.sampler(initial=0))
    found = problem.run(study, 20)
    for value, bits in ((0.0, 4), (1e6, 0)):
        params = dict.fromkeys(problem.names, bits)
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=problem.space,
                values=[value, 32.0 if value == 0.0 else problem.cost(params)],
            )
        )
    more = problem.run(study, 25)
    assert volume([*found, *more]) > volume(found) + 0.1


# --- constraints ------------------------------------------------------------------------------


def test_what_a_known_limit_forbids_is_not_proposed() -> None:
    problem = Problem()
    sampler = problem.sampler(excess=lambda p: {"cost": problem.cost(p) - 4.0})
    points = problem.run(problem.study(sampler), 40)
    assert all(cost <= 4.0 for _, cost in points)


def test_a_limit_that_is_not_known_is_learned() -> None:
    problem = Problem()
    study = problem.study(problem.sampler())
    for _ in range(50):
        trial = study.ask(problem.space)
        odd = sum(v for i, v in enumerate(trial.params.values()) if i % 2)
        trial.set_constraint("odd", odd - 12.0)
        study.tell(trial, [problem.loss(trial.params), problem.cost(trial.params)])
    late = [t.constraints["odd"] <= 0 for t in study.trials[35:]]
    assert np.mean(late) > 0.6


# --- batches, repetition, resuming ------------------------------------------------------------


def test_trials_that_run_are_not_asked_for_again() -> None:
    problem = Problem()
    study = problem.study(problem.sampler())
    problem.run(study, 22)
    batch = [study.ask(problem.space) for _ in range(8)]
    assert len(set(asked(study))) == 30
    costs = [problem.cost(t.params) for t in batch]
    assert max(costs) - min(costs) > 0.5  # not all at one budget


def test_a_small_space_is_gone_through_without_repetition() -> None:
    space: dict[str, BaseDistribution] = {
        "a": IntDistribution(0, 2), "b": IntDistribution(0, 2), "c": CategoricalDistribution("xyz")
    }  # fmt: skip
    study = optuna.create_study(sampler=SurrogateSampler(space=space, seed=0))
    for _ in range(27):
        trial = study.ask(space)
        study.tell(trial, float(trial.params["a"]))
    assert len(set(asked(study))) == 27
    study.ask(space)  # and more can be asked for


def test_failed_trials_are_not_asked_for_again() -> None:
    problem = Problem(layers=4)
    study = problem.study(problem.sampler())
    for number in range(40):
        trial = study.ask(problem.space)
        if number % 3:
            study.tell(trial, [problem.loss(trial.params), problem.cost(trial.params)])
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    assert len(set(asked(study))) == 40


def test_a_new_sampler_goes_on_as_the_old_one_would() -> None:
    problem = Problem(layers=6)
    whole = problem.study(problem.sampler())
    problem.run(whole, 36)
    parts = problem.study(problem.sampler())
    for _ in range(3):
        problem.run(parts, 12)
        parts.sampler = problem.sampler()
    assert asked(parts) == asked(whole)
    other = problem.study(problem.sampler(seed=1))
    problem.run(other, 36)
    assert asked(other) != asked(whole)


def test_one_sampler_serves_two_studies() -> None:
    problem = Problem(layers=6)
    sampler = problem.sampler()
    first, second = problem.study(sampler), problem.study(sampler)
    problem.run(first, 25)
    problem.run(second, 25)
    assert asked(first) == asked(second)


def test_many_trials_leave_the_process_small() -> None:
    problem = Problem(layers=5)
    study = problem.study(problem.sampler())
    generator = np.random.default_rng(0)
    for _ in range(600):
        params = {n: int(generator.integers(5)) for n in problem.names}
        values = [problem.loss(params), problem.cost(params)]
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=problem.space, values=values)
        )
    before = set(asked(study))
    problem.run(study, 5)
    assert len(set(asked(study)) - before) == 5


# --- priors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_structures_that_cost_little_are_proposed_under_a_tight_budget(seed: int) -> None:
    """Half of the structures are nearly free, the others dear and save half as much: far from
    what chance would take."""
    problem = Problem(8)
    structures = {f"prune:{i}": IntDistribution(0, 2) for i in range(8)}
    cheap = [n for n in structures if int(n[-1]) % 2]
    prior = {n: ((0.02, 0.005, 1e-9) if n in cheap else (3.0, 1.0, 1e-9)) for n in structures}
    costs = {n: ((0.0, 0.5, 1.0) if n in cheap else (0.0, 0.2, 0.4)) for n in structures}
    priors, tables = {**problem.prior, **prior}, {**problem.costs, **costs}
    space = {**problem.space, **structures}

    def added(params: Params, table: Mapping[str, Sequence[float]]) -> float:
        return sum(table[n][params[n]] for n in table)

    limit = 0.4 * sum(max(c) for c in tables.values())
    sampler = SurrogateSampler(
        space=space,
        priors=[priors],
        costs={1: tables},
        known=lambda p: (None, added(p, tables)),
        excess=lambda p: {"size": added(p, tables) / limit - 1},
        initial=0,
        seed=seed,
    )
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for _ in range(24):
        trial = study.ask(space)
        loss = problem.loss(trial.params) + added(trial.params, prior)
        study.tell(trial, [loss, added(trial.params, tables)])
    asked_for = [t.params for t in study.get_trials(deepcopy=False)[8:]]
    changed = {n: np.mean([p[n] < 2 for p in asked_for]) for n in structures}
    at_random = 2 / 3
    assert np.mean([changed[n] for n in cheap]) > at_random + 0.2
    assert np.mean([changed[n] for n in structures if n not in cheap]) < at_random - 0.2


def test_a_prior_may_have_many_values() -> None:
    space = {"width": IntDistribution(0, 39), "bits": IntDistribution(0, 4)}
    prior = {"width": np.geomspace(1, 1e-3, 40), "bits": np.geomspace(1, 1e-3, 5)}
    sampler = SurrogateSampler(space=space, priors=[prior], seed=0, initial=0)
    study = optuna.create_study(sampler=sampler)
    for _ in range(10):
        trial = study.ask(space)
        study.tell(trial, sum(prior[n][trial.params[n]] for n in prior))
    assert 0 <= study.best_params["width"] <= 39


def test_the_first_trials_are_the_priors_own_solutions() -> None:
    problem = Problem()
    tilted = {n: tuple(v**0.5 for v in p) for n, p in problem.prior.items()}
    found = problem.run(problem.study(problem.sampler(priors=[problem.prior, tilted])), 20)
    costs = [cost for _, cost in found]
    assert min(costs) < 2.2 and max(costs) > 7.5


def test_a_prior_of_another_length_is_an_error() -> None:
    problem = Problem(layers=3)
    study = problem.study(problem.sampler(priors=[{"layer0": (1.0, 0.5)}]))
    with pytest.raises(ValueError, match="the prior of 'layer0' has 2 values, not 5"):
        study.ask(problem.space)


def test_it_says_which_layers_matter() -> None:
    """The prior of one layer is a tenth of what it should be."""
    problem = Problem(error=0.0)
    problem.pairs[:] = 0
    name = max(problem.prior, key=lambda n: problem.prior[n][0])
    problem.prior = {**problem.prior, name: tuple(0.1 * v for v in problem.prior[name])}
    study = problem.study(sampler := problem.sampler())
    assert sampler.view(study) is None
    problem.run(study, 40)
    view = sampler.view(study)
    assert view is not None and view["trials"] == 40
    layers = view["layers"]
    assert set(layers) == set(problem.names) and next(iter(layers)) == name
    assert layers[name]["factor"] > 2 > layers[name]["factor_error"]
    assert sum(x["importance"] for x in layers.values()) == pytest.approx(1)


def test_solutions_are_exact_on_the_grid() -> None:
    generator = np.random.default_rng(3)
    losses = [np.sort(generator.exponential(size=4))[::-1] for _ in range(4)]
    costs = [np.array([0.0, 10, 20, 40]) * (i + 1) for i in range(4)]  # whole steps of the grid
    picks = exact(losses, costs, grid=40)
    top = sum(c[-1] for c in costs)
    for at, row in enumerate(picks):
        budget = at * top / 40
        assert sum(c[i] for c, i in zip(costs, row, strict=True)) <= budget + 1e-9
        best = min(
            sum(x[i] for x, i in zip(losses, found, strict=True))
            for found in product(range(4), repeat=4)
            if sum(c[i] for c, i in zip(costs, found, strict=True)) <= budget + 1e-9
        )
        assert sum(x[i] for x, i in zip(losses, row, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_gap_to_the_front_is_to_the_least_loss_that_costs_no_more(objectives: int) -> None:
    generator = np.random.default_rng(objectives)
    loss = generator.integers(0, 30, 200).astype(float)  # with ties
    costs = generator.integers(0, 12, (200, objectives)).astype(float)
    expected = [
        a - min(b for b, d in zip(loss, costs, strict=True) if (d <= c).all())
        for a, c in zip(loss, costs, strict=True)
    ]
    assert _gap(loss, costs).tolist() == expected
