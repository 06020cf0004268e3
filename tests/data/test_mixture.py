from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_it.config import Data, Source
from jax_it.data.mixture import Mixture, _hash, hold_out, mix
from jax_it.data.tokenized import Tokenized
from jax_it.errors import UserError
from tests.data.letters import of_lengths

GOLDEN = """The order in which examples are drawn has changed. A run that is resumed after this change would train on
other examples than it would have before (promise 2). Undo the change; or, if it is wanted, say so in the release
notes, and put the new values here."""


def source(name: str, size: int, dropped: tuple[int, ...] = (), templates: int = 1) -> list[Tokenized]:
    """A source of `size` examples whose lengths tell source, example and template."""
    made = []
    for template in range(templates):
        targets = [0 if i in dropped else 2 + (i + template) % 5 for i in range(size)]
        made.append(of_lengths(name, [2 + (3 * i + template) % 11 for i in range(size)], targets))
    return made


def mixture(*made: list[Tokenized], held_out: Any = None, weights: Any = None, **given_: Any) -> Mixture:
    named = [Source(path=item[0].name, weight=weight) for item, weight in zip(made, weights or [1.0] * 9, strict=False)]
    return mix(named, made, Data(**given_), held_out)


def drawn(epoch: np.recarray) -> list[tuple[int, int]]:
    return list(zip(epoch.source.tolist(), epoch.example.tolist(), strict=True))


def rows(epoch: np.recarray) -> list[list[int]]:
    return [epoch[name].tolist() for name in epoch.dtype.names]


# All


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_mixing_all_takes_every_example_that_was_kept_once_an_epoch(epoch):
    mixed = mixture(source("a", 30, dropped=(0, 7, 29)), source("b", 1), source("c", 11))
    expected = [(0, i) for i in range(30) if i not in (0, 7, 29)] + [(1, 0)] + [(2, i) for i in range(11)]
    assert sorted(drawn(mixed.epoch(epoch))) == expected and mixed.epoch_examples == len(expected)


def test_an_example_that_one_of_the_templates_drops_is_not_drawn():
    one, two = of_lengths("a", [3] * 4, [2, 0, 2, 2]), of_lengths("a", [3] * 4, [2, 2, 0, 2])
    assert sorted(drawn(mixture([one, two]).epoch(0))) == [(0, 0), (0, 3)]


def test_every_epoch_has_an_order_of_its_own_which_mixes_the_sources():
    mixed = mixture(source("a", 500), source("b", 500))
    orders = [drawn(mixed.epoch(e)) for e in range(3)]
    for i, order in enumerate(orders):
        positions = np.array([place for place, (number, _) in enumerate(order) if number == 0])
        assert 430 < positions.mean() < 570  # half-way, as those of the other source
        examples = np.array([example for _, example in order])
        assert abs(np.corrcoef(examples, np.arange(1000))[0, 1]) < 0.1
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(order, other, strict=True)) < 10


def test_lengths_are_those_of_the_example_under_its_template():
    made = [source("a", 20, templates=3), source("b", 9)]
    epoch = mixture(*made).epoch(2)
    for number, index, template, source_length, target_length in zip(*rows(epoch), strict=True):
        item = made[number][template]
        assert (len(item.example(index).source), len(item.example(index).target)) == (source_length, target_length)


def test_the_stream_depends_on_the_seed_alone_and_can_be_read_anywhere():
    def made() -> Mixture:
        return mixture(source("a", 20, templates=2), source("b", 30), seed=5)

    inorder, backwards = made(), made()
    forward = [rows(inorder.epoch(e)) for e in range(4)]
    assert [rows(backwards.epoch(e)) for e in (3, 2, 1, 0)] == forward[::-1]
    other = mixture(source("a", 20, templates=2), source("b", 30), seed=6)
    assert rows(other.epoch(0)) != forward[0]
    assert rows(mixture(source("a", 20), seed=-1).epoch(0)) != rows(mixture(source("a", 20), seed=1).epoch(0))


def test_two_copies_of_a_data_set_do_not_march_in_step():
    epoch = mixture(source("a", 300), source("a", 300)).epoch(0)
    one, two = (epoch.example[epoch.source == number] for number in (0, 1))
    assert (one == two).mean() < 0.05


def test_the_order_is_the_one_it_has_always_been():
    mixed = mixture(source("a", 8, templates=2), source("b", 5), seed=7)
    found = [list(zip(*rows(mixed.epoch(e))[:3], strict=True)) for e in (0, 1)]
    assert found == [
        [(1, 4, 0), (0, 0, 0), (1, 2, 0), (0, 7, 1), (1, 0, 0), (0, 1, 0), (1, 3, 0), (0, 6, 0), (0, 4, 0), (0, 2, 0),
         (1, 1, 0), (0, 5, 1), (0, 3, 1)],
        [(1, 2, 0), (0, 7, 1), (0, 6, 0), (1, 3, 0), (0, 0, 1), (0, 4, 0), (1, 1, 0), (1, 4, 0), (0, 5, 0), (0, 3, 1),
         (0, 1, 1), (0, 2, 0), (1, 0, 0)],
    ], GOLDEN  # fmt: skip
    assert mixed.shuffled_rows(8, 1, 16384).tolist() == [6, 1, 4, 7, 5, 2, 3, 0], GOLDEN
    assert hold_out(source("a", 20), 5, seed=3).tolist() == [3, 5, 7, 16, 18], GOLDEN


def test_hashes_are_those_of_splitmix64_in_plain_python():
    def step(state: int, value: int) -> int:
        mixed = ((state ^ value % 2**64) + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return mixed ^ (mixed >> 31)

    values = np.array([0, 1, 2, 12345678901])
    for seed, epoch, purpose in ((0, 0, -1), (7, 3, 2), (-5, 2**40, 0)):
        expected = [step(step(step(seed % 2**64, purpose), epoch), int(value)) for value in values]
        assert _hash(seed, values, epoch, purpose).tolist() == expected


# Weights and sizes


def largest_remainders(rates: list[Fraction], total: int) -> list[int]:
    exact = [rate * total / sum(rates) for rate in rates]
    counts = [int(value) for value in exact]
    order = sorted(range(len(rates)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=5))
@example([(1, 0), (1, 11), (1, 12), (1, 20), (60, 1)])  # two remainders are the same fraction, but not the same float
@example([(1, 0), (1, 1), (1, 12), (1, 30), (28, 1)])
def test_weights_are_honoured_exactly_in_every_epoch(items):
    sizes, weights = [size for size, _ in items], [weight for _, weight in items]
    if not any(weights):
        return
    expected = largest_remainders([Fraction(weight) for weight in weights], sum(sizes))
    made = [source(f"s{i}", size) for i, size in enumerate(sizes)]
    given_ = {"weights": [float(weight) for weight in weights], "mixing": "weights"}
    if any(weight and not count for weight, count in zip(weights, expected, strict=True)):
        with pytest.raises(UserError, match="its weight gives it less than one of"):
            mixture(*made, **given_)
        return
    mixed = mixture(*made, **given_)
    for epoch in range(3):
        counts = Counter(mixed.epoch(epoch).source.tolist())
        assert [counts[i] for i in range(len(sizes))] == expected


@pytest.mark.parametrize(
    "cap, temperature, expected",
    [
        (0, 1.0, [10, 40, 160]),
        (20, 1.0, [10, 20, 20]),
        (40, 1.0, [10, 40, 40]),
        (0, 2.0, [30, 60, 120]),  # 210 in proportion to 1 : 2 : 4
        (40, 2.0, [18, 36, 36]),  # 90 in proportion to 1 : 2 : 2
        (0, 1e9, [70, 70, 70]),
        (0, 0.5, [1, 12, 197]),  # 210 in proportion to 1 : 16 : 256, exactly 0.77, 12.31, 196.92
    ],
)
def test_size_takes_a_cap_and_then_a_temperature(cap, temperature, expected):
    made = [source(f"s{size}", size) for size in (10, 40, 160)]
    mixed = mixture(*made, mixing="proportional", mixing_cap=cap, mixing_temperature=temperature)
    assert np.bincount(mixed.epoch(1).source).tolist() == expected
    assert mixed.epoch_examples == sum(expected)


def test_a_data_set_s_own_cap_replaces_the_common_one():
    made = [source(f"s{size}", size) for size in (10, 40, 160)]
    sources = [Source("a"), Source("b"), Source("c", mixing_cap=80)]
    mixed = mix(sources, made, Data(mixing="proportional", mixing_cap=20))
    assert np.bincount(mixed.epoch(0).source).tolist() == [10, 20, 80]


def test_small_sources_go_on_to_their_next_epoch_while_large_ones_are_not_through():
    sizes = [7, 50, 200]
    made = [source(f"s{i}", size) for i, size in enumerate(sizes)]
    mixed = mixture(*made, mixing="weights", weights=[1.0, 1.0, 1.0])
    seen: Counter[tuple[int, int]] = Counter()
    total = [0, 0, 0]
    for number in range(8):
        epoch = mixed.epoch(number)
        seen.update(drawn(epoch))
        for i, size in enumerate(sizes):
            total[i] += int((epoch.source == i).sum())
            times = {seen[i, example] for example in range(size)}
            assert times <= {total[i] // size, -(-total[i] // size)}, "one came back before all had been drawn"


def test_an_example_that_comes_back_within_an_epoch_draws_its_template_anew():
    mixed = mixture(source("a", 40, templates=2), source("b", 400), mixing="weights", weights=[1.0, 1.0])
    epoch = mixed.epoch(0)
    templates = [epoch.template[(epoch.source == 0) & (epoch.example == i)] for i in range(40)]
    assert {len(drawn) for drawn in templates} == {5, 6}  # 220 draws of 40 examples
    assert sum(len(set(drawn.tolist())) == 2 for drawn in templates) > 30


def test_a_source_of_no_weight_is_not_drawn_and_one_too_small_to_be_drawn_is_refused():
    made = [source("a", 30), source("b", 30)]
    mixed = mixture(*made, mixing="weights", weights=[0.0, 2.0])
    assert set(mixed.epoch(0).source.tolist()) == {1} and mixed.epoch_examples == 60
    with pytest.raises(
        UserError, match="data set a: its weight gives it less than one of 60 examples; raise the weight"
    ):
        mixture(*made, mixing="weights", weights=[0.001, 2.0])


# Templates


def test_a_template_is_drawn_for_each_example_and_epoch():
    mixed = mixture(source("a", 1200, templates=3))
    templates = []
    for number in range(3):
        epoch = mixed.epoch(number)
        of_example = np.zeros(1200, int)
        of_example[epoch.example] = epoch.template
        templates.append(of_example)
        assert np.bincount(of_example, minlength=3).min() > 340
    for one, two in ((0, 1), (0, 2), (1, 2)):
        agree = (templates[one] == templates[two]).mean()
        assert 0.28 < agree < 0.39  # a third, as of independent draws


def test_an_example_s_template_does_not_depend_on_the_other_sources():
    alone = mixture(source("a", 50, templates=3), seed=2)
    among = mixture(source("a", 50, templates=3), source("b", 70), seed=2)
    for number in range(2):
        one, two = alone.epoch(number), among.epoch(number)
        here = two.source == 0
        found = dict(zip(two.example[here].tolist(), two.template[here].tolist(), strict=True))
        assert found == dict(zip(one.example.tolist(), one.template.tolist(), strict=True))


# Held out


@pytest.mark.parametrize("number", [0, 1, 10, 39])
def test_what_is_held_out_is_not_trained_on(number):
    made = [source("a", 40), source("b", 60, dropped=(3, 4))]
    held_out = [hold_out(item, number, seed=1) for item in made]
    assert [len(indices) for indices in held_out] == [number, number]
    assert not {3, 4} & set(held_out[1].tolist())
    mixed = mixture(*made, held_out=held_out)
    trained = {pair for epoch in range(2) for pair in drawn(mixed.epoch(epoch))}
    held = {(i, int(example)) for i, indices in enumerate(held_out) for example in indices}
    kept = {(0, i) for i in range(40)} | {(1, i) for i in range(60) if i not in (3, 4)}
    assert trained | held == kept and not trained & held


def test_what_is_held_out_is_stable_spread_and_grows_with_the_number():
    item = source("a", 1000)
    fifty = hold_out(item, 50, seed=1)
    assert fifty.tolist() == sorted(set(fifty.tolist())) == hold_out(source("other", 1000, templates=2), 50, 1).tolist()
    assert set(fifty.tolist()) < set(hold_out(item, 80, seed=1).tolist())
    assert set(fifty.tolist()) != set(hold_out(item, 50, seed=2).tolist())
    assert np.histogram(fifty, 4, (0, 1000))[0].min() >= 5


def test_a_source_of_which_nothing_is_left_is_refused():
    item = source("a", 10)
    with pytest.raises(
        UserError, match=r"data set a: no example is left for training; lower config\.data\.validation_size"
    ):
        mixture(item, held_out=[hold_out(item, 10, seed=0)])
