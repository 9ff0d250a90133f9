from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from autoquant import document
from autoquant.errors import SpaceError


class Part(document.Document):
    size: int
    kind: str = "a"
    float_: bool = Field(default=False, alias="float")


class Whole(document.Document):
    name: str = ""
    parts: tuple[Part, ...] = Field(min_length=1)
    best: Part | None = None


def _read(folder: Path, text: str) -> Whole:
    path = folder / "whole.yaml"
    path.write_text(text, encoding="utf-8")
    return document.read(path, Whole, SpaceError)


def test_yaml_becomes_the_model(tmp_path: Path) -> None:
    whole = _read(tmp_path, "name: é\nparts:\n  - {size: 3, float: true}\n  - size: 4\n")
    assert whole.name == "é"
    assert [(p.size, p.float_) for p in whole.parts] == [(3, True), (4, False)]


def test_json_is_yaml_too(tmp_path: Path) -> None:
    assert _read(tmp_path, '{"parts": [{"size": 3}]}').parts[0].size == 3


def test_documents_cannot_be_changed(tmp_path: Path) -> None:
    whole = _read(tmp_path, "parts: [{size: 3}]")
    with pytest.raises(ValidationError):
        whole.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: x\nparts:\n- size: 1\n- size: big\n", 4, "parts.1.size: Input should be"),
        ("name: x\nparts:\n- size: 1\n  knid: b\n", 4, "parts.0.knid: unknown field; did you mean"),
        ("nmae: x\nparts: [{size: 1}]\n", 1, "nmae: unknown field; did you mean 'name'"),
        ("parts:\n- size: 1\n  flaot: true\n", 3, "did you mean 'float'"),
        ("parts:\n- size: 1\nbest:\n  size: 2\n  kidn: x\n", 5, "did you mean 'kind'"),
        ("name: x\nparts:\n- kind: b\n", 3, "parts.0.size: Field required"),
        ("parts: []\n", 1, "parts: Tuple should have at least 1 item"),
        ("name: x\n", 1, "parts: Field required"),
        ("name: [1]\nparts: [{size: x}]\n", 1, "(and 1 more)"),
    ],
)
def test_an_error_names_file_line_and_field(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(SpaceError) as caught:
        _read(tmp_path, text)
    assert f"whole.yaml:{line}: " in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_mistake_counts_once(tmp_path: Path) -> None:
    with pytest.raises(SpaceError) as caught:
        _read(tmp_path, "parts:\n- size: big\n")
    assert "more)" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "3", "- 1", "parts: [", "\x00", "? [1]\n: 2", "name: 2020-13-45", "name: !!python/x 1"],
)
def test_what_is_no_document_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpaceError, match=r"whole\.yaml") as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(SpaceError):
        _read(tmp_path, f"name: !!python/object/apply:pathlib.Path.touch ['{marker}']\n")
    assert not marker.exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match="cannot be read"):
        document.read(tmp_path / "none.yaml", Whole, SpaceError)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    with pytest.raises(SpaceError, match=r"latin\.yaml: cannot be read"):
        document.read(tmp_path / "latin.yaml", Whole, SpaceError)


def test_find_prefers_built_in_names_and_takes_paths(tmp_path: Path) -> None:
    assert document.find("int8", "search_spaces", "space", SpaceError).name == "int8.yaml"
    own = tmp_path / "own.yaml"
    own.write_text("")
    assert document.find(str(own), "search_spaces", "space", SpaceError) == own


@pytest.mark.parametrize(
    ("name", "message"),
    [("int9", "did you mean 'int8'"), ("none.yaml", "no such file"), ("zzz", "there is: ")],
)
def test_find_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        document.find(name, "search_spaces", "space", SpaceError)


def test_a_folder_that_is_not_there_has_nothing() -> None:
    assert document.builtin("no_such_folder") == {}
