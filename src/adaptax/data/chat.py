"""Gemma's chat template: a conversation as pieces of text and template, and which of them are trained.

By default trained are the assistant's words and the ``<end_of_turn>`` that closes them; the newline after it is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from adaptax.data.tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, Tokenizer
from adaptax.schema import UserError, one_of

Message = Mapping[str, Any]
ROLES = {"system": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "model", "gpt", "chatgpt", "bot"), "model")
TEMPLATE_WORDS = ("user\n", "model\n", "\n")  # encoded once, not once for each turn
TOOL_ROLES = ("tool", "function", "ipython", "environment", "observation", "function_call")


@dataclass(frozen=True)
class Example:
    """One row as tokens."""

    tokens: np.ndarray  # [T] int32
    is_trained: np.ndarray  # [T] bool: the token is a target


class Piece(NamedTuple):
    """A stretch of a rendered row: control tokens, then text."""

    control: tuple[int, ...]
    text: str
    is_trained: bool


class Turn(NamedTuple):
    """A turn of a conversation."""

    role: str  # as the template has it: user or model
    content: str
    is_masked: bool  # its row says that it is not to be trained
    system: str = ""  # the system's words and a blank line, which go before those of the first user
    is_system_masked: bool = False


def read_turns(messages: Any, column: str, system: str = "") -> list[Turn]:
    """The turns of a list of messages; the system's words go before the first user's, as Gemma has no system turn.

    A message is ``{role, content}`` or ShareGPT's ``{from, value}``. Its content is a text, or a list of text parts,
    which are trimmed and joined as Gemma's template does. ``train: false`` or ``weight: 0`` keep it from being trained.

    Args:
      messages: what the row holds.
      column: what its file calls it, for messages of errors.
      system: the system's words, where they stand in a column of their own.

    Raises:
      UserError: naming the column and message: an unknown role, turns that do not alternate, empty content, ...
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{column} must be a list of turns, not {_short(messages)}")
    turns: list[Turn] = []
    prefix: tuple[str, bool] = (system + "\n\n" if system else ""), False
    for place, message in enumerate(messages):
        label = f"{column}[{place}]"
        role, content = _read_message(message, label)
        is_masked = _is_masked(message, label)
        if role == "system":
            if place != 0:
                raise UserError(f"{label}: a system turn may only come first")
            if system and system != content:
                raise UserError(f"{label} is a system turn, and the row has a system column too: keep one of them")
            prefix = content + "\n\n", is_masked
            continue
        due = "user" if len(turns) % 2 == 0 else "model"
        if role != due:
            name = message.get("from") or message["role"]
            raise UserError(f"{label} is {name}: roles must alternate user, assistant, user, ...")
        turns.append(Turn(role, content.strip(), is_masked, *prefix))
        prefix = "", False
    if not turns:
        raise UserError(f"{column} has no user turn")
    if len(turns) < 2:
        raise UserError(f"{column} has no assistant turn, so nothing to train on")
    return turns


def render_chat(turns: Sequence[Turn], supervise: str = "assistant") -> list[Piece]:
    """A conversation in Gemma's template, every turn closed.

    Args:
      turns: from :func:`read_turns`.
      supervise: ``assistant`` trains every assistant turn, ``last_assistant`` the last one, ``all`` everything but the
        BOS; turns that are masked are left out.
    """
    last = max(i for i, turn in enumerate(turns) if turn.role == "model")
    pieces = [Piece((BOS,), "", False)]
    for i, turn in enumerate(turns):
        is_all = supervise == "all"
        is_wanted = is_all or (turn.role == "model" and (supervise != "last_assistant" or i == last))
        is_trained = is_wanted and not turn.is_masked
        is_head = is_all and not (turn.is_system_masked if turn.system else turn.is_masked)
        # Of the system in one piece with the role: "\n" may join with its words. Those of a turn are trimmed.
        pieces += [Piece((START_OF_TURN,), f"{turn.role}\n{turn.system}", is_head), Piece((), turn.content, is_trained)]
        pieces += [Piece((END_OF_TURN,), "", is_trained), Piece((), "\n", is_all and is_trained)]
    return pieces


def render_text(text: Any, column: str) -> list[Piece]:
    """A plain document between BOS and EOS, all of it trained.

    Raises:
      UserError: it is no text, is empty, or begins with the BOS, which would then stand twice.
    """
    content = read_text(text, column)
    if content.lstrip().startswith("<bos>"):
        raise UserError(f"{column} begins with <bos>, which is put there anyway: BOS would be doubled; take it out")
    return [Piece((BOS,), "", False), Piece((), content, True), Piece((EOS,), "", True)]


def read_text(value: Any, column: str) -> str:
    """The text of a column; raises UserError where it is none, or empty."""
    if not isinstance(value, str):
        raise UserError(f"{column} must be a text, not {_short(value)}")
    if not value.strip():
        raise UserError(f"{column} is empty")
    return value


def encode_rows(rows: Sequence[list[Piece]], tokenizer: Tokenizer) -> list[Example | UserError]:
    """Rendered rows as tokens, all in one call of the tokenizer; a row that has none is handed out as its error."""
    errors: dict[int, UserError] = {}
    stretches: list[Sequence[int] | str] = []  # tokens, or a text to encode, of one row after the other
    flags: list[bool] = []
    ends = [0]
    for i, pieces in enumerate(rows):
        try:
            for piece in pieces:
                parts = _parts(piece, tokenizer)
                stretches += parts
                flags += [piece.is_trained] * len(parts)
        except UserError as error:
            errors[i] = error
            del stretches[ends[-1] :], flags[ends[-1] :]
        ends.append(len(stretches))
    encoded = iter(tokenizer.encode_pieces([stretch for stretch in stretches if isinstance(stretch, str)]))
    tokens = [next(encoded) if isinstance(stretch, str) else stretch for stretch in stretches]
    edges = np.concatenate([[0], np.cumsum([len(stretch) for stretch in tokens])]).astype(np.int64)
    flat = np.fromiter(itertools.chain.from_iterable(tokens), np.int32, int(edges[-1]))
    trained = np.repeat(np.array(flags, bool), np.diff(edges))
    examples: list[Example | UserError] = []
    for i, (start, stop) in enumerate(itertools.pairwise(edges[ends].tolist())):
        example = Example(flat[start:stop], trained[start:stop])
        problem = _template_problem(example.tokens) if tokenizer.allow_special and i not in errors else None
        examples.append(UserError(problem) if problem else errors.get(i, example))
    return examples


def _parts(piece: Piece, tokenizer: Tokenizer) -> list[Sequence[int] | str]:
    if piece.text in TEMPLATE_WORDS:
        return [piece.control, tokenizer.template_tokens(piece.text)]
    if not piece.text:
        return [piece.control]
    parts: list[Sequence[int] | str] = [p if isinstance(p, str) else (p,) for p in tokenizer.split(piece.text)]
    return [piece.control, *parts] if piece.control else parts


def _template_problem(tokens: np.ndarray) -> str | None:
    """What special tokens out of the rows broke of the template, if anything."""
    if np.count_nonzero(tokens == BOS) > 1:
        return "BOS is doubled: a text spells <bos>, which is put there anyway; take it out"
    turns = tokens[(tokens == START_OF_TURN) | (tokens == END_OF_TURN)]
    if len(turns) % 2 or (turns[::2] != START_OF_TURN).any() or (turns[1::2] != END_OF_TURN).any():
        return (
            "a text spells <start_of_turn> without its <end_of_turn>, or the other way round; mend it, or keep such "
            "words plain text with data.allow_special_tokens=false"
        )
    return None


def last_request(tokens: list[int], tokenizer: Tokenizer) -> str:
    """What the user said last in a prompt, without the template around it."""
    text = tokenizer.decode(tokens)
    return text.rpartition("<start_of_turn>user\n")[2].partition("<end_of_turn>")[0]


def _read_message(message: Any, label: str) -> tuple[str, str]:
    """(role of the template or system, content)."""
    if not isinstance(message, Mapping):
        raise UserError(f"{label} must be an object with role and content, not {_short(message)}")
    role_key, content_key = ("from", "value") if message.get("from") is not None else ("role", "content")
    role, content = message.get(role_key), message.get(content_key)
    if role in TOOL_ROLES or message.get("tool_calls"):
        raise UserError(
            f"{label} is a tool turn or call: Gemma's template has none; write it as text of a user or assistant turn"
        )
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{label}.{role_key} is {_short(role)}: {one_of(str(role), ('system', 'user', 'assistant'))}")
    if isinstance(content, list):
        content = _join_parts(content, f"{label}.{content_key}", ROLES[role] == "system")
    if not isinstance(content, str):
        raise UserError(f"{label}.{content_key} must be a text, not {_short(content)}")
    if not content.strip():
        raise UserError(f"{label}.{content_key} is empty")
    return ROLES[role], content


def _join_parts(parts: list[Any], label: str, is_system: bool) -> str:
    """Text parts as the template joins them: trimmed, nothing between; a system turn has one part, untrimmed."""
    texts: list[str] = []
    for i, part in enumerate(parts):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise UserError(f'{label}[{i}] must be {{"type": "text", "text": ...}}, not {_short(part)}')
        if part["type"] != "text":
            raise UserError(f"{label}[{i}] is of type {_short(part['type'])}: only text is trained; take it out")
        if not isinstance(part.get("text"), str):
            raise UserError(f"{label}[{i}].text must be a text, not {_short(part.get('text'))}")
        texts.append(part["text"])
    if is_system and len(texts) > 1:
        raise UserError(f"{label} has {len(texts)} parts: Gemma's template reads the first alone; join them into one")
    return texts[0] if is_system and texts else "".join(text.strip() for text in texts)


def _is_masked(message: Message, label: str) -> bool:
    """Whether ``train`` or ``weight`` keep a message from being trained."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise UserError(f"{label}.train must be true or false, not {_short(train)}")
    if weight is not None and (isinstance(weight, str) or weight not in (0, 1)):
        raise UserError(f"{label}.weight must be 0 or 1, not {_short(weight)}")
    if train is not None and weight is not None and train != bool(weight):
        raise UserError(f"{label}.train is {train} but its weight is {weight}; keep one of them")
    return train is False or weight == 0


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}..." if len(text) > 43 else text
