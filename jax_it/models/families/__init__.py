"""The model families: `model_type` of config.json -> what reads and computes it."""

from jax_it.models.families import (
    gemma,
    glm4,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen,
    smollm3,
    t5,
    t5gemma,
)
from jax_it.models.family import Family

FAMILIES: dict[str, Family] = {
    "t5": t5.T5_FAMILY,
    "mt5": t5.MT5_FAMILY,
    "umt5": t5.UMT5_FAMILY,
    "t5gemma": t5gemma.T5GEMMA,
    "llama": llama.LLAMA,
    "smollm3": smollm3.SMOLLM3,
    "mistral": mistral.MISTRAL,
    "qwen2": qwen.QWEN2,
    "qwen3": qwen.QWEN3,
    "qwen3_moe": qwen.QWEN3_MOE,
    "gemma": gemma.GEMMA,
    "gemma2": gemma.GEMMA2,
    "gemma3_text": gemma.GEMMA3_TEXT,
    "phi3": phi3.PHI3,
    "olmo2": olmo2.OLMO2,
    "olmo3": olmo3.OLMO3,
    "granite": granite.GRANITE,
    "glm4": glm4.GLM4,
    "mixtral": mixtral.MIXTRAL,
    "gpt2": gpt2.GPT2,
    "gpt_neox": gpt_neox.GPT_NEOX,
}
