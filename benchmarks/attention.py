"""Implementations of attention in turn, forward and backward: alone, or within layers of a published size.

    python benchmarks/attention.py --size 1b --length 2048 --rounds 5
    python benchmarks/attention.py --size 1b --length 2048 --layers 6 --rounds 3

compiles the gradient for each implementation, runs them in turn in one process, and prints a JSON line each: median
seconds, their ratio to those of the first, GiB of temporaries as compiled. Alone, a local and a global layer's
attention are measured; within layers, with the gradient of adapters on all modules, every sixth is global.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import support  # noqa: E402
from adaptax.lora import build_model, merge_model  # noqa: E402
from adaptax.models.attention import attend, build_masks  # noqa: E402
from adaptax.models.gemma3_weights import SIZES  # noqa: E402
from adaptax.step import Program  # noqa: E402


def make_rows(options: argparse.Namespace) -> dict[str, jax.Array]:
    """Tokens, positions and segments: one document a row, or documents of --document tokens one behind the other."""
    shape, index = (options.batch, options.length), np.arange(options.length)
    tokens = np.random.default_rng(0).integers(4, 1000, shape)
    size = options.document or options.length
    values = {"tokens": tokens, "positions": index % size, "segments": index // size + 1}
    return {name: jnp.asarray(np.broadcast_to(array, shape), jnp.int32) for name, array in values.items()}


@dataclasses.dataclass
class Pass:
    """A compiled forward and backward pass with its arguments, and what was measured of it."""

    compiled: jax.stages.Compiled
    arguments: tuple[Any, ...]
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        """Once, to the end."""
        started = time.monotonic()
        jax.block_until_ready(self.compiled(*self.arguments))
        self.seconds.append(time.monotonic() - started)


def compile_pass(lose: Callable[..., jax.Array], wanted: Any, *arguments: Any) -> Pass:
    """The gradient of a loss for the wanted arguments."""
    return Pass(jax.jit(jax.grad(lose, argnums=wanted)).lower(*arguments).compile(), arguments)


def compile_alone(attention: str, is_global: bool, options: argparse.Namespace) -> Pass:
    """One layer's attention, with the gradient for queries, keys and values."""
    arch, mesh, rng = SIZES[options.size], support.make_mesh(), np.random.default_rng(0)

    def lose(q: jax.Array, k: jax.Array, v: jax.Array, rows: Any) -> jax.Array:
        window, kind = arch.sliding_window, {"implementation": attention, "mesh": mesh, "dtype": q.dtype}
        mask = build_masks(rows["positions"], rows["segments"], window, **kind)[is_global]
        return jnp.sin(attend(q, k, v, mask, arch.query_pre_attn_scalar**-0.5).astype(jnp.float32)).sum()

    q, k, v = (
        jnp.asarray(
            rng.standard_normal((options.batch, options.length, heads, arch.head_dim), np.float32), options.dtype
        )
        for heads in (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)
    )
    return compile_pass(lose, (0, 1, 2), q, k, v, make_rows(options))


def compile_layers(attention: str, options: argparse.Namespace) -> Pass:
    """Layers without the head."""
    pattern = tuple((i + 1) % 6 == 0 for i in range(options.layers))
    numbers = {"num_layers": options.layers, "global_layers": pattern, "vocab_size": 1024}
    arch, mesh = dataclasses.replace(SIZES[options.size], **numbers), support.make_mesh()
    spec, dtype = support.full_spec(arch), jnp.dtype(options.dtype)
    graphdef = build_model(support.FAMILY, arch, spec, mesh, train=True, remat=options.remat, attention=attention)

    adapter_dtype = Program(graphdef, spec, dtype, mesh).adapter_dtype

    def lose(adapters: Any, base: Any, rows: Any) -> jax.Array:
        model = merge_model(graphdef, base, adapters, spec, adapter_dtype)
        hidden_BTD = model(rows["tokens"], rows["positions"], rows["segments"], dtype=dtype)
        return jnp.sin(hidden_BTD.astype(jnp.float32)).sum()

    base, adapters = support.load(None, arch, mesh, dtype), support.random_adapters(arch, spec, mesh)
    return compile_pass(lose, 0, adapters, base, make_rows(options))


def compare(passes: dict[str, Pass], rounds: int, **told: Any) -> None:
    """Runs them round by round, the first round for nothing, and prints a line each."""
    for _ in range(rounds + 1):
        for one in passes.values():
            one.run()
    first = next(iter(passes.values()))
    for name, one in passes.items():
        seconds = statistics.median(one.seconds[1:])
        row = {"attention": name, **told, "seconds": round(seconds, 3)}
        row["ratio"] = round(seconds / statistics.median(first.seconds[1:]), 2)
        row["temporaries_gib"] = round(one.compiled.memory_analysis().temp_size_in_bytes / 2**30, 2)
        print(json.dumps(row), flush=True)


def main() -> None:
    """All implementations, alone or within layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--layers", type=int, default=0, help="0: attention alone")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--document", type=int, default=0, help="tokens of a document; 0: one fills a row")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="full", help="within layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--implementations", nargs="+", default=["plain", "xla"])
    options = parser.parse_args()
    names = options.implementations
    if options.layers:
        compare({name: compile_layers(name, options) for name in names}, options.rounds, layers=options.layers)
        return
    for kind in ("local", "global"):
        compare({name: compile_alone(name, kind == "global", options) for name in names}, options.rounds, layer=kind)


if __name__ == "__main__":
    main()
