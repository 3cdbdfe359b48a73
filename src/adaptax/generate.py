"""Greedy answers to prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from adaptax.data.chat import Example
from adaptax.data.tokenizer import END_OF_TURN, EOS, PAD
from adaptax.lora import Arrays, merge_model
from adaptax.mesh import replicated
from adaptax.step import HEAD, Program


def answer_span(example: Example) -> tuple[int, int]:
    """(start, stop) of the last trained stretch of an example, the token that ends it included."""
    trained = np.flatnonzero(example.is_trained)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[breaks[-1] + 1 if breaks.size else 0]), int(trained[-1]) + 1


Decode = Callable[..., tuple[jax.Array, jax.Array]]


def greedy(
    decode: Decode, base: Arrays, adapters: Arrays, prompts: Sequence[Sequence[int]], max_new_tokens: int, fsdp: int
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to the end of the turn.

    Args:
      decode: from :func:`build_decode`.
      base: the frozen weights.
      adapters: the adapters.
      prompts: token ids, of any lengths.
      max_new_tokens: an answer is cut there.
      fsdp: devices the rows are spread over.
    """
    rows = -(-len(prompts) // fsdp) * fsdp
    length = max(map(len, prompts)) + max_new_tokens
    tokens, lengths = np.full((rows, length), PAD, np.int32), np.ones(rows, np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
    ended = np.arange(rows) >= len(prompts)
    out, ends = jax.device_get(decode(base, adapters, tokens, lengths, ended, max_new_tokens))
    return [out[i, len(prompt) : ends[i]].tolist() for i, prompt in enumerate(prompts)]


def build_decode(program: Program) -> Decode:
    """Jitted greedy decoding: (base, adapters, tokens, lengths, ended, max_new_tokens) -> (tokens, lengths).

    Every new token runs the whole sequence again, all rows at once: meant for short answers.
    """

    def decode(
        base: Arrays,
        adapters: Arrays,
        tokens_BT: jax.Array,
        lengths_B: jax.Array,
        ended_B: jax.Array,
        max_new_tokens: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        rows_B = jnp.arange(tokens_BT.shape[0])
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        model = merge_model(program.graphdef, base, adapters, program.spec, program.adapter_dtype)
        head_VD = base[HEAD].astype(program.dtype)

        def is_going(carry: tuple[jax.Array, ...]) -> jax.Array:
            return (carry[0] < max_new_tokens) & ~carry[3].all()

        def extend(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            i, tokens_BT, lengths_B, ended_B = carry
            hidden_BTD = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), dtype=program.dtype)
            last_BD = hidden_BTD[rows_B, lengths_B - 1]
            logits_BV = jnp.einsum("BD,VD->BV", last_BD, head_VD, preferred_element_type=jnp.float32)
            new_B = logits_BV.argmax(axis=-1).astype(tokens_BT.dtype)
            ended_B |= (new_B == END_OF_TURN) | (new_B == EOS)
            places_B = jnp.where(ended_B, tokens_BT.shape[1], lengths_B)  # past the end: not written
            return i + 1, tokens_BT.at[rows_B, places_B].set(new_B, mode="drop"), lengths_B + ~ended_B, ended_B

        _, tokens_BT, lengths_B, _ = jax.lax.while_loop(is_going, extend, (jnp.int32(0), tokens_BT, lengths_B, ended_B))
        return tokens_BT, lengths_B

    return jax.jit(decode, out_shardings=replicated(program.mesh))
