"""Encoder-decoders: T5 and its relatives, and T5Gemma."""

from typing import Any, NamedTuple

import numpy as np

from jax_it.data.encoded import Encoded
from jax_it.data.formats import Seq2SeqBatch, Seq2SeqFormat
from jax_it.data.packing import Shape
from tests.parity.case import Case, Shapes, centred

SOURCE_LENGTHS, TARGET_LENGTHS = (24, 13, 5), (10, 7, 3)


class Seq2SeqInputs(NamedTuple):
    """Sources and targets of several lengths, each with its end token, padded with 0; masks are 1 for tokens."""

    source_BS: np.ndarray
    source_mask_BS: np.ndarray
    target_BT: np.ndarray
    target_mask_BT: np.ndarray

    @property
    def mask_BT(self) -> np.ndarray:
        """Where logits mean something."""
        return self.target_mask_BT


def inputs(case: Case) -> Seq2SeqInputs:
    random = case.random
    first = start(case) + 1 if case.values["model_type"] == "t5gemma" else 2

    def padded(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
        tokens = random.randint(first, case.values["vocab_size"], mask.shape).astype(np.int32)
        tokens[np.arange(len(lengths)), np.array(lengths) - 1] = case.end_tokens[0]
        return tokens * mask, mask

    return Seq2SeqInputs(*padded(SOURCE_LENGTHS), *padded(TARGET_LENGTHS))


def start(case: Case) -> int:
    """The decoder's first token."""
    if case.values["model_type"] == "t5gemma":
        return case.values["decoder"]["bos_token_id"]
    return case.values["decoder_start_token_id"]


def batch(given: Seq2SeqInputs, start: int) -> Seq2SeqBatch:
    """The batch that jax_it's own data pipeline makes of them."""
    rows = [
        [Encoded(source[:s], target[:t], block=0)]
        for source, s, target, t in zip(given.source_BS, SOURCE_LENGTHS, given.target_BT, TARGET_LENGTHS, strict=True)
    ]
    return Seq2SeqFormat(start=start, pad=0).batch(rows, Shape(1, max(SOURCE_LENGTHS), max(TARGET_LENGTHS)))


def packed(given: Seq2SeqInputs, start: int) -> Seq2SeqBatch:
    """All of them in one row, whose sources share two blocks."""
    placed = [
        Encoded(source[:s], target[:t], block)
        for source, s, target, t, block in zip(
            given.source_BS, SOURCE_LENGTHS, given.target_BT, TARGET_LENGTHS, (0, 1, 1), strict=True
        )
    ]
    return Seq2SeqFormat(start=start, pad=0).batch([placed], Shape(2, max(SOURCE_LENGTHS), sum(TARGET_LENGTHS)))


def _t5_shapes(case: Case) -> Shapes:
    v = case.values
    width, inner = v["d_model"], v["num_heads"] * v["d_kv"]
    projection = v.get("feed_forward_proj", "relu" if v["model_type"] == "t5" else "gated-gelu")
    up = ("wi_0", "wi_1") if projection.startswith("gated-") else ("wi",)
    shapes: Shapes = {"shared.weight": (v["vocab_size"], width)}
    if case.untied:
        shapes["lm_head.weight"] = (v["vocab_size"], width)
    for stack, layers in (("encoder", v["num_layers"]), ("decoder", v.get("num_decoder_layers", v["num_layers"]))):
        for i in range(layers):
            kinds = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder") + ["DenseReluDense"]
            for j, kind in enumerate(kinds):
                layer = f"{stack}.block.{i}.layer.{j}"
                shapes[f"{layer}.layer_norm.weight"] = (width,)
                if kind == "DenseReluDense":
                    shapes |= {f"{layer}.{kind}.{name}.weight": (v["d_ff"], width) for name in up}
                    shapes[f"{layer}.{kind}.wo.weight"] = (width, v["d_ff"])
                else:
                    shapes |= {f"{layer}.{kind}.{name}.weight": (inner, width) for name in "qkv"}
                    shapes[f"{layer}.{kind}.o.weight"] = (width, inner)
                if kind == "SelfAttention" and (i == 0 or v["model_type"] == "umt5"):
                    buckets = v.get("relative_attention_num_buckets", 32)
                    shapes[f"{layer}.{kind}.relative_attention_bias.weight"] = (buckets, v["num_heads"])
        shapes[f"{stack}.final_layer_norm.weight"] = (width,)
    return shapes


def _draw_t5(case: Case, name: str, uniform: np.ndarray) -> np.ndarray:
    tensor = 0.5 + uniform if "norm" in name else _t5_deviation(case, name, uniform.shape) * centred(uniform)
    if name in ("shared.weight", "lm_head.weight"):
        tensor[case.values["eos_token_id"]] *= 2  # so that greedy generation meets it
    return tensor


def _t5_deviation(case: Case, name: str, shape: tuple[int, ...]) -> float:
    """The standard deviation with which a sum over the weight's inputs is of order 1."""
    if name == "shared.weight":
        # A tied head that is not scaled sums its rows as they are; mT5's never is.
        scaled = case.values["model_type"] != "mt5" and case.values.get("scale_decoder_outputs", True)
        return 1.0 if case.untied or scaled else shape[1] ** -0.5
    if "bias" in name:
        return 1.0
    if name == "lm_head.weight" and case.values["model_type"] == "umt5":
        return 1.0  # scaled though untied
    if name.endswith((".o.weight", ".wo.weight")):
        return 3 * shape[-1] ** -0.5  # or the residual is the token itself, and a tied head repeats it for ever
    query = case.values["d_kv"] ** -0.5 if name.endswith(".q.weight") else 1.0  # T5 does not scale scores
    return query * shape[-1] ** -0.5


def _t5gemma_shapes(case: Case) -> Shapes:
    encoder, decoder = case.values["encoder"], case.values["decoder"]
    shapes: Shapes = {}
    for stack, v in (("encoder", encoder), ("decoder", decoder)):
        width, size, hidden = v["hidden_size"], v["head_dim"], v["intermediate_size"]
        shapes[f"model.{stack}.embed_tokens.weight"] = (v["vocab_size"], width)
        shapes[f"model.{stack}.norm.weight"] = (width,)
        blocks = {"self_attn": width} | ({"cross_attn": encoder["hidden_size"]} if stack == "decoder" else {})
        for i in range(v["num_hidden_layers"]):
            layer = f"model.{stack}.layers.{i}"
            for block, read in blocks.items():
                shapes |= {
                    f"{layer}.pre_{block}_layernorm.weight": (width,),
                    f"{layer}.post_{block}_layernorm.weight": (width,),
                    f"{layer}.{block}.q_proj.weight": (v["num_attention_heads"] * size, width),
                    f"{layer}.{block}.k_proj.weight": (v["num_key_value_heads"] * size, read),
                    f"{layer}.{block}.v_proj.weight": (v["num_key_value_heads"] * size, read),
                    f"{layer}.{block}.o_proj.weight": (width, v["num_attention_heads"] * size),
                }
            shapes |= {
                f"{layer}.pre_feedforward_layernorm.weight": (width,),
                f"{layer}.post_feedforward_layernorm.weight": (width,),
                f"{layer}.mlp.gate_proj.weight": (hidden, width),
                f"{layer}.mlp.up_proj.weight": (hidden, width),
                f"{layer}.mlp.down_proj.weight": (width, hidden),
            }
    if case.untied:
        shapes["lm_head.out_proj.weight"] = (decoder["vocab_size"], decoder["hidden_size"])
    return shapes


def _draw_t5gemma(case: Case, name: str, uniform: np.ndarray) -> np.ndarray:
    if "norm" in name:
        return uniform - 0.5  # Gemma multiplies by 1 + weight
    tensor = centred(uniform) * uniform.shape[-1] ** -0.5  # embeddings too: they are multiplied by √width
    if "embed_tokens" in name or "lm_head" in name:
        tensor[case.end_tokens] *= 1.5
    return tensor


COMMON: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "use_cache": True,
    "vocab_size": 96,
}
# Few buckets and a short reach: the batch's distances meet exact, log-spaced and last buckets alike.
NEWER: dict[str, Any] = COMMON | {
    "num_decoder_layers": 2,
    "num_heads": 6,  # heads × head size is not the width, as in T5 1.1 small
    "relative_attention_max_distance": 16,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
}
T5: dict[str, Any] = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "n_positions": 512}


def _t5(name: str, values: dict[str, Any], untied: bool, dead: Shapes | None = None) -> Case:
    return Case(name, values, untied, _t5_shapes, _draw_t5, dead or {})


T5_CASES = [
    _t5(
        "t5",  # T5 1.0: ReLU, tied, scaled; keys that it lacks have their defaults
        COMMON
        | T5
        | {
            "relative_attention_num_buckets": 32,
            "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
        },
        untied=False,
        dead={"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)},
    ),
    # T5 1.1, LM-adapted, Flan-T5, T0
    _t5("t5_1_1", NEWER | T5 | {"feed_forward_proj": "gated-gelu", "num_layers": 3}, untied=True),
    # The same as Transformers 5 saves a model whose head is its embedding.
    _t5(
        "t5_1_1_tied",
        NEWER
        | T5
        | {
            "dense_act_fn": "gelu_new",
            "feed_forward_proj": "gated-gelu",
            "is_gated_act": True,
            "scale_decoder_outputs": False,
            "tie_word_embeddings": True,
        },
        untied=False,
    ),
    _t5("ul2", NEWER | T5 | {"feed_forward_proj": "gated-silu", "num_heads": 4}, untied=True),
    _t5(
        "byt5",  # deep encoder, shallow decoder, few tokens
        NEWER
        | T5
        | {
            "feed_forward_proj": "gated-gelu",
            "gradient_checkpointing": False,
            "num_decoder_layers": 1,
            "num_layers": 3,
            "tokenizer_class": "ByT5Tokenizer",
            "vocab_size": 384,
        },
        untied=True,
    ),
    _t5(
        "deep_decoder",
        NEWER | T5 | {"feed_forward_proj": "relu", "num_decoder_layers": 3, "num_layers": 1},
        untied=True,
    ),
    _t5(
        "mt5",
        NEWER
        | {
            "architectures": ["MT5ForConditionalGeneration"],
            "feed_forward_proj": "gated-gelu",
            "model_type": "mt5",
            "tokenizer_class": "T5Tokenizer",
        },
        untied=True,
    ),
    _t5("mt5_tied", NEWER | {"feed_forward_proj": "gated-gelu", "model_type": "mt5"}, untied=False),
    _t5(
        "umt5",
        NEWER
        | {
            "architectures": ["UMT5ForConditionalGeneration"],
            "classifier_dropout": 0.0,
            "dense_act_fn": "gelu_new",
            "feed_forward_proj": "gated-gelu",
            "is_gated_act": True,
            "model_type": "umt5",
            "num_layers": 3,
            "scalable_attention": True,
            "tokenizer_class": "T5Tokenizer",
            "torch_dtype": "float32",
        },
        untied=True,
    ),
    _t5("umt5_tied", NEWER | {"model_type": "umt5"}, untied=False),
]


def _module(**values: Any) -> dict[str, Any]:
    """An encoder or decoder of T5Gemma; caps and windows are small enough to be felt."""
    layers = values.pop("num_hidden_layers")
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 4.0,
        "bos_token_id": 2,
        "classifier_dropout_rate": 0.0,
        "dropout_rate": 0.0,
        "eos_token_id": 1,
        "final_logit_softcapping": 5.0,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(layers)],
        "max_position_embeddings": 64,
        "model_type": "t5_gemma_module",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 12,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": 96,
    } | values


def _t5gemma(name: str, encoder: dict[str, Any], decoder: dict[str, Any], untied: bool = False, seed: int = 0) -> Case:
    decoder = {
        **_module(**decoder),
        "cross_attention_hidden_size": encoder.get("hidden_size", 32),
        "is_decoder": True,
    }
    values = {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "attention_dropout": 0.0,
        "classifier_dropout_rate": 0.0,
        "decoder": decoder,
        "dropout_rate": 0.0,
        "encoder": _module(**encoder),
        "eos_token_id": [1, 3],
        "initializer_range": 0.02,
        "is_encoder_decoder": True,
        "model_type": "t5gemma",
        "pad_token_id": 0,
        "transformers_version": "4.53.0.dev0",
        "use_cache": True,
        "vocab_size": 96,
    }
    if untied:
        values["tie_word_embeddings"] = False
    return Case(name, values, untied, _t5gemma_shapes, _draw_t5gemma, seed=seed)


T5GEMMA_CASES = [
    _t5gemma("t5gemma", {"num_hidden_layers": 2}, {"num_hidden_layers": 2}),
    _t5gemma("t5gemma_untied", {"num_hidden_layers": 2}, {"num_hidden_layers": 3}, untied=True, seed=4),
    # Another depth and width, as of t5gemma-9b-2b.
    _t5gemma("t5gemma_wide", {"num_hidden_layers": 3, "hidden_size": 48}, {"num_hidden_layers": 2}, seed=29),
]
CASES = [*T5_CASES, *T5GEMMA_CASES]
