"""Which sources a configuration names, and what is refused before a row is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaptax.config import Config, UserError
from adaptax.data.catalog import Source, check_sources, eval_sources, train_sources
from rows import Write, chat, data_config, run_config

EMBEDDED = "embedded:home/train.jsonl"


@pytest.fixture
def path(write_jsonl: Write) -> str:
    """A file of one row."""
    return str(write_jsonl([chat("Hi", "Hello")]))


def config_of(train: Any = None, num_batches: int | None = None, **changes: Any) -> Config:
    """A run with these data."""
    return run_config(data_config(train, **changes), num_batches=num_batches)


# Names to sources


def test_files_share_what_the_section_says() -> None:
    changes: dict[str, Any] = {"format": "text", "columns": {"text": "t"}, "filter": {"n": 1}, "max_rows": 7}
    config = data_config(["a.jsonl", "b.csv"], eval="c.jsonl", **changes)
    shared = ("text", {"text": "t"}, {"n": 1})
    assert train_sources(config) == [Source("a.jsonl", *shared, 7), Source("b.csv", *shared, 7)]
    assert eval_sources(config) == [Source("c.jsonl", *shared, None)]  # max_rows is of training
    assert eval_sources(data_config("a.jsonl")) == []
    assert [source.path for source in train_sources(data_config("a.jsonl"))] == ["a.jsonl"]


def test_sources_of_a_mixture_say_their_own_or_share() -> None:
    own = {"format": "text", "columns": {"text": "t"}, "filter": {"n": 1}, "max_rows": 7}
    entries = [{"path": "a.jsonl", "weight": 2, **own}, {"path": "hub:org/name", "weight": 0.5}]
    config = data_config(mixture=entries, format="alpaca", filter={"lang": "en"}, max_rows=9)
    assert train_sources(config) == [
        Source("a.jsonl", "text", {"text": "t"}, {"n": 1}, 7, 2.0),
        Source("hub:org/name", "alpaca", {}, {"lang": "en"}, 9, 0.5),
    ]


def test_max_rows_of_a_source_of_a_mixture_may_be_all() -> None:
    entries = [{"path": "a.jsonl", "weight": 1, "max_rows": None}]
    assert train_sources(data_config(mixture=entries, max_rows=9))[0].max_rows is None


def test_a_mixture_stands_in_for_the_rows_that_ship_with_the_package_alone(path: str) -> None:
    entries = [{"path": path, "weight": 1}]
    for train in (None, EMBEDDED, [EMBEDDED]):
        assert [source.path for source in train_sources(data_config(train, mixture=entries))] == [path]
    for train in (path, [EMBEDDED, path]):
        with pytest.raises(UserError, match="data.train and data.mixture are both set: data.train=null, or"):
            train_sources(data_config(train, mixture=entries))


@pytest.mark.parametrize(
    ("mixture", "words"),
    [
        ([], "data.mixture must be like '[{path: a.jsonl, weight: 2}, ...]', not []"),
        ("a.jsonl", "data.mixture must be like '[{path: a.jsonl, weight: 2}, ...]', not 'a.jsonl'"),
        ({"path": "a", "weight": 1}, "data.mixture must be like '[{path: a.jsonl, weight: 2}, ...]', not {"),
        (["a.jsonl"], "data.mixture[0] must be like {path: a.jsonl, weight: 2}, not 'a.jsonl'"),
        ([{"weight": 1}], "data.mixture[0] must be like {path: a.jsonl, weight: 2}, not {'weight': 1}"),
        ([{"path": 3, "weight": 1}], "data.mixture[0] must be like {path: a.jsonl, weight: 2}, not {"),
        ([{"path": "a", "wieght": 1}], "data.mixture[0].wieght: did you mean weight? it is one of columns, filter, "),
        ([{"path": "a"}], "data.mixture[0].weight is missing"),
        ([{"path": "a", "weight": 1}, {"path": "a", "weight": 0}], "data.mixture[1].weight must be a number above 0"),
        ([{"path": "a", "weight": -1}], "data.mixture[0].weight must be a number above 0, not -1"),
        ([{"path": "a", "weight": True}], "data.mixture[0].weight must be a number above 0, not True"),
        ([{"path": "a", "weight": "2"}], "data.mixture[0].weight must be a number above 0, not '2'"),
        ([{"path": "a", "weight": float("nan")}], "data.mixture[0].weight must be a number above 0, not nan"),
        ([{"path": "a", "weight": float("inf")}], "data.mixture[0].weight must be a number above 0, not inf"),
        ([{"path": "a", "weight": 1, "max_rows": 0}], "data.mixture[0].max_rows must be a whole number from 1, not 0"),
        ([{"path": "a", "weight": 1, "max_rows": 2.5}], "data.mixture[0].max_rows must be a whole number from 1"),
        ([{"path": "a", "weight": 1, "max_rows": True}], "data.mixture[0].max_rows must be a whole number from 1"),
        ([{"path": "a", "weight": 1, "format": "txt"}], "data.mixture[0].format=txt: did you mean text? it is one of"),
        ([{"path": "a", "weight": 1, "columns": ["a"]}], "data.mixture[0].columns must be like {prompt: question, "),
        ([{"path": "a", "weight": 1, "columns": {"q": "a"}}], "data.mixture[0].columns: q is no column of a format"),
        ([{"path": "a", "weight": 1, "filter": "n > 1"}], "data.mixture[0].filter must be like '{lang: en, "),
        ([{"path": "a", "weight": 1, "filter": {"n": "> x"}}], "data.mixture[0].filter.n='> x': > needs a number"),
    ],
)
def test_what_is_no_mixture(mixture: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        train_sources(data_config(mixture=mixture))
    assert str(caught.value).startswith(words)


# What is wrong before a row is read


def test_what_is_there_is_good(path: str) -> None:
    check_sources(config_of(path))
    check_sources(config_of(EMBEDDED, eval="embedded:home/eval.jsonl"))
    check_sources(config_of(mixture=[{"path": path, "weight": 1}, {"path": EMBEDDED, "weight": 1}]))
    check_sources(config_of("hub:nobody/nothing"))  # looked up later, as it may take long
    check_sources(config_of(path, num_batches=5, streaming=True, packing=True))
    check_sources(config_of(path, num_batches=5, streaming=True, packing=True, eval=path, eval_fraction=0.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": "no/such.jsonl"}, "data.train=no/such.jsonl: no such file"),
        ({"train": ["{path}", "no/such.jsonl"]}, "data.train=no/such.jsonl: no such file"),
        ({"eval": "no/such.jsonl"}, "data.eval=no/such.jsonl: no such file"),
        ({"train": None, "mixture": [{"path": "no/such.jsonl", "weight": 1}]}, "data.mixture=no/such.jsonl: no such"),
        ({"train": "no/*.jsonl"}, "data.train=no/*.jsonl: no file matches this pattern"),
        ({"format": "txt"}, "data.format=txt: did you mean text? it is one of auto, messages, "),
        ({"columns": {"q": "a"}}, "data.columns: q is no column of a format"),
        ({"columns": {"prompt": 3}}, "data.columns must be like {prompt: question, completion: answer}, not"),
        ({"filter": ["a"]}, "data.filter must be like '{lang: en, score: "),
        ({"filter": {"text": "~("}}, "data.filter.text='~(' is not a regular expression: "),
        ({"streaming": True, "packing": True}, "data.streaming=true does not know how long an epoch is: set training."),
        (
            {"streaming": True, "packing": True, "num_batches": 5, "eval_fraction": 0.1},
            "data.streaming=true cannot hold",
        ),
        ({"streaming": True, "num_batches": 5}, "data.streaming=true packs rows: data.packing=true"),
    ],
)
def test_what_is_wrong_is_told(path: str, changes: dict[str, Any], words: str) -> None:
    values = {"train": path} | changes
    if isinstance(values["train"], list):
        values["train"] = [name.format(path=path) for name in values["train"]]
    with pytest.raises(UserError) as caught:
        check_sources(config_of(**values))
    assert str(caught.value).startswith(words)


def test_no_row_is_read(tmp_path: Path) -> None:
    """What is in a file shows later."""
    (tmp_path / "rows.jsonl").write_text("{ no JSON\n")
    check_sources(config_of(tmp_path / "rows.jsonl"))
