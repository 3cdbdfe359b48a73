"""Model FLOPs: the floating-point operations that a training step asks for, whatever a machine does. No jax here.

A product of [m, k] and [k, n] is 2mkn. Counted are the matrix products of the layers, of attention and of the head, as
in PaLM (arXiv 2204.02311, appendix B), with what LoRA spares: frozen weights have no gradient of their own, and layers
below the first adapted one no backward pass. Norms, softmax, rotary angles, the embedding's lookup and the optimizer
count nothing; nor do padding, of rows and of lower ranks, and what rematerialisation computes anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaptax.models import Architecture, Family

if TYPE_CHECKING:
    from adaptax.lora import LoraSpec  # brings jax


@dataclass(frozen=True)
class Counts:
    """What a batch holds that work depends on."""

    num_tokens: float  # without padding
    num_supervised: float
    num_pairs: Mapping[int | None, float]  # (query, key) pairs by attention window; None: a query sees all before it


def count_pairs(length: int, window: int | None) -> int:
    """(query, key) pairs of a document: each of its tokens sees itself and those before it, ``window`` at most."""
    full = length if window is None else min(length, window)
    return full * (full + 1) // 2 + (length - full) * full


def count_documents(family: Family, arch: Architecture, lengths: Iterable[int], num_supervised: float) -> Counts:
    """The counts of documents of these lengths in tokens, however they are packed."""
    lengths, windows = list(lengths), set(family.checkpoint.attention_windows(arch))
    pairs = {window: sum(count_pairs(length, window) for length in lengths) for window in windows}
    return Counts(sum(lengths), num_supervised, pairs)


def split_flops(family: Family, arch: Architecture, spec: LoraSpec, counts: Counts) -> dict[str, float]:
    """The model FLOPs of a training step, forward and backward, by what they are for.

    ``frozen``: the layers' own weights, 2 per weight and token forward, 2 backward from the first adapted layer on.
    ``adapters``: 6 per weight and token. ``attention``: 4 per pair, query head and its size forward, 8 backward.
    ``head``: logits and the gradient of the hidden states, of supervised positions alone.
    """
    checkpoint, first = family.checkpoint, spec.first_layer
    sizes = checkpoint.axis_sizes(arch)
    in_out = {kind: [size for _, size in checkpoint.adapter_axes(arch, kind)] for kind in checkpoint.LINEARS}
    num_frozen = sum(num_in * num_out for num_in, num_out in in_out.values())  # of a layer
    num_adapter = sum(spec.total_rank(kind) * sum(in_out[kind]) for kind in spec.layers)
    num_passes = sizes["L"] + (sizes["L"] - first)  # of a layer: all forward, some backward
    windows = checkpoint.attention_windows(arch)
    pairs = sum(counts.num_pairs[window] * (1 if i < first else 3) for i, window in enumerate(windows))
    return {
        "frozen": 2.0 * num_passes * num_frozen * counts.num_tokens,
        "adapters": 6.0 * num_adapter * counts.num_tokens,
        "attention": 4.0 * sizes["N"] * sizes["H"] * pairs,
        "head": 4.0 * sizes["D"] * sizes["V"] * counts.num_supervised,
    }


def step_flops(family: Family, arch: Architecture, spec: LoraSpec, counts: Counts) -> float:
    """The model FLOPs of a training step: the sum of :func:`split_flops`."""
    return sum(split_flops(family, arch, spec, counts).values())
