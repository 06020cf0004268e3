"""Tokens per second of greedy decoding: with prompt lookup against without, the same engine and the same texts.

    python bench/prompt_lookup.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/t0/train.jsonl.gz
    python bench/prompt_lookup.py … --prompts 2 --rounds 1 --batch-sizes 1                           # a quick look

Two tasks of the same documents (the beginnings of the data's prompts): the model repeats each one (`copies`), or
writes about it in its own words (`free`). Both decode to the same number of tokens, end tokens ignored; rounds
alternate in one process after a first pass that compiles.
"""

import argparse
from functools import partial

from generate import draw
from measure import alternate, limits, machine, ratio, timed

TASKS = {
    "copies": "Repeat the following text word for word.\n\n{}",
    "free": "Write a poem in your own words about the topic of the following text.\n\n{}",
}
WORDS = 100  # of a document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="lines of {prompt, completion}, .jsonl or .jsonl.gz")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,8", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--drafts", default="10", type=lambda text: [int(n) for n in text.split(",")])
    options = parser.parse_args()
    from jax_it.data import chat
    from jax_it.generation import Engine, Sampling, generate
    from jax_it.predict import encode
    from jax_it.run import load, make_format
    from jax_it.sharding import inference_mesh

    model, params, tokenizer = load(options.model)
    mesh, new, number = inference_mesh(model.parameter_count), options.new_tokens, options.prompts
    documents = [
        " ".join(words[:WORDS])
        for record in draw(options.data, 50 * number, 0)
        if len(words := record["prompt"].split()) >= WORDS
    ][:number]

    def take(engine: Engine, prompts: list[list[int]], texts: dict[int, list[int]]) -> None:
        for output in generate(engine, params, prompts):
            assert texts.setdefault(output.request_id, output.tokens) == output.tokens, "a round gave another text"

    rates = limits()
    print(machine())
    print(
        f"matmul {rates['flops_per_second'] / 1e9:.0f} GFLOP/s, weights read at {rates['bytes_per_second'] / 1e9:.1f} "
        f"GB/s: at most {rates['bytes_per_second'] / 4 / model.parameter_count:.1f} steps/s of one text",
        flush=True,
    )
    for size in options.batch_sizes:
        engines = {
            drafts: Engine(
                model, mesh, new, size, Sampling(ignore_eos=True, prompt_lookup_num_tokens=drafts), chat.ends(tokenizer)
            )
            for drafts in (0, *options.drafts)
        }
        for task, instruction in TASKS.items():
            prompts = encode(make_format(model, tokenizer), tokenizer, [instruction.format(d) for d in documents])
            texts: dict[int, dict[int, list[int]]] = {drafts: {} for drafts in engines}
            sides = {
                drafts: partial(timed, partial(take, engine, prompts, texts[drafts]))
                for drafts, engine in engines.items()
            }
            alternate(1, sides)
            seconds = alternate(options.rounds, sides)
            for drafts in options.drafts:
                same = sum(texts[drafts][i] == text for i, text in texts[0].items())
                plain, looked_up = (number * new / min(seconds[each]).wall for each in (0, drafts))
                print(
                    f"{task}, {size} at a time, {drafts} drafted: {plain:.1f} tokens/s without, {looked_up:.1f} with; "
                    f"ratio {ratio(seconds[drafts], seconds[0])}; {same} of {number} texts the same",
                    flush=True,
                )


if __name__ == "__main__":
    main()
