"""Orbax checkpoints in Google's layout are the base that the Hugging Face checkpoint of the same weights is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import orbax_layout
import small_runs
import support
from adaptax.config import UserError
from adaptax.data.tokenizer import open_tokenizer
from adaptax.models import ASSETS, find_architecture
from adaptax.plan import plan
from adaptax.prepare import identify_base
from command_line import Answer
from orbax_layout import Tree
from rows import chat

GOLDEN = Path(__file__).parent / "golden"
Q = "transformer/layer_3/attn/q_einsum"


def write(tmp_path: Path, tree: Tree, way: str = "standard", config: Path | None = GOLDEN / "text") -> Path:
    """A checkpoint of a tree, with the ``config.json`` of another one, since its shape is no published one's."""
    directory = orbax_layout.write(tmp_path / "orbax", tree, way)
    if config is not None:
        shutil.copy(config / "config.json", directory)
    return directory


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


SPELLINGS: dict[str, Callable[[Tree], Tree]] = {
    "flat": lambda tree: tree,
    "nested": orbax_layout.nest,
    "bare": lambda tree: orbax_layout.nest(tree, whole=False),
    "params": lambda tree: {"params": orbax_layout.nest(tree)},
    "trainer": lambda tree: {"params": orbax_layout.nest(tree, whole=False), "step": 7, "opt_state": {"0": np.ones(3)}},
}


@pytest.mark.parametrize(
    ("way", "spelling"),
    [("standard", "flat"), ("pytree", "flat"), ("files", "nested"), ("v1", "params"), ("pytree", "bare")]
    + [("standard", "trainer"), ("files", "flat")],
)
def test_every_way_of_writing_gives_the_same_base(way: str, spelling: str, tmp_path: Path) -> None:
    arch, base = support.open_checkpoint(GOLDEN / "text")
    directory = write(tmp_path, SPELLINGS[spelling](orbax_layout.convert(GOLDEN / "text")), way)
    found, loaded = support.open_checkpoint(directory)
    assert found == arch
    assert_same(base, loaded)
    assert identify_base(base)() == identify_base(loaded)()


def test_the_logits_are_those_of_transformers(tmp_path: Path) -> None:
    arch, base = support.open_checkpoint(write(tmp_path, orbax_layout.convert(GOLDEN / "text")))
    program, stored = support.make_program(arch, None, support.make_mesh()), np.load(GOLDEN / "text" / "logits.npz")
    ours = support.logits(program, base, {}, stored["tokens"])
    np.testing.assert_allclose(ours, stored["logits"], atol=2e-5)


def test_what_belongs_to_images_is_left_out(tmp_path: Path) -> None:
    _, base = support.open_checkpoint(GOLDEN / "multimodal")
    tree = orbax_layout.add_vision(orbax_layout.convert(GOLDEN / "multimodal"))
    arch, loaded = support.open_checkpoint(write(tmp_path, tree, config=GOLDEN / "multimodal"))
    assert arch.is_multimodal
    assert_same(base, loaded)


def test_the_vocabulary_has_as_many_rows_as_the_arrays(tmp_path: Path) -> None:
    """Of 4b and up Google's checkpoints have 64 rows less than those of Hugging Face."""
    tree = orbax_layout.convert(GOLDEN / "multimodal")
    whole = tree["transformer/embedder"]["input_embedding"]
    tree["transformer/embedder"] = {"input_embedding": whole[:-64]}
    arch, loaded = support.open_checkpoint(write(tmp_path, tree, config=GOLDEN / "multimodal"))
    assert arch.vocab_size == len(whole) - 64
    np.testing.assert_array_equal(loaded["embedder/embedding"], whole[:-64])


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    tree = orbax_layout.convert(GOLDEN / "text", ml_dtypes.bfloat16)
    _, loaded = support.open_checkpoint(write(tmp_path, tree))
    assert {array.dtype for array in loaded.values()} == {jnp.dtype(jnp.bfloat16)}
    linear = tree["transformer/layer_3/mlp/linear"]["w"]
    np.testing.assert_array_equal(np.asarray(loaded["layers/mlp/down_proj/w"][3]), linear)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_each_device_gets_its_part(quantization: str | None, tmp_path: Path) -> None:
    arch = find_architecture(support.model_config(GOLDEN / "text"))
    directory = write(tmp_path, orbax_layout.convert(GOLDEN / "text"))
    mesh = support.make_mesh(2, 4)
    there = support.load(GOLDEN / "text", arch, mesh, quantization=quantization)
    here = support.load(directory, arch, mesh, quantization=quantization)
    assert_same(there, here)
    for path in there:
        assert here[path].sharding == there[path].sharding


def test_an_array_in_chunks_is_read_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import orbax.checkpoint as ocp

    _, base = support.open_checkpoint(GOLDEN / "text")
    tree = orbax_layout.convert(GOLDEN / "text")
    chunks = {m: {n: ocp.SaveArgs(chunk_byte_size=2048) for n in arrays} for m, arrays in tree.items()}
    with ocp.PyTreeCheckpointer(use_ocdbt=True, use_zarr3=True) as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree, ocp.args.PyTreeSave(tree, chunks))
    shutil.copy(GOLDEN / "text" / "config.json", tmp_path / "orbax")
    monkeypatch.setattr("adaptax.orbax_files.PIECE_BYTES", 8192)
    assert_same(base, support.open_checkpoint(tmp_path / "orbax")[1])


def tiny_tree() -> Tree:
    return orbax_layout.convert(ASSETS / "gemma3_tiny", ml_dtypes.bfloat16)


def test_a_download_needs_no_config_json(tmp_path: Path) -> None:
    """The weights in a folder of their own, beside the tokenizer; which size they are tells their shape."""
    orbax_layout.write(tmp_path / "kaggle" / "gemma3-tiny", tiny_tree())
    shutil.copy(ASSETS / "gemma3_tiny" / "tokenizer.model", tmp_path / "kaggle")
    config = support.model_config(tmp_path / "kaggle")
    arch, base = support.open_checkpoint(tmp_path / "kaggle")
    assert arch == support.FAMILY.checkpoint.SIZES["tiny"]
    assert arch == find_architecture(support.model_config(tmp_path / "kaggle", size="tiny"))
    assert_same(support.load(ASSETS / "gemma3_tiny", arch, support.make_mesh()), base)
    whole = small_runs.make_config(tmp_path)
    whole = small_runs.change(whole, {"model.weights": config.weights})
    assert open_tokenizer(whole, tmp_path / "kaggle", arch.vocab_size).vocab_size <= arch.vocab_size
    shutil.move(tmp_path / "kaggle" / "tokenizer.model", tmp_path / "kaggle" / "gemma3-tiny")
    assert open_tokenizer(whole, tmp_path / "kaggle", arch.vocab_size).vocab_size <= arch.vocab_size


def test_the_size_must_be_the_one_of_the_arrays(tmp_path: Path) -> None:
    directory = orbax_layout.write(tmp_path / "orbax", tiny_tree())
    with pytest.raises(UserError, match=r"orbax is not a 1b: it has num_layers 6 \(not 26\), embed_dim 128"):
        find_architecture(support.model_config(directory, size="1b"))


def test_a_shape_of_no_size_says_what_to_do(tmp_path: Path) -> None:
    directory = write(tmp_path, orbax_layout.convert(GOLDEN / "text"), config=None)
    with pytest.raises(UserError, match=r"is none of 270m, .*it has num_layers 8, .*name model\.model_size") as caught:
        find_architecture(support.model_config(directory))
    assert "\n" not in str(caught.value)


def test_preview_shows_the_data_without_jax(run: Callable[..., Answer], home: Path) -> None:
    orbax_layout.write(home / "model" / "tiny", tiny_tree())
    shutil.copy(ASSETS / "gemma3_tiny" / "tokenizer.model", home / "model")
    (home / "rows.jsonl").write_text(json.dumps(chat("Hi", "Hello")) + "\n")
    changes = ["model.model_size=auto", "model.weights=model", "data.train=rows.jsonl", "data.eval_fraction=0"]
    answer = run("preview", "model=gemma3_tiny", *changes)
    assert answer.code == 0, answer.err
    assert "⟦Hello<end_of_turn>⟧" in answer.out
    assert not answer.imported_jax


def test_a_run_is_the_run_on_the_hugging_face_checkpoint(tmp_path: Path) -> None:
    home = small_runs.write_home(tmp_path)
    orbax = orbax_layout.write(home / "google" / "weights", orbax_layout.convert(home / "model"))
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(home / "model" / name, home / "google")
    config = small_runs.make_config(home)
    there = small_runs.train(home / "there", config)
    config = small_runs.change(config, {"model.weights": str(home / "google")})
    here = small_runs.train(home / "here", config)
    assert small_runs.losses_of(here) == small_runs.losses_of(there)
    theirs, ours = small_runs.adapter_of(home / "there"), small_runs.adapter_of(home / "here")
    assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    said = json.loads((home / "here" / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(home / "google")
    assert orbax.is_dir()
    assert plan(small_runs.change(config, {"training.memory_gib": 1.0}), support.make_mesh())


def test_a_checkpoint_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    tree = orbax_layout.convert(GOLDEN / "text")
    _, first = support.open_checkpoint(write(tmp_path, tree))
    _, again = support.open_checkpoint(tmp_path / "orbax")
    assert again is first
    shutil.rmtree(tmp_path / "orbax")
    _, other = support.open_checkpoint(
        write(tmp_path, tree | {"transformer/final_norm": {"scale": np.ones(32, np.float32)}})
    )
    np.testing.assert_array_equal(other["final_norm/scale"], np.ones(32))


# What is refused


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        support.open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def test_missing_unexpected_and_misshapen_arrays_are_listed_in_one_error(tmp_path: Path) -> None:
    tree = orbax_layout.convert(GOLDEN / "text")
    del tree["transformer/layer_2/mlp/gating_einsum"]
    tree[Q] = {"w": np.ones((4, 5, 8), np.float32), "b": np.ones(3, np.float32)}
    tree["transformer/layer_1/mlp/linear"] = {"w": np.ones((48, 32), np.int32)}
    message = refusal(write(tmp_path, tree))
    for words in (
        "4 of its tensors are wrong",
        "missing transformer/layer_2/mlp/gating_einsum/w [2, 48, 32]",
        f"unexpected {Q}/b [3]",
        f"{Q}/w is [4, 5, 8], not [4, 32, 8]",
        "transformer/layer_1/mlp/linear/w is of type int32, not F32, BF16 or F16",
    ):
        assert words in message


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, {"adapters": {"a": np.ones(3)}})
    assert "is an Orbax checkpoint, but not of a Gemma 3" in refusal(directory)


def test_two_checkpoints_in_a_folder_are_not_chosen_between(tmp_path: Path) -> None:
    for name in ("one", "two"):
        orbax_layout.write(tmp_path / "both" / name, {"a": {"b": np.ones(3)}})
    assert "holds 2 Orbax checkpoints" in refusal(tmp_path / "both")


def test_two_spellings_of_one_array_are_refused(tmp_path: Path) -> None:
    tree = orbax_layout.convert(GOLDEN / "text")
    assert "which are the same" in refusal(write(tmp_path, tree | {"final_norm": {"scale": np.ones(32, np.float32)}}))


def test_a_file_that_is_gone_is_not_zeros(tmp_path: Path) -> None:
    directory = write(tmp_path, orbax_layout.convert(GOLDEN / "text"), "files")
    (directory / f"{Q}.w" / "0.0.0").unlink()
    assert "cannot be read" in refusal(directory)


@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    directory = write(tmp_path, orbax_layout.convert(GOLDEN / "text"), "pytree")
    largest = max((directory / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)
    damaged = {"cut": largest, "gone": largest, "garbage": directory / "manifest.ocdbt"}[damage]
    if damage == "gone":
        damaged.unlink()
    elif damage == "cut":
        os.truncate(damaged, damaged.stat().st_size // 2)
    else:
        damaged.write_bytes(b"x" * 100)
    message = refusal(directory)
    assert str(directory) in message
    assert "cannot be read" in message


def test_a_chunk_larger_than_its_array_is_refused(tmp_path: Path) -> None:
    """A chunk is decompressed as a whole, however little of it is asked for."""
    directory = write(tmp_path, orbax_layout.convert(GOLDEN / "text"), "files")
    path = directory / f"{Q}.w" / ".zarray"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"chunks": [4, 32, 1 << 30]}))
    assert "has chunks of" in refusal(directory)
