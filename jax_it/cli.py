"""The command line: `jax-it COMMAND`. It parses, calls one function, and says what went wrong in one line."""

import argparse
import errno
import importlib.metadata
import io
import logging
import math
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, NoReturn

from etils import epath

from jax_it import files, typed
from jax_it.errors import Interrupted, UserError, exit_now, first_line, shorten

MAX_SEED = (1 << 32) - 1  # JAX draws from the lowest 32 bits: a larger seed would repeat a smaller one
LINE = 1500  # characters of a message at most
ON_DEVICES = ("train", "eval", "generate", "export")  # on several hosts, the same command on each


def main(arguments: list[str] | None = None) -> NoReturn:
    """Exit with 0: done, 2: the user can fix it, 1: a fault of ours.

    Or with 75, and 130 after Ctrl-C: stopped with nothing lost; the same command continues.
    """
    # Read by the libraries when they are imported: no advice for other frameworks, no threads after a fork.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _open_streams()
    options, rest = _parser().parse_known_args(arguments)
    if not options.debug:
        silence_libraries()
    try:
        changes = overrides(rest, takes_config="config" in options)
        if options.command in ON_DEVICES:
            from jax_it import hosts, status

            hosts.start()
            with hosts.watched(), status.lines(options.command) if hosts.is_first() else nullcontext():
                options.run(options, changes)
        else:
            options.run(options, changes)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        _say(options.command, error)
        leave(2, str(error))
    except Interrupted as stopped:
        _say(options.command, stopped)
        leave(stopped.code, "has stopped", at_once=arguments is None)  # 75 is BSD's EX_TEMPFAIL: to be tried again
    except KeyboardInterrupt:
        _say(options.command, "stopped by Ctrl-C before it was done; nothing half-written is left")
        leave(130, "was interrupted", at_once=arguments is None)
    except BrokenPipeError:
        leave(141, "has stopped")
    except Exception as error:
        if isinstance(error, OSError) and (reason := _lost_output("\n")):
            _say(options.command, f"cannot write to standard output: {reason}")
            leave(2, reason)
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            what = first_line(error)[:300]
            _say(options.command, f"not enough memory ({what}); take smaller batches, shorter texts or more devices")
            leave(2, "has not enough memory")
        with suppress(OSError):
            traceback.print_exc()
        _say(options.command, "this is a fault of jax_it; please report the lines above")
        leave(1, "it reports a fault")
    leave(0)


def leave(code: int, message: str = "", at_once: bool = False) -> NoReturn:
    """End the process and, if it is one of several, the others; one that has not joined them yet just ends.

    `at_once` skips Python's own shutdown: a signal may have interrupted a library between the start of a thread and
    the note of it by which the thread would be told to end, and the shutdown would wait for it for ever.
    """
    if (reason := _lost_output()) and code == 0:
        if reason == os.strerror(errno.EPIPE):  # nobody reads on: be quiet about it
            code, message = 141, "has stopped"
        else:
            code, message = 2, f"cannot write to standard output: {reason}"
            _say("", message)
    try:
        if hosts := sys.modules.get("jax_it.hosts"):
            hosts.leave(code, message)
        sys.exit(code)
    except SystemExit:
        if not at_once:
            raise
        exit_now(code)


def _say(command: str, what: object) -> None:
    """Print one line to standard error, as far as that can be written to."""
    try:
        print(f"{f'jax-it {command}'.rstrip()}: {shorten(str(what), LINE)}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or Python tries again at its exit


def _lost_output(probe: str = "") -> str:
    """Return why what was printed, or `probe`, cannot be written to standard output; "" if it can. It is lost then."""
    try:
        sys.stdout.write(probe)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror or str(error)
    return ""


def _open_streams() -> None:
    """Replace standard streams that are closed, whose numbers other files would get, and allows any text in them."""
    for number, name in ((0, "stdin"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    if sys.stdout is None:
        _say("", "standard output is closed; send it to a file or to /dev/null")
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its encoding has not, as standard error has it


def silence_libraries() -> None:
    """Keep their reports of failures off standard error: those come back as exceptions, printed in one line."""
    for name in ("absl", "asyncio"):  # Orbax logs through the first and runs on the second
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None  # of writes that are still under way when another one has failed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage before it."""
        if message.endswith("expected one argument"):
            message += " (write --OPTION=VALUE where it begins with '-')"
        _say(self.prog.removeprefix("jax-it").strip(), f"{message}; see {self.prog} --help")
        leave(2)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        leave(status)


class _Version(argparse.Action):
    def __call__(self, *arguments: Any) -> NoReturn:
        version = importlib.metadata.version
        print(f"jax-it {version('jax-it')} (JAX {version('jax')}, Python {platform.python_version()})")
        leave(0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jax-it", description="Instruction tuning in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of jax-it, JAX and Python")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
        return command

    config: dict[str, Any] = {
        "type": _filled, "required": True, "metavar": "NAME|FILE[:ARG]",
        "help": "a recipe's name or a config file; --config.a.b=VALUE changes a setting",
    }  # fmt: skip
    checkpoint: dict[str, Any] = {
        "default": "latest",
        "metavar": "latest|best|STEP",
        "help": "which checkpoint (default: latest)",
    }

    print_config: dict[str, Any] = {"action": "store_true", "help": "print all settings as JSON, and do nothing else"}

    train = add("train", _train, "Train a model, or continue the run in the directory.")
    train.add_argument("--config", **config)
    train.add_argument("--workdir", type=_path, required=True, metavar="DIR", help="the run's directory")
    train.add_argument(
        "--allow-change", action="append", default=[], metavar="SETTING",
        help="continue with another value of this setting, such as train.duration; may be repeated",
    )  # fmt: skip
    train.add_argument(
        "--dry-run", action="store_true", help="check all that comes before the first step; leave nothing"
    )
    train.add_argument("--print-config", **print_config)

    evaluate = add("eval", _evaluate, "Score a run's checkpoints, or any model: loss, metrics over text, benchmarks.")
    scored = evaluate.add_mutually_exclusive_group(required=True)
    scored.add_argument("--workdir", type=_path, help="a run's folder")
    scored.add_argument("--model", type=_path, metavar="DIR|NAME", help="a Transformers or PEFT folder or a hub name")
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", **checkpoint)
    which.add_argument("--follow", action="store_true", help="score each new checkpoint until the run ends")
    which.add_argument("--summary", action="store_true", help="show the scores of all steps in one table")
    evaluate.add_argument(
        "--config", **config | {"required": False, "help": "a file whose eval and data.eval replace the run's"}
    )
    evaluate.add_argument("--output", type=_path, metavar="DIR", help="a folder for the scores (default: the run's)")
    evaluate.add_argument("--timeout", type=_positive, metavar="S", help="--follow: give up after S seconds")
    evaluate.add_argument("--json", type=_path, metavar="FILE", help="--summary: write it as JSON too")
    evaluate.add_argument("--csv", type=_path, metavar="FILE", help="--summary: write it as CSV too")
    evaluate.add_argument(
        "--run-metric-code",
        action="store_true",
        help="run the Python that the run's own config names as a metric or as tasks of lm_eval",
    )
    evaluate.add_argument(
        "--run-model-code", action="store_true", help="let tasks run the programs that the model writes, under limits"
    )

    generate = add("generate", _generate, "Generate text for one prompt, for a file of them, or in a conversation.")
    generate.add_argument(
        "--model", type=_path, required=True, help="a run's folder, a Transformers or PEFT folder, or a hub name"
    )
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=_text, metavar="TEXT", help="one prompt; the generated text is printed")
    source.add_argument(
        "--input", type=_path, metavar="FILE", help="a file of records, as for training: JSON lines, CSV or Parquet"
    )
    source.add_argument("--chat", action="store_true", help="a conversation on the terminal, or a line at a time")
    generate.add_argument(
        "--output", type=_path, metavar="FILE.jsonl", help="where the records go, with a field 'prediction' added"
    )
    generate.add_argument(
        "--template", type=_filled, metavar="NAME|JINJA",
        help="how a record of --input becomes a prompt, as data.train.N.template (default: auto); what the template "
        "has for a completion is ignored",
    )  # fmt: skip
    generate.add_argument("--system", type=_filled, metavar="TEXT", help="a system prompt")
    generate.add_argument(
        "--raw", action="store_true",
        help="take prompts as they are (default: render them with the model's chat template, as in training)",
    )  # fmt: skip
    _add_sampling(generate)

    export = add("export", _export, "Write a checkpoint as a Transformers folder, or its adapters as a PEFT folder.")
    export.add_argument("--workdir", type=_path, required=True, help="the run's folder")
    export.add_argument(
        "--output",
        type=partial(_path, locate=files.locate_local),
        required=True,
        help="a folder that does not exist yet",
    )
    export.add_argument("--checkpoint", **checkpoint)
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="", help="of the weights (default: the model's)"
    )
    export.add_argument("--adapter-only", action="store_true", help="write the adapters alone, in PEFT format")

    preview = add("preview", _preview, "Show what the model will see, and what becomes of each data set.")
    preview.add_argument("--config", **config)
    preview.add_argument("--num", type=_whole(0), default=3, metavar="N", help="examples to show (default: 3)")
    preview.add_argument("--print-config", **print_config)

    plan = add("plan", _plan, "Compile the training step for chips that are not there: memory, traffic, time.")
    plan.add_argument("--config", **config)
    plan.add_argument("--topology", required=True, help="v5e:8x8, v5p:4x4x4, v6e:16x16, or cpu:8 for fake devices")
    plan.add_argument("--slices", type=_positive, default=1, metavar="N", help="so many of these (default: 1)")
    plan.add_argument("--rows", type=_positive, metavar="N", help="of a step (default: train.batch_size full ones)")
    plan.add_argument("--json", type=_path, metavar="FILE", help="write the plan as JSON too")
    plan.add_argument("--hlo", type=_path, metavar="FILE", help="write the compiled program's text too")
    return parser


def _add_sampling(generate: argparse.ArgumentParser) -> None:
    def add(name: str, type: Any, default: Any, metavar: str, help: str) -> None:
        generate.add_argument(name, type=type, default=default, metavar=metavar, help=help)

    add("--max-new-tokens", _whole(1, 1 << 20), 128, "N", "the most tokens that are generated (default: 128)")
    add("--min-new-tokens", _whole(0), 0, "N", "the fewest tokens that are generated (default: 0)")
    add("--temperature", _number, 0.0, "T", "0: always the most likely token (default); above 0: sample")
    add("--top-k", _whole(0), 0, "K", "sample from the K most likely tokens; 0: from all (default)")
    add("--top-p", _number, 1.0, "P", "sample from the most likely tokens that add up to probability P (default: 1)")
    add("--min-p", _number, 0.0, "P", "leave out tokens less likely than P times the most likely one (default: 0)")
    add("--repetition-penalty", _number, 1.0, "X", "above 1: make repeated tokens less likely (default: 1)")
    add("--seed", _whole(0, MAX_SEED), 0, "S", "of sampling (default: 0)")
    add("--num-return-sequences", _positive, 1, "N", "texts for each prompt: samples, or the best beams (default: 1)")
    add("--num-beams", _positive, 1, "N", "beam search with N beams; 1: none (default)")
    add("--length-penalty", _number, 1.0, "X", "beam search: above 0 favours longer texts (default: 1)")
    generate.add_argument(
        "--early-stopping", choices=["no", "yes", "never"], default="no",
        help="beam search: when to stop, as early_stopping in Transformers (default: no)",
    )  # fmt: skip
    add("--forced-bos-token", _text, "", "TOKEN", "the first token of every text, such as a target language's")
    generate.add_argument(
        "--stop", type=_stop, action="append", default=[], metavar="TEXT",
        help=r"end a text before TEXT; may be given several times; \n, \t, \r and \\ are escapes as in Python",
    )  # fmt: skip
    generate.add_argument("--logprobs", action="store_true", help="write the log probability of each token too")
    add("--batch-size", _positive, 32, "N", "texts that are generated at a time (default: 32)")


def _whole(least: int, most: int = (1 << 31) - 1) -> Callable[[str], int]:
    def read(text: str) -> int:
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit()):
            raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a whole number")
        if len(digits) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{shorten(text)} is not from {least} to {most}")
        return int(text)

    return read


_positive = _whole(1)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not a finite number")
    return number


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 arrive as halves of surrogate pairs
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not UTF-8") from None
    return text


def _filled(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _stop(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty text would end every text where it begins")
    escapes = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
    return re.sub(r"\\[ntr\\]", lambda found: escapes[found[0]], _text(text))


def _path(text: str, locate: Callable[[str, str], object] = files.locate) -> str:
    """Refuse what cannot be a path, before anything is imported or read."""
    try:
        locate(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def overrides(rest: list[str], takes_config: bool) -> dict[str, str]:
    """Return {"train.seed": "1"} from ["--config.train.seed=1"], or from the same in two words."""
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config.") or not takes_config:
            raise UserError(f"unknown option {shorten(word)}; see jax-it COMMAND --help")
        if not equals and (value := next(words, "--")).startswith("--"):
            raise UserError(f"{name} needs a value: {name}=VALUE")
        name = name.removeprefix("--config.")
        if typed.parts(name) in map(typed.parts, found):
            raise UserError(f"--config.{typed.shown_name(name)} is given twice; keep one")
        found[name] = value
    return found


def _train(options: argparse.Namespace, changes: dict[str, str]) -> None:
    from jax_it import hosts
    from jax_it.training import dry_run, train

    if (config := _config(options, changes)) is None:
        return
    if options.dry_run:
        report = dry_run(config, options.workdir, options.allow_change)
        if hosts.is_first():
            print(report)
        return
    state = train(config, options.workdir, options.allow_change)
    if hosts.is_first():
        run = shlex.quote(options.workdir)
        print(
            f"step {int(state.step)} is saved in {options.workdir}; next: jax-it eval --workdir {run}, "
            f"jax-it generate --model {run} --prompt TEXT, or jax-it export --workdir {run} --output DIR"
        )


def _config(options: argparse.Namespace, changes: dict[str, str]) -> Any:
    """Load the config; with --print-config, print it and return None."""
    from jax_it import config, hosts

    loaded = config.load(options.config, changes)
    if not options.print_config:
        return loaded
    if hosts.is_first():
        print(files.to_json(config.to_dict(loaded), indent=2))
    return None


def _evaluate(options: argparse.Namespace, changes: dict[str, str]) -> None:
    from jax_it.evaluation.evaluate import EvalOptions, evaluate, evaluate_model

    asked = EvalOptions(
        options.config or "", changes, options.output or "", options.run_model_code, options.run_metric_code
    )
    for name, goes_with in (("timeout", "follow"), ("json", "summary"), ("csv", "summary")):
        if getattr(options, name) is not None and not getattr(options, goes_with):
            raise UserError(f"--{name} goes with --{goes_with}")
    if options.model:
        if options.follow or options.summary or options.checkpoint != "latest":
            raise UserError("--checkpoint, --follow and --summary are for a run: name it with --workdir")
        _show(f"{options.model}\n", evaluate_model(options.model, asked))
    elif options.summary:
        _summarize(options, asked)
    elif options.follow:
        from jax_it.evaluation.follow import follow

        failed = follow(
            options.workdir, asked, options.timeout or 0,
            lambda step, result: _show(f"step {step}\n", result, last=False),
        )  # fmt: skip
        if failed:
            steps = ", ".join(map(str, failed))
            raise UserError(f"step{'s' * (len(failed) > 1)} {steps} could not be fully scored; the reasons are above")
    else:
        step, result = evaluate(options.workdir, options.checkpoint, asked)
        _show(f"step {step}\n", result)


def _show(head: str, result: Any, last: bool = True) -> None:
    """Print the results of an evaluation. Raises UserError where a task failed, unless more results follow."""
    from jax_it import hosts
    from jax_it.evaluation import examples_text, failures, table

    if hosts.is_first():
        print(f"{head}{table(result)}", flush=True)
        if last and result.predictions:
            print(examples_text(result))
    if last and (failed := failures(result)):
        raise UserError("; ".join(f"{task}: {why}" for task, why in failed.items()))


def _summarize(options: argparse.Namespace, asked: Any) -> None:
    from jax_it import hosts
    from jax_it.evaluation import summary

    outputs = _outputs({"--json": options.json, "--csv": options.csv})
    found = summary.summarize(options.workdir, asked)
    if hosts.is_first():
        for option, content in (("--json", summary.to_json), ("--csv", summary.to_csv)):
            if option in outputs:
                files.write_output(outputs[option], content(found), option)
        print(summary.text(found))


def _outputs(options: dict[str, str | None]) -> dict[str, epath.Path]:
    """Return the files that options name, by option. Raises UserError if one cannot be written, or two are the same."""
    found: dict[str, epath.Path] = {}
    for option, path in options.items():
        if path is None:
            continue
        file = files.locate_output(path, option)
        for other, taken in found.items():
            if not files.is_stream(file) and os.path.realpath(file) == os.path.realpath(taken):
                raise UserError(f"{other} and {option} both name {path}; give each a file of its own")
        found[option] = file
    return found


def _generate(options: argparse.Namespace, changes: dict[str, str]) -> None:
    from jax_it import chat_session, hosts
    from jax_it.data.templates import Turn
    from jax_it.predict import generate_file, read_prompts

    if options.input and not options.output:
        raise UserError("--input needs --output, the file that the rows are written to")
    if options.template and not options.input:
        raise UserError("--template goes with --input")
    if options.system and options.raw:
        raise UserError("--system and --raw exclude each other: a system prompt is rendered with the prompt")
    sampling = _sampling(options)
    if options.chat:
        if options.raw or options.output or options.num_return_sequences > 1:
            raise UserError("--raw, --output and --num-return-sequences do not go with --chat")
        return chat_session.run(
            options.model, options.system or "", options.max_new_tokens, sampling, options.stop,
            options.forced_bos_token,
        )  # fmt: skip
    if options.input:
        rows, prompts = read_prompts(options.input, options.template or "auto", options.system or "", options.raw)
    else:
        rows = [{"prompt": options.prompt}]
        prompts = [options.prompt]
        if options.system:
            prompts = [(Turn("system", options.system), Turn("user", options.prompt))]
    found = generate_file(
        options.model, rows, prompts, options.output, options.max_new_tokens, sampling, options.batch_size,
        options.stop, options.logprobs, options.forced_bos_token, options.raw,
    )  # fmt: skip
    if options.prompt is not None and hosts.is_first():
        for text in found[0]:
            print(text.text)


def _sampling(options: argparse.Namespace) -> Any:
    """Return how tokens are chosen. Raises UserError for options that exclude each other or have no effect."""
    from jax_it.generation import Sampling
    from jax_it.generation.sampling import check

    beams, draws = options.num_beams > 1, options.temperature > 0
    if not options.temperature >= 0 or options.top_k < 0 or not 0 < options.top_p <= 1:  # nan is neither
        raise UserError("--temperature and --top-k must not be negative, and --top-p must be in (0, 1]")
    if not 0 <= options.min_p <= 1 or not options.repetition_penalty > 0:
        raise UserError("--min-p must be in [0, 1], and --repetition-penalty more than 0")
    if not 0 <= options.min_new_tokens <= options.max_new_tokens:
        raise UserError(f"--min-new-tokens must be from 0 to --max-new-tokens, {options.max_new_tokens}")
    if beams and draws:
        raise UserError("--num-beams and --temperature exclude each other: beam search does not sample")
    if not draws and (options.top_k or options.top_p < 1 or options.min_p):
        raise UserError("--top-k, --top-p and --min-p need a --temperature above 0: greedy decoding does not sample")
    if not beams and (options.length_penalty != 1 or options.early_stopping != "no"):
        raise UserError("--length-penalty and --early-stopping are for beam search; add --num-beams")
    if not draws and options.num_return_sequences > options.num_beams:
        raise UserError("--num-return-sequences needs a --temperature above 0, or at least as many --num-beams")
    if options.logprobs and not options.output:
        raise UserError("--logprobs needs --output, the file that they are written to")
    sampling = Sampling(
        options.temperature, options.top_k, options.top_p, options.seed, options.num_beams, options.length_penalty,
        {"no": False, "yes": True}.get(options.early_stopping, "never"), options.min_p, options.repetition_penalty,
        options.min_new_tokens, num_samples=options.num_return_sequences,
    )  # fmt: skip
    check(sampling, options.max_new_tokens, vocab_size=options.num_beams)  # the model's is known when it is loaded
    return sampling


def _export(options: argparse.Namespace, changes: dict[str, str]) -> None:
    from jax_it import hosts
    from jax_it.export import export

    step = export(options.workdir, options.output, options.checkpoint, options.dtype, options.adapter_only)
    if hosts.is_first():
        print(f"step {step} is in {options.output}, in {'PEFT' if options.adapter_only else 'Transformers'} format")


def _preview(options: argparse.Namespace, changes: dict[str, str]) -> None:
    from jax_it.preview import preview

    if (config := _config(options, changes)) is not None:
        print(preview(config, options.num))


def _plan(options: argparse.Namespace, changes: dict[str, str]) -> None:
    from jax_it import config, plan

    outputs = _outputs({"--json": options.json, "--hlo": options.hlo})
    settings = config.load(options.config, changes)
    topology = plan.find(options.topology, options.slices)
    found = plan.plan(settings, topology, options.rows or 0, outputs.get("--hlo"))
    if "--json" in outputs:
        files.write_output(outputs["--json"], plan.to_json(found), "--json")
    print(plan.text(found))
