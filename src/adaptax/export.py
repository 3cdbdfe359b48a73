"""Adapters in PEFT's format, read again after writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from adaptax.config import UserError
from adaptax.lora import LoraSpec
from adaptax.models import Architecture, Family

PEFT_PREFIX = "base_model.model."


def save_peft_adapter(
    directory: Path, adapters: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture, source: str
) -> None:
    """Writes ``adapter_config.json`` and ``adapter_model.safetensors``, whole or not at all, and reads them again.

    Args:
      directory: replaced if it exists.
      adapters: path -> stacked float32 array, on the host.
      spec: rank, alpha and the adapted layers.
      family: the model family.
      arch: tells the class in the checkpoint, and so the names.
      source: directory or hub id of the base.

    Raises:
      UserError: what was read is not what was to be written.
    """
    tensors = peft_tensors(adapters, spec, family, arch)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    text = json.dumps(peft_config(tensors, spec, family, arch, source), indent=2)
    (partial / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    _check_written(partial / "adapter_model.safetensors", tensors)
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def peft_tensors(
    adapters: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture
) -> dict[str, np.ndarray]:
    """PEFT's names and [out, in] shapes, at each module's own rank. Keys and values share their A: both have it."""
    tensors = {}
    prefix = PEFT_PREFIX + family.checkpoint.peft_module_prefix(arch)
    for kind, layers in spec.layers.items():
        names = family.checkpoint.LINEARS[kind].tensors
        a, b = adapters[f"layers/{kind}/w_lora_a"], adapters[f"layers/{kind}/w_lora_b"]
        for place, layer in enumerate(layers):
            rank = spec.rank_of(kind, layer)
            a_RI = a[place, :, :rank].T
            b_RCO = b[place, :rank].reshape(rank, len(names), -1)
            for part, name in enumerate(names):
                module = f"{prefix}layers.{layer}.{name}"
                tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a_RI)
                tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b_RCO[:, part].T)
    return tensors


def peft_config(
    tensors: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture, source: str
) -> dict[str, Any]:
    """The ``adapter_config.json`` that makes PEFT adapt the modules in ``tensors`` and no others."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": spec.rank,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": _target_modules(tensors, spec, family, arch),
        "bias": "none",
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "rank_pattern": _name_modules(spec.ranks, spec, family, arch),
        "alpha_pattern": _name_modules(spec.alphas, spec, family, arch),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def make_uniform(adapters: Mapping[str, np.ndarray], spec: LoraSpec) -> tuple[dict[str, np.ndarray], LoraSpec]:
    """The same updates with one rank and one scale for all modules, for programs that know but one ``r`` and alpha.

    Args:
      adapters: path -> stacked float32 array, on the host.
      spec: what they were trained with.

    Returns:
      The adapters, with zeros up to the highest rank and what differs in scale put into B; their spec, without rsLoRA.
    """
    rank = max(map(spec.stacked_rank, spec.layers), default=spec.rank)
    top = max(map(spec.top_scale, spec.layers), default=1.0)
    made = {}
    for kind, layers in spec.layers.items():
        a, b = adapters[f"layers/{kind}/w_lora_a"], adapters[f"layers/{kind}/w_lora_b"]
        shares = np.array([spec.scale_of(kind, layer) / top for layer in layers], np.float32)
        lacks = rank - a.shape[2]
        made[f"layers/{kind}/w_lora_a"] = np.pad(a, ((0, 0), (0, 0), (0, lacks)))
        made[f"layers/{kind}/w_lora_b"] = np.pad(b * shares[:, None, None], ((0, 0), (0, lacks), (0, 0)))
    alpha = spec.alpha if spec.alpha / rank == top else top * rank
    return made, LoraSpec(spec.layers, rank, alpha, spec.dropout)


def _name_modules(values: Mapping[str, float], spec: LoraSpec, family: Family, arch: Architecture) -> dict[str, float]:
    """Full names in the checkpoint -> what modules have; PEFT takes names as patterns, and they match themselves."""
    prefix = family.checkpoint.peft_module_prefix(arch)
    return {
        f"{prefix}layers.{layer}.{name}": _plain(values[path])
        for kind, layers in spec.layers.items()
        for layer in layers
        if (path := f"layers/{layer}/{kind}") in values
        for name in family.checkpoint.LINEARS[kind].tensors
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _target_modules(tensors: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture) -> list[str]:
    """Suffixes where all layers are adapted; full names where others end alike, such as those of a vision tower."""
    if arch.is_multimodal or any(len(layers) < arch.num_layers for layers in spec.layers.values()):
        return sorted({name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in tensors})
    return sorted(n.rpartition(".")[2] for kind in spec.layers for n in family.checkpoint.LINEARS[kind].tensors)


def _check_written(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with safe_open(path, "numpy") as file:
        names = set(file.keys())
        same = names == set(tensors) and all(np.array_equal(file.get_tensor(n), tensors[n]) for n in names)
    if not same:
        raise UserError(f"{path}: what was read back is not what was written; is the disk full or failing?")
