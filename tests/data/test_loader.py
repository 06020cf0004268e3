import itertools
import math
import threading
import time
from collections import Counter

import numpy as np
import pytest

from jax_it.config import Data, Duration, Source
from jax_it.data import loader
from jax_it.data.encoded import Encoded
from jax_it.data.formats import Seq2SeqBatch, Seq2SeqFormat
from jax_it.data.loader import Part, Step, TrainData
from jax_it.data.mixture import mix
from jax_it.data.packing import Layout, Shape, bucket, pack
from tests.data.letters import FIRST, of_lengths

START, PAD = 7, 0  # unlike each other, as in some models
LIMIT = Shape(1, 24, 20)
PACKED = Shape(2, 24, 30)
Example = tuple[tuple[int, ...], tuple[int, ...]]


def made(packed: bool = True, number: int = 50, rows: int = 4, templates: int = 1, seed: int = 3) -> TrainData:
    """Two sources of random lengths, in which no token occurs twice."""
    rng = np.random.default_rng(0)
    parts, first = [], FIRST
    for name, size in (("a", number), ("b", number // 3)):
        sources, targets = rng.integers(2, 25, size), rng.integers(2, 12, size)
        targets[0] = 20
        versions = []
        for _ in range(templates):
            versions.append(of_lengths(name, sources, targets, first))
            first += int(sources.sum() + targets.sum())
        parts.append(versions)
    data = Data(max_source_length=LIMIT.source, max_target_length=LIMIT.target, packing=packed, seed=seed)
    mixed = mix([Source(path="a"), Source(path="b")], parts, data)
    epoch = mixed.epoch(0)
    per_row = len(epoch.source) / len(pack(epoch.source_length, epoch.target_length, PACKED)) if packed else 1.0
    layout = Layout(PACKED if packed else LIMIT, rows, per_row, 0.0, 0.0)
    return TrainData(mixed, Seq2SeqFormat(START, PAD), layout, packed)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an epoch has several."""
    monkeypatch.setattr(loader, "WINDOW", 25)


def all_examples(data: TrainData, epoch: int) -> Counter[Example]:
    """The examples of an epoch, by the mixture alone."""
    drawn, found = data.mixture.epoch(epoch), Counter()
    for source, example, template in zip(drawn.source, drawn.example, drawn.template, strict=True):
        item = data.mixture.tokenized[source][template]
        found[tuple(item.example(example).source.tolist()), tuple(item.example(example).target.tolist())] += 1
    return found


def rows_of(batch: Seq2SeqBatch) -> list[list[tuple[list[int], list[int], int]]]:
    """(source, target, block) of each example of each row, read off the arrays."""
    rows = []
    for r in range(len(batch.targets_BT)):
        row = []
        for segment in range(1, int(batch.segments_BT[r].max()) + 1):
            (block,) = {int(block) for block in np.argwhere(batch.source_segments_BGS[r] == segment)[:, 0]}
            source = batch.source_BGS[r][batch.source_segments_BGS[r] == segment]
            row.append((source.tolist(), batch.targets_BT[r][batch.segments_BT[r] == segment].tolist(), block))
        rows.append(row)
    return rows


def examples_of(*steps: Step) -> Counter[Example]:
    return Counter(
        (tuple(source), tuple(target)) for step in steps for row in rows_of(step.batch) for source, target, _ in row
    )


def filled(values: list[int], length: int, with_: int) -> list[int]:
    return values + [with_] * (length - len(values))


def slow_batch(rows: list[list[tuple[list[int], list[int], int]]], shape: Shape) -> Seq2SeqBatch:
    """The arrays of these rows, put together position by position."""
    columns: list[list] = [[] for _ in Seq2SeqBatch._fields]
    for row in rows:
        blocks: list[tuple[list[int], list[int], list[int]]] = [([], [], []) for _ in range(shape.blocks)]
        tokens, targets, segments, positions = [], [], [], []
        for segment, (source, target, block) in enumerate(row, 1):
            for position, token in enumerate(source):
                for values, value in zip(blocks[block], (token, segment, position), strict=True):
                    values.append(value)
            for position, token in enumerate(target):
                tokens.append(target[position - 1] if position else START)
                targets.append(token)
                segments.append(segment)
                positions.append(position)
        for column, k, pad in zip(columns[:3], range(3), (PAD, 0, 0), strict=True):
            column.append([filled(block[k], shape.source, pad) for block in blocks])
        weights = [1] * len(targets)
        for column, values, pad in zip(
            columns[3:], (tokens, targets, weights, segments, positions), (PAD, PAD, 0, 0, 0), strict=True
        ):
            column.append(filled(values, shape.target, pad))
    arrays = {name: np.array(column, np.int32) for name, column in zip(Seq2SeqBatch._fields, columns, strict=True)}
    arrays["weights_BT"] = arrays["weights_BT"].astype(np.float32)
    return Seq2SeqBatch(**arrays)


def assert_equal(one: Seq2SeqBatch, two: Seq2SeqBatch) -> None:
    for name, a, b in zip(Seq2SeqBatch._fields, one, two, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and (a == b).all(), name


# Batches


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_is_what_its_rows_are_position_by_position(packed):
    data = made(packed, templates=2)
    for number in range(12):
        step = data.batch(number)
        rows = rows_of(step.batch)
        assert_equal(step.batch, slow_batch(rows, step.shape))
        assert len(rows) == 4 and all(rows) and step.step == number
        if not packed:
            assert [len(row) for row in rows] == [1] * 4
        assert step.sizes == (
            sum(map(len, rows)),
            sum(len(source) for row in rows for source, _, _ in row),
            sum(len(target) for row in rows for _, target, _ in row),
            step.batch.source_BGS.size,
            step.batch.targets_BT.size,
        )
        assert step.sizes.tokens == step.sizes.source_tokens + step.sizes.target_tokens


def test_the_format_puts_examples_where_they_are_placed():
    source, target = np.array([5, 1]), np.array([6, 8, 1])
    rows = [[Encoded(source, target, 1), Encoded(source + 3, target[:2], 1)], [], [Encoded(source, target, 0)]]
    batch = Seq2SeqFormat(start=START, pad=9).batch(rows, Shape(2, 5, 6))
    assert batch.source_BGS.tolist() == [[[9] * 5, [5, 1, 8, 4, 9]], [[9] * 5] * 2, [[5, 1, 9, 9, 9], [9] * 5]]
    assert batch.source_segments_BGS[0].tolist() == [[0] * 5, [1, 1, 2, 2, 0]]
    assert batch.source_positions_BGS[0].tolist() == [[0] * 5, [0, 1, 0, 1, 0]]
    assert batch.targets_BT.tolist() == [[6, 8, 1, 6, 8, 9], [9] * 6, [6, 8, 1, 9, 9, 9]]
    assert batch.tokens_BT.tolist() == [[7, 6, 8, 7, 6, 9], [9] * 6, [7, 6, 8, 9, 9, 9]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 2, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 2, 0, 0, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_a_step_is_the_same_read_directly_in_sequence_or_after_a_restart(packed):
    duration = Duration(3, "epochs")
    steps = list(made(packed).read(0, duration, loader.WHOLE))
    total = made(packed).steps(duration)
    assert [step.step for step in steps] == list(range(total))
    backwards = made(packed)
    for number in range(total - 2, -1, -1):
        assert_equal(backwards.batch(number).batch, steps[number].batch)
    for start in (1, total // 2, total - 1):
        for again in made(packed).read(start, duration, loader.WHOLE):
            assert again.sizes == steps[again.step].sizes
            assert_equal(again.batch, steps[again.step].batch)
        assert again.step == total - 1


def test_another_seed_gives_other_batches_of_the_same_examples():
    one, two = made(seed=3), made(seed=4)
    assert examples_of(one.batch(0)) != examples_of(two.batch(0))
    assert all_examples(one, 0) == all_examples(two, 0)


def test_rows_are_not_trained_on_in_the_order_in_which_they_were_packed(monkeypatch):
    monkeypatch.setattr(loader, "WINDOW", 1000)
    data = made(number=200, rows=1)
    drawn = data.mixture.epoch(0)
    packed = pack(drawn.source_length, drawn.target_length, PACKED)
    row_of = {}
    for row in range(len(packed)):
        i = packed.members[packed.ends[row]]  # its first example, whose tokens no other has
        row_of[tuple(data.mixture.tokenized[drawn.source[i]][0].example(drawn.example[i]).source.tolist())] = row
    steps = data.read(0, Duration(1, "epochs"), loader.WHOLE)
    places = [row_of[tuple(rows_of(step.batch)[0][0][0])] for step in steps]
    assert sorted(places) == list(range(len(packed)))
    assert abs(np.corrcoef(places, range(len(places)))[0, 1]) < 0.25


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_several_hosts_are_the_whole_batch(packed, count):
    data = made(packed, rows=6)
    for number in (0, 5, data.steps(Duration(1, "epochs")) - 1):
        whole = data.batch(number, Part((0,), 1, 4))
        parts = [data.batch(number, Part((i,), count, 4)) for i in range(count)]
        assert_equal(Seq2SeqBatch(*map(np.concatenate, zip(*(part.batch for part in parts), strict=True))), whole.batch)
        assert all(part.sizes == whole.sizes and part.shape == whole.shape for part in parts)


@pytest.mark.parametrize(
    "multiple, count, rows", [(1, 1, 6), (3, 1, 6), (4, 1, 8), (16, 1, 16), (1, 4, 8), (3, 2, 6), (4, 3, 12)]
)
def test_rows_that_a_multiple_adds_are_empty_and_the_rest_stays(multiple, count, rows):
    data = made(rows=6)
    alone = data.batch(2)
    parts = [data.batch(2, Part((i,), count, multiple)) for i in range(count)]
    batch = Seq2SeqBatch(*map(np.concatenate, zip(*(part.batch for part in parts), strict=True)))
    assert_equal(batch, slow_batch(rows_of(alone.batch) + [[]] * (rows - 6), PACKED))
    assert parts[0].sizes[:3] == alone.sizes[:3]
    assert parts[0].sizes[3:] == (rows * PACKED.blocks * PACKED.source, rows * PACKED.target)


def test_a_padded_batch_is_as_long_as_its_longest_rounded_up():
    data = made(packed=False)
    for number in range(12):
        step = data.batch(number)
        lengths = [(len(source), len(target)) for row in rows_of(step.batch) for source, target, _ in row]
        source, target = (max(side) for side in zip(*lengths, strict=True))
        assert step.shape == (1, 16 if source <= 16 else 24, 16 if target <= 16 else 20)


# Epochs


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_an_epoch_trains_on_every_example_exactly_once(packed, rows):
    data = made(packed, rows=rows, templates=2)
    (one, two, three) = (all_examples(data, epoch) for epoch in range(3))
    assert one != two and sum(one.values()) == data.mixture.epoch_examples == 66 and set(one.values()) == {1}
    assert examples_of(*data.read(0, Duration(1, "epochs"), loader.WHOLE)) == one
    assert examples_of(*data.read(0, Duration(3, "epochs"), loader.WHOLE)) == one + two + three
    half = examples_of(*data.read(0, Duration(1.5, "epochs"), loader.WHOLE))
    assert one < half < one + two and 20 < (half - one).total() < 46


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_told_where_the_examples_of_a_step_are_from(packed):
    data = made(packed, templates=2)
    origin = {  # no token occurs twice
        tuple(item.example(i).target.tolist()): (item.name, i + 1)
        for templates in data.mixture.tokenized
        for item in templates
        for i in range(item.counts.examples)
    }
    duration = Duration(1.5, "epochs")
    for step in data.read(0, duration, loader.WHOLE):
        expected = {origin[target] for _, target in examples_of(step)}
        told = data.examples(step.step, duration)
        assert {(source["source"], record) for source in told for record in source["records"]} == expected
        assert sum(len(source["records"]) for source in told) == len(expected)


@pytest.mark.parametrize("packed", [True, False])
def test_the_last_batch_of_the_run_ends_in_empty_rows(packed):
    data = made(packed, rows=7)
    *_, last = data.read(0, Duration(1, "epochs"), Part((0,), 1, 8))
    rows = rows_of(last.batch)
    real = len([row for row in rows if row])
    assert len(rows) == 8 and 0 < real < 7 and not any(rows[real:])
    assert last.sizes.examples == sum(map(len, rows)) and last.batch.weights_BT[real:].sum() == 0
    on = data.batch(last.step, Part((0,), 1, 8))  # without an end, the next epoch's rows come
    assert rows_of(on.batch)[:real] == rows[:real] and len([row for row in rows_of(on.batch) if row]) == 7


def test_a_batch_across_epochs_takes_the_last_rows_of_one_and_the_first_of_the_next():
    data = made(packed=False, rows=7)  # 66 rows an epoch
    found = examples_of(data.batch(9))
    one, two = all_examples(data, 0), all_examples(data, 1)
    assert found <= one + two and found == examples_of(*(data.batch(i) for i in range(10))) - examples_of(
        *(data.batch(i) for i in range(9))
    )
    assert examples_of(*(data.batch(i) for i in range(10))) >= one


# Durations


@pytest.mark.parametrize("packed", [True, False])
def test_rates_are_those_of_the_first_epoch(packed):
    data = made(packed)
    rows = sum(len([row for row in rows_of(s.batch) if row]) for s in data.read(0, Duration(1, "epochs"), loader.WHOLE))
    tokens = sum(len(source) + len(target) for source, target in all_examples(data, 0))
    assert data.rates.epoch_steps == rows / 4
    assert data.rates.step_examples == pytest.approx(66 / (rows / 4))
    assert data.rates.step_tokens == pytest.approx(tokens / (rows / 4))


@pytest.mark.parametrize("packed", [True, False])
def test_durations_are_steps(packed):
    data = made(packed)
    tokens = sum(len(source) + len(target) for source, target in all_examples(data, 0))
    epoch = data.rates.epoch_steps
    assert data.steps(Duration(5, "steps")) == 5
    assert data.steps(Duration(66, "examples")) == data.steps(Duration(tokens, "tokens")) == math.ceil(epoch)
    assert data.steps(Duration(33, "examples")) == math.ceil(epoch / 2)
    assert data.steps(Duration(1, "epochs")) == math.ceil(epoch)
    assert data.steps(Duration(0.25, "epochs")) in (math.floor(epoch / 4), math.ceil(epoch / 4))
    assert len(list(data.read(0, Duration(40, "steps"), loader.WHOLE))) == 40
    rows = [
        len([row for row in rows_of(step.batch) if row]) for step in data.read(0, Duration(40, "steps"), loader.WHOLE)
    ]
    assert rows == [4] * 40  # in steps, epochs follow each other without empty rows


def test_buckets_are_few_and_hold_their_length():
    sizes = sorted([16 * 2**i for i in range(8)] + [24 * 2**i for i in range(8)])
    for length, limit in itertools.product(range(1, 1025), (1024, 1000)):
        if length <= limit:
            assert bucket(length, limit) == min(min(size for size in sizes if size >= length), limit)


# Reading ahead


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_reading_ahead_is_bounded_and_ends_with_the_reader(monkeypatch):
    data, asked = made(), []
    batch = data.batch
    monkeypatch.setattr(data, "batch", lambda step, *rest: asked.append(step) or batch(step, *rest))
    steps = data.read(3, Duration(1000, "steps"), Part())
    assert [next(steps).step for _ in range(2)] == [3, 4]
    time.sleep(0.2)
    assert len(asked) <= 2 + loader.AHEAD + 1 and batch_threads()
    steps.close()
    for thread in batch_threads():
        thread.join(10)
    assert not batch_threads()


def test_an_error_of_the_thread_reaches_the_reader(monkeypatch):
    data = made()
    monkeypatch.setattr(data, "batch", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        next(data.read(0, Duration(5, "steps"), Part()))
