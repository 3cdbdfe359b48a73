"""Questions to the model: conversations up to where the model is to speak, as tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaptax.config import DataConfig
from adaptax.data.chat import Turn, encode_rows, read_turns, render_chat
from adaptax.data.formats import Fields
from adaptax.data.sources import find_units, open_rows
from adaptax.data.tokenizer import Tokenizer
from adaptax.schema import UserError

_MISSING = "?"  # stands for an answer that is not there yet


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its next answer."""

    row: Mapping[str, Any]
    tokens: list[int]
    expected: str | None  # the answer that its row has


def read_questions(config: DataConfig, path: str, tokenizer: Tokenizer) -> Iterator[Question]:
    """The questions of a file, in order.

    Rows are those of training; the last answer, or its column, may be missing. ``data.columns`` names other columns.

    Raises:
      UserError: naming file and row of one that is no question.
    """
    for unit in find_units(path):
        rows = open_rows(unit)
        for i in range(len(rows)):
            try:
                row = rows[i]
                yield read_question(row, config.columns or {}, tokenizer)
            except UserError as error:
                raise UserError(f"{rows.name} row {rows.number(i)}: {error}") from None


def read_question(row: Mapping[str, Any], names: Mapping[str, str], tokenizer: Tokenizer) -> Question:
    """The question of a row."""
    fields = Fields(row, names)
    has = lambda column: row.get(fields.name(column)) is not None  # noqa: E731
    column = next((c for c in ("messages", "conversations", "instruction", "prompt") if has(c)), None)
    if column is None:
        raise UserError(
            f"no question: it has none of the columns messages, conversations, instruction and prompt, but "
            f"{', '.join(row) or 'nothing'}; data.columns names others"
        )
    if column in ("messages", "conversations"):
        turns, expected = _split(fields[column], fields.name(column), fields.optional("system"))
        return Question(row, encode_question(turns, tokenizer), expected)
    request = "\n\n".join(filter(None, (fields.text(column), fields.optional("input"))))
    answer = "output" if column == "instruction" else "completion"
    turns, _ = _split([{"role": "user", "content": request}], column, fields.optional("system"))
    return Question(row, encode_question(turns, tokenizer), fields.optional(answer) or None)


def ask(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation whose last turn is the user's."""
    return encode_question(_split(list(messages), "messages", "")[0], tokenizer)


def _split(messages: Any, column: str, system: str) -> tuple[list[Turn], str | None]:
    """The turns up to where the model is to speak, its turn included, and what it says there."""
    role = messages[-1].get("role") or messages[-1].get("from") if _is_list(messages) else None
    is_open = role in ("user", "human")
    if is_open:
        key = ("from", "value", "gpt") if messages[-1].get("from") is not None else ("role", "content", "assistant")
        messages = [*messages, {key[0]: key[2], key[1]: _MISSING}]
    turns = read_turns(messages, column, system)
    if turns[-1].role != "model":
        raise UserError(f"{column} must end with a user's turn, or with the answer to one")
    return turns, None if is_open else turns[-1].content


def _is_list(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and isinstance(messages[-1], Mapping)


def encode_question(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation up to the words of its last turn, which is the model's."""
    pieces = render_chat(turns)
    words = max(i for i, piece in enumerate(pieces) if not piece.control and piece.text == turns[-1].content)
    example = encode_rows([pieces[:words]], tokenizer)[0]
    if isinstance(example, UserError):
        raise example
    return example.tokens.tolist()


def batches(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    """The questions, some at a time."""
    while batch := list(itertools.islice(questions, size)):
        yield batch


def count_questions(path: str) -> int:
    """Rows of a file of questions.

    Raises:
      UserError: it is not there, or is none.
    """
    return sum(len(open_rows(unit)) for unit in find_units(path))
