"""`jax-it generate --chat`: a conversation whose answers are printed while they are generated."""

import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import jax

from jax_it.data import chat
from jax_it.data.templates import Turn
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.generation import GREEDY, Engine, Request, RequestOutput, Sampling, Scheduler, StopStrings
from jax_it.models import Model, Params
from jax_it.predict import check_length, encode
from jax_it.run import load, make_format
from jax_it.sharding import inference_mesh
from jax_it.status import activity

RESET = "/reset"


class ChatSession:
    """A conversation with a model that has a chat template; `turns` has everything said so far.

    Raises UserError for a model without a chat template.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        system: str = "",
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
    ):
        if tokenizer.chat_template is None:
            raise UserError(
                f"{tokenizer.name} has no chat template, so the model was not trained on conversations; use --prompt, "
                "or train it with config.model.chat_template='default'"
            )
        mesh = inference_mesh(model.parameter_count)
        engine = Engine(model, mesh, max_new_tokens, 1, sampling, chat.ends(tokenizer))
        self._scheduler = Scheduler(engine.load(params), stream_interval=1)
        self._model, self._tokenizer, self._format = model, tokenizer, make_format(model, tokenizer)
        self._max_new_tokens = max_new_tokens
        self._stop = StopStrings(stop, tokenizer.decode) if stop else None
        self._system: tuple[Turn, ...] = (Turn("system", system),) if system else ()
        self._number_of_requests = 0
        self.is_cut = False  # whether the last answer reached `max_new_tokens`
        self.reset()

    def reset(self) -> None:
        """Forget what was said, but not the system prompt."""
        self.turns: tuple[Turn, ...] = self._system

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to what the user says, a part for each token; a part may be empty.

        A caller that stops early ends the answer there. An answer that is empty is not remembered, nor is `text`.
        Raises UserError for a conversation that has become too long for the model.
        """
        turns = (*self.turns, Turn("user", text))
        prompts = encode(self._format, self._tokenizer, [turns])
        check_length(self._model, prompts, self._max_new_tokens)
        number = self._number_of_requests
        request = Request(number, prompts[0], stop=self._stop, index=number)
        self._number_of_requests += 1
        self._scheduler.add_request(request)
        answer = shown = ""
        try:
            while self._scheduler.has_unfinished:
                for output in self._scheduler.step():
                    if output.finish_reason == "error":
                        raise UserError(
                            "the model's logits are not finite, so its weights are damaged; use another checkpoint"
                        )
                    answer, self.is_cut = self._decode(output), output.finish_reason == "length"
                    if answer.startswith(shown):
                        yield answer[len(shown) :]
                        shown = answer
                    elif output.finish_reason:  # the tokenizer removes spaces before some later tokens
                        yield f"\n{answer}"
        finally:
            self._scheduler.abort(request.request_id)
            if answer.strip():
                self.turns = (*turns, Turn("assistant", answer))

    def _decode(self, output: RequestOutput) -> str:
        """Return the text of an answer so far, without trailing characters that the next tokens may change."""
        text = self._tokenizer.decode(output.tokens)
        if self._stop:
            text = self._stop.cut(text)
        if output.finish_reason:
            return text
        if self._stop:  # it may be the beginning of a stop string
            text = text[: max(0, len(text) + 1 - max(map(len, self._stop.strings)))]
        return text.rstrip("\ufffd")  # the first bytes of a character


def run(
    model_path: str,
    system: str = "",
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    forced_bos_token: str = "",
) -> None:
    """Answer each line of standard input on standard output, until its end; "/reset" starts a new conversation.

    Ctrl-C stops an answer and, at the prompt, ends the conversation. Raises UserError as `ChatSession` does; on a
    terminal, an error about what the user said is printed instead.
    """
    if jax.process_count() > 1:
        raise UserError("--chat does not run on several hosts; start it on one, or use --input")
    model, params, tokenizer = load(model_path)
    if forced_bos_token:
        sampling = sampling._replace(forced_bos_token=tokenizer.id_of(forced_bos_token, "--forced-bos-token"))
    session = ChatSession(model, params, tokenizer, system, max_new_tokens, sampling, stop)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        print(f"Ctrl-C stops an answer, {RESET} starts a new conversation, Ctrl-D ends", file=sys.stderr)
    with activity(lambda: ""):  # a progress line would appear in the middle of an answer
        for line in _lines(is_terminal):
            if line.strip() == RESET:
                session.reset()
            elif line.strip():
                try:
                    _print_answer(session, line)
                except UserError as error:
                    if not is_terminal:
                        raise
                    print(error, file=sys.stderr)


def _lines(is_terminal: bool) -> Iterator[str]:
    """Yield what the user says, until the end of standard input or, at a terminal's prompt, Ctrl-C."""
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its editing keys and history
    while True:
        try:
            line = input(">>> " if is_terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            break
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8 text; convert it to UTF-8") from None
        yield line
    if is_terminal:
        print()


def _print_answer(session: ChatSession, text: str) -> None:
    before = session.turns
    with _counted_interrupts() as interrupts, closing(session.answer(text)) as parts:
        for part in parts:
            print(part, end="", flush=True)
            if interrupts:
                break
    print(flush=True)
    if interrupts:
        return
    if session.is_cut:
        print("(the answer reached --max-new-tokens before it ended)", file=sys.stderr)
    if session.turns == before:
        print("(the answer is empty)", file=sys.stderr)


@contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list: an exception during a step on the devices would lose the engine's state.

    A second Ctrl-C raises KeyboardInterrupt.
    """
    interrupts: list[int] = []

    def note(number: int, frame: object) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
