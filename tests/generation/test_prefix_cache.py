"""Which beginnings of prompts are found again, and which make room."""

import numpy as np

from jax_it.generation.prefix_cache import PrefixCache


def test_whole_blocks_are_found_but_never_a_prompts_last_token():
    cache = PrefixCache(8, size=2)
    written = cache.add([1, 2, 3, 4, 5])
    assert len(set(written)) == 2 and cache.match([1, 2, 3, 4]) == written[:1]
    assert cache.match([1, 2, 3, 4, 9]) == cache.match([1, 2, 3, 4, 5, 6, 7]) == written
    assert cache.match([1, 2]) == cache.match([3, 4, 5]) == cache.match([2, 2, 3, 4, 5]) == []
    assert cache.add([1, 2, 7, 8, 9])[0] == -1, "the first block is there already"


def test_the_least_recently_used_prompt_makes_room_from_its_end():
    cache = PrefixCache(3, size=1)
    first, second = cache.add([1, 2, 3])
    (other,) = cache.add([7, 8])
    cache.match([7, 8])
    assert cache.add([5, 6]) == [second]
    assert cache.match([1, 2, 3]) == [first] and cache.match([7, 8]) == [other]


def test_a_prompt_longer_than_the_cache_fills_it_and_no_more():
    cache = PrefixCache(2, size=1)
    cache.add([9, 9])
    assert sorted(cache.add([1, 2, 3, 4, 5])) == [0, 1]
    assert len(cache.match([1, 2, 3, 4, 5])) == 2


def test_what_is_found_is_always_what_was_written():
    """Random prompts over few tokens, with a model of the memory."""
    rng, cache, memory = np.random.default_rng(0), PrefixCache(7, size=2), {}
    hits = 0
    for _ in range(2000):
        prompt = rng.integers(0, 2, rng.integers(1, 12)).tolist()
        for i, number in enumerate(cache.match(prompt)):
            assert memory[number] == prompt[: 2 * i + 2]
            hits += 1
        for i, number in enumerate(cache.add(prompt)):
            if number >= 0:
                memory[number] = prompt[: 2 * i + 2]
    assert hits > 500
