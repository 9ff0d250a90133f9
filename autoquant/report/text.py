"""Figures and phrases of a run as text: what tables, plots and pages share."""

from __future__ import annotations

import functools
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from autoquant.candidate import FLOAT, LayerChoice

Record = Mapping[str, Any]

TITLES = {
    "latency_ms": "Latency",
    "size_bytes": "File size",
    "stored_bytes": "Entropy-coded file",
    "weight_bytes": "Packed weights",
    "average_weight_bits": "Average weight bits",
    "macs": "MACs",
    "bops": "BOPs",
    "peak_memory_bytes": "Peak activation memory",
    "energy_mj": "Energy",
}
MISSING = "–"
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_MINUS = "\N{MINUS SIGN}"


COLUMNS = (
    "trial",
    "accuracy",
    "drop",
    "test",
    "test_drop",
    "predicted",
    "measured",
    "size",
    "bits",
)


def rows_of(front: Record) -> list[dict[str, str]]:
    """The networks to compare with and then the members, as formatted cells."""
    return [*reference_rows(front), *member_rows(front)]


def reference_rows(front: Record) -> list[dict[str, str]]:
    """The float network and, where it was measured, all layers at 8/8, as formatted cells."""
    _, percent = metric_of(front)
    baseline = front["baseline"]
    int8 = baseline.get("uniform_int8")
    rows = [
        {
            "trial": "float",
            "accuracy": figure_text(baseline.get("accuracy"), percent),
            "drop": "",
            "test": figure_text(baseline.get("test_accuracy"), percent),
            "test_drop": "",
            "predicted": "",
            "measured": digits(baseline.get("latency_ms")),
            "size": amount("size_bytes", baseline.get("size_bytes")),
            "bits": "32",
        }
    ]
    if int8:
        rows.append(
            {
                "trial": "8/8",
                "accuracy": MISSING,
                "drop": "",
                "test": figure_text(int8.get("accuracy"), percent),
                "test_drop": with_error(int8, "drop", percent),
                "predicted": digits(int8.get("predicted_latency_ms")),
                "measured": measured_text(int8),
                "size": amount("size_bytes", int8.get("size_bytes")),
                "bits": "8",
            }
        )
    return rows


def member_rows(front: Record) -> list[dict[str, str]]:
    """The members, as formatted cells."""
    _, percent = metric_of(front)
    baseline, rows = front["baseline"], []
    for member in front["members"]:
        verified = member.get("verified")
        predicted = member["predicted"]
        bits = predicted.get("average_weight_bits")
        rows.append(
            {
                "trial": str(member["trial"]),
                "accuracy": with_error(member["searched"], "accuracy", percent),
                "drop": with_error(member["searched"], "drop", percent),
                "test": figure_text(verified and verified.get("accuracy"), percent),
                "test_drop": with_error(verified or {}, "drop", percent),
                "predicted": predicted_text(predicted, verified, baseline),
                "measured": measured_text(verified),
                "size": amount("size_bytes", predicted.get("size_bytes")),
                "bits": amount("average_weight_bits", bits),
            }
        )
    return rows


def metric_of(front: Record) -> tuple[str, bool]:
    """Name of the metric, and whether it is shown in percent (top-1 is)."""
    for member in front["members"]:
        name = str(member["searched"].get("metric", "top1"))
        return ("top-1", True) if name == "top1" else (name, False)
    return "accuracy", False


def split_of(front: Record) -> str:
    """The split that the search scored on."""
    return next((str(m["searched"]["split"]) for m in front["members"]), "validation")


def summary(front: Record) -> str:
    """Members, trials, time and hypervolume in a line."""
    count = len(front["members"])
    return (
        f"{count} member{'' if count == 1 else 's'} of {front['trials']} trials in "
        f"{duration(front['seconds'])}, hypervolume {front['hypervolume']:.4g}"
    )


def curse(front: Record) -> str | None:
    """How much better members look on validation, where they were chosen, than on test."""
    _, percent = metric_of(front)
    pairs = [
        (m["searched"]["drop"], m["verified"]["drop"])
        for m in front["members"]
        if m.get("verified") and m["verified"].get("split") != m["searched"].get("split")
    ]
    if not pairs:
        return None
    searched, verified = (
        figure_text(sum(p) / len(p), percent, True) for p in zip(*pairs, strict=True)
    )
    unit = " points" if percent else ""
    return f"mean drop of {len(pairs)} members {searched}, on test {verified}{unit}"


def headline_member(front: Record) -> Record:
    """The smallest member without a measurable loss, else the most accurate one."""
    members = front["members"]
    lossless = [m for m in members if _is_lossless(m)]
    found: Record = members[0]
    return min(lossless, key=lambda m: m["predicted"]["size_bytes"]) if lossless else found


def _is_lossless(member: Record) -> bool:
    score = member["searched"]
    return bool(score["drop"] <= (score["drop_standard_error"] or 0.0))


def headline(front: Record) -> str:
    """The smallest member without a measurable loss, or the most accurate one, in a sentence."""
    members = front["members"]
    if not members:
        return "No trial met the limits: the front is empty."
    _, percent = metric_of(front)
    unit = " points" if percent else ""
    member = headline_member(front)
    if _is_lossless(member):
        drop = with_error(member["searched"], "drop", percent)
        text = (
            f"Trial {member['trial']} is the smallest member without a measurable loss on "
            f"{split_of(front)} (drop {drop}{unit}, within one standard error of none)"
        )
    else:
        text = (
            f"Trial {member['trial']} is the most accurate member (drop "
            f"{with_error(member['searched'], 'drop', percent)}{unit})"
        )
    baseline = front["baseline"]
    ratios = []
    if baseline.get("size_bytes"):
        ratio = baseline["size_bytes"] / member["predicted"]["size_bytes"]
        size = f"{ratio:.1f} times smaller than" if ratio >= 1.05 else "as large as"
        ratios.append(f"its file is {size} the float network's")
    latency = (member.get("verified") or {}).get("latency_ms")
    kind = "measured"
    if latency is None:
        latency, kind = member["predicted"].get("latency_ms"), "predicted"
    if latency and baseline.get("latency_ms"):
        ratio = baseline["latency_ms"] / latency
        words = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
        words = words if abs(ratio - 1) >= 0.05 else "as fast"
        ratios.append(f"it runs {words} ({kind})")
    return text + (": " + " and ".join(ratios) if ratios else "") + "."


def layer_names(front: Record, layers: Sequence[Record]) -> list[str]:
    """The layers by depth, then any that only candidates name."""
    names = [str(layer["name"]) for layer in layers]
    known = set(names)
    for member in front["members"]:
        for name in member["candidate"]["layers"]:
            if name not in known:
                known.add(name)
                names.append(name)
    return names


def choices_of(candidate: Record, names: Iterable[str]) -> list[LayerChoice]:
    """The choice of every layer; float where the candidate leaves it out."""
    layers = candidate["layers"]
    return [_choice(tuple(layers[n].items())) if n in layers else FLOAT for n in names]


@functools.lru_cache(maxsize=4096)
def _choice(fields: tuple[tuple[str, Any], ...]) -> LayerChoice:
    return LayerChoice.from_dict(dict(fields))


def bits_summary(candidate: Record, names: Sequence[str]) -> list[str]:
    """``4/8 ×12, 8/8 ×7, float ×1``, and a part for each other thing that was done."""
    counts = Counter(choices_of(candidate, names))
    ordered = sorted(counts, key=lambda c: (c.weight_bits, c.activation_bits, str(c)))
    parts = [", ".join(f"{choice}\N{NO-BREAK SPACE}×{counts[choice]}" for choice in ordered)]
    pruned = [ratio for ratio in (candidate.get("pruning") or {}).values() if ratio]
    if pruned:
        mean = 100 * sum(pruned) / len(pruned)
        parts.append(f"{len(pruned)} channel groups pruned by {mean:.0f} % on average")
    if candidate.get("rank"):
        parts.append(f"{len(candidate['rank'])} layers of reduced rank")
    if candidate.get("training"):
        parts.append("fine-tuned")
    if candidate.get("polish"):
        parts.append("polished")
    return [part for part in parts if part]


def bits_words(choice: LayerChoice) -> str:
    """``4-bit weights, 8-bit activations``."""

    def words(bits: int) -> str:
        return "float" if bits == 32 else f"{bits}-bit"

    extra = str(choice).partition(" ")[2]
    return f"{words(choice.weight_bits)} weights, {words(choice.activation_bits)} activations" + (
        f", {extra}" if extra else ""
    )


def structure_words(candidate: Record) -> list[list[str]]:
    """What a candidate changes beside bits, as pairs of a name and words."""
    found = []
    pruning = {n: r for n, r in (candidate.get("pruning") or {}).items() if r}
    if pruning:
        words = ", ".join(f"{tail_of(n, 24)} −{100 * r:.0f} %" for n, r in pruning.items())
        found.append(["channels", words])
    for field, name in (("rank", "ranks"), ("student", "student"), ("training", "training")):
        values = candidate.get(field) or {}
        if values:
            words = ", ".join(f"{tail_of(str(n), 24)} {v}" for n, v in values.items())
            found.append([name, words])
    if candidate.get("drop"):
        found.append(["left out", ", ".join(tail_of(n, 24) for n in candidate["drop"])])
    return found


def export_command(front: Record, trial: int | str) -> str:
    """The command that packages a member; ``N`` for a trial leaves it open."""
    run = str(front["run"])
    folder = "DIR" if trial == "N" else shlex.quote(f"{run}-{trial}")
    return f"autoquant export {shlex.quote(run)} --trial {trial} -o {folder}"


def figure_text(value: float | None, percent: bool, signed: bool = False, sign: str = "") -> str:
    """A value of the metric: ``91.73`` (with ``sign`` after it) for top-1, else ``0.8203``."""
    if value is None:
        return MISSING
    text = f"{100 * value:.2f}" if percent else f"{value:.4f}"
    if signed and float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", _MINUS) + (f" {sign}" if percent and sign else "")


def with_error(score: Record, field: str, percent: bool, sign: str = "") -> str:
    """``accuracy`` or ``drop`` of a score with its standard error."""
    if score.get(field) is None:
        return MISSING
    error = score["standard_error" if field == "accuracy" else "drop_standard_error"]
    value = figure_text(score[field], percent, signed=True)
    return f"{value} ± {figure_text(error, percent)}" + (f" {sign}" if percent and sign else "")


def predicted_text(predicted: Record, verified: Record | None, baseline: Record) -> str:
    """Predicted latency in ms; a range where it is not measured and the model knows its error."""
    latency, error = predicted.get("latency_ms"), baseline.get("latency_error")
    text = digits(latency)
    if latency is None or error is None or (verified or {}).get("latency_ms") is not None:
        return text
    return f"{text} ±{error:.0%}"


def measured_text(verified: Record | None) -> str:
    """Measured latency in ms with the spread of its rounds."""
    if not verified or verified.get("latency_ms") is None:
        return MISSING
    latency, spread = verified["latency_ms"], verified.get("latency_spread_ms")
    text = digits(latency)
    decimals = len(text.partition(".")[2])
    return text if spread is None else f"{text} ± {spread:.{decimals}f}"


def digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return MISSING
    magnitude = abs(value)
    decimals = 0 if magnitude >= 100 else 1 if magnitude >= 10 else 2 if magnitude >= 1 else 3
    return f"{value:.{decimals}f}"


def scale_of(name: str, values: Sequence[float]) -> tuple[float, str]:
    """What to divide an axis by, and its unit."""
    if name.endswith("_ms"):
        return 1.0, "ms"
    if name.endswith("_mj"):
        return 1.0, "mJ"
    unit = "B" if name.endswith("_bytes") else ""
    if not unit and name not in ("macs", "bops"):
        return 1.0, ""
    top = max((abs(value) for value in values), default=0.0)
    factor, prefix = next(((f, p) for f, p in _SI if top >= f), (1.0, ""))
    return factor, (prefix + unit) or ""


def amount(name: str, value: float | None) -> str:
    """A cost with its unit: ``1.08 MB``, ``3.21 ms``, ``41.2 M``."""
    if value is None:
        return MISSING
    factor, unit = scale_of(name, [value])
    if factor == 1 and unit == "B":
        return f"{value:.0f} B"
    text = f"{value:.2f}" if name == "average_weight_bits" else digits(value / factor)
    return f"{text} {unit}".rstrip()


def quantity(front: Record, name: str, value: float) -> str:
    """A coordinate of the reference point, in the units of its objective."""
    if name == "accuracy":
        return figure_text(value, metric_of(front)[1], sign="%")
    return amount(name, value)


def count_text(value: float | None) -> str:
    """``512``, ``41.2 M``."""
    return MISSING if value is None else f"{value}" if value < 1000 else amount("macs", value)


def total(layers: Sequence[Record], key: str) -> float | None:
    """The sum of what is known; None where nothing is."""
    known = [layer[key] for layer in layers if layer.get(key) is not None]
    return sum(known) if known else None


def shape_text(shape: Sequence[Any] | None) -> str:
    """``64×3×3×3``."""
    return MISSING if shape is None else "×".join("?" if d is None else str(d) for d in shape)


def duration(seconds: float) -> str:
    """``1 min 23 s``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def tail_of(name: str, length: int) -> str:
    """The end of a long name: names of layers differ there."""
    return name if len(name) <= length else "…" + name[-(length - 1) :]


def plain(cell: str) -> str:
    """Narrower: ``91.73 ±0.31``."""
    return cell.replace("± ", "±")


def markdown_text(text: object) -> str:
    """Escape what Markdown and the HTML inside it would read as markup."""
    plain = escape(str(text), quote=False)
    return "".join("\\" + c if c in "\\`*_[]|#~" else c for c in plain)
