"""What an ``adapter_config.json`` says of ranks and scales, and what in it cannot be represented here. No jax."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptax.config import UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MOST_BYTES, _MOST_PATTERNS = 4 << 20, 4096  # far above any adapter of a Gemma 3
# PEFT takes names as regular expressions, which a file from elsewhere may have made to match for ever: these do not.
_PLAIN = re.compile(r"\^?(?:\.\*)?(?:[\w-]|\\?\.)+\$?", re.ASCII)
_PREFIXES = ("model.", "model.language_model.", "language_model.model.")  # of text models, as transformers has had them
# Settings of PEFT that make another function of the same arrays, or of other ones.
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA, which also rescales the base weights",
    "use_qalora": "QA-LoRA, which pools its inputs",
    "use_bdlora": "a LoRA of diagonal blocks",
    "kasa_config": "KaSA, which changes the base weights too",
    "monteclora_config": "MonteCLoRA, which draws its weights",
    "arrow_config": "a router between adapters",
    "alora_invocation_tokens": "an activated LoRA, which is switched on by tokens",
    "lora_bias": "a LoRA with biases",
    "modules_to_save": "training of whole modules beside the adapters",
    "trainable_token_indices": "training of tokens' embeddings",
    "layer_replication": "a model with repeated layers",
    "target_parameters": "a LoRA of bare parameters",
    "megatron_config": "a LoRA sharded by Megatron",
}
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base weights too
_Patterns = Sequence[tuple[re.Pattern[str], Any]]


@dataclass(frozen=True)
class PeftSettings:
    """What counts of an ``adapter_config.json``."""

    path: Path
    rank: Any
    alpha: Any
    ranks: _Patterns  # the first one that the end of a module's name matches counts
    alphas: _Patterns
    use_rslora: bool
    dropout: float
    base: str  # what it says it was trained on

    def alpha_of(self, name: str, rank: int) -> float:
        """The alpha of a module of this rank.

        Raises:
          UserError: the file says another rank, or an alpha that makes no scale.
        """
        said, alpha = _look_up(self.ranks, name, self.rank), _look_up(self.alphas, name, self.alpha)
        if said != rank or rank < 1:
            raise UserError(f"{self.path}: {name} has rank {rank} in {TENSORS}, and rank {said!r:.40} here")
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not 1e-9 <= alpha <= 1e9:
            raise UserError(f"{self.path}: {name} has lora_alpha {alpha!r:.40}; it must be a number from 1e-9 to 1e9")
        return float(alpha)

    def weigh(self, rank: int) -> float:
        """What alpha is divided by at this rank."""
        return math.sqrt(rank) if self.use_rslora else rank


def read_settings(directory: Path) -> PeftSettings:
    """Reads the ``adapter_config.json`` in a folder.

    Raises:
      UserError: there is none, or it is of something else than a plain LoRA.
    """
    path = directory / CONFIG
    values = _read_values(directory, path)
    if values["peft_type"] != "LORA":
        raise UserError(f"{path}: peft_type is {values['peft_type']!r:.80}; only LORA can be read")
    for key, words in _REFUSED.items():
        if values.get(key):
            raise UserError(f"{path}: {key}={values[key]!r:.80} is {words}, which cannot be represented")
    if values.get("bias", "none") != "none":
        raise UserError(f"{path}: bias={values['bias']!r:.80} trains biases, which Gemma 3 has none of")
    init = values.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        fix = "; save it with PEFT's path_initial_model_for_weight_conversion" * (not init.lower().startswith("loftq"))
        raise UserError(f"{path}: init_lora_weights={init:.80} goes with base weights that were changed{fix}")
    use_rslora, dropout = values.get("use_rslora", False), values.get("lora_dropout", 0.0)
    if not isinstance(use_rslora, bool):
        raise UserError(f"{path}: use_rslora={use_rslora!r:.80} must be true or false")
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"{path}: lora_dropout={dropout!r:.80} must be a number from 0 to below 1")
    ranks, alphas = (_read_patterns(path, key, values.get(key)) for key in ("rank_pattern", "alpha_pattern"))
    base = values.get("base_model_name_or_path")
    base = base if isinstance(base, str) else ""
    return PeftSettings(
        path, values.get("r"), values.get("lora_alpha"), ranks, alphas, use_rslora, float(dropout), base
    )


def _read_values(directory: Path, path: Path) -> Mapping[str, Any]:
    try:
        if not path.is_file():
            raise UserError(f"{directory}: {_say_what_is_there(directory)}")
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is no adapter's configuration: it is larger than {_MOST_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} cannot be read: it is not valid JSON") from None
    if not isinstance(values, dict) or "peft_type" not in values:
        raise UserError(f"{path} is no adapter's configuration: it names no peft_type")
    if not (directory / TENSORS).is_file():
        pickled = directory / "adapter_model.bin"
        hint = f"; {pickled.name} is a pickle, which is not read: save it with safe_serialization" * pickled.exists()
        raise UserError(f"{directory} has no {TENSORS}{hint}")
    return values


def _say_what_is_there(directory: Path) -> str:
    """What a folder without a configuration is, and where the adapter may be that was meant."""
    if not directory.exists():
        return "no such folder"
    if not directory.is_dir():
        what, near = "a file; an adapter in PEFT's format is a folder", [directory.parent]
    else:
        what = f"no adapter in PEFT's format: it has no {CONFIG}"
        names = ("adapter", "adapters/best", "adapters/last")  # of a run
        near = [*(directory / name for name in names), *sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))]
    found = [path for path in near if (path / CONFIG).is_file()]
    return f"{what}; did you mean {found[0]}?" if found else what


def _read_patterns(path: Path, key: str, values: Any) -> _Patterns:
    """Compiled as PEFT does."""
    values = values or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: {key}={values!r:.80} must be a mapping from modules' names to numbers")
    if len(values) > _MOST_PATTERNS:
        raise UserError(f"{path}: {key} has {len(values)} names, more than any model has modules")
    for pattern in values:
        if not _PLAIN.fullmatch(pattern):
            raise UserError(
                f"{path}: {key}: {pattern!r:.80} is a regular expression; only names are read, whole ones or their "
                "ends: write the modules out"
            )
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in values.items()]


def _look_up(patterns: _Patterns, name: str, default: Any) -> Any:
    names = [prefix + name for prefix in _PREFIXES] if patterns else []
    return next((value for pattern, value in patterns if any(map(pattern.match, names))), default)
