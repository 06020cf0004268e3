"""Which request gets which slot, and when: the scheduler with an engine of lists, which needs no model."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jax_it.generation import length_buckets, requests, scheduler, stop
from jax_it.generation.requests import INVALID, DecodeResult, PrefillBatch, Request, RequestOutput, Sampling
from jax_it.generation.scheduler import Scheduler

END = 1


class FakeEngine:
    """Continues a prompt [first, …] with first + 1, first + 2, …; a number of 100 or more is the end token instead.

    `calls` are what was asked of it, in order: (name, what tells).
    """

    prompt_widths: tuple[int, ...] = ()

    def __init__(self, slots: int, max_new_tokens: int = 8, samples: int = 1, num_beams: int = 1, shards: int = 1):
        self.num_slots, self.max_new_tokens, self.slots_per_request = slots, max_new_tokens, samples
        self.num_beams, self.shards, self.eos_ids, self.max_logprobs = num_beams, shards, (END,), 0
        self.sampling, self.vocab_size = Sampling(num_beams=num_beams, num_samples=samples), 300
        self.prefill_widths: set[int] = set()
        self.capacity = 0
        self.slots = [SimpleNamespace(texts=[], done=True, limit=0, first=0) for _ in range(slots)]
        self.calls: list[tuple] = []
        self.steps = 0

    def reserve(self, capacity: int) -> None:
        if capacity > self.capacity:
            self.calls.append(("reserve", capacity))
            self.capacity = capacity

    def insert(self, batch: PrefillBatch) -> None:
        rows, width = batch.tokens_QS.shape
        assert width <= self.capacity and len(batch.slots_Y) == rows * self.slots_per_request
        self.prefill_widths.add(width)
        prompts = [tokens[segments > 0].tolist() for tokens, segments in zip(*batch[:2], strict=True)]
        inserted = []
        settings = batch.settings
        arrays = batch.slots_Y, batch.prompts_Y, settings.text_id_Y, settings.limit_Y
        for slot, prompt, row, limit in zip(*map(list, arrays), strict=True):
            if slot < self.num_slots:
                self.slots[slot] = SimpleNamespace(texts=[], done=False, limit=limit, first=prompts[prompt][0])
                inserted.append(int(row))
        self.calls.append(("insert", inserted))

    def resize(self, slots: Sequence[int]) -> None:
        self.calls.append(("resize", len(slots)))
        self.slots = [SimpleNamespace(**vars(self.slots[slot])) for slot in slots]

    def decode(self, idle: Sequence[bool], max_steps: int, until_done: int, **settings) -> DecodeResult:
        assert len(idle) == len(self.slots) and not all(idle)
        for slot, nobody in zip(self.slots, idle, strict=True):
            slot.done = slot.done or nobody
        steps = 0
        while steps < max_steps and sum(slot.done for slot in self.slots) < until_done:
            steps += 1
            for slot in self.slots:
                if not slot.done:
                    token = slot.first + len(slot.texts) + 1
                    slot.texts.append(token if token < 100 else INVALID if token >= 200 else END)
                    slot.done = token >= 100 or len(slot.texts) == slot.limit
        assert steps, "a call for nothing"
        self.steps += steps
        self.calls.append(("decode", steps))
        tokens = np.full((len(self.slots), 1, self.max_new_tokens), END)
        for row, slot in enumerate(self.slots):
            tokens[row, 0, : len(slot.texts)] = slot.texts
        numbers = np.array([len(slot.texts) for slot in self.slots])
        return DecodeResult(np.array([slot.done for slot in self.slots]), numbers, tokens, np.zeros(tokens.shape))


class FakeServer(FakeEngine):
    """After `warm_up`: computes 64 tokens of prompts at a time."""

    prompt_widths, prefill_chunk, small_chunk, can_chunk, num_blocks, max_prompt = (32, 64), 64, 32, True, 0, 1000

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        return (self.num_slots,)

    def prefill_sizes(self, width: int) -> tuple[int, ...]:
        return tuple(dict.fromkeys([1, 64 // width]))

    extend_sizes = prefill_sizes

    def insert(self, batch: PrefillBatch) -> None:
        self.capacity = self.max_prompt
        self.calls.append(("prefill", batch.tokens_QS.shape))
        super().insert(batch)

    def extend(self, prompts: Sequence[tuple[int, Sequence[int], int]], width: int) -> None:
        assert 0 < len(prompts) <= self.extend_sizes(width)[-1]
        for slot, tokens, start in prompts:
            assert 0 < len(tokens) <= width
            self.computed = {**getattr(self, "computed", {}), slot: start + len(tokens)}
        self.calls.append(("extend", sum(len(tokens) for _, tokens, _ in prompts)))

    def copy(self, source: int, target: int) -> None:
        self.calls.append(("copy", target))
        self.computed = getattr(self, "computed", {})
        self.computed[target] = self.computed.get(source)

    def begin(self, slot: int, prompt: Sequence[int], settings: requests.SlotSettings) -> None:
        assert self.computed[slot] in (len(prompt) - 1, None)
        limit = int(settings.limit_Y[0])
        self.slots[slot] = SimpleNamespace(texts=[], done=False, limit=limit, first=prompt[0])


def finish(scheduler: Scheduler) -> list[RequestOutput]:
    """The outputs of all steps until nothing is left."""
    outputs = []
    while scheduler.has_unfinished:
        outputs += scheduler.step()
    return outputs


def requested(scheduler: Scheduler, *prompts: list[int], **settings) -> Scheduler:
    for i, prompt in enumerate(prompts):
        scheduler.add_request(Request(i, prompt, index=i, **settings))
    return scheduler


def names(engine: FakeEngine) -> list[str]:
    return [name for name, _ in engine.calls]


def inserted(engine: FakeEngine) -> list[list[int]]:
    """The requests that were prefilled together."""
    return [told for name, told in engine.calls if name == "insert"]


@pytest.mark.parametrize("module", [scheduler, requests, length_buckets, stop])
def test_scheduling_is_plain_python(module):
    lines = Path(module.__file__).read_text().splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported and not any(name.split(".")[0] in ("jax", "flax") for name in imported)


def test_a_text_ends_at_its_end_token_or_its_limit_or_the_engines():
    engine = FakeEngine(4)
    scheduler = Scheduler(engine)
    for i, (first, limit) in enumerate([(96, None), (10, 3), (10, None), (10, 99)]):
        scheduler.add_request(Request(i, [first], limit))
    found = {output.request_id: output for output in finish(scheduler)}
    assert found[0] == RequestOutput(0, 0, [97, 98, 99], None, "stop")
    assert found[1] == RequestOutput(1, 0, [11, 12, 13], None, "length")
    assert found[2] == RequestOutput(2, 0, [11, 12, 13, 14, 15, 16, 17, 18], None, "length")
    assert found[3].tokens == found[2].tokens


def test_a_limit_below_one_is_an_error():
    with pytest.raises(ValueError, match="at least one token"):
        Scheduler(FakeEngine(1)).add_request(Request(0, [5], 0))


def test_prompts_of_a_list_are_taken_shortest_first_in_full_groups():
    engine = FakeEngine(16)  # two prompts at a time
    prompts = [[5] * length for length in (9, 2, 7, 3, 8, 1, 4)]
    finish(requested(Scheduler(engine), *prompts))
    assert inserted(engine) == [[5], [1, 3], [6, 2], [4, 0]]


def test_prompts_of_a_list_wait_until_a_whole_group_fits():
    engine = FakeEngine(16)
    scheduler = Scheduler(engine)
    for i in range(18):
        scheduler.add_request(Request(i, [10], 1 + i % 8))
    finish(scheduler)
    assert [len(group) for group in inserted(engine)] == [2] * 9
    assert engine.calls[9] == ("decode", 1), "two of 16 texts have one token"


def test_requests_that_arrive_while_it_runs_get_slots_that_become_free():
    engine = FakeEngine(2)
    scheduler = requested(Scheduler(engine, stream_interval=1), [10], [96])
    assert [output.tokens for output in scheduler.step()] == [[11], [97]]
    scheduler.add_request(Request(2, [20], 2, index=2))
    scheduler.add_request(Request(3, [30], 2, index=3))
    outputs = finish(scheduler)
    last = {output.request_id: output for output in outputs if output.finish_reason}
    assert {i: output.tokens for i, output in last.items()} == {
        0: [11, 12, 13, 14, 15, 16, 17, 18], 1: [97, 98, 99], 2: [21, 22], 3: [31, 32]
    }  # fmt: skip
    assert inserted(engine)[-2:] == [[2], [3]]
    assert engine.steps == 8, "the two later ones run beside the longest"


def test_streamed_requests_are_served_in_the_order_of_arrival_and_a_list_shortest_first():
    prompts = [[5] * 9, [5] * 3, [5] * 1, [5] * 2]
    for interval, order in ((4, [[0], [1], [2], [3]]), (0, [[2], [3], [1], [0]])):
        engine = FakeEngine(1)
        finish(requested(Scheduler(engine, interval), *prompts))
        assert inserted(engine) == order


def test_tokens_are_streamed_as_they_come():
    scheduler = requested(Scheduler(FakeEngine(2), stream_interval=3), [10], [95])
    assert scheduler.step() == [
        RequestOutput(0, 0, [11, 12, 13], None, None),
        RequestOutput(1, 0, [96, 97, 98], None, None),
    ]
    assert scheduler.step() == [
        RequestOutput(0, 0, [11, 12, 13, 14, 15, 16], None, None),
        RequestOutput(1, 0, [96, 97, 98, 99], None, "stop"),
    ]
    assert scheduler.step() == [RequestOutput(0, 0, [11, 12, 13, 14, 15, 16, 17, 18], None, "length")]
    assert not scheduler.has_unfinished and scheduler.step() == []


def test_beams_are_not_streamed_before_they_end():
    scheduler = requested(Scheduler(FakeEngine(2, num_beams=2), stream_interval=3), [10])
    assert [scheduler.step() for _ in range(2)] == [[], []]
    assert [output.finish_reason for output in scheduler.step()] == ["length"]


@pytest.mark.parametrize("interval", [0, 2])
def test_a_text_is_cut_where_its_stop_is_first_true_and_its_slot_is_free(interval):
    engine = FakeEngine(1, max_new_tokens=100)
    scheduler = Scheduler(engine, interval)
    scheduler.add_request(Request(0, [10], stop=lambda tokens: 13 in tokens))
    scheduler.add_request(Request(1, [20], 1))
    outputs = [output for output in finish(scheduler) if output.finish_reason]
    assert outputs == [RequestOutput(0, 0, [11, 12, 13], None, "stop"), RequestOutput(1, 0, [21], None, "length")]
    assert engine.steps <= 17


def test_an_aborted_request_gets_no_more_outputs_and_its_slots_go_to_the_next():
    engine = FakeEngine(2, samples=2)
    scheduler = requested(Scheduler(engine, stream_interval=2), [10], [20], [30], [40])
    assert {output.request_id for output in scheduler.step()} == {0}
    scheduler.abort(0)
    scheduler.abort(2)
    scheduler.abort(99)  # aborting one that has ended is not an error
    outputs = finish(scheduler)
    assert {(output.request_id, output.sample) for output in outputs} == {(1, 0), (1, 1), (3, 0), (3, 1)}
    assert inserted(engine) == [[0, 1], [2, 3], [6, 7]]
    scheduler = requested(Scheduler(FakeEngine(1)), [10], [20])
    for i in range(2):
        scheduler.abort(i)
    assert not scheduler.has_unfinished and scheduler.step() == []


def test_the_slots_of_a_list_become_fewer_at_its_end_and_all_again_for_requests_that_do_not_fit():
    engine = FakeEngine(16)
    scheduler = Scheduler(engine)
    for i in range(16):
        scheduler.add_request(Request(i, [10], 8 if i < 4 else 2))
    assert len(scheduler.step()) == 12
    scheduler.add_request(Request(16, [20], 1))
    scheduler.step()
    assert "resize" not in names(engine), "five run"
    scheduler = Scheduler(engine := FakeEngine(16))
    for i in range(16):
        scheduler.add_request(Request(i, [10], 3 if i < 4 else 2))
    outputs = scheduler.step() + scheduler.step()
    assert engine.calls[-2:] == [("resize", 4), ("decode", 1)] and len(outputs) == 16
    for i in range(16, 22):
        scheduler.add_request(Request(i, [20 + i], 2))
    outputs = finish(scheduler)
    assert ("resize", 16) in engine.calls
    assert {output.request_id: output.tokens for output in outputs} == {i: [21 + i, 22 + i] for i in range(16, 22)}


def test_running_texts_survive_a_change_of_the_slots():
    scheduler = Scheduler(engine := FakeEngine(16), stream_interval=2)
    for i in range(16):
        scheduler.add_request(Request(i, [10 + i], 8 if i % 5 == 0 else 2))
    scheduler.step()
    scheduler.step()
    assert engine.calls[-2:] == [("resize", 4), ("decode", 2)]
    for i in range(16, 20):
        scheduler.add_request(Request(i, [30 + i], 2))
    outputs = [output for output in finish(scheduler) if output.finish_reason == "length"]
    assert names(engine).count("resize") >= 2
    for output in outputs:
        first = 10 + output.request_id if output.request_id < 16 else 30 + output.request_id
        assert output.tokens == list(range(first + 1, first + 1 + len(output.tokens)))
    assert [len(output.tokens) for output in outputs if output.request_id < 16] == [8] * 4


def test_slots_that_cannot_become_fewer_on_their_devices_stay():
    engine = FakeEngine(16, shards=16)
    finish(requested(Scheduler(engine), [10], [20], max_new_tokens=2))
    assert names(engine) == ["reserve", "insert", "decode"]


def test_the_cache_grows_once_for_all_prompts_that_start_together():
    engine = FakeEngine(4)
    scheduler = requested(Scheduler(engine, stream_interval=1), [5] * 3, [5] * 300)
    scheduler.step()
    scheduler.add_request(Request(2, [5] * 700, 1))
    finish(scheduler)
    assert [told for name, told in engine.calls if name == "reserve"] == [384, 768]


def test_a_text_whose_logits_are_not_finite_is_an_error_and_the_others_go_on():
    scheduler = requested(Scheduler(FakeEngine(2)), [200], [10])
    assert {output.request_id: output.finish_reason for output in finish(scheduler)} == {0: "error", 1: "length"}


def test_texts_and_short_prompts_do_not_wait_for_a_long_prompt_which_is_computed_in_chunks():
    engine = FakeServer(3)
    scheduler = requested(Scheduler(engine, stream_interval=1), [10])
    assert [output.tokens for output in scheduler.step()] == [[11]]
    scheduler.add_request(Request(1, [20] * 250, 1, index=1))
    scheduler.add_request(Request(2, [30], 2, index=2))
    assert [output.tokens for output in scheduler.step()] == [[11, 12], [31]]
    assert engine.calls[-3:] == [("insert", [2]), ("extend", 64), ("decode", 1)]
    found = [[(output.request_id, len(output.tokens)) for output in scheduler.step()] for _ in range(3)]
    assert found == [[(0, 3), (2, 2)], [(0, 4)], [(0, 5), (1, 1)]], "250 tokens are 4 chunks, the last one smaller"


def test_prompts_that_arrive_together_are_prefilled_group_by_group_in_order():
    engine = FakeServer(8)
    scheduler = requested(Scheduler(engine, stream_interval=1), [5], [5] * 2, [5] * 40, [5] * 9, max_new_tokens=9)
    for _ in range(3):
        scheduler.step()
    assert inserted(engine) == [[0, 1], [2], [3]]


def test_a_prompt_that_is_aborted_between_its_chunks_leaves_its_slot():
    engine = FakeServer(1)
    scheduler = requested(Scheduler(engine, stream_interval=1), [5] * 900, [10], max_new_tokens=2)
    assert scheduler.step() == [] and scheduler.num_running == scheduler.num_waiting == 1
    scheduler.abort(0)
    assert [output.tokens for output in scheduler.step()] == [[11]]


@pytest.mark.parametrize("lengths, shape", [([20], (1, 32)), ([20, 5], (2, 32)), ([50], (1, 64)), ([20, 50], (1, 32))])
def test_a_server_prefills_few_prompts_in_few_rows(lengths, shape):
    engine = FakeServer(4)
    requested(Scheduler(engine, stream_interval=1), *([5] * length for length in lengths)).step()
    assert ("prefill", shape) in engine.calls


@pytest.mark.parametrize("interval", [0, 1, 5])
def test_random_requests_all_come_back_whole_whenever_they_arrive(interval):
    rng = np.random.default_rng(interval)
    for slots, samples, shards in ((1, 1, 1), (5, 2, 1), (16, 1, 4), (32, 3, 2)):
        scheduler = Scheduler(FakeEngine(slots, 8, samples, shards=shards), interval)
        aborted: set[int] = set()
        ended: dict[tuple[int, int], list[int]] = {}
        added: dict[int, int] = {}
        while scheduler.has_unfinished or len(added) < 40:
            for _ in range(rng.integers(0, 6) if len(added) < 40 else 0):
                added[len(added)] = int(rng.integers(2, 92))
                prompt = [added[len(added) - 1]] * int(rng.integers(1, 200))
                scheduler.add_request(Request(len(added) - 1, prompt, int(rng.integers(1, 12))))
            if added and rng.random() < 0.2:
                aborted.add(gone := int(rng.integers(0, len(added))))
                scheduler.abort(gone)
            for request, sample, tokens, _, reason, *_ in scheduler.step():
                assert tokens == [added[request] + n for n in range(1, len(tokens) + 1)]
                assert (request, sample) not in ended
                if reason:
                    ended[request, sample] = tokens
        whole = {(i, sample) for i in added if i not in aborted for sample in range(samples)}
        assert whole <= ended.keys()


@pytest.mark.parametrize("length", [20, 150])
def test_the_texts_of_one_request_share_one_prefill(length):
    engine = FakeServer(4)
    sampling = requests.GREEDY._replace(num_samples=3)
    scheduler = requested(Scheduler(engine, stream_interval=1), [3] * length, [5] * 10, sampling=sampling)
    found = {output[:2]: output.tokens for output in finish(scheduler) if output.finish_reason}
    assert found.keys() == {(request, sample) for request in range(2) for sample in range(3)}
    assert all(tokens[0] == (4, 6)[request] for (request, _), tokens in found.items())
    computed = sum(told for name, told in engine.calls if name == "extend")
    assert computed == (length - 1 if length > 64 else 0)
    assert [told for name, told in engine.calls if name == "copy"][:2] == [1, 2]
