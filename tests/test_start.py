"""Continuing from a result: what a new study runs first, and where it says it is from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_task import LAYERS, TWO, settings, task

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.errors import RunError
from autoquant.front import Front
from autoquant.search import search
from autoquant.search.start import moved, read_start

W2, W4, W8 = (LayerChoice(bits, 8) for bits in (2, 4, 8))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Front]:
    folder = tmp_path_factory.mktemp("old")
    return folder, search(task(folder), settings(folder))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "runs" / name / "trials.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("choice", "offered", "found"),
    [
        (W4, (W2, W4, W8), W4),
        (LayerChoice(3, 8), (W2, W4, W8), W4),  # of two the wider
        (FLOAT, (W2, W8), W8),
        (LayerChoice(4, 4), (W4, LayerChoice(8, 4)), W4),
        (W8, (FLOAT, LayerChoice(8, 32)), LayerChoice(8, 32)),
        (W8, (LayerChoice(8, 8, dynamic=True), W8), W8),
        (LayerChoice(8, 8, dynamic=True), (W4, LayerChoice(8, 8, symmetric=True)),
         LayerChoice(8, 8, symmetric=True)),
    ],
)  # fmt: skip
def test_a_choice_moves_to_the_nearest(
    choice: LayerChoice, offered: tuple[LayerChoice, ...], found: LayerChoice
) -> None:
    [(origin, candidate)] = moved([("start a:1", Candidate({"x": choice}))], {"x": offered})
    assert origin == "start a:1" and candidate.choice("x") == found


def test_what_is_not_chosen_is_left_out() -> None:
    polished = Candidate({"x": W4}, polish=True)
    [(_, candidate)] = moved([("start a:1", polished)], {"x": (W4,), "y": (W8, FLOAT)})
    assert candidate == Candidate({"x": W4, "y": FLOAT})


def test_a_layer_that_is_gone_is_named() -> None:
    start = [("start a:1", Candidate({"frist": W4, "gone": FLOAT}))]
    with pytest.raises(RunError, match=r"a:1 compresses layer 'frist'.*did you mean 'first'"):
        moved(start, dict.fromkeys(LAYERS, (W4,)))
    assert moved([("start a:1", Candidate({"gone": FLOAT}))], {"first": (W4,)})


def test_the_front_is_run_first_and_its_origin_kept(old: tuple[Path, Front]) -> None:
    folder, front = old
    new = settings(folder, name="new", space=TWO, start_from="one", polish=False)
    search(task(folder), new)
    starts = [t for t in lines(folder, "new") if t["origin"].startswith("start ")]
    assert [t["trial"] for t in starts] == list(range(len(starts))) and starts
    keys = {
        candidate.key
        for _, candidate in moved(
            [("", m.candidate) for m in front.members], dict.fromkeys(LAYERS, (W4, W8))
        )
    }
    assert {t["key"] for t in starts} == keys  # two members that move to one are run once
    assert {t["origin"].split()[1] for t in starts} <= {f"one:{m.trial}" for m in front.members}
    study = yaml.safe_load((folder / "runs" / "new" / "study.yaml").read_text())
    assert study["start_from"] == "one"


def test_one_trial_may_be_any_of_the_run(old: tuple[Path, Front]) -> None:
    folder, front = old
    members = {m.trial for m in front.members}
    other = next(t for t in lines(folder, "one") if t["trial"] not in members)
    spec = f"{folder / 'runs' / 'one'}:{other['trial']}"
    assert read_start(spec, "elsewhere") == [
        (f"start one:{other['trial']}", Candidate.from_dict(other["candidate"]))
    ]


def test_a_resumed_run_has_run_it_and_keeps_its_name(old: tuple[Path, Front]) -> None:
    folder, front = old
    options = {"name": "resumed", "start_from": f"one:{front.members[0].trial}"}
    search(task(folder), settings(folder, trials=2, **options))
    again = settings(folder, trials=3, name="resumed", resume=True)
    search(task(folder), again)
    assert [t["origin"].startswith("start") for t in lines(folder, "resumed")] == [1, 0, 0]
    study = yaml.safe_load((folder / "runs" / "resumed" / "study.yaml").read_text())
    assert study["start_from"] == options["start_from"]
    with pytest.raises(RunError, match="start_from differs"):
        search(task(folder), settings(folder, name="resumed", resume=True, start_from="one"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("oen", "no run 'oen' under .*; did you mean 'one'"),
        ("one:99", "run 'one' has no trial 99"),
        ("one:", "no run 'one:'"),
    ],
)
def test_a_start_that_there_is_not_leaves_no_run(
    old: tuple[Path, Front], spec: str, message: str
) -> None:
    folder, _ = old
    with pytest.raises(RunError, match=message):
        search(task(folder), settings(folder, name="never", start_from=spec))
    assert not (folder / "runs" / "never").exists()


def test_another_network_is_an_error_before_its_layers_are_measured(
    old: tuple[Path, Front],
) -> None:
    folder, _ = old
    other = folder / "runs" / "other"
    other.mkdir()
    document = json.loads((folder / "runs" / "one" / "front.json").read_text())
    document["members"][0]["candidate"] = Candidate({"conv9": W4}).to_dict()
    document["run"] = "other"
    (other / "front.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match="layer 'conv9', which this network does not have"):
        search(task(folder), settings(folder, name="never", start_from="other"))
    assert not (folder / "runs" / "never").exists()
