"""Scores of held-out rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import support
from adaptax.data.chat import Example
from adaptax.data.pipeline import BatchSource, Dataset
from adaptax.data.store import Examples
from adaptax.data.tokenizer import END_OF_TURN, Tokenizer
from adaptax.evaluate import build_answer, evaluate_loss
from adaptax.generate import Generator
from adaptax.models.gemma3_weights import SIZES
from adaptax.step import build_eval_step
from rows import encode_chat

ARCH = SIZES["tiny"]


def chat(tokenizer: Tokenizer, *contents: str) -> Example:
    roles = ("user", "assistant") * len(contents)
    return encode_chat([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], tokenizer)


@pytest.mark.parametrize(("fsdp", "tp"), [(1, 1), (2, 2)])
def test_exact_match_counts_the_rows_that_greedy_decoding_gets_right(tokenizer: Tokenizer, fsdp: int, tp: int) -> None:
    """Rows made of what the base model itself answers are right; the same rows with a word changed are not."""
    mesh = support.make_mesh(fsdp, tp)
    base = support.load(Path(support.find_source_of_tiny()), ARCH, mesh)
    program = support.make_program(ARCH, None, mesh)
    requests = ["switch the hallway fan off", "Lock the garage door.", "play jazz in the kitchen"]
    prompts = [chat(tokenizer, "hello", "hi", request, "x").tokens[:-3].tolist() for request in requests]
    generator = Generator(program, ARCH)
    answers = generator.answer(base, {}, prompts, 40)
    right = [
        Example(
            np.array([*prompt, *answer, END_OF_TURN], np.int32),
            np.array([False] * len(prompt) + [True] * (len(answer) + 1)),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    wrong = [Example(row.tokens.copy(), row.is_trained) for row in right]
    for row in wrong:
        row.tokens[-3] = 700
    assert len({tuple(answer) for answer in answers}) == 3
    score = build_answer(generator, base, Dataset(Examples.of([*right, *wrong[:2]])), 5, batch_size=4)({})
    assert score is not None
    assert (score.exact_match, score.num_rows) == (0.6, 5)
    assert score.given[:3] == score.expected[:3] == answers
    assert score.given[3] != score.expected[3]


def test_a_missing_end_is_not_an_exact_match(tokenizer: Tokenizer) -> None:
    mesh = support.make_mesh()
    base = support.load(Path(support.find_source_of_tiny()), ARCH, mesh)
    program = support.make_program(ARCH, None, mesh)
    row = chat(tokenizer, "Lock the garage door.", "Okay, I will")  # right so far, but the base goes on
    score = build_answer(Generator(program, ARCH), base, Dataset(Examples.of([row])), 1, batch_size=1)({})
    assert score is not None
    assert score.exact_match == 0
    assert len(score.given[0]) > len(score.expected[0])
    assert score.given[0][: len(score.expected[0])] == score.expected[0]


def test_the_loss_is_the_same_however_rows_are_batched_and_none_without_rows(tokenizer: Tokenizer) -> None:
    mesh = support.make_mesh()
    base = support.load(Path(support.find_source_of_tiny()), ARCH, mesh)
    step = build_eval_step(support.make_program(ARCH, None, mesh))
    rows = [chat(tokenizer, "a" * n, "b" * (2 * n)) for n in range(1, 6)]
    losses = [
        evaluate_loss(
            step,
            base,
            BatchSource(Dataset(Examples.of(rows)), num_micro=1, batch_size=size, buckets=np.array([24, 48])),
            mesh,
            {},
        )
        for size in (1, 2, 5)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert evaluate_loss(step, base, None, mesh, {}) is None


def test_no_rows_asked_for_or_held_out_give_no_score(tokenizer: Tokenizer) -> None:
    generator = Generator(support.make_program(ARCH, None, support.make_mesh()), ARCH)
    data = Dataset(Examples.of([chat(tokenizer, "a", "b")]))
    assert build_answer(generator, {}, data, 0, 1)({}) is None
    assert build_answer(generator, {}, Dataset(), 5, 1)({}) is None
