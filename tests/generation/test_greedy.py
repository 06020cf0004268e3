"""The reference `greedy()` and the engine give the same tokens, alone or among other requests."""

import pytest

from jax_it.generation import Engine, Request, Scheduler, generate, greedy
from tests.generation.conftest import by_prompt

LENGTH = 10
CHOSEN = (1, 6, 10)  # of the prompts


@pytest.fixture(scope="module", params=["tiny", "llama"])
def subject(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def expected(subject) -> dict[int, list[int]]:
    return {i: greedy(subject.model, subject.params, subject.sources[i], LENGTH) for i in CHOSEN}


@pytest.fixture(scope="module")
def engine(subject) -> Engine:
    return Engine(subject.model, subject.mesh, LENGTH, 4)


def test_a_list_of_prompts_gets_the_tokens_of_greedy(subject, engine, expected):
    found = by_prompt(generate(engine, subject.params, subject.sources))
    assert {i: found[i] for i in CHOSEN} == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == len(CHOSEN)


def test_requests_that_arrive_while_others_run_get_the_tokens_of_greedy_as_they_come(subject, engine, expected):
    scheduler = Scheduler(engine.load(subject.params), stream_interval=3)
    waiting = list(range(len(subject.sources)))
    streamed: dict[int, list[list[int]]] = {i: [] for i in waiting}
    while waiting or scheduler.has_unfinished:
        for i in waiting[:2]:
            scheduler.add_request(Request(i, subject.sources[i]))
        if waiting[:2] == [2, 3]:
            scheduler.abort(0)
        del waiting[:2]
        for output in scheduler.step():
            streamed[output.request_id].append(output.tokens)
    for i, tokens in expected.items():
        assert streamed[i][-1] == tokens
        assert all(tokens[: len(part)] == part for part in streamed[i])
        assert len(streamed[i]) >= len(tokens) // 3
    assert len(streamed[0]) == 1


def test_greedy_ends_at_a_given_end_token_or_its_limit(subject, expected):
    i = max(expected, key=lambda i: len(expected[i]))
    text = expected[i]
    assert greedy(subject.model, subject.params, subject.sources[i], 2) == text[:2]
    end = text[3]
    assert greedy(subject.model, subject.params, subject.sources[i], LENGTH, (end,)) == text[: text.index(end)]
