from __future__ import annotations

import re

import pytest

from autoquant import errors


def _classes() -> dict[str, type[errors.AutoquantError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.AutoquantError)
    }


def test_what_the_user_can_put_right_exits_with_2() -> None:
    for kind in _classes().values():
        assert kind.exit_status == (2 if issubclass(kind, errors.UserError) else 1), kind


def test_the_docstring_draws_the_whole_tree() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"\b(?:\w+Error|NoFeasibleMember)\b", errors.__doc__))
    assert drawn == set(_classes())


def test_nearest_offers_what_is_close() -> None:
    hint = errors.nearest("conv11", ["conv1", "linear", "pool"])
    assert "'conv1'" in hint and "linear" not in hint


def test_nearest_lists_what_there_is_when_nothing_is_close() -> None:
    assert errors.nearest("zzz", ["conv1", "linear"]) == "there is: conv1, linear"
    assert "none" in errors.nearest("zzz", [])


def test_nearest_shortens_a_long_list() -> None:
    hint = errors.nearest("zzz", (f"{i:03d}" for i in range(1000)))
    assert hint.endswith("…") and len(hint) < 100


@pytest.mark.parametrize("name", sorted(_classes()))
def test_every_class_says_what_it_is_for(name: str) -> None:
    assert _classes()[name].__doc__
