"""Replies, streams and errors of the HTTP interface."""

import asyncio
import json
import random

import httpx2 as httpx
import pytest

import jax_it
from jax_it.generation import GREEDY
from jax_it.predict import predict
from tests.serving.conftest import Served, events

QUESTIONS = ["Say hello", "Who are you?", "Is grass green?", "What is the colour of the sky, and why is it so?"]


@pytest.fixture(scope="module")
def loaded(served_folders):
    """Each model as a user of the package has it."""
    return {name: jax_it.load(str(folder)) for name, folder in served_folders.items()}


def offline(loaded, name: str, prompts, new=24, sampling=GREEDY, raw=False, stop=()) -> list[list[str]]:
    """The texts that `jax-it generate` gives."""
    found = predict(*loaded[name], prompts, new, sampling, raw=raw, stop=stop)
    return [[one.text for one in several] for several in found]


def contents(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]


def test_an_answer_is_the_text_that_generate_gives(served, loaded):
    for question in QUESTIONS:
        assert contents(served.chat(question)) == offline(loaded, "llama", [question])[0]
    several = [question[:20] for question in QUESTIONS]
    assert contents(served.complete(several, max_tokens=9)) == [
        text for (text,) in offline(loaded, "llama", several, 9, raw=True)
    ]


def test_an_encoder_decoder_answers_as_generate_does(served, loaded):
    texts = offline(loaded, "t5", QUESTIONS)
    assert [contents(served.chat(question, model="t5")) for question in QUESTIONS] == texts
    assert [contents(served.complete(question, model="t5", max_tokens=24)) for question in QUESTIONS] == texts


def test_a_reply_has_the_fields_of_openai(served, loaded):
    body = served.chat("Say hello", max_tokens=5).json()
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion" and body["model"] == "llama"
    (choice,) = body["choices"]
    assert choice["index"] == 0 and choice["message"]["role"] == "assistant" and choice["finish_reason"] == "length"
    usage = body["usage"]
    assert usage["completion_tokens"] == 5 and usage["total_tokens"] == 5 + usage["prompt_tokens"]
    body = served.complete("Hello", max_tokens=3).json()
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"


def test_content_may_be_parts_and_a_prompt_token_ids(served, loaded):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    assert contents(served.post("/v1/chat/completions", body)) == contents(served.chat("Say hello"))
    ids = served.post("/tokenize", {"prompt": "Say hello"}).json()["tokens"]
    text = contents(served.complete("Say hello"))
    assert contents(served.complete(ids)) == text and contents(served.complete([ids, ids])) == text * 2


def test_a_text_ends_before_a_stop_string(served, loaded):
    (whole,) = contents(served.chat("Say hello"))
    stop = whole[4:7]
    response = served.chat("Say hello", stop=[stop, "never"])
    assert contents(response) == [whole[: whole.index(stop)]]
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_a_stream_is_the_reply_in_parts(served):
    (whole,) = contents(served.chat("Say hello"))
    response = served.chat("Say hello", stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] > 0
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole and len(deltas) > 5
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk["usage"] is None and chunk["id"] == chunks[0]["id"] for chunk in chunks)


def test_a_stream_of_several_texts_names_each_of_them(served):
    prompts = ["Say hello", "Who are you?"]
    texts = {0: "", 1: ""}
    for chunk in events(served.complete(prompts, stream=True).text)[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert [*texts.values()] == contents(served.complete(prompts))


def test_a_stop_string_is_never_in_a_stream(served):
    (whole,) = contents(served.chat("Say hello"))
    stop = whole[4:8]
    chunks = events(served.chat("Say hello", stop=stop, stream=True).text)[:-1]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole[: whole.index(stop)] and chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_samples_are_those_of_generate_with_the_same_seed(served, loaded):
    sampling = GREEDY._replace(temperature=1.5, top_k=20, seed=7, num_samples=3)
    settings = {"temperature": 1.5, "top_k": 20, "seed": 7, "n": 3, "max_tokens": 12}
    texts = offline(loaded, "llama", QUESTIONS[:1], 12, sampling)[0]
    assert contents(served.chat(QUESTIONS[0], **settings)) == texts and len(set(texts)) == 3
    assert contents(served.chat(QUESTIONS[0], temperature=1.5, max_tokens=12)) != contents(
        served.chat(QUESTIONS[0], temperature=1.5, max_tokens=12)
    )


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_beam_search_gives_the_texts_of_generate(served, loaded, name):
    sampling = GREEDY._replace(num_beams=3, num_samples=2)
    texts = offline(loaded, name, QUESTIONS[:1], 24, sampling)[0]
    for stream in (False, True):
        response = served.chat(QUESTIONS[0], model=name, use_beam_search=True, best_of=3, n=2, stream=stream)
        if not stream:
            assert contents(response) == texts
            continue
        found = {0: "", 1: ""}
        for chunk in events(response.text)[:-1]:
            found[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
        assert [*found.values()] == texts


def test_penalties_biases_and_limits_change_the_text(served, loaded):
    (plain,) = contents(served.chat("Say hello"))
    first = served.chat("Say hello", logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["token"]
    (token,) = {served.post("/tokenize", {"prompt": first}).json()["tokens"][0]}
    (text,) = contents(served.chat("Say hello", logit_bias={str(token): -100}))
    assert not text.startswith(first)
    for change in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}):
        assert contents(served.chat("Say hello", **change)) != [plain]
    response = served.chat("Say hello", ignore_eos=True, max_tokens=20, temperature=2.0, seed=3)
    assert response.json()["usage"]["completion_tokens"] == 20


def test_log_probabilities_are_of_the_tokens_of_the_text(served):
    settings = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6}
    choice = served.chat("Say hello", **settings).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 6 and "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        best = entry["top_logprobs"]
        assert len(best) == 3 and best[0]["logprob"] == pytest.approx(entry["logprob"]) and best[0]["token"]
    streamed = [
        entry
        for chunk in events(served.chat("Say hello", logprobs=True, top_logprobs=3, max_tokens=6, stream=True).text)[
            :-1
        ]
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == entries


def test_the_log_probabilities_of_a_prompt_are_those_of_the_harness(served, loaded):
    from jax_it.generation.likelihood import LikelihoodRequest, Likelihoods
    from jax_it.sharding import inference_mesh

    model, params, tokenizer = loaded["llama"]
    context, continuation = tokenizer.encode(["Say hello", " Hello, I am well."])
    ids = [*context, *continuation]
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
    log_probs = served.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    # As lm_eval's `local-completions` reads them.
    values, best = log_probs["token_logprobs"][len(context) : -1], log_probs["top_logprobs"][len(context) : -1]
    likelihoods = Likelihoods(model, inference_mesh(model.parameter_count), 1)
    ((_, (found,)),) = likelihoods(params, [LikelihoodRequest(context, [continuation])])
    assert len(values) == len(continuation) and sum(values) == pytest.approx(found.log_prob, abs=1e-3)
    assert all(v == max(top.values()) for v, top in zip(values, best, strict=True)) == found.greedy
    assert log_probs["token_logprobs"][0] is None and len(log_probs["tokens"]) == len(ids) + 1


def test_an_echo_begins_with_the_prompt(served):
    (text,) = contents(served.complete("Say hello", max_tokens=4))
    assert contents(served.complete("Say hello", max_tokens=4, echo=True)) == [f"Say hello{text}"]
    response = served.complete("Say hello", max_tokens=0, echo=True, logprobs=0)
    assert contents(response) == ["Say hello"] and response.json()["usage"]["completion_tokens"] == 0
    assert "".join(response.json()["choices"][0]["logprobs"]["tokens"]) == "Say hello"


def test_a_text_may_have_to_be_json_of_a_schema(served):
    def format(schema):
        return {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}

    response = served.chat("Say hello", response_format=format({"enum": ["grass", ["sky"]]}))
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert json.loads(contents(response)[0]) in ("grass", ["sky"])
    (text,) = contents(served.chat("Say hello", response_format={"type": "json_object"}))
    assert text.lstrip()[0] == "{"
    for wrong in ({"type": "nothing"}, {"$ref": "#/nowhere"}):
        error = served.refused("/v1/chat/completions", CHAT | {"response_format": format(wrong)})
        assert error["param"] == "response_format" and "JSON schema" in error["message"]


def test_tokens_and_text_go_back_and_forth(served):
    body = served.post("/tokenize", {"prompt": "Say hello", "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] == 152
    assert served.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "Say hello"}
    chat = served.post("/tokenize", {"messages": [{"role": "user", "content": "Say hello"}]}).json()
    assert chat["count"] == served.chat("Say hello").json()["usage"]["prompt_tokens"]
    assert "im_start" in served.get("/tokenizer_info").json()["chat_template"]


def test_models_version_docs_and_metrics_are_there(served):
    body = served.get("/v1/models").json()
    assert [each["id"] for each in body["data"]] == ["llama", "t5"] and body["object"] == "list"
    assert served.get("/v1/models/t5").json()["kind"] == "seq2seq"
    assert served.get("/version").json().keys() == {"jax-it", "jax", "version"}
    page = served.get("/docs").text
    assert "/v1/chat/completions" in page and "http" not in page and "src=" not in page
    assert served.get("/health").json() == {"status": "ok"}
    text = served.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total",
        "generation_tokens_total", 'request_success_total{finished_reason="length"', "time_to_first_token_seconds_sum",
        "inter_token_latency_seconds_bucket", "e2e_request_latency_seconds_count", "request_queue_time_seconds_sum",
        "request_prefill_time_seconds_sum", "request_decode_time_seconds_sum",
    ):  # fmt: skip
        assert f"vllm:{name}" in text, name


CHAT = {"messages": [{"role": "user", "content": "Say hello"}]}


@pytest.mark.parametrize(
    "path, body, param, message",
    [
        ("chat/completions", CHAT | {"top_a": 1}, "top_a", "unknown field 'top_a'"),
        ("chat/completions", {"messages": [{"role": "user", "text": "x"}]}, "messages.0.text", "unknown field"),
        ("chat/completions", {}, "messages", "messages: Field required"),
        ("chat/completions", {"messages": []}, "messages", "at least 1 item"),
        ("chat/completions", {"messages": [{"role": "user", "content": " "}]}, "messages.0.content", "is empty"),
        ("chat/completions", {"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role", "'system'"),
        ("chat/completions", CHAT | {"temperature": -1}, "temperature", "greater than or equal to 0"),
        ("chat/completions", CHAT | {"temperature": 1e-9}, "temperature", "it must be 0 (greedy), or from 1e-6"),
        ("chat/completions", CHAT | {"max_tokens": 25}, "max_tokens", "more than this server's 24"),
        ("chat/completions", CHAT | {"max_completion_tokens": 25}, "max_completion_tokens", "more than"),
        ("chat/completions", CHAT | {"max_tokens": 1, "max_completion_tokens": 2}, None, "differ"),
        ("chat/completions", CHAT | {"n": 2}, "n", "needs a temperature above 0"),
        ("chat/completions", CHAT | {"n": 17, "temperature": 1}, "n", "17 texts are more than 16"),
        ("chat/completions", CHAT | {"stream_options": {"include_usage": True}}, None, "goes with stream"),
        ("chat/completions", CHAT | {"top_logprobs": 1}, None, "goes with logprobs"),
        ("chat/completions", CHAT | {"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
        ("chat/completions", CHAT | {"logit_bias": {"900000": 1}}, "logit_bias", "the model has tokens 0 to"),
        ("chat/completions", CHAT | {"best_of": 2}, "best_of", "use_beam_search"),
        ("chat/completions", CHAT | {"use_beam_search": True}, "best_of", "2 beams or more"),
        ("chat/completions", CHAT | {"use_beam_search": True, "best_of": 99}, "best_of", "from n, 1, to 16"),
        ("chat/completions", CHAT | {"use_beam_search": True, "best_of": 2, "stop": "x"}, "use_beam_search", "stop"),
        ("chat/completions", CHAT | {"min_tokens": 30}, "min_tokens", "more than max_tokens"),
        ("chat/completions", CHAT | {"temperature": 1, "top_k": 1 << 31}, "top_k", "from 0 to 2147483647"),
        ("chat/completions", CHAT | {"long " * 5000: 1}, None, "unknown field 'long long"),
        ("chat/completions", CHAT | {"stop": ""}, "stop", "at least 1 character"),
        ("chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice", "tools does not have"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs", "'thinking'"),
        ("completions", {"prompt": ""}, "prompt", "is empty"),
        ("completions", {"prompt": []}, "prompt", ""),
        ("completions", {"prompt": [1 << 20]}, "prompt", "is not one of the model's"),
        ("completions", {"prompt": "word " * 200}, "prompt", "this server takes 128"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "needs echo"),
        ("completions", {"prompt": "x", "model": "t5", "echo": True}, "echo", "lm_eval --model jax_it"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix", "unknown field"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_request_is_said_with_the_field(served, path, body, param, message):
    error = served.refused(f"/v1/{path}", body)
    assert message in error["message"] and error["type"] == "invalid_request_error" and len(error["message"]) < 500
    assert param is None or error["param"] == param


def test_a_prompt_that_is_too_long_for_the_model_is_refused(served):
    error = served.refused(
        "/v1/completions", {"prompt": [5] * 72, "max_tokens": 24, "model": "llama"} | {"prompt": [5] * 129}
    )
    assert error["code"] == "context_length_exceeded"


def test_other_errors_have_the_same_shape(served):
    assert served.refused("/v1/chat/completions", CHAT | {"model": "gpt"}, 404)["code"] == "model_not_found"
    assert served.refused("/v1/nothing", {}, 404) and served.refused("/v1/models", {}, 405)
    assert served.refused("/v1/completions/", {"prompt": "x"}, 404), "a redirect would name another host behind a proxy"
    for body in (
        b"{",
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": NaN}',
        b'"x"',
        b"",
        b'{"prompt": "\\ud800"}',
    ):
        headers = {"content-type": "application/json"}
        response = served.post("/v1/completions", body, **headers)
        assert response.status_code == 400 and response.json()["error"]["message"], body[:20]
    response = served.post("/v1/completions", b'{"prompt": "x"}', **{"content-type": "text/plain"})
    assert response.status_code == 400 and "application/json" in response.text
    assert "larger than 4194304 bytes" in served.refused("/v1/completions", {"prompt": "x" * (5 << 20)}, 413)["message"]


def test_a_field_that_is_null_counts_as_left_out(served):
    assert contents(served.chat("Say hello", temperature=None, stop=None, tools=None)) == contents(
        served.chat("Say hello")
    )


def test_a_conversation_of_several_turns_is_rendered_as_in_training(served, loaded):
    from jax_it.data.templates import Turn

    turns = [("system", "Be brief."), ("user", "Say hello"), ("assistant", "Hello"), ("user", "Who are you?")]
    texts = offline(loaded, "llama", [[Turn(*turn) for turn in turns]])[0]
    body = {"messages": [{"role": role, "content": text} for role, text in turns]}
    assert contents(served.post("/v1/chat/completions", body)) == texts
    error = served.refused("/v1/chat/completions", body | {"model": "t5"})
    assert "no chat template" in error["message"] and error["param"] == "messages"


def test_many_requests_at_random_times_each_have_the_text_of_their_own(served, loaded):
    asyncio.run(_random_arrivals(served, loaded, 40))


@pytest.mark.slow
def test_two_hundred_requests_at_random_times_each_have_the_text_of_their_own(served, loaded):
    asyncio.run(_random_arrivals(served, loaded, 200))


async def _random_arrivals(served: Served, loaded, number: int) -> None:
    """Requests of mixed kinds and lengths, some of which are given up."""
    rng = random.Random(0)
    prompts = [
        " ".join(rng.choices("red green blue sky hello you grass".split(), k=rng.randint(1, 12))) for _ in range(12)
    ]
    expected = {
        (name, new): [text for (text,) in offline(loaded, name, prompts, new, raw=True)]
        for name in ("llama", "t5")
        for new in (5, 24)
    }

    async def ask(client: httpx.AsyncClient) -> None:
        await asyncio.sleep(rng.random() * number / 20)
        name, new, which = rng.choice(["llama", "t5"]), rng.choice([5, 24]), rng.randrange(12)
        body = {"model": name, "prompt": prompts[which], "max_tokens": new}
        want = expected[name, new][which]
        kind = rng.random()
        if kind < 0.15:  # given up
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await client.post("/v1/completions", json=body)
        elif kind < 0.5:
            response = await client.post("/v1/completions", json=body | {"stream": True})
            assert "".join(chunk["choices"][0]["text"] for chunk in events(response.text)[:-1]) == want
        else:
            response = await client.post("/v1/completions", json=body)
            assert response.json()["choices"][0]["text"] == want

    async with served.client() as client:
        await asyncio.gather(*(ask(client) for _ in range(number)))
    assert served.server.unfinished == 0
