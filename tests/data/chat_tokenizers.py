"""Small tokenizers of the real kinds, trained here, with the marks of the checkpoints whose templates are tested."""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jax_it.data import builtin
from jax_it.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
TEXTS = [text for row in builtin.records("test") for text in (row["prompt"], row["completion"])]
TEXTS += ["system user assistant model", "\n\n", "  a  b", "Hello\n\nHello", "I am well.\n"] * 50

# How Llama 3 and Qwen split text before merging: line ends stay together.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Kind(NamedTuple):
    """What a checkpoint's tokenizer is like."""

    model: str  # "gpt2", "llama3", "qwen", "llama2" (a space before every text), "metaspace" or "gemma"
    end: str  # of a text
    special: tuple[str, ...] = ()
    start: str | None = None
    adds_start: bool = False
    rstrip: bool = False  # special tokens swallow the blanks after them


def made(kind: Kind, template: str | None, name: str = "a checkpoint") -> Tokenizer:
    """The tokenizer of a checkpoint, with its chat template."""
    backend = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_trained(kind)),
        eos_token=kind.end, bos_token=kind.start, chat_template=template,
    )  # fmt: skip
    return Tokenizer(backend, name)


def template(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def _trained(kind: Kind) -> str:
    of_bytes = kind.model in ("gpt2", "llama3", "qwen")
    built = tokenizers.Tokenizer(models.BPE(byte_fallback=not of_bytes, fuse_unk=True))
    alphabet = []
    if of_bytes:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind.model == "gpt2")
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
        built.pre_tokenizer = byte_level if kind.model == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
        built.decoder = decoders.ByteLevel()
        if kind.model == "qwen":
            built.normalizer = normalizers.NFC()
    else:
        space = normalizers.Replace(" ", "▁")
        if kind.model == "llama2":
            built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        elif kind.model == "metaspace":
            built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            built.normalizer = space
            built.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        built.decoder = decoders.Sequence(parts + ([] if kind.model == "gemma" else [decoders.Strip(" ", 1, 0)]))
    special = [*([kind.start] if kind.start else []), kind.end, *kind.special]
    fallback = [] if of_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=[*special, *fallback], initial_alphabet=alphabet, show_progress=False
    )
    # As in their checkpoints, a line end is a byte to Llama 2 and Mistral, and Gemma has pieces of several.
    lines = [line for text in TEXTS for line in text.split("\n")]
    built.train_from_iterator(lines if kind.model in ("llama2", "metaspace") else TEXTS, trainer)
    # Bytes are pieces of the vocabulary, and only the marks are special.
    tree = json.loads(built.to_str()) | {"added_tokens": []}
    plain = tokenizers.Tokenizer.from_str(json.dumps(tree))
    plain.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=kind.rstrip and t != kind.start) for t in special]
    )
    steps: list[object] = [processors.ByteLevel(trim_offsets=True)] if of_bytes else []
    if kind.adds_start:
        pair = (kind.start, plain.token_to_id(kind.start))
        steps.append(processors.TemplateProcessing(single=f"{kind.start} $A", pair=None, special_tokens=[pair]))
    if steps:
        plain.post_processor = processors.Sequence(steps)
    return plain.to_str()


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADER = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
PHI3 = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

# By template; the model whose tokenizer each stands for is named in chat_templates/README.md.
KINDS = {
    "smollm2": Kind("gpt2", "<|im_end|>", IM, "<|im_start|>"),
    "chatml": Kind("llama2", "<|im_end|>", IM, "<s>", True),
    "llama3": Kind("llama3", "<|end_of_text|>", HEADER, "<|begin_of_text|>", True),
    "llama3_1": Kind("llama3", "<|eot_id|>", HEADER, "<|begin_of_text|>", True),
    "llama3_2": Kind("llama3", "<|eot_id|>", HEADER, "<|begin_of_text|>", True),
    "qwen2_5": Kind("qwen", "<|im_end|>", IM),
    "qwen3": Kind("qwen", "<|im_end|>", IM),
    "gemma": Kind("gemma", "<eos>", TURN, "<bos>", True),
    "gemma3": Kind("gemma", "<eos>", TURN, "<bos>", True),
    "mistral_v1": Kind("llama2", "</s>", (), "<s>", True),
    "mistral_v3": Kind("metaspace", "</s>", ("[INST]", "[/INST]"), "<s>", True),
    "phi3": Kind("llama2", "<|endoftext|>", PHI3, "<s>", False, True),
    "zephyr": Kind("llama2", "</s>", (), "<s>", True),
    "llama2": Kind("llama2", "</s>", (), "<s>", True),
    "olmo2": Kind("llama3", "<|endoftext|>", (), "<|endoftext|>"),
    "phi4": Kind("llama3", "<|im_end|>", (*IM, "<|im_sep|>")),
    "deepseek_v2": Kind("llama3", END, (), BEGIN, True),
    "deepseek_r1_distill": Kind("llama3", END, ("<｜User｜>", "<｜Assistant｜>"), BEGIN, True),
    "smollm3": Kind("llama3", "<|im_end|>", IM),
    "gpt_oss": Kind("llama3", "<|return|>", HARMONY, "<|startoftext|>"),
    "chatglm3": Kind("metaspace", "</s>", ("<|user|>", "<|assistant|>", "<|system|>")),
}


@functools.cache
def checkpoint(name: str) -> Tokenizer:
    """The tokenizer that a stock template belongs to."""
    return made(KINDS[name], template(name), name)
