#!/usr/bin/env bash
# Measure training on the TPU chips of this host, where jax_it is installed with its extra `tpu`.
#
#   bench/tpu.sh [MODEL …]       # the models of bench/device.py, all by default
set -euo pipefail
cd "$(dirname "$0")/.."
[[ $# -gt 0 ]] || set -- t5-large t5-xl llama-8b-lora
PYTHONPATH=$PWD timeout "${SECONDS_AT_MOST:-1200}" "${PYTHON:-python3}" bench/device.py "$@"
