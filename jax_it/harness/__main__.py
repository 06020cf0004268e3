"""`python -m jax_it.harness`: lm_eval's command line, which knows `jax_it` as a model."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from jax_it.errors import UserError

NAME = "jax_it"
COMMANDS = ("run", "ls", "list", "validate")  # of lm_eval
BATCH = "32"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exit with 0: done, 2: the user can fix it, or with lm_eval's own codes."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        sys.argv = ["lm_eval", *completed(sys.argv[1:] if arguments is None else arguments)]
        run()
    except UserError as error:
        print(f"jax_it.harness: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("jax_it.harness: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:  # lm_eval's or ours
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def run() -> None:
    """Run lm_eval's own command with the arguments of this process."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise UserError(f"the harness needs {error.name}: pip install 'jax-it[harness]'") from None
    register()
    cli_evaluate()


def register() -> None:
    """Make `jax_it` a model of lm_eval in this process."""
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="jax_it.harness.model:HarnessModel")


def completed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with our model, and a batch size that is not lm_eval's 1, where they name none."""
    words = list(arguments)
    if not words or words[0] in ("-h", "--help", *COMMANDS[1:]):
        return words
    if words[0] != "run":
        words = ["run", *words]
    if "-h" in words or "--help" in words:
        return words
    for names, value in ((("--model", "-M"), NAME), (("--batch_size", "-b"), BATCH)):
        if not any(word.split("=", 1)[0] in names for word in words):
            words += [names[0], value]
    return words


if __name__ == "__main__":
    main()
