"""Tiny Hugging Face checkpoints with fixed seeds, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def build_text_model(seed: int = 0, **changes: Any) -> Any:
    """A random ``Gemma3ForCausalLM``, float32, norms away from their initial zeros."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return _randomize(Gemma3ForCausalLM, Gemma3TextConfig(**(TEXT | changes)), seed)


def build_multimodal_model(seed: int = 0, **changes: Any) -> Any:
    """A random ``Gemma3ForConditionalGeneration`` as 4b: rope factor 8 on global layers, padded vocabulary."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    four_b = {"num_key_value_heads": 2, "vocab_size": 2112, "rope_parameters": rope}
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**(TEXT | four_b | changes)),
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=2100,
        boi_token_index=2101,
        eoi_token_index=2102,
    )
    return _randomize(Gemma3ForConditionalGeneration, config, seed)


def _randomize(model_class: Any, config: Any, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.ndim == 1:
                weight.normal_(0.0, 0.3)
            elif "embed_tokens" in name or "_proj" in name:
                weight.normal_(0.0, 0.08)
    return model


def save(model: Any, directory: Path, **kwargs: Any) -> Path:
    """Writes ``config.json`` and safetensors as ``save_pretrained`` does."""
    model.save_pretrained(directory, **kwargs)
    return directory
