"""A pair that computes the same with more heads, so that ranks can share them out.

SmolLM2 and its drafter have three key heads. Heads that are zero add nothing, and with four of them
the pair runs on two ranks or four:

    python tools/pad_kv_heads.py --output PAIR
    python benchmarks/sglang_serving.py --output FILE.json --target PAIR/target \\
        --drafter PAIR/drafter --settings '{"tp_size": 2}' --modes none,plugin,plugin-adaptive \\
        --dtype float32 --concurrency 8 --new-tokens 64 --repeats 1 --check
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_plugin.checkpoints.hub import resolve_drafter, resolve_model


def main(
    output: Annotated[Path, typer.Option()],
    target: str = "smollm2",
    drafter: Path | None = None,
    kv_heads: int = 4,
) -> None:
    """Write ``target`` and ``drafter`` under a new directory."""
    pad(resolve_model(target), output / "target", kv_heads)
    pad(resolve_drafter(drafter, target), output / "drafter", kv_heads)


def pad(model: Path, output: Path, kv_heads: int) -> None:
    """A copy of a model of plain attention without biases, with so many key heads."""
    shutil.copytree(model, output)
    config = json.loads((model / "config.json").read_text())
    query, had, width = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    heads = kv_heads * (query // had)
    changed = {**config, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    (output / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
    rows = {"q_proj": heads * width, "k_proj": kv_heads * width, "v_proj": kv_heads * width}
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            layer = name.removesuffix(".weight").rpartition(".")[2]
            if layer in rows:
                tensors[name] = grown(tensor, rows[layer])
            elif layer == "o_proj":
                tensors[name] = grown(tensor.T, heads * width).T.contiguous()
        (output / file.name).unlink()
        save_file(tensors, output / file.name, metadata={"format": "pt"})


def grown(tensor: Tensor, rows: int) -> Tensor:
    """[rows, …] of a tensor and zeros behind it."""
    return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *tensor.shape[1:])])


if __name__ == "__main__":
    typer.run(main)
