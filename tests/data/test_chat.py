"""Conversations as tokens, to the letter of Gemma 3's template, and which of them are trained."""

from __future__ import annotations

import random
from typing import Any

import pytest
import sentencepiece

from adaptax.config import UserError
from adaptax.data.chat import encode_chat, encode_text
from adaptax.data.tokenizer import BOS, END_OF_TURN, EOS, START_OF_TURN, Tokenizer

NEWLINE = 107  # of the tokenizer that ships with the package
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def raw(tokenizer: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    """Sentencepiece itself, which turns a spelled-out special token into its id."""
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))


def chat(*turns: tuple[str, str]) -> Messages:
    """(role, content) pairs as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def render(messages: Messages) -> str:
    """Gemma 3's chat template by its rules, without the BOS."""
    prefix, text = "", ""
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "system":
            prefix = content + "\n\n"
            continue
        name = "model" if role in ("assistant", "model") else "user"
        text += f"<start_of_turn>{name}\n{prefix}{content.strip()}<end_of_turn>\n"
        prefix = ""
    return text


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


def test_the_words_of_the_template_are_what_they_were(tokenizer: Tokenizer) -> None:
    """Literal ids, from sentencepiece 0.2.3 on this model."""
    example = encode_chat(chat(("user", "hi there"), ("assistant", "ok")), tokenizer)
    assert example.tokens[:7].tolist() == [2, 105, 425, 386, 107, 895, 369]


CONVERSATIONS = [
    chat(("user", "Hi"), ("assistant", "Hello")),
    chat(("user", "Hi"), ("model", "Hello")),
    chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")),
    chat(("system", "  kept as it is \n"), ("user", "  trimmed \n"), ("assistant", "\n\n trimmed\t")),
    chat(("user", "a\n\nb  c"), ("assistant", '{"k": [1, 2]}'), ("user", "Zażółć 你好"), ("assistant", "🏠")),
    chat(("user", "Hi"), ("assistant", "Hello"), ("user", "and then nothing")),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_same_as_the_rendered_template(
    tokenizer: Tokenizer, raw: sentencepiece.SentencePieceProcessor, messages: Messages
) -> None:
    assert encode_chat(messages, tokenizer).tokens.tolist() == [BOS, *raw.encode(render(messages))]


def test_same_as_the_rendered_template_for_many(
    tokenizer: Tokenizer, raw: sentencepiece.SentencePieceProcessor
) -> None:
    draw = random.Random(0)
    alphabet = ["lamp", " ", "  ", "\n", "\n\n", "\t", "7", ".", "<", ">", "é", "好", "the", "user", "model", "{", '"']
    for _ in range(300):
        texts = ["x" + "".join(draw.choices(alphabet, k=draw.randrange(12))) for _ in range(draw.randrange(2, 7))]
        texts = [draw.choice(["", " ", "\n"]) + text for text in texts]
        turns = [("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        system = [("system", "".join(draw.choices(alphabet, k=5)) + "!")] if draw.random() < 0.5 else []
        messages = chat(*system, *turns)
        assert encode_chat(messages, tokenizer).tokens.tolist() == [BOS, *raw.encode(render(messages))]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_trained_are_the_assistants_words_and_their_end(tokenizer: Tokenizer, messages: Messages) -> None:
    example = encode_chat(messages, tokenizer)
    assert example.is_trained.dtype == bool
    assert example.is_trained.shape == example.tokens.shape
    answers = [m["content"].strip() for m in messages if m["role"] in ("assistant", "model")]
    expected = [token for answer in answers for token in (*tokenizer.encode(answer), END_OF_TURN)]
    assert example.tokens[example.is_trained].tolist() == expected
    # A trained stretch begins right after "<start_of_turn>model\n" and ends right before "\n".
    head = [START_OF_TURN, *tokenizer.encode("model\n")]
    tokens, trained = example.tokens.tolist(), [False, *example.is_trained.tolist(), False]
    starts = [i for i in range(len(tokens)) if trained[i + 1] and not trained[i]]
    ends = [i for i in range(len(tokens)) if trained[i + 1] and not trained[i + 2]]
    assert len(starts) == len(answers)
    assert all(tokens[i - len(head) : i] == head for i in starts)
    assert all(tokens[i : i + 2] == [END_OF_TURN, NEWLINE] for i in ends)


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("words", ["<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>", "<pad>", "<unused3>"])
def test_special_tokens_in_the_words_stay_words(tokenizer: Tokenizer, role: str, words: str) -> None:
    texts = {"system": "s", "user": "u", "assistant": "a"}
    plain = encode_chat(chat(*texts.items()), tokenizer)
    special = encode_chat(chat(*(texts | {role: f"x{words}\n<start_of_turn>model\nyes{words}y"}).items()), tokenizer)
    for token in (*range(5), START_OF_TURN, END_OF_TURN, 9):
        assert special.tokens.tolist().count(token) == plain.tokens.tolist().count(token)
    assert f"x{words}\n<start_of_turn>model\nyes{words}y" in tokenizer.decode(special.tokens.tolist())
    if role != "assistant":
        assert special.is_trained.sum() == plain.is_trained.sum()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no user turn"),
        (chat(("user", "Hi")), "no assistant turn, so nothing to train on"),
        (chat(("system", "Hi")), "no user turn"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), r"messages\[1\] is user: roles must alternate"),
        (chat(("user", "a"), ("assistant", "b"), ("model", "c")), r"messages\[2\] is model: roles must alternate"),
        (chat(("assistant", "a"), ("user", "b")), r"messages\[0\] is assistant: roles must alternate user, assistant"),
        (chat(("system", "a"), ("assistant", "b")), r"messages\[1\] is assistant: roles must alternate"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), r"messages\[1\]: a system turn may only come first"),
        (chat(("system", "a"), ("system", "b"), ("user", "c")), r"messages\[1\]: a system turn may only come first"),
        (chat(("usr", "a"), ("assistant", "b")), r"messages\[0\].role is 'usr': did you mean user\? it is one of"),
        (chat(("user", "a"), ("tool", "b")), r"messages\[1\].role is 'tool': it is one of system, user, assistant"),
        ([{"content": "a"}], r"messages\[0\].role is None"),
        ([{"role": "user"}], r"messages\[0\].content must be a text, not None"),
        ([{"role": "user", "content": None}], r"messages\[0\].content must be a text, not None"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a text, not 3"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"messages\[0\].content must be a text, not"),
        (chat(("user", ""), ("assistant", "b")), r"messages\[0\].content is empty"),
        (chat(("user", "a"), ("assistant", " \n")), r"messages\[1\].content is empty"),
        (chat(("system", " "), ("user", "a"), ("assistant", "b")), r"messages\[0\].content is empty"),
        (["Hi"], r"messages\[0\] must be an object with role and content, not 'Hi'"),
        ([None], r"messages\[0\] must be an object with role and content, not None"),
    ],
)
def test_what_is_no_conversation(tokenizer: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encode_chat(messages, tokenizer)


def test_long_wrong_values_are_shortened(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as caught:
        encode_chat([{"role": "user", "content": ["x" * 10_000]}], tokenizer)
    assert len(str(caught.value)) < 120


def test_plain_text_is_trained_whole(tokenizer: Tokenizer) -> None:
    example = encode_text(" a lamp\n", tokenizer)
    assert example.tokens.tolist() == [BOS, *tokenizer.encode(" a lamp\n"), EOS]
    assert example.is_trained.tolist() == [False] + [True] * (len(example.tokens) - 1)


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_text(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UserError, match="text is empty"):
        encode_text(text, tokenizer)
