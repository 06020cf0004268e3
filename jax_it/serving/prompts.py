"""Prompts and conversations to token ids: as `jax-it generate` renders them, and so as training did."""

import json
from collections.abc import Sequence
from typing import Any

from jax_it.data import chat_template
from jax_it.data.templates import ToolCall, Turn
from jax_it.errors import UserError
from jax_it.predict import encode
from jax_it.run import Run
from jax_it.serving.errors import ApiError
from jax_it.serving.schemas import Message, Tool


def encode_texts(run: Run, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Return the token ids of prompts as they are, with the special tokens that generation needs.

    Raises ApiError for text that the model cannot take, and for an id that it does not have.
    """
    encoded = []
    for i, prompt in enumerate(prompts):
        where = "prompt" if len(prompts) == 1 else f"prompt.{i}"
        if isinstance(prompt, str):
            try:
                encoded.append(encode(run.format, run.tokenizer, [prompt], raw=True)[0])
            except UserError as error:
                raise ApiError(400, str(error), where) from None
        else:
            if (largest := max(prompt)) >= run.model.config.vocab_size:
                raise ApiError(
                    400, f"token {largest} is not one of the model's 0 to {run.model.config.vocab_size - 1}", where
                )
            encoded.append(list(prompt))
    return encoded


def encode_chat(
    run: Run, messages: Sequence[Message], tools: Sequence[Tool] = (), template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Return the token ids that the answer to a conversation is generated from.

    Turns of system, user and assistant that end with the user are encoded as in training. What training does not
    have (tools, their results, variables of the template) is rendered as Transformers' `apply_chat_template` does.
    Raises ApiError for a conversation that the template refuses.
    """
    tokenizer, variables = run.tokenizer, template_kwargs or {}
    roles: list[str] = [("system" if each.role == "developer" else each.role) for each in messages]
    plain = not (tools or variables) and {*roles} <= {"system", "user", "assistant"} and roles[-1] == "user"
    if tokenizer.chat_template is None:
        _check_without_template(tokenizer.name, roles, bool(tools), variables)
    else:
        _check_variables(tokenizer.chat_template, bool(tools), variables)
    for i, message in enumerate(messages):
        if message.tool_calls and (plain or message.role != "assistant"):
            plain = False
        if message.role == "user" and not message.text.strip():
            raise ApiError(400, "a user's message is empty", f"messages.{i}.content")
    turns = [_turn(role, each, f"messages.{i}") for i, (role, each) in enumerate(zip(roles, messages, strict=True))]
    if tools:
        turns.insert(0, Turn("tools", json.dumps([each.model_dump(exclude_none=True) for each in tools])))
    try:
        if plain:
            return encode(run.format, tokenizer, [turns])[0]
        text = chat_template.apply(turns, tokenizer, "the conversation", generation=True, variables=variables)
        return _started_once(run, encode(run.format, tokenizer, [text], raw=True)[0])
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None


def _check_without_template(name: str, roles: list[str], tools: bool, variables: dict[str, Any]) -> None:
    """Refuse what a model that was not trained on conversations would not understand."""
    if tools or variables:
        field = "tools" if tools else "chat_template_kwargs"
        raise ApiError(400, f"{name} has no chat template, so it does not take {field}", field)
    if [role for role in roles if role != "system"] != ["user"]:
        raise ApiError(
            400,
            f"{name} has no chat template, so it was not trained on conversations: send one user message (a system "
            "message may come before it), or use /v1/completions",
            "messages",
        )


def _check_variables(template: str, tools: bool, given: dict[str, Any]) -> None:
    """Refuse what the chat template would not read."""
    known = chat_template.variables_of(template)
    if tools and "tools" not in known:
        raise ApiError(400, "the model's chat template does not take tools", "tools")
    for name in given:
        if name not in known or name in ("messages", "tools", "documents", "add_generation_prompt"):
            raise ApiError(400, f"the model's chat template has no variable {name!r} to set", "chat_template_kwargs")


def _turn(role: str, message: Message, where: str) -> Turn:
    calls = []
    for number, call in enumerate(message.tool_calls):
        try:
            arguments = json.loads(call.function.arguments)
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise ApiError(400, "a call's arguments are not a JSON object", f"{where}.tool_calls.{number}")
        calls.append(ToolCall(call.function.name, arguments, call.id))
    return Turn(
        role, message.text, tool_calls=tuple(calls), tool_call_id=message.tool_call_id or "", name=message.name or ""
    )


def _started_once(run: Run, tokens: list[int]) -> list[int]:
    """Return the tokens with one beginning token, if the template has written another."""
    start = run.tokenizer.start
    while start is not None and tokens[:2] == [start, start]:
        tokens = tokens[1:]
    return tokens
