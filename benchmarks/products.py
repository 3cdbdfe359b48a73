"""What this processor does at most: dense products of 2048 x 2048 with 2048 x 2048, by XLA and by PyTorch.

    python benchmarks/products.py
    XLA_FLAGS=--xla_cpu_use_onednn=true python benchmarks/products.py --only xla

prints GFLOP/s for the types that a training step may multiply in: the best of several calls. At these rates a step's
products take the least that it can take. Needs torch, but with ``--only xla``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

SIZE = 2048
XLA = {  # of the factors, of the outcome
    "XLA float32": (jnp.float32, jnp.float32),
    "XLA bfloat16": (jnp.bfloat16, jnp.bfloat16),
    "XLA bfloat16 into float32": (jnp.bfloat16, jnp.float32),
}


def xla_products() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Compiled products, each waiting for its outcome."""
    for name, (kind, outcome) in XLA.items():
        a, b = (jax.random.normal(jax.random.key(k), (SIZE, SIZE), kind) for k in (0, 1))
        product = jax.jit(lambda a, b, outcome=outcome: jnp.matmul(a, b, preferred_element_type=outcome))
        yield name, lambda product=product, a=a, b=b: product(a, b).block_until_ready()


def torch_products() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The same by PyTorch."""
    import torch

    for name in ("float32", "bfloat16"):
        a, b = (torch.randn(SIZE, SIZE).to(getattr(torch, name)) for _ in range(2))
        yield f"PyTorch {name}", lambda a=a, b=b: a @ b


def main() -> None:
    """A line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("xla", "torch"))
    parser.add_argument("--calls", type=int, default=15)
    options = parser.parse_args()
    makers = {"xla": xla_products, "torch": torch_products}
    for library, make in makers.items():
        for name, call in make() if options.only in (None, library) else ():
            call()
            seconds = []
            for _ in range(options.calls):
                started = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - started)
            print(f"{name:28} {2 * SIZE**3 / min(seconds) / 1e9:6.0f} GFLOP/s")


if __name__ == "__main__":
    main()
