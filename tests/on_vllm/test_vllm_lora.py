"""Adapters of the target, also of its head, and none, in one batch; the drafter has none."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.helpers.greedy import greedy_text
from tests.helpers.tiny import ENGINE_SIZES, write_tiny
from tests.on_vllm.test_vllm_quantised import PROMPTS
from tests.on_vllm.vllm_helpers import running

RANK, ALPHA = 4, 8
MODULES = ["q_proj", "down_proj", "lm_head"]
LENGTH = 12


def write_adapter(directory: Path, target: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A random adapter in peft's files, and the target that it makes."""
    generator = torch.Generator().manual_seed(seed)
    adapted, tensors = copy.deepcopy(target), {}
    for name, module in adapted.named_modules():
        if name.rpartition(".")[2] not in MODULES:
            continue
        rows, columns = module.weight.shape
        down = 0.3 * torch.randn(RANK, columns, generator=generator)
        up = 0.3 * torch.randn(rows, RANK, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        module.weight.data += ALPHA / RANK * up @ down
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": MODULES}
    (directory / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    return adapted


def test_adapters_and_none_in_one_batch(pair, tmp_path):
    target, directory = pair
    drafter = write_tiny(tmp_path / "drafter", **ENGINE_SIZES, target_hidden_size=64)
    names = [None, "one", "other", None]
    models = {None: target}
    requests: dict[str | None, LoRARequest | None] = {None: None}
    for number, name in enumerate(("one", "other"), 1):
        models[name] = write_adapter(tmp_path / name, target, number)
        requests[name] = LoRARequest(name, number, str(tmp_path / name))
    expected = [
        greedy_text(models[name], prompt, LENGTH)
        for name, prompt in zip(names, PROMPTS, strict=True)
    ]
    for name, prompt, text in zip(names, PROMPTS, expected, strict=True):
        assert name is None or greedy_text(target, prompt, LENGTH) != text
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    # A CPU gives requests without an adapter the last slot's, drafter or not: it stays empty.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 3}
    with running(directory, drafter, max_model_len=256, **lora) as engine:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            params,
            lora_request=[requests[name] for name in names],
            use_tqdm=False,
        )
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
