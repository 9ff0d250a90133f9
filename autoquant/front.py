"""The Pareto front: non-dominated members, hypervolume, and choosing one of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autoquant.candidate import Candidate
from autoquant.errors import CandidateError, NoFeasibleMember, RunError, nearest
from autoquant.result import COST_NAMES, Cost, Score, TrialResult
from autoquant.task import Array


@dataclass(frozen=True, slots=True)
class Member:
    """One non-dominated trial: what the search knew, what verification found, its file.

    ``verified`` is None until the member was scored on the test split and measured.
    ``folder`` is the run's; it is not part of the JSON.
    """

    trial: int
    candidate: Candidate
    searched: Score
    predicted: Cost
    verified: Mapping[str, Any] | None
    artifact: str | None
    folder: Path | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """The candidate's key."""
        return self.candidate.key

    @property
    def latency_ms(self) -> float | None:
        """Measured where it was measured, else predicted."""
        if self.verified and self.verified.get("latency_ms") is not None:
            return float(self.verified["latency_ms"])
        return self.predicted.latency_ms

    def objective(self, name: str) -> float:
        """Value of an objective: searched accuracy, or a predicted cost."""
        return self.searched.value if name == "accuracy" else float(getattr(self.predicted, name))

    def to_dict(self) -> dict[str, Any]:
        """The member's entry in front.json."""
        return {
            "trial": self.trial,
            "key": self.key,
            "candidate": self.candidate.to_dict(),
            "searched": self.searched.to_dict(),
            "predicted": self.predicted.to_dict(),
            "verified": None if self.verified is None else dict(self.verified),
            "artifact": self.artifact,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], folder: Path | None = None) -> Member:
        """Read ``to_dict``'s form; ``folder`` is the run's."""
        return cls(
            trial=d["trial"],
            candidate=Candidate.from_dict(d["candidate"]),
            searched=Score.from_dict(d["searched"]),
            predicted=Cost.from_dict(d["predicted"]),
            verified=d.get("verified"),
            artifact=d.get("artifact"),
            folder=folder,
        )


@dataclass(frozen=True, slots=True)
class Front:
    """The result of a search: members by searched accuracy, highest first.

    ``reference_point``: the corner that ``hypervolume`` is measured from (see
    `reference_point`). ``folder`` is where the run lives; it is not part of the JSON.
    """

    run: str
    task: str
    hardware: str
    objectives: tuple[str, ...]
    reference_point: Mapping[str, float]
    hypervolume: float
    trials: int
    seconds: float
    baseline: Mapping[str, Any]
    members: tuple[Member, ...]
    folder: Path | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of front.json."""
        return {
            "run": self.run,
            "task": self.task,
            "hardware": self.hardware,
            "objectives": list(self.objectives),
            "reference_point": dict(self.reference_point),
            "hypervolume": self.hypervolume,
            "trials": self.trials,
            "seconds": self.seconds,
            "baseline": dict(self.baseline),
            "members": [member.to_dict() for member in self.members],
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any], folder: Path | None = None) -> Front:
        """Read ``to_dict``'s form."""
        rest = {
            name: d[name]
            for name in (
                "run", "task", "hardware", "reference_point",
                "hypervolume", "trials", "seconds", "baseline",
            )
        }  # fmt: skip
        return cls(
            **rest,
            objectives=tuple(d["objectives"]),
            members=tuple(Member.from_dict(m, folder) for m in d["members"]),
            folder=folder,
        )

    @classmethod
    def read(cls, run: str | Path, runs_dir: str | Path = "runs") -> Front:
        """Read a finished run: a name under ``runs_dir``, or its folder. Raises RunError."""
        folder = find_run(run, runs_dir)
        path = folder / "front.json"
        if not path.is_file():
            raise RunError(f"{folder}: no front.json; the search has not finished (--resume it)")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")), folder)
        except (OSError, ValueError, KeyError, TypeError, CandidateError) as error:
            raise RunError(f"{path}: not a front: {type(error).__name__}: {error}") from None

    def member(self, trial: int) -> Member:
        """The member of one trial. Raises RunError where it is not on the front."""
        for member in self.members:
            if member.trial == trial:
                return member
        raise RunError(
            f"run {self.run!r}: trial {trial} is not on the front; "
            f"{nearest(str(trial), [str(m.trial) for m in self.members])}"
        )

    def knee(self) -> Member:
        """The member nearest to float's accuracy at no cost.

        Distance in the box between the reference point and (float's metric, zero costs), among
        the members inside that box; among all where none is. Raises NoFeasibleMember for an
        empty front.
        """
        if not self.members:
            raise NoFeasibleMember(f"run {self.run!r}: the front is empty")
        names = list(self.reference_point)
        corner, ideal = box_of(self.reference_point, float(self.baseline["accuracy"]))
        points = _points(self.members, names)
        outside = (points >= corner).any(axis=1)
        distance = (((points - ideal) / (corner - ideal)) ** 2).sum(axis=1)
        if not outside.all():
            distance = np.where(outside, np.inf, distance)
        return self.members[int(np.argmin(distance))]

    def choose(
        self,
        *,
        max_drop: float | None = None,
        max_latency_ms: float | None = None,
        max_size_bytes: int | None = None,
    ) -> Member:
        """The best member within limits; without limits, the knee.

        ``max_drop`` is on the validation split, in the metric's units: the cheapest member
        within it (cost objectives as shares of the baseline, summed). Without ``max_drop``:
        the most accurate within the other limits. Raises NoFeasibleMember.
        """
        if max_drop is None and max_latency_ms is None and max_size_bytes is None:
            return self.knee()
        fitting = [
            m
            for m in self.members
            if (max_drop is None or m.searched.drop <= max_drop)
            and (
                max_latency_ms is None
                or (m.latency_ms is not None and m.latency_ms <= max_latency_ms)
            )
            and (max_size_bytes is None or m.predicted.size_bytes <= max_size_bytes)
        ]
        if not fitting:
            raise NoFeasibleMember(
                f"run {self.run!r}: no member within the limits; the front has {self._span()}"
            )
        if max_drop is None:
            return max(fitting, key=lambda m: m.searched.value)
        costs = [name for name in self.objectives if name != "accuracy"]
        worst = {name: max(m.objective(name) for m in self.members) or 1.0 for name in costs}
        return min(fitting, key=lambda m: sum(m.objective(n) / worst[n] for n in costs))

    def nearby(self, member: Member) -> dict[str, Member]:
        """What else is close: the best ``smaller``, ``faster`` and ``more accurate`` member.

        The most accurate of the smaller ones and of the faster ones, the smallest of the more
        accurate ones; those that there are.
        """
        found = {}
        accurate = {"key": lambda m: (m.searched.value, -m.predicted.size_bytes)}
        smaller = [m for m in self.members if m.predicted.size_bytes < member.predicted.size_bytes]
        if smaller:
            found["smaller"] = max(smaller, **accurate)
        own = member.latency_ms
        times = [(m, m.latency_ms) for m in self.members]
        faster = [m for m, time in times if own is not None and time is not None and time < own]
        if faster:
            found["faster"] = max(faster, **accurate)
        better = [m for m in self.members if m.searched.value > member.searched.value]
        if better:
            found["more accurate"] = min(better, key=lambda m: m.predicted.size_bytes)
        return found

    def _span(self) -> str:
        """The range of what can be limited, for messages."""
        if not self.members:
            return "no members"
        drops = [m.searched.drop for m in self.members]
        sizes = [m.predicted.size_bytes for m in self.members]
        text = f"drops {min(drops):.4f}…{max(drops):.4f}, {min(sizes):,}…{max(sizes):,} bytes"
        times = [m.latency_ms for m in self.members if m.latency_ms is not None]
        return text + (f", {min(times):.3f}…{max(times):.3f} ms" if times else "")

    def _repr_html_(self) -> str:
        """A notebook shows the table."""
        head = "<tr><th>trial</th><th>accuracy</th><th>drop</th><th>ms</th><th>bytes</th></tr>"
        rows = "".join(
            f"<tr><td>{m.trial}</td><td>{m.searched.value:.4f}</td><td>{m.searched.drop:+.4f}</td>"
            f"<td>{'' if m.latency_ms is None else f'{m.latency_ms:.3f}'}</td>"
            f"<td>{m.predicted.size_bytes:,}</td></tr>"
            for m in self.members
        )
        return f"<table>{head}{rows}</table>"


def find_run(run: str | Path, runs_dir: str | Path = "runs") -> Path:
    """The folder of a run: a name under ``runs_dir``, or a path. Raises RunError."""
    for folder in (Path(runs_dir) / run, Path(run)):
        if folder.is_dir():
            return folder
    base = Path(runs_dir)
    names = (
        [p.name for p in base.iterdir() if (p / "study.yaml").is_file()] if base.is_dir() else []
    )
    raise RunError(f"no run {str(run)!r} under {base}; {nearest(str(run), names)}")


def check_objectives(objectives: Sequence[str]) -> tuple[str, ...]:
    """``accuracy`` and at least one predicted figure. Raises RunError naming what is wrong."""
    valid = ("accuracy", *COST_NAMES)
    for name in objectives:
        if name not in valid:
            raise RunError(f"--objectives: unknown {name!r}; {nearest(name, valid)}")
    if len(set(objectives)) != len(objectives):
        raise RunError("--objectives: a name stands twice")
    if "accuracy" not in objectives or len(objectives) < 2:
        raise RunError("--objectives: give accuracy and at least one cost, such as latency_ms")
    return tuple(objectives)


def _points(items: Sequence[Member], objectives: Sequence[str]) -> Array:
    """Objectives as columns to be minimized."""
    sign = [-1.0 if name == "accuracy" else 1.0 for name in objectives]
    return np.array(
        [[s * m.objective(n) for s, n in zip(sign, objectives, strict=True)] for m in items]
    )


def nondominated(points: Array) -> Array:
    """Mask of the rows that no other row dominates; all columns are minimized.

    Of equal rows the first stays. O(n²) comparisons.
    """
    keep = np.ones(len(points), bool)
    for i, point in enumerate(points):
        others = np.delete(points, i, axis=0)
        dominated = (others <= point).all(axis=1) & (others < point).any(axis=1)
        equal = (points[:i] == point).all(axis=1)
        keep[i] = not dominated.any() and not equal.any()
    return keep


def ranked(points: Array) -> list[int]:
    """Indices from the best to the worst: by front of non-domination, within one by how far the
    neighbours are, the ends first (Deb et al. 2002). ``points``: rows to be minimized."""
    left, order = np.arange(len(points)), list[int]()
    while len(left):
        first = left[nondominated(points[left])]
        room = np.zeros(len(first))
        for column in points[first].T:
            by = np.argsort(column, kind="stable")
            width = max(float(column[by[-1]] - column[by[0]]), 1e-12)
            room[by[[0, -1]]] = np.inf
            room[by[1:-1]] += (column[by[2:]] - column[by[:-2]]) / width
        order += [int(i) for i in first[np.argsort(-room, kind="stable")]]
        left = np.setdiff1d(left, first)
    return order


def hypervolume(points: Array, reference: Array) -> float:
    """Volume that ``points`` dominate below ``reference``; all columns are minimized.

    Exact, by slicing along the last objective (While et al. 2006): fine for fronts of hundreds
    and up to four objectives.
    """
    inside = points[(points < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside[:, 0].min())
    if inside.shape[1] == 2:
        ordered = inside[np.argsort(inside[:, 0])]
        right = np.append(ordered[1:, 0], reference[0])
        lowest = np.minimum.accumulate(ordered[:, 1])
        return float(((right - ordered[:, 0]) * (reference[1] - lowest)).sum())
    inside = inside[nondominated(inside)]
    ordered = inside[np.argsort(inside[:, -1])]
    depth = np.append(ordered[1:, -1], reference[-1]) - ordered[:, -1]
    return float(
        sum(
            d * hypervolume(ordered[: i + 1, :-1], reference[:-1])
            for i, d in enumerate(depth)
            if d > 0
        )
    )


def reference_point(baseline: Cost, accuracy: float, objectives: Sequence[str]) -> dict[str, float]:
    """Where the hypervolume starts: a tenth below float's metric, a tenth above float's costs.

    The tenth is of the metric's absolute value (0.1 where that is zero).
    """
    return {
        name: accuracy - 0.1 * (abs(accuracy) or 1.0)
        if name == "accuracy"
        else 1.1 * float(getattr(baseline, name))
        for name in objectives
    }


def relative_hypervolume(
    members: Sequence[Member], reference: Mapping[str, float], accuracy: float
) -> float:
    """Hypervolume as a share of the box from ``reference`` to (float's metric, zero costs).

    More than 1 is possible where members beat float.
    """
    if not members:
        return 0.0
    corner, ideal = box_of(reference, accuracy)
    volume = hypervolume(_points(members, list(reference)), corner)
    return volume / float(np.prod(corner - ideal))


def box_of(reference: Mapping[str, float], accuracy: float) -> tuple[Array, Array]:
    """The reference point and the ideal one, as columns to be minimized."""
    corner = np.array([-v if n == "accuracy" else v for n, v in reference.items()])
    ideal = np.array([-accuracy if n == "accuracy" else 0.0 for n in reference])
    return corner, ideal


def best_of(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[TrialResult]:
    """The scored results from the best to the worst by all objectives; see `ranked`."""
    scored = [r for r in results if r.score is not None and r.predicted is not None]
    rows = [
        [-r.score.value if n == "accuracy" else float(getattr(r.predicted, n)) for n in objectives]
        for r in scored
        if r.score is not None
    ]
    return [scored[i] for i in ranked(np.array(rows).reshape(len(scored), len(objectives)))]


def members_of(results: Sequence[TrialResult], objectives: Sequence[str]) -> list[Member]:
    """The non-dominated complete trials, by searched accuracy, highest first."""
    members = [
        Member(r.trial, r.candidate, r.score, r.predicted, None, None)
        for r in results
        if r.status == "complete" and r.score is not None and r.predicted is not None
    ]
    if not members:
        return []
    keep = nondominated(_points(members, objectives))
    front = [member for member, kept in zip(members, keep, strict=True) if kept]
    return sorted(front, key=lambda m: (-m.searched.value, m.predicted.size_bytes))
