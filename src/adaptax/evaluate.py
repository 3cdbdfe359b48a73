"""How good the adapters are: loss on held-out rows, and exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from adaptax.data.pipeline import BatchSource, Dataset
from adaptax.generate import Decode, greedy, split_answer
from adaptax.lora import Arrays
from adaptax.mesh import shard_batch
from adaptax.step import Batch

EvalStep = Callable[[Arrays, Arrays, Batch], tuple[jax.Array, jax.Array]]


def evaluate_loss(
    eval_step: EvalStep, base: Arrays, batches: BatchSource | None, mesh: Mesh, adapters: Arrays
) -> float | None:
    """Mean negative log likelihood per trained token over all held-out rows, in nats; None where there are none."""
    if batches is None:
        return None
    sums = [eval_step(adapters, base, shard_batch(batches[k], mesh)) for k in range(batches.steps_per_epoch)]
    losses, counts = zip(*jax.device_get(sums), strict=True)
    return float(sum(map(float, losses)) / sum(map(int, counts)))


@dataclass(frozen=True)
class Answers:
    """Greedy answers to held-out prompts, as tokens."""

    prompts: list[list[int]]
    expected: list[list[int]]
    given: list[list[int]]

    @property
    def exact_match(self) -> float:
        """The share of answers that equal the expected one, token by token."""
        return sum(a == b for a, b in zip(self.expected, self.given, strict=True)) / len(self.expected)


def answer_rows(
    decode: Decode, base: Arrays, data: Dataset, num_rows: int, mesh: Mesh, adapters: Arrays
) -> Answers | None:
    """Answers the first ``num_rows`` held-out rows; an answer may be a fourth longer than the longest expected one.

    None where no row is asked for or held out.
    """
    if num_rows == 0 or not data.examples:
        return None
    prompts, expected = zip(*(split_answer(example) for example in data.examples[:num_rows]), strict=True)
    max_new_tokens = max(map(len, expected)) * 5 // 4 + 1
    given = greedy(decode, base, adapters, prompts, max_new_tokens, mesh.shape["fsdp"])
    return Answers(list(prompts), list(expected), given)
