"""Which channels go, and what the layers that read them become."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from conftest import run
from test_channels import attention, convolutions

from autoquant.calibration import calibrate
from autoquant.candidate import IMPORTANCES as NAMES
from autoquant.compress.channels import Channels
from autoquant.compress.prune import (
    IMPORTANCES,
    Evidence,
    offered,
    prune,
    scores,
    units_removed,
)
from autoquant.errors import CandidateError
from autoquant.graph import Graph
from autoquant.task import Array, Split

IMAGES = np.random.default_rng(5).normal(size=(96, 3, 8, 8)).astype(np.float32)
WORDS = np.random.default_rng(6).normal(size=(96, 5, 16)).astype(np.float32)


@functools.cache
def evidence(network: str = "convolutions") -> Evidence:
    graph, data = (convolutions(), IMAGES) if network == "convolutions" else (attention(), WORDS)
    split = Split("calibration", ((data,),), None, len(data))
    found = calibrate(graph, split, method="minmax", moments=True, threads=1)
    return Evidence(graph, found.moments, ((data,),), classes=network == "convolutions")


def outputs(graph: Graph, data: Array) -> Array:
    return run(graph.model, data)[0]


def test_the_names_are_those_of_candidates() -> None:
    assert tuple(IMPORTANCES) == NAMES


@pytest.mark.parametrize("importance", NAMES)
def test_what_is_pruned_first_matters_least(importance: str) -> None:
    """Zero the channels that an importance ranks low, and those that it ranks high."""
    found = evidence()
    channels = Channels(found.graph)
    group = channels.groups["inner"]
    ranked = scores(channels, group, found.saliency(importance))
    assert ranked.shape == (12,) and (ranked >= 0).all() and len(set(ranked.tolist())) == 12
    order = np.argsort(ranked)
    errors = []
    for part in (order[:5], order[-5:]):
        gone = {group.labels[i] for i in part}
        smaller = Graph.read(channels.without(gone), [IMAGES])
        errors.append(np.square(outputs(smaller, IMAGES) - outputs(found.graph, IMAGES)).mean())
    assert errors[0] < errors[1]


def test_a_saliency_is_the_same_each_time() -> None:
    first, second = (
        Evidence(e.graph, e.moments, e.inputs, e.classes).saliency("stability")
        for e in (evidence(), evidence())
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("network", "group"), [("convolutions", "inner"), ("attention", "fc1")])
def test_the_layers_that_read_are_fitted(network: str, group: str) -> None:
    """Fitting to the calibration data keeps outputs closer than leaving the weights alone."""
    found = evidence(network)
    data = IMAGES if network == "convolutions" else WORDS
    channels = Channels(found.graph)
    gone, model = prune(channels, {group: 0.5}, "l2", found)
    assert len(gone) == channels.groups[group].units // 2
    fitted = Graph.read(model, [data])
    plain = Graph.read(channels.without(gone), [data])
    assert fitted.macs == plain.macs < found.graph.macs
    expected = outputs(found.graph, data)
    error, before = (
        float(np.square(outputs(graph, data) - expected).mean()) for graph in (fitted, plain)
    )
    assert error < 0.9 * before


def test_a_ratio_that_empties_a_group_and_an_unknown_group_are_one_line() -> None:
    found = evidence()
    channels = Channels(found.graph)
    with pytest.raises(CandidateError, match=r"'left' is 0.95: none of its 8 units.*at most 0.875"):
        prune(channels, {"left": 0.95}, "l2", found)
    with pytest.raises(CandidateError, match="unknown channel group 'lft'; did you mean 'left'"):
        prune(channels, {"lft": 0.5}, "l2", found)


def test_offered_ratios_leave_what_the_device_likes() -> None:
    groups = Channels(convolutions()).groups
    assert units_removed(groups["inner"], 0.5) == 6
    assert offered(groups["inner"], [0, 0.25, 0.5], 4) == (1 - 8 / 12, 0.0)
    assert offered(groups["left"], [0.125, 0.5], 8) == (0.0,)
    assert offered(groups["right"], [0.5], 8) == (0.5,)  # it has no eight channels
    heads = Channels(attention()).groups["q"]
    assert offered(heads, [0.25, 0.5], 4) == (0.5, 0.25)  # a head is four channels
