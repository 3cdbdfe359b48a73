"""Which tokens may be drawn, and how often."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptax.sampling import GREEDY, Sampling, choose_tokens, filter_logits

SETTINGS = [
    Sampling(1.0, 0, 1.0, 0.0),
    Sampling(0.7, 5, 1.0, 0.0),
    Sampling(1.3, 0, 0.8, 0.0),
    Sampling(1.0, 0, 1.0, 0.05),
    Sampling(0.9, 40, 0.95, 0.02),
    Sampling(2.0, 1, 0.5, 0.5),
    Sampling(1.0, 0, 1e-6, 0.0),
]


def draw_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (4, 500)).astype(np.float32)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_what_may_be_drawn_is_what_transformers_leaves(sampling: Sampling) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = draw_logits()
    theirs = process.TemperatureLogitsWarper(sampling.temperature)(None, torch.tensor(logits))
    if sampling.top_k:
        theirs = process.TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = process.TopPLogitsWarper(sampling.top_p)(None, theirs)
    if sampling.min_p:
        theirs = process.MinPLogitsWarper(sampling.min_p)(None, theirs)
    ours = np.asarray(filter_logits(jnp.asarray(logits), sampling))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs.numpy()))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)


def test_drawn_tokens_have_the_probabilities_that_are_left() -> None:
    sampling, logits = Sampling(1.5, 6, 0.9, 0.0), jnp.asarray(draw_logits()[:1])
    expected = np.asarray(jax.nn.softmax(filter_logits(logits, sampling)))[0]
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.jit(choose_tokens)(jnp.tile(logits, (len(keys), 1)), keys, sampling)
    found = np.bincount(np.asarray(drawn), minlength=500) / len(keys)
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(expected))
    np.testing.assert_allclose(found, expected, atol=0.015)


def test_without_temperature_the_most_likely_token_is_taken() -> None:
    logits = jnp.asarray(draw_logits())
    chosen = choose_tokens(logits, jax.random.split(jax.random.key(0), 4), GREEDY)
    np.testing.assert_array_equal(chosen, logits.argmax(axis=-1))


def test_tokens_as_likely_as_the_last_one_taken_are_all_taken() -> None:
    logits = jnp.array([[3.0, 1.0, 1.0, 0.0, -2.0]])
    kept = filter_logits(logits, Sampling(1.0, 2, 1.0, 0.0))
    np.testing.assert_array_equal(jnp.isfinite(kept)[0], [True, True, True, False, False])
