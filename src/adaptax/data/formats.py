"""Row formats: one function and one line in FORMATS each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptax.config import UserError
from adaptax.data.chat import Example, encode_chat, encode_text
from adaptax.data.tokenizer import Tokenizer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """How rows with these columns become examples."""

    columns: tuple[str, ...]
    encode: Callable[[Row, Tokenizer], Example]


def _messages(row: Row, tokenizer: Tokenizer) -> Example:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError(f"messages must be a list of turns, not {messages!r:.60}")
    return encode_chat(messages, tokenizer)


def _prompt_completion(row: Row, tokenizer: Tokenizer) -> Example:
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str):
            raise UserError(f"{column} must be a text, not {row[column]!r:.60}")
        if not row[column].strip():
            raise UserError(f"{column} is empty")
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return encode_chat(turns, tokenizer)


def _text(row: Row, tokenizer: Tokenizer) -> Example:
    if not isinstance(row["text"], str):
        raise UserError(f"text must be a text, not {row['text']!r:.60}")
    return encode_text(row["text"], tokenizer)


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "text": Format(("text",), _text),
}


def find_format(columns: list[str], name: str, path: str) -> str:
    """The format of a file: the named one if its columns are there, else the first whose columns are.

    Raises:
      UserError: naming the columns that are there and those that are needed.
    """
    if name == "auto":
        for candidate, form in FORMATS.items():
            if set(form.columns) <= set(columns):
                return candidate
        needed = "; ".join(f"{n}: {', '.join(f.columns)}" for n, f in FORMATS.items())
        raise UserError(f"{path} has the columns {', '.join(columns)}; no format fits (one of {needed})")
    missing = [column for column in FORMATS[name].columns if column not in columns]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, which data.format={name} needs; it has {', '.join(columns)}"
        )
    return name
