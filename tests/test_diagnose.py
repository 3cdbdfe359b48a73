"""Where a batch stops being finite: things broken on purpose are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import support
from adaptax.diagnose import Diagnosis, build_diagnose, conclude, diagnose, show_diagnosis
from adaptax.lora import Arrays, LoraSpec
from adaptax.models.gemma3_weights import SIZES

ARCH = replace(
    SIZES["tiny"], num_layers=4, embed_dim=32, mlp_dim=64, num_heads=2, head_dim=16, vocab_size=128,
    global_layers=(False, False, True, False),
)  # fmt: skip
MESH = support.make_mesh()
SPEC = support.full_spec(ARCH, rank=4, dropout=0.1)
FEW = LoraSpec({"mlp/down_proj": (1,), "attn/q_einsum": (3,)}, 4, 4.0)
BATCH = support.random_batch(ARCH.vocab_size, (2, 2, 16))
KEY = jax.random.fold_in(jax.random.key(0), 0)  # of the first step of a run
Run = Callable[..., Diagnosis]


@pytest.fixture(scope="module")
def base() -> Arrays:
    return support.load(None, ARCH, MESH)


@pytest.fixture(scope="module")
def adapters() -> Arrays:
    return support.random_adapters(ARCH, SPEC, MESH)


@pytest.fixture(scope="module")
def run() -> Run:
    return compile_for(SPEC)


@pytest.fixture(scope="module")
def run_few() -> Run:
    return compile_for(FEW)


def compile_for(spec: LoraSpec, dtype: str = "float32") -> Run:
    """``(base, adapters, batch) -> diagnosis`` of a batch as the data makes it."""
    program = replace(support.make_program(ARCH, spec, MESH), dtype=jnp.dtype(dtype))
    compiled = build_diagnose(program)
    return lambda base, adapters, batch=BATCH: compiled(base, adapters, support.shard_batch(batch, MESH), KEY)


def put(arrays: Arrays, path: str, place: Any, value: float) -> Arrays:
    """The arrays with some values of one changed."""
    return arrays | {path: arrays[path].at[place].set(value)}


def table(diagnosis: Diagnosis) -> dict[str, tuple[int, bool]]:
    """Place -> (finite sequences, whether the gradient is)."""
    return {row.place: (row.num_finite, row.is_gradient_finite) for row in diagnosis.rows}


def test_a_finite_batch_is_said_to_be_finite_with_the_numbers_of_the_step(run, base, adapters) -> None:
    trainer = support.Trainer(ARCH, base, SPEC, MESH, adapters=jax.tree.map(jnp.copy, adapters))
    seen, metrics = run(base, adapters), trainer.run(BATCH)
    assert seen.loss == pytest.approx(metrics["loss"], rel=1e-6)
    assert seen.grad_norm == pytest.approx(metrics["grad_norm"], rel=1e-5)
    assert seen.finding is seen.first is None
    assert seen.sequences == seen.damaged == ()
    assert [row.place for row in seen.rows] == ["embedder", *(f"layers/{i}" for i in range(4)), "final_norm", "loss"]
    assert set(table(seen).values()) == {(4, True)}
    norms = [row.gradient for row in seen.rows if row.place.startswith("layers/")]
    assert np.linalg.norm(norms) == pytest.approx(seen.grad_norm, rel=1e-5)
    assert "all is finite in float32 (loss 4.8" in conclude({"float32": seen})


def test_a_base_weight_that_is_not_a_number_is_named_with_its_layer(run, base, adapters) -> None:
    broken = put(base, "layers/mlp/down_proj/w", (2, 3, 4), jnp.nan)
    broken = put(broken, "layers/post_attention_norm/scale", (3, 0), jnp.inf)
    seen = run(broken, adapters)
    assert seen.first.startswith(
        "layers/2/mlp (forward): its base weight layers/2/mlp/down_proj/w holds 1 NaN, and 1 more "
    )
    assert "fetch or convert them again" in seen.first
    assert seen.damaged[1:] == ("base weight layers/3/post_attention_norm/scale holds 1 inf",)
    assert seen.sequences == ((0, 0), (0, 1), (1, 0), (1, 1))
    rows = table(seen)
    assert (rows["layers/1"][0], rows["layers/2"][0], rows["loss"][0]) == (4, 0, 0)


def test_an_embedding_that_no_token_of_the_batch_asks_for_breaks_the_loss_and_is_named(run, base, adapters) -> None:
    absent = next(i for i in range(128) if i not in BATCH["tokens"])
    seen = run(put(base, "embedder/embedding", absent, jnp.nan), adapters)
    assert seen.first.startswith("embedder (forward): its base weight embedder/embedding holds 32 NaN;")
    assert (table(seen)["final_norm"][0], table(seen)["loss"][0]) == (4, 0)


def test_an_adapter_that_is_infinite_is_laid_to_an_earlier_update(run, base, adapters) -> None:
    seen = run(base, put(adapters, "layers/attn/q_einsum/w_lora_b", (1, 0, 0), jnp.inf))
    assert seen.first.startswith("layers/1/attn (forward): its adapter layers/1/attn/q_einsum/w_lora_b holds 1 inf;")
    assert "an earlier update made it so" in seen.first
    assert "optimizer.learning_rate" in seen.first


def test_adapters_that_overflow_together_are_told_from_damaged_ones(run, base, adapters) -> None:
    huge = put(adapters, "layers/mlp/up_proj/w_lora_b", 2, 1e25)  # either is finite, their product is not
    seen = run(base, put(huge, "layers/mlp/gate_proj/w_lora_b", 2, 1e25))
    assert seen.first.startswith("layers/2/mlp (forward): its weights are finite, what comes out is not, in 2 of 2")
    assert "the largest value of an adapter is 1e+25, in layers/2/mlp/" in seen.first
    assert "the adapters have run away" in seen.first
    assert seen.damaged == ()


def test_only_the_sequence_that_is_affected_is_named(run, base, adapters) -> None:
    tokens = BATCH["tokens"].copy()
    tokens[1, 0, 5] = 999
    seen = run(base, adapters, BATCH | {"tokens": tokens})
    assert seen.first.startswith(
        "embedder (forward): token 999 is not among the 128 of the model, in 1 of 2 sequences of micro-batch 1: (1, 0) "
        "from its token 5; the tokenizer"
    )
    assert seen.sequences == ((1, 0),)
    assert table(seen)["loss"] == (3, False)


def test_a_token_whose_embedding_overflows_is_not_called_unknown(run, base, adapters) -> None:
    tokens = np.where(BATCH["tokens"] == 7, 8, BATCH["tokens"])
    tokens[0, 1, 3] = 7
    seen = run(put(base, "embedder/embedding", 7, 3e38), adapters, BATCH | {"tokens": tokens})
    assert seen.first.startswith("embedder (forward): its weights are finite, what comes out is not, in 1 of 2")
    assert "(0, 1) from its token 3; the largest" in seen.first
    assert seen.first.endswith("whose largest value is 3e+38, in embedder/embedding")


def test_a_gradient_that_overflows_is_laid_to_the_layer_that_makes_it(run, base, adapters) -> None:
    huge = put(adapters, "layers/attn/kv_einsum/w_lora_b", 1, 3e38)  # times an A of zeros: nothing, but dA is x dy B
    seen = run(base, put(huge, "layers/attn/kv_einsum/w_lora_a", 1, 0.0))
    assert seen.first.startswith(
        "layers/1/attn (gradient): the forward pass is finite, the gradient of its adapter "
        "layers/1/attn/kv_einsum/w_lora_a is not finite; the one that arrives is at most 0."
    )
    assert np.isfinite(seen.loss)
    assert seen.sequences == ()
    assert [table(seen)[f"layers/{i}"] for i in range(4)] == [(4, False), (4, False), (4, True), (4, True)]


def test_a_gradient_whose_square_overflows_has_every_layer_finite(run, base, adapters) -> None:
    """As it is in the step, whose norm squares."""
    huge = put(adapters, "layers/attn/kv_einsum/w_lora_b", 1, 1e36)
    seen = run(base, put(huge, "layers/attn/kv_einsum/w_lora_a", 1, 1e-36))
    assert seen.first.startswith("gradient norm: the gradient is finite, its square is not: of layers/1/attn/kv_einsum")
    assert seen.grad_norm == np.inf
    assert table(seen)["layers/1"] == (4, True)
    assert table(seen)["loss"] == (4, False)


def test_adapters_of_some_layers_only(run_few, base) -> None:
    adapters = support.random_adapters(ARCH, FEW, MESH)
    seen = run_few(base, put(adapters, "layers/attn/q_einsum/w_lora_a", (0, 0, 0), jnp.nan))
    assert seen.first.startswith("layers/3/attn (forward): its adapter layers/3/attn/q_einsum/w_lora_a holds 1 NaN;")
    assert [row.gradient is None for row in seen.rows[1:5]] == [True, False, True, False]
    seen = run_few(put(base, "layers/attn/kv_einsum/w", (0, 0), jnp.inf), adapters)  # below the first adapted layer
    assert seen.first.startswith("layers/0/attn (forward): its base weight layers/0/attn/kv_einsum/w holds 32 inf;")
    seen = run_few(
        put(base, "final_norm/scale", slice(None), 1e36), adapters
    )  # overflows in a layer without adapters there
    assert seen.first.startswith("layers/3/mlp (gradient): the forward pass is finite, the gradient that it hands down")
    assert "the adapters are of usual size" in seen.first
    assert seen.first.endswith("whose largest value is 1e+36, in final_norm/scale")
    assert table(seen)["layers/3"] == (4, False)


def test_what_only_the_compute_type_cannot_hold_is_told_from_what_nothing_can(run_few, base, caplog) -> None:
    adapters = support.random_adapters(ARCH, FEW, MESH)
    runs = {"bfloat16": compile_for(FEW, "bfloat16"), "float32": run_few}
    large = put(base, "layers/mlp/down_proj/w", (0, 0, 0), 3.4e38)  # rounds to inf in bfloat16
    seen = {dtype: run(large, adapters) for dtype, run in runs.items()}
    with caplog.at_level(logging.INFO, "adaptax"):
        show_diagnosis(seen)
    text = " ".join(caplog.text.split())
    assert (
        "the compute type bfloat16 overflowed: in float32 all is finite, in bfloat16 it is not from layers/0/mlp"
        in text
    )
    assert "layers/0/mlp/down_proj/w holds 1 out of the compute type's range; set model.dtype=float32" in text
    assert "│ layers/0 │ │" in text
    assert "│ no │ yes │" in text
    nothing = {dtype: run(put(base, "final_norm/scale", 0, jnp.nan), adapters) for dtype, run in runs.items()}
    expected = (
        "the first that is not finite, in bfloat16 and in float32: final_norm (forward): its base weight final_norm"
    )
    assert conclude(nothing).startswith(expected)


@pytest.mark.slow
def test_on_a_mesh_it_says_the_same(run_few, base) -> None:
    mesh = support.make_mesh(2, 2)
    adapters = {place: support.random_adapters(ARCH, FEW, place) for place in (MESH, mesh)}
    broken = {place: put(adapters[place], "layers/mlp/down_proj/w_lora_b", (0, 0, 5), -jnp.inf) for place in adapters}
    batch, split = support.shard_batch(BATCH, mesh), support.load(None, ARCH, mesh)
    seen, alone = (
        diagnose(support.make_program(ARCH, FEW, mesh), split, broken[mesh], batch),
        run_few(base, broken[MESH]),
    )
    assert seen.first == alone.first
    assert seen.sequences == alone.sequences
    assert table(seen) == table(alone)
    np.testing.assert_allclose([row.top for row in seen.rows[:2]], [row.top for row in alone.rows[:2]], rtol=1e-5)
