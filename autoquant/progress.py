"""Progress of a search on a terminal or in a notebook: stages, a bar, the best so far."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from autoquant.result import TrialResult
from autoquant.search.status import Pace
from autoquant.search.study import Callback


class ProgressBar(Callback):
    """A rich progress bar on stderr; plain lines where stderr is no terminal.

    `close` it where a search may have ended without `finish`.
    """

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.waiting: Progress | None = None  # the time that a stage has taken so far
        self.failed = 0
        self.best: TrialResult | None = None
        self.smallest: TrialResult | None = None
        self.reference = 0.0
        self.speed: Pace | None = None

    def stage(self, text: str) -> None:
        """One line a stage, and on a terminal how long it takes while it does."""
        self.close()
        self.console.print(f"[dim]autoquant:[/] {escape(text)}", highlight=False, soft_wrap=True)
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TimeElapsedColumn())
            self.waiting = Progress(*columns, console=self.console, transient=True)
            self.waiting.add_task("", total=None)
            self.waiting.start()

    def start(
        self,
        study: Mapping[str, Any],
        layers: Sequence[Mapping[str, Any]],
        done: Sequence[TrialResult],
    ) -> None:
        """Open the bar."""
        self.close()
        name = study["name"]
        self.console.print(
            f"[dim]autoquant:[/] searching {escape(str(name))}: {study['trials']} trials over "
            f"{len(layers)} layers" + (f", {len(done)} done before" if done else ""),
            highlight=False,
            soft_wrap=True,
        )
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[pace]}"),
            console=self.console,
            disable=not (self.console.is_terminal or "ipykernel" in sys.modules),
        )
        self.bar = self.progress.add_task(
            "search", total=study["trials"], completed=len(done), pace=""
        )
        self.progress.start()
        self.speed = Pace(study["trials"], len(done))
        for result in done:
            self._count(result)

    def trial(self, result: TrialResult) -> None:
        """Advance, with the best so far."""
        self._count(result)
        if result.status == "failed":
            self.console.print(
                f"[yellow]autoquant: trial {result.trial} failed: {escape(str(result.error))}[/]",
                highlight=False,
                soft_wrap=True,
            )
        if self.speed is not None:
            self.speed.tick()
        if self.progress is not None:
            self.progress.update(self.bar, advance=1, description=self._text())

    def pace(self, workers: int, retries: int) -> None:
        """Show how many run, how fast, and what was started again."""
        if self.speed is not None and self.progress is not None:
            self.speed.workers, self.speed.retries = workers, retries
            self.progress.update(self.bar, pace=str(self.speed))

    def finish(self, front: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Take what moves off the terminal."""
        for shown in (self.progress, self.waiting):
            if shown is not None:
                shown.stop()
        self.progress = self.waiting = None

    def _count(self, result: TrialResult) -> None:
        self.failed += result.status == "failed"
        if result.status != "complete" or result.score is None or result.predicted is None:
            return
        if self.best is None or result.score.value > self.best.score.value:  # type: ignore[union-attr]
            self.best = result
        close = result.score.drop <= 0.01 * abs(result.score.value + result.score.drop)
        if close and (
            self.smallest is None
            or result.predicted.size_bytes < self.smallest.predicted.size_bytes  # type: ignore[union-attr]
        ):
            self.smallest = result

    def _text(self) -> str:
        parts = []
        if self.best is not None and self.best.score is not None:
            parts.append(f"best {self.best.score.value:.4f}")
        if self.smallest is not None and self.smallest.predicted is not None:
            parts.append(f"within 1 %: {self.smallest.predicted.size_bytes / 1e3:,.0f} kB")
        if self.failed:
            parts.append(f"{self.failed} failed")
        return ", ".join(parts) or "search"
