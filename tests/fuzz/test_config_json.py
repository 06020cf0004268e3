"""Mutants of every family's config.json: the logits of PyTorch, or a refusal that names the field.

A field is given another value, or none, one or two (now and then three) at a time. Transformers builds a tiny model of
the mutant with random weights and saves it; jax_it reads that folder. What jax_it accepts must be a model that
Transformers can build, whose logits are finite, and the same.
"""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest

from jax_it import config, pretrained, sharding
from jax_it.data.encoded import Encoded
from jax_it.data.formats import CausalFormat, Seq2SeqFormat
from jax_it.data.packing import Shape
from jax_it.errors import UserError
from jax_it.models import build
from jax_it.models.config_json import HARMLESS
from jax_it.models.families import FAMILIES
from jax_it.pretrained import hf
from tests.fuzz.commands import Kind
from tests.fuzz.seeds import fuzz_cases
from tests.parity import causal_cases as causal
from tests.parity import seq2seq_cases as seq2seq

TOLERANCE = 1e-4  # of the largest logit
ABSENT = "<absent>"

BASES: dict[str, dict[str, Any]] = {
    **{case.values["model_type"]: dict(case.values) for case in [*causal.CASES[::-1], *seq2seq.CASES[::-1]]},
}

NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, 5, 7, 16, 64, -1, -8)
RATES: tuple[Any, ...] = (0.0, 0.1, 0.5, 1.0, 2.0, -1.0)
ROPES: tuple[Any, ...] = (
    {},
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    {"rope_theta": 50},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 4},
    {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5, "rope_theta": 1000.0},
    {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0,
     "original_max_position_embeddings": 32, "rope_theta": 20.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 2.0, "rope_theta": 20.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False, "rope_theta": 1},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16, "attention_factor": 0.8},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
     "original_max_position_embeddings": 16},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0],
     "factor": 3.0},
    {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]},
    {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0], "factor": 3.0},
    {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    {"rope_type": "none"},
    {"rope_type": "default", "rope_theta": 100.0, "scale": 2.0},
    {"full_attention": {"rope_type": "default", "rope_theta": 100.0}},
    {"full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
     "sliding_attention": {"rope_type": "default", "rope_theta": 30.0}},
    {"full_attention": None, "sliding_attention": {"rope_type": "yarn", "rope_theta": 30.0, "factor": 2.0}},
)  # fmt: skip
SIZES: tuple[Any, ...] = (16, 48, 33, 1, 0, -1)
LAYERS: tuple[Any, ...] = (1, 2, 3, 5, 0, -1)
HEADS: tuple[Any, ...] = (1, 2, 3, 4, 8, 0, -2)
ACTIVATIONS: tuple[Any, ...] = (
    "relu",
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "silu",
    "swish",
    "tanh",
    "gelu_fast",
    "",
)
IDS: tuple[Any, ...] = (0, 5, 95, 96, -1, [3, 4], [], [200], 10**9)
KINDS: tuple[Any, ...] = (
    ["full_attention"] * 2, ["sliding_attention"] * 2, ["sliding_attention", "full_attention"],
    ["full_attention", "sliding_attention", "full_attention"], ["sliding_attention"] * 3, [],
    ["chunked_attention"] * 2, ["attention"] * 2, ["sliding_attention", "full_attention"] * 2,
    ["full_attention"] * 7, ["sliding_attention"] * 4, ["sliding_attention"] * 5,
)  # fmt: skip
VALUES: dict[str, tuple[Any, ...]] = {
    "vocab_size": (64, 1, 0, -1), "num_hidden_layers": LAYERS, "num_layers": LAYERS, "num_decoder_layers": LAYERS,
    "n_layer": LAYERS, "hidden_size": SIZES, "d_model": SIZES, "n_embd": SIZES, "intermediate_size": SIZES,
    "d_ff": SIZES, "n_inner": SIZES, "moe_intermediate_size": SIZES, "num_attention_heads": HEADS, "num_heads": HEADS,
    "n_head": HEADS, "num_key_value_heads": HEADS, "head_dim": (8, 16, 7, 3, 1, 4, 0, -8), "d_kv": (16, 7, 1, 0, -8),
    "hidden_act": ACTIVATIONS, "hidden_activation": ACTIVATIONS, "activation_function": ACTIVATIONS,
    "feed_forward_proj": ("relu", "gelu", "gated-gelu", "gated-silu", "silu", "gated-relu", "gelu-gated", "", "gated-"),
    "rope_parameters": ROPES, "rope_scaling": ROPES, "rope_theta": (100.0, 7, 1, 0, -5.0, 1e30),
    "rotary_emb_base": (100.0, 7, 0), "rope_local_base_freq": (30.0, 0, 7),
    "partial_rotary_factor": (0.5, 0.75, 0.3, 0.0, 1.0, 2.0, -0.5), "rotary_pct": (0.5, 1.0, 0.3, 0.0, 2.0),
    "original_max_position_embeddings": (4, 16, 64, 1, 0), "max_position_embeddings": (16, 1024, 8, 1, 0, -1),
    "n_positions": (64, 30, 0), "n_ctx": (64, 16), "sliding_window": (3, 8, 1, 0, -1, 64, 4096), "layer_types": KINDS,
    "max_window_layers": (0, 1, 2, 28, -1), "sliding_window_pattern": (1, 2, 3, 6, 0, -2),
    "_sliding_window_pattern": (1, 2, 3), "no_rope_layers": ([1] * 5, [0] * 5, [1, 0, 1, 0, 1], [1, 2], [], [0] * 9),
    "no_rope_layer_interval": (1, 2, 4, 9, 0, -2), "rms_norm_eps": (1e-3, 0.1, 0.0, -1.0, 1e-30),
    "query_pre_attn_scalar": (8, 1, 0, -4, 3.5), "attn_logit_softcapping": (2.0, 0.0, -3.0, 30),
    "final_logit_softcapping": (2.0, 0.0, -3.0, 30), "num_experts": (2, 4, 8, 1, 0, -1),
    "num_local_experts": (2, 4, 8, 1, 0, -1), "num_experts_per_tok": (1, 2, 4, 9, 0, -1),
    "decoder_sparse_step": (1, 2, 0), "mlp_only_layers": ([], [0], [9]),
    "relative_attention_num_buckets": (32, 7, 8, 4, 3, 2, 1, 0, -8),
    "relative_attention_max_distance": (128, 9, 8, 4, 2, 1, 0, -1), "dropout_rate": RATES, "resid_pdrop": RATES,
    "embd_pdrop": RATES, "attn_pdrop": RATES, "attention_dropout": RATES, "hidden_dropout": RATES,
    "dense_act_fn": ("relu", "silu", "gelu_new"), "chunk_size_feed_forward": (0, 1),
    "dtype": ("float32", "bfloat16"), "torch_dtype": ("float32",), "architectures": (["X"],),
    "hidden_size_per_layer_input": (4,),
}  # fmt: skip
# Names that a config.json may have beside its class's fields: of older versions, aliases, other families'.
LEGACY = (
    "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings", "rotary_pct",
    "rotary_emb_base", "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern", "head_dim",
    "layer_types", "tie_word_embeddings", "decoder_start_token_id", "bos_token_id",
)  # fmt: skip
OTHERS = (
    "hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "num_experts",
    "num_local_experts", "sliding_window", "use_sliding_window", "max_window_layers", "dense_act_fn", "is_gated_act",
    "scale_decoder_outputs", "attention_bias", "mlp_bias", "lm_head_bias", "qkv_bias", "use_mrope", "use_qk_norm",
    "rope_interleaved", "is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "per_layer_config",
    "is_causal", "n_ctx", "hidden_act", "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention", "residual_multiplier", "rope_parameters",
)  # fmt: skip
HOSTILE: tuple[Any, ...] = (
    "", "32", "é\ud800", [], [[]], {}, {"a": 1}, [32], True, 1.5, float("nan"), float("inf"), -float("inf"), 10**400,
    -(10**25), 1e308, 1e-320, 2**31, 2**63, 2**64, None, [None], [[[[1]]]], "\x00", 32.0,
)  # fmt: skip


def config_class(kind: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


@functools.cache
def singles() -> list[tuple[str, str, Any]]:
    """(family, field, value) of every single mutation; a field of T5Gemma's halves has the half before it."""
    found = []
    for kind in FAMILIES:
        found += [(kind, name, value) for name, value in mutations(config_class(kind), BASES[kind])]
    half = config_class("t5gemma").sub_configs_defaults["encoder"].config_class
    for side in ("encoder", "decoder"):
        found += [("t5gemma", f"{side}.{name}", value) for name, value in mutations(half, BASES["t5gemma"][side])]
    return found


def mutations(kind: Any, base: dict[str, Any]) -> list[tuple[str, Any]]:
    """(field, value) of one config class: of its own fields and those that its rope or an older version reads, and a
    few values of the others."""
    own = {field.name: field.default for field in dataclasses.fields(kind)}
    read = {*own, *base, *(LEGACY if "rope_parameters" in own else ())}
    found = []
    for name in dict.fromkeys([*own, *base, *LEGACY, *kind.attribute_map, *OTHERS]):
        if name in VALUES:
            values = list(VALUES[name])
        elif name.endswith("_token_id"):
            values = list(IDS)
        else:
            default = own.get(name)
            values = {bool: [True, False], int: list(NUMBERS), float: [0.5, 0.0, 3.0]}.get(type(default), [True, "x"])
        values = [*values, None, ABSENT] if name in read else values[:2]
        found += [(name, value) for value in values]
    return found


def draw(seed: int) -> tuple[str, dict[str, Any]]:
    """A family and its mutated fields. Seeds that follow each other go through all single mutations."""
    random, all_of_them = Random(seed), singles()
    kind, name, value = all_of_them[seed * 7919 % len(all_of_them)]
    changes = {name: value}
    while random.random() < 0.45:
        _, name, value = random.choice(of_family(kind))
        changes[name] = value
    if random.random() < 0.15:
        name = random.choice([*changes, *BASES[kind]])
        changes[name] = random.choice(HOSTILE)
    return kind, changes


@functools.cache
def of_family(kind: str) -> list[tuple[str, str, Any]]:
    return [single for single in singles() if single[0] == kind]


def mutant(kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The family's config.json with the changes; for T5Gemma "encoder.x" is in its encoder."""
    made = json.loads(json.dumps({**BASES[kind], "torch_dtype": "float32"}))
    for name, value in changes.items():
        half, _, field = name.rpartition(".")
        inside = made.get(half) if half else made
        if not isinstance(inside, dict):
            continue
        if value == ABSENT:
            inside.pop(field or name, None)
        else:
            inside[field or name] = value
    return made


def random_model(values: dict[str, Any]) -> Any:
    """Transformers' model of a config.json, with weights of such a size that every part of it is felt."""
    import torch
    import transformers

    made = config_class(values["model_type"]).from_dict(json.loads(json.dumps(values)))
    made._experts_implementation = "eager"  # the others have rules of their own for sizes
    auto = transformers.AutoModelForSeq2SeqLM if made.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = auto.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                sharp = 0.25 if name.endswith(".q.weight") else 1.5  # T5 does not scale its scores
                weight.normal_(std=sharp * weight.shape[-1] ** -0.5)
            elif "bias" in name:
                weight.normal_(std=0.3)
            else:
                weight.uniform_(0.5, 1.5)
    return model


LENGTHS = (24, 7)


def texts(vocabulary: int, lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    return [np.random.RandomState(length).randint(0, vocabulary, length).astype(np.int32) for length in lengths]


def their_logits(model: Any, start: int, vocabulary: int) -> np.ndarray:
    """Logits [X, V] of every position of the texts, or targets, each computed alone."""
    import torch

    found = []
    with torch.no_grad():
        for text, target in zip(texts(vocabulary), texts(vocabulary, (9, 4)), strict=True):
            tokens = torch.from_numpy(text)[None].long()
            given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            if model.config.is_encoder_decoder:
                tokens = torch.from_numpy(np.concatenate([[start], target[:-1]]))[None].long()
                given |= {"decoder_input_ids": tokens, "decoder_attention_mask": torch.ones_like(tokens)}
            found.append(model(**given, return_dict=True).logits[0].numpy())
    return np.concatenate(found)


def load(model: Any, folder: Path) -> tuple[Any, Any]:
    """The model with the folder's weights, as `pretrained.load` reads them; the model is made once."""
    settings = config.Model(path=str(folder), dropout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "build", lambda *_: model)
        return pretrained.load(settings, sharding.make_mesh(config.Mesh(), jax.devices()[:1]))


def our_logits(model: Any, params: Any, vocabulary: int) -> np.ndarray:
    """The same of all texts in one row."""
    sources, targets = texts(vocabulary), texts(vocabulary, (9, 4))
    if model.kind == "seq2seq":
        placed = [Encoded(source, target, 0) for source, target in zip(sources, targets, strict=True)]
        batch: Any = Seq2SeqFormat(start=model.config.decoder_start_token_id, pad=0).batch([placed], Shape(1, 32, 16))
    else:
        placed = [Encoded(np.zeros(0, np.int32), text, 0, np.ones(len(text), bool)) for text in sources]
        batch = CausalFormat(0).batch([placed], Shape(0, 0, 32))
    with jax.disable_jit():  # operation by operation: these are compiled once for all mutants
        logits = model.logits(model.head(params), model.hidden_states(params, batch)[0])
    return np.asarray(logits)[0, : sum(map(len, targets if model.kind == "seq2seq" else sources))]


def check(seed: int, folder: Path) -> tuple[Kind, str]:
    kind, changes = draw(seed)
    return compare(kind, changes, folder, f"seed {seed}: ")


def compare(kind: str, changes: dict[str, Any], folder: Path, said: str = "") -> tuple[Kind, str]:
    said += f"{kind} with {changes!r}: "
    values = mutant(kind, changes)
    (folder / "config.json").write_text(json.dumps(values))
    settings = config.Model(path=str(folder), dropout=0.0)
    try:
        ours = build(*hf.read_config_json(settings), settings)
    except UserError as error:
        message = str(error)
        fields = {field for name in (*values, *changes) for field in name.split(".")}
        named = any(field in message for field in fields) and "\n" not in message and len(message) < 1000
        return ("refused" if named else "fault"), said + message
    except Exception as error:
        return "fault", f"{said}{type(error).__name__}: {error}"[:600]
    vocabulary = min(ours.config.vocab_size, 96)
    start = ours.config.decoder_start_token_id if ours.kind == "seq2seq" else 0
    try:
        theirs = random_model(values)
        logits = their_logits(theirs, start, vocabulary)
    except Exception as error:
        try:
            theirs = random_model(plain(values))
            logits = their_logits(theirs, start, vocabulary)
        except Exception:
            return "fault", f"{said}accepted, and Transformers says {type(error).__name__}: {error}"[:900]
    if not np.isfinite(logits).all():
        return "fault", f"{said}accepted, and PyTorch's logits are not finite"
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    try:
        found = our_logits(*load(ours, folder), vocabulary)
    except Exception as error:
        return "fault", f"{said}{type(error).__name__}: {error}"[:600]
    if ours.kind == "causal" and "eos_token_id" not in changes:
        ends = theirs.config.eos_token_id
        ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end in range(vocabulary)]
        if list(ours.config.eos_token_ids) != ends:
            return "fault", f"{said}texts end at {ours.config.eos_token_ids}, in Transformers at {ends}"
    if not relative(found, logits) <= TOLERANCE:
        # Rounding may grow in the model itself: then PyTorch's does too, but not alike. With one hidden unit, 1 + tanh
        # of GELU cancels to a few bits, which the norm after it makes large; JAX's tanh and PyTorch's round otherwise.
        exact = their_logits(theirs.double(), start, vocabulary)
        ours_off, theirs_off = relative(found, exact), relative(logits, exact)
        if not ours_off <= max(TOLERANCE, 16 * theirs_off):
            return "fault", f"{said}the logits are off by {ours_off:.1e}, PyTorch's float32 ones by {theirs_off:.1e}"
    return "ran", said


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def plain(values: dict[str, Any], kind: Any = None) -> dict[str, Any]:
    """The same config.json without what Transformers alone refuses and means nothing for logits: fields that say
    nothing of them, null for a default, an integer for a float, [x] for x.
    """
    kind = kind or config_class(values["model_type"])
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    made = {}
    for name, value in values.items():
        accepted = types.get(name, "")
        if name in HARMLESS - {"model_type", "n_positions"} or name == "auto_map":
            continue
        if isinstance(value, dict) and name in kind.sub_configs_defaults:
            value = plain(value, kind.sub_configs_defaults[name].config_class)
        if value is None and "None" not in accepted:
            continue
        if isinstance(value, list) and len(value) == 1 and "list" not in accepted:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and "float" in accepted and "int" not in accepted:
            value = float(value)
        made[name] = value
    return made


@fuzz_cases(2400, 12, chunk=200, marks=(pytest.mark.parity,))
def test_a_mutant_of_config_json_is_read_as_pytorch_reads_it_or_refused(seeds, tally):
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    with tempfile.TemporaryDirectory() as folder:
        tally(check(seed, Path(folder)) for seed in seeds)
    jax.clear_caches()  # hundreds of small programs


LINEAR = {"rope_type": "linear", "factor": 8.0}
BEFORE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0, "rope_theta": 50.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parity
@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        ("gemma3_text", {"num_hidden_layers": 4}, "ran"),
        ("gemma3_text", {"num_hidden_layers": 2, "layer_types": [SLIDING] * 2}, "ran"),
        ("gemma3_text", {"_sliding_window_pattern": 2}, "ran"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "refused"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "refused"),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}, "refused"),
        ("smollm3", {"no_rope_layers": [0] * 5}, "ran"),
        ("smollm3", {"layer_types": [SLIDING] * 5, "sliding_window": 3, "use_sliding_window": True}, "ran"),
        ("smollm3", {"layer_types": [SLIDING] * 5, "sliding_window": 3}, "refused"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 3}, "ran"),
        ("llama", {"partial_rotary_factor": 0.5}, "refused"),
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}, "ran"),
        ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 4}, "ran"),
        ("llama", {"rope_scaling": BEFORE | {"original_max_position_embeddings": 24}}, "ran"),
        ("llama", {"rope_scaling": YARN | {"factor": None}}, "ran"),
        ("phi3", {"rope_scaling": YARN}, "refused"),
        ("gemma2", {"attn_logit_softcapping": None, "hidden_activation": None}, "ran"),
        ("gemma2", {"sliding_window": None, "layer_types": [FULL] * 4}, "refused"),
        ("t5gemma", {"decoder.sliding_window": 0}, "refused"),
    ],
)
def test_what_was_once_read_otherwise(kind, changes, expected, tmp_path):
    found, said = compare(kind, changes, tmp_path)
    assert found == expected, said
