"""`jax-it data run RECIPE.py`: stages one after another; what an interrupted or changed recipe has done stays done.

    def get_config(arg=""):
        return ConfigDict({
            "inputs": [{"path": "raw/*.jsonl"}],
            "stages": [{"stage": "validate", "fix": True}, {"stage": "dedup", "near": True}],
            "output": "clean.jsonl.zst",
        })

The records after each stage, its manifest and the records that it dropped are in `work_dir`. A stage is not run again
where its manifest has the same input, settings and versions, and its output is the file that it wrote.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etils import epath

from jax_it import config, files, typed
from jax_it.config import Source
from jax_it.curation import run as stage_run
from jax_it.curation.input import Input
from jax_it.curation.settings import SETTINGS, Convert
from jax_it.errors import UserError, shown
from jax_it.workers import Workers


@dataclass(frozen=True)
class Recipe:
    """What `get_config` returns."""

    inputs: tuple[Source, ...] = ()
    stages: tuple[Mapping[str, Any], ...] = ()  # of each its name, as "stage", and its settings
    output: str = ""  # .jsonl, .jsonl.gz, .jsonl.zst or .parquet
    work_dir: str = ""  # a folder for what each stage makes; "": OUTPUT.stages
    on_invalid: Literal["error", "drop"] = "error"  # for records that cannot be read or rendered; drop: skip and count


def read(path: str) -> Recipe:
    """Return the recipe of a config file, FILE or FILE:ARG. Raises UserError that names the field."""
    recipe: Recipe = typed.build(Recipe, config.read(path), "config")
    for name, value in (("inputs", recipe.inputs), ("stages", recipe.stages), ("output", recipe.output)):
        if not value:
            raise UserError(f"config.{name} is empty; set it in {path}")
    return recipe


def run(recipe: Recipe, workers: Workers, command: Sequence[str] = ()) -> dict[str, Any]:
    """Run a recipe's stages, and return the manifest of its output, which has those of all stages. Raises UserError."""
    stages = [_stage(fields, f"config.stages.{i}") for i, fields in enumerate(recipe.stages)]
    output = files.locate_output(recipe.output, "config.output")
    if files.is_stream(output):
        raise UserError(f"config.output: {output} is not a regular file, which a recipe needs")
    work_dir = files.locate(recipe.work_dir or f"{recipe.output}.stages", "config.work_dir")
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config.work_dir: cannot make {work_dir}: {error.strerror}; name another folder") from None
    manifests = []
    sources, template = recipe.inputs, _template(recipe.inputs, stages[0][1])
    lists = []  # of dropped records, with the stages' names
    with (
        tempfile.TemporaryDirectory(prefix="jax_it-") as folder,
        files.locked_output(output, "config.output"),
        files.locked(work_dir / ".lock", f"runs a recipe in {work_dir}; wait for it", "give another config.work_dir"),
    ):
        data = Input(sources, "config.inputs", workers, Path(folder))
        stage_run.check_output(output, data)
        for number, (name, settings) in enumerate(stages):
            file = work_dir / f"{number}-{name}.jsonl.zst"
            manifest = _done(file, stage_run.identity(name, settings, data, recipe.on_invalid))
            if manifest is None:
                manifest = stage_run.run(name, settings, data, file, recipe.on_invalid, command, origins=True)
            else:
                print(f"{name}: {file} is up to date")
            manifests.append(manifest)
            lists.append((name, stage_run.dropped_of(file)))
            if isinstance(settings, Convert) and settings.to != "same":
                template = "auto"
            data = Input(_one(file, template), f"config.stages.{number}", workers, Path(folder), origins=True)
            if not manifest["counts"]["kept"]:
                raise UserError(f"config.stages.{number}: {name} has dropped all records, see {lists[-1][1]}")
        final = stage_run.run("convert", Convert(), data, output, recipe.on_invalid, command)
        final["stages"] = manifests
        _join(lists, stage_run.dropped_of(output))
        files.write_atomically(stage_run.manifest_of(output), final)
    return final


def _stage(fields: Mapping[str, Any], where: str) -> tuple[str, Any]:
    """Return a stage's name and settings."""
    settings = dict(fields)
    name = settings.pop("stage", "")
    if name not in SETTINGS:
        raise UserError(f"{where}.stage: {shown(name)} is not one of {', '.join(SETTINGS)}")
    return name, typed.build(SETTINGS[name], settings, where)


def _template(inputs: Sequence[Source], first: Any) -> str:
    """Return the template of all inputs, which may differ only where the first stage converts them to one shape."""
    templates = {source.template for source in inputs}
    if len(templates) > 1 and not (isinstance(first, Convert) and first.to != "same"):
        raise UserError("config.inputs have different templates; let the first stage be 'convert', to one shape")
    return inputs[0].template[0]


def _one(file: epath.Path, template: str) -> tuple[Source, ...]:
    settings: Any = {"path": str(file), "template": (template,)}
    return (Source(**settings),)


def _done(file: epath.Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of a stage's output, where it is what the stage would make now."""
    try:
        manifest = files.read_json_object(stage_run.manifest_of(file))
        if any(manifest.get(name) != value for name, value in identity.items()):
            return None
        return manifest if manifest["output"]["digest"] == stage_run.digest(file) else None
    except (OSError, KeyError, TypeError, UserError):
        return None


def _join(lists: Sequence[tuple[str, epath.Path]], to: epath.Path) -> None:
    """Write the stages' lists of dropped records as one, each record with its stage."""
    with files.open_atomically(to) as target:
        for name, file in lists:
            with files.open_binary(file) as stream:
                for line in stream:
                    target.write(f'{{"stage": "{name}", '.encode() + line.lstrip(b"{"))
