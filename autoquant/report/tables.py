"""Tables of runs for the terminal, and the Markdown note for MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoquant.report.text import (
    COLUMNS,
    MISSING,
    Record,
    count_text,
    export_command,
    headline,
    markdown_text,
    metric_of,
    plain,
    rows_of,
    shape_text,
    split_of,
    summary,
    total,
)

if TYPE_CHECKING:
    from rich.table import Table

_TABLE_WIDTH = 100  # columns of a terminal that the front must fit


def front_table(front: Record) -> Table:
    """The front as a table of at most 100 columns: the float network first, then the members.

    ``front`` is the content of ``front.json``. Top-1 is in percent and its drops in points, any
    other metric in its own units; ± is one standard error (of a drop, the paired one).
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    name, percent = metric_of(front)
    unit, points = ("(%)", "(points)") if percent else ("", "")
    heading = f"{front['run']} · {front['task']} · {front['hardware']} · {name}"
    headings = [
        "trial\n",
        f"{split_of(front)}\n{unit}",
        f"drop\n{points}",
        f"test\n{unit}",
        f"drop\n{points}",
        "predicted\n(ms)",
        "measured\n(ms)",
        "size\n",
        "weight\nbits",
    ]
    rows = [[plain(row[column]) for column in COLUMNS] for row in rows_of(front)]
    widths = [
        max(len(part) for cell in (title, *cells) for part in cell.split("\n"))
        for title, *cells in zip(headings, *rows, strict=True)
    ]
    narrow = sum(widths) + 2 * (len(widths) - 1) > _TABLE_WIDTH
    table = Table(
        title=Text(heading, style="bold"),
        title_justify="left",
        caption=Text(summary(front)),
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
            str(layer.get("name", MISSING)),
            str(layer.get("kind", MISSING)),
            *(shape_text(layer.get(f"{part}_shape")) for part in ("weight", "input", "output")),
            count_text(layer.get("macs")),
            count_text(layer.get("parameters")),
        ]
        if low is not None:
            value = layer.get("sensitivity", {}).get(low)
            cells.append(MISSING if value is None else f"{value:.1e}")
        table.add_row(*map(Text, cells))
    macs, parameters = (total(layers, key) for key in ("macs", "parameters"))
    table.caption = Text(
        f"{len(layers)} layers · {count_text(macs)} MACs · {count_text(parameters)} parameters"
    )
    return table


def groups_table(groups: Sequence[Record]) -> Table:
    """The channel groups of a network: how many units each has, which layers make its channels
    and which read them.

    Keys read: name, units, channels, makers, readers; a missing one shows as a dash.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("channel group", no_wrap=True, overflow="fold")
    for heading in ("units", "channels"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("made by", "read by"):
        table.add_column(heading, overflow="fold")
    for group in groups:
        cells = [str(group.get(key, MISSING)) for key in ("name", "units", "channels")]
        cells += [", ".join(group.get(key, [MISSING])) for key in ("makers", "readers")]
        table.add_row(*map(Text, cells))
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


def front_markdown(
    front: Record, links: Mapping[int, str] | None = None, chosen: int | None = None
) -> str:
    """The front as a Markdown table, how to read it, and the command that exports a member.

    ``links``: where a member's page is, by trial. ``chosen``: the trial that is registered.
    """
    links = links or {}
    name, percent = metric_of(front)
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
        f"### {markdown_text(front['run'])}: {markdown_text(front['task'])} on "
        f"{markdown_text(front['hardware'])}",
        "",
        f"{markdown_text(headline(front))} {markdown_text(summary(front).capitalize())}.",
        "",
        "Export a member with its trial number:",
        "",
        "```",
        export_command(front, "N"),
        "```",
        "",
        "The artifact `front.html` is the report; the child runs are the trials, and those on "
        "the front carry the tag `pareto = true` and hold their file and `candidate.json`.",
        "",
        *_registered(front, links, chosen),
        _HOW_TO_READ,
        "",
        "| " + " | ".join(map(markdown_text, headings)) + " |",
        "|" + "---:|" * len(headings),
    ]
    for row in rows_of(front):
        cells = [markdown_text(plain(row[column])) for column in COLUMNS]
        if row["trial"].isdecimal() and int(row["trial"]) in links:
            cells[0] = f"[{cells[0]}]({links[int(row['trial'])]})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _registered(front: Record, links: Mapping[int, str], chosen: int | None) -> list[str]:
    """Which member is a version of the registered model."""
    if chosen is None or chosen not in links:
        return []
    return [
        f"The knee, trial [{chosen}]({links[chosen]}), is registered as "
        f"{markdown_text(front['task'])} under the alias `chosen`, with the session option that "
        "it needs.",
        "",
    ]


_HOW_TO_READ = (
    "Every row was scored on the ONNX file itself. The first columns come from the validation "
    "split, which the search saw; the test columns come from data that it did not see. A drop "
    "is the float network minus the member on the same samples; ± is one standard error (of a "
    "drop, the paired one; of a measured latency, the spread of its rounds; of a predicted one, "
    "the range of the device's model)."
)


def status_table(status: Record) -> Table:
    """What `autoquant.search.status.status` found, a row a fact; what is unknown is left out."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    owner = status["owner"]
    rows = {
        "run": status["run"],
        "state": status["state"],
        "driver": owner and f"process {owner.get('pid')} on {owner.get('host')}",
        "last heard of": status["last_heard_of"],
        "stage": status["stage"],
        "trials": f"{status['trials']} of {status['total']}",
        "failed": status["failed"] or None,
        "last error": status["last_error"],
        "front so far": f"{status['members']} members",
    }
    if status["state"] == "running":
        rate, left = status["trials_per_minute"], status["seconds_left"]
        rows["workers"] = status["workers"] or None
        rows["retries"] = status["retries"] or None
        rows["trials a minute"] = None if rate is None else f"{rate:.3g}"
        rows["minutes left"] = None if left is None else f"{left / 60:.1f}"
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table
