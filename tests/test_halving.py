from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_task import batches, settings, task

from autoquant.front import ranked
from autoquant.result import TrialResult
from autoquant.search import search
from autoquant.search.study import Callback
from autoquant.space import Space

RULES = [{"weight_bits": [2, 3, 4, 8], "activation_bits": 8}]
PRUNING = [{"ratios": [0, 0.25, 0.5]}]
PRUNED = Space.model_validate({"name": "p", "rules": RULES, "pruning": PRUNING})


def space(**training: object) -> Space:
    return Space.model_validate({"name": "h", "rules": RULES, "training": training})


def test_ranks_are_fronts_and_then_the_ends_before_the_crowd() -> None:
    points = np.array([[2, 2], [0, 3], [1, 1.9], [1.1, 1.8], [3, 0], [5, 5]], float)
    order = ranked(points)
    assert set(order[:2]) == {1, 4} and order[-1] == 5 and order[-2] == 0
    assert sorted(order) == list(range(6))


def test_the_better_half_trains_on(tmp_path: Path) -> None:
    found = space(halving=True, steps=[10, 30], batch_size=32, learning_rate=0.003)
    chosen = settings(tmp_path, space=found, trials=18, polish=False)
    front = search(task(tmp_path, train=batches(4, 128)), chosen)
    lines = (tmp_path / "runs" / "one" / "trials.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines]
    steps = [(t["candidate"]["training"] or {}).get("steps", 0) for t in trials]
    assert len(trials) == 18 and steps == [0] * 12 + [10] * 4 + [30] * 2
    short = [json.dumps(t["candidate"]["layers"]) for t in trials if t["origin"] == "training"]
    assert set(short[4:]) <= set(short[:4])
    assert list((tmp_path / "runs" / "one" / "training").glob("*.pt"))
    for member in front.members:
        assert (tmp_path / "runs" / "one" / str(member.artifact)).is_file()


def test_halving_needs_steps() -> None:
    with pytest.raises(ValueError, match="halving needs steps"):
        space(halving=True)


def test_a_task_without_train_data_trains_none(tmp_path: Path) -> None:
    found = space(halving=True, steps=[10, 30])
    front = search(task(tmp_path), settings(tmp_path, space=found, trials=9, polish=False))
    assert front.trials == 9 and not any(m.candidate.training for m in front.members)


class Stop(Callback):
    """Ctrl-C after the first trained trial."""

    def trial(self, result: TrialResult) -> None:
        if result.candidate.training:
            raise KeyboardInterrupt


def test_what_was_interrupted_on_a_rung_goes_on_with_resume(tmp_path: Path) -> None:
    """As if nothing had happened: the same candidates train, none twice."""
    found = space(halving=True, steps=[10, 30], batch_size=32, learning_rate=0.003)
    scores = []
    for name in ("whole", "halves"):
        folder = tmp_path / name
        folder.mkdir()
        chosen = settings(folder, space=found, trials=18, polish=False)
        work = task(folder, train=batches(4, 128))
        if name == "halves":
            search(work, chosen, callbacks=[Stop()])
            chosen = replace(chosen, resume=True)
        search(work, chosen)
        lines = (folder / "runs" / "one" / "trials.jsonl").read_text().splitlines()
        trials = [json.loads(line) for line in lines]
        assert len({t["key"] for t in trials}) == len(trials) == 18
        scores.append({t["key"]: t["score"]["accuracy"] for t in trials})
    assert scores[0] == scores[1]


def test_workers_train_and_prune_as_this_process_does(tmp_path: Path) -> None:
    """On Ray as in process: the same candidates, the same scores, and a file of each member."""
    found = space(halving=True, steps=[10, 30], batch_size=32, learning_rate=0.003)
    pruned = found.model_copy(update={"pruning": PRUNED.pruning})
    scores = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        chosen = settings(folder, space=pruned, trials=18, workers=workers, sampler="random")
        chosen = replace(chosen, polish=False)
        front = search(task(folder, train=batches(4, 128)), chosen)
        lines = (folder / "runs" / "one" / "trials.jsonl").read_text().splitlines()
        trials = [json.loads(line) for line in lines]
        assert [t["error"] for t in trials] == [None] * 18
        assert sum(t["origin"] == "training" for t in trials) == 6
        for member in front.members:
            if member.candidate.training:
                path = folder / "runs" / "one" / "artifacts" / f"{member.trial}.onnx"
                assert path.is_file() or (folder / "runs" / "one" / str(member.artifact)).is_file()
        scores.append({t["key"]: t["score"]["accuracy"] for t in trials})
    both = set(scores[0]) & set(scores[1])
    assert len(both) >= 10 and any(scores[0][key] for key in both)
    assert {k: scores[0][k] for k in both} == {k: scores[1][k] for k in both}
