"""Options of the commands after training."""

from __future__ import annotations

import re
from typing import Any

import pytest

from adaptax.options import (
    OPTIONS,
    EvaluateOptions,
    ExportOptions,
    GenerateOptions,
    InspectOptions,
    describe_options,
    option_names,
    take_options,
)
from adaptax.schema import UserError


def take(cls: type, *arguments: str) -> tuple[Any, list[str]]:
    return take_options(cls, arguments, lambda name: name == "chat")


def test_options_are_taken_and_keys_are_left() -> None:
    options, rest = take(
        GenerateOptions, "outputs/a", "model.dtype=bfloat16", "prompt=hi", "+data.columns.a=b", "--info"
    )
    assert options == GenerateOptions("outputs/a", None, "hi", None, None, None)
    assert rest == ["model.dtype=bfloat16", "+data.columns.a=b", "--info"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a, b=c; {d: [e]}", "a, b=c; {d: [e]}"),
        ("über $HOME ${x} \\", "über $HOME ${x} \\"),
        ('"a, b"', "a, b"),
        ("'a'", "a"),
        ('"a" and "b"', '"a" and "b"'),
        ("'", None),
        ("a\nb", "a\nb"),
        ("3", "3"),
        ("true", "true"),
        (" hi ", " hi "),
    ],
)
def test_texts_are_taken_as_they_stand_but_for_quotes_around_all(given: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(UserError, match="prompt= is empty"):
            take(GenerateOptions, f"prompt={given}")
    else:
        assert take(GenerateOptions, f"prompt={given}")[0].prompt == text


def test_null_is_what_an_option_is_without_a_value() -> None:
    options, _ = take(EvaluateOptions, "adapter=null", "adapters=null")
    assert (options.adapter, options.adapters) == (None, None)


def test_data_names_a_file_of_rows_or_a_choice_of_the_configuration() -> None:
    assert take(EvaluateOptions, "data=chat")[1] == ["data=chat"]
    assert take(EvaluateOptions, "data=chat.jsonl")[0].data == "chat.jsonl"
    assert take(EvaluateOptions, "+data=chat.jsonl", "data=chat")[1] == ["data=chat"]
    assert take(ExportOptions, "data=rows.jsonl")[1] == ["data=rows.jsonl"]  # it has none


def test_other_values_are_read_and_checked() -> None:
    assert take(EvaluateOptions, "adapters=[a/b, none,'c d']")[0].adapters == ["a/b", "none", "c d"]
    options, _ = take(ExportOptions, "uniform=true", "max_shard_gib=1", "format=gguf")
    assert (options.uniform, options.max_shard_gib, options.format) == (True, 1.0, "gguf")
    assert take(ExportOptions)[0] == ExportOptions(None, None, "peft", None, False, 2.0)
    assert take(InspectOptions, "rank=4")[0].rank == 4


@pytest.mark.parametrize(
    ("cls", "arguments", "problem"),
    [
        (GenerateOptions, ["prompt=a", "prompt=b"], "prompt is given twice: a and b"),
        (GenerateOptions, ["one", "run=two"], "run is given twice: one and two"),
        (GenerateOptions, ["run="], "run= is empty: give it a value, or leave it out"),
        (GenerateOptions, ['prompt=""'], "prompt= is empty"),
        (EvaluateOptions, ["compare=bass"], "compare=bass: did you mean base?"),
        (EvaluateOptions, ["adapters=[a"], "adapters=[a: it cannot be read; is a bracket or a quote not closed?"),
        (ExportOptions, ["format=ggml"], "format=ggml: did you mean gguf?"),
        (
            ExportOptions,
            ["uniform=maybe", "max_shard_gib=0"],
            "uniform must be true or false, not 'maybe'; max_shard_gib",
        ),
        (InspectOptions, ["energy=2"], "energy must be at most 1, not 2.0"),
        (InspectOptions, ["rank=two"], "rank must be a whole number, not 'two'"),
    ],
)
def test_mistakes_are_told(cls: type, arguments: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        take(cls, *arguments)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_described(command: str) -> None:
    described = dict(describe_options(OPTIONS[command]))
    assert list(described) == option_names(command)
    assert all(words.endswith(".") and "``" not in words for words in described.values())
    assert option_names("train") == []


def test_defaults_are_told() -> None:
    assert dict(describe_options(ExportOptions))["format"].endswith("Default peft.")
