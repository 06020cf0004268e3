"""Requests with settings of their own that arrive at any time, with an engine whose shapes are all fixed."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_it.generation import Engine, Request, RequestOutput, Sampling, Scheduler, generate
from tests.generation.conftest import Tiny

LENGTH, SLOTS, CHUNK, LONGEST = 10, 4, 40, 150
SETTINGS: list[dict[str, Any]] = [
    {},
    {"sampling": Sampling(temperature=0.9, top_k=12, top_p=0.9, seed=1, num_samples=2)},
    {"sampling": Sampling(repetition_penalty=1.3, frequency_penalty=0.4), "logprobs": 3},
    {"sampling": Sampling(temperature=1.2, min_p=0.05, presence_penalty=0.5, seed=1 << 40, logit_bias=((7, 1.5),))},
    {"sampling": Sampling(ignore_eos=True, min_new_tokens=4), "max_new_tokens": 7},
    {"sampling": Sampling(forced_bos_token=9), "logprobs": 0},
]


class Server(NamedTuple):
    tiny: Tiny
    engine: Engine  # loaded and warmed up
    prompts: list[list[int]]

    def start(self) -> Scheduler:
        return Scheduler(self.engine, stream_interval=1)


@pytest.fixture(scope="module", params=["tiny", "llama"])
def server(request: Any) -> Server:
    """T5, and Llama with a prefix cache."""
    tiny = request.getfixturevalue(request.param)
    rng = np.random.default_rng(0)
    shared = rng.integers(5, 40, 130).tolist()
    prompts = [rng.integers(5, 40, n).tolist() for n in (1, 3, 12, 30, 39, 40, 41, 64, 65, 97, 150)]
    prompts += [[*shared, *rng.integers(5, 40, n).tolist()] for n in (1, 3, 12, 20)]
    if tiny.model.kind == "seq2seq":
        prompts = [[*prompt[:38], 1] for prompt in prompts]
    engine = Engine(
        tiny.model, tiny.mesh, LENGTH, SLOTS, max_logprobs=3, prefill_chunk=CHUNK, prefix_cache_bytes=1 << 16
    ).load(tiny.params)
    engine.warm_up(LONGEST if tiny.model.kind == "causal" else CHUNK)
    return Server(tiny, engine, prompts)


def ended(outputs: Iterable[RequestOutput]) -> dict[tuple[int, int], RequestOutput]:
    return {output[:2]: output for output in outputs if output.finish_reason}


def finish(scheduler: Scheduler, requests: Sequence[Request]) -> dict[tuple[int, int], RequestOutput]:
    for request in requests:
        scheduler.add_request(request)
    outputs = []
    while scheduler.has_unfinished:
        outputs += scheduler.step()
    return ended(outputs)


def number_compiled(engine: Engine) -> int:
    """Count compiled programs: the engine's, and those that other engines have of the same functions."""
    return sum(program._cache_size() for program in engine._programs.values())


def requests_of(server: Server) -> list[Request]:
    return [
        Request(len(SETTINGS) * i + k, prompt, **SETTINGS[k])
        for i, prompt in enumerate(server.prompts)
        for k in {0, 1 + i % (len(SETTINGS) - 1)}
    ]


def test_texts_that_arrive_at_any_time_with_any_settings_are_those_of_each_request_alone(server):
    shapes, compiled = set(server.engine.shapes), number_compiled(server.engine)
    requests = requests_of(server)
    alone: dict[tuple[int, int], RequestOutput] = {}
    for request in requests:
        alone |= finish(server.start(), [request])
    rng = np.random.default_rng(1)
    scheduler, waiting = server.start(), [requests[i] for i in rng.permutation(len(requests))]
    outputs: list[RequestOutput] = []
    aborted = waiting[3].request_id
    while scheduler.has_unfinished or waiting:
        for _ in range(min(len(waiting), rng.integers(0, 4))):
            scheduler.add_request(waiting.pop())
        outputs += scheduler.step()
        if len(waiting) == 1:
            scheduler.abort(aborted)
    together = ended(outputs)
    assert alone.keys() - together.keys() <= {(aborted, 0), (aborted, 1)}
    for key, output in together.items():
        assert output.tokens == alone[key].tokens and output.finish_reason == alone[key].finish_reason
        if output.log_probs is not None:
            np.testing.assert_allclose(output.log_probs, alone[key].log_probs, rtol=0, atol=1e-5)
    assert len({tuple(output.tokens) for output in together.values()}) > len(server.prompts)
    assert server.engine.shapes == shapes
    assert number_compiled(server.engine) == compiled, "something was compiled later"
    if server.engine.num_blocks:
        assert scheduler.cached_tokens


def test_greedy_texts_are_those_of_a_list_of_prompts(server):
    offline = Engine(server.tiny.model, server.tiny.mesh, LENGTH, SLOTS)
    expected = {output[:2]: output.tokens for output in generate(offline, server.tiny.params, server.prompts)}
    found = finish(server.start(), [Request(i, prompt) for i, prompt in enumerate(server.prompts)])
    assert {key: output.tokens for key, output in found.items()} == expected


def test_texts_of_one_seed_are_equal_and_those_of_other_seeds_and_samples_differ(server):
    sampling = Sampling(temperature=1.5, ignore_eos=True, num_samples=6, seed=3)  # more than there are slots
    requests = [
        Request(i, server.prompts[2], sampling=sampling._replace(seed=seed)) for i, seed in enumerate((3, 3, 4))
    ]
    found = finish(server.start(), requests)
    texts = [[tuple(found[i, sample].tokens) for sample in range(6)] for i in range(3)]
    assert texts[0] == texts[1] and len({*texts[0], *texts[2]}) == 12


def test_the_likeliest_alternatives_come_with_a_texts_log_probabilities(server):
    (output,) = finish(server.start(), [Request(0, server.prompts[3], logprobs=2)]).values()
    tokens = output.tokens + [1] * (output.finish_reason == "stop")
    assert output.top_log_probs.tokens_NA.shape == (len(tokens), 2)
    assert output.top_log_probs.tokens_NA[:, 0].tolist()[: len(output.tokens)] == output.tokens
    np.testing.assert_array_equal(output.top_log_probs.log_probs_NA[:, 0], np.float32(output.log_probs))
    assert (np.diff(output.top_log_probs.log_probs_NA) < 0).all()


class Digits:
    """Allow 10 or 11, then 12 or 13, and so on up to five tokens, and the end token after three."""

    def allowed(self, tokens):
        allowed = np.zeros(self.vocabulary, bool)
        allowed[10 + 2 * len(tokens) : 12 + 2 * len(tokens)] = len(tokens) < 5
        allowed[1] = len(tokens) >= 3
        return allowed


class Broken(Digits):
    def allowed(self, tokens):
        if len(tokens) == 2:
            raise RuntimeError("no state")
        return super().allowed(tokens)


def test_constraints_hold_for_their_own_request_alone(server):
    plain = finish(server.start(), [Request(0, server.prompts[2])])
    Digits.vocabulary = server.tiny.model.config.vocab_size
    sampling = Sampling(temperature=2.0, num_samples=2)
    found = finish(
        server.start(),
        [
            Request(0, server.prompts[2]),
            Request(1, server.prompts[3], constraint=Digits),
            Request(2, server.prompts[4], constraint=Digits, sampling=sampling, logprobs=0),
            Request(3, server.prompts[4], constraint=Broken),
        ],
    )
    assert found[0, 0] == plain[0, 0]
    for key in ((1, 0), (2, 0), (2, 1)):
        tokens = found[key].tokens
        assert found[key].finish_reason == "stop" and 3 <= len(tokens) <= 5
        assert [token // 2 for token in tokens] == [5, 6, 7, 8, 9][: len(tokens)]
    assert found[3, 0].finish_reason == "error" and len(found[3, 0].tokens) == 2


@pytest.mark.parametrize("server", ["llama"], indirect=True)
def test_a_prompts_log_probabilities_are_those_of_decoding_it_token_by_token(server):
    prompt, tiny = server.prompts[3], server.tiny
    found = finish(server.start(), [Request(0, prompt, prompt_logprobs=3)])[0, 0].prompt_log_probs
    cache = tiny.model.prefill(tiny.params, np.array([prompt[:1]]), np.ones((1, 1), int), len(prompt))[2]
    weights, step, rows = tiny.model.prepare_for_decoding(tiny.params), jax.jit(tiny.model.decode_step), []
    for at, token in enumerate(prompt[:-1]):
        logits_BV, cache = step(weights, np.array([token]), np.array([at]), cache)
        rows.append(jax.nn.log_softmax(logits_BV[0]))
    expected = np.array(rows)
    np.testing.assert_allclose(found.log_probs_N, expected[np.arange(len(expected)), prompt[1:]], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found.top.tokens_NA, np.argsort(-expected)[:, :3])


@pytest.mark.parametrize("server", ["llama"], indirect=True)
def test_a_request_whose_logits_are_not_finite_fails_alone_and_leaves_nothing_behind(server):
    broken = server.engine.load({**server.tiny.params, "embedding": server.tiny.params["embedding"].at[3].set(np.nan)})
    broken.warm_up(LONGEST)
    scheduler = Scheduler(broken, stream_interval=1)
    bad = [3 if i % 50 == 1 else 5 for i in range(LONGEST)]
    expected = finish(server.start(), [Request(i, prompt) for i, prompt in enumerate(server.prompts)])
    found = finish(scheduler, [Request(100 + i, bad) for i in range(SLOTS)])
    assert {output.finish_reason for output in found.values()} == {"error"}
    found = finish(scheduler, [*(Request(i, prompt) for i, prompt in enumerate(server.prompts)), Request(99, bad)])
    assert found.pop((99, 0)).finish_reason == "error"
    assert found == expected


def test_what_an_engine_does_not_have_is_an_error(server):
    scheduler = server.start()
    for wrong, what in (
        ({"prompt": [5] * 500}, "a prompt of 500 tokens"),
        ({"logprobs": 4}, "alternatives"),
        ({"sampling": Sampling(num_beams=2)}, "beam search"),
    ):
        with pytest.raises(ValueError, match=what):
            scheduler.add_request(Request(0, **{"prompt": [5], **wrong}))
    assert not scheduler.has_unfinished


def test_a_step_decodes_few_slots_while_few_are_busy_and_no_text_changes(server, monkeypatch):
    decode, sizes = Engine.decode, list[int]()

    def counted(engine: Engine, idle: Sequence[bool], *arguments: Any, **options: Any) -> Any:
        sizes.append(len(idle))
        return decode(engine, idle, *arguments, **options)

    monkeypatch.setattr(Engine, "decode", counted)
    prompts, endless = server.prompts[:SLOTS], Sampling(ignore_eos=True)
    alone = [finish(server.start(), [Request(0, prompt, sampling=endless)])[0, 0].tokens for prompt in prompts]
    assert server.engine.decode_sizes == (1, SLOTS) and set(sizes) == {1}
    limits = [2, 4, 6, LENGTH]
    sizes.clear()
    found = finish(server.start(), [Request(i, prompts[i], limits[i], sampling=endless) for i in range(SLOTS)])
    assert [found[i, 0].tokens for i in range(SLOTS)] == [alone[i][: limits[i]] for i in range(SLOTS)]
    # The text that outlives the others is moved to the first slot.
    assert set(sizes[-3:]) == {1} and SLOTS in sizes
