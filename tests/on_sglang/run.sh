#!/usr/bin/env bash
# The SGLang tests on a CPU: whole on the installed version, the serving tests on the others.
#   usage: tests/on_sglang/run.sh VENV
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$1" && pwd)
"$venv/bin/python" -m pytest "$here"
for site in "$venv"/sglang-*; do
  [ -d "$site" ] || continue
  echo "== ${site##*/sglang-}"
  PYTHONPATH="$site" "$venv/bin/python" -m pytest "$here/test_sglang_serve.py" -m versions
done
