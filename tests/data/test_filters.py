"""Which rows are taken: every operator, on the values that JSON, tables and CSV have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adaptax.config import UserError
from adaptax.data.filters import RowFilter

BIG = 1234567890123456789  # as a float it is ...768


@pytest.mark.parametrize(
    ("condition", "taken", "left"),
    [
        ("en", ["en"], ["de", "En", "en ", "", None, 1, True, ["en"]]),
        ("", [""], [" ", None, 0, False]),
        (5, [5, 5.0, "5", "5.0", " 5 ", "5e0"], [6, "6", "five", "", None, True, [5]]),
        (0.5, [0.5, "0.5", ".50"], [0, 1, "0,5", None]),
        (1, [1, 1.0, "1"], [True, "true"]),
        (0, [0, "0", "-0"], [False, None, ""]),
        (BIG, [BIG, str(BIG)], [BIG + 1, str(BIG + 1), float(BIG)]),
        (True, [True, "true", "True", " TRUE"], [False, 1, "1", "yes", "false", None]),
        (False, [False, "false", "False"], [True, 0, "0", "", None]),
        (None, [None, "null"], ["", 0, False, "None", []]),
        ("true", [True, "true"], ["True", False, 1]),
        ("5", [5, 5.0, "5"], ["5.0", 6, True]),
        ("null", [None, "null"], ["", 0]),
        ("nan", ["nan"], [math.nan, None]),
        (["en", "de"], ["en", "de"], ["fr", None, "ende", ["en"]]),
        ([1, 2.5, "x"], [1, "1", 2.5, "2.5", "x"], [2, True, "y", None]),
        ([None, "en"], [None, "en"], ["", "de"]),
        ([True], [True, "true"], [1, False]),
        ([], [], ["", None, 0, "en"]),
        ("> 0.5", [0.6, 1, "0.6", " 1 ", "1e3", math.inf, True], [0.5, 0, -1, "0.5", None, "", "  ", math.nan, False]),
        (">= 0.5", [0.5, "0.50", 1], [0.49, "0.4", None, "", math.nan]),
        ("< 0", [-1, "-1", -0.1, -math.inf, "-inf"], [0, -0.0, "0", 1, None, "", math.nan]),
        ("<= -1e3", [-1000, "-1000.0", -1001], [-999, "", None]),
        (">0.5", [1], [0]),
        ("  >=   1  ", [1], [0.9]),
        ("> 1_000", [1001], [1000]),
        ("== en", ["en"], ["de", "en ", None]),
        ("==en", ["en"], ["== en"]),
        ("== 5", [5, 5.0, "5"], [6, "5.0", None, True]),
        (f"== {BIG}", [BIG, str(BIG)], [BIG + 1]),
        ("== true", [True, "true"], [False, 1]),
        ("== null", [None, "null"], ["", 0, "x"]),
        ("== ", [""], [" ", None, 0]),
        ("== > 5", ["> 5"], [6]),
        ("== a\nb", ["a\nb"], ["a"]),
        ("!= en", ["de", "", None, 1, "EN"], ["en"]),
        ("!= 5", [6, "6", None, True], [5, 5.0, "5"]),
        ("!= null", ["x", "", 0, False, []], [None, "null"]),
        ("!= ", ["x", " ", None, 0], [""]),
        ("~ ^a.c$", ["abc", "a-c"], ["abcd", "ABC", "", None, 5, ["abc"]]),
        ("~ b", ["abc", "b"], ["ac", None]),
        ("~(?i)spam|ham", ["Spam!", "the ham"], ["eggs", None]),
        ("~ .", ["x", " "], ["", None, 5, True]),
        (r"~ \d{3}", ["a 123"], ["12", 123]),
        ("~", ["x", ""], [None, 5]),
        ("!~ forum|spam", ["book", "", None, 5], ["forum", "my spam"]),
        ("!~ ^$", ["x", None], [""]),
        (r"~ a\nb", ["a\nb"], ["ab"]),
        ("=5", ["=5"], [5]),  # no operator, but a text
        ("=> 5", ["=> 5"], [5, 6]),
        ("a > 5", ["a > 5"], [6]),
    ],
)
def test_conditions(condition: Any, taken: list[Any], left: list[Any]) -> None:
    is_taken = RowFilter({"x": condition})
    assert [value for value in [*taken, *left] if is_taken({"x": value})] == taken


def test_every_condition_must_hold() -> None:
    is_taken = RowFilter({"lang": "en", "score": ">= 0.5", "source": "!~ spam"})
    good = {"lang": "en", "score": 0.5, "source": "book", "other": None}
    assert is_taken(good)
    for column, value in (("lang", "de"), ("score", 0.4), ("source", "spam")):
        assert not is_taken(good | {column: value})


def test_no_conditions() -> None:
    assert not RowFilter({})
    assert RowFilter({})({"x": 1})
    assert RowFilter({"x": None})


@pytest.mark.parametrize(
    ("conditions", "taken", "left"),
    [
        ({"meta.lang": "en"}, [{"meta": {"lang": "en"}}, {"meta.lang": "en"}], [{"meta": {"lang": "de"}}]),
        ({"meta": {"lang": "en"}}, [{"meta": {"lang": "en"}}, {"meta.lang": "en"}], [{"meta": {}}, {"meta": "en"}]),
        ({"a.b.c": "> 1"}, [{"a": {"b": {"c": 2}}}], [{"a": {"b": {"c": 1}}}, {"a": {"b": None}}, {"a": [2]}, {}]),
        ({"a": {"b": {"c": 1}, "d": 2}}, [{"a": {"b": {"c": 1}, "d": 2}}], [{"a": {"b": {"c": 1}}}, {"a": {"d": 2}}]),
        ({"meta.lang": None}, [{"meta": {"lang": None}}, {"meta": None}, {"meta": {}}, {}], [{"meta": {"lang": "en"}}]),
        ({"meta.lang": "!= en"}, [{"meta": None}, {"meta": {"lang": "de"}}], [{"meta": {"lang": "en"}}]),
        ({"a.b": 1}, [{"a.b": 1, "a": {"b": 2}}], [{"a.b": 2, "a": {"b": 1}}]),  # the very name goes first
        ({"a.b": "> 1", "a": {"b": "< 5"}}, [{"a": {"b": 2}}], [{"a": {"b": 1}}, {"a": {"b": 5}}]),  # both hold
        ({1: "x"}, [{"1": "x"}], [{"1": "y"}]),
    ],
)
def test_nested_columns(conditions: Mapping[Any, Any], taken: list[dict[str, Any]], left: list[dict[str, Any]]) -> None:
    is_taken = RowFilter(conditions)
    assert [row for row in [*taken, *left] if is_taken(row)] == taken


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        (None, "data.filter must be like '{lang: en, score: \">= 0.5\"}', not None"),
        ("lang: en", "data.filter must be like '{lang: en, score: \">= 0.5\"}', not 'lang: en'"),
        (["lang"], "data.filter must be like '{lang: en, score: \">= 0.5\"}', not ['lang']"),
        ({"s": ">= high"}, "data.filter.s='>= high': >= needs a number, not 'high'"),
        ({"s": ">"}, "data.filter.s='>': > needs a number, not ''"),
        ({"s": "< 0,5"}, "data.filter.s='< 0,5': < needs a number, not '0,5'"),
        ({"s": "<html>"}, "data.filter.s='<html>': < needs a number, not 'html>'"),
        ({"s": "<= 1 and > 0"}, "data.filter.s='<= 1 and > 0': <= needs a number, not '1 and > 0'"),
        ({"m": {"s": "> x"}}, "data.filter.m.s='> x': > needs a number, not 'x'"),
        ({"s": "~ ("}, "data.filter.s='~ (' is not a regular expression: "),
        ({"s": "!~ [a"}, "data.filter.s='!~ [a' is not a regular expression: "),
        ({"s": "~ *"}, "data.filter.s='~ *' is not a regular expression: nothing to repeat at position 0"),
    ],
)
def test_conditions_that_cannot_be_read(conditions: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        RowFilter(conditions)
    assert str(caught.value).startswith(words)
    assert len(str(caught.value)) < 120
    with pytest.raises(UserError) as caught:
        RowFilter(conditions, "data.mixture[1].filter")
    assert str(caught.value).startswith(words.replace("data.filter", "data.mixture[1].filter"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("high", "'high'"),
        ([1], "[1]"),
        ({"a": 1}, "{'a': 1}"),
        ("1,5", "'1,5'"),
        (10**400, "1" + "0" * 59),
        ("x" * 1000, "'" + "x" * 59),
    ],
)
def test_values_that_cannot_be_compared(value: Any, shown: str) -> None:
    is_taken = RowFilter({"meta.score": ">= 0.5"})
    with pytest.raises(UserError) as caught:
        is_taken({"meta": {"score": value}})
    assert str(caught.value) == f"meta.score must be a number for data.filter's '>= 0.5', not {shown}"


def test_a_value_that_another_condition_leaves_out_is_not_looked_at() -> None:
    is_taken = RowFilter({"kind": "rated", "score": "> 1"})
    assert not is_taken({"kind": "free", "score": "none given"})
    with pytest.raises(UserError, match="score must be a number"):
        is_taken({"kind": "rated", "score": "none given"})


def test_unknown_columns() -> None:
    is_taken = RowFilter({"lang": "en", "meta.score": "> 1"})
    is_taken.check_columns(["lang", "meta", "text"], "rows.jsonl")
    is_taken.check_columns(["lang", "meta.score", "text"], "rows.jsonl")
    with pytest.raises(UserError) as caught:
        is_taken.check_columns(["lang", "text"], "rows.jsonl")
    assert str(caught.value) == "data.filter: rows.jsonl has no column meta.score; it has lang, text"
    with pytest.raises(UserError) as caught:
        RowFilter({"Lang": "en"}, "data.mixture[0].filter").check_columns(["lang"], "a.csv")
    assert str(caught.value) == "data.mixture[0].filter: a.csv has no column Lang; it has lang"
    RowFilter({}).check_columns([], "rows.jsonl")


def test_rows_of_a_csv_file(tmp_path: Path) -> None:
    """All of its values are texts, and a missing one is an empty text."""
    from adaptax.data.sources import open_rows

    path = tmp_path / "rows.csv"
    path.write_text("id,lang,score,ok\n1,en,0.9,True\n2,de,0.9,true\n3,en,,false\n4,en,0.10,TRUE\n5,,1e0,\n")
    rows = open_rows(str(path))

    def taken(**conditions: Any) -> list[str]:
        is_taken = RowFilter(conditions)
        return [rows[i]["id"] for i in range(len(rows)) if is_taken(rows[i])]

    assert taken(score=">= 0.5") == ["1", "2", "5"]
    assert taken(score="< 0.5") == ["4"]
    assert taken(score=0.1) == ["4"]
    assert taken(score="== ") == ["3"]
    assert taken(lang="!= ") == ["1", "2", "3", "4"]
    assert taken(ok=True) == ["1", "2", "4"]
    assert taken(id=[1, "3", 5.0], lang="en") == ["1", "3"]
    assert taken(id=3) == ["3"]


def test_a_condition_in_a_list_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.filter.n: '>= 5' in a list is a value, no condition"):
        RowFilter({"n": ["a", ">= 5"]})


def test_names_of_any_kind_have_an_order() -> None:
    assert RowFilter({1: "a", "b": "c"}).described == RowFilter({"b": "c", 1: "a"}).described
