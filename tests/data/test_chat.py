"""What of a conversation is trained, and what is no conversation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from adaptax.config import UserError
from adaptax.data.chat import (
    ROLES,
    TOOL_ROLES,
    Example,
    encode_rows,
    last_request,
    read_turns,
    render_chat,
    render_text,
)
from adaptax.data.tokenizer import BOS, END_OF_TURN, EOS, Tokenizer
from conversations import Messages, chat, odd_conversations, parts, random_conversations
from rows import encode_chat, encode_text

MODES = ("assistant", "last_assistant", "all")
FIVE = chat(("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
NO_FLAGS: dict[int, dict[str, Any]] = {}


def trained(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The stretches that are trained, as text with special tokens spelled out."""
    runs = itertools.groupby(zip(example.tokens.tolist(), example.is_trained.tolist(), strict=True), lambda t: t[1])
    return [tokenizer.show([token for token, _ in run]) for is_trained, run in runs if is_trained]


def flag(messages: Messages, flags: dict[int, dict[str, Any]]) -> Messages:
    """The messages with flags at some places."""
    return [message | flags.get(place, {}) for place, message in enumerate(messages)]


S = "<start_of_turn>user\nS\n\n"
U1, U2 = "U1<end_of_turn>\n", "<start_of_turn>user\nU2<end_of_turn>\n"
A1, A2 = (f"<start_of_turn>model\n{words}<end_of_turn>\n" for words in ("A1", "A2"))
OFF = {"train": False}


@pytest.mark.parametrize(
    ("mode", "flags", "expected"),
    [
        ("assistant", NO_FLAGS, ["A1<end_of_turn>", "A2<end_of_turn>"]),
        ("last_assistant", NO_FLAGS, ["A2<end_of_turn>"]),
        ("all", NO_FLAGS, [S + U1 + A1 + U2 + A2]),
        ("assistant", {2: OFF}, ["A2<end_of_turn>"]),
        ("assistant", {4: OFF}, ["A1<end_of_turn>"]),
        ("assistant", {2: OFF, 4: OFF}, []),
        ("assistant", {0: OFF, 1: OFF, 3: OFF}, ["A1<end_of_turn>", "A2<end_of_turn>"]),
        ("assistant", {1: {"train": True}, 3: {"weight": 1}}, ["A1<end_of_turn>", "A2<end_of_turn>"]),
        ("last_assistant", {2: OFF}, ["A2<end_of_turn>"]),
        ("last_assistant", {4: OFF}, []),
        ("all", {2: OFF}, [S + U1, U2 + A2]),
        ("all", {3: OFF}, [S + U1 + A1, A2]),
        ("all", {1: OFF, 3: OFF}, [S, A1, A2]),
        ("all", {0: OFF}, [U1 + A1 + U2 + A2]),
        ("all", {0: OFF, 1: OFF}, [A1 + U2 + A2]),
        ("all", {0: OFF, 1: OFF, 2: OFF, 3: OFF, 4: OFF}, []),
    ],
)
def test_what_is_trained(
    tokenizer: Tokenizer, mode: str, flags: dict[int, dict[str, Any]], expected: list[str]
) -> None:
    example = encode_chat(flag(FIVE, flags), tokenizer, mode)
    assert trained(example, tokenizer) == expected
    assert example.tokens.tolist() == encode_chat(FIVE, tokenizer).tokens.tolist()  # flags and modes change no token


@pytest.mark.parametrize("mode", MODES)
def test_a_last_turn_of_the_user_is_trained_in_mode_all_alone(tokenizer: Tokenizer, mode: str) -> None:
    example = encode_chat(chat(("user", "U"), ("assistant", "A"), ("user", "V")), tokenizer, mode)
    whole = ["".join(f"<start_of_turn>{turn}<end_of_turn>\n" for turn in ("user\nU", "model\nA", "user\nV"))]
    assert trained(example, tokenizer) == (whole if mode == "all" else ["A<end_of_turn>"])


@pytest.mark.parametrize(
    ("flags", "is_trained"),
    [
        ({}, True),
        ({"train": None, "weight": None}, True),  # as tables have it for messages without
        ({"train": True}, True),
        ({"train": False}, False),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": -0.0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"weight": True}, True),
        ({"weight": False}, False),
        ({"train": True, "weight": 1}, True),
        ({"train": False, "weight": 0.0}, False),
        ({"train": None, "weight": 0}, False),
        ({"train": False, "weight": None}, False),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_flags(tokenizer: Tokenizer, mode: str, flags: dict[str, Any], is_trained: bool) -> None:
    messages = chat(("user", "U"), ("assistant", "A"))
    plain = encode_chat(messages, tokenizer, mode)
    assert "A<end_of_turn>" in "".join(trained(plain, tokenizer))
    example = encode_chat(flag(messages, {1: flags}), tokenizer, mode)
    if is_trained:
        assert np.array_equal(example.is_trained, plain.is_trained)
    else:
        user = ["<start_of_turn>user\nU<end_of_turn>\n"]
        assert trained(example, tokenizer) == (user if mode == "all" else [])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"train": "false"}, "train must be true or false, not 'false'"),
        ({"train": 0}, "train must be true or false, not 0"),
        ({"train": 1}, "train must be true or false, not 1"),
        ({"train": []}, "train must be true or false, not []"),
        ({"weight": "0"}, "weight must be 0 or 1, not '0'"),
        ({"weight": ""}, "weight must be 0 or 1, not ''"),
        ({"weight": 2}, "weight must be 0 or 1, not 2"),
        ({"weight": -1}, "weight must be 0 or 1, not -1"),
        ({"weight": 0.5}, "weight must be 0 or 1, not 0.5"),
        ({"weight": float("nan")}, "weight must be 0 or 1, not nan"),
        ({"weight": [1]}, "weight must be 0 or 1, not [1]"),
        ({"train": True, "weight": 0}, "train is True but its weight is 0; keep one of them"),
        ({"train": False, "weight": 1.0}, "train is False but its weight is 1.0; keep one of them"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_flags_that_say_nothing_clear(tokenizer: Tokenizer, place: int, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        encode_chat(flag(FIVE, {place: flags}), tokenizer)
    assert str(caught.value) == f"messages[{place}].{words}"


def test_bos_is_never_trained_and_all_is_all_but_it(tokenizer: Tokenizer) -> None:
    for messages in [*odd_conversations(), *random_conversations(40, seed=2)]:
        every, last, whole = (encode_chat(messages, tokenizer, mode) for mode in MODES)
        assert every.tokens[0] == last.tokens[0] == whole.tokens[0] == BOS
        assert not every.is_trained[0]
        assert whole.is_trained.tolist() == [False] + [True] * (len(whole.tokens) - 1)
        final = trained(every, tokenizer)[-1:]
        assert trained(last, tokenizer) == final
        assert not (last.is_trained & ~every.is_trained).any()
        num_answers = sum(m["role"] in ("assistant", "model") for m in messages)
        assert (every.tokens[every.is_trained] == END_OF_TURN).sum() == num_answers


def test_random_flags_keep_their_turns_alone_from_being_trained(tokenizer: Tokenizer) -> None:
    """Each turn's tokens are trained as they would be without flags, or, where it is masked, not at all."""
    draw = random.Random(3)
    for messages in random_conversations(40, seed=3):
        flags = {place: draw.choice(({}, OFF, {"weight": 0}, {"weight": 1})) for place in range(len(messages))}
        masked = [place for place, given in flags.items() if given in (OFF, {"weight": 0})]
        for mode in MODES:
            lone = [encode_chat(flag(messages, {place: OFF}), tokenizer, mode).is_trained for place in masked]
            expected = np.logical_and.reduce([encode_chat(messages, tokenizer, mode).is_trained, *lone])
            assert np.array_equal(encode_chat(flag(messages, flags), tokenizer, mode).is_trained, expected)


def test_plain_text_is_trained_whole(tokenizer: Tokenizer) -> None:
    example = encode_text(" a lamp\n", tokenizer)
    assert example.tokens.tolist() == [BOS, *tokenizer.encode(" a lamp\n"), EOS]
    assert example.is_trained.tolist() == [False] + [True] * (len(example.tokens) - 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "text is empty"),
        (" \n\t\xa0", "text is empty"),
        (None, "text must be a text, not None"),
        (["a"], "text must be a text, not ['a']"),
        ("<bos>Once", "text begins with <bos>, which is put there anyway: BOS would be doubled; take it out"),
        (" \n<bos> Once", "text begins with <bos>, which is put there anyway: BOS would be doubled; take it out"),
    ],
)
def test_what_is_no_document(tokenizer: Tokenizer, text: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        encode_text(text, tokenizer)
    assert str(caught.value) == words
    with pytest.raises(UserError) as caught:
        render_text(text, "story")
    assert str(caught.value) == words.replace("text ", "story ", 1)


USER, TOOL = {"role": "user", "content": "a"}, "is a tool turn or call: Gemma's template has none; write it as text"
ALTERNATE = "roles must alternate user, assistant, user, ..."


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages must be a list of turns, not []"),
        (None, "messages must be a list of turns, not None"),
        ("Hi", "messages must be a list of turns, not 'Hi'"),
        (USER, "messages must be a list of turns, not {'role': 'user', 'content': 'a'}"),
        ([USER], "messages has no assistant turn, so nothing to train on"),
        (chat(("system", "a")), "messages has no user turn"),
        (chat(("system", "a"), ("user", "b")), "messages has no assistant turn, so nothing to train on"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), f"messages[1] is user: {ALTERNATE}"),
        (chat(("user", "a"), ("assistant", "b"), ("model", "c")), f"messages[2] is model: {ALTERNATE}"),
        (chat(("assistant", "a"), ("user", "b")), f"messages[0] is assistant: {ALTERNATE}"),
        (chat(("system", "a"), ("assistant", "b")), f"messages[1] is assistant: {ALTERNATE}"),
        ([{"from": "gpt", "value": "a"}], f"messages[0] is gpt: {ALTERNATE}"),
        ([{"from": "gpt", "value": "a", "role": None}], f"messages[0] is gpt: {ALTERNATE}"),
        ([{"role": "bot", "content": "a", "from": None}], f"messages[0] is bot: {ALTERNATE}"),
        (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "messages[1]: a system turn may only come first"),
        (chat(("system", "a"), ("system", "b"), ("user", "c")), "messages[1]: a system turn may only come first"),
        (
            chat(("usr", "a"), ("assistant", "b")),
            "messages[0].role is 'usr': did you mean user? it is one of system, user, assistant",
        ),
        ([{"from": "narrator", "value": "a"}], "messages[0].from is 'narrator': it is one of system, user, assistant"),
        (chat(("User", "a")), "messages[0].role is 'User': did you mean user? it is one of system, user, assistant"),
        ([{"content": "a"}], "messages[0].role is None: it is one of system, user, assistant"),
        ([{"role": 1, "content": "a"}], "messages[0].role is 1: it is one of system, user, assistant"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role is ['user']: did you mean user? it is one of"),
        ([{"role": "", "content": "a"}], "messages[0].role is '': it is one of system, user, assistant"),
        *(([USER, {"role": role, "content": "b"}], f"messages[1] {TOOL}") for role in TOOL_ROLES),
        ([USER, {"from": "observation", "value": "b"}], f"messages[1] {TOOL}"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], f"messages[1] {TOOL}"),
        ([{"role": "user"}], "messages[0].content must be a text, not None"),
        ([{"role": "user", "content": None}], "messages[0].content must be a text, not None"),
        ([{"role": "user", "content": 3}], "messages[0].content must be a text, not 3"),
        ([{"role": "user", "content": {"text": "a"}}], "messages[0].content must be a text, not {'text': 'a'}"),
        ([{"from": "human", "content": "a"}], "messages[0].value must be a text, not None"),
        ([{"role": "user", "value": "a"}], "messages[0].content must be a text, not None"),
        (chat(("user", ""), ("assistant", "b")), "messages[0].content is empty"),
        (chat(("user", "a"), ("assistant", " \n\xa0")), "messages[1].content is empty"),
        (chat(("system", " "), ("user", "a"), ("assistant", "b")), "messages[0].content is empty"),
        ([{"from": "human", "value": "\t"}], "messages[0].value is empty"),
        ([{"role": "user", "content": []}], "messages[0].content is empty"),
        ([{"role": "system", "content": []}], "messages[0].content is empty"),
        ([{"role": "user", "content": parts(" ", "")}], "messages[0].content is empty"),
        ([{"role": "system", "content": parts(" ")}], "messages[0].content is empty"),
        (
            [{"role": "system", "content": parts("a", "b")}],
            "messages[0].content has 2 parts: Gemma's template reads the first alone; join them into one",
        ),
        (
            [{"role": "user", "content": ["a"]}],
            'messages[0].content[0] must be {"type": "text", "text": ...}, not \'a\'',
        ),
        (
            [{"role": "user", "content": [*parts("a"), {"text": "b"}]}],
            'messages[0].content[1] must be {"type": "text", "text": ...}, not {\'text\': \'b\'}',
        ),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}, *parts("a")]}],
            "messages[0].content[0] is of type 'image': only text is trained; take it out",
        ),
        ([{"from": "human", "value": [{"type": "text"}]}], "messages[0].value[0].text must be a text, not None"),
        (["Hi"], "messages[0] must be an object with role and content, not 'Hi'"),
        ([None], "messages[0] must be an object with role and content, not None"),
        ([["user", "Hi"]], "messages[0] must be an object with role and content, not ['user', 'Hi']"),
    ],
)
def test_what_is_no_conversation(tokenizer: Tokenizer, messages: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        encode_chat(messages, tokenizer)
    said = str(caught.value)
    assert said == words or (said.startswith(words) and words.endswith(("it is one of", TOOL)))
    assert "\n" not in said
    with pytest.raises(UserError) as caught:
        read_turns(messages, "talk")
    assert str(caught.value) == said.replace("messages", "talk", 1)  # by the name that the column has in the file


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": ["x" * 10_000]}],
        [{"role": "user", "content": list(range(10_000))}],
        [{"role": "x" * 10_000, "content": "a"}],
        [{"role": "user", "content": {"x" * 10_000: 1}}],
        [{"role": "user", "content": [{"type": "x" * 10_000}]}],
        ["x" * 10_000],
        "x" * 10_000,
        [{"role": "user", "content": "a", "weight": "x" * 10_000}],
    ],
)
def test_long_wrong_values_are_shortened(tokenizer: Tokenizer, messages: Any) -> None:
    with pytest.raises(UserError) as caught:
        encode_chat(messages, tokenizer)
    assert len(str(caught.value)) < 140


def test_all_names_of_the_roles(tokenizer: Tokenizer) -> None:
    expected = encode_chat(chat(("user", "a"), ("assistant", "b")), tokenizer).tokens.tolist()
    users, models = ([name for name, role in ROLES.items() if role == wanted] for wanted in ("user", "model"))
    assert set(users) >= {"user", "human"}
    assert set(models) >= {"assistant", "model", "gpt"}
    for user, model in itertools.product(users, models):
        assert encode_chat(chat((user, "a"), (model, "b")), tokenizer).tokens.tolist() == expected
        turns = [{"from": user, "value": "a", "content": "x"}, {"from": model, "value": "b", "role": None}]
        assert encode_chat(turns, tokenizer).tokens.tolist() == expected


def test_rows_at_once_are_rows_one_by_one(tokenizer: Tokenizer) -> None:
    """Also beside rows that cannot be encoded."""
    rows = random_conversations(20, seed=4)
    rendered = [render_chat(read_turns(messages, "messages")) for messages in rows]
    broken = render_chat(read_turns(chat(("user", "a"), ("assistant", "half \ud83d")), "messages"))
    mixed = [broken, *rendered[:7], broken, broken, *rendered[7:], broken]
    results: Sequence[Example | UserError] = encode_rows(mixed, tokenizer)
    assert [isinstance(result, UserError) for result in results] == [pieces is broken for pieces in mixed]
    for messages, result in zip(rows, [r for r in results if isinstance(r, Example)], strict=True):
        alone = encode_chat(messages, tokenizer)
        assert np.array_equal(result.tokens, alone.tokens)
        assert np.array_equal(result.is_trained, alone.is_trained)
    assert str(results[0]) == "character 6 of 'half \\ud83d' is half a surrogate pair, no text"
    assert encode_rows([], tokenizer) == []


def test_rows_that_break_the_template_do_not_touch_their_neighbours(tokenizer: Tokenizer) -> None:
    allowing = Tokenizer(tokenizer.path, allow_special=True)
    conversations = [
        chat(("user", words), ("assistant", "b")) for words in ("a", "<bos>", "c", "<end_of_turn>", "<eos>")
    ]
    results = encode_rows([render_chat(read_turns(c, "messages")) for c in conversations], allowing)
    assert [isinstance(result, UserError) for result in results] == [False, True, False, True, False]
    assert isinstance(results[2], Example)
    assert results[2].tokens.tolist() == encode_chat(conversations[2], tokenizer).tokens.tolist()


@pytest.mark.parametrize(
    ("messages", "request_"),
    [
        (chat(("user", "first"), ("assistant", "b")), "first"),
        (chat(("user", "first"), ("assistant", "b"), ("user", "two\nlines"), ("assistant", "d")), "two\nlines"),
        (chat(("system", "s"), ("user", "u"), ("assistant", "b")), "s\n\nu"),
    ],
)
def test_the_last_request_of_a_prompt(tokenizer: Tokenizer, messages: Messages, request_: str) -> None:
    example = encode_chat(messages, tokenizer, "last_assistant")
    prompt = example.tokens[: np.flatnonzero(example.is_trained)[0]].tolist()
    assert last_request(prompt, tokenizer) == request_
