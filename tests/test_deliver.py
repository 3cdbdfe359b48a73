"""Exports: what was trained, as other programs load it, and the receipt."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_runs
import support
from adaptax.config import Config, UserError
from adaptax.deliver import Reference, check_logits, export
from adaptax.export import save_peft_adapter
from adaptax.models import find_architecture
from adaptax.options import ExportOptions

GOLDEN = Path(__file__).parent / "golden"
OPTIONS = ExportOptions(None, None, "peft", None, False, 2.0)


@pytest.fixture(scope="module", params=["text", "multimodal"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """(a configuration of a small base, where an adapter of it lies)."""
    home = tmp_path_factory.mktemp(request.param)
    shutil.copytree(GOLDEN / request.param, home / "base")
    return write_adapter(home)


def write_adapter(home: Path) -> tuple[Config, Path]:
    arch = find_architecture(support.model_config(home / "base"))
    spec = support.mixed_spec(arch)
    host = {path: np.asarray(array) for path, array in support.random_adapters(arch, spec, support.make_mesh()).items()}
    save_peft_adapter(home / "adapter", host, spec, support.FAMILY, arch, str(home / "base"))
    return small_runs.make_config(home, {"model.weights": str(home / "base")}), home / "adapter"


def deliver(setting: tuple[Config, Path], out: Path, **options: Any) -> dict[str, Any]:
    config, place = setting
    return export(replace(OPTIONS, out=str(out), **options), config, support.make_mesh(), place)


def reference_logits(setting: tuple[Config, Path], tokens: np.ndarray) -> np.ndarray:
    """Of the base with the adapter, by transformers and PEFT."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config, place = setting
    name = json.loads((Path(str(config.model.weights)) / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(config.model.weights, dtype=torch.float32)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, str(place)).eval()(input_ids=torch.tensor(tokens)).logits.numpy()


def assert_receipt(receipt: dict[str, Any], out: Path, modules: int) -> None:
    assert json.loads((out / "export.json").read_text()) == receipt
    assert receipt["modules"] == modules
    written = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    assert receipt["files"].keys() | {"export.json"} == written.keys()
    for name, said in receipt["files"].items():
        assert said["sha256"] == hashlib.sha256(written[name].read_bytes()).hexdigest()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert receipt["versions"]["jax"]


TOKENS = np.random.default_rng(1).integers(4, 190, (2, 30))


@pytest.mark.parametrize("uniform", [False, True])
def test_an_exported_adapter_gives_peft_the_same_logits(setting, uniform: bool, tmp_path: Path) -> None:
    receipt = deliver(setting, tmp_path / "out", uniform=uniform)
    assert_receipt(receipt, tmp_path / "out", receipt["modules"])
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert bool(said["rank_pattern"]) is not uniform
    assert receipt["logits"]["difference"] < 1e-5 < 1e-2 < receipt["logits"]["adapter_effect"]
    ours = reference_logits((setting[0], tmp_path / "out"), TOKENS)
    np.testing.assert_allclose(ours, reference_logits(setting, TOKENS), atol=1e-4)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_merged_checkpoint_is_loaded_by_transformers_with_the_same_logits(
    setting, quantization: str | None, tmp_path: Path
) -> None:
    """Also after a run with a quantised base, to which the adapter is not added, but to the base as it is stored."""
    config, place = setting
    changed = replace(config, model=replace(config.model, quantization=quantization)), place
    receipt = deliver(changed, tmp_path / "out", format="merged", max_shard_gib=1e-4)
    assert_receipt(receipt, tmp_path / "out", receipt["modules"])
    assert receipt["logits"]["difference"] < receipt["logits"]["tolerance"] < receipt["logits"]["adapter_effect"]
    assert "model.safetensors.index.json" in receipt["files"]
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        merged = model(input_ids=torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(merged, reference_logits(setting, TOKENS), atol=1e-4)


@pytest.mark.parametrize("setting", ["text"], indirect=True)
def test_googles_layout_is_read_as_base_weights_again(setting, tmp_path: Path) -> None:
    receipt = deliver(setting, tmp_path / "out", format="orbax")
    assert_receipt(receipt, tmp_path / "out", receipt["modules"])
    assert receipt["logits"]["difference"] < 1e-5
    arch, base = support.open_checkpoint(tmp_path / "out")
    logits = support.logits(support.make_program(arch, None, support.make_mesh()), base, {}, TOKENS)
    np.testing.assert_allclose(logits, reference_logits(setting, TOKENS)[..., : logits.shape[-1]], atol=1e-4)


@pytest.mark.parametrize("setting", ["text"], indirect=True)
def test_a_gguf_adapter_is_written(setting, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    receipt = deliver(setting, tmp_path / "out", format="gguf")
    assert_receipt(receipt, tmp_path / "out", receipt["modules"])
    assert set(receipt["files"]) == {"adapter.gguf"}


def test_a_checkpoint_of_a_run_is_exported_as_its_adapter_is(tmp_path: Path) -> None:
    home = small_runs.write_home(tmp_path / "home")
    config = small_runs.make_config(home, {"checkpoint.every_steps": 2, "checkpoint.keep": 9, "model.use_rslora": True})
    small_runs.train(tmp_path / "run", config)
    other = replace(config, model=replace(config.model, use_rslora=False, lora_rank=32))  # the checkpoint's own counts
    steps = tmp_path / "run" / "checkpoints"
    for name, place in (("a", steps / "step_00000006"), ("b", tmp_path / "run" / "adapter")):
        deliver((other, place), tmp_path / name)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    deliver((other, steps / "step_00000004"), tmp_path / "c")
    assert (tmp_path / "c" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["use_rslora"] is True


def test_logits_that_differ_are_refused(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(2, 8, 50)).astype(np.float32)
    reference = Reference(logits, 0.5)
    said = check_logits(reference, logits + np.float32(1e-6), 1e-4, tmp_path)
    assert said["difference"] == pytest.approx(1e-6, rel=0.1)
    for wrong in (logits * 1.01, np.roll(logits, 1, axis=1), np.full_like(logits, np.nan)):
        with pytest.raises(
            UserError, match=r"the logits of the files differ from those in memory by .*nothing was writ"
        ):
            check_logits(reference, wrong, 1e-4, tmp_path)


def test_nothing_stays_where_an_export_fails(tmp_path: Path) -> None:
    """Of an adapter whose sum with the base is not finite."""
    shutil.copytree(GOLDEN / "text", tmp_path / "base")
    arch = find_architecture(support.model_config(tmp_path / "base"))
    spec = support.full_spec(arch, rank=2)
    host = {p: np.asarray(a) for p, a in support.random_adapters(arch, spec, support.make_mesh()).items()}
    host["layers/mlp/up_proj/w_lora_b"] = np.full_like(host["layers/mlp/up_proj/w_lora_b"], 3e38)
    save_peft_adapter(tmp_path / "adapter", host, spec, support.FAMILY, arch, "base")
    config = small_runs.make_config(tmp_path, {"model.weights": str(tmp_path / "base")})
    (tmp_path / "outs").mkdir()
    for form in ("merged", "orbax", "peft"):
        with pytest.raises(UserError, match="not finite|logits"):
            deliver((config, tmp_path / "adapter"), tmp_path / "outs" / form, format=form)
    assert not list((tmp_path / "outs").iterdir())


def test_what_cannot_be_exported_is_told_before_anything_is_read(tmp_path: Path) -> None:
    config = small_runs.make_config(tmp_path)
    (tmp_path / "taken").mkdir()
    for words, options, place in (
        ("there is no adapter to export: set run=DIR", {"out": "x"}, None),
        ("out=DIR is missing", {}, tmp_path),
        ("uniform=true is of format=peft", {"out": "x", "uniform": True, "format": "merged"}, tmp_path),
        ("exists: choose another name", {"out": str(tmp_path / "taken")}, tmp_path),
    ):
        with pytest.raises(UserError, match=words):
            export(replace(OPTIONS, **options), config, support.make_mesh(), place)


@pytest.mark.parametrize("setting", ["text"], indirect=True)
def test_random_weights_and_googles_checkpoints_are_not_merged_into(setting, tmp_path: Path) -> None:
    config, place = setting
    deliver(setting, tmp_path / "google", format="orbax")
    changed = replace(config, model=replace(config.model, weights=str(tmp_path / "google")))
    with pytest.raises(
        UserError, match="format=merged needs a Hugging Face checkpoint, and .* is Google's; take format=orbax"
    ):
        deliver((changed, place), tmp_path / "out", format="merged")
    assert not (tmp_path / "out").exists()
