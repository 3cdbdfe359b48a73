"""Which rows to take: conditions on columns, as ``data.filter`` writes them. No code is run."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from adaptax.config import UserError

Condition = Callable[[Any], bool]
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_OPERATOR = re.compile(r"\s*(>=|<=|==|!=|!~|>|<|~)\s*(.*)", re.DOTALL)


class RowFilter:
    """Whether a row is taken: every condition must hold.

    Args:
      conditions: column (``meta.lang`` for a nested one) -> a value, a list of values, or a text with an operator:
        ``> >= < <=`` with a number, ``== !=`` with a value or ``null``, ``~ !~`` with a regular expression that is
        searched for. No value, or a blank one where a number is due, does not meet ``> >= < <=``.
      key: where they stand, for messages.

    Raises:
      UserError: a condition that cannot be read.
    """

    def __init__(self, conditions: Any, key: str = "data.filter"):
        if not isinstance(conditions, Mapping):
            raise UserError(f"{key} must be like '{{lang: en, score: \">= 0.5\"}}', not {conditions!r}")
        self._key = key
        self.described = sorted((column, repr(value)) for column, value in _flatten(conditions))
        self._conditions = [(column, _parse(value, f"{key}.{column}")) for column, value in _flatten(conditions)]

    def check_columns(self, columns: Sequence[str], path: str) -> None:
        """Refuses a condition on a column that the file has not."""
        for name, _ in self._conditions:
            if name not in columns and name.partition(".")[0] not in columns:
                raise UserError(f"{self._key}: {path} has no column {name}; it has {', '.join(columns)}")

    def __bool__(self) -> bool:
        return bool(self._conditions)

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Raises UserError where a value cannot be compared."""
        for name, is_met in self._conditions:
            try:
                if not is_met(_look_up(row, name)):
                    return False
            except UserError as error:
                raise UserError(f"{name} {error}") from None
        return True


def _flatten(conditions: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for column, value in conditions.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{column}.")
        else:
            yield f"{prefix}{column}", value


def _look_up(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _parse(value: Any, key: str) -> Condition:
    if isinstance(value, list):
        for item in value:
            if isinstance(item, str) and _OPERATOR.fullmatch(item):
                raise UserError(f"{key}: {item!r} in a list is a value, no condition: a list names values to take")
        return lambda actual: any(_equal(actual, wanted) for wanted in value)
    match = _OPERATOR.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return lambda actual: _equal(actual, value)
    sign, rest = match.groups()
    if sign in ("==", "!="):
        return lambda actual: _equal(actual, rest) == (sign == "==")
    if sign in ("~", "!~"):
        try:
            pattern = re.compile(rest)
        except re.error as error:
            raise UserError(f"{key}={value!r} is not a regular expression: {error}") from None
        return lambda actual: (isinstance(actual, str) and pattern.search(actual) is not None) == (sign == "~")
    try:
        limit = float(rest)
    except ValueError:
        raise UserError(f"{key}={value!r}: {sign} needs a number, not {rest!r}") from None
    return lambda actual: not _is_blank(actual) and bool(COMPARISONS[sign](_number(actual, value), limit))


def _is_blank(value: Any) -> bool:
    """Whether there is no value; CSV has an empty text for it."""
    return value is None or (isinstance(value, str) and not value.strip())


def _number(value: Any, condition: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"must be a number for data.filter's {condition!r}, not {value!r:.60}") from None


def _equal(actual: Any, wanted: Any) -> bool:
    """Also across text and number or truth, as CSV has texts alone, and a command line has no types."""
    if actual is None or wanted is None:  # "!= null" has no other way to say it
        return actual is wanted or "null" in (actual, wanted)
    if isinstance(actual, str) == isinstance(wanted, str):
        return actual == wanted and isinstance(actual, bool) == isinstance(wanted, bool)
    text, other = (actual, wanted) if isinstance(actual, str) else (wanted, actual)
    if isinstance(other, bool):
        return text.strip().lower() == str(other).lower()
    for kind in (int, float):  # an id of 18 digits is no float
        with contextlib.suppress(ValueError):
            return kind(text) == other
    return False
