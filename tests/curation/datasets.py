"""What tests of several stages need: files of records, an `Input` on them, the command line."""

import gzip
import json
from pathlib import Path

import pytest

from jax_it import cli, workers
from jax_it.config import Source
from jax_it.curation import input
from jax_it.data import sources


def write(file: Path, records: list) -> str:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    file.write_bytes(gzip.compress(lines.encode()) if file.suffix == ".gz" else lines.encode())
    return str(file)


def read(file: Path) -> list[dict]:
    return [record.fields for record in sources.read(Source(path=str(file)))]


def data_of(*paths: str, folder: Path, number: int = 1, template: str = "auto") -> input.Input:
    return input.Input(input.sources_of(paths, template), "FILE", workers.Workers(number), folder)


def architectures(vocab_size: int) -> dict[str, dict]:
    """config.json of the smallest models, by kind."""
    return {
        "t5": {
            "model_type": "t5", "vocab_size": vocab_size, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
            "num_heads": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
        },
        "llama": {
            "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 16, "head_dim": 8,
            "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    }  # fmt: skip


def jax_it(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["data", *words])
    return left.value.code or 0
