"""A text depends on its prompt alone: other requests, order, padding, reused slots and devices do not change it.

Models of every kind of memory: T5 (cross-attention, relative positions), a window in all layers, a window in every
other layer, and learned positions. Each is compared with full forward passes over one prompt's own tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, models, sharding
from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.generation import GREEDY, Engine, Request, RequestOutput, Sampling, Scheduler, generate
from tests.parity import cases

FAMILIES = ("t5_1_1", "mistral", "gemma2", "gpt2")
PROMPTS, LONGEST, LENGTH = 32, 34, 12  # GPT-2's case has 48 positions
ENDS = tuple(range(5, 25))  # beside the model's own, so that texts have many lengths
SLOTS = 8
TOLERANCE = 2e-5  # of logits of order 1, in float32
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=3, num_samples=2)


class Subject(NamedTuple):
    model: models.Model
    params: models.Params
    prompts: list[list[int]]

    def cut(self, text: list[int]) -> list[int]:
        """A text without the mark that ended it."""
        return [token for token in text if token not in (*self.model.config.eos_token_ids, *ENDS)]


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: Any, tmp_path_factory: Any) -> Subject:
    case = cases.BY_NAME[request.param]
    model, params = cases.load(cases.write(case, tmp_path_factory.mktemp(case.name)), dropout=0.0)
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)  # for one device or several
    if case.name == "gpt2":
        params["positions"] *= 6  # or its texts are one token again and again
    ends = [1] if model.kind == "seq2seq" else []
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LONGEST, PROMPTS)
    return Subject(model, params, [[*rng.integers(5, 96, length).tolist(), *ends] for length in lengths])


def mesh(devices: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(), jax.devices()[:devices])


def full_logits(subject: Subject, texts: list[list[int]]) -> np.ndarray:
    """The logits [text, LENGTH, V] of every next token of the prompts' texts, by full forward passes."""
    model, rows = subject.model, len(texts)
    made_BT = np.zeros((rows, LENGTH), np.int32)
    source_BS, segments_BS = np.zeros((2, rows, LONGEST + LENGTH), np.int32)
    for row, (prompt, text) in enumerate(zip(subject.prompts, texts, strict=True)):
        made_BT[row, : len(text)] = text
        read = prompt if model.kind == "seq2seq" else prompt + made_BT[row].tolist()
        source_BS[row, : len(read)], segments_BS[row, : len(read)] = read, 1
    positions_BS = np.broadcast_to(np.arange(source_BS.shape[1]), source_BS.shape)
    if model.kind == "seq2seq":
        tokens_BT = np.pad(made_BT[:, :-1], ((0, 0), (1, 0)), constant_values=model.config.decoder_start_token_id)
        ones_BT = np.ones_like(tokens_BT)
        positions_BT = np.broadcast_to(np.arange(LENGTH), tokens_BT.shape)
        batch: Any = Seq2SeqBatch(
            source_BS[:, None],
            segments_BS[:, None],
            positions_BS[:, None],
            tokens_BT,
            ones_BT,
            ones_BT,
            ones_BT,
            positions_BT,
        )
        places_BT = positions_BT
    else:
        batch = CausalBatch(source_BS, None, None, segments_BS, positions_BS)
        places_BT = np.array([len(prompt) - 1 for prompt in subject.prompts])[:, None] + np.arange(LENGTH)
    return np.asarray(_forward(model)(subject.params, batch, places_BT))


def _forward(model: models.Model) -> Any:
    if model.values["model_type"] not in _FORWARD:

        @jax.jit
        def forward(params: models.Params, batch: Any, places_BT: jax.Array) -> jax.Array:
            hidden_BSD = model.hidden_states(params, batch)[0]
            return model.logits(
                model.head(params), jnp.take_along_axis(hidden_BSD, jnp.asarray(places_BT)[:, :, None], axis=1)
            )

        _FORWARD[model.values["model_type"]] = forward
    return _FORWARD[model.values["model_type"]]


_FORWARD: dict[str, Any] = {}  # each compiled once


@pytest.fixture(scope="module")
def expected(subject: Subject) -> list[list[int]]:
    """Each prompt's greedy tokens, end mark included."""
    texts: list[list[int]] = [[] for _ in subject.prompts]
    for number in range(LENGTH):
        logits_BV = full_logits(subject, texts)[:, number]
        for text, logits_V in zip(texts, logits_BV, strict=True):
            if subject.cut(text) == text:  # it has not ended
                text.append(int(logits_V.argmax()))
                best, second = np.sort(logits_V)[[-1, -2]]
                assert best - second > 100 * TOLERANCE, "a tie, or nearly: another seed of the prompts, please"
    return texts


def decoded(made: Any) -> dict[tuple[int, int], RequestOutput]:
    """The texts by prompt and sample, each of which came once."""
    texts = list(made)
    found = {(text.request_id, text.sample): text for text in texts}
    assert len(found) == len(texts)
    return found


@pytest.fixture(scope="module")
def greedy(subject: Subject) -> Engine:
    return Engine(subject.model, mesh(1), LENGTH, SLOTS, GREEDY, ENDS)


def test_the_texts_show_something(subject, expected):
    assert len({tuple(text) for text in expected}) >= 12
    assert len(set(map(len, expected))) >= 4, "slots must become free at different times"


def test_greedy_texts_never_change_with_other_requests_order_padding_limits_or_reused_slots(subject, expected, greedy):
    rng = np.random.default_rng(2)
    for trial in range(8):
        chosen = rng.integers(0, PROMPTS, rng.integers(1, 3 * SLOTS)).tolist()  # some of them twice
        limits = rng.integers(1, LENGTH + 1, len(chosen)).tolist() if trial % 2 else [LENGTH] * len(chosen)
        scheduler = Scheduler(greedy.load(subject.params))
        for at, i in enumerate(chosen):
            scheduler.add_request(Request(at, subject.prompts[i], limits[at]))
        outputs = []
        while scheduler.has_unfinished:
            outputs += scheduler.step()
        found = decoded(outputs)
        assert found.keys() == {(i, 0) for i in range(len(chosen))}
        for at, i in enumerate(chosen):
            text = expected[i][: limits[at]]
            assert found[at, 0].tokens == subject.cut(text), (trial, at)


def test_the_log_probabilities_of_tokens_in_slots_are_those_of_the_full_forward_pass(subject, expected, greedy):
    log_probs_BTV = jax.nn.log_softmax(full_logits(subject, expected))
    found = decoded(generate(greedy, subject.params, subject.prompts, logprobs=0))
    for i, text in enumerate(expected):
        exact = log_probs_BTV[i, np.arange(len(text)), text]
        np.testing.assert_allclose(found[i, 0].log_probs, exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("subject", ["t5_1_1", "gemma2"], indirect=True)
@pytest.mark.parametrize("batch_size, devices", [(3, 1), (SLOTS, 8)])
def test_greedy_texts_are_the_same_in_other_numbers_of_slots_and_devices(subject, expected, batch_size, devices):
    engine = Engine(subject.model, mesh(devices), LENGTH, batch_size, eos_ids=ENDS)
    found = decoded(generate(engine, subject.params, subject.prompts))
    assert [found[i, 0].tokens for i in range(PROMPTS)] == [subject.cut(text) for text in expected]


@pytest.mark.parametrize("subject", ["t5_1_1", pytest.param("mistral", marks=pytest.mark.slow)], indirect=True)
def test_drawn_texts_depend_on_seed_prompt_and_index_alone(subject):
    """Every other prompt keeps its index, and so its draws; those around it change, in number and length too."""
    plain = Engine(subject.model, mesh(1), LENGTH, SLOTS, DRAWN, ENDS)
    alone = decoded(generate(plain, subject.params, subject.prompts))
    assert len({tuple(text.tokens) for text in alone.values()}) > PROMPTS
    rng = np.random.default_rng(4)
    others = [
        prompt if i % 2 else rng.integers(5, 96, rng.integers(1, LONGEST)).tolist()
        for i, prompt in enumerate(subject.prompts)
    ]
    kept = {key for key in alone if key[0] % 2}
    few = Engine(subject.model, mesh(1), LENGTH, 3, DRAWN, ENDS)
    spread = Engine(subject.model, mesh(8), LENGTH, SLOTS, DRAWN, ENDS)
    for engine, prompts in ((plain, others), (plain, others[: PROMPTS // 2]), (few, others), (spread, others)):
        found = decoded(generate(engine, subject.params, prompts))
        compared = kept & found.keys()
        assert len(compared) >= PROMPTS // 2
        assert {key: found[key].tokens for key in compared} == {key: alone[key].tokens for key in compared}
    other_seed = Engine(subject.model, mesh(1), LENGTH, SLOTS, DRAWN._replace(seed=DRAWN.seed + 1), ENDS)
    found = decoded(generate(other_seed, subject.params, subject.prompts))
    assert sum(found[key].tokens != alone[key].tokens for key in alone) > PROMPTS
