"""What a search evaluates first."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from small_task import context

from autoquant.candidate import Candidate
from autoquant.search.first import at_latencies, between, first_candidates, within_limits
from autoquant.search.sensitivity import predicted, priors
from autoquant.search.solver import Table, curve
from autoquant.search.trial import Context, Limits


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def prior(small: Context) -> Table:
    return next(iter(priors(small).values())).table


def all_of(found: Context) -> list[Candidate]:
    names = list(found.choices)
    return [
        Candidate(dict(zip(names, choices, strict=True)))
        for choices in product(*found.choices.values())
    ]


def latency(found: Context, candidate: Candidate) -> float:
    value = found.predict(candidate).latency_ms
    assert value is not None
    return value


def test_solutions_at_latencies_are_the_best_of_all_that_are_as_fast(
    small: Context, prior: Table
) -> None:
    """Conversions included: no candidate is faster and closer to float."""
    solved = at_latencies(small, prior, 8)
    assert between(small) and len(solved) >= 2
    every = [(latency(small, c), predicted(prior, small.choices, c)) for c in all_of(small)]
    for candidate in solved:
        own, lost = latency(small, candidate), predicted(prior, small.choices, candidate)
        better = [x for x in every if x[0] <= own + 1e-9 and x[1] < lost * 0.99 - 1e-9]
        assert not better, candidate


def test_a_search_for_latency_starts_with_them(small: Context, prior: Table) -> None:
    found = first_candidates(small, ("accuracy", "latency_ms"), {"one": prior}, [])
    assert set(at_latencies(small, prior, 8)) <= {candidate for _, candidate in found}
    additive = set(curve(small.choices, prior, small.additive_cost("latency_ms"), 8))
    assert {c for origin, c in found if origin == "solver"} != additive


@pytest.mark.parametrize(
    ("objectives", "solved_for"),
    [
        (("accuracy", "bops"), ["bops"]),
        (("accuracy", "latency_ms", "bops"), ["bops"]),
        (("accuracy", "weight_bytes"), ["size_bytes"]),
        (("accuracy", "latency_ms", "weight_bytes"), ["size_bytes"]),
        (("accuracy", "peak_memory_bytes"), ["size_bytes"]),
        (("accuracy", "latency_ms", "peak_memory_bytes"), []),
    ],
)
def test_sums_that_are_objectives_are_solved_for(
    small: Context, prior: Table, objectives: tuple[str, ...], solved_for: list[str]
) -> None:
    uneven = {n: [v * (1 + i) for v in t] for i, (n, t) in enumerate(prior.items())}
    found = {c for _, c in first_candidates(small, objectives, {"one": uneven}, [])}
    for name in ("bops", "size_bytes"):
        solved = set(curve(small.choices, uneven, small.additive_cost(name), 14, tied=small.tied))
        assert (solved <= found) == (name in solved_for)


def test_limits_have_a_solution_of_their_own(small: Context, prior: Table) -> None:
    """The closest to float of all candidates within a size and a latency, to the programme's gap
    and what it has to leave for rounding."""
    every = [(small.predict(c), predicted(prior, small.choices, c)) for c in all_of(small)]
    sizes = sorted(cost.size_bytes for cost, _ in every)
    times = sorted(float(cost.latency_ms or 0) for cost, _ in every)
    limits = Limits(size_bytes=sizes[len(sizes) // 4], latency_ms=times[len(times) // 3])
    limited = replace(small, limits=limits)
    found = within_limits(limited, prior)
    assert len(found) == 1
    assert max(limits.excess(limited.predict(found[0]), None).values()) <= 0
    fitting = [lost for cost, lost in every if max(limits.excess(cost, None).values()) <= 0]
    assert predicted(prior, small.choices, found[0]) <= sorted(fitting)[len(fitting) // 4]


def test_limits_that_nothing_satisfies_have_none(small: Context, prior: Table) -> None:
    limited = replace(small, limits=Limits(size_bytes=10))
    assert within_limits(limited, prior) == [] == within_limits(small, prior)
