"""What a search evaluates first: uniform candidates, and exact solutions under the priors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from autoquant.candidate import Candidate
from autoquant.cost.table import TableModel
from autoquant.result import Cost
from autoquant.search.coupling import boundaries
from autoquant.search.dimensions import IMPORTANCE, structural_starts
from autoquant.search.solver import Boundary, Table, curve, joint_curve, solve_exact
from autoquant.search.structural import additive_costs, structural_dimensions
from autoquant.search.study import uniform_candidates
from autoquant.search.trial import Context

_SECONDS = 5.0  # that one exact solution may take
_SHRINK = (1.0, 0.99, 0.96, 0.92)  # of a budget, while what it counts is not all there is
_BY_BITS = {"weight_bytes", "average_weight_bits"}  # solved for as ``size_bytes``
_OTHER_SUMS = {"stored_bytes", "bops"}  # which bytes say little of
_ADDITIVE = ("size_bytes", "stored_bytes", "latency_ms", "energy_mj")


def mean_of(priors: Mapping[str, Table]) -> Table:
    """The geometric mean of tables, zero where one is."""
    tables = list(priors.values())
    found: dict[str, Sequence[float]] = {}
    for name in tables[0]:
        values = np.array([t[name] for t in tables], dtype=np.float64)
        mean = np.exp(np.log(np.maximum(values, 1e-300)).mean(axis=0))
        found[name] = tuple(np.where(values.min(axis=0) > 0, mean, 0.0).tolist())
    return found


def first_candidates(
    context: Context,
    objectives: Sequence[str],
    priors: Mapping[str, Table],
    start: Sequence[tuple[str, Candidate]],
    structures: Mapping[str, Sequence[Cost]] | None = None,
) -> list[tuple[str, Candidate]]:
    """Those of another run, uniform candidates, then the best under the priors' mean at a spread
    of budgets, and where there are several priors, fewer under each. With the costs of
    ``structures``, a handful over bits and structures together."""
    uniform = uniform_candidates(context.choices)
    found = [*start, *(("uniform", c) for c in uniform)]
    mean, widest = mean_of(priors), _widest(uniform)
    found += [("solver", c) for c in within_limits(context, mean)]
    if context.options and widest is not None:
        found += [("uniform", c) for c in structural_starts(widest, context.options)]
    tables = [(mean, 14, 8)]
    if len(priors) > 1:
        tables = [(mean, 10, 6), *((t, 5, 3) for t in list(priors.values())[:3])]
    beside = {n: o for n, o in context.options.items() if n == IMPORTANCE}
    beside |= structural_dimensions(context)
    wanted = set(objectives)
    if wanted & _BY_BITS or (len(objectives) == 2 and not wanted & _OTHER_SUMS):
        wanted.add("size_bytes")
    for index, (table, by_size, by_latency) in enumerate(tables):
        budgets = {"size_bytes": by_size, "stored_bytes": by_size, "bops": by_size}
        budgets |= {"latency_ms": by_latency, "energy_mj": by_latency}
        for name, points in budgets.items():
            if name not in wanted:
                continue
            costs, tied = additive_costs(context, structures or {}, name), context.tied
            if name == "latency_ms" and between(context):
                solved = at_latencies(context, table, points)
            else:
                solved = curve(context.choices, table, costs, points, tied=tied)
            if index == 0 and structures:
                few = max(2, points // 2)
                solved += joint_curve(context.choices, beside, table, costs, few, tied)
            found += [("solver", c) for c in solved]
    unique: dict[Candidate, str] = {}
    for origin, candidate in found:
        unique.setdefault(candidate, origin)
    return [(origin, candidate) for candidate, origin in unique.items()]


def _widest(uniform: Sequence[Candidate]) -> Candidate | None:
    """The first of uniform candidates that is not float; None where all are."""
    return next((c for c in uniform if not all(x.is_float for x in c.layers.values())), None)


def between(context: Context) -> list[Boundary]:
    """What conversions between precisions add to ``latency_ms``; none where no table says."""
    model = context.cost.latency
    if not isinstance(model, TableModel):
        return []
    return boundaries(context.graph, context.choices, model)


def at_latencies(context: Context, prior: Table, points: int) -> list[Candidate]:
    """Up to ``points`` exact solutions at latencies from the fastest uniform candidate's to the
    slowest's, with what conversions between layers cost: a layer alone in another precision
    pays for both of its ends."""
    costs, paid = context.additive_cost("latency_ms"), between(context)
    ends = [_spent(context, c, costs, paid) for c in uniform_candidates(context.choices)]
    if not ends or min(ends) <= 0 or max(ends) <= min(ends):
        return []
    found = [
        _solved(context, prior, {"latency_ms": costs}, {"latency_ms": budget}, paid)
        for budget in np.geomspace(min(ends), max(ends), points + 1)[:-1].tolist()
    ]
    return list(dict.fromkeys(c for c in found if c is not None))


def within_limits(context: Context, prior: Table) -> list[Candidate]:
    """The solution of least divergence within all limits on sums over layers, if there is one:
    a search under tight limits would else meet few candidates that count."""
    limits = context.limits
    names = [n for n in _ADDITIVE if getattr(limits, n) is not None]
    if not names:
        return []
    uniform = uniform_candidates(context.choices)
    base = _widest(uniform) or uniform[0]
    exact, paid = context.predict(base), between(context)
    costs = {n: context.additive_cost(n) for n in names}
    budgets = {}
    for name in names:
        beside = paid if name == "latency_ms" else []
        spent = _spent(context, base, costs[name], beside)
        whole = getattr(exact, name)
        if whole is None:
            return []
        budgets[name] = float(getattr(limits, name)) - (float(whole) - spent)
    for share in _SHRINK:
        smaller = {n: budget * share for n, budget in budgets.items()}
        found = _solved(context, prior, costs, smaller, paid)
        if found is None:
            return []
        if max(limits.excess(context.predict(found), None).values(), default=0.0) <= 0:
            return [found]
    return []


def _solved(
    context: Context,
    prior: Table,
    costs: Mapping[str, Table],
    budgets: Mapping[str, float],
    paid: Sequence[Boundary],
) -> Candidate | None:
    return solve_exact(
        context.choices,
        prior,
        costs,
        budgets,
        tied=context.tied,
        forbidden=context.forbidden,
        boundaries={"latency_ms": paid} if "latency_ms" in budgets else None,
        seconds=_SECONDS,
    )


def _spent(context: Context, candidate: Candidate, costs: Table, paid: Sequence[Boundary]) -> float:
    """What the solver counts of a candidate's cost."""
    picks = {n: list(c).index(candidate.choice(n)) for n, c in context.choices.items()}
    kernels = sum(costs[n][i] for n, i in picks.items())
    return float(kernels + sum(b.cost for b in paid if b.paid(picks)))
