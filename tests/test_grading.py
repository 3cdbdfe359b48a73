"""Whether answers are right, and how sure shares and means are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from adaptax.answer_config import METRICS, EvaluationConfig, check_metric, metrics_of
from adaptax.grading import GRADES, last_number, mean_interval, share_interval, why_not


def evaluation(metric: Any = None, pattern: str | None = None, tolerance: float = 1e-6) -> EvaluationConfig:
    return EvaluationConfig(metric, pattern, tolerance, None, 0)


def grade(metric: str, given: str, expected: str, **config: Any) -> bool:
    return GRADES[metric](given, expected, evaluation(metric, **config))


def test_there_is_a_function_for_every_metric() -> None:
    assert tuple(GRADES) == METRICS


def test_exact_match_looks_past_the_space_around_alone() -> None:
    assert grade("exact_match", " yes\n", "yes")
    assert not grade("exact_match", "Yes", "yes")
    assert not grade("exact_match", "a  b", "a b")


def test_a_regex_is_searched_for() -> None:
    assert grade("regex", "so it is 42.", "anything", pattern=r"\b42\b")
    assert not grade("regex", "420", "42", pattern=r"\b42\b")


@pytest.mark.parametrize(
    ("given", "expected", "is_right"),
    [
        ('{"b": [1, 2], "a": "ü"}', '{"a":"\\u00fc","b":[1.0,2]}', True),
        ('```json\n{"a": 1}\n```', '{"a": 1}', True),
        ("Here:\n```\n[1]\n```\nDone.", "[1]", True),
        ("1e2", "100", True),
        ("-0.0", "0", True),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1}', '{"a": 1, "b": null}', False),
        ("1", "true", False),
        ("0", "false", False),
        ("0", "null", False),
        ('"1"', "1", False),
        ('{"a": 1', '{"a": 1}', False),
        ('{"a": 1} or so', '{"a": 1}', False),
        ("[" * 100_000, "[]", False),
        ("9" * 5000, "9", False),
        ("", "null", False),
    ],
)
def test_json_is_compared_by_value(given: str, expected: str, is_right: bool) -> None:
    assert grade("json", given, expected) is is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and 4 make 7", 7),
        ("1,234,567.50 in all", 1234567.5),
        ("1,2345", 2345),
        ("-5", -5),
        ("x = \N{MINUS SIGN}5", -5),
        ("$-3", -3),
        ("+7", 7),
        ("5-7", 7),
        ("2024-01-05", 5),
        ("(2)-3", 3),
        (".5", 0.5),
        ("is 5.", 5),
        ("12%", 12),
        ("1e3", 1000),
        ("2.5e-1", 0.25),
        ("none at all", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_are_equal_to_a_share_of_the_expected_one() -> None:
    assert grade("numeric", "about 3.14", "3.14159", tolerance=1e-3)
    assert not grade("numeric", "about 3.14", "3.14159", tolerance=1e-4)
    assert grade("numeric", "-0", "0")
    assert not grade("numeric", "0.0001", "0", tolerance=0.5)  # a share of nothing
    assert not grade("numeric", "no idea", "3")
    assert not grade("numeric", "1e999", "1e999")


def test_answers_that_nothing_could_equal_are_known() -> None:
    assert why_not("json", "yes") == "is no JSON"
    assert why_not("numeric", "yes") == "holds no number"
    assert (
        why_not("json", "[3]") is why_not("numeric", "3") is why_not("exact_match", "") is why_not("regex", "") is None
    )


@pytest.mark.parametrize(
    ("metric", "pattern", "problem"),
    [
        ("exact", None, "evaluation.metric=exact: did you mean exact_match?"),
        (["json", "numerik"], None, "evaluation.metric=numerik: did you mean numeric?"),
        ([3], None, "evaluation.metric=3: it is one of"),
        (3, None, "evaluation.metric must be one of"),
        ({"json": 1}, None, "evaluation.metric must be one of"),
        ("regex", None, "evaluation.metric=regex needs evaluation.pattern"),
        ("regex", "(", "evaluation.pattern='(' is not a regular expression"),
    ],
)
def test_mistakes_in_the_metrics(metric: Any, pattern: str | None, problem: str) -> None:
    [found] = check_metric(evaluation(metric, pattern))
    assert problem in found


@pytest.mark.parametrize(
    ("metric", "names"), [(None, []), ("json", ["json"]), (["json", "numeric"], ["json", "numeric"])]
)
def test_metrics_are_one_or_several_or_none(metric: Any, names: list[str]) -> None:
    assert check_metric(evaluation(metric)) == []
    assert metrics_of(evaluation(metric)) == names


# Intervals


def draw_rows(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and tokens of rows: those of a row are alike, and longer rows are easier."""
    counts = rng.integers(1, 30, num_rows)
    return counts * rng.gamma(4.0, 0.3, num_rows) * (1.5 - counts / 60), counts


def test_intervals_of_a_mean_hold_the_truth_95_times_of_100() -> None:
    rng = np.random.default_rng(0)
    sums, counts = draw_rows(rng, 2_000_000)
    truth, hits = sums.sum() / counts.sum(), 0
    for _ in range(2000):
        mean, half = mean_interval(*draw_rows(rng, 80))
        hits += abs(mean - truth) <= half
    assert 0.93 < hits / 2000 < 0.965  # 0.0049 is the standard error of this share


def test_the_interval_of_a_mean_is_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(1)
    sums, counts = draw_rows(rng, 300)
    mean, half = mean_interval(sums, counts)
    rows = rng.integers(0, 300, (4000, 300))
    low, high = np.quantile(sums[rows].sum(axis=1) / counts[rows].sum(axis=1), [0.025, 0.975])
    assert mean == pytest.approx(sums.sum() / counts.sum())
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=0.1 * half)


def test_the_interval_of_rows_that_are_all_alike_is_nothing_and_of_one_row_unknown() -> None:
    mean, half = mean_interval(np.array([1.0, 2.0, 4.0]), np.array([2, 4, 8]))
    assert (mean, half) == (0.5, 0.0)
    mean, half = mean_interval(np.array([3.0]), np.array([4]))
    assert mean == 0.75
    assert math.isnan(half)
    assert math.isnan(mean_interval(np.array([3.0, math.nan]), np.array([4, 4]))[0])


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.9])
def test_intervals_of_a_share_hold_the_truth_about_95_times_of_100(share: float) -> None:
    """Counted out over all that may be drawn: Wilson's interval is near 95% on the average of shares, not at each."""
    n, covered = 100, 0.0
    for k in range(n + 1):
        found, low, high = share_interval([True] * k + [False] * (n - k))
        assert low <= found == k / n <= high
        covered += math.comb(n, k) * share**k * (1 - share) ** (n - k) * (low <= share <= high)
    assert 0.92 < covered < 0.98


def test_shares_of_nothing_and_of_all_have_an_interval_within_0_and_1() -> None:
    assert share_interval([False] * 20) == pytest.approx((0, 0, 0.16113), abs=1e-4)
    assert share_interval([True] * 20) == pytest.approx((1, 0.83887, 1), abs=1e-4)
    assert share_interval([True]) == pytest.approx((1, 0.20655, 1), abs=1e-4)
