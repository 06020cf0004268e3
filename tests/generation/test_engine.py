"""Decoded tokens are those of the full forward pass, and a row's tokens do not depend on what is around it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.data.formats import CausalBatch, Seq2SeqBatch
from jax_it.errors import UserError
from jax_it.generation import Engine, Request, Sampling, Scheduler, generate, length_buckets, scheduler
from tests.generation.conftest import by_prompt

LENGTH = 10
SAMPLINGS = {
    "greedy": Sampling(),
    "sampled": Sampling(temperature=0.8, top_k=20, top_p=0.95, seed=5),
    "beams": Sampling(num_beams=3, early_stopping=True),
}


@pytest.fixture(scope="module", params=SAMPLINGS)
def sampling(request) -> Sampling:
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def engines(tiny) -> dict[Sampling, Engine]:
    """One of each kind, for batches of 8, so that few are compiled."""
    return {sampling: Engine(tiny.model, tiny.mesh, LENGTH, 8, sampling) for sampling in SAMPLINGS.values()}


@pytest.fixture(scope="module")
def texts(tiny, engines, sampling) -> list[list[int]]:
    """Each source's tokens, decoded in batches of 8."""
    found = by_prompt(generate(engines[sampling], tiny.params, tiny.sources))
    return [found[i] for i in range(len(tiny.sources))]


def test_greedy_tokens_are_the_likeliest_of_the_full_forward_pass_at_each_step(tiny, engines):
    rows, width = len(tiny.sources), max(map(len, tiny.sources))
    source, segments = np.zeros((2, rows, width), np.int32)
    for row, tokens in enumerate(tiny.sources):
        source[row, : len(tokens)], segments[row, : len(tokens)] = tokens, 1

    @jax.jit
    def full_pass(tokens_BT: jax.Array) -> jax.Array:
        ones_BT = jnp.ones((rows, LENGTH), jnp.int32)
        positions = np.broadcast_to(np.arange(width), segments.shape)[:, None]
        batch = Seq2SeqBatch(source[:, None], segments[:, None], positions, tokens_BT, ones_BT, ones_BT, ones_BT, None)
        return tiny.model.logits(tiny.model.head(tiny.params), tiny.model.hidden_states(tiny.params, batch)[0]).argmax(
            -1
        )

    tokens_BT = np.full((rows, LENGTH + 1), tiny.model.config.decoder_start_token_id)
    for position in range(LENGTH):
        tokens_BT[:, position + 1] = full_pass(tokens_BT[:, :LENGTH])[:, position]
    found = by_prompt(generate(engines[Sampling()], tiny.params, tiny.sources))
    (end,) = tiny.model.config.eos_token_ids
    for row, text in enumerate(tokens_BT[:, 1:].tolist()):
        assert found[row] == (text[: text.index(end)] if end in text else text)


def test_texts_differ_and_end_at_various_lengths(tiny, texts):
    assert len({tuple(text) for text in texts}) >= 10
    assert len({len(text) for text in texts}) >= 4 and max(map(len, texts)) == LENGTH
    assert not any(set(tiny.model.config.eos_token_ids) & set(text) for text in texts)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused_and_never_become_text(tiny, engines, sampling, value):
    params = tiny.params | {"head": tiny.params["head"].at[7, 3].set(value)}
    with pytest.raises(UserError, match=r"the model's logits for prompt \d+ are not finite"):
        list(generate(engines[sampling], params, tiny.sources))


@pytest.mark.parametrize("batch_size, width", [(1, 32), (3, 64)])
def test_neither_the_batch_size_nor_padding_changes_a_row(tiny, sampling, texts, batch_size, width, monkeypatch):
    monkeypatch.setattr(length_buckets, "SMALLEST", width)
    found = list(generate(Engine(tiny.model, tiny.mesh, LENGTH, batch_size, sampling), tiny.params, tiny.sources))
    assert len(found) == len(texts)
    assert by_prompt(found) == dict(enumerate(texts))


def test_the_other_requests_in_a_batch_never_change_a_row(tiny, engines, sampling, texts):
    """Every other source stays at its index, where draws are its own, and its neighbours are replaced."""
    rng = np.random.default_rng(2)
    others = [[*rng.integers(2, 40, rng.integers(0, 31)).tolist(), 1] for _ in tiny.sources]
    mixed = [other if i % 2 else source for i, (source, other) in enumerate(zip(tiny.sources, others, strict=True))]
    found = by_prompt(generate(engines[sampling], tiny.params, mixed))
    assert [found[i] for i in range(0, len(texts), 2)] == texts[::2]


@pytest.mark.parametrize("name", ["greedy", "beams"])
def test_the_order_of_the_sources_never_changes_a_text(tiny, engines, name):
    engine = engines[SAMPLINGS[name]]
    order = np.random.default_rng(3).permutation(len(tiny.sources)).tolist()
    found = by_prompt(generate(engine, tiny.params, tiny.sources))
    shuffled = by_prompt(generate(engine, tiny.params, [tiny.sources[i] for i in order]))
    assert [shuffled[row] for row in range(len(order))] == [found[i] for i in order]


def test_longer_sources_get_wider_batches_and_the_same_texts(tiny, engines, monkeypatch):
    expected = by_prompt(generate(engines[Sampling()], tiny.params, tiny.sources))
    monkeypatch.setattr(length_buckets, "SMALLEST", 4)
    monkeypatch.setattr(length_buckets, "COMPILE_COST", 0)
    monkeypatch.setattr(scheduler, "MIN_CAPACITY", 4)
    engine = Engine(tiny.model, tiny.mesh, LENGTH, 3)
    assert by_prompt(generate(engine, tiny.params, tiny.sources)) == expected
    inserted = [width for program, _, width in engine.shapes if program == "insert"]
    # The sources' lengths, end marks with them: 1, 2, 4, 6, 8, 10, 13, 16, 21, 30, 31, 32.
    assert sorted(inserted) == [4, 8, 12, 16, 24, 32]
    assert {width for program, _, width in engine.shapes if program == "decode"} == {16, 32}


def test_the_number_of_devices_never_changes_a_row(tiny, sampling, texts):
    mesh = sharding.make_mesh(config.Mesh())
    found = by_prompt(generate(Engine(tiny.model, mesh, LENGTH, 8, sampling), tiny.params, tiny.sources))
    assert found == dict(enumerate(texts))


def test_the_same_seed_draws_the_same_texts_and_another_seed_others(tiny, engines):
    sampling = SAMPLINGS["sampled"]
    first = by_prompt(generate(engines[sampling], tiny.params, tiny.sources))
    assert by_prompt(generate(engines[sampling], tiny.params, tiny.sources)) == first
    other = Engine(tiny.model, tiny.mesh, LENGTH, 8, sampling._replace(seed=sampling.seed + 1))
    second = by_prompt(generate(other, tiny.params, tiny.sources))
    assert sum(first[i] != second[i] for i in first) >= len(first) - 1  # two may both end at once


def test_equal_sources_draw_texts_of_their_own(tiny, engines):
    found = by_prompt(generate(engines[SAMPLINGS["sampled"]], tiny.params, [tiny.sources[0]] * 8))
    assert len({tuple(text) for text in found.values()}) == 8


def test_every_source_comes_back_once(tiny, engines):
    found = [text.request_id for text in generate(engines[Sampling()], tiny.params, tiny.sources)]
    assert sorted(found) == list(range(len(tiny.sources)))


def test_no_sources_give_no_texts(tiny, engines):
    assert list(generate(engines[Sampling()], tiny.params, [])) == []


@pytest.mark.parametrize("name", ["greedy", "beams"])
def test_rows_that_fill_up_a_batch_keep_nobody_waiting(tiny, monkeypatch, name):
    """Decoding ends with the last row that was asked for, though the batch has rows to spare."""
    steps: list[int] = []
    decode_step = type(tiny.model).decode_step

    def counted(self, prepared, tokens_B, positions_B, cache):
        jax.debug.callback(lambda position: steps.append(int(position)), positions_B[0])
        return decode_step(self, prepared, tokens_B, positions_B, cache)

    monkeypatch.setattr(type(tiny.model), "decode_step", counted)
    short = tiny.sources[11]
    ((_, _, text, *_),) = generate(Engine(tiny.model, tiny.mesh, LENGTH, 3, SAMPLINGS[name]), tiny.params, [short])
    jax.effects_barrier()
    if name == "greedy":
        assert len(steps) == len(text) + 1  # the end mark
    assert len(steps) < LENGTH, "choose a source whose beams all end early"


def likeliest(tiny, length, ends):
    """Greedy texts by the full forward pass over each prompt with its text so far, of a causal model."""
    width = max(map(len, tiny.sources)) + length
    starts = np.array([len(prompt) for prompt in tiny.sources])
    tokens = np.zeros((len(starts), width), np.int32)
    for row, prompt in enumerate(tiny.sources):
        tokens[row, : len(prompt)] = prompt

    @jax.jit
    def full_pass(tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
        places_BT = jnp.broadcast_to(jnp.arange(width), tokens_BT.shape)
        segments_BT, prompt_BT = places_BT <= last_B[:, None], places_BT < starts[:, None]
        prefix_BT = prompt_BT.astype(jnp.int32) if tiny.model.options.prefix_lm else None
        batch = CausalBatch(tokens_BT, None, None, segments_BT.astype(jnp.int32), places_BT, prefix_BT)
        hidden_BTD = tiny.model.hidden_states(tiny.params, batch)[0]
        return tiny.model.logits(tiny.model.head(tiny.params), hidden_BTD[jnp.arange(len(starts)), last_B]).argmax(-1)

    for number in range(length):
        tokens[np.arange(len(starts)), starts + number] = full_pass(tokens, starts + number - 1)
    texts = [tokens[row, start : start + length].tolist() for row, start in enumerate(starts)]
    return [text[: next((i for i, token in enumerate(text) if token in ends), length)] for text in texts]


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_greedy_tokens_of_a_causal_model_are_the_likeliest_of_the_full_forward_pass(llama, prefix_lm):
    model = dataclasses.replace(llama.model, options=llama.model.options._replace(prefix_lm=prefix_lm))
    expected = likeliest(llama._replace(model=model), LENGTH, model.config.eos_token_ids)
    assert by_prompt(generate(Engine(model, llama.mesh, LENGTH, 8), llama.params, llama.sources)) == dict(
        enumerate(expected)
    )
    assert len({tuple(text) for text in expected}) >= 10
    assert len({len(text) for text in expected}) >= 3 and max(map(len, expected)) == LENGTH
    if prefix_lm:
        assert expected != likeliest(llama, LENGTH, model.config.eos_token_ids), "the mask must matter"


@pytest.mark.parametrize("name", SAMPLINGS)
def test_neither_the_batch_nor_its_width_nor_the_devices_change_a_causal_models_texts(llama, name, monkeypatch):
    expected = by_prompt(
        generate(Engine(llama.model, llama.mesh, LENGTH, 8, SAMPLINGS[name]), llama.params, llama.sources)
    )
    many = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    for mesh, batch_size, width in ((llama.mesh, 3, 64), (many, 8, 32)):
        monkeypatch.setattr(length_buckets, "SMALLEST", width)
        found = generate(Engine(llama.model, mesh, LENGTH, batch_size, SAMPLINGS[name]), llama.params, llama.sources)
        assert by_prompt(found) == expected


@pytest.mark.parametrize("name", ["tiny", "llama"])
def test_a_text_ends_at_any_end_token_of_the_model_or_given_beside_them(request, name):
    tiny = request.getfixturevalue(name)
    endless = dataclasses.replace(tiny.model, config=dataclasses.replace(tiny.model.config, eos_token_ids=()))
    never = by_prompt(generate(Engine(endless, tiny.mesh, LENGTH, 8, eos_ids=(39,)), tiny.params, tiny.sources))
    common = max(range(2, 39), key=lambda token: sum(token in text for text in never.values()))
    several = dataclasses.replace(endless, config=dataclasses.replace(endless.config, eos_token_ids=(1, 39)))
    found = by_prompt(generate(Engine(several, tiny.mesh, LENGTH, 8, eos_ids=(common, 1)), tiny.params, tiny.sources))
    for i, text in never.items():
        assert found[i] == text[: next((at for at, token in enumerate(text) if token in (1, common)), len(text))]
    assert sum(found[i] != never[i] and 1 not in never[i][: len(found[i]) + 1] for i in never) >= 2


def test_a_model_whose_texts_would_never_end_is_an_error(llama):
    model = dataclasses.replace(llama.model, config=dataclasses.replace(llama.model.config, eos_token_ids=()))
    with pytest.raises(ValueError, match="no end token"):
        Engine(model, llama.mesh, LENGTH, 8)


def test_each_shape_that_is_reported_was_compiled_once_and_no_other(tiny):
    engine = Engine(tiny.model, tiny.mesh, LENGTH, 16)
    generate(engine, tiny.params, tiny.sources)
    for _ in range(2):
        assert len(list(generate(engine, tiny.params, tiny.sources * 4))) == 4 * len(tiny.sources)
    for name in ("init", "insert", "decode", "resize"):
        compiled = engine._programs[name]._cache_size()
        assert compiled == sum(program == name for program, _, _ in engine.shapes), name
    # 48 prompts of at most 32 tokens, 2 at a time; at the end a quarter of the slots is left.
    assert {(program, slots) for program, slots, _ in engine.shapes} == {
        ("init", 16), ("insert", 16), ("decode", 16), ("resize", 4), ("decode", 4)
    }  # fmt: skip


def test_short_texts_do_not_wait_for_long_ones(tiny, monkeypatch):
    """With limits of 1 and one of LENGTH, 4 slots take far fewer steps than batches of 4 would."""
    limits = [LENGTH if i % 4 == 0 else 1 for i in range(32)]
    prompts = [tiny.sources[1]] * 32
    engine = Engine(tiny.model, tiny.mesh, LENGTH, 4, Sampling(min_new_tokens=LENGTH))
    taken: list[int] = []
    plain = Engine.decode

    def watched(self, *arguments, **settings):
        result = plain(self, *arguments, **settings)
        taken.append(int(result.number_B.max()))
        return result

    monkeypatch.setattr(Engine, "decode", watched)
    scheduler = Scheduler(engine.load(tiny.params))
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        scheduler.add_request(Request(i, prompt, limit))
    found: dict[int, int] = {}
    while scheduler.has_unfinished:
        found |= {output.request_id: len(output.tokens) for output in scheduler.step()}
    assert [found[i] for i in range(32)] == limits
    assert len(taken) > 8, "slots were refilled while others went on"


def test_more_texts_than_beams_are_an_error(tiny):
    with pytest.raises(ValueError, match="3 texts of a prompt, from 2 beams"):
        Engine(tiny.model, tiny.mesh, LENGTH, 8, Sampling(num_beams=2, num_samples=3))


def test_slots_are_all_filled_where_texts_begin_together(tiny, monkeypatch):
    """Texts of one length in 8 slots, 20 of them: three rounds, though prompts come in by 4 or by 3."""
    monkeypatch.setattr(scheduler, "PREFILL_SHARE", 2)
    monkeypatch.setattr(scheduler, "MIN_CAPACITY", 16)
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 100)
    monkeypatch.setattr(length_buckets, "COMPILE_COST", 0)
    engine = Engine(tiny.model, tiny.mesh, LENGTH, 8, Sampling(min_new_tokens=LENGTH))
    ran: list[tuple[str, int]] = []
    plain = Engine._run

    def run(self, program, slots, width, *arguments):
        ran.append((program, arguments[-1].tokens_QS.shape[0] if program == "insert" else 0))
        return plain(self, program, slots, width, *arguments)

    monkeypatch.setattr(Engine, "_run", run)
    prompts = [[2, 3] * (4 if i < 10 else 16) for i in range(20)]
    assert {len(text.tokens) for text in generate(engine, tiny.params, prompts)} == {LENGTH}
    assert [program for program, _ in ran].count("decode_any") == 3
    assert {rows for program, rows in ran if program == "insert"} == {4, 3}


def test_slots_are_as_wide_at_once_as_all_that_come_in_before_a_step_need(tiny, monkeypatch):
    monkeypatch.setattr(length_buckets, "SMALLEST", 4)
    monkeypatch.setattr(length_buckets, "COMPILE_COST", 0)
    monkeypatch.setattr(scheduler, "MIN_CAPACITY", 4)
    engine = Engine(tiny.model, tiny.mesh, LENGTH, len(tiny.sources))
    list(generate(engine, tiny.params, tiny.sources))
    assert {shape for shape in engine.shapes if shape[0] != "insert"} == {("init", 12, 32), ("decode", 12, 32)}
