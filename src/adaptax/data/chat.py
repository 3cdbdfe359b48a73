"""Gemma's chat template: a conversation as tokens, and which of them are trained.

Trained are the assistant's words and the ``<end_of_turn>`` that closes them; the newline after it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptax.config import UserError, one_of
from adaptax.data.tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, Tokenizer

Message = Mapping[str, Any]
TEMPLATE_ROLES = {"user": "user", "assistant": "model", "model": "model"}


@dataclass(frozen=True)
class Example:
    """One row as tokens."""

    tokens: np.ndarray  # [T] int32
    is_trained: np.ndarray  # [T] bool: the token is a target


def encode_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """A conversation, one BOS, every turn closed.

    Raises:
      UserError: an unknown role, turns that do not alternate, empty content, no assistant turn.
    """
    turns = _fold_system(messages)
    if not any(role == "model" for role, _ in turns):
        raise UserError("no assistant turn, so nothing to train on")
    tokens, trained = [BOS], [False]
    for role, content in turns:
        if role == "user":  # the word and the content in one piece: "\n" may join with the content
            parts = [([START_OF_TURN, *tokenizer.encode(f"user\n{content}"), END_OF_TURN], False)]
        else:
            head = [START_OF_TURN, *tokenizer.encode("model\n")]
            parts = [(head, False), ([*tokenizer.encode(content), END_OF_TURN], True)]
        for piece, is_trained in [*parts, (tokenizer.encode("\n"), False)]:
            tokens += piece
            trained += [is_trained] * len(piece)
    return Example(np.array(tokens, np.int32), np.array(trained, bool))


def last_request(tokens: list[int], tokenizer: Tokenizer) -> str:
    """What the user said last in a prompt, without the template around it."""
    text = tokenizer.decode(tokens)
    return text.rpartition("<start_of_turn>user\n")[2].partition("<end_of_turn>")[0]


def encode_text(text: str, tokenizer: Tokenizer) -> Example:
    """A plain document between BOS and EOS, all of it trained."""
    if not text.strip():
        raise UserError("text is empty")
    tokens = [BOS, *tokenizer.encode(text), EOS]
    trained = np.ones(len(tokens), bool)
    trained[0] = False
    return Example(np.array(tokens, np.int32), trained)


def _fold_system(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(template role, content) per turn; the system's words go before the first user's, as Gemma has no system turn."""
    turns: list[tuple[str, str]] = []
    prefix = ""
    for place, message in enumerate(messages):
        role, content = _read_message(message, place)
        if role == "system":
            if place != 0:
                raise UserError(f"messages[{place}]: a system turn may only come first")
            prefix = content + "\n\n"
            continue
        due = "user" if len(turns) % 2 == 0 else "model"
        if TEMPLATE_ROLES[role] != due:
            raise UserError(f"messages[{place}] is {role}: roles must alternate user, assistant, user, ...")
        turns.append((due, (prefix if not turns else "") + content.strip()))
    if not turns:
        raise UserError("no user turn")
    return turns


def _read_message(message: Message, place: int) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise UserError(f"messages[{place}] must be an object with role and content, not {_short(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in (*TEMPLATE_ROLES, "system"):
        raise UserError(f"messages[{place}].role is {role!r}: {one_of(str(role), ('system', 'user', 'assistant'))}")
    if not isinstance(content, str):
        raise UserError(f"messages[{place}].content must be a text, not {_short(content)}")
    if not content.strip():
        raise UserError(f"messages[{place}].content is empty")
    return role, content


def _short(value: Any) -> str:
    text = repr(value)
    return f"{text[:40]}..." if len(text) > 43 else text
