"""Causal models: each family's config.json as published, scaled down, and the tensors that its checkpoints hold.

Windows, caps and rope's original lengths are small enough to be felt within the batch's 24 positions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jax_it.data.formats import CausalBatch
from tests.parity.case import Case, Shapes, centred

LENGTHS = (24, 13, 5)
END = 2


class CausalInputs(NamedTuple):
    """Texts of several lengths, each with its end token, padded with 0; the mask is 1 for tokens."""

    tokens_BT: np.ndarray
    mask_BT: np.ndarray

    @property
    def prompts(self) -> list[list[int]]:
        """What generation continues: the texts without their end tokens."""
        return [row[: length - 1].tolist() for row, length in zip(self.tokens_BT, self.mask_BT.sum(1), strict=True)]


def inputs(case: Case) -> CausalInputs:
    random = case.random
    mask_BT = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32)
    tokens_BT = random.randint(5, case.values["vocab_size"], mask_BT.shape).astype(np.int32)
    tokens_BT[np.arange(len(LENGTHS)), np.array(LENGTHS) - 1] = case.end_tokens[0]
    return CausalInputs(tokens_BT * mask_BT, mask_BT)


def batch(given: CausalInputs) -> CausalBatch:
    """A row for each text."""
    return _batch([[text] for text in _texts(given)], given.tokens_BT.shape[1])


def packed(given: CausalInputs) -> CausalBatch:
    """All texts in one row, and some padding."""
    return _batch([_texts(given)], int(given.mask_BT.sum()) + 3)


def _texts(given: CausalInputs) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(given.tokens_BT, given.mask_BT.sum(1), strict=True)]


def _batch(rows: list[list[np.ndarray]], length: int) -> CausalBatch:
    tokens, targets, segments, positions = np.zeros((4, len(rows), length), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, texts in enumerate(rows):
        at = 0
        for segment, text in enumerate(texts, 1):
            here = (row, slice(at, at + len(text)))
            tokens[here], segments[here], positions[here] = text, segment, np.arange(len(text))
            targets[row, at : at + len(text) - 1] = text[1:]  # the last token has no target
            weights[row, at : at + len(text) - 1] = 1
            at += len(text)
    return CausalBatch(tokens, targets, weights, segments, positions)


# Tensors.


def _sizes(v: Any) -> tuple[int, int, int, int]:
    """The width, and the sizes of queries, of keys and of a head."""
    heads = v["num_attention_heads"]
    head = v.get("head_dim") or v["hidden_size"] // heads
    return v["hidden_size"], heads * head, (v.get("num_key_value_heads") or heads) * head, head


def _attention(case: Case, layer: str) -> Shapes:
    v = case.values
    width, query, key, head = _sizes(v)
    kind = v["model_type"]
    if kind == "phi3":
        return {
            f"{layer}.self_attn.qkv_proj.weight": (query + 2 * key, width),
            f"{layer}.self_attn.o_proj.weight": (width, query),
        }
    shapes = {
        f"{layer}.self_attn.q_proj.weight": (query, width),
        f"{layer}.self_attn.k_proj.weight": (key, width),
        f"{layer}.self_attn.v_proj.weight": (key, width),
        f"{layer}.self_attn.o_proj.weight": (width, query),
    }
    if kind == "qwen2" or v.get("attention_bias"):
        sizes = {"q": query, "k": key, "v": key}
        shapes |= {f"{layer}.self_attn.{name}_proj.bias": (size,) for name, size in sizes.items()}
    if v.get("attention_bias") and kind != "glm4":
        shapes[f"{layer}.self_attn.o_proj.bias"] = (width,)
    if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (head,) for name in "qk"}
    if kind in ("olmo2", "olmo3"):  # over all heads at once
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (size,) for name, size in (("q", query), ("k", key))}
    return shapes


def _feed_forward(case: Case, layer: str) -> Shapes:
    v = case.values
    width, hidden = v["hidden_size"], v["intermediate_size"]
    if v["model_type"] in ("phi3", "glm4"):
        return {
            f"{layer}.mlp.gate_up_proj.weight": (2 * hidden, width),
            f"{layer}.mlp.down_proj.weight": (width, hidden),
        }
    if v["model_type"] == "mixtral":
        block, experts, (gate, up, down) = "block_sparse_moe", v["num_local_experts"], ("w1", "w3", "w2")
    elif v["model_type"] == "qwen3_moe":
        block, experts, (gate, up, down) = (
            "mlp",
            v.get("num_experts") or v["num_local_experts"],
            ("gate_proj", "up_proj", "down_proj"),
        )
        hidden = v["moe_intermediate_size"]
    else:
        shapes = {f"{layer}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
        if v.get("mlp_bias"):
            shapes |= {f"{layer}.mlp.{name}_proj.bias": (hidden,) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.down_proj.bias"] = (width,)
        return shapes
    shapes = {f"{layer}.{block}.gate.weight": (experts, width)}
    for i in range(experts):
        shapes |= {f"{layer}.{block}.experts.{i}.{name}.weight": (hidden, width) for name in (gate, up)}
        shapes[f"{layer}.{block}.experts.{i}.{down}.weight"] = (width, hidden)
    return shapes


NORMS = {
    "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "gemma3_text": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
    "olmo2": ("post_attention", "post_feedforward"),
    "olmo3": ("post_attention", "post_feedforward"),
    "glm4": ("input", "post_self_attn", "post_attention", "post_mlp"),
}


def _llama_shapes(case: Case) -> Shapes:
    """Of all whose names are Llama's: every family but the two GPTs."""
    v = case.values
    width = v["hidden_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (v["vocab_size"], width), "model.norm.weight": (width,)}
    if case.untied:
        shapes["lm_head.weight"] = (v["vocab_size"], width)
    for i in range(v["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= _attention(case, layer) | _feed_forward(case, layer)
        for norm in NORMS.get(v["model_type"], ("input", "post_attention")):
            shapes[f"{layer}.{norm}_layernorm.weight"] = (width,)
    return shapes


def _gpt2_shapes(case: Case) -> Shapes:
    v = case.values
    width = v["n_embd"]
    # The oldest checkpoints were saved without a head around them.
    at = "transformer." if case.name == "gpt2_saved" else ""
    shapes: Shapes = {f"{at}wte.weight": (v["vocab_size"], width), f"{at}wpe.weight": (v["n_positions"], width)}
    # A Conv1D's weight is [in, out].
    linear = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for i in range(v["n_layer"]):
        for name, shape in linear.items():
            shapes |= {f"{at}h.{i}.{name}.weight": shape, f"{at}h.{i}.{name}.bias": shape[1:]}
        shapes |= {f"{at}h.{i}.ln_{j}.{part}": (width,) for j in (1, 2) for part in ("weight", "bias")}
    return shapes | {f"{at}ln_f.{part}": (width,) for part in ("weight", "bias")}


def _gpt_neox_shapes(case: Case) -> Shapes:
    v = case.values
    width, hidden = v["hidden_size"], v["intermediate_size"]
    shapes: Shapes = {"gpt_neox.embed_in.weight": (v["vocab_size"], width)}
    if case.untied:
        shapes["embed_out.weight"] = (v["vocab_size"], width)
    linear = {
        "attention.query_key_value": (3 * width, width),
        "attention.dense": (width, width),
        "mlp.dense_h_to_4h": (hidden, width),
        "mlp.dense_4h_to_h": (width, hidden),
    }
    for i in range(v["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}"
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{norm}.{part}": (width,) for part in ("weight", "bias")}
    return shapes | {f"gpt_neox.final_layer_norm.{part}": (width,) for part in ("weight", "bias")}


EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "embed_in.weight", "embed_out.weight", "wte.weight")
# Their inputs are averages, or products of a gate: three times as large, they count beside the residual.
OUTPUTS = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h", "w2")


def _draw(case: Case, name: str, uniform: np.ndarray) -> np.ndarray:
    if name.endswith((".attn.bias", ".attention.bias")):  # a dead mask
        return np.tril(np.ones_like(uniform))
    if uniform.ndim <= 1:
        if name.endswith(".bias"):
            # Most are added to the residual, or make the same tokens likely everywhere.
            return (0.5 if "query" in name or "attn" in name else 0.1) * centred(uniform)
        # Gemma multiplies by 1 + weight.
        return uniform - 0.5 if case.values["model_type"].startswith("gemma") else 0.5 + uniform
    inputs = uniform.shape[0] if ".c_" in name else uniform.shape[-1]
    deviation = inputs**-0.5 * (3 if any(f"{part}." in name for part in OUTPUTS) else 1)
    if name.endswith(("embed_tokens.weight", "embed_in.weight")) and case.untied:
        deviation = 1.0
    tensor = deviation * centred(uniform)
    if name.endswith(EMBEDDINGS):
        tensor[case.end_tokens] *= 1.5  # so that greedy generation meets them
    return tensor


# Configurations.


def _config(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The base with some values changed or added; those that are `...` are left out."""
    return {key: value for key, value in (base | changes).items() if value is not ...}


# Whose texts vary, without ties; 0 for the others.
SEEDS = {
    "llama2": 1, "llama3_tied": 4, "llama_biased": 2, "mistral": 2, "mistral_nemo": 3, "qwen2_untied": 3,
    "qwen2_window": 2, "gemma": 32, "gemma2": 25, "gemma3_linear": 38, "olmo2": 1, "gpt2": 21, "gpt2_saved": 1,
    "gpt_neox": 34, "gpt_neox_serial": 2, "qwen3_moe": 1, "qwen3_moe_unnormed": 1, "llama3_saved": 2,
    "qwen3_saved": 6, "gemma3_saved": 33,
}  # fmt: skip


def _case(
    name: str,
    values: dict[str, Any],
    untied: bool = False,
    dead: Shapes | None = None,
    shapes: Callable[[Case], Shapes] = _llama_shapes,
) -> Case:
    return Case(name, values, untied, shapes, _draw, dead or {}, SEEDS.get(name, 0))


LLAMA_2: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 96,
}
LLAMA_3 = _config(
    LLAMA_2,
    _name_or_path=...,
    attention_bias=False,
    attention_dropout=0.0,
    eos_token_id=[END, 3, 4],
    mlp_bias=False,
    num_key_value_heads=2,
    rope_theta=500000.0,
    transformers_version="4.43.0.dev0",
)
# Of the wavelengths 6, 169, … the first stays, the next is in between or slowed down.
LLAMA_3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
SMOLLM2 = _config(
    LLAMA_2,
    _name_or_path=...,
    attention_bias=False,
    attention_dropout=0.0,
    initializer_range=0.041666666666666664,
    is_llama_config=True,
    mlp_bias=False,
    num_attention_heads=6,
    hidden_size=48,
    num_key_value_heads=2,
    pad_token_id=0,
    rope_interleaved=False,
    rope_theta=100000,
    tie_word_embeddings=True,
    transformers_version="4.42.3",
    **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
)
LLAMA_CASES = [
    # The first exports held rope's frequencies as weights.
    _case("llama2", LLAMA_2, True, {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": (4,) for i in range(2)}),
    _case("llama3", _config(LLAMA_3, rope_scaling=LLAMA_3_ROPE), True),
    # Llama 3.2: tied, and heads whose sizes do not make up the width.
    _case(
        "llama3_tied",
        _config(
            LLAMA_3,
            head_dim=16,
            rope_scaling=LLAMA_3_ROPE | {"factor": 32.0, "original_max_position_embeddings": 512},
            tie_word_embeddings=True,
        ),
    ),
    _case("llama_linear", _config(LLAMA_2, rope_scaling={"factor": 4.0, "type": "linear"}), True),
    _case("llama_biased", _config(LLAMA_3, attention_bias=True, mlp_bias=True), True),
    _case("smollm2", SMOLLM2),
    _case(
        "smollm3",
        {
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": END,
            "hidden_act": "silu",
            "hidden_size": 32,
            "initializer_range": 0.02,
            "intermediate_size": 48,
            "layer_types": ["full_attention"] * 5,
            "max_position_embeddings": 64,
            "max_window_layers": 28,
            "mlp_bias": False,
            "model_type": "smollm3",
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0, 1],
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "pad_token_id": 4,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "transformers_version": "4.54.0.dev0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 96,
        },
    ),
]

MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 8,
    "tie_word_embeddings": False,
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 96,
}
MISTRAL_CASES = [
    _case("mistral", MISTRAL, True),
    # Nemo: no window, and a head size of its own.
    _case("mistral_nemo", _config(MISTRAL, head_dim=16, rope_theta=1000000.0, sliding_window=None), True),
]

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": END,
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "max_window_layers": 2,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 8,  # and not used, unless `use_sliding_window` says so
    "tie_word_embeddings": True,
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 96,
}
QWEN3 = _config(
    QWEN2,
    architectures=["Qwen3ForCausalLM"],
    attention_bias=False,
    head_dim=16,
    model_type="qwen3",
    num_hidden_layers=3,
    rope_scaling=None,
    sliding_window=None,
    transformers_version="4.51.0",
    use_mrope=...,
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "rope_type": "yarn"}
QWEN_CASES = [
    _case("qwen2", QWEN2),
    _case("qwen2_untied", _config(QWEN2, tie_word_embeddings=False, use_mrope=...), True),
    _case("qwen2_window", _config(QWEN2, max_window_layers=1, num_hidden_layers=3, use_sliding_window=True)),
    _case("qwen3", QWEN3),
    _case("qwen3_yarn", _config(QWEN3, rope_scaling=YARN, tie_word_embeddings=False), True),
]

GEMMA: dict[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 16,
    "hidden_act": "gelu",  # and gelu_pytorch_tanh is meant
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "gemma",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "transformers_version": "4.38.1",
    "use_cache": True,
    "vocab_size": 96,
}
GEMMA_2 = _config(
    GEMMA,
    architectures=["Gemma2ForCausalLM"],
    attn_logit_softcapping=4.0,
    cache_implementation="hybrid",
    final_logit_softcapping=5.0,
    hidden_act="gelu_pytorch_tanh",
    model_type="gemma2",
    num_hidden_layers=4,
    num_key_value_heads=2,
    query_pre_attn_scalar=12,
    rope_scaling=...,
    sliding_window=8,
    transformers_version="4.42.4",
)
GEMMA_3 = _config(
    GEMMA_2,
    architectures=["Gemma3ForCausalLM"],
    attn_logit_softcapping=None,
    eos_token_id=[1, 3],
    final_logit_softcapping=None,
    hidden_act=...,
    model_type="gemma3_text",
    num_hidden_layers=7,
    num_key_value_heads=1,
    rope_local_base_freq=100.0,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=8,
    sliding_window_pattern=6,
    transformers_version="4.50.0.dev0",
)
GEMMA_CASES = [
    _case("gemma", GEMMA),
    _case("gemma2", GEMMA_2),
    # Five local layers before each global one, and one left over.
    _case("gemma3", GEMMA_3),
    _case(
        "gemma3_linear",
        _config(
            GEMMA_3, num_hidden_layers=4, rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window_pattern=2
        ),
    ),
]

PHI_3: dict[str, Any] = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "phi3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 64,
    "pad_token_id": END,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 9,
    "tie_word_embeddings": False,
    "transformers_version": "4.40.2",
    "use_cache": True,
    "vocab_size": 96,
}
PHI_4 = _config(
    PHI_3, _name_or_path="Phi-4", auto_map=..., num_key_value_heads=2, rope_theta=250000, sliding_window=None
)
# 12 of each head's 16 dimensions turn, by 6 frequencies.
PHI_4_MINI = _config(
    PHI_3,
    _name_or_path="Phi-4-mini-instruct",
    full_attn_mod=1,
    hidden_size=64,
    interpolate_factor=1,
    lm_head_bias=False,
    max_position_embeddings=256,
    mlp_bias=False,
    num_key_value_heads=2,
    partial_rotary_factor=0.75,
    rope_scaling={
        "long_factor": [1, 1.25, 1.5, 2.5, 8.0, 16.0],
        "short_factor": [1.0, 1.0, 1.1, 1.25, 1.5, 2.0],
        "type": "longrope",
    },
    sliding_window=262144,
    tie_word_embeddings=True,
    transformers_version="4.45.0",
)
PHI_CASES = [
    _case("phi3", PHI_3, True),
    _case("phi4", PHI_4, True),
    # All positions below the original length, or (of every text, and of what generation makes of it) some beyond.
    _case("phi4_mini", PHI_4_MINI),
    _case("phi4_mini_long", _config(PHI_4_MINI, max_position_embeddings=48, original_max_position_embeddings=3)),
]

OLMO_2: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": END,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "olmo2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "transformers_version": "4.47.0.dev0",
    "use_cache": True,
    "vocab_size": 96,
}

OLMO_3 = _config(
    OLMO_2,
    architectures=["Olmo3ForCausalLM"],
    layer_types=[*["sliding_attention"] * 3, "full_attention", "sliding_attention"],  # a period, and one left over
    max_position_embeddings=256,
    model_type="olmo3",
    num_hidden_layers=5,
    rope_scaling={
        "attention_factor": 1.2, "beta_fast": 4, "beta_slow": 1, "factor": 8.0,
        "original_max_position_embeddings": 32, "rope_type": "yarn",
    },
    sliding_window=8,
    transformers_version="4.57.0.dev0",
)  # fmt: skip
GRANITE = _config(
    LLAMA_3,
    architectures=["GraniteForCausalLM"],
    attention_multiplier=0.4,
    embedding_multiplier=6.0,
    logits_scaling=3.0,
    model_type="granite",
    pretraining_tp=...,
    residual_multiplier=0.6,
    rms_norm_eps=1e-05,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    transformers_version="4.46.0.dev0",
)
GLM_4: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [END, 3],
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "glm4",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 4,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.51.0.dev0",
    "use_cache": True,
    "vocab_size": 96,
}

GPT_2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": END,
    "embd_pdrop": 0.1,
    "eos_token_id": END,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 48,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 48,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 96,
}
GPT_NEOX: dict[str, Any] = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": END,
    "eos_token_id": END,
    "hidden_act": "gelu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 48,
    "model_type": "gpt_neox",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "transformers_version": "4.24.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 96,
}
GPT_CASES = [
    _case("gpt2", GPT_2, dead={f"h.{i}.attn.bias": (1, 1, 48, 48) for i in range(2)}, shapes=_gpt2_shapes),
    _case("gpt2_saved", GPT_2, shapes=_gpt2_shapes),
    _case(
        "gpt_neox",  # Pythia
        GPT_NEOX,
        True,
        {
            f"gpt_neox.layers.{i}.attention.{name}": shape
            for i in range(2)
            for name, shape in {"bias": (1, 1, 48, 48), "masked_bias": (), "rotary_emb.inv_freq": (2,)}.items()
        },
        _gpt_neox_shapes,
    ),
    _case(
        "gpt_neox_serial",  # RedPajama-INCITE
        _config(GPT_NEOX, attention_dropout=0.0, hidden_dropout=0.0, rotary_pct=1.0, use_parallel_residual=False),
        True,
        shapes=_gpt_neox_shapes,
    ),
]

MIXTRAL = _config(
    MISTRAL,
    architectures=["MixtralForCausalLM"],
    attention_dropout=0.0,
    model_type="mixtral",
    num_experts_per_tok=2,
    num_local_experts=4,
    output_router_logits=False,
    rope_theta=1000000.0,
    router_aux_loss_coef=0.02,
    sliding_window=None,
    transformers_version="4.36.0.dev0",
)
QWEN3_MOE = _config(
    QWEN3,
    architectures=["Qwen3MoeForCausalLM"],
    decoder_sparse_step=1,
    mlp_only_layers=[],
    model_type="qwen3_moe",
    moe_intermediate_size=24,
    norm_topk_prob=True,
    num_experts=6,
    num_experts_per_tok=3,
    num_hidden_layers=2,
    output_router_logits=False,
    router_aux_loss_coef=0.001,
    tie_word_embeddings=False,
)
MIXTURE_CASES = [
    _case("mixtral", MIXTRAL, True),
    _case("qwen3_moe", QWEN3_MOE, True),
    _case("qwen3_moe_unnormed", _config(QWEN3_MOE, norm_topk_prob=False), True),
]

# As Transformers 5 itself writes them.
SAVED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "float32",
    "pad_token_id": None,
    "rope_scaling": ...,
    "rope_theta": ...,
    "transformers_version": "5.23.0",
}
SAVED_CASES = [
    _case(
        "llama3_saved",
        _config(LLAMA_3, **SAVED, head_dim=8, rope_parameters=LLAMA_3_ROPE | {"rope_theta": 500000.0}, bos_token_id=1),
        True,
    ),
    _case(
        "qwen3_saved",
        _config(
            QWEN3,
            **SAVED,
            layer_types=["full_attention"] * 3,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        ),
    ),
    _case(
        "gemma3_saved",
        _config(
            GEMMA_3,
            **SAVED | {"pad_token_id": 0},
            _sliding_window_pattern=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_hidden_layers=4,
            rope_local_base_freq=...,
            rope_parameters={
                "full_attention": {"factor": 8.0, "rope_theta": 1000000, "rope_type": "linear"},
                "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
            },
            sliding_window_pattern=2,
            tie_word_embeddings=True,
            use_bidirectional_attention=False,
        ),
    ),
    _case(
        "qwen3_moe_saved",
        _config(
            QWEN3_MOE,
            **SAVED,
            num_experts=...,
            num_local_experts=6,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
        ),
        True,
    ),
]

CASES = [
    *LLAMA_CASES,
    *MISTRAL_CASES,
    *QWEN_CASES,
    *GEMMA_CASES,
    *PHI_CASES,
    _case("olmo2", OLMO_2, True),
    _case("olmo3", OLMO_3, True),
    _case("granite", GRANITE),
    _case("glm4", GLM_4, True),
    *GPT_CASES,
    *MIXTURE_CASES,
    *SAVED_CASES,
]


def is_mixture(case: Case) -> bool:
    """Whether the case has experts and a router."""
    return case.values["model_type"] in ("mixtral", "qwen3_moe")
