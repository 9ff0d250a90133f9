from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import NETWORKS, run
from small_task import SPACE, batches, model, task

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.bank import Bank
from autoquant.compress.polish import polish
from autoquant.compress.qdq import assemble, resolve
from autoquant.compress.readback import read_bits
from autoquant.runtime import OnnxRuntime
from autoquant.search import SearchSettings, search
from autoquant.search.trial import Context, prepare, run_trial
from autoquant.space import Space

_POLISH = sys.modules[polish.__module__]
LOW = LayerChoice(2, 8)
NARROW = Space.model_validate(
    {"name": "narrow", "rules": [{"weight_bits": [3, 4, 5, 6], "activation_bits": 8}]}
)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return prepare(task(tmp_path_factory.mktemp("task")), space=SPACE, latency=False)


def low(context: Context, polished: bool) -> Candidate:
    return Candidate({layer.name: LOW for layer in context.graph.layers}, polish=polished)


def error(context: Context, candidate: Candidate) -> float:
    """Squared error of the outputs on images that calibrated nothing."""
    images = np.concatenate([inputs for inputs, _ in batches(77)])
    artifact = onnx.ModelProto.FromString(context.compress(candidate).model)
    return float(((run(artifact, images)[0] - run(model(), images)[0]) ** 2).mean())


def test_outputs_come_closer_to_float_at_two_bits(context: Context) -> None:
    assert error(context, low(context, True)) < 0.9 * error(context, low(context, False))


def test_the_bits_stay_and_the_key_differs(context: Context) -> None:
    polished, plain = low(context, True), low(context, False)
    assert polished.key != plain.key
    artifact = onnx.ModelProto.FromString(context.compress(polished).model)
    names = [layer.name for layer in context.graph.layers]
    assert read_bits(artifact, names) == dict.fromkeys(names, (2, 8))


def test_it_repeats_byte_for_byte_and_leaves_the_bank_alone(context: Context) -> None:
    before = context.compress(low(context, False)).sha256
    first = context.compress(low(context, True)).sha256
    assert context.compress(low(context, True)).sha256 == first != before
    assert context.compress(low(context, False)).sha256 == before


def test_it_gives_the_same_bytes_beside_another(context: Context) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import torch

    wanted = [low(context, True), replace(low(context, True), layers={"head": LOW})]
    alone = [context.compress(c).sha256 for c in wanted]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2) as pool:
            beside = list(pool.map(lambda c: context.compress(c).sha256, wanted))
    finally:
        torch.set_num_threads(before)
    assert beside == alone


def test_layers_of_more_than_eight_bits_are_not_touched(context: Context) -> None:
    float_ = resolve(context.graph, Candidate(polish=True))
    bank = polish(
        context.graph, float_, context.calibration, context.bank, context.inputs, "onnxruntime"
    )
    assert not bank.overrides


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_kind_of_network_goes_through(name: str) -> None:
    net = NETWORKS[name]()
    candidate = resolve(
        net.graph, Candidate({layer.name: LOW for layer in net.graph.layers}, polish=True)
    )
    inputs = (tuple(net.inputs),)
    bank = polish(net.graph, candidate, net.calibration, net.bank, inputs, "onnxruntime")
    artifact = compress(net.graph, candidate, net.calibration, bank, "onnxruntime")
    (output, *_) = run(onnx.ModelProto.FromString(artifact.model), *net.inputs)
    assert np.isfinite(output).all()


def test_a_trial_keeps_the_file_that_it_scored(context: Context, tmp_path: Path) -> None:
    path = tmp_path / "artifacts" / "7.onnx"
    result = run_trial(context, low(context, True), 7, save=path)
    assert result.status == "complete" and result.candidate.polish
    import hashlib

    assert hashlib.sha256(path.read_bytes()).hexdigest() == result.sha256


def test_a_search_polishes_a_tenth_of_its_trials(tmp_path: Path) -> None:
    settings = SearchSettings(space=NARROW, trials=20, name="p", runs_dir=tmp_path / "runs")
    front = search(task(tmp_path), settings)
    assert front.trials == 20
    lines = (tmp_path / "runs" / "p" / "trials.jsonl").read_text().splitlines()
    polished = [line for line in lines if '"polish":true' in line]
    assert len(lines) == 20 and len(polished) == 2
    plain = search(task(tmp_path), replace(settings, name="q", polish=False))
    assert not any(member.candidate.polish for member in plain.members)
    again = search(task(tmp_path), replace(settings, trials=30, resume=True))
    assert again.trials == 30


def test_layers_with_blocks_are_refitted_too() -> None:
    net = NETWORKS["blocked"]()
    nbits = LayerChoice(4, 32, "block32", nbits=True)
    candidate = net.resolved({"conv": LayerChoice(3, 32, "block32"), "first": nbits})
    found = polish(
        net.graph, candidate, net.calibration, net.bank, [net.inputs], "onnxruntime"
    ).overrides
    assert set(found) == {"conv", "first"}
    assert found["conv"].scale.shape == (5, 2) and found["first"].scale.shape == (70, 4)

    def error(bank: Bank) -> float:
        model = assemble(net.graph, candidate, net.calibration, bank)
        return float(((net.run(model)[0] - net.reference[0]) ** 2).mean())

    polished = net.bank.overlay()
    polished.overrides.update(found)
    assert error(polished) < error(net.bank)


def test_a_network_too_large_to_be_tuned_comes_closer_to_float(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_POLISH, "WORK", 0.0)
    assert error(context, low(context, True)) < error(context, low(context, False))


def test_a_polished_artifact_is_never_farther_from_float_than_the_banks(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, polished = context.compress(low(context, False)), context.compress(low(context, True))

    def second(model: bytes) -> float:
        return context.second(OnnxRuntime().open(model))

    assert second(polished.model) < second(plain.model)

    def spoiled(graph, candidate, calibration, bank, *_):  # type: ignore[no-untyped-def]
        found = bank.overlay()
        for layer in graph.layers:
            entry = bank.get(layer, candidate.choice(layer.name))
            found.overrides[layer.name] = replace(entry, values=np.zeros_like(entry.values))
        return found

    monkeypatch.setattr(sys.modules["autoquant.search.variant"], "polish", spoiled)
    guarded = context.compress(low(context, True))
    assert second(guarded.model) == second(plain.model)
    assert guarded.candidate.polish


def test_polishing_keeps_zeros_and_codebooks(context: Context) -> None:
    sparse = LayerChoice(3, 8, sparsity=0.5)
    clustered = LayerChoice(3, 8, sparsity=0.5, codebook=True)
    layers = dict(zip(("first", "second", "head"), (sparse, clustered, LOW), strict=True))
    candidate = Candidate(layers, polish=True)
    found, graph = resolve(context.graph, candidate), context.graph
    bank = polish(graph, found, context.calibration, context.bank, context.inputs, "onnxruntime", 1)
    kept = context.bank.get(graph.by_name["first"], sparse)
    assert not bank.overrides["first"].values[kept.values == 0].any()
    assert (bank.overrides["first"].scale != kept.scale).any()  # fitted anew all the same
    assert "second" not in bank.overrides and "head" in bank.overrides
    assert len(context.compress(candidate).model)
