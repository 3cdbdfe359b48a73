"""The product of bfloat16 with a frozen weight: what it gives, and that the model's are all of this kind."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import support
from adaptax.lora import build_model, merge_model
from adaptax.models.gemma3_weights import SIZES
from adaptax.models.products import frozen_product
from adaptax.step import Program

CASES = {  # x, w, contracted axes of each
    "one axis": ((2, 5, 16), (16, 3, 4), ((2,), (0,))),
    "two axes": ((2, 5, 3, 16), (3, 16, 24), ((2, 3), (0, 1))),
    "to one axis": ((7, 16), (16, 8), ((1,), (0,))),
}


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


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All, also those of the functions within."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def test_a_model_in_bfloat16_multiplies_frozen_weights_so_and_adapters_in_float32() -> None:
    arch, mesh = SIZES["tiny"], support.make_mesh()
    spec = support.full_spec(arch, rank=4)
    base = support.load(None, arch, mesh)
    half = {path: array.astype(jnp.bfloat16) for path, array in base.items()}
    adapters = support.random_adapters(arch, spec, mesh)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, arch.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))

    def pull(dtype: type, base: support.Arrays) -> support.Arrays:
        program = Program(build_model(support.FAMILY, arch, spec, mesh, train=True), spec, jnp.dtype(dtype), mesh)

        def loss(adapters: support.Arrays) -> jax.Array:
            model = merge_model(program.graphdef, base, adapters, spec, program.adapter_dtype)
            hidden = model(tokens, positions, jnp.ones_like(tokens), dtype=dtype)
            assert hidden.dtype == dtype
            return (hidden.astype(jnp.float32) ** 2 * jnp.linspace(-1, 1, arch.embed_dim)).mean()

        return jax.grad(loss)(adapters)

    gradients = pull(jnp.bfloat16, half)
    for path, right in pull(jnp.float32, {p: a.astype(jnp.float32) for p, a in half.items()}).items():
        assert gradients[path].dtype == jnp.float32
        off = jnp.linalg.norm(gradients[path] - right) / jnp.linalg.norm(right)
        assert off < 0.05, (path, off)  # roundings of 2^-9 in each of six layers, forward and backward

    found = set()
    for equation in equations(jax.make_jaxpr(functools.partial(pull, jnp.bfloat16))(half).jaxpr):
        if equation.primitive.name == "dot_general":
            x, w = (var.aval for var in equation.invars)
            is_frozen = w.shape in {array.shape[1:] for path, array in base.items() if path.endswith("/w")}
            is_thin = spec.rank in (*x.shape, *w.shape)
            if is_frozen or is_thin:
                found.add((is_frozen, str(x.dtype), str(w.dtype), str(equation.outvars[0].aval.dtype)))
    assert found == {(True, "bfloat16", "bfloat16", "float32"), (False, "float32", "float32", "float32")}
