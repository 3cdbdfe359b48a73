"""What a configuration key may hold, and what is said of a key or value that is wrong. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")
_KIND_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback, exit code 1."""


def knob(
    doc: str,
    *,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    kinds: tuple[type, ...] = (),
) -> Any:
    """A configuration field: its documentation and the values it accepts; ``kinds`` where it is annotated as Any."""
    limits = {"choices": choices, "minimum": minimum, "above": above, "maximum": maximum, "kinds": kinds}
    return field(metadata={"doc": doc, **limits})


def build_group(
    cls: type[T], values: Mapping[str, Any], problems: list[str], *, prefix: str = "", known: Iterable[str] = ()
) -> T:
    """A dataclass of knobs from plain values; what is wrong with them is added to the problems."""
    known = list(known) or key_paths(cls)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    problems += [unknown_key(prefix + str(key), known) for key in values if key not in fields]
    built: dict[str, Any] = {}
    for name, f in fields.items():
        path, hint = prefix + name, hints[name]
        if name not in values:
            problems.append(f"{path} is missing")
        elif dataclasses.is_dataclass(hint):
            if isinstance(values[name], Mapping):
                inner = typing.cast(type, hint)
                built[name] = build_group(inner, values[name], problems, prefix=f"{path}.", known=known)
            else:
                problems.append(f"{path} must be a group of keys, not {values[name]!r}")
        else:
            built[name], problem = _check_value(path, values[name], hint, f.metadata)
            problems += [problem] if problem else []
    return cls(**{name: built.get(name) for name in fields})


def _check_value(path: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Returns the value (an int where a float is due becomes one) and what is wrong with it, or None."""
    kinds = limits["kinds"] or [t for t in typing.get_args(hint) or (hint,) if t is not type(None)]
    if Any in kinds:
        return value, None
    choices = limits["choices"]
    words = [", ".join(choices) if len(kinds) > 1 and kind is str else _KIND_NAMES[kind] for kind in kinds]
    if value is None and type(None) in typing.get_args(hint):
        return None, None
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, tuple(kinds)) or (bool not in kinds and isinstance(value, bool)):
        return value, f"{path} must be {' or '.join(words)}, not {'null' if value is None else repr(value)}"
    if isinstance(value, str):
        return value, f"{path}={value}: {one_of(value, choices)}" if choices and value not in choices else None
    if isinstance(value, float) and not math.isfinite(value):
        return value, f"{path} must be finite, not {value}"
    for name, is_bad, limit in (
        ("minimum", lambda v, x: v < x, "at least"),
        ("above", lambda v, x: v <= x, "more than"),
        ("maximum", lambda v, x: v > x, "at most"),
    ):
        if limits[name] is not None and is_bad(value, limits[name]):
            return value, f"{path} must be {limit} {limits[name]}, not {value}"
    return value, None


def check_patterns(path: str, value: Any, *, is_whole: bool) -> list[str]:
    """What is wrong with a mapping from regular expressions to numbers above 0, whole ones or not."""
    if not isinstance(value, Mapping):
        return [f'{path} must be a mapping such as {{".*attn/.*": 8}}, not {value!r}']
    problems = []
    for pattern, number in value.items():
        if not isinstance(pattern, str):
            problems.append(f"{path}: {pattern!r} is not a regular expression; put it in quotes")
            continue
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"{path}: {pattern!r} is not a regular expression: {error}")
        is_number = isinstance(number, int if is_whole else (int, float)) and not isinstance(number, bool)
        if not is_number or not 0 < number < math.inf:
            kind = "a whole number from 1" if is_whole else "a number above 0"
            problems.append(f"{path}: {pattern!r} must have {kind}, not {'null' if number is None else repr(number)}")
    return problems


def key_paths(cls: type, prefix: str = "") -> list[str]:
    """Every key as a dotted path, groups included: ``model``, ``model.lora_rank``, ..."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        paths.append(prefix + name)
        if dataclasses.is_dataclass(hint):
            paths += key_paths(typing.cast(type, hint), f"{prefix}{name}.")
    return paths


def unknown_key(path: str, known: Iterable[str]) -> str:
    """The one line that says that a key is unknown, with the closest known one."""
    known = list(known)
    group, _, leaf = path.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if group and k.rpartition(".")[0] == group}
    close = [k for k in known if k.rpartition(".")[2] == leaf][:1]  # right key, wrong or missing group
    if not close and siblings:
        close = [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.55)]
    elif not close:
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "see --cfg job for every key"
    return f"unknown key {path}: {hint}"


def one_of(value: str, choices: Iterable[str]) -> str:
    """``did you mean X? It is one of X, Y, Z``, for a value that is none of the choices."""
    choices = list(choices)
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return (f"did you mean {close[0]}? " if close else "") + f"it is one of {', '.join(choices)}"
