"""Rows to conversations: each format's columns, how a file's format is found, and what is no row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from adaptax.config import UserError
from adaptax.data.chat import Example, encode_rows
from adaptax.data.formats import FORMATS, Fields, check_format, find_format
from adaptax.data.tokenizer import Tokenizer
from conversations import chat, parts
from rows import encode_chat, encode_text

TURNS = chat(("user", "Hi"), ("assistant", "Hello"))
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
MODES = ("assistant", "last_assistant", "all")
Row = dict[str, Any]
Columns = dict[str, str]
NO_COLUMNS: Columns = {}


def encode(
    tokenizer: Tokenizer, name: str, row: Row, columns: Columns = NO_COLUMNS, supervise: str = "assistant"
) -> Example:
    """A row in a format, as tokens."""
    (example,) = encode_rows([FORMATS[name].render(Fields(row, columns), supervise)], tokenizer)
    assert isinstance(example, Example)
    return example


def same(left: Example, right: Example) -> bool:
    """Whether two examples are equal."""
    return np.array_equal(left.tokens, right.tokens) and np.array_equal(left.is_trained, right.is_trained)


SYSTEM_TURNS = chat(("system", " S "), ("user", "Hi"), ("assistant", "Hello"))
INPUT_TURNS = chat(("user", "Do\n\n{x}"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("name", "row", "columns", "turns"),
    [
        ("messages", {"messages": TURNS}, {}, TURNS),
        ("messages", {"messages": SHARED}, {}, TURNS),
        ("messages", {"messages": SYSTEM_TURNS}, {}, SYSTEM_TURNS),
        ("messages", {"messages": chat(("user", parts("H", "i")), ("model", parts("Hello")))}, {}, TURNS),
        ("messages", {"messages": TURNS, "id": 7, "text": "other"}, {}, TURNS),
        ("messages", {"talk": TURNS, "messages": None}, {"messages": "talk"}, TURNS),
        ("sharegpt", {"conversations": SHARED}, {}, TURNS),
        ("sharegpt", {"conversations": TURNS}, {}, TURNS),
        ("sharegpt", {"items": SHARED}, {"conversations": "items"}, TURNS),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, {}, TURNS),
        ("prompt_completion", {"prompt": " Hi\n", "completion": "\nHello "}, {}, TURNS),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello", "system": None}, {}, TURNS),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello", "system": ""}, {}, TURNS),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello", "system": " S "}, {}, SYSTEM_TURNS),
        ("prompt_completion", {"q": "Hi", "a": "Hello"}, {"prompt": "q", "completion": "a"}, TURNS),
        (
            "prompt_completion",
            {"q": "Hi", "completion": "Hello", "s": " S "},
            {"prompt": "q", "system": "s"},
            SYSTEM_TURNS,
        ),
        (
            "prompt_completion",
            {"prompt": "Hello", "completion": "Hi"},
            {"prompt": "completion", "completion": "prompt"},
            TURNS,
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello", "input": "not of this format"}, {}, TURNS),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}, {}, TURNS),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, {}, TURNS),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello", "system": ""}, {}, TURNS),
        ("alpaca", {"instruction": "Hi", "input": " \n", "output": "Hello", "system": "\t"}, {}, TURNS),
        ("alpaca", {"instruction": "Do", "input": "{x}", "output": "Hello"}, {}, INPUT_TURNS),
        ("alpaca", {"instruction": "Hi", "output": "Hello", "system": " S "}, {}, SYSTEM_TURNS),
        (
            "alpaca",
            {"task": "Do", "data": "{x}", "out": "Hello"},
            {"instruction": "task", "input": "data", "output": "out"},
            INPUT_TURNS,
        ),
    ],
)
@pytest.mark.parametrize("supervise", MODES)
def test_rows_are_conversations(
    tokenizer: Tokenizer, supervise: str, name: str, row: Row, columns: Columns, turns: list[Row]
) -> None:
    example = encode(tokenizer, name, row, columns, supervise)
    assert same(example, encode_chat(turns, tokenizer, supervise))
    assert example.is_trained.any()


def test_an_instruction_and_its_input_by_the_letter(tokenizer: Tokenizer) -> None:
    row = {"instruction": "Sum up.", "input": "A long text.\n", "output": "Short.", "system": "Be brief."}
    tokens = encode(tokenizer, "alpaca", row).tokens.tolist()
    assert tokenizer.decode(tokens) == (
        "<start_of_turn>user\nBe brief.\n\nSum up.\n\nA long text.<end_of_turn>\n"
        "<start_of_turn>model\nShort.<end_of_turn>\n"
    )


@pytest.mark.parametrize("supervise", MODES)
def test_text(tokenizer: Tokenizer, supervise: str) -> None:
    assert same(encode(tokenizer, "text", {"text": " Hi\n"}, {}, supervise), encode_text(" Hi\n", tokenizer))
    row = {"story": " Hi\n", "text": "other"}
    assert same(encode(tokenizer, "text", row, {"text": "story"}, supervise), encode_text(" Hi\n", tokenizer))


def test_flags_of_messages_hold(tokenizer: Tokenizer) -> None:
    turns = [*TURNS, TURNS[0], TURNS[1] | {"train": False}]
    example = encode(tokenizer, "messages", {"messages": turns})
    assert example.is_trained.any()
    assert same(example, encode_chat(turns, tokenizer))
    assert not encode(tokenizer, "sharegpt", {"conversations": [SHARED[0], SHARED[1] | {"weight": 0}]}).is_trained.any()


def test_which_formats_are_conversations() -> None:
    assert [name for name, form in FORMATS.items() if not form.is_chat] == ["text"]


@pytest.mark.parametrize(
    ("columns", "names", "name"),
    [
        (["messages"], {}, "messages"),
        (["conversations"], {}, "sharegpt"),
        (["prompt", "completion"], {}, "prompt_completion"),
        (["completion", "id", "prompt"], {}, "prompt_completion"),
        (["instruction", "output"], {}, "alpaca"),
        (["id", "output", "input", "instruction", "system"], {}, "alpaca"),
        (["text"], {}, "text"),
        (["text", "completion", "prompt", "output", "instruction", "conversations", "messages"], {}, "messages"),
        (["text", "completion", "prompt", "output", "instruction", "conversations"], {}, "sharegpt"),
        (["text", "completion", "prompt", "output", "instruction"], {}, "alpaca"),
        (["text", "completion", "prompt"], {}, "prompt_completion"),
        (["text", "prompt"], {}, "text"),
        (["text", "instruction"], {}, "text"),
        (["q", "a"], {"prompt": "q", "completion": "a"}, "prompt_completion"),
        (["q", "completion"], {"prompt": "q"}, "prompt_completion"),
        (["messages", "q", "a"], {"instruction": "q", "output": "a"}, "alpaca"),  # a format that is named goes first
        (["messages", "body"], {"text": "body"}, "text"),
        (["messages", "text"], {"text": "messages"}, "text"),
        (["messages", "talk"], {"messages": "talk"}, "messages"),
        (["prompt", "completion", "sys"], {"system": "sys"}, "prompt_completion"),
        (["instruction", "output", "sys"], {"system": "sys"}, "alpaca"),
        (["messages", "prompt", "completion", "sys"], {"system": "sys"}, "messages"),
        (["prompt", "completion"], {"prompt": "completion", "completion": "prompt"}, "prompt_completion"),
    ],
)
def test_the_format_is_found_by_the_columns(columns: list[str], names: Columns, name: str) -> None:
    assert find_format(columns, "auto", "rows.jsonl", names) == name
    assert find_format(columns, name, "rows.jsonl", names) == name
    if not names:
        assert find_format(columns, "auto", "rows.jsonl") == name


def test_a_named_format_goes_before_the_columns() -> None:
    assert find_format(["messages", "text"], "text", "rows.jsonl") == "text"
    assert find_format(["messages", "body"], "text", "rows.jsonl", {"text": "body"}) == "text"


NEEDED = (
    "no format fits (one of messages: messages; sharegpt: conversations; alpaca: instruction, output; "
    "prompt_completion: prompt, completion; text: text): name yours like "
    "'data.columns={prompt: question, completion: answer}'"
)


@pytest.mark.parametrize(
    ("columns", "names", "has"),
    [
        (["question", "answer"], {}, "question, answer"),
        (["Messages"], {}, "Messages"),
        ([], {}, "no columns"),
        (["prompt", "instruction"], {}, "prompt, instruction"),
        (["q", "messages"], {"prompt": "q"}, "q, messages"),  # not the format of messages: its map is of another
        ([f"c{i}" for i in range(12)], {}, ", ".join(f"c{i}" for i in range(12))),
        ([f"c{i}" for i in range(500)], {}, ", ".join(f"c{i}" for i in range(12)) + " and 488 more"),
    ],
)
def test_no_format_fits(columns: list[str], names: Columns, has: str) -> None:
    with pytest.raises(UserError) as caught:
        find_format(columns, "auto", "rows.jsonl", names)
    assert str(caught.value) == f"rows.jsonl has {'the columns ' if columns else ''}{has}; {NEEDED}"


@pytest.mark.parametrize(
    ("columns", "name", "names", "words"),
    [
        (["prompt"], "prompt_completion", {}, "completion, which data.format=prompt_completion needs; it has prompt"),
        (
            ["text"],
            "prompt_completion",
            {},
            "prompt, completion, which data.format=prompt_completion needs; it has text",
        ),
        (["text"], "messages", {}, "messages, which data.format=messages needs; it has text"),
        (["text"], "sharegpt", {}, "conversations, which data.format=sharegpt needs; it has text"),
        (["input", "output"], "alpaca", {}, "instruction, which data.format=alpaca needs; it has input, output"),
        (["Text"], "text", {}, "text, which data.format=text needs; it has Text"),
        (
            ["q"],
            "prompt_completion",
            {"prompt": "q"},
            "completion, which data.format=prompt_completion needs; it has q",
        ),
        ([], "text", {}, "text, which data.format=text needs; it has none"),
        (["a"], "text", {"text": "body"}, "body, which data.columns names; it has a"),
        (["a"], "auto", {"prompt": "q", "completion": "a"}, "q, which data.columns names; it has a"),
        (["x"], "auto", {"prompt": "q", "completion": "a"}, "q, a, which data.columns names; it has x"),
        (
            ["prompt", "completion"],
            "auto",
            {"system": "sys"},
            "sys, which data.columns names; it has prompt, completion",
        ),
    ],
)
def test_columns_that_are_missing(columns: list[str], name: str, names: Columns, words: str) -> None:
    with pytest.raises(UserError) as caught:
        find_format(columns, name, "rows.jsonl", names)
    assert str(caught.value) == f"rows.jsonl has no column {words}"


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        *((name, {}) for name in ("auto", *FORMATS)),
        *((name, {column: "x"}) for name, form in FORMATS.items() for column in (*form.columns, *form.optional)),
        *(("auto", {column: "x"}) for form in FORMATS.values() for column in (*form.columns, *form.optional)),
        ("auto", {"prompt": "q", "output": "a"}),
    ],
)
def test_formats_and_column_maps_that_are_fine(name: str, columns: Columns) -> None:
    check_format(name, columns)


ALL = "messages, system, conversations, instruction, output, input, prompt, completion, text"


@pytest.mark.parametrize(
    ("name", "columns", "words"),
    [
        ("jsonl", {}, ".format=jsonl: it is one of auto, messages, sharegpt, alpaca, prompt_completion, text"),
        ("alpacca", {}, ".format=alpacca: did you mean alpaca? it is one of auto, messages, sharegpt, alpaca, prompt_"),
        ("", {}, ".format=: it is one of auto, messages"),
        (None, {}, ".format=None: it is one of auto, messages"),
        (["text"], {}, ".format=['text']: "),
        ("text", ["q"], ".columns must be like {prompt: question, completion: answer}, not ['q']"),
        ("text", "q", ".columns must be like {prompt: question, completion: answer}, not 'q'"),
        ("text", None, ".columns must be like {prompt: question, completion: answer}, not None"),
        ("text", {"text": None}, ".columns must be like {prompt: question, completion: answer}, not {'text': None}"),
        ("text", {"text": ["a"]}, ".columns must be like {prompt: question, completion: answer}, not {'text': ['a']}"),
        ("text", {"prompt": "q"}, ".columns: prompt is no column of a format: it is one of text (the format's"),
        ("alpaca", {"prompt": "q"}, ".columns: prompt is no column of a format: "),
        ("auto", {"promt": "q"}, f".columns: promt is no column of a format: did you mean prompt? it is one of {ALL}"),
        ("auto", {"question": "prompt"}, ".columns: question is no column of a format: "),  # the wrong way round
        ("auto", {7: "prompt"}, f".columns: 7 is no column of a format: it is one of {ALL}"),
    ],
)
@pytest.mark.parametrize("key", ["data", "data.mixture[1]"])
def test_formats_and_column_maps_that_are_refused(key: str, name: Any, columns: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_format(name, columns, key)
    assert str(caught.value).startswith(key + words)


QA = {"prompt": "question", "completion": "answer", "system": "rules"}


@pytest.mark.parametrize(
    ("name", "row", "columns", "words"),
    [
        ("messages", {"messages": None}, {}, "messages must be a list of turns, not None"),
        ("messages", {"messages": []}, {}, "messages must be a list of turns, not []"),
        ("messages", {"messages": "Hi"}, {}, "messages must be a list of turns, not 'Hi'"),
        ("messages", {"talk": TURNS[0]}, {"messages": "talk"}, "talk must be a list of turns, not {'role': 'user', "),
        ("messages", {"messages": TURNS[:1]}, {}, "messages has no assistant turn, so nothing to train on"),
        ("messages", {"talk": [7]}, {"messages": "talk"}, "talk[0] must be an object with role and content, not 7"),
        ("messages", {"talk": [*TURNS, TURNS[1]]}, {"messages": "talk"}, "talk[2] is assistant: roles must alternate"),
        ("messages", {"id": 1, "text": ""}, {}, "column messages is not there; the row has id, text"),
        ("messages", {}, {}, "column messages is not there; the row has none"),
        ("messages", {"messages": TURNS}, {"messages": "talk"}, "column talk is not there; the row has messages"),
        ("sharegpt", {"conversations": []}, {}, "conversations must be a list of turns, not []"),
        ("sharegpt", {"conversations": [SHARED[1]]}, {}, "conversations[0] is gpt: roles must alternate user, assist"),
        (
            "sharegpt",
            {"c": [SHARED[0], {"from": "gpt"}]},
            {"conversations": "c"},
            "c[1].value must be a text, not None",
        ),
        ("prompt_completion", {"prompt": None, "completion": "b"}, {}, "prompt must be a text, not None"),
        ("prompt_completion", {"prompt": "a", "completion": 3}, {}, "completion must be a text, not 3"),
        ("prompt_completion", {"prompt": TURNS, "completion": "b"}, {}, "prompt must be a text, not [{'role': 'user'"),
        ("prompt_completion", {"prompt": " ", "completion": "b"}, {}, "prompt is empty"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, {}, "completion is empty"),
        ("prompt_completion", {"prompt": "a"}, {}, "column completion is not there; the row has prompt"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "system": 5}, {}, "system must be a text, not 5"),
        ("prompt_completion", {"question": "", "answer": "b"}, QA, "question is empty"),
        ("prompt_completion", {"question": "a", "answer": None}, QA, "answer must be a text, not None"),
        ("prompt_completion", {"question": "a", "answer": "b", "rules": {}}, QA, "rules must be a text, not {}"),
        (
            "prompt_completion",
            {"question": "a", "completion": "b"},
            QA,
            "column answer is not there; the row has quest",
        ),
        ("alpaca", {"instruction": "", "input": "x", "output": "b"}, {}, "instruction is empty"),
        ("alpaca", {"instruction": "a", "output": None}, {}, "output must be a text, not None"),
        ("alpaca", {"instruction": "a", "input": ["x"], "output": "b"}, {}, "input must be a text, not ['x']"),
        ("alpaca", {"instruction": "a", "data": 1, "output": "b"}, {"input": "data"}, "data must be a text, not 1"),
        ("alpaca", {"instruction": "a"}, {}, "column output is not there; the row has instruction"),
        ("text", {"text": None}, {}, "text must be a text, not None"),
        ("text", {"text": ["a"]}, {}, "text must be a text, not ['a']"),
        ("text", {"text": "\n"}, {}, "text is empty"),
        ("text", {"story": "\n"}, {"text": "story"}, "story is empty"),
        ("text", {"story": "<bos>a"}, {"text": "story"}, "story begins with <bos>, which is put there anyway"),
        ("text", {f"c{i}": 1 for i in range(20)}, {}, "column text is not there; the row has c0, c1, c2, c3, c4, c5, "),
    ],
)
def test_what_is_no_row(name: str, row: Row, columns: Columns, words: str) -> None:
    with pytest.raises(UserError) as caught:
        FORMATS[name].render(Fields(row, columns), "assistant")
    assert str(caught.value).startswith(words)
    assert len(str(caught.value)) < 140


def test_the_system_column_of_sharegpt(tokenizer: Tokenizer) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    own = {"from": "system", "value": "Be brief."}
    render = FORMATS["sharegpt"].render
    with_column = render(Fields({"conversations": turns, "system": "Be brief."}), "assistant")
    assert with_column == render(Fields({"conversations": [own, *turns]}), "assistant")
    assert with_column == render(Fields({"conversations": [own, *turns], "system": "Be brief."}), "assistant")
    assert render(Fields({"conversations": turns, "system": None}), "assistant") != with_column
    with pytest.raises(UserError, match=r"conversations\[0\] is a system turn, and the row has a system column too"):
        render(Fields({"conversations": [own, *turns], "system": "Be long."}), "assistant")
