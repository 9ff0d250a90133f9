"""HTML pages that need no network: plotly.js is inside."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from autoquant.candidate import WEIGHT_BITS
from autoquant.report.assets import PAGE, SCRIPT, STYLE
from autoquant.report.compare import DROPS, compare_fronts, run_names
from autoquant.report.figures import (
    BIT_COLOURS,
    NAMED_LAYERS,
    bits_figure,
    compare_figure,
    cost_figure,
    latency_figure,
    learned_figure,
    progress_figures,
    shown_costs,
)
from autoquant.report.history import by_origin, progress, what_never_paid
from autoquant.report.text import (
    COLUMNS,
    MISSING,
    TITLES,
    Record,
    amount,
    bits_summary,
    bits_words,
    choices_of,
    curse,
    duration,
    export_command,
    headline,
    headline_member,
    layer_names,
    member_rows,
    metric_of,
    quantity,
    rows_of,
    split_of,
    structure_words,
)

_LEARNED_LAYERS = 30  # rows of the table of what the search learned


def front_html(
    front: Record,
    trials: Sequence[Record],
    layers: Sequence[Record],
    learned: Record | None = None,
) -> str:
    """One HTML page of a run that needs no network: plots, bits of every layer, export commands.

    ``front`` is the content of ``front.json``, ``trials`` the lines of ``trials.jsonl``,
    ``layers`` mappings with ``name`` and, where they are known, ``costs`` of choices, in the
    order of depth, ``learned`` the content of ``learned.json``. About 5 MB: plotly.js is inside.
    """
    names = layer_names(front, layers)
    plots = {f"cost-{cost}": cost_figure(front, trials, names, cost) for cost in shown_costs(front)}
    costs = "\n".join(map(_panel, plots))
    predicted = latency_figure(front)
    if predicted is not None:
        plots["latency"] = predicted
    if front["members"] and names:
        plots["bits"] = bits_figure(front["members"], names)
    curve = progress(front, trials)
    if curve:
        plots |= progress_figures(front, curve)
    sections = [
        f'<p class="headline">{escape(headline(front))}</p>',
        _heading("Accuracy and cost", _HOW_TO_READ_PLOTS),
        f'<div class="panels">{costs}</div>',
        _chosen_html(front, names),
        _heading("Weight bits of every layer", _HOW_TO_READ_BITS),
        _bits_html(front, names),
        _heading("Members", _HOW_TO_READ_MEMBERS),
        f'<div class="wide">{_members_html(front, names)}</div>',
        _latency_html(front) if predicted is not None else "",
        _history_html() if curve else "",
        _learned_html(front, trials, names, learned, plots),
    ]
    shares = {n: x["importance"] for n, x in ((learned or {}).get("layers") or {}).items()}
    chosen = {"layers": _layers_data(names, layers, shares), **_members_data(front, names)}
    return _page(str(front["run"]), _facts_html(front), sections, plots, chosen)


def compare_html(fronts: Sequence[Record]) -> str:
    """One HTML page with the fronts of runs of one task overlaid. Raises RunError."""
    compared = compare_fronts(fronts)
    names = run_names(compared)
    costs = [name for name in compared["objectives"] if name != "accuracy"]
    plots = {f"cost-{cost}": compare_figure(fronts, names, cost) for cost in costs}
    facts = {
        "task": compared["task"],
        "metric": metric_of(fronts[0])[0],
        "compared by": ", ".join(compared["objectives"]),
    }
    percent = metric_of(fronts[0])[1]
    headings = ["hardware", "trials", "time", "members", "on the joint front", "hypervolume"]
    headings += [f"smallest within {100 * d:g} {'points' if percent else '%'}" for d in DROPS]
    rows = []
    for name, run in zip(names, compared["runs"], strict=True):
        small = (run["smallest"][str(d)] for d in DROPS)
        cells = [
            run["hardware"],
            str(run["trials"]),
            duration(run["seconds"]),
            str(run["members"]),
            str(len(run["joint_front"])),
            f"{run['hypervolume']:.4f}",
            *(
                MISSING
                if s is None
                else f"{amount('size_bytes', s['size_bytes'])} (trial {s['trial']})"
                for s in small
            ),
        ]
        figures = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><td class="text">{escape(name)}</td>{figures}</tr>')
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    sections = [
        _heading("Accuracy and cost", _HOW_TO_READ_COMPARED),
        f'<div class="panels">{"".join(map(_panel, plots))}</div>',
        _heading(
            "Runs",
            "The joint front are the members that no member of any of the runs dominates. "
            "Hypervolumes are against one reference point, the worst of the runs'.",
        ),
        f'<div class="wide"><table><thead><tr><th class="text">run</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    ]
    return _page(" and ".join(names), _facts(facts), sections, plots, {"members": []})


def _page(heading: str, facts: str, sections: Sequence[str], plots: Record, chosen: Record) -> str:
    from plotly.offline import get_plotlyjs

    return PAGE.format(
        title=escape(f"{heading} · autoquant"),
        heading=escape(heading),
        style=STYLE,
        plotlyjs=get_plotlyjs(),
        facts=facts,
        body="\n".join(section for section in sections if section),
        script=SCRIPT.replace("CHOSEN", _inline(chosen)).replace("PLOTS", _inline(plots)),
    )


def _inline(document: Record) -> str:
    """JSON inside a script: an escaped "<" cannot end it."""
    return json.dumps(document, separators=(",", ":")).replace("<", "\\u003c")


def _heading(title: str, note: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p class="note">{escape(note)}</p>'


def _panel(name: str) -> str:
    return f"<figure>{_placeholder(name, 380)}</figure>"


_HOW_TO_READ_BITS = (
    "One row a member, most accurate first; one column a layer, from input to output."
)
_HOW_TO_READ_MEMBERS = (
    "The member's ONNX file was scored itself. Searched figures come from the split that the "
    "search saw, test figures from data that it did not see. A drop is the float network minus "
    "the member on the same samples; ± is one standard error (of a drop, the paired one; of a "
    "measured latency, the spread of its rounds; of a predicted one, the range of the device's "
    "model)."
)
_HOW_TO_READ_COMPARED = (
    "Up and to the left is better. A point is a member of a run's front with one standard error; "
    "a line joins those of a run that no other of its members beats in the two quantities of the "
    "panel. Click a name to hide its run."
)


_HOW_TO_READ_PLOTS = (
    "Up and to the left is better. A point is a trial; the orange ones are the front, with one "
    "standard error, and the line joins those that no other member beats in the two quantities "
    "of the panel. The blue diamond is the float network, blue rings are the same bits in every "
    "layer, open circles measured latencies. Click a member to select it; double-click to see "
    "every trial or to come back."
)


def _bits_html(front: Record, names: Sequence[str]) -> str:
    members = front["members"]
    if not members or not names:
        return "<p>The front is empty.</p>"
    used = {c.weight_bits for m in members for c in choices_of(m["candidate"], names)}
    legend = "".join(
        f'<span class="chip"><i style="background:{BIT_COLOURS[bits]}"></i>'
        f"{'float (f)' if bits == 32 else f'{bits} bit'}</span>"
        for bits in WEIGHT_BITS
        if bits in used
    )
    width = (24 if len(names) <= NAMED_LAYERS else 8) * len(names) + 90
    height = 26 * len(members) + (132 if len(names) <= NAMED_LAYERS else 56)
    return (
        f'<p class="legend">{legend}</p>'
        f'<div class="wide"><div style="min-width:{width}px">'
        f"{_placeholder('bits', height)}</div></div>"
    )


def _placeholder(name: str, height: int) -> str:
    """Where the script draws the plot of this name."""
    return f'<div class="plot" id="{escape(name)}" style="height:{height}px"></div>'


def _facts_html(front: Record) -> str:
    reference = front.get("reference_point") or {}
    point = ", ".join(f"{name} {quantity(front, name, reference[name])}" for name in reference)
    facts = {
        "task": front["task"],
        "metric": metric_of(front)[0],
        "hardware": front["hardware"],
        "objectives": ", ".join(front["objectives"]),
        "trials": f"{front['trials']} in {duration(front['seconds'])}",
        "front": f"{len(front['members'])} members",
        "hypervolume": f"{front['hypervolume']:.4g}" + (f" against {point}" if point else ""),
    }
    both = curse(front)
    if both is not None:
        facts["validation against test"] = both
    return _facts(facts)


def _facts(facts: Record) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts.items()
    )


def _chosen_html(front: Record, names: Sequence[str]) -> str:
    """Where the script shows the member that is selected or under the mouse."""
    if not front["members"] or not names:
        return ""
    return (
        '<section id="chosen"><h2 id="chosen-title">Selected member</h2>'
        '<dl id="chosen-facts"></dl>'
        '<p class="command"><code id="chosen-command"></code>'
        '<button id="copy" type="button">Copy</button></p>'
        '<div class="wide"><div id="strip" role="group" aria-label="layers by depth"></div></div>'
        '<p class="note" id="strip-note" aria-live="polite"></p></section>'
    )


def _layers_data(
    names: Sequence[str], layers: Sequence[Record], shares: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Of every layer its name, its share of the divergence, and by choice bytes and
    milliseconds."""
    costs = {str(layer["name"]): layer.get("costs") or {} for layer in layers}
    return [
        {
            "name": name,
            "sensitivity": shares.get(name),
            "costs": {
                choice: [cost.get("size_bytes"), cost.get("latency_ms")]
                for choice, cost in costs.get(name, {}).items()
            },
        }
        for name in names
    ]


def _members_data(front: Record, names: Sequence[str]) -> dict[str, Any]:
    """What the script shows of each member; the one that it shows first."""
    if not front["members"] or not names:
        return {"members": []}
    unit = " points" if metric_of(front)[1] else ""
    members = []
    for member, row in zip(front["members"], member_rows(front), strict=True):
        facts = [
            [f"{split_of(front)}", row["accuracy"]],
            ["drop", f"{row['drop']}{unit}"],
            ["test drop", f"{row['test_drop']}{unit}"],
            ["file", row["size"]],
            ["bits a weight", row["bits"]],
            ["latency, predicted (ms)", row["predicted"]],
            ["measured (ms)", row["measured"]],
            *structure_words(member["candidate"]),
        ]
        members.append(
            {
                "trial": member["trial"],
                "facts": [[k, v] for k, v in facts if not v.startswith(MISSING)],
                "command": export_command(front, member["trial"]),
                "layers": [
                    [c.weight_bits, str(c), bits_words(c)]
                    for c in choices_of(member["candidate"], names)
                ],
            }
        )
    colours = {str(bits): colour for bits, colour in BIT_COLOURS.items()}
    first = headline_member(front)["trial"]
    return {"members": members, "colours": colours, "first": first}


def _latency_html(front: Record) -> str:
    pairs = [
        (m["predicted"].get("latency_ms"), (m.get("verified") or {}).get("latency_ms"))
        for m in front["members"]
    ]
    errors = sorted(abs(a / b - 1) for a, b in pairs if a is not None and b)
    text = "Points above the dotted line ran faster than predicted."
    if errors:
        middle = errors[len(errors) // 2]
        text += f" Error of {len(errors)} members: median {middle:.1%}, worst {errors[-1]:.1%}."
    return _heading("Predicted against measured latency", text) + (
        f'<div class="panels">{_panel("latency")}</div>'
    )


def _history_html() -> str:
    panels = "".join(map(_panel, ("hypervolume-trials", "hypervolume-seconds")))
    return (
        _heading(
            "How the front grew",
            "Hypervolume of the front so far, as a share of the box between the reference point "
            "and the float network's metric at no cost.",
        )
        + f'<div class="panels">{panels}</div>'
    )


def _members_html(front: Record, names: Sequence[str]) -> str:
    unit, points = (" (%)", " (points)") if metric_of(front)[1] else ("", "")
    costs = [c for c in front["objectives"] if c not in ("accuracy", "latency_ms", "size_bytes")]
    costs = [c for c in costs if c != "average_weight_bits"]
    headings = [
        "trial",
        f"{split_of(front)}{unit}",
        f"drop{points}",
        f"test{unit}",
        f"drop{points}",
        "latency, predicted (ms)",
        "latency, measured (ms)",
        "size",
        "weight bits",
        *(TITLES.get(cost, cost) for cost in costs),
    ]
    words = ("layers (weight/activation bits)", "export")
    rows = []
    every = rows_of(front)
    beside = len(every) - len(front["members"])  # networks to compare with
    for member, row in zip([*[None] * beside, *front["members"]], every, strict=True):
        figures = (member or {}).get("predicted") or {}
        if row["trial"] == "float":
            figures = front["baseline"]
        cells = [f"<td>{escape(row[column])}</td>" for column in COLUMNS]
        cells += [f"<td>{escape(amount(cost, figures.get(cost)))}</td>" for cost in costs]
        if member is None:
            cells += ["<td></td><td></td>"]
        else:
            summary = " · ".join(bits_summary(member["candidate"], names))
            command = export_command(front, member["trial"])
            cells.append(f'<td class="text layers">{escape(summary)}</td>')
            cells.append(f'<td class="text"><code>{escape(command)}</code></td>')
        kind = f' data-trial="{member["trial"]}" tabindex="0"' if member else ' class="float"'
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    head += "".join(f'<th class="text">{escape(heading)}</th>' for heading in words)
    body = "\n".join(rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _learned_html(
    front: Record,
    trials: Sequence[Record],
    names: Sequence[str],
    learned: Record | None,
    plots: dict[str, Any],
) -> str:
    """Which layers matter, what never paid and what proposed the members."""
    parts = []
    layers = dict(list(((learned or {}).get("layers") or {}).items())[:_LEARNED_LAYERS])
    if learned and layers:
        plots["learned"] = learned_figure(layers)
        parts.append(
            '<p class="note">Share of the divergence that each layer or structure causes, most '
            f"sensitive first, learned from {learned['trials']} trials; the marks are what was "
            "measured or assumed before them.</p>"
            f"<figure>{_placeholder('learned', 90 + 22 * len(layers))}</figure>"
            f"{_factors_html(layers)}"
        )
    sentences = what_never_paid(front, trials, names)
    if sentences:
        items = "".join(f"<li>{escape(text)}</li>" for text in sentences)
        parts.append(f"<h3>What never paid, and what always did</h3><ul>{items}</ul>")
    if trials:
        rows = "".join(
            f'<tr><td class="text">{escape(name)}</td><td>{count}</td><td>{kept}</td></tr>'
            for name, count, kept in by_origin(front, trials)
        )
        parts.append(
            '<h3>What proposed the members</h3><div class="wide"><table><thead><tr>'
            '<th class="text">proposed by</th><th>trials</th><th>on the front</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "<h2>What the search learned</h2>\n" + "\n".join(parts) if parts else ""


def _factors_html(layers: Record) -> str:
    rows = []
    for name, layer in layers.items():
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
        "<details><summary>The factor between the two, with its uncertainty</summary>"
        '<div class="wide"><table><thead><tr><th class="text">layer</th><th>learned (%)</th>'
        "<th>before (%)</th><th>factor</th></tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div></details>"
    )
