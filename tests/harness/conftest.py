"""Folders of tiny models, and tasks of lm_eval from files: what a user has, without a network."""

import json
from pathlib import Path

import jax
import pytest

import jax_it
from jax_it import config, models
from jax_it.data import tokenizer_files as tokenizers
from tests.data.chat_tokenizers import TEXTS, checkpoint

CAUSAL = {
    "model_type": "llama", "hidden_size": 32, "head_dim": 8, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
# Its head is the embedding: of others lm_eval 0.4.13 with Transformers 5 replaces the head by the embedding.
T5 = {
    "model_type": "t5", "feed_forward_proj": "gated-gelu", "d_model": 32, "d_kv": 8,
    "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20, "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip


def write(folder: Path, values: dict, tokenizer: tokenizers.Tokenizer) -> Path:
    """A model of random weights that depend on what was read, with its tokenizer."""
    values = {**values, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.end}
    model = models.build(values, "the test", config.Model(dropout=0.0 if values["model_type"] == "t5" else None))
    params = jax.jit(model.init)(jax.random.key(1))
    layers = params["layers"] if "layers" in params else params["decoder"]["layers"]
    layers["attention"]["output"] *= 4
    layers["mlp"]["down"] *= 2
    if "cross" in layers:
        layers["cross"]["output"] *= 6
    jax_it.save(folder, model, params, tokenizer)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """By the kind of tokenizer: one that begins no text ("smollm2"), one that does, and a T5."""
    root = tmp_path_factory.mktemp("models")
    made = {name: write(root / name, CAUSAL, checkpoint(name)) for name in ("smollm2", "llama3")}
    return made | {"t5": write(root / "t5", T5, tokenizers.train(TEXTS, 300))}


QUESTIONS = [
    ("Is grass green?", ["yes", "no", "sometimes, in spring"]),
    ("Who are you?", ["the model", "the user", "Hello"]),
    ("Say hello", ["Hello", "well", "I am well.\n"]),
    ("What is the colour of the sky, and why is it so, on a day without clouds?", ["blue", "a  b", "system"]),
]


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> Path:
    """A folder with tasks `choose`, `write` and `read`, their data beside them."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "options": options, "gold": i % 3} for i, (question, options) in enumerate(QUESTIONS)
    ]
    (root / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "data.jsonl")}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    made = {
        "choose": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{options}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "write": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}\n",
            "doc_to_target": "{{options[gold]}}",
            "generation_kwargs": {"until": ["\n\n", "e"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "read": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question * 4}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, task in made.items():  # YAML takes JSON
        (root / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    return root
