"""YAML that people write → pydantic models, with errors that name file, line and field."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from autoquant.errors import UserError, nearest


class Document(BaseModel):
    """Base of what people write: immutable, unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


D = TypeVar("D", bound=Document)


def builtin(folder: str) -> dict[str, Path]:
    """The shipped YAML files of ``search_spaces`` or ``hardware_profiles`` by name.

    They stand beside the package in a checkout and inside it in a wheel.
    """
    here = Path(__file__).resolve().parent
    for place in (here / folder, here.parent / folder):
        if place.is_dir():
            return {path.stem: path for path in sorted(place.glob("*.yaml"))}
    return {}


def find(name: str, folder: str, what: str, error: type[UserError]) -> Path:
    """The file of a built-in name, or the path itself. Raises ``error`` with the nearest name."""
    shipped = builtin(folder)
    if name in shipped:
        return shipped[name]
    if name.endswith((".yaml", ".yml", ".json")):
        path = Path(name)
        if not path.is_file():
            raise error(f"{name}: no such file")
        return path
    raise error(f"no {what} {name!r}; {nearest(name, shipped)} Or give a .yaml file")


def read(path: Path, model: type[D], error: type[UserError]) -> D:
    """Parse and check one file. Raises ``error``: one line with file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path}: cannot be read: {reason}") from None
    except (yaml.YAMLError, ValueError) as reason:  # ValueError: a date that does not exist
        raise error(f"{path}: not YAML: {' '.join(str(reason).split())}") from None
    if not isinstance(content, dict):
        raise error(f"{path}: expected fields such as {', '.join(model.model_fields)}")
    try:
        return model.model_validate(content)
    except ValidationError as reason:
        # An unknown field first: it may be the one that is missing, misspelt.
        first, *rest = sorted(reason.errors(), key=lambda e: e["type"] != "extra_forbidden")
        rest = [e for e in rest if e["type"] != "too_short"]  # what is wrong is not counted
        location = [part for part in first["loc"] if not str(part).startswith("function-")]
        line = _line(root, location)
        field = ".".join(str(part) for part in location) or "the file"
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown field; {nearest(str(location[-1]), _fields(model, location[:-1]))}"
        more = f" (and {len(rest)} more)" if rest else ""
        raise error(f"{path}:{line}: {field}: {message}{more}") from None


def _line(root: Any, location: Sequence[Any]) -> int:
    """Line of the deepest part of ``location`` that the file has."""
    node, line = root, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = [(k, v) for k, v in node.value if k.value == str(part)]
            if not match:
                break
            line, node = match[0][0].start_mark.line + 1, match[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _fields(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Field names of the model that ``location`` leads to."""
    for part in location:
        if not isinstance(part, str) or part not in model.model_fields:
            continue
        inner = [
            kind
            for kind in _types(model.model_fields[part].annotation)
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if inner:
            model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _types(annotation: Any) -> list[Any]:
    inner = getattr(annotation, "__args__", ())
    return [annotation] + [t for a in inner for t in _types(a)]
