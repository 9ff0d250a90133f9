from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_task import batches, settings, task

from autoquant.front import ranked
from autoquant.search import search
from autoquant.space import Space

RULES = [{"weight_bits": [2, 3, 4, 8], "activation_bits": 8}]


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
