"""An answer's loss, behind its prompt and alone, is that of the model's full forward pass."""

import jax
import numpy as np
import pytest

import jax_it.run
from jax_it import config, models, sharding
from jax_it.config import Data
from jax_it.curation.answer_loss import AnswerLosses
from jax_it.data.encoding import Counts
from jax_it.data.templates import Example, Turn
from jax_it.run import Run
from tests.curation.datasets import architectures, read, write
from tests.curation.datasets import jax_it as data_command
from tests.curation.test_classifier import opened
from tests.data.letters import Letters

EXAMPLES = [("abc def", "gh"), ("a", "bcdefgh ab"), ("hgfedcba", "a b c d"), ("ab", "")]


def example(prompt, answer):
    return Example((Turn("user", prompt), Turn("assistant", answer)), (answer,))


class WithBackend(Letters):
    class backend:
        bos_token_id = None


@pytest.fixture(params=architectures(vocab_size=64))
def run(request):
    model = models.build(architectures(vocab_size=64)[request.param], "the test", config.Model(dropout=0.0))
    mesh = sharding.make_mesh(config.Mesh(data=1), jax.devices()[:1])
    return Run(config.Config(), model, WithBackend(), mesh), jax.jit(model.init)(jax.random.key(0))


def test_losses_are_those_of_the_full_forward_pass(run):
    run, params = run
    data = Data(max_seq_length=64, max_source_length=32, max_target_length=32, train_on="last")
    examples = [example(*pair) for pair in EXAMPLES]
    losses = AnswerLosses(run, params, 4)
    found = losses([losses.encode(each, "x", data) for each in examples], alone=True)

    def expected(encoded):
        """The mean over the trained tokens of one example, of all of its logits."""
        shape = run.format.fit(
            np.array([len(encoded.source)]), np.array([len(encoded.target)]), run.format.smallest(data)
        )
        batch = run.format.batch([[encoded]], shape)
        logits = run.model.logits(run.model.head(params), run.model.hidden_states(params, batch)[0])
        losses = -jax.nn.log_softmax(logits)[0, np.arange(len(batch.targets_BT[0])), batch.targets_BT[0]]
        return float((losses * batch.weights_BT[0]).sum() / batch.weights_BT.sum())

    encoded = list(run.format.encode(examples, ["x"] * 4, data, run.tokenizer, Counts(), evaluation=True))
    assert encoded[3] is None and np.isnan(found[3].loss)
    for one, item in zip(encoded[:3], found, strict=False):
        assert item.loss == pytest.approx(expected(one), abs=1e-5)
        if one.loss_mask is None:
            bare = one._replace(source=np.array([run.tokenizer.end], np.int32))
        else:
            answer = one.target[one.loss_mask]
            mask = np.arange(len(answer) + 1) > 0
            bare = one._replace(target=np.array([run.tokenizer.end, *answer], np.int32), loss_mask=mask)
        assert item.alone == pytest.approx(expected(bare), abs=1e-5)
        assert item.ifd == item.loss / item.alone


REFUSES = (
    "{% for message in messages %}{% if 'no' in message.content %}{{ raise_exception('a bad word') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_record_that_the_models_template_refuses_is_invalid_and_ends_nothing_where_it_is_to_be_dropped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(jax_it.run, "load_run", lambda path: opened("llama", REFUSES))
    pairs = [("a", "yes"), ("b", "no"), ("c", "yes"), ("no", "yes")]
    path = write(tmp_path / "a.jsonl", [{"prompt": one, "completion": two} for one, two in pairs])
    words = ["filter", path, "--num-workers", "1", "--model", "m", "--max-loss", "100"]
    words += ["--output", str(tmp_path / "b.jsonl")]
    assert data_command(*words) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 2: " in error and "a bad word" in error and not (tmp_path / "b.jsonl").exists()
    assert data_command(*words, "--on-invalid", "drop") == 0
    assert [row["prompt"] for row in read(tmp_path / "b.jsonl")] == ["a", "c"]
    dropped = read(tmp_path / "b.jsonl.dropped.jsonl")
    assert [(row["line"], row["reason"]) for row in dropped] == [(2, "invalid"), (4, "invalid")]
    assert all("a bad word" in row["error"] for row in dropped)
