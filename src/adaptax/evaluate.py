"""How good the adapters are: loss on held-out rows, and exact match of greedy answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptax.config import Config
from adaptax.data.chat import Example, last_request
from adaptax.data.packing import choose_buckets
from adaptax.data.pipeline import BatchSource, Dataset
from adaptax.data.store import Examples
from adaptax.data.tokenizer import END_OF_TURN, Tokenizer
from adaptax.generate import Generator, answer_span
from adaptax.lora import Arrays, merge_model
from adaptax.loss import chunk_size
from adaptax.mesh import batch_part, replicated, shard_batch
from adaptax.sampling import read_sampling
from adaptax.step import HEAD, Batch, Program

EvalStep = Callable[[Arrays, Arrays, Batch], tuple[jax.Array, jax.Array]]
NUM_SHOWN, MAX_SHOWN_TOKENS = 4, 256


def evaluate_loss(
    eval_step: EvalStep,
    base: Arrays,
    batches: BatchSource | None,
    mesh: Mesh,
    adapters: Arrays,
    check: Callable[[], None] = lambda: None,
) -> float | None:
    """Mean negative log likelihood per trained token over all held-out rows, in nats; None where there are none.

    ``check`` is called while each batch runs, and may raise.
    """
    if batches is None:
        return None
    sums = []
    for k in range(batches.steps_per_epoch):
        sums.append(eval_step(adapters, base, shard_batch(batches[k], mesh)))
        check()
        jax.block_until_ready(sums[:-1][-1:])  # one ahead, and no more
    losses, counts = zip(*jax.device_get(sums), strict=True)
    return float(sum(map(float, losses)) / sum(map(int, counts)))


@dataclass(frozen=True)
class Answers:
    """How many greedy answers are right, and a few of them, as tokens."""

    exact_match: float  # share of answers that equal the expected one, token by token
    num_rows: int
    prompts: list[list[int]]
    expected: list[list[int]]
    given: list[list[int]]


def build_answer(
    generator: Generator, base: Arrays, data: Dataset, num_rows: int, batch_size: int
) -> Callable[[Arrays], Answers | None]:
    """A function from adapters to the score of the first ``num_rows`` held-out rows; None where there are none.

    Plain documents, and conversations that were cut before the end of their last answer, have no score.

    A greedy answer is the expected one exactly where every expected token, the end of the turn included, is the most
    likely one behind those before it. So one pass over the expected answers scores them all, and only the few that are
    shown are generated; these may be a fourth longer than the expected ones.
    """
    whole = list(itertools.islice(answered_rows(data.examples), num_rows))
    if not whole:
        return lambda adapters: None
    answers = Dataset(Examples.of([_only_answer(row, *span) for _, row, span in whole]))
    program = generator.program
    longest = choose_buckets(answers.examples.lengths, 1)
    batches = BatchSource(answers, num_micro=1, batch_size=batch_size, buckets=longest, part=batch_part(program.mesh))
    score = build_score(program)
    prompts = [row.tokens[:start].tolist() for _, row, (start, _) in whole[:NUM_SHOWN]]
    expected = [row.tokens[start : stop - 1].tolist() for _, row, (start, stop) in whole[:NUM_SHOWN]]
    max_new_tokens = min(max(map(len, expected)) * 5 // 4 + 1, MAX_SHOWN_TOKENS)

    def answer(adapters: Arrays) -> Answers:
        num_right = 0
        for k in range(batches.steps_per_epoch):
            _, counts_B, right_B = score(adapters, base, shard_batch(batches[k], program.mesh))
            num_right += int(((counts_B > 0) & (right_B == counts_B)).sum())
        given = generator.answer(base, adapters, prompts, max_new_tokens)
        return Answers(num_right / len(whole), len(whole), prompts, expected, given)

    return answer


@dataclass(frozen=True)
class Sample:
    """An answer to a held-out row, as text."""

    request: str
    expected: str
    given: str

    def describe(self) -> str:
        """Three lines."""
        return f"request: {self.request}\nexpected: {self.expected}\nanswer: {self.given}"


def build_sample(
    generator: Generator, base: Arrays, data: Dataset, tokenizer: Tokenizer, config: Config
) -> Callable[[Arrays], list[Sample]]:
    """A function from adapters to their answers to the first ``evaluation.num_samples`` held-out rows."""
    rows = list(itertools.islice(answered_rows(data.examples), config.evaluation.num_samples))
    prompts = [row.tokens[:start].tolist() for _, row, (start, _) in rows]
    requests = [last_request(prompt, tokenizer) for prompt in prompts]
    expected = [tokenizer.decode(row.tokens[start : stop - 1].tolist()) for _, row, (start, stop) in rows]
    generation = config.generation

    def sample(adapters: Arrays) -> list[Sample]:
        if not prompts:
            return []
        settings = generation.max_new_tokens, read_sampling(generation)
        given = generator.answer(base, adapters, prompts, *settings, seed=generation.seed)
        return list(map(Sample, requests, expected, map(tokenizer.decode, given)))

    return sample


def answered_rows(examples: Iterable[Example]) -> Iterator[tuple[int, Example, tuple[int, int]]]:
    """The rows that have a last answer, whole: their numbers, themselves, and where it stands in them."""
    for number, row in enumerate(examples):
        start, stop = answer_span(row)
        if start > 1 and row.tokens[stop - 1] == END_OF_TURN:
            yield number, row, (start, stop)


def build_score(program: Program) -> Callable[[Arrays, Arrays, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """Jitted ``(adapters, base, batch) -> of each row``: summed loss in nats, supervised targets, and how many of these
    are the most likely token.
    """

    def score(adapters: Arrays, base: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        micro = {name: array[0] for name, array in batch.items()}
        model = merge_model(program.graphdef, base, adapters, program.spec, program.adapter_dtype)
        hidden_BTD = model(micro["tokens"], micro["positions"], micro["segments"], dtype=program.dtype)
        B, T, _ = hidden_BTD.shape
        C = max(1, min(T, chunk_size(base[HEAD].shape[0]) // B))  # positions at a time: no [tokens, vocabulary] array
        head_VD = base[HEAD].astype(program.dtype)

        def cut(x_BT: jax.Array) -> jax.Array:
            padded = jnp.pad(x_BT, ((0, 0), (0, -T % C), *((0, 0) for _ in x_BT.shape[2:])))
            return padded.reshape(B, -1, C, *x_BT.shape[2:]).swapaxes(0, 1)

        def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_BCD, targets_BC = chunk
            logits_BCV = jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
            target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(logits_BCV, axis=-1) - target_BC, logits_BCV.argmax(-1) == targets_BC

        scored = jax.lax.map(score_chunk, (cut(hidden_BTD), cut(micro["targets"])))
        losses_BT, is_right_BT = (x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in scored)
        mask_BT = micro["loss_mask"]
        return (losses_BT * mask_BT).sum(axis=1), mask_BT.sum(axis=1), (is_right_BT & mask_BT).sum(axis=1)

    return jax.jit(score, out_shardings=replicated(program.mesh))


def _only_answer(example: Example, start: int, stop: int) -> Example:
    """The example up to the end of its last answer, of which alone the answer is supervised."""
    is_trained = example.is_trained[:stop].copy()
    is_trained[:start] = False
    return Example(example.tokens[:stop], is_trained)
