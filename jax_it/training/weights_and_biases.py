"""The log as a run of Weights & Biases, if the config asks for it."""

import importlib
import importlib.util
import secrets
from typing import Any

from jax_it import config as settings
from jax_it import hosts
from jax_it.config import Config
from jax_it.errors import UserError
from jax_it.files import local, read_json, write_atomically
from jax_it.run_dir import RunDir


def check(project: str) -> None:
    """Raise UserError if a project is named and the package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "config.train.wandb needs the package wandb: pip install 'jax-it[wandb]', or leave the setting empty"
        )


def start(run_dir: RunDir, config: Config) -> Any:
    """Open the run that belongs to the directory: the same one after a restart. Returns None if none is wanted.

    Steps that are taken again after a crash are not logged again: they are the same.
    """
    if not config.train.wandb or not hosts.is_first():
        return None
    file = run_dir.path / "wandb.json"
    try:
        if not file.is_file():
            write_atomically(file, {"id": secrets.token_hex(4)})
        run = read_json(file)["id"]
        return importlib.import_module("wandb").init(
            project=config.train.wandb,
            id=run,
            name=run_dir.path.name,
            resume="allow",
            config=settings.to_dict(config),
            dir=local(run_dir.path),
        )
    except Exception as error:  # of its own, of the network, of the account
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"config.train.wandb: {reason}; fix that, or set WANDB_MODE=offline") from error
