"""What a causal model's position sees: its segment, what came before, its window, and the prompt of a prefix-LM."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, sharding
from jax_it.data.encoded import Encoded
from jax_it.data.formats import CausalFormat
from jax_it.data.packing import Shape
from jax_it.errors import UserError
from jax_it.generation import Engine, Sampling, generate
from jax_it.models import Model, Params, build
from jax_it.models.config import LayerKind
from jax_it.models.rope import Rope
from tests.generation.conftest import by_prompt

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1,
}  # fmt: skip
WINDOWED = LLAMA | {"model_type": "mistral", "sliding_window": 3}


def make(values: dict, prefix_lm: bool = False) -> tuple[Model, Params]:
    model = build(values, "test", config.Model(prefix_lm=prefix_lm))
    return model, jax.jit(model.init)(jax.random.key(0))


def example(seed: int, prompt: int, answer: int) -> Encoded:
    tokens = np.random.RandomState(seed).randint(2, 64, prompt + answer).astype(np.int32)
    return Encoded(np.zeros(0, np.int32), tokens, 0, np.arange(prompt + answer) >= prompt)


def states(model: Model, params: Params, examples: list[Encoded], length: int) -> np.ndarray:
    batch = CausalFormat(0, model.options.prefix_lm).batch([examples], Shape(0, 0, length))
    return np.asarray(jax.jit(model.hidden_states)(params, batch)[0])[0]


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_no_position_sees_a_later_one_but_in_the_prompt_of_a_prefix_lm(prefix_lm):
    model, params = make(LLAMA, prefix_lm)
    one = example(0, 5, 4)
    before = states(model, params, [one], 9)
    for changed in range(9):
        tokens = one.target.copy()
        tokens[changed] = 65 - tokens[changed]
        after = states(model, params, [one._replace(target=tokens)], 9)
        seen_by = {i for i in range(9) if not np.array_equal(before[i], after[i])}
        expected = set(range(changed, 9))
        if prefix_lm and changed < 5:
            expected |= set(range(5))
        assert seen_by == expected


@pytest.mark.parametrize("prefix_lm", [False, True])
def test_an_example_in_a_packed_row_has_the_states_that_it_has_alone(prefix_lm):
    model, params = make(LLAMA, prefix_lm)
    examples = [example(0, 5, 4), example(1, 2, 3), example(2, 4, 1)]
    together, at = states(model, params, examples, 24), 0
    for one in examples:
        alone = states(model, params, [one], len(one.target))
        # States of order 1 through some twenty float32 sums.
        np.testing.assert_allclose(together[at : at + len(alone)], alone, rtol=0, atol=1e-5)
        at += len(alone)


def test_a_window_hides_what_is_further_back():
    model, params = make(WINDOWED | {"num_hidden_layers": 1})
    one = example(0, 5, 4)
    before = states(model, params, [one], 9)
    tokens = one.target.copy()
    tokens[2] = 65 - tokens[2]
    after = states(model, params, [one._replace(target=tokens)], 9)
    assert [i for i in range(9) if not np.array_equal(before[i], after[i])] == [2, 3, 4]


@pytest.mark.parametrize("values, prefix_lm", [(LLAMA, False), (LLAMA, True), (WINDOWED, False), (WINDOWED, True)])
def test_generated_tokens_are_the_likeliest_of_the_full_forward_pass(values, prefix_lm):
    model, params = make(values, prefix_lm)
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    prompts = [example(seed, length, 0).target.tolist() for seed, length in enumerate((3, 7, 1, 12))]
    length = 6
    made = by_prompt(generate(Engine(model, mesh, length, 4), params, prompts))
    assert len({tuple(tokens) for tokens in made.values()}) > 1
    for i, prompt in enumerate(prompts):
        text = [*prompt, *made[i]]
        whole = Encoded(np.zeros(0, np.int32), np.array(text, np.int32), 0, np.arange(len(text)) >= len(prompt))
        hidden = jnp.asarray(states(model, params, [whole], len(text)))
        likeliest = np.asarray(model.logits(model.head(params), hidden)).argmax(-1)[len(prompt) - 1 :].tolist()
        assert likeliest[: len(made[i])] == made[i]
        assert len(made[i]) == length or likeliest[len(made[i])] == 1


def test_layers_that_differ_are_computed_by_their_own_window_and_rope():
    """Gemma 3's two kinds of layers, against the same model with all layers of one kind, a layer at a time."""
    values = {
        "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 3,
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    model, params = make(values)
    kinds = model.config.layer_kinds
    assert [kind.window for kind in kinds] == [3, 0] and kinds[0].rope != kinds[1].rope
    one = example(0, 8, 4)
    both = states(model, params, [one], 12)
    swapped = dataclasses.replace(model.config, layer_kinds=kinds[::-1])
    other = states(dataclasses.replace(model, config=swapped), params, [one], 12)
    assert np.abs(both - other).max() > 1e-2
    # With equal weights in both layers, swapping the layers' weights changes nothing, and their kinds does.
    same = dict(params)
    same["layers"] = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[0]]), same["layers"])
    assert (
        np.abs(
            states(model, same, [one], 12) - states(dataclasses.replace(model, config=swapped), same, [one], 12)
        ).max()
        > 1e-3
    )


LONGROPE = LLAMA | {
    "model_type": "phi3", "pad_token_id": None, "max_position_embeddings": 64, "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]},
}  # fmt: skip


@pytest.mark.parametrize("length, extended", [(10, False), (20, True)])
def test_longrope_goes_by_the_length_of_the_text_and_not_of_its_row(length, extended):
    model, params = make(LONGROPE)
    one, other = example(0, length // 2, length - length // 2), example(1, 5, 5)
    alone, packed = states(model, params, [one], length), states(model, params, [other, one], 48)
    np.testing.assert_allclose(packed[10 : 10 + length], alone, rtol=0, atol=1e-5)
    short = LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"long_factor": [1.0, 1.1, 1.2, 1.3]}}
    difference = np.abs(states(make(short)[0], params, [one], length) - alone).max()
    assert difference > 1e-2 if extended else difference == 0


def test_longrope_generates_by_the_length_that_the_text_has_then():
    """As Transformers does for Phi-3: a text that outgrows the original length is computed again. A text does not
    depend on how many tokens it may have."""
    model, params = make(LONGROPE)
    params = jax.tree.map(lambda leaf: leaf * 3, params)  # far from ties, and from one token over and over
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    prompts = [example(7 + length, length, 0).target.tolist() for length in (4, 12, 15, 16, 17, 20)]  # of 16
    compute = jax.jit(lambda params, batch: model.logits(model.head(params), model.hidden_states(params, batch)[0]))

    def likeliest(tokens: list[int]) -> int:
        text = Encoded(np.zeros(0, np.int32), np.array(tokens, np.int32), 0, np.ones(len(tokens), bool))
        return int(compute(params, CausalFormat(0).batch([[text]], Shape(0, 0, 32)))[0, len(tokens) - 1].argmax())

    short = by_prompt(generate(Engine(model, mesh, 3, 6, eos_ids=(0,)), params, prompts))
    long = by_prompt(generate(Engine(model, mesh, 8, 6, eos_ids=(0,)), params, prompts))
    beams = by_prompt(generate(Engine(model, mesh, 8, 1, Sampling(num_beams=2), eos_ids=(0,)), params, prompts[1:2]))
    assert len(beams[0]) == 8
    for i, prompt in enumerate(prompts):
        assert long[i][:3] == short[i]
        for number, token in enumerate(long[i]):
            assert token == likeliest([*prompt, *long[i][:number]]), (len(prompt), number)
    unlike = dataclasses.replace(model, config=dataclasses.replace(model.config, recompute_longrope=False))
    assert by_prompt(generate(Engine(unlike, mesh, 8, 6, eos_ids=(0,)), params, prompts)) != long, (
        "the test says nothing"
    )


def test_a_prefix_lm_with_longrope_is_refused():
    with pytest.raises(UserError, match=r"^config.model.prefix_lm: the longrope of test"):
        make(LONGROPE, prefix_lm=True)


@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3"])
def test_layers_that_are_all_of_the_second_rope_rotate_by_it(kind):
    """All layers with a window in Gemma 3, none that rotate in SmolLM3: against the same rope as the only one."""
    values = LLAMA | {"model_type": kind, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
    if kind == "smollm3":
        values = {**values, "no_rope_layers": [0, 0], "pad_token_id": None}
        del values["hidden_activation"]
    else:
        values |= {"layer_types": ["sliding_attention"] * 2, "sliding_window": 64, "rope_local_base_freq": 10.0}
    model, params = make(values)
    frequencies = np.float32(10) ** (-np.arange(0, 8, 2, dtype=np.float32) / 8)
    second = None if kind == "smollm3" else Rope(tuple(frequencies.tolist()))
    alone = dataclasses.replace(model.config, layer_kinds=(LayerKind(rope=second),))
    one = example(0, 8, 4)
    expected = states(dataclasses.replace(model, config=alone), params, [one], 12)
    np.testing.assert_allclose(states(model, params, [one], 12), expected, rtol=0, atol=1e-6)
