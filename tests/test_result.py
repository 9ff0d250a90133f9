from __future__ import annotations

import json

import pytest

from autoquant.candidate import Candidate, LayerChoice
from autoquant.result import COST_NAMES, STATUSES, Cost, Latency, Score, TrialResult

SCORE = Score("top1", 0.9, 0.01, 0.02, 0.005, 1000, "validation")
COST = Cost(1.5, 1000, 800, 4.5, 10_000, 320_000, 4096)
CANDIDATE = Candidate({"a": LayerChoice(4, 8)})


def test_a_score_has_the_names_of_front_json() -> None:
    document = SCORE.to_dict()
    assert document["accuracy"] == 0.9
    assert {
        "accuracy", "standard_error", "drop", "drop_standard_error", "samples", "split"
    } <= set(document)  # fmt: skip
    assert Score.from_dict(json.loads(json.dumps(document))) == SCORE


def test_a_cost_has_the_names_of_front_json() -> None:
    assert set(COST_NAMES) == {
        "latency_ms", "size_bytes", "weight_bytes", "average_weight_bits", "energy_mj", "macs",
        "bops", "peak_memory_bytes", "stored_bytes",
    }  # fmt: skip
    assert tuple(COST.to_dict()) == COST_NAMES
    assert Cost.from_dict({**json.loads(json.dumps(COST.to_dict())), "new": 1}) == COST


def test_a_latency_names_the_settings_it_belongs_to() -> None:
    document = Latency(1.0, 1.2, 0.1, 20, 1, 1, "onnxruntime").to_dict()
    assert {"latency_ms", "latency_median_ms", "latency_spread_ms", "batch", "threads"} <= set(
        document
    )


@pytest.mark.parametrize(
    "result",
    [
        TrialResult(
            3,
            CANDIDATE,
            "complete",
            SCORE,
            COST,
            {"latency_ms": 1.0},
            {"build": 0.5},
            7,
            None,
            "ab",
        ),
        TrialResult(4, CANDIDATE, "failed", error="ModelError: broken"),
        TrialResult(5, Candidate(), "infeasible", predicted=COST),
    ],
    ids=lambda r: r.status,
)
def test_a_trial_is_a_line_of_json_that_reads_back(result: TrialResult) -> None:
    line = json.dumps(result.to_dict())
    assert "\n" not in line
    again = TrialResult.from_dict(json.loads(line))
    assert again.to_dict() == result.to_dict()
    assert again.candidate == result.candidate and again.score == result.score
    assert again.predicted == result.predicted and again.error == result.error


def test_a_line_has_the_fields_of_the_contract() -> None:
    result = TrialResult(
        1, CANDIDATE, "complete", SCORE, COST, seconds={"build": 0.5, "score": 2.0}
    )
    line = result.to_dict()
    assert set(line) >= {
        "trial", "key", "status", "candidate", "score", "predicted", "measured", "seconds", "seed",
        "error",
    }  # fmt: skip
    assert line["key"] == CANDIDATE.key
    assert line["seconds"] == 2.5
    assert line["status"] in STATUSES
