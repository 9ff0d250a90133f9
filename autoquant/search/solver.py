"""Exact best candidates under an additive prior.

`solve` and `curve`: dynamic programming over the budget of one additive cost (multiple-choice
knapsack), every budget on a fine grid at once, in milliseconds. `solve_exact`: a mixed-integer
programme for several budgets at a time, with costs at the boundaries between layers, peaks, tied
layers and forbidden pairs, in seconds at most.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoquant.candidate import Candidate, LayerChoice
from autoquant.errors import SpaceError
from autoquant.search.dimensions import candidate_of
from autoquant.task import Array

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

GRID = 8000  # steps of the budget
GAP = 1e-3  # relative: how far `solve_exact` may stay from the optimum

Choices = Mapping[str, Sequence[LayerChoice]]
Options = Mapping[str, Sequence[Any]]  # of layers and of other dimensions
Table = Mapping[str, Sequence[float]]  # a figure for each choice of each layer
Ties = Sequence[Sequence[str]]  # groups of layers that take the same choice
Forbidden = Sequence[tuple[tuple[str, LayerChoice], tuple[str, LayerChoice]]]


Condition = tuple[str, frozenset[int]]  # a layer, and the indices of choices that satisfy it


@dataclass(frozen=True, slots=True)
class Boundary:
    """A cost paid once where any of ``cases`` holds: all of its conditions at a time.

    A tensor that is converted from int8 to float is paid for where all layers that make it run
    in int8 and one that reads it does not. ``cost`` must not be negative.
    """

    cases: Sequence[Sequence[Condition]]
    cost: float

    def paid(self, picks: Mapping[str, int]) -> bool:
        """Whether choices, by index, pay it."""
        return any(all(picks[layer] in held for layer, held in case) for case in self.cases)


def solve(
    choices: Options,
    divergence: Table,
    cost: Table,
    budgets: Sequence[float],
    tied: Ties = (),
) -> list[Candidate]:
    """The candidate of least summed divergence within each budget of the summed cost.

    ``choices``: of layers, and the options of other dimensions (`dimensions`) beside them.
    ``cost`` must not be negative. A budget is rounded down to a grid of ``GRID`` steps between
    the least and the most possible cost; one below the least gets the cheapest candidate.
    Layers of a group of ``tied`` take the same choice. Raises SpaceError where they cannot.
    """
    if tied:
        picks = _tied_picks(choices, divergence, cost, budgets, tied)
    else:
        picks = _picks(choices, divergence, cost, budgets)
    return [candidate_of(p) for p in picks]


def _picks(
    choices: Options, divergence: Table, cost: Table, budgets: Sequence[float]
) -> list[dict[str, Any]]:
    """By budget an option a dimension; see `solve`."""
    names = [name for name, found in choices.items() if len(found) > 1]
    low = sum(min(cost[name]) for name in choices)
    high = sum(max(cost[name]) for name in choices)
    step = (high - low) / GRID or 1.0
    steps = {
        n: np.ceil((np.array(cost[n]) - min(cost[n])) / step - 1e-9).astype(int) for n in names
    }
    best = np.zeros(GRID + 1)
    taken: dict[str, Array] = {}
    for name in names:
        losses = np.asarray(divergence[name], dtype=np.float64)
        options = np.full((len(losses), GRID + 1), np.inf)
        for row, shift, loss in zip(options, np.minimum(steps[name], GRID), losses, strict=True):
            np.add(best[: GRID + 1 - shift], loss, out=row[shift:])
        taken[name] = options.argmin(axis=0)
        best = options.min(axis=0)
    found = []
    for budget in budgets:
        index = int(np.clip((budget - low) / step, 0, GRID))
        picks = {}
        for name in reversed(names):
            picks[name] = int(taken[name][index])
            index -= steps[name][picks[name]]
        found.append({n: c[picks.get(n, 0)] for n, c in choices.items()})
    return found


def _tied_picks(
    choices: Options, divergence: Table, cost: Table, budgets: Sequence[float], tied: Ties
) -> list[dict[str, Any]]:
    """Each group as one layer of the choices that all of it has."""
    groups = {name: tuple(group) for group in _groups(choices, tied) for name in group}
    merged = {}
    for name in choices:
        group = groups.get(name, (name,))
        if name == group[0]:
            merged[name] = shared_choices(choices, group)

    def total(table: Table) -> dict[str, list[float]]:
        return {
            name: [
                sum(table[n][list(choices[n]).index(c)] for n in groups.get(name, (name,)))
                for c in found
            ]
            for name, found in merged.items()
        }

    solved = _picks(merged, total(divergence), total(cost), budgets)
    return [{n: p[groups.get(n, (n,))[0]] for n in choices} for p in solved]


def _groups(choices: Options, tied: Ties) -> list[list[str]]:
    """The groups without layers that are not in ``choices``; groups that meet become one."""
    found: list[list[str]] = []
    for group in tied:
        joined = [name for name in dict.fromkeys(group) if name in choices]
        for other in [g for g in found if set(g) & set(joined)]:
            found.remove(other)
            joined = list(dict.fromkeys([*other, *joined]))
        found.append(joined)
    return [sorted(group, key=list(choices).index) for group in found if len(group) > 1]


def shared_choices(choices: Options, group: Sequence[str]) -> tuple[LayerChoice, ...]:
    """The choices that every layer of a group has. Raises SpaceError where there is none."""
    first, *others = group
    shared = tuple(c for c in choices[first] if all(c in choices[n] for n in others))
    if not shared:
        raise SpaceError(
            f"layers {', '.join(group[:4])} are tied, but no choice is common to all of them: "
            "give them the same bits, or do not tie them"
        )
    return shared


def curve(
    choices: Choices, divergence: Table, cost: Table, points: int, tied: Ties = ()
) -> list[Candidate]:
    """Up to ``points`` solutions at budgets spread evenly in the log of the cost, cheapest first.

    Budgets go from the least possible cost to that of every layer's most costly choice that is
    not float, where there is one.
    """
    low = sum(min(cost[name]) for name in choices)
    high = sum(max(cost[name]) for name in choices)
    if high <= low:
        return []
    top = sum(_widest(found, cost[name]) for name, found in choices.items())
    top = top if low < top < high else high
    budgets = np.exp(np.linspace(np.log(max(low, top / 1000)), np.log(top), points))
    return list(dict.fromkeys(solve(choices, divergence, cost, budgets.tolist(), tied)))


def joint_curve(
    choices: Choices,
    structures: Options,
    divergence: Table,
    cost: Table,
    points: int,
    tied: Ties = (),
) -> list[Candidate]:
    """Up to ``points`` solutions over layers and ``structures`` together, cheapest first.

    A dimension of ``structures`` without a table stays at its last option. Budgets are spread
    evenly in the log of the cost, from half of what the cheapest choices of all layers cost on
    the network as it is (its options of least divergence) to below that of the widest.
    """
    free = {n: c for n, c in structures.items() if n in divergence and n in cost}
    held = {n: c[-1:] for n, c in structures.items() if n not in free}
    if not free:
        return []
    whole = sum(cost[n][int(np.argmin(divergence[n]))] for n in free)
    low = sum(min(cost[n]) for n in choices)
    top = sum(_widest(found, cost[n]) for n, found in choices.items())
    if low <= 0:
        return []
    budgets = whole + np.geomspace(low / 2, max(low, top), points + 1)[:-1]
    still = dict.fromkeys(held, (0.0,))
    options = {**choices, **free, **held}
    losses, costs = {**divergence, **still}, {**cost, **still}
    return list(dict.fromkeys(solve(options, losses, costs, budgets.tolist(), tied)))


def _widest(choices: Sequence[LayerChoice], cost: Sequence[float]) -> float:
    """The most that a choice other than float costs."""
    coded = [c for choice, c in zip(choices, cost, strict=True) if not choice.is_float]
    return max(coded, default=max(cost))


# --- several budgets at once -----------------------------------------------------------------


def solve_exact(
    choices: Choices,
    divergence: Table,
    costs: Mapping[str, Table],
    budgets: Mapping[str, float],
    *,
    peaks: Mapping[str, Sequence[Table]] | None = None,
    tied: Ties = (),
    forbidden: Forbidden = (),
    boundaries: Mapping[str, Sequence[Boundary]] | None = None,
    seconds: float = 60.0,
) -> Candidate | None:
    """The candidate of least summed divergence within every budget; None where there is none.

    ``costs``: by budget, what each choice adds (layers left out add nothing). ``peaks``: by
    budget, several such tables, each of whose sums must stay within it (memory at each
    moment). ``boundaries``: by budget, what is paid between layers. The optimum is exact to
    ``GAP``, unless ``seconds`` end first. Raises SpaceError for tied layers that share no
    choice and for a budget without costs. A multiple-choice knapsack, solved by HiGHS.
    """
    from scipy.optimize import Bounds, milp
    from scipy.sparse import coo_array

    peaks, boundaries = peaks or {}, boundaries or {}
    for name in budgets:
        if name not in costs and name not in peaks and name not in boundaries:
            raise SpaceError(f"budget {name!r} has no costs")
    programme = _Programme(choices, divergence)
    for group in _groups(choices, tied):
        programme.tie(choices, group)
    for (first, low), (second, high) in forbidden:
        if low in choices.get(first, ()) and high in choices.get(second, ()):
            a, b = programme.column(first, low), programme.column(second, high)
            programme.row({a: 1.0, b: 1.0}, upper=1.0)
    for name, budget in budgets.items():
        tables = [*peaks.get(name, ()), *([costs[name]] if name in costs else [])]
        paid = {programme.pay(b): b.cost for b in boundaries.get(name, ()) if b.cost > 0}
        for table in tables or [{}]:
            row = {**programme.weigh(table), **paid}
            scale = (
                max(map(abs, row.values()), default=0.0) or 1.0
            )  # HiGHS' tolerances are absolute
            programme.row({k: v / scale for k, v in row.items()}, upper=budget / scale)
    count = len(programme.objective)
    matrix = coo_array(
        (programme.values, (programme.rows, programme.columns)), (len(programme.upper), count)
    )
    with _quiet():
        found = milp(
            np.array(programme.objective),
            constraints=_constraint(matrix.tocsr(), programme.lower, programme.upper),
            integrality=(np.arange(count) < programme.binaries).astype(np.int64),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": seconds},
        )
    if found.x is None:
        return None
    return Candidate(
        {
            name: offered[int(np.argmax(found.x[start : start + len(offered)]))]
            for (name, offered), start in zip(
                choices.items(), programme.starts.values(), strict=True
            )
        }
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints lines of its own debugging to the process's stdout, which is for data."""
    import ctypes

    sys.stdout.flush()
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 1)
        yield
    finally:
        with contextlib.suppress(OSError, TypeError, AttributeError):  # C's buffer, not Python's
            ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def _constraint(matrix: Any, lower: Sequence[float], upper: Sequence[float]) -> LinearConstraint:
    from scipy.optimize import LinearConstraint

    return LinearConstraint(matrix, np.array(lower), np.array(upper))


class _Programme:
    """Columns (a binary for each choice, then one for each boundary) and rows, as they come."""

    def __init__(self, choices: Choices, divergence: Table) -> None:
        self.choices = choices
        self.starts: dict[str, int] = {}
        self.objective: list[float] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        largest = max((v for n in choices for v in divergence[n] if np.isfinite(v)), default=0.0)
        for name, found in choices.items():
            self.starts[name] = len(self.objective)
            losses = [v if np.isfinite(v) else 1e6 * largest for v in divergence[name]]
            self.objective += [v / (largest or 1.0) for v in losses]
            self.row(dict.fromkeys(self._span(name, range(len(found))), 1.0), 1.0, 1.0)
        self.binaries = len(self.objective)

    def column(self, layer: str, choice: LayerChoice) -> int:
        return self.starts[layer] + list(self.choices[layer]).index(choice)

    def _span(self, layer: str, indices: Any) -> list[int]:
        return [self.starts[layer] + i for i in indices]

    def row(self, entries: Mapping[int, float], lower: float = -np.inf, upper: float = 0.0) -> None:
        """One constraint: ``lower ≤ Σ value·column ≤ upper``."""
        self.rows += [len(self.upper)] * len(entries)
        self.columns += entries.keys()
        self.values += entries.values()
        self.lower.append(lower)
        self.upper.append(upper)

    def weigh(self, table: Table) -> dict[int, float]:
        """The columns of a table's figures, without zeros."""
        return {
            self.starts[name] + i: float(value)
            for name, values in table.items()
            if name in self.starts
            for i, value in enumerate(values)
            if value
        }

    def tie(self, choices: Choices, group: Sequence[str]) -> None:
        """All layers of the group take the choice that the first takes."""
        shared = shared_choices(choices, group)
        for name in group:
            for choice in choices[name]:
                own = self.column(name, choice)
                if choice not in shared:
                    self.row({own: 1.0})
                elif name != group[0]:
                    self.row({own: 1.0, self.column(group[0], choice): -1.0}, 0.0, 0.0)

    def pay(self, boundary: Boundary) -> int:
        """A column that is 1 where the boundary is paid: budgets push it down to no less."""
        index = len(self.objective)
        self.objective.append(0.0)
        for case in boundary.cases:
            held = [c for layer, indices in case for c in self._span(layer, indices)]
            self.row({**dict.fromkeys(held, 1.0), index: -1.0}, upper=len(case) - 1.0)
        return index
