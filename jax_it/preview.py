"""Shows what the model will see: text, tokens, loss mask, packing; and what happens to each data set."""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from jax_it import config as settings
from jax_it import data, metrics, sharding
from jax_it.config import Config
from jax_it.data import chat
from jax_it.data.encoding import Counts
from jax_it.data.formats import CausalBatch, CausalFormat, Seq2SeqBatch
from jax_it.data.tokenized import Tokenized, shown_characters
from jax_it.data.tokenizer import Tokenizer
from jax_it.evaluation import training_suite
from jax_it.pretrained import load_model
from jax_it.run import load_tokenizer, make_format, start_run
from jax_it.run_checks import check_model


def preview(config: Config, number: int) -> str:
    """Return what `jax-it preview` prints, with `number` examples of the first batch.

    Raises UserError for whatever training would refuse before its first step, except its mesh and its weights.
    """
    metrics.check(config.eval.metrics)
    # The run's mesh may be that of another machine.
    sizes = {axis: max(getattr(config.mesh, axis), 1) for axis in sharding.AXES}
    run = start_run(config, sharding.make_mesh(settings.Mesh()), sizes=sizes)
    training_suite(run)
    assert run.data
    return report(run.config, run.data, run.tokenizer, number)


def tokenize(config: Config, output: str) -> str:
    """Tokenize the training data into a new folder, and return what became of each data set.

    Raises UserError for whatever training would refuse of the data and the tokenizer.
    """
    config, _ = data.pin(config)
    tokenizer = load_tokenizer(config)
    model = load_model(config.model, tokenizer.ids_of(config.model.new_tokens))
    check_model(config, model, tokenizer)
    return _data_sets(data.tokenize(config.data, tokenizer, make_format(model, tokenizer), output))


def report(config: Config, built: data.Built, tokenizer: Tokenizer, number: int) -> str:
    """Return the report for data that has been built."""
    parts = [_data_sets(built.tokenized), _rows(config, built)]
    if tokenizer.chat_template is not None and isinstance(built.train.format, CausalFormat):
        parts.append(_generation(tokenizer))
    if number:
        parts.append(_examples(built, tokenizer, number))
    return "\n\n".join(parts)


def _data_sets(tokenized: Sequence[Sequence[Tokenized]]) -> str:
    lines = ["Data sets"]
    for templates in tokenized:
        for item in templates:
            counts = item.counts
            tokens = max(counts.source_tokens + counts.target_tokens, 1)
            template = "" if len(templates) == 1 else f", template {item.template!r}"
            lines += [
                f"  {item.name}{template}: {counts.examples} examples, {counts.kept} kept"
                + (f", {counts.skipped} without text by this template or its examples" if counts.skipped else ""),
                f"    dropped    {_share(counts.empty_completion, counts.examples)} with an empty completion, "
                f"{_share(counts.too_long, counts.examples)} too long",
                *_invalid(counts),
                f"    truncated  {_share(counts.truncated_source, counts.examples)} sources, "
                f"{_share(counts.truncated_target, counts.examples)} targets"
                + (f", {_share(counts.truncated_turns, counts.examples)} by turns" if counts.truncated_turns else ""),
                f"    tokens     mean source {counts.source_tokens / counts.examples:.1f}, "
                f"target {counts.target_tokens / counts.examples:.1f} (before truncation)",
                f"    trained on {_share(counts.target_tokens, tokens)} of the tokens",
                f"    unknown    {_share(counts.unknown_tokens, tokens)} of the tokens"
                + (f": {shown_characters(counts.unknown)}" if counts.unknown else ""),
                f"    lost       {shown_characters(counts.lost) or 'no character'}",
            ]
    return "\n".join(lines)


def _invalid(counts: Counts) -> list[str]:
    if not counts.invalid:
        return []
    return [f"    invalid    {_share(counts.invalid, counts.examples)}: {counts.shown_reasons(most=5)}"]


def _share(number: int, of: int) -> str:
    return f"{number} ({number / of:.2%})"


def _rows(config: Config, built: data.Built) -> str:
    layout, train = built.train.layout, built.train
    shape, rates = layout.shape, train.rates
    kind = "Packed rows" if train.packed else "Rows, padded to the longest of each batch"
    source = f"source {shape.blocks} x {shape.source} tokens, {layout.source_fill:.1%} full; target "
    return "\n".join(
        [
            kind,
            f"  {source if shape.source else ''}{shape.target} tokens, {layout.target_fill:.1%} full",
            f"  {layout.rows} rows a step, {layout.examples_per_row:.2f} examples a row: "
            f"{rates.step_examples:.1f} examples and {rates.step_tokens:.0f} tokens a step",
            f"  an epoch has {train.mixture.epoch_examples} examples and {rates.epoch_steps:.1f} steps; "
            f"the run ({config.train.duration}) has {train.steps(config.train.duration)} steps",
        ]
    )


def _examples(built: data.Built, tokenizer: Tokenizer, number: int) -> str:
    batch = built.train.batch(0).batch
    lines = ["First examples of the first batch: tokens that the loss counts are shown in [brackets]"]
    rows = range(len(batch.targets_BT))
    places = ((row, s) for row in rows for s in range(1, int(batch.segments_BT[row].max()) + 1))
    for row, segment in islice(places, number):
        if isinstance(batch, Seq2SeqBatch):
            lines += _pair(batch, row, segment, tokenizer)
        else:
            lines += _sequence(batch, row, segment, tokenizer)
    return "\n".join(lines)


def _pair(batch: Seq2SeqBatch, row: int, segment: int, tokenizer: Tokenizer) -> list[str]:
    source = batch.source_BGS[row][batch.source_segments_BGS[row] == segment]
    here = batch.segments_BT[row] == segment
    targets = batch.targets_BT[row][here]
    return [
        f"  row {row}, segment {segment}: {len(source)} source and {len(targets)} target tokens",
        f"    source text   {_short(tokenizer.decode(source))}",
        f"    source tokens {_short(' '.join(tokenizer.show(source)))}",
        f"    target text   {_short(tokenizer.decode(targets))}",
        f"    target tokens {_short(_bracketed(targets, batch.weights_BT[row][here] > 0, tokenizer))}",
    ]


def _sequence(batch: CausalBatch, row: int, segment: int, tokenizer: Tokenizer) -> list[str]:
    here = batch.segments_BT[row] == segment
    tokens, weights = batch.tokens_BT[row][here], batch.weights_BT[row][here]
    mask = np.concatenate([[False], weights[:-1] > 0])  # a weight is that of the next token
    return [
        f"  row {row}, segment {segment}: {len(tokens)} tokens, {int(mask.sum())} of them trained on",
        f"    text    {_short(repr(tokenizer.text(tokens)))}",
        f"    loss on {_short(repr(tokenizer.text(tokens[mask])))}",
        f"    tokens  {_short(_bracketed(tokens, mask, tokenizer))}",
    ]


def _bracketed(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> str:
    pieces = zip(tokenizer.show(tokens), mask, strict=True)
    return " ".join(f"[{piece}]" if is_target else piece for piece, is_target in pieces)


def _generation(tokenizer: Tokenizer) -> str:
    """Return how a conversation's answer begins and ends, and whether other programs would begin it differently."""
    lines = [
        "Chat template",
        f"  an answer ends with {' or '.join(tokenizer.show(chat.ends(tokenizer)))}",
    ]
    if (differing := chat.generation_prompt(tokenizer)) is None:
        lines.append("  the template's generation prompt is the text before an answer in training")
    else:
        ours, theirs = map(repr, differing)
        lines += [
            "  the template's generation prompt differs from the text before an answer in training",
            f"    in training       {_short(ours)}",
            f"    generation prompt {_short(theirs)}",
        ]
    return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}"
