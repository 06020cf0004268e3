"""Tiny random models of every family, and the batch that they are compared on, made by numpy alone.

A case is a config.json as its authors published it (dead keys included), scaled down, and tensors
that follow from their names and shapes: nothing of them is stored, and nothing here asks jax_it what
a checkpoint holds. Weights have the scales that T5 begins training from, so that activations, logits
and gradients are of order 1 and a tolerance means the same in every case.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_it import config, losses, sharding
from jax_it.data.batches import Placed, Seq2SeqBatch, Seq2SeqFormat
from jax_it.data.packing import Shape
from jax_it.models import Model, Params, hf
from jax_it.models.weights import flatten

SOURCE_LENGTHS, TARGET_LENGTHS = (24, 13, 5), (10, 7, 3)
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Case:
    name: str
    values: Mapping[str, Any]  # config.json
    untied: bool  # the checkpoint has a head that differs from its embedding
    dead: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # published tensors that nobody reads


COMMON = {
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
NEWER = COMMON | {
    "num_decoder_layers": 2,
    "num_heads": 6,  # heads × head size is not the width, as in T5 1.1 small
    "relative_attention_max_distance": 16,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
}
T5 = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "n_positions": 512}

CASES = [
    Case(
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
    Case("t5_1_1", NEWER | T5 | {"feed_forward_proj": "gated-gelu", "num_layers": 3}, untied=True),
    # The same as Transformers 5 saves a model whose head is its embedding.
    Case(
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
    Case("ul2", NEWER | T5 | {"feed_forward_proj": "gated-silu", "num_heads": 4}, untied=True),
    Case(
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
    Case(
        "deep_decoder",
        NEWER | T5 | {"feed_forward_proj": "relu", "num_decoder_layers": 3, "num_layers": 1},
        untied=True,
    ),
    Case(
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
    Case("mt5_tied", NEWER | {"feed_forward_proj": "gated-gelu", "model_type": "mt5"}, untied=False),
    Case(
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
    Case("umt5_tied", NEWER | {"model_type": "umt5"}, untied=False),
]
BY_NAME = {case.name: case for case in CASES}


def tensor_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a checkpoint's tensors in Transformers' format."""
    v = case.values
    width, inner = v["d_model"], v["num_heads"] * v["d_kv"]
    projection = v.get("feed_forward_proj", "relu" if v["model_type"] == "t5" else "gated-gelu")
    up = ("wi_0", "wi_1") if projection.startswith("gated-") else ("wi",)
    shapes = {"shared.weight": (v["vocab_size"], width)}
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
    return shapes | case.dead


def tensors(case: Case, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A checkpoint's tensors: uniform, each drawn by a seed that is its name."""
    made = {}
    for name, shape in tensor_shapes(case).items():
        uniform = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
        # A uniform number's deviation is √(1/12).
        centred = math.sqrt(12) * (uniform - 0.5)
        tensor = 0.5 + uniform if "norm" in name else _deviation(case, name, shape) * centred
        if name in ("shared.weight", "lm_head.weight"):
            tensor[case.values["eos_token_id"]] *= 2  # so that greedy generation meets it
        made[name] = tensor.astype(np.float32).astype(DTYPES[dtype])
    return made


def _deviation(case: Case, name: str, shape: tuple[int, ...]) -> float:
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


class Inputs(NamedTuple):
    """Sources and targets of several lengths, each with its end token, padded with 0; masks are 1 for tokens."""

    source_BS: np.ndarray
    source_mask_BS: np.ndarray
    target_BT: np.ndarray
    target_mask_BT: np.ndarray


def inputs(case: Case) -> Inputs:
    random = np.random.RandomState(zlib.crc32(case.name.encode()))

    def padded(lengths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
        tokens = random.randint(2, case.values["vocab_size"], mask.shape).astype(np.int32)
        tokens[np.arange(len(lengths)), np.array(lengths) - 1] = case.values["eos_token_id"]
        return tokens * mask, mask

    return Inputs(*padded(SOURCE_LENGTHS), *padded(TARGET_LENGTHS))


def batch(given: Inputs) -> Seq2SeqBatch:
    """The batch that jax_it's own data pipeline makes of them."""
    rows = [
        [Placed(source[:s], target[:t], block=0)]
        for source, s, target, t in zip(given.source_BS, SOURCE_LENGTHS, given.target_BT, TARGET_LENGTHS, strict=True)
    ]
    return Seq2SeqFormat(start=0, pad=0).batch(rows, Shape(1, max(SOURCE_LENGTHS), max(TARGET_LENGTHS)))


def write(case: Case, folder: Path, dtype: str = "float32") -> Path:
    """Writes the case as a folder in Transformers' format."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**case.values, "torch_dtype": dtype}, indent=2))
    save_file(tensors(case, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **settings: Any) -> tuple[Model, Params]:
    """The folder's model and params on one device, through the reader that users get."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    return hf.load(config.Model(path=str(folder), **settings), mesh)


def digest(case: Case) -> str:
    """Changes with anything that PyTorch's results for the case depend on."""
    hashed = hashlib.sha256(json.dumps(dict(case.values), sort_keys=True).encode())
    for name, tensor in tensors(case).items():
        hashed.update(name.encode() + tensor.tobytes())
    for array in inputs(case):
        hashed.update(array.tobytes())
    return hashed.hexdigest()


class Results(NamedTuple):
    """What a model makes of a case's inputs."""

    logits_BTV: np.ndarray  # padded positions included: what stands there means nothing
    loss: float  # the mean over target tokens
    gradients: dict[str, np.ndarray]  # of the loss, by Transformers' names


def results(model: Model, params: Params, given: Inputs) -> Results:
    """jax_it's results, computed as in training: the loss in chunks, gradients by `jax.grad`."""
    arrays = batch(given)

    @jax.jit
    def compute(params: Params) -> Any:
        def loss_of(params: Params) -> Any:
            hidden_BTD = model.apply(params, arrays)
            head = model.head(params)
            loss, weight = losses.chunked_sum(
                losses.cross_entropy, model.logits, 4, head, hidden_BTD, arrays.targets_BT, arrays.weights_BT
            )
            return loss / weight, model.logits(head, hidden_BTD)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    (loss, logits_BTV), gradients = compute(params)
    return Results(np.asarray(logits_BTV), float(loss), by_name(model, gradients))


def by_name(model: Model, params: Params) -> dict[str, np.ndarray]:
    """A tree like the params as tensors with Transformers' names and layouts."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    return {
        name: weight.restore(leaves[path][i] if weight.stacked else leaves[path])
        for path, weight in model.weights.items()
        for i, name in enumerate(weight.names(leaves[path].shape))
    }


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, as a share of the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
