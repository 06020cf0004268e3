"""What PyTorch and Transformers make of a case. PyTorch is imported by the functions, so that collection needs none."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.parity.cases import Case, Inputs, Results

NEW_TOKENS = 12


def open_folder(folder: Path, dtype: str = "float32") -> Any:
    """Transformers' model of a folder, all of whose weights it found and used."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    complaints = {what: names for what, names in report.items() if names}
    assert not complaints, f"Transformers reads {folder} with {complaints}"
    return model.eval()


def results(model: Any, given: Inputs) -> Results:
    import torch

    labels = torch.from_numpy(np.where(given.target_mask_BT, given.target_BT, -100)).long()
    model.zero_grad()
    output = model(**_source(given), labels=labels)
    output.loss.backward()
    gradients = {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}
    return Results(output.logits.detach().numpy(), output.loss.item(), gradients)


def generate(model: Any, given: Inputs) -> np.ndarray:
    """Greedy tokens [B, 1 + NEW_TOKENS], the start token first; 0 after a row's end token."""
    import torch

    config = model.config
    if config.num_decoder_layers <= config.num_layers:
        tokens = model.generate(**_source(given), do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS)
        return torch.nn.functional.pad(tokens, (0, 1 + NEW_TOKENS - tokens.shape[1])).numpy()
    # Transformers' cache has a layer for each of the encoder's, and fails where the decoder has more.
    tokens = torch.zeros(len(given.source_BS), 1, dtype=torch.long)
    for _ in range(NEW_TOKENS):
        new = _logits(model, given, tokens)[:, -1].argmax(-1)
        new = new.masked_fill((tokens == config.eos_token_id).any(1), config.pad_token_id)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
    return tokens.numpy()


def smallest_lead(model: Any, given: Inputs, tokens: np.ndarray) -> float:
    """By how much the generated token's logit exceeds the second, at the tightest step before a row's end."""
    import torch

    best, second = _logits(model, given, torch.from_numpy(tokens[:, :-1])).topk(2).values.unbind(-1)
    ended = np.cumsum(tokens == model.config.eos_token_id, axis=1)[:, :-1] > 0
    return (best - second).numpy()[~ended].min().item()


def logits(model: Any, given: Inputs, case: Case) -> np.ndarray:
    """Logits [B, T, V] for the case's targets."""
    import torch

    start = case.values["decoder_start_token_id"]
    tokens = np.pad(given.target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return _logits(model, given, torch.from_numpy(tokens)).numpy()


def _logits(model: Any, given: Inputs, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(**_source(given), decoder_input_ids=tokens.long()).logits


def _source(given: Inputs) -> dict[str, Any]:
    import torch

    return {
        "input_ids": torch.from_numpy(given.source_BS).long(),
        "attention_mask": torch.from_numpy(given.source_mask_BS),
    }
