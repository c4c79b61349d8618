"""Each kernel, its naive twin and a device-to-device copy of as many bytes, on a CUDA device.

    python benchmarks/kernels.py --output FILE.json

The shapes are those of a Qwen3-8B drafter in bfloat16. Figures are medians of
``triton.testing.do_bench`` in microseconds, with a cold L2 cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 5, 4096, 32, 8, 128, 12288
EPS = 1e-6
Run = Callable[[], object]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def add_rms_norm(rows: int) -> tuple[Run, Run, int]:
    from dflash_plugin.kernels.add_rms_norm import add_rms_norm, add_rms_norm_naive

    arguments = (random(rows, HIDDEN), random(rows, HIDDEN), random(HIDDEN), EPS)
    moved = 4 * rows * HIDDEN * 2
    return lambda: add_rms_norm(*arguments), lambda: add_rms_norm_naive(*arguments), moved


def gated_act(rows: int) -> tuple[Run, Run, int]:
    from dflash_plugin.kernels.gated_act import gated_act, gated_act_naive

    gate_up = random(rows, 2 * INTERMEDIATE)
    moved = 3 * rows * INTERMEDIATE * 2
    return lambda: gated_act(gate_up), lambda: gated_act_naive(gate_up), moved


def rotary(rows: int) -> tuple[Tensor, Tensor]:
    """Positions and inverse frequencies."""
    exponents = torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM
    return torch.arange(rows, device="cuda"), 1_000_000.0**-exponents


def qk_norm_rope(rows: int) -> tuple[Run, Run, int]:
    from dflash_plugin.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_naive

    qkv = random(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    positions, inverse = rotary(rows)
    weights = (random(HEAD_DIM), random(HEAD_DIM))
    arguments = (qkv, positions, *weights, inverse, HEADS, KV_HEADS, HEAD_DIM, EPS)
    moved = 2 * rows * (HEADS + KV_HEADS) * HEAD_DIM * 2
    return lambda: qk_norm_rope(*arguments), lambda: qk_norm_rope_naive(*arguments), moved


def inject_kv(rows: int) -> tuple[Run, Run, int]:
    from dflash_plugin.kernels.inject_kv import KVPools, inject_kv, inject_kv_naive

    kv = random(rows, LAYERS, 2, KV_HEADS, HEAD_DIM)
    positions, inverse = rotary(rows)
    slots = torch.randperm(2 * rows, device="cuda")[:rows]
    keys, values = ([random(2 * rows, KV_HEADS, HEAD_DIM) for _ in range(LAYERS)] for _ in "kv")
    pools = KVPools.build(keys, values)
    arguments = (kv, positions, slots, pools, random(LAYERS, HEAD_DIM), inverse, EPS)
    return lambda: inject_kv(*arguments), lambda: inject_kv_naive(*arguments), 2 * kv.nbytes


def measure(make: Callable[[int], tuple[Run, Run, int]], rows: int) -> dict[str, object]:
    from triton.testing import do_bench

    kernel, twin, moved = make(rows)
    # A copy reads and writes every byte.
    source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    runs = {"kernel": kernel, "twin": twin, "copy": lambda: target.copy_(source)}
    times = {f"{name}_us": do_bench(run, return_mode="median") * 1e3 for name, run in runs.items()}
    speed = moved / times["kernel_us"] / 1e3
    return {"op": make.__name__, "rows": rows, "bytes": moved, **times, "kernel_gb_s": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 1024, 16384])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/kernels.py needs a CUDA device, and torch sees none")
    import triton

    ops = (add_rms_norm, gated_act, qk_norm_rope, inject_kv)
    record = {
        "command": "python benchmarks/kernels.py",
        "device": torch.cuda.get_device_name(),
        "dtype": "bfloat16",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "rows": [measure(make, rows) for make in ops for rows in options.rows],
    }
    text = json.dumps(record, indent=2)
    if options.output:
        options.output.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
