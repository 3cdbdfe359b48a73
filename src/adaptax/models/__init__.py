"""The model families: one line each. Importing this imports no jax."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from adaptax.config import ModelConfig, UserError, locate
from adaptax.models import gemma3_weights
from adaptax.models.gemma3_weights import Architecture
from adaptax.models.hub import find_file
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

    An Orbax checkpoint needs none: its arrays tell which size it is, and how many rows its vocabulary has.

    Args:
      config: the model's configuration.
      directory: where the weights lie, if they were fetched; else a local ``model.weights`` is looked at.

    Raises:
      UserError: ``config.json`` or the arrays contradict ``model_size``.
    """
    source = find_source(config)
    checkpoint = find_family(config.model_family).checkpoint
    directory = directory or Path(source).expanduser()
    if source == "random" or not directory.is_dir():
        if config.model_size == "auto":
            raise UserError(f"model.model_size=auto needs a checkpoint in a directory; model.weights={source} is none")
        return checkpoint.SIZES[config.model_size]
    from adaptax.orbax_files import find_checkpoint  # brings numpy, which --help does without

    path, folder = find_file(directory, "config.json"), find_checkpoint(directory)
    if folder is not None:
        return _find_in_arrays(config, checkpoint, folder, path)
    found = _read_config(checkpoint, path)
    if config.model_size != "auto":
        _check_size(checkpoint.SIZES[config.model_size], vars(found), config.model_size, path)
    return found


def _read_config(checkpoint: ModuleType, path: Path) -> Architecture:
    try:
        return checkpoint.read_architecture(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        kinds = "a Hugging Face checkpoint's directory, or hold an Orbax checkpoint"
        raise UserError(f"{path} is missing: model.weights must be {kinds}") from None
    except (ValueError, AttributeError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a valid config.json: {error}") from None


def _find_in_arrays(config: ModelConfig, checkpoint: ModuleType, folder: Path, path: Path) -> Architecture:
    """The size that an Orbax checkpoint's arrays have, or what a ``config.json`` beside them says."""
    from adaptax.orbax_files import list_arrays

    arrays = list_arrays(folder, checkpoint.spell_orbax)
    measured = checkpoint.measure_orbax({name: array.shape for name, array in arrays.items()})
    if measured is None:
        raise UserError(f"{folder} is an Orbax checkpoint, but not of a Gemma 3 as Google publishes them")
    size = config.model_size
    if size != "auto":
        _check_size(checkpoint.SIZES[size], measured, size, folder)
    if path.exists():
        found = _read_config(checkpoint, path)
    elif size != "auto":
        found = checkpoint.SIZES[size]
    else:
        fitting = [size for size, arch in checkpoint.SIZES.items() if not _compare(arch, measured)]
        if not fitting:
            numbers = ", ".join(f"{name} {measured[name]}" for name in _COMPARED)
            fix = "name model.model_size, or put its config.json beside it"
            raise UserError(f"{folder} is none of {', '.join(checkpoint.SIZES)}: it has {numbers}; {fix}")
        found = checkpoint.SIZES[fitting[0]]
    return replace(found, vocab_size=measured["vocab_size"])


_COMPARED = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")


def _compare(expected: Architecture, found: Mapping[str, int]) -> list[str]:
    """What is found to be different."""
    wanted = vars(expected)
    return [f"{n} {found[n]} (not {wanted[n]})" for n in _COMPARED if found[n] != wanted[n]]


def _check_size(expected: Architecture, found: Mapping[str, int], size: str, path: Path) -> None:
    if wrong := _compare(expected, found):
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
