from __future__ import annotations

import json
import re
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table
from small_task import LAYERS, member, uniform

from autoquant.candidate import Candidate, LayerChoice
from autoquant.errors import RunError
from autoquant.front import Front, Member
from autoquant.report import (
    choice_lines,
    compare_fronts,
    compare_html,
    compare_table,
    front_html,
    front_markdown,
    front_table,
    layers_table,
)
from autoquant.report.history import by_origin, progress, what_never_paid
from autoquant.report.text import structure_words
from autoquant.result import TrialResult

VERIFIED = {
    "accuracy": 0.8812, "standard_error": 0.0123, "drop": -0.0123, "drop_standard_error": 0.0123,
    "samples": 500, "split": "test", "latency_ms": 0.1234, "latency_median_ms": 0.13,
    "latency_spread_ms": 0.0123,
}  # fmt: skip
NAMES = [{"name": name} for name in LAYERS]


def front(*members: Member, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "run": "one",
        "task": "small",
        "hardware": "made-up",
        "objectives": ("accuracy", "latency_ms", "size_bytes"),
        "reference_point": {"accuracy": 0.81, "latency_ms": 2.2, "size_bytes": 3_300_000},
        "hypervolume": 0.512345,
        "trials": 60,
        "seconds": 83.2,
        "baseline": {
            "accuracy": 0.9, "test_accuracy": 0.91, "latency_ms": 0.25, "size_bytes": 3_000_000,
        },
        "members": members,
    }  # fmt: skip
    return Front(**{**fields, **changes}).to_dict()


def members(metric: str = "top1", count: int = 4, first: int = 8) -> tuple[Member, ...]:
    return tuple(
        member(
            first + i,
            0.8912 - i / 100,
            12_593_112 // (i + 1),
            1.23456 / (i + 1),
            {**VERIFIED, "latency_ms": 12.34 / 10**i},
            metric,
        )
        for i in range(count)
    )


def rendered(table: Table, width: int = 100) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


# --- terminal ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["top1", "spearman", "mean_intersection_over_union"])
@pytest.mark.parametrize("first", [8, 998])
def test_the_table_fits_100_columns_and_nothing_is_cut(metric: str, first: int) -> None:
    lines = rendered(front_table(front(*members(metric, first=first))))
    assert max(map(len, lines)) <= 100
    assert "…" not in "\n".join(lines)
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("trial"))
    names = [line.split()[0] for line in lines[head + 3 : head + 8]]
    assert names == ["float", *(str(first + i) for i in range(4))]


def test_the_table_shows_what_was_found() -> None:
    text = "\n".join(rendered(front_table(front(*members()))))
    for part in ("one · small · made-up · top-1", "validation", "test", "weight", "(points)"):
        assert part in text
    for figure in ("90.00", "89.12 ±1.00", "0.88 ±0.50", "12.6 MB", "−1.23 ±1.23", "0.250"):
        assert figure in text
    assert "4 members of 60 trials in 1 min 23 s, hypervolume 0.5123" in text


def test_another_metric_keeps_its_units() -> None:
    text = "\n".join(rendered(front_table(front(*members("spearman")))))
    assert "0.8912 ±0.0100" in text and "(%)" not in text and "spearman" in text


def test_a_narrow_terminal_keeps_the_first_column() -> None:
    lines = rendered(front_table(front(*members())), width=60)
    assert any(line.split()[:1] == ["float"] for line in lines)
    assert any(line.split()[:1] == ["trial"] for line in lines)


def test_an_empty_front_is_a_table_of_the_float_network() -> None:
    text = "\n".join(rendered(front_table(front())))
    assert "float" in text and "0 members" in text


def test_members_that_are_not_verified_or_have_no_error_have_dashes() -> None:
    document = front(member(3, 0.88, 1000))
    document["members"][0]["searched"]["standard_error"] = None
    document["members"][0]["searched"]["drop_standard_error"] = None
    line = next(x for x in rendered(front_table(document)) if x.split()[:1] == ["3"])
    assert "88.00 ±–" in line and line.split().count("–") == 3
    html = front_html(document, [], NAMES)
    assert "trial 3" in html and "88.00 ± –" in html


def test_layers_are_listed_with_their_totals() -> None:
    layers = [
        {
            "name": "a.very.long.name.of.a.layer.in.a.block", "kind": "Conv",
            "weight_shape": [64, 3, 3, 3], "input_shape": [1, 3, None, 8],
            "output_shape": [1, 64, 8, 8], "macs": 110_592, "parameters": 1728,
        },
        {"name": "b", "kind": "Gemm"},
    ]  # fmt: skip
    text = "\n".join(rendered(layers_table(layers)))
    assert "a.very.long.name.of.a.layer.in.a.block" in text and "64×3×3×3" in text
    assert "1×3×?×8" in text and "2 layers · 111 k MACs · 1.73 k parameters" in text


# --- Markdown ---------------------------------------------------------------------------------


def test_markdown_has_a_row_a_member_and_the_export_command() -> None:
    text = front_markdown(front(*members()))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + 4
    assert len({row.count("|") - row.count("\\|") for row in rows}) == 1
    assert rows[2].startswith("| float |") and rows[3].startswith("| 8 |")
    assert "autoquant export one --trial N -o DIR" in text


def test_markdown_escapes_what_would_be_markup() -> None:
    text = front_markdown(front(*members(), task="a|b*c<d>", run="x_y"))
    assert "a\\|b\\*c&lt;d&gt;" in text and "x\\_y" in text


# --- HTML -------------------------------------------------------------------------------------


def page(document: dict[str, Any], trials: list[dict[str, Any]] | None = None) -> str:
    """The page without plotly's own code."""
    html = front_html(document, trials or [], NAMES)
    assert get_plotlyjs() in html
    return html.replace(get_plotlyjs(), "")


def plots(html: str) -> dict[str, Any]:
    found = re.search(r"var plots = (\{.*\});", html)
    assert found is not None
    document: dict[str, Any] = json.loads(found[1], parse_constant=pytest.fail)
    return document


def test_the_page_fetches_nothing() -> None:
    html = page(front(*members()))
    assert not re.search(r"<link|<iframe|<img|@import|\bsrc\s*=|\bhref\s*=|url\(|https?:", html)


def test_the_page_has_every_member_and_its_command() -> None:
    document = front(*members(), run="my run")
    html = page(document)
    for found in document["members"]:
        assert f"<td>{found['trial']}</td>" in html
        assert f"autoquant export &#x27;my run&#x27; --trial {found['trial']} -o" in html
    assert "<td>float</td>" in html and "hypervolume" in html and "1 min 23 s" in html


def test_a_plot_a_cost_with_units_baseline_and_front() -> None:
    found = plots(page(front(*members())))
    assert set(found) == {"cost-latency_ms", "cost-size_bytes", "bits", "latency"}
    size, latency = found["cost-size_bytes"], found["cost-latency_ms"]
    assert size["layout"]["xaxis"]["title"]["text"] == "File size (MB)"
    assert latency["layout"]["xaxis"]["title"]["text"] == "Latency, predicted (ms)"
    assert size["layout"]["yaxis"]["title"]["text"] == "top-1 (%), validation"
    traces = {t["name"]: t for t in size["data"] if "name" in t}
    assert traces["float"]["x"] == [3.0] and traces["float"]["y"] == [90.0]
    assert traces["front"]["y"] == pytest.approx([89.12, 88.12, 87.12, 86.12])
    assert traces["front"]["error_y"]["array"] == [1.0] * 4
    assert all("4/8" in text or "8/8" in text for text in traces["front"]["text"])


def test_other_trials_are_dots_and_infeasible_ones_crosses() -> None:
    best = members()
    others = [
        TrialResult(20 + i, m.candidate, status, m.searched, m.predicted).to_dict()
        for i, (m, status) in enumerate(
            zip(best, ("complete", "infeasible", "failed"), strict=False)
        )
    ]
    others[2]["score"] = others[2]["predicted"] = None
    found = plots(page(front(*best), others))
    traces = {t["name"]: t for t in found["cost-size_bytes"]["data"] if "name" in t}
    assert len(traces["trials"]["x"]) == len(traces["infeasible"]["x"]) == 1
    assert traces["infeasible"]["marker"]["symbol"] != traces["trials"]["marker"].get("symbol")


def test_the_plot_of_bits_has_a_row_a_member_and_a_column_a_layer() -> None:
    candidate = Candidate(
        {"first": LayerChoice(3, 8), "second": LayerChoice(8, 8), "head": LayerChoice()}
    )
    found = plots(page(front(member(1, 0.89, 1000, candidate=candidate), *members())))
    bits = found["bits"]
    assert bits["data"][0]["text"][0] == ["3", "8", "f"] and len(bits["data"][0]["text"]) == 5
    assert bits["layout"]["xaxis"]["ticktext"] == list(LAYERS)


def test_names_cannot_break_the_page() -> None:
    evil = '</script><script>alert("x")</script>'
    candidate = Candidate({evil: LayerChoice(4, 8)})
    document = front(
        member(1, 0.89, 1000, 1.0, None, evil, candidate), run=evil, task=evil, hardware=evil
    )
    html = front_html(document, [], [{"name": evil}]).replace(get_plotlyjs(), "")
    assert "<script>alert" not in html
    assert html.count("</script>") == 3  # configuration, plotly, plots
    assert "&lt;/script&gt;" in html
    plots(html)


def test_a_front_without_members_is_a_page_too() -> None:
    html = page(front())
    assert "The front is empty" in html and "No trial met the limits" in html
    assert set(plots(html)) == {"cost-size_bytes"}


def test_objectives_without_figures_fall_back_to_the_size() -> None:
    document = front(*members(), objectives=("accuracy", "latency_ms"))
    for found in document["members"]:
        found["predicted"]["latency_ms"] = None
    assert set(plots(page(document))) == {"cost-size_bytes", "bits"}  # nothing to compare


def test_the_sentence_on_top_names_the_smallest_member_without_a_loss() -> None:
    lossless = member(5, 0.8999, 1_000_000, 1.0, VERIFIED, candidate=uniform(8))
    smaller = member(6, 0.80, 100_000)
    html = page(front(lossless, smaller))
    assert "Trial 5 is the smallest member" in html
    assert "3.0 times smaller" in html and "2.0 times faster (measured)" in html
    assert "Trial 6 is the most accurate member" in page(front(smaller))


# --- trials together --------------------------------------------------------------------------


def trial(found: Member, origin: str = "sampler", status: str = "complete") -> dict[str, Any]:
    return TrialResult(
        found.trial,
        found.candidate,
        status,
        found.searched,
        found.predicted,
        seconds={"evaluate": 2.0},
        origin=origin,
    ).to_dict()


def chosen(html: str) -> dict[str, Any]:
    found = re.search(r"var chosen = (\{.*\});", html)
    assert found is not None
    document: dict[str, Any] = json.loads(found[1], parse_constant=pytest.fail)
    return document


WIDE = {"accuracy": 0.81, "latency_ms": 2.2, "size_bytes": 20_000_000}


def test_the_front_grows_to_its_hypervolume() -> None:
    document = front(*members(), reference_point=WIDE)
    trials = [trial(m) for m in reversed(members())]
    trials.append(trial(member(20, 0.95, 10, 0.001), status="infeasible"))
    curve = progress(document, trials)
    assert [step[0] for step in curve] == [0, 1, 2, 3, 4, 5]
    volumes = [step[2] for step in curve]
    assert volumes == sorted(volumes) and volumes[0] == 0 and 0 < volumes[-1] < 1
    assert curve[-1][1] == pytest.approx(10.0)
    assert len(set(volumes)) == 5
    narrow = {**WIDE, "size_bytes": 3_300_000}  # what lies outside of the box does not count
    inside = progress(front(*members(), reference_point=narrow), trials)
    assert [step[0] for step in inside] == [0, 4, 5]


def test_the_curve_ends_at_the_value_of_the_front() -> None:
    from autoquant.front import relative_hypervolume

    document = front(*members(), reference_point=WIDE)
    expected = relative_hypervolume(members(), document["reference_point"], 0.9)
    assert progress(document, [trial(m) for m in members()])[-1][2] == pytest.approx(expected)


def test_what_proposed_and_what_never_paid() -> None:
    best = members(count=2)
    wasted = member(30, 0.5, 1000, candidate=uniform(2))
    trials = [trial(best[0], "uniform"), trial(best[1], "start old:7"), trial(wasted, "uniform")]
    document = front(*best)
    assert by_origin(document, trials) == [("uniform", 2, 1), ("start", 1, 1)]
    sentences = what_never_paid(document, trials, LAYERS)
    assert sentences == ["No member has a layer at 2/8, which 1 trials tried."]
    same = front(member(1, 0.8, 10), member(3, 0.7, 9))
    assert what_never_paid(same, [], LAYERS) == ["Every member has 4/8 at first, second, head."]
    html = page(document, trials)
    assert sentences[0] in html and "What proposed the members" in html


def test_uniform_trials_are_marked_and_measured_latencies_shown() -> None:
    trials = [
        trial(member(40, 0.88, 1000, candidate=uniform(8)), "uniform"),
        trial(member(41, 0.87, 500, candidate=uniform(4)), "uniform"),
        trial(member(42, 0.6, 300, candidate=uniform(2)), "uniform"),
        trial(member(43, 0.86, 500, candidate=uniform(4)), "solver"),
    ]
    found = plots(page(front(*members()), trials))
    traces = {t["name"]: t for t in found["cost-size_bytes"]["data"] if "name" in t}
    assert {n for n in traces if n.startswith("uniform")} == {"uniform 8/8", "uniform 4/8"}
    assert traces["uniform 4/8"]["y"] == [87.0]
    assert "measured" not in traces
    measured = next(t for t in found["cost-latency_ms"]["data"] if t.get("name") == "measured")
    assert measured["x"] == pytest.approx([12.34, 1.234, 0.1234, 0.01234])
    both = next(t for t in found["latency"]["data"] if t["name"] == "front")
    assert both["x"] == measured["x"] and len(both["y"]) == 4


def test_a_click_finds_bits_costs_and_the_command() -> None:
    layers = [
        {"name": name, "costs": {"4/8": {"size_bytes": 10.0 + i, "latency_ms": None}}}
        for i, name in enumerate(LAYERS)
    ]
    document = front(*members())
    shares = {"importance": 0.5, "prior": 0.4, "factor": 1.2, "factor_error": 0.1}
    learned = {"trials": 9, "layers": dict.fromkeys(LAYERS[:2], shares)}
    html = front_html(document, [], layers, learned).replace(get_plotlyjs(), "")
    found = chosen(html)
    costs = {"4/8": [12.0, None]}
    assert found["layers"][2] == {"name": "head", "sensitivity": None, "costs": costs}
    assert found["layers"][0]["sensitivity"] == 0.5
    assert [m["trial"] for m in found["members"]] == [8, 9, 10, 11]
    assert found["first"] == 8 and found["members"][1]["layers"][0][:2] == [4, "4/8"]
    assert found["members"][1]["command"] == "autoquant export one --trial 9 -o one-9"
    assert structure_words({"pruning": {"first": 0.25}, "training": {"steps": 9}}) == [
        ["channels", "first −25 %"], ["training", "steps 9"],
    ]  # fmt: skip
    for found_member in document["members"]:
        assert f'<tr data-trial="{found_member["trial"]}" tabindex="0">' in html


def test_a_run_of_1000_trials_is_below_8_mb() -> None:
    names = [f"blocks.{i}.attention.projection" for i in range(60)]
    candidate = Candidate({n: LayerChoice(2 + i % 7, 8) for i, n in enumerate(names)})
    best = [member(i, 0.9 - i / 1000, 10_000 - 90 * i, candidate=candidate) for i in range(60)]
    trials = [
        trial(member(i, 0.9 - i % 97 / 1000, 10_000 - i, candidate=candidate)) for i in range(1000)
    ]
    layers = [{"name": n, "costs": {"4/8": {"size_bytes": 1, "latency_ms": 1}}} for n in names]
    assert len(front_html(front(*best), trials, layers).encode()) < 8_000_000


# --- runs side by side ------------------------------------------------------------------------


def test_runs_are_compared_against_one_point() -> None:
    first = front(*members(), reference_point=WIDE)
    second = front(*members(first=20), run="two")
    second["members"] = second["members"][2:]
    compared = compare_fronts([first, second])
    assert compared["objectives"] == ["accuracy", "latency_ms", "size_bytes"]
    one, two = compared["runs"]
    assert one["joint_front"] == [8, 9, 10, 11] and two["joint_front"] == [22, 23]
    assert one["hypervolume"] > two["hypervolume"] > 0
    assert one["smallest"]["0.01"]["trial"] == 8 and two["smallest"]["0.01"] is None
    assert one["smallest"]["0.02"]["trial"] == 9


def test_other_hardware_has_other_latencies() -> None:
    compared = compare_fronts([front(*members()), front(*members(), hardware="board")])
    assert compared["objectives"] == ["accuracy", "size_bytes"]
    assert set(plots(compare_html([front(*members()), front(*members(), hardware="board")]))) == {
        "cost-size_bytes"
    }


@pytest.mark.parametrize("hardware", ["made-up", "another-made-up-device-of-some-kind"])
def test_the_comparison_fits_100_columns(hardware: str) -> None:
    long = "a-run-with-a-name-that-goes-on-and-on"
    runs = [front(*members()), front(*members(), run=long, hardware=hardware, seconds=360_000.0)]
    lines = rendered(compare_table(compare_fronts(runs)))
    assert max(map(len, lines)) <= 100
    assert any("goes-on" in line for line in lines)
    assert not any("smalle…" in line for line in lines)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (front(*members(), task="large", run="two"), "task 'small' and 'large'"),
        (front(*members("spearman"), run="two"), "metric top1 and spearman"),
        (front(run="two"), "run 'two': its front is empty"),
    ],
)
def test_what_cannot_be_compared_is_one_line(other: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=re.escape(message)):
        compare_fronts([front(*members()), other])


def test_the_overlay_has_a_trace_a_run_and_fetches_nothing() -> None:
    html = compare_html([front(*members()), front(*members(), run="<b>")])
    html = html.replace(get_plotlyjs(), "")
    assert not re.search(r"<link|<iframe|<img|@import|\bsrc\s*=|\bhref\s*=|url\(|https?:", html)
    names = [t.get("name") for t in plots(html)["cost-size_bytes"]["data"]]
    assert "one" in names and "&lt;b&gt;" in names and "<b>" not in html


# --- choosing ---------------------------------------------------------------------------------


def test_a_choice_says_what_it_costs_and_what_is_close() -> None:
    found = Front.from_dict(front(*members()))
    chosen = found.member(9)
    nearby = {what: m.trial for what, m in found.nearby(chosen).items()}
    assert nearby == {"smaller": 10, "faster": 10, "more accurate": 8}
    first, close = choice_lines(found.to_dict(), 9, nearby)
    assert first.startswith("trial 9: drop 1.88 ± 0.50 points on validation, 6.30 MB (210% of")
    assert "smaller and faster is trial 10 (−1.00 points, size −33%, latency −90%)" in close
    assert "more accurate is trial 8 (+1.00 points, size +100%, latency +900%)" in close
    alone = Front.from_dict(front(members()[0]))
    assert len(choice_lines(alone.to_dict(), 8, alone.nearby(alone.members[0]))) == 1
