"""Plots as the JSON that plotly.js draws; colours that follow the theme are set in the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from autoquant.candidate import WEIGHT_BITS
from autoquant.report.text import (
    MISSING,
    TITLES,
    Record,
    amount,
    bits_summary,
    bits_words,
    choices_of,
    figure_text,
    layer_names,
    measured_text,
    metric_of,
    scale_of,
    split_of,
    tail_of,
    with_error,
)

# Okabe and Ito's vermillion and a mid blue: apart for every colour vision, on white and on black.
FRONT, BASELINE, TRIAL = "#d55e00", "#3b8fd1", "#8a8f98"
_UNIFORM = {"8": "square-open", "4": "triangle-up-open"}  # weight bits → symbol
# Of runs that are compared: Okabe and Ito's, without what is too pale on white or dark on black.
COLOURS = ("#d55e00", "#3b8fd1", "#009e73", "#cc79a7", "#e69f00", "#8a8f98")
SYMBOLS = ("circle", "square", "triangle-up", "x", "star", "pentagon", "cross")
NAMED_LAYERS = 200  # above it, the plot of bits has neither names nor figures
# Viridis for integers, greys for float.
BIT_COLOURS = dict(
    zip(
        WEIGHT_BITS,
        (
            *("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"),
            *("#9a9a9a", "#d0d0d0"),
        ),
        strict=True,
    )
)


def cost_figure(
    front: Record, trials: Sequence[Record], names: Sequence[str], cost: str
) -> dict[str, Any]:
    """Accuracy over one cost: all trials, the front, the float network."""
    metric, percent = metric_of(front)
    baseline = front["baseline"]
    members = [m for m in front["members"] if m["predicted"].get(cost) is not None]
    on_front = {m["trial"] for m in front["members"]}
    others = [
        t
        for t in trials
        if t["trial"] not in on_front
        and t.get("score")
        and t.get("predicted")
        and t["predicted"].get(cost) is not None
    ]
    points = [m["predicted"][cost] for m in members] + [t["predicted"][cost] for t in others]
    if baseline.get(cost) is not None:
        points.append(baseline[cost])
    factor, unit = scale_of(cost, points)
    up = 100.0 if percent else 1.0
    data: list[dict[str, Any]] = []
    for status, symbol in (("", "circle"), ("infeasible", "x-thin-open")):
        shown = [t for t in others if (t["status"] == "infeasible") == (status == "infeasible")]
        if shown:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": status or "trials",
                    "x": [t["predicted"][cost] / factor for t in shown],
                    "y": [t["score"]["accuracy"] * up for t in shown],
                    "marker": {"color": TRIAL, "size": 6, "opacity": 0.6, "symbol": symbol},
                    "text": [_hover(front, names, t, t["score"]) for t in shown],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    line = _staircase(members, cost)
    if line:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [m["predicted"][cost] / factor for m in line],
                "y": [m["searched"]["accuracy"] * up for m in line],
                "line": {"color": FRONT, "width": 1.5, "shape": "hv"},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    if members:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "front",
                "x": [m["predicted"][cost] / factor for m in members],
                "y": [m["searched"]["accuracy"] * up for m in members],
                "error_y": {
                    "type": "data",
                    "array": [(m["searched"]["standard_error"] or 0.0) * up for m in members],
                    "color": FRONT,
                    "thickness": 1,
                    "width": 3,
                },
                "marker": {"color": FRONT, "size": 9},
                "customdata": [m["trial"] for m in members],
                "text": [_hover(front, names, m, m["searched"]) for m in members],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    data += _uniform(trials, names, cost, factor, up)
    if cost == "latency_ms":
        data += _measured(members, factor, up)
    shapes = []
    if baseline.get("accuracy") is not None:
        level = baseline["accuracy"] * up
        line_style = {"color": BASELINE, "width": 1, "dash": "dot"}
        shapes.append(
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": level,
                "y1": level,
                "line": line_style,
            }
        )
        if baseline.get(cost) is not None:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": "float",
                    "x": [baseline[cost] / factor],
                    "y": [level],
                    "marker": {"color": BASELINE, "size": 12, "symbol": "diamond"},
                    "text": [
                        f"<b>float</b><br>{mark(metric)} "
                        f"{figure_text(baseline['accuracy'], percent, sign='%')}"
                        f"<br>{TITLES.get(cost, cost).lower()} {amount(cost, baseline[cost])}"
                    ],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    title = f"{TITLES.get(cost, cost)}, predicted" if cost == "latency_ms" else TITLES.get(cost)
    layout = layout_of(
        xaxis={
            "title": {"text": f"{title or mark(cost)}{f' ({unit})' if unit else ''}"},
            **_cost_axis(points),
        },
        yaxis={
            "title": {"text": f"{mark(metric)}{' (%)' if percent else ''}, {split_of(front)}"},
            **_visible_range(front, [t["score"]["accuracy"] for t in others], up),
        },
        shapes=shapes,
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 56, "r": 12, "t": 32, "b": 48},
    )
    return {"data": data, "layout": layout}


def _uniform(
    trials: Sequence[Record], names: Sequence[str], cost: str, factor: float, up: float
) -> list[dict[str, Any]]:
    """Rings around the candidates that have one choice of 8 or 4 bits wherever they can."""
    found: dict[str, Record] = {}
    for trial in trials:
        if trial.get("origin") != "uniform" or not (trial.get("score") and trial.get("predicted")):
            continue
        most, count = Counter(map(str, choices_of(trial["candidate"], names))).most_common(1)[0]
        if most.split("/")[0] in _UNIFORM and 2 * count >= len(names):
            found.setdefault(f"uniform {most}", trial)
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": [trial["predicted"][cost] / factor],
            "y": [trial["score"]["accuracy"] * up],
            "marker": {
                "color": BASELINE,
                "size": 15,
                "symbol": _UNIFORM[name.split()[1].split("/")[0]],
                "line": {"width": 2},
            },
            "hoverinfo": "skip",
        }
        for name, trial in found.items()
        if trial["predicted"].get(cost) is not None
    ]


def _measured(members: Sequence[Record], factor: float, up: float) -> list[dict[str, Any]]:
    """Measured latencies as open circles, each with a line to what was predicted."""
    known = [m for m in members if (m.get("verified") or {}).get("latency_ms") is not None]
    if not known:
        return []
    pairs = [(m["predicted"]["latency_ms"], m["verified"]["latency_ms"]) for m in known]
    heights = [m["searched"]["accuracy"] * up for m in known]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [v for a, b in pairs for v in (a / factor, b / factor, None)],
            "y": [v for height in heights for v in (height, height, None)],
            "line": {"color": FRONT, "width": 1},
            "opacity": 0.6,
            "hoverinfo": "skip",
            "showlegend": False,
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "measured",
            "x": [b / factor for _, b in pairs],
            "y": heights,
            "marker": {"color": FRONT, "size": 8, "symbol": "circle-open"},
            "customdata": [m["trial"] for m in known],
            "text": [f"<b>trial {m['trial']}</b><br>{_measured_words(m)}" for m in known],
            "hovertemplate": "%{text}<extra></extra>",
        },
    ]


def _measured_words(member: Record) -> str:
    predicted = amount("latency_ms", member["predicted"]["latency_ms"])
    return f"{measured_text(member['verified'])} ms measured<br>{predicted} predicted"


def latency_figure(front: Record) -> dict[str, Any] | None:
    """Predicted over measured latency with the line where they are equal; None unmeasured."""
    members = [
        m
        for m in front["members"]
        if (m.get("verified") or {}).get("latency_ms") is not None
        and m["predicted"].get("latency_ms") is not None
    ]
    if not members:
        return None
    measured = [m["verified"]["latency_ms"] for m in members]
    predicted = [m["predicted"]["latency_ms"] for m in members]
    spreads = [m["verified"].get("latency_spread_ms") or 0.0 for m in members]
    baseline = front["baseline"]
    both = [baseline.get("latency_ms"), (baseline.get("predicted") or {}).get("latency_ms")]
    int8 = baseline.get("uniform_int8") or {}
    eight = [int8.get("latency_ms"), int8.get("predicted_latency_ms")]
    known = [x for x in (*measured, *predicted, *both, *eight) if x is not None]
    low, high = 0.95 * min(known), 1.05 * max(known)
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "equal",
            "x": [low, high],
            "y": [low, high],
            "line": {"color": TRIAL, "width": 1, "dash": "dot"},
            "hoverinfo": "skip",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "front",
            "x": measured,
            "y": predicted,
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": spreads,
                "arrayminus": [0.0] * len(spreads),
                "color": FRONT,
                "thickness": 1,
                "width": 3,
            },
            "marker": {"color": FRONT, "size": 9},
            "customdata": [m["trial"] for m in members],
            "text": [f"<b>trial {m['trial']}</b><br>{_measured_words(m)}" for m in members],
            "hovertemplate": "%{text}<extra></extra>",
        },
    ]
    for name, pair, symbol in (("float", both, "diamond"), ("8/8", eight, "square-open")):
        if None not in pair:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "x": pair[:1],
                    "y": pair[1:],
                    "marker": {"color": BASELINE, "size": 12, "symbol": symbol},
                    "hovertemplate": f"<b>{name}</b><br>%{{x:.4g}} ms measured<br>%{{y:.4g}} ms "
                    "predicted<extra></extra>",
                }
            )
    layout = layout_of(
        xaxis={"title": {"text": "Latency, measured (ms)"}, "range": [low, high]},
        yaxis={"title": {"text": "Latency, predicted (ms)"}, "range": [low, high]},
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 56, "r": 12, "t": 32, "b": 48},
    )
    return {"data": data, "layout": layout}


def progress_figures(
    front: Record, curve: Sequence[tuple[int, float, float]]
) -> dict[str, dict[str, Any]]:
    """Hypervolume over finished trials and over their seconds; ``curve`` as in `progress`."""
    found = {}
    for name, column, title in (
        ("hypervolume-trials", 0, "trials"),
        ("hypervolume-seconds", 1, "seconds of trials, summed"),
    ):
        line = {
            "type": "scatter",
            "mode": "lines",
            "x": [point[column] for point in curve],
            "y": [point[2] for point in curve],
            "line": {"color": FRONT, "width": 2, "shape": "hv"},
            "hovertemplate": "%{y:.4f} after %{x:.4g}<extra></extra>",
            "showlegend": False,
        }
        layout = layout_of(
            xaxis={"title": {"text": title}, "rangemode": "tozero"},
            yaxis={"title": {"text": "hypervolume"}, "rangemode": "tozero"},
            hovermode="closest",
            margin={"l": 56, "r": 12, "t": 12, "b": 48},
        )
        found[name] = {"data": [line], "layout": layout}
    return found


def learned_figure(layers: Mapping[str, Record]) -> dict[str, Any]:
    """Share of the divergence by layer: bars for what was learned, marks for the prior."""
    names = list(layers)
    y = list(range(len(names)))
    learned = [100 * layers[n]["importance"] for n in names]
    prior = [100 * layers[n]["prior"] for n in names]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": "learned",
            "x": learned,
            "y": y,
            "marker": {"color": BASELINE},
            "customdata": [mark(n) for n in names],
            "hovertemplate": "<b>%{customdata}</b><br>%{x:.1f} % learned<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "before the trials",
            "x": prior,
            "y": y,
            "marker": {"color": FRONT, "size": 9, "symbol": "diamond"},
            "customdata": [mark(n) for n in names],
            "hovertemplate": "<b>%{customdata}</b><br>%{x:.1f} % before<extra></extra>",
        },
    ]
    layout = layout_of(
        xaxis={"title": {"text": "share of the divergence (%)"}, "rangemode": "tozero"},
        yaxis={
            "tickmode": "array",
            "tickvals": y,
            "ticktext": [mark(tail_of(n, 24)) for n in names],
            "autorange": "reversed",
            "showgrid": False,
        },
        hovermode="closest",
        dragmode=False,
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"},
        margin={"l": 56, "r": 12, "t": 32, "b": 48},
    )
    return {"data": data, "layout": layout}


def compare_figure(fronts: Sequence[Record], names: Sequence[str], cost: str) -> dict[str, Any]:
    """The fronts of runs over one cost, a colour and a symbol each."""
    metric, percent = metric_of(fronts[0])
    up = 100.0 if percent else 1.0
    members = [m for f in fronts for m in f["members"] if m["predicted"].get(cost) is not None]
    points = [m["predicted"][cost] for m in members]
    points += [f["baseline"][cost] for f in fronts if f["baseline"].get(cost) is not None]
    factor, unit = scale_of(cost, points)
    data: list[dict[str, Any]] = []
    for index, (front, name) in enumerate(zip(fronts, names, strict=True)):
        own = [m for m in front["members"] if m["predicted"].get(cost) is not None]
        own.sort(key=lambda m: (m["predicted"][cost], m["searched"]["accuracy"]))
        layers = layer_names(front, ())
        colour, symbol = COLOURS[index % len(COLOURS)], SYMBOLS[index % len(SYMBOLS)]
        line = _staircase(own, cost)
        data += [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [m["predicted"][cost] / factor for m in line],
                "y": [m["searched"]["accuracy"] * up for m in line],
                "line": {"color": colour, "width": 1.5, "shape": "hv"},
                "legendgroup": str(index),
                "hoverinfo": "skip",
                "showlegend": False,
            },
            {
                "type": "scatter",
                "mode": "markers",
                "name": mark(name),
                "x": [m["predicted"][cost] / factor for m in own],
                "y": [m["searched"]["accuracy"] * up for m in own],
                "error_y": {
                    "type": "data",
                    "array": [(m["searched"]["standard_error"] or 0.0) * up for m in own],
                    "color": colour,
                    "thickness": 1,
                    "width": 3,
                },
                "marker": {"color": colour, "size": 9, "symbol": symbol},
                "legendgroup": str(index),
                "text": [f"{mark(name)}<br>{_hover(front, layers, m, m['searched'])}" for m in own],
                "hovertemplate": "%{text}<extra></extra>",
            },
        ]
    baselines = sorted(
        {
            (f["baseline"][cost], f["baseline"]["accuracy"])
            for f in fronts
            if f["baseline"].get(cost) is not None and f["baseline"].get("accuracy") is not None
        }
    )
    if baselines:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "float",
                "x": [x / factor for x, _ in baselines],
                "y": [y * up for _, y in baselines],
                "marker": {"color": TRIAL, "size": 12, "symbol": "diamond"},
                "hovertemplate": "<b>float</b> %{y:.4g}<extra></extra>",
            }
        )
    title = f"{TITLES.get(cost, cost)}{', predicted' if cost == 'latency_ms' else ''}"
    layout = layout_of(
        xaxis={
            "title": {"text": f"{mark(title)}{f' ({unit})' if unit else ''}"},
            **_cost_axis(points),
        },
        yaxis={
            "title": {"text": f"{mark(metric)}{' (%)' if percent else ''}, {split_of(fronts[0])}"}
        },
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 56, "r": 12, "t": 32, "b": 48},
    )
    return {"data": data, "layout": layout}


def bits_figure(members: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Weight bits of every layer (columns, by depth) of every member (rows)."""
    order = {bits: i for i, bits in enumerate(WEIGHT_BITS)}
    choices = [choices_of(m["candidate"], names) for m in members]
    z = [[order[c.weight_bits] for c in row] for row in choices]
    steps = len(WEIGHT_BITS)
    scale = [
        [edge, colour]
        for i, colour in enumerate(BIT_COLOURS.values())
        for edge in (i / steps, (i + 1) / steps)
    ]
    trace = {
        "type": "heatmap",
        "z": z,
        "x": list(range(len(names))),
        "y": list(range(len(members))),
        "zmin": -0.5,
        "zmax": steps - 0.5,
        "colorscale": scale,
        "showscale": False,
        "xgap": 1,
        "ygap": 2,
        "text": [["f" if c.weight_bits == 32 else str(c.weight_bits) for c in r] for r in choices],
        "texttemplate": "%{text}" if len(names) <= NAMED_LAYERS else "",
        "customdata": [
            [
                f"<b>trial {member['trial']}</b><br>{mark(name)}<br>{bits_words(choice)}"
                for name, choice in zip(names, row, strict=True)
            ]
            for member, row in zip(members, choices, strict=True)
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    ticks = names if len(names) <= NAMED_LAYERS else ()
    layout = layout_of(
        xaxis={
            "tickmode": "array",
            "tickvals": list(range(len(ticks))),
            "ticktext": [mark(tail_of(name, 22)) for name in ticks],
            "tickangle": -60,
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
        }
        | ({} if ticks else {"title": {"text": "layers, by depth"}, "showticklabels": False}),
        yaxis={
            "tickmode": "array",
            "tickvals": list(range(len(members))),
            "ticktext": [f"trial {m['trial']}" for m in members],
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
        },
        dragmode=False,
        margin={"l": 70, "r": 8, "t": 8, "b": 120 if ticks else 40},
    )
    return {"data": [trace], "layout": layout}


def mark(text: str) -> str:
    """Escape for plotly's own markup, which knows no ``&quot;``."""
    return escape(text, quote=False)


def shown_costs(front: Record) -> list[str]:
    """The cost objectives that have figures; the file size where none has."""
    named = [name for name in front["objectives"] if name != "accuracy"]
    known = [c for c in named if any(m["predicted"].get(c) is not None for m in front["members"])]
    return known or ["size_bytes"]


def layout_of(xaxis: Record, yaxis: Record, **rest: Any) -> dict[str, Any]:
    """A layout on the page's own background; ``rest`` goes beside the axes."""
    axis = {"zeroline": False, "automargin": True}
    return {
        "xaxis": {**axis, **xaxis},
        "yaxis": {**axis, **yaxis},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        **rest,
    }


def _cost_axis(points: Sequence[float]) -> dict[str, Any]:
    """From zero; logarithmic where costs span more than a factor of 30, cut where less than 2."""
    positive = [p for p in points if p > 0]
    if len(positive) == len(points) > 0:
        span = max(positive) / min(positive)
        if span > 30:
            return {"type": "log"}
        if span < 2:
            return {}
    return {"rangemode": "tozero"}


def _visible_range(front: Record, others: Sequence[float], up: float) -> dict[str, Any]:
    """An accuracy range in which the better half of the members can be told apart.

    A few collapsed networks would press everything else into a line: where members or trials
    lie further below than three times the span of the better half, the axis starts there.
    """
    scores = [m["searched"] for m in front["members"]]
    if not scores:
        return {}
    values = sorted((s["accuracy"] for s in scores), reverse=True)
    known = [front["baseline"].get("accuracy")]
    top = max([*values, *(k for k in known if k is not None)])
    middle = values[len(values) // 2]
    error = max(s["standard_error"] or 0.0 for s in scores)
    low = top - 3 * max(top - middle, error)
    if min([*values, *others]) >= low:
        return {}
    pad = 0.06 * (top + error - low)
    return {"range": [low * up, (top + error + pad) * up]}


def _staircase(members: Sequence[Record], cost: str) -> list[Record]:
    """The members that no other beats in accuracy and ``cost`` alone, cheapest first."""
    best = -float("inf")
    line = []
    for member in sorted(members, key=lambda m: (m["predicted"][cost], -m["searched"]["accuracy"])):
        if member["searched"]["accuracy"] > best:
            best = member["searched"]["accuracy"]
            line.append(member)
    return line


def _hover(front: Record, names: Sequence[str], record: Record, score: Record) -> str:
    metric, percent = metric_of(front)
    predicted, verified = record["predicted"], record.get("verified")
    lines = [
        f"<b>trial {record['trial']}</b>",
        f"{mark(metric)} {with_error(score, 'accuracy', percent, sign='%')}, "
        f"drop {with_error(score, 'drop', percent)}",
    ]
    if verified:
        lines.append(
            f"test {with_error(verified, 'accuracy', percent, sign='%')}, "
            f"drop {with_error(verified, 'drop', percent)}"
        )
    lines += [mark(part) for part in bits_summary(record["candidate"], names)]
    lines.append(
        f"{amount('size_bytes', predicted.get('size_bytes'))}, "
        f"{amount('average_weight_bits', predicted.get('average_weight_bits'))} bits a weight"
    )
    latency = predicted.get("latency_ms")
    if latency is not None:
        measured = measured_text(verified)
        lines.append(
            f"{amount('latency_ms', latency)} predicted"
            + (f", {measured} ms measured" if measured != MISSING else "")
        )
    return "<br>".join(lines)
