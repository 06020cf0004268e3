"""The fields of requests. A field that is not here is refused by its name; one that is null counts as left out."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

MAX_LIST = 2048  # entries of a list in a request
MAX_STOP = 16  # stop strings
MAX_LOGPROBS = 20

TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        """Take a field that is null for one that is left out, as clients send those that nobody set."""
        if isinstance(fields, dict):
            return {name: value for name, value in fields.items() if value is not None}
        return fields


class StreamOptions(_Request):
    include_usage: bool = Field(False, description="A last chunk with the usage, whose `choices` is empty.")


class JsonSchema(_Request):
    name: str = "response"
    description: str = ""
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool = True


class ResponseFormat(_Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', which needs it")
        return self


class Generation(_Request):
    """What completions and chat completions share."""

    model: str | None = Field(None, description="One of /v1/models; the first of them if left out.")
    max_tokens: int | None = Field(None, ge=0, description="New tokens at most.")
    temperature: float = Field(0.0, ge=0, description="0: always the most likely token; above 0: sample.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample from the likeliest tokens with this probability.")
    n: int = Field(1, ge=1, le=MAX_LIST, description="Texts for each prompt.")
    stop: Annotated[StrictStr, Field(min_length=1)] | list[Annotated[StrictStr, Field(min_length=1)]] = Field(
        [], max_length=MAX_STOP, description="A text ends before the first of these strings."
    )
    seed: Seed | None = Field(None, description="Of sampling: the same request with the same seed gives the same text.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, description="Token id: bias.")
    stream: bool = Field(False, description="Send the text in parts, as server-sent events.")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str = Field("", description="Goes to the access log.")
    top_k: int = Field(0, ge=-1, description="Sample from so many of the likeliest tokens; 0 or -1: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Leave out tokens less likely than this share of the likeliest.")
    repetition_penalty: float = Field(1.0, gt=0, description="Above 1: tokens that occurred before are less likely.")
    min_tokens: int = Field(0, ge=0, description="No end of a text before this many new tokens.")
    length_penalty: float = Field(1.0, description="Of beam search: above 0 favors longer texts.")
    ignore_eos: bool = Field(False, description="Do not end at an end token.")
    use_beam_search: bool = Field(False, description="Beam search with `best_of` beams, or `n` of them.")
    best_of: int | None = Field(None, ge=1, description="Beams of a beam search.")

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Generation):
    prompt: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_LIST)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_LIST)]
    ) = Field(description="A text, token ids, or a list of either; it is not rendered with the chat template.")
    echo: bool = Field(False, description="Begin with the prompt; with `logprobs`, also those of its tokens.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="Of each token and so many likeliest ones.")


class TextPart(_Request):
    type: Literal["text"]
    text: StrictStr


class FunctionCall(_Request):
    name: str
    arguments: str = "{}"


class ToolCall(_Request):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(_Request):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Function(_Request):
    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Request):
    type: Literal["function"]
    function: Function


class NamedFunction(_Request):
    name: str


class ToolChoice(_Request):
    type: Literal["function"]
    function: NamedFunction


class ChatRequest(Generation):
    messages: list[Message] = Field(min_length=1, max_length=MAX_LIST)
    max_completion_tokens: int | None = Field(None, ge=1, description="The same as max_tokens.")
    logprobs: bool = Field(False, description="The log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="And so many likeliest ones.")
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = Field("auto")
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables of the chat template.")

    @model_validator(mode="after")
    def _check_together(self) -> "ChatRequest":
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be 1 or more")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true")
        return self


class TokenizeRequest(_Request):
    model: str | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_LIST)
    add_special_tokens: bool = Field(True, description="Of a prompt: those that generation would add.")
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False
    tools: list[Tool] = Field([], max_length=128)
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Request):
    model: str | None = None
    tokens: list[TokenId] = Field(max_length=1 << 20)


class RenderRequest(_Request):
    model: str | None = None
    template: StrictStr = Field(description="One of the model's `templates` in /v1/models.")
    fields: dict[str, StrictStr] = Field({}, description="Field of the template: text.")
