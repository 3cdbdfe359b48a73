"""The fused cross entropy against the dense one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support
from adaptax.loss import chunk_size, cross_entropy

B, T, D, V = 8, 24, 32, 512


def inputs(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Hidden states, head, targets, and a mask with other counts in every row, one of them empty."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    head = jax.random.normal(keys[1], (V, D), dtype)
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    mask = jnp.arange(T)[None] < jnp.array([0, 1, 5, 24, 3, 7, 11, 2])[:, None]
    return hidden, head, targets, mask


def dense(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """The same with all logits."""
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return (losses * mask).sum()


@pytest.mark.parametrize(("fsdp", "tp"), [(1, 1), (8, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("small_chunks", [False, True])
def test_loss_and_gradient_equal_the_dense_ones(
    fsdp: int, tp: int, small_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:  # several chunks, the last one not full
        monkeypatch.setattr("adaptax.loss.chunk_size", lambda vocab_size: 5)
    mesh = support.make_mesh(fsdp, tp)
    hidden, head, targets, mask = inputs()
    loss, gradient = jax.jit(jax.value_and_grad(lambda h: cross_entropy(h, head, targets, mask, mesh)))(hidden)
    expected, expected_gradient = jax.value_and_grad(dense)(hidden, head, targets, mask)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    assert np.abs(expected_gradient).max() > 0.1
    without = jax.jit(lambda h: cross_entropy(h, head, targets, mask, mesh))(hidden)
    np.testing.assert_allclose(without, expected, rtol=1e-5)


def test_the_gradient_scales_with_what_follows() -> None:
    mesh, (hidden, head, targets, mask) = support.make_mesh(), inputs()
    one = jax.grad(lambda h: cross_entropy(h, head, targets, mask, mesh))(hidden)
    third = jax.grad(lambda h: cross_entropy(h, head, targets, mask, mesh) / 3)(hidden)
    np.testing.assert_allclose(third, one / 3, atol=1e-6)


def test_nothing_supervised_gives_zero_and_no_gradient() -> None:
    mesh, (hidden, head, targets, mask) = support.make_mesh(), inputs()
    loss, gradient = jax.value_and_grad(lambda h: cross_entropy(h, head, targets, mask & False, mesh))(hidden)
    assert float(loss) == 0
    assert not np.asarray(gradient).any()


def test_bfloat16_hidden_states_are_summed_in_float32() -> None:
    mesh, (hidden, head, targets, mask) = support.make_mesh(), inputs(jnp.bfloat16)
    loss = cross_entropy(hidden, head, targets, mask, mesh)
    assert loss.dtype == jnp.float32
    expected = dense(hidden.astype(jnp.float32), head.astype(jnp.float32), targets, mask)
    np.testing.assert_allclose(loss, expected, rtol=2e-3)


def test_no_array_of_tokens_by_vocabulary_is_ever_made() -> None:
    tokens, width, vocab = 16_384, 64, 65_536
    whole = tokens * vocab * 4
    mesh = support.make_mesh()

    def run(hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array) -> Any:
        return jax.value_and_grad(lambda h: cross_entropy(h, head, targets, mask, mesh))(hidden)

    shapes = [((1, tokens, width), jnp.float32), ((vocab, width), jnp.float32), ((1, tokens), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*s) for s in [*shapes, ((1, tokens), jnp.bool_)]]
    temporaries = jax.jit(run).lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    chunk = chunk_size(vocab) * vocab * 4
    assert temporaries < 4 * chunk < whole / 2
