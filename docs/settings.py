"""All settings as a Markdown page: python docs/settings.py > docs/configuration.md"""

import json
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from cclmpc_dist.config import Config

HEAD = """# Settings

Made by `python docs/settings.py > docs/configuration.md`. Any setting can follow a configuration file on the command
line as `key=value`. Batch sizes are global: over all ranks.

| key | type | default | what it is |
|---|---|---|---|
"""


def page() -> str:
    return HEAD + "\n".join(rows(Config, "")) + "\n"


def rows(section: type[BaseModel], prefix: str) -> list[str]:
    """A line for each setting of a section and its subsections."""
    lines = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += rows(kind, f"{prefix}{name}.")
            continue
        default = "must be set" if field.is_required() else f"`{json.dumps(field.default)}`"
        lines.append(f"| `{prefix}{name}` | {words(kind)} | {default} | {field.description} |")
        if get_origin(kind) is dict:
            lines += rows(get_args(kind)[1], f"{prefix}{name}.NAME.")
    return lines


def words(kind: Any) -> str:
    """A type as a person says it."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("unset" if choice is type(None) else words(choice) for choice in get_args(kind))
    if get_origin(kind) is dict:
        return "sections by name"
    if get_origin(kind) in (tuple, list):
        return f"list of {words(get_args(kind)[0])}"
    if get_origin(kind) is Annotated:
        return words(get_args(kind)[0])
    return str(kind.__name__)


if __name__ == "__main__":
    print(page(), end="")
