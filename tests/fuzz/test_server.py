"""Hostile requests over a real connection: each is answered or refused in OpenAI's shape, in time, and harms none."""

import asyncio
import copy
import json
import random
from typing import Any

import httpx2 as httpx

from jax_it.serving import schemas
from tests.fuzz.seeds import fuzz_cases
from tests.serving.conftest import events, listening, served, served_folders  # noqa: F401

TIMEOUT = 120  # seconds of one request, on a busy machine
AT_A_TIME = 8
REFUSALS = {400, 401, 404, 405, 408, 413, 429}


class Raw(str):
    """JSON as it is written, right or wrong."""


class Pairs(list):
    """An object whose keys may occur twice."""


def nested(opening: str, closing: str, depth: int) -> Raw:
    return Raw(opening * depth + "1" + closing * depth)


NUMBERS = [Raw(text) for text in (
    "0", "-0", "1", "-1", "2", "7", "0.5", "1.5", "-2", "1e-320", "1e-7", "1e30", "1e308", "1e309", "-1e309", "NaN",
    "Infinity", "-Infinity", "2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775808",
    "18446744073709551615", "18446744073709551616", "1" + "0" * 400, "9" * 5000, "1e999999", "01", "+1", ".5", "1.",
)]  # fmt: skip
TEXTS = (
    "", " ", "x", "0", "1", "-1", "nan", "\x00", "a\nb\r\n", "\ud800", "\udfff\ud800", "ü☃𝒳🏳️‍🌈",
    "\u202e\u0301", "\ufffd",
    "<|im_start|>", "<|im_end|><|im_start|>system", "</s>", "{{ 7 * 7 }}", "{% raw %}", "%s%n", "data: [DONE]\n\n",
    "x" * 300, "word " * 3000, "llama", "t5", "system", "tool", "auto", "../../etc/passwd", '"', "\\", "<tool_call>",
)  # fmt: skip
TREES = (
    None, True, False, [], {}, [[]], [None], {"": None}, [1, "x"], [[1], [2]], ["x", ["y"]], {"\ud800": "\ud800"},
    [0] * 3000, ["x"] * 3000, [[5]] * 200, nested("[", "]", 40), nested("[", "]", 400), nested('{"a":', "}", 400),
    nested("[", "]", 990), nested('{"items":', "}", 900), nested('{"anyOf":[', "]}", 450), nested("[", "]", 50_000),
    Pairs([("type", "text"), ("type", Raw("7"))]),
)  # fmt: skip
SCHEMAS = (
    True, False, {}, {"type": "string", "pattern": "(a{1000}){1000}"}, {"type": "string", "pattern": "(a|aa)+$"},
    {"type": "string", "pattern": "((((((a*)*)*)*)*)*)*b"}, {"type": "string", "pattern": "(?=x)"},
    {"type": "string", "pattern": "(.{0,500}x){50}"}, {"type": "string", "pattern": "["},
    {"type": "string", "pattern": "\\p{L}{1,100000}"}, {"type": "string", "minLength": 1000000000},
    {"type": "string", "minLength": 5, "maxLength": 4}, {"type": "array", "minItems": 1000000},
    {"type": "array", "minItems": -1}, {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "http://127.0.0.1:1/schema.json"}, {"$ref": "file:///etc/passwd"}, {"enum": []}, {"const": Raw("1e400")},
    {"enum": [f"value {i}" for i in range(20_000)]}, {"type": "number", "multipleOf": Raw("1e-300")},
    {"type": "number", "minimum": Raw("1e300"), "maximum": Raw("-1e300")},
    {"type": "integer", "minimum": Raw("9" * 400)},
    {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}, "required": [f"p{i}" for i in range(3000)]},
    {"allOf": [{"properties": {f"q{i}": {"type": "integer"}}} for i in range(200)]},
    {"anyOf": [{"type": "object", "properties": {"x": {"const": i}}} for i in range(2000)]},
    {"oneOf": [{"type": "string"}, {"type": "string"}]}, {"not": {}}, {"type": ["string", "nope"]},
    {"type": "object", "patternProperties": {"^(a+)+$": {}}, "minProperties": 100000},
    {"type": "string", "format": "date-time"}, {"type": "string", "format": "\ud800"}, {"if": {}, "then": False},
    nested('{"items":', "}", 200), nested('{"properties":{"a":', "}}", 300), {"type": "\x00"},
)  # fmt: skip
REGEX_ENDS = ("", "$", "{2,900}", "+?", "|", "(?!a)", "\\1", "[^\\x00]")
CONTENT_TYPES = (
    "", "text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
    "application/json; charset=utf-16", "application/problem+json", "application/json; charset=nope",
    "json", ",", "\xff",
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
CHAT = {"messages": [{"role": "user", "content": "Say hello"}]}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        CHAT, CHAT | {"model": "t5"}, CHAT | {"stream": True, "stream_options": {"include_usage": True}},
        CHAT | {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "seed": 1, "n": 2},
        CHAT | {"logprobs": True, "top_logprobs": 3, "max_tokens": 4}, CHAT | {"stop": ["a", "b"], "stream": True},
        CHAT | {"tools": [TOOL], "tool_choice": "required", "max_tokens": 6},
        CHAT | {"tools": [TOOL], "stream": True},
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
        CHAT | {"logit_bias": {"5": 1.5}, "frequency_penalty": 1, "presence_penalty": 1, "repetition_penalty": 1.2},
        {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1"}, {"role": "user", "content": "And?"},
        ], "chat_template_kwargs": {}},
    ],
    "/v1/completions": [
        {"prompt": "Say hello"}, {"prompt": ["Say", "hello"], "max_tokens": 5, "stream": True}, {"prompt": [5, 6, 7]},
        {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 2, "max_tokens": 1}, {"prompt": "x", "model": "t5"},
        {"prompt": "x", "best_of": 2, "use_beam_search": True, "model": "t5"}, {"prompt": "x", "min_tokens": 3},
        {"prompt": "x", "echo": True, "max_tokens": 0}, {"prompt": "x", "ignore_eos": True, "user": "me"},
    ],
    "/tokenize": [
        {"prompt": "Say hello", "return_token_strs": True}, CHAT, CHAT | {"tools": [TOOL]},
        {"prompt": "x", "model": "t5"},
    ],
    "/detokenize": [{"tokens": [5, 6, 7]}, {"tokens": []}],
    "/render": [{"template": "{{ x }} ||| {{ y }}", "fields": {"x": "1"}}],
}  # fmt: skip
LIMITS = {  # values at the edge of what a field may have, on both sides of it
    "max_tokens": (1, 24, 25, 2**31), "temperature": (0, 1e-6, 1e-7, 2.0, 1e30, 1e31, 5), "top_p": (0, 1e-30, 1, 1.1),
    "n": (1, 2, 16, 17), "stop": ("\ufffd", ["a"] * 16, ["a"] * 17, "x" * 5000), "seed": (-1, 2**63, 2**64 - 1, 2**64),
    "frequency_penalty": (2, -2, 2.1), "presence_penalty": (2, -2), "stream": (True, False), "ignore_eos": (True,),
    "logit_bias": ({str(i): 100 for i in range(300)}, {str(i): -100 for i in range(301)}, {"0": 100}, {"5": -100}),
    "top_k": (-1, 1, 2**31 - 1, 2**31, 2**64, 10**30), "min_p": (0, 1, 1e-30), "repetition_penalty": (1e-6, 1e30, 1e-9),
    "min_tokens": (24, 2**40), "logprobs": (True, 0, 1, 5, 20), "top_logprobs": (0, 20, 21), "echo": (True,),
    "length_penalty": (1e30, -1e308), "best_of": (1, 2, 2**40), "user": ("\ud800", "\n" * 5000),
    "model": ("t5", "llama"),
    "response_format": ({"type": "json_object"}, {"type": "text"}), "tool_choice": ("none", "required"),
    "chat_template_kwargs": ({"tools": 1}, {"bos_token": [1]}, {"x": 1}), "parallel_tool_calls": (False,),
}  # fmt: skip
MODELS = {
    "/v1/chat/completions": schemas.ChatRequest, "/v1/completions": schemas.CompletionRequest,
    "/tokenize": schemas.TokenizeRequest, "/detokenize": schemas.DetokenizeRequest, "/render": schemas.RenderRequest,
}  # fmt: skip


def dump(tree: Any) -> str:
    """JSON with its own words for numbers and with keys that occur twice."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, dict | Pairs):
        pairs = tree.items() if isinstance(tree, dict) else tree
        return "{" + ",".join(f"{json.dumps(key)}:{dump(value)}" for key, value in pairs) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    return json.dumps(tree)


def hostile(rng: random.Random) -> Any:
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return rng.choice(TEXTS)
    if kind < 0.9:
        return rng.choice(TREES)
    return rng.choice(SCHEMAS)


def a_schema(rng: random.Random) -> Any:
    if rng.random() < 0.7:
        return rng.choice(SCHEMAS)
    letters = "".join(rng.choices("ab(|)*+?[]{}\\d.^-0123,", k=rng.randrange(1, 30)))
    return {"type": "string", "pattern": letters + rng.choice(REGEX_ENDS)}


def mutate(tree: Any, rng: random.Random, model: Any) -> Any:
    """The body with one more thing wrong, or odd."""
    kind = rng.random()
    if kind < 0.15:
        return tree | {rng.choice([*model.model_fields]): hostile(rng)}
    if kind < 0.3 and model is schemas.ChatRequest:
        schema = a_schema(rng)
        if rng.random() < 0.5:
            return tree | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        tool = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
        return tree | {"tools": [tool], "tool_choice": rng.choice(["auto", "required", TOOL])}
    if kind < 0.36:
        return tree | {rng.choice(TEXTS): hostile(rng)}
    if kind < 0.42:
        tokens = [rng.choice([-1, 0, 5, 700, 900_000, 1 << 31, 1.5, True, "5"]) for _ in range(rng.randrange(1, 9))]
        return tree | rng.choice(
            [{"prompt": tokens}, {"tokens": tokens}, {"logit_bias": {str(t): 100 for t in tokens}}]
        )
    if kind < 0.46:
        return tree | {
            rng.choice(["prompt", "messages"]): rng.choice(["word " * 10_000, [5] * 10_000, CHAT["messages"] * 500])
        }
    if kind < 0.5:
        items = [*tree.items()]
        return Pairs([*items, (rng.choice(items)[0], hostile(rng))])
    # Somewhere in the tree
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = rng.choice([*keys])
        if isinstance(node[key], dict | list) and not isinstance(node[key], Pairs) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        if rng.random() < 0.2 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = hostile(rng)
        return tree


def mangle(body: bytes, rng: random.Random) -> bytes:
    """The body's bytes, broken."""
    at = rng.randrange(len(body) + 1)
    return rng.choice([
        body[:at], body[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"}"]) + body[at:], body + body,
        b"\xef\xbb\xbf" + body, body.decode().encode("utf-16"), b" " * (10 << 20) + body, body + b" " * (10 << 20),
        body.replace(b":", b"=", 1), b"", b"null", b"[" + body + b"]", rng.randbytes(50), b'"' + b"x" * (10 << 20),
    ])  # fmt: skip


def a_request(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    path = rng.choices([*BODIES], (6, 5, 2, 1, 1))[0]
    tree: Any = copy.deepcopy(rng.choice(BODIES[path]))
    if path.startswith("/v1"):
        for name in rng.sample([*LIMITS], rng.choice((0, 0, 1, 2, 4))):
            tree |= {name: rng.choice(LIMITS[name])}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 1, 2, 3))):
        if isinstance(tree, Pairs) or not tree:
            break
        tree = mutate(tree, rng, MODELS[path])
    body = dump(tree).encode()
    if rng.random() < 0.12:
        body = mangle(body, rng)
    headers = {"Content-Type": "application/json"}
    if rng.random() < 0.06:
        headers["Content-Type"] = rng.choice(CONTENT_TYPES)
    if rng.random() < 0.04:
        name = rng.choice(["Authorization", "Content-Encoding", "Expect", "Origin", "X-Request-Id", "Accept"])
        headers[name] = rng.choice(["gzip", "100-continue", "Bearer x", "x" * 5000, "ü"])
    if rng.random() < 0.03:
        path = rng.choice([path + "/", path + "?model=%ff", "/v1/models/%ff%00", "/%2e%2e/", path.upper()])
    return path, body, headers


def refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def wrong(response: httpx.Response) -> str:
    """What is wrong with an answer; "" where nothing is."""
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            *_, last = events(response.text)
            return "" if last == "[DONE]" else wrong_error(last, 400)
        response.json(parse_constant=refuse)
        return ""
    if response.status_code not in REFUSALS:
        return f"status {response.status_code}"
    return wrong_error(response.json(), response.status_code)


def wrong_error(body: Any, status: int) -> str:
    if body.keys() != {"error"} or body["error"].keys() != {"message", "type", "param", "code"}:
        return "not OpenAI's shape"
    error = body["error"]
    if not error["message"] or len(error["message"]) > 2000 or not isinstance(error["param"], str | None):
        return "a message that says nothing, or too much"
    wanted = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    return "" if error["type"] == wanted else f"status {status} with type {error['type']!r}"


@fuzz_cases(1000, short=0, chunk=100)
def test_a_request_is_answered_or_refused_in_time(seeds, served, listening, tally):  # noqa: F811
    url = listening(served)
    good = {path: bodies[0] for path, bodies in BODIES.items() if path.startswith("/v1")}

    def answers() -> list[Any]:
        return [httpx.post(url + path, json=body, timeout=TIMEOUT).json() for path, body in good.items()]

    async def run() -> list[tuple[Any, str]]:
        turns = asyncio.Semaphore(AT_A_TIME)

        async def one(client: httpx.AsyncClient, seed: int) -> tuple[Any, str]:
            path, body, headers = a_request(random.Random(seed))
            said = f"seed {seed}: POST {path} {headers} {body[:300]!r}"
            async with turns:
                try:
                    raw = {name: value.encode("latin-1") for name, value in headers.items()}
                    response = await client.post(path, content=body, headers=raw)
                except Exception as error:
                    return "fault", f"{said}: {type(error).__name__} {error}"
            said = f"{said}: {response.status_code} {response.text[:300]}"
            try:
                fault = wrong(response)
            except Exception as error:
                fault = f"{type(error).__name__} {error}"
            return ("fault", f"{fault}; {said}") if fault else ("ran" if response.is_success else "refused", said)

        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
            return await asyncio.gather(*(one(client, seed) for seed in seeds))

    before = answers()
    found = asyncio.run(run())
    after = answers()
    if [each.get("choices") for each in after] != [each["choices"] for each in before] or served.server.unfinished:
        found.append(("fault", f"seeds {seeds[0]} to {seeds[-1]}: after them another request has the answer {after}"))
    tally(found)
