"""config.json of models on the hub, as their authors published it: what a plan needs of them without a network."""

from typing import Any

_T5 = {
    "model_type": "t5", "vocab_size": 32128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "tie_word_embeddings": False,
    "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
}  # fmt: skip


def _t5(width: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {
        "d_model": width, "d_ff": feed_forward, "num_layers": layers, "num_decoder_layers": layers,
        "num_heads": heads, "d_kv": 64, "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    return _T5 | sizes | more


def _llama(width: int, feed_forward: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": width, "intermediate_size": feed_forward, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8,
    }  # fmt: skip
    return _LLAMA | sizes | more


_BASE: dict[str, Any] = {"eos_token_id": 128001}
_INSTRUCT: dict[str, Any] = {"eos_token_id": [128001, 128008, 128009]}

_T5_SIZES = {
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10240, 24, 64),
}
_LLAMA_SIZES = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}

PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"google/flan-t5-{name}": _t5(*sizes) for name, sizes in _T5_SIZES.items()},
    **{f"google/t5-v1_1-{name}": _t5(*sizes) for name, sizes in _T5_SIZES.items()},
    "google/flan-ul2": _t5(4096, 16384, 32, 16, d_kv=256, feed_forward_proj="gated-silu"),
    **{f"meta-llama/Llama-3.1-{name}": _llama(*sizes, **_BASE) for name, sizes in _LLAMA_SIZES.items()},
    **{f"meta-llama/Llama-3.1-{name}-Instruct": _llama(*sizes, **_INSTRUCT) for name, sizes in _LLAMA_SIZES.items()},
}
