"""How good the adapters are: loss on held-out rows, and exact match of greedy answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from adaptax.data.chat import Example
from adaptax.data.packing import choose_buckets
from adaptax.data.pipeline import BatchSource, Dataset
from adaptax.data.store import Examples
from adaptax.data.tokenizer import END_OF_TURN
from adaptax.generate import answer_span, build_decode, greedy
from adaptax.lora import Arrays, merge_model
from adaptax.loss import chunk_size
from adaptax.mesh import batch_part, shard_batch
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
    program: Program, base: Arrays, data: Dataset, num_rows: int, batch_size: int
) -> Callable[[Arrays], Answers | None]:
    """A function from adapters to the score of the first ``num_rows`` held-out rows; None where there are none.

    Plain documents, and conversations that were cut before the end of their last answer, have no score.

    A greedy answer is the expected one exactly where every expected token, the end of the turn included, is the most
    likely one behind those before it. So one pass over the expected answers scores them all, and only the few that are
    shown are generated; these may be a fourth longer than the expected ones.
    """
    answered = ((row, answer_span(row)) for row in data.examples)
    has_answer = ((row, span) for row, span in answered if span[0] > 1 and row.tokens[span[1] - 1] == END_OF_TURN)
    whole = list(itertools.islice(has_answer, num_rows))
    if not whole:
        return lambda adapters: None
    rows, spans = zip(*whole, strict=True)
    answers = Dataset(Examples.of([_only_answer(row, *span) for row, span in zip(rows, spans, strict=True)]))
    longest = choose_buckets(answers.examples.lengths, 1)
    batches = BatchSource(answers, num_micro=1, batch_size=batch_size, buckets=longest, part=batch_part(program.mesh))
    match, decode = build_match(program), build_decode(program)
    prompts = [row.tokens[:start].tolist() for row, (start, _) in zip(rows, spans, strict=True)][:NUM_SHOWN]
    expected = [row.tokens[start : stop - 1].tolist() for row, (start, stop) in zip(rows, spans, strict=True)]
    max_new_tokens = min(max(map(len, expected[:NUM_SHOWN])) * 5 // 4 + 1, MAX_SHOWN_TOKENS)

    def answer(adapters: Arrays) -> Answers:
        sharded = (shard_batch(batches[k], program.mesh) for k in range(batches.steps_per_epoch))
        num_right = sum(int(match(adapters, base, batch)) for batch in sharded)
        given = greedy(decode, base, adapters, prompts, max_new_tokens, program.mesh.shape["fsdp"])
        return Answers(num_right / len(rows), len(rows), prompts, expected[:NUM_SHOWN], given)

    return answer


def build_match(program: Program) -> Callable[[Arrays, Arrays, Batch], jax.Array]:
    """Jitted ``(adapters, base, batch) -> rows of which every supervised target is the most likely token``."""

    def match(adapters: Arrays, base: Arrays, batch: Batch) -> jax.Array:
        micro = {name: array[0] for name, array in batch.items()}
        model = merge_model(program.graphdef, base, adapters, program.spec, program.adapter_dtype)
        hidden_BTD = model(micro["tokens"], micro["positions"], micro["segments"], dtype=program.dtype)
        B, T, D = hidden_BTD.shape
        C = max(1, min(T, chunk_size(base[HEAD].shape[0]) // B))  # positions at a time: no [tokens, vocabulary] array
        padded = jnp.pad(hidden_BTD, ((0, 0), (0, -T % C), (0, 0))).reshape(B, -1, C, D).swapaxes(0, 1)

        def most_likely(hidden_BCD: jax.Array) -> jax.Array:
            head_VD = base[HEAD].astype(program.dtype)
            return jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32).argmax(-1)

        best_BT = jax.lax.map(most_likely, padded).swapaxes(0, 1).reshape(B, -1)[:, :T]
        is_right_B = ((best_BT == micro["targets"]) | ~micro["loss_mask"]).all(axis=1)
        return (is_right_B & micro["loss_mask"].any(axis=1)).sum()

    return jax.jit(match)


def _only_answer(example: Example, start: int, stop: int) -> Example:
    """The example up to the end of its last answer, of which alone the answer is supervised."""
    is_trained = example.is_trained[:stop].copy()
    is_trained[:start] = False
    return Example(example.tokens[:stop], is_trained)
