#!/usr/bin/env bash
# An SGLang for a CPU and this project, in a new virtual environment: about 2 minutes, 4 GB.
#   usage: tests/on_sglang/install.sh VENV [VERSION ...]
# The first version (0.5.20 if none is given) goes into the environment; the others, which need the
# same packages, beside it into VENV/sglang-VERSION: put that folder first in PYTHONPATH.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1 version=${2:-0.5.20}
python3 -m venv "$venv"
. "$venv/bin/activate"
pip install -q torch==2.13.0
pip install -q -r "$here/requirements.txt" torch==2.13.0
# Without the GPU packages that SGLang asks for. torchvision's release is a CUDA build whose Python
# part is all that is needed; the shim lets it load.
pip install -q --no-deps torchvision==0.28.0 "sglang==$version"
pip install -q accelerate gguf typer rich pytest hypothesis scipy httpx
pip install -q --no-deps -e "$here/../.."
# What stands in for SGLang's kernels for other processors is found by every process of the environment.
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$here/shim" > "$site/sglang_on_a_cpu.pth"
for other in "${@:3}"; do
  pip install -q --no-deps --target "$venv/sglang-$other" "sglang==$other"
done
