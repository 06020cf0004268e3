"""Log-likelihoods are those of the full forward pass, whatever stands beside a prompt and however they are computed."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.errors import UserError
from jax_it.generation import likelihood
from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods

WIDTH, LENGTH = 48, 8


@pytest.fixture(scope="module", params=["t5", "llama"])
def small(request, tiny, llama):
    return {"t5": tiny, "llama": llama}[request.param]


@pytest.fixture(params=["decode", "forward"])
def how(request, monkeypatch) -> str:
    """The way that is taken wherever both are open."""
    monkeypatch.setattr(likelihood, "STEP_COST", 0 if request.param == "decode" else 10**6)
    return request.param


@pytest.fixture(scope="module")
def requests(small) -> list[LikelihoodRequest]:
    rng = np.random.default_rng(3)
    lengths = [(3, 1, 2), (1, 1, 1), (2, 3, 3), (2, 1, 3), (7,)]
    return [
        LikelihoodRequest(prompt, [rng.integers(1, 40, length).tolist() for length in each])
        for prompt, each in zip(small.sources, lengths, strict=False)
    ]


@pytest.fixture(scope="module")
def expected(small, requests) -> list[list[tuple[float, bool]]]:
    """Of each continuation alone, by the model's full forward pass over the prompt and it."""
    model = small.model

    def one_row(tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        row, segments = np.zeros((2, 1, WIDTH), np.int32)
        row[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
        return row, segments

    @jax.jit
    def logits(params, batch):
        return model.logits(model.head(params), model.hidden_states(params, batch)[0])[0]

    def of(prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
        if model.kind == "causal":
            row, segments = one_row([*prompt, *continuation])
            positions = np.arange(WIDTH, dtype=np.int32)[None]
            batch = CausalBatch(row, row, np.ones(row.shape, np.float32), segments, positions)
            first = len(prompt) - 1
        else:
            source, source_segments = one_row(prompt)
            target, segments = one_row([model.config.decoder_start_token_id, *continuation])
            positions = np.arange(WIDTH, dtype=np.int32)[None]
            batch = Seq2SeqBatch(
                source[:, None], source_segments[:, None], positions[:, None],
                target, target, np.ones(target.shape, np.float32), segments, positions,
            )  # fmt: skip
            first = 0
        found = np.asarray(logits(small.params, batch), np.float64)[first : first + len(continuation)]
        log_probs = found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
        total = sum(log_probs[i, token] for i, token in enumerate(continuation))
        return float(total), bool((found.argmax(-1) == continuation).all())

    return [[of(request.prompt, tokens) for tokens in request.continuations] for request in requests]


def scored(small, requests, batch_size=3, mesh=None, params=None):
    likelihoods = Likelihoods(small.model, mesh or small.mesh, batch_size)
    found = dict(likelihoods(small.params if params is None else params, requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[i] for i in range(len(requests))], likelihoods.shapes


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert [likelihood.log_prob for likelihood in mine] == pytest.approx([value for value, _ in theirs], rel=1e-5)
        assert [likelihood.greedy for likelihood in mine] == [greedy for _, greedy in theirs]


def test_each_sum_of_log_probabilities_is_that_of_the_full_forward_pass(small, requests, expected, how):
    likelihoods = Likelihoods(small.model, small.mesh, 3)
    found = dict(likelihoods(small.params, requests))
    assert_same([found[i] for i in range(len(requests))], expected)
    shapes = set(likelihoods.shapes)
    assert {shape[0] for shape in shapes} == {"decode", how}  # single tokens always by one step
    # Beside other requests they are the same.
    other = dict(likelihoods(small.params, requests[::-1]))
    assert_same([other[i] for i in range(len(requests))], expected[::-1])
    assert likelihoods.shapes == shapes


def test_the_likelihoods_do_not_depend_on_the_devices(small, requests, expected, how):
    mesh = sharding.make_mesh(config.Mesh(tensor=2), jax.devices()[:4])
    params = jax.device_put(small.params, sharding.shardings(small.model.logical_axes, small.params, mesh))
    assert_same(scored(small, requests[2:4], batch_size=12, mesh=mesh, params=params)[0], expected[2:4])


def test_a_continuation_is_greedy_where_each_token_is_the_likeliest(small, how):
    prompt = small.sources[1]
    likelihoods = Likelihoods(small.model, small.mesh, 1)
    tokens: list[int] = []
    for _ in range(2):  # the likeliest token after all so far, by trying all
        every = LikelihoodRequest(prompt, [[*tokens, token] for token in range(40)])
        ((_, found),) = likelihoods(small.params, [every])
        best = max(range(40), key=lambda token: found[token].log_prob)
        assert [each.greedy for each in found] == [token == best for token in range(40)]
        tokens.append(best)


@pytest.mark.parametrize("how", ["decode"], indirect=True)
def test_logits_that_are_not_finite_make_nothing_likely(tiny, how):
    params = tiny.params | {"head": tiny.params["head"].at[7, 3].set(np.nan)}
    with pytest.raises(UserError, match=r"^the model's logits for prompt 1 are not finite"):
        list(Likelihoods(tiny.model, tiny.mesh, 1)(params, [LikelihoodRequest(tiny.sources[1], [[3], [4]])]))


def test_the_probabilities_of_all_next_tokens_add_up_to_one(small):
    ((_, found),) = Likelihoods(small.model, small.mesh, 1)(
        small.params, [LikelihoodRequest(small.sources[0], [[token] for token in range(40)])]
    )
    assert sum(np.exp(each.log_prob) for each in found) == pytest.approx(1, abs=1e-5)


@pytest.fixture
def planned(tiny, monkeypatch):
    """A function that returns the shapes that would be compiled for some requests."""

    def shapes(requests: list[LikelihoodRequest]) -> set:
        likelihoods = Likelihoods(tiny.model, tiny.mesh, 64)
        for name in ("_decode", "_forward"):
            monkeypatch.setattr(likelihoods, name, lambda *arrays: (np.zeros(arrays[-1].shape), arrays[-1] > 0))
        assert len(list(likelihoods(tiny.params, requests))) == len(requests)
        return likelihoods.shapes

    return shapes


def test_whole_texts_stand_in_rows_and_short_answers_to_long_prompts_are_decoded(planned):
    assert {how for how, *_ in planned([LikelihoodRequest([1], [[1] * 20])])} == {"forward"}
    assert {how for how, *_ in planned([LikelihoodRequest([1] * 40, [[1] * 2] * 4)])} == {"decode"}


def test_many_requests_of_all_lengths_make_few_shapes(planned):
    rng = np.random.default_rng(1)
    requests = [
        LikelihoodRequest([1] * rng.integers(1, 500), [[1] * n for n in rng.integers(1, 7, rng.integers(2, 6))])
        for _ in range(500)
    ]
    assert len(planned(requests)) < 60


@pytest.mark.parametrize(
    "request_", [LikelihoodRequest([], [[1]]), LikelihoodRequest([1], []), LikelihoodRequest([1], [[1], []])]
)
def test_a_prompt_or_a_continuation_without_a_token_is_an_error(tiny, request_):
    with pytest.raises(ValueError, match=r"request 1: a prompt and its continuations need one token or more"):
        list(Likelihoods(tiny.model, tiny.mesh, 1)(tiny.params, [LikelihoodRequest([1], [[1]]), request_]))


def test_a_prefix_lm_s_prompt_is_read_both_ways_either_way(llama, how):
    model = dataclasses.replace(llama.model, options=llama.model.options._replace(prefix_lm=True))
    other = llama._replace(model=model)
    requests = [LikelihoodRequest(llama.sources[1], [[3, 4, 5], [6, 7]])]
    found, _ = scored(other, requests)
    batch = CausalBatch(
        *(np.array([row]) for row in ([*llama.sources[1], 3, 4, 5], [0] * 15)),
        np.ones((1, 15), np.float32), np.ones((1, 15), np.int32), np.arange(15)[None],
        np.array([[1] * 12 + [0] * 3]),
    )  # fmt: skip
    logits = np.asarray(model.logits(model.head(llama.params), model.hidden_states(llama.params, batch)[0])[0])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    assert found[0][0].log_prob == pytest.approx(float(sum(log_probs[11 + i, 3 + i] for i in range(3))), rel=1e-5)
    assert found[0][0].log_prob != pytest.approx(scored(llama, requests)[0][0][0].log_prob, rel=1e-3)
