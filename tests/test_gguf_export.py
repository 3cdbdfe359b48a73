"""The GGUF file that we write holds what llama.cpp expects, and its update of every module is ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import support
from adaptax.config import UserError
from adaptax.gguf_export import save_gguf_adapter
from adaptax.lora import LoraSpec
from adaptax.models.gemma3_weights import LINEARS, SIZES, Architecture

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the gguf extra")

TINY = SIZES["tiny"]
UNEVEN = {
    "layers": {"attn/q_einsum": (0, 3), "attn/kv_einsum": (2, 5), "mlp/down_proj": tuple(range(6))},
    "ranks": {"layers/3/attn/q_einsum": 2, "layers/2/attn/kv_einsum": 1, "layers/0/mlp/down_proj": 6},
    "alphas": {"layers/3/attn/q_einsum": 5.0, "layers/5/attn/kv_einsum": 0.3},
}


def host_adapters(spec: LoraSpec, arch: Architecture) -> dict[str, np.ndarray]:
    """Random adapters, zero where a layer's rank is below the stacked one."""
    rng = np.random.default_rng(0)
    adapters = {}
    for kind, layers in spec.layers.items():
        (_, num_in), (_, num_out) = support.FAMILY.checkpoint.adapter_axes(arch, kind)
        rank = spec.stacked_rank(kind)
        a = rng.normal(0, 0.1, (len(layers), num_in, rank)).astype(np.float32)
        b = rng.normal(0, 0.1, (len(layers), rank, num_out)).astype(np.float32)
        for place, layer in enumerate(layers):
            a[place, :, spec.rank_of(kind, layer) :] = 0
            b[place, spec.rank_of(kind, layer) :] = 0
        adapters[f"layers/{kind}/w_lora_a"], adapters[f"layers/{kind}/w_lora_b"] = a, b
    return adapters


def our_updates(adapters: dict[str, np.ndarray], spec: LoraSpec) -> dict[str, np.ndarray]:
    """What is added to every tensor of the checkpoint, [out, in], by its name."""
    updates = {}
    for kind, layers in spec.layers.items():
        names = LINEARS[kind].tensors
        for place, layer in enumerate(layers):
            a, b = (adapters[f"layers/{kind}/w_lora_{side}"][place].astype(np.float64) for side in "ab")
            parts = np.split(spec.scale_of(kind, layer) * (a @ b).T, len(names))
            updates |= {f"model.layers.{layer}.{name}": part for name, part in zip(names, parts, strict=True)}
    return updates


def read(path: Path) -> tuple[dict[str, str | float], dict[str, np.ndarray]]:
    """(metadata, tensors) by the gguf package's reader."""
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {}
    for key, field in reader.fields.items():
        value = field.parts[-1]
        is_text = field.types[:1] == [gguf.GGUFValueType.STRING]
        metadata[key] = value.tobytes().decode() if is_text else value[0]
    return metadata, {tensor.name: tensor.data for tensor in reader.tensors}


def llama_cpp_updates(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp would add to every tensor of its base: alpha / rank, or 1 without an alpha, times B A."""
    metadata, tensors = read(path)
    alpha = float(metadata["adapter.lora.alpha"])
    updates = {}
    for name, b in tensors.items():
        base, side = name.rsplit(".", 1)
        if side == "lora_b":
            scale = alpha / b.shape[1] if alpha else 1.0
            updates[base] = scale * b.astype(np.float64) @ tensors[f"{base}.lora_a"]
    return updates


def llama_cpp_name(name: str, arch: Architecture) -> str:
    """The gguf package's own name for a tensor of a Hugging Face checkpoint."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, arch.num_layers)
    return f"{names.get_name(name)}.weight"


@needs_gguf
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 8, "alpha": 5.0, "use_rslora": True},
        UNEVEN,
        UNEVEN | {"use_rslora": True},
        {"alpha": 0.0, "alphas": {"layers/1/mlp/up_proj": 3.0}},
    ],
    ids=["uniform", "rslora", "uneven", "uneven rslora", "alpha 0"],
)
def test_llama_cpp_would_add_what_we_add(changes: dict, tmp_path: Path) -> None:
    spec = support.full_spec(TINY, **({"rank": 4, "alpha": 6.0} | changes))
    adapters = host_adapters(spec, TINY)
    path = tmp_path / "adapter.gguf"
    save_gguf_adapter(path, adapters, spec, support.FAMILY, TINY)
    ours = our_updates(adapters, spec)
    theirs = llama_cpp_updates(path)
    assert {llama_cpp_name(name, TINY) for name in ours} == set(theirs)
    for name, update in ours.items():
        np.testing.assert_allclose(theirs[llama_cpp_name(name, TINY)], update, atol=1e-6, rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.gguf"]


@needs_gguf
@pytest.mark.parametrize("size", ["tiny", "270m", "4b"])
def test_the_file_has_llama_cpps_names_shapes_and_metadata(size: str, tmp_path: Path) -> None:
    arch = SIZES[size]
    spec = LoraSpec({kind: (0, arch.num_layers - 1) for kind in LINEARS}, rank=2, alpha=16.0)
    save_gguf_adapter(tmp_path / "new" / "adapter.gguf", host_adapters(spec, arch), spec, support.FAMILY, arch)
    metadata, tensors = read(tmp_path / "new" / "adapter.gguf")
    said = {key: value for key, value in metadata.items() if not key.startswith("GGUF.")}
    assert said == {
        "general.architecture": "gemma3",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
    }
    kv = arch.num_kv_heads * arch.head_dim
    out_in = {
        "attn_q": (arch.num_heads * arch.head_dim, arch.embed_dim),
        "attn_k": (kv, arch.embed_dim),
        "attn_v": (kv, arch.embed_dim),
        "attn_output": (arch.embed_dim, arch.num_heads * arch.head_dim),
        "ffn_gate": (arch.mlp_dim, arch.embed_dim),
        "ffn_up": (arch.mlp_dim, arch.embed_dim),
        "ffn_down": (arch.embed_dim, arch.mlp_dim),
    }
    shapes = {}
    for layer in (0, arch.num_layers - 1):
        for name, (num_out, num_in) in out_in.items():
            shapes[f"blk.{layer}.{name}.weight.lora_a"] = 2, num_in
            shapes[f"blk.{layer}.{name}.weight.lora_b"] = num_out, 2
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}


@needs_gguf
def test_where_all_modules_are_alike_the_numbers_keep_their_bits(tmp_path: Path) -> None:
    for use_rslora, alpha in ((False, 6.0), (True, 6.0 * math.sqrt(3))):
        spec = support.full_spec(TINY, rank=3, alpha=6.0, use_rslora=use_rslora)
        adapters = host_adapters(spec, TINY)
        save_gguf_adapter(tmp_path / "adapter.gguf", adapters, spec, support.FAMILY, TINY)
        metadata, tensors = read(tmp_path / "adapter.gguf")
        assert metadata["adapter.lora.alpha"] == np.float32(alpha)
        b = adapters["layers/mlp/up_proj/w_lora_b"][4]
        np.testing.assert_array_equal(tensors["blk.4.ffn_up.weight.lora_b"], b.T)


@needs_gguf
def test_each_module_is_written_at_its_own_rank(tmp_path: Path) -> None:
    spec = support.full_spec(TINY, rank=4, **UNEVEN)
    save_gguf_adapter(tmp_path / "adapter.gguf", host_adapters(spec, TINY), spec, support.FAMILY, TINY)
    _, tensors = read(tmp_path / "adapter.gguf")
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_a")}
    assert ranks["blk.3.attn_q.weight.lora_a"] == 2
    assert ranks["blk.2.attn_v.weight.lora_a"] == 1
    assert ranks["blk.0.ffn_down.weight.lora_a"] == 6
    assert ranks["blk.5.attn_k.weight.lora_a"] == 4


def test_without_the_package_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # what an import finds where there is none
    spec = support.full_spec(TINY)
    with pytest.raises(UserError, match=r"format=gguf needs the gguf package: pip install 'adaptax\[gguf\]'"):
        save_gguf_adapter(tmp_path / "new" / "adapter.gguf", host_adapters(spec, TINY), spec, support.FAMILY, TINY)
    assert not any(tmp_path.iterdir())


def cut(path: Path) -> None:
    """The file as a full disk may leave it."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 64)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@needs_gguf
@pytest.mark.parametrize("spoil", [cut, flip])
def test_a_file_that_is_not_what_was_written_does_not_stay(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    spec = support.full_spec(TINY)
    path = tmp_path / "adapter.gguf"
    path.write_text("of an earlier export")
    close = gguf.GGUFWriter.close

    def close_and_spoil(writer: object) -> None:
        close(writer)
        spoil(tmp_path / "adapter.gguf.partial")

    monkeypatch.setattr(gguf.GGUFWriter, "close", close_and_spoil)  # the disk that loses what it was given
    with pytest.raises(UserError, match="adapter.gguf: what was read back is not what was written"):
        save_gguf_adapter(path, host_adapters(spec, TINY), spec, support.FAMILY, TINY)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.gguf"]
    assert path.read_text() == "of an earlier export"
