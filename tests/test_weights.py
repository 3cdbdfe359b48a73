"""Base weights from every layout that checkpoints come in, each tensor accounted for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import support
from adaptax.config import UserError
from adaptax.models import find_architecture, find_source
from adaptax.models.hub import fetch_files

GOLDEN = Path(__file__).parent / "golden"


def rewrite(source: Path, target: Path, change) -> Path:
    """A copy of a checkpoint with its tensors passed through ``change``."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def same_weights(a: Path, b: Path) -> bool:
    (_, first), (_, second) = support.open_checkpoint(a), support.open_checkpoint(b)
    return first.keys() == second.keys() and all(np.array_equal(first[p], second[p]) for p in first)


def test_weights_are_the_tensors_of_the_file_in_their_stacked_places() -> None:
    arch, base = support.open_checkpoint(GOLDEN / "text")
    tensors = load_file(GOLDEN / "text" / "model.safetensors")
    layer = "model.layers.3."
    q = tensors[f"{layer}self_attn.q_proj.weight"]  # [N*H, D]
    np.testing.assert_array_equal(base["layers/attn/q_einsum/w"][3].reshape(arch.embed_dim, -1), q.T)
    for place, name in enumerate("kv"):
        w = tensors[f"{layer}self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(base["layers/attn/kv_einsum/w"][3, :, place].reshape(arch.embed_dim, -1), w.T)
    np.testing.assert_array_equal(base["layers/mlp/down_proj/w"][3], tensors[f"{layer}mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(base["embedder/embedding"], tensors["model.embed_tokens.weight"])


def test_many_files_with_an_index_equal_one_file(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "text" / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "text" / "config.json").read_text())
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(GOLDEN / "text", tmp_path)


def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((GOLDEN / "text" / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    with pytest.raises(UserError, match="must not leave the directory"):
        support.open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((GOLDEN / "text" / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is not a valid index"):
        support.open_checkpoint(tmp_path)


def test_both_multimodal_layouts_give_the_same_text_model(tmp_path: Path) -> None:
    def as_published(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        renamed = {}
        for name, array in tensors.items():
            name = name.replace("model.language_model.", "language_model.model.")
            renamed[re.sub(r"^model\.(vision_tower|multi_modal_projector)", r"\1", name)] = array
        assert any(name.startswith("vision_tower.") for name in renamed)
        return renamed

    published = rewrite(GOLDEN / "multimodal", tmp_path / "published", as_published)
    arch, base = support.open_checkpoint(published)
    assert arch.is_multimodal
    assert arch.rope_factor == 8
    assert same_weights(GOLDEN / "multimodal", published)
    assert (
        base["embedder/embedding"].shape[0] == arch.vocab_size
    )  # padding rows are kept: transformers' softmax has them


def test_a_second_copy_of_the_tied_head_is_accepted(tmp_path: Path) -> None:
    def with_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}

    assert same_weights(GOLDEN / "text", rewrite(GOLDEN / "text", tmp_path / "head", with_head))


def test_an_untied_head_is_refused(tmp_path: Path) -> None:
    """A head of its own would be ignored: the model would train against another one."""

    def with_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        support.open_checkpoint(rewrite(GOLDEN / "text", tmp_path / "head", with_head))


def test_missing_unexpected_and_misshapen_tensors_are_listed_in_one_error(tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        del tensors["model.layers.2.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
        tensors["model.layers.1.mlp.gate_proj.weight"] = np.zeros((3, 5), np.float32)
        return tensors

    damaged = rewrite(GOLDEN / "text", tmp_path / "damaged", damage)
    with pytest.raises(UserError) as caught:
        support.open_checkpoint(damaged)
    message = str(caught.value)
    assert "4 of its tensors are wrong" in message
    for words in (
        "missing model.layers.2.mlp.up_proj.weight",
        "missing model.norm.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.gate_proj.weight is [3, 5], not [48, 32]",
    ):
        assert words in message
    assert "\n" not in message


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    copy = rewrite(GOLDEN / "text", tmp_path / "copy", dict)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        support.open_checkpoint(copy)


def test_bfloat16_weights_stay_bfloat16_and_compute_as_float32(tmp_path: Path) -> None:
    def halve(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}

    def widen(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in tensors.items()}

    half = rewrite(GOLDEN / "text", tmp_path / "half", halve)
    full = rewrite(GOLDEN / "text", tmp_path / "full", widen)
    (arch, stored), (_, widened) = support.open_checkpoint(half), support.open_checkpoint(full)
    assert {a.dtype for a in stored.values()} == {jnp.dtype(jnp.bfloat16)}
    program = support.make_program(arch, None, support.make_mesh())
    tokens = np.arange(4, 40)[None]
    a, b = (np.asarray(support.hidden_states(program, base, {}, tokens)) for base in (stored, widened))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("fsdp", "tp"), [(4, 2), (2, 4)])
def test_every_mesh_gets_the_same_values_each_device_its_part(fsdp: int, tp: int) -> None:
    _, alone = support.open_checkpoint(GOLDEN / "text")
    _, spread = support.open_checkpoint(GOLDEN / "text", support.make_mesh(fsdp, tp))
    for path, array in alone.items():
        whole = np.asarray(array)
        for shard in spread[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_a_tensor_larger_than_a_piece_is_read_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = support.open_checkpoint(GOLDEN / "text", support.make_mesh(2, 4))
    monkeypatch.setattr("adaptax.tensor_files.PIECE_BYTES", 7 * 32 * 4)  # seven rows of the embedding, of 192
    _, pieced = support.open_checkpoint(shutil.copytree(GOLDEN / "text", tmp_path / "copy"), support.make_mesh(2, 4))
    assert all(np.array_equal(whole[path], pieced[path]) for path in whole)


def test_the_size_must_fit_the_checkpoint() -> None:
    with pytest.raises(UserError, match=r"is not a 270m: it has num_layers 8 \(not 18\).*model_size=auto"):
        find_architecture(support.model_config(GOLDEN / "text", size="270m"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": "6"}, "num_hidden_layers must be a number above 0, not '6'"),
        ({"sliding_window": None}, "sliding_window must be a number above 0, not None"),
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' on global layers"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 8"),
    ],
)
def test_a_config_that_asks_for_another_model_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "text" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=re.escape(words)):
        find_architecture(support.model_config(tmp_path))


def test_old_and_sparse_spellings_of_config_json_are_read(tmp_path: Path) -> None:
    """As google/gemma-3-4b-it was published: what is absent stands at the class's defaults."""
    text = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    found = find_architecture(support.model_config(tmp_path, size="4b"))
    assert found == support.FAMILY.checkpoint.SIZES["4b"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/directory", "no such directory, and not a hub id"),
        ("./missing", "no such directory"),
        ("google/gemma-3-1b-it", "is not in the local cache and the hub is out of reach"),
    ],
)
def test_a_source_that_cannot_be_had_says_how_to_get_it(source: str, words: str) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(UserError, match=words):
        fetch_files(find_source(support.model_config(source)))


_PEAK = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
import support
from adaptax.models import find_architecture
mesh = support.make_mesh()
directory = Path(sys.argv[1])
arch = find_architecture(support.model_config(directory))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantization = sys.argv[2] if len(sys.argv) > 2 else None
base = support.load(directory, arch, mesh, quantization=quantization)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_host_memory_is_the_checkpoint_and_little_more(dtype: str, tmp_path: Path) -> None:
    """A checkpoint of 1.2 (or 0.6) GB, most of it one embedding."""
    size = write_large(tmp_path, dtype, vocab_size=262_144, intermediate_size=2048)
    assert peak_of_loading(tmp_path) <= size + (1 << 29)


@pytest.mark.slow
def test_a_base_that_is_quantised_while_it_is_read_is_never_there_as_it_is_stored(tmp_path: Path) -> None:
    """A checkpoint of 0.8 GB, most of it matrices; what is kept of it in 4 bits is a quarter."""
    size = write_large(tmp_path, "bfloat16", vocab_size=8192, intermediate_size=8192)
    assert peak_of_loading(tmp_path, "nf4") <= size


def write_large(folder: Path, dtype: str, **numbers: int) -> int:
    """A checkpoint of 24 layers; bytes of its file."""
    config = json.loads((GOLDEN / "text" / "config.json").read_text())
    config |= {"hidden_size": 640, "num_hidden_layers": 24} | numbers
    config |= {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    arch = find_architecture(support.model_config(folder))
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    shapes = support.FAMILY.checkpoint.tensor_shapes(arch, "model.")
    save_file({name: np.zeros(shape, kind) for name, shape in shapes.items()}, folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


def peak_of_loading(*arguments: Path | str) -> int:
    """Bytes of host memory at the most, in a process of its own, above those before."""
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root}:{root.parent / 'src'}"}
    command = [sys.executable, "-c", _PEAK, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024
