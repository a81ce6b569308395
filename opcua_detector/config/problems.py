"""Problems of a file as errors that name line, key, value and what was expected; nothing secret is quoted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from .units import Wrong


def yaml_error(error: Exception, file: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else file
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "a value cannot be read"
    return ConfigError(f"this is not valid YAML: {problem}", file=where, expected="YAML 1.1",
                       next_step="correct the line: mind indents, colons and quotes")


def no_duplicate_keys(node: yaml.Node, file: str) -> None:
    for mapping in _mappings(node):
        seen: set[str] = set()
        for key, _ in mapping.value:
            if key.value in seen:
                raise ConfigError("the key stands here twice", file=f"{file}, line {key.start_mark.line + 1}",
                                  key=str(key.value), next_step="remove one of the two")
            seen.add(key.value)


def _mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _mappings(value)


def config_error(error: ValidationError, root: yaml.Node, file: str, whole: type[BaseModel]) -> ConfigError:
    """Turn the first pydantic error into ours; further ones are counted in the next step."""
    problems = [e for e in error.errors() if e["type"] != "too_short"] or list(error.errors())
    # A misspelt key is both unknown and missing: the unknown one tells more.
    first = next((e for e in problems if e["type"] == "extra_forbidden"), problems[0])
    loc = tuple(part for part in first["loc"] if not str(part).startswith("function-"))
    cause = first.get("ctx", {}).get("error")
    given = first["input"]
    if isinstance(cause, Wrong):
        loc, given = loc + cause.at, cause.value
    line, key = _locate(root, loc)
    value = _shown(key, given)
    kind = first["type"]
    more = len(problems) - 1
    after = f" ({more} more to follow)" if more else ""
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    where = f"{file}, line {line}"
    if kind == "extra_forbidden":
        allowed = _allowed_keys(loc, whole)
        return ConfigError("unknown key", file=where, key=key, value=value, expected=allowed,
                           next_step=f"correct the spelling or remove the key{after}")
    if kind == "missing":
        return ConfigError("a key is missing", file=where, key=key, expected=f"the key '{loc[-1]}'",
                           next_step=f"add it; the samples in configs/ show each key{after}")
    return ConfigError("wrong value", file=where, key=key, value=value,
                       expected=message[0].lower() + message[1:], next_step=f"correct the value{after}")


def _shown(key: str, value: object) -> object:
    """Return what an error may show of a value: no mapping, no list, nothing secret."""
    if isinstance(value, dict | list | tuple) or re.search("passw|pwd|secret|token|credential", key, re.IGNORECASE):
        return None
    return re.sub(r"//[^/@]*@", "//...@", value) if isinstance(value, str) else value


def _locate(root: yaml.Node, loc: tuple[int | str, ...]) -> tuple[int, str]:
    """Return (line, dotted key) of a location, as deep as the file goes."""
    node, line, parts = root, root.start_mark.line + 1, []
    for part in loc:
        parts.append(f"[{part}]" if isinstance(part, int) else f".{part}")
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    found, line = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line, "".join(parts).lstrip(".")


def _allowed_keys(loc: tuple[int | str, ...], whole: type[BaseModel]) -> str:
    """Return the keys of the section that holds the last key of a location."""
    section = whole
    for part in loc[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return "one of " + ", ".join(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key holds: itself, or the items of its list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
