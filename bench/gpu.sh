#!/usr/bin/env bash
# Measure training on a machine with Python 3.12, JAX with CUDA and a driver, in under ten minutes and without a network.
#
#   bench/gpu.sh wheels          # before, where there is a network: the other packages, for Python 3.12, in bench/wheels
#   bench/gpu.sh [MODEL …]       # there; the models of bench/device.py, all by default
#
# Without bench/wheels the packages must be installed already.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3.12}
packages=(flax optax orbax-checkpoint 'etils[epath]' transformers tokenizers sentencepiece protobuf safetensors
  ml-collections jinja2 pyyaml rouge-score sacrebleu regex tqdm zstandard)

if [[ ${1:-} == wheels ]]; then
  python3 -m pip download -q --only-binary=:all: --python-version 3.12 --dest bench/wheels -c constraints/py312.txt \
    "${packages[@]}"
  rm -f bench/wheels/jax-* bench/wheels/jaxlib-*  # the machine has its own
  du -sh bench/wheels
  exit
fi

if [[ -d bench/wheels ]]; then
  venv=$(mktemp -d)
  trap 'rm -rf "$venv"' EXIT
  "$python" -m venv --system-site-packages "$venv"
  python=$venv/bin/python
  "$python" -m pip install -q --no-index --find-links bench/wheels --no-deps bench/wheels/*.whl
fi
[[ $# -gt 0 ]] || set -- t5-large t5-xl llama-8b-lora
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
PYTHONPATH=$PWD XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92} \
  timeout "${SECONDS_AT_MOST:-540}" "$python" bench/device.py "$@"
