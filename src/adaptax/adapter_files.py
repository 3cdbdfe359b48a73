"""Adapters in PEFT's format, read: which modules they adapt, at which rank and scale, and their arrays. No jax here.

Keys and values share their A here. A foreign adapter whose k and v have an A each is the same function at the sum of
their ranks: A = [A_k | A_v], and a B with zeros where the other one's columns meet it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from adaptax.config import ModelConfig, UserError
from adaptax.models import Architecture, find_architecture, find_family
from adaptax.tensor_files import DTYPES, StoredTensor, list_file

log = logging.getLogger(__name__)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = r"(?:base_model\.model\.)?((?:model\.|language_model\.)*"  # as each release of transformers has it
_NAME = re.compile(_PREFIX + r"(layers\.\d+\.[\w.]+))\.lora_(A|B)(?:\.default)?\.weight")
# Settings of PEFT that make another function of the same arrays, or of other ones: value -> what it is.
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA, which also rescales the base weights",
    "alora_invocation_tokens": "an activated LoRA, which is switched on by tokens",
    "lora_bias": "a LoRA with biases",
    "modules_to_save": "trains whole modules beside the adapters",
    "trainable_token_indices": "trains embeddings of tokens",
    "layer_replication": "repeats layers",
    "target_parameters": "adapts bare parameters",
    "megatron_config": "is sharded by Megatron",
}
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base weights too


@dataclass(frozen=True)
class Module:
    """The adapter of one of our modules, as it lies in the files."""

    rank: int
    alpha: float
    pairs: tuple[tuple[StoredTensor, StoredTensor] | None, ...]  # (A, B) of each of its tensors; None: not adapted
    ranks: tuple[int, ...]  # of each pair; 0 where there is none
    factors: tuple[float, ...]  # what each B is multiplied by, so that alpha and rank give its scale
    is_shared: bool  # all have the same A


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter in PEFT's format."""

    directory: Path
    modules: Mapping[str, Module]  # our module path -> its adapter, layer by layer
    use_rslora: bool
    dropout: float
    base: str  # what it says it was trained on

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Module kind -> layers."""
        found: dict[str, tuple[int, ...]] = {}
        for path in self.modules:
            _, layer, kind = path.split("/", 2)
            found[kind] = (*found.get(kind, ()), int(layer))
        return found

    @functools.cached_property
    def digest(self) -> str:
        """Hash of its files."""
        names = (CONFIG, TENSORS)
        return hashlib.sha256(b"".join((self.directory / name).read_bytes() for name in names)).hexdigest()


def open_adapter(directory: Path, checkpoint: ModuleType, arch: Architecture) -> AdapterFiles:
    """What an adapter says of itself, held against the model; arrays are read for keys and values alone.

    Args:
      directory: of ``adapter_config.json`` and ``adapter_model.safetensors``.
      checkpoint: the family's, such as ``gemma3_weights``.
      arch: the model's numbers.

    Raises:
      UserError: it is none, cannot be represented, or is of another model.
    """
    config = _read_config(directory)
    pairs = _pair_up(directory, list_file(directory / TENSORS))
    shapes = _shapes(checkpoint, arch)
    targets = {name: (path, place) for path, names in _targets(checkpoint, arch).items() for place, name in names}
    unknown = [name for name in pairs if name not in targets]
    if unknown:
        raise UserError(
            f"{directory} adapts {unknown[0]}, which this model does not have or does not adapt: "
            f"{len(unknown)} of its {len(pairs)} modules are such; is model= the model that it was trained on?"
        )
    modules: dict[str, Module] = {}
    for path, names in _targets(checkpoint, arch).items():
        found = [pairs.get(name) for _, name in names]
        if any(found):
            modules[path] = _read_module(directory, config, [name for _, name in names], found, shapes[path])
    if not modules:
        raise UserError(f"{directory / TENSORS} holds no lora_A and lora_B")
    dropout, base = config.get("lora_dropout") or 0.0, config.get("base_model_name_or_path") or ""
    return AdapterFiles(directory, modules, bool(config.get("use_rslora")), float(dropout), str(base))


def read_arrays(files: AdapterFiles, checkpoint: ModuleType, arch: Architecture) -> dict[str, np.ndarray]:
    """The stacked float32 arrays, ``layers/KIND/w_lora_a`` and ``..._b``; what lower ranks leave over is zero."""
    arrays: dict[str, np.ndarray] = {}
    for kind, layers in files.layers.items():
        (_, num_in), (_, num_out) = checkpoint.adapter_axes(arch, kind)
        modules = [files.modules[f"layers/{layer}/{kind}"] for layer in layers]
        rank = max(module.rank for module in modules)
        a = np.zeros((len(layers), num_in, rank), np.float32)
        b = np.zeros((len(layers), rank, num_out), np.float32)
        for place, module in enumerate(modules):
            _fill(module, a[place], b[place].reshape(rank, len(module.pairs), -1))
        arrays |= {f"layers/{kind}/w_lora_a": a, f"layers/{kind}/w_lora_b": b}
    return arrays


def _fill(module: Module, a_IR: np.ndarray, b_RCO: np.ndarray) -> None:
    start = 0
    for part, (pair, rank, factor) in enumerate(zip(module.pairs, module.ranks, module.factors, strict=True)):
        if pair is None:
            continue
        a_IR[:, start : start + rank] = pair[0].map().T
        b_RCO[start : start + rank, part] = np.float32(factor) * pair[1].map().T.astype(np.float32)
        start += 0 if module.is_shared else rank


def adopt(config: ModelConfig, files: AdapterFiles, arch: Architecture) -> ModelConfig:
    """The model's configuration with rank, scale and modules as an adapter has them."""
    num_layers = arch.num_layers
    ranks, alphas = ([getattr(m, name) for m in files.modules.values()] for name in ("rank", "alpha"))
    rank, alpha = (max(set(values), key=lambda v: (values.count(v), v)) for values in (ranks, alphas))
    return replace(
        config,
        lora_rank=rank,
        lora_alpha=float(alpha),
        use_rslora=files.use_rslora,
        lora_module_path="|".join(_pattern(kind, layers, num_layers) for kind, layers in files.layers.items()),
        lora_rank_pattern={re.escape(path): m.rank for path, m in files.modules.items() if m.rank != rank},
        lora_alpha_pattern={re.escape(path): m.alpha for path, m in files.modules.items() if m.alpha != alpha},
    )


def _pattern(kind: str, layers: Sequence[int], num_layers: int) -> str:
    if len(layers) == num_layers:
        return f".*{kind.rpartition('/')[2]}"
    return f"layers/({'|'.join(map(str, layers))})/{kind}"


def adopt_initial(config: ModelConfig, given: Sequence[str]) -> ModelConfig:
    """The configuration with what ``model.init_adapter``, if it is set, says of ranks, scales and modules.

    Args:
      config: of the model.
      given: keys that were given on the command line.

    Raises:
      UserError: one of them is the adapter's own to say; or the adapter cannot be begun from.
    """
    if config.init_adapter is None:
        return config
    names = ("lora_rank", "lora_alpha", "lora_module_path", "use_rslora", "lora_rank_pattern", "lora_alpha_pattern")
    for name in names:
        if f"model.{name}" in given:
            raise UserError(f"model.{name} is what the adapter in model.init_adapter has: leave it out")
    checkpoint, arch = find_family(config.model_family).checkpoint, find_architecture(config)
    return adopt(config, open_adapter(Path(config.init_adapter).expanduser(), checkpoint, arch), arch)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    if not path.is_file():
        inner = sorted(p.parent for p in directory.glob(f"*/{CONFIG}")) if directory.is_dir() else []
        hint = f"; did you mean {inner[0]}?" if inner else ""
        what = "no adapter in PEFT's format: it has no adapter_config.json" if directory.is_dir() else "no such folder"
        raise UserError(f"{directory}: {what}{hint}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is not an adapter's configuration: it names no peft_type") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r:.80}; only LORA can be read")
    for key, words in _REFUSED.items():
        if config.get(key):
            raise UserError(f"{path}: {key}={config[key]!r:.80}: it is {words}, and cannot be represented")
    if config.get("bias", "none") != "none":
        raise UserError(f"{path}: bias={config['bias']!r:.80}: biases are trained too, and Gemma 3 has none")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        raise UserError(
            f"{path}: init_lora_weights={init:.80}: such an adapter goes with base weights that were changed; convert "
            "it with PEFT's path_initial_model_for_weight_conversion"
        )
    if not (directory / TENSORS).is_file():
        pickled = directory / "adapter_model.bin"
        hint = f"; {pickled.name} is a pickle, which is not read: save it with safe_serialization" * pickled.exists()
        raise UserError(f"{directory} has no {TENSORS}{hint}")
    return config


def _pair_up(directory: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """``layers.N.self_attn.q_proj`` -> its A [r, in] and B [out, r]."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{directory / TENSORS}: {name:.200} is no LoRA of the text model's layers")
        if tensor.dtype not in DTYPES or len(tensor.shape) != 2:
            raise UserError(f"{directory / TENSORS}: {name:.200} is {tensor.dtype} {list(tensor.shape)}, no matrix")
        halves.setdefault(match[2], {})[match[3]] = tensor
    for module, pair in halves.items():
        if len(pair) < 2:
            raise UserError(f"{directory / TENSORS}: {module} has a lora_{min(pair)} alone; the other half is missing")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(
                f"{directory / TENSORS}: {module} has a lora_A of rank {pair['A'].shape[0]} and a lora_B of rank "
                f"{pair['B'].shape[1]}"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _targets(checkpoint: ModuleType, arch: Architecture) -> dict[str, list[tuple[int, str]]]:
    """Our module path -> the modules of transformers that it stands for, by place."""
    return {
        f"layers/{layer}/{kind}": [(i, f"layers.{layer}.{name}") for i, name in enumerate(linear.tensors)]
        for kind, linear in checkpoint.LINEARS.items()
        for layer in range(arch.num_layers)
    }


def _shapes(checkpoint: ModuleType, arch: Architecture) -> dict[str, tuple[int, int]]:
    """Our module path -> inputs, and outputs of each of its tensors."""
    shapes = {}
    for kind, linear in checkpoint.LINEARS.items():
        (_, num_in), (_, num_out) = checkpoint.adapter_axes(arch, kind)
        shape = num_in, num_out // len(linear.tensors)
        shapes |= {f"layers/{layer}/{kind}": shape for layer in range(arch.num_layers)}
    return shapes


def _read_module(
    directory: Path,
    config: Mapping[str, Any],
    names: Sequence[str],
    pairs: Sequence[tuple[StoredTensor, StoredTensor] | None],
    shape: tuple[int, int],
) -> Module:
    scales, ranks = [], []
    for name, pair in zip(names, pairs, strict=True):
        if pair is None:
            scales.append(0.0)
            ranks.append(0)
            continue
        found = pair[0].shape[1], pair[1].shape[0]
        if found != shape:
            raise UserError(
                f"{directory}: {name} is {found[0]} to {found[1]}, this model's is {shape[0]} to {shape[1]}: "
                "model= must be the model that the adapter was trained on"
            )
        ranks.append(pair[0].shape[0])
        scales.append(_scale(directory, config, name, ranks[-1]))
    present = [pair for pair in pairs if pair is not None]
    is_shared = len(present) == 1 or (
        len(set(ranks)) == 1 and all(np.array_equal(present[0][0].map(), a.map()) for a, _ in present[1:])
    )
    rank = max(ranks) if is_shared else sum(ranks)
    scale = next(s for s, pair in zip(scales, pairs, strict=True) if pair is not None)
    alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    factors = tuple(s / scale for s in scales)
    return Module(rank, _rounded(alpha), tuple(pairs), tuple(ranks), factors, is_shared)


def _rounded(alpha: float) -> float:
    """Alpha without the last bits that a root has put there."""
    near = round(alpha, 9)
    return near if math.isclose(near, alpha, rel_tol=1e-12) else alpha


def _scale(directory: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies A B by in a module, whose rank must be what the configuration says."""
    said = _look_up(config.get("rank_pattern"), name, config.get("r"))
    alpha = _look_up(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha) and alpha > 0
    if said != rank or not is_number:
        raise UserError(
            f"{directory}: {name} has rank {rank}, and {CONFIG} says rank {said!r:.40} and alpha {alpha!r:.40}"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _look_up(patterns: Any, name: str, default: Any) -> Any:
    """As PEFT finds a module's own value: of the first pattern that the end of its name matches."""
    for pattern, value in (patterns if isinstance(patterns, Mapping) else {}).items():
        with contextlib.suppress(re.error):  # such an adapter PEFT does not load either
            if any(re.match(rf"(.*\.)?({pattern})$", f"{prefix}{name}") for prefix in _PREFIXES):
                return value
    return default
