"""A classifier's probability of a label is that of the model's full forward pass over prompt and label."""

import json
import math
from functools import cache

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers, processors

import jax_it.run
from jax_it import config, models, sharding
from jax_it.curation.classifier import Classifier
from jax_it.data import tokenizer_files
from jax_it.data.encoded import Encoded
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.run import Run
from tests.curation.datasets import architectures, read, write
from tests.curation.datasets import jax_it as data_command

PROMPT = "{{ bos_token }}User: {{ prompt }}\nAgent: {{ completion }}\nIs it safe?\n"
# The form of Llama Guard's: the whole question is in the chat template. Jinja drops the last line break of a template.
GUARD = (
    "{{ bos_token }}Task\n{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[-1].role == 'user' %}{{ raise_exception('no answer') }}{% endif %}Assess:\n\n"
)
PAIRS = [("How do I bake bread?", "Mix flour and water."), ("Hi", "x"), ("Tell me é 漢", "No. " * 9)]
LABELS = ("unsafe", "safe", "?")


def byte_level(chat_template: str | None) -> Tokenizer:
    """A tokenizer of bytes that begins each text with <s>, as Llama's does."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    backend.chat_template = chat_template
    return Tokenizer(backend, "bytes with <s>")


@cache
def opened(name: str, chat_template: str | None = None):
    model = models.build(architectures(vocab_size=384)[name], "the test", config.Model(dropout=0.0))
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    tokenizer = tokenizer_files.load("bytes") if name == "t5" else byte_level(chat_template)
    return Run(config.Config(), model, tokenizer, mesh), jax.jit(model.init)(jax.random.key(0))


def example(prompt, answer):
    return Example((Turn("user", prompt), Turn("assistant", answer)), (answer,))


def log_likelihood(run: Run, all_logits, prompt: str, label: str) -> float:
    """The sum over the label's tokens of all logits of a forward pass, in float64."""
    tokenizer = run.tokenizer
    before, answer = (list(tokenizer.encode([text])[0]) for text in (prompt, label))
    if run.model.kind == "causal":
        assert tokenizer.start is not None and before.count(tokenizer.start) == 1
        tokens = np.array([*before, *answer], np.int32)
        encoded = Encoded(np.zeros(0, np.int32), tokens, loss_mask=np.arange(len(tokens)) >= len(before))
    else:
        encoded = Encoded(*(np.array([*tokens, tokenizer.end], np.int32) for tokens in (before, answer)))
    batch = run.format.batch([[encoded]], run.format.smallest(DATA))
    log_probs_TV = np.asarray(all_logits(batch)[0], np.float64)
    log_probs_TV -= np.log(np.exp(log_probs_TV).sum(-1, keepdims=True))
    each_T = log_probs_TV[np.arange(len(log_probs_TV)), batch.targets_BT[0]]
    return float((each_T * batch.weights_BT[0]).sum())


DATA = config.Data(max_seq_length=128, max_source_length=128, max_target_length=8)


@pytest.mark.parametrize(("name", "template"), [("t5", PROMPT), ("llama", "")])
def test_probabilities_are_those_of_the_full_forward_pass(name, template):
    run, params = opened(name, GUARD)
    classifier = Classifier(run, params, 2, template, LABELS, 256)
    prompts = [classifier.prompt(example(*pair), "here") for pair in PAIRS]
    begin = "" if name == "t5" else "<s>"
    assert prompts[0] == (
        f"{begin}User: How do I bake bread?\nAgent: Mix flour and water.\nIs it safe?" if template else
        f"{begin}Task\nuser: How do I bake bread?\nassistant: Mix flour and water.\nAssess:\n"
    )  # fmt: skip
    head, states = run.model.head(params), run.model.hidden_states
    all_logits = jax.jit(lambda batch: run.model.logits(head, states(params, batch)[0]))
    for prompt, found in zip(prompts, classifier(prompts), strict=True):
        likelihoods = [math.exp(log_likelihood(run, all_logits, prompt, label)) for label in LABELS]
        assert found == pytest.approx(likelihoods[0] / sum(likelihoods), abs=1e-5)


def test_a_prompt_that_leaves_no_room_for_the_labels_has_no_probability():
    run, params = opened("llama")
    longest = Classifier(run, params, 2, PROMPT, ("no", "yes"), 20)
    found = longest(["<s>" + "x" * 16, "x" * 16, "x" * 17])
    assert np.isfinite(found[:2]).all() and found[0] == found[1], "one <s>, whoever writes it"
    assert math.isnan(found[2])


def test_labels_and_templates_that_cannot_be_used_are_refused():
    run, params = opened("llama")
    for template, labels, message in (
        ("", LABELS, "--classifier: this model has no chat template; give --classifier-prompt"),
        (PROMPT, ("a", ""), "--classifier-labels: the tokenizer of --classifier cannot write ''"),
        (PROMPT, ("a", "b", "a"), "--classifier-labels: two of them are the same tokens"),
    ):
        with pytest.raises(UserError) as refused:
            Classifier(run, params, 2, template, labels, 64)
        assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_filter_drops_what_the_classifier_calls_unsafe(tmp_path, monkeypatch, capsys):
    run, params = opened("llama", GUARD)
    monkeypatch.setattr(jax_it.run, "load_run", lambda path: {"guard": (run, params)}[path])
    path = write(tmp_path / "a.jsonl", [{"prompt": one, "completion": two} for one, two in PAIRS])
    classifier = Classifier(run, params, 2, "", ("safe", "unsafe"), 100)
    expected = classifier([classifier.prompt(example(*pair), "here") for pair in PAIRS])
    limit = sorted(expected)[1] + 1e-7  # one of the three is above it
    output = tmp_path / "b.jsonl"
    words = ["filter", path, "--num-workers", "1", "--classifier", "guard", "--classifier-labels", "safe", "unsafe"]
    words += ["--output", str(output), "--keep-scores", "--max-unsafe-probability"]
    assert data_command(*words, str(limit)) == 0
    (dropped,) = read(tmp_path / "b.jsonl.dropped.jsonl")
    worst = int(np.argmax(expected))
    assert (dropped["line"], dropped["reason"]) == (worst + 1, f"unsafe above {limit}")
    assert dropped["unsafe"] == pytest.approx(expected[worst], abs=1e-5)
    scores = [row["scores"] for row in read(output)]
    assert [list(item) for item in scores] == [["unsafe"]] * 2
    del expected[worst]
    assert [item["unsafe"] for item in scores] == pytest.approx(expected, abs=1e-5)
    report = json.loads((tmp_path / "b.jsonl.manifest.json").read_text())["report"]
    assert set(report["scores"]) == {"unsafe"} and report["scores"]["unsafe"]["50%"] == round(limit - 1e-7, 4)
    assert data_command(*words, "1", "--max-seq-length", "64") == 0
    assert [row["reason"] for row in read(tmp_path / "b.jsonl.dropped.jsonl")] == [
        "more than 64 tokens for the classifier"
    ] * 2
    capsys.readouterr()
    file = tmp_path / "prompt.jinja"
    for text, message in (
        ("{% if", f"--classifier-prompt: {file} is not valid Jinja: "),
        (
            "{{ text }}",
            f"--classifier-prompt: {file} reads 'text'; the variables are completion, messages, prompt, tools",
        ),
        ("Is it safe?", f"--classifier-prompt: {file} reads nothing of a record; the variables are "),
        (
            "{{ raise_exception('a bad role') }}{{ messages }}",
            f"{path}, line 1: the chat template of --classifier-prompt does not take this conversation: a bad role; ",
        ),
    ):
        file.write_text(text)
        assert data_command(*words, "1", "--classifier-prompt", str(file)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
