"""Adapters as a GGUF file for llama.cpp, read again after writing.

The layout is that of llama.cpp's own ``convert_lora_to_gguf.py``: a pair ``NAME.lora_a`` [R, in] and ``NAME.lora_b``
[out, R] per tensor of the base, and one alpha for the whole file. llama.cpp divides it by the rank of each pair.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from adaptax.config import UserError
from adaptax.lora import LoraSpec
from adaptax.models import Architecture, Family


def save_gguf_adapter(
    path: Path, adapters: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture
) -> None:
    """Writes one GGUF file, whole or not at all, and reads it again.

    Args:
      path: the file, replaced if it exists; its folder is made.
      adapters: path -> stacked float32 array, on the host.
      spec: ranks, alphas and the adapted layers.
      family: the model family.
      arch: the model's numbers.

    Raises:
      UserError: the ``gguf`` package is missing, or what was read is not what was to be written.
    """
    gguf = _import_gguf()
    alpha = file_alpha(spec)
    tensors = gguf_tensors(adapters, spec, family, arch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        _write(gguf, partial, tensors, alpha, family.checkpoint.GGUF_ARCHITECTURE)
        if not _is_as_meant(gguf, partial, tensors, alpha, family.checkpoint.GGUF_ARCHITECTURE):
            raise UserError(f"{path}: what was read back is not what was written; is the disk full or failing?")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_alpha(spec: LoraSpec) -> float:
    """The alpha of the file: a module with the spec's own rank and alpha is scaled by it as it is.

    llama.cpp knows alpha / rank only, so rsLoRA's alpha / sqrt(rank) becomes a larger alpha. To it, 0 would mean that
    nothing is scaled.
    """
    alpha = spec.alpha * math.sqrt(spec.rank) if spec.use_rslora else spec.alpha
    return float(np.float32(alpha)) or 1.0


def gguf_tensors(
    adapters: Mapping[str, np.ndarray], spec: LoraSpec, family: Family, arch: Architecture
) -> dict[str, np.ndarray]:
    """llama.cpp's names; A [R, in] and B [out, R], float32, each module at its own rank.

    Where a module's scale is not the file's alpha / rank, what is missing is in its B. Keys and values share their A,
    which is written to both.
    """
    tensors = {}
    alpha = file_alpha(spec)
    for kind, layers in spec.layers.items():
        names = [family.checkpoint.GGUF_NAMES[name] for name in family.checkpoint.LINEARS[kind].tensors]
        a, b = adapters[f"layers/{kind}/w_lora_a"], adapters[f"layers/{kind}/w_lora_b"]
        for place, layer in enumerate(layers):
            rank = spec.rank_of(kind, layer)
            factor = np.float32(spec.scale_of(kind, layer) * rank / alpha)
            a_RI = a[place, :, :rank].T
            b_RCO = factor * b[place, :rank].reshape(rank, len(names), -1)
            for part, name in enumerate(names):
                module = f"blk.{layer}.{name}.weight"
                tensors[f"{module}.lora_a"] = np.ascontiguousarray(a_RI, np.float32)
                tensors[f"{module}.lora_b"] = np.ascontiguousarray(b_RCO[:, part].T, np.float32)
    return tensors


def _import_gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError("format=gguf needs the gguf package: pip install 'adaptax[gguf]'") from None


def _write(gguf: Any, path: Path, tensors: Mapping[str, np.ndarray], alpha: float, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _is_as_meant(gguf: Any, path: Path, tensors: Mapping[str, np.ndarray], alpha: float, architecture: str) -> bool:
    try:
        reader = gguf.GGUFReader(path)
        said = {key: _read_value(reader, key) for key in ("general.type", "adapter.type", "general.architecture")}
        alpha_read = _read_value(reader, "adapter.lora.alpha")
        read = {tensor.name: tensor.data for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError):  # of a file that ends too early
        return False
    meant = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    same = said == meant and alpha_read == alpha and len(reader.tensors) == len(tensors) and set(read) == set(tensors)
    return same and all(
        read[name].dtype == np.float32 and np.array_equal(read[name], tensor) for name, tensor in tensors.items()
    )


def _read_value(reader: Any, key: str) -> str | float:
    """A text or a number of the file's metadata."""
    value = reader.fields[key].parts[-1]
    return value.tobytes().decode() if value.dtype == np.uint8 else float(value[0])
