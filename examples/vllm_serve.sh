#!/usr/bin/env bash
# Serves SmolLM2 with the shipped drafter, asks one question over HTTP, and shows what was accepted.
#   usage: examples/vllm_serve.sh [more flags of vllm serve]     (in an environment with vLLM)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
target=$(python -c 'from dflash_plugin.checkpoints.hub import resolve_model; print(resolve_model("smollm2"))')
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}

vllm serve "$target" --served-model-name smollm2 --port 8011 --max-model-len 1024 \
  --speculative-method dflash --speculative-model "$here/smollm2-135m-dflash" "$@" &
server=$!
trap 'kill $server; wait $server || true' EXIT
until curl -sf localhost:8011/health; do
  kill -0 $server
  sleep 1
done
curl -sf localhost:8011/v1/chat/completions -H 'Content-Type: application/json' -d '{
  "model": "smollm2", "temperature": 0, "max_tokens": 64,
  "messages": [{"role": "user", "content": "Write a haiku about rivers."}]}'
echo
curl -sf localhost:8011/metrics | grep -E '^(dflash:|vllm:spec_decode)' | grep -v _created
