"""Other engines that take our exports: CTranslate2 writes the same greedy text, on a CPU in float32."""

from pathlib import Path

import pytest

import jax_it
from jax_it.data import tokenizer_files as tokenizers
from tests.data.chat_tokenizers import TEXTS, checkpoint
from tests.harness.conftest import CAUSAL, T5, write

pytestmark = pytest.mark.parity

PROMPTS = ["Is grass green?", "Who are you?", "Translate into German: the blue hat", "Say hello"]


def converted(folder: Path, compute_type: str) -> Path:
    """What `ct2-transformers-converter` makes of a folder."""
    from ctranslate2.converters import TransformersConverter

    return Path(TransformersConverter(str(folder)).convert(str(folder / compute_type), quantization=compute_type))


def ours(folder: Path) -> list[str]:
    model, params, tokenizer = jax_it.load(str(folder))
    return jax_it.generate(model, params, tokenizer, PROMPTS, max_new_tokens=12, raw=True)


def test_a_t5_gives_the_same_greedy_text_in_float32_and_a_text_in_int8(tmp_path):
    import ctranslate2

    folder = write(tmp_path / "t5", T5, tokenizers.train(TEXTS, 300))
    tokenizer = tokenizers.load(str(folder)).backend
    texts = {}
    for compute_type in ("float32", "int8"):
        translator = ctranslate2.Translator(str(converted(folder, compute_type)), "cpu", compute_type=compute_type)
        source = [tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids) for prompt in PROMPTS]
        found = translator.translate_batch(source, beam_size=1, max_decoding_length=12)
        tokens = [tokenizer.convert_tokens_to_ids(each.hypotheses[0]) for each in found]
        texts[compute_type] = [tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
    assert texts["float32"] == ours(folder)
    assert all(texts["int8"])


def test_a_llama_gives_the_same_greedy_text(tmp_path):
    import ctranslate2

    folder = write(tmp_path / "llama", CAUSAL, checkpoint("smollm2"))
    tokenizer = tokenizers.load(str(folder)).backend
    generator = ctranslate2.Generator(str(converted(folder, "float32")), "cpu", compute_type="float32")
    start = [tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    found = generator.generate_batch(start, sampling_topk=1, max_length=12, include_prompt_in_result=False)
    texts = [tokenizer.decode(each.sequences_ids[0], skip_special_tokens=True) for each in found]
    assert texts == ours(folder)
