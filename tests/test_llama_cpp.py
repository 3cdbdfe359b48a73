"""llama.cpp itself, with the base of the package, loads our GGUF adapters and computes what we compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import support
from adaptax.gguf_export import save_gguf_adapter
from adaptax.lora import LoraSpec
from adaptax.models import ASSETS
from adaptax.models.gemma3_weights import GGUF_NAMES, SIZES
from test_gguf_export import host_adapters

TINY = SIZES["tiny"]
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
TOKENS = [2, 105, *np.random.default_rng(0).integers(300, 2000, 60).tolist()]  # longer than the sliding window
SPECS = {
    "uniform": {},
    "uneven rslora": {
        "use_rslora": True,
        "ranks": {"layers/3/attn/q_einsum": 2, "layers/2/attn/kv_einsum": 1},
        "alphas": {"layers/3/attn/q_einsum": 3.0, "layers/5/mlp/up_proj": 0.3},
    },
}


def write_base(path: Path) -> None:
    """The base as a GGUF file; llama.cpp keeps 1 + w of norms."""
    import gguf

    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(1024)
    writer.add_embedding_length(TINY.embed_dim)
    writer.add_block_count(TINY.num_layers)
    writer.add_feed_forward_length(TINY.mlp_dim)
    writer.add_head_count(TINY.num_heads)
    writer.add_head_count_kv(TINY.num_kv_heads)
    writer.add_key_length(TINY.head_dim)
    writer.add_value_length(TINY.head_dim)
    writer.add_layer_norm_rms_eps(TINY.norm_eps)
    writer.add_rope_freq_base(TINY.rope_theta_global)
    writer.add_sliding_window(TINY.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(TINY.vocab_size)])  # tokens go in and come out as numbers
    writer.add_token_scores([0.0] * TINY.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * TINY.vocab_size)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    for name, tensor in load_file(ASSETS / "gemma3_tiny" / "model.safetensors").items():
        tensor = tensor.astype(np.float32) + ("norm" in name)
        if name not in TOP:
            _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
            name = f"blk.{layer}.{(NORMS | GGUF_NAMES)[inner]}.weight"
        writer.add_tensor(TOP.get(name, name), np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask_llama_cpp(base: Path, adapter: Path | None) -> dict[int, float]:
    """The 40 likeliest next tokens after TOKENS, with the natural logarithms of their probabilities."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup, params.enable_chat_template = 256, 1, False, False
    params.cpuparams.n_threads = 2
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    answer = xllamacpp.Server(params).handle_completions({"prompt": TOKENS, "n_predict": 1, "n_probs": 40})
    answer = json.loads(answer) if isinstance(answer, str) else answer
    return {top["id"]: top["logprob"] for top in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def our_log_probabilities(adapters: dict[str, np.ndarray], spec: LoraSpec | None) -> np.ndarray:
    """The same of all tokens. Scales that differ by module are put into B."""
    folded = {}
    for path, array in adapters.items():
        kind, _, side = path.removeprefix("layers/").rpartition("/")
        factors = [spec.scale_of(kind, layer) * spec.rank / spec.alpha for layer in spec.layers[kind]]
        folded[path] = np.array(factors, np.float32)[:, None, None] * array if side == "w_lora_b" else array
    spec = spec and replace(spec, use_rslora=False, ranks={}, alphas={})
    mesh = support.make_mesh()
    _, base = support.open_checkpoint(ASSETS / "gemma3_tiny", mesh)
    logits = support.logits(support.make_program(TINY, spec, mesh), base, folded, np.array([TOKENS]))
    return np.asarray(jax.nn.log_softmax(logits[0, -1]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    write_base(path)
    return path


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS.keys())
def test_llama_cpp_computes_the_same_with_the_adapter(changes: dict, base: Path, tmp_path: Path) -> None:
    spec = support.full_spec(TINY, rank=4, alpha=2.0, **changes)
    adapters = host_adapters(spec, TINY)
    save_gguf_adapter(tmp_path / "adapter.gguf", adapters, spec, support.FAMILY, TINY)
    plain, adapted = our_log_probabilities({}, None), our_log_probabilities(adapters, spec)
    for theirs, ours in ((ask_llama_cpp(base, None), plain), (ask_llama_cpp(base, tmp_path / "adapter.gguf"), adapted)):
        assert len(theirs) == 40
        assert max(abs(value - ours[token]) for token, value in theirs.items()) < 0.002  # its GELU is a float16 table
    assert max(abs(value - plain[token]) for token, value in theirs.items()) > 1.0
