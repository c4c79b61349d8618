#!/usr/bin/env bash
# Trains DFlash 2 drafters of SmolLM2 at one budget: each of the same sequences, steps and batch.
#   warm     from the shipped DFlash drafter
#   scratch  from new weights
#   control  the shipped DFlash drafter for as many steps more, without the new parts
#   usage: examples/train_dflash2.sh PROMPTS.jsonl OUTPUT [warm|scratch|control]...
# A run that was interrupted goes on when the same command is given again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
prompts=$1 output=$2
shift 2
[ $# -gt 0 ] || set -- warm scratch

common=(--target "${TARGET:-smollm2}" --prompts "$prompts" --self-prompts "${SELF_PROMPTS:-36000}"
  --openings "$here/smollm2-135m-dflash/openings.jsonl" --max-prompt-tokens 256
  --max-new-tokens "${NEW_TOKENS:-256}" --held-out "${HELD_OUT:-256}"
  --generation-batch "${GENERATION_BATCH:-1024}" --weighting dpace --steps "${STEPS:-2000}"
  --batch-size "${BATCH:-64}" --anchors "${ANCHORS:-128}" --eval-every 500 --save-every 500)
shipped=(--start-from "$here/smollm2-135m-dflash" --learning-rate "${WARM_RATE:-1e-3}")
fresh=(--mask-token 4 --layers 3 --intermediate-size 768 --target-layers 5,13,21,28
  --learning-rate "${RATE:-2e-3}")
parts=(--dflash2 --selector-rank 32 --selector-weight "${SELECTOR_WEIGHT:-1}")

for run; do
  case $run in
    warm) options=("${shipped[@]}" "${parts[@]}") ;;
    scratch) options=("${fresh[@]}" "${parts[@]}") ;;
    control) options=("${shipped[@]}") ;;
    *) echo "$run is no run: warm, scratch, control" >&2 && exit 2 ;;
  esac
  mkdir -p "$output/$run/work"
  # Made by the first run, the sequences serve the others.
  made=$(find "$output" -name sequences-00.safetensors -print -quit)
  [ -z "$made" ] || [ -e "$output/$run/work/sequences-00.safetensors" ] || cp "$made" "$output/$run/work"
  python -m dflash_plugin train "${common[@]}" "${options[@]}" --output "$output/$run"
done
