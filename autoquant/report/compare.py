"""Runs of one task side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autoquant.errors import RunError
from autoquant.front import box_of
from autoquant.report.history import joint_front, joint_hypervolume
from autoquant.report.text import (
    MISSING,
    Record,
    amount,
    duration,
    figure_text,
    metric_of,
    tail_of,
)

if TYPE_CHECKING:
    from rich.table import Table

DROPS = (0.005, 0.01, 0.02)  # of top-1, or shares of the float network's metric


def compare_fronts(fronts: Sequence[Record]) -> dict[str, Any]:
    """What runs of one task and metric found, against one reference point.

    ``fronts``: contents of ``front.json``. Objectives are those that all runs have; on different
    hardware latency and energy are not compared. The reference point is the worst of theirs.
    Raises RunError where the runs cannot be compared, or one found nothing.
    """
    first = fronts[0]
    for front in fronts:
        if not front["members"]:
            raise RunError(f"run {front['run']!r}: its front is empty; there is nothing to compare")
    for other in fronts[1:]:
        for what, of in (("task", _task), ("metric", _metric), ("split", _split)):
            if of(first) != of(other):
                raise RunError(
                    f"runs {first['run']!r} and {other['run']!r} cannot be compared: "
                    f"{what} {of(first)} and {of(other)}"
                )
    devices = {f["hardware"] for f in fronts}
    shared = [n for n in first["objectives"] if all(n in f["objectives"] for f in fronts)]
    if len(devices) > 1:
        shared = [n for n in shared if n not in ("latency_ms", "energy_mj")]
    costs = [n for n in shared if n != "accuracy"] or ["size_bytes"]
    objectives = ["accuracy", *costs]
    worst = {
        n: (min if n == "accuracy" else max)(_corner(f, n) for f in fronts) for n in objectives
    }
    accuracy = max(float(f["baseline"]["accuracy"]) for f in fronts)
    corner, ideal = box_of(worst, accuracy)
    joint = joint_front(fronts, objectives)
    return {
        "task": first["task"],
        "metric": _metric(first),
        "objectives": objectives,
        "reference_point": worst,
        "runs": [
            {
                "run": front["run"],
                "hardware": front["hardware"],
                "trials": front["trials"],
                "seconds": front["seconds"],
                "members": len(front["members"]),
                "joint_front": sorted(kept),
                "hypervolume": joint_hypervolume(front, objectives, corner, ideal),
                "smallest": {str(drop): _smallest(front, drop) for drop in DROPS},
            }
            for front, kept in zip(fronts, joint, strict=True)
        ],
    }


def _task(front: Record) -> str:
    return repr(front["task"])


def _metric(front: Record) -> str:
    return str(front["members"][0]["searched"].get("metric", "top1"))


def _split(front: Record) -> str:
    score = front["members"][0]["searched"]
    return f"{score['split']} of {score['samples']:,} samples"


def _corner(front: Record, name: str) -> float:
    known = (front.get("reference_point") or {}).get(name)
    return float(1.1 * front["baseline"][name] if known is None else known)


def _smallest(front: Record, drop: float) -> dict[str, Any] | None:
    """The smallest member within a drop on the searched split."""
    if metric_of(front)[0] != "top-1":
        drop *= abs(float(front["baseline"]["accuracy"]))
    within = [m for m in front["members"] if m["searched"]["drop"] <= drop]
    if not within:
        return None
    member = min(within, key=lambda m: m["predicted"]["size_bytes"])
    return {
        "trial": member["trial"],
        "size_bytes": member["predicted"]["size_bytes"],
        "latency_ms": member["predicted"].get("latency_ms"),
    }


def compare_table(compared: Record) -> Table:
    """`compare_fronts` as a table of at most 100 columns, a row a run."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    runs = compared["runs"]
    percent = compared["metric"] == "top1"
    devices = sorted({str(run["hardware"]) for run in runs})
    heading = [str(compared["task"]), ", ".join(compared["objectives"])]
    heading[1:1] = devices if len(devices) == 1 else []
    table = Table(
        title=Text(" · ".join(heading), style="bold"),
        title_justify="left",
        caption=Text(_how_to_read(compared)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),  # and the box puts one between columns
    )
    table.add_column("run\n", no_wrap=True)
    table.add_column("time\n" if len(devices) == 1 else "hardware\n", no_wrap=True)
    for title in ("trials\n", "on joint\nfront", "hyper-\nvolume"):
        table.add_column(title, justify="right", no_wrap=True)
    for drop in DROPS:
        text = f"{100 * drop:g}{' pt' if percent else ' %'}"
        table.add_column(f"smallest\n≤ {text}", justify="right", no_wrap=True)
    for run, name in zip(runs, run_names(compared), strict=True):
        small = (run["smallest"][str(drop)] for drop in DROPS)
        cells = [
            tail_of(name, 22 if len(devices) == 1 else 18),
            duration(run["seconds"]) if len(devices) == 1 else tail_of(run["hardware"], 14),
            str(run["trials"]),
            f"{len(run['joint_front'])} of {run['members']}",
            f"{run['hypervolume']:.3f}",
            *(MISSING if s is None else amount("size_bytes", s["size_bytes"]) for s in small),
        ]
        table.add_row(*map(Text, cells))
    return table


def _how_to_read(compared: Record) -> str:
    point = ", ".join(
        f"{n} {figure_text(v, compared['metric'] == 'top1') if n == 'accuracy' else amount(n, v)}"
        for n, v in compared["reference_point"].items()
    )
    return (
        f"hypervolume against {point}\njoint front: what no member of any run dominates; smallest: "
        "file within a drop on the searched split"
    )


def run_names(compared: Record) -> list[str]:
    """The runs' names, numbered where two have the same."""
    names = [str(run["run"]) for run in compared["runs"]]
    return [
        f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def choice_lines(front: Record, trial: int, nearby: Record) -> list[str]:
    """What choosing a member means: its drop and costs, and what is close to it.

    ``nearby``: what it is (``smaller``, …) → trial.
    """
    members = {m["trial"]: m for m in front["members"]}
    chosen, percent = members[trial], metric_of(front)[1]
    unit = " points" if percent else ""
    score, baseline = chosen["searched"], front["baseline"]
    parts = [
        f"drop {figure_text(score['drop'], percent, signed=True)} ± "
        f"{figure_text(score['drop_standard_error'], percent)}{unit} on {score['split']}"
    ]
    for name in ("size_bytes", "latency_ms"):
        mine, whole = _cost(chosen, name), baseline.get(name)
        if mine is not None:
            share = f" ({mine / whole:.0%} of float)" if whole else ""
            parts.append(amount(name, mine) + share)
    lines = [f"trial {trial}: {', '.join(parts)}"]
    grouped: dict[int, list[str]] = {}
    for what, other in nearby.items():
        grouped.setdefault(other, []).append(what)
    close = []
    for other, words in grouped.items():
        differences = [
            f"{_signed(score['drop'] - members[other]['searched']['drop'], percent)}"
            f"{unit or ' accuracy'}"
        ]
        for name, what in (("size_bytes", "size"), ("latency_ms", "latency")):
            mine, its = _cost(chosen, name), _cost(members[other], name)
            if mine and its is not None:
                differences.append(f"{what} {_percent(its / mine - 1)}")
        close.append(f"{' and '.join(words)} is trial {other} ({', '.join(differences)})")
    if close:
        lines.append("close: " + "; ".join(close))
    return lines


def _cost(member: Record, name: str) -> float | None:
    """Measured where it was measured, else predicted."""
    measured = (member.get("verified") or {}).get(name)
    found = member["predicted"].get(name) if measured is None else measured
    return None if found is None else float(found)


def _percent(value: float) -> str:
    return f"{value:+.0%}".replace("-", "−") if abs(value) >= 0.005 else "the same"


def _signed(value: float, percent: bool) -> str:
    text = figure_text(value, percent, signed=True)
    return text if text.startswith("−") else f"+{text}"
