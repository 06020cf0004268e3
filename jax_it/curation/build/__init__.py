"""New instruction data from a model: `METHODS` names the ways, each a function of a `Generator`.

requests.py       what is asked and answered; the journal, in which every answer is kept
endpoint.py       a model behind any OpenAI-style HTTP endpoint, `jax-it serve` included
local.py          a model in this process
self_instruct.py  new instructions from a few seeds, with inputs and outputs
evolve.py         harder and rarer instructions from given ones
answers.py        answers to given instructions, the best of several by a judge
translate.py      a set in another language
"""
