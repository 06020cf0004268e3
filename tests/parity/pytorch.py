"""What PyTorch and Transformers make of a case. PyTorch is imported by the functions, so that collection needs none."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.parity import cases, seq2seq_cases
from tests.parity import texts as ways
from tests.parity.cases import Case, Inputs, Results
from tests.parity.causal_cases import CausalInputs

NEW_TOKENS = {"seq2seq": 12, "causal": 16}
NONE = -1  # stands where a generated text has ended
BALANCE = 0.1  # the router's balancing loss, beside the token loss


def open_folder(folder: Path, dtype: str = "float32") -> Any:
    """Transformers' model of a folder, all of whose weights it found and used."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    # Eager attention is the one that every family implements, soft caps included.
    model, report = auto.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    complaints = {what: names for what, names in report.items() if names}
    assert not complaints, f"Transformers reads {folder} with {complaints}"
    return model.eval()


def results(model: Any, given: Inputs) -> Results:
    """Logits, the mean loss of a token, and its gradients."""
    model.zero_grad()
    output = model(**_arguments(given), labels=_labels(given))
    output.loss.backward()
    return Results(output.logits.detach().numpy(), output.loss.item(), _gradients(model))


def balance(model: Any, given: CausalInputs) -> tuple[float, Results]:
    """The router's balancing loss of all tokens, and the results where `BALANCE` times it is added to the loss."""
    coefficient, model.router_aux_loss_coef = model.router_aux_loss_coef, BALANCE
    model.zero_grad()
    output = model(**_arguments(given), labels=_labels(given), output_router_logits=True)
    output.loss.backward()
    model.router_aux_loss_coef = coefficient
    return output.aux_loss.item(), Results(output.logits.detach().numpy(), output.loss.item(), _gradients(model))


def _gradients(model: Any) -> dict[str, np.ndarray]:
    """The gradient of each weight by the names that a checkpoint has: written as a checkpoint is, and read back.

    In memory Transformers 5 keeps a layer's experts in one tensor.
    """
    import torch

    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for weight, of in zip(gradients.parameters(), model.parameters(), strict=True):
            weight.copy_(of.grad)
    with tempfile.TemporaryDirectory() as folder:
        gradients.save_pretrained(folder)
        read = safetensors.numpy.load_file(Path(folder) / "model.safetensors")
    return {cases.plain(name): tensor for name, tensor in read.items()}


def generate(model: Any, given: Inputs, **settings: Any) -> np.ndarray:
    """The tokens [B, T] that each source or prompt is continued with, end tokens included; `NONE` after that.

    The most likely ones, unless `settings` of `generate` say otherwise. Prompts go one at a time: no padding.
    """
    import torch

    length = NEW_TOKENS["causal" if isinstance(given, CausalInputs) else "seq2seq"]
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": length} | settings
    texts: list[list[int]] = []
    if isinstance(given, CausalInputs):
        for prompt in given.prompts:
            tokens = torch.tensor([prompt])
            made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
            texts.append(made[0, len(prompt) :].tolist())
    else:
        decoder = getattr(model.config, "decoder", None)
        deeper = decoder is None and model.config.num_decoder_layers > model.config.num_layers
        made = _greedy(model, given, length) if deeper else model.generate(**_arguments(given), **settings)
        texts = made[:, 1:].tolist()
    rows = [_until_end(text, _ends(model)) for text in texts]
    return np.array([row + [NONE] * (length - len(row)) for row in rows])


def texts(model: Any, case: Case, **settings: Any) -> np.ndarray:
    """The tokens [prompt, T] that `generate` makes of the case's prompts under one of `texts.SETTINGS`."""
    return continued(model, ways.prompts(case), ways.LENGTH, ways.ends(case), **settings)


def continued(
    model: Any,
    prompts: list[list[int]],
    length: int,
    ends: list[int],
    noise: float = 0.0,
    seed: int = 0,
    forced_bos_token: int | None = None,
    **settings: Any,
) -> np.ndarray:
    """The tokens [prompt, T] that `generate` produces, as above, but all prompts in a batch: padded on the left
    for a causal model.

    Settings are those of `Sampling`. `noise` is the largest error that is added to each of the model's logits.
    """
    import torch

    causal = not model.config.is_encoder_decoder
    width = max(map(len, prompts))
    tokens, mask = np.zeros((2, len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        at = slice(width - len(prompt), width) if causal else slice(len(prompt))
        tokens[row, at], mask[row, at] = prompt, 1
    processors = []
    if forced_bos_token is not None and causal:
        processors.append(_ForcedFirst(forced_bos_token, width))
    elif forced_bos_token is not None:
        settings["forced_bos_token_id"] = forced_bos_token
    random = torch.Generator().manual_seed(seed)
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        errors = noise * (2 * torch.rand(output.logits.shape, generator=random) - 1)
        output.logits = output.logits + errors
        return output

    if noise:
        model.forward = forward
    made = model.generate(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask),
        logits_processor=processors,
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=ends,
        pad_token_id=0,
        **settings,
    )[:, width if causal else 1 :].tolist()
    if noise:
        del model.forward
    rows = [_until_end(text, ends) for text in made]
    return np.array([row + [NONE] * (length - len(row)) for row in rows])


class _ForcedFirst:
    """Transformers' forced first token, for texts that go on from prompts: there it looks for texts of one token."""

    def __init__(self, token: int, width: int):
        import transformers

        self._force, self._width = transformers.ForcedBOSTokenLogitsProcessor(token), width

    def __call__(self, tokens: Any, scores: Any) -> Any:
        return self._force(tokens[:, self._width - 1 :], scores)


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def _until_end(text: list[int], ends: list[int]) -> list[int]:
    at = [i for i, token in enumerate(text) if token in ends]
    return text[: at[0] + 1] if at else text


def _greedy(model: Any, given: Inputs, length: int) -> Any:
    """As `generate`, whose cache has a layer for each of T5's encoder, and fails where the decoder has more."""
    import torch

    tokens = torch.zeros(len(given.mask_BT), 1, dtype=torch.long)
    for _ in range(length):
        with torch.no_grad():
            new = model(**_arguments(given), decoder_input_ids=tokens).logits[:, -1].argmax(-1)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
    return tokens


def smallest_lead(model: Any, given: Inputs, texts_BT: np.ndarray) -> float:
    """By how much the generated token's logit exceeds the second, at the tightest step."""
    import torch

    leads = []
    for row, text in enumerate(texts_BT):
        new = [token for token in text.tolist() if token != NONE]
        with torch.no_grad():
            if isinstance(given, CausalInputs):
                prompt = given.prompts[row]
                logits_TV = model(input_ids=torch.tensor([prompt + new[:-1]])).logits[0, len(prompt) - 1 :]
            else:
                source = {name: array[row : row + 1] for name, array in _arguments(given).items()}
                tokens = torch.tensor([[_start(model), *new[:-1]]])
                logits_TV = model(**source, decoder_input_ids=tokens).logits[0]
        assert logits_TV.argmax(-1).tolist() == new, "what was generated is not the most likely"
        best, second = logits_TV.topk(2).values.unbind(-1)
        leads.append((best - second).min().item())
    return min(leads)


def _start(model: Any) -> int:
    decoder = getattr(model.config, "decoder", None)
    return model.config.decoder_start_token_id if decoder is None else decoder.bos_token_id


def logits(model: Any, given: Inputs, case: Case) -> np.ndarray:
    """Logits [B, T, V] for the case's targets."""
    import torch

    arguments = _arguments(given)
    if not isinstance(given, CausalInputs):
        tokens = np.pad(given.target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=seq2seq_cases.start(case))
        arguments["decoder_input_ids"] = torch.from_numpy(tokens).long()
    with torch.no_grad():
        return model(**arguments).logits.numpy()


def _arguments(given: Inputs) -> dict[str, Any]:
    import torch

    causal = isinstance(given, CausalInputs)
    tokens, mask = (given.tokens_BT, given.mask_BT) if causal else (given.source_BS, given.source_mask_BS)
    return {"input_ids": torch.from_numpy(tokens).long(), "attention_mask": torch.from_numpy(mask).long()}


def _labels(given: Inputs) -> Any:
    import torch

    targets = given.tokens_BT if isinstance(given, CausalInputs) else given.target_BT
    return torch.from_numpy(np.where(given.mask_BT, targets, -100)).long()
