"""Adapters in PEFT's format, read: our own to the bit, PEFT's as the same function, all else refused in a line."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoints
import small_runs
import support
from adaptax.adapter_files import adopt, open_adapter, read_arrays
from adaptax.checking import read_config
from adaptax.config import UserError
from adaptax.export import save_peft_adapter
from adaptax.job import build_spec
from adaptax.lora import Arrays, LoraSpec, init_adapters, place_adapters
from adaptax.models import ASSETS, Architecture
from adaptax.models.gemma3_weights import SIZES
from adaptax.peft_settings import CONFIG, TENSORS, read_settings
from adaptax.prepare import prepare

TINY = SIZES["tiny"]
PREFIX = "base_model.model.model."


def read(directory: Path, arch: Architecture) -> tuple[LoraSpec, dict[str, np.ndarray]]:
    """(what a run with such an initial adapter trains, what it begins from)."""
    files = open_adapter(directory, support.FAMILY.checkpoint, arch)
    config = small_runs.make_config(directory, {"model.lora_dropout": 0.25})
    config = replace(config, model=adopt(config.model, files, arch))
    return build_spec(config, arch), read_arrays(files, support.FAMILY.checkpoint, arch)


def refusal(directory: Path, arch: Architecture = TINY) -> str:
    """The one line that says why it is not taken; it names the folder."""
    with pytest.raises(UserError) as caught:
        read(directory, arch)
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    assert len(message) < 700
    return message


# Ours

SOME = {"attn/kv_einsum": (2, 5), "attn/q_einsum": (5,), "mlp/down_proj": tuple(range(TINY.num_layers))}
SPECS: dict[str, Callable[[Architecture], LoraSpec]] = {
    "all": lambda arch: support.full_spec(arch, rank=3, alpha=1 / 3),
    "some layers": lambda arch: support.full_spec(arch, rank=4, alpha=6.0, layers=SOME),
    "rsLoRA, ranks and alphas by module": lambda arch: support.mixed_spec(arch, alpha=0.7),
}


@pytest.mark.parametrize("is_multimodal", [False, True], ids=["text", "multimodal"])
@pytest.mark.parametrize("make_spec", SPECS.values(), ids=SPECS.keys())
def test_a_runs_own_adapter_comes_back_to_the_bit(make_spec, is_multimodal: bool, tmp_path: Path) -> None:
    arch = replace(TINY, is_multimodal=is_multimodal)
    spec = make_spec(arch)
    arrays = support.draw_adapters(arch, spec)
    save_peft_adapter(tmp_path / "adapter", arrays, spec, support.FAMILY, arch, "google/gemma-3-1b-it")
    found, again = read(tmp_path / "adapter", arch)
    assert found.layers == spec.layers
    assert (found.use_rslora, found.dropout) == (spec.use_rslora, 0.25)  # dropout is the configuration's
    for kind, layers in spec.layers.items():
        for layer in layers:
            assert found.rank_of(kind, layer) == spec.rank_of(kind, layer)
            assert found.alpha_of(kind, layer) == spec.alpha_of(kind, layer)
    assert again.keys() == arrays.keys()
    for path, array in arrays.items():
        assert again[path].dtype == np.float32
        np.testing.assert_array_equal(again[path], array)


def test_it_is_laid_on_the_mesh_as_fresh_adapters_are(tmp_path: Path) -> None:
    spec, mesh = support.full_spec(TINY, rank=4, layers=SOME), support.make_mesh(2, 4)
    arrays = support.draw_adapters(TINY, spec)
    placed = place_adapters(support.FAMILY, TINY, spec, mesh, arrays)
    fresh = init_adapters(support.FAMILY, TINY, spec, mesh, 0)
    assert {p: a.sharding for p, a in placed.items()} == {p: a.sharding for p, a in fresh.items()}
    for path, array in arrays.items():
        np.testing.assert_array_equal(placed[path], array)


# PEFT's


@dataclass(frozen=True)
class Base:
    """A model of transformers, and ours of the same weights."""

    model: Any
    directory: Path
    arch: Architecture
    weights: Arrays
    tokens: np.ndarray

    def compute(self, spec: LoraSpec, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Our logits."""
        mesh = support.make_mesh()
        adapters = place_adapters(support.FAMILY, self.arch, spec, mesh, arrays)
        return support.logits(
            support.make_program(self.arch, spec, mesh, train=False), self.weights, adapters, self.tokens
        )

    def ask(self, theirs: Any) -> np.ndarray:
        """The logits of a model of transformers or PEFT."""
        import torch

        with torch.no_grad():
            return theirs(input_ids=torch.tensor(self.tokens)).logits.numpy()

    def adapt(self, directory: Path, seed: int = 0, **settings: Any) -> np.ndarray:
        """Writes an adapter that PEFT made and that looks trained, and returns its logits."""
        import peft
        import torch

        torch.manual_seed(seed)
        config = peft.LoraConfig(**({"task_type": "CAUSAL_LM", "init_lora_weights": False} | settings))
        theirs = peft.get_peft_model(copy.deepcopy(self.model), config).eval()
        with torch.no_grad():
            for name, weight in theirs.named_parameters():
                if "lora_" in name:
                    weight.normal_(0.0, 0.1)
        theirs.save_pretrained(directory)
        return self.ask(theirs)

    def load(self, directory: Path) -> np.ndarray:
        """The logits of an adapter as PEFT reads it."""
        import peft

        return self.ask(peft.PeftModel.from_pretrained(copy.deepcopy(self.model), str(directory)))


def make_base(directory: Path, build: Callable[..., Any]) -> Base:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    model = build(seed=5, num_hidden_layers=3, layer_types=layers)
    arch, weights = support.open_checkpoint(checkpoints.save(model, directory))
    return Base(model, directory, arch, weights, np.random.default_rng(2).integers(4, 2000, (1, 24)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("text"), checkpoints.build_text_model)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("multimodal"), checkpoints.build_multimodal_model)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KEYS, VALUES = "layers.1.self_attn.k_proj", r"layers\.1\.self_attn.v_proj"
FOREIGN: dict[str, dict[str, Any]] = {
    "every module": {"target_modules": ALL, "r": 4, "lora_alpha": 10},
    "ranks and alphas by name, rsLoRA, two layers": {
        "target_modules": ["k_proj", "v_proj", "up_proj"],
        "layers_to_transform": [1, 2],
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {KEYS: 2, f"^model.{VALUES}": 5, "2.mlp.up_proj": 7},
        "alpha_pattern": {".*v_proj": 9, KEYS: 1.5},
    },
}


@pytest.mark.parametrize("settings", FOREIGN.values(), ids=FOREIGN.keys())
def test_an_adapter_of_peft_is_the_same_function_here_and_when_it_is_written_again(
    text: Base, settings: dict[str, Any], tmp_path: Path
) -> None:
    theirs = text.adapt(tmp_path / "theirs", **settings)
    spec, arrays = read(tmp_path / "theirs", text.arch)
    ours = text.compute(spec, arrays)
    assert np.abs(theirs - text.ask(text.model)).max() > 0.05
    assert np.abs(ours - theirs).max() <= 1e-4
    save_peft_adapter(tmp_path / "again", arrays, spec, support.FAMILY, text.arch, str(text.directory))
    assert np.abs(text.load(tmp_path / "again") - theirs).max() <= 1e-4


def test_what_keys_and_values_have_of_their_own_lies_side_by_side(text: Base, tmp_path: Path) -> None:
    """[A_k | A_v] at the sum of the ranks, and a B that is zero where the other's columns meet it."""
    text.adapt(tmp_path, target_modules=["k_proj", "v_proj"], r=4, rank_pattern={"v_proj": 3}, lora_alpha=4)
    spec, arrays = read(tmp_path, text.arch)
    assert spec.layers == {"attn/kv_einsum": (0, 1, 2)}
    assert {spec.rank_of("attn/kv_einsum", layer) for layer in range(3)} == {7}
    stored = {name: array.T for name, array in load_file(tmp_path / TENSORS).items()}
    a, b = arrays["layers/attn/kv_einsum/w_lora_a"][1], arrays["layers/attn/kv_einsum/w_lora_b"][1].reshape(7, 2, -1)
    names = [f"{PREFIX}layers.1.self_attn.{name}_proj.lora_" for name in "kv"]
    np.testing.assert_array_equal(a, np.concatenate([stored[f"{name}A.weight"] for name in names], axis=1))
    np.testing.assert_array_equal(b[:4, 0], stored[f"{names[0]}B.weight"])
    np.testing.assert_allclose(b[4:, 1], stored[f"{names[1]}B.weight"] * np.float32(4 / 3), rtol=1e-6)
    assert not b[:4, 1].any()
    assert not b[4:, 0].any()


def test_values_alone_leave_b_of_the_keys_at_zero(text: Base, tmp_path: Path) -> None:
    text.adapt(tmp_path, target_modules=["v_proj"], r=4)
    files = open_adapter(tmp_path, support.FAMILY.checkpoint, text.arch)
    assert files.left_out == [f"layers.{i}.self_attn.k_proj" for i in range(3)]
    assert files.num_modules == 3
    arrays = read_arrays(files, support.FAMILY.checkpoint, text.arch)
    b = arrays["layers/attn/kv_einsum/w_lora_b"].reshape(3, 4, 2, -1)
    assert not b[:, :, 0].any()
    assert b[:, :, 1].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_stored_in_16_bits_are_those_numbers_in_float32(text: Base, dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    text.adapt(tmp_path, target_modules=ALL, r=4)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_torch(tmp_path / TENSORS).items()}
    save_torch(tensors, tmp_path / TENSORS)
    _, arrays = read(tmp_path, text.arch)
    save_torch({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / TENSORS)
    _, wide = read(tmp_path, text.arch)
    for path, array in wide.items():
        assert arrays[path].dtype == np.float32
        np.testing.assert_array_equal(arrays[path], array)


def test_names_are_matched_as_peft_matches_them(tmp_path: Path) -> None:
    other = pytest.importorskip("peft.utils.other")
    keys = [
        "up_proj",
        "3.self_attn.q_proj",
        "3.mlp.up_proj",
        "^model.layers.1.mlp.up_proj",
        "p.proj",
        ".*1.mlp.up_proj",
    ]
    names = [f"layers.{i}.{name}" for i in (1, 3, 13, 113) for name in ("self_attn.q_proj", "mlp.up_proj")]
    (tmp_path / TENSORS).touch()
    for key in keys:
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 1, "alpha_pattern": {key: 5}}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        found = [name for name in names if read_settings(tmp_path).alpha_of(name, 8) == 5]
        assert found == [name for name in names if other.get_pattern_key([key], f"model.{name}") == key]


def find_loss(theirs: Any, batches: list[dict[str, np.ndarray]]) -> float:
    """PEFT's loss over the supervised tokens of some batches."""
    import torch

    total, count = 0.0, 0
    for batch in batches:
        width = batch["tokens"].shape[-1]
        tokens, mask, targets = (batch[name].reshape(-1, width) for name in ("tokens", "loss_mask", "targets"))
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor(tokens)).logits
        labels = torch.tensor(np.where(mask, targets, -100), dtype=torch.long)
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int(mask.sum())
    return total / count


def test_a_run_begins_where_peft_would_and_peft_reads_what_comes_of_it(text: Base, tmp_path: Path) -> None:
    """The losses before the first update are PEFT's; those after it, PEFT has with the adapter that is written."""
    import peft

    text.adapt(tmp_path / "theirs", target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=2)
    shutil.copy(ASSETS / "gemma3_tiny" / "tokenizer.model", text.directory)
    for name, num_rows in (("rows", 8), ("eval", 4)):
        small_runs.write_rows(tmp_path / f"{name}.jsonl", num_rows)
    changes = {"model.weights": str(text.directory), "model.init_adapter": str(tmp_path / "theirs")}
    changes |= {
        "training.remat": "none",
        "training.num_batches": 1,
        "training.exact_match_rows": 0,
        "optimizer.learning_rate": 1e-3,
    }
    config = read_config(dataclasses.asdict(small_runs.make_config(tmp_path, changes)))
    feed = prepare(config, support.make_mesh()).feed
    held_out = [feed.eval_batches[k] for k in range(feed.eval_batches.steps_per_epoch)]
    losses = {
        step: loss
        for step, name, loss in small_runs.losses_of(small_runs.train(tmp_path / "run", config))
        if name == "eval_loss"
    }
    (first,) = [row["train_loss"] for row in small_runs.read_metrics(tmp_path / "run") if "train_loss" in row]

    before, after = (
        peft.PeftModel.from_pretrained(copy.deepcopy(text.model), str(path)).eval()
        for path in (tmp_path / "theirs", tmp_path / "run" / "adapter")
    )
    assert first == pytest.approx(find_loss(before, [feed.batches[0]]), rel=1e-5)
    assert losses[0] == pytest.approx(find_loss(before, held_out), rel=1e-5)
    assert losses[1] == pytest.approx(find_loss(after, held_out), rel=1e-5)
    assert losses[1] < losses[0]


LANGUAGE = r".*language_model\..*\.(q_proj|k_proj|v_proj|down_proj)"


def test_the_multimodal_class_has_names_of_its_own(multimodal: Base, tmp_path: Path) -> None:
    patterns = {"model.language_model.layers.1.self_attn.k_proj": 6}
    theirs = multimodal.adapt(tmp_path, target_modules=LANGUAGE, r=4, lora_alpha=7, alpha_pattern=patterns)
    names = load_file(tmp_path / TENSORS)
    assert all(name.startswith(f"{PREFIX}language_model.layers.") for name in names)
    spec, arrays = read(tmp_path, multimodal.arch)
    assert np.abs(multimodal.compute(spec, arrays) - theirs).max() <= 1e-4


SPELLINGS = ["base_model.model.language_model.model.", "base_model.model.model.", "model.", "language_model.model."]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same_names_are_the_same_adapter(spelling: str, tmp_path: Path) -> None:
    """As older releases of transformers, vLLM and PEFT's own state in memory have them."""
    spec = support.full_spec(TINY, rank=4)
    arrays = support.draw_adapters(TINY, spec)
    save_peft_adapter(tmp_path, arrays, spec, support.FAMILY, replace(TINY, is_multimodal=True), "base")
    tensors = load_file(tmp_path / TENSORS)
    renamed = {name.replace("base_model.model.model.language_model.", spelling): a for name, a in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    if spelling == "model.":
        renamed = {name.replace(".weight", ".default.weight"): array for name, array in renamed.items()}
    save_file(renamed, tmp_path / TENSORS)
    _, again = read(tmp_path, TINY)
    for path, array in arrays.items():
        np.testing.assert_array_equal(again[path], array)


def test_an_adapter_of_the_vision_tower_is_refused(multimodal: Base, tmp_path: Path) -> None:
    multimodal.adapt(tmp_path, target_modules=["q_proj", "v_proj"], r=4)
    assert re.search(r"vision_tower.*is no LoRA of the text model's layers", refusal(tmp_path, multimodal.arch))


# What cannot be read


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small adapter of ours, to be spoiled."""
    spec = support.full_spec(TINY, rank=2, layers={"attn/kv_einsum": (0, 1), "mlp/up_proj": (0,)})
    save_peft_adapter(tmp_path / "adapter", support.draw_adapters(TINY, spec), spec, support.FAMILY, TINY, "base")
    return tmp_path / "adapter"


Tensors = dict[str, np.ndarray]
KEY_A, UP_B = f"{PREFIX}layers.0.self_attn.k_proj.lora_A.weight", f"{PREFIX}layers.0.mlp.up_proj.lora_B.weight"
UP_A = UP_B.replace("_B", "_A")


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


def put(**arrays: np.ndarray) -> Callable[[Tensors], Tensors]:
    names = {"KEY_A": KEY_A, "UP_A": UP_A, "UP_B": UP_B}
    return lambda tensors: tensors | {names.get(name, PREFIX + name): array for name, array in arrays.items()}


def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no A": (without(KEY_A), r"layers\.0\.self_attn\.k_proj has a lora_B alone"),
    "no B": (without(UP_B), r"layers\.0\.mlp\.up_proj has a lora_A alone"),
    "nothing": (lambda tensors: {}, "holds no lora_A and lora_B"),
    "another width": (put(UP_A=zeros(2, 64)), r"layers\.0\.mlp\.up_proj is 64 to 512, this model's is 128 to 512"),
    "another rank": (put(UP_A=zeros(3, 128)), r"lora_A of rank 3 and a lora_B of rank 2"),
    "a rank of 0": (put(UP_A=zeros(0, 128), UP_B=zeros(512, 0)), r"up_proj has rank 0 in"),
    "a rank of its own": (put(UP_A=zeros(3, 128), UP_B=zeros(512, 3)), r"up_proj has rank 3 in .* rank 2 here"),
    "a vector": (put(UP_A=zeros(2)), r"is F32 \[2\], no matrix of F32, BF16, F16"),
    "whole numbers": (put(UP_A=np.zeros((2, 128), np.int64)), r"is I64 \[2, 128\], no matrix"),
    "doubles": (put(UP_A=np.zeros((2, 128))), r"is F64 \[2, 128\], no matrix"),
    "NaN": (put(UP_B=np.full((512, 2), np.nan, np.float32)), r"layers\.0\.mlp\.up_proj holds numbers that are not fin"),
    "infinity": (put(KEY_A=np.full((2, 128), np.inf, np.float32)), r"self_attn\.k_proj holds numbers that are not fin"),
    "a layer too many": (rename("layers.1.", "layers.6."), r"adapts layers\.6\.self_attn\.k_proj, which this model"),
    "another module": (rename("up_proj", "router"), r"adapts layers\.0\.mlp\.router, which this model does not have"),
    "embedding": (put(**{"embed_tokens.lora_embedding_A": zeros(2, 2)}), "embed_tokens.*is no LoRA of the text"),
    "head": (rename(f"{PREFIX}layers.0.mlp.up_proj", "base_model.model.lm_head"), "lm_head.*is no LoRA of the text"),
    "DoRA": (put(**{"layers.0.mlp.up_proj.lora_magnitude_vector": zeros(512)}), "magnitude_vector' is no LoRA"),
    "two names": (put(**{"language_model.layers.0.mlp.up_proj.lora_A.weight": zeros(2, 128)}), "under two names"),
    "an odd name": (put(**{"layers.0\n\x1b[31m.lora_A.weight": zeros(2, 2)}), r"layers\.0\\n\\x1b"),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_arrays_that_are_no_adapter_of_this_model_are_refused(spoil, words: str, adapter: Path) -> None:
    save_file(spoil(load_file(adapter / TENSORS)), adapter / TENSORS)
    assert re.search(words, refusal(adapter))


@pytest.mark.parametrize("num_bytes", [0, 7, 200, -1])
def test_a_file_that_was_cut_is_refused(num_bytes: int, adapter: Path) -> None:
    data = (adapter / TENSORS).read_bytes()
    (adapter / TENSORS).write_bytes(data[:num_bytes])
    assert "cannot be read" in refusal(adapter)


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    arch = replace(TINY, embed_dim=64)
    spec = support.full_spec(arch, rank=2)
    save_peft_adapter(tmp_path, support.draw_adapters(arch, spec), spec, support.FAMILY, arch, "base")
    assert "q_proj is 64 to 128, this model's is 128 to 128: model= must be the model" in refusal(tmp_path)


def test_a_scale_beyond_float32_is_refused(adapter: Path) -> None:
    """Keys and values with scales so far apart that a B would overflow."""
    config = json.loads((adapter / CONFIG).read_text())
    config["alpha_pattern"] = {"k_proj": 1e-9, "v_proj": 1e9}
    (adapter / CONFIG).write_text(json.dumps(config))
    tensors = load_file(adapter / TENSORS)
    save_file(tensors | {n: 1e25 * a for n, a in tensors.items() if "v_proj.lora_B" in n}, adapter / TENSORS)
    assert "v_proj holds numbers that are not finite" in refusal(adapter)
