from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoquant.compress.train import finetune, relations, responses
from autoquant.errors import CandidateError, TaskError
from autoquant.task import Task
from autoquant.training import SCHEDULES, TrainingSettings


class Net(torch.nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, width, 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(width)
        self.head = torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def net(seed: int, width: int = 6) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = Net(width)
        found.bn.running_mean.uniform_(-0.3, 0.3)
        found.head.weight.data *= 8
        return found.eval()


def batches(seed: int, count: int = 64) -> list[tuple[np.ndarray, np.ndarray]]:
    x = np.random.default_rng(seed).normal(size=(count, 2, 5, 5)).astype(np.float32)
    x *= np.random.default_rng(seed + 1).uniform(0.3, 3, (count, 1, 1, 1)).astype(np.float32)
    with torch.no_grad():
        y = net(0)(torch.from_numpy(x)).argmax(1).numpy()
    return [(x[i : i + 20], y[i : i + 20]) for i in range(0, count, 20)]


def task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "net",
        "model": net(0),
        "example_inputs": (np.zeros((1, 2, 5, 5), np.float32),),
        "calibration": [x for x, _ in batches(1)],
        "validation": batches(2),
        "train": batches(3),
    }
    return Task(**{**fields, **changes})


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"steps": 30, "batch_size": 16, "learning_rate": 0.01, **changes})


def trained(found: TrainingSettings, start: int = 1, **rest: Any) -> Net:
    module = net(start)
    finetune(module, rest.pop("task", task()), found, **rest)
    return module


def distance(module: Net, teacher: Net) -> float:
    x = torch.from_numpy(np.concatenate([x for x, _ in batches(9)]))
    with torch.no_grad():
        return float(responses(module(x), teacher(x), 4.0, True))


def same(a: Net, b: Net) -> bool:
    return all(
        torch.equal(p, q)
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_the_loss_falls_and_the_module_is_left_in_eval_mode() -> None:
    module = net(1)
    history = finetune(module, task(), settings(steps=60, teacher="none"))
    assert history.losses[-1][1] < 0.8 * history.losses[0][1] and history.steps == 60
    assert not module.training


def test_a_seed_gives_the_same_weights() -> None:
    found = settings(teacher="none")
    assert same(trained(found), trained(found))
    assert not same(trained(found), trained(settings(teacher="none", seed=1)))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_responses_bring_the_student_closer(alpha: float) -> None:
    teacher = net(0)
    found = trained(settings(steps=80, alpha=alpha), teacher=teacher)
    assert distance(found, teacher) < 0.7 * distance(net(1), teacher)


def test_hints_bring_a_layer_closer_to_the_teacher_s() -> None:
    teacher = net(0)
    x = torch.from_numpy(batches(9)[0][0])

    def gap(changes: dict[str, Any]) -> float:
        found = trained(settings(steps=80, alpha=0.0, **changes), teacher=teacher)
        with torch.no_grad():
            return float(((found.conv(x) - teacher.conv(x)) ** 2).mean())

    assert gap({"hints": ("conv",), "hint_weight": 3.0}) < 0.8 * gap({})


def test_relations_bring_the_distances_between_samples_closer() -> None:
    teacher = net(0)
    x = torch.from_numpy(np.concatenate([x for x, _ in batches(9)]))

    def gap(weight: float) -> float:
        found = trained(settings(steps=80, alpha=0.0, relation_weight=weight), teacher=teacher)
        with torch.no_grad():
            return float(relations(found(x), teacher(x)))

    assert gap(20.0) < 0.7 * gap(0.0)


def test_mixup_learns_from_sums_of_samples_and_of_their_losses() -> None:
    teacher, seen = net(0), []
    plain = settings(steps=1, mixup=1.0, teacher="none")

    def loss(output: Any, target: Any) -> Any:
        seen.append(target)
        return torch.nn.functional.cross_entropy(output, target)

    trained(plain, task=task(loss=loss))
    first, second = seen
    assert torch.equal(first.sort().values, second.sort().values) and not torch.equal(first, second)
    found = settings(steps=80, alpha=1.0, mixup=1.0)
    assert same(trained(found, teacher=teacher), trained(found, teacher=teacher))
    without = trained(settings(steps=80, alpha=1.0), teacher=teacher)
    assert not same(trained(found, teacher=teacher), without)
    assert distance(trained(found, teacher=teacher), teacher) < 0.7 * distance(net(1), teacher)


def test_hints_reach_a_teacher_of_another_width() -> None:
    teacher = net(0, width=9)
    loss = settings(steps=60, alpha=0.0, hints=("conv",), hint_weight=1.0, relation_weight=0.0)
    module = net(1)
    history = finetune(module, task(loss=lambda y, _: 0.0 * y.sum()), loss, teacher=teacher)
    assert history.losses[-1][1] < 0.7 * history.losses[0][1]


def test_mixup_of_inputs_that_cannot_be_added_is_an_error() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x).mean(1)

    tokens = np.zeros((16, 5), np.int64)
    found = task(
        model=Table(), example_inputs=(tokens[:1],), train=[(tokens, np.zeros(16, np.int64))]
    )
    with pytest.raises(CandidateError, match=r"mixup adds inputs, which are torch\.int64"):
        finetune(Table(), found, settings(mixup=1.0, teacher="none"))


@pytest.mark.parametrize("teacher", ["self", "mutual"])
def test_a_network_teaches_itself_or_learns_beside_another(teacher: str) -> None:
    found = settings(teacher=teacher, alpha=0.5)
    module = net(1)
    history = finetune(module, task(), found)
    assert history.losses[-1][1] < history.losses[0][1]
    assert not same(module, trained(settings(teacher="none")))


def test_the_task_names_another_teacher() -> None:
    other = net(5)
    found = trained(settings(steps=80, teacher="task", alpha=1.0), task=task(teacher=other))
    assert distance(found, other) < 0.7 * distance(net(1), other)


def test_frozen_statistics_stay_and_live_ones_follow() -> None:
    before = net(1).bn.running_mean
    assert torch.equal(trained(settings(teacher="none")).bn.running_mean, before)
    live = trained(settings(teacher="none", batch_norm="live")).bn.running_mean
    assert not torch.equal(live, before)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_longer_run_continues_a_shorter_one(schedule: str, tmp_path: Path) -> None:
    short, long = (
        settings(teacher="self", schedule=schedule),
        settings(teacher="self", schedule=schedule, steps=50),
    )
    trained(short, checkpoints=tmp_path)
    module = net(1)
    history = finetune(module, task(), long, checkpoints=tmp_path)
    assert history.resumed == short.stem(30) and history.steps == 50
    assert same(module, trained(long))


def test_a_damaged_checkpoint_is_trained_again(tmp_path: Path) -> None:
    found = settings(teacher="none")
    trained(found, checkpoints=tmp_path)
    (path,) = tmp_path.glob("*.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert same(trained(found, checkpoints=tmp_path), trained(found))


def test_what_adjust_removes_stays_removed() -> None:
    mask = torch.zeros(6, 2, 3, 3)
    mask[::2] = 1

    def adjust(_step: int, _steps: int, weights: dict[str, torch.Tensor]) -> None:
        weights["conv"].mul_(mask)

    weight = trained(settings(teacher="none"), adjust=adjust).conv.weight
    assert (weight[1::2] == 0).all() and (weight[::2] != 0).all()


class Passes(list):  # type: ignore[type-arg]
    def epoch(self, number: int) -> Any:
        generator = np.random.default_rng(number)
        return [(x + generator.normal(size=x.shape).astype(np.float32), y) for x, y in self]


def test_a_task_augments_each_pass() -> None:
    found = settings(teacher="none")
    augmented = task(train=Passes(batches(3)))
    assert same(trained(found, task=augmented), trained(found, task=augmented))
    assert not same(trained(found, task=augmented), trained(found))


def test_epochs_are_passes_over_the_data() -> None:
    module = net(1)
    history = finetune(module, task(), TrainingSettings(epochs=2, batch_size=16, teacher="none"))
    assert history.steps == 2 * (64 // 16)


def test_a_metric_without_classes_takes_the_squared_error_or_the_teacher() -> None:
    x = np.random.default_rng(0).normal(size=(32, 2, 5, 5)).astype(np.float32)
    y = np.random.default_rng(1).normal(size=(32, 3)).astype(np.float32)

    def metric(outputs: Any, targets: Any) -> float:
        return -float(((outputs - targets) ** 2).mean())

    scores = task(train=[(x, y[:, 0])], validation=[(x, y[:, 0])], metric=metric)
    found = trained(settings(teacher="float"), task=scores, teacher=net(0))
    assert distance(found, net(0)) < distance(net(1), net(0))
    with pytest.raises(TaskError, match="no loss follows"):
        trained(settings(teacher="none"), task=scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hints": ("convs",)}, "hint layer 'convs' is not in the network; did you mean 'conv'"),
        ({"hints": ("conv=cnv",)}, "hint layer 'cnv' is not in the teacher"),
        ({"hints": ("conv",), "teacher": "none"}, "hints need a teacher"),
        ({"hints": ("conv=head",)}, "layers of one resolution"),
        ({"learning_rate": 10.0, "optimizer": "sgd", "steps": 200}, "lower learning_rate"),
    ],
)
def test_errors_are_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CandidateError, match=said):
        trained(settings(**changes), teacher=net(0))


def test_errors_of_the_task() -> None:
    with pytest.raises(TaskError, match="has no train data; give Task"):
        trained(settings(teacher="none"), task=task(train=None))
    with pytest.raises(TaskError, match="has no teacher; give Task"):
        trained(settings(teacher="task"))
    with pytest.raises(TaskError, match="no float network to distil from"):
        trained(settings())
    floats = [(x, y.astype(np.float32)) for x, y in batches(3)]
    with pytest.raises(TaskError, match="top1 needs class indices"):
        trained(settings(teacher="none"), task=task(train=floats))


def test_relations_do_not_see_a_rotation_or_a_scale() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32))
    turned = (
        3 * x @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    )
    assert float(relations(x, turned)) < 1e-9 < float(relations(x, x**2))
    assert copy.deepcopy(x).equal(x)
