#!/usr/bin/env bash
# The SGLang tests on a CPU: whole on the installed version and, on the other core meanwhile, the
# serving tests on the other versions.
#   usage: tests/on_sglang/run.sh VENV
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$1" && pwd)
export OMP_NUM_THREADS=1
log=$(mktemp)

others() {
  for site in "$venv"/sglang-*; do
    [ -d "$site" ] || continue
    echo "== SGLang ${site##*/sglang-}"
    PYTHONPATH="$site" SGLANG_CPU_OMP_THREADS_BIND=1 \
      "$venv/bin/python" -m pytest "$here/test_sglang_serve.py" -m versions || return 1
  done
}

others > "$log" 2>&1 &
versions=$!
failed=0
"$venv/bin/python" -m pytest "$here" || failed=1
wait $versions || failed=1
cat "$log"
exit $failed
