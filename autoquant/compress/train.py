"""The training loop: distillation losses, optimizer, schedule, checkpoints; and fine-tuning.

What is trained is a `Network`: a torch module (`finetune`), or a graph with the quantizers of its
artifact (`autoquant.compress.qat`). The result follows from the network, the data and the settings
alone; sums run on one thread, since their order decides about the last bits.

A checkpoint lies where the schedule first depends on the number of steps: a run that finds one
of the same network and settings goes on from there and ends where it would have without.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from autoquant.cache import write_atomically
from autoquant.compress.blocks import Block, Quantize, Unsupported, run_block
from autoquant.errors import CandidateError, ModelError, TaskError, nearest
from autoquant.graph import Graph
from autoquant.task import Array, Task
from autoquant.training import TrainingSettings

if TYPE_CHECKING:
    import torch

THREADS = 1
AVERAGE = 0.99  # of the running average that teaches a network itself, a step
_WORSE = 100  # times the first loss, or 1 where that was less: that far up, it has diverged
_CHECKED = 20  # steps between looks at the loss

Say = Callable[[str], None]
Adjust = Callable[[int, int, Mapping[str, Any]], None]
Targets = Sequence[tuple[float, Any]]  # of a minibatch, with their shares of the loss


class Network(Protocol):
    """What the loop trains, or asks as a teacher."""

    def __call__(self, inputs: tuple[Any, ...], taps: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """First output, and the outputs of the layers ``taps``."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: ``params``, ``unit`` (of the learning rate), ``decays``."""
        ...

    def weights(self) -> dict[str, Any]:
        """Layer → its weight as it is trained, which an `Adjust` may change in place."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors by name, not copied: all that training changes."""
        ...

    def layers(self) -> list[str]:
        """Names that can be taps."""
        ...

    def prepare(self, training: bool) -> None:
        """Before the first and after the last step."""
        ...


class ModuleNetwork:
    """A torch module; taps are the outputs of submodules."""

    def __init__(self, module: torch.nn.Module, batch_norm: str = "frozen") -> None:
        self.module, self.batch_norm = module, batch_norm

    def __call__(self, inputs: tuple[Any, ...], taps: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """See `Network`."""
        found: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                found[name] = output

            return hook

        named = dict(self.module.named_modules())
        handles = [named[name].register_forward_hook(keep(name)) for name in taps]
        try:
            output = self.module(*inputs)
        finally:
            for handle in handles:
                handle.remove()
        return (output if hasattr(output, "shape") else first(output)), found

    def groups(self) -> list[dict[str, Any]]:
        """Weights decay; biases and scales of norms do not."""
        trained = [p for p in self.module.parameters() if p.requires_grad]
        parts = [[p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]]
        return [{"params": p, "unit": 1.0, "decays": i == 0} for i, p in enumerate(parts) if p]

    def weights(self) -> dict[str, Any]:
        """See `Network`."""
        return {
            name: module.weight
            for name, module in self.module.named_modules()
            if hasattr(module, "weight") and getattr(module.weight, "ndim", 0) > 1
        }

    def state(self) -> dict[str, Any]:
        """See `Network`."""
        return dict(self.module.state_dict())

    def layers(self) -> list[str]:
        """See `Network`."""
        return [name for name, _ in self.module.named_modules() if name]

    def prepare(self, training: bool) -> None:
        """See `Network`."""
        import torch

        self.module.train(training)
        if self.batch_norm == "frozen":
            for module in self.module.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()


class GraphNetwork:
    """A float graph as torch runs it, a `Network` without anything to train; taps are layers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        nodes = tuple(range(len(graph.nodes)))
        self.whole = Block("", graph.outputs[0], nodes, graph.layers)

    def run(
        self,
        inputs: tuple[Any, ...],
        taps: Sequence[str],
        weights: Mapping[str, Any] | None = None,
        biases: Mapping[str, Any] | None = None,
        quantize: Quantize | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """First output and taps. Raises ModelError for an operator that torch has no form of."""
        feeds = dict(zip(self.graph.inputs, inputs, strict=True))
        kept = {self.graph.by_name[name].output: None for name in taps}
        try:
            output = run_block(self.graph, self.whole, feeds, weights, biases, quantize, kept)
        except Unsupported as error:
            raise ModelError(f"training: no torch form of {error}; leave training out") from None
        return output, {name: kept[self.graph.by_name[name].output] for name in taps}

    def __call__(self, inputs: tuple[Any, ...], taps: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """See `Network`."""
        return self.run(inputs, taps)

    def groups(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def weights(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state(self) -> dict[str, Any]:
        """Nothing but what tells the network from others."""
        import torch

        return {"fingerprint": torch.tensor(int(self.graph.fingerprint[:12], 16))}

    def layers(self) -> list[str]:
        """Layers of the graph."""
        return [layer.name for layer in self.graph.layers]

    def prepare(self, training: bool) -> None:
        """Nothing to do."""


def first(outputs: Any) -> Any:
    """The first of several outputs."""
    return next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs[0]


@dataclass(slots=True)
class History:
    """What training said: the loss at every so many steps, as (step, loss)."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    resumed: int = 0


def finetune(
    module: torch.nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    teacher: torch.nn.Module | Network | None = None,
    adjust: Adjust | None = None,
    checkpoints: Path | None = None,
) -> History:
    """Train a float module in place, as ``settings`` say; it is left in eval mode.

    ``teacher``: what ``settings.teacher`` ``float`` or ``task`` stand for (``Task.teacher``
    where the settings say ``task`` and none is given). ``adjust(step, steps, weights)`` is
    called before every step and after the last, with the weights by layer, and may change them
    in place: masks of pruned weights. ``checkpoints``: a folder. Raises CandidateError,
    TaskError.
    """
    taught = ModuleNetwork(module, settings.batch_norm)
    found = teacher_of(task, settings, teacher)
    if settings.teacher == "mutual":
        import copy

        peer = ModuleNetwork(copy.deepcopy(module), settings.batch_norm)
        return fit([taught, peer], found, task, settings, adjust, checkpoints)
    return fit([taught], found, task, settings, adjust, checkpoints)


def teacher_of(
    task: Task, settings: TrainingSettings, given: torch.nn.Module | Network | None
) -> Network | None:
    """The fixed network that the settings distil from; None where they name none.

    Raises TaskError where it is missing.
    """
    import torch

    if settings.teacher not in ("float", "task"):
        return None
    if settings.teacher == "task":
        if task.teacher is None:
            raise TaskError(
                f"task {task.name!r} has no teacher; give Task(…, teacher=…), or training: "
                "teacher float"
            )
        if not isinstance(task.teacher, torch.nn.Module):
            return GraphNetwork(Graph.read(task.teacher, task.example_inputs))
        given = task.teacher
    if given is None:
        raise TaskError(f"task {task.name!r}: training has no float network to distil from")
    return ModuleNetwork(given) if isinstance(given, torch.nn.Module) else given


def fit(
    networks: Sequence[Network],
    teacher: Network | None,
    task: Task,
    settings: TrainingSettings,
    adjust: Adjust | None = None,
    checkpoints: Path | None = None,
) -> History:
    """Train networks in place, two where they teach each other. Raises CandidateError where
    the loss diverges or a hint layer does not exist, TaskError for the data."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.enable_grad():
            return _Loop(networks, teacher, task, settings, adjust, checkpoints).run()
    finally:
        torch.set_num_threads(before)


class _Loop:
    def __init__(
        self,
        networks: Sequence[Network],
        teacher: Network | None,
        task: Task,
        settings: TrainingSettings,
        adjust: Adjust | None,
        checkpoints: Path | None,
    ) -> None:
        import torch

        self.networks, self.teacher, self.task, self.settings = networks, teacher, task, settings
        self.adjust, self.checkpoints = adjust, checkpoints
        self.data = _Data(task, settings)
        self.steps = settings.steps or math.ceil(settings.epochs * self.data.minibatches())
        self.average = None
        if settings.teacher == "self":
            self.average = {n: t.detach().clone() for n, t in networks[0].state().items()}
        self.hints = self._hints()
        self.projections = self._projections() if self.hints else {}
        self.groups = [
            {**group, "params": list(group["params"])}
            for network in networks
            for group in network.groups()
        ]
        if self.projections:
            matrices = list(self.projections.values())
            self.groups.append({"params": matrices, "unit": 1.0, "decays": False})
        self.optimizer = self._optimizer()
        self.half = torch.cpu._is_amx_tile_supported()  # bfloat16 products twice as fast

    def _hints(self) -> list[tuple[str, str]]:
        """(layer, teacher's layer) of each hint. Raises CandidateError."""
        settings = self.settings
        if not settings.hints or not settings.hint_weight:
            return []
        if not self.has_teacher:
            raise CandidateError(
                f"training: hints need a teacher; {settings.teacher!r} has no layers to follow"
            )
        found = []
        for hint in settings.hints:
            own, _, other = hint.partition("=")
            sides: list[tuple[str, str, Network]] = [("the network", own, self.networks[0])]
            if self.teacher is not None:
                sides.append(("the teacher", other or own, self.teacher))
            for whose, name, side in sides:
                if name not in side.layers():
                    near = nearest(name, side.layers())
                    raise CandidateError(f"training: hint layer {name!r} is not in {whose}; {near}")
            found.append((own, other or own))
        return found

    def _projections(self) -> dict[str, Any]:
        """One matrix a hint, from the layer's channels to the teacher's; near the identity."""
        import torch

        inputs, _ = next(self.data.epoch(0))
        with torch.no_grad():
            own = self.networks[0](inputs, [a for a, _ in self.hints])[1]
            other = self._taught(inputs)[1]
        generator = torch.Generator().manual_seed(self.settings.seed)
        found = {}
        for a, b in self.hints:
            x, y = own[a], other[b]
            if x.ndim != y.ndim or (x.shape[2:] != y.shape[2:] and x.ndim == 4):
                raise CandidateError(
                    f"training: hint {a!r} has the shape {list(x.shape[1:])}, its teacher's layer "
                    f"{b!r} {list(y.shape[1:])}; give layers of one resolution"
                )
            axis = 1 if x.ndim == 4 else -1
            rows, columns = y.shape[axis], x.shape[axis]
            matrix = torch.eye(rows, columns)
            if rows != columns:
                noise = torch.randn(rows, columns, generator=generator)
                matrix = noise / columns**0.5
            found[a] = matrix.requires_grad_()
        return found

    def _optimizer(self) -> Any:
        import torch

        settings = self.settings
        groups = [
            {
                "params": g["params"],
                "peak": settings.learning_rate * g["unit"],
                "lr": settings.learning_rate * g["unit"],
                "weight_decay": settings.weight_decay if g["decays"] else 0.0,
            }
            for g in self.groups
        ]
        if settings.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        return kind(groups)

    def run(self) -> History:
        """All steps; continues where a checkpoint allows it."""
        import torch

        settings, history = self.settings, History()
        stem = settings.stem(self.steps)
        key = self._key() if self.checkpoints is not None else ""
        step = self._resume(key, stem)
        history.resumed = step
        for network in self.networks:
            network.prepare(True)
        start: float | None = None
        for inputs, targets in self.data.after(step, self.steps):
            if step == stem and step > history.resumed:
                self._save(key, step)
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * settings.rate(step, self.steps)
            self._adjust(step)
            inputs, targets = self._mixed(step, inputs, targets)
            with self._cast():
                taught = self._taught(inputs) if self.has_teacher else None
            with self._cast():  # of its own: weights that were cast are kept in it
                loss = self._loss(inputs, targets, taught)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.average is not None:
                self._follow()
            if step % _CHECKED == 0 or step == self.steps - 1:
                value = float(loss.detach())
                start = value if start is None else start
                if not math.isfinite(value) or value > _WORSE * max(abs(start), 1.0):
                    raise CandidateError(
                        f"training: the loss is {value:.3g} at step {step}, it began with "
                        f"{start:.3g}; lower learning_rate ({settings.learning_rate:g})"
                    )
                history.losses.append((step, value))
            step += 1
        if step == stem and step > history.resumed:
            self._save(key, step)
        self._adjust(step)
        for network in self.networks:
            network.prepare(False)
            for name, tensor in network.state().items():
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise CandidateError(
                        f"training: {name!r} is not finite after {step} steps; lower "
                        f"learning_rate ({settings.learning_rate:g})"
                    )
        history.steps = step
        return history

    def _cast(self) -> Any:
        import torch

        return torch.autocast("cpu", torch.bfloat16, enabled=self.half)

    @property
    def has_teacher(self) -> bool:
        """Whether a network that does not learn by gradients gives responses."""
        return self.teacher is not None or self.average is not None

    def _adjust(self, step: int) -> None:
        import torch

        if self.adjust is not None:
            with torch.no_grad():
                self.adjust(step, self.steps, self.networks[0].weights())

    def _mixed(self, step: int, inputs: tuple[Any, ...], targets: Any) -> tuple[Any, Targets]:
        """The minibatch plus itself in another order, as ``mixup`` says. Raises CandidateError."""
        import torch

        if not self.settings.mixup:
            return inputs, [(1.0, targets)]
        generator = np.random.default_rng((self.settings.seed, step))
        share = float(generator.beta(self.settings.mixup, self.settings.mixup))
        order = torch.from_numpy(generator.permutation(len(targets)))
        made = []
        for x in inputs:
            if not x.is_floating_point():
                raise CandidateError(
                    f"training: mixup adds inputs, which are {x.dtype} here; leave mixup out"
                )
            other = x.unflatten(0, (len(targets), -1))[order].flatten(0, 1)
            made.append(x * share + other * (1 - share))
        return tuple(made), [(share, targets), (1 - share, targets[order])]

    # losses

    def _taught(self, inputs: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
        """The teacher's output and hint layers."""
        import torch

        taps = [b for _, b in self.hints]
        with torch.no_grad():
            if self.teacher is not None:
                return self.teacher(inputs, taps)
            assert self.average is not None
            with _swapped(self.networks[0].state(), self.average):
                return self.networks[0](inputs, taps)

    def _loss(
        self, inputs: tuple[Any, ...], targets: Targets, taught: tuple[Any, dict[str, Any]] | None
    ) -> Any:
        settings = self.settings
        taps = [a for a, _ in self.hints]
        made = [network(inputs, taps) for network in self.networks]
        outputs = [output.float() for output, _ in made]
        if len(outputs) > 1:
            pairs = [(outputs[0], outputs[1].detach()), (outputs[1], outputs[0].detach())]
        elif taught is None:
            return self._of_targets(outputs[0], targets, 1.0)
        else:
            pairs = [(outputs[0], taught[0].float())]
        total: Any = 0.0
        for output, other in pairs:
            alpha = settings.alpha if self._has_loss(output, targets) else 1.0
            if alpha < 1:
                total = total + self._of_targets(output, targets, 1 - alpha)
            if alpha:
                total = total + alpha * responses(
                    output, other, settings.temperature, self.task.metric == "top1"
                )
            if settings.relation_weight:
                total = total + settings.relation_weight * relations(output, other)
        for own, name in self.hints:
            projected = _projected(made[0][1][own].float(), self.projections[own])
            assert taught is not None
            wanted = taught[1][name].float()
            unit = wanted.var().clamp_min(1e-12)
            total = total + settings.hint_weight * ((projected - wanted) ** 2).mean() / unit
        return total

    def _has_loss(self, output: Any, targets: Targets) -> bool:
        """Whether targets say how good outputs are."""
        given = self.task.loss is not None or self.task.metric == "top1"
        return given or output.shape == targets[0][1].shape

    def _of_targets(self, output: Any, targets: Targets, share: float) -> Any:
        return sum(share * part * self._of(output, target) for part, target in targets)

    def _of(self, output: Any, target: Any) -> Any:
        from torch.nn import functional

        if self.task.loss is not None:
            return self.task.loss(output, target)
        if self.task.metric == "top1":
            return functional.cross_entropy(output, target.long())
        if output.shape == target.shape:
            return functional.mse_loss(output, target.to(output.dtype))
        raise TaskError(
            f"task {self.task.name!r}: no loss follows from its targets; give Task(…, loss=…), or "
            "train with a teacher"
        )

    def _follow(self) -> None:
        import torch

        assert self.average is not None
        with torch.no_grad():
            for name, tensor in self.networks[0].state().items():
                if tensor.is_floating_point():
                    self.average[name].lerp_(tensor, 1 - AVERAGE)
                else:
                    self.average[name].copy_(tensor)

    # checkpoints

    def _key(self) -> str:
        """Hash of all that the steps before the stem follow from, but the data."""
        rest = {k: v for k, v in self.settings.to_dict().items() if k not in ("steps", "epochs")}
        shown = sorted(rest.items())
        digest = hashlib.sha256(repr((self.task.name, shown, self.half)).encode())
        for network in (*self.networks, *([self.teacher] if self.teacher else [])):
            for name, tensor in sorted(network.state().items()):
                digest.update(name.encode() + b"\0")
                digest.update(np.ascontiguousarray(tensor.detach().numpy()).tobytes())
        return digest.hexdigest()[:16]

    def _save(self, key: str, step: int) -> None:
        import torch

        if self.checkpoints is None:
            return
        content = {
            "networks": [n.state() for n in self.networks],
            "projections": self.projections,
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        path = self.checkpoints / f"{key}-{step}.pt"
        with contextlib.suppress(OSError):  # what is not saved is trained again
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: torch.save(content, file))

    def _resume(self, key: str, stem: int) -> int:
        """The step of the last checkpoint that this run would have passed; 0 without any."""
        import torch

        if self.checkpoints is None:
            return 0
        found = {int(p.stem.rpartition("-")[2]): p for p in self.checkpoints.glob(f"{key}-*.pt")}
        for step in sorted((s for s in found if 0 < s <= stem), reverse=True):
            try:
                content = torch.load(found[step], weights_only=True)
                with torch.no_grad():
                    for network, state in zip(self.networks, content["networks"], strict=True):
                        _copy(network.state(), state)
                    _copy(self.projections, content["projections"])
                    if self.average is not None:
                        _copy(self.average, content["average"])
                self.optimizer.load_state_dict(content["optimizer"])
                return step
            except (OSError, RuntimeError, ValueError, KeyError, EOFError):
                continue  # damaged
        return 0


def responses(output: Any, teacher: Any, temperature: float, classes: bool) -> Any:
    """How far outputs are from a teacher's: T² KL of the softened classes (Hinton et al. 2015),
    or the squared error in units of the teacher's variance."""
    from torch.nn import functional

    if not classes:
        return ((output - teacher) ** 2).mean() / teacher.var().clamp_min(1e-12)
    return temperature**2 * functional.kl_div(
        functional.log_softmax(output / temperature, 1),
        functional.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )


def relations(output: Any, teacher: Any) -> Any:
    """Difference between the distances of all pairs of samples, each in units of its mean
    (Park et al. 2019, distance-wise)."""
    import torch
    from torch.nn import functional

    def distances(x: Any) -> Any:
        flat = x.flatten(1)
        rows, columns = torch.triu_indices(len(flat), len(flat), 1)
        found = ((flat[rows] - flat[columns]) ** 2).sum(1).clamp_min(1e-12).sqrt()
        return found / found.mean().clamp_min(1e-12)

    if len(output) < 2:
        return output.sum() * 0.0
    return functional.smooth_l1_loss(distances(output), distances(teacher))


def _projected(x: Any, matrix: Any) -> Any:
    import torch

    if x.ndim == 4:
        return torch.einsum("oc,nchw->nohw", matrix, x)
    return x @ matrix.T


@contextlib.contextmanager
def _swapped(state: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[None]:
    """A network with other values for the moment."""
    before = {name: tensor.detach().clone() for name, tensor in state.items()}
    _copy(state, other)
    try:
        yield
    finally:
        _copy(state, before)


def _copy(state: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(values[name])


class _Data:
    """Minibatches of a task's training data, by epoch.

    Data without ``epoch`` is read once; where its batches have one shape, samples are shuffled,
    else batches.
    """

    def __init__(self, task: Task, settings: TrainingSettings) -> None:
        self.task, self.settings = task, settings
        self.split = None
        if task.train is None or not hasattr(task.train, "epoch"):
            self.split = task.split("train")
        first = next(self._batches(0), None)
        if first is None:
            raise TaskError(f"task {task.name!r}: train is empty")
        if task.metric == "top1" and task.loss is None and first[1].dtype.kind not in "iu":
            raise TaskError(
                f"task {task.name!r}: train: targets are {first[1].dtype}; top1 needs class indices"
            )

    def _batches(self, epoch: int) -> Iterator[tuple[tuple[Array, ...], Array]]:
        """Batches of the task's own size, shuffled."""
        if self.split is None:
            yield from self.task.epoch(epoch)
            return
        split, targets = self.split, self.split.targets
        assert targets is not None
        generator = np.random.default_rng((self.settings.seed, epoch))
        shapes = {tuple(a.shape[1:] for a in batch) for batch in split.batches}
        rows = sum(len(b[0]) for b in split.batches) // len(targets)  # inputs of a target
        if len(shapes) == 1:
            joined = [np.concatenate(parts) for parts in zip(*split.batches, strict=True)]
            order = generator.permutation(len(targets))
            for start in range(0, len(order), self.settings.batch_size):
                part = order[start : start + self.settings.batch_size]
                picked = (part[:, None] * rows + np.arange(rows)).reshape(-1)
                yield tuple(a[picked] for a in joined), targets[part]
            return
        starts = np.cumsum([0, *(len(b[0]) // rows for b in split.batches)])
        for index in generator.permutation(len(split.batches)):
            batch = split.batches[index]
            yield batch, targets[starts[index] : starts[index + 1]]

    def epoch(self, number: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Minibatches of at most ``batch_size`` targets as tensors; a short rest is left out
        where there are whole ones."""

        size, whole = self.settings.batch_size, 0
        held: list[tuple[tuple[Array, ...], Array]] = []
        count = 0
        for inputs, targets in self._batches(number):
            shape = tuple(a.shape[1:] for a in inputs)
            if held and tuple(a.shape[1:] for a in held[0][0]) != shape:
                yield _tensors(held)
                held, count, whole = [], 0, whole + 1
            held.append((inputs, targets))
            count += len(targets)
            while count >= size:
                taken, held = _cut(held, size)
                count -= size
                whole += 1
                yield _tensors(taken)
        if held and not whole:
            yield _tensors(held)

    def minibatches(self) -> int:
        """How many an epoch has."""
        return sum(1 for _ in self.epoch(0))

    def after(self, step: int, steps: int) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """The minibatches of the steps from ``step`` to ``steps``, over as many epochs."""
        seen = epoch = 0
        while seen < steps:
            before = seen
            for item in self.epoch(epoch):
                if seen >= steps:
                    return
                if seen >= step:
                    yield item
                seen += 1
            if seen == before:
                raise TaskError(f"task {self.task.name!r}: train epoch {epoch} is empty")
            epoch += 1


def _cut(
    held: list[tuple[tuple[Array, ...], Array]], size: int
) -> tuple[list[tuple[tuple[Array, ...], Array]], list[tuple[tuple[Array, ...], Array]]]:
    """The first ``size`` targets of some batches with their inputs, and the rest."""
    taken, left = [], []
    for inputs, targets in held:
        count = min(size, len(targets))
        rows = len(inputs[0]) // len(targets)
        if count:
            taken.append((tuple(a[: count * rows] for a in inputs), targets[:count]))
        if count < len(targets):
            left.append((tuple(a[count * rows :] for a in inputs), targets[count:]))
        size -= count
    return taken, left


def _tensors(held: list[tuple[tuple[Array, ...], Array]]) -> tuple[tuple[Any, ...], Any]:
    import torch

    inputs = [
        torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))
        for parts in zip(*(i for i, _ in held), strict=True)
    ]
    targets = torch.from_numpy(np.concatenate([t for _, t in held]))
    dense = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs]
    return tuple(dense), targets
