"""Names and options of a study's dimensions, and the candidates that they span."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from small_task import SPACE, context
from test_study import Fake, open_study, settings

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.search.dimensions import candidate_of, option_of, structural_starts
from autoquant.search.study import Study, read_trials

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "conv": (LayerChoice(4, 8), LayerChoice(8, 8), FLOAT),
    "prune:conv": (0.5, 0.25, 0.0),
    "prune:stage:2": (0.5, 0.0),
    "rank:conv": ("cp:4", "separable", 8, None),
    "drop:block": (True, False),
    "student:width": (0.5, None),
    "train:steps": (0, 200),
    "train:learning_rate": (0.1, 0.01),
    "importance": ("l1", "taylor", "l2"),
}


def test_a_candidate_has_the_options_that_it_was_made_of() -> None:
    generator = random.Random(0)
    for _ in range(200):
        picks = {n: generator.choice(c) for n, c in DIMENSIONS.items()}
        found = candidate_of(picks)
        again = {n: option_of(found, n, c) for n, c in DIMENSIONS.items()}
        if not picks["train:steps"]:
            picks["train:learning_rate"] = 0.01  # without steps it has no effect
        assert again == picks
        assert Candidate.from_dict(found.to_dict()) == found


def test_the_last_option_leaves_the_network_as_it_is() -> None:
    found = candidate_of({n: c[-1] for n, c in DIMENSIONS.items() if n != "train:steps"})
    assert found == Candidate() and not found.is_structural


def test_what_has_no_effect_is_no_other_candidate() -> None:
    plain = candidate_of({"conv": LayerChoice(4, 8)})
    assert candidate_of({"conv": LayerChoice(4, 8), "importance": "l1"}) == plain
    assert candidate_of({"conv": LayerChoice(4, 8), "train:steps": 0}) == plain
    assert candidate_of({"conv": LayerChoice(4, 8), "drop:block": True}) != plain


def test_the_structure_leaves_bits_and_training_out() -> None:
    whole = candidate_of({n: c[0] for n, c in DIMENSIONS.items()} | {"train:steps": 200})
    assert whole.is_structural
    assert whole.structure == candidate_of(
        {n: c[0] for n, c in DIMENSIONS.items() if n != "conv" and not n.startswith("train")}
    )


@pytest.mark.parametrize("sampler", ["tpe", "surrogate"])
def test_a_study_proposes_records_and_resumes_all_dimensions(tmp_path: Path, sampler: str) -> None:
    small = context(tmp_path, SPACE)
    options = {"train:steps": (0, 200), "train:learning_rate": (0.1, 0.01)}
    object.__setattr__(small, "options", options)
    table = {n: tuple(2.0**-c.weight_bits for c in f) for n, f in small.choices.items()}
    study = open_study(small, tmp_path, sampler=sampler, trials=20)
    study.priors.update({"given": table})
    assert set(study.free) == {*small.choices, *options}
    assert study.run(Fake(small), []) == "trials"
    trained = [r.candidate.training for r in read_trials(tmp_path / "trials.jsonl")]
    assert {"steps": 200, "learning_rate": 0.1} in trained and None in trained
    again = Study(small, settings(tmp_path, sampler=sampler, trials=25), True)
    assert again.run(Fake(small), []) == "trials"
    assert len({r.candidate.key for r in again.results}) == 25


def test_a_study_starts_with_structures_of_one_kind() -> None:
    base = Candidate({"conv": LayerChoice(8, 8)})
    options = {n: c for n, c in DIMENSIONS.items() if n != "conv"}
    found = structural_starts(base, options)
    parts = [(dict(c.pruning), dict(c.rank), c.drop) for c in found]
    assert parts == [
        ({"conv": 0.25, "stage:2": 0.5}, {}, ()),
        ({"conv": 0.5, "stage:2": 0.5}, {}, ()),
        ({}, {"conv": 8}, ()),
        ({}, {"conv": "separable"}, ()),
        ({}, {"conv": "cp:4"}, ()),
        ({}, {}, ("block",)),
    ]
    assert all(c.layers == base.layers and c.training is None for c in found)
