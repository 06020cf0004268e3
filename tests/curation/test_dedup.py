"""Which records `jax-it data dedup` drops, against brute force and MinHash's own formula."""

import itertools
import json
import random

import numpy as np
import pytest

from jax_it import errors
from jax_it.curation import dedup, embeddings, texts
from jax_it.curation.settings import Dedup
from tests.curation.datasets import data_of, jax_it, read, write
from tests.data.chat_tokenizers import checkpoint
from tests.harness.conftest import CAUSAL, T5
from tests.harness.conftest import write as model_folder

WORDS = [f"w{i}" for i in range(2000)]


def text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(WORDS, k=length))


def edited(rng: random.Random, original: str, share: float) -> str:
    """A text of which a share of the words is replaced."""
    words = original.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def records_of(found: list[str]) -> list[dict]:
    return [{"prompt": item, "completion": "yes"} for item in found]


def groups(tmp_path, found: list[str], **settings) -> list[int]:
    path = write(tmp_path / "a.jsonl", records_of(found))
    return dedup.find(Dedup(on="prompt", **settings), data_of(path, folder=tmp_path)).kept_N.tolist()


def jaccard(one: str, two: str) -> float:
    """Of the sets of word 5-grams, by the definition."""
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), two.split()))
    return len(a & b) / len(a | b)


def test_texts_that_differ_in_case_spacing_and_width_are_exact_duplicates(tmp_path):
    found = ["Say  hello.", "say\nhello.", "ｓａｙ hello.", "say hello", "STRASSE", "straße", "", " "]
    assert groups(tmp_path, found, method="exact") == [0, 0, 0, 3, 4, 4, 6, 6]


def test_near_duplicates_are_those_that_a_comparison_of_all_finds(tmp_path):
    rng = random.Random(0)
    found = []
    for _ in range(40):
        found.append(text(rng, 120))
        found += [edited(rng, found[-1], share) for share in (0.0, 0.004, 0.01, 0.05, 0.2)]
    rng.shuffle(found)
    kept: list[int] = []
    expected = []
    for i, item in enumerate(found):
        similar = [(jaccard(item, found[j]), -j) for j in kept]
        best, j = max(similar, default=(0.0, 0))
        expected.append(-j if best >= 0.9 else i)
        kept += [i] if best < 0.9 else []
    assert groups(tmp_path, found, threshold=0.9) == expected  # of 0.9, MinHash finds 0.9998


def test_as_many_near_duplicates_are_found_as_minhash_predicts(tmp_path):
    rng = random.Random(1)
    found, similarities = [], []
    for _ in range(600):
        found.append(text(rng, 100))
        found.append(edited(rng, found[-1], rng.choice((0.01, 0.02, 0.03))))
        similarities.append(jaccard(*found[-2:]))
    kept = groups(tmp_path, found, threshold=0.5)
    for low, high in ((0.5, 0.75), (0.75, 0.85), (0.85, 1.0)):
        pairs = [i for i, similarity in enumerate(similarities) if low <= similarity < high]
        chance = np.array([1 - (1 - similarities[i] ** 8) ** 14 for i in pairs])
        hits = sum(kept[2 * i + 1] == 2 * i for i in pairs)
        assert len(pairs) > 50
        assert abs(hits - chance.sum()) <= 3.5 * np.sqrt((chance * (1 - chance)).sum()) + 1
    for i, j in enumerate(kept):
        assert i == j or i - j == 1  # nothing else is taken for a duplicate


def test_a_dropped_record_duplicates_the_kept_one_and_no_chain_of_others(tmp_path):
    words = text(random.Random(2), 200).split()
    found = [" ".join(words[start : start + 100]) for start in range(0, 60, 6)]
    kept = groups(tmp_path, found, threshold=0.8)
    assert len(set(kept)) > 2
    assert all(jaccard(found[i], found[j]) >= 0.8 for i, j in enumerate(kept))
    heads = sorted(set(kept))
    assert all(jaccard(found[i], found[j]) < 0.8 for i, j in itertools.combinations(heads, 2))


def test_chinese_is_compared_by_characters(tmp_path):
    one = "识别并解释给定列表中的两个科学理论：细胞理论和日心说。细胞理论认为所有生命体都是由微小的基本单元构成。"
    two = one.replace("识别", "说明")
    three = "请写一首关于秋天的诗，描写落叶、凉风和远处的山。" * 2
    assert groups(tmp_path, [one, two, three]) == [0, 0, 2]
    assert texts.words(texts.fold("细胞理论 and Ｔ5！")) == ["细", "胞", "理", "论", "and", "t5"]


def test_short_texts_are_duplicates_only_when_their_words_are_the_same(tmp_path):
    assert groups(tmp_path, ["say red", "say, red!", "say blue", "?", "!", "? "]) == [0, 0, 2, 3, 4, 3]


@pytest.mark.parametrize(
    ("keep", "expected"), [("first", ["a", "d"]), ("longest", ["c", "d"]), ("best:score", ["b", "d"])]
)
def test_keep_says_which_record_of_a_group_stays(tmp_path, keep, expected):
    base = text(random.Random(3), 80)
    records = [
        {"id": "a", "prompt": base, "completion": "x", "score": 1},
        {"id": "b", "prompt": base.upper(), "completion": "x", "score": 2.5},
        {"id": "c", "prompt": base + " one", "completion": "x", "score": 1},
        {"id": "d", "prompt": "another", "completion": "x", "score": 0},
    ]
    path = write(tmp_path / "a.jsonl", records)
    output = tmp_path / "b.jsonl"
    assert jax_it("dedup", path, "--keep", keep, "--output", str(output)) == 0
    assert [record["id"] for record in read(output)] == expected


def test_the_list_of_dropped_records_names_what_they_duplicate(tmp_path, capsys):
    base = text(random.Random(4), 80)
    one = write(tmp_path / "a.jsonl", records_of([base, "x y z"]))
    two = write(tmp_path / "b.jsonl", records_of(["X Y Z", base + " more"]))
    assert jax_it("dedup", one, two, "--output", str(tmp_path / "c.jsonl")) == 0
    similarity = round(76 / 79, 4)  # of 77 and 78 n-grams: that with the last word and "yes" differs
    assert read(tmp_path / "c.jsonl.dropped.jsonl") == [
        {"file": two, "line": 1, "reason": "exact duplicate", "duplicate_of": f"{one}, line 2"},
        {
            "file": two,
            "line": 2,
            "reason": "near duplicate",
            "duplicate_of": f"{one}, line 1",
            "similarity": similarity,
        },
    ]
    report = json.loads((tmp_path / "c.jsonl.manifest.json").read_text())["report"]
    assert report["duplicates"] == {"exact": 1, "near": 1}
    assert report["largest_groups"][0] == {"kept": f"{one}, line 1", "records": 2}
    assert f"2 records like {one}, line 2" in capsys.readouterr().out


def test_an_exact_duplicate_follows_its_twin_when_that_is_dropped_later(tmp_path):
    base = text(random.Random(5), 80)
    records = [
        {"prompt": base + " tail", "completion": "x", "score": 1},
        {"prompt": base + " tail", "completion": "x", "score": 2},
        {"prompt": base, "completion": "x", "score": 3},
    ]
    path = write(tmp_path / "a.jsonl", records)
    found = dedup.find(Dedup(keep="best:score"), data_of(path, folder=tmp_path))
    assert found.kept_N.tolist() == [2, 2, 2]
    assert [dedup.METHODS[method] for method in found.method_N[:2]] == ["near", "near"]


def test_records_that_cannot_be_rendered_are_no_duplicates(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "x"}, *records_of(["a", "a"])])
    output = tmp_path / "b.jsonl"
    assert jax_it("dedup", path, "--on-invalid", "drop", "--output", str(output)) == 0
    assert [item["reason"] for item in read(tmp_path / "b.jsonl.dropped.jsonl")] == [
        "invalid", "invalid", "exact duplicate",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [CAUSAL, T5], ids=["causal", "encoder-decoder"])
def test_texts_of_the_same_meaning_have_states_of_a_small_angle(tmp_path, values):
    model = str(model_folder(tmp_path / "model", values, checkpoint("smollm2")))
    found = ["say red 1", "name the capital of France", "Say  red 1", "say red 1!", "x" * 90]
    encoder = embeddings.Encoder(model)
    (states_ND,) = encoder.states(found)
    (alone_ND,) = encoder.states(found[:1])
    np.testing.assert_allclose(states_ND[0], alone_ND[0], atol=1e-5)  # whatever it is padded to
    np.testing.assert_allclose(np.linalg.norm(states_ND, axis=1), 1, atol=1e-5)
    cosine = states_ND @ states_ND.T
    threshold = float(max(cosine[0, 1], cosine[0, 4], cosine[1, 4], cosine[1, 3], cosine[3, 4])) + 1e-3
    assert cosine[0, 3] > threshold
    kept = groups(tmp_path, found, method="semantic", model=model, semantic_threshold=threshold)
    assert kept == [0, 1, 0, 0, 4]  # the third is an exact duplicate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "best"}, "keep: 'best' is not first, longest or best:FIELD"),
        ({"keep": "best:task"}, "line 1: field 'task', which keep='best:task' compares, is not a number"),
        ({"threshold": 0.0}, "threshold: 0.0 is not above 0"),
        ({"method": "semantic"}, "method 'semantic' and a model need each other"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path, settings, message):
    path = write(tmp_path / "a.jsonl", records_of(["a"]))
    with pytest.raises(errors.UserError, match=message):
        dedup.plan(Dedup(**settings), data_of(path, folder=tmp_path))


@pytest.mark.parametrize("command", [["dedup"], ["dedup", "--method", "exact"], ["sample", "--split", "train"]])
def test_data_without_a_record_that_can_be_rendered_leave_nothing(tmp_path, command):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    output = tmp_path / "b.jsonl"
    assert jax_it(command[0], path, *command[1:], "--on-invalid", "drop", "--output", str(output)) == 0
    assert read(tmp_path / "b.jsonl.dropped.jsonl")[0]["reason"] == "invalid" and output.read_bytes() == b""
