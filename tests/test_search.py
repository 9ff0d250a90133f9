"""Whole searches of a small task: what they find, what they leave, how they fail."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from conftest import run as execute
from small_task import (
    LAYERS,
    SPACE,
    TWO,
    batches,
    context,
    model,
    profile,
    settings,
    task,
    uniform,
)

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress.coding import stored_bytes
from autoquant.errors import (
    HardwareError,
    NoFeasibleMember,
    RunError,
    SpaceError,
    TaskError,
    UserError,
)
from autoquant.front import Front
from autoquant.report.text import reference_rows
from autoquant.result import COST_NAMES, STATUSES, TrialResult
from autoquant.search import SearchSettings, search
from autoquant.search import trial as trials
from autoquant.search import variant as variants
from autoquant.search.study import Callback, Study, read_trials
from autoquant.space import Space
from autoquant.task import Array

SCORE = {"accuracy", "standard_error", "drop", "drop_standard_error", "samples", "split"}
FLOAT_OR_8 = Space.model_validate(
    {"name": "int8", "rules": [{"weight_bits": 8, "activation_bits": 8, "float": True}]}
)


def run(folder: Path, name: str = "one") -> Path:
    return folder / "runs" / name


def lines(folder: Path, name: str = "one") -> list[dict[str, Any]]:
    """The content of trials.jsonl, strictly."""
    text = (run(folder, name) / "trials.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def document(folder: Path, name: str = "one") -> dict[str, Any]:
    text = (run(folder, name) / "front.json").read_text()
    found: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Front]:
    """A search of 24 trials, and the folder that it lives in."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, search(task(folder), settings(folder, trials=24))


# --- what a run holds -------------------------------------------------------------------------


def test_front_json_is_that_of_the_contract(finished: tuple[Path, Front]) -> None:
    folder, front = finished
    found = document(folder)
    assert set(found) == {
        "run", "task", "hardware", "objectives", "reference_point", "hypervolume", "trials",
        "seconds", "baseline", "members",
    }  # fmt: skip
    assert (found["run"], found["task"], found["hardware"]) == ("one", "small", "made-up")
    assert found["objectives"] == ["accuracy", "latency_ms", "size_bytes"]
    assert set(found["reference_point"]) == set(found["objectives"])
    assert found["trials"] == 24 and found["seconds"] > 0 and 0 < found["hypervolume"] < 2
    assert {"accuracy", "test_accuracy", "latency_ms", "size_bytes"} <= set(found["baseline"])
    assert found["members"]
    for member in found["members"]:
        assert set(member) == {
            "trial", "key", "candidate", "searched", "predicted", "verified", "artifact",
        }  # fmt: skip
        assert set(member["candidate"]) == {"layers", "pruning", "rank", "training", "polish"}
        assert set(member["candidate"]["layers"]) == set(LAYERS)
        for choice in member["candidate"]["layers"].values():
            assert set(choice) == {"weight_bits", "activation_bits"}
        assert set(member["searched"]) >= SCORE and member["searched"]["split"] == "validation"
        assert set(member["predicted"]) == set(COST_NAMES)
        assert set(member["verified"]) >= SCORE | {
            "latency_ms", "latency_median_ms", "latency_spread_ms",
        }  # fmt: skip
        assert member["verified"]["split"] == "test"
        assert member["artifact"] == f"artifacts/{member['trial']}.onnx"
    assert front == Front.from_dict(found) == Front.read("one", folder / "runs")


def test_members_are_the_nondominated_trials_sorted(finished: tuple[Path, Front]) -> None:
    folder, front = finished
    accuracies = [m.searched.value for m in front.members]
    assert accuracies == sorted(accuracies, reverse=True)
    complete = [t for t in lines(folder) if t["status"] == "complete"]

    def point(t: Mapping[str, Any]) -> tuple[float, float, int]:
        return -t["score"]["accuracy"], t["predicted"]["latency_ms"], t["predicted"]["size_bytes"]

    def beaten(t: Mapping[str, Any]) -> bool:
        return any(
            all(a <= b for a, b in zip(point(o), point(t), strict=True)) and point(o) != point(t)
            for o in complete
        )

    wanted = {point(t) for t in complete if not beaten(t)}
    found = {point(t) for t in complete if t["trial"] in {m.trial for m in front.members}}
    assert found == wanted and len(front.members) == len(wanted)


def test_artifacts_are_the_files_that_were_scored(finished: tuple[Path, Front]) -> None:
    folder, front = finished
    hashes = {t["trial"]: t["sha256"] for t in lines(folder)}
    artifacts = run(folder) / "artifacts"
    assert {p.name for p in artifacts.iterdir()} == {f"{m.trial}.onnx" for m in front.members}
    for member in front.members:
        assert member.artifact is not None
        content = (run(folder) / member.artifact).read_bytes()
        assert hashlib.sha256(content).hexdigest() == hashes[member.trial]
        assert member.predicted.size_bytes == pytest.approx(len(content), rel=0.01)


def test_a_line_of_a_trial_is_that_of_the_contract(finished: tuple[Path, Front]) -> None:
    folder, _ = finished
    found = lines(folder)
    assert len(found) == 24
    for line in found:
        assert set(line) >= {
            "trial", "key", "status", "candidate", "score", "predicted", "measured", "seconds",
            "seed", "error",
        }  # fmt: skip
        assert line["status"] in STATUSES
        assert line["key"] == Candidate.from_dict(line["candidate"]).key
    assert len({line["key"] for line in found}) == 24
    assert len({line["trial"] for line in found}) == 24


def test_the_baseline_is_the_float_network(finished: tuple[Path, Front]) -> None:
    folder, front = finished
    assert front.baseline["accuracy"] == front.baseline["test_accuracy"] == 0.875
    assert front.baseline["size_bytes"] == pytest.approx(
        (folder / "small.onnx").stat().st_size, rel=0.1
    )
    assert front.baseline["latency_ms"] > 0
    assert (front.baseline["batch"], front.baseline["threads"]) == (1, 1)


def test_uniform_int8_is_measured_beside_float(finished: tuple[Path, Front]) -> None:
    _, front = finished
    found = front.baseline["uniform_int8"]
    assert found["latency_ms"] > 0 and found["rounds"] == front.baseline["rounds"]
    assert found["predicted_latency_ms"] is None or found["predicted_latency_ms"] > 0
    assert found["split"] == "test" and 0 < found["size_bytes"] < front.baseline["size_bytes"]
    assert found["accuracy"] == pytest.approx(front.baseline["test_accuracy"] - found["drop"])
    assert reference_rows(front.to_dict())[1]["trial"] == "8/8"


def test_members_are_verified_on_the_test_split(finished: tuple[Path, Front]) -> None:
    _, front = finished
    for member in front.members:
        verified = member.verified
        assert verified is not None and verified["samples"] == 96
        assert verified["drop"] == pytest.approx(0.875 - verified["accuracy"])
        assert verified["latency_ms"] <= verified["latency_median_ms"]
    assert any(m.verified["accuracy"] != m.searched.value for m in front.members if m.verified)


def test_a_run_says_how_to_repeat_it(finished: tuple[Path, Front]) -> None:
    folder, _ = finished
    study = yaml.safe_load((run(folder) / "study.yaml").read_text())
    assert study["task"] == "small" and study["name"] == "one" and study["trials"] == 24
    assert Space.model_validate(study["space"]) == SPACE
    assert study["hardware"]["name"] == "made-up"
    environment = json.loads((run(folder) / "environment.json").read_text())
    assert environment["versions"]["optuna"] == optuna.__version__
    assert {"python", "cpu", "onnxruntime", "time"} <= set(environment)


def test_a_rescaled_network_keeps_its_names_baseline_and_files(tmp_path: Path) -> None:
    """The settings reach study.yaml; resuming with them rebuilds the same files."""
    changes = {"equalize": True, "smooth": 0.5, "calibration": "downstream"}
    space = SPACE.model_copy(update=changes)
    plain, scaled = context(tmp_path), context(tmp_path, space)
    assert scaled.graph.fingerprint != scaled.original.fingerprint == plain.graph.fingerprint
    assert scaled.evaluator.reference is not None and plain.evaluator.reference is not None
    assert scaled.evaluator.reference.value == plain.evaluator.reference.value
    assert set(scaled.choices) == set(plain.choices)
    assert scaled.compress(uniform(8)).model != plain.compress(uniform(8)).model
    search(task(tmp_path), settings(tmp_path, space=space, trials=3))
    study = yaml.safe_load((run(tmp_path) / "study.yaml").read_text())
    again = Space.model_validate(study["space"])
    assert again == space
    front = search(task(tmp_path), settings(tmp_path, space=again, trials=5, resume=True))
    made = context(tmp_path, again)
    for member in front.members:
        artifact = run(tmp_path) / "artifacts" / f"{member.trial}.onnx"
        assert artifact.read_bytes() == made.compress(member.candidate).model


def test_the_same_seed_finds_the_same(finished: tuple[Path, Front], tmp_path: Path) -> None:
    folder, front = finished
    search(task(tmp_path), settings(tmp_path, trials=24))

    def known(where: Path) -> list[dict[str, Any]]:
        return [{**line, "seconds": 0, "stages": {}} for line in lines(where)]

    assert known(tmp_path) == known(folder)
    assert document(tmp_path)["hypervolume"] == front.hypervolume
    search(task(tmp_path), settings(tmp_path, trials=24, seed=1, name="other"))
    assert [t["key"] for t in lines(tmp_path, "other")] != [t["key"] for t in lines(folder)]


def test_without_a_test_split_members_keep_the_searched_score(tmp_path: Path) -> None:
    front = search(task(tmp_path, test=None), settings(tmp_path, trials=4))
    assert front.baseline["test_accuracy"] is None
    for member in front.members:
        assert member.verified is not None
        assert member.verified["split"] == "validation"
        assert member.verified["accuracy"] == member.searched.value
        assert member.verified["latency_ms"] > 0


def test_the_first_trials_are_uniform(tmp_path: Path) -> None:
    search(task(tmp_path), settings(tmp_path, trials=4))
    found = [Candidate.from_dict(t["candidate"]) for t in lines(tmp_path)]
    assert found == [uniform(bits) for bits in (32, 8, 4, 2)]


def test_a_small_space_is_exhausted(tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Callback):
        def stage(self, text: str) -> None:
            said.append(text)

    front = search(
        task(tmp_path), settings(tmp_path, space=TWO, trials=100), callbacks=[Listener()]
    )
    assert front.trials == 8 and len(lines(tmp_path)) == 8
    assert any("no new candidate" in text for text in said)


@pytest.mark.parametrize(
    "objectives", [("accuracy", "bops"), ("weight_bytes", "accuracy", "peak_memory_bytes")]
)
def test_any_predicted_figure_is_an_objective(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    front = search(task(tmp_path), settings(tmp_path, objectives=objectives, trials=6))
    assert front.objectives == objectives and list(front.reference_point) == list(objectives)
    assert front.members and front.hypervolume > 0


SPARSE = Space.model_validate(
    {
        "name": "sparse",
        "rules": [
            {
                "weight_bits": [4, 8],
                "activation_bits": 8,
                "sparsity": [0, 0.5, "2:4"],
                "codebook_bits": 3,
            }
        ],
        "training": {"halving": True, "steps": [10]},
    }
)


def test_zeros_and_codebooks_are_searched_for_their_size_in_storage(tmp_path: Path) -> None:
    given = task(tmp_path, train=batches(4, 128))
    found = {"objectives": ("accuracy", "stored_bytes"), "space": SPARSE, "trials": 24}
    front = search(given, settings(tmp_path, **found))
    done = [t for t in lines(tmp_path) if t["status"] == "complete"]
    chosen = [c for t in done for c in t["candidate"]["layers"].values()]
    assert {c.get("sparsity", 0) for c in chosen} == {0, 0.5, "2:4"}
    assert {c.get("codebook", False) for c in chosen} == {False, True}
    assert any(t["candidate"]["training"] for t in done)
    assert front.folder is not None
    for member in front.members:
        assert member.predicted.stored_bytes is not None and member.artifact is not None
        real = stored_bytes((front.folder / member.artifact).read_bytes())
        assert member.predicted.stored_bytes == pytest.approx(real, rel=0.15)
        assert member.verified is not None and member.verified["stored_bytes"] == real
    tight = min(t["predicted"]["stored_bytes"] for t in done) + 40
    limited = search(given, settings(tmp_path, name="two", max_stored_bytes=tight, **found))
    assert all((m.predicted.stored_bytes or 0) <= tight for m in limited.members)
    assert {t["status"] for t in lines(tmp_path, "two")} >= {"complete", "infeasible"}


def test_zeros_alone_are_no_gain_in_the_file_or_the_latency(tmp_path: Path) -> None:
    found = trials.prepare(task(tmp_path), space=SPARSE, hardware=profile())
    dense = {n: LayerChoice(4, 8) for n in LAYERS}
    sparse = {n: LayerChoice(4, 8, sparsity=0.5) for n in LAYERS}
    a, b = (found.predict(found.resolve(Candidate(x))) for x in (dense, sparse))
    assert b.latency_ms == a.latency_ms and abs(b.size_bytes - a.size_bytes) < 200  # names
    assert b.stored_bytes is not None and a.stored_bytes is not None
    assert b.weight_bytes == a.weight_bytes and b.stored_bytes < a.stored_bytes + 40


def test_callbacks_hear_of_everything_in_order(tmp_path: Path) -> None:
    class Recorder(Callback):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def stage(self, text: str) -> None:
            if not self.heard or self.heard[-1] != "stage":
                self.heard.append("stage")

        def start(
            self,
            study: Mapping[str, Any],
            layers: Sequence[Mapping[str, Any]],
            done: Sequence[TrialResult],
        ) -> None:
            assert study["name"] == "one" and [x["name"] for x in layers] == list(LAYERS)
            self.heard.append(f"start {len(done)}")

        def trial(self, result: TrialResult) -> None:
            self.heard.append(f"trial {result.trial}")

        def finish(self, front: Front) -> None:
            assert front.folder is not None and (front.folder / "front.json").is_file()
            self.heard.append("finish")

    recorder = Recorder()
    search(task(tmp_path), settings(tmp_path, trials=2), callbacks=[recorder])
    order = ["stage", "start 0", "trial 0", "trial 1", "stage", "finish"]
    assert recorder.heard == order
    recorder.heard.clear()
    search(task(tmp_path), settings(tmp_path, trials=3, resume=True), callbacks=[recorder])
    assert recorder.heard[1] == "start 2" and sum("trial" in x for x in recorder.heard) == 1


# --- polishing --------------------------------------------------------------------------------


def test_low_bit_members_are_polished_as_trials_of_their_own(tmp_path: Path) -> None:
    def closeness(outputs: Array, targets: Array) -> float:
        return -float(((outputs - targets) ** 2).mean())

    def logits(seed: int) -> list[tuple[Array, Array]]:
        return [(x, execute(model(), x)[0]) for x, _ in batches(seed)]

    found = {"objectives": ("accuracy", "weight_bytes"), "trials": 30}
    judged = task(tmp_path, validation=logits(2), test=logits(3), metric=closeness)
    front = search(judged, settings(tmp_path, **found))
    by_key = {t["key"]: t for t in lines(tmp_path)}
    assert len(by_key) == 30
    polished = [t for t in by_key.values() if t["candidate"]["polish"]]
    assert 1 <= len(polished) <= 3  # a tenth
    for trial in polished:
        plain = by_key[Candidate.from_dict({**trial["candidate"], "polish": False}).key]
        assert trial["status"] == "complete" and trial["sha256"] != plain["sha256"]
        assert trial["trial"] > plain["trial"]
        assert trial["predicted"]["weight_bytes"] == plain["predicted"]["weight_bytes"]
    kept = [m for m in front.members if m.candidate.polish]
    assert kept
    for member in kept:
        path = run(tmp_path) / "artifacts" / f"{member.trial}.onnx"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == by_key[member.key]["sha256"]
        assert member.predicted.size_bytes == pytest.approx(path.stat().st_size, rel=0.01)
        path.write_bytes(b"cut off")  # made again where it is not whole
    again = search(judged, settings(tmp_path, resume=True, **found))
    assert [m.key for m in again.members] == [m.key for m in front.members]
    for member in kept:
        content = (run(tmp_path) / "artifacts" / f"{member.trial}.onnx").read_bytes()
        assert hashlib.sha256(content).hexdigest() == by_key[member.key]["sha256"]


def test_a_small_space_leaves_no_more_than_a_tenth_to_polish(tmp_path: Path) -> None:
    found = {"objectives": ("accuracy", "weight_bytes"), "space": TWO, "trials": 12}
    targets = [(x, execute(model(), x)[0]) for x, _ in batches(2)]

    def closeness(outputs: Array, targets: Array) -> float:
        return -float(((outputs - targets) ** 2).mean())

    judged = task(tmp_path, validation=targets, test=None, metric=closeness)
    front = search(judged, settings(tmp_path, **found))
    assert sum(t["candidate"]["polish"] for t in lines(tmp_path)) == 1
    assert front.trials == 8 + 1


def test_without_polish_no_trial_is_polished(tmp_path: Path) -> None:
    found = settings(tmp_path, objectives=("accuracy", "weight_bytes"), trials=30, polish=False)
    search(task(tmp_path), found)
    assert len(lines(tmp_path)) == 30
    assert not any(t["candidate"]["polish"] for t in lines(tmp_path))


# --- limits -----------------------------------------------------------------------------------


def test_trials_beyond_a_limit_are_infeasible_and_recorded(tmp_path: Path) -> None:
    front = search(task(tmp_path), settings(tmp_path, max_size_bytes=2700, trials=20))
    found = lines(tmp_path)
    assert {t["status"] for t in found} == {"complete", "infeasible"}
    for line in found:
        feasible = line["predicted"]["size_bytes"] <= 2700
        assert line["status"] == ("complete" if feasible else "infeasible")
        assert (line["score"] is not None) == feasible  # not worth running
    assert all(m.predicted.size_bytes <= 2700 for m in front.members)


def test_a_limit_on_the_drop_is_judged_by_the_score(tmp_path: Path) -> None:
    front = search(task(tmp_path), settings(tmp_path, max_drop=0.02, trials=12))
    for line in lines(tmp_path):
        assert line["score"] is not None
        assert (line["status"] == "complete") == (line["score"]["drop"] <= 0.02)
    assert {t["status"] for t in lines(tmp_path)} == {"complete", "infeasible"}
    assert all(m.searched.drop <= 0.02 for m in front.members)


def test_a_limit_on_the_latency_is_judged_by_the_prediction(tmp_path: Path) -> None:
    limit = 0.006  # milliseconds; all float takes 0.0108
    front = search(task(tmp_path), settings(tmp_path, max_latency_ms=limit, trials=12))
    assert {t["status"] for t in lines(tmp_path)} == {"complete", "infeasible"}
    assert all(float(m.predicted.latency_ms or 9) <= limit for m in front.members)


def test_no_feasible_trial_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(NoFeasibleMember, match="none of 6 trials") as caught:
        search(task(tmp_path), settings(tmp_path, max_size_bytes=10, trials=6))
    assert caught.value.exit_status == 1 and "\n" not in str(caught.value)
    assert [t["status"] for t in lines(tmp_path)] == ["infeasible"] * 6
    assert document(tmp_path)["members"] == [] and document(tmp_path)["hypervolume"] == 0
    assert Front.read(run(tmp_path)).members == ()


def test_limits_may_change_with_resume(tmp_path: Path) -> None:
    first = search(task(tmp_path), settings(tmp_path, trials=12))
    sizes = sorted(m.predicted.size_bytes for m in first.members)
    tight = settings(tmp_path, trials=12, resume=True, max_size_bytes=sizes[0])
    second = search(task(tmp_path), tight)
    assert [m.predicted.size_bytes for m in second.members] == sizes[:1]
    assert len(lines(tmp_path)) == 12
    study = yaml.safe_load((run(tmp_path) / "study.yaml").read_text())
    assert study["max_size_bytes"] == sizes[0]
    third = search(task(tmp_path), settings(tmp_path, trials=12, resume=True))
    assert [m.key for m in third.members] == [m.key for m in first.members]


# --- the sampler's side -----------------------------------------------------------------------


def test_a_run_says_what_the_search_learned(finished: tuple[Path, Front]) -> None:
    folder, _ = finished
    learned = json.loads((run(folder) / "learned.json").read_text())
    assert learned["signal"] == "divergence" and set(learned["layers"]) == set(LAYERS)
    for layer in learned["layers"].values():
        assert set(layer) == {"importance", "prior", "factor", "factor_error"}
    assert sum(x["prior"] for x in learned["layers"].values()) == pytest.approx(1)
    assert {t["origin"] for t in lines(folder)} >= {"uniform", "solver", "sampler"}
    assert all(t["score"]["divergence"] >= 0 for t in lines(folder) if t["score"])
    priors = json.loads((run(folder) / "priors.json").read_text())
    assert all(set(table) == set(LAYERS) for table in priors.values())


def test_resume_reads_the_prior_instead_of_measuring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(task(tmp_path), settings(tmp_path, trials=8))
    module = sys.modules["autoquant.search"]
    monkeypatch.setattr(module, "sensitivity", lambda *_: pytest.fail("measured again"))
    assert search(task(tmp_path), settings(tmp_path, trials=10, resume=True)).trials == 10


def test_layers_are_fixed_by_a_pattern(tmp_path: Path) -> None:
    fixed = {"fix": ["he*=8/8", "first=float"], "trials": 20}
    search(task(tmp_path), settings(tmp_path, **fixed))
    for line in lines(tmp_path):
        candidate = Candidate.from_dict(line["candidate"])
        assert str(candidate.choice("head")) == "8/8" and candidate.choice("first").is_float
    assert len(lines(tmp_path)) == 4 + 0  # what is left to choose: one layer
    again = search(task(tmp_path), settings(tmp_path, resume=True, **fixed))
    assert again.trials == 4
    study = yaml.safe_load((run(tmp_path) / "study.yaml").read_text())
    assert Space.model_validate(study["space"]).rules[-1].layers == "first"


@pytest.mark.parametrize("text", ["head", "=8/8", "head=9/8", "head=8", "head=a/b"])
def test_what_cannot_be_fixed_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(RunError, match="--fix") as caught:
        search(task(tmp_path), settings(tmp_path, fix=[text]))
    assert "\n" not in str(caught.value)


def test_a_pattern_that_fixes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"\(layers: tail\) matches no layer"):
        search(task(tmp_path), settings(tmp_path, fix=["tail=8/8"]))


def test_the_signal_may_be_the_metric(tmp_path: Path) -> None:
    front = search(task(tmp_path), settings(tmp_path, signal="metric", trials=16))
    assert front.trials == 16 and front.members
    with pytest.raises(RunError, match="--signal 'kl'"):
        settings(tmp_path, signal="kl")


def test_patience_ends_a_search(tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Callback):
        def stage(self, text: str) -> None:
            said.append(text)

    found = settings(tmp_path, trials=60, patience=6, polish=False)
    front = search(task(tmp_path), found, callbacks=[Listener()])
    assert front.trials < 60 and "the front has not changed for 6 trials" in said
    with pytest.raises(RunError, match="--patience"):
        settings(tmp_path, patience=0)


class Closeness:
    """Label-free, on many samples: what a part of the split tells apart."""

    def __call__(self, outputs: Array, targets: Array) -> float:
        return -float(((outputs - targets) ** 2).mean())


def test_what_is_dominated_stops_early_and_members_have_seen_all(tmp_path: Path) -> None:
    images = [x for x, _ in batches(2, 960)]
    validation = [(x, execute(model(), x)[0]) for x in images]
    judged = task(tmp_path, validation=validation, test=None, metric=Closeness())
    found = {"objectives": ("accuracy", "weight_bytes"), "polish": False}
    front = search(judged, settings(tmp_path, trials=40, sampler="random", **found))
    stopped = [t for t in lines(tmp_path) if t["status"] == "stopped" and "dominated" in t["why"]]
    assert stopped
    by_trial = {t["trial"]: t for t in lines(tmp_path)}
    for trial in stopped:
        assert trial["score"]["samples"] < 960
        rival = by_trial[int(trial["why"].rpartition(" ")[2])]
        assert rival["score"]["accuracy"] > trial["score"]["accuracy"]
        assert rival["predicted"]["weight_bytes"] <= trial["predicted"]["weight_bytes"]
    assert all(m.searched.samples == 960 for m in front.members)


def test_a_refined_trial_needs_the_second_inputs_to_agree(tmp_path: Path) -> None:
    found = context(tmp_path)
    plain = trials.run_trial(found, uniform(4), 0, against=trials.Against("solver"))
    assert plain.status == "complete" and plain.second is not None and plain.score is not None
    for second, status in ((0.5 * plain.second, "stopped"), (2 * plain.second, "complete")):
        pick = trials.Pick(7, plain.score.value, second)
        result = trials.run_trial(found, uniform(4), 1, against=trials.Against(picks=(pick,)))
        assert result.status == status and result.second == plain.second
        assert (result.why or "").startswith("trial 7" if status == "stopped" else "")
    better = trials.Against(picks=(trials.Pick(7, plain.score.value + 0.1, 0.0),))  # not replaced
    result = trials.run_trial(found, uniform(4), 1, against=better)
    assert result.status == "complete" and result.second is None


# --- trials that fail -------------------------------------------------------------------------


def breaks(
    monkeypatch: pytest.MonkeyPatch, when: Callable[[Candidate], bool], error: Exception
) -> None:
    """Let compressing some candidates raise."""
    compress = variants.compress

    def broken(graph: Any, candidate: Candidate, *rest: Any) -> Any:
        if when(candidate):
            raise error
        return compress(graph, candidate, *rest)

    monkeypatch.setattr(variants, "compress", broken)


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch, lambda c: c == uniform(4), ValueError("no such\nkernel"))
    front = search(task(tmp_path), settings(tmp_path))
    found = lines(tmp_path)
    assert len(found) == 8
    (failed,) = [t for t in found if t["status"] == "failed"]
    assert Candidate.from_dict(failed["candidate"]) == uniform(4)
    assert failed["error"].startswith("ValueError: no such kernel (test_search.py:")
    assert failed["score"] is None
    assert front.members and failed["trial"] not in {m.trial for m in front.members}


def test_an_error_of_ours_is_recorded_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch, lambda c: c == uniform(4), HardwareError("no kernel"))
    search(task(tmp_path), settings(tmp_path, trials=4))
    assert [t["error"] for t in lines(tmp_path)] == [None, None, "no kernel", None]


def test_a_search_of_which_every_trial_fails_says_why(tmp_path: Path) -> None:
    class Reference:
        """Judges the float network, and no other."""

        def __init__(self) -> None:
            self.known: Array | None = None

        def __call__(self, outputs: Array, targets: Array) -> float:
            if self.known is None:
                self.known = outputs
            if len(outputs) == len(self.known) and not np.array_equal(outputs, self.known):
                inside = {row.tobytes() for row in self.known}  # a bootstrap resamples them
                if any(row.tobytes() not in inside for row in outputs):
                    raise KeyError("quantized")
            return float((outputs.argmax(1) == targets).mean())

    found = settings(tmp_path, space=TWO, trials=5)
    with pytest.raises(NoFeasibleMember, match="all 5 trials failed") as caught:
        search(task(tmp_path, metric=Reference()), found)
    assert "KeyError: 'quantized'" in str(caught.value) and caught.value.exit_status == 1
    assert [t["status"] for t in lines(tmp_path)] == ["failed"] * 5
    assert all("the metric raised" in t["error"] for t in lines(tmp_path))


class Sour:
    """Accuracy; ``bad`` where the outputs are not the float network's."""

    def __init__(self, bad: float) -> None:
        self.bad = bad
        self.known: set[bytes] | None = None

    def __call__(self, outputs: Array, targets: Array) -> float:
        rows = {row.tobytes() for row in outputs}
        self.known = self.known or rows
        return float((outputs.argmax(1) == targets).mean()) if rows <= self.known else self.bad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_a_number_fails_the_trial(tmp_path: Path, bad: float) -> None:
    front = search(task(tmp_path, metric=Sour(bad), test=None), settings(tmp_path, trials=4))
    found = lines(tmp_path)
    assert [t["status"] for t in found] == ["complete", "failed", "failed", "failed"]
    assert found[1]["error"] == f"Sour on validation is {bad}"
    assert [m.candidate for m in front.members] == [uniform(32)]


def test_a_metric_that_resamples_cannot_take_has_no_error(tmp_path: Path) -> None:
    whole = task(tmp_path).split("validation").targets
    assert whole is not None

    def strict(outputs: Array, targets: Array) -> float:
        if not np.array_equal(targets, whole):
            raise ValueError("not the split")
        return float((outputs.argmax(1) == targets).mean())

    front = search(task(tmp_path, metric=strict, test=None), settings(tmp_path, trials=4))
    member = document(tmp_path)["members"][0]  # strict JSON: null, not NaN
    assert member["searched"]["standard_error"] is None
    assert member["searched"]["drop_standard_error"] is None
    assert math.isnan(front.members[0].searched.standard_error)
    assert math.isnan(Front.read(run(tmp_path)).members[0].searched.standard_error)
    assert lines(tmp_path)[0]["score"]["standard_error"] is None


def test_a_metric_below_zero_is_fine(tmp_path: Path) -> None:
    def negative(outputs: Array, targets: Array) -> float:
        return -float(((outputs - np.eye(4)[targets]) ** 2).mean())

    front = search(task(tmp_path, metric=negative), settings(tmp_path, trials=6))
    assert front.members and front.hypervolume > 0 and front.baseline["accuracy"] < 0


# --- how a search ends ------------------------------------------------------------------------


class Interrupt(Callback):
    """Ctrl-C after some trials."""

    def __init__(self, after: int) -> None:
        self.left = after

    def trial(self, result: TrialResult) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_ctrl_c_ends_with_the_front_so_far(tmp_path: Path) -> None:
    front = search(task(tmp_path), settings(tmp_path), callbacks=[Interrupt(3)])
    assert front.trials == len(lines(tmp_path)) == 3
    assert front.members and all(m.verified for m in front.members)
    again = search(task(tmp_path), settings(tmp_path, resume=True))
    assert again.trials == len({t["key"] for t in lines(tmp_path)}) == 8


def test_ctrl_c_inside_a_trial_ends_with_the_front_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch, lambda c: c == uniform(2), KeyboardInterrupt())  # type: ignore[arg-type]
    front = search(task(tmp_path), settings(tmp_path))
    assert front.trials == 3 and front.members


def test_ctrl_c_between_a_line_and_its_use_loses_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Study._write

    def interrupted(study: Study, result: TrialResult) -> None:
        whole(study, result)
        if len(study.results) == 3:
            study.results.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(Study, "_write", interrupted)
    front = search(task(tmp_path), settings(tmp_path))
    assert front.trials == len(lines(tmp_path)) == 3
    monkeypatch.undo()
    again = search(task(tmp_path), settings(tmp_path, resume=True))
    assert again.trials == len({t["key"] for t in lines(tmp_path)}) == 8


def test_a_timeout_before_the_first_trial_leaves_no_member(tmp_path: Path) -> None:
    with pytest.raises(NoFeasibleMember, match="no trial was finished"):
        search(task(tmp_path), settings(tmp_path, timeout=1e-9))
    front = search(task(tmp_path), settings(tmp_path, trials=4, resume=True))
    assert front.trials == 4


def test_resume_goes_on_to_the_total(tmp_path: Path) -> None:
    first = search(task(tmp_path), settings(tmp_path, trials=6))
    before = lines(tmp_path)
    second = search(task(tmp_path), settings(tmp_path, trials=16, resume=True))
    after = lines(tmp_path)
    assert after[:6] == before and len(after) == second.trials == 16
    assert len({t["key"] for t in after}) == 16
    assert second.seconds > first.seconds
    assert second.hypervolume >= first.hypervolume
    study = yaml.safe_load((run(tmp_path) / "study.yaml").read_text())
    assert study["trials"] == 16
    files = {p.name for p in (run(tmp_path) / "artifacts").iterdir()}
    assert files == {f"{m.trial}.onnx" for m in second.members}
    third = search(task(tmp_path), settings(tmp_path, trials=16, resume=True))
    assert [m.key for m in third.members] == [m.key for m in second.members]
    assert lines(tmp_path) == after


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"space": TWO}, "space"),
        ({"seed": 1}, "seed"),
        ({"objectives": ("accuracy", "size_bytes")}, "objectives"),
        ({"hardware": profile().model_copy(update={"name": "other"})}, "hardware"),
        ({"threads": 2}, "threads"),
    ],
)
def test_resume_refuses_another_search(
    finished: tuple[Path, Front], changes: dict[str, Any], what: str
) -> None:
    folder, _ = finished
    before = lines(folder)
    with pytest.raises(RunError, match=f"--resume: {what} differs"):
        search(task(folder), settings(folder, trials=30, resume=True, **changes))
    assert lines(folder) == before and (run(folder) / "front.json").is_file()


def test_resume_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run 'one'"):
        search(task(tmp_path), settings(tmp_path, resume=True))
    with pytest.raises(RunError, match="--resume needs --name"):
        settings(tmp_path, resume=True, name=None)


@pytest.mark.parametrize("text", ["", "[1]", "{", "a: [\n", "\x00"])
def test_resume_with_a_damaged_study_is_one_line(tmp_path: Path, text: str) -> None:
    search(task(tmp_path), settings(tmp_path, trials=2))
    (run(tmp_path) / "study.yaml").write_text(text)
    with pytest.raises(RunError, match=r"study\.yaml") as caught:
        search(task(tmp_path), settings(tmp_path, trials=4, resume=True))
    assert "\n" not in str(caught.value)


def test_a_damaged_front_is_made_anew(tmp_path: Path) -> None:
    search(task(tmp_path), settings(tmp_path, trials=2))
    (run(tmp_path) / "front.json").write_text("{")
    front = search(task(tmp_path), settings(tmp_path, trials=3, resume=True))
    assert front.trials == 3 and document(tmp_path)["trials"] == 3


def test_a_resumed_run_keeps_its_latency_model(tmp_path: Path) -> None:
    bare = profile().model_copy(update={"model": None})
    search(task(tmp_path), settings(tmp_path, trials=3))
    study = run(tmp_path) / "study.yaml"
    content = yaml.safe_load(study.read_text())
    content["hardware"].pop("model")  # as of a search that measured it here
    study.write_text(yaml.safe_dump(content))
    search(task(tmp_path), settings(tmp_path, trials=6, resume=True, hardware=bare))
    found = {t["key"]: t["predicted"]["latency_ms"] for t in lines(tmp_path)}
    assert found[uniform(32).key] == pytest.approx(0.010832)
    kernels = {t["predicted"]["latency_ms"] for t in lines(tmp_path)[3:]}
    assert all(latency < 0.0109 for latency in kernels)


def test_a_network_that_changed_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search(task(tmp_path), settings(tmp_path, trials=4))
    data = [(x * 3, y) for x, y in batches(1)]
    changed = task(tmp_path, calibration=[x for x, _ in data])
    with pytest.raises(RunError, match="differs from the one that was scored"):
        search(changed, settings(tmp_path, trials=4, resume=True))


# --- where it cannot begin --------------------------------------------------------------------


def test_a_used_name_is_an_error_and_leaves_the_run_alone(finished: tuple[Path, Front]) -> None:
    folder, _ = finished
    before = lines(folder)
    with pytest.raises(RunError, match="run 'one' exists"):
        search(task(folder), settings(folder))
    assert lines(folder) == before


def test_a_runs_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="cannot be made") as caught:
        search(task(tmp_path), settings(tmp_path))
    assert str(tmp_path / "runs") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"space": "mixt"}, SpaceError, "did you mean 'mixed'"),
        ({"hardware": "onnxruntime"}, HardwareError, "did you mean 'onnxruntime-cpu'"),
        ({"objectives": ("accuracy", "speed")}, RunError, "unknown 'speed'"),
        ({"objectives": ("accuracy", "energy_mj")}, HardwareError, "does not predict energy_mj"),
        ({"sampler": "tpa"}, RunError, "did you mean 'tpe'"),
        ({"batch": 2}, HardwareError, "batch 1 and 1 threads, not 2 and 1"),
        ({"storage": "sqlite:////dev/null/x.db"}, RunError, "--storage"),
    ],
)
def test_a_mistake_leaves_no_run_behind(
    tmp_path: Path, changes: dict[str, Any], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        search(task(tmp_path), settings(tmp_path, **changes))
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2
    assert not run(tmp_path).exists()
    search(task(tmp_path), settings(tmp_path, trials=1))  # the name is free


def test_a_layer_that_a_space_names_must_exist(tmp_path: Path) -> None:
    space = Space.model_validate(
        {"name": "s", "rules": [{"layers": "frist", "weight_bits": 8, "activation_bits": 8}]}
    )
    with pytest.raises(SpaceError, match=r"rule 1 \(layers: frist\) matches no layer"):
        search(task(tmp_path), settings(tmp_path, space=space))


def test_data_that_cannot_be_used_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="validation is empty"):
        search(task(tmp_path, validation=[]), settings(tmp_path))
    assert not run(tmp_path).exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trials", 0),
        ("trials", True),
        ("trials", 2.5),
        ("batch", 0),
        ("threads", -1),
        ("workers", 0),
        ("timeout", 0),
        ("max_size_bytes", -5),
        ("max_latency_ms", 0.0),
        ("evaluation_threads", -1),
        ("name", ""),
        ("name", "a/b"),
        ("name", ".hidden"),
    ],
)
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(RunError, match=f"--{field.replace('_', '-')}"):
        SearchSettings(**{field: value})


# --- storage ----------------------------------------------------------------------------------


def test_a_search_can_keep_its_study_in_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'all.db'}"
    for name in ("a", "b"):
        search(task(tmp_path), settings(tmp_path, name=name, storage=url, trials=3))
    names = {s.study_name for s in optuna.get_all_study_summaries(url)}
    assert names == {"a", "b"}
    assert not list((tmp_path / "runs").glob("*/study.journal"))
    search(task(tmp_path), settings(tmp_path, name="a", storage=url, trials=5, resume=True))
    assert len(lines(tmp_path, "a")) == 5


def test_a_disk_that_fills_up_keeps_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fill(Callback):
        def trial(self, result: TrialResult) -> None:
            if result.trial == 3:

                def full(_: int) -> None:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunError, match="No space left on device") as caught:
        search(task(tmp_path), settings(tmp_path), callbacks=[Fill()])
    assert caught.value.exit_status == 2 and "\n" not in str(caught.value)
    monkeypatch.undo()
    done = read_trials(run(tmp_path) / "trials.jsonl")
    assert len(done) >= 4
    front = search(task(tmp_path), settings(tmp_path, resume=True))
    assert front.trials == 8 and len({t["key"] for t in lines(tmp_path)}) == 8
    assert [t["key"] for t in lines(tmp_path)][: len(done)] == [r.candidate.key for r in done]


# --- the weight bank of an earlier search ----------------------------------------------------


class Bank(Callback):
    """What a search says of its weight bank."""

    def __init__(self) -> None:
        self.said = ""

    def stage(self, text: str) -> None:
        if text.startswith("weight bank"):
            self.said = text


def searched(folder: Path, **changes: Any) -> tuple[str, list[str]]:
    """What was said of the bank, and the files' hashes."""
    bank = Bank()
    options = settings(folder, **{"trials": 5, **changes})
    search(task(folder), options, callbacks=[bank])
    assert options.name is not None
    return bank.said, [t["sha256"] for t in lines(folder, options.name)]


def test_a_search_takes_the_bank_of_an_earlier_one(tmp_path: Path) -> None:
    said, files = searched(tmp_path, name="first")
    assert "weight bank: 9 entries, 0.0 MB" in said and ", 0 from the cache" in said
    assert "peak memory" in said
    (kept,) = run(tmp_path, "first").glob("bank-*.npz")
    again, same = searched(tmp_path, name="second")
    assert ", 9 from the cache" in again and same == files
    assert (run(tmp_path, "second") / kept.name).is_file()
    resumed, more = searched(tmp_path, name="second", trials=7, resume=True)
    assert ", 9 from the cache" in resumed and more[:5] == files


def test_a_damaged_bank_is_made_again(tmp_path: Path) -> None:
    _, files = searched(tmp_path, name="first")
    (kept,) = run(tmp_path, "first").glob("bank-*.npz")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    said, same = searched(tmp_path, name="second")
    assert ", 0 from the cache" in said and same == files
    said, _ = searched(tmp_path, name="first", trials=6, resume=True)
    assert ", 9 from the cache" in said  # the one of the run beside it
    assert kept.stat().st_size > len(whole) // 2  # and its own is whole again


def test_a_bank_of_other_calibration_data_is_not_taken(tmp_path: Path) -> None:
    searched(tmp_path, name="first")
    bank = Bank()
    other = task(tmp_path, calibration=[x for x, _ in batches(7)])
    search(other, settings(tmp_path, trials=2, name="second"), callbacks=[bank])
    assert ", 0 from the cache" in bank.said


def test_another_space_completes_the_bank(tmp_path: Path) -> None:
    searched(tmp_path, name="first", space=TWO)
    said, _ = searched(tmp_path, name="second")
    assert "weight bank: 9 entries" in said and ", 6 from the cache" in said
    third, _ = searched(tmp_path, name="third")
    assert ", 9 from the cache" in third
