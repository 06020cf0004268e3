"""`jax-it generate`: generates text for one prompt, for a file of them, or in a conversation."""

import argparse
import re
from typing import Any

from jax_it.commands import arguments
from jax_it.errors import UserError

MAX_SEED = (1 << 32) - 1  # JAX uses the lowest 32 bits: a larger seed would repeat a smaller one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=arguments.path, required=True, metavar="DIR|NAME",
        help="a run directory, a Transformers or PEFT folder, or a hub name",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=arguments.text, metavar="TEXT", help="one prompt; the text is printed")
    source.add_argument(
        "--input", type=arguments.path, metavar="FILE",
        help="a file of records, as for training: JSON lines, CSV or Parquet",
    )  # fmt: skip
    source.add_argument(
        "--chat", action="store_true", help="a conversation on the terminal, or on standard input, a line a turn"
    )
    parser.add_argument(
        "--output", type=arguments.path, metavar="FILE.jsonl",
        help="where the records go, with a field 'prediction' added",
    )  # fmt: skip
    parser.add_argument(
        "--template", type=arguments.non_empty, metavar="NAME|JINJA",
        help="how a record of --input becomes a prompt, as data.train.N.template (default: auto); the template's "
        "completion is ignored",
    )  # fmt: skip
    parser.add_argument("--system", type=arguments.non_empty, metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--raw", action="store_true",
        help="leave prompts unchanged (default: render them with the model's chat template, as in training)",
    )  # fmt: skip
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    def add(name: str, type: Any, default: Any, metavar: str, help: str) -> None:
        parser.add_argument(name, type=type, default=default, metavar=metavar, help=help)

    integer, number, positive = arguments.integer, arguments.number, arguments.positive
    add("--max-new-tokens", integer(1, 1 << 20), 128, "N", "the most tokens to generate (default: 128)")
    add("--min-new-tokens", integer(0), 0, "N", "the fewest tokens to generate (default: 0)")
    add("--temperature", number, 0.0, "T", "0: always the most likely token (default); above 0: sample")
    add("--top-k", integer(0), 0, "K", "sample from the K most likely tokens; 0: from all (default)")
    add("--top-p", number, 1.0, "P", "sample from the most likely tokens that add up to probability P (default: 1)")
    add("--min-p", number, 0.0, "P", "leave out tokens less likely than P times the most likely one (default: 0)")
    add("--repetition-penalty", number, 1.0, "X", "above 1: make repeated tokens less likely (default: 1)")
    add("--seed", integer(0, MAX_SEED), 0, "S", "sampling seed (default: 0)")
    add("--num-return-sequences", positive, 1, "N", "texts for each prompt: samples, or the best beams (default: 1)")
    add("--num-beams", positive, 1, "N", "beam search with N beams; 1: none (default)")
    add("--length-penalty", number, 1.0, "X", "beam search: above 0 favors longer texts (default: 1)")
    parser.add_argument(
        "--early-stopping", choices=["no", "yes", "never"], default="no",
        help="beam search: when to stop, as early_stopping in Transformers (default: no)",
    )  # fmt: skip
    add("--forced-bos-token", arguments.text, "", "TOKEN", "the first token of every text, such as a language token")
    parser.add_argument(
        "--stop", type=stop_string, action="append", default=[], metavar="TEXT",
        help=r"end a text before TEXT; may be repeated; \n, \t, \r and \\ are escapes as in Python",
    )  # fmt: skip
    add(
        "--prompt-lookup-num-tokens", integer(0, 1024), 0, "N",
        "greedy decoding of causal models: draft up to N tokens a step from the prompt and the text so far, which is "
        "faster where texts repeat parts of their prompts (default: 0)",
    )  # fmt: skip
    parser.add_argument("--logprobs", action="store_true", help="also write the log probability of each token")
    add("--batch-size", positive, 32, "N", "texts generated at a time (default: 32)")


def stop_string(value: str) -> str:
    """Read the value of --stop, with its escapes."""
    if not value:
        raise argparse.ArgumentTypeError("an empty text would end every text where it begins")
    escapes = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda found: escapes[found[0]], arguments.text(value))


def run(options: argparse.Namespace) -> None:
    if options.input and not options.output:
        raise UserError("--input needs --output, the file to write the records to")
    if options.template and not options.input:
        raise UserError("--template needs --input, whose records it renders")
    if options.system and options.raw:
        raise UserError("--system and --raw exclude each other: a raw prompt is not rendered; leave one out")
    if options.chat and (options.raw or options.output or options.num_return_sequences > 1):
        raise UserError("--raw, --output and --num-return-sequences do not go with --chat; leave them out")
    sampling = _sampling(options)
    if options.chat:
        _chat(options, sampling)
    else:
        _predict(options, sampling)


def _chat(options: argparse.Namespace, sampling: Any) -> None:
    from jax_it import chat_session

    chat_session.run(
        options.model,
        system=options.system or "",
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        stop=options.stop,
        forced_bos_token=options.forced_bos_token,
    )


def _predict(options: argparse.Namespace, sampling: Any) -> None:
    from jax_it import hosts
    from jax_it.data.templates import Turn
    from jax_it.predict import generate_file, read_prompts

    if options.input:
        rows, prompts = read_prompts(options.input, options.template or "auto", options.system or "", options.raw)
    else:
        rows = [{"prompt": options.prompt}]
        prompts = [options.prompt]
        if options.system:
            prompts = [(Turn("system", options.system), Turn("user", options.prompt))]
    found = generate_file(
        options.model,
        rows,
        prompts,
        options.output,
        options.max_new_tokens,
        sampling=sampling,
        batch_size=options.batch_size,
        stop=options.stop,
        logprobs=options.logprobs,
        forced_bos_token=options.forced_bos_token,
        raw=options.raw,
    )
    if options.prompt is not None and hosts.is_first():
        for prediction in found[0]:
            print(prediction.text)


def _sampling(options: argparse.Namespace) -> Any:
    """Return how tokens are chosen. Raises UserError for options that exclude each other or have no effect."""
    from jax_it.generation import Sampling
    from jax_it.generation.requests import check

    beams, draws = options.num_beams > 1, options.temperature > 0
    if options.temperature < 0 or not 0 < options.top_p <= 1:
        raise UserError("--temperature and --top-k must not be negative, and --top-p must be in (0, 1]")
    if not 0 <= options.min_p <= 1 or not options.repetition_penalty > 0:
        raise UserError("--min-p must be in [0, 1], and --repetition-penalty more than 0")
    if options.min_new_tokens > options.max_new_tokens:
        raise UserError(f"--min-new-tokens must be from 0 to --max-new-tokens, {options.max_new_tokens}")
    if beams and draws:
        raise UserError("--num-beams and --temperature exclude each other: beam search does not sample")
    if not draws and (options.top_k or options.top_p < 1 or options.min_p):
        raise UserError("--top-k, --top-p and --min-p need a --temperature above 0: greedy decoding does not sample")
    if not beams and (options.length_penalty != 1 or options.early_stopping != "no"):
        raise UserError("--length-penalty and --early-stopping are for beam search; add --num-beams")
    if not draws and options.num_return_sequences > options.num_beams:
        raise UserError("--num-return-sequences needs a --temperature above 0, or at least as many --num-beams")
    if options.prompt_lookup_num_tokens and options.logprobs:
        raise UserError("--prompt-lookup-num-tokens and --logprobs exclude each other; leave one out")
    if options.logprobs and not options.output:
        raise UserError("--logprobs needs --output, the file to write them to")
    early_stopping: Any = {"no": False, "yes": True, "never": "never"}[options.early_stopping]
    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        repetition_penalty=options.repetition_penalty,
        min_new_tokens=options.min_new_tokens,
        num_samples=options.num_return_sequences,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        early_stopping=early_stopping,
        prompt_lookup_num_tokens=options.prompt_lookup_num_tokens,
    )
    check(sampling, options.max_new_tokens, vocab_size=options.num_beams)  # the model's is known when it is loaded
    return sampling
