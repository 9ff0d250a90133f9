"""What the sampler believes: a Gaussian process around the additive prior, and its parameters.

The loss of a candidate is modelled as ``log loss = c + log Σ_l p_l(x_l) exp(e_l(x_l)) + g(x)``:
``p`` is the prior's divergence of each choice of each layer, ``e`` its correction (a Gaussian
process along each layer's choices, linearized, so that a layer counts by its share of the sum),
``g`` what layers do together (one process over all of them), and noise. Without a prior it is a
plain process with a constant mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from scipy.linalg import cho_solve, solve_triangular
from scipy.spatial.distance import cdist

from autoquant.task import Array

Table = Mapping[str, Sequence[float]]  # parameter → a figure for each of its values, in order

FITTED = 96  # trials that its hyperparameters are chosen on
_ORDINAL = 24  # values up to which a number is a list of choices
_KNOTS = 9  # of a continuous parameter's own process
_LENGTH = 2.0  # of the correction's correlation, in choices
_RADIUS = 0.6  # of a smooth correlation, in ranges of a parameter
_FAR = 1.5  # of a log loss from what was predicted, at most
_SCALES = (0.15, 0.3, 0.6, 1.2)  # standard deviations of a correction
_JOINT = (0.03, 0.1, 0.3)  # of what layers do together
_NOISE = (0.02, 0.06, 0.15, 0.3)
_PLAIN_JOINT, _PLAIN_NOISE = (0.1, 0.4, 1.0), (0.03, 0.1, 0.3, 0.6)  # without a prior


@dataclass(frozen=True, slots=True)
class Dimension:
    """One parameter as a position: an index of its values, or a point of the unit interval."""

    name: str
    distribution: BaseDistribution
    values: tuple[Any, ...] | None  # None: continuous
    categorical: bool
    root: Array  # (values or knots, same): square root of the correction's covariance

    @property
    def size(self) -> int:
        """How many values, or knots of a continuous one."""
        return len(self.root)

    def position(self, value: Any) -> float:
        """Where a value is."""
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
        """What is at a position."""
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
        """(count,): positions, evenly distributed."""
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


def _dimension(name: str, distribution: BaseDistribution, listed: int = _ORDINAL) -> Dimension:
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
    return Dimension(name, distribution, values, categorical, np.linalg.cholesky(covariance))


@dataclass(slots=True)
class SearchSpace:
    """Parameters in a fixed order, with the prior's logarithm and spread for each value."""

    dimensions: list[Dimension]
    prior: list[Array | None]  # mean over the given priors, geometric
    spread: list[Array]  # standard deviation of their logarithms
    weights: Array  # of each parameter in what layers do together

    @property
    def known(self) -> list[int]:
        """Which parameters have a prior."""
        return [i for i, p in enumerate(self.prior) if p is not None]

    def encode(self, params: Mapping[str, Any]) -> Array:
        """(parameters,): the positions of a trial's values."""
        return np.array([d.position(params[d.name]) for d in self.dimensions])

    def decode(self, row: Array) -> dict[str, Any]:
        """The values at a row of positions."""
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


def space_of(distributions: Mapping[str, BaseDistribution], priors: Sequence[Table]) -> SearchSpace:
    """Distributions in their order, with the mean and the spread of the logarithms of priors."""
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
    return SearchSpace(dimensions, means, spreads, weights)


class GaussianProcess:
    """The Gaussian process of the loss and of what else is unknown, on one set of trials.

    ``targets`` (trials, outputs): the first is the (log) loss, the others are standardized
    inside. All outputs share one correlation.
    """

    def __init__(
        self,
        space: SearchSpace,
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
