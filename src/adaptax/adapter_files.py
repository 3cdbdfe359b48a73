"""Adapters in PEFT's format, read: which modules they adapt, at which rank and scale, and their arrays. No jax here.

Keys and values share their A here. A foreign adapter whose k and v have an A each is the same function at the sum of
their ranks: A = [A_k | A_v], and a B with zeros where the other one's columns meet it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from adaptax.config import ModelConfig, UserError
from adaptax.models import Architecture, find_architecture, find_family
from adaptax.peft_settings import CONFIG, TENSORS, PeftSettings, read_settings
from adaptax.tensor_files import DTYPES, StoredTensor, list_file, read_pieces

_PREFIX = r"(?:base_model\.model\.)?(?:model\.|language_model\.)*"  # as each release of transformers has it
_NAME = re.compile(_PREFIX + r"(layers\.\d+\.[\w.]+)\.lora_(A|B)(?:\.default)?\.weight", re.ASCII)
_Pair = tuple[StoredTensor, StoredTensor]


@dataclass(frozen=True)
class Module:
    """The adapter of one of our modules, as it lies in the files."""

    rank: int
    alpha: float
    names: tuple[str, ...]  # of the modules of transformers that it stands for
    pairs: tuple[_Pair | None, ...]  # A and B of each of these; None: not adapted
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

    @property
    def num_modules(self) -> int:
        """How many modules of transformers it adapts."""
        return sum(pair is not None for module in self.modules.values() for pair in module.pairs)

    @property
    def left_out(self) -> list[str]:
        """Modules of transformers that it does not adapt, but shares an array here with one that it does."""
        modules = self.modules.values()
        return [n for m in modules for n, pair in zip(m.names, m.pairs, strict=True) if pair is None]

    def hash(self) -> str:
        """Of the bytes of its files.

        Raises:
          UserError: one cannot be read.
        """
        digest = hashlib.sha256()
        for name in (CONFIG, TENSORS):
            path = self.directory / name
            for piece in read_pieces(path, 0, path.stat().st_size):
                digest.update(piece)
        return digest.hexdigest()


def open_adapter(directory: Path, checkpoint: ModuleType, arch: Architecture) -> AdapterFiles:
    """What an adapter says of itself, held against the model; arrays are read for keys and values alone.

    Args:
      directory: of ``adapter_config.json`` and ``adapter_model.safetensors``.
      checkpoint: the family's, such as ``gemma3_weights``.
      arch: the model's numbers.

    Raises:
      UserError: it is none, cannot be represented, or is of another model.
    """
    settings = read_settings(directory)
    pairs = _pair_up(directory, list_file(directory / TENSORS))
    shapes = _shapes(checkpoint, arch)
    targets = _targets(checkpoint, arch)
    known = {name for names in targets.values() for name in names}
    unknown = [name for name in pairs if name not in known]
    if unknown:
        raise UserError(
            f"{directory} adapts {unknown[0]:.200}, which this model does not have or does not adapt: "
            f"{len(unknown)} of its {len(pairs)} modules are such; is model= the model that it was trained on?"
        )
    modules: dict[str, Module] = {}
    for path, names in targets.items():
        found = [pairs.get(name) for name in names]
        if any(found):
            modules[path] = _read_module(settings, names, found, shapes[path])
    if not modules:
        raise UserError(f"{directory / TENSORS} holds no lora_A and lora_B")
    return AdapterFiles(directory, modules, settings.use_rslora, settings.dropout, settings.base)


def read_arrays(files: AdapterFiles, checkpoint: ModuleType, arch: Architecture) -> dict[str, np.ndarray]:
    """The stacked float32 arrays, ``layers/KIND/w_lora_a`` and ``..._b``; what lower ranks leave over is zero.

    Raises:
      UserError: a number is not finite.
    """
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
        stop = start + rank
        with np.errstate(over="ignore"):  # is refused below
            a_IR[:, start:stop] = pair[0].map().T
            b_RCO[start:stop, part] = np.float32(factor) * pair[1].map().T.astype(np.float32)
        if not (np.isfinite(a_IR[:, start:stop]).all() and np.isfinite(b_RCO[start:stop, part]).all()):
            raise UserError(f"{pair[0].path}: {module.names[part]} holds numbers that are not finite")
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
    return adopt(config, open_initial(config, checkpoint, arch), arch)


def open_initial(config: ModelConfig, checkpoint: ModuleType, arch: Architecture) -> AdapterFiles:
    """Opens the adapter that ``model.init_adapter`` names; see :func:`open_adapter`."""
    assert config.init_adapter is not None
    path = Path(config.init_adapter).expanduser()
    if not path.exists():
        hint = "a run that has saved a checkpoint goes on without it by checkpoint.resume=FOLDER"
        raise UserError(f"model.init_adapter={path}: no such folder; {hint}")
    return open_adapter(path, checkpoint, arch)


def _pair_up(directory: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, _Pair]:
    """``layers.N.self_attn.q_proj`` -> its A [r, in] and B [out, r]."""
    halves: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{directory / TENSORS}: {name!r:.200} is no LoRA of the text model's layers")
        if tensor.dtype not in DTYPES or len(tensor.shape) != 2:
            is_what = f"{tensor.dtype} {list(tensor.shape)}"
            raise UserError(f"{directory / TENSORS}: {name!r:.200} is {is_what}, no matrix of {', '.join(DTYPES)}")
        half = halves.setdefault(match[1], {})
        if match[2] in half:
            raise UserError(f"{directory / TENSORS}: {match[1]:.200} has a lora_{match[2]} under two names")
        half[match[2]] = tensor
    for module, pair in halves.items():
        if len(pair) < 2:
            half = f"{module:.200} has a lora_{min(pair)} alone"
            raise UserError(f"{directory / TENSORS}: {half}; the other half is missing")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(
                f"{directory / TENSORS}: {module:.200} has a lora_A of rank {pair['A'].shape[0]} and a lora_B of rank "
                f"{pair['B'].shape[1]}"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}


def _targets(checkpoint: ModuleType, arch: Architecture) -> dict[str, list[str]]:
    """Our module path -> the modules of transformers that it stands for."""
    return {
        f"layers/{layer}/{kind}": [f"layers.{layer}.{name}" for name in linear.tensors]
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
    settings: PeftSettings, names: Sequence[str], pairs: Sequence[_Pair | None], shape: tuple[int, int]
) -> Module:
    """The adapter of one of our modules from those of the modules of transformers that it stands for."""
    ranks, alphas, scales = [0] * len(pairs), [0.0] * len(pairs), [0.0] * len(pairs)
    present = [(place, pair) for place, pair in enumerate(pairs) if pair is not None]
    for place, (a, b) in present:
        found = a.shape[1], b.shape[0]
        if found != shape:
            raise UserError(
                f"{a.path}: {names[place]} is {found[0]} to {found[1]}, this model's is {shape[0]} to {shape[1]}: "
                "model= must be the model that the adapter was trained on"
            )
        ranks[place] = a.shape[0]
        alphas[place] = settings.alpha_of(names[place], ranks[place])
        scales[place] = alphas[place] / settings.weigh(ranks[place])
    (first, (a, _)), *others = present
    is_shared = all(ranks[place] == ranks[first] and np.array_equal(a.map(), pair[0].map()) for place, pair in others)
    rank, alpha = ranks[first], alphas[first]
    if not is_shared:
        rank = sum(ranks)
        alpha = _rounded(scales[first] * settings.weigh(rank))
    factors = tuple(scale / scales[first] for scale in scales)
    return Module(rank, alpha, tuple(names), tuple(pairs), tuple(ranks), factors, is_shared)


def _rounded(alpha: float) -> float:
    """Alpha without the last bits that a division or a root has put there."""
    near = round(alpha, 9)
    return near if math.isclose(near, alpha, rel_tol=1e-12) else alpha
