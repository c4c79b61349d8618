#!/usr/bin/env bash
# Builds wheel and sdist, installs the wheel with its command line into a bare environment, and uses
# it from another directory, as a user without a clone does. About 2 minutes, 2.5 GB.
#   usage: tests/try_wheel.sh [VENV]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${1:-$work/venv}
python3 -m venv "$work/build"
"$work/build/bin/pip" install -q build
# From a copy, so that no build folder of the clone gets into the wheel.
mkdir "$work/source"
git -C "$root" ls-files -z | tar -C "$root" --null -T - -c | tar -C "$work/source" -x
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/source" > "$work/build.log" \
  || { cat "$work/build.log"; exit 1; }
ls -l "$work/dist"

python3 -m venv "$venv"
"$venv/bin/pip" install -q torch==2.13.0
"$venv/bin/pip" install -q "$(echo "$work"/dist/*.whl)[cli]"

cd "$work" # away from the clone
expect() { # runs a command and looks for a text in what it prints
  local text=$1 shown
  shift
  shown=$("$@" 2>&1) || { echo "$shown"; echo "failed: $*" >&2; return 1; }
  grep -qF -- "$text" <<< "$shown" || { echo "$shown"; echo "no '$text' from: $*" >&2; return 1; }
  echo "ok: $*"
}
version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("dflash-plugin"))')
expect "dflash-plugin $version" "$venv/bin/dflash-plugin" --version
expect "generate" "$venv/bin/python" -m dflash_plugin --help
expect "yes, token for token" \
  "$venv/bin/dflash-plugin" generate "Say hello." --max-new-tokens 16 --compare
# Without the packages of the command line, serving loads and the program says what is missing.
"$venv/bin/pip" uninstall -q -y typer
"$venv/bin/python" -c 'import dflash_plugin.serving.drafter_spec, dflash_plugin.drafter.model'
message=$("$venv/bin/dflash-plugin" --version 2>&1) && { echo "no error without typer" >&2; exit 1; }
[ "$message" = "error: the command line needs typer, which is not installed: run pip install 'dflash-plugin[cli]'" ] \
  || { echo "$message" >&2; exit 1; }
echo "ok: without the extra"
