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
from adaptax.export import save_peft_adapter
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


@pytest.mark.parametrize("layers", [None, SUBSET], ids=["all", "some layers"])
@pytest.mark.parametrize("build", [checkpoints.build_text_model, checkpoints.build_multimodal_model])
def test_peft_loads_the_adapter_and_computes_the_same_logits(build, layers, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = build(seed=5)
    arch, base = support.open_checkpoint(checkpoints.save(model, tmp_path / "base"))
    spec = support.full_spec(arch, rank=4, alpha=6.0, **({"layers": layers} if layers else {}))
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
