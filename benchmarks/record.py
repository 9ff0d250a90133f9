"""Every benchmark's output: the figures with versions, machine and time, as small JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def record(name: str, figures: dict[str, Any], write: bool = True) -> None:
    """Write ``results/NAME.json``: the figures and what they were measured with."""
    from autoquant.search.run import describe_environment

    if write:
        RESULTS.mkdir(exist_ok=True)
        document = {"environment": describe_environment(), **figures}
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {RESULTS.name}/{name}.json")
