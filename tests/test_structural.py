"""Priors and additive costs of structures, and what a search makes of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_structure import SPACE, task

from autoquant.candidate import FLOAT, LayerChoice
from autoquant.errors import CandidateError
from autoquant.report import front_html
from autoquant.runtime import OnnxRuntime
from autoquant.search import SearchSettings, search, structural
from autoquant.search.dimensions import candidate_of
from autoquant.search.sampler import exact
from autoquant.search.structural import (
    additive_costs,
    middle,
    structural_costs,
    structural_dimensions,
    structural_sensitivity,
)
from autoquant.search.study import Study, StudySettings, read_trials
from autoquant.search.trial import Context, float_model, prepare
from autoquant.space import Space

RATIOS = Space.model_validate(
    {
        "name": "ratios",
        "rules": [{"weight_bits": [2, 4, 8], "activation_bits": 8, "float": True}],
        "pruning": [{"groups": "blocks.*", "ratios": [0, 0.2, 0.4, 0.6, 0.8]}],
        "rank": [{"layers": "blocks.2.b", "ranks": ["full", 1, 2, 3, "cp:2", "separable"]}],
        "drop": ["blocks.2"],
    }
)


@pytest.fixture(autouse=True)
def no_cache_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("residual")
    return prepare(task(folder), space=RATIOS, latency=False, evaluation_workers=1)


# --- divergences ------------------------------------------------------------------------------


def divergence_of(context: Context, name: str, option: Any) -> float:
    graph = context.variant(candidate_of({name: option})).graph
    return context.second(OnnxRuntime().open(float_model(graph)))


def test_options_have_the_divergence_of_the_float_network_with_them_alone(
    context: Context,
) -> None:
    found = structural_sensitivity(context)
    assert set(found.table) == set(structural_dimensions(context)) and not found.notes
    assert "drop:blocks.2" in found.table and "importance" not in found.table
    for name, option in (("drop:blocks.2", True), ("rank:blocks.2.b", "separable")):
        at = context.options[name].index(option)
        assert found.table[name][at] == pytest.approx(divergence_of(context, name, option))
    for values in found.table.values():
        assert all(np.isfinite(values)) and values[-1] == 0.0  # the last is the network as it is
        assert all(v > 0 for v in values[:-1])


def test_a_full_rank_is_no_change(context: Context) -> None:
    options = (2, 5, None)  # the layer's smaller side is 5
    assert structural._divergences(context, "rank:blocks.2.b", options)[1:] == (0.0, 0.0)


def test_the_more_compressed_never_looks_better(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = structural_sensitivity(context).table
    assert list(table["prune:blocks.0.a"]) == sorted(table["prune:blocks.0.a"], reverse=True)
    assert context.options["rank:blocks.2.b"] == ("separable", "cp:2", 1, 2, 3, None)
    numbers = table["rank:blocks.2.b"][2:]
    assert list(numbers) == sorted(numbers, reverse=True)
    told = iter([0.1, 0.4, 0.2])  # as run: most compressed first
    monkeypatch.setattr(Context, "second", lambda *_: next(told))
    found = structural._divergences(context, "prune:blocks.0.a", (0.6, 0.4, 0.2, 0.0))
    assert found == pytest.approx((0.4, 0.4, 0.2, 0.0))


def test_at_most_three_of_a_kind_run_and_the_others_lie_between(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = []
    made = structural._made
    monkeypatch.setattr(structural, "_made", lambda *a: run.append(a[2]) or made(*a))
    options = context.options["prune:blocks.0.a"]
    assert options == pytest.approx((0.8, 0.6, 0.4, 0.2, 0.0))
    values = structural._divergences(context, "prune:blocks.0.a", options)
    assert run == pytest.approx([0.8, 0.4, 0.2])
    assert values[1] == pytest.approx((values[0] * values[2]) ** 0.5)  # linear in the logarithm


def test_a_second_time_it_comes_from_the_cache(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    first = structural_sensitivity(context, heard.append)
    assert "structural dimensions: about" in heard[0]

    def fail(*_: object) -> None:
        raise AssertionError("it ran again")

    monkeypatch.setattr(structural, "_divergences", fail)
    heard.clear()
    assert structural_sensitivity(context, heard.append) == first
    assert len(heard) == 1 and "from the cache" in heard[0]
    (path,) = (tmp_path / "cache").glob("structures-*.json")
    path.write_text("{")  # damaged
    with pytest.raises(AssertionError, match="again"):
        structural_sensitivity(context)


def test_what_would_take_too_long_has_no_prior(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = structural._seconds(context, [])
    monkeypatch.setattr(structural, "PATIENCE", 3.5 * each)
    heard: list[str] = []
    found = structural_sensitivity(context, heard.append)
    assert 0 < len(found.table) < len(structural_dimensions(context))
    assert len(found.notes) == 1 and "no prior for" in found.notes[0]
    assert any(found.notes[0] in line for line in heard)


def test_what_cannot_be_made_has_no_prior(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = structural._alone

    def broken(context: Context, name: str, option: Any) -> Any:
        if name == "drop:blocks.2":
            raise CandidateError("no such block")
        return made(context, name, option)

    monkeypatch.setattr(structural, "_alone", broken)
    found = structural_sensitivity(context)
    assert found.notes == ("no prior for drop:blocks.2: no such block",)
    assert set(found.table) == set(structural_dimensions(context)) - {"drop:blocks.2"}
    costs = structural_costs(context, list(structural_dimensions(context)))
    assert set(costs) == set(found.table)


# --- costs ------------------------------------------------------------------------------------


def test_the_middle_of_what_is_offered() -> None:
    bits = [LayerChoice(b, 8) for b in (2, 3, 4, 6, 8)]
    assert middle([*bits, FLOAT]) == LayerChoice(4, 8) and middle([FLOAT]) == FLOAT
    assert middle([LayerChoice(8, 8), LayerChoice(4, 8)]) == LayerChoice(4, 8)


def test_costs_are_the_exact_ones_of_one_change_at_the_middle_bits(context: Context) -> None:
    names = list(structural_dimensions(context))
    costs = structural_costs(context, names)
    base = {n: middle(c) for n, c in context.choices.items()}
    assert {c.weight_bits for c in base.values()} == {4}
    for figure in ("weight_bytes", "bops"):
        found = additive_costs(context, costs, figure)
        assert {n: found[n] for n in context.choices} == context.additive_cost(figure)
        for name in names:
            options = context.options[name]
            each = [
                getattr(context.predict(candidate_of({**base, name: o})), figure) for o in options
            ]
            differences = [value - min(each) for value in each]
            assert found[name] == pytest.approx(differences), (figure, name)
            assert min(found[name]) == 0.0


def test_a_files_size_is_told_before_its_weights_are_rounded(context: Context) -> None:
    costs = structural_costs(context, ["drop:blocks.2", "rank:blocks.2.b"])
    found = additive_costs(context, costs, "size_bytes")
    base = {n: middle(c) for n, c in context.choices.items()}
    each = [candidate_of({**base, "drop:blocks.2": gone}) for gone in (True, False)]
    shorter, whole = (len(context.compress(candidate).model) for candidate in each)
    expected = pytest.approx(whole - shorter, abs=300)  # less the shifts of two biases
    assert found["drop:blocks.2"] == (0.0, expected)
    assert found["rank:blocks.2.b"][-1] == 0.0  # three layers in place of a tiny one: none is less


def test_figures_that_structures_do_not_change_add_nothing(context: Context) -> None:
    costs = structural_costs(context, ["drop:blocks.2"])
    for figure in ("latency_ms", "energy_mj", "average_weight_bits"):  # no device is known here
        assert additive_costs(context, costs, figure)["drop:blocks.2"] == (0.0, 0.0)
    found = additive_costs(context, costs, "stored_bytes")
    assert found["drop:blocks.2"][1] > 0
    head = context.graph.by_name["head"]
    assert found["head"][-1] == 4 * head.parameters  # float has no code


# --- a search ---------------------------------------------------------------------------------


def settings(folder: Path, **changes: Any) -> SearchSettings:
    fields: dict[str, Any] = {
        "space": SPACE,
        "objectives": ("accuracy", "bops"),
        "hardware": "cortex-m7-cmsis-nn",
        "trials": 30,
        "name": "one",
        "runs_dir": folder / "runs",
        "polish": False,
    }
    return SearchSettings(**{**fields, **changes})


def study_of(context: Context, folder: Path) -> Study:
    """With a made-up prior by which bits matter less than any structure."""
    names = list(structural_dimensions(context))
    table = {n: tuple(1e-7 * 2.0**-c.weight_bits for c in f) for n, f in context.choices.items()}
    table |= structural_sensitivity(context).table
    return Study(
        context,
        StudySettings("one", folder, ("accuracy", "bops"), 8, None, "surrogate", 0, None),
        False,
        priors={"made up": table},
        structures=structural_costs(context, names),
    )


def test_the_samplers_solutions_span_bits_and_structures(context: Context, tmp_path: Path) -> None:
    """From all that can go to the network as it is, which the budgets reach."""
    found = study_of(context, tmp_path)._surrogate()
    (prior,), costs = found.priors, found.costs[1]
    names = list(structural_dimensions(context))
    assert set(prior) == {*context.choices, *names} == set(costs)
    assert all(min(prior[n]) > 0 for n in names)
    picks = exact([np.array(prior[n]) for n in prior], [np.array(costs[n]) for n in prior])
    at = dict(zip(prior, picks.T, strict=True))
    last = {n: len(context.options[n]) - 1 for n in names}
    changed = [sum(at[n][i] != last[n] for n in names) for i in range(len(picks))]
    assert changed[0] > 3 and changed[-1] == 0


def test_a_search_starts_from_solutions_over_bits_and_structures(tmp_path: Path) -> None:
    search(task(tmp_path), settings(tmp_path))
    folder = tmp_path / "runs" / "one"
    trials = read_trials(folder / "trials.jsonl")
    assert any(r.candidate.is_structural for r in trials if r.origin == "solver")
    priors = json.loads((folder / "priors.json").read_text())
    shown = json.loads((folder / "sensitivity.json").read_text())
    for table in priors.values():
        assert table["drop:blocks.0"][0] > 0 == table["drop:blocks.0"][1]
    assert "drop:blocks.0" not in shown["layers"]
    assert set(shown["structures"]["drop:blocks.0"]) == {"True", "False"}
    learned = json.loads((folder / "learned.json").read_text())
    assert {"stem", "drop:blocks.0", "rank:blocks.0.a"} <= set(learned["layers"])
    front = json.loads((folder / "front.json").read_text())
    page = front_html(front, [r.to_dict() for r in trials], [], learned)
    assert "prune:stem" in page and "layer or structure" in page


def test_a_run_without_priors_of_structures_is_resumed_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(task(tmp_path), settings(tmp_path))
    path = tmp_path / "runs" / "one" / "priors.json"
    whole = json.loads(path.read_text())
    older = {k: {n: v for n, v in t.items() if ":" not in n} for k, t in whole.items()}
    path.write_text(json.dumps(older))
    module = sys.modules["autoquant.search"]
    monkeypatch.setattr(module, "priors_of", lambda *_, **__: pytest.fail("measured again"))
    assert search(task(tmp_path), settings(tmp_path, trials=34, resume=True)).trials == 34
    assert json.loads(path.read_text()) == whole


def test_a_student_and_structures_exclude_each_other(tmp_path: Path) -> None:
    space = SPACE.model_copy(update={"student": {"width": (3, None)}})
    search(task(tmp_path), settings(tmp_path, space=space, trials=36))
    found = [r.candidate for r in read_trials(tmp_path / "runs" / "one" / "trials.jsonl")]
    assert any(c.student for c in found)
    assert not any(c.student and (c.pruning or c.rank or c.drop) for c in found)


def test_without_structures_nothing_is_measured(tmp_path: Path) -> None:
    plain = prepare(task(tmp_path), space="int8", latency=False, evaluation_workers=1)
    assert structural_dimensions(plain) == {} and structural_sensitivity(plain).table == {}
    assert structural_costs(plain, []) == {}
