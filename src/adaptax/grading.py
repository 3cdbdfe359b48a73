"""Whether an answer is right, and how sure a share or a mean is. No jax here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from adaptax.answer_config import EvaluationConfig

Z = 1.959964  # of an interval that holds 95% of a normal distribution
# A sign counts where no word or number goes before it: "5-7" ends in 7.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?```", re.DOTALL)


def exact_match(given: str, expected: str, config: EvaluationConfig) -> bool:
    """The same text, but for space around it."""
    return given.strip() == expected.strip()


def regex(given: str, expected: str, config: EvaluationConfig) -> bool:
    """The answer holds ``evaluation.pattern``, whatever was expected."""
    assert config.pattern is not None
    return re.search(config.pattern, given) is not None


def json_equal(given: str, expected: str, config: EvaluationConfig) -> bool:
    """The same JSON value: order of keys and layout do not count. A fence of Markdown around it is taken off."""
    found, wanted = read_json(given), read_json(expected)
    return found is not None and found == wanted


def numeric(given: str, expected: str, config: EvaluationConfig) -> bool:
    """The last numbers are equal, to ``evaluation.tolerance`` of the expected one."""
    found, wanted = last_number(given), last_number(expected)
    return found is not None and wanted is not None and abs(found - wanted) <= config.tolerance * abs(wanted)


GRADES: dict[str, Callable[[str, str, EvaluationConfig], bool]] = {
    "exact_match": exact_match,
    "regex": regex,
    "json": json_equal,
    "numeric": numeric,
}


def why_not(metric: str, expected: str) -> str | None:
    """Why no answer could be right by this metric; None where one can."""
    if metric == "json" and read_json(expected) is None:
        return "is no JSON"
    if metric == "numeric" and last_number(expected) is None:
        return "holds no number"
    return None


def read_json(text: str) -> str | None:
    """The JSON value that a text is, as a text that equal values share; None where it is none.

    1 and 1.0 are equal, 1 and true are not.
    """
    fenced = _FENCE.search(text)
    try:
        return json.dumps(json.loads(fenced[1] if fenced else text, parse_float=_read_float), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _read_float(text: str) -> float:
    number = float(text)
    return int(number) if number.is_integer() else number


def last_number(text: str) -> float | None:
    """The last number in a text; commas between thousands are left out."""
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(found[-1].replace(",", "")) if found else None


def mean_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """(the mean of all tokens, half the width of its 95% interval), of sums and counts by row.

    Rows are what was drawn, not tokens: those of one row are alike. The interval is that of a ratio of means,
    linearised; it is NaN for a single row.
    """
    total, n = counts.sum(), len(counts)
    mean = float(sums.sum() / total)
    if n < 2:
        return mean, math.nan
    residuals = sums - mean * counts
    return mean, float(Z * np.sqrt(n / (n - 1) * np.square(residuals).sum()) / total)


def share_interval(is_right: Sequence[bool]) -> tuple[float, float, float]:
    """(the share, the ends of its 95% interval), after Wilson (1927)."""
    n = len(is_right)
    share = sum(is_right) / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return share, max(0.0, middle - half), min(1.0, middle + half)
