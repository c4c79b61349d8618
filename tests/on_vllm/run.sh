#!/usr/bin/env bash
# The vLLM tests: on the V1 runner, which serves on a CPU, then shorter on V2 under Triton's
# interpreter.
#   usage: tests/on_vllm/run.sh VENV
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python="$1/bin/python"
"$python" -m pytest "$here"
export VLLM_V2_ON_CPU=1 VLLM_USE_V2_MODEL_RUNNER=1 PYTHONPATH="$here/v2_rig"
"$python" -m pytest "$here/test_vllm_engine.py" "$here/test_vllm_dialects.py" \
  "$here/test_vllm_adaptive.py" "$here/test_vllm_families.py" "$here/test_vllm_lora.py" \
  "$here/test_vllm_hybrid_prefixes.py"
