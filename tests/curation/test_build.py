"""New data from a model: what is asked, what is kept, what is paid for."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from jax_it import cli
from jax_it.curation.build import endpoint, local, self_instruct
from jax_it.curation.build.endpoint import Endpoint
from jax_it.curation.build.requests import Journal, Reply, Usage, ask, key_of
from jax_it.curation.build.similarity import Similar
from jax_it.errors import UserError
from jax_it.metrics.rouge import statistics
from jax_it.predict import Prediction


class Stub:
    """An endpoint whose `answer` gets the prompt; `trouble` is what comes before the answers: statuses, or "broken"."""

    def __init__(self, answer, trouble=(), delay=0.0):
        self.asked: list[dict] = []  # bodies that were answered
        self.keys: list[str] = []
        self.headers: list[dict] = []
        self.running = self.most_running = 0
        self._lock = threading.Lock()
        waiting = list(trouble)
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stub._lock:
                    stub.running += 1
                    stub.most_running = max(stub.most_running, stub.running)
                    wrong = waiting.pop(0) if waiting else None
                time.sleep(delay)
                status, headers = 200, {}
                if isinstance(wrong, int):
                    status, headers = wrong, {"retry-after": "0"}
                    content = json.dumps({"error": {"message": f"it is {wrong}"}})
                elif wrong == "broken":
                    content = '{"choices": [{"mess'
                elif wrong == "empty":
                    content = '{"choices": []}'
                else:
                    with stub._lock:
                        stub.asked.append(body)
                        stub.keys.append(self.headers["idempotency-key"])
                        stub.headers.append(dict(self.headers))
                    text = answer(body["messages"][-1]["content"], body)
                    usage = {"prompt_tokens": 10, "completion_tokens": 5}
                    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                    content = json.dumps({"choices": [choice], "usage": usage})
                with stub._lock:
                    stub.running -= 1
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(content.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content.encode())

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(autouse=True)
def short_waits_and_rounds(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(self_instruct, "ROUND", 4)


def asked(stub, tmp_path, requests, usage=None, **settings):
    usage = usage or Usage()
    with (
        Journal(tmp_path / "journal.jsonl") as journal,
        Endpoint(stub.url, "m", journal, usage, **settings) as model,
    ):
        return model(requests)


def jax_it(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "build", *words])
    return left.value.code or 0


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# The endpoint and the journal


def test_requests_are_answered_in_order_and_sent_again_after_trouble(tmp_path):
    usage = Usage()
    requests = [ask(f"question {i}", temperature=0.5, seed=i) for i in range(20)]
    trouble = [429, 500, "broken", 503, "empty", 529]
    with Stub(lambda text, body: text.upper(), trouble, delay=0.01) as stub:
        replies = asked(stub, tmp_path, requests, usage, concurrency=4, api_key="secret")
    assert [reply.text for reply in replies] == [f"QUESTION {i}" for i in range(20)]
    assert stub.most_running <= 4 and len(stub.asked) == 20
    assert usage.retries == 6 and usage.retried["an answer that is not a completion"] == 2
    assert usage.report(input_price=1.0, output_price=2.0)["cost"] == (20 * 10 * 1 + 20 * 5 * 2) / 1e6
    assert stub.headers[0]["Authorization"] == "Bearer secret"
    assert sorted(body["seed"] for body in stub.asked) == list(range(20)) and stub.asked[0]["model"] == "m"


def test_no_answer_is_asked_for_twice(tmp_path):
    requests = [ask(f"question {i}") for i in range(10)]
    with Stub(lambda text, body: text) as stub:
        asked(stub, tmp_path, requests[:6])
        usage = Usage()
        replies = asked(stub, tmp_path, [*requests, requests[0]], usage)
    assert [reply.text for reply in replies] == [f"question {i}" for i in [*range(10), 0]]
    assert len(stub.asked) == len(set(stub.keys)) == 10
    assert (usage.requests, usage.from_journal) == (4, 6)
    # What tells two requests apart: the model, the sampling, the seed.
    assert (
        len({key_of("m", ask("a")), key_of("n", ask("a")), key_of("m", ask("a", seed=1)), key_of("m", ask("b"))}) == 4
    )


def test_a_line_that_a_kill_left_half_written_is_removed_from_the_journal(tmp_path):
    file = tmp_path / "journal.jsonl"
    with Journal(file) as journal:
        journal.put("a", Reply("one\u2028é"))
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"key": "b", "te')
    with Journal(file) as journal:
        assert journal.get("a") == Reply("one\u2028é") and journal.get("b") is None
        journal.put("c", Reply("three"))
    assert file.read_bytes().startswith(whole + b'{"key": "c"')
    file.write_text("not json\n")
    with pytest.raises(UserError, match="line 1: not an answer; restore the journal or remove it"), Journal(file):
        pass


def test_an_endpoint_that_keeps_failing_or_refuses_the_key_is_an_error_that_keeps_the_answers(tmp_path):
    requests = [ask(f"question {i}") for i in range(3)]
    with Stub(lambda text, body: text, [None, *[500] * 8]) as stub, pytest.raises(UserError) as failed:
        asked(stub, tmp_path, requests, concurrency=1)
    assert "8 attempts failed, the last one with: status 500" in str(failed.value)
    with Stub(lambda text, body: text, [401]) as stub, pytest.raises(UserError, match="it is 401; check the API key"):
        asked(stub, tmp_path, requests, concurrency=1)
    with Stub(lambda text, body: text, [422]) as stub:
        replies = asked(stub, tmp_path, requests[1:], concurrency=1)
    assert replies[0].error == "status 422: it is 422" and replies[1].text == "question 2"
    with pytest.raises(UserError, match="cannot be reached"):
        asked(stub, tmp_path, [ask("another")])
    with pytest.raises(UserError, match="not a URL; give one such as"):
        Endpoint("localhost:8000", "m", Journal(tmp_path / "j"), Usage())


def test_requests_that_an_endpoint_refused_are_asked_again_by_the_next_run(tmp_path):
    requests = [ask(f"question {i}") for i in range(3)]
    refusal = "/v1/chat/completions: all 3 requests were refused, the first with: status 400: it is 400;"
    with Stub(lambda text, body: text, [400] * 3) as stub, pytest.raises(UserError, match=refusal):
        asked(stub, tmp_path, requests)
    with Stub(lambda text, body: text) as stub:
        assert [reply.text for reply in asked(stub, tmp_path, requests)] == [f"question {i}" for i in range(3)]
    with Stub(lambda text, body: text, [400]) as stub:  # one more, which is refused beside what is answered
        assert asked(stub, tmp_path, [*requests, ask("long")])[3].error == "status 400: it is 400"


def test_a_local_model_computes_what_the_journal_lacks_in_batches_of_the_same_settings(tmp_path, monkeypatch):
    batches = []

    def predict(model, params, tokenizer, prompts, new, sampling, batch_size, mesh, stop):
        batches.append((len(prompts), new, sampling.temperature, sampling.seed))
        return [[Prediction(turns[-1].text.upper(), new > 8, None)] for turns in prompts]

    tokenizer = SimpleNamespace(encode=lambda texts: [text.split() for text in texts])
    run = SimpleNamespace(model=None, tokenizer=tokenizer, mesh=None)
    monkeypatch.setattr(local, "load_run", lambda path: (run, None))
    monkeypatch.setattr(local.predict, "predict", predict)
    requests = [ask(f"a question {i}", max_new_tokens=8 + i % 2, temperature=0.5, seed=i) for i in range(20)]
    usage = Usage()
    with Journal(tmp_path / "j") as journal:
        model = local.LocalModel("folder", journal, usage, batch_size=2)
        replies = model([*requests, requests[0]])
        again = model(requests)
    assert [reply.text for reply in replies] == [f"A QUESTION {i}" for i in [*range(20), 0]] and again == replies[:20]
    assert batches == [(8, 8, 0.5, 0), (2, 8, 0.5, 16), (8, 9, 0.5, 1), (2, 9, 0.5, 17)]
    assert replies[1] == Reply("A QUESTION 1", True, 3, 3) and not replies[0].finished
    assert (usage.requests, usage.from_journal) == (20, 20)


# Similarity


def test_the_most_similar_text_is_that_of_rouge_l():
    texts = [
        "Translate this sentence into German.", "Translate this sentence to German, please.",
        "Write a poem about the sea.", "Write a poem about the sea and the sea.", "the the the a a", "a the a the",
        "请把这句话翻译成德语。", "请把这句话翻译成法语。", "x",
    ]  # fmt: skip
    for threshold in (0.3, 0.7):
        similar = Similar(threshold)
        for number, text in enumerate(texts):
            before = [[other] for other in texts[:number]]
            scores = statistics(["rougeL_chars"], [text] * number, before)["rougeL_chars"].ravel().tolist()
            found = similar.find(text)
            if max(scores, default=0) > threshold:
                assert found == (scores.index(max(scores)), pytest.approx(max(scores)))
            else:
                assert found is None
            similar.add(text)


# Self-Instruct

SUBJECTS = "rivers poems recipes cities planets birds songs bridges novels trees chess coffee history law soil".split()
VERBS = "Describe Compare List Explain Rank Summarize Criticize Imagine Translate Simplify Justify Continue".split()


def seeds(file, number=12):
    lines = []
    for i in range(number):
        label = {
            "instruction": f"Decide whether text {i} number {i * 7} is about {SUBJECTS[i]}.",
            "is_classification": True,
        }
        instances = [{"input": f"Text about {SUBJECTS[i]}", "output": "yes"}]
        if i % 2:
            label = {"instruction": f"{VERBS[i]} {SUBJECTS[i]} for children aged {i} years", "is_classification": False}
            instances = [{"input": "", "output": f"{SUBJECTS[i]} are good."}]
        lines.append(json.dumps(label | {"instances": instances}) + "\n")
    file.write_text("".join(lines))
    return str(file)


def model(text, body):
    """A model that makes eight tasks from what it was shown, of which some can't be kept."""
    if text.startswith("Come up with"):
        number = body["seed"]
        words = [f"{VERBS[(number + i) % 12].lower()} w{number}x{i} v{number}y{i} u{i}z{number}" for i in range(5)]
        tasks = [*words, "Draw a picture of the sea", "Too short", text.rsplit("\n8. ", 1)[1]]
        return "\n".join(f"{9 + i}. {task}" for i, task in enumerate(tasks))
    if text.startswith("Can the following"):
        return "Yes" if "x1" in text.rsplit("Task:", 1)[1] else "No"
    if text.startswith("Given a classification task"):
        return "Class label: good\nInput: A fine day.\nClass label: bad\nInput: A wet day.\nClass label: bad\nInput:"
    name = text.rsplit("Task: ", 1)[1].strip()
    return (
        f"Example 1\nInput: of {name}\nOutput: one\nExample 2\nInput: of {name}\nOutput: two\nExample 3\nOutput: alone"
    )


def test_self_instruct_makes_instructions_and_instances_with_their_origin(tmp_path):
    file, output = seeds(tmp_path / "seeds.jsonl"), tmp_path / "made.jsonl"
    with Stub(model) as stub:
        words = [file, "--method", "self_instruct", "--endpoint", stub.url, "--model", "m", "--number", "40"]
        words += ["--max-new-tokens", "300"]
        assert jax_it(*words, "--journal", str(tmp_path / "j"), "--output", str(output)) == 0
    made = rows(output)
    instructions = list(dict.fromkeys(row["instruction"] for row in made))
    assert len(instructions) == 40 and not any(re.search("Draw|Too short", text) for text in instructions)
    origin = made[0]["origin"]
    assert origin["method"] == "self_instruct" and origin["model"] == "m" and origin["seed"] == 0
    assert len(origin["parents"]) == 8 and all(parent.startswith(file) for parent in origin["parents"])
    later = json.loads(output.read_text().splitlines()[-1])["origin"]["parents"]
    assert sum(parent.startswith("instruction ") for parent in later) in (0, 2)
    # One input with several outputs is dropped; a class label without an input stays.
    by_kind = Counter((row["origin"]["is_classification"], row["input"][:3], row["output"]) for row in made)
    assert by_kind[True, "A f", "good"] == by_kind[True, "A w", "bad"] == by_kind[True, "", "bad"] == 8
    assert by_kind[False, "", "alone"] == 32 and len(by_kind) == 4
    report = json.loads((tmp_path / "made.jsonl.manifest.json").read_text())["report"]
    assert report["rejected"]["instance: one input with several outputs"] == 64
    assert {"instruction: like another", "instruction: too short"} < set(report["rejected"])
    assert report["usage"]["requests"] == len(stub.asked)
    assert {body["max_tokens"] for body in stub.asked} == {8, 300}


def test_what_is_made_does_not_depend_on_how_many_requests_run_at_a_time_nor_on_a_stop(tmp_path):
    file = seeds(tmp_path / "seeds.jsonl")
    made, counts = [], []
    for number, trouble in ((1, []), (8, [429, "broken"] * 5), (8, [None] * 25 + [401])):
        output, journal = tmp_path / f"{len(made)}.jsonl", str(tmp_path / f"{len(made)}.journal")
        with Stub(model, trouble) as stub:
            words = [file, "--method", "self_instruct", "--endpoint", stub.url, "--model", "m", "--number", "30"]
            words += ["--journal", journal, "--output", str(output), "--concurrency", str(number)]
            if 401 in trouble:
                assert jax_it(*words) == 2 and not output.exists()
            assert jax_it(*words) == 0
        made.append(output.read_bytes())
        counts.append(len(stub.asked))
        assert len(set(stub.keys)) == len(stub.keys) or 401 in trouble  # those under way at the error are asked again
    assert made[0] == made[1] == made[2]
    assert counts[0] == counts[1] and counts[2] < counts[0] + 8


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Name three red fruits.", ""),
        ("写一首关于春天的诗", ""),
        ("Do it now", "too short"),
        ("word " * 151, "too long"),
        ("Show a graph of the sales", "about what a language model cannot do"),
        ("Photograph-like descriptions are needed here", ""),
        ("Write a program that sorts numbers", "begins with 'Write a program'"),
        ("- list all the things", "begins with a punctuation mark"),
    ],
)
def test_instructions_are_kept_by_the_papers_rules(instruction, reason):
    assert self_instruct.fault(instruction) == reason


def test_numbered_lists_and_instances_are_read_as_models_write_them():
    assert self_instruct.proposed(Reply("9. Name a bird.\n10. Name\n a tree.\n\n11) Sing.")) == [
        "Name a bird.",
        "Name a tree.",
        "Sing.",
    ]
    assert self_instruct.proposed(Reply("Task 9: One.\n**Task 10:** Two.\n11. Thr", finished=False)) == ["One.", "Two."]
    assert self_instruct.proposed(Reply("Sure! Here they are:\n9. One.")) == ["One."]
    assert list(self_instruct.instances("Input: 2+2\nOutput: 4\n\nTask: more\nOutput: 5", False)) == [("2+2", "4")]
    assert list(self_instruct.instances("The answer.\nIt is long.", False)) == [("", "The answer.\nIt is long.")]
    assert list(self_instruct.instances("Example 1\nInput: None\nOutput: x\nExample 2\nOutput: y", False)) == [
        ("", "x"),
        ("", "y"),
    ]


# Answers, Evol-Instruct, translation


def prompts(file, number=6):
    lines = [json.dumps({"id": i, "prompt": f"What is {i} plus one?", "completion": "?"}) + "\n" for i in range(number)]
    file.write_text("".join(lines))
    return str(file)


def test_a_judge_chooses_among_candidates_or_rejects_all_of_them(tmp_path):
    def answer(text, body):
        if not text.startswith("Here are a conversation"):
            number = int(re.search(r"\d+", text)[0])
            return "same" if number == 3 else f"{number} candidate {body['seed'] % 1000}"
        if "What is 1 " in text:
            return "0"
        if "What is 2 " in text:
            return "I cannot say."
        best = max(re.findall(r"\[Answer (\d)\]\n\d candidate (\d+)", text), key=lambda found: int(found[1]))
        return f"Answer {best[0]}."

    output = tmp_path / "out.jsonl"
    with Stub(answer) as stub:
        words = [prompts(tmp_path / "in.jsonl"), "--endpoint", stub.url, "--model", "m", "--judge-model", "j"]
        words += ["--journal", str(tmp_path / "j"), "--output", str(output), "--candidates", "3"]
        assert jax_it(*words) == 0
    assert {row["id"]: row["completion"] for row in rows(output)} == {
        0: "0 candidate 2", 3: "same", 4: "4 candidate 2", 5: "5 candidate 2",
    }  # fmt: skip
    assert rows(output)[0]["origin"] == {
        "method": "answers", "model": "m", "parents": [f"{tmp_path / 'in.jsonl'}, line 1"], "seed": 0,
        "candidates": 3, "judge": "j",
    }  # fmt: skip
    dropped = rows(tmp_path / "out.jsonl.dropped.jsonl")
    assert [(row["line"], row["reason"]) for row in dropped] == [
        (2, "the judge rejected all answers"),
        (3, "the judge named no answer"),
    ]
    assert Counter(body["model"] for body in stub.asked) == {"m": 18, "j": 5}


def test_instructions_evolve_and_rewritings_that_fail_are_given_up(tmp_path):
    def answer(text, body):
        if text.startswith("Do these two"):
            return "Yes" if "What is 1 " in text else "No"
        if "### Instruction" in text:
            before = text.rsplit("### Instruction\n", 1)[1]
            return "### Rewritten instruction" if "What is 2 " in before else f"{before} And why?"
        return "I'm sorry, I cannot." if "What is 3 " in text else "Because."

    output = tmp_path / "out.jsonl"
    with Stub(answer) as stub:
        words = [prompts(tmp_path / "in.jsonl"), "--method", "evol_instruct", "--endpoint", stub.url, "--model", "m"]
        words += ["--journal", str(tmp_path / "j"), "--output", str(output), "--rounds", "2"]
        assert jax_it(*words) == 0
    assert [row["prompt"] for row in rows(output)] == [f"What is {i} plus one? And why? And why?" for i in (0, 4, 5)]
    assert len(rows(output)[0]["origin"]["steps"]) == 2 and rows(output)[0]["completion"] == "Because."
    reasons = [row["reason"] for row in rows(tmp_path / "out.jsonl.dropped.jsonl")]
    assert reasons == ["no rewriting added anything"] * 2 + ["the answer is an apology"]


def test_a_set_is_translated_turn_by_turn_and_what_comes_back_unchanged_is_dropped(tmp_path):
    german = "Das ist ein langer deutscher Satz über das Wetter in Berlin und in München."
    english = "This is a long English sentence about the weather in Berlin and in Munich."
    records = [
        {"messages": [{"role": "user", "content": english}, {"role": "assistant", "content": "Yes."}]},
        {"prompt": english + " Again?", "completion": "No."},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = {english: german, "Yes.": "Ja.", "No.": "Nein."}
    output = tmp_path / "out.jsonl"
    with Stub(lambda text, body: answers.get((said := text.rsplit("### Text\n", 1)[1]), said)) as stub:
        words = [str(tmp_path / "in.jsonl"), "--method", "translate", "--language", "German", "--endpoint", stub.url]
        words += ["--model", "m", "--journal", str(tmp_path / "j"), "--output", str(output)]
        assert jax_it(*words) == 0
    (row,) = rows(output)
    assert (row["prompt"], row["completion"], row["origin"]["language"]) == (german, "Ja.", "German")
    assert [row["reason"] for row in rows(tmp_path / "out.jsonl.dropped.jsonl")] == ["a text was not translated"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model is missing"),
        (["--model", "m"], "--journal is missing"),
        (["--model", "m", "--journal", "j", "--language", "de"], "--language is for --method translate"),
        (
            ["--model", "m", "--journal", "j", "--endpoint", "http://x", "--api-key-env", "NO_SUCH"],
            "NO_SUCH is not set",
        ),
        (["--model", "m", "--journal", "j", "--number", "0"], "--number: 0 is less than 1"),
        (
            ["--model", "m", "--journal", "j", "--candidates", "2", "--temperature", "0"],
            "needs a --temperature above 0",
        ),
        (["--model", "m", "--journal", "j", "--method", "self_instruct", "--endpoint", "http://x"], "and there are 6"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert jax_it(prompts(tmp_path / "in.jsonl"), *words) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.slow
def test_a_build_that_is_killed_twice_pays_for_no_answer_twice(tmp_path):
    file, output = seeds(tmp_path / "seeds.jsonl"), tmp_path / "made.jsonl"
    with Stub(model, delay=0.02) as stub:
        words = [
            sys.executable,
            "-m",
            "jax_it",
            "data",
            "build",
            file,
            "--method",
            "self_instruct",
            "--endpoint",
            stub.url,
        ]
        words += ["--model", "m", "--number", "200", "--journal", str(tmp_path / "j"), "--output", str(output)]
        words += ["--concurrency", "4"]
        for stop in (30, 150):
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(stub.asked) < stop:
                assert process.poll() is None
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert not output.exists()
        assert subprocess.run(words, stdout=subprocess.DEVNULL).returncode == 0
        killed = Counter(stub.keys)
        whole = tmp_path / "whole.jsonl"
        words[words.index(str(output))], words[words.index(str(tmp_path / "j"))] = str(whole), str(tmp_path / "k")
        assert subprocess.run(words, stdout=subprocess.DEVNULL).returncode == 0
    assert output.read_bytes() == whole.read_bytes()
    # Only what was under way at a kill is asked again, and with the same key.
    assert sum(killed.values()) - len(killed) <= 2 * 4
