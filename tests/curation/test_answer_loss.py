"""An answer's loss, behind its prompt and alone, is that of the model's full forward pass."""

import jax
import numpy as np
import pytest

from jax_it import config, models, sharding
from jax_it.config import Data
from jax_it.curation.answer_loss import AnswerLosses
from jax_it.data.formats import pack_rows
from jax_it.data.packing import Layout
from jax_it.data.templates import Example, Turn
from jax_it.run import Run
from tests.data.letters import LETTERS

ARCHITECTURES = {
    "t5": {
        "model_type": "t5", "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": 0,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "head_dim": 8, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    },
}  # fmt: skip
EXAMPLES = [("abc def", "gh"), ("a", "bcdefgh ab"), ("hgfedcba", "a b c d"), ("ab", "")]


def example(prompt, answer):
    return Example((Turn("user", prompt), Turn("assistant", answer)), (answer,))
