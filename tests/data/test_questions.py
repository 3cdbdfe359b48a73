"""Questions: the tokens before an answer, whatever the rows look like."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptax.config import UserError
from adaptax.data.questions import ask, batches, measure_questions, read_question, read_questions
from adaptax.data.tokenizer import Tokenizer
from conversations import build_transformers_tokenizer, odd_conversations, random_conversations
from rows import data_config, encode_chat

Write = Callable[..., Path]
USER = {"role": "user", "content": "How warm?"}
MODEL = {"role": "assistant", "content": "20 degrees"}
CONFIG = data_config()


def question(row: dict[str, Any], tokenizer: Tokenizer, **config: Any) -> str:
    """A row's question as text."""
    return tokenizer.decode(read_question(row, data_config(**config), tokenizer).tokens)


def expected(words: str, before: str = "") -> str:
    return f"{before}<start_of_turn>user\n{words}<end_of_turn>\n<start_of_turn>model\n"


def test_tokens_are_the_generation_prompt_of_transformers(model: Path) -> None:
    """And so are those of a conversation whose answer is there already."""
    pytest.importorskip("transformers")
    theirs, ours = build_transformers_tokenizer(model.parent), Tokenizer(model)
    num_open = 0
    for messages in [*odd_conversations(), *random_conversations(100, seed=5)]:
        is_open = messages[-1]["role"] == "user"
        asked = messages if is_open else messages[:-1]
        wanted = theirs.apply_chat_template(asked, return_dict=False, add_generation_prompt=True)
        assert ask(messages, ours) == wanted, messages
        assert ask(asked, ours) == wanted, messages
        num_open += is_open
    assert 10 < num_open < 140


def test_tokens_are_those_that_training_has_before_an_answer(tokenizer: Tokenizer) -> None:
    messages = [USER, MODEL, {"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
    example = encode_chat(messages, tokenizer, "last_assistant")
    start = int(np.flatnonzero(example.is_trained)[0])
    assert ask(messages, tokenizer) == ask(messages[:-1], tokenizer) == example.tokens[:start].tolist()
    masked = [*messages[:-1], messages[-1] | {"train": False}]
    assert ask(masked, tokenizer) == example.tokens[:start].tolist()


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [SYSTEM, USER]},
        {"messages": [SYSTEM, USER, MODEL]},
        {"messages": [USER], "system": "Be brief."},
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "How warm?"}]},
        {
            "conversations": [{"from": "human", "value": "How warm?"}, {"from": "gpt", "value": "x"}],
            "system": "Be brief.",
        },
        {"instruction": "How warm?", "system": "Be brief."},
        {"instruction": "How warm?", "input": " ", "output": "x", "system": "Be brief."},
        {"prompt": "How warm?", "system": "Be brief."},
        {"prompt": "How warm?", "completion": None, "system": "Be brief.", "input": "not of this format"},
        {"messages": None, "prompt": "How warm?", "system": "Be brief."},
    ],
    ids=json.dumps,
)
def test_rows_of_every_format_ask_the_same(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    assert question(row, tokenizer) == expected("Be brief.\n\nHow warm?")


def test_an_instruction_with_an_input_and_a_conversation_of_several_turns(tokenizer: Tokenizer) -> None:
    assert question({"instruction": "Sum up:", "input": "a, b"}, tokenizer) == expected("Sum up:\n\na, b")
    before = expected("How warm?") + "20 degrees<end_of_turn>\n"
    assert question({"messages": [USER, MODEL, {"role": "user", "content": "Sure?"}]}, tokenizer) == expected(
        "Sure?", before
    )


def test_columns_are_mapped_and_decide_with_the_format_which_column_asks(tokenizer: Tokenizer) -> None:
    row = {"question": "Q", "prompt": "P", "instruction": "I"}
    assert question(row, tokenizer) == expected("I")
    assert question(row, tokenizer, columns={"prompt": "question"}) == expected("Q")
    assert question(row, tokenizer, format="prompt_completion") == expected("P")
    assert question({"prompt": "P"}, tokenizer, format="messages") == expected("P")  # of a run with other rows
    assert question({"q": "Q"}, tokenizer, columns={"prompt": "q", "completion": "gone"}) == expected("Q")


def test_special_tokens_are_what_training_makes_of_them(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "a <pad> b"}]
    allowing = Tokenizer(tokenizer.path, allow_special=True)
    assert 0 in ask(messages, allowing)
    assert 0 not in ask(messages, tokenizer)
    with pytest.raises(UserError, match="without its <end_of_turn>"):
        ask([{"role": "user", "content": "a <end_of_turn> b"}], allowing)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"text": "a", "id": 3},
            "no question: it has none of the columns messages, conversations, instruction, prompt",
        ),
        ({"text": "a", "id": 3}, "prompt, but text, id; data.columns names others"),
        ({}, "but nothing"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 3}, "prompt must be a text, not 3"),
        ({"messages": []}, "messages must be a list of turns, not []"),
        ({"messages": "hi"}, "messages must be a list of turns, not 'hi'"),
        ({"messages": [MODEL]}, "messages[0] is assistant: roles must alternate"),
        ({"messages": [SYSTEM]}, "messages has no user turn"),
        ({"messages": [USER, USER]}, "messages[1] is user: roles must alternate"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content is empty"),
        ({"messages": [USER, {"role": "tool", "content": "3"}]}, "messages[1] is a tool turn"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half a surrogate pair"),
    ],
    ids=lambda value: ascii(value),
)
def test_what_is_no_question(tokenizer: Tokenizer, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        read_question(row, CONFIG, tokenizer)


def test_a_file_of_questions(tokenizer: Tokenizer, write_jsonl: Write) -> None:
    rows = [{"prompt": "a"}, {"messages": [USER, MODEL]}, {"prompt": "b " * 50, "id": 7}]
    path = write_jsonl(rows)
    found = list(read_questions(CONFIG, str(path), tokenizer))
    assert [question.row for question in found] == rows
    assert measure_questions(CONFIG, str(path), tokenizer) == (3, max(len(question.tokens) for question in found))
    assert [len(batch) for batch in batches(iter(found), 2)] == [2, 1]


def test_a_csv_file_with_names_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"one, two",\nthree,4\n')
    config = data_config(columns={"prompt": "question"})
    found = [tokenizer.decode(question.tokens) for question in read_questions(config, str(path), tokenizer)]
    assert found == [expected("one, two"), expected("three")]


@pytest.mark.parametrize(
    ("rows", "config", "problem"),
    [
        ([{"prompt": "a"}, "", {"prompt": ""}], {}, "rows.jsonl row 3: prompt is empty"),
        ([{"prompt": "a"}, "{"], {}, "rows.jsonl row 2: not valid JSON"),
        ([{"prompt": "a"}], {"columns": {"promt": "a"}}, "promt is no column of a format: did you mean prompt?"),
        ([{"prompt": "a"}], {"format": "massages"}, "data.format=massages: did you mean messages?"),
    ],
)
def test_mistakes_name_the_file_and_the_row(
    tokenizer: Tokenizer, write_jsonl: Write, rows: list[Any], config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        measure_questions(data_config(**config), str(write_jsonl(rows)), tokenizer)


def test_a_file_that_is_not_there(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        measure_questions(CONFIG, "gone.jsonl", tokenizer)
