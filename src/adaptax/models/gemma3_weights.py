"""Gemma 3 as its checkpoints tell it: numbers of each size, config.json, tensor names. No jax here.

Numbers: the published ``config.json`` of each size; defaults of absent values: transformers' ``Gemma3TextConfig``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptax.config import UserError

DEFAULT_SOURCES = {size: f"google/gemma-3-{size}-it" for size in ("270m", "1b", "4b", "12b", "27b")}
DEFAULT_SOURCES["tiny"] = "embedded:gemma3_tiny"


@dataclass(frozen=True)
class Architecture:
    """The numbers of one Gemma 3. Axis letters in brackets."""

    num_layers: int  # [L]
    embed_dim: int  # [D]
    mlp_dim: int  # [F]
    num_heads: int  # [N] query heads
    num_kv_heads: int  # [K]
    head_dim: int  # [H]
    vocab_size: int  # [V] rows of the embedding, padding rows included
    sliding_window: int  # a local query sees this many keys, itself included
    query_pre_attn_scalar: float  # attention logits are scaled by its inverse square root
    global_layers: tuple[bool, ...]  # one flag per layer
    rope_theta_local: float = 10_000.0
    rope_theta_global: float = 1_000_000.0
    rope_factor: float = 1.0  # positions are divided by it on global layers
    norm_eps: float = 1e-6
    is_multimodal: bool = False  # its checkpoints are Gemma3ForConditionalGeneration with a vision tower


def _every(period: int, num_layers: int) -> tuple[bool, ...]:
    return tuple((i + 1) % period == 0 for i in range(num_layers))


def _size(num_layers: int, embed_dim: int, mlp_dim: int, num_heads: int, num_kv_heads: int) -> Architecture:
    return Architecture(
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        vocab_size=262_144,
        sliding_window=512,
        query_pre_attn_scalar=256,
        global_layers=_every(6, num_layers),
    )


_MULTIMODAL = {"vocab_size": 262_208, "sliding_window": 1024, "rope_factor": 8.0, "is_multimodal": True}

SIZES: dict[str, Architecture] = {
    "270m": _size(18, 640, 2048, 4, 1),
    "1b": _size(26, 1152, 6912, 4, 1),
    "4b": replace(_size(34, 2560, 10_240, 8, 4), **_MULTIMODAL),
    "12b": replace(_size(48, 3840, 15_360, 16, 8), **_MULTIMODAL),
    "27b": replace(_size(62, 5376, 21_504, 32, 16), head_dim=128, query_pre_attn_scalar=168, **_MULTIMODAL),
    "tiny": replace(
        _size(6, 128, 512, 4, 1), head_dim=32, vocab_size=2048, sliding_window=32, query_pre_attn_scalar=32
    ),
}


@dataclass(frozen=True)
class Linear:
    """A projection: its tensors in a checkpoint, each [out, in], and its weight here, [in..., out...].

    Several tensors are joined on a new first output axis (keys and values in ``kv_einsum``).
    """

    tensors: tuple[str, ...]
    in_axes: str
    out_axes: str


# The modules that adapters may go to, by path within a layer.
LINEARS: dict[str, Linear] = {
    "attn/q_einsum": Linear(("self_attn.q_proj",), "D", "NH"),
    "attn/kv_einsum": Linear(("self_attn.k_proj", "self_attn.v_proj"), "D", "CKH"),
    "attn/attn_vec_einsum": Linear(("self_attn.o_proj",), "NH", "D"),
    "mlp/gate_proj": Linear(("mlp.gate_proj",), "D", "F"),
    "mlp/up_proj": Linear(("mlp.up_proj",), "D", "F"),
    "mlp/down_proj": Linear(("mlp.down_proj",), "F", "D"),
}

GGUF_ARCHITECTURE = "gemma3"
GGUF_NAMES = {  # a layer's tensors, as llama.cpp calls them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

NORMS: dict[str, tuple[str, str]] = {  # path within a layer -> tensor name, axis
    "pre_attention_norm": ("input_layernorm", "D"),
    "post_attention_norm": ("post_attention_layernorm", "D"),
    "pre_ffw_norm": ("pre_feedforward_layernorm", "D"),
    "post_ffw_norm": ("post_feedforward_layernorm", "D"),
    "attn/query_norm": ("self_attn.q_norm", "H"),
    "attn/key_norm": ("self_attn.k_norm", "H"),
}

EMBEDDING, FINAL_NORM = "embedder/embedding", "final_norm/scale"
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
# Left out: text is all that is trained. In Orbax checkpoints also what a trainer saved beside the parameters.
LEFT_OUT = ("vision_tower.", "multi_modal_projector.", "SigLiPFromPatches_0/", "vision_encoder/")
LEFT_OUT += ("transformer/embedder/mm_", "opt_state/", "collections/")

# Google's own layout, in Orbax checkpoints: parameter -> name there, {} being the layer, and its axes. A digit is the
# place on a first axis that several parameters share.
_LAYER = "transformer/layer_{}/"
ORBAX: dict[str, tuple[str, str]] = {
    EMBEDDING: ("transformer/embedder/input_embedding", "VD"),
    FINAL_NORM: ("transformer/final_norm/scale", "D"),
    "layers/pre_attention_norm/scale": (f"{_LAYER}pre_attention_norm/scale", "D"),
    "layers/post_attention_norm/scale": (f"{_LAYER}post_attention_norm/scale", "D"),
    "layers/pre_ffw_norm/scale": (f"{_LAYER}pre_ffw_norm/scale", "D"),
    "layers/post_ffw_norm/scale": (f"{_LAYER}post_ffw_norm/scale", "D"),
    "layers/attn/query_norm/scale": (f"{_LAYER}attn/_query_norm/scale", "H"),
    "layers/attn/key_norm/scale": (f"{_LAYER}attn/_key_norm/scale", "H"),
    "layers/attn/q_einsum/w": (f"{_LAYER}attn/q_einsum/w", "NDH"),
    "layers/attn/kv_einsum/w": (f"{_LAYER}attn/kv_einsum/w", "CKDH"),
    "layers/attn/attn_vec_einsum/w": (f"{_LAYER}attn/attn_vec_einsum/w", "NHD"),
    "layers/mlp/gate_proj/w": (f"{_LAYER}mlp/gating_einsum/w", "0FD"),
    "layers/mlp/up_proj/w": (f"{_LAYER}mlp/gating_einsum/w", "1FD"),
    "layers/mlp/down_proj/w": (f"{_LAYER}mlp/linear/w", "FD"),
}
ORBAX_PREFIX = "transformer/"
ORBAX_VOCAB_SIZE = 262_144  # Hugging Face's files of 4b and up have 64 rows more, for images


def axis_sizes(arch: Architecture) -> dict[str, int]:
    """Axis letter -> size."""
    letters = {"D": arch.embed_dim, "F": arch.mlp_dim, "N": arch.num_heads, "K": arch.num_kv_heads}
    return letters | {"H": arch.head_dim, "V": arch.vocab_size, "L": arch.num_layers, "C": 2}


def module_paths(arch: Architecture) -> list[str]:
    """Every path that ``lora_module_path`` may match: ``layers/0/attn/q_einsum``, ..."""
    return [f"layers/{i}/{kind}" for i in range(arch.num_layers) for kind in LINEARS]


def text_prefix(names: Mapping[str, Any] | set[str]) -> str | None:
    """The part of the names of all tensors that are read: which of the four layouts this checkpoint has."""
    if ORBAX[EMBEDDING][0] in names:
        return ORBAX_PREFIX
    return next((prefix for prefix in TEXT_PREFIXES if f"{prefix}embed_tokens.weight" in names), None)


def tensor_shapes(arch: Architecture, prefix: str) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint must hold, with its shape (linear weights are [out, in], but in ``ORBAX``)."""
    sizes = axis_sizes(arch)
    if prefix == ORBAX_PREFIX:
        rows = [(name.format(i), axes) for name, axes in ORBAX.values() for i in range(arch.num_layers)]
        return {name: tuple(sizes["C"] if axis.isdigit() else sizes[axis] for axis in axes) for name, axes in rows}
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}embed_tokens.weight": (arch.vocab_size, arch.embed_dim),
        f"{prefix}norm.weight": (arch.embed_dim,),
    }
    for i in range(arch.num_layers):
        for linear in LINEARS.values():
            rows, columns = _product(linear.out_axes.lstrip("C"), sizes), _product(linear.in_axes, sizes)
            shapes |= {f"{prefix}layers.{i}.{name}.weight": (rows, columns) for name in linear.tensors}
        for name, axis in NORMS.values():
            shapes[f"{prefix}layers.{i}.{name}.weight"] = (sizes[axis],)
    return shapes


def _product(axes: str, sizes: Mapping[str, int]) -> int:
    product = 1
    for axis in axes:
        product *= sizes[axis]
    return product


# The largest values taken, far above any Gemma 3: what a file claims is laid out before its weights are seen.
_LARGEST: dict[str, int | float] = {
    "num_hidden_layers": 1000,
    "hidden_size": 100_000,
    "intermediate_size": 1_000_000,
    "num_attention_heads": 1000,
    "num_key_value_heads": 1000,
    "head_dim": 10_000,
    "vocab_size": 10_000_000,
    "sliding_window": 10**9,
    "query_pre_attn_scalar": 1e6,
    "rms_norm_eps": 1.0,
}


def read_architecture(config: Mapping[str, Any], source: str) -> Architecture:
    """The numbers in a checkpoint's ``config.json``, old and new spellings, absent values at their defaults.

    Raises:
      UserError: it is not a Gemma 3, or asks for something this model does not do.
    """
    model_type = config.get("model_type")
    if model_type not in ("gemma3", "gemma3_text"):
        raise UserError(f"{source}: model_type is {model_type!r:.80}, not gemma3 or gemma3_text")
    text = config.get("text_config", {}) if model_type == "gemma3" else config
    if not isinstance(text, Mapping):
        raise UserError(f"{source}: text_config must hold the numbers of the text model, not {text!r:.80}")
    _refuse_unsupported(text, source)
    for key, largest in _LARGEST.items():
        if key in text:
            _check_number(text[key], key, source, largest)
    num_layers = text.get("num_hidden_layers", 26)
    theta_local, theta_global, factor = _read_rope(text, source)
    arch = Architecture(
        num_layers=num_layers,
        embed_dim=text.get("hidden_size", 2304),
        mlp_dim=text.get("intermediate_size", 9216),
        num_heads=text.get("num_attention_heads", 8),
        num_kv_heads=text.get("num_key_value_heads", 4),
        head_dim=text.get("head_dim", 256),
        vocab_size=text.get("vocab_size", 262_208),
        sliding_window=text.get("sliding_window", 4096),
        query_pre_attn_scalar=text.get("query_pre_attn_scalar", 256),
        global_layers=_read_global_layers(text, num_layers, source),
        rope_theta_local=theta_local,
        rope_theta_global=theta_global,
        rope_factor=factor,
        norm_eps=text.get("rms_norm_eps", 1e-6),
        is_multimodal=model_type == "gemma3",
    )
    if arch.num_heads % arch.num_kv_heads:
        heads = f"num_attention_heads={arch.num_heads} must be a multiple of num_key_value_heads={arch.num_kv_heads}"
        raise UserError(f"{source}: {heads}")
    if arch.head_dim % 2:
        raise UserError(f"{source}: head_dim={arch.head_dim} must be even")
    return arch


def _check_number(value: Any, key: str, source: str, largest: int | float) -> Any:
    """The value, if it is above 0 (NaN is not), not above the largest, and whole where that is."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{source}: {key} must be a number above 0, not {value!r:.80}")
    if value > largest or not isinstance(value, type(largest) | int):
        kind = "whole number" if isinstance(largest, int) else "number"
        raise UserError(f"{source}: {key} must be a {kind} up to {largest:,}, not {value!r:.80}")
    return value


def _refuse_unsupported(text: Mapping[str, Any], source: str) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
        "attention_bias": (None, False),
        "tie_word_embeddings": (None, True),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
    }
    for key, values in wanted.items():
        if text.get(key) not in values:
            raise UserError(f"{source}: {key}={text[key]!s:.80} is not supported (Gemma 3 has {values[-1]})")


def _read_global_layers(text: Mapping[str, Any], num_layers: int, source: str) -> tuple[bool, ...]:
    types = text.get("layer_types")
    if types is None:
        period = text.get("sliding_window_pattern", text.get("_sliding_window_pattern", 6))
        return _every(_check_number(period, "sliding_window_pattern", source, 1000), num_layers)
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{source}: layer_types must be {num_layers} of full_attention or sliding_attention")
    return tuple(kind == "full_attention" for kind in types)


def _read_rope(text: Mapping[str, Any], source: str) -> tuple[float, float, float]:
    """(local theta, global theta, linear factor on global layers)."""
    by_kind = text.get("rope_parameters") or {}
    local, full = by_kind.get("sliding_attention") or {}, dict(by_kind.get("full_attention") or {})
    full |= text.get("rope_scaling") or {}
    for name, rope, allowed in (("local", local, ("default",)), ("global", full, ("default", "linear"))):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in allowed:
            raise UserError(
                f"{source}: rope_type {kind!r:.80} on {name} layers is not supported (Gemma 3 has {allowed[-1]})"
            )
    theta_local = local.get("rope_theta", text.get("rope_local_base_freq", 10_000.0))
    theta_global = full.get("rope_theta", text.get("rope_theta", 1_000_000.0))
    values = {"local rope_theta": theta_local, "global rope_theta": theta_global, "factor": full.get("factor") or 1.0}
    checked = [float(_check_number(value, key, source, 1e12)) for key, value in values.items()]
    return checked[0], checked[1], checked[2]


def parameter_axes(arch: Architecture) -> dict[str, str]:
    """Axis letters of every parameter of the stacked model, by path: the border between checkpoints and meshes."""
    axes = {EMBEDDING: "VD", FINAL_NORM: "D"}
    axes |= {f"layers/{path}/scale": f"L{axis}" for path, (_, axis) in NORMS.items()}
    axes |= {f"layers/{kind}/w": f"L{linear.in_axes}{linear.out_axes}" for kind, linear in LINEARS.items()}
    return axes


def adapter_axes(arch: Architecture, kind: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """(letter, size) of the input of a module kind's A and of the output of its B.

    Adapters are matrices: axes that belong together are one, under the letter of the first, by which it may be split.
    """
    linear, sizes = LINEARS[kind], axis_sizes(arch)
    return tuple((axes[0], _product(axes, sizes)) for axes in (linear.in_axes, linear.out_axes))  # type: ignore[return-value]


def attention_windows(arch: Architecture) -> tuple[int | None, ...]:
    """Of each layer: how many keys a query sees at most, itself included; None where it sees all before it."""
    return tuple(None if is_global else arch.sliding_window for is_global in arch.global_layers)


def tensor_names(path: str, arch: Architecture, prefix: str) -> list[list[str]]:
    """The checkpoint tensors behind a parameter: one list per layer (a single one for unstacked parameters)."""
    if prefix == ORBAX_PREFIX:
        name = ORBAX[path][0]
        return [[name.format(i)] for i in range(arch.num_layers)] if path.startswith("layers/") else [[name]]
    if path == EMBEDDING:
        return [[f"{prefix}embed_tokens.weight"]]
    if path == FINAL_NORM:
        return [[f"{prefix}norm.weight"]]
    inner = path.removeprefix("layers/").rpartition("/")[0]
    names = LINEARS[inner].tensors if inner in LINEARS else (NORMS[inner][0],)
    return [[f"{prefix}layers.{i}.{name}.weight" for name in names] for i in range(arch.num_layers)]


def stored_axes(path: str, prefix: str) -> str | None:
    """Axes of a parameter's tensor in a layer by ``ORBAX``; None where its tensors are those of ``LINEARS``."""
    return ORBAX[path][1] if prefix == ORBAX_PREFIX else None


def spell_orbax(name: str) -> str:
    """The name in ``ORBAX`` of an array in a checkpoint: flat or nested, with ``params`` or without ``transformer``."""
    name = name.removeprefix("params/")
    bare = name.removeprefix(ORBAX_PREFIX)
    if bare.startswith(("embedder/", "final_norm/", "layer_")):
        name = ORBAX_PREFIX + bare
    return f"{name}/w" if name.endswith(("/mlp/gating_einsum", "/mlp/linear")) else name


def measure_orbax(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """The numbers of :class:`Architecture` that shapes tell, by its fields; None where they are not a Gemma's.

    Args:
      shapes: of a checkpoint's arrays, names as :func:`spell_orbax` spells them.
    """
    sizes: dict[str, int] = {}
    for name, axes in ORBAX.values():
        shape = shapes.get(name.format(0), ())
        if len(shape) != len(axes):
            return None
        sizes |= dict(zip(axes, shape, strict=True))
    layers = [match for name in shapes if (match := re.match(r"transformer/layer_(\d{1,4})/", name))]
    sizes["L"] = 1 + max(int(match[1]) for match in layers)
    fields = {"num_layers": "L", "embed_dim": "D", "mlp_dim": "F", "num_heads": "N", "num_kv_heads": "K"}
    return {field: sizes[axis] for field, axis in (fields | {"head_dim": "H", "vocab_size": "V"}).items()}


def is_left_out(name: str) -> bool:
    """Whether a tensor belongs to the vision tower, which is not trained and not loaded."""
    return name == "step" or name.removeprefix("model.").startswith(LEFT_OUT)


def is_tied_head(name: str) -> bool:
    """Whether a tensor is a second copy of the embedding, which some checkpoints have."""
    return name.endswith("lm_head.weight")


def peft_module_prefix(arch: Architecture) -> str:
    """Where transformers keeps the text model's layers, as PEFT spells it."""
    return "model.language_model." if arch.is_multimodal else "model."
