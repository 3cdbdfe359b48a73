"""Questions to the model: conversations up to where the model is to speak, as tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptax.config import DataConfig
from adaptax.data.chat import Turn, encode_rows, read_turns, render_chat
from adaptax.data.formats import Fields, check_format
from adaptax.data.sources import find_units, open_rows
from adaptax.data.tokenizer import Tokenizer
from adaptax.schema import UserError

COLUMNS = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "prompt": "prompt_completion"}
_MISSING = "?"  # stands for an answer that is not there yet


@dataclass(frozen=True)
class Question:
    """A conversation that waits for its next answer."""

    row: Mapping[str, Any]
    tokens: list[int]


def read_questions(config: DataConfig, path: str, tokenizer: Tokenizer) -> Iterator[Question]:
    """The questions of a file, in order.

    Rows are those of training; the last answer, or its column, may be missing. ``data.columns`` names other columns.

    Raises:
      UserError: naming file and row of one that is no question.
    """
    check_format(config.format, config.columns or {})
    for unit in find_units(path):
        rows = open_rows(unit)
        for i in range(len(rows)):
            try:
                yield read_question(rows[i], config, tokenizer)
            except UserError as error:
                raise UserError(f"{rows.name} row {rows.number(i)}: {error}") from None


def measure_questions(config: DataConfig, path: str, tokenizer: Tokenizer) -> tuple[int, int]:
    """(how many questions a file has, tokens of the longest one); raises what :func:`read_questions` does."""
    lengths = [len(question.tokens) for question in read_questions(config, path, tokenizer)]
    return len(lengths), max(lengths)


def read_question(row: Mapping[str, Any], config: DataConfig, tokenizer: Tokenizer) -> Question:
    """The question of a row: in the column that ``data.format`` or ``data.columns`` name, if it has several."""
    fields = Fields(row, config.columns or {})
    columns = sorted(COLUMNS, key=lambda column: (COLUMNS[column] != config.format, column not in fields.names))
    column = next((column for column in columns if row.get(fields.name(column)) is not None), None)
    if column is None:
        wanted = ", ".join(fields.name(column) for column in COLUMNS)
        raise UserError(
            f"no question: it has none of the columns {wanted}, but {', '.join(row) or 'nothing'}; data.columns names "
            "others, such as {prompt: question}"
        )
    if column in ("messages", "conversations"):
        messages = fields[column]
    else:
        more = fields.optional("input") if column == "instruction" else ""
        request = "\n\n".join(filter(None, (fields.text(column), more)))
        messages = [{"role": "user", "content": request}]
    return Question(row, ask(messages, tokenizer, fields.name(column), fields.optional("system")))


def ask(messages: Any, tokenizer: Tokenizer, column: str = "messages", system: str = "") -> list[int]:
    """The tokens of a conversation up to where the model's last turn begins to speak.

    Args:
      messages: the last is the user's, or the answer that is asked for.
      tokenizer: the model's.
      column: what their file calls them, for messages of errors.
      system: the system's words, where they are no message.

    Raises:
      UserError: as :func:`adaptax.data.chat.read_turns` does.
    """
    turns = _read_turns(messages, column, system)
    if turns[-1].role != "model":
        raise UserError(f"{column} must end with a user's turn, or with the answer to one")
    turns[-1] = turns[-1]._replace(content=_MISSING, is_masked=False)
    example = encode_rows([render_chat(turns, "last_assistant")], tokenizer)[0]
    if isinstance(example, UserError):
        raise example
    return example.tokens[: example.is_trained.argmax()].tolist()


def _read_turns(messages: Any, column: str, system: str) -> list[Turn]:
    """The turns; where the last is the user's, one of the model's is put behind it."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, Mapping) and (last.get("from") or last.get("role")) in ("user", "human"):
        messages = [*messages, {"role": "assistant", "content": _MISSING}]
    return read_turns(messages, column, system)


def batches(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    """The questions, some at a time."""
    while batch := list(itertools.islice(questions, size)):
        yield batch
