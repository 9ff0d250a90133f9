from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_task import SPACE, member, profile, task

import autoquant
from autoquant.candidate import Candidate
from autoquant.progress import ProgressBar
from autoquant.result import TrialResult

STUDY = {"name": "one", "trials": 10}


def result(trial: int, accuracy: float, size: int, status: str = "complete") -> TrialResult:
    found = member(trial, accuracy, size)
    return TrialResult(trial, found.candidate, status, found.searched, found.predicted)


def bar(terminal: bool = True) -> tuple[ProgressBar, io.StringIO]:
    """A bar that draws into a string."""
    found, text = ProgressBar(), io.StringIO()
    found.console = Console(file=text, force_terminal=terminal, width=100, no_color=True)
    return found, text


def test_the_bar_counts_trials_and_shows_the_best() -> None:
    found, text = bar()
    found.stage("lowering")
    found.start(STUDY, [{}] * 3, [])
    for trial in (result(0, 0.9, 3000), result(1, 0.896, 1000), result(2, 0.5, 10)):
        found.trial(trial)
    assert found.progress is not None
    (shown,) = found.progress.tasks
    assert (shown.completed, shown.total) == (3, 10)
    assert "best 0.9000" in shown.description and "within 1 %: 1 kB" in shown.description
    found.finish(None)
    assert found.progress is None
    assert "lowering" in text.getvalue() and "searching one: 10 trials" in text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_shows_its_time_on_a_terminal_and_leaves_nothing(terminal: bool) -> None:
    found, text = bar(terminal)
    found.stage("timing [kernels]")
    assert (found.waiting is not None) == terminal
    if found.waiting is not None:
        assert not found.waiting.finished and found.waiting.live.is_started
    found.stage("verifying")
    found.close()
    assert found.waiting is None and found.progress is None
    assert text.getvalue().count(" timing [kernels]\n") == 1
    assert ("0:00:0" in text.getvalue()) == terminal


def test_a_resumed_search_starts_where_it_was() -> None:
    found, text = bar()
    found.start(STUDY, [{}] * 3, [result(0, 0.9, 3000), result(1, 0.8, 10, "infeasible")])
    assert found.progress is not None and found.progress.tasks[0].completed == 2
    found.trial(result(2, 0.85, 2000))
    assert "best 0.9000" in found.progress.tasks[0].description
    assert found.progress.tasks[0].completed == 3
    found.finish(None)
    assert "2 done before" in text.getvalue()


def test_a_failed_trial_is_said_and_counted() -> None:
    found, text = bar()
    found.start(STUDY, [], [])
    error = "ValueError: shape [/2, 3] is [red]wrong[/red]"  # no markup
    found.trial(replace(TrialResult(4, Candidate(), "failed"), error=error))
    assert found.progress is not None
    assert "1 failed" in found.progress.tasks[0].description
    found.finish(None)
    assert f"trial 4 failed: {error}" in text.getvalue()


def test_a_name_with_brackets_is_printed_as_it_is() -> None:
    found, text = bar()
    found.stage("reading [/tmp/x] and [bold]that[/bold]")
    found.start({"name": "a[/b]", "trials": 3}, [], [])
    found.finish(None)
    assert "reading [/tmp/x] and [bold]that[/bold]" in text.getvalue()
    assert "searching a[/b]" in text.getvalue()


def test_without_a_terminal_there_are_only_lines() -> None:
    found, text = bar(terminal=False)
    found.start({"name": "a" * 200, "trials": 10}, [], [])
    for trial in range(5):
        found.trial(result(trial, 0.9, 1000))
    found.finish(None)
    assert "\x1b" not in text.getvalue() and "━" not in text.getvalue()
    assert len(text.getvalue().splitlines()) == 1  # a log is not wrapped


def test_a_search_shows_it_on_stderr_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"space": SPACE, "hardware": profile(), "trials": 2}
    autoquant.search(task(tmp_path), runs_dir=tmp_path, name="one", tracking=False, **options)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "lowering" in captured.err and "searching one: 2 trials over 3 layers" in captured.err
    assert "verifying" in captured.err
