"""What we write, PEFT and transformers load, and it computes what we computed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoints
import support
from adaptax.export import make_uniform, save_peft_adapter
from adaptax.lora import LoraSpec
from adaptax.models.gemma3_weights import LINEARS, SIZES


def export(directory: Path, spec: LoraSpec, arch, source: str = "base") -> dict[str, jax.Array]:
    adapters = support.random_adapters(arch, spec, support.make_mesh())
    host = {path: np.asarray(array) for path, array in adapters.items()}
    save_peft_adapter(directory, host, spec, support.FAMILY, arch, source)
    return adapters


def test_the_files_have_pefts_names_shapes_and_settings(tmp_path: Path) -> None:
    arch = SIZES["tiny"]
    export(tmp_path / "adapter", support.full_spec(arch, rank=4, alpha=8.0), arch, "google/gemma-3-1b-it")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == arch.num_layers * 7 * 2
    layer = "base_model.model.model.layers.5."
    assert tensors[f"{layer}self_attn.o_proj.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{layer}mlp.up_proj.lora_B.weight"].shape == (512, 4)
    np.testing.assert_array_equal(
        tensors[f"{layer}self_attn.k_proj.lora_A.weight"], tensors[f"{layer}self_attn.v_proj.lora_A.weight"]
    )
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "google/gemma-3-1b-it"
    assert (config["r"], config["lora_alpha"], config["bias"]) == (4, 8, "none")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_an_adapter_that_is_there_already_is_replaced_whole(tmp_path: Path) -> None:
    arch = SIZES["tiny"]
    for rank in (4, 8):
        export(tmp_path / "adapter", support.full_spec(arch, rank=rank), arch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape[0] == 8


SUBSET = {"attn/kv_einsum": (2, 5), "attn/q_einsum": (5,), "mlp/down_proj": tuple(range(8))}


SPECS = {
    "all": lambda arch: support.full_spec(arch, rank=4, alpha=6.0),
    "some layers": lambda arch: support.full_spec(arch, rank=4, alpha=6.0, layers=SUBSET),
    "mixed": support.mixed_spec,
}


@pytest.mark.parametrize("make_spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("build", [checkpoints.build_text_model, checkpoints.build_multimodal_model])
def test_peft_loads_the_adapter_and_computes_the_same_logits(build, make_spec, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = build(seed=5)
    arch, base = support.open_checkpoint(checkpoints.save(model, tmp_path / "base"))
    spec = make_spec(arch)
    adapters = export(tmp_path / "adapter", spec, arch, str(tmp_path / "base"))
    tokens = np.random.default_rng(2).integers(4, 2000, (2, 40))
    ours = support.logits(support.make_program(arch, spec, support.make_mesh()), base, adapters, tokens)
    plain = support.logits(support.make_program(arch, None, support.make_mesh()), base, {}, tokens)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    adapted = {name for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert not [name for name in adapted if "vision" in name]
    assert len(adapted) == sum(len(places) * len(LINEARS[kind].tensors) for kind, places in spec.layers.items())
    with torch.no_grad():
        theirs = loaded(input_ids=torch.tensor(tokens)).logits.numpy()
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(ours - plain).max() > 1e-2


def test_files_tell_the_ranks_alphas_and_scale_of_modules_by_their_full_names(tmp_path: Path) -> None:
    arch = SIZES["tiny"]
    spec = support.mixed_spec(arch)
    save_peft_adapter(tmp_path / "adapter", support.draw_adapters(arch, spec), spec, support.FAMILY, arch, "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    layer = "model.layers."
    keys_values = [f"{layer}5.self_attn.k_proj", f"{layer}5.self_attn.v_proj"]
    down = [f"{layer}{i}.mlp.down_proj" for i in (0, 3)]
    assert config["rank_pattern"] == dict(zip([*keys_values, *down], (2, 2, 7, 1), strict=True))
    assert config["alpha_pattern"] == dict(zip([*keys_values, down[1]], (9, 9, 5), strict=True))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 6, True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {name: min(tensor.shape) for name, tensor in tensors.items()}  # no width is as small
    assert ranks == {
        name: config["rank_pattern"].get(name.removeprefix("base_model.model.").partition(".lora_")[0], 4)
        for name in tensors
    }


def test_made_uniform_one_rank_and_scale_give_the_same_updates() -> None:
    arch, mesh = SIZES["tiny"], support.make_mesh()
    spec = support.mixed_spec(arch)
    base, adapters = support.load(None, arch, mesh), support.draw_adapters(arch, spec)
    made, uniform = make_uniform(adapters, spec)
    assert (uniform.rank, uniform.use_rslora, uniform.ranks, uniform.alphas) == (7, False, {}, {})
    assert {array.shape[1 if path.endswith("_b") else 2] for path, array in made.items()} == {7}
    tokens = np.random.default_rng(4).integers(4, 250, (1, 24))
    none = {path: np.zeros_like(array) for path, array in made.items()}
    before, after, plain = (
        support.logits(support.make_program(arch, of, mesh), base, jax.device_put(arrays), tokens)
        for of, arrays in ((spec, adapters), (uniform, made), (uniform, none))
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.abs(before - plain).max() > 1e-2


def test_what_is_uniform_already_stays_as_it_is() -> None:
    spec = support.full_spec(SIZES["tiny"], rank=3, alpha=7.0)
    adapters = support.draw_adapters(SIZES["tiny"], spec)
    made, same = make_uniform(adapters, spec)
    assert same == spec
    for path, array in adapters.items():
        np.testing.assert_array_equal(made[path], array)
