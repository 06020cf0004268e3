"""jax_it's models in the Language Model Evaluation Harness (lm_eval 0.4): all its tasks, scored by its own code.

    python -m jax_it.harness --model_args path=DIR --tasks hellaswag,gsm8k --output_path results

`lm_eval` finds models in its own package alone, so this command tells it of ours and hands over to it: all its
options are there, `--model jax_it` is understood, and so is `--batch_size 32`. PATH is a run's folder, one in
Transformers or PEFT format, or a hub name. In Python, `harness.model.HarnessModel(path)` goes to
`lm_eval.simple_evaluate(model=…)`. The package comes with the extra `harness`; it needs no PyTorch.

Scores are those of lm_eval's own Transformers model, but for two things in which that one (0.4.13) differs from what a
task asks: encoder-decoders' texts, which it lets be longer by as many tokens as the source has, and the heads of
encoder-decoders such as Flan-T5, which it replaces by the embedding under Transformers 5.
"""
