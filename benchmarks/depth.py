"""Compile time and memory of a training step as layers are added; from shapes alone, no weights are made.

    python benchmarks/depth.py --size 1b --batch 4 --length 512 --rank 32

compiles the step of a published size with 18, 26 and 34 layers and prints a JSON line each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import support  # noqa: E402
from adaptax.models.gemma3_weights import SIZES  # noqa: E402
from adaptax.weights import describe_weights  # noqa: E402


def compile_step(size: str, num_layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds to compile, and GiB of temporaries and of base weights."""
    pattern = tuple((i + 1) % 6 == 0 for i in range(num_layers))
    arch = dataclasses.replace(SIZES[size], num_layers=num_layers, global_layers=pattern)
    mesh = support.make_mesh()
    dtype = jnp.dtype(options.dtype)
    base = describe_weights(None, arch, support.FAMILY.checkpoint, mesh, dtype)
    trainer = support.Trainer(arch, base, support.full_spec(arch, options.rank, options.rank), mesh)  # type: ignore[arg-type]
    shape = (1, options.batch, options.length)
    batch = support.shard_batch(support.random_batch(1000, shape), mesh)
    lowered = trainer.step.lower(trainer.state, base, batch)
    started = time.monotonic()
    memory = lowered.compile().memory_analysis()
    weights = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(base))
    return {
        "layers": num_layers,
        "compile_seconds": round(time.monotonic() - started, 1),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 2),
        "base_weights_gib": round(weights / 2**30, 2),
    }


def main() -> None:
    """Three depths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    for num_layers in (18, 26, 34):
        print(json.dumps(compile_step(options.size, num_layers, options)), flush=True)


if __name__ == "__main__":
    main()
