"""What a config.json may say: all that is not implemented is refused, in a line that names the file and the key."""

import json

import pytest

from jax_it import config
from jax_it.errors import UserError
from jax_it.models import build, hf
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
        ("model_type", None, "not supported; jax_it has t5, "),
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
    assert read(VALUES | {"eos_token_id": value}).end_tokens == tokens


def test_a_list_of_one_number_stands_for_it_elsewhere_and_a_longer_one_is_refused():
    assert read(VALUES | {"pad_token_id": [7]}).pad_token == 7
    with pytest.raises(UserError, match="pad_token_id is \\[7, 8\\]; it must be of type int"):
        read(VALUES | {"pad_token_id": [7, 8]})


def test_an_integer_may_stand_for_a_float():
    assert read(VALUES | {"dropout_rate": 0}).dropout == 0.0


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_the_defaults_are_those_of_transformers(kind):
    import transformers

    theirs = transformers.AutoConfig.for_model(kind)
    ours = read({"model_type": kind})
    assert ours.vocabulary == theirs.vocab_size
    assert (ours.width, ours.heads, ours.head_size) == (theirs.d_model, theirs.num_heads, theirs.d_kv)
    assert ours.feed_forward == theirs.d_ff
    assert (ours.encoder_layers, ours.decoder_layers) == (theirs.num_layers, theirs.num_decoder_layers)
    assert ours.buckets == theirs.relative_attention_num_buckets
    assert ours.max_distance == theirs.relative_attention_max_distance
    assert (ours.activation, ours.gated) == (theirs.dense_act_fn, theirs.is_gated_act)
    assert (ours.epsilon, ours.dropout) == (theirs.layer_norm_epsilon, theirs.dropout_rate)
    assert ours.tied == theirs.tie_word_embeddings
    assert (ours.pad_token, ours.end_tokens) == (theirs.pad_token_id, (theirs.eos_token_id,))
    assert ours.start_token == 0
    # Read for T5 alone: mT5 and umT5 have no such setting.
    assert ours.scaled == getattr(theirs, "scale_decoder_outputs", kind == "umt5")


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_config_that_transformers_wrote_anew_reads_as_the_published_one(case):
    import transformers

    published = read(case.values)
    rewritten = transformers.AutoConfig.for_model(**case.values).to_dict()
    # It writes that every head is tied; whether one is follows from the weights.
    assert read(rewritten) == read(
        case.values | {"tie_word_embeddings": True, "scale_decoder_outputs": published.scaled}
    )


def test_settings_of_the_run_override_those_of_the_file(folder):
    model = config.Model(path=str(folder), architecture={"num_layers": 1, "dropout_rate": 0.3}, pretrained=False)
    values, where = hf.read_values(model)
    read_back = build(values, where, model).config
    assert (read_back.encoder_layers, read_back.dropout, read_back.width) == (1, 0.3, 32)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is missing"):
        cases.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"t5"', ""])
def test_a_config_that_is_no_json_object_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json (is not valid JSON|holds no JSON object)"):
        cases.load(tmp_path)


def test_a_refusal_names_the_file_that_was_read(tmp_path):
    folder = cases.write(cases.BY_NAME["t5"], tmp_path)
    (folder / "config.json").write_text(json.dumps(VALUES | {"sliding_window": 128}))
    with pytest.raises(UserError, match=rf"^{tmp_path}/config.json: sliding_window: not known"):
        cases.load(folder)
