"""What a config.json may say: all that is not implemented is refused, in a line that names the file and the key."""

import json

import pytest

from jax_it import config
from jax_it.errors import UserError
from jax_it.models import build
from jax_it.models.families import FAMILIES
from jax_it.pretrained import hf
from tests.parity import cases

FILE = "/models/mine/config.json"
VALUES = dict(cases.BY_NAME["t5_1_1"].values)


def read(values):
    return build(values, FILE, config.Model()).config


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("num_experts", 8, "not known"),
        ("d_modle", 32, "not known"),
        ("num_layers", "2", "must be of type int"),
        ("num_layers", 2.0, "must be of type int"),
        ("num_layers", True, "must be of type int"),
        ("num_layers", [1], "must be of type int"),
        ("eos_token_id", "1", "must be a token id or a list of them"),
        ("eos_token_id", [1, "2"], "must be a token id or a list of them"),
        ("eos_token_id", [True], "must be a token id or a list of them"),
        ("dropout_rate", "0.1", "must be of type float"),
        ("layer_norm_epsilon", False, "must be of type float"),
        ("tie_word_embeddings", 0, "must be of type bool"),
        ("feed_forward_proj", 3, "must be of type str"),
        ("feed_forward_proj", "gated-swish", "is not one of relu, "),
        ("dense_act_fn", "silu", "only 'gelu_new' is"),
        ("is_gated_act", False, "only True is"),
        ("is_encoder_decoder", False, "only True is"),
        ("is_decoder", True, "only False is"),
        ("chunk_size_feed_forward", 64, "only 0 is"),
        ("model_type", "bart", "not supported; jax_it has t5, "),
        ("model_type", None, "is missing"),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_file_and_key(key, value, said):
    with pytest.raises(UserError) as refusal:
        read(VALUES | {key: value})
    message = str(refusal.value)
    assert message.startswith(FILE) and key in message and said in message
    assert "\n" not in message


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(UserError, match=r"alibi, rope_theta: not known"):
        read(VALUES | {"rope_theta": 1e4, "alibi": True})


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_null_means_the_default_as_an_absent_key_does(case):
    # From feed_forward_proj, and contradict its default; a short distance, which the default's buckets do not have.
    follow = {"dense_act_fn", "is_gated_act", "relative_attention_max_distance"}
    for key in case.values.keys() - {"model_type"}:
        absent = {name: value for name, value in case.values.items() if name not in {key, *follow}}
        assert read(absent | {key: None}) == read(absent), key


@pytest.mark.parametrize("value, tokens", [(7, (7,)), ([7], (7,)), ([7, 1, 9], (7, 1, 9)), (0, (0,)), ([], (1,))])
def test_a_text_may_end_at_one_token_or_at_any_of_a_list(value, tokens):
    assert read(VALUES | {"eos_token_id": value}).eos_token_ids == tokens


def test_a_list_of_one_token_stands_for_it_and_a_longer_one_is_refused():
    assert read(VALUES | {"pad_token_id": [7]}).pad_token_id == 7
    with pytest.raises(UserError, match="pad_token_id is \\[7, 8\\]; it must be of type int"):
        read(VALUES | {"pad_token_id": [7, 8]})


def test_an_integer_may_stand_for_a_float():
    assert read(VALUES | {"dropout_rate": 0}).dropout == 0.0


def is_scaled(config):
    return config.decoder.output_scale == config.decoder.embed_dim**-0.5


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_the_defaults_are_those_of_transformers(kind):
    import transformers

    theirs = transformers.AutoConfig.for_model(kind)
    ours = read({"model_type": kind})
    assert ours.vocab_size == theirs.vocab_size
    for half in (ours.encoder, ours.decoder):
        assert (half.embed_dim, half.num_heads, half.head_dim) == (theirs.d_model, theirs.num_heads, theirs.d_kv)
        assert half.num_kv_heads == half.num_heads and half.mlp_dim == theirs.d_ff
        assert half.relative_bias.buckets == theirs.relative_attention_num_buckets
        assert half.relative_bias.max_distance == theirs.relative_attention_max_distance
        assert (half.activation, half.gated_mlp) == (theirs.dense_act_fn, theirs.is_gated_act)
        assert half.norm_eps == theirs.layer_norm_epsilon
    assert (ours.encoder.num_layers, ours.decoder.num_layers) == (theirs.num_layers, theirs.num_decoder_layers)
    assert ours.dropout == theirs.dropout_rate
    assert ours.tied == theirs.tie_word_embeddings
    assert (ours.pad_token_id, ours.eos_token_ids) == (theirs.pad_token_id, (theirs.eos_token_id,))
    assert ours.decoder_start_token_id == 0
    # Read for T5 alone: mT5 and umT5 have no such setting.
    assert is_scaled(ours) == getattr(theirs, "scale_decoder_outputs", kind == "umt5")


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_config_that_transformers_wrote_anew_reads_as_the_published_one(case):
    import transformers

    published = read(case.values)
    rewritten = transformers.AutoConfig.for_model(**case.values).to_dict()
    # It writes that every head is tied; whether one is follows from the weights.
    assert read(rewritten) == read(
        case.values | {"tie_word_embeddings": True, "scale_decoder_outputs": is_scaled(published)}
    )


def test_settings_of_the_run_override_those_of_the_file(folder):
    model = config.Model(path=str(folder), architecture={"num_layers": 1, "dropout_rate": 0.3}, pretrained=False)
    values, where = hf.read_config_json(model)
    read_back = build(values, where, model).config
    assert (read_back.encoder.num_layers, read_back.dropout, read_back.encoder.embed_dim) == (1, 0.3, 32)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is missing"):
        cases.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"t5"', ""])
def test_a_config_that_is_no_json_object_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json (is not valid JSON|is not a JSON object)"):
        cases.load(tmp_path)


def test_a_refusal_names_the_file_that_was_read(tmp_path):
    folder = cases.write(cases.BY_NAME["t5"], tmp_path)
    (folder / "config.json").write_text(json.dumps(VALUES | {"sliding_window": 128}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json: sliding_window: not known"):
        cases.load(folder)


FAMILY = {kind: next(c for c in cases.ALL if c.values["model_type"] == kind).values for kind in FAMILIES}
WIDTHS = ("hidden_size", "d_model", "n_embd", "num_attention_heads", "num_heads", "n_head", "num_key_value_heads")
SIZES = (
    *WIDTHS, "head_dim", "d_kv", "intermediate_size", "d_ff", "n_inner", "moe_intermediate_size", "num_hidden_layers",
    "num_layers", "num_decoder_layers", "n_layer", "vocab_size", "sliding_window", "n_positions", "num_local_experts",
    "num_experts_per_tok", "relative_attention_num_buckets", "relative_attention_max_distance", "query_pre_attn_scalar",
)  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_size_of_a_family_may_be_zero_or_negative_or_no_integer(kind):
    half = "decoder" if kind == "t5gemma" else None
    base = FAMILY[kind][half] if half else FAMILY[kind]
    unread = set() if kind == "gpt2" else {"n_positions"}
    for key in base.keys() & set(SIZES) - unread:
        for value in (0, -1, "32", 1.5, float("nan"), 10**400, [1], [1, 2], {}):
            values = {**base, key: value}
            with pytest.raises(UserError) as refusal:
                read({**FAMILY[kind], half: values} if half else values)
            message = str(refusal.value)
            assert key in message and "\n" not in message and len(message) < 400, key


SCALED: dict = {"rope_parameters": None}
LLAMA_LIKE = [kind for kind in FAMILIES if kind not in ("t5", "mt5", "umt5", "gpt2", "gpt_neox", "t5gemma")]


IMPOSSIBLE = [
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": 8}, "num_key_value_heads"),
    ({"head_dim": 7}, "head_dim"),
    ({"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
    ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    ({**SCALED, "rope_scaling": {"rope_type": "yarn", "factor": 2}, "max_position_embeddings": None}, "scaling"),
    ({**SCALED, "rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "rope_scaling"),
    ({**SCALED, "rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling"),
    ({"rope_parameters": 5}, "rope_parameters"),
    ({"eos_token_id": 96}, "eos_token_id"),
    ({"pad_token_id": -1}, "pad_token_id"),
    ({"bos_token_id": 10**9}, "bos_token_id"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"layer_types": []}, "layer_types"),
    ({"hidden_act": "x" * 5000, "hidden_activation": "x" * 5000}, "hidden_act"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"no\nsuch\ud800": 1}, "no\\nsuch\\ud800"),
]


@pytest.mark.parametrize("kind", LLAMA_LIKE)
def test_what_cannot_be_built_or_has_no_meaning_is_refused_by_its_field(kind):
    for changes, field in IMPOSSIBLE:
        with pytest.raises(UserError) as refusal:
            read({**FAMILY[kind], **changes})
        message = str(refusal.value)
        assert field in message and "\n" not in message and len(message) < 400, changes
        message.encode()


@pytest.mark.parametrize(
    "kind, changes, field",
    [
        ("t5", {"dropout_rate": 2.0}, "dropout_rate"),
        ("t5", {"dropout_rate": -1}, "dropout_rate"),
        ("t5", {"dropout_rate": 1.0}, "dropout_rate"),
        ("gpt2", {"resid_pdrop": 1.5, "embd_pdrop": 1.5, "attn_pdrop": 1.5}, "resid_pdrop"),
        ("t5", {"decoder_start_token_id": 96}, "decoder_start_token_id"),
        ("umt5", {"decoder_start_token_id": -1}, "decoder_start_token_id"),
        ("t5", {"relative_attention_num_buckets": 7}, "relative_attention_num_buckets"),
        ("t5", {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
        ("t5", {"relative_attention_max_distance": 16}, "relative_attention_max_distance"),
        ("gpt2", {"n_head": 5}, "n_head"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
        ("gpt_neox", {"num_attention_heads": 5}, "num_attention_heads"),
        ("gpt_neox", {"rotary_pct": 0.0}, "rotary_pct"),
        ("gpt_neox", {"rotary_pct": 2.0}, "partial_rotary_factor"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}, "type"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 8}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
    ],
)  # fmt: skip
def test_what_a_family_cannot_compute_is_refused_by_its_field(kind, changes, field):
    with pytest.raises(UserError, match=field):
        read({**FAMILY[kind], **changes})


def test_a_half_of_t5gemma_is_refused_by_its_name_and_field():
    decoder = {**FAMILY["t5gemma"]["decoder"], "sliding_window": 0}
    with pytest.raises(UserError, match="decoder: sliding_window is 0; it must be at least 1"):
        read({**FAMILY["t5gemma"], "decoder": decoder})


@pytest.mark.parametrize(
    "kind, field",
    [
        ("t5gemma", "classifier_dropout_rate"), ("t5", "classifier_dropout"), ("t5", "initializer_factor"),
        ("gpt_neox", "is_decoder"), ("smollm3", "max_window_layers"), ("qwen3_moe", "max_window_layers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["32", [None]])
def test_a_field_without_effect_has_a_value_of_its_type(kind, field, value):
    with pytest.raises(UserError, match=f"{field} is .*; it must be of type "):
        read({**FAMILY[kind], field: value})


def test_a_default_for_padding_that_the_vocabulary_lacks_is_refused():
    values = {key: value for key, value in FAMILY["smollm3"].items() if key != "pad_token_id"}
    with pytest.raises(UserError, match="pad_token_id is missing, and the default, 128004, is not in the vocabulary"):
        read(values)
    assert read({**values, "pad_token_id": None}).pad_token_id is None


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_end_where_transformers_says_if_the_file_does_not(kind):
    import transformers

    theirs = transformers.AutoConfig.for_model(kind).eos_token_id
    values = {key: value for key, value in FAMILY[kind].items() if key != "eos_token_id"} | {"vocab_size": 200_000}
    if kind == "t5gemma":
        return  # the halves have it
    theirs = theirs if isinstance(theirs, list) else [theirs] * (theirs is not None)
    assert read(values).eos_token_ids == tuple(theirs)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"d_model": 32, "d_model": 64}', "'d_model' occurs twice"),
        ('{"a": {"b": 1, "b": 2}}', "'b' occurs twice"),
        ('{"dropout_rate": NaN}', "'dropout_rate' has the value NaN, which is not a JSON number"),
        ('{"dropout_rate": [[1], [-Infinity]]}', "'dropout_rate' has the value -Infinity, which is not a JSON number"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"d_model": ' + "9" * 5000 + "}", "is not valid JSON"),
        (b'{"model_type": "\xff"}', "is not valid JSON"),
        (b"\x00\x01", "is not valid JSON"),
    ],
)
def test_json_that_python_would_read_with_a_guess_or_not_at_all_is_refused(text, said, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as refusal:
        cases.load(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{tmp_path}/config.json") and said in message and "\n" not in message
