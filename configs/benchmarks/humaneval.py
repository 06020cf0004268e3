"""HumanEval: 164 Python functions to write from their docstrings, by pass@k (Chen et al. 2021).

    jax-it eval --model codellama/CodeLlama-7b-hf --config configs/benchmarks/humaneval.py --run-model-code \\
        --output scores/humaneval
    jax-it eval --workdir runs/mine --config configs/benchmarks/humaneval.py:200,HumanEval.jsonl.gz --run-model-code

It runs programs that the model writes, so it needs --run-model-code. Each program runs in its own process, without
access to the network, to other processes or to your files, and is stopped after 10 seconds or at 1 GiB of memory.

Data: openai/openai_humaneval of the hub, or a file of github.com/openai/human-eval (MIT license). The argument is a
list of: that file; the number of samples per problem, drawn at temperature 0.8, for pass@10 and pass@100 (without it
one greedy sample, for pass@1); "chat", for models that answer in a conversation. A model continues the
prompt up to one of the paper's stop strings; in a conversation the answer's first code block counts.

To reproduce: Code Llama 7B pass@1 33.5, pass@10 59.6, pass@100 85.9 (Rozière et al. 2023, table 2); Llama 2 7B pass@1
12.8 (Touvron et al. 2023); with "chat" SmolLM2-1.7B-Instruct pass@1 28.1 (its model card, whose prompt is not known).
"""

import ml_collections

from jax_it import config as defaults

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # section 2.2 of the paper
# Without the line end that closes the prompt: most tokenizers make one token of it and the blanks that follow.
PROMPT = "{{prompt.strip()}}"
ASK = "Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{{prompt}}```"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    words = [word for word in arg.split(",") if word]
    samples = next((int(word) for word in words if word.isdecimal()), 1)
    file = next((word for word in words if not word.isdecimal() and word != "chat"), "")
    chat = "chat" in words

    config = defaults.default()
    task = {
        "name": "humaneval",
        "data": {"path": file} if file else {"path": "openai/openai_humaneval", "split": "test", "format": "datasets"},
        "score": "code_execution",
        "metrics": [f"pass@{k}" for k in (1, 10, 100) if k <= samples],
        "chat": chat,
        "max_prompt_length": 2048,
        "max_new_tokens": 512,
        "samples": samples,
        "published": "Code Llama 7B pass@1 33.5, pass@10 59.6, pass@100 85.9 (Rozière et al. 2023)",
    }
    task["data"]["template"] = [f"{ASK if chat else PROMPT} ||| {{{{canonical_solution}}}}"]
    task["stop"] = [] if chat else list(STOP)
    if samples > 1:
        task |= {"temperature": 0.8, "top_p": 0.95}
    config.eval.tasks = [task]
    return config
