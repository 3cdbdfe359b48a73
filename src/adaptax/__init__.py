"""adaptax: LoRA fine-tuning of Gemma 3 in JAX, driven by Hydra."""

__version__ = "0.1.0"
