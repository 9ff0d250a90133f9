"""The default sampler: a Gaussian process around the additive prior, and exact solutions.

The loss of a candidate is modelled as ``log loss = c + log Σ_l p_l(x_l) exp(e_l(x_l)) + g(x)``:
``p`` is the prior's divergence of each choice of each layer, ``e`` its correction (a Gaussian
process along each layer's choices, linearized, so that a layer counts by its share of the sum),
``g`` what layers do together (one process over all of them), and noise. Drawing ``e`` from its
posterior gives priors to solve exactly (Thompson 1933); neighbours of the front come on top. Of
all these the largest expected gain in hypervolume wins (Emmerich et al. 2006). Objectives that
are known functions of a candidate are not modelled; without a prior it is a plain process with a
constant mean.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import TrialState
from scipy.linalg import cho_solve, solve_triangular
from scipy.spatial.distance import cdist
from scipy.special import ndtr

from autoquant.task import Array

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Table = Mapping[str, Sequence[float]]  # parameter → a figure for each of its values, in order

ACTIVE = 256  # trials that the process is conditioned on
FITTED = 96  # trials that its hyperparameters are chosen on
DRAWS = 2  # priors from the posterior that an ask solves for
GRID = 512  # budgets of an exact solution
LEVELS = 96  # points of the cost space at which a gain is taken
STARTUP = 10  # random trials of a study without a prior
_ORDINAL = 24  # values up to which a number is a list of choices
_KNOTS = 9  # of a continuous parameter's own process
_LENGTH = 2.0  # of the correction's correlation, in choices
_RADIUS = 0.6  # of a smooth correlation, in ranges of a parameter
_FAR = 1.5  # of a log loss from what was predicted, at most
_POWER = 0.5  # of the loss whose gain is expected: between log (0) and plain (1)
_NOTHING = 1e-6  # of a parameter's largest prior: too little for trials to correct
_FINALISTS = 16  # whose known objectives are computed exactly
_SCALES = (0.15, 0.3, 0.6, 1.2)  # standard deviations of a correction
_JOINT = (0.03, 0.1, 0.3)  # of what layers do together
_NOISE = (0.02, 0.06, 0.15, 0.3)
_PLAIN_JOINT, _PLAIN_NOISE = (0.1, 0.4, 1.0), (0.03, 0.1, 0.3, 0.6)  # without a prior


@dataclass(frozen=True, slots=True)
class _Dimension:
    """One parameter as a position: an index of its values, or a point of the unit interval."""

    name: str
    distribution: BaseDistribution
    values: tuple[Any, ...] | None  # None: continuous
    categorical: bool
    root: Array  # (values or knots, same): square root of the correction's covariance

    @property
    def size(self) -> int:
        return len(self.root)

    def position(self, value: Any) -> float:
        if self.values is not None:
            return float(self._index(value))
        low, high, d = *self._range(), self.distribution
        at = math.log(value) if d.log else float(value)  # type: ignore[attr-defined]
        return min(max((at - low) / (high - low), 0.0), 1.0)

    def _index(self, value: Any) -> int:
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return int(d.to_internal_repr(value))
        assert isinstance(d, IntDistribution | FloatDistribution) and self.values is not None
        at = round((float(value) - d.low) / (d.step or 1))
        return int(min(max(at, 0), len(self.values) - 1))

    def value(self, position: float) -> Any:
        if self.values is not None:
            return self.values[round(position)]
        low, high, d = *self._range(), self.distribution
        at = low + position * (high - low)
        assert isinstance(d, IntDistribution | FloatDistribution)
        at = math.exp(at) if d.log else at
        if d.step is not None and not d.log:
            at = d.low + d.step * round((at - d.low) / d.step)
        at = min(max(at, d.low), d.high)
        return round(at) if isinstance(d, IntDistribution) else float(at)

    def _range(self) -> tuple[float, float]:
        d = self.distribution
        assert isinstance(d, IntDistribution | FloatDistribution)
        return (math.log(d.low), math.log(d.high)) if d.log else (float(d.low), float(d.high))

    def rows(self, positions: Array) -> Array:
        """(candidates, size): rows of ``root``; between two knots, their mean by distance."""
        if self.values is not None:
            return np.asarray(self.root[positions.astype(int)])
        at = positions * (self.size - 1)
        left = np.minimum(at.astype(int), self.size - 2)
        part = (at - left)[:, None]
        return np.asarray((1 - part) * self.root[left] + part * self.root[left + 1])

    def random(self, generator: np.random.Generator, count: int) -> Array:
        if self.values is None:
            return generator.random(count)
        return generator.integers(0, len(self.values), count).astype(float)

    def moved(self, generator: np.random.Generator, position: float) -> float:
        """A position near another: the next choice as a rule, sometimes any."""
        if self.values is None:
            near = position + generator.normal() * (0.15 if generator.random() < 0.7 else 0.02)
            return float(abs(min(near, 2 - near)) if -1 <= near <= 2 else generator.random())
        count = len(self.values)
        if self.categorical or generator.random() < 0.25:
            return float((position + generator.integers(1, count)) % count)
        step = 1 if position == 0 or (position < count - 1 and generator.random() < 0.5) else -1
        return position + step


def _dimension(name: str, distribution: BaseDistribution, listed: int = _ORDINAL) -> _Dimension:
    """``listed``: values up to which a number is a list of them."""
    values: tuple[Any, ...] | None = None
    categorical = isinstance(distribution, CategoricalDistribution)
    if isinstance(distribution, CategoricalDistribution):
        values = distribution.choices
    elif isinstance(distribution, IntDistribution | FloatDistribution):
        low, high, step = distribution.low, distribution.high, distribution.step
        count = 1 if distribution.single() else math.inf
        if step is not None and not distribution.log:
            count = round((high - low) / step) + 1
        elif isinstance(distribution, IntDistribution):
            count = high - low + 1
        if count <= listed:
            kind = int if isinstance(distribution, IntDistribution) else float
            values = tuple(kind(min(low + i * (step or 1), high)) for i in range(int(count)))
    size = _KNOTS if values is None else len(values)
    length = _LENGTH if values is not None else (_KNOTS - 1) / 2
    gaps = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    covariance = np.eye(size) if categorical else np.exp(-gaps / length)
    return _Dimension(name, distribution, values, categorical, np.linalg.cholesky(covariance))


@dataclass(slots=True)
class _Space:
    """Parameters in a fixed order, with the prior's logarithm and spread for each value."""

    dimensions: list[_Dimension]
    prior: list[Array | None]  # mean over the given priors, geometric
    spread: list[Array]  # standard deviation of their logarithms
    weights: Array  # of each parameter in what layers do together

    @property
    def known(self) -> list[int]:
        """Which parameters have a prior."""
        return [i for i, p in enumerate(self.prior) if p is not None]

    def encode(self, params: Mapping[str, Any]) -> Array:
        return np.array([d.position(params[d.name]) for d in self.dimensions])

    def decode(self, row: Array) -> dict[str, Any]:
        return {d.name: d.value(float(p)) for d, p in zip(self.dimensions, row, strict=True)}

    def coordinates(self, rows: Array) -> Array:
        """Where taxicab distance is what the joint process decays with."""
        columns = []
        for d, weight, at in zip(self.dimensions, self.weights, rows.T, strict=True):
            if d.categorical:
                columns += [weight * 0.5 * (at == i) for i in range(d.size)]
            else:
                span = max(d.size - 1, 1) if d.values is not None else 1
                columns.append(weight * at / span)
        return np.array(columns).T

    def sums(self, table: Sequence[Array | None], rows: Array) -> Array:
        """(candidates, parameters with a prior): what each adds."""
        columns = [table[i][rows[:, i].astype(int)] for i in self.known]  # type: ignore[index]
        return np.array(columns).T.reshape(len(rows), len(columns))


def _space(distributions: Mapping[str, BaseDistribution], priors: Sequence[Table]) -> _Space:
    listed = {n: max(_ORDINAL, *(len(p.get(n, ())) for p in priors), 0) for n in distributions}
    dimensions = [_dimension(name, d, listed[name]) for name, d in distributions.items()]
    means: list[Array | None] = []
    spreads = []
    for d in dimensions:
        given = [np.asarray(p[d.name], float) for p in priors if d.name in p]
        for values in given:
            if d.values is None or len(values) != len(d.values):
                raise ValueError(f"the prior of {d.name!r} has {len(values)} values, not {d.size}")
        if not given:
            means.append(None)
            spreads.append(np.zeros(d.size))
            continue
        logs = np.log(np.maximum(given, 1e-12))
        means.append(np.where(np.min(given, axis=0) <= 0, 0.0, np.exp(logs.mean(0))))
        spreads.append(np.where(means[-1] == 0, 0.0, logs.std(0)))
    ranges = np.array([1.0 if m is None else float(np.ptp(m)) for m in means])
    inside = np.array([m is not None for m in means])
    weights = np.ones(len(means))
    if inside.any():
        weights[inside] = np.sqrt(ranges[inside] / max(ranges[inside].max(), 1e-300))
    return _Space(dimensions, means, spreads, weights)


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


class _Process:
    """The Gaussian process of the loss and of what else is unknown, on one set of trials.

    ``targets`` (trials, outputs): the first is the (log) loss, the others are standardized
    inside. All outputs share one correlation.
    """

    def __init__(
        self,
        space: _Space,
        rows: Array,
        targets: Array,
        regressors: Callable[[Array], Array],
        noise: Array,
        offset: float,
        hyper: tuple[float, float, float] | None = None,
    ) -> None:
        self.space, self.rows, self.regressors, self.offset = space, rows, regressors, offset
        self.prior = list(space.prior)
        self.table = list(self.prior)
        self.correction = [np.zeros(d.size) for d in space.dimensions]
        self.has_prior = bool(space.known)
        self.scale = 1.0
        if self.has_prior and offset > 0:  # a loss that starts above zero
            total = space.sums(self.prior, rows).sum(1)
            loss = np.exp(targets[:, 0]) - offset
            seen = (loss > offset) & (total > 0)
            if seen.any():
                self.scale = float(np.median(loss[seen] / total[seen]))
        self.coordinates = space.coordinates(rows)
        joint = self._joint(self.coordinates)
        rest = targets[:, 1:]
        self.fits = np.zeros((0, 0))
        if rest.shape[1]:
            design = regressors(rows)
            self.fits = np.linalg.lstsq(design, rest, rcond=None)[0]
            rest = rest - design @ self.fits
        self.spreads = np.maximum(rest.std(0), 1e-9) if rest.size else np.ones(rest.shape[1])
        for step in range((3 if len(rows) <= FITTED else 2) if self.has_prior else 1):
            features = self._features(rows)
            mean, lean = self._mean(rows)
            first = targets[:, 0] - mean + lean
            self.center = float(np.median(first - lean))
            if self.has_prior:  # outputs that broke are no more than far off
                gap = np.clip(first - lean - self.center, -_FAR, _FAR)
                first = lean + self.center + gap
            else:
                self.center = float(first.mean())
            self.unit = 1.0 if self.has_prior else max(float(first.std()), 1e-9)
            residual = np.column_stack([(first - self.center) / self.unit, rest / self.spreads])
            parts = features @ features.T, joint
            if hyper is None or step == 0:
                self.hyper = hyper or self._choose(parts, residual, noise)
            self._condition(parts, residual, noise, features)
            if self.has_prior:
                self._correct()

    def _features(self, rows: Array) -> Array:
        """(candidates, values of all parameters): additive effects, of unit scale."""
        space, columns = self.space, []
        shares = self._shares(rows)
        at = {d: i for i, d in enumerate(space.known)}
        count = math.sqrt(max(len(space.dimensions), 1))
        for i, d in enumerate(space.dimensions):
            found = d.rows(rows[:, i])
            if i in at:
                index = rows[:, i].astype(int)
                extra = 1 + space.spread[i][index]  # where priors disagree, correct more
                found = found * (shares[:, at[i]] * extra)[:, None]
            elif not self.has_prior:
                found = found / count
            columns.append(found)
        return np.concatenate(columns, axis=1) if columns else np.zeros((len(rows), 0))

    def _joint(self, coordinates: Array) -> Array:
        """Correlation with the trials of what parameters do together: exponential around a
        prior, smooth (Matérn 5/2) without one."""
        if self.has_prior:
            return np.asarray(np.exp(-cdist(coordinates, self.coordinates, "cityblock")))
        far = math.sqrt(5) / _RADIUS * cdist(coordinates, self.coordinates)
        return np.asarray((1 + far + far * far / 3) * np.exp(-far))

    def _shares(self, rows: Array) -> Array:
        found = self.scale * self.space.sums(self.table, rows)
        return np.asarray(found / np.maximum(found.sum(1) + self.offset, 1e-12)[:, None])

    def _mean(self, rows: Array) -> tuple[Array, Array]:
        """The mean under the corrected table, and what its corrections add by linearization."""
        if not self.has_prior:
            return np.zeros(len(rows)), np.zeros(len(rows))
        total = self.scale * self.space.sums(self.table, rows).sum(1)
        shares = self._shares(rows)
        lean = np.zeros(len(rows))
        for column, i in enumerate(self.space.known):
            lean += shares[:, column] * self.correction[i][rows[:, i].astype(int)]
        return np.log(np.maximum(total, 1e-9) + self.offset), lean

    def _choose(
        self, parts: tuple[Array, Array], residual: Array, noise: Array
    ) -> tuple[float, float, float]:
        """Hyperparameters of largest marginal likelihood on a grid, under a weak prior."""
        step = max(1, math.ceil(len(residual) / FITTED))
        pick = np.arange(len(residual))[::step]
        additive, joint = (p[np.ix_(pick, pick)] for p in parts)
        found, noise = residual[pick], noise[pick]
        if len(pick) < 4:
            return (0.3, 0.1, 0.06) if self.has_prior else (0.6, 0.4, 0.1)
        joints = _JOINT if self.has_prior else _PLAIN_JOINT
        noises = _NOISE if self.has_prior else _PLAIN_NOISE
        best, choice = -math.inf, (0.3, joints[1], noises[1])
        for a in _SCALES:
            for b in joints:
                base = a * a * additive + b * b * joint + 1.0
                for c in noises:
                    matrix = base + np.diag(c * c + noise)
                    lower = np.linalg.cholesky(matrix)
                    half = solve_triangular(lower, found, lower=True, check_finite=False)
                    score = -0.5 * float((half**2).sum())
                    score -= found.shape[1] * float(np.log(np.diag(lower)).sum())
                    score -= 0.5 * math.log(a / 0.3) ** 2 + 0.25 * math.log(c / 0.06) ** 2
                    if score > best:
                        best, choice = score, (a, b, c)
        return choice

    def _condition(
        self, parts: tuple[Array, Array], residual: Array, noise: Array, features: Array
    ) -> None:
        a, b, c = self.hyper
        matrix = a * a * parts[0] + b * b * parts[1] + 1.0
        self.lower = np.linalg.cholesky(matrix + np.diag(c * c + noise + 1e-9))
        self.alpha = cho_solve((self.lower, True), residual, check_finite=False)
        self.features, self.noise, self.residual = features, noise, residual

    def _correct(self) -> None:
        """The corrections' posterior mean, and the table that it makes."""
        pull = self.hyper[0] ** 2 * (self.features.T @ self.alpha[:, 0])
        self._set(self._split(pull))

    def _split(self, pull: Array) -> list[Array]:
        found, at = [], 0
        for i, d in enumerate(self.space.dimensions):
            part = d.root @ pull[at : at + d.size]
            found.append(part * (1 + self.space.spread[i]))
            at += d.size
        return found

    def _set(self, correction: list[Array]) -> None:
        self.correction = [np.clip(c, -4, 4) for c in correction]
        self.table = self._tables(self.correction)

    def _tables(self, correction: Sequence[Array]) -> list[Array | None]:
        return [
            None if p is None else p * np.exp(np.clip(c, -4, 4))
            for p, c in zip(self.prior, correction, strict=True)
        ]

    def draw(self, generator: np.random.Generator) -> list[Array | None]:
        """A table from the posterior (Matheron's rule)."""
        a, b, c = self.hyper
        count, width = self.features.shape
        free = generator.normal(size=width)
        made = a * self.features @ free + generator.normal()
        made += generator.normal(size=count) * np.sqrt(b * b + c * c + self.noise)
        gap = self.residual[:, 0] - made
        solved = cho_solve((self.lower, True), gap, check_finite=False)
        return self._tables(self._split(a * free + a * a * (self.features.T @ solved)))

    def spread_of_corrections(self) -> list[Array]:
        """Standard deviations of each value's correction, posterior."""
        a = self.hyper[0]
        half = solve_triangular(self.lower, self.features, lower=True, check_finite=False)
        covariance = a * a * np.eye(half.shape[1]) - a**4 * (half.T @ half)
        found, at = [], 0
        for i, d in enumerate(self.space.dimensions):
            block = covariance[at : at + d.size, at : at + d.size]
            variance = np.einsum("ij,jk,ik->i", d.root, block, d.root)
            found.append(np.sqrt(np.maximum(variance, 0)) * (1 + self.space.spread[i]))
            at += d.size
        return found

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Mean and standard deviation (candidates, outputs), of what is without noise."""
        a, b, _ = self.hyper
        features, space = self._features(rows), self.space
        cross = (
            a * a * (features @ self.features.T)
            + b * b * self._joint(space.coordinates(rows))
            + 1.0
        )
        half = solve_triangular(self.lower, cross.T, lower=True, check_finite=False)
        own = a * a * (features**2).sum(1) + b * b + 1.0
        deviation = np.sqrt(np.maximum(own - (half**2).sum(0), 1e-8))
        found = cross @ self.alpha
        mean, lean = self._mean(rows)
        means = np.empty_like(found)
        means[:, 0] = mean - lean + self.center + self.unit * found[:, 0]
        if found.shape[1] > 1:
            means[:, 1:] = self.regressors(rows) @ self.fits + found[:, 1:] * self.spreads
        scales = np.concatenate([[self.unit], self.spreads])
        return means, deviation[:, None] * scales


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
        self._cache: tuple[list[Any], _Space] | None = None
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

    def _of(self, distributions: Mapping[str, BaseDistribution]) -> _Space:
        items = list(distributions.items())
        if self._cache is None or self._cache[0] != items:
            self._cache = items, _space(distributions, self.priors)
            self._forget()
        return self._cache[1]

    def _forget(self) -> None:
        self._log = _Log()
        self._pending.clear()
        self._hyper.clear()
        self._exact.clear()

    def _read(self, study: Study, space: _Space) -> tuple[_Observed, Array, set[bytes]]:
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
        self, log: _Log, trial: FrozenTrial, row: Array, signs: Sequence[float], space: _Space
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

    def _row(self, trial: FrozenTrial, space: _Space) -> Array | None:
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

    def _figures(self, space: _Space, row: Array) -> tuple[tuple[float | None, ...], float]:
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

    def _propose(self, study: Study, number: int, space: _Space) -> Array:
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

    def _solutions(self, space: _Space, count: int) -> list[Array]:
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

    def _costs(self, space: _Space, table: Table) -> list[Array]:
        return [
            np.asarray(table.get(d.name, np.zeros(d.size)), float)
            for i, d in enumerate(space.dimensions)
            if i in set(space.known)
        ]

    def _loss(self, values: Array, signs: Sequence[float], space: _Space) -> Array:
        """The modelled loss: its logarithm where there is a prior."""
        column = values[:, self.learned]
        if not space.known:
            return column
        gap = column - signs[self.learned] * self.ideal
        return np.log(np.maximum(gap, 0.0) + max(self.noise, 1e-9))

    def _top(self, signs: Sequence[float], space: _Space) -> float:
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

    def _regressors(self, space: _Space) -> Callable[[Array], Array]:
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
        space: _Space,
        observed: _Observed,
        signs: Sequence[float],
        hyper: tuple[float, float, float] | None = None,
    ) -> _Process:
        """Condition on an active set; hyperparameters are chosen as trials grow by a fifth."""
        if space.known and self.noise <= 0:  # a loss of zero, as float's, has no logarithm
            gap = observed.values[:, self.learned] - signs[self.learned] * self.ideal
            if (gap > 1e-9).sum() >= 4:
                observed = observed.take(np.flatnonzero(gap > 1e-9))
        count = len(observed.rows)
        offset = max(self.noise, 1e-9) if space.known and self.noise > 0 else 0.0
        loss = self._loss(observed.values, signs, space)

        def made(part: Array, hyper: tuple[float, float, float] | None) -> _Process:
            seen = observed.take(part)
            others = self._others(observed.values.shape[1])
            targets = np.column_stack([loss[part], seen.values[:, others], seen.limits])
            extra = (offset / np.exp(loss[part])) ** 2 if offset else np.zeros(len(part))
            return _Process(
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
        model: _Process,
        observed: _Observed,
        running: Array,
        space: _Space,
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

    def _fill(self, values: Array, rows: Array, space: _Space, signs: Sequence[float]) -> Array:
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
        model: _Process,
        observed: _Observed,
        space: _Space,
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
        self, observed: _Observed, space: _Space, signs: Sequence[float], top: float
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
        model: _Process,
        observed: _Observed,
        pool: Array,
        space: _Space,
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

    def _unseen(self, space: _Space, generator: np.random.Generator, seen: set[bytes]) -> Array:
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
