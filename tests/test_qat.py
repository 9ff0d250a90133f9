from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import NETWORKS, run
from small_task import LAYERS, batches, context, graph, task

from autoquant.candidate import Candidate, LayerChoice
from autoquant.compress import compress
from autoquant.compress.qat import Quantized, Trained, train, train_pair
from autoquant.compress.qdq import resolve
from autoquant.compress.train import GraphNetwork, History, responses
from autoquant.errors import CandidateError, ModelError
from autoquant.search.trial import Context

FLOAT_TYPE = "onnxruntime"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context(tmp_path_factory.mktemp("task"))


def candidate(*bits: tuple[int, int], **training: Any) -> Candidate:
    widths = bits * len(LAYERS) if len(bits) == 1 else bits
    layers = {n: LayerChoice(*b) for n, b in zip(LAYERS, widths, strict=True)}
    settings = {"steps": 60, "batch_size": 32, "learning_rate": 0.01, **training}
    return resolve(graph(), Candidate(layers, training=settings))


def trained(prepared: Context, folder: Path, found: Candidate, **rest: Any) -> Trained:
    given = rest.pop("task", None) or task(folder, train=batches(4, 128))
    c = prepared
    return train(c.graph, found, c.calibration, c.bank, FLOAT_TYPE, given, **rest)


def outputs(made: Trained, found: Candidate, images: np.ndarray | None = None) -> np.ndarray:
    images = np.concatenate([x for x, _ in batches(77)]) if images is None else images
    file = compress(made.graph, found, made.calibration, made.bank, FLOAT_TYPE)
    return run(onnx.ModelProto.FromString(file.model), images)[0]


def gap(prepared: Context, made: Trained | None, found: Candidate) -> float:
    """Divergence from the float network on the training images."""
    c = prepared
    made = made or Trained(c.graph, c.calibration, c.bank, History())
    images = np.concatenate([x for x, _ in batches(4, 128)])
    exact = torch.from_numpy(run(c.graph.model, images)[0])
    return float(responses(torch.from_numpy(outputs(made, found, images)), exact, 1.0, True))


@pytest.mark.parametrize("quantizer", ["lsq", "ste"])
@pytest.mark.parametrize("bits", [(2, 8), (3, 3), (2, 4)])
def test_training_brings_the_artifact_closer_to_the_teacher(
    prepared: Context, tmp_path: Path, bits: tuple[int, int], quantizer: str
) -> None:
    found = candidate(bits, alpha=1.0, temperature=1.0, quantizer=quantizer, steps=150)
    found = replace(found, training={**(found.training or {}), "learning_rate": 0.003})
    made = trained(prepared, tmp_path, found)
    assert gap(prepared, made, found) < 0.9 * gap(prepared, None, found)
    assert made.history.losses[-1][1] < made.history.losses[0][1]


CASES = [
    candidate((2, 8)),
    candidate((4, 4)),
    candidate((3, 3), quantizer="ste"),
    candidate((4, 6), (8, 8), (32, 32)),
    candidate((32, 32), (3, 32), (8, 8)),
]


@pytest.mark.parametrize("found", CASES, ids=["w2a8", "w4a4", "w3a3", "mixed", "float"])
def test_the_artifact_computes_what_training_saw(
    prepared: Context, tmp_path: Path, found: Candidate
) -> None:
    made = trained(prepared, tmp_path, found)
    bank = made.bank
    simulated = Quantized(made.graph, found, made.calibration, bank, FLOAT_TYPE)
    images = torch.from_numpy(np.concatenate([x for x, _ in batches(77)]))
    with torch.no_grad():
        seen = simulated((images,), ())[0].numpy()
    got = outputs(made, found)
    assert np.median(np.abs(got - seen)) < 1e-5 * np.ptp(got)
    assert (np.abs(got - seen) > 0.01 * np.ptp(got)).mean() < 0.02


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("bits", [(4, 8), (4, 4)])
def test_the_simulation_is_the_artifact_on_every_kind_of_network(
    name: str, bits: tuple[int, int]
) -> None:
    net = NETWORKS[name]()
    layers = {x.name: LayerChoice(*bits) for x in net.graph.layers}
    found = net.resolved(Candidate(layers))
    made = Quantized(net.graph, found, net.calibration, net.bank, FLOAT_TYPE)
    _, calibration, bank = made.result()
    file = compress(net.graph, found, calibration, bank, FLOAT_TYPE)
    got = run(onnx.ModelProto.FromString(file.model), *net.inputs)[0]
    try:
        with torch.no_grad():
            seen = made(tuple(torch.from_numpy(np.array(x)) for x in net.inputs), ())[0].numpy()
    except ModelError as error:
        pytest.skip(str(error))
    assert np.median(np.abs(got - seen)) < 2e-3 * max(np.ptp(got), 1e-6)


def test_rounding_twice_on_a_nested_grid_is_rounding_once() -> None:
    from autoquant.compress.qat import _dividing, rounded_to

    one = torch.ones(())
    x = torch.linspace(-0.2, 1.4, 20_001)
    for bits in (2, 3, 4, 5, 6, 7):
        levels = 2**bits - 1
        low, high = _dividing(0.0, 1.0, bits)
        fine = (high - low) / 255
        once = rounded_to(x, one, 1 / levels, 0, levels)
        twice = rounded_to(rounded_to(x, one, fine, 0, 255), one, 1 / levels, 0, levels)
        assert (once - twice).abs().max() < 1e-5


def test_the_gradient_of_a_step_is_that_of_lsq() -> None:
    from autoquant.compress.qat import rounded_to

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 50, generator=generator)
    weight = torch.randn(8, 50, generator=generator)
    x[1:], weight[1:] = x[:1], weight[:1]  # some of the samples stand for all
    step, scale, low, high = torch.ones(()).requires_grad_(), 0.3, -4, 3
    (rounded_to(x, step, scale, low, high) * weight).sum().backward()
    v = x / scale
    inside = (v > low) & (v < high)
    wanted = (weight * torch.where(inside, v.round() - v, v.clamp(low, high))).sum() * scale
    wanted *= (high / 50) ** 0.5
    assert step.grad is not None and torch.allclose(step.grad, wanted, rtol=1e-3)


def test_the_same_seed_gives_the_same_bytes(prepared: Context, tmp_path: Path) -> None:
    found = candidate((3, 4))

    def made(threads: int) -> bytes:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            t = trained(prepared, tmp_path, found)
        finally:
            torch.set_num_threads(before)
        return compress(t.graph, found, t.calibration, t.bank, FLOAT_TYPE).model

    assert made(1) == made(2)


def test_a_longer_run_continues_a_shorter_one(prepared: Context, tmp_path: Path) -> None:
    folder = tmp_path / "training"
    short, long = candidate((2, 8)), candidate((2, 8), steps=100)
    trained(prepared, tmp_path, short, checkpoints=folder)
    continued = trained(prepared, tmp_path, long, checkpoints=folder)
    assert continued.history.resumed == 36
    assert np.array_equal(
        outputs(continued, long), outputs(trained(prepared, tmp_path, long), long)
    )


def test_masked_weights_stay_zero_in_the_file(prepared: Context, tmp_path: Path) -> None:
    def adjust(_step: int, _steps: int, weights: Any) -> None:
        weights["second"][::2] = 0

    made = trained(prepared, tmp_path, candidate((4, 8)), adjust=adjust)
    entry = made.bank.overrides["second"]
    assert not entry.values[::2].any() and entry.values[1::2].any()


SPARSE = [
    LayerChoice(4, 8, sparsity=0.6),
    LayerChoice(3, 8, sparsity="2:4"),
    LayerChoice(2, 8, codebook=True),  # with 3 bits it begins near its best
    LayerChoice(3, 8, sparsity=0.5, codebook=True),
]


def sparse(choice: LayerChoice, **training: Any) -> Candidate:
    layers = {**dict.fromkeys(LAYERS, choice), "head": LayerChoice(8, 8)}
    settings = {"steps": 150, "batch_size": 32, "learning_rate": 0.003, "alpha": 1.0, **training}
    return resolve(graph(), Candidate(layers, training={**settings, "temperature": 1.0}))


@pytest.mark.parametrize("choice", SPARSE, ids=["ratio", "2:4", "codebook", "both"])
def test_pruned_and_clustered_weights_train_as_they_are_stored(
    prepared: Context, tmp_path: Path, choice: LayerChoice
) -> None:
    found = sparse(choice)
    made = trained(prepared, tmp_path, found)
    assert gap(prepared, made, found) < 0.9 * gap(prepared, None, found)
    for name in ("first", "second"):
        values = made.bank.overrides[name].values
        if choice.sparsity == "2:4":
            parts = np.moveaxis(values, 1, -1)[..., : values.shape[1] // 4 * 4]
            assert ((parts.reshape(*parts.shape[:-1], -1, 4) != 0).sum(-1) <= 2).all()
        else:
            assert (values == 0).mean() >= float(choice.sparsity) - 1 / values.size
        if choice.codebook:
            table = made.bank.overrides[name].table
            assert table is not None and set(values.ravel()) <= set(table)
            assert len(table) == 2**choice.weight_bits
    simulated = Quantized(made.graph, found, made.calibration, made.bank, FLOAT_TYPE)
    images = np.concatenate([x for x, _ in batches(77)])
    with torch.no_grad():
        seen = simulated((torch.from_numpy(images),), ())[0].numpy()
    got = outputs(made, found)
    assert np.median(np.abs(got - seen)) < 1e-5 * np.ptp(got)


def test_zeros_grow_while_a_network_trains(prepared: Context, tmp_path: Path) -> None:
    shares = []

    def look(_step: int, _steps: int, weights: Any) -> None:
        shares.append(float((weights["second"] == 0).float().mean()))

    trained(prepared, tmp_path, sparse(LayerChoice(4, 8, sparsity=0.8)), adjust=look)
    assert shares[0] < 0.05 and shares[20] < 0.7
    assert shares[75] == pytest.approx(0.8, abs=0.01) and shares[-1] >= shares[75] - 1e-6
    assert (np.diff(shares) >= -1e-6).all()


def test_the_values_of_a_codebook_are_learned(prepared: Context, tmp_path: Path) -> None:
    found = sparse(LayerChoice(2, 8, codebook=True))
    made = trained(prepared, tmp_path, found)
    before = prepared.bank.get(prepared.graph.by_name["second"], found.choice("second")).table
    after = made.bank.overrides["second"].table
    assert before is not None and after is not None and (before != after).any()


def test_two_sparse_candidates_teach_each_other(prepared: Context, tmp_path: Path) -> None:
    c = prepared
    pair = sparse(SPARSE[0], steps=40), sparse(SPARSE[3], steps=40)
    given = task(tmp_path, train=batches(4, 128))
    made = train_pair(c.graph, pair, c.calibration, c.bank, FLOAT_TYPE, given)
    for m, share in zip(made, (0.6, 0.5), strict=True):
        assert (m.bank.overrides["second"].values == 0).mean() >= share - 0.01


def test_pruning_by_steps_continues_no_shorter_run(prepared: Context, tmp_path: Path) -> None:
    folder = tmp_path / "training"
    for choice, resumed in ((SPARSE[0], 0), (SPARSE[1], 24)):
        trained(prepared, tmp_path, sparse(choice, steps=40), checkpoints=folder)
        long = sparse(choice, steps=60)
        continued = trained(prepared, tmp_path, long, checkpoints=folder)
        assert continued.history.resumed == resumed
        assert np.array_equal(
            outputs(continued, long), outputs(trained(prepared, tmp_path, long), long)
        )


@pytest.mark.parametrize("teacher", ["self", "mutual", "none"])
def test_other_teachers(prepared: Context, tmp_path: Path, teacher: str) -> None:
    made = trained(prepared, tmp_path, candidate((2, 8), teacher=teacher, alpha=0.5))
    assert made.history.losses[-1][1] < made.history.losses[0][1]


def test_two_candidates_teach_each_other(prepared: Context, tmp_path: Path) -> None:
    c = prepared
    pair = candidate((2, 8), alpha=0.5), candidate((3, 8), alpha=0.5)
    given = task(tmp_path, train=batches(4, 128))
    made = train_pair(c.graph, pair, c.calibration, c.bank, FLOAT_TYPE, given)
    assert [m.bank.overrides["second"].bits for m in made] == [2, 3]
    for found, m in zip(pair, made, strict=True):
        assert np.isfinite(outputs(m, found)).all()


def test_hints_and_their_errors(prepared: Context, tmp_path: Path) -> None:
    made = trained(prepared, tmp_path, candidate((2, 8), hints=["second"], alpha=0.5))
    assert made.history.losses[-1][1] < made.history.losses[0][1]
    with pytest.raises(CandidateError, match="hint layer 'secnd' is not in the network; did you"):
        trained(prepared, tmp_path, candidate((2, 8), hints=["secnd"]))


def test_a_loss_that_diverges_is_an_error(prepared: Context, tmp_path: Path) -> None:
    given = task(tmp_path, train=batches(4, 128), loss=lambda y, _: (1e9 * y**3).exp().sum())
    with pytest.raises(CandidateError, match=r"the loss is (inf|nan) at step 0.*learning_rate"):
        trained(prepared, tmp_path, candidate((8, 8), teacher="none"), task=given)


def test_the_bank_and_the_calibration_that_were_given_stay(
    prepared: Context, tmp_path: Path
) -> None:
    found = candidate((4, 4))
    before = compress(prepared.graph, found, prepared.calibration, prepared.bank, FLOAT_TYPE).model
    trained(prepared, tmp_path, found)
    after = compress(prepared.graph, found, prepared.calibration, prepared.bank, FLOAT_TYPE).model
    assert before == after and replace(found) == found


def damaged(prepared: Context) -> Context:
    """With half of each channel's weights gone, so that there is something to learn."""
    found = prepared.graph
    generator = np.random.default_rng(3)
    arrays = {}
    for layer in found.layers[:-1]:
        weight = found.array(layer.weight)
        arrays[layer.weight] = weight * (generator.random(weight.shape) < 0.5)
    return replace(prepared, graph=found.with_arrays(arrays))


def test_a_float_candidate_trains_with_its_normalization_back(
    prepared: Context, tmp_path: Path
) -> None:
    """By the statistics of its batches; folded again, the file computes what training left."""
    broken, seen = damaged(prepared), []
    found = candidate((32, 32), alpha=1.0, temperature=1.0, batch_norm="live", steps=150)

    def watch(step: int, steps: int, weights: Any) -> None:
        seen.append({name: w.detach().clone() for name, w in weights.items()})

    made = trained(broken, tmp_path, found, teacher=GraphNetwork(prepared.graph), adjust=watch)
    assert [x.name for x in made.graph.layers] == [x.name for x in broken.graph.layers]
    assert set(seen[0]) == {x.name for x in broken.graph.layers} and len(seen) == 151
    before = Trained(broken.graph, broken.calibration, broken.bank, History())
    assert gap(prepared, made, found) < 0.5 * gap(prepared, before, found)
    again = trained(broken, tmp_path, found, teacher=GraphNetwork(prepared.graph))
    assert np.array_equal(outputs(made, found), outputs(again, found))
    first = broken.graph.layers[0]  # what was folded is not what was trained
    assert not np.allclose(made.graph.array(first.weight), seen[-1][first.name].numpy(), rtol=1e-3)


def test_live_normalization_continues_follows_hints_and_is_for_float_alone(
    prepared: Context, tmp_path: Path
) -> None:
    broken = damaged(prepared)
    settings = {"batch_norm": "live", "hints": [LAYERS[1]], "learning_rate": 0.003}
    short = candidate((32, 32), **{**settings, "steps": 20})
    long = candidate((32, 32), **{**settings, "steps": 60})
    trained(broken, tmp_path, short, checkpoints=tmp_path)
    made = trained(broken, tmp_path, long, checkpoints=tmp_path)
    whole = trained(broken, tmp_path, long)
    assert made.history.resumed > 0
    np.testing.assert_allclose(outputs(made, long), outputs(whole, long), rtol=1e-4, atol=1e-5)
    frozen, live = (
        trained(broken, tmp_path, candidate((8, 8), batch_norm=kind)) for kind in ("frozen", "live")
    )
    eight = candidate((8, 8))
    assert np.array_equal(outputs(frozen, eight), outputs(live, eight))
