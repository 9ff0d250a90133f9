"""Tables and plots of runs: for the terminal, for MLflow's note and as HTML pages.

Everything here reads the contract's JSON (``front.json``, lines of ``trials.jsonl``); nothing
needs the objects that made it.
"""

from autoquant.report.compare import choice_lines, compare_fronts, compare_table
from autoquant.report.page import compare_html, front_html
from autoquant.report.tables import (
    front_markdown,
    front_table,
    groups_table,
    layers_table,
    status_table,
)

__all__ = [
    "choice_lines",
    "compare_fronts",
    "compare_html",
    "compare_table",
    "front_html",
    "front_markdown",
    "front_table",
    "groups_table",
    "layers_table",
    "status_table",
]
