"""What one compressed network is: a frozen, hashable value with JSON both ways.

A candidate names layers of the *original* graph. A layer that it leaves out stays float.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from autoquant.errors import CandidateError, nearest
from autoquant.training import TrainingSettings

WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
ACTIVATION_BITS = (3, 4, 6, 8, 16, 32)
GRANULARITIES = ("channel", "tensor", "block32", "block64", "block128")
ROUNDING_NAMES = ("nearest", "second-order", "adaround")
IMPORTANCES = ("l1", "l2", "batchnorm", "taylor", "hessian", "activation", "stability")
NBITS = (2, 4, 8)  # weight bits that MatMulNBits runs


def block_size(granularity: str) -> int:
    """Weights that share a scale along the inputs of a channel; 0 where a channel has one."""
    return int(granularity.removeprefix("block")) if granularity.startswith("block") else 0


def parse_sparsity(value: float | str) -> tuple[int, int] | float:
    """``"2:4"`` → (2, 4), two weights kept of every four; a share of zeros → itself.

    Raises CandidateError for what is neither.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", value)
        if found is not None and 0 < int(found[1]) < int(found[2]) <= 64:
            return int(found[1]), int(found[2])
    elif type(value) in (int, float) and 0 <= value < 1:
        return float(value)
    raise CandidateError(
        f"sparsity is {value!r}; it can be the share of zeros from 0 to <1, or a pattern in quotes "
        "such as '2:4': two weights kept of every four"
    )


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """How one layer is stored and computed.

    ``weight_bits``: 2…8 integers, 16 (float16 storage, or integers with ``int16``), 32 float.
    ``activation_bits``: of the layer's *input*: 3, 4, 6 (clipped), 8, 16, or 32 (float).
    Weights below 32 with activations at 32 are *weight-only*: small file, float kernel.
    ``granularity``: one weight scale a ``channel``, a ``tensor``, or each ``block32``,
    ``block64`` or ``block128`` inputs of a channel (the last block may be short). Kernels for
    8-bit activations have one scale a channel: blocks are for float kernels and ``nbits``.
    ``symmetric``: the input's zero point is fixed at the middle of the range.
    ``dynamic``: the input's range is taken at run time (Gemm and MatMul, 8-bit activations).
    ``nbits``: the kernel reads the packed weights, 2, 4 or 8 bits in blocks (Gemm and MatMul,
    onnxruntime's MatMulNBits): fast for few rows. It computes in float, or with
    ``activation_bits`` 8 in integers, each block of the input on a grid taken at run time.
    ``rounding``: how weights of at most 8 bits are rounded; None: as the search space says.
    ``sparsity``: share of the weights that are zero, 0 to <1, or a pattern: ``"2:4"`` keeps two
    of every four inputs of a channel. Zeros pay in ``stored_bytes``, not in the ONNX file.
    ``codebook``: the weights are one of 2^weight_bits values (2…7 bits) that k-means finds for
    the layer, on the int8 grid of each channel: the int8 kernel runs (Han et al. 2016).
    """

    weight_bits: int = 32
    activation_bits: int = 32
    granularity: str = "channel"
    symmetric: bool = False
    dynamic: bool = False
    int16: bool = False
    nbits: bool = False
    rounding: str | None = None
    sparsity: float | str = 0.0
    codebook: bool = False

    def __post_init__(self) -> None:
        pattern = parse_sparsity(self.sparsity)
        if isinstance(pattern, float):
            object.__setattr__(self, "sparsity", pattern)
        for name, valid in (
            ("weight_bits", WEIGHT_BITS),
            ("activation_bits", ACTIVATION_BITS),
            ("granularity", GRANULARITIES),
        ):
            value = getattr(self, name)
            if type(value) is not type(valid[0]) or value not in valid:
                raise CandidateError(f"{name} is {value!r}; it can be {', '.join(map(str, valid))}")
        if self.rounding is not None and self.rounding not in ROUNDING_NAMES:
            raise CandidateError(
                f"rounding is {self.rounding!r}; it can be {', '.join(ROUNDING_NAMES)}"
            )
        for name in ("symmetric", "dynamic", "int16", "nbits", "codebook"):
            if not isinstance(getattr(self, name), bool):
                raise CandidateError(f"{name} is {getattr(self, name)!r}; it can be true, false")
        if self.dynamic and (self.activation_bits != 8 or self.weight_bits > 8):
            raise CandidateError(
                f"dynamic needs activation_bits 8 and weight_bits of 8 or fewer, not "
                f"{self.activation_bits} and {self.weight_bits}"
            )
        block = block_size(self.granularity)
        if self.nbits and not (
            block and self.weight_bits in NBITS and self.activation_bits in (8, 32)
        ):
            raise CandidateError(
                f"nbits needs weight_bits 2, 4 or 8, activation_bits 8 or 32 and granularity "
                f"block32, block64 or block128, not {self.weight_bits}, {self.activation_bits} "
                f"and {self.granularity}"
            )
        if self.sparsity and self.weight_bits > 8:
            raise CandidateError(
                f"sparsity needs weight_bits of 8 or fewer, not {self.weight_bits}"
            )
        if self.codebook and (self.weight_bits > 7 or self.granularity != "channel"):
            raise CandidateError(
                f"codebook needs weight_bits 2 to 7 and granularity channel, not "
                f"{self.weight_bits} and {self.granularity}"
            )
        if block and not self.nbits and max(self.weight_bits, self.activation_bits) <= 8:
            raise CandidateError(
                f"granularity {self.granularity!r} needs activation_bits 16 or 32, or nbits: "
                f"kernels with {self.activation_bits}-bit inputs have one weight scale a channel"
            )

    @property
    def stored_bits(self) -> float:
        """About what an entropy code takes for a weight: which are zero, and what the others
        are. Weights that are not zero count as evenly spread, so it is an upper bound."""
        pattern = parse_sparsity(self.sparsity)
        if isinstance(pattern, tuple):
            kept = pattern[0] / pattern[1]
            places = math.log2(math.comb(pattern[1], pattern[0])) / pattern[1]
        else:
            kept = 1 - pattern
            places = -sum(p * math.log2(p) for p in (kept, pattern) if p)
        values = math.log2(max(1, 2**self.weight_bits - bool(pattern)))
        return min(float(self.weight_bits), places + kept * values)

    @property
    def is_float(self) -> bool:
        """Whether nothing about the layer is quantized."""
        return self.weight_bits == 32 and self.activation_bits == 32

    def to_dict(self) -> dict[str, Any]:
        """Both bit widths, and of the other fields those that differ from their defaults."""
        always = ("weight_bits", "activation_bits")
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in always or getattr(self, f.name) != f.default
        }

    @classmethod
    def from_dict(cls, value: Any, where: str = "layer") -> LayerChoice:
        """Read ``to_dict``'s form; ``{"weight_bits": 4}`` alone is weight-only.

        Raises CandidateError that names ``where`` and the field.
        """
        if not isinstance(value, Mapping):
            raise CandidateError(f"{where}: expected fields such as weight_bits, not {value!r}")
        valid = {f.name for f in fields(cls)}
        for name in value:
            if name not in valid:
                raise CandidateError(
                    f"{where}: unknown field {name!r}; {nearest(str(name), valid)}"
                )
        try:
            return cls(**value)
        except CandidateError as error:
            raise CandidateError(f"{where}: {error}") from None

    def __str__(self) -> str:
        """Short form for tables: ``4/8``, ``float``, ``4/32``, ``8/8 dynamic``."""
        if self.is_float:
            return "float"
        extra = [self.granularity] if self.granularity != "channel" else []
        flags = ("symmetric", "dynamic", "int16", "nbits", "codebook")
        extra += [name for name in flags if getattr(self, name)]
        extra += [self.rounding] if self.rounding else []
        extra += [f"sparse {self.sparsity}"] if self.sparsity else []
        return " ".join([f"{self.weight_bits}/{self.activation_bits}", *extra])


FLOAT = LayerChoice()


def is_rank(value: Any) -> bool:
    """Whether a value is a rank: a whole number above 0, ``cp:RANK`` or ``separable``."""
    if isinstance(value, str):
        kind, _, rank = value.partition(":")
        return value == "separable" or (kind == "cp" and rank.isdecimal() and int(rank) > 0)
    return type(value) is int and value > 0


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One compressed network, by layers, channel groups, ranks and training settings.

    ``layers``: layer name → LayerChoice; absent layers are float. The pieces of a factorized
    layer take its choice, or their own (``NAME.0``, ``NAME.1``, ``NAME.2``) where given.
    ``pruning``: channel group → ratio removed. ``rank``: layer → rank of its factors, a number
    (SVD, or Tucker-2 with that many channels on either side), ``"cp:RANK"`` or
    ``"separable"`` (a depthwise and a pointwise convolution). ``training``: settings or None.
    ``polish``: refitted after assembly. ``drop``: residual blocks or transformer layers left
    out. ``student``: keywords of the task's ``student`` factory, whose network takes the place
    of the task's. ``importance``: what decides which channels of a group go. Two candidates are
    equal if their keys are.
    """

    layers: Mapping[str, LayerChoice] = field(default_factory=dict)
    pruning: Mapping[str, float] = field(default_factory=dict)
    rank: Mapping[str, int | str] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    polish: bool = False
    drop: tuple[str, ...] = ()
    student: Mapping[str, Any] = field(default_factory=dict)
    importance: str = "l2"

    @property
    def key(self) -> str:
        """16 hex digits over what has an effect: float layers and empty parts do not count."""
        document = self.to_dict()
        document["layers"] = {
            n: (replace(c, rounding=None) if c.weight_bits > 8 else c).to_dict()
            for n, c in self.layers.items()
            if not c.is_float
        }
        document["pruning"] = {n: r for n, r in self.pruning.items() if r}
        if not document["pruning"]:
            document.pop("importance", None)
        if self.drop:
            document["drop"] = sorted(self.drop)
        training = TrainingSettings.from_dict(self.training)
        document["training"] = None if training.is_off else training.to_dict()
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def choice(self, layer: str) -> LayerChoice:
        """The choice of ``layer``; float where the candidate leaves it out."""
        return self.layers.get(layer, FLOAT)

    @property
    def structure(self) -> Candidate:
        """What of it decides the layers and their shapes, alone."""
        return Candidate(
            pruning={n: r for n, r in self.pruning.items() if r},
            rank=self.rank,
            drop=self.drop,
            student=self.student,
            importance=self.importance,
        )

    @property
    def is_structural(self) -> bool:
        """Whether its layers or their shapes differ from the original network's."""
        return any(self.pruning.values()) or bool(self.rank or self.drop or self.student)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of ``front.json`` and ``candidate.yaml``."""
        document: dict[str, Any] = {
            "layers": {name: choice.to_dict() for name, choice in self.layers.items()},
            "pruning": dict(self.pruning),
            "rank": dict(self.rank),
            "training": None if self.training is None else dict(self.training),
            "polish": self.polish,
        }
        if self.drop:
            document["drop"] = list(self.drop)
        if self.student:
            document["student"] = dict(self.student)
        if self.importance != "l2":
            document["importance"] = self.importance
        return document

    @classmethod
    def from_dict(cls, value: Any, where: str = "candidate") -> Candidate:
        """Read ``to_dict``'s form; every part may be left out. Raises CandidateError."""
        if not isinstance(value, Mapping):
            raise CandidateError(f"{where}: expected a mapping with 'layers', not {value!r}")
        valid = {f.name for f in fields(cls)}
        for name in value:
            if name not in valid:
                raise CandidateError(
                    f"{where}: unknown field {name!r}; {nearest(str(name), valid)}"
                )
        parts: dict[str, Mapping[Any, Any]] = {}
        for name in ("layers", "pruning", "rank", "student"):
            part = value.get(name)
            part = {} if part is None else part
            if not isinstance(part, Mapping):
                raise CandidateError(
                    f"{where}: field {name!r} must map names to values, not {part!r}"
                )
            parts[name] = part
        training = value.get("training")
        if training is not None and not isinstance(training, Mapping):
            raise CandidateError(f"{where}: field 'training' must be a mapping or null")
        try:
            TrainingSettings.from_dict(training)
        except CandidateError as error:
            raise CandidateError(f"{where}: {error}") from None
        for name, ratio in parts["pruning"].items():
            if type(ratio) not in (int, float) or not 0 <= ratio < 1:
                raise CandidateError(
                    f"{where}: pruning of {name!r} is {ratio!r}; it can be 0 to <1"
                )
        for name, rank in parts["rank"].items():
            if not is_rank(rank):
                raise CandidateError(
                    f"{where}: rank of {name!r} is {rank!r}; it can be 1 or more, 'cp:RANK' "
                    "or 'separable'"
                )
        drop = value.get("drop") or ()
        if isinstance(drop, str) or not isinstance(drop, Sequence):
            raise CandidateError(f"{where}: field 'drop' must list blocks, not {drop!r}")
        importance = value.get("importance", "l2")
        if importance not in IMPORTANCES:
            raise CandidateError(
                f"{where}: importance is {importance!r}; it can be {', '.join(IMPORTANCES)}"
            )
        polish = value.get("polish", False)
        if not isinstance(polish, bool):
            raise CandidateError(f"{where}: polish is {polish!r}; it can be true, false")
        return cls(
            layers={
                str(name): LayerChoice.from_dict(choice, f"{where}: layer {str(name)!r}")
                for name, choice in parts["layers"].items()
            },
            pruning={str(k): float(v) for k, v in parts["pruning"].items()},
            rank={str(k): v for k, v in parts["rank"].items()},
            training=None if training is None else dict(training),
            polish=polish,
            drop=tuple(map(str, drop)),
            student={str(k): v for k, v in parts["student"].items()},
            importance=importance,
        )

    @classmethod
    def read(cls, path: str | Path) -> Candidate:
        """Read a YAML or JSON file (JSON is YAML). Raises CandidateError naming the file."""
        import yaml

        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CandidateError(f"{path}: cannot be read: {error}") from None
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
            raise CandidateError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(document if document is not None else {}, where=str(path))

    def normalized(self, layers: Mapping[str, LayerChoice]) -> Candidate:
        """This candidate with ``layers`` in place of its own."""
        return replace(self, layers=dict(layers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Candidate) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)
