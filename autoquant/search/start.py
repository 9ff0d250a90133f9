"""Continue from a result: members of an old front as the first candidates of a new study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from autoquant.candidate import Candidate, LayerChoice
from autoquant.errors import RunError, nearest
from autoquant.front import Front, find_run
from autoquant.search.dimensions import Options, candidate_of, option_of
from autoquant.search.study import read_trials

Origins = list[tuple[str, Candidate]]


def read_start(spec: str, runs_dir: str | Path) -> Origins:
    """The members of ``RUN``'s front, or the one trial of ``RUN:TRIAL``, with their origins.

    Raises RunError for a run or a trial that there is not.
    """
    run, _, trial = spec.rpartition(":")
    if not (run and trial.isdigit()):
        front = Front.read(spec, runs_dir)
        if not front.members:
            raise RunError(f"--start-from {spec}: its front is empty")
        return [(_origin(front.run, m.trial), m.candidate) for m in front.members]
    folder = find_run(run, runs_dir)
    trials = {r.trial: r.candidate for r in read_trials(folder / "trials.jsonl")}
    if int(trial) not in trials:
        raise RunError(
            f"--start-from {spec}: run {run!r} has no trial {trial}; "
            f"{nearest(trial, map(str, trials))}"
        )
    return [(_origin(folder.name, int(trial)), trials[int(trial)])]


def _origin(run: str, trial: int) -> str:
    return f"start {run}:{trial}"


def moved(
    start: Sequence[tuple[str, Candidate]],
    choices: Mapping[str, Sequence[LayerChoice]],
    options: Options | None = None,
) -> Origins:
    """The candidates with the nearest choice that ``choices`` offers for each layer.

    Of ``options`` they keep what there still is. What a search does not choose, polishing for
    one, is left out. Raises RunError for a compressed layer that the network does not have.
    """
    found = []
    for origin, candidate in start:
        for name, choice in candidate.layers.items():
            if name not in choices and not choice.is_float:
                raise RunError(
                    f"--start-from: {origin.removeprefix('start ')} compresses layer {name!r}, "
                    f"which this network does not have; {nearest(name, choices)}"
                )
        picks: dict[str, Any] = {
            n: _nearest(candidate.choice(n), offered) for n, offered in choices.items()
        }
        picks |= {n: option_of(candidate, n, c) for n, c in (options or {}).items()}
        found.append((origin, candidate_of(picks)))
    return found


def _nearest(choice: LayerChoice, offered: Sequence[LayerChoice]) -> LayerChoice:
    """By weight bits, activation bits, codebook and zeros, then the rest; of two the wider."""

    def distance(other: LayerChoice) -> tuple[float, ...]:
        return (
            abs(other.weight_bits - choice.weight_bits),
            abs(other.activation_bits - choice.activation_bits),
            other.codebook != choice.codebook,
            abs(other.stored_bits - choice.stored_bits),
            sum(getattr(other, f.name) != getattr(choice, f.name) for f in fields(choice)),
            -other.weight_bits,
            -other.activation_bits,
        )

    return min(offered, key=distance)
