"""The chat page in a real Chromium, headless, against a server of tiny models that answers slowly enough to stop it."""

import asyncio
import dataclasses
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import httpx2 as httpx
import pytest
import uvicorn
from playwright.sync_api import Page, expect, sync_playwright

from jax_it import config as settings
from jax_it.serving import page as chat_page
from tests.serving.conftest import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SCREENSHOTS = os.environ.get("JAX_IT_TEST_SCREENSHOTS")  # a folder for pictures of the page, to look at

expect.set_options(timeout=120_000)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Slow:
    """The app, with a pause before each part of a stream."""

    def __init__(self, app):
        self.app, self.pause = app, 0.0

    async def __call__(self, scope, receive, send):
        async def send_slowly(message):
            if message["type"] == "http.response.body" and message.get("more_body"):
                await asyncio.sleep(self.pause)
            await send(message)

        await self.app(scope, receive, send_slowly)


@pytest.fixture(scope="module")
def listening(served: Served):
    """(URL, the slow app) of the tiny models on a port of this machine."""
    slow = Slow(served.app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(slow, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", slow
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, listening):
    """An empty page of a new profile. Every address it asks for is the server's, and nothing fails in it."""
    url, slow = listening
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(120_000)
    requested, errors = [], []
    context.on("request", lambda request: requested.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on(
        "response", lambda got: got.request.method == "GET" and got.status not in (200, 401) and errors.append(got.url)
    )
    page.goto(url)
    expect(page.get_by_label("Model")).to_have_value("llama")
    yield page
    context.close()
    slow.pause = 0.0
    assert {address.split("/")[2] for address in requested} == {url.split("/")[2]}
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []


def answers(page: Page):
    return page.locator("li.assistant:not(.running) .text")


def ask(page: Page, text: str, label: str = "Message") -> None:
    page.get_by_label(label, exact=True).fill(text)
    page.get_by_label(label, exact=True).press("Enter")


def expected(url: str, *turns: str, system: str = "", **fields) -> str:
    """The answer to turns of user and assistant, as the API gives it."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": messages, **fields}, timeout=60)
    return response.json()["choices"][0]["message"]["content"]


@needs_chromium
def test_a_question_is_answered_edited_asked_again_and_kept(page, listening):
    url, _ = listening
    page.get_by_label("System prompt").fill("Hello")  # shorter than the template's own: the model has 96 positions
    page.get_by_label("Max new tokens").fill("6")
    fields = {"system": "Hello", "max_tokens": 6}
    first, second = (expected(url, text, **fields) for text in ("Is grass green?", "Who are you?"))
    assert first != second
    ask(page, "Is grass green?")
    expect(answers(page)).to_have_text(first)
    expect(page.locator("li.assistant small")).to_contain_text("tokens/s")

    ask(page, "well")
    expect(answers(page)).to_have_text([first, expected(url, "Is grass green?", first, "well", **fields)])
    page.get_by_role("button", name="Edit message 1").click()
    page.get_by_role("textbox", name="Message 1").fill("Who are you?")
    page.get_by_role("button", name="Resend").click()
    expect(answers(page)).to_have_text([second])

    page.get_by_role("button", name="Copy message 2").click()
    expect(page.get_by_role("button", name="Copy message 2")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == second
    page.reload()
    expect(answers(page)).to_have_text([second])
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#messages li")).to_have_count(0)


@needs_chromium
def test_a_stream_is_shown_as_it_comes_and_stopped_and_its_slot_is_free(page, served, listening):
    url, slow = listening
    whole = expected(url, "Is grass green?")
    slow.pause = 0.2
    ask(page, "Is grass green?")
    expect(page.locator("li.assistant.running .text")).not_to_be_empty()
    assert served.server.unfinished == 1
    page.keyboard.press("Escape")
    expect(page.locator("li.assistant small")).to_have_text("Stopped")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    shown = answers(page).text_content()
    assert shown and whole.startswith(shown) and shown != whole
    until = time.monotonic() + 5
    while served.server.unfinished and time.monotonic() < until:
        time.sleep(0.02)
    assert served.server.unfinished == 0
    slow.pause = 0.0
    page.get_by_role("button", name="Regenerate message 2").click()
    expect(answers(page)).to_have_text(whole)


@needs_chromium
def test_settings_go_into_requests_and_what_the_server_refuses_is_shown(page, listening):
    page.get_by_label("System prompt").fill("You are terse.")
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Max new tokens").fill("5")
    ask(page, "Say hello")
    fields = {"temperature": 1.5, "seed": 7, "max_tokens": 5}
    expect(answers(page)).to_have_text(expected(listening[0], "Say hello", system="You are terse.", **fields))
    expect(page.locator("li.assistant small")).to_contain_text("5 tokens")

    page.get_by_role("button", name="Reset to defaults").click()
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data='{"messages": [], "zeal": 1}'))
    ask(page, "<b>Say hello</b>")
    expect(page.locator("li.assistant .failure")).to_have_text("unknown field 'zeal'")
    expect(page.locator("li.user .text").last).to_have_text("<b>Say hello</b>")


@needs_chromium
def test_a_t5_has_a_prompt_mode_with_the_templates_of_its_run(page, served, listening, monkeypatch):
    t5 = served.models["t5"]
    source = settings.Source(path="unread", template=("Is {{ what | lower }} green? ||| {{ answer }}", "auto"))
    config = dataclasses.replace(t5.run.config, data=settings.Data(train=(source,)))
    run = dataclasses.replace(t5.run, config=config)
    monkeypatch.setitem(served.models, "t5", dataclasses.replace(t5, run=run))
    page.reload()
    page.get_by_label("Model").select_option("t5")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    ask(page, "Is grass green?", "Prompt")
    body = {"model": "t5", "prompt": "Is grass green?", "max_tokens": 24}
    answer = httpx.post(f"{listening[0]}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    expect(answers(page)).to_have_text([answer])

    page.locator("#template").select_option("Is {{ what | lower }} green? ||| {{ answer }}")
    ask(page, "GRASS", "what")
    expect(answers(page)).to_have_text([answer, answer])
    expect(page.locator("li.user .text").last).to_have_text("Is grass green?")


@needs_chromium
def test_a_key_is_asked_for_where_the_server_needs_one_and_is_not_stored_for_good(page, served, monkeypatch):
    expect(page.get_by_label("API key")).to_be_hidden()
    monkeypatch.setattr(served.server, "keys", [b"secret"])
    page.reload()
    expect(page.locator("#error")).to_contain_text("a valid key is needed")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#error")).to_be_empty()
    ask(page, "Is grass green?")
    expect(page.locator("li.assistant small")).to_contain_text("tokens/s")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


@needs_chromium
@pytest.mark.parametrize("width, scheme", [(360, "dark"), (1280, "light")])
def test_nothing_is_wider_than_a_phone_or_too_pale_to_read(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)
    ask(page, "unbreakable" * 4)
    expect(page.locator("li.assistant small")).to_contain_text("tokens/s")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{width}-{scheme}.png")
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#settings")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{width}-{scheme}-settings.png")


@needs_chromium
def test_a_long_conversation_leaves_room_for_the_settings_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.reload()
    ask(page, "line\n" * 40)
    expect(page.locator("li.assistant small")).to_contain_text("tokens/s")
    page.locator("#settings").evaluate("each => each.hidden = false")
    assert page.locator("#settings").bounding_box()["height"] > 300
    send = page.locator("#send").bounding_box()
    assert send["y"] + send["height"] <= 740


def test_the_page_is_open_without_a_key_loads_nothing_from_elsewhere_and_is_all_there(listening):
    assert set(chat_page.FILES.values()) == {file.name for file in chat_page.STATIC.iterdir()}
    for path, name in chat_page.FILES.items():
        response = httpx.get(f"{listening[0]}{path}")
        assert response.status_code == 200
        assert response.content == (chat_page.STATIC / name).read_bytes()
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert "//" not in response.text.replace("// ", "").replace("http://www.w3.org/2000/svg", "")
