"""`jax-it serve`: answers requests over HTTP, as OpenAI's API does."""

import argparse

from jax_it.commands import arguments
from jax_it.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=named_path, action="append", required=True, metavar="[NAME=]DIR|NAME",
        help="a run directory, a Transformers or PEFT folder, or a hub name; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", type=named_path, action="append", default=[], metavar="NAME=DIR",
        help="a PEFT folder over the first model, which requests choose by its name; may be repeated",
    )  # fmt: skip
    integer, positive = arguments.integer, arguments.positive
    parser.add_argument("--host", type=arguments.non_empty, default="127.0.0.1", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=integer(0, 65535), default=8000, metavar="N", help="0: any (default: 8000)")
    parser.add_argument(
        "--api-key-file", type=arguments.path, metavar="FILE",
        help="keys, one a line, of which requests must have one; so do those in JAX_IT_API_KEYS, separated by commas",
    )  # fmt: skip
    parser.add_argument(
        "--cors-origin", type=arguments.non_empty, action="append", default=[], metavar="URL",
        help="let pages of this origin read answers; may be repeated (default: none)",
    )  # fmt: skip
    add = parser.add_argument
    add("--batch-size", type=positive, default=32, metavar="N", help="texts generated at a time (default: 32)")
    add(
        "--max-new-tokens", type=integer(1, 1 << 20), default=512, metavar="N",
        help="the most tokens that a request may ask for (default: 512)",
    )  # fmt: skip
    add(
        "--max-prompt-tokens", type=integer(1, 1 << 20), default=1024, metavar="N",
        help="the longest prompt; each text that is generated has memory for it (default: 1024)",
    )  # fmt: skip
    add("--max-queue", type=integer(0), default=256, metavar="N", help="the most texts that wait (default: 256)")
    add("--request-timeout", type=positive, default=600, metavar="S", help="seconds for a request (default: 600)")
    add(
        "--drain-timeout", type=positive, default=60, metavar="S",
        help="seconds that running requests have after SIGTERM (default: 60)",
    )  # fmt: skip
    add(
        "--stream-interval", type=positive, default=1, metavar="N",
        help="tokens of each part of a streamed text; more are faster on accelerators (default: 1)",
    )  # fmt: skip
    add("--log-prompts", action="store_true", help="also log what requests ask")


def named_path(value: str) -> tuple[str, str]:
    """Read NAME=PATH, or a path alone."""
    name, equals, path = value.partition("=")
    if not equals or "/" in name:
        return "", arguments.path(value)
    return arguments.non_empty(name), arguments.path(path)


def run(options: argparse.Namespace) -> None:
    for name, path in options.adapter:
        if not name:
            raise UserError(f"--adapter {path}: give it a name, which requests choose it by: --adapter NAME={path}")
    try:
        from jax_it.serving.admission import Limits
        from jax_it.serving.server import ServeOptions, serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("jax_it"):
            raise
        raise UserError(f"{error.name} is not installed; the server needs: pip install 'jax-it[serve]'") from None
    serve(
        ServeOptions(
            models=options.model,
            adapters=options.adapter,
            host=options.host,
            port=options.port,
            key_file=options.api_key_file,
            cors_origins=options.cors_origin,
            batch_size=options.batch_size,
            stream_interval=options.stream_interval,
            limits=Limits(
                max_new_tokens=options.max_new_tokens,
                max_prompt=options.max_prompt_tokens,
                max_queue=options.max_queue,
                timeout=options.request_timeout,
            ),
            log_prompts=options.log_prompts,
            drain_timeout=options.drain_timeout,
        )
    )
