"""Generated answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import checkpoints
import support
from adaptax.data.chat import Example
from adaptax.data.tokenizer import END_OF_TURN, Tokenizer
from adaptax.export import save_peft_adapter
from adaptax.generate import Generator, answer_span
from adaptax.models.gemma3_weights import SIZES
from adaptax.sampling import Sampling
from adaptax.weights import take_apart
from rows import encode_chat

TINY = SIZES["tiny"]
ENDS = (1, END_OF_TURN)


def continue_reference(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates greedily."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        rows = model.generate(
            torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=list(ENDS), pad_token_id=0
        )
    return [token for token in rows[0, len(prompt) :].tolist() if token not in ENDS]


@pytest.mark.parametrize(
    ("is_multimodal", "num_tokens"),
    [(False, 200), pytest.param(True, 40, marks=pytest.mark.slow)],
    ids=["text", "multimodal"],
)
def test_greedy_tokens_are_those_of_transformers_far_past_the_window_with_and_without_an_adapter(
    tmp_path: Path, is_multimodal: bool, num_tokens: int
) -> None:
    """Behind prompts of many lengths, in layers with a window of 8; weights stacked, and layer by layer."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    build = checkpoints.build_multimodal_model if is_multimodal else checkpoints.build_text_model
    model = build(seed=9)
    arch, base = support.open_checkpoint(checkpoints.save(model, tmp_path / "base"))
    mesh, spec = support.make_mesh(), support.full_spec(arch)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(110, 2000, n).tolist() for n in (3, 77, 1, 130)]
    adapters = support.random_adapters(arch, spec, mesh)
    host = {path: np.asarray(array) for path, array in adapters.items()}
    save_peft_adapter(tmp_path / "adapter", host, spec, support.FAMILY, arch, "base")

    plain = Generator(support.make_program(arch, None, mesh), arch).answer(base, {}, prompts, num_tokens)
    adapted = Generator(support.make_program(arch, spec, mesh, train=False), arch)
    answers = adapted.answer(take_apart(base, jnp.float32), adapters, prompts, num_tokens)
    for i in (0, 3):
        assert plain[i] == continue_reference(model, prompts[i], num_tokens)
    assert max(map(len, plain)) == num_tokens
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert answers[3] == continue_reference(model, prompts[3], num_tokens)
    assert answers != plain


def tiny_generator(dtype: Any = jnp.float32, fsdp: int = 1, tp: int = 1) -> tuple[Generator, Any]:
    """The shipped model, which answers after a fashion."""
    mesh = support.make_mesh(fsdp, tp)
    base = support.load(Path(support.find_source_of_tiny()), TINY, mesh, dtype)
    return Generator(support.make_program(TINY, None, mesh), TINY), base


PROMPTS = [[2, 105, 300], [2, 105, 400, 500], [2], list(range(200, 300))]


def test_an_answer_does_not_depend_on_its_company_or_on_the_mesh() -> None:
    generator, base = tiny_generator()
    warm = Sampling(1.0, 50, 0.9, 0.01)
    together = generator.answer(base, {}, PROMPTS, 30, warm, seed=3)
    alone = [
        generator.answer(base, {}, [prompt], 30, warm, seed=3, first_row=i, num_rows=4)[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    assert alone == together
    assert generator.answer(base, {}, PROMPTS, 30, warm, seed=4) != together
    split, spread = tiny_generator(fsdp=2, tp=2)
    assert split.answer(spread, {}, PROMPTS, 30, warm, seed=3) == together


def test_streamed_tokens_are_those_of_the_whole_answer() -> None:
    generator, base = tiny_generator()
    for prompt in PROMPTS:
        assert list(generator.stream(base, {}, prompt, 25)) == generator.answer(base, {}, [prompt], 25)[0]


def test_prompts_of_all_lengths_share_a_program_for_each_capacity() -> None:
    generator, base = tiny_generator()
    for length in (1, 2, 63, 64, 65, 150, 200):
        generator.answer(base, {}, [[2] * length], 20)
    assert generator._prefill._cache_size() == 2  # 256 and 512 tokens
    assert generator._extend._cache_size() == 2
    rates = generator.rates
    assert rates.new_seconds > 0
    assert rates.prompt_tokens == 1 + 62 + 63 + 64 + 149  # without the two calls that compiled


def test_an_answer_ends_at_the_limit_and_rows_are_padded_to_the_mesh() -> None:
    generator, base = tiny_generator(fsdp=4)
    answers = generator.answer(base, {}, PROMPTS[:3], 5)
    assert len(answers) == 3
    assert all(len(answer) <= 5 for answer in answers)
    assert generator.answer(base, {}, PROMPTS[:1], 1)[0] == answers[0][:1]


def test_a_quantised_base_answers_as_its_own_logits_say() -> None:
    mesh, prompt = support.make_mesh(), PROMPTS[2]
    base = support.load(Path(support.find_source_of_tiny()), TINY, mesh, quantization="int8")
    program = support.make_program(TINY, None, mesh)
    answer = Generator(program, TINY).answer(take_apart(dict(base), jnp.float32), {}, [prompt], 8)[0]
    base = support.load(Path(support.find_source_of_tiny()), TINY, mesh, quantization="int8")
    logits = support.logits(program, base, {}, np.array([[*prompt, *answer]]))[0]
    assert answer == logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert len(answer) == 8


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
