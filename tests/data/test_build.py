from pathlib import Path
from typing import Any

import pytest

from jax_it import data as chain
from jax_it.config import Config, Data, Duration, Eval, Source, Task
from jax_it.data import sources
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.loader import WHOLE
from jax_it.data.packing import Shape
from jax_it.errors import UserError
from tests.data.letters import Letters, pairs, write

A = [f"{'abcdefghij'[: 1 + i % 9]} {i}>{'xyz'[: 1 + i % 3]}" for i in range(40)]
B = [f"say {i}>{i}" for i in range(10)]

FORMAT = Seq2SeqFormat(0, 0)


def settings(folder: Path, **given: Any) -> Data:
    sources = (
        Source(path=write(folder / "a.jsonl", pairs(*A))),
        Source(path=write(folder / "b.jsonl", pairs(*B)), template=("auto", "{{prompt}}? ||| {{completion}}")),
    )
    kept = {"max_source_length": 16, "max_target_length": 6, "cache_dir": str(folder / "cache"), "max_unknown": 0.5}
    return Data(train=sources, **{**kept, **given})


def build(data: Data, batch_size: int = 16) -> chain.Built:
    return chain.build(data, Letters(), FORMAT, batch_size, lambda shape: shape.blocks * shape.source)


def trained(built: chain.Built, epochs: int = 1) -> list[str]:
    """The prompts that a run trains on, in no order."""
    found = []
    for step in built.train.read(0, Duration(epochs, "epochs"), WHOLE):
        for row, segments in zip(step.batch.source_BGS, step.batch.source_segments_BGS, strict=True):
            found += [Letters().decode(row[segments == segment]) for segment in range(1, segments.max() + 1)]
    return sorted(found)


PROMPTS = sorted(text.split(">")[0] for text in [*A, *B])


@pytest.mark.parametrize("packing", [True, False])
def test_from_files_to_batches_every_example_arrives_once(tmp_path, packing):
    built = build(settings(tmp_path, packing=packing))
    assert trained(built) == PROMPTS  # the question mark is unknown to the tokenizer, and is not shown
    assert built.train.packed == packing
    rows = built.train.layout
    assert rows.shape == Shape(1, 16, 6) and rows.rows == 16 if not packing else rows.examples_per_row > 1.5


def test_row_lengths_that_are_given_are_taken(tmp_path):
    built = build(settings(tmp_path, packed_source_length=48, packed_target_length=20))
    assert built.train.layout.shape == Shape(3, 16, 20) and trained(built) == PROMPTS


@pytest.mark.parametrize("longest, block", [(63, 64), (64, 128), (120, 128), (190, 256), (255, 256), (300, 512)])
def test_blocks_are_no_longer_than_the_longest_source_needs(tmp_path, longest, block):
    """They are halves of the limit, so that whoever can share the limit can share them."""
    records = [*A, f"{'a' * longest}>x"]  # and the end mark
    source = Source(path=write(tmp_path / "a.jsonl", pairs(*records)))
    data = Data(train=(source,), max_source_length=512, max_target_length=96, cache_dir=str(tmp_path / "cache"))
    built = build(data)
    assert built.train.layout.shape.source == block and built.train.layout.shape.target >= 96
    assert trained(built) == sorted(text.split(">")[0][: 512 - 1] for text in records)


def test_what_is_held_out_is_evaluated_and_never_trained_on(tmp_path):
    data = settings(tmp_path, validation_size=4)
    examples = chain.build_eval(data, Letters(), FORMAT, limit=0).examples
    prompts = {example.prompt.rstrip("?") for example in examples}
    assert len(prompts) == 8 and {example.group for example in examples} == {"a", "b"}
    assert prompts.isdisjoint(trained(build(data), epochs=2)) and {*prompts, *trained(build(data))} == set(PROMPTS)


def test_held_out_examples_stay_the_same_whatever_else_changes(tmp_path):
    def held(**given: Any) -> set[str]:
        data = settings(tmp_path, validation_size=4, **given)
        return {example.id for example in chain.build_eval(data, Letters(), FORMAT, 0).examples}

    before = held()
    assert held(packing=False, mixing="proportional", max_source_length=20) == before
    alone = settings(tmp_path, validation_size=4)
    alone = Data(**{**vars(alone), "train": alone.train[:1]})
    assert {example.id for example in chain.build_eval(alone, Letters(), FORMAT, 0).examples} == {
        id for id in before if id.startswith("a/")
    }
    assert held(seed=1) != before


def test_without_examples_to_evaluate_there_is_no_set(tmp_path):
    assert chain.build_eval(settings(tmp_path), Letters(), FORMAT, 0) is None


def test_the_digest_is_that_of_all_training_data(tmp_path):
    before = build(settings(tmp_path)).digest
    assert build(settings(tmp_path, seed=5, max_source_length=20)).digest == before
    data = settings(tmp_path)
    Path(data.train[1].path).write_text(Path(data.train[1].path).read_text().replace("say 0", "say O"))
    assert build(data).digest != before
    assert build(Data(**{**vars(data), "train": data.train[::-1]})).digest != build(data).digest


def test_what_became_of_each_data_set_is_described(tmp_path):
    described = [item for templates in build(settings(tmp_path)).tokenized for item in templates]
    assert [(item.name, item.template, item.counts.examples) for item in described] == [
        ("a", "auto", 40), ("b", "auto", 10), ("b", "{{prompt}}? ||| {{completion}}", 10),
    ]  # fmt: skip
    assert [item.counts.unknown_tokens for item in described] == [0, 0, 10]


def test_a_fault_in_the_data_names_its_place(tmp_path):
    data = settings(tmp_path)
    path = Path(data.train[1].path)
    path.write_text(path.read_text() + '{"question": "x"}\n')
    message = rf"^data set b: 1 of \d+ records are invalid: {path}, line 11: has none of the fields 'messages'"
    with pytest.raises(UserError, match=message):
        build(data)


def test_hub_data_sets_are_pinned_to_their_commits_and_others_left_alone(monkeypatch):
    config = Config(
        data=Data(train=(Source("org/a"), Source("b.jsonl")), eval=(Source("org/a", revision="v1"),)),
        eval=Eval(tasks=(Task(data=Source("org/a"), fewshot=Source("org/c")),)),
    )
    commits = {"org/a@": "1" * 40, "org/a@v1": "2" * 40, "org/c@": "3" * 40}
    monkeypatch.setattr(sources, "commit", lambda source, where: commits.get(f"{source.path}@{source.revision}", ""))
    pinned, found = chain.pin(config)
    assert found == commits
    assert [source.revision for source in pinned.data.train] == ["1" * 40, ""]
    assert pinned.data.eval[0].revision == "2" * 40
    assert (pinned.eval.tasks[0].data.revision, pinned.eval.tasks[0].fewshot.revision) == ("1" * 40, "3" * 40)
    assert chain.pin(config, {"org/a@": "4" * 40})[0].data.train[0].revision == "4" * 40
    assert chain.pin(config, {})[0] == config
