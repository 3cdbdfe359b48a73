"""The product of bfloat16 with a frozen weight: what it gives, and that the model's are all of this kind."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support
from adaptax.lora import LoraSpec, build_model, merge_model
from adaptax.models.gemma3_weights import SIZES
from adaptax.models.products import frozen_product
from adaptax.step import Program

CASES = {  # x, w, contracted axes of each
    "one axis": ((2, 5, 16), (16, 3, 4), ((2,), (0,))),
    "two axes": ((2, 5, 3, 16), (3, 16, 24), ((2, 3), (0, 1))),
    "to one axis": ((7, 16), (16, 8), ((1,), (0,))),
}
ARCH, MESH = SIZES["tiny"], support.make_mesh()
SPEC = support.full_spec(ARCH, rank=4)


@pytest.fixture(scope="module")
def base() -> support.Arrays:
    """Weights in bfloat16."""
    return {path: array.astype(jnp.bfloat16) for path, array in support.load(None, ARCH, MESH).items()}


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_float32_rounded(case: str) -> None:
    shape_x, shape_w, contracted = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, (shape_x, shape_w), strict=False))
    numbers = contracted, ((), ())
    exact = functools.partial(jax.lax.dot_general, dimension_numbers=numbers)
    out, pull = jax.vjp(lambda x: frozen_product(x, w, numbers), x)
    right, pull_right = jax.vjp(lambda x: exact(x, w.astype(jnp.float32)), x.astype(jnp.float32))
    d_out = jax.random.normal(keys[2], out.shape, jnp.bfloat16)
    assert out.dtype == pull(d_out)[0].dtype == jnp.bfloat16
    # One rounding to 8 bits, of a value exact in float32.
    np.testing.assert_allclose(np.float32(out), right, rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(
        np.float32(pull(d_out)[0]), pull_right(d_out.astype(jnp.float32))[0], rtol=2**-8, atol=1e-5
    )


def pull(dtype: type, base: support.Arrays, remat: str = "full", spec: LoraSpec = SPEC) -> support.Arrays:
    """Gradients of a loss in the model, in a type."""
    program = Program(build_model(support.FAMILY, ARCH, spec, MESH, train=True, remat=remat), spec, dtype, MESH)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, ARCH.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))

    def loss(adapters: support.Arrays) -> jax.Array:
        model = merge_model(program.graphdef, base, adapters, spec, program.adapter_dtype)
        hidden = model(tokens, positions, jnp.ones_like(tokens), dtype=dtype)
        assert hidden.dtype == dtype
        return (hidden.astype(jnp.float32) ** 2 * jnp.linspace(-1, 1, ARCH.embed_dim)).mean()

    return jax.grad(loss)(support.random_adapters(ARCH, spec, MESH))


def products(base: support.Arrays, remat: str, spec: LoraSpec = SPEC) -> list[tuple[Any, Any, Any]]:
    """(x, w, outcome) of every product in the gradients of the model in bfloat16."""
    jaxpr = jax.make_jaxpr(functools.partial(pull, jnp.bfloat16, remat=remat, spec=spec))(base).jaxpr
    found = [e for e, _ in support.equations(jaxpr) if e.primitive.name == "dot_general"]
    return [tuple(var.aval for var in (*e.invars, *e.outvars)) for e in found]


@pytest.mark.parametrize("first_adapted", [0, 3])
def test_a_model_in_bfloat16_multiplies_frozen_weights_so_and_adapters_in_float32(
    base: support.Arrays, first_adapted: int
) -> None:
    layers = tuple(range(first_adapted, ARCH.num_layers))
    spec = dataclasses.replace(SPEC, layers=dict.fromkeys(SPEC.layers, layers))
    gradients = pull(jnp.bfloat16, base, spec=spec)
    for path, right in pull(jnp.float32, base, spec=spec).items():
        assert gradients[path].dtype == jnp.float32
        off = jnp.linalg.norm(gradients[path] - right) / jnp.linalg.norm(right)
        assert off < 0.05, (path, off)  # roundings of 2^-9 in each of six layers, forward and backward
    found = products(base, "full", spec)
    assert sum(w.shape in frozen_shapes(base) for _, w, _ in found) == (3 if first_adapted == 0 else 4) * 6
    for x, w, outcome in found:
        if w.shape in frozen_shapes(base):
            assert x.dtype == w.dtype == jnp.bfloat16
            assert outcome.dtype == jnp.float32
        elif SPEC.rank in (*x.shape, *w.shape):
            assert jnp.float32 in (x.dtype, w.dtype)
            assert outcome.dtype == jnp.float32


def test_products_in_bfloat16_are_kept_as_bits_and_not_made_again(base: support.Arrays) -> None:
    """With ``matmul`` a layer's six products are made once forward, and their inputs' gradients once backward."""
    counts = {
        remat: sum(w.shape in frozen_shapes(base) for _, w, _ in products(base, remat)) for remat in ("full", "matmul")
    }
    assert counts == {"full": 3 * 6, "matmul": 2 * 6}
    jaxpr = jax.make_jaxpr(functools.partial(pull, jnp.bfloat16, remat="matmul"))(base).jaxpr
    scans = [
        e for e, _ in support.equations(jaxpr) if e.primitive.name == "scan" and e.params["length"] == ARCH.num_layers
    ]
    stacked = {str(v.aval.dtype) for v in scans[0].outvars if v.aval.shape[1:] == (2, 24, ARCH.mlp_dim)}
    assert stacked == {"uint16"}
    kept, made = pull(jnp.bfloat16, base, "matmul"), pull(jnp.bfloat16, base, "full")
    for path in kept:
        np.testing.assert_allclose(kept[path], made[path], rtol=1e-3, atol=1e-6)


def frozen_shapes(base: support.Arrays) -> set[tuple[int, ...]]:
    """Of a layer's matrices."""
    return {array.shape[1:] for path, array in base.items() if path.endswith("/w")}
