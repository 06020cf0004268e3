"""Adapters: what is trained, what they compute, and which weights have one. Against PEFT: tests/parity/test_peft.py."""

import dataclasses
import json
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_it import config, losses, pretrained, sharding
from jax_it.errors import UserError
from jax_it.models import Model, Params, build
from jax_it.models.dropout import dropout
from jax_it.models.linear import Adapted, project
from jax_it.models.lora import is_linear
from jax_it.models.quantized import Quantized, block_size, quantize
from jax_it.models.weights import flatten, unflatten
from jax_it.pretrained import peft
from jax_it.pretrained.storage import cast_or_quantize, storage_dtypes
from jax_it.training.step import loss_fn
from tests.parity import cases

FAMILIES = pytest.mark.parametrize("name", ["llama3", "phi3", "gpt2", "mixtral", "t5_1_1"])
KINDS = pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="lora"),
        pytest.param({"rank_stabilized": True}, id="rslora", marks=pytest.mark.slow),
        pytest.param({"dora": True}, id="dora"),
    ],
)
# Logits are of order 1, and pass through some thirty sums; what is merged is rounded once more.
TOLERANCE = 2e-5


class Tiny(NamedTuple):
    folder: Path
    model: Model
    params: Params


def mesh():
    return sharding.make_mesh(config.Mesh(), jax.devices()[:1])


def load(folder: Path, **settings) -> tuple[Model, Params]:
    return pretrained.load(config.Model(path=str(folder), dropout=0.0, **settings), mesh())


def shaken(model: Model, params: Params) -> Params:
    """The params with adapters that do something: at first they do nothing."""
    trained, frozen = model.split(params)
    random = np.random.default_rng(0)
    leaves = flatten(trained)
    for path, leaf in leaves.items():
        noise = 0.03 * random.standard_normal(leaf.shape).astype(np.float32)
        leaves[path] = leaf * (1 + noise) if path.endswith("magnitude") else leaf + noise
    return model.join(unflatten(leaves), frozen)


def logits(model: Model, params: Params, name: str) -> np.ndarray:
    batch = cases.batch(cases.BY_NAME[name], cases.inputs(cases.BY_NAME[name]))
    compute = jax.jit(lambda params: model.logits(model.head(params), model.hidden_states(params, batch)[0]))
    there = batch.segments_BT > 0
    return np.asarray(compute(params))[there]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return cache(lambda name: cases.write(cases.BY_NAME[name], tmp_path_factory.mktemp(name)))


@KINDS
@FAMILIES
def test_a_fresh_adapter_changes_nothing_and_a_merged_one_computes_the_same(name, kind, folders):
    model, params = load(folders(name), lora=config.Lora(rank=3, **kind))
    plain = logits(*load(folders(name)), name)
    np.testing.assert_allclose(logits(model, params, name), plain, rtol=0, atol=TOLERANCE)
    params = shaken(model, params)
    adapted = logits(model, params, name)
    assert np.abs(adapted - plain).max() > 1000 * TOLERANCE
    merged, weights = model.merge(params)
    assert merged.adapter is None and flatten(weights).keys() == flatten(model.shapes).keys()
    np.testing.assert_allclose(logits(merged, weights, name), adapted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["llama3", "t5_1_1"])
def test_gradients_are_those_of_finite_differences(name, folders):
    model, params = load(folders(name), lora=config.Lora(rank=2))
    trained, frozen = model.split(shaken(model, params))
    assert flatten(trained).keys() == flatten(model.trained_logical_axes).keys()
    batch = cases.batch(cases.BY_NAME[name], cases.inputs(cases.BY_NAME[name]))

    @jax.jit
    def loss(trained):
        params = model.join(trained, frozen)
        states, head = model.hidden_states(params, batch)[0], model.head(params)
        return losses.chunked_sum(
            losses.cross_entropy, model.logits, 8, head, states, batch.targets_BT, batch.weights_BT, head_trained=False
        )[0]

    gradient = jax.jit(jax.grad(loss))(trained)
    random, step = np.random.default_rng(1), 1e-2
    for path, slope in flatten(gradient).items():
        direction = random.standard_normal(slope.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)

        def at(step, path=path, direction=direction):
            leaves = flatten(trained)
            return float(loss(unflatten({**leaves, path: leaves[path] + step * direction})))

        # The loss, a sum of order 100, has an error of some 3e-5, which over a step of 2e-2 is one of 1.5e-3.
        expected = float(np.sum(np.asarray(slope) * direction))
        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(expected, rel=1e-2, abs=5e-3), path
    assert max(np.abs(slope).max() for slope in jax.tree.leaves(gradient)) > 1


def test_doras_first_magnitudes_are_the_weights_own_lengths_and_take_no_product(folders):
    model, base = load(folders("gpt2"))
    adapted = pretrained.add_adapter(model, config.Model(lora=config.Lora(rank=3, dora=True)))
    init = jax.jit(adapted.init_adapter).lower(jax.random.key(0), base)
    assert "dot_general" not in init.as_text()  # XLA's CPU compiler gets it wrong for B's constant zeros
    leaves, weights = flatten(init.compile()(jax.random.key(0), base)), flatten(base)
    for path, axes in (("layers.mlp.down", 1), ("layers.attention.output", (1, 2))):
        lengths = np.sqrt(np.square(np.asarray(weights[path], np.float64)).sum(axes))
        np.testing.assert_allclose(leaves[f"{path}.magnitude"], lengths, rtol=1e-6)


def test_doras_product_is_that_of_the_paper_in_float64():
    random = np.random.default_rng(0)
    w, a, b = (random.standard_normal(shape) for shape in ((6, 3, 4), (6, 2), (2, 3, 4)))
    x, magnitude = random.standard_normal((2, 5, 6)), 1 + random.random((3, 4))
    direction = w + 0.5 * np.einsum("DR,RNH->DNH", a, b)
    expected = np.einsum("BTD,DNH->BTNH", x, magnitude * direction / np.sqrt((direction**2).sum(0)))
    weight = Adapted(*(jnp.float32(array) for array in (w, a, b, magnitude)), None, 0.5)
    ours = project(jnp.float32(x), FakeParam(weight), "BTD,DNH->BTNH")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


class FakeParam:
    def __init__(self, value):
        self.get_value = lambda: value


def test_a_small_change_of_doras_magnitude_is_seen_in_bfloat16():
    random = np.random.default_rng(0)
    w, a, b = (jnp.float32(random.standard_normal(shape)) for shape in ((64, 256), (64, 2), (2, 256)))
    x = jnp.bfloat16(random.standard_normal((1, 4, 64)))
    plain = Adapted(w, a, 0 * b, jnp.sqrt(jnp.square(w).sum(0)), None, 1.0)
    larger = dataclasses.replace(plain, magnitude=1.003 * plain.magnitude)
    before, after = (project(x, FakeParam(weight), "BTD,DF->BTF").astype(jnp.float32) for weight in (plain, larger))
    # bfloat16 keeps 8 bits: a change of 0.3 % shows in about three of four outputs, and on average.
    assert (before != after).mean() > 0.5
    np.testing.assert_allclose((after * before).sum() / jnp.square(before).sum(), 1.003, atol=3e-4)


def test_dropout_acts_on_the_adapters_input_alone():
    random = np.random.default_rng(0)
    w, a, b = (jnp.float32(random.standard_normal(shape)) for shape in ((8, 4), (8, 2), (2, 4)))
    x, key = jnp.float32(random.standard_normal((1, 3, 8))), jax.random.key(5)
    out = project(x, FakeParam(Adapted(w, a, b, None, key, 2.0, 0.5)), "BTD,DF->BTF")
    np.testing.assert_allclose(out, x @ w + 2 * dropout(x, 0.5, key) @ a @ b, rtol=0, atol=1e-5)


def test_a_training_key_drops_and_none_does_not(folders):
    model, params = load(folders("llama3"), lora=config.Lora(rank=2, dropout=0.5))
    params = shaken(model, params)
    batch = cases.batch(cases.BY_NAME["llama3"], cases.inputs(cases.BY_NAME["llama3"]))
    states = [
        np.asarray(model.hidden_states(params, batch, key)[0])
        for key in (None, None, jax.random.key(0), jax.random.key(1))
    ]
    np.testing.assert_array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2]) and not np.array_equal(states[2], states[3])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_over_quantized_weights_computes_as_over_what_they_stand_for(kind, folders):
    model, params = load(folders("llama3"), quantize=kind, lora=config.Lora(rank=3))
    params = shaken(model, params)
    _, frozen = model.split(params)
    dense, same = model.merge(params)
    np.testing.assert_allclose(logits(model, params, "llama3"), logits(dense, same, "llama3"), rtol=0, atol=TOLERANCE)
    _, plain = load(folders("llama3"))
    expected = quantize(np.asarray(plain["layers"]["mlp"]["up"]), kind).dequantize(jnp.float32)
    np.testing.assert_array_equal(frozen["layers"]["mlp"]["up"].dequantize(jnp.float32), expected)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("name", ["llama3", "smollm2", "gpt2", "mixtral", "t5_1_1", "t5_1_1_tied"])
def test_only_linear_layers_and_experts_are_quantized(name, pretrained, folders):
    """As in QLoRA. Embedding and head stay in the computation's dtype, tied or not."""
    model, params = load(
        folders(name), quantize="nf4", dtype="bfloat16", pretrained=pretrained, lora=config.Lora(rank=2)
    )
    frozen = flatten(model.split(params)[1])
    experts = {path for path in frozen if path.split(".")[-2:-1] == ["experts"] and not path.endswith(".router")}
    assert bool(experts) == (name == "mixtral")
    linear = {path for path, weight in model.weights.items() if is_linear(weight)}
    wanted = {path for path in linear | experts if block_size(frozen[path].shape[-1])}
    assert {path for path, leaf in frozen.items() if isinstance(leaf, Quantized)} == wanted
    assert ("head" in frozen) == (name in ("llama3", "mixtral", "t5_1_1"))
    for path in {"embedding", "head", "positions"} & frozen.keys():
        assert frozen[path].dtype == jnp.bfloat16, path


def test_weights_are_quantized_the_same_shard_by_shard_as_whole(folders):
    settings = config.Model(path=str(folders("llama3")), quantize="nf4", lora=config.Lora(rank=2))
    _, one = pretrained.load_base(settings, mesh())
    many = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    _, eight = pretrained.load_base(settings, many)
    assert any(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(eight))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, eight)


LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
}  # fmt: skip


def test_a_qlora_base_takes_half_a_byte_a_linear_weight_and_two_bytes_for_each_of_embedding_and_head():
    settings = config.Model(
        architecture=LLAMA_8B, pretrained=False, dtype="bfloat16", quantize="nf4", lora=config.Lora(rank=16)
    )
    model = build(LLAMA_8B, "test", settings)
    kept = storage_dtypes(model, settings)
    frozen = flatten(jax.eval_shape(lambda base: cast_or_quantize(base, kept), model.shapes))
    size = {path: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen[path])) for path in frozen}
    assert model.parameter_count == pytest.approx(8.03e9, rel=1e-3)
    linear = [path for path, weight in model.weights.items() if is_linear(weight)]
    assert sum(size[path] for path in linear) / sum(frozen[path].size for path in linear) == (4 + 16 / 64) / 8 <= 0.6
    assert size["embedding"] == size["head"] == 2 * 128256 * 4096
    assert sum(size.values()) == pytest.approx(5.81e9, rel=1e-3)  # 0.72 bytes a parameter, as the README says


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("q_proj", "v_proj"), {"query", "value"}),
        (("self_attn.o_proj",), {"output"}),
        ((r".*\.mlp\.(up|down)_proj",), {"up", "down"}),
        (("all-linear",), {"query", "key", "value", "output", "gate", "up", "down"}),
        (("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"), {"up"}),
    ],
)
def test_targets_are_named_by_the_end_of_a_name_or_a_pattern(targets, expected, folders):
    values = json.loads((folders("smollm2") / "config.json").read_text())
    assert values["num_hidden_layers"] == 2
    model, _ = load(folders("smollm2"), lora=config.Lora(rank=1, targets=targets))
    assert {target.path.split(".")[-1] for target in model.adapter.targets} == expected


@pytest.mark.parametrize(
    "target, problem",
    [
        ("query", "'query' matches no weight; there are down_proj, gate_proj, "),
        ("embed_tokens", "matches no weight"),
        ("model.layers.0.mlp.up_proj", "is named in 1 of 2 layers"),
        ("(", "is neither a name nor a regular expression"),
        ("(.|..|...)+[!?]", "takes too long to match; write a simpler pattern"),
    ],
)
def test_a_target_that_is_none_is_refused(target, problem, folders):
    with pytest.raises(UserError, match=r"config\.model\.lora\.targets") as raised:
        load(folders("smollm2"), lora=config.Lora(rank=1, targets=(target,)))
    assert problem in str(raised.value)


@pytest.fixture(scope="module")
def base(folders):
    return pretrained.load_model(config.Model(path=str(folders("smollm2"))))


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    model, params = load(folders("smollm2"), lora=config.Lora(rank=2))
    folder = tmp_path_factory.mktemp("adapter")
    peft.save(folder, model, shaken(model, params), str(folders("smollm2")))
    return folder


@pytest.fixture
def adapter(written, tmp_path):
    """A PEFT folder for the tiny SmolLM2."""
    return shutil.copytree(written, tmp_path / "adapter")


def test_an_adapter_comes_back_as_it_was_written(adapter, folders):
    first = load(folders("smollm2"), lora=config.Lora(path=str(adapter)))
    model, params = load(folders("smollm2"), lora=config.Lora(rank=2))
    expected = model.split(shaken(model, params))[0]
    jax.tree.map(np.testing.assert_array_equal, first[0].split(first[1])[0], expected)


@pytest.mark.parametrize(
    "name, targets",
    [("t5_1_1", (r"encoder\..*\.q",)), ("gpt2", (r".*\.attn\.c_proj",)), ("t5_1_1", ("SelfAttention.v", "wo"))],
)
def test_an_adapter_of_some_modules_alike_comes_back_with_these_alone(name, targets, folders, tmp_path):
    model, params = load(folders(name), lora=config.Lora(rank=2, targets=targets))
    params = shaken(model, params)
    peft.save(tmp_path, model, params, str(folders(name)))
    again, read = load(folders(name), lora=config.Lora(path=str(tmp_path)))
    assert again.adapter.targets == model.adapter.targets
    jax.tree.map(np.testing.assert_array_equal, again.split(read)[0], model.split(params)[0])


@pytest.mark.parametrize("same_a", [False, True])
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
def test_a_fused_projections_rank_does_not_grow_with_round_trips(name, same_a, folders, tmp_path):
    model, params = load(folders(name), lora=config.Lora(rank=4, alpha=6))
    params = shaken(model, params)
    if same_a:  # as an adapter made by PEFT is read
        attention = params["adapter"]["layers"]["attention"]
        for path in ("key", "value"):
            attention[path] = {**attention[path], "a": attention["query"]["a"]}
        gate = params["adapter"]["layers"]["mlp"].get("gate")
        if gate:
            params["adapter"]["layers"]["mlp"]["up"]["a"] = gate["a"]
    written = []
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        peft.save(folder, model, params, str(folders(name)))
        written.append([(folder / file).read_bytes() for file in (peft.CONFIG, peft.WEIGHTS)])
        read, params = load(folders(name), lora=config.Lora(path=str(folder)))
        assert read.adapter == model.adapter
    assert written[0] == written[1] == written[2]
    ranks = json.loads(written[0][0])
    fused = {12, 8} if name == "phi3" else {12}  # queries, keys and values; gate and up
    assert {ranks["r"], *ranks["rank_pattern"].values()} == {4} | (set() if same_a else fused)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_read_are_kept_in_the_dtype_of_those_drawn(dtype, adapter, folders):
    model, params = load(folders("smollm2"), param_dtype=dtype, lora=config.Lora(path=str(adapter)))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.split(params)[0])} == {jnp.dtype(dtype)}


def rewrite(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


ENDLESS = "(.|..|...)+[!?]"  # for a name of some thirty characters


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "rank 0"),
        ({"r": True}, "rank True"),
        ({"r": 10**400}, "rank 1000"),
        ({"lora_alpha": 0}, "lora_alpha 0 of "),
        ({"lora_alpha": float("nan")}, "'lora_alpha' has the value NaN, which is not a JSON number"),
        ({"alpha_pattern": {"q_proj": "4"}}, "lora_alpha '4' of "),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern: '(' is neither a name nor a regular expression"),
        ({"target_modules": ENDLESS}, "target_modules: '(.|..|...)+[!?]' takes too long to match; write a simpler"),
        ({"rank_pattern": {ENDLESS: 4}}, "rank_pattern: '(.|..|...)+[!?]' takes too long to match"),
        ({"alpha_pattern": {"((a{999}){999}){999}": 4}}, "alpha_pattern: '((a{999}){999}){999}' takes too long"),
        ({"alpha_pattern": {"(?R)": 4}}, "alpha_pattern: '(?R)' is neither a name nor a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern=[1] must map modules to numbers"),
        ({"lora_dropout": 2}, "lora_dropout=2 must be"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1' must be"),
        ({"use_dora": "no"}, "use_dora='no' must be true or false"),
        ({"target_modules": 5}, "target_modules=5 must be"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"new_kind_config": {"a": 1}}, "new_kind_config={'a': 1} is not supported by jax_it; it must be empty"),
        ({"alpha_pattern": {"model.layers.0.mlp.up_proj": 64}}, "another rank or alpha in some layers"),
        ({"rank_pattern": {"model.layers.1.mlp.up_proj": 1}}, "another rank or alpha in some layers"),
        ({"target_modules": ["c_attn"]}, "'c_attn' matches no weight"),
        ({"r": 3}, "the adapter is for another base model"),
        ({"target_modules": ["q_proj"]}, "does not belong to any module of this base model"),
    ],
)
def test_an_adapter_that_cannot_be_read_faithfully_is_refused(changes, problem, adapter, base, folders):
    rewrite(adapter, **changes)
    with pytest.raises(UserError) as raised:
        peft.load(str(adapter), base, mesh(), str(folders("smollm2")))
    assert problem in str(raised.value) and str(adapter) in str(raised.value)


ODD: list[Any] = [
    None, True, False, 0, -1, 10**400, 1e-320, 1e308, float("nan"), float("inf"), "", "x", "(", "\ud800", "\n", [], [0],
    [None], ["q_proj", 1], {}, {"q_proj": 2}, {"q_proj": "x"}, {"(": 1}, {"": 0}, [[[]]], "q_proj",
]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_any_value_of_any_field_of_an_adapter_config_is_read_or_refused_in_one_line(seed, adapter, folders):
    model = pretrained.load_model(config.Model(path=str(folders("smollm2"))))
    file, random = adapter / "adapter_config.json", np.random.default_rng(seed)
    values = json.loads(file.read_text())
    for _ in range(150):
        fields = random.choice(sorted(values), random.integers(1, 4))
        odd = {str(field): ODD[random.integers(len(ODD))] for field in fields}
        file.write_text(json.dumps(values | odd))
        try:
            read, _ = peft.read_adapter(str(adapter), model)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000 and str(adapter) in str(error), odd
        else:
            assert 0 <= read.dropout < 1 and type(read.dora) is bool, odd
            assert all(target.rank >= 1 and 0 < target.scale < 1e31 for target in read.targets), odd


@pytest.mark.parametrize("content", [b"", b"[]", b'"x"', b"{", b"\xff", b"[" * 100_000, b"{}"])
def test_an_adapter_config_that_is_no_object_is_refused(content, adapter, folders):
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_config\.json") as raised:
        peft.base_of(adapter)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_another_revision_of_its_base_is_refused(adapter, base):
    rewrite(adapter, base_model_name_or_path="someone/model", revision="v2")
    with pytest.raises(UserError, match="the adapter is for revision 'v2' of someone/model; download that one"):
        peft.load(str(adapter), base, mesh(), "someone/model")


def test_an_adapter_for_another_base_model_is_refused(adapter, base, folders):
    with pytest.raises(UserError, match="the adapter is for another base model"):
        load(folders("llama3"), lora=config.Lora(path=str(adapter)))
    rewrite(adapter, base_model_name_or_path="someone/another-model")
    with pytest.raises(UserError, match="trained for someone/another-model, not for someone/this-model"):
        peft.load(str(adapter), base, mesh(), "someone/this-model")


@pytest.mark.parametrize("name", ["llama3", "t5"])
def test_rows_of_new_tokens_have_the_gradients_of_the_whole_embedding_on_any_mesh(name, folders):
    """97 rows, which 2 devices do not share equally; fresh adapters change nothing."""
    new, case = (95, 96), cases.BY_NAME[name]
    given = cases.inputs(case)
    texts = {
        field: np.where((tokens % 3 == 0) & (tokens > 1), 95 + tokens % 2, tokens)
        for field, tokens in given._asdict().items()
        if "mask" not in field
    }
    batch = cases.batch(case, given._replace(**texts))
    found = []
    for rank, sizes in ((0, {}), (2, {}), (2, {"fsdp": 2, "tensor": 2})):
        settings = config.Model(path=str(folders(name)), dropout=0.0, lora=config.Lora(rank=rank))
        devices = sharding.make_mesh(config.Mesh(data=1, **sizes), jax.devices()[: 4 if sizes else 1])
        with jax.set_mesh(devices):
            model, params = pretrained.load(settings, devices, new_ids=new)
            trained, frozen = model.split(params)
            gradient = jax.jit(jax.grad(partial(loss_fn, model, config.Train()), has_aux=True))
            found.append(flatten(gradient(trained, frozen, batch, None, None)[0]))
    whole, *beside = found
    paths = ["embedding"] if model.config.tied else ["embedding", "head"]
    for path in paths:
        wanted = np.asarray(whole[path])[list(new)]
        assert np.abs(wanted).max(1).min() > 1e-3, "a token that the text lacks would say nothing"
        for gradients in beside:
            # Float32 sums in another order: some eight roundings of the largest entry.
            assert cases.relative_error(np.asarray(gradients[f"{path}.rows"]), wanted) < 1e-6
    assert all(path in beside[0] for path in (f"{path}.rows" for path in paths)) and "embedding" not in beside[0]
