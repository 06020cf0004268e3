"""`jax-it data build`: new records with a model, behind an endpoint or in this process."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from etils import epath

from jax_it import files
from jax_it.curation.build import answers, evolve, self_instruct, translate
from jax_it.curation.build.endpoint import Endpoint
from jax_it.curation.build.requests import Generator, Journal, Usage
from jax_it.curation.input import Chunk, Input, sources_of
from jax_it.curation.planned import Decisions, PerDecision
from jax_it.curation.settings import Build
from jax_it.curation.stage import Kept, Outcome, PerRecord, Plan, invalid
from jax_it.data import templates
from jax_it.data.records import InvalidRecord, Record
from jax_it.data.templates import Turn
from jax_it.errors import UserError

Item = tuple[Record, Sequence[Turn]]


def plan(settings: Build, input: Input) -> Plan:
    _check(settings)
    with ExitStack() as stack:
        file = files.locate_local(settings.journal, "--journal")
        lock = epath.Path(file.with_name(f"{file.name}.lock"))
        stack.enter_context(files.locked(lock, f"is using the journal {file}; wait for it", "name another --journal"))
        journal = stack.enter_context(Journal(file))
        shared = Usage()
        generator: Generator
        judge: Generator
        if settings.endpoint:
            key = _api_key(settings.api_key_env)

            def endpoint(model: str) -> Endpoint:
                made = Endpoint(settings.endpoint, model, journal, shared, key, settings.concurrency, settings.timeout)
                return stack.enter_context(made)

            generator = endpoint(settings.model)
            judge = endpoint(settings.judge_model) if settings.judge_model else generator
        else:
            from jax_it.curation.build.local import LocalModel  # and with it JAX

            generator = judge = LocalModel(settings.model, journal, shared, settings.batch_size)
        if settings.method == "self_instruct":
            found = _self_instruct(generator, settings, input)
        else:
            found = _each(_METHODS[settings.method](settings, generator, judge), settings, input)
    usage = shared.report(settings.input_price, settings.output_price)
    text = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in usage.items() if name != "retried")
    return found._replace(report={"usage": usage, **found.report}, text=f"{text}\n{found.text}".strip())


def _check(settings: Build) -> None:
    if not settings.model:
        raise UserError("--model is missing; name the endpoint's model, or a folder to run here")
    if not settings.journal:
        raise UserError("--journal is missing; name a file to keep the answers in")
    if settings.judge_model and not settings.endpoint:
        raise UserError("--judge-model is for --endpoint; leave it out")
    if settings.api_key_env and not settings.endpoint:
        raise UserError("--api-key-env is for --endpoint; leave it out")
    if bool(settings.language) != (settings.method == "translate"):
        raise UserError("--language is for --method translate, which needs it; add it or leave it out")
    least = {"number": 1, "rounds": 1, "candidates": 1, "max_new_tokens": 1, "concurrency": 1, "batch_size": 1}
    for name, value in least.items():
        if getattr(settings, name) < value:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(settings, name)} is less than {value}")
    if settings.candidates > 1 and not settings.temperature > 0:
        raise UserError("--candidates needs a --temperature above 0: without one all of them are the same")


def _api_key(variable: str) -> str:
    if not variable:
        return ""
    if not os.environ.get(variable):
        raise UserError(f"--api-key-env: the environment variable {variable} is not set; set it to the API key")
    return os.environ[variable]


def _self_instruct(generator: Generator, settings: Build, input: Input) -> Plan:
    seeds = [self_instruct.read_task(record, chunk.template) for chunk, record in _records(input)]
    made = self_instruct.make(
        generator, seeds, settings.number, settings.seed, settings.temperature, settings.max_new_tokens
    )
    if made.instructions < settings.number:
        text = f"the model made {made.instructions} new instructions of {settings.number}, and no more"
        print(f"jax-it data build: {text}", file=sys.stderr)
    if not made.records:
        raise UserError(f"the model made nothing that can be kept: {dict(made.rejected)}; try a larger model")
    file = Path(input.folder) / "made.jsonl"
    file.write_text("".join(files.to_json(record) + "\n" for record in made.records), encoding="utf-8")
    records = Input(sources_of([str(file)], "auto"), "made", input.workers, input.folder)
    report = {
        "instructions": made.instructions,
        "records": len(made.records),
        "rounds": made.rounds,
        "rejected": dict(sorted(made.rejected.items())),
    }
    return Plan(PerRecord(_keep), report=report, records=records)


def _keep(record: Record, template: str) -> Outcome:
    return Kept(record.fields)


def _records(input: Input) -> Iterator[tuple[Chunk, Record]]:
    for chunk in input.chunks():
        for record in chunk.records():
            if record.error:
                raise InvalidRecord(record.error)
            yield chunk, record


def _answers(settings: Build, generator: Generator, judge: Generator) -> Callable[[Sequence[Item]], list[Outcome]]:
    several = settings.candidates > 1
    return lambda items: answers.make(
        generator,
        judge,
        items,
        settings.candidates,
        settings.temperature if several else 0.0,
        settings.max_new_tokens,
        settings.seed,
    )


def _evolve(settings: Build, generator: Generator, judge: Generator) -> Callable[[Sequence[Item]], list[Outcome]]:
    return lambda items: evolve.make(
        generator, items, settings.rounds, settings.temperature, settings.max_new_tokens, settings.seed
    )


def _translate(settings: Build, generator: Generator, judge: Generator) -> Callable[[Sequence[Item]], list[Outcome]]:
    return lambda items: translate.make(generator, items, settings.language, settings.max_new_tokens, settings.seed)


_METHODS = {"answers": _answers, "evol_instruct": _evolve, "translate": _translate}


def _each(make: Callable[[Sequence[Item]], list[Outcome]], settings: Build, input: Input) -> Plan:
    """Plan a method that makes a record of a record."""
    store = Decisions(input)
    whole = settings.method == "translate"
    for chunk in input.chunks():
        decisions: list[Outcome | None] = []
        items: list[Item] = []
        for record in chunk.records():
            try:
                if record.error:
                    raise InvalidRecord(record.error)
                render: Any = templates.render if whole else templates.prompt
                turns = render(record, chunk.template)
                items.append((record, turns.turns if whole else turns))
                decisions.append(None)
            except InvalidRecord as error:
                decisions.append(invalid(error))
        made = iter(make(items))
        store.put(chunk.start, [next(made) if one is None else one for one in decisions])
    return Plan(PerDecision(_decided), store)


def _decided(record: Record, template: str, decision: Outcome) -> Outcome:
    return decision
