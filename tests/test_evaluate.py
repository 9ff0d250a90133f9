from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import NETWORKS

from autoquant.errors import ModelError, TaskError
from autoquant.evaluate import BOOTSTRAP, Evaluator, divergence
from autoquant.runtime import OnnxRuntime
from autoquant.task import Array, Split

COUNT = 240


class Model:
    """A session that computes ``function`` of its input: the float network is the identity."""

    input_names = ("x",)

    def __init__(self, function: Callable[[Array], Array] = lambda x: x) -> None:
        self.function = function
        self.batches: list[int] = []

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.batches.append(len(inputs[0]))
        return [self.function(inputs[0]), np.zeros(1)]


def _logits(count: int = COUNT, classes: int = 4, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, classes)).astype(np.float32)


def _split(inputs: Array, targets: Any, size: int = 64) -> Split:
    """Batches of ``size`` inputs; the targets belong to all of them."""
    batches = tuple((inputs[i : i + size],) for i in range(0, len(inputs), size))
    targets = np.asarray(targets)
    return Split("validation", batches, targets, len(targets))


def _evaluator(inputs: Array, targets: Any, metric: Any = "top1", **rest: Any) -> Evaluator:
    return Evaluator(_split(inputs, targets), metric, "metric", **rest)


def _accurate(logits: Array, wrong: int) -> Array:
    """Labels that the logits get right, but for the first ``wrong`` samples."""
    labels = logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % logits.shape[1]
    return labels


def _mistaken(rows: Sequence[int], classes: int = 4) -> Callable[[Array], Array]:
    """Turn the logits of samples around, known by their position in the data."""
    data = _logits(classes=classes)

    def function(x: Array) -> Array:
        index = [int(np.flatnonzero((data == row).all(1))[0]) for row in x]
        return np.where(np.isin(index, rows)[:, None], -x, x)

    return function


# --- top-1 -----------------------------------------------------------------------------------


def test_top1_by_hand() -> None:
    logits = _logits()
    evaluator = _evaluator(logits, _accurate(logits, 60))
    reference = evaluator.set_reference(Model())
    assert reference.value == 0.75
    assert reference.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / COUNT))
    # of those that were right, twelve become wrong
    score = evaluator.score(Model(_mistaken(range(100, 112))))
    assert score.value == pytest.approx((180 - 12) / COUNT)
    assert score.drop == pytest.approx(12 / COUNT)
    assert score.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / COUNT))
    # the error of the drop is paired: the samples on which both agree do not count
    p = 12 / COUNT
    assert score.drop_standard_error == pytest.approx(math.sqrt(p * (1 - p) / COUNT))
    assert score.drop_standard_error < 0.5 * score.standard_error
    assert (score.metric, score.samples, score.split) == ("metric", COUNT, "validation")


def test_a_drop_of_zero_may_hide_differences() -> None:
    """One model right where the other is wrong, and the reverse: the paired error says so."""
    logits = _logits(classes=2)
    evaluator = _evaluator(logits, _accurate(logits, 40))
    evaluator.set_reference(Model())
    score = evaluator.score(Model(_mistaken([*range(10), *range(100, 110)], 2)))
    assert score.drop == 0
    assert score.drop_standard_error == pytest.approx(math.sqrt(20 / COUNT / COUNT))


def test_the_float_network_has_no_drop() -> None:
    logits = _logits()
    evaluator = _evaluator(logits, _accurate(logits, 60))
    evaluator.set_reference(Model())
    score = evaluator.score(Model())
    assert (score.value, score.drop, score.drop_standard_error) == (0.75, 0, 0)


def test_an_output_that_is_nan_is_wrong() -> None:
    logits = _logits()
    evaluator = _evaluator(logits, np.zeros(COUNT, int))
    evaluator.set_reference(Model(lambda x: np.eye(4)[np.zeros(len(x), int)]))
    assert evaluator.score(Model(lambda x: np.full_like(x, np.nan))).value == 0


def test_top1_of_many_positions() -> None:
    logits = _logits(COUNT).reshape(40, 6, 4)
    labels = logits.argmax(-1)
    labels[0, :3] += 1
    labels %= 4
    evaluator = _evaluator(logits, labels)
    assert evaluator.set_reference(Model()).value == pytest.approx(1 - 3 / COUNT)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros(COUNT), "integer labels"),
        (np.zeros((COUNT, 1), int), "integer labels of shape (240,), not int64 of (240, 1)"),
        (np.zeros(COUNT // 2, int), "integer labels of shape (240,)"),
        (np.zeros(1, int), "integer labels of shape (240,)"),
        (np.full(COUNT, 4), "labels go from 4 to 4, but the network has 4 outputs"),
        (np.full(COUNT, -1), "labels go from -1 to -1"),
    ],
)
def test_labels_that_cannot_be_are_refused(targets: Array, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        _evaluator(_logits(), targets).set_reference(Model())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_worse_than_chance_is_refused() -> None:
    logits = _logits()
    with pytest.raises(TaskError, match=r"is 0\.0000, below chance \(0\.2500\)"):
        _evaluator(logits, logits.argmin(1)).set_reference(Model())


def test_chance_itself_is_not() -> None:
    labels = np.random.default_rng(3).integers(0, 4, COUNT)
    assert 0.15 < _evaluator(_logits(), labels).set_reference(Model()).value < 0.35


# --- metrics of the user's own ---------------------------------------------------------------


def mean_of_outputs(outputs: Array, targets: Array) -> float:
    return float(outputs.mean())


def test_a_callable_sees_the_whole_split_once() -> None:
    seen = []

    def metric(outputs: Array, targets: Array) -> float:
        seen.append((outputs.copy(), targets.copy()))
        return float((outputs[:, 0] * targets).sum())

    x, y = _logits(), np.arange(COUNT) / 7
    evaluator = _evaluator(x, y, metric)
    reference = evaluator.set_reference(Model())
    assert np.array_equal(seen[0][0], x) and np.array_equal(seen[0][1], y)
    assert reference.value == pytest.approx(float((x[:, 0] * y).sum()))
    score = evaluator.score(Model(lambda x: x / 2))
    assert score.value == pytest.approx(reference.value / 2)
    assert score.drop == pytest.approx(reference.value / 2)


def test_the_bootstrap_gives_the_error_of_a_mean() -> None:
    x = _logits(2000)[:, :1]
    evaluator = _evaluator(x, np.zeros(len(x)), mean_of_outputs)
    expected = x.std() / math.sqrt(len(x))
    found = evaluator.set_reference(Model()).standard_error
    assert found == pytest.approx(expected, rel=4 / math.sqrt(2 * BOOTSTRAP))


def test_the_bootstrap_is_paired() -> None:
    x = _logits()
    evaluator = _evaluator(x, np.zeros(COUNT), mean_of_outputs)
    evaluator.set_reference(Model())
    same = evaluator.score(Model())
    assert (same.drop, same.drop_standard_error) == (0, 0) and same.standard_error > 0
    shifted = evaluator.score(Model(lambda x: x - 0.5))  # the same difference everywhere
    assert shifted.drop == pytest.approx(0.5, rel=1e-4)
    assert shifted.drop_standard_error < 1e-6 < shifted.standard_error
    noisy = evaluator.score(Model(lambda x: x + _logits(len(x), seed=len(x))))
    assert noisy.drop_standard_error > 1e-3


def test_scores_repeat_and_depend_on_the_seed_alone() -> None:
    def errors(seed: int) -> tuple[float, float]:
        evaluator = _evaluator(_logits(), np.zeros(COUNT), mean_of_outputs, seed=seed)
        evaluator.set_reference(Model())
        score = evaluator.score(Model(lambda x: x**2))
        return score.standard_error, score.drop_standard_error

    assert errors(0) == errors(0) != errors(1)


def test_the_outputs_of_one_target_stay_together() -> None:
    """Pairs of sentences: two rows a target, resampled as one."""
    pairs = np.repeat(np.arange(30, dtype=np.float32), 2)
    x = np.stack([pairs, np.tile([0.0, 1.0], 30).astype(np.float32)], axis=1)
    broken = []

    def metric(outputs: Array, targets: Array) -> float:
        first, second = outputs[0::2], outputs[1::2]
        ok = len(outputs) == 2 * len(targets)
        ok &= bool((first[:, 0] == targets).all() and (second[:, 0] == targets).all())
        ok &= bool((first[:, 1] == 0).all() and (second[:, 1] == 1).all())
        broken.append(not ok)
        return float(targets.mean())

    evaluator = _evaluator(x, np.arange(30.0), metric, rows=7)
    evaluator.set_reference(Model())
    score = evaluator.score(Model())
    assert len(broken) > BOOTSTRAP and not any(broken)
    assert (score.samples, score.drop, score.drop_standard_error) == (30, 0, 0)


def test_a_resample_on_which_the_metric_fails_is_left_out() -> None:
    """As an area under a curve does on a resample with one class alone."""
    state = np.random.default_rng(0)

    def metric(outputs: Array, targets: Array) -> float:
        if targets[0] != 0 and state.random() < 0.3:  # the split itself starts with 0
            raise ValueError("one class alone")
        return float(outputs.mean())

    evaluator = _evaluator(_logits(), np.arange(COUNT), metric)
    assert 0 < evaluator.set_reference(Model()).standard_error < 1


def _raises(outputs: Array, targets: Array) -> float:
    raise ValueError("no\ncolumn")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda o, t: math.nan, "is nan"),
        (lambda o, t: math.inf, "is inf"),
        (lambda o, t: None, "the metric raised TypeError"),
        (_raises, "the metric raised ValueError: no column"),
    ],
)
def test_a_metric_that_fails_is_one_line(metric: Any, message: str) -> None:
    with pytest.raises(TaskError, match="metric of the float network on validation") as caught:
        _evaluator(_logits(), np.zeros(COUNT), metric).set_reference(Model())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_metric_that_fails_on_an_artifact_alone() -> None:
    def metric(outputs: Array, targets: Array) -> float:
        return float(np.sqrt(outputs.mean())) if outputs.mean() >= 0 else math.nan

    evaluator = _evaluator(np.abs(_logits()), np.zeros(COUNT), metric)
    evaluator.set_reference(Model())
    with pytest.raises(TaskError, match="metric on validation is nan"):
        evaluator.score(Model(lambda x: -x))


# --- divergence ------------------------------------------------------------------------------


def test_the_divergence_is_the_mean_kl_of_the_softmax() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(p + 3.0, q - 1.0, classes=True) == pytest.approx(expected / 2)
    assert divergence(p, p, classes=True) == 0.0
    assert divergence(p, q * np.nan, classes=True) == 1e6


def test_the_divergence_of_other_outputs_is_relative_to_their_variance() -> None:
    reference = np.array([[0.0], [2.0], [4.0]])
    assert divergence(reference, reference + 1, False) == pytest.approx(1 / reference.var())
    assert divergence(reference, reference + 1, False, variance=2.0) == pytest.approx(0.5)


def test_a_large_split_is_taken_in_parts() -> None:
    p, q = _logits(9000), _logits(9000, seed=1)
    halves = [divergence(p[i : i + 4500], q[i : i + 4500], True) for i in (0, 4500)]
    assert divergence(p, q, True) == pytest.approx(np.mean(halves))


@pytest.mark.parametrize("metric", ["top1", mean_of_outputs])
def test_a_score_carries_its_divergence(metric: Any) -> None:
    logits = _logits()
    evaluator = _evaluator(logits, logits.argmax(1), metric)
    evaluator.set_reference(Model())
    assert evaluator.score(Model()).divergence == 0.0
    scores = [evaluator.score(Model(lambda x, k=k: k * x)).divergence for k in (0.9, 0.5)]
    assert 0 < float(scores[0] or 0) < float(scores[1] or 0)


# --- stages ----------------------------------------------------------------------------------


def _staged(metric: Any = "top1", count: int = 1600) -> Evaluator:
    """Batches of 50: a quarter has 400 samples, half 800."""
    logits = _logits(count)
    targets = logits.argmax(1) if metric == "top1" else logits.mean(axis=1)
    evaluator = Evaluator(_split(logits, targets, 50), metric, "metric", rows=50)
    evaluator.set_reference(Model())
    return evaluator


def _noisy(scale: float, seed: int = 1) -> Callable[[Array], Array]:
    """Noise that a sample always gets, whichever batch it is in."""

    def function(x: Array) -> Array:
        own = np.random.default_rng(seed).normal(size=(64, x.shape[1]))
        index = (np.abs(x[:, 0]) * 1e6).astype(int) % 64
        return (x + scale * own[index]).astype(np.float32)

    return function


def closeness(outputs: Array, targets: Array) -> float:
    return -float(((outputs.mean(axis=1) - targets) ** 2).mean())


@pytest.mark.parametrize(("metric", "samples"), [("top1", 400), (closeness, 400)])
def test_what_is_surely_worse_stops_after_a_quarter(metric: Any, samples: int) -> None:
    evaluator = _staged(metric)
    good = evaluator.assess(Model(_noisy(0.05)))
    assert not good.stopped and good.evidence and good.score.samples == 1600
    model = Model(_noisy(2.0))
    bad = evaluator.assess(model, good.evidence)
    assert bad.stopped and bad.evidence is None
    assert bad.score.samples == sum(model.batches) == samples
    assert bad.score.value < good.score.value and bad.score.drop > 0
    again = evaluator.assess(Model(_noisy(2.0)), good.evidence)
    assert again == bad


@pytest.mark.parametrize("metric", ["top1", closeness])
def test_a_rival_does_not_change_the_score_of_what_it_does_not_stop(metric: Any) -> None:
    evaluator = _staged(metric)
    good = evaluator.assess(Model(_noisy(0.3)))
    for scale in (0.05, 0.3):
        model = Model(_noisy(scale))
        found = evaluator.assess(model, good.evidence)
        assert not found.stopped and sum(model.batches) == 1600  # no batch twice
        assert found.score == evaluator.score(Model(_noisy(scale)))


def test_a_little_worse_may_take_another_stage() -> None:
    evaluator = _staged()
    good = evaluator.assess(Model())
    stops = [evaluator.assess(Model(_noisy(s)), good.evidence) for s in (0.01, 0.02, 0.04, 0.3)]
    assert not stops[0].stopped and stops[-1].stopped
    assert {s.score.samples for s in stops} <= {400, 800, 1600}
    order = [s.score.samples for s in stops]
    assert order == sorted(order, reverse=True)


def test_a_false_stop_is_as_rare_as_it_says() -> None:
    """Rivals of the same accuracy: at most one in a hundred is stopped."""
    generator = np.random.default_rng(0)
    evaluator = _staged()
    labels = evaluator.split.targets
    assert labels is not None
    stopped = 0
    for _ in range(300):
        pair = []
        for _ in range(2):
            wrong = generator.random(1600) < 0.1
            flipped = np.where(wrong, (labels + 1) % 4, labels)
            pair.append(np.eye(4, dtype=np.float32)[flipped])
        first, second = (Model(_rows_of(evaluator, outputs)) for outputs in pair)
        stopped += evaluator.assess(first, evaluator.assess(second).evidence).stopped
    assert stopped <= 6  # a mean of 3 at most


def _rows_of(evaluator: Evaluator, outputs: Array) -> Callable[[Array], Array]:
    """A model that answers with given rows, known by where its input stands in the split."""
    at = {batch[0].tobytes(): i for i, batch in enumerate(evaluator.batches)}
    return lambda x: outputs[at[x.tobytes()] * 50 : at[x.tobytes()] * 50 + len(x)]


def test_a_small_split_has_no_stages() -> None:
    logits = _logits(150)
    evaluator = _evaluator(logits, logits.argmax(1), rows=50)
    evaluator.set_reference(Model())
    assert evaluator.stages() == [] and evaluator.assess(Model()).evidence is None


def test_a_metric_that_a_part_cannot_have_is_left_for_the_whole() -> None:
    def whole(outputs: Array, targets: Array) -> float:
        if len(outputs) < 1600:
            raise ValueError("a part")
        return closeness(outputs, targets)

    evaluator = _staged(whole)
    assert evaluator.assess(Model()).evidence is None
    rival = _staged(closeness).assess(Model()).evidence
    found = evaluator.assess(Model(_noisy(2.0)), rival)
    assert not found.stopped and found.score.samples == 1600


# --- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ("top1", mean_of_outputs))
@pytest.mark.parametrize("rows", (1, 7, 64, 1000))
def test_neither_workers_nor_batches_change_a_score(metric: Any, rows: int) -> None:
    net = NETWORKS["residual"]()
    outputs = net.reference[0]
    session = OnnxRuntime().open(net.graph.model.SerializeToString())
    artifact = OnnxRuntime().open(net.assemble(net.uniform(3, 8)).SerializeToString())
    scores = []
    for workers in (1, 4):
        evaluator = Evaluator(
            _split(net.inputs[0], outputs.argmax(1), 20),
            metric, "metric", rows=rows, workers=workers,
        )  # fmt: skip
        evaluator.set_reference(session)
        scores.append(evaluator.score(artifact))
    assert scores[0] == scores[1]
    whole = _evaluator(net.inputs[0], outputs.argmax(1), metric)
    whole.set_reference(session)
    assert whole.score(artifact).value == pytest.approx(scores[0].value, abs=1e-5)


def test_batches_are_no_larger_than_asked() -> None:
    model = Model()
    _evaluator(_logits(), np.zeros(COUNT, int), rows=25).outputs(model)
    assert max(model.batches) == 25 and sum(model.batches) == COUNT


def test_a_fixed_batch_is_filled_up_and_the_filling_is_not_scored() -> None:
    x = _logits(30)
    evaluator = _evaluator(x, x.argmax(1), rows=8, fixed=True)
    model = Model()
    assert np.array_equal(evaluator.outputs(model), x)
    assert set(model.batches) == {8}
    assert evaluator.set_reference(Model()).value == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: np.asarray(x.mean()), "a row a sample"),
        (lambda x: x.T, "a row a sample"),
        (lambda x: x[:, : 1 + len(x) % 3], "all of one shape"),
        (lambda x: 1 / np.asarray("x"), "running the model on validation failed"),
    ],
)
def test_outputs_that_cannot_be_scored_are_a_model_error(
    function: Callable[[Array], Array], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        _evaluator(_logits(), np.zeros(COUNT)).outputs(Model(function))
    assert "\n" not in str(caught.value)


def test_data_of_another_shape_is_a_model_error() -> None:
    net = NETWORKS["gemm"]()
    session = OnnxRuntime().open(net.graph.model.SerializeToString())
    with pytest.raises(ModelError, match="running the model on validation failed"):
        _evaluator(_logits(), np.zeros(COUNT, int)).set_reference(session)
