"""The dimensions of a study and the candidates that they span.

A layer's choice goes by the layer's bare name, everything else by its kind: ``prune:GROUP``
(ratio), ``rank:LAYER`` (None: as it is), ``drop:BLOCK``, ``student:KEYWORD``, ``train:SETTING``
and ``importance``. Options are in order, the most compressed first, so the last of each leaves the
network as it is where the space offers that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoquant.candidate import FLOAT, Candidate, LayerChoice
from autoquant.compress.channels import Channels
from autoquant.compress.factorize import can_factorize, concrete
from autoquant.compress.prune import offered
from autoquant.compress.structure import droppable
from autoquant.errors import CandidateError, SpaceError
from autoquant.graph import Graph
from autoquant.hardware import Hardware
from autoquant.space import Space

KINDS = ("prune", "rank", "drop", "student", "train")
IMPORTANCE = "importance"
Options = Mapping[str, tuple[Any, ...]]  # dimension → its options, in order


def structural_options(space: Space, graph: Graph, hardware: Hardware) -> Options:
    """What a space offers beside bits, by dimension. Raises SpaceError: a pattern that matches
    nothing, a rank that a layer cannot have."""
    found: dict[str, tuple[Any, ...]] = {}
    groups = Channels(graph).groups if space.pruning else {}
    for name, ratios in space.ratios(groups).items():
        try:
            found[f"prune:{name}"] = offered(groups[name], ratios, hardware.round_to)
        except CandidateError as error:
            raise SpaceError(f"space {space.name!r}: {error}") from None
    layers = [x.name for x in graph.layers if can_factorize(x)]
    for name, ranks in space.ranks(layers if space.rank else ()).items():
        try:
            each = [concrete(graph, graph.by_name[name], rank) for rank in ranks]
        except CandidateError as error:
            raise SpaceError(f"space {space.name!r}: {error}") from None
        found[f"rank:{name}"] = tuple(sorted(dict.fromkeys(each), key=_by_rank))
    for name in space.dropped(droppable(graph) if space.drop else ()):
        found[f"drop:{name}"] = (True, False)
    found |= {f"student:{name}": values for name, values in space.student.items()}
    if space.pruning:
        found[IMPORTANCE] = space.importance
    return found


def _by_rank(rank: int | str | None) -> tuple[int, int]:
    """The most compressed first: separable, polyadic ranks, ranks, as it is."""
    if rank is None:
        return 3, 0
    if rank == "separable":
        return 0, 0
    return (1, int(rank.partition(":")[2])) if isinstance(rank, str) else (2, rank)


def candidate_of(picks: Mapping[str, Any]) -> Candidate:
    """The candidate of one option a dimension; training of no steps is none."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    layers: dict[str, LayerChoice] = {}
    importance = "l2"
    for dimension, option in picks.items():
        if isinstance(option, LayerChoice):
            layers[dimension] = option
        elif dimension == IMPORTANCE:
            importance = option
        else:
            kind, _, name = dimension.partition(":")
            found[kind][name] = option
    training = found["train"]
    return Candidate(
        layers,
        pruning={n: ratio for n, ratio in found["prune"].items() if ratio},
        rank={n: rank for n, rank in found["rank"].items() if rank is not None},
        training=training if training.get("steps") or training.get("epochs") else None,
        drop=tuple(n for n, gone in found["drop"].items() if gone),
        student={n: value for n, value in found["student"].items() if value is not None},
        importance=importance,
    )


def option_of(candidate: Candidate, dimension: str, options: tuple[Any, ...]) -> Any:
    """What a candidate has of a dimension; the last option where it has none of them."""
    if isinstance(options[0], LayerChoice):
        return candidate.layers.get(dimension, FLOAT)
    kind, _, name = dimension.partition(":")
    if kind == "train":
        found = (candidate.training or {"steps": 0, "epochs": 0}).get(name)
    elif kind == "prune":
        found = candidate.pruning.get(name, 0.0)
    elif kind == "rank":
        found = candidate.rank.get(name)
    elif kind == "drop":
        found = name in candidate.drop
    elif kind == "student":
        found = candidate.student.get(name)
    else:
        found = candidate.importance
    return found if found in options else options[-1]


def structural_starts(base: Candidate, options: Options) -> list[Candidate]:
    """A candidate with structures of one kind alike: all groups at their mildest ratio, then at
    the next, as far as any goes; the same with ranks; each block dropped alone."""
    found = []
    for kind in ("prune", "rank"):
        own = {n: c for n, c in options.items() if n.startswith(f"{kind}:") and len(c) > 1}
        for step in range(2, max(map(len, own.values()), default=0) + 1):
            picks = {n: c[max(len(c) - step, 0)] for n, c in own.items()}
            found.append(candidate_of({**_rest(options), **base.layers, **picks}))
    found += [
        candidate_of({**_rest(options), **base.layers, name: True})
        for name, offered in options.items()
        if name.startswith("drop:") and True in offered
    ]
    return list(dict.fromkeys(found))


def _rest(options: Options) -> dict[str, Any]:
    """The last of structures, the first of training: none where it is offered."""
    return {n: c[0 if n.startswith("train:") else -1] for n, c in options.items()}
