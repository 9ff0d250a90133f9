"""What the trials of a run say together: how the front grew, and what paid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from autoquant.front import box_of, hypervolume
from autoquant.report.text import Record, choices_of
from autoquant.task import Array

_POINTS = 60  # of the curve, at most: a hypervolume takes milliseconds


def progress(front: Record, trials: Sequence[Record]) -> list[tuple[int, float, float]]:
    """(trials, their seconds summed, relative hypervolume) where the front changed.

    Complete trials count, as in ``front.json``; its last value is the front's.
    """
    reference = front.get("reference_point") or {}
    accuracy = front["baseline"].get("accuracy")
    if not reference or accuracy is None:
        return []
    corner, ideal = box_of(reference, accuracy)
    steps: list[tuple[int, float, Array]] = []
    kept = np.empty((0, len(reference)))
    seconds = 0.0
    for count, trial in enumerate(sorted(trials, key=lambda t: int(t["trial"])), 1):
        seconds += trial.get("seconds") or 0.0
        point = _point(trial, list(reference))
        if point is None or not (point < corner).all() or (kept <= point).all(axis=1).any():
            continue
        kept = np.vstack([kept[~(point <= kept).all(axis=1)], point])
        steps.append((count, seconds, kept))
    if not steps:
        return []
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(_POINTS, len(steps))).round().astype(int))
    volume = float(np.prod(corner - ideal))
    curve = [
        (count, took, hypervolume(points, corner) / volume)
        for count, took, points in (steps[i] for i in chosen)
    ]
    return [(0, 0.0, 0.0), *curve, (len(trials), seconds, curve[-1][2])]


def _point(trial: Record, objectives: Sequence[str]) -> Array | None:
    """The objectives of a complete trial, all to be minimized."""
    if trial["status"] != "complete" or not (trial.get("score") and trial.get("predicted")):
        return None
    values = [
        -trial["score"]["accuracy"] if name == "accuracy" else trial["predicted"].get(name)
        for name in objectives
    ]
    return None if None in values else np.array(values, dtype=np.float64)


def _as_trial(member: Record) -> Record:
    return {**member, "status": "complete", "score": member["searched"]}


def by_origin(front: Record, trials: Sequence[Record]) -> list[tuple[str, int, int]]:
    """(what proposed trials, how many, how many of them are on the front), most trials first."""
    on_front = {m["trial"] for m in front["members"]}

    def origin(trial: Record) -> str:
        return str(trial.get("origin") or "sampler").split()[0]

    tried = Counter(origin(t) for t in trials)
    kept = Counter(origin(t) for t in trials if t["trial"] in on_front)
    return [(name, count, kept[name]) for name, count in tried.most_common()]


def what_never_paid(front: Record, trials: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Sentences on choices that no member has, and on layers where all members agree."""
    members = [choices_of(m["candidate"], names) for m in front["members"]]
    if not members or not names:
        return []
    tried: Counter[str] = Counter()
    for trial in trials:
        tried.update({str(c) for c in choices_of(trial["candidate"], names)})
    used = {str(c) for row in members for c in row}
    found = [
        f"No member has a layer at {choice}, which {count} trials tried."
        for choice, count in tried.most_common()
        if choice not in used
    ]
    if len(members) > 1:
        same: dict[str, list[str]] = {}
        for name, column in zip(names, zip(*members, strict=True), strict=True):
            if len(set(column)) == 1:
                same.setdefault(str(column[0]), []).append(name)
        for choice, layers in same.items():
            shown = ", ".join(layers[:6]) + (f" and {len(layers) - 6} more" if layers[6:] else "")
            found.append(f"Every member has {choice} at {shown}.")
    return found


def joint_front(fronts: Sequence[Record], objectives: Sequence[str]) -> list[set[int]]:
    """For each run the trials that no member of any of the runs dominates."""
    rows = [
        (
            i,
            int(m["trial"]),
            _point({**m, "status": "complete", "score": m["searched"]}, objectives),
        )
        for i, front in enumerate(fronts)
        for m in front["members"]
    ]
    found: list[set[int]] = [set() for _ in fronts]
    known = [(i, trial, point) for i, trial, point in rows if point is not None]
    if not known:
        return found
    points = np.array([point for _, _, point in known])
    for i, trial, point in known:
        dominated = (points <= point).all(axis=1) & (points < point).any(axis=1)
        if not dominated.any():  # what two runs found counts for both
            found[i].add(trial)
    return found


def joint_hypervolume(
    front: Record, objectives: Sequence[str], corner: Array, ideal: Array
) -> float:
    """The hypervolume of one of several fronts, as a share of a box that they have in common."""
    points = [_point(_as_trial(m), objectives) for m in front["members"]]
    known = [p for p in points if p is not None]
    if not known:
        return 0.0
    return hypervolume(np.array(known), corner) / float(np.prod(corner - ideal))
