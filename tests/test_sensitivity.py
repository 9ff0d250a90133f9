from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_task import LAYERS, SPACE, task

from autoquant.candidate import Candidate, LayerChoice
from autoquant.result import TrialResult
from autoquant.search.sensitivity import (
    _monotone,
    divergence,
    predicted,
    rank_correlation,
    sensitivity,
)
from autoquant.search.study import uniform_candidates
from autoquant.search.trial import Context, prepare, run_trial
from autoquant.space import Space


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return prepare(task(tmp_path_factory.mktemp("task")), space=SPACE, latency=False)


def test_divergence_is_the_mean_kl_of_the_softmax() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(p + 3.0, q - 1.0, classes=True) == pytest.approx(expected / 2)
    assert divergence(p, p, classes=True) == pytest.approx(0.0)


def test_divergence_of_other_outputs_is_the_relative_squared_error() -> None:
    reference = np.array([[0.0], [2.0], [4.0]])
    assert divergence(reference, reference + 1.0, classes=False) == pytest.approx(
        1 / reference.var()
    )
    assert divergence(reference, reference * np.nan, classes=False) == np.inf


def test_every_choice_of_every_layer_has_a_value_that_falls_with_its_bits(
    context: Context,
) -> None:
    table = sensitivity(context)
    assert set(table) == set(LAYERS)
    for name, values in table.items():
        assert len(values) == len(context.choices[name])
        assert list(values) == sorted(values, reverse=True)
        assert values[0] > 0 and values[-1] == 0.0  # 2 bits; float


def test_it_does_not_depend_on_the_number_of_workers(context: Context) -> None:
    assert sensitivity(context, workers=1) == sensitivity(context, workers=3)


def test_a_candidate_is_the_sum_of_its_layers(context: Context) -> None:
    table = sensitivity(context)
    lowest = Candidate({n: c[0] for n, c in context.choices.items()})
    assert predicted(table, context.choices, lowest) == pytest.approx(
        sum(values[0] for values in table.values())
    )
    assert predicted(table, context.choices, Candidate()) == 0.0


def test_the_rank_correlation_needs_three_trials(context: Context, tmp_path: Path) -> None:
    table = sensitivity(context)
    results: list[TrialResult] = []
    for index in range(3):
        candidate = Candidate({n: c[index] for n, c in context.choices.items()})
        results.append(run_trial(context, candidate, index))
    assert np.isnan(rank_correlation(table, context.choices, results[:2]))
    assert -1.0 <= rank_correlation(table, context.choices, results) <= 1.0


def test_choices_of_equal_bits_keep_values_of_their_own() -> None:
    channel, block = LayerChoice(4, 32), LayerChoice(4, 32, "block32")
    choices = (LayerChoice(3, 32), channel, block, LayerChoice(8, 32))
    assert _monotone(choices, (0.3, 0.2, 0.1, 0.15)) == (0.3, 0.2, 0.15, 0.15)


def test_roundings_of_one_width_have_values_of_their_own(tmp_path: Path) -> None:
    rule = {"weight_bits": [3, 8], "activation_bits": 8, "rounding": ["nearest", "second-order"]}
    space = Space.model_validate({"name": "two", "rules": [rule]})
    context = prepare(task(tmp_path), space=space, latency=False)
    assert [str(c) for c in context.choices["second"]] == [
        "3/8 nearest", "3/8 second-order", "8/8 nearest", "8/8 second-order"
    ]  # fmt: skip
    nearest, second_order, *_ = sensitivity(context)["second"]
    assert 0 < second_order < nearest
    first = uniform_candidates(context.choices)
    assert len(first) == 4  # each rounding at each width
    shas = {context.compress(candidate).sha256 for candidate in first}
    assert len(shas) == 4
