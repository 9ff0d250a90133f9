"""Search spaces: ``search_spaces/*.yaml`` → the choices of every layer."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from autoquant import document
from autoquant.candidate import (
    ACTIVATION_BITS,
    FLOAT,
    IMPORTANCES,
    NBITS,
    ROUNDING_NAMES,
    WEIGHT_BITS,
    LayerChoice,
    block_size,
    is_rank,
    parse_sparsity,
)
from autoquant.errors import CandidateError, SpaceError, nearest
from autoquant.training import TrainingSettings

TIES = ("residual", "attention")


class NamedLayer(Protocol):
    """What a space needs of a layer."""

    @property
    def name(self) -> str:
        """Its name in the graph."""
        ...

    @property
    def kind(self) -> str:
        """Its ONNX operator, or Product."""
        ...


def _listed_width(value: object) -> object:
    return (value,) if isinstance(value, int) else value


def _known(value: tuple[int, ...], valid: tuple[int, ...]) -> tuple[int, ...]:
    for bits in value:
        if bits not in valid:
            raise ValueError(f"{bits} is not one of {', '.join(map(str, valid))}")
    return tuple(sorted(set(value)))


WeightBits = Annotated[
    tuple[int, ...],
    BeforeValidator(_listed_width),
    AfterValidator(lambda value: _known(value, WEIGHT_BITS)),
]
ActivationBits = Annotated[
    tuple[int, ...],
    BeforeValidator(_listed_width),
    AfterValidator(lambda value: _known(value, ACTIVATION_BITS)),
]


Patterns = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


def _listed(value: object) -> object:
    return (value,) if isinstance(value, int | float | str) else value


class Rule(document.Document):
    """Choices for the layers that it matches: every pair of the two bit widths, and float.

    Products of two activations (kind ``Product``) are matched where ``kinds`` names them; of
    the rule they take ``activation_bits`` 8 and ``float``. ``granularity`` may be a list: each
    pair then comes with each. Where a kernel has no block scales, a block means ``channel``.
    ``nbits``: Gemm and MatMul with 2, 4 or 8 bits in blocks run on packed weights. With several
    names in ``rounding`` a choice of at most 8 weight bits comes once for each.

    ``sparsity``: shares of zeros (0: none) and patterns such as ``"2:4"``; each choice of at most
    8 weight bits comes with each. ``codebook_bits``: choices beside those of ``weight_bits``,
    whose weights are one of so many bits' values of a codebook.
    """

    layers: str | tuple[str, ...] = "*"
    kinds: tuple[str, ...] | None = None
    weight_bits: WeightBits = ()
    activation_bits: ActivationBits = (32,)
    float_: bool = Field(default=False, alias="float")
    granularity: tuple[str, ...] = ("channel",)
    symmetric: bool = False
    dynamic: bool = False
    int16: bool = False
    nbits: bool = False
    rounding: tuple[str, ...] = ()
    sparsity: tuple[float | str, ...] = (0.0,)
    codebook_bits: WeightBits = ()

    @field_validator("sparsity")
    @classmethod
    def _known_sparsities(cls, value: tuple[float | str, ...]) -> tuple[float | str, ...]:
        for share in value:
            try:
                parse_sparsity(share)
            except CandidateError as error:
                raise ValueError(str(error)) from None
        return tuple(dict.fromkeys(value)) or (0.0,)

    @field_validator("codebook_bits")
    @classmethod
    def _known_codebooks(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _known(value, tuple(bits for bits in WEIGHT_BITS if bits < 8))

    @field_validator("rounding")
    @classmethod
    def _known_roundings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in ROUNDING_NAMES:
                raise ValueError(f"{name!r} is not one of {', '.join(ROUNDING_NAMES)}")
        return tuple(dict.fromkeys(value))

    @field_validator("granularity", "rounding", "sparsity", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return _listed(value)

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        valid = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "Product")
        for kind in value or ():
            if kind not in valid:
                raise ValueError(f"{kind!r} is not one of {', '.join(valid)}")
        return value

    def matches(self, layer: NamedLayer) -> bool:
        """Whether the rule is about this layer (shell patterns over its name)."""
        patterns = (self.layers,) if isinstance(self.layers, str) else self.layers
        kinds = self.kinds is None and layer.kind != "Product"
        return (kinds or layer.kind in (self.kinds or ())) and any(
            fnmatchcase(layer.name, pattern) for pattern in patterns
        )

    def choices(self, kind: str) -> tuple[LayerChoice, ...]:
        """From the smallest to the largest as they are stored; float last."""
        found = []
        is_dense = kind in ("Gemm", "MatMul")
        widths = (32,) if kind == "Gather" else self.activation_bits
        weights: tuple[int, ...] = self.weight_bits
        if kind == "Product":
            weights, widths = (32,), tuple(bits for bits in widths if bits == 8)
        codebooks = () if kind in ("Gather", "Product") else self.codebook_bits
        grids = [(bits, False) for bits in weights] + [(bits, True) for bits in codebooks]
        each = product(sorted(grids), sorted(widths), self.granularity, self.sparsity)
        for (weight, codebook), activation, granularity, sparsity in each:
            if weight == activation == 32:
                continue
            if codebook and granularity != self.granularity[0]:
                continue  # its scales are those of channels
            is_int8 = weight <= 8 and activation <= 8
            block = bool(block_size(granularity))
            nbits = self.nbits and is_dense and block and weight in NBITS and activation in (8, 32)
            nbits = nbits and not codebook
            dynamic = (self.dynamic or nbits) and is_dense and is_int8 and activation == 8
            for rounding in (self.rounding if weight <= 8 else ()) or (None,):
                found.append(
                    LayerChoice(
                        weight,
                        activation,
                        granularity="channel"
                        if codebook or (block and is_int8 and not nbits)
                        else granularity,
                        symmetric=self.symmetric,
                        dynamic=dynamic,
                        int16=self.int16,
                        nbits=nbits,
                        rounding=None if codebook else rounding,
                        sparsity=sparsity if weight <= 8 else 0.0,
                        codebook=codebook,
                    )
                )
        found.sort(key=lambda choice: choice.stored_bits)
        is_float = self.float_ or (32 in self.weight_bits and 32 in self.activation_bits)
        return tuple(dict.fromkeys([*found, FLOAT] if is_float or not found else found))


class Side(document.Document):
    """Choices of some layers: those with one of these widths (empty: any)."""

    layers: str | tuple[str, ...] = "*"
    weight_bits: WeightBits = ()
    activation_bits: ActivationBits = ()

    def matches(self, layer: str, choice: LayerChoice) -> bool:
        """Whether a choice of a layer is meant (shell patterns over the name)."""
        patterns = (self.layers,) if isinstance(self.layers, str) else self.layers
        return (
            any(fnmatchcase(layer, pattern) for pattern in patterns)
            and (not self.weight_bits or choice.weight_bits in self.weight_bits)
            and (not self.activation_bits or choice.activation_bits in self.activation_bits)
        )


def _match(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _ratios(value: tuple[float, ...]) -> tuple[float, ...]:
    for ratio in value:
        if not 0 <= ratio < 1:
            raise ValueError(f"{ratio} is not a ratio from 0 to below 1")
    return tuple(sorted(set(value), reverse=True))


def _ranks(value: tuple[int | float | str, ...]) -> tuple[int | float | str, ...]:
    for rank in value:
        share = isinstance(rank, float) and 0 < rank < 1
        if not (share or is_rank(rank) or rank in ("full", "vbmf")):
            raise ValueError(
                f"{rank!r} is not a rank, a share of the full rank between 0 and 1, full, vbmf, "
                "cp:RANK or separable"
            )
    return tuple(dict.fromkeys(value))


class PruningRule(document.Document):
    """Ratios of channels that the channel groups it matches may lose; 0 keeps all."""

    groups: Patterns = ("*",)
    ratios: Annotated[tuple[float, ...], BeforeValidator(_listed), AfterValidator(_ratios)]


class RankRule(document.Document):
    """Ranks that the layers it matches may take.

    A whole number, a share of the layer's full rank, ``vbmf`` (the rank that variational Bayes
    finds), ``cp:RANK``, ``separable``, or ``full``: the layer stays as it is.
    """

    layers: Patterns = ("*",)
    ranks: Annotated[
        tuple[int | float | str, ...], BeforeValidator(_listed), AfterValidator(_ranks)
    ]


Values = Annotated[tuple[Any, ...], BeforeValidator(_listed)]


class TrainingRanges(document.Document):
    """Values that training settings (`TrainingSettings`) may take, one or several of each; a
    setting without values keeps its default. ``hints``: names of layers, held for all of them;
    ``hint_weight`` may be a choice, 0 among others.

    ``halving``: ``steps`` are no choice but a ladder. Candidates are searched untrained; then the
    better ones by all objectives train for the fewest steps, the better half of these for the
    next, and so on; of other settings the first value holds. A task without train data
    trains none.
    """

    halving: bool = False
    steps: Values = ()
    epochs: Values = ()
    batch_size: Values = ()
    optimizer: Values = ()
    learning_rate: Values = ()
    schedule: Values = ()
    weight_decay: Values = ()
    quantizer: Values = ()
    batch_norm: Values = ()
    teacher: Values = ()
    alpha: Values = ()
    temperature: Values = ()
    hints: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    hint_weight: Values = ()
    relation_weight: Values = ()
    mixup: Values = ()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name, values in self._given():
            for value in values:
                try:
                    TrainingSettings.from_dict({name: value})
                except CandidateError as error:
                    raise ValueError(str(error).removeprefix("training: ")) from None
        if any(self.steps) and any(self.epochs):
            raise ValueError("give steps or epochs, not both")
        if self.halving and not any(self.steps):
            raise ValueError("halving needs steps, such as [100, 400]")
        return self

    def _given(self) -> list[tuple[str, tuple[Any, ...]]]:
        each = {n: getattr(self, n) for n in type(self).model_fields if n != "halving"}
        if self.hints:
            each["hints"] = (self.hints,)  # one value
        return [(name, values) for name, values in each.items() if values]

    def dimensions(self) -> dict[str, tuple[Any, ...]]:
        """``train:SETTING`` → its values; nothing where no step is offered."""
        if self.halving or (not any(self.steps) and not any(self.epochs)):
            return {}
        return {f"train:{n}": tuple(dict.fromkeys(values)) for n, values in self._given()}

    def ladder(self) -> list[dict[str, Any]]:
        """The settings of each rung, the shortest first; none without ``halving``."""
        rest = {n: values[0] for n, values in self._given() if n not in ("steps", "epochs")}
        steps = sorted({n for n in self.steps if n}) if self.halving else []
        return [{**rest, "steps": n} for n in steps]


class Space(document.Document):
    """What a search may choose: for each layer the last rule that matches it decides.

    A layer that no rule matches stays float. ``equalize`` and ``smooth`` (its alpha, 0 to 1)
    rescale the float network before it is calibrated; its outputs stay. ``tie``: groups of layers
    that take the same choice: ``residual`` (layers whose outputs meet in an Add), ``attention``
    (products that read one tensor) or lists of patterns. ``forbid``: pairs of choices that exclude
    each other. ``pruning`` and ``rank``: as with ``rules``, the last that matches a channel group
    or a layer decides. ``drop``: patterns of residual blocks and transformer layers that may be
    left out. ``student``: values of the keywords of the task's ``student`` factory; null for the
    network itself. ``importance``: what decides which channels go, one or several to choose from.
    """

    name: str = ""
    description: str = ""
    calibration: Literal["minmax", "percentile", "mse", "entropy", "downstream"] = "mse"
    rounding: Literal["nearest", "second-order", "adaround"] = "second-order"
    equalize: bool = False
    smooth: float | None = Field(default=None, ge=0, le=1)
    rules: tuple[Rule, ...] = Field(min_length=1)
    tie: tuple[str | tuple[str, ...], ...] = ()
    forbid: tuple[tuple[Side, Side], ...] = ()
    pruning: tuple[PruningRule, ...] = ()
    rank: tuple[RankRule, ...] = ()
    drop: Patterns = ()
    student: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    importance: Patterns = ("l2",)
    training: TrainingRanges = TrainingRanges()

    @field_validator("importance")
    @classmethod
    def _known_importances(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in IMPORTANCES:
                raise ValueError(f"{name!r} is not one of {', '.join(IMPORTANCES)}")
        return tuple(dict.fromkeys(value))

    @property
    def is_structural(self) -> bool:
        """Whether it offers other layers or shapes than the network's."""
        return bool(self.pruning or self.rank or self.drop or self.student)

    def ratios(self, groups: Iterable[str]) -> dict[str, tuple[float, ...]]:
        """Channel group → ratios it may lose, the most first. Raises SpaceError."""
        return {
            name: rule.ratios
            for name, rule in self._matched("pruning", self.pruning, "groups", groups).items()
        }

    def ranks(self, layers: Iterable[str]) -> dict[str, tuple[int | float | str, ...]]:
        """Layer → ranks it may take, as they are written. Raises SpaceError."""
        return {
            name: rule.ranks
            for name, rule in self._matched("rank", self.rank, "layers", layers).items()
        }

    def dropped(self, blocks: Iterable[str]) -> list[str]:
        """Blocks that may be left out. Raises SpaceError for a pattern without a block."""
        blocks = list(blocks)
        for pattern in self.drop:
            if not any(fnmatchcase(b, pattern) for b in blocks):
                raise SpaceError(f"space {self.name!r}: drop: {_unmatched(pattern, blocks)}")
        return [b for b in blocks if _match(b, self.drop)]

    def _matched(
        self, field: str, rules: Iterable[Any], key: str, names: Iterable[str]
    ) -> dict[str, Any]:
        """Name → the last rule that matches it. Raises SpaceError for a pattern without any."""
        names = list(names)
        found = {}
        for index, rule in enumerate(rules, 1):
            for pattern in getattr(rule, key):
                matched = [n for n in names if fnmatchcase(n, pattern)]
                if not matched:
                    raise SpaceError(
                        f"space {self.name!r}: {field}: rule {index}: {_unmatched(pattern, names)}"
                    )
                found.update(dict.fromkeys(matched, rule))
        return {name: found[name] for name in names if name in found}

    @field_validator("tie")
    @classmethod
    def _known_ties(
        cls, value: tuple[str | tuple[str, ...], ...]
    ) -> tuple[str | tuple[str, ...], ...]:
        for item in value:
            if isinstance(item, str) and item not in TIES:
                raise ValueError(f"{item!r} is not one of {', '.join(TIES)} or a list of patterns")
        return value

    def choices(self, layers: Iterable[NamedLayer]) -> dict[str, tuple[LayerChoice, ...]]:
        """Layer name → its choices in order. Raises SpaceError for a pattern without a layer."""
        layers = list(layers)
        result: dict[str, tuple[LayerChoice, ...]] = {}
        used: set[int] = set()
        for layer in layers:
            found: tuple[LayerChoice, ...] = (FLOAT,)
            for index, rule in enumerate(self.rules):
                if rule.matches(layer):
                    used.add(index)
                    try:
                        found = rule.choices(layer.kind)
                    except CandidateError as error:
                        raise SpaceError(
                            f"space {self.name!r}: rule {index + 1}: {error}"
                        ) from None
            result[layer.name] = found
        for index, rule in enumerate(self.rules):
            if index not in used and rule.kinds is None:
                raise SpaceError(
                    f"space {self.name!r}: rule {index + 1} (layers: {rule.layers}) matches no "
                    f"layer; there is: {', '.join(layer.name for layer in layers[:8])}"
                    + (", …" if len(layers) > 8 else "")
                )
        return result


def _unmatched(pattern: str, names: list[str]) -> str:
    return f"{pattern!r} matches none; {nearest(pattern, names)}"


def load_space(name: str | Path | Space) -> Space:
    """Read a space by built-in name or path. Raises SpaceError."""
    if isinstance(name, Space):
        return name
    path = document.find(str(name), "search_spaces", "space", SpaceError)
    space = document.read(path, Space, SpaceError)
    return space.model_copy(update={"name": space.name or path.stem})
