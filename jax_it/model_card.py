"""The model card (README.md) of an exported folder, as the Hugging Face Hub shows it."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_it.data import sources
from jax_it.models import Model
from jax_it.run import Run

MAX_ROWS = 20  # of the table of scores


def model_card(
    name: str, run: Run, step: int, scores: Mapping[str, Mapping[str, Any]] | None, adapter_only: bool
) -> str:
    """Return the card of a run's checkpoint: metadata in YAML, how it was trained, its scores, and how to use it.

    `scores` are those of the checkpoint's metrics.json; None: it was not evaluated.
    """
    from huggingface_hub import ModelCardData  # slow to import

    config, model = run.config, run.model
    has_chat_template = run.tokenizer.chat_template is not None
    base = config.model.path if config.model.pretrained else ""
    on_hub = bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base)) and not Path(base).is_dir()
    tags = ["jax-it", model.config.model_type]
    tags += ["lora"] if model.adapter else []
    tags += ["conversational"] if has_chat_template else []
    data = ModelCardData(
        base_model=base if on_hub else None,  # the hub knows no local folders
        datasets=_hub_datasets(run) or None,
        library_name="peft" if adapter_only else "transformers",
        pipeline_tag="text-generation" if model.kind == "causal" else "text2text-generation",
        tags=tags,
        **_license_of(base),
    )
    shown = f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`"
    start = f"{shown}, fine-tuned" if base else f"A {model.config.model_type} model, trained from random weights"
    what = "Adapters for " if adapter_only else ""
    version = importlib.metadata.version("jax-it")
    return "\n\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n\n# {name}",
            f"{what}{start} with jax_it {version}.",
            "## Training\n\n" + _table(["setting", "value"], _training(run, step)),
            f"## Evaluation\n\n{_evaluation(scores)}",
            f"## Use\n\n```python\n{_usage(name, model, has_chat_template, adapter_only)}\n```\n",
        ]
    )


def _license_of(base: str) -> dict[str, Any]:
    """Return the license in the base model's card, if it has a card here that names one."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if not base:
        return {}
    try:
        folder = Path(base).expanduser()
        file = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(base, "README.md")
        values = ModelCard.load(Path(str(file)), ignore_metadata_errors=True).data.to_dict()
    except Exception:  # there is no card, or it cannot be read
        return {}
    return {key: values[key] for key in ("license", "license_name", "license_link") if key in values}


def _hub_datasets(run: Run) -> list[str]:
    """Return the names of the training data that comes from the hub, whose commits a run has resolved."""
    resolved = {name.rpartition("@")[0] for name in run.resolved.commits} if run.resolved else set()
    return sorted({source.path for source in run.config.data.train if source.path in resolved})


def _training(run: Run, step: int) -> list[list[str]]:
    data, train, optimizer = run.config.data, run.config.train, run.config.train.optimizer
    model, hub_datasets = run.model, _hub_datasets(run)
    names = [
        f"[{source.path}](https://huggingface.co/datasets/{source.path})"
        if source.path in hub_datasets
        else f"`{sources.name_of(source)}`"
        for source in data.train
    ]
    weights = "all"
    if model.adapter:
        ranks = ", ".join(map(str, sorted({target.rank for target in model.adapter.targets})))
        weights = f"{'DoRA' if model.adapter.dora else 'LoRA'} adapters of rank {ranks}"
        if model.adapter.token_ids:
            weights += f", and the rows of {len(model.adapter.token_ids)} tokens in the embedding and the head"
    length = f"{data.max_seq_length} tokens"
    if model.kind == "seq2seq":
        length = f"{data.max_source_length} source and {data.max_target_length} target tokens"
    return [
        ["data", ", ".join(names)],
        ["trained weights", weights],
        ["step", f"{step} of {run.resolved.total_steps}" if run.resolved else str(step)],
        ["batch size", f"{train.batch_size} examples"],
        ["optimizer", f"{optimizer.name}, {optimizer.schedule} schedule, warmup {optimizer.warmup or 'none'}"],
        ["peak learning rate", f"{optimizer.learning_rate:g}"],
        ["maximum length", length],
        ["loss", train.loss],
        ["seed", f"{train.seed} (data: {data.seed})"],
    ]


def _evaluation(scores: Mapping[str, Mapping[str, Any]] | None) -> str:
    numbers = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in (scores or {}).items()
    }
    names = list(dict.fromkeys(name for values in numbers.values() for name in values))
    if not names:
        return "This checkpoint was not evaluated."
    order = sorted(numbers, key=lambda task: task != "all")
    rows = [
        [task, *(f"{numbers[task][name]:.4g}" if name in numbers[task] else "" for name in names)] for task in order
    ]
    more = f"\n\n{len(rows) - MAX_ROWS} more tasks are left out." if len(rows) > MAX_ROWS else ""
    return _table(["task", *names], rows[:MAX_ROWS]) + more


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def _usage(name: str, model: Model, has_chat_template: bool, adapter_only: bool) -> str:
    """Return Python code that generates text with Transformers, or PEFT, as the model was trained to."""
    causal = model.kind == "causal"
    auto = "ModelForCausalLM" if causal else "ModelForSeq2SeqLM"
    lines = [
        "from transformers import AutoTokenizer"
        if adapter_only
        else f"from transformers import Auto{auto}, AutoTokenizer"
    ]
    if adapter_only:
        auto = f"Peft{auto}"
        lines.insert(0, f"from peft import Auto{auto}")
    lines += [
        "",
        f"path = {name!r}  # this folder, or the name of its repository on the hub",
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        f"model = Auto{auto}.from_pretrained(path)",
        "",
        'prompt = "What is the capital of France?"',
    ]
    if has_chat_template:
        lines += [
            'messages = [{"role": "user", "content": prompt}]',
            "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
        ]
    special = ", add_special_tokens=False" if has_chat_template and causal else ""  # the template has written them
    lines.append(f'inputs = tokenizer(prompt{special}, return_tensors="pt", return_token_type_ids=False)')
    lines.append("output = model.generate(**inputs, max_new_tokens=128, do_sample=False)[0]")
    if causal:
        lines.append('output = output[inputs["input_ids"].shape[1] :]')
    lines.append("print(tokenizer.decode(output, skip_special_tokens=True))")
    return "\n".join(lines)
