"""Answers to prompts: the prompt in pieces of one size, then token by token, with a cache of keys and values."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from adaptax.data.chat import Example
from adaptax.data.tokenizer import END_OF_TURN, EOS, PAD
from adaptax.lora import Arrays, merge_model
from adaptax.mesh import partition, replicated
from adaptax.models import Architecture
from adaptax.models.cache import Cache, make_cache
from adaptax.models.products import two_rows
from adaptax.sampling import GREEDY, Sampling, choose_tokens
from adaptax.step import HEAD, Program

# Tokens of a prompt that are run at once: enough to fill the device, few enough that a short prompt is not all padding.
PIECE_TOKENS = {"cpu": 64}
OTHER_PIECE_TOKENS = 256
SMALLEST_CAPACITY = 256
STREAM_TOKENS = 1


def answer_span(example: Example) -> tuple[int, int]:
    """(start, stop) of the last trained stretch of an example, the token that ends it included."""
    trained = np.flatnonzero(example.is_trained)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[breaks[-1] + 1 if breaks.size else 0]), int(trained[-1]) + 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Decoding:
    """Rows on their way."""

    cache: Cache
    tokens_B: jax.Array  # the last of each row, not yet run
    written_BS: jax.Array  # answers so far; what is behind an answer's end is PAD
    counts_B: jax.Array  # tokens of each answer
    ended_B: jax.Array
    keys_B: jax.Array
    step: jax.Array


@dataclass
class Rates:
    """Tokens and seconds so far: of prompts, and of answers; without what was spent on compiling."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def describe(self) -> str:
        """``prompts 812 tokens/s, answers 21.3 tokens/s``."""
        parts = []
        for name, count, seconds in (
            ("prompts", self.prompt_tokens, self.prompt_seconds),
            ("answers", self.new_tokens, self.new_seconds),
        ):
            rate = count / seconds if seconds else 0.0
            parts += [f"{name} {rate:,.0f} tokens/s" if rate >= 100 else f"{name} {rate:.3g} tokens/s"] if rate else []
        return ", ".join(parts)


@dataclass
class Generator:
    """Generation with one program: prompts of all lengths share few compiled functions, by the capacity they need.

    Args:
      program: without dropout.
      arch: the model's numbers.
    """

    program: Program
    arch: Architecture
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        self._start = jax.jit(self._make_start, static_argnums=(4,))
        self._prefill = jax.jit(self._run_piece, donate_argnums=2)
        self._extend = jax.jit(self._run_tokens, donate_argnums=2)
        self._seen: set[Any] = set()

    @property
    def piece_tokens(self) -> int:
        """Tokens of a prompt that are run at once."""
        return PIECE_TOKENS.get(self._platform, OTHER_PIECE_TOKENS)

    @property
    def _platform(self) -> str:
        return self.program.mesh.devices.flat[0].platform

    def answer(
        self,
        base: Arrays,
        adapters: Arrays,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        first_row: int = 0,
        num_rows: int = 1,
    ) -> list[list[int]]:
        """The continuation of each prompt, up to the end of the turn, which is left out.

        Args:
          base: the frozen weights, stacked or from :func:`adaptax.weights.take_apart`.
          adapters: the adapters.
          prompts: token ids, of any lengths from 1.
          max_new_tokens: an answer is cut there.
          sampling: how tokens are drawn.
          seed: of drawing, with each row's number.
          first_row: the number of the first prompt: its answer does not depend on the others in the batch.
          num_rows: rows are filled up to so many, for which there is a program already.
        """
        state = self._begin(base, adapters, prompts, max_new_tokens, (seed, first_row), num_rows)
        state = self._advance(base, adapters, state, sampling, max_new_tokens)
        written, counts = np.asarray(state.written_BS), np.asarray(state.counts_B)
        return [written[i, : counts[i]].tolist() for i in range(len(prompts))]

    def stream(
        self,
        base: Arrays,
        adapters: Arrays,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
    ) -> Iterator[int]:
        """The tokens of one answer, each as soon as it is there."""
        state = self._begin(base, adapters, [prompt], max_new_tokens, (seed, 0), 1)
        done = 0
        while done < max_new_tokens:
            state = self._advance(base, adapters, state, sampling, STREAM_TOKENS)
            count, is_ended = np.asarray(state.counts_B)[0], np.asarray(state.ended_B)[0]
            if count > done:
                yield from np.asarray(state.written_BS)[0, done:count].tolist()
            done = int(count)
            if is_ended:
                return

    def _begin(
        self,
        base: Arrays,
        adapters: Arrays,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        draw: tuple[int, int],
        num_rows: int,
    ) -> Decoding:
        """Runs all but the last token of every prompt."""
        size, num_rows = self.piece_tokens, self.round_rows(max(num_rows, len(prompts)))
        lengths = [len(prompt) - 1 for prompt in prompts]
        num_pieces = -(-max(lengths) // size)
        width, capacity = num_pieces * size, self.capacity(max(lengths) + 1, max_new_tokens)
        tokens, starts = np.full((num_rows, width), PAD, np.int32), np.full(num_rows, width, np.int32)
        last = np.full(num_rows, PAD, np.int32)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            tokens[i, width - length :], starts[i], last[i] = prompt[:-1], width - length, prompt[-1]
        ended = np.arange(num_rows) >= len(prompts)
        rows = np.arange(draw[1], draw[1] + num_rows, dtype=np.uint32)
        state = self._start(starts, last, ended, (np.uint32(draw[0]), rows), capacity)
        cache, began = state.cache, time.monotonic()
        is_new = self._is_new("prefill", num_rows, capacity)
        for k in range(num_pieces):
            cache = self._prefill(base, adapters, cache, tokens[:, k * size : (k + 1) * size])
        jax.block_until_ready(cache)
        if not is_new:
            self.rates.prompt_tokens += sum(lengths)
            self.rates.prompt_seconds += time.monotonic() - began
        return replace(state, cache=cache)

    def _advance(self, base: Arrays, adapters: Arrays, state: Decoding, sampling: Sampling, num_steps: int) -> Decoding:
        """Up to ``num_steps`` more tokens of every row that has not ended."""
        is_new, began = self._is_new("decode", *state.written_BS.shape), time.monotonic()
        before = int(np.asarray(state.counts_B).sum())
        state = self._extend(base, adapters, state, sampling, np.int32(num_steps))
        count = int(np.asarray(state.counts_B).sum())  # waits
        if not is_new:
            self.rates.new_tokens += count - before
            self.rates.new_seconds += time.monotonic() - began
        return state

    def _is_new(self, *what: Any) -> bool:
        """Whether a function is compiled in this call."""
        is_new, _ = what not in self._seen, self._seen.add(what)
        return is_new

    def capacity(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Tokens of a row that the cache is made for: few sizes, as each is compiled for."""
        width = -(-(prompt_tokens - 1) // self.piece_tokens) * self.piece_tokens
        return max(SMALLEST_CAPACITY, 1 << (width + max_new_tokens - 1).bit_length())

    def round_rows(self, num_rows: int) -> int:
        """Rows as the mesh divides them."""
        fsdp = self.program.mesh.shape["fsdp"]
        return -(-num_rows // fsdp) * fsdp

    def _spread(self, state: Decoding) -> Decoding:
        """What the host reads is whole on every device."""
        names = ("tokens_B", "written_BS", "counts_B", "ended_B", "step")
        whole = replicated(self.program.mesh)
        read = {name: jax.lax.with_sharding_constraint(getattr(state, name), whole) for name in names}
        return replace(state, **read)

    def _place(self, axes: str, array: jax.Array) -> jax.Array:
        sharding: NamedSharding = partition(axes, array.shape, self.program.mesh)
        return jax.lax.with_sharding_constraint(array, sharding)

    def _make_start(
        self, starts_B: jax.Array, tokens_B: jax.Array, ended_B: jax.Array, draw: Any, capacity: int
    ) -> Decoding:
        seed, rows_B = draw
        place = functools.partial(self._place, "BKSH")
        cache = make_cache(self.arch, starts_B, capacity, self.program.dtype, place)
        keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows_B)
        num_rows = starts_B.shape[0]
        written_BS = jnp.full((num_rows, capacity), PAD, jnp.int32)
        counts_B = jnp.zeros(num_rows, jnp.int32)
        return self._spread(Decoding(cache, tokens_B, written_BS, counts_B, ended_B, keys_B, jnp.int32(0)))

    def _merge(self, base: Arrays, adapters: Arrays) -> Any:
        return merge_model(self.program.graphdef, base, adapters, self.program.spec, self.program.adapter_dtype)

    def _run_piece(self, base: Arrays, adapters: Arrays, cache: Cache, tokens_BT: jax.Array) -> Cache:
        return self._merge(base, adapters).extend(tokens_BT, cache, dtype=self.program.dtype)[1]

    def _run_tokens(
        self, base: Arrays, adapters: Arrays, state: Decoding, sampling: Sampling, num_steps: jax.Array
    ) -> Decoding:
        model, dtype = self._merge(base, adapters), self.program.dtype
        head_VD, rows_B = base[HEAD].astype(dtype), jnp.arange(state.tokens_B.shape[0])
        last, is_cpu = state.step + num_steps, self._platform == "cpu"

        def is_going(state: Decoding) -> jax.Array:
            return (state.step < last) & ~state.ended_B.all()

        def extend(state: Decoding) -> Decoding:
            hidden_BTD, cache = model.extend(state.tokens_B[:, None], state.cache, dtype=dtype)
            hidden_BD = two_rows(hidden_BTD[:, 0]) if is_cpu else hidden_BTD[:, 0]
            logits_VB = jnp.einsum("VD,BD->VB", head_VD, hidden_BD, preferred_element_type=jnp.float32)
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.step)
            new_B = choose_tokens(logits_VB.T[: len(rows_B)], keys_B, sampling)
            ended_B = state.ended_B | (new_B == END_OF_TURN) | (new_B == EOS)
            places_B = jnp.where(ended_B, state.written_BS.shape[1], state.counts_B)  # past the end: not written
            written_BS = state.written_BS.at[rows_B, places_B].set(new_B, mode="drop")
            counts_B = state.counts_B + ~ended_B
            return Decoding(cache, new_B, written_BS, counts_B, ended_B, state.keys_B, state.step + 1)

        return self._spread(jax.lax.while_loop(is_going, extend, state))
