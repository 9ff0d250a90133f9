"""Tables and plots of a run: for the terminal, for MLflow's note and as one HTML page.

Everything here reads the contract's JSON (``front.json``, lines of ``trials.jsonl``); nothing
needs the objects that made it.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from autoquant.candidate import FLOAT, WEIGHT_BITS, LayerChoice

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]

_TITLES = {
    "latency_ms": "Latency",
    "size_bytes": "File size",
    "weight_bytes": "Packed weights",
    "average_weight_bits": "Average weight bits",
    "macs": "MACs",
    "bops": "BOPs",
    "peak_memory_bytes": "Peak activation memory",
    "energy_mj": "Energy",
}
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MINUS = "\N{MINUS SIGN}"
_MISSING = "–"
# Okabe and Ito's vermillion and a mid blue: apart for every colour vision, on white and on black.
_FRONT, _BASELINE, _TRIAL = "#d55e00", "#3b8fd1", "#8a8f98"
_TABLE_WIDTH = 100  # columns of a terminal that the front must fit
_LEARNED_LAYERS = 30  # rows of the table of what the search learned
_NAMED_LAYERS = 200  # above it, the plot of bits has neither names nor figures
# Viridis for integers, greys for float.
_BIT_COLOURS = dict(
    zip(
        WEIGHT_BITS,
        (
            *("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#90d743", "#fde725"),
            *("#9a9a9a", "#d0d0d0"),
        ),
        strict=True,
    )
)


# -- terminal ------------------------------------------------------------------------------


def front_table(front: Record) -> Table:
    """The front as a table of at most 100 columns: the float network first, then the members.

    ``front`` is the content of ``front.json``. Top-1 is in percent and its drops in points, any
    other metric in its own units; ± is one standard error (of a drop, the paired one).
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    name, percent = _metric(front)
    unit, points = ("(%)", "(points)") if percent else ("", "")
    heading = f"{front['run']} · {front['task']} · {front['hardware']} · {name}"
    headings = [
        "trial\n",
        f"{_split(front)}\n{unit}",
        f"drop\n{points}",
        f"test\n{unit}",
        f"drop\n{points}",
        "predicted\n(ms)",
        "measured\n(ms)",
        "size\n",
        "weight\nbits",
    ]
    rows = [[_plain(row[column]) for column in _COLUMNS] for row in _rows(front)]
    widths = [
        max(len(part) for cell in (title, *cells) for part in cell.split("\n"))
        for title, *cells in zip(headings, *rows, strict=True)
    ]
    narrow = sum(widths) + 2 * (len(widths) - 1) > _TABLE_WIDTH
    table = Table(
        title=Text(heading, style="bold"),
        title_justify="left",
        caption=Text(_summary(front)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0 if narrow else 1, 0, 0),  # and the box puts one between columns
    )
    for title, width in zip(headings, widths, strict=True):
        trial = title == headings[0]
        table.add_column(title, justify="right", no_wrap=True, min_width=width if trial else None)
    for index, cells in enumerate(rows):
        table.add_row(*map(Text, cells), style="" if index else "bold")
    return table


def layers_table(layers: Sequence[Record]) -> Table:
    """The layers of a network, in the order given, with their shapes, MACs and parameters.

    Keys read: name, kind, weight_shape, input_shape, output_shape, macs, parameters; a missing
    one shows as a dash. Where layers have a ``sensitivity``, a column shows it at the choice
    nearest to 4 bits.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, caption_justify="left")
    table.add_column("layer", no_wrap=True, overflow="fold")
    for heading in ("kind", "weight", "input", "output"):
        table.add_column(heading, overflow="fold")
    for heading in ("MACs", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    low = _low_choice(layers)
    if low is not None:
        table.add_column(f"at {low}", justify="right", no_wrap=True)
    for layer in layers:
        cells = [
            str(layer.get("name", _MISSING)),
            str(layer.get("kind", _MISSING)),
            *(_shape(layer.get(f"{part}_shape")) for part in ("weight", "input", "output")),
            _count(layer.get("macs")),
            _count(layer.get("parameters")),
        ]
        if low is not None:
            value = layer.get("sensitivity", {}).get(low)
            cells.append(_MISSING if value is None else f"{value:.1e}")
        table.add_row(*map(Text, cells))
    macs, parameters = (_total(layers, key) for key in ("macs", "parameters"))
    table.caption = Text(
        f"{len(layers)} layers · {_count(macs)} MACs · {_count(parameters)} parameters"
    )
    return table


def _low_choice(layers: Sequence[Record]) -> str | None:
    """The choice nearest to 4 bits among those that most layers' sensitivity has."""
    counts = Counter(choice for layer in layers for choice in layer.get("sensitivity", {}))
    coded = [c for c in counts if c[:1].isdigit()]
    most = max((counts[c] for c in coded), default=0)
    return min(
        (c for c in coded if counts[c] == most),
        key=lambda c: (abs(int(c.partition("/")[0]) - 4), c),
        default=None,
    )


# -- MLflow --------------------------------------------------------------------------------


def front_markdown(front: Record) -> str:
    """The front as a Markdown table, how to read it, and the command that exports a member."""
    name, percent = _metric(front)
    unit = " (%)" if percent else ""
    headings = [
        "trial",
        f"{name}{unit}",
        "drop",
        f"test{unit}",
        "test drop",
        "latency, predicted (ms)",
        "measured (ms)",
        "size",
        "weight bits",
    ]
    lines = [
        f"### {_markdown(front['run'])}: {_markdown(front['task'])} on "
        f"{_markdown(front['hardware'])}",
        "",
        f"{_markdown(_headline(front))} {_markdown(_summary(front).capitalize())}.",
        "",
        "Export a member with its trial number:",
        "",
        "```",
        _export_command(front, "N"),
        "```",
        "",
        "The artifact `front.html` is the report; the child runs are the trials, and those on "
        "the front carry the tag `pareto = true`.",
        "",
        _HOW_TO_READ,
        "",
        "| " + " | ".join(map(_markdown, headings)) + " |",
        "|" + "---:|" * len(headings),
    ]
    for row in _rows(front):
        cells = [_markdown(_plain(row[column])) for column in _COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_HOW_TO_READ = (
    "Every row was scored on the ONNX file itself. The first columns come from the validation "
    "split, which the search saw; the test columns come from data that it did not see. A drop "
    "is the float network minus the member on the same samples; ± is one standard error (of a "
    "drop, the paired one; of a measured latency, the spread of its rounds; of a predicted one, "
    "the range of the device's model)."
)


# -- HTML ----------------------------------------------------------------------------------


def front_html(
    front: Record,
    trials: Sequence[Record],
    layers: Sequence[Record],
    learned: Record | None = None,
) -> str:
    """One HTML page of a run that needs no network: plots, bits of every layer, export commands.

    ``front`` is the content of ``front.json``, ``trials`` the lines of ``trials.jsonl``,
    ``layers`` mappings with ``name``, in the order of depth, ``learned`` the content of
    ``learned.json``. About 5 MB: plotly.js is inside.
    """
    from plotly.offline import get_plotlyjs

    names = _layer_names(front, layers)
    plots = {
        f"cost-{cost}": _cost_figure(front, trials, names, cost) for cost in _shown_costs(front)
    }
    panels = "\n".join(f"<figure>{_placeholder(name, 380)}</figure>" for name in plots)
    if front["members"] and names:
        plots["bits"] = _bits_figure(front["members"], names)
    # An escaped "<" cannot end the script; names are escaped again for plotly's own markup.
    data = json.dumps(plots, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.format(
        title=escape(f"{front['run']} · autoquant"),
        heading=escape(str(front["run"])),
        style=_STYLE,
        plotlyjs=get_plotlyjs(),
        facts=_facts_html(front),
        headline=escape(_headline(front)),
        panels=panels,
        how_to_read=_HOW_TO_READ_PLOTS,
        bits=_bits_html(front, names),
        members=_members_html(front, names),
        learned=_learned_html(learned),
        script=_SCRIPT.replace("PLOTS", data),
    )


_HOW_TO_READ_PLOTS = (
    "Up and to the left is better. A point is a trial; the orange ones are the front, with one "
    "standard error, and the line joins those that no other member beats in the two quantities "
    "of the panel. The blue diamond is the float network. Hover or tap for the bits; double-click "
    "to see every trial or to come back."
)


def _cost_figure(
    front: Record, trials: Sequence[Record], names: Sequence[str], cost: str
) -> dict[str, Any]:
    """Accuracy over one cost: all trials, the front, the float network."""
    metric, percent = _metric(front)
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
    factor, unit = _scale(cost, points)
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
                    "marker": {"color": _TRIAL, "size": 6, "opacity": 0.6, "symbol": symbol},
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
                "line": {"color": _FRONT, "width": 1.5, "shape": "hv"},
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
                    "color": _FRONT,
                    "thickness": 1,
                    "width": 3,
                },
                "marker": {"color": _FRONT, "size": 9},
                "text": [_hover(front, names, m, m["searched"]) for m in members],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    shapes = []
    if baseline.get("accuracy") is not None:
        level = baseline["accuracy"] * up
        line_style = {"color": _BASELINE, "width": 1, "dash": "dot"}
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
                    "marker": {"color": _BASELINE, "size": 12, "symbol": "diamond"},
                    "text": [
                        f"<b>float</b><br>{_mark(metric)} "
                        f"{_figure(baseline['accuracy'], percent, sign='%')}"
                        f"<br>{_TITLES.get(cost, cost).lower()} {_amount(cost, baseline[cost])}"
                    ],
                    "hovertemplate": "%{text}<extra></extra>",
                }
            )
    title = f"{_TITLES.get(cost, cost)}, predicted" if cost == "latency_ms" else _TITLES.get(cost)
    layout = _layout(
        xaxis={
            "title": {"text": f"{title or _mark(cost)}{f' ({unit})' if unit else ''}"},
            "rangemode": "tozero",
            **_log_axis(points),
        },
        yaxis={
            "title": {"text": f"{_mark(metric)}{' (%)' if percent else ''}, {_split(front)}"},
            **_visible_range(front, [t["score"]["accuracy"] for t in others], up),
        },
        shapes=shapes,
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 56, "r": 12, "t": 32, "b": 48},
    )
    return {"data": data, "layout": layout}


def _bits_figure(members: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Weight bits of every layer (columns, by depth) of every member (rows)."""
    order = {bits: i for i, bits in enumerate(WEIGHT_BITS)}
    choices = [_choices(m["candidate"], names) for m in members]
    z = [[order[c.weight_bits] for c in row] for row in choices]
    steps = len(WEIGHT_BITS)
    scale = [
        [edge, colour]
        for i, colour in enumerate(_BIT_COLOURS.values())
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
        "texttemplate": "%{text}" if len(names) <= _NAMED_LAYERS else "",
        "customdata": [
            [
                f"<b>trial {member['trial']}</b><br>{_mark(name)}<br>{_bits_words(choice)}"
                for name, choice in zip(names, row, strict=True)
            ]
            for member, row in zip(members, choices, strict=True)
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    ticks = names if len(names) <= _NAMED_LAYERS else ()
    layout = _layout(
        xaxis={
            "tickmode": "array",
            "tickvals": list(range(len(ticks))),
            "ticktext": [_mark(_tail(name, 22)) for name in ticks],
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


def _bits_html(front: Record, names: Sequence[str]) -> str:
    members = front["members"]
    if not members or not names:
        return "<p>The front is empty.</p>"
    used = {c.weight_bits for m in members for c in _choices(m["candidate"], names)}
    legend = "".join(
        f'<span class="chip"><i style="background:{_BIT_COLOURS[bits]}"></i>'
        f"{'float (f)' if bits == 32 else f'{bits} bit'}</span>"
        for bits in WEIGHT_BITS
        if bits in used
    )
    width = (24 if len(names) <= _NAMED_LAYERS else 8) * len(names) + 90
    height = 26 * len(members) + (132 if len(names) <= _NAMED_LAYERS else 56)
    return (
        f'<p class="legend">{legend}</p>'
        f'<div class="wide"><div style="min-width:{width}px">'
        f"{_placeholder('bits', height)}</div></div>"
    )


def _mark(text: str) -> str:
    """Escape for plotly's own markup, which knows no ``&quot;``."""
    return escape(text, quote=False)


def _placeholder(name: str, height: int) -> str:
    """Where the script draws the plot of this name."""
    return f'<div class="plot" id="{escape(name)}" style="height:{height}px"></div>'


def _shown_costs(front: Record) -> list[str]:
    """The cost objectives that have figures; the file size where none has."""
    named = [name for name in front["objectives"] if name != "accuracy"]
    known = [c for c in named if any(m["predicted"].get(c) is not None for m in front["members"])]
    return known or ["size_bytes"]


def _layout(xaxis: Record, yaxis: Record, **rest: Any) -> dict[str, Any]:
    axis = {"zeroline": False, "automargin": True}
    return {
        "xaxis": {**axis, **xaxis},
        "yaxis": {**axis, **yaxis},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        **rest,
    }


def _log_axis(points: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis where the costs span more than a factor of 30."""
    positive = [p for p in points if p > 0]
    wide = len(positive) == len(points) > 0 and max(positive) > 30 * min(positive)
    return {"type": "log", "rangemode": "normal"} if wide else {}


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
    metric, percent = _metric(front)
    predicted, verified = record["predicted"], record.get("verified")
    lines = [
        f"<b>trial {record['trial']}</b>",
        f"{_mark(metric)} {_with_error(score, 'accuracy', percent, sign='%')}, "
        f"drop {_with_error(score, 'drop', percent)}",
    ]
    if verified:
        lines.append(
            f"test {_with_error(verified, 'accuracy', percent, sign='%')}, "
            f"drop {_with_error(verified, 'drop', percent)}"
        )
    lines += [_mark(part) for part in _bits_summary(record["candidate"], names)]
    lines.append(
        f"{_amount('size_bytes', predicted.get('size_bytes'))}, "
        f"{_amount('average_weight_bits', predicted.get('average_weight_bits'))} bits a weight"
    )
    latency = predicted.get("latency_ms")
    if latency is not None:
        measured = _measured(verified)
        lines.append(
            f"{_amount('latency_ms', latency)} predicted"
            + (f", {measured} ms measured" if measured != _MISSING else "")
        )
    return "<br>".join(lines)


def _facts_html(front: Record) -> str:
    reference = front.get("reference_point") or {}
    point = ", ".join(f"{name} {_quantity(front, name, reference[name])}" for name in reference)
    facts = {
        "task": front["task"],
        "metric": _metric(front)[0],
        "hardware": front["hardware"],
        "objectives": ", ".join(front["objectives"]),
        "trials": f"{front['trials']} in {_duration(front['seconds'])}",
        "front": f"{len(front['members'])} members",
        "hypervolume": f"{front['hypervolume']:.4g}" + (f" against {point}" if point else ""),
    }
    curse = _curse(front)
    if curse is not None:
        facts["validation against test"] = curse
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )


def _members_html(front: Record, names: Sequence[str]) -> str:
    unit, points = (" (%)", " (points)") if _metric(front)[1] else ("", "")
    costs = [c for c in front["objectives"] if c not in ("accuracy", "latency_ms", "size_bytes")]
    costs = [c for c in costs if c != "average_weight_bits"]
    headings = [
        "trial",
        f"{_split(front)}{unit}",
        f"drop{points}",
        f"test{unit}",
        f"drop{points}",
        "latency, predicted (ms)",
        "latency, measured (ms)",
        "size",
        "weight bits",
        *(_TITLES.get(cost, cost) for cost in costs),
    ]
    words = ("layers (weight/activation bits)", "export")
    rows = []
    members: list[Record | None] = [None, *front["members"]]
    for member, row in zip(members, _rows(front), strict=True):
        figures = (member or {}).get("predicted") or front["baseline"]
        cells = [f"<td>{escape(row[column])}</td>" for column in _COLUMNS]
        cells += [f"<td>{escape(_amount(cost, figures.get(cost)))}</td>" for cost in costs]
        if member is None:
            cells += ["<td></td><td></td>"]
        else:
            summary = " · ".join(_bits_summary(member["candidate"], names))
            command = _export_command(front, member["trial"])
            cells.append(f'<td class="text layers">{escape(summary)}</td>')
            cells.append(f'<td class="text"><code>{escape(command)}</code></td>')
        rows.append(f"<tr{'' if member else ' class=float'}>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    head += "".join(f'<th class="text">{escape(heading)}</th>' for heading in words)
    body = "\n".join(rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _learned_html(learned: Record | None) -> str:
    """Which layers matter to the surrogate, most first; nothing where it learned nothing."""
    if not learned or not learned.get("layers"):
        return ""
    rows = []
    for name, layer in list(learned["layers"].items())[:_LEARNED_LAYERS]:
        spread = math.exp(layer["factor_error"])
        cells = [
            f"{100 * layer['importance']:.1f}",
            f"{100 * layer['prior']:.1f}",
            f"{layer['factor']:.2f} (×÷ {spread:.2f})",
        ]
        figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><td class="text">{escape(str(name))}</td>{figures}</tr>')
    body = "\n".join(rows)
    return (
        "<h2>What the search learned</h2>\n"
        '<p class="note">Share of the divergence that each layer causes, learned from '
        f"{learned['trials']} trials and before them, and the factor between the two with its "
        "uncertainty.</p>\n"
        '<div class="wide"><table><thead><tr><th class="text">layer</th><th>learned (%)</th>'
        "<th>prior (%)</th><th>factor</th></tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


# -- what the three share ------------------------------------------------------------------

_COLUMNS = (
    "trial",
    "accuracy",
    "drop",
    "test",
    "test_drop",
    "predicted",
    "measured",
    "size",
    "bits",
)


def _rows(front: Record) -> list[dict[str, str]]:
    """The float network and then the members, as formatted cells."""
    _, percent = _metric(front)
    baseline = front["baseline"]
    rows = [
        {
            "trial": "float",
            "accuracy": _figure(baseline.get("accuracy"), percent),
            "drop": "",
            "test": _figure(baseline.get("test_accuracy"), percent),
            "test_drop": "",
            "predicted": "",
            "measured": _digits(baseline.get("latency_ms")),
            "size": _amount("size_bytes", baseline.get("size_bytes")),
            "bits": "32",
        }
    ]
    for member in front["members"]:
        verified = member.get("verified")
        predicted = member["predicted"]
        bits = predicted.get("average_weight_bits")
        rows.append(
            {
                "trial": str(member["trial"]),
                "accuracy": _with_error(member["searched"], "accuracy", percent),
                "drop": _with_error(member["searched"], "drop", percent),
                "test": _figure(verified and verified.get("accuracy"), percent),
                "test_drop": _with_error(verified or {}, "drop", percent),
                "predicted": _predicted(predicted, verified, baseline),
                "measured": _measured(verified),
                "size": _amount("size_bytes", predicted.get("size_bytes")),
                "bits": _amount("average_weight_bits", bits),
            }
        )
    return rows


def _metric(front: Record) -> tuple[str, bool]:
    """Name of the metric, and whether it is shown in percent (top-1 is)."""
    for member in front["members"]:
        name = str(member["searched"].get("metric", "top1"))
        return ("top-1", True) if name == "top1" else (name, False)
    return "accuracy", False


def _split(front: Record) -> str:
    return next((str(m["searched"]["split"]) for m in front["members"]), "validation")


def _summary(front: Record) -> str:
    count = len(front["members"])
    return (
        f"{count} member{'' if count == 1 else 's'} of {front['trials']} trials in "
        f"{_duration(front['seconds'])}, hypervolume {front['hypervolume']:.4g}"
    )


def _curse(front: Record) -> str | None:
    """How much better members look on validation, where they were chosen, than on test."""
    _, percent = _metric(front)
    pairs = [
        (m["searched"]["drop"], m["verified"]["drop"])
        for m in front["members"]
        if m.get("verified") and m["verified"].get("split") != m["searched"].get("split")
    ]
    if not pairs:
        return None
    searched, verified = (_figure(sum(p) / len(p), percent, True) for p in zip(*pairs, strict=True))
    unit = " points" if percent else ""
    return f"mean drop of {len(pairs)} members {searched}, on test {verified}{unit}"


def _headline(front: Record) -> str:
    """The smallest member without a measurable loss, or the most accurate one, in a sentence."""
    members = front["members"]
    if not members:
        return "No trial met the limits: the front is empty."
    _, percent = _metric(front)
    unit = " points" if percent else ""
    lossless = [
        m for m in members if m["searched"]["drop"] <= (m["searched"]["drop_standard_error"] or 0.0)
    ]
    if lossless:
        member = min(lossless, key=lambda m: m["predicted"]["size_bytes"])
        drop = _with_error(member["searched"], "drop", percent)
        text = (
            f"Trial {member['trial']} is the smallest member without a measurable loss on "
            f"{_split(front)} (drop {drop}{unit}, within one standard error of none)"
        )
    else:
        member = members[0]
        text = (
            f"Trial {member['trial']} is the most accurate member (drop "
            f"{_with_error(member['searched'], 'drop', percent)}{unit})"
        )
    baseline = front["baseline"]
    ratios = []
    if baseline.get("size_bytes"):
        ratio = baseline["size_bytes"] / member["predicted"]["size_bytes"]
        ratios.append(f"its file is {ratio:.1f} times smaller than the float network's")
    latency = (member.get("verified") or {}).get("latency_ms")
    kind = "measured"
    if latency is None:
        latency, kind = member["predicted"].get("latency_ms"), "predicted"
    if latency and baseline.get("latency_ms"):
        ratio = baseline["latency_ms"] / latency
        words = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
        ratios.append(f"it runs {words} ({kind})")
    return text + (": " + " and ".join(ratios) if ratios else "") + "."


def _layer_names(front: Record, layers: Sequence[Record]) -> list[str]:
    """The layers by depth, then any that only candidates name."""
    names = [str(layer["name"]) for layer in layers]
    known = set(names)
    for member in front["members"]:
        for name in member["candidate"]["layers"]:
            if name not in known:
                known.add(name)
                names.append(name)
    return names


def _choices(candidate: Record, names: Iterable[str]) -> list[LayerChoice]:
    layers = candidate["layers"]
    return [LayerChoice.from_dict(layers[n]) if n in layers else FLOAT for n in names]


def _bits_summary(candidate: Record, names: Sequence[str]) -> list[str]:
    """``4/8 ×12, 8/8 ×7, float ×1``, and a part for each other thing that was done."""
    counts = Counter(_choices(candidate, names))
    ordered = sorted(counts, key=lambda c: (c.weight_bits, c.activation_bits, str(c)))
    parts = [", ".join(f"{choice}\N{NO-BREAK SPACE}×{counts[choice]}" for choice in ordered)]
    pruned = [ratio for ratio in (candidate.get("pruning") or {}).values() if ratio]
    if pruned:
        mean = 100 * sum(pruned) / len(pruned)
        parts.append(f"{len(pruned)} channel groups pruned by {mean:.0f} % on average")
    if candidate.get("rank"):
        parts.append(f"{len(candidate['rank'])} layers of reduced rank")
    if candidate.get("training"):
        parts.append("fine-tuned")
    if candidate.get("polish"):
        parts.append("polished")
    return [part for part in parts if part]


def _bits_words(choice: LayerChoice) -> str:
    """``4-bit weights, 8-bit activations``."""

    def words(bits: int) -> str:
        return "float" if bits == 32 else f"{bits}-bit"

    extra = str(choice).partition(" ")[2]
    return f"{words(choice.weight_bits)} weights, {words(choice.activation_bits)} activations" + (
        f", {extra}" if extra else ""
    )


def _export_command(front: Record, trial: int | str) -> str:
    run = str(front["run"])
    folder = "DIR" if trial == "N" else shlex.quote(f"{run}-{trial}")
    return f"autoquant export {shlex.quote(run)} --trial {trial} -o {folder}"


def _figure(value: float | None, percent: bool, signed: bool = False, sign: str = "") -> str:
    """A value of the metric: ``91.73`` (with ``sign`` after it) for top-1, else ``0.8203``."""
    if value is None:
        return _MISSING
    text = f"{100 * value:.2f}" if percent else f"{value:.4f}"
    if signed and float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", _MINUS) + (f" {sign}" if percent and sign else "")


def _with_error(score: Record, field: str, percent: bool, sign: str = "") -> str:
    """``accuracy`` or ``drop`` of a score with its standard error."""
    if score.get(field) is None:
        return _MISSING
    error = score["standard_error" if field == "accuracy" else "drop_standard_error"]
    value = _figure(score[field], percent, signed=True)
    return f"{value} ± {_figure(error, percent)}" + (f" {sign}" if percent and sign else "")


def _predicted(predicted: Record, verified: Record | None, baseline: Record) -> str:
    """Predicted latency in ms; a range where it is not measured and the model knows its error."""
    latency, error = predicted.get("latency_ms"), baseline.get("latency_error")
    text = _digits(latency)
    if latency is None or error is None or (verified or {}).get("latency_ms") is not None:
        return text
    return f"{text} ±{error:.0%}"


def _measured(verified: Record | None) -> str:
    """Measured latency in ms with the spread of its rounds."""
    if not verified or verified.get("latency_ms") is None:
        return _MISSING
    latency, spread = verified["latency_ms"], verified.get("latency_spread_ms")
    text = _digits(latency)
    decimals = len(text.partition(".")[2])
    return text if spread is None else f"{text} ± {spread:.{decimals}f}"


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return _MISSING
    magnitude = abs(value)
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:.{decimals}f}"


def _scale(name: str, values: Sequence[float]) -> tuple[float, str]:
    """What to divide an axis by, and its unit."""
    if name.endswith("_ms"):
        return 1.0, "ms"
    if name.endswith("_mj"):
        return 1.0, "mJ"
    unit = "B" if name.endswith("_bytes") else ""
    if not unit and name not in ("macs", "bops"):
        return 1.0, ""
    top = max((abs(value) for value in values), default=0.0)
    factor, prefix = next(((f, p) for f, p in _SI if top >= f), (1.0, ""))
    return factor, (prefix + unit) or ""


def _amount(name: str, value: float | None) -> str:
    """A cost with its unit: ``1.08 MB``, ``3.21 ms``, ``41.2 M``."""
    if value is None:
        return _MISSING
    factor, unit = _scale(name, [value])
    if factor == 1 and unit == "B":
        return f"{value:.0f} B"
    text = f"{value:.2f}" if name == "average_weight_bits" else _digits(value / factor)
    return f"{text} {unit}".rstrip()


def _quantity(front: Record, name: str, value: float) -> str:
    """A coordinate of the reference point, in the units of its objective."""
    if name == "accuracy":
        return _figure(value, _metric(front)[1], sign="%")
    return _amount(name, value)


def _count(value: float | None) -> str:
    return _MISSING if value is None else f"{value}" if value < 1000 else _amount("macs", value)


def _total(layers: Sequence[Record], key: str) -> float | None:
    known = [layer[key] for layer in layers if layer.get(key) is not None]
    return sum(known) if known else None


def _shape(shape: Sequence[Any] | None) -> str:
    return _MISSING if shape is None else "×".join("?" if d is None else str(d) for d in shape)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _tail(name: str, length: int) -> str:
    """The end of a long name: names of layers differ there."""
    return name if len(name) <= length else "…" + name[-(length - 1) :]


def _plain(cell: str) -> str:
    """Narrower: ``91.73 ±0.31``."""
    return cell.replace("± ", "±")


def _markdown(text: object) -> str:
    """Escape what Markdown and the HTML inside it would read as markup."""
    plain = escape(str(text), quote=False)
    return "".join("\\" + c if c in "\\`*_[]|#~" else c for c in plain)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
<script>window.PlotlyConfig = {{MathJaxConfig: 'local'}};</script>
<script>{plotlyjs}</script>
</head>
<body>
<main>
<h1>{heading}</h1>
<dl>{facts}</dl>
<p class="headline">{headline}</p>
<h2>Accuracy and cost</h2>
<p class="note">{how_to_read}</p>
<div class="panels">
{panels}
</div>
<h2>Weight bits of every layer</h2>
<p class="note">One row a member, most accurate first; one column a layer, from input to output.</p>
{bits}
<h2>Members</h2>
<p class="note">The member's ONNX file was scored itself. Searched figures come from the split that
the search saw, test figures from data that it did not see. A drop is the float network minus the
member on the same samples; ± is one standard error (of a drop, the paired one; of a measured
latency, the spread of its rounds; of a predicted one, the range of the device's model).</p>
<div class="wide">
{members}
</div>
{learned}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1c1f23; --soft: #5a616b; --line: #e3e5e8; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a2a9b4; --line: #33383f; --page: #15181c; --card: #1e2227; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1440px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 4px; }
dl { display: flex; flex-wrap: wrap; gap: 8px; margin: 0; }
dl div { background: var(--card); border-radius: 8px; padding: 6px 12px; max-width: 100%; }
dt { color: var(--soft); font-size: .78rem; }
dd { margin: 0; overflow-wrap: anywhere; }
.headline { font-size: 1.05rem; margin: 16px 0 0; max-width: 75ch; }
.note { color: var(--soft); font-size: .88rem; margin: 0 0 12px; max-width: 90ch; }
.panels { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; min-width: 0; }
.wide { overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; margin: 0 0 8px; font-size: .85rem; }
.chip i { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 5px;
  vertical-align: -2px; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; white-space: normal; min-width: 4.5em;
  vertical-align: bottom; }
td.text, th.text { text-align: left; white-space: normal; }
td.layers { min-width: 13em; }
tr.float td { color: var(--soft); }
th:first-child, td:first-child { min-width: 0; position: sticky; left: 0; background: var(--page); }
code { font-size: .95em; white-space: nowrap; user-select: all; background: var(--card);
  border-radius: 4px; padding: 2px 5px; }
"""

_SCRIPT = """
(function () {
  var plots = PLOTS;
  var options = { responsive: true, displayModeBar: false };
  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }
  function draw() {
    var ink = colour('--ink'), line = colour('--line'), card = colour('--card');
    Object.keys(plots).forEach(function (name) {
      var layout = plots[name].layout;
      layout.font.color = ink;
      if (matchMedia('(pointer: coarse)').matches) layout.dragmode = false;
      [layout.xaxis, layout.yaxis].forEach(function (axis) {
        axis.gridcolor = axis.linecolor = line;
      });
      layout.hoverlabel = { align: 'left', bgcolor: card, bordercolor: line, font: { color: ink } };
      Plotly.react(name, plots[name].data, layout, options);
    });
  }
  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
})();
"""
