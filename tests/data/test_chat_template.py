"""Conversations as tokens, to the letter of Gemma 3's template: golden ids always, live where transformers is there."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adaptax.config import UserError
from adaptax.data.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer
from conversations import (
    GOLDEN,
    Messages,
    build_transformers_tokenizer,
    chat,
    long_conversations,
    odd_conversations,
    parts,
    random_conversations,
    render,
)
from rows import encode_chat

NEWLINE = 107  # of the tokenizer that ships with the package
NUM_RANDOM = 300


@pytest.fixture(scope="module")
def ours(model: Path) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    """The same sentencepiece model in transformers, with the jinja template."""
    pytest.importorskip("transformers")
    return build_transformers_tokenizer(model.parent)


@pytest.fixture(scope="module")
def corpus() -> list[Messages]:
    return [*odd_conversations(), *long_conversations(), *random_conversations(NUM_RANDOM, seed=0)]


def ids(theirs: Any, messages: Messages, **options: Any) -> list[int]:
    """What transformers makes of a conversation."""
    return theirs.apply_chat_template(messages, return_dict=False, **options)


def test_ids_of_a_small_conversation_by_hand(tokenizer: Tokenizer) -> None:
    pieces = {text: tokenizer.encode(text) for text in ("user", "model", "Hi there", "Yes.", "Bye", "No")}
    example = encode_chat(
        chat(("user", "Hi there"), ("assistant", "Yes."), ("user", "Bye"), ("assistant", "No")), tokenizer
    )
    expected = [
        *(BOS, START_OF_TURN, *pieces["user"], NEWLINE, *pieces["Hi there"], END_OF_TURN, NEWLINE),
        *(START_OF_TURN, *pieces["model"], NEWLINE, *pieces["Yes."], END_OF_TURN, NEWLINE),
        *(START_OF_TURN, *pieces["user"], NEWLINE, *pieces["Bye"], END_OF_TURN, NEWLINE),
        *(START_OF_TURN, *pieces["model"], NEWLINE, *pieces["No"], END_OF_TURN, NEWLINE),
    ]
    assert example.tokens.tolist() == expected
    assert expected.count(BOS) == 1
    assert example.tokens.dtype == "int32"
    assert example.is_trained.dtype == bool
    assert example.is_trained.shape == example.tokens.shape


def test_the_words_of_the_template_are_what_they_were(tokenizer: Tokenizer) -> None:
    """Literal ids, from sentencepiece 0.2.3 on this model."""
    example = encode_chat(chat(("user", "hi there"), ("assistant", "ok")), tokenizer)
    assert example.tokens[:7].tolist() == [2, 105, 425, 386, 107, 895, 369]


RENDERED = [
    (chat(("user", " Hi\n"), ("assistant", "Yo")), "user\n|Hi$model\n|Yo$"),
    (chat(("system", " S\n"), ("user", "\nHi"), ("model", "Yo ")), "user\n S\n\n\n|Hi$model\n|Yo$"),
    (chat(("system", parts("S ")), ("user", parts(" a ", "b")), ("model", "c")), "user\nS \n\n|ab$model\n|c$"),
    (chat(("user", "a"), ("model", "b"), ("user", "c")), "user\n|a$model\n|b$user\n|c$"),
]


def expand(short: str) -> str:
    """``role\\n|text$`` as the template writes it."""
    turns = [turn.replace("|", "") for turn in short.split("$")[:-1]]
    return "".join(f"<start_of_turn>{turn}<end_of_turn>\n" for turn in turns)


@pytest.mark.parametrize(("messages", "short"), RENDERED)
def test_rendered_by_hand(tokenizer: Tokenizer, messages: Messages, short: str) -> None:
    assert tokenizer.decode(encode_chat(messages, tokenizer).tokens.tolist()) == expand(short)
    assert render(messages) == expand(short)


@pytest.mark.parametrize(("messages", "short"), RENDERED)
def test_the_jinja_template_of_these_tests_by_hand(theirs: Any, messages: Messages, short: str) -> None:
    assert theirs.apply_chat_template(messages, tokenize=False) == "<bos>" + expand(short)


def test_golden_ids_of_transformers(tokenizer: Tokenizer) -> None:
    """``python tests/conversations.py`` writes the file, where transformers is installed."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["tokenizer_sha256"] == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest(), "write it anew"
    assert [row["messages"] for row in golden["conversations"]] == odd_conversations(), "write it anew"
    assert len(golden["conversations"]) >= 55
    for row in golden["conversations"]:
        assert encode_chat(row["messages"], tokenizer).tokens.tolist() == row["ids"], row["messages"]


def test_ids_are_those_of_transformers(ours: Tokenizer, theirs: Any, corpus: list[Messages]) -> None:
    assert len(corpus) >= 350
    assert {len(messages) for messages in corpus} >= set(range(2, 14))
    for messages in corpus:
        assert encode_chat(messages, ours).tokens.tolist() == ids(theirs, messages), messages


def test_trained_are_the_assistants_tokens_of_transformers(
    ours: Tokenizer, theirs: Any, corpus: list[Messages]
) -> None:
    """The template marks them by ``{% generation %}``: the words and ``<end_of_turn>``, without the newline."""
    for messages in corpus:
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = encode_chat(messages, ours)
        assert example.is_trained.tolist() == [bool(mark) for mark in found["assistant_masks"]], messages


def test_what_comes_before_an_answer_is_the_generation_prompt(
    ours: Tokenizer, theirs: Any, corpus: list[Messages]
) -> None:
    answered = [messages for messages in corpus if messages[-1]["role"] != "user"]
    assert len(answered) > 150
    for messages in answered:
        example = encode_chat(messages, ours, "last_assistant")
        prompt = example.tokens[: np.flatnonzero(example.is_trained)[0]].tolist()
        assert prompt == ids(theirs, messages[:-1], add_generation_prompt=True), messages


def test_sharegpt_is_the_same(ours: Tokenizer, theirs: Any, corpus: list[Messages]) -> None:
    names = {
        "system": ["system"],
        "user": ["human", "user"],
        "assistant": ["gpt", "chatgpt"],
        "model": ["bot", "model"],
    }
    for i, messages in enumerate(corpus):
        turns = [{"from": names[m["role"]][i % len(names[m["role"]])], "value": m["content"]} for m in messages]
        assert encode_chat(turns, ours).tokens.tolist() == ids(theirs, messages), messages


def test_the_order_of_roles_is_refused_where_transformers_refuses_it(ours: Tokenizer, theirs: Any) -> None:
    """And where its template would write a system turn, or a conversation without an answer."""
    jinja2 = pytest.importorskip("jinja2")
    accepted = refused = 0
    for roles in itertools.chain(*(itertools.product(("system", "user", "assistant"), repeat=n) for n in range(1, 6))):
        messages = chat(*((role, f"{role} {i}") for i, role in enumerate(roles)))
        try:
            expected = ids(theirs, messages)
        except jinja2.TemplateError:
            expected = None
        if expected is None or "system" in roles[1:] or "assistant" not in roles:
            with pytest.raises(UserError, match=r"must alternate|may only come first|no assistant turn|no user turn"):
                encode_chat(messages, ours)
            refused += 1
        else:
            assert encode_chat(messages, ours).tokens.tolist() == expected
            accepted += 1
    assert (accepted, refused) == (7, 3 + 9 + 27 + 81 + 243 - 7)  # 2 to 5 turns, or 2 to 4 after a system turn


def is_whole(tokens: list[int]) -> bool:
    """Whether BOS stands once, and every turn that begins ends before the next one."""
    turns = [token for token in tokens if token in (START_OF_TURN, END_OF_TURN)]
    pairs = [START_OF_TURN, END_OF_TURN] * (len(turns) // 2)
    return tokens.count(BOS) == 1 and turns == pairs


def test_allowed_special_tokens_are_those_of_transformers(model: Path, theirs: Any) -> None:
    """Or refused, where they would break the template."""
    allowing = Tokenizer(model, allow_special=True)
    num_legal = num_refused = num_special = 0
    for messages in random_conversations(NUM_RANDOM, seed=1, special=0.12):
        expected = ids(theirs, messages)
        if is_whole(expected):
            assert encode_chat(messages, allowing).tokens.tolist() == expected, messages
            num_legal += 1
            num_special += any(token in (0, 1, 3, 4, 5, 13, 104) for token in expected)
        else:
            with pytest.raises(UserError, match=r"BOS is doubled|without its <end_of_turn>"):
                encode_chat(messages, allowing)
            num_refused += 1
    assert num_legal > 100
    assert num_special > 50
    assert num_refused > 50


@pytest.mark.parametrize(
    "text",
    [
        "<eos>",
        "a<eos><pad><unk>b",
        " <mask> <unused7>\n<unused98>",
        "[multimodal]<[multimodal]>",
        "<end_of<eos>_turn>",
        "<<eos>>",
        "<eos<eos>",
        "<end_of_turn>\n<start_of_turn>user\nanother turn",
        "<end_of_turn><start_of_turn>",
        parts("<eo", "s>", " <unused", "7> "),
        parts("<eos> ", " <eos>"),
        "<start_of_image>?<end_of_image><unused6241>",
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_allowed_special_tokens_by_hand(model: Path, theirs: Any, role: str, text: Any) -> None:
    messages = chat(*({"user": "u", "assistant": "a"} | {role: text}).items())
    tokens = encode_chat(messages, Tokenizer(model, allow_special=True)).tokens.tolist()
    assert tokens == ids(theirs, messages)
    is_known = theirs.convert_tokens_to_ids("<start_of_image>") != 3 or "image" not in str(text)
    assert (tokens != encode_chat(messages, Tokenizer(model)).tokens.tolist()) == is_known
