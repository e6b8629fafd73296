"""Words for a configuration that cannot be read: keys set twice, and pydantic's errors in one line each."""

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

Loc = tuple[int | str, ...]  # a place in the tree of settings, as pydantic tells it

_WORDS = {
    "tuple_type": "input should be a list, as in [64, 64, 32]",
    "model_type": "input should be a section, with `key: value` lines of its own",
    "string_pattern_mismatch": "give letters, digits, _ and -, the first a letter or digit",
    "dict_type": "input should be a section of names, each with `key: value` lines of its own",
}


def repeated(node: yaml.Node | None, section: str = "") -> Iterator[str]:
    """Keys that a section holds twice, of which YAML takes the last and says nothing. One line a problem."""
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{section}{key.value}", key.start_mark.line + 1
        if name in lines:
            yield f"line {line}: {name} is set in line {lines[name]} already: remove one of the two"
        lines[name] = line
        yield from repeated(value, f"{name}.")


def _inside(section: Any, part: int | str) -> Any:
    """What stands under a name in a section, or in a dictionary of sections."""
    if get_origin(section) is dict:
        return get_args(section)[1]
    return section.model_fields[part].annotation


def _fields(loc: Loc, root: type[BaseModel]) -> list[str]:
    """Names valid in the section that `loc` lies in."""
    section: Any = root
    for part in loc[:-1]:
        section = _inside(section, part)
    return list(section.model_fields)


def explain(item: Any, raw: dict[str, Any], root: type[BaseModel]) -> str:
    """One line for one of pydantic's errors; the same line for each alternative that a setting has."""
    loc: Loc = item["loc"]
    if item["type"] == "extra_forbidden":
        names = _fields(loc, root)
        near = difflib.get_close_matches(str(loc[-1]), names, 1)
        meant = ".".join(map(str, (*loc[:-1], *near)))
        remedy = f"did you mean {meant}?" if near else f"known here: {', '.join(names)}"
        return f"{'.'.join(map(str, loc))}: unknown setting: {remedy}"
    if loc[-1] == "[key]":  # pydantic's word for the name itself
        return f"{'.'.join(map(str, loc[:-1]))}: a name here has letters, digits, - and _: rename it"
    setting, description = _setting(loc, root)
    key, inside = ".".join(setting), loc[len(setting) :]
    if item["type"] == "missing":
        return f"{key}: missing: set it"
    if any(isinstance(part, str) for part in inside):  # pydantic's name of an alternative
        value: Any = raw
        for part in setting:
            value = value[part]
        return f"{key} = {value!r}: not what it takes: {description}"
    place = "".join(f"[{part}]" for part in inside)
    words = _WORDS.get(item["type"], f"{item['msg'][0].lower()}{item['msg'][1:]}")
    return f"{key}{place} = {item['input']!r}: {words}"


def _setting(loc: Loc, root: type[BaseModel]) -> tuple[list[str], str]:
    """The part of `loc` that names a setting, and the setting's help text; places in its value are left off."""
    section: Any = root
    names: list[str] = []
    description = ""
    for part in loc:
        if get_origin(section) is not dict:
            description = section.model_fields[part].description or ""
        names.append(str(part))
        section = _inside(section, part)
        if not hasattr(section, "model_fields") and get_origin(section) is not dict:
            break
    return names, description


def without(raw: dict[str, Any], locs: Sequence[Loc]) -> dict[str, Any]:
    """A copy without the settings at `locs`, so that their defaults stand in."""
    copy = json.loads(json.dumps(raw, default=str))
    for loc in locs:
        node = copy
        for part in loc:
            if not isinstance(node, dict) or part not in node:
                break
            if isinstance(node[part], dict) and part != loc[-1]:
                node = node[part]
                continue
            del node[part]
            break
    return copy
