"""The training step: what it computes, what it leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import support
from adaptax.lora import init_adapters
from adaptax.models.gemma3_weights import SIZES
from adaptax.step import build_eval_step, count_visible

ARCH = SIZES["tiny"]


@pytest.fixture(scope="module")
def base() -> dict[str, jax.Array]:
    return support.load(None, ARCH, support.make_mesh())


def make_trainer(base: dict[str, jax.Array], **changes: object) -> support.Trainer:
    spec = support.full_spec(ARCH)
    return support.Trainer(ARCH, base, spec, support.make_mesh(), support.optimizer_config(**changes))  # type: ignore[arg-type]


def test_accumulating_four_times_one_row_equals_four_rows_at_once(base: dict[str, jax.Array]) -> None:
    batch = support.random_batch(ARCH.vocab_size, (1, 4, 32), supervised=0.4)
    counts = batch["loss_mask"].sum(axis=(0, 2))
    assert len(set(counts)) > 1  # a mean of means would differ
    whole, parts = make_trainer(base), make_trainer(base)
    one_by_one = {name: array.reshape(4, 1, 32) for name, array in batch.items()}
    for _ in range(3):
        a, b = whole.run(batch), parts.run(one_by_one)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["num_supervised"] == b["num_supervised"] == counts.sum()


def test_the_loss_is_the_mean_over_supervised_tokens_of_the_dense_cross_entropy(base: dict[str, jax.Array]) -> None:
    batch = support.random_batch(ARCH.vocab_size, (1, 4, 32))
    program = support.make_program(ARCH, None, support.make_mesh())
    logits = support.logits(program, base, {}, batch["tokens"][0])
    losses = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(batch["targets"][0]))
    expected = float((losses * batch["loss_mask"][0]).sum() / batch["loss_mask"].sum())
    assert make_trainer(base).run(batch)["loss"] == pytest.approx(expected, rel=1e-5)  # B is zero: the base's loss


def test_only_adapters_change_and_only_they_have_moments(base: dict[str, jax.Array]) -> None:
    before = {path: np.asarray(array).copy() for path, array in base.items()}
    trainer = make_trainer(base)
    adapters = {path: np.asarray(array).copy() for path, array in trainer.state.adapters.items()}
    for seed in range(2):  # in the first step A gets no gradient, as B is zero
        trainer.run(support.random_batch(ARCH.vocab_size, (1, 2, 16), seed=seed))
    assert all(np.array_equal(before[path], base[path]) for path in base)
    assert all(not np.array_equal(adapters[path], trainer.state.adapters[path]) for path in adapters)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(trainer.state.optimizer) if leaf.ndim)
    assert sizes == sorted(2 * [array.size for array in adapters.values()])  # mu and nu


def test_frozen_weights_get_no_gradient(base: dict[str, jax.Array]) -> None:
    """The compiled step holds no array of a weight's stacked shape but the weights themselves."""
    trainer = make_trainer(base)
    batch = support.shard_batch(support.random_batch(ARCH.vocab_size, (1, 2, 16)), trainer.mesh)
    jaxpr = jax.make_jaxpr(trainer.step)(trainer.state, base, batch)
    outputs = [v.aval.shape for v in jaxpr.jaxpr.outvars]
    assert not {array.shape for path, array in base.items() if path.endswith("/w")} & set(outputs)
    memory = trainer.step.lower(trainer.state, base, batch).compile().memory_analysis()
    weights = sum(array.nbytes for path, array in base.items() if path.endswith("/w"))
    assert memory.temp_size_in_bytes < weights / 2


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(base: dict[str, jax.Array]) -> None:
    poisoned = base | {"final_norm/scale": base["final_norm/scale"].at[0].set(jnp.nan)}
    trainer = make_trainer(base)
    good, bad = support.random_batch(ARCH.vocab_size, (1, 2, 16)), poisoned
    trainer.run(good)
    before = jax.tree.map(np.asarray, (trainer.state.adapters, trainer.state.optimizer))
    before = jax.tree.map(np.copy, before)
    trainer.base = bad
    metrics = [trainer.run(good) for _ in range(2)]
    assert np.isnan(metrics[-1]["loss"])
    assert metrics[-1]["nonfinite_in_row"] == metrics[-1]["num_nonfinite"] == 2
    after = (trainer.state.adapters, trainer.state.optimizer)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    trainer.base = base
    last = trainer.run(good)
    assert np.isfinite(last["loss"])
    assert (last["nonfinite_in_row"], last["num_nonfinite"]) == (0, 2)


def test_adapters_are_float32_masters_in_a_bfloat16_model(base: dict[str, jax.Array]) -> None:
    """Updates far below bfloat16's resolution must not round to zero."""
    half = {path: array.astype(jnp.bfloat16) for path, array in base.items()}
    trainer = make_trainer(half, learning_rate=1e-6)
    before = {path: np.asarray(array).copy() for path, array in trainer.state.adapters.items()}
    for seed in range(2):
        trainer.run(support.random_batch(ARCH.vocab_size, (1, 2, 16), seed=seed))
    for path, array in trainer.state.adapters.items():
        assert array.dtype == jnp.float32
        assert (np.asarray(array) != before[path]).mean() > 0.9, path


def test_clipping_bounds_the_update_and_reports_the_true_norm(base: dict[str, jax.Array]) -> None:
    batch = support.random_batch(ARCH.vocab_size, (1, 2, 16))
    free, clipped = (make_trainer(base, name="sgd", learning_rate=1.0, max_grad_norm=n) for n in (None, 0.01))
    norms = []
    for trainer in (free, clipped):
        before = {path: np.asarray(array).copy() for path, array in trainer.state.adapters.items()}
        grad_norm = trainer.run(batch)["grad_norm"]
        moved = np.sqrt(sum(((np.asarray(trainer.state.adapters[p]) - before[p]) ** 2).sum() for p in before))
        norms.append((grad_norm, moved))
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-6)
    assert norms[0][1] == pytest.approx(norms[0][0], rel=1e-3)
    assert norms[1][1] == pytest.approx(0.01, rel=1e-3)


def test_the_evaluation_step_gives_the_same_sum_however_rows_are_grouped(base: dict[str, jax.Array]) -> None:
    spec, mesh = support.full_spec(ARCH), support.make_mesh()
    adapters = init_adapters(support.FAMILY, ARCH, spec, mesh, 0)
    evaluate = build_eval_step(support.make_program(ARCH, spec, mesh, train=False))
    batch = support.random_batch(ARCH.vocab_size, (1, 4, 16))
    loss, count = evaluate(adapters, base, support.shard_batch(batch, mesh))
    split = {name: array.reshape(2, 2, 16) for name, array in batch.items()}
    loss_2, count_2 = evaluate(adapters, base, support.shard_batch(split, mesh))
    assert int(count) == int(count_2) == batch["loss_mask"].sum()
    assert float(loss) == pytest.approx(float(loss_2), rel=1e-6)


def test_visible_pairs_are_those_of_the_mask() -> None:
    lengths = [[5, 9, 1], [12], []]
    segments, positions = np.zeros((1, 3, 16), np.int32), np.zeros((1, 3, 16), np.int32)
    for row, documents in enumerate(lengths):
        segments[0, row, : sum(documents)] = np.repeat(range(1, len(documents) + 1), documents)
        positions[0, row, : sum(documents)] = np.concatenate([np.arange(n) for n in (*documents, 0)])
    index = np.arange(16)
    same = (segments[..., None] == segments[..., None, :]) & (segments[..., None] > 0)
    for window, (high, low) in zip((None, 4), count_visible(as_batch(segments, positions), (None, 4)), strict=True):
        reach = index[:, None] - index[None]
        mask = same & (reach >= 0) & (reach < (window or 16))
        assert 256 * int(high) + int(low) == mask.sum()


def test_visible_pairs_are_exact_where_float32_and_int32_are_not() -> None:
    positions = np.broadcast_to(np.arange(8191, dtype=np.int32), (1, 200, 8191))
    ((high, low),) = count_visible(as_batch(np.ones_like(positions), positions), (None,))
    assert 256 * int(high) + int(low) == 200 * 8191 * 8192 // 2 > 2**32


def as_batch(segments: np.ndarray, positions: np.ndarray) -> dict[str, jax.Array]:
    return {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}
