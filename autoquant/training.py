"""What training in a trial can be told: `TrainingSettings`, part of a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from autoquant.errors import CandidateError, nearest

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cooldown", "cosine", "step", "constant")
TEACHERS = ("float", "task", "self", "mutual", "none")
QUANTIZERS = ("lsq", "ste")
BATCH_NORMS = ("frozen", "live")
COOLDOWN = 0.4  # share of the steps in which ``cooldown`` goes to zero

_NAMES: dict[str, tuple[str, ...]] = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "teacher": TEACHERS,
    "quantizer": QUANTIZERS,
    "batch_norm": BATCH_NORMS,
}
_RANGES: dict[str, tuple[float, float]] = {  # lowest and highest value, both allowed
    "steps": (0, 10_000_000),
    "epochs": (0, 10_000),
    "batch_size": (1, 65_536),
    "learning_rate": (1e-8, 10),
    "weight_decay": (0, 1),
    "temperature": (0.1, 100),
    "alpha": (0, 1),
    "hint_weight": (0, 1e6),
    "relation_weight": (0, 1e6),
    "mixup": (0, 100),
    "seed": (0, 2**31 - 1),
}
_WHOLE = ("steps", "batch_size", "seed")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How a compressed network is trained.

    ``steps``: optimizer steps, or ``epochs``: passes over the training data; both 0: none.
    ``learning_rate``: the highest, in units of a weight's own size for quantization-aware
    training. ``schedule``: ``cooldown`` (constant, then linear to zero in the last two fifths;
    a longer run continues a shorter one), ``cosine``, ``step`` (a tenth at 60 %, a hundredth
    at 85 %), ``constant``.
    ``quantizer``: ``lsq`` learns the step sizes of weights and activations (Esser et al.
    2020), ``ste`` keeps them (Bengio et al. 2013). ``batch_norm``: ``frozen`` is folded into the
    weights that train; ``live`` gives the convolutions of a candidate whose layers are all
    float their normalization back, by the batches that it trains on, and folds it afterwards.
    ``teacher``: the ``float`` network, the one that the ``task`` names, the running average of
    the network in training (``self``, Tarvainen & Valpola 2017), a second network that learns
    beside it (``mutual``, Zhang et al. 2018: its own form at 8 bits, or float where it is
    that), or ``none``. ``alpha``: share of the teacher's responses, softened by
    ``temperature``, in the loss; the rest is the targets' (Hinton et al. 2015). ``hints``:
    layers whose outputs follow the teacher's through a learned projection (Romero et al.
    2015), ``NAME`` or ``NAME=TEACHER'S NAME``, with ``hint_weight``. ``relation_weight``: of
    the distances between the outputs of a batch's samples (Park et al. 2019). ``mixup``: above
    0, a network learns from sums of two samples, in shares drawn anew for each minibatch from
    Beta(mixup, mixup) (Zhang et al. 2018): with a teacher, data that it was not trained on
    (Beyer et al. 2022).
    """

    steps: int = 0
    epochs: float = 0.0
    batch_size: int = 64
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "cooldown"
    weight_decay: float = 0.0
    quantizer: str = "lsq"
    batch_norm: str = "frozen"
    teacher: str = "float"
    alpha: float = 0.9
    temperature: float = 4.0
    hints: tuple[str, ...] = ()
    hint_weight: float = 1.0
    relation_weight: float = 0.0
    mixup: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, valid in _NAMES.items():
            if getattr(self, name) not in valid:
                raise CandidateError(
                    f"training: {name} is {getattr(self, name)!r}; it can be {', '.join(valid)}"
                )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            whole = name in _WHOLE
            kinds = (int,) if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "a whole number" if whole else "a number"
                raise CandidateError(
                    f"training: {name} is {value!r}; it can be {what} from {low:g} to {high:g}"
                )
        if self.steps and self.epochs:
            raise CandidateError("training: give steps or epochs, not both")
        hints = (self.hints,) if isinstance(self.hints, str) else self.hints
        if not isinstance(hints, (tuple, list)) or not all(isinstance(h, str) for h in hints):
            raise CandidateError(f"training: hints is {self.hints!r}; it can be names of layers")
        object.__setattr__(self, "hints", tuple(hints))

    @property
    def is_off(self) -> bool:
        """Whether it trains nothing."""
        return not self.steps and not self.epochs

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, so that two spellings are one."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {f.name: found[f.name] for f in fields(self) if found[f.name] != f.default}
        if "hints" in found:
            found["hints"] = list(self.hints)
        return found

    @classmethod
    def from_dict(cls, value: Mapping[str, Any] | None) -> TrainingSettings:
        """Read ``to_dict``'s form. Raises CandidateError."""
        valid = {f.name for f in fields(cls)}
        for name in value or {}:
            if name not in valid:
                raise CandidateError(
                    f"training: unknown setting {name!r}; {nearest(str(name), valid)}"
                )
        return cls(**dict(value or {}))

    def rate(self, step: int, steps: int) -> float:
        """The share of ``learning_rate`` at a step of so many."""
        import math

        done = step / max(1, steps)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "step":
            return 1.0 if done < 0.6 else 0.1 if done < 0.85 else 0.01
        if self.schedule == "cooldown":
            stem = self.stem(steps)
            return 1.0 if step < stem else (steps - step) / (steps - stem)
        return 1.0

    def stem(self, steps: int) -> int:
        """The step up to which the schedule does not depend on how many there are: there a
        longer run continues a shorter one."""
        share = {"constant": 1.0, "cooldown": 1 - COOLDOWN, "step": 0.6, "cosine": 0.0}
        return int(steps * share[self.schedule])
