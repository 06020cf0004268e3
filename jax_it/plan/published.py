"""config.json of models on the hub, as their authors published it, so that a plan of them needs no network."""

from typing import Any


def _t5(d_model: int, d_ff: int, layers: int, heads: int, d_kv: int = 64, act: str = "gated-gelu") -> dict[str, Any]:
    return {
        "model_type": "t5", "vocab_size": 32128, "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        "d_model": d_model, "d_ff": d_ff, "num_layers": layers, "num_decoder_layers": layers, "num_heads": heads,
        "d_kv": d_kv, "feed_forward_proj": act,
    }  # fmt: skip


def _llama(hidden: int, intermediate: int, layers: int, heads: int, eos: int | list[int]) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": 128256, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": eos,
        "rope_scaling": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8,
    }  # fmt: skip


_T5 = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16),
       "xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}  # fmt: skip
_LLAMA = {"8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64)}

_GEMMA_2_9B = {
    "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
    "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False,
    "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_SMOLLM3_3B = {
    "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "no_rope_layer_interval": 4, "attention_bias": False,
    "max_position_embeddings": 65536, "tie_word_embeddings": True,
    "bos_token_id": 128000, "eos_token_id": 128012, "pad_token_id": 128004,
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    **{f"google/{name}-{size}": _t5(*sizes) for name in ("flan-t5", "t5-v1_1") for size, sizes in _T5.items()},
    "google/gemma-2-9b": _GEMMA_2_9B,
    "google/gemma-2-9b-it": _GEMMA_2_9B | {"eos_token_id": [1, 107]},
    "HuggingFaceTB/SmolLM3-3B": _SMOLLM3_3B,
    "google/flan-ul2": _t5(4096, 16384, 32, 16, 256, "gated-silu"),
    **{f"meta-llama/Llama-3.1-{size}": _llama(*sizes, 128001) for size, sizes in _LLAMA.items()},
    **{
        f"meta-llama/Llama-3.1-{size}-Instruct": _llama(*sizes, [128001, 128008, 128009])
        for size, sizes in _LLAMA.items()
    },
}
