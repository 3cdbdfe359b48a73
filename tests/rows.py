"""Rows and configurations of data for the tests; no jax."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from adaptax import config as cfg
from adaptax.data.chat import Example, Piece, encode_rows, read_turns, render_chat, render_text
from adaptax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
Write = Callable[..., Path]  # of the fixture write_jsonl
FIRST_ID = 200  # row i of make_examples holds the token FIRST_ID + i


def data_config(train: Any = None, **changes: Any) -> cfg.DataConfig:
    """A data section with every key; nothing is held out, and no tokens are kept on disk."""
    values: dict[str, Any] = {
        "train": train if train is None or isinstance(train, list) else str(train),
        "eval": None,
        "eval_fraction": 0.0,
        "mixture": None,
        "format": "auto",
        "columns": {},
        "filter": {},
        "max_rows": None,
        "on_bad_row": "error",
        "supervise": "assistant",
        "allow_special_tokens": False,
        "min_length": 1,
        "max_length": 64,
        "overlong": "truncate",
        "packing": False,
        "length_buckets": 1,
        "shuffle": True,
        "streaming": False,
        "cache": False,
        "cache_dir": None,
        "cache_gib": 1.0,
        "prefetch_batches": 2,
    }
    return cfg.DataConfig(**(values | changes))


def run_config(data: cfg.DataConfig, mesh_shape: Any = None, **training: Any) -> cfg.Config:
    """A whole run over these data; ``training`` changes that section."""
    values: dict[str, Any] = {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "global_batch_size": None,
        "remat": "full",
        "num_batches": None,
        "num_epochs": 1,
        "eval_every_steps": None,
        "exact_match_rows": 0,
        "max_nonfinite": 1,
        "early_stopping_patience": None,
        "early_stopping_min_delta": 0.0,
        "stop_after_steps": None,
        "memory_gib": None,
        "compile_cache_gib": 0.0,
        "profile": None,
        "seed": 0,
    }
    return cfg.Config(
        name="test",
        model=cfg.ModelConfig(
            model_family="gemma3",
            model_size="tiny",
            lora_rank=8,
            lora_alpha=None,
            lora_module_path=".*",
            mesh_shape=mesh_shape or [[1, 1], ["fsdp", "tp"]],
            lora_dropout=0.0,
            use_rslora=False,
            lora_rank_pattern={},
            lora_alpha_pattern={},
            weights=None,
            tokenizer=None,
            dtype="float32",
            quantization=None,
            init_adapter=None,
            attention="auto",
        ),
        data=data,
        optimizer=cfg.OptimizerConfig("sgd", 1.0, 0.0, None, None, None, None, None, None),
        schedule=cfg.ScheduleConfig("constant", 0, 1.0),
        training=cfg.TrainingConfig(**(values | training)),
        checkpoint=cfg.CheckpointConfig(None, None, 1, "auto", 30.0),
        logging=cfg.LoggingConfig(1, "off", False, False, None),
        generation=cfg.GenerationConfig(16, 0.0, None, None, None, 0, 4),
        evaluation=cfg.EvaluationConfig(None, None, 1e-6, None, 0),
    )


def chat(user: str, assistant: str) -> dict[str, Any]:
    """A row of one question and its answer."""
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def hash_batch(batch: Batch) -> str:
    """One text for all that a batch holds."""
    digest = hashlib.sha256()
    for name, array in sorted(batch.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def assert_same(left: Batch, right: Batch) -> None:
    """Two batches are equal in every array."""
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def documents(batch: Batch) -> Iterable[tuple[np.ndarray, Batch]]:
    """(tokens, all arrays) of each document of a batch, in order: of each segment of each sequence; no padding."""
    flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    for i, segments in enumerate(flat["segments"]):
        for segment in np.unique(segments[segments > 0]):
            here = segments == segment
            yield flat["tokens"][i, here], {name: array[i, here] for name, array in flat.items()}


def encode_chat(messages: Any, tokenizer: Tokenizer, supervise: str = "assistant") -> Example:
    """One conversation as tokens."""
    return _encode(render_chat(read_turns(messages, "messages"), supervise), tokenizer)


def encode_text(text: Any, tokenizer: Tokenizer) -> Example:
    """One plain document as tokens."""
    return _encode(render_text(text, "text"), tokenizer)


def _encode(pieces: list[Piece], tokenizer: Tokenizer) -> Example:
    example = encode_rows([pieces], tokenizer)[0]
    if isinstance(example, cfg.UserError):
        raise example
    return example
