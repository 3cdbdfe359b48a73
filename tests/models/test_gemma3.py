"""The model against transformers: golden logits always, live where torch is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoints
import support
from adaptax.lora import init_adapters
from adaptax.models.attention import attention_masks
from adaptax.models.gemma3 import Gemma3
from adaptax.models.gemma3_weights import SIZES, Architecture

GOLDEN = Path(__file__).parents[1] / "golden"


def difference(directory: Path, tokens: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of our float32 logits from the expected ones."""
    arch, base = support.open_checkpoint(directory)
    program = support.make_program(arch, None, support.make_mesh())
    ours = support.logits(program, base, {}, tokens)
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max())


@pytest.mark.parametrize("name", ["text", "multimodal"])
def test_logits_equal_the_golden_ones_of_transformers(name: str) -> None:
    golden = np.load(GOLDEN / name / "logits.npz")
    assert np.abs(golden["logits"]).max() > 1  # an untrained model that says nothing would agree with anything
    assert difference(GOLDEN / name, golden["tokens"], golden["logits"]) <= 2e-4


@pytest.mark.parametrize("build", [checkpoints.build_text_model, checkpoints.build_multimodal_model])
def test_logits_equal_a_live_transformers(build, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = build(seed=3)
    tokens = np.random.default_rng(1).integers(4, 2000, (2, 70))  # the window is 8
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    assert difference(checkpoints.save(model, tmp_path), tokens, expected) <= 2e-4


@pytest.mark.slow
def test_logits_equal_transformers_at_the_true_270m_architecture(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = checkpoints.build_text_model(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        head_dim=256,
        sliding_window=512,
        query_pre_attn_scalar=256,
        max_position_embeddings=32_768,
    )
    tokens = np.random.default_rng(1).integers(4, 262_144, (1, 600))
    directory = checkpoints.save(model, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens)).logits[:, -128:].numpy()
    assert support.find_architecture(support.model_config(directory, size="270m")) == replace(SIZES["270m"])
    arch, base = support.open_checkpoint(directory)
    program = support.make_program(arch, None, support.make_mesh())
    hidden = support.hidden_states(program, base, {}, tokens)[:, -128:]
    ours = np.asarray(hidden @ base["embedder/embedding"].T)
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() <= 1e-3


def test_a_local_query_sees_exactly_its_window_and_its_own_segment() -> None:
    positions = jnp.array([[0, 1, 2, 3, 0, 1]])
    segments = jnp.array([[1, 1, 1, 1, 2, 2]])
    local, full = attention_masks(positions, segments, window=2)
    assert full[0, 3].tolist() == [True, True, True, True, False, False]
    assert local[0, 3].tolist() == [False, False, True, True, False, False]
    assert full[0, 5].tolist() == [False, False, False, False, True, True]


def test_a_document_behind_another_gets_the_hidden_states_it_gets_alone() -> None:
    arch = SIZES["tiny"]
    model = Gemma3(arch, rngs=nnx.Rngs(0))
    first, second = jnp.arange(10, 50)[None], jnp.arange(100, 160)[None]
    packed = jnp.concatenate([first, second], axis=1)
    positions = jnp.concatenate([jnp.arange(40), jnp.arange(60)])[None]
    segments = jnp.concatenate([jnp.full(40, 1), jnp.full(60, 2)])[None]
    alone = model(second, jnp.arange(60)[None], jnp.ones((1, 60), int))
    np.testing.assert_allclose(model(packed, positions, segments)[:, 40:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "num_parameters"), [("270m", 268_098_176), ("1b", 999_885_952), ("4b", 3_880_263_168)]
)
def test_each_size_has_its_published_number_of_text_parameters(size: str, num_parameters: int) -> None:
    shapes = nnx.eval_shape(lambda: nnx.state(Gemma3(SIZES[size], rngs=nnx.Rngs(0)), nnx.Param))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == num_parameters


def test_compile_time_and_temporaries_do_not_grow_with_depth() -> None:
    base = replace(SIZES["tiny"], embed_dim=64, mlp_dim=128, vocab_size=512)
    measured = {depth: _compile(replace(base, num_layers=depth, global_layers=_pattern(depth))) for depth in (18, 34)}
    # What grows: each layer's input, kept for the backward pass, and its adapters' gradients and updates.
    kept = 4 * 64 * 64 * 4
    adapters = init_adapters(support.FAMILY, base, support.full_spec(base), support.make_mesh(), 0)
    adapter_bytes = sum(array.nbytes for array in adapters.values()) / base.num_layers
    growth = (measured[34][1] - measured[18][1]) / 16
    assert growth <= 1.1 * (kept + 2 * adapter_bytes)
    assert measured[34][0] == pytest.approx(measured[18][0], rel=0.02)  # unrolled, it would be nearly twice as long


def _pattern(depth: int) -> tuple[bool, ...]:
    return tuple((i + 1) % 6 == 0 for i in range(depth))


def _compile(arch: Architecture) -> tuple[int, int]:
    """(lines of the compiled program, which compile time follows; bytes of temporaries) of a training step."""
    mesh = support.make_mesh()
    trainer = support.Trainer(arch, support.load(None, arch, mesh), support.full_spec(arch), mesh)
    batch = support.shard_batch(support.random_batch(arch.vocab_size, (1, 4, 64)), mesh)
    compiled = trainer.step.lower(trainer.state, trainer.base, batch).compile()
    return len(compiled.as_text().splitlines()), compiled.memory_analysis().temp_size_in_bytes
