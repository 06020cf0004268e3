"""BLEU, chrF and TER are sacrebleu's."""

import pytest
import sacrebleu

from jax_it import metrics
from jax_it.errors import UserError
from tests.metrics.texts import PREDICTIONS, RAGGED, REFERENCES

# The example of sacrebleu's own documentation.
DOCUMENTED = (PREDICTIONS[:3], REFERENCES[:3])


CHINESE = (
    ["国家主席今天访问了3个城市，并发表讲话。", "他喜欢用Python编程。", ""],
    [["国家主席今天访问了三个城市，并发表了讲话。", "主席今天访问了3个城市。"], ["他喜欢用Python写程序。"], ["好。"]],
)


def test_bleu_of_chinese_is_sacrebleus_with_its_tokenizer_zh():
    predictions, references = CHINESE
    streams = [[texts[0] for texts in references], [references[0][1], None, None]]
    expected = sacrebleu.corpus_bleu(predictions, streams, tokenize="zh").score
    assert expected > 30
    assert metrics.score(["bleu_zh"], predictions, references)["bleu_zh"] == pytest.approx(expected, abs=1e-9)
    assert metrics.score(["bleu"], predictions, references)["bleu"] < 10


def test_bleu_of_chinese_counts_characters_by_hand():
    # 我爱北京天安门 for 我爱南京天安门: 6 of 7 characters, 4 of 6 pairs, 2 of 5 triples (京天安, 天安门) and 1 of 4.
    expected = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert metrics.score(["bleu_zh"], ["我爱北京天安门"], [["我爱南京天安门"]])["bleu_zh"] == pytest.approx(expected)


@pytest.mark.parametrize("name, expected", [("bleu", 48.530827), ("chrf", 59.73)])
def test_bleu_and_chrf_are_the_numbers_in_sacrebleus_documentation(name, expected):
    assert metrics.score([name], *DOCUMENTED)[name] == pytest.approx(expected, abs=5e-3)


def test_bleu_with_a_missing_reference_is_the_number_in_sacrebleus_documentation():
    predictions, references = DOCUMENTED
    ragged = [references[0][1:], *references[1:]]
    assert metrics.score(["bleu"], predictions, ragged)["bleu"] == pytest.approx(29.44, abs=5e-3)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_references_may_differ_in_number(name):
    # Repeating a reference changes neither BLEU nor chrF, so a rectangle of repetitions is the same corpus.
    most = max(map(len, RAGGED))
    repeated = [[texts[min(i, len(texts) - 1)] for texts in RAGGED] for i in range(most)]
    expected = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name](PREDICTIONS, repeated).score
    assert metrics.score([name], PREDICTIONS, RAGGED)[name] == pytest.approx(expected, abs=1e-9)
    first = [texts[:1] for texts in RAGGED]
    assert metrics.score([name], PREDICTIONS, first)[name] != pytest.approx(expected, abs=1e-3)


GERMAN = (
    [
        'wählen Sie " Bild neu berechnen , " um beim Ändern der Bildgröße Pixel hinzuzufügen oder zu entfernen , '
        "damit das Bild ungefähr dieselbe Größe aufweist wie die andere Größe .",
        "wenn Sie alle Aufgaben im aktuellen Dokument aktualisieren möchten , wählen Sie im Menü des "
        'Aufgabenbedienfelds die Option " Alle Aufgaben aktualisieren . "',
        'klicken Sie auf der Registerkarte " Optionen " auf die Schaltfläche " Benutzerdefiniert " und geben Sie '
        'Werte für " Fehlerkorrektur-Level " und " Y / X-Verhältnis " ein .',
        "Sie können beispielsweise ein Dokument erstellen , das ein Auto über die Bühne enthält .",
        'wählen Sie im Dialogfeld " Neu aus Vorlage " eine Vorlage aus und klicken Sie auf " Neu . "',
    ],
    [
        'wählen Sie " Bild neu berechnen , " um beim Ändern der Bildgröße Pixel hinzuzufügen oder zu entfernen , '
        "damit die Darstellung des Bildes in einer anderen Größe beibehalten wird .",
        "wenn Sie alle Aufgaben im aktuellen Dokument aktualisieren möchten , wählen Sie im Menü des "
        'Aufgabenbedienfelds die Option " Alle Aufgaben aktualisieren . "',
        'klicken Sie auf der Registerkarte " Optionen " auf die Schaltfläche " Benutzerdefiniert " und geben Sie '
        'für " Fehlerkorrektur-Level " und " Y / X-Verhältnis " niedrigere Werte ein .',
        "Sie können beispielsweise ein Dokument erstellen , das ein Auto enthalt , das sich über die Bühne bewegt .",
        'wählen Sie im Dialogfeld " Neu aus Vorlage " eine Vorlage aus und klicken Sie auf " Neu . "',
    ],
)


@pytest.mark.parametrize(
    "predictions, references, expected",
    [
        (["aaaa bbbb cccc dddd"], ["aaaa bbbb cccc dddd"], 0),
        (["dddd eeee ffff"], ["aaaa bbbb cccc"], 100),
        ([""], ["a"], 100),
        (["d e f g h a b c"], ["a b c d e f g h"], 12.5),  # one shift
        (*GERMAN, 13.6),
    ],
)
def test_ter_is_the_number_in_sacrebleus_own_tests(predictions, references, expected):
    scores = metrics.score(["ter", "ter_chars"], predictions, [[text] for text in references])
    assert scores == pytest.approx({"ter": expected, "ter_chars": expected}, abs=1e-3)


def test_ter_counts_edits_to_the_nearest_reference_over_the_mean_length_by_hand():
    # 1 edit to the second reference of 3 and 5 words; case aside, and punctuation part of the word.
    assert metrics.score(["ter"], ["The dog barked loudly"], [["a cat sat", "the dog barked very loudly"]])["ter"] == 25
    assert metrics.score(["ter"], ["dog."], [["dog"]])["ter"] == 100
    assert metrics.score(["ter"], ["one two three"], [["four"]])["ter"] == 300
    assert metrics.score(["ter"], ["one"], [[""]])["ter"] == 100
    assert metrics.score(["ter"], [""], [[""]])["ter"] == 0
    assert all(
        map(metrics.lower_is_better, ("ter", "ter_chars", "ter_macro", "loss", "perplexity", "perplexity_macro"))
    )
    assert not any(metrics.lower_is_better(name) for name in metrics.METRICS if not name.startswith("ter"))


def test_ter_with_several_references_is_sacrebleus():
    streams = [[texts[0] for texts in RAGGED], [texts[1] if len(texts) > 1 else None for texts in RAGGED]]
    streams.append([None, None, RAGGED[2][2], None, None])
    expected = sacrebleu.corpus_ter(PREDICTIONS, streams).score
    assert 10 < expected < 100
    assert metrics.score(["ter"], PREDICTIONS, RAGGED)["ter"] == pytest.approx(expected, abs=1e-9)


def test_ter_of_chinese_characters_is_sacrebleus_with_asian_support():
    predictions = ["国家主席今天访问了三个城市", "他喜欢用 python 编程"]
    references = ["国家主席昨天访问了两个大城市", "他喜欢用 python 写程序"]
    expected = sacrebleu.corpus_ter(predictions, [references], normalized=True, asian_support=True).score
    assert 20 < expected < 60
    found = metrics.score(["ter", "ter_chars"], predictions, [[text] for text in references])
    assert found["ter_chars"] == pytest.approx(expected, abs=1e-9)
    assert found["ter"] > expected + 10


def test_bleu_of_characters_is_sacrebleus_with_its_tokenizer_char():
    predictions, references = ["เขาไปโรงเรียน"], ["เขาไปที่โรงเรียน"]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="char").score
    assert 50 < expected < 100
    assert metrics.score(["bleu_char"], predictions, [references])["bleu_char"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "name, package, prediction, reference",
    [
        ("bleu_ja", "MeCab", "今日はとても良い天気ですね。", "今日は良い天気です。"),
        ("bleu_ko", "mecab_ko", "오늘은 날씨가 아주 좋습니다.", "오늘 날씨가 좋습니다."),
    ],
)
def test_bleu_of_japanese_and_korean_is_sacrebleus_with_mecab(name, package, prediction, reference):
    pytest.importorskip(package)
    expected = sacrebleu.corpus_bleu([prediction], [[reference]], tokenize=f"{name[-2:]}-mecab").score
    assert 10 < expected < 90
    metrics.check([name])
    assert metrics.score([name], [prediction], [[reference]])[name] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["bleu_ja", "bleu_ko"])
def test_a_bleu_without_its_packages_is_refused_before_a_run_with_the_extra_to_install(name, monkeypatch):
    language = name[-2:]
    monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{language}_mecab.MeCab", None)
    with pytest.raises(UserError) as error:
        metrics.check(["bleu", name])
    message = str(error.value)
    assert name in message and f"pip install 'jax-it[{language}]'" in message and "\n" not in message


FLORES = "flores200sacrebleuspm"  # as sacrebleu calls it


def test_bleu_of_flores_pieces_is_that_of_texts_cut_by_its_model(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["เขาไปโรงเรียนเมื่อวาน", "he went to school", "他昨天去学校"] * 20), encoding="utf-8")
    prefix = tmp_path / "models" / "tiny"
    prefix.parent.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(prefix), vocab_size=60, minloglevel=2, hard_vocab_limit=False
    )
    (tmp_path / "models" / "tiny.model").rename(tmp_path / "models" / FLORES)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "models" / FLORES))
    prediction, reference = "เขาไปเมื่อวาน he went", "เขาไปโรงเรียนเมื่อวาน he went"
    cut = [" ".join(pieces.encode(text, out_type=str)) for text in (prediction, reference)]
    expected = sacrebleu.corpus_bleu(cut[:1], [cut[1:]], tokenize="none", force=True).score
    assert 10 < expected < 95
    found = metrics.score(["bleu_flores200"], [prediction], [[reference]])
    assert found["bleu_flores200"] == pytest.approx(expected, abs=1e-9)


def test_a_bleu_whose_model_is_damaged_is_refused_with_its_place(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / FLORES).write_bytes(b"half a download")
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(UserError) as error:
        metrics.check(["bleu_flores200"])
    message = str(error.value)
    assert str(tmp_path / "models") in message and "bleu_char" in message and "\n" not in message


def test_a_bleu_whose_model_cannot_be_downloaded_is_refused(tmp_path, monkeypatch):
    def offline(url):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no route to host.*bleu_char"):
        metrics.check(["bleu_flores200"])
