"""jax_it's models in the Language Model Evaluation Harness (lm_eval 0.4): all of its tasks, scored by its own code.

    python -m jax_it.harness --model_args path=DIR --tasks hellaswag,gsm8k --output_path results

`lm_eval` finds models only in its own package, so this command registers ours and then calls lm_eval's: all of its
options work, `--model jax_it` and `--batch_size 32` are the defaults. DIR is a run's folder, one in Transformers or
PEFT format, or a hub name. In Python, pass `harness.model.HarnessModel(path)` to `lm_eval.simple_evaluate(model=…)`.
The package comes with the extra `harness`; it needs no PyTorch. `jax-it eval` runs the same tasks (score="lm_eval").

Scores are those of lm_eval's own Transformers model, except where that one (0.4.13) does not do what a task asks: it
lets encoder-decoders' texts be longer by as many tokens as the source has, and under Transformers 5 it replaces the
heads of encoder-decoders such as Flan-T5 by the embedding.
"""
