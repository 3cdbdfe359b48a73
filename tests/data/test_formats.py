"""Rows to examples: each format's columns, how a file's format is found, and what is no row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaptax.config import UserError
from adaptax.data.chat import Example, encode_chat, encode_text
from adaptax.data.formats import FORMATS, find_format
from adaptax.data.tokenizer import Tokenizer

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def same(left: Example, right: Example) -> bool:
    """Whether two examples are equal."""
    return np.array_equal(left.tokens, right.tokens) and np.array_equal(left.is_trained, right.is_trained)


def test_messages(tokenizer: Tokenizer) -> None:
    assert same(FORMATS["messages"].encode({"messages": TURNS}, tokenizer), encode_chat(TURNS, tokenizer))


def test_prompt_and_completion_are_a_conversation(tokenizer: Tokenizer) -> None:
    row = {"prompt": "Hi", "completion": "Hello"}
    assert same(FORMATS["prompt_completion"].encode(row, tokenizer), encode_chat(TURNS, tokenizer))


def test_text(tokenizer: Tokenizer) -> None:
    assert same(FORMATS["text"].encode({"text": "Hi"}, tokenizer), encode_text("Hi", tokenizer))


def test_columns_beside_those_of_the_format_are_left_alone(tokenizer: Tokenizer) -> None:
    row = {"messages": TURNS, "id": 7, "text": "other"}
    assert same(FORMATS["messages"].encode(row, tokenizer), encode_chat(TURNS, tokenizer))


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["messages"], "messages"),
        (["prompt", "completion"], "prompt_completion"),
        (["completion", "id", "prompt"], "prompt_completion"),
        (["text"], "text"),
        (["text", "completion", "prompt", "messages"], "messages"),
        (["text", "completion", "prompt"], "prompt_completion"),
        (["text", "prompt"], "text"),
    ],
)
def test_the_format_is_found_by_the_columns(columns: list[str], name: str) -> None:
    assert find_format(columns, "auto", "rows.jsonl") == name


def test_a_named_format_goes_before_the_columns() -> None:
    assert find_format(["messages", "text"], "text", "rows.jsonl") == "text"


def test_no_format_fits() -> None:
    with pytest.raises(UserError) as caught:
        find_format(["instruction", "output"], "auto", "rows.jsonl")
    assert str(caught.value) == (
        "rows.jsonl has the columns instruction, output; no format fits "
        "(one of messages: messages; prompt_completion: prompt, completion; text: text)"
    )


@pytest.mark.parametrize(
    ("columns", "name", "words"),
    [
        (["prompt"], "prompt_completion", "rows.jsonl has no column completion, which data.format=prompt_completion"),
        (["text"], "prompt_completion", "rows.jsonl has no column prompt, completion, which data.format=prompt_comp"),
        (["text"], "messages", "rows.jsonl has no column messages, which data.format=messages needs; it has text"),
        (["Text"], "text", "rows.jsonl has no column text, which data.format=text needs; it has Text"),
    ],
)
def test_a_named_format_needs_its_columns(columns: list[str], name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_format(columns, name, "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("messages", {"messages": None}, "messages must be a list of turns, not None"),
        ("messages", {"messages": []}, r"messages must be a list of turns, not \[\]"),
        ("messages", {"messages": "Hi"}, "messages must be a list of turns, not 'Hi'"),
        ("messages", {"messages": TURNS[0]}, "messages must be a list of turns, not {'role'"),
        ("messages", {"messages": TURNS[:1]}, "no assistant turn"),
        ("prompt_completion", {"prompt": None, "completion": "b"}, "prompt must be a text, not None"),
        ("prompt_completion", {"prompt": "a", "completion": 3}, "completion must be a text, not 3"),
        ("prompt_completion", {"prompt": TURNS, "completion": "b"}, "prompt must be a text, not .{50,80}$"),
        ("prompt_completion", {"prompt": " ", "completion": "b"}, "prompt is empty"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "completion is empty"),
        ("text", {"text": None}, "text must be a text, not None"),
        ("text", {"text": ["a"]}, r"text must be a text, not \['a'\]"),
        ("text", {"text": "\n"}, "text is empty"),
    ],
)
def test_what_is_no_row(tokenizer: Tokenizer, name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FORMATS[name].encode(row, tokenizer)
