from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from small_task import member, uniform

from autoquant.candidate import Candidate
from autoquant.errors import NoFeasibleMember, RunError
from autoquant.front import (
    Front,
    Member,
    check_objectives,
    find_run,
    hypervolume,
    members_of,
    nondominated,
    reference_point,
    relative_hypervolume,
)
from autoquant.result import COST_NAMES, Cost, Score, TrialResult
from autoquant.task import Array

OBJECTIVES = ("accuracy", "latency_ms", "size_bytes")
BASELINE = Cost(4.0, 4000, 3000, 32.0, 10_000, 10_240_000, 8192)


def points(columns: int, rows: int = 12) -> st.SearchStrategy[Array]:
    """Few levels, so that ties and equal rows happen."""
    shape = st.tuples(st.integers(1, rows), st.just(columns))
    return npst.arrays(np.float64, shape, elements=st.integers(0, 8).map(float))


def dominates(a: Array, b: Array) -> bool:
    return bool((a <= b).all() and (a < b).any())


def front(*members: Member, **changes: Any) -> Front:
    objectives = changes.get("objectives", OBJECTIVES)
    corner = reference_point(BASELINE, 0.9, objectives)
    fields: dict[str, Any] = {
        "run": "one",
        "task": "small",
        "hardware": "made-up",
        "objectives": objectives,
        "reference_point": corner,
        "hypervolume": relative_hypervolume(members, corner, 0.9),
        "trials": 10,
        "seconds": 1.5,
        "baseline": {"accuracy": 0.9, "size_bytes": 4000},
        "members": members,
    }
    return Front(**{**fields, **changes})


# Accuracy, bytes and ms fall together; float has 0.9, 4000 and 4.
A, B, C = (
    member(0, 0.90, 3000, 3.0),
    member(1, 0.89, 1000, 2.0),
    member(2, 0.70, 500, 1.0),
)


# --- non-dominated ----------------------------------------------------------------------------


@given(st.integers(1, 4).flatmap(points))
def test_no_member_is_dominated_and_what_is_dropped_is_or_equals_one(found: Array) -> None:
    keep = nondominated(found)
    kept = found[keep]
    assert len(kept)
    assert not any(dominates(a, b) for a, b in itertools.permutations(kept, 2))
    assert len(np.unique(kept, axis=0)) == len(kept)
    for dropped in found[~keep]:
        assert any(dominates(a, dropped) or (a == dropped).all() for a in kept)


def test_of_equal_points_the_first_stays() -> None:
    assert nondominated(np.array([[1.0, 2], [1, 2], [0, 3]])).tolist() == [True, False, True]


def test_no_points_no_front() -> None:
    assert nondominated(np.zeros((0, 2))).tolist() == []
    assert hypervolume(np.zeros((0, 2)), np.ones(2)) == 0


# --- hypervolume ------------------------------------------------------------------------------


def by_cells(found: Array, reference: Array) -> float:
    """Volume of the unit cells that some point dominates; all coordinates are integers."""
    corners = itertools.product(*(range(int(r)) for r in reference))
    return float(sum((found <= np.array(cell)).all(axis=1).any() for cell in corners))


@given(st.integers(1, 4).flatmap(lambda n: points(n, 8)))
@settings(max_examples=60, deadline=None)
def test_the_hypervolume_is_the_volume_of_the_union(found: Array) -> None:
    reference = np.full(found.shape[1], 6.0)
    assert hypervolume(found, reference) == pytest.approx(by_cells(found, reference))


@given(st.sampled_from([2, 3]).flatmap(points), st.data())
def test_more_points_never_take_volume_away(found: Array, data: st.DataObject) -> None:
    reference = np.full(found.shape[1], 8.0)
    more = data.draw(npst.arrays(np.float64, found.shape[1], elements=st.floats(0, 10)))
    before, after = hypervolume(found, reference), hypervolume(np.vstack([found, more]), reference)
    assert after >= before - 1e-9
    if (more < reference).all() and not any((p <= more).all() for p in found):
        assert after > before


def test_by_inclusion_and_exclusion() -> None:
    a, b, reference = np.array([1.0, 5, 2]), np.array([3.0, 2, 4]), np.array([7.0, 8, 9])

    def box(p: Array) -> float:
        return float((reference - p).prod())

    both = box(a) + box(b) - box(np.maximum(a, b))
    assert hypervolume(np.array([a, b]), reference) == pytest.approx(both)


def test_points_on_or_beyond_the_reference_add_nothing() -> None:
    reference = np.array([2.0, 2.0])
    assert hypervolume(np.array([[2.0, 0], [0, 2], [3, 1], [5, 5]]), reference) == 0


def test_the_reference_point_is_a_tenth_below_float() -> None:
    point = reference_point(BASELINE, 0.9, OBJECTIVES)
    assert point == pytest.approx({"accuracy": 0.81, "latency_ms": 4.4, "size_bytes": 4400})
    assert reference_point(BASELINE, -0.5, ("accuracy",))["accuracy"] == pytest.approx(-0.55)
    assert reference_point(BASELINE, 0.0, ("accuracy",))["accuracy"] == pytest.approx(-0.1)


def test_the_hypervolume_of_a_front_is_a_share_of_the_box() -> None:
    corner = reference_point(BASELINE, 0.9, OBJECTIVES)
    assert relative_hypervolume([], corner, 0.9) == 0
    # (0.9 − 0.81) of 0.09, (4.4 − 2.2) of 4.4, (4400 − 1100) of 4400
    one = member(0, 0.9, 1100, 2.2)
    assert relative_hypervolume([one], corner, 0.9) == pytest.approx(0.5 * 0.75)
    better = member(0, 0.99, 1100, 2.2)
    assert relative_hypervolume([better], corner, 0.9) == pytest.approx(2 * 0.5 * 0.75)


# --- members ----------------------------------------------------------------------------------


def result(trial: int, accuracy: float | None, size: int, status: str = "complete") -> TrialResult:
    found = member(trial, accuracy or 0.5, size)
    score = None if accuracy is None else found.searched
    return TrialResult(trial, found.candidate, status, score, found.predicted)


def test_members_are_complete_nondominated_and_sorted() -> None:
    results = [
        result(0, 0.7, 500),
        result(1, 0.9, 3000),
        result(2, 0.8, 600),
        result(3, 0.75, 700),  # dominated by 2
        result(4, 0.99, 10, "infeasible"),
        result(5, 0.99, 10, "failed"),
        result(6, None, 10),
        result(7, 0.9, 3000),  # equals 1
    ]
    found = members_of(results, ("accuracy", "size_bytes"))
    assert [m.trial for m in found] == [1, 2, 0]
    assert members_of([], OBJECTIVES) == []
    assert members_of(results[4:7], OBJECTIVES) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=12))
def test_the_front_of_any_trials_is_nondominated(pairs: list[tuple[int, int]]) -> None:
    results = [result(i, a / 10, s) for i, (a, s) in enumerate(pairs)]
    found = members_of(results, ("accuracy", "size_bytes"))
    accuracies = [m.searched.value for m in found]
    sizes = [m.predicted.size_bytes for m in found]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) == len(found)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(found)


def test_the_latency_of_a_member_is_the_measured_one_where_there_is_one() -> None:
    assert A.latency_ms == 3.0
    assert member(0, 0.9, 1, 3.0, {"latency_ms": 5.0}).latency_ms == 5.0


# --- choosing ---------------------------------------------------------------------------------


def test_the_knee_is_the_member_nearest_to_float_at_no_cost() -> None:
    # In shares of the box: A (0, .68, .68), B (.11, .45, .23); C loses more than a tenth.
    assert front(A, B, C).knee() is B
    assert front(A, C).knee() is A


def test_the_knee_of_members_that_are_all_beyond_the_reference_is_the_nearest() -> None:
    far = member(3, 0.6, 400, 0.5)
    assert front(far, C).knee() is C


def test_max_drop_finds_the_cheapest_within_it() -> None:
    found = front(A, B, C)
    assert found.choose(max_drop=0.005) is A
    assert found.choose(max_drop=0.011) is B
    assert found.choose(max_drop=0.5) is C


def test_limits_on_costs_find_the_most_accurate_within_them() -> None:
    found = front(A, B, C)
    assert found.choose(max_size_bytes=3000) is A
    assert found.choose(max_size_bytes=2999) is B
    assert found.choose(max_latency_ms=2.0) is B
    assert found.choose(max_latency_ms=1.9) is C
    assert found.choose(max_drop=0.1, max_size_bytes=1000) is B


def test_without_limits_the_knee_is_chosen() -> None:
    found = front(A, B, C)
    assert found.choose() is found.knee()


def test_a_limit_looks_at_the_measured_latency() -> None:
    slow = member(5, 0.9, 3000, 1.0, {"latency_ms": 3.0})
    with pytest.raises(NoFeasibleMember):
        front(slow).choose(max_latency_ms=2.0)


def test_without_a_latency_no_limit_on_it_holds() -> None:
    score = Score("top1", 0.9, 0.01, 0.0, 0.01, 10, "validation")
    cost = Cost(None, 10, 10, 8.0, 10, 10, 10)
    unknown = Member(0, Candidate(), score, cost, None, None)
    found = front(unknown, objectives=("accuracy", "size_bytes"))
    with pytest.raises(NoFeasibleMember):
        found.choose(max_latency_ms=1e9)
    assert found.choose(max_size_bytes=10) is unknown


def test_what_nothing_satisfies_says_what_there_is() -> None:
    with pytest.raises(NoFeasibleMember) as caught:
        front(A, B, C).choose(max_size_bytes=499)
    text = str(caught.value)
    assert "\n" not in text and "500" in text and "3,000" in text and "'one'" in text
    assert caught.value.exit_status == 1


def test_an_empty_front_has_no_knee_and_no_choice() -> None:
    with pytest.raises(NoFeasibleMember, match="empty"):
        front().knee()
    with pytest.raises(NoFeasibleMember, match="no members"):
        front().choose(max_drop=1.0)


def test_a_member_by_its_trial() -> None:
    found = front(A, B, C)
    assert found.member(1) is B
    with pytest.raises(RunError, match="trial 7 is not on the front"):
        found.member(7)


# --- objectives -------------------------------------------------------------------------------


def test_objectives_are_accuracy_and_predicted_figures() -> None:
    for name in COST_NAMES:
        assert check_objectives(["accuracy", name]) == ("accuracy", name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["accuracy", "latency"], "did you mean 'latency_ms'"),
        (["accuracy"], "at least one cost"),
        (["size_bytes", "latency_ms"], "give accuracy"),
        (["accuracy", "macs", "macs"], "twice"),
        ([], "give accuracy"),
    ],
)
def test_other_objectives_are_an_error(names: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        check_objectives(names)
    assert "--objectives" in str(caught.value)


# --- reading and writing ----------------------------------------------------------------------


def test_a_front_goes_through_json(tmp_path: Path) -> None:
    verified = {"accuracy": 0.88, "latency_ms": 1.5, "split": "test"}
    found = front(member(1, 0.89, 1000, 2.0, verified, candidate=uniform(2, 8, 32)), C)
    text = json.dumps(found.to_dict())
    assert Front.from_dict(json.loads(text)) == found
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "front.json").write_text(text)
    again = Front.read("one", tmp_path)
    assert again == found and again == Front.read(folder)
    assert again.folder == folder and again.members[0].folder == folder
    assert again.members[0].verified == verified
    assert again.members[0].key == found.members[0].key


def test_the_json_has_the_keys_of_the_contract() -> None:
    document = front(A).to_dict()
    assert list(document) == [
        "run", "task", "hardware", "objectives", "reference_point", "hypervolume", "trials",
        "seconds", "baseline", "members",
    ]  # fmt: skip
    assert list(document["members"][0]) == [
        "trial", "key", "candidate", "searched", "predicted", "verified", "artifact",
    ]  # fmt: skip


def test_an_unknown_run_names_the_nearest(tmp_path: Path) -> None:
    for name in ("resnet-mixed", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text("{}")
    (tmp_path / "mlartifacts").mkdir()
    with pytest.raises(RunError, match="did you mean 'resnet-mixed'") as caught:
        find_run("resnet-mixd", tmp_path)
    assert "mlartifacts" not in str(caught.value)
    with pytest.raises(RunError, match="there is: none"):
        find_run("one", tmp_path / "missing")


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(RunError, match=r"no front\.json"):
        Front.read("one", tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"run": 1}', "\x00", json.dumps(front(A).to_dict())[:-40]],
)
def test_a_damaged_front_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "front.json").write_text(text)
    with pytest.raises(RunError, match="not a front") as caught:
        Front.read(tmp_path)
    assert "front.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("members", 0, "candidate"), 3),
        (("members", 0, "searched"), {}),
        (("members", 0, "predicted"), None),
        (("members",), 5),
        (("objectives",), None),
        (("members", 0, "candidate", "layers"), {"first": {"weight_bits": 9}}),
    ],
)
def test_a_front_with_a_wrong_part_is_an_error(
    tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    document = json.loads(json.dumps(front(A).to_dict()))
    place = document
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    (tmp_path / "front.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="not a front"):
        Front.read(tmp_path)


def test_a_notebook_shows_a_table() -> None:
    html = front(A, B, C)._repr_html_()
    assert html.count("<tr>") == 4 and "0.8900" in html and "3,000" in html
