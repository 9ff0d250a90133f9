"""The default sampler: exact solutions of priors that trials correct, and neighbours of the front.

Its belief about the loss is a Gaussian process around the additive prior (`surrogate`). Drawing
the prior's corrections from its posterior gives priors to solve exactly (Thompson 1933);
neighbours of the front come on top. Of all these the largest expected gain in hypervolume wins
(Emmerich et al. 2006). Objectives that are known functions of a candidate are not modelled.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import TrialState
from scipy.special import ndtr

from autoquant.search.surrogate import FITTED, GaussianProcess, SearchSpace, Table, space_of
from autoquant.task import Array

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

ACTIVE = 256  # trials that the process is conditioned on
DRAWS = 2  # priors from the posterior that an ask solves for
GRID = 512  # budgets of an exact solution
LEVELS = 96  # points of the cost space at which a gain is taken
STARTUP = 10  # random trials of a study without a prior
_POWER = 0.5  # of the loss whose gain is expected: between log (0) and plain (1)
_NOTHING = 1e-6  # of a parameter's largest prior: too little for trials to correct
_FINALISTS = 16  # whose known objectives are computed exactly


@dataclass(frozen=True, slots=True)
class _Observed:
    """Trials as arrays; objectives are to be minimized. ``limits``: constraints that are not
    known beforehand, at most 0 is feasible."""

    rows: Array  # (trials, parameters)
    values: Array  # (trials, objectives)
    limits: Array  # (trials, constraints)
    feasible: Array  # (trials,)

    def take(self, index: Array) -> _Observed:
        return _Observed(
            self.rows[index], self.values[index], self.limits[index], self.feasible[index]
        )


@dataclass(slots=True)
class _Log:
    """Finished trials, read once each. ``start``: every trial before it was read."""

    start: int = 0
    numbers: set[int] = field(default_factory=set)
    seen: set[bytes] = field(default_factory=set)
    order: list[int] = field(default_factory=list)
    rows: list[Array] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    constraints: list[dict[str, float]] = field(default_factory=list)
    feasible: list[bool] = field(default_factory=list)


def exact(losses: Sequence[Array], costs: Sequence[Array], grid: int = GRID) -> Array:
    """(budgets, parameters): for each budget of the summed cost the indices of least summed
    loss, cheapest first.

    Dynamic programming over ``grid`` steps between the least cost and that of every
    parameter's most costly value that has a loss; costs are rounded to the nearest step.
    """
    low = sum(float(c.min()) for c in costs)
    coded = [float(c[x > 0].max(initial=c.min())) for x, c in zip(losses, costs, strict=True)]
    high = sum(coded)
    step = (high - low) / grid if high > low else 1.0
    best = np.zeros(grid + 1)
    taken, shifts = [], []
    for loss, cost in zip(losses, costs, strict=True):
        shift = np.round((cost - cost.min()) / step).astype(int)
        options = np.full((len(loss), grid + 1), np.inf)
        for i, by in enumerate(shift):
            if by <= grid:
                options[i, by:] = best[: grid + 1 - by] + loss[i]
        taken.append(options.argmin(axis=0))
        best = options.min(axis=0)
        shifts.append(shift)
    index = np.arange(grid + 1)
    picks = np.zeros((grid + 1, len(losses)), int)
    for i in reversed(range(len(losses))):
        picks[:, i] = taken[i][index]
        index = index - shifts[i][picks[:, i]]
    return picks


class SurrogateSampler(BaseSampler):
    """Proposes by expected hypervolume gain under a Gaussian process with an additive prior.

    ``space``: the study's parameters, where known beforehand. ``priors``: for parameters with
    ordered or categorical values, what each value adds to the loss; several priors are averaged
    geometrically, and corrected the more the less they agree. ``costs``: objective index → what
    each value adds to that objective, to solve for. ``known``: parameters → values of all
    objectives that need no trial (None for the others). ``excess``: parameters → known
    constraints (at most 0 is feasible). ``learned``: the objective that is the loss. ``ideal``
    and ``noise``: the loss's objective without compression, and the standard error of its
    values; with a prior the logarithm of ``loss - ideal + noise`` is modelled. ``worst``: gives
    the value of the loss's objective beyond which a trial is of no use, whatever it costs; None
    while that is not known. ``initial``: trials of the priors' own solutions, before any model.

    Any Optuna distribution, any number of objectives, constraints set by ``set_constraint``.
    All that it knows it reads from the study: a new sampler with the same seed goes on as the
    old one would. Running trials count as finished at their predicted values.
    """

    def __init__(
        self,
        *,
        space: Mapping[str, BaseDistribution] | None = None,
        priors: Sequence[Table] = (),
        costs: Mapping[int, Table] | None = None,
        known: Callable[[Mapping[str, Any]], Sequence[float | None]] | None = None,
        excess: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None,
        learned: int = 0,
        ideal: float = 0.0,
        noise: float = 0.0,
        worst: Callable[[], float | None] | None = None,
        initial: int = 20,
        seed: int | None = None,
    ) -> None:
        self.space = None if space is None else dict(space)
        self.priors, self.costs = tuple(priors), dict(costs or {})
        self.known, self.excess, self.learned = known, excess, learned
        self.ideal, self.noise, self.initial = ideal, noise, initial
        self.worst = worst
        self.reseed_rng(seed)
        self._intersection = IntersectionSearchSpace()
        self._lock = threading.Lock()
        self._cache: tuple[list[Any], SearchSpace] | None = None
        self._where: tuple[Any, str] | None = None  # the study that the rest is about
        self._log = _Log()
        self._pending: dict[int, Array] = {}  # asked for here, not yet suggested
        self._hyper: dict[tuple[int, int], tuple[float, float, float]] = {}
        self._exact: dict[bytes, tuple[tuple[float | None, ...], float]] = {}

    # --- Optuna's side ------------------------------------------------------------------------

    def reseed_rng(self, seed: int | None = None) -> None:
        """A new seed: that given, or a random one."""
        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._independent = RandomSampler(seed=self.seed % 2**32)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """The space as given, else what all finished trials share."""
        found = self.space if self.space is not None else self._intersection.calculate(study)
        return {name: d for name, d in found.items() if not d.single()}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """At random: for what is not in the common space (conditional, or a first trial)."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The candidate of largest expected gain; never one that the study has seen, where
        another can be found."""
        if not search_space:
            return {}
        with self._lock:
            space = self._of(search_space)
            row = self._propose(study, trial.number, space)
            self._pending[trial.number] = row
        return space.decode(row)

    # --- what the study knows -----------------------------------------------------------------

    def _of(self, distributions: Mapping[str, BaseDistribution]) -> SearchSpace:
        items = list(distributions.items())
        if self._cache is None or self._cache[0] != items:
            self._cache = items, space_of(distributions, self.priors)
            self._forget()
        return self._cache[1]

    def _forget(self) -> None:
        self._log = _Log()
        self._pending.clear()
        self._hyper.clear()
        self._exact.clear()

    def _read(self, study: Study, space: SearchSpace) -> tuple[_Observed, Array, set[bytes]]:
        """Finished trials, positions of running ones, and all positions ever asked for."""
        where = study._storage, study.study_name
        if where != self._where:
            self._where = where
            self._forget()
        log = self._log
        signs = self._signs(study)
        running = []
        seen = log.seen
        trials = study.get_trials(deepcopy=False)
        for trial in trials[log.start :]:
            if trial.number in log.numbers:
                continue
            row = self._row(trial, space)
            if trial.state.is_finished():
                log.numbers.add(trial.number)
                self._pending.pop(trial.number, None)
                if row is not None:
                    seen.add(row.tobytes())
                    self._log_values(log, trial, row, signs, space)
            elif row is not None and trial.state == TrialState.RUNNING:
                running.append(row)
        while log.start < len(trials) and trials[log.start].number in log.numbers:
            log.start += 1
        keys = sorted({k for c in log.constraints for k in c})
        limits = np.array([[c.get(k, 0.0) for k in keys] for c in log.constraints])
        order = np.argsort(log.order, kind="stable")  # as a new sampler would read them
        shape = (len(order), len(space.dimensions))
        observed = _Observed(
            np.array(log.rows).reshape(shape)[order],
            np.array(log.values).reshape(len(order), len(signs))[order],
            limits.reshape(len(order), len(keys))[order],
            np.array(log.feasible, bool)[order],
        )
        waiting = np.array(running).reshape(len(running), len(space.dimensions))
        return observed, waiting, seen | {row.tobytes() for row in running}

    def _log_values(
        self, log: _Log, trial: FrozenTrial, row: Array, signs: Sequence[float], space: SearchSpace
    ) -> None:
        """Keep a complete trial. ``bound`` marks values that are bounds, not observations."""
        if trial.state != TrialState.COMPLETE or "bound" in trial.user_attrs:
            return
        found = [s * v for s, v in zip(signs, trial.values, strict=True)]
        if not np.isfinite(found).all():
            return
        known = {} if self.excess is None else self.excess(space.decode(row))
        limits = {k: v for k, v in trial.constraints.items() if k not in known}
        log.order.append(trial.number)
        log.rows.append(row)
        log.values.append(found)
        log.constraints.append(limits)
        log.feasible.append(max([*limits.values(), *known.values()], default=0.0) <= 0)

    @staticmethod
    def _signs(study: Study) -> list[float]:
        return [1.0 if d == StudyDirection.MINIMIZE else -1.0 for d in study.directions]

    def _row(self, trial: FrozenTrial, space: SearchSpace) -> Array | None:
        """The trial's position; None for one that is not in this space."""
        params, told = trial.params, trial.distributions
        for d in space.dimensions:
            if d.name not in params:
                return self._pending.get(trial.number) if not trial.state.is_finished() else None
            if told[d.name] is not d.distribution and told[d.name] != d.distribution:
                if type(told[d.name]) is not type(d.distribution):
                    return None
                if not d.distribution._contains(d.distribution.to_internal_repr(params[d.name])):
                    return None
        return space.encode(params)

    def _figures(self, space: SearchSpace, row: Array) -> tuple[tuple[float | None, ...], float]:
        """Known objectives and the largest known constraint of one candidate."""
        key = row.tobytes()
        if key not in self._exact:
            params = space.decode(row)
            values = () if self.known is None else tuple(self.known(params))
            limits = {} if self.excess is None else self.excess(params)
            worst = max(limits.values(), default=0.0)
            self._exact[key] = values, worst
        return self._exact[key]

    # --- proposals ----------------------------------------------------------------------------

    def _propose(self, study: Study, number: int, space: SearchSpace) -> Array:
        generator = np.random.default_rng([self.seed % 2**32, number])
        observed, running, seen = self._read(study, space)
        if number < self.initial and space.known and self.costs:
            for row in self._solutions(space, self.initial):
                if row.tobytes() not in seen and self._figures(space, row)[1] <= 0:
                    return row
        started = STARTUP if not space.known else 4
        if len(observed.rows) < started:
            return self._unseen(space, generator, seen)
        signs = self._signs(study)
        model = self._model(space, observed, signs)
        if len(running):
            observed = self._believe(model, observed, running, space, signs)
            model = self._model(space, observed, signs, model.hyper)
        top = self._top(signs, space)
        pool = self._pool(model, observed, space, generator, seen, signs, top)
        if not len(pool):
            return self._unseen(space, generator, seen)
        best: Array = pool[self._best(model, observed, pool, space, signs, top)]
        return best

    def _solutions(self, space: SearchSpace, count: int) -> list[Array]:
        """The priors' own solutions at a spread of budgets: half of them the mean's."""
        tables = [[p for p in space.prior if p is not None]]
        for prior in self.priors if len(self.priors) > 1 else ():
            names = [space.dimensions[i].name for i in space.known]
            if all(n in prior for n in names):
                tables.append([np.asarray(prior[n], float) for n in names])
        middle = [0.0 if d.values is None else float((d.size - 1) // 2) for d in space.dimensions]
        costs = [self._costs(space, table) for table in self.costs.values()]
        found: dict[bytes, Array] = {}
        for number, table in enumerate(tables):
            share = 1.0 if len(tables) == 1 else 0.5 / (1 if number == 0 else len(tables) - 1)
            points = max(2, round(count * share / len(costs)))
            for cost in costs:
                picks = exact(table, cost)
                for at in np.geomspace(1, GRID + 1, points).astype(int) - 1:
                    row = np.array(middle)
                    row[space.known] = picks[at]
                    found.setdefault(row.tobytes(), row)
        return list(found.values())

    def _costs(self, space: SearchSpace, table: Table) -> list[Array]:
        return [
            np.asarray(table.get(d.name, np.zeros(d.size)), float)
            for i, d in enumerate(space.dimensions)
            if i in set(space.known)
        ]

    def _loss(self, values: Array, signs: Sequence[float], space: SearchSpace) -> Array:
        """The modelled loss: its logarithm where there is a prior."""
        column = values[:, self.learned]
        if not space.known:
            return column
        gap = column - signs[self.learned] * self.ideal
        return np.log(np.maximum(gap, 0.0) + max(self.noise, 1e-9))

    def _top(self, signs: Sequence[float], space: SearchSpace) -> float:
        """The modelled loss beyond which a trial is of no use; infinite where none is known."""
        worst = None if self.worst is None else self.worst()
        if worst is None:
            return math.inf
        values = np.full((1, self.learned + 1), signs[self.learned] * worst)
        return float(self._loss(values, signs, space)[0])

    @staticmethod
    def _useful(observed: _Observed, loss: Array, top: float) -> Array:
        """Which trials count: feasible ones of use, else those that are feasible."""
        found: Array = observed.feasible & (loss <= top)
        return found if found.any() else observed.feasible

    def _others(self, count: int) -> Array:
        return np.array([i for i in range(count) if i != self.learned], dtype=int)

    def _regressors(self, space: SearchSpace) -> Callable[[Array], Array]:
        """Candidates → additive costs and a constant: the mean of the other objectives."""
        tables = [
            [np.asarray(t.get(d.name, np.zeros(d.size)), float) for d in space.dimensions]
            for t in self.costs.values()
        ]

        def regressors(rows: Array) -> Array:
            columns = [np.ones(len(rows))]
            for table in tables:
                columns.append(
                    np.sum(
                        [t[rows[:, i].astype(int)] for i, t in enumerate(table)
                         if space.dimensions[i].values is not None], axis=0,
                    ) / (sum(float(t.max()) for t in table) or 1.0)
                )  # fmt: skip
            return np.array(columns).T

        return regressors

    def _model(
        self,
        space: SearchSpace,
        observed: _Observed,
        signs: Sequence[float],
        hyper: tuple[float, float, float] | None = None,
    ) -> GaussianProcess:
        """Condition on an active set; hyperparameters are chosen as trials grow by a fifth."""
        if space.known and self.noise <= 0:  # a loss of zero, as float's, has no logarithm
            gap = observed.values[:, self.learned] - signs[self.learned] * self.ideal
            if (gap > 1e-9).sum() >= 4:
                observed = observed.take(np.flatnonzero(gap > 1e-9))
        count = len(observed.rows)
        offset = max(self.noise, 1e-9) if space.known and self.noise > 0 else 0.0
        loss = self._loss(observed.values, signs, space)

        def made(part: Array, hyper: tuple[float, float, float] | None) -> GaussianProcess:
            seen = observed.take(part)
            others = self._others(observed.values.shape[1])
            targets = np.column_stack([loss[part], seen.values[:, others], seen.limits])
            extra = (offset / np.exp(loss[part])) ** 2 if offset else np.zeros(len(part))
            return GaussianProcess(
                space, seen.rows, targets, self._regressors(space), extra, offset, hyper
            )

        if hyper is None:
            stage = min(4, count)
            while stage + max(4, stage // 5) <= count:
                stage += max(4, stage // 5)
            key = stage, observed.limits.shape[1]
            if key not in self._hyper:
                self._hyper[key] = made(np.arange(max(0, stage - FITTED), stage), None).hyper
            hyper = self._hyper[key]
        return made(self._active(observed, loss), hyper)

    def _active(self, observed: _Observed, loss: Array) -> Array:
        """Trials near the front, the latest, and some of the rest."""
        count = len(loss)
        if count <= ACTIVE:
            return np.arange(count)
        others = self._others(observed.values.shape[1])
        near = _gap(loss, observed.values[:, others])
        order = np.argsort(near + np.where(observed.feasible, 0.0, np.ptp(loss)), kind="stable")
        chosen = dict.fromkeys(order[: ACTIVE // 2].tolist())
        chosen.update(dict.fromkeys(range(count - ACTIVE // 4, count)))
        for i in np.linspace(0, count - 1, ACTIVE).astype(int).tolist():
            if len(chosen) >= ACTIVE:
                break
            chosen[i] = None
        return np.array(sorted(chosen))

    def _believe(
        self,
        model: GaussianProcess,
        observed: _Observed,
        running: Array,
        space: SearchSpace,
        signs: Sequence[float],
    ) -> _Observed:
        """Running trials at their predicted values (kriging believer, Ginsbourger et al. 2010)."""
        means, _ = model.predict(running)
        values = np.empty((len(running), observed.values.shape[1]))
        others = self._others(values.shape[1])
        values[:, others] = means[:, 1 : 1 + len(others)]
        loss = means[:, 0]
        if space.known:
            floor = max(self.noise, 1e-9)
            loss = np.exp(loss) - floor + signs[self.learned] * self.ideal
        values[:, self.learned] = loss
        self._fill(values, running, space, signs)
        limits = means[:, 1 + len(others) :]
        return _Observed(
            np.concatenate([observed.rows, running]),
            np.concatenate([observed.values, values]),
            np.concatenate([observed.limits, limits]),
            np.concatenate([observed.feasible, (limits <= 0).all(axis=1)]),
        )

    def _fill(
        self, values: Array, rows: Array, space: SearchSpace, signs: Sequence[float]
    ) -> Array:
        """Put known objectives in place; which columns were known."""
        columns = np.zeros(values.shape[1], bool)
        if self.known is not None:
            for i, row in enumerate(rows):
                for j, value in enumerate(self._figures(space, row)[0]):
                    if value is not None and j != self.learned:
                        values[i, j] = signs[j] * value
                        columns[j] = True
        return columns

    def _pool(
        self,
        model: GaussianProcess,
        observed: _Observed,
        space: SearchSpace,
        generator: np.random.Generator,
        seen: set[bytes],
        signs: Sequence[float],
        top: float,
    ) -> Array:
        """New candidates: exact solutions, neighbours of the front, and some at random."""
        front = self._front(observed, space, signs, top)
        rows: list[Array] = []
        if space.known and self.costs:
            tables = [model.table, *(model.draw(generator) for _ in range(DRAWS))]
            scaled = [self._costs(space, t) for t in self.costs.values()]
            tops = [sum(float(c.max()) for c in t) or 1.0 for t in scaled]
            for k, table in enumerate(tables):
                share = generator.dirichlet(np.ones(len(scaled)) * 0.5)
                cost = [
                    sum(w * t[i] / top for w, t, top in zip(share, scaled, tops, strict=True))
                    for i in range(len(space.known))
                ]
                picks = exact([table[i] for i in space.known], cost)  # type: ignore[misc]
                some = np.unique(picks, axis=0)
                count = min(len(some), 48 if k == 0 else 32)
                for at in generator.permutation(len(some))[:count]:
                    row = front[generator.integers(len(front))].copy()
                    row[space.known] = some[at]
                    rows.append(row)
        width = len(space.dimensions)
        for _ in range(128 if space.known else 256):
            row = front[generator.integers(len(front))].copy()
            moves = min(width, 1 + int(generator.integers(3 if space.known else 4)))
            for i in generator.choice(width, moves, replace=False):
                row[i] = space.dimensions[i].moved(generator, row[i])
            rows.append(row)
        extra = 8 if space.known else 128
        rows += list(np.array([d.random(generator, extra) for d in space.dimensions]).T)
        fresh = {r.tobytes(): r for r in rows if r.tobytes() not in seen}
        return np.array(list(fresh.values())).reshape(len(fresh), width)

    def _front(
        self, observed: _Observed, space: SearchSpace, signs: Sequence[float], top: float
    ) -> Array:
        """Rows of the trials that count and that no other dominates; where none is feasible,
        those that come nearest."""
        loss = self._loss(observed.values, signs, space)
        others = self._others(observed.values.shape[1])
        rows = np.flatnonzero(self._useful(observed, loss, top))
        if not len(rows):
            worst = observed.limits.max(axis=1, initial=0.0)
            return observed.rows[np.argsort(worst, kind="stable")[:8]]
        near = _gap(loss[rows], observed.values[np.ix_(rows, others)])
        return observed.rows[rows[near <= 0]]

    def _best(
        self,
        model: GaussianProcess,
        observed: _Observed,
        pool: Array,
        space: SearchSpace,
        signs: Sequence[float],
        top: float,
    ) -> int:
        """Index of the largest expected gain; known figures of the finalists are exact."""
        others = self._others(observed.values.shape[1])
        means, deviations = model.predict(pool)
        loss = self._loss(observed.values, signs, space)
        useful = self._useful(observed, loss, top)
        gain = _Gain(
            loss[useful],
            observed.values[np.ix_(useful, others)],
            top,
            bool(space.known),
            bool(self.costs),
            self.seed % 2**32,
        )
        costs = means[:, 1 : 1 + len(others)].copy()
        spreads = deviations[:, 1 : 1 + len(others)].copy()
        if self.costs and self.known is not None:
            spreads[:] = 0.0
        limits = means[:, 1 + len(others) :], deviations[:, 1 + len(others) :]
        likely = ndtr(-limits[0] / limits[1]).prod(axis=1)
        score = likely * gain(means[:, 0], deviations[:, 0], costs, spreads)
        if self.known is None and self.excess is None:
            return int(np.argmax(score))
        finalists = np.argsort(-score, kind="stable")[:_FINALISTS]
        values = np.zeros((len(finalists), observed.values.shape[1]))
        values[:, others] = costs[finalists]
        exact_columns = self._fill(values, pool[finalists], space, signs)[others]
        sharp = np.where(exact_columns, 0.0, spreads[finalists])
        final = (
            gain(means[finalists, 0], deviations[finalists, 0], values[:, others], sharp)
            * likely[finalists]
        )
        worst = np.array([self._figures(space, pool[i])[1] for i in finalists])
        if not (worst <= 0).any():
            return int(finalists[np.argmin(worst)])
        return int(finalists[np.argmax(np.where(worst <= 0, final, -1.0))])

    def _unseen(
        self, space: SearchSpace, generator: np.random.Generator, seen: set[bytes]
    ) -> Array:
        """A random position that the study has not seen, if there seems to be one."""
        row = np.zeros(len(space.dimensions))
        for _ in range(200):
            row = np.array([d.random(generator, 1)[0] for d in space.dimensions])
            if row.tobytes() not in seen and self._figures(space, row)[1] <= 0:
                return row
        sizes = [math.inf if d.values is None else d.size for d in space.dimensions]
        if math.prod(sizes) <= 4096:
            grids = np.meshgrid(*(np.arange(float(d.size)) for d in space.dimensions))
            for found in np.array([g.ravel() for g in grids]).T:
                if found.copy().tobytes() not in seen:
                    return np.array(found)
        return row

    # --- what it learned ----------------------------------------------------------------------

    def view(self, study: Study) -> dict[str, Any] | None:
        """Which parameters matter, after the study's trials; None before there is a model.

        For each parameter with a prior, in order of importance: its ``prior`` and learned
        ``importance`` (share of the summed loss, over the mean of its values), ``factor`` (what
        learning multiplied its prior by, geometric mean) and ``factor_error`` (standard
        deviation of the factor's logarithm). ``correction``, ``joint``, ``noise``: standard
        deviations in the logarithm of the loss.
        """
        distributions = self.infer_relative_search_space(study, None)  # type: ignore[arg-type]
        if not distributions:
            return None
        with self._lock:
            space = self._of(distributions)
            observed, _, _ = self._read(study, space)
            if len(observed.rows) < 4 or not space.known:
                return None
            signs = self._signs(study)
            model = self._model(space, observed, signs)
        prior = {i: float(np.mean(model.prior[i])) for i in space.known}  # type: ignore[arg-type]
        now = {i: float(np.mean(model.table[i])) for i in space.known}  # type: ignore[arg-type]
        errors = model.spread_of_corrections()
        totals = sum(prior.values()) or 1.0, sum(now.values()) or 1.0
        layers = {}
        for i in sorted(space.known, key=lambda i: -now[i]):
            own = np.asarray(model.prior[i])
            used = np.flatnonzero(own > _NOTHING * own.max())
            factor = float(np.exp(model.correction[i][used].mean())) if len(used) else 1.0
            layers[space.dimensions[i].name] = {
                "importance": now[i] / totals[1],
                "prior": prior[i] / totals[0],
                "factor": factor,
                "factor_error": float(errors[i][used].mean()) if len(used) else 0.0,
            }
        scale, joint, noise = model.hyper
        return {
            "trials": len(observed.rows),
            "correction": scale,
            "joint": joint,
            "noise": noise,
            "layers": layers,
        }


def _gap(loss: Array, costs: Array) -> Array:
    """How far each loss is above the least that costs no more; at most 0 on the front."""
    if not len(loss):
        return np.zeros(0)
    if costs.shape[1] == 0:
        return np.asarray(loss - loss.min())
    if costs.shape[1] == 1:
        order = np.lexsort((loss, costs[:, 0]))
        best = np.minimum.accumulate(loss[order])
        found = np.empty(len(loss))
        found[order] = loss[order] - best
        return found
    least, left = np.empty(len(loss)), np.ones(len(loss), bool)
    for i in np.argsort(loss, kind="stable"):
        if left[i]:  # on the front: no trial of a smaller loss costs as little
            reached = left & (costs >= costs[i]).all(axis=1)
            least[reached] = loss[i]
            left &= ~reached
    return np.asarray(loss - least)


class _Gain:
    """Expected gain in hypervolume, over a sample of points of the cost space.

    At each point the front has a least loss; a candidate gains there what it is expected to
    be below it, times the probability that its costs are. Exact for one known cost but for
    the sampling. ``top``: the loss of nothing at all; infinite: a little above the front's
    worst. ``logarithm``: the loss is one, and the gain is in its ``_POWER``; ``ratios``: costs
    count by their logarithm.
    """

    def __init__(
        self, loss: Array, costs: Array, top: float, logarithm: bool, ratios: bool, seed: int
    ) -> None:
        self.logarithm, self.ratios = logarithm, ratios
        count = costs.shape[1]
        self.shift = np.zeros(count)
        if not len(loss):
            self.levels, self.least, self.top = np.full((1, count), np.inf), np.array([np.inf]), 0.0
            return
        near = _gap(loss, costs) <= 0
        front, where = loss[near], costs[near]
        low, high = costs.min(axis=0), where.max(axis=0)
        self.shift = np.where(low > 0, 0.0, 1e-9 + np.abs(low) + 0.05 * (high - low))
        low, high = self._scale(low), self._scale(high)
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9
        if count == 1:
            unit = (np.arange(LEVELS)[:, None] + 0.5) / LEVELS
        elif count:
            unit = np.random.default_rng(seed).random((LEVELS * 2, count))
        else:
            unit = np.zeros((1, 0))
        self.levels = low + unit * (high - low)
        self.top = top if top < math.inf else float(front.max() + 0.1 * np.ptp(front) + 1e-9)
        inside = (self._scale(where)[None] <= self.levels[:, None]).all(axis=2)
        self.least = np.minimum(np.where(inside, front[None], self.top).min(axis=1), self.top)

    def _scale(self, costs: Array) -> Array:
        return np.asarray(np.log(np.maximum(costs + self.shift, 1e-300)) if self.ratios else costs)

    def __call__(self, mean: Array, deviation: Array, costs: Array, spreads: Array) -> Array:
        if not np.isfinite(self.least).all():  # nothing feasible yet: any candidate will do
            return np.ones(len(mean))
        value = self._scale(costs)
        width = spreads / np.maximum(costs + self.shift, 1e-300) if self.ratios else spreads
        gap = self.levels[None] - value[:, None]
        known = width[:, None] <= 1e-12
        inside = np.where(known, gap >= 0, ndtr(gap / np.where(known, 1.0, width[:, None])))
        share = inside.prod(axis=2)
        if self.logarithm:
            # E[max(0, f - Y)] of a lognormal Y
            m, s = _POWER * mean[:, None], _POWER * deviation[:, None]
            f = _POWER * (self.least[None] - self.top)
            z = (f + _POWER * self.top - m) / s
            m = m - _POWER * self.top
            expected = np.exp(f) * ndtr(z) - np.exp(np.minimum(m + s * s / 2, 50)) * ndtr(z - s)
        else:
            z = (self.least[None] - mean[:, None]) / deviation[:, None]
            density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            expected = deviation[:, None] * (z * ndtr(z) + density)
        return np.asarray((share * np.maximum(expected, 0.0)).mean(axis=1))
