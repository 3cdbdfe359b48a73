"""Where adapters go and what they do."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

import rows
import support
from adaptax.config import UserError
from adaptax.job import build_spec
from adaptax.lora import LoraSpec, adapter_shapes, init_adapters
from adaptax.models import match_modules, match_patterns
from adaptax.models.gemma3 import Block
from adaptax.models.gemma3_weights import LINEARS, SIZES

ARCH = SIZES["tiny"]
ATTENTION = {"attn/q_einsum", "attn/kv_einsum", "attn/attn_vec_einsum"}
MLP = {"mlp/gate_proj", "mlp/up_proj", "mlp/down_proj"}
DEFAULT = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"


def match(pattern: str) -> dict[str, tuple[int, ...]]:
    return match_modules(support.model_config(None, "270m", lora_module_path=pattern), SIZES["270m"])


@pytest.mark.parametrize(
    ("pattern", "kinds", "layers"),
    [
        (DEFAULT, ATTENTION | MLP, range(18)),
        (".*", ATTENTION | MLP, range(18)),
        (".*einsum", ATTENTION, range(18)),
        (".*proj", MLP, range(18)),
        ("layers/(1[0-7])/.*", ATTENTION | MLP, range(10, 18)),
        ("layers/0/attn/q_einsum", {"attn/q_einsum"}, range(1)),
    ],
)
def test_a_regex_adapts_what_it_says(pattern: str, kinds: set[str], layers: range) -> None:
    assert match(pattern) == {kind: tuple(layers) for kind in LINEARS if kind in kinds}


@pytest.mark.parametrize("pattern", ["q_einsum", ".*attn", "embedder/.*", ".*norm", "layers/18/.*"])
def test_a_regex_that_matches_no_whole_path_is_refused_with_the_kinds_there_are(pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        match(pattern)
    assert all(kind in str(caught.value) for kind in LINEARS)


class Unrolled(nnx.Module):
    """The layers one by one, as the paths that users match spell them."""

    def __init__(self) -> None:
        self.layers = nnx.List([Block(ARCH, rngs=nnx.Rngs(0)) for _ in range(ARCH.num_layers)])

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x, rope, mask)
        return x


@pytest.mark.parametrize("pattern", [DEFAULT, ".*", ".*einsum", ".*proj", "layers/[35]/mlp/.*|.*0/attn/kv.*"])
def test_qwix_on_the_unrolled_model_adapts_the_same_modules_with_the_same_shapes(pattern: str) -> None:
    def make() -> nnx.Module:
        provider = qwix.LoraProvider(module_path=pattern, rank=4, alpha=4.0)
        return qwix.apply_lora_to_model(Unrolled(), provider, *Block.example_inputs(ARCH), rngs=nnx.Rngs(0))

    state = nnx.state(nnx.eval_shape(make), nnx.LoRAParam)
    theirs = {"/".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    layers = match_modules(support.model_config(None, "tiny", lora_module_path=pattern), ARCH)
    ours = {}
    for path, (shape, _) in adapter_shapes(support.FAMILY, ARCH, LoraSpec(layers, 4, 4.0)).items():
        for layer in layers[path.removeprefix("layers/").rpartition("/")[0]]:
            ours[path.replace("layers/", f"layers/{layer}/", 1)] = shape[1:]
    assert ours == theirs


def test_adapters_start_as_peft_starts_them_whatever_the_mesh_and_the_other_modules() -> None:
    spec = support.full_spec(SIZES["270m"], rank=32)
    alone = init_adapters(support.FAMILY, SIZES["270m"], spec, support.make_mesh(), seed=1)
    spread = init_adapters(support.FAMILY, SIZES["270m"], spec, support.make_mesh(2, 4), seed=1)
    for path, array in alone.items():
        np.testing.assert_array_equal(array, spread[path])
        assert array.dtype == jnp.float32
        if path.endswith("_b"):
            assert not np.asarray(array).any()
        else:
            limit = 1 / math.sqrt(array.shape[1])
            assert 0.99 * limit < np.abs(array).max() <= limit
            assert np.std(array) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert len({np.asarray(a)[0].tobytes() for p, a in alone.items() if p.endswith("_a")}) == 6
    few = LoraSpec({"mlp/up_proj": (7, 9)}, 32, 32.0)
    some = init_adapters(support.FAMILY, SIZES["270m"], few, support.make_mesh(), seed=1)
    path = "layers/mlp/up_proj/w_lora_a"
    np.testing.assert_array_equal(some[path], np.asarray(alone[path])[[7, 9]])


def test_a_module_starts_the_same_whatever_ranks_the_others_have() -> None:
    spec = support.mixed_spec(ARCH)
    mixed = init_adapters(support.FAMILY, ARCH, spec, support.make_mesh(2, 4), seed=1)
    for kind, layers in spec.layers.items():
        path = f"layers/{kind}/w_lora_a"
        assert mixed[path].shape[2] == max(spec.rank_of(kind, layer) for layer in layers)
        assert not np.asarray(mixed[path])[np.broadcast_to(support.beyond_ranks(spec, path), mixed[path].shape)].any()
        for place, layer in enumerate(layers):
            rank = spec.ranks.get(f"layers/{layer}/{kind}", 4)
            alone = LoraSpec({kind: (layer,)}, rank, 1.0)
            (a, _) = init_adapters(support.FAMILY, ARCH, alone, support.make_mesh(), seed=1).values()
            np.testing.assert_array_equal(mixed[path][place, :, :rank], a[0])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])  # test_optim has the others, given such gradients
def test_what_is_beyond_a_rank_stays_zero_in_training(name: str, base) -> None:
    layers = {"attn/kv_einsum": (4, 5), "mlp/down_proj": (4, 5)}
    ranks = {"layers/4/attn/kv_einsum": 2, "layers/5/mlp/down_proj": 130}  # adafactor factors from 128 on
    spec = support.mixed_spec(ARCH, layers=layers, ranks=ranks)
    config = support.optimizer_config(name, 1e-2, weight_decay=0.1, loraplus_lr_ratio=8.0)
    trainer = support.Trainer(ARCH, base, spec, support.make_mesh(), config)
    start = {path: np.asarray(array) for path, array in trainer.state.adapters.items()}
    for step in range(3):
        assert math.isfinite(trainer.run(support.random_batch(ARCH.vocab_size, (1, 2, 16), seed=step))["loss"])
    for path, array in trainer.state.adapters.items():
        beyond = np.broadcast_to(support.beyond_ranks(spec, path), array.shape)
        assert beyond.any()
        assert not np.asarray(array)[beyond].any()
        assert (np.asarray(array) != start[path])[~beyond].mean() > 0.9


def test_patterns_become_the_ranks_and_alphas_of_modules() -> None:
    config = rows.run_config(rows.data_config())
    model = support.model_config(
        None,
        "tiny",
        lora_module_path="layers/[45]/(attn/q_einsum|mlp/up_proj)",
        lora_rank=4,
        use_rslora=True,
        lora_rank_pattern={"layers/5/mlp/.*": 16, ".*mlp/.*": 6, ".*/attn/.*": 4},
        lora_alpha_pattern={"layers/4/.*": 3},
    )
    spec = build_spec(replace(config, model=model), ARCH)
    assert (spec.rank, spec.alpha, spec.use_rslora) == (4, 4.0, True)
    assert spec.ranks == {"layers/4/mlp/up_proj": 6, "layers/5/mlp/up_proj": 16}
    assert spec.alphas == {
        "layers/4/attn/q_einsum": 3.0,
        "layers/4/mlp/up_proj": 3.0,
        "layers/5/mlp/up_proj": 16.0,  # its own rank
    }
    given = build_spec(replace(config, model=replace(model, lora_alpha=8.0)), ARCH)
    assert given.alpha == 8.0
    assert given.alphas == {"layers/4/attn/q_einsum": 3.0, "layers/4/mlp/up_proj": 3.0}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"attn/.*": 8}, "'attn/.*' matches no adapted module; .* such as layers/4/attn/q_einsum$"),
        ({".*": 8, ".*mlp.*": 4}, r"'\.\*mlp\.\*' matches no adapted module"),
        ({".*": 8, "layers/4/.*": 4}, r"'layers/4/\.\*' matches what patterns before it match: put it before them"),
    ],
)
@pytest.mark.parametrize("key", ["lora_rank_pattern", "lora_alpha_pattern"])
def test_a_pattern_that_counts_for_no_module_is_refused(key: str, patterns: dict[str, int], words: str) -> None:
    config = support.model_config(None, "tiny", lora_module_path="layers/[45]/attn/q_einsum", **{key: patterns})
    with pytest.raises(UserError, match=f"model.{key}: {words}"):
        match_patterns(config, match_modules(config, ARCH))


def forward(spec: LoraSpec | None, adapters: dict[str, jax.Array], base: dict[str, jax.Array], **kwargs) -> np.ndarray:
    program = support.make_program(ARCH, spec, support.make_mesh(), train="dropout_key" in kwargs)
    tokens = np.arange(10, 42)[None]
    return np.asarray(support.hidden_states(program, base, adapters, tokens, **kwargs))


@pytest.fixture(scope="module")
def base() -> dict[str, jax.Array]:
    return support.load(None, ARCH, support.make_mesh())


SPECS = {
    "some layers": support.full_spec(ARCH, rank=4, alpha=6.0, layers={"attn/kv_einsum": (2, 4), "mlp/down_proj": (3,)}),
    "all": support.full_spec(ARCH, rank=4, alpha=6.0),
    "mixed": support.mixed_spec(ARCH),
}


def expected_scale(spec: LoraSpec, path: str) -> float:
    rank = spec.ranks.get(path, 4)
    return spec.alphas.get(path, 6.0) / (rank**0.5 if spec.use_rslora else rank)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_adapters_add_their_scale_times_a_b_to_the_weights_of_their_layers(spec: LoraSpec, base) -> None:
    adapters = support.random_adapters(ARCH, spec, support.make_mesh())
    merged = dict(base)
    for kind, places in spec.layers.items():
        a, b = adapters[f"layers/{kind}/w_lora_a"], adapters[f"layers/{kind}/w_lora_b"]
        weight = merged[f"layers/{kind}/w"]
        for i, layer in enumerate(places):
            delta = (a[i] @ b[i]).reshape(weight.shape[1:]) * expected_scale(spec, f"layers/{layer}/{kind}")
            weight = weight.at[layer].add(delta)
        merged[f"layers/{kind}/w"] = weight
    adapted, plain = forward(spec, adapters, base), forward(None, {}, base)
    np.testing.assert_allclose(adapted, forward(None, {}, merged), atol=2e-5)
    assert np.abs(adapted - plain).max() > 1e-2


@pytest.mark.parametrize("rank", [32, 128, 512])
def test_a_rank_as_large_as_an_axis_and_weights_of_another_type_confuse_nothing(rank: int, base) -> None:
    """qwix tells a weight from its adapters by shape where it must; at rank 128 and 512 their shapes are alike here."""
    half = {path: array.astype(jnp.bfloat16) for path, array in base.items()}
    spec = support.full_spec(ARCH, rank=rank)
    trainer = support.Trainer(ARCH, half, spec, support.make_mesh(), support.optimizer_config("sgd", 1.0))
    trainer.run(support.random_batch(ARCH.vocab_size, (1, 2, 16)))
    moved = {p for p, a in trainer.state.adapters.items() if p.endswith("_b") and np.asarray(a).any(axis=(1, 2)).all()}
    assert moved == {f"layers/{kind}/w_lora_b" for kind in LINEARS}


def test_dropout_acts_in_training_only_and_differs_by_key_and_layer(base) -> None:
    spec = support.full_spec(ARCH, dropout=0.5)
    adapters = support.random_adapters(ARCH, spec, support.make_mesh())
    quiet = forward(spec, adapters, base)
    np.testing.assert_array_equal(quiet, forward(support.full_spec(ARCH), adapters, base))
    one, again, other = (forward(spec, adapters, base, dropout_key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - quiet).max() > 1e-3
    assert np.abs(one - other).max() > 1e-3


def test_layers_below_the_first_adapted_one_cost_no_backward_pass(base) -> None:
    """Every layer is run forward; only adapted ones, and those above, are run backward."""
    flops = {}
    for first in (0, 5):
        spec = support.full_spec(ARCH, layers={"mlp/up_proj": tuple(range(first, 6))})
        trainer = support.Trainer(ARCH, base, spec, support.make_mesh())
        batch = support.shard_batch(support.random_batch(ARCH.vocab_size, (1, 2, 32)), trainer.mesh)
        compiled = trainer.step.lower(trainer.state, base, batch).compile()
        flops[first] = _loop_lengths(compiled.as_text())
    assert sorted(flops[0])[-2:] == [6, 6]  # forward and backward over all
    assert sorted(flops[5])[-1] <= 5  # the five below: forward alone, once
    assert flops[5].count(5) == 1


def _loop_lengths(text: str) -> list[int]:
    """The known trip counts of a compiled program's loops."""
    import re

    return [int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', text)]
