from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from small_task import LAYERS, SPACE, task

from autoquant.candidate import Candidate, LayerChoice
from autoquant.errors import RunError
from autoquant.result import TrialResult
from autoquant.search.sensitivity import (
    ESTIMATORS,
    Sensitivity,
    content_key,
    divergence,
    estimate,
    monotone,
    predicted,
    priors,
    rank_correlation,
    sensitivity,
)
from autoquant.search.study import uniform_candidates
from autoquant.search.trial import Context, prepare, run_trial
from autoquant.space import Space
from autoquant.task import Task


@pytest.fixture(autouse=True)
def no_cache_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOQUANT_CACHE", str(tmp_path / "cache"))


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
    assert monotone(choices, (0.3, 0.2, 0.1, 0.15)) == (0.3, 0.2, 0.15, 0.15)


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


# --- estimators -------------------------------------------------------------------------------

TWO_INPUTS = Space.model_validate(
    {"rules": [{"weight_bits": [2, 4, 8], "activation_bits": [4, 8], "float": True}]}
)


class Block(torch.nn.Module):
    """Batch normalization, a layer used twice, a skip changed in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = torch.nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(6)
        self.twice = torch.nn.Conv2d(6, 6, 3, padding=1)
        self.relu = torch.nn.ReLU(inplace=True)
        self.head = torch.nn.Linear(6, 5)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-1.5, 2, 6))
            self.norm.bias.normal_()
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.2, 3)
            self.head.weight.mul_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.twice(self.twice(x)) + x)
        return self.head(x.mean((2, 3)))


def module_task(module: torch.nn.Module, *shape: int, metric: object = "top1") -> Task:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(128, *shape, generator=generator)
    with torch.no_grad():
        outputs = module.eval()(inputs)
    targets = outputs.argmax(1) if metric == "top1" else outputs
    return Task(
        name="module",
        model=module,
        example_inputs=(inputs[:1],),
        calibration=[inputs],
        validation=[(inputs, targets)],
        metric=metric,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def block() -> tuple[Task, Context]:
    found = module_task(Block(), 2, 6, 6)
    return found, prepare(found, space=TWO_INPUTS, latency=False)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_values_every_choice(name: str, block: tuple[Task, Context]) -> None:
    found, context = block
    result = estimate(context, found, estimator=name)
    assert result.estimator == name and set(result.table) == {"stem", "twice", "twice#2", "head"}
    for layer, values in result.table.items():
        by_choice = {str(c): v for c, v in zip(context.choices[layer], values, strict=True)}
        assert by_choice["float"] == 0.0
        assert by_choice["2/8"] > by_choice["4/8"] > by_choice["8/8"] > 0
        assert by_choice["8/4"] > by_choice["8/8"] and by_choice["2/4"] >= by_choice["2/8"]


def test_a_search_starts_from_two_estimates_where_there_is_a_module(
    block: tuple[Task, Context], context: Context, tmp_path: Path
) -> None:
    found = priors(block[1], block[0])
    assert list(found) == ["measured", "fisher"]
    assert all(name == result.estimator for name, result in found.items())
    mean = estimate(block[1], block[0], estimator="combined").table
    for name, values in mean.items():
        low, high = (
            [f(pair) for pair in zip(*(r.table[name] for r in found.values()), strict=True)]
            for f in (min, max)
        )
        assert all(0.99 * a <= v <= 1.01 * b for a, v, b in zip(low, values, high, strict=True))
    assert list(priors(context, task(tmp_path))) == ["measured"]  # an ONNX file


def test_fisher_is_near_what_a_single_change_measures(block: tuple[Task, Context]) -> None:
    found, context = block
    fisher = estimate(context, found, estimator="fisher").table
    runs = estimate(context, found, estimator="measured-all").table
    a, b = (np.array([v for values in t.values() for v in values if v]) for t in (fisher, runs))
    assert spearmanr(a, b).statistic > 0.9
    assert np.abs(np.median(np.log(a / b))) < np.log(2)


def test_fisher_of_a_linear_network_is_the_relative_squared_error() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 64))
    found = module_task(network, 8, metric=lambda outputs, targets: float(-abs(outputs).mean()))
    space = Space.model_validate({"rules": [{"weight_bits": [2, 3], "activation_bits": 32}]})
    context = prepare(found, space=space, latency=False)
    fisher = estimate(context, found, estimator="fisher").table
    runs = estimate(context, found, estimator="measured-all").table
    np.testing.assert_allclose(fisher["0"], runs["0"], rtol=0.1)  # random projections


def test_the_module_stays_as_it_was(block: tuple[Task, Context]) -> None:
    found, context = block
    assert isinstance(found.model, torch.nn.Module)
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    found.model.train()
    estimate(context, found, estimator="fisher")
    assert found.model.training and found.model.relu.inplace
    for name, parameter in found.model.named_parameters():
        assert parameter.requires_grad and parameter.grad is None
        assert torch.equal(parameter, before[name])
    found.model.eval()
    assert not any(m._forward_hooks for m in found.model.modules())


def test_fisher_knows_embeddings() -> None:
    class Words(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.words = torch.nn.Embedding(11, 8)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids).mean(1))

    module = Words().eval()
    ids = torch.randint(0, 11, (64, 4), generator=torch.Generator().manual_seed(1))
    labels = module(ids).argmax(1)
    found = Task("words", module, (ids[:1],), [ids], [(ids, labels)])
    space = Space.model_validate({"rules": [{"weight_bits": [2, 4], "activation_bits": 8}]})
    result = estimate(prepare(found, space=space, latency=False), found, estimator="fisher")
    assert result.notes == () and result.table["words"][0] > result.table["words"][1] > 0


def test_without_a_module_another_estimator_is_named(context: Context, tmp_path: Path) -> None:
    heard: list[str] = []
    result = estimate(context, task(tmp_path), estimator="combined", say=heard.append)
    assert result.estimator == "measured" and result.table == sensitivity(context)
    assert result.notes == ("combined: the task has no torch module; measured instead",)
    assert any("no torch module" in line for line in heard)
    assert estimate(context).estimator == "measured"


def test_auto_takes_the_best_that_there_is(block: tuple[Task, Context]) -> None:
    found, context = block
    heard: list[str] = []
    assert estimate(context, found, say=heard.append).estimator == "combined"
    assert "sensitivity of 4 layers: combined, about" in heard[0]


def test_layers_without_a_gradient_are_measured(block: tuple[Task, Context]) -> None:
    found, context = block

    class Detached(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.relu(self.norm(self.stem(x)))
            x = self.relu(self.twice(self.twice(x)) + x)
            return self.head(x.mean((2, 3)))

    other = Task(**{f: getattr(found, f) for f in found.__slots__} | {"model": Detached()})
    result = estimate(context, other, estimator="fisher")
    assert len(result.notes) == 1 and "no gradient for stem" in result.notes[0]
    assert result.table["stem"] == sensitivity(context)["stem"]


def test_around_a_base_the_others_stay_at_it(context: Context) -> None:
    base = Candidate({n: c[0] for n, c in context.choices.items()})
    result = estimate(context, estimator="measured-all", base=base)
    assert result.table != estimate(context, estimator="measured-all").table
    outputs = divergence_of(context, base), divergence_of(context, replaced(context, base, "head"))
    expected = max(outputs[0] - outputs[1], 0.0)
    assert result.table["head"][0] == pytest.approx(max(expected, result.table["head"][1]))
    fallen = estimate(context, estimator="bank", base=base)
    assert fallen.estimator == "measured" and "does not know of a base" in fallen.notes[0]


def replaced(context: Context, base: Candidate, name: str) -> Candidate:
    return Candidate({**base.layers, name: context.choices[name][-1]})


def divergence_of(context: Context, candidate: Candidate) -> float:
    from autoquant.runtime import OnnxRuntime

    reference, changed = (
        OnnxRuntime().open(context.compress(c).model).run(context.probe)[0].astype(np.float64)
        for c in (Candidate(), candidate)
    )
    return divergence(reference, changed, classes=True)


def test_a_second_estimate_comes_from_the_cache(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = estimate(context, estimator="measured")

    def fail(_: object) -> None:
        raise AssertionError("it was estimated again")

    monkeypatch.setitem(ESTIMATORS, "measured", fail)
    heard: list[str] = []
    assert estimate(context, estimator="measured", say=heard.append) == first
    assert "from the cache" in heard[0]
    (path,) = (tmp_path / "cache").iterdir()
    path.write_text("{")  # damaged: estimated again
    with pytest.raises(AssertionError, match="again"):
        estimate(context, estimator="measured")


def test_it_is_stored_and_read_for_the_same_choices_only(context: Context) -> None:
    found = estimate(context, estimator="bank")
    again = Sensitivity.from_dict(found.to_dict(), context.choices)
    assert again == found and found.key == content_key(context, "bank")
    assert content_key(context, "fisher") != found.key
    assert content_key(context, "bank", Candidate()) != found.key
    stored = found.to_dict()
    del stored["layers"]["head"]["4/8"]
    with pytest.raises(RunError, match=r"sensitivity.json does not fit this search: .*4/8"):
        Sensitivity.from_dict(stored, context.choices)


@pytest.mark.parametrize("name", ["measured", "fisher", "combined", "bank"])
def test_products_blocks_and_roundings_are_valued(name: str) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.query, self.key = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
            self.head = torch.nn.Linear(40, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.query(x) @ self.key(x).transpose(1, 2)
            return self.head((scores.softmax(-1) @ x).mean(1)) * 5

    found = module_task(Attention(), 6, 40)
    rules = [
        {
            "weight_bits": [3, 8],
            "granularity": ["channel", "block32"],
            "rounding": ["nearest", "second-order"],
        },
        {"kinds": ["Product"], "activation_bits": 8, "float": True},
    ]
    space = Space.model_validate({"rules": rules})
    context = prepare(found, space=space, latency=False)
    result = estimate(context, found, estimator=name)
    assert result.estimator == name
    products = [layer.name for layer in context.graph.products]
    assert len(products) == 2 and set(products) < set(result.table)
    for product in products:
        at = dict(zip(map(str, context.choices[product]), result.table[product], strict=True))
        assert at["float"] == 0.0 < at["32/8"]
    at = dict(zip(map(str, context.choices["head"]), result.table["head"], strict=True))
    assert len(at) == 8 and at["3/32 nearest"] > at["8/32 nearest"] > 0
    assert at["3/32 second-order"] < at["3/32 nearest"]
    assert at["3/32 block32 nearest"] < at["3/32 nearest"]


def test_an_unknown_estimator_is_named(context: Context) -> None:
    with pytest.raises(RunError, match="did you mean 'fisher'"):
        estimate(context, estimator="fischer")


def test_denser_weights_never_look_worse() -> None:
    choices = [LayerChoice(4, 8, sparsity=0.5), LayerChoice(4, 8), LayerChoice(8, 8)]
    assert monotone(choices, (0.1, 0.2, 0.15)) == (0.2, 0.2, 0.15)
    other = [LayerChoice(4, 8, codebook=True), LayerChoice(4, 8)]
    assert monotone(other, (0.1, 0.2)) == (0.1, 0.2)
