"""Prompts and conversations to token ids: as `jax-it generate` renders them, and so as training did."""

import json
from collections.abc import Sequence
from typing import Any

from jax_it.data import chat
from jax_it.data.templates import Turn
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
    tokenizer = run.tokenizer
    roles: list[str] = [("system" if each.role == "developer" else each.role) for each in messages]
    plain = not (tools or template_kwargs) and {*roles} <= {"system", "user", "assistant"} and roles[-1] == "user"
    if tokenizer.chat_template is None:
        _check_without_template(tokenizer.name, roles, bool(tools), template_kwargs)
    else:
        _check_variables(tokenizer.chat_template, bool(tools), template_kwargs or {})
    for i, message in enumerate(messages):
        if message.tool_calls and (plain or message.role != "assistant"):
            plain = False
        if message.role == "user" and not message.text.strip():
            raise ApiError(400, "a user's message is empty", f"messages.{i}.content")
    try:
        if plain:
            turns = tuple(Turn(role, each.text) for role, each in zip(roles, messages, strict=True))
            return encode(run.format, tokenizer, [turns])[0]
        text = chat.render(
            [_fields(role, each) for role, each in zip(roles, messages, strict=True)], tokenizer, "the conversation",
            generation=True, tools=[each.model_dump(exclude_none=True) for each in tools] or None,
            variables=template_kwargs or {},
        )  # fmt: skip
        return _started_once(run, encode(run.format, tokenizer, [text], raw=True)[0])
    except UserError as error:
        raise ApiError(400, str(error), "messages") from None


def _check_without_template(name: str, roles: list[str], tools: bool, variables: dict[str, Any] | None) -> None:
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
    known = chat.variables_of(template)
    if tools and "tools" not in known:
        raise ApiError(400, "the model's chat template does not take tools", "tools")
    for name in given:
        if name not in known or name in ("messages", "tools", "documents", "add_generation_prompt"):
            raise ApiError(400, f"the model's chat template has no variable {name!r} to set", "chat_template_kwargs")


def _fields(role: str, message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it."""
    fields: dict[str, Any] = {"role": role, "content": message.text}
    if message.name:
        fields["name"] = message.name
    if message.tool_call_id:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return fields


def _arguments(text: str) -> Any:
    """Return a call's arguments as the mapping that templates write with `tojson`, or as they are."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _started_once(run: Run, tokens: list[int]) -> list[int]:
    """Return the tokens with one beginning token, if the template has written another."""
    start = run.tokenizer.start
    while start is not None and tokens[:2] == [start, start]:
        tokens = tokens[1:]
    return tokens
