#!/usr/bin/env bash
# Serves SmolLM2 with the shipped drafter over HTTP and asks it one question.
#   usage: examples/sglang_serve.sh [more flags of sglang.launch_server]
# On a CPU: SGLANG_USE_CPU_ENGINE=1 and
#   --device cpu --dtype float32 --attention-backend torch_native --disable-cuda-graph
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$(python -c 'from dflash_plugin.checkpoints.hub import resolve_model; print(resolve_model("smollm2"))')
url=http://127.0.0.1:30011
python -m sglang.launch_server --model-path "$target" --port 30011 --context-length 1024 \
  --mem-fraction-static 0.3 --speculative-algorithm DFLASH \
  --speculative-draft-model-path "$here/smollm2-135m-dflash" "$@" &
server=$!
trap 'kill $server; wait $server || true' EXIT
until curl -sf $url/health > /dev/null; do
  kill -0 $server || exit 1
  sleep 1
done
curl -sf $url/v1/chat/completions -H 'Content-Type: application/json' \
  -d '{"model": "default", "max_tokens": 64, "temperature": 0,
       "messages": [{"role": "user", "content": "Name three rivers of Europe."}]}'
echo
curl -sf $url/server_info | python -c 'import json, sys; print(json.load(sys.stdin)["internal_states"][0]["dflash_plugin"])'
