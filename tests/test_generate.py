"""Greedy answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import checkpoints
import support
from adaptax.data.chat import Example
from adaptax.data.tokenizer import END_OF_TURN, Tokenizer
from adaptax.generate import answer_span, build_decode, greedy
from rows import encode_chat


def test_greedy_tokens_equal_those_of_transformers_for_prompts_of_different_lengths(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = checkpoints.build_text_model(seed=9)
    arch, base = support.open_checkpoint(checkpoints.save(model, tmp_path))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(110, 2000, n).tolist() for n in (3, 17, 9)]
    decode = build_decode(support.make_program(arch, None, support.make_mesh()))
    ours = greedy(decode, base, {}, prompts, 20, fsdp=1)
    for prompt, answer in zip(prompts, ours, strict=True):
        with torch.no_grad():
            theirs = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=[1, END_OF_TURN],
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
        assert answer == [token for token in theirs if token not in (1, END_OF_TURN)]
        assert len(set(answer)) > 1


def test_an_answer_is_the_last_trained_stretch_without_its_end(tokenizer: Tokenizer) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    example: Example = encode_chat(turns, tokenizer)
    start, stop = answer_span(example)
    assert example.tokens[start:stop].tolist() == [*tokenizer.encode("four"), END_OF_TURN]
    assert example.tokens[:start].tolist()[-len(tokenizer.encode("model\n")) :] == tokenizer.encode("model\n")


def test_rows_are_padded_to_the_mesh_and_the_padding_is_not_returned() -> None:
    arch, mesh = support.FAMILY.checkpoint.SIZES["tiny"], support.make_mesh(4, 1)
    decode = build_decode(support.make_program(arch, None, mesh))
    base = support.load(Path(support.find_source_of_tiny()), arch, mesh)
    answers = greedy(decode, base, {}, [[2, 105, 300], [2, 105, 400, 500], [2]], 5, fsdp=4)
    assert len(answers) == 3
    assert all(len(answer) <= 5 for answer in answers)
