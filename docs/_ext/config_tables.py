"""``.. config-table:: ModelConfig``: the keys of a dataclass of ``adaptax.config``, types, defaults and limits."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from adaptax import config

CONF = Path(__file__).resolve().parents[2] / "conf"
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "see its meaning"}


def list_table(header: Iterable[str], rows: Iterable[Iterable[str]], widths: str = "auto") -> str:
    """A reStructuredText table with a header row."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (header, *rows):
        lines += [f"   {'-' if i else '* -'} {cell}".replace("   - ", "     - ", 1) for i, cell in enumerate(row)]
    return "\n".join(lines)


def read_choice(path: Path) -> dict[str, Any]:
    """The values of a file, with those of the files that its own defaults list names underneath."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    below: dict[str, Any] = {}
    for name in values.pop("defaults", []):
        below |= read_choice(path.with_name(f"{name}.yaml")) if name != "_self_" else {}
    return below | values


def read_defaults(group: str) -> tuple[str, dict[str, Any]]:
    """(the default choice of a group, choice -> its values), with what ``conf/config.yaml`` itself says underneath."""
    main = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    chosen = next(entry[group] for entry in main["defaults"] if isinstance(entry, Mapping) and group in entry)
    files = sorted((CONF / group).glob("*.yaml"))
    return chosen, {file.stem: main.get(group, {}) | read_choice(file) for file in files}


def describe_default(key: str, chosen: str, choices: Mapping[str, Mapping[str, Any]]) -> str:
    """The value in the default choice, then those choices that have another one."""
    default = choices[chosen][key]
    others = [f"{name} {_literal(values[key])}" for name, values in choices.items() if values[key] != default]
    return "; ".join([_literal(default), *others])


def describe_type(hint: Any) -> str:
    """``whole number``, ``number or null``, ..."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    return TYPES[kinds[0]] + (" or null" if type(None) in typing.get_args(hint) else "")


def describe_limits(metadata: Mapping[str, Any]) -> str:
    """The values that are accepted, as a sentence; empty where all are."""
    if metadata["choices"]:
        return " One of " + ", ".join(f"``{choice}``" for choice in metadata["choices"]) + "."
    words = {"minimum": "at least", "above": "more than", "maximum": "at most"}
    limits = [f"{word} {metadata[name]}" for name, word in words.items() if metadata[name] is not None]
    return f" {' and '.join(limits).capitalize()}." if limits else ""


def _literal(value: Any) -> str:
    return f"``{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}``"


class ConfigTable(SphinxDirective):
    """The keys of one configuration group, from the dataclass and the group's files."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table."""
        cls, hints = getattr(config, self.arguments[0]), typing.get_type_hints(config.Config)
        group = next(name for name, hint in hints.items() if hint is cls)
        chosen, choices = read_defaults(group)
        hints, rows = typing.get_type_hints(cls), []
        for field in dataclasses.fields(cls):
            meaning = field.metadata["doc"] + describe_limits(field.metadata)
            default = describe_default(field.name, chosen, choices)
            rows.append((f"``{group}.{field.name}``", describe_type(hints[field.name]), default, meaning))
        for path in (Path(config.__file__), CONF / "config.yaml", *(CONF / group).glob("*.yaml")):
            self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(list_table(("Key", "Type", "Default", "Meaning"), rows, "24 14 22 40"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directive."""
    app.add_directive("config-table", ConfigTable)
    return {"parallel_read_safe": True}
