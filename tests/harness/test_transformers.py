"""The same requests to jax_it and to lm_eval's own Transformers model, which needs PyTorch: the same answers."""

import pytest

from tests.harness.conftest import QUESTIONS
from tests.harness.test_model import ask

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

PAIRS = [(question, f" {option}") for question, options in QUESTIONS for option in options]
PAIRS += [
    ("", "Hello"),
    ("Say hello ", "Hello"),
    ("<|begin_of_text|>Say hello", " well"),
    (QUESTIONS[3][0] * 6, " blue"),
]


@pytest.fixture(scope="module", params=["smollm2", "llama3", "t5"])
def both(request, folders):
    """jax_it's model of a folder and lm_eval's."""
    torch = pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    from jax_it.harness.model import HarnessModel

    torch.set_num_threads(1)
    folder = str(folders[request.param])
    theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3)
    return HarnessModel(folder, batch_size=4), theirs


def test_what_both_take_for_granted_is_the_same(both):
    ours, theirs = both
    for name in ("max_gen_toks", "prefix_token_id", "eot_token_id", "backend", "max_length"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in ("Say hello", " Say\nhello", "<|begin_of_text|>Say", "<|im_start|>user\nSay"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def test_log_likelihoods_are_the_same(both):
    ours, theirs = both
    for (found, greedy), (expected, also) in zip(
        ask(ours.loglikelihood, *PAIRS), ask(theirs.loglikelihood, *PAIRS), strict=True
    ):
        assert found == pytest.approx(expected, rel=2e-5, abs=1e-4) and greedy == also


def test_log_likelihoods_of_long_texts_in_windows_are_the_same(both):
    ours, theirs = both
    texts = [(QUESTIONS[3][0] * n,) for n in (1, 4, 9)]
    found, expected = ask(ours.loglikelihood_rolling, *texts), ask(theirs.loglikelihood_rolling, *texts)
    assert found == pytest.approx(expected, rel=2e-5)


def test_greedy_texts_are_the_same(both):
    ours, theirs = both
    settings = {"max_gen_toks": 16, "do_sample": False}
    requests = [
        (f"{question}\n", settings | {"until": until}) for question, _ in QUESTIONS for until in (["e"], ["\n", "q"])
    ]
    requests += [(QUESTIONS[3][0] * 6, settings), ("Say hello", {"max_gen_toks": 24, "temperature": 0.0})]
    found, expected = ask(ours.generate_until, *requests), ask(theirs.generate_until, *requests)
    if ours.backend == "seq2seq":  # lm_eval lets these be longer, by as many tokens as the source has
        expected = [text[: len(mine)] for text, mine in zip(expected, found, strict=True)]
    assert found == expected
    assert len(set(found)) > 4


def test_beams_give_the_same_texts(both):
    ours, theirs = both
    if ours.backend == "seq2seq":
        pytest.skip("lm_eval lets these be longer, by as many tokens as the source has")
    settings = {"max_gen_toks": 12, "do_sample": False, "num_beams": 3}
    requests = [(question, settings) for question, _ in QUESTIONS]
    assert ask(ours.generate_until, *requests) == ask(theirs.generate_until, *requests)


def test_chat_templates_give_the_same_prompts(both):
    ours, theirs = both
    if not ours.tokenizer.chat_template:
        pytest.skip("it has no chat template")
    turns = [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "Hello"}]
    for messages, goes_on in ((turns[:1], True), (turns, False)):
        assert ours.apply_chat_template(messages, goes_on) == theirs.apply_chat_template(messages, goes_on)
    assert ours.chat_template(True) == theirs.chat_template(True)
    request = (ours.apply_chat_template(turns[:1]), {"max_gen_toks": 8})
    assert ask(ours.generate_until, request) == ask(theirs.generate_until, request)
    assert ours.tokenizer_name == theirs.tokenizer_name


def test_tasks_have_the_same_scores(both, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found, expected = (
        lm_eval.simple_evaluate(model, tasks=["choose", "write", "read"], task_manager=manager, bootstrap_iters=0)
        for model in both
    )
    for task, values in expected["results"].items():
        for name, value in values.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=2e-5), (task, name)
