"""The model families: one line each. Importing this imports no jax."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from adaptax.config import ModelConfig, UserError, locate
from adaptax.models import gemma3_weights
from adaptax.models.gemma3_weights import Architecture
from adaptax.schema import one_of

ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Family:
    """What the rest of the house needs to know of a family before jax is imported."""

    module: str  # holds the nnx model; imported when a model is built
    model_class: str
    checkpoint: ModuleType  # sizes, module kinds, tensor names: see gemma3_weights


FAMILIES: dict[str, Family] = {
    "gemma3": Family("adaptax.models.gemma3", "Gemma3", gemma3_weights),
}


def find_family(name: str) -> Family:
    """The family of that name."""
    if name not in FAMILIES:
        raise UserError(f"model.model_family={name}: {one_of(name, FAMILIES)}")
    return FAMILIES[name]


def find_source(config: ModelConfig) -> str:
    """Where the base weights come from: a directory, a hub id, or ``random``."""
    checkpoint = find_family(config.model_family).checkpoint
    sizes = [*checkpoint.SIZES, "auto"]
    if config.model_size not in sizes:
        raise UserError(f"model.model_size={config.model_size}: {one_of(config.model_size, sizes)}")
    source = config.weights or checkpoint.DEFAULT_SOURCES.get(config.model_size)
    if source is None:
        raise UserError("model.model_size=auto reads the checkpoint's config.json: set model.weights=DIRECTORY")
    if source == "random" or locate(source).is_dir():
        return source if source == "random" else str(locate(source))
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"model.weights={source}: no such directory, and not a hub id such as google/gemma-3-1b-it")
    return source


def find_architecture(config: ModelConfig, directory: Path | None = None) -> Architecture:
    """The numbers of the model: those of ``model_size``, completed by ``config.json`` where the weights are at hand.

    Args:
      config: the model's configuration.
      directory: where the weights lie, if they were fetched; else a local ``model.weights`` is looked at.

    Raises:
      UserError: ``config.json`` contradicts ``model_size``.
    """
    source = find_source(config)
    checkpoint = find_family(config.model_family).checkpoint
    directory = directory or Path(source).expanduser()
    if source == "random" or not directory.is_dir():
        if config.model_size == "auto":
            raise UserError(f"model.model_size=auto needs a directory with config.json; model.weights={source} is none")
        return checkpoint.SIZES[config.model_size]
    path = directory / "config.json"
    try:
        found = checkpoint.read_architecture(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: model.weights must be a Hugging Face checkpoint directory") from None
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a valid config.json: {error}") from None
    if config.model_size != "auto":
        _check_size(checkpoint.SIZES[config.model_size], found, config.model_size, path)
    return found


def _check_size(expected: Architecture, found: Architecture, size: str, path: Path) -> None:
    names = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
    wrong = [
        f"{n} {getattr(found, n)} (not {getattr(expected, n)})"
        for n in names
        if getattr(found, n) != getattr(expected, n)
    ]
    if wrong:
        raise UserError(f"{path} is not a {size}: it has {', '.join(wrong)}; model.model_size=auto takes what it has")


def match_modules(config: ModelConfig, arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The modules that get adapters: module kind (``attn/q_einsum``) -> its layers.

    Raises:
      UserError: ``model.lora_module_path`` matches no whole path.
    """
    checkpoint = find_family(config.model_family).checkpoint
    matched: dict[str, tuple[int, ...]] = {}
    for path in checkpoint.module_paths(arch):
        if re.fullmatch(config.lora_module_path, path):
            _, layer, kind = path.split("/", 2)
            matched[kind] = (*matched.get(kind, ()), int(layer))
    if not matched:
        kinds = ", ".join(f"layers/0/{kind}" for kind in checkpoint.LINEARS)
        raise UserError(
            f"model.lora_module_path={config.lora_module_path!r} matches no module; it must match a whole path such as "
            f"{kinds} (layers 0 to {arch.num_layers - 1})"
        )
    return matched


def match_patterns(config: ModelConfig, layers: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, float]]:
    """The ranks and alphas that patterns give to modules: ``lora_rank_pattern`` -> module path -> its number.

    Args:
      config: the model's configuration.
      layers: the adapted modules, as :func:`match_modules` gives them.

    Raises:
      UserError: a pattern counts for no adapted module.
    """
    paths = [f"layers/{layer}/{kind}" for kind, places in layers.items() for layer in places]
    found = {}
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        patterns: Mapping[str, float] = getattr(config, key)
        first = {path: next((p for p in patterns if re.fullmatch(p, path)), None) for path in paths}
        for pattern in (p for p in patterns if p not in first.values()):
            if any(re.fullmatch(pattern, path) for path in paths):
                raise UserError(f"model.{key}: {pattern!r} matches what patterns before it match: put it before them")
            raise UserError(
                f"model.{key}: {pattern!r} matches no adapted module; it must match a whole path such as "
                f"{', '.join(f'layers/{places[0]}/{kind}' for kind, places in layers.items())}"
            )
        found[key] = {path: patterns[pattern] for path, pattern in first.items() if pattern is not None}
    return found
