"""New weights while vLLM runs: drafts and text are those of the new ones, or they are refused."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from dflash_plugin.checkpoints.reference_drafts import answer
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving import new_weights
from dflash_plugin.transformers.loading import load_drafter
from dflash_plugin.vllm.selfcheck import draft
from tests.helpers.greedy import greedy_text
from tests.helpers.tiny import ENGINE_SIZES as SIZES
from tests.helpers.tiny import tiny_target, write_target, write_tiny
from tests.on_vllm.vllm_helpers import ON_V2, on_worker, running

SCRIPT = Path(__file__).parents[2] / "examples" / "train_while_serving.py"
spec = spec_from_file_location("train_while_serving", SCRIPT)
assert spec is not None
assert spec.loader is not None
example = module_from_spec(spec)
spec.loader.exec_module(example)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 20, 30, 40], [50, 51, 52, 53]]
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
# Weights, and what makes the drafter.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("checkpoint", {**BIASES, "target_layer_ids": (2, 0)}),
    "own head, reduced": ("checkpoint", {"draft_vocab_size": 24, "own_head": True}),
    "FP8": ("fp8", BIASES),
    "FP8, own head": ("fp8", {"draft_vocab_size": 24, "own_head": True}),
}
TESTED = ["plain"] if ON_V2 and not torch.cuda.is_available() else list(KINDS)


@pytest.mark.parametrize("kind", TESTED)
def test_new_weights_reach_text_and_drafts(tmp_path: Path, kind: str) -> None:
    weights, changes = KINDS[kind]
    first, second = (tiny_target(**SIZES, seed=seed) for seed in (0, 1))
    directory = write_target(tmp_path / "target")
    first.save_pretrained(directory)
    made = {**SIZES, "target_hidden_size": 64, **changes}
    old, new = (write_tiny(tmp_path / str(seed), seed=seed, **made) for seed in (0, 1))
    options = {"additional_config": {"dflash_plugin": {"draft_weights": weights}}}
    with running(directory, old, max_model_len=256, **options) as engine:

        def check(target: PreTrainedModel, checkpoint: Path) -> None:
            engine.reset_prefix_cache()
            drafter = load_drafter(checkpoint, target, weights=weights)
            for prompt in PROMPTS:
                expected = answer(drafter, target, prompt)
                assert min(expected.margins) > 1e-3
                assert on_worker(engine, draft, [*prompt, expected.anchor]) == expected.drafts
            assert texts(engine) == [greedy_text(target, prompt, 16) for prompt in PROMPTS]

        check(first, old)
        engine.collective_rpc("reload_draft_weights", args=(str(new),))
        check(first, new)
        on_worker(engine, tensor_by_tensor, old)
        check(first, old)
        on_worker(engine, try_what_does_not_fit, new)
        check(first, old)
        on_worker(engine, transfer, new)
        check(first, new)
        second.save_pretrained(tmp_path / "second")
        on_worker(engine, reload, tmp_path / "second", old)
        check(second, old)
        # The tensors were the last; the checkpoint is what is left of what was discarded.
        on_worker(engine, lose)
        check(second, new)
        if kind == "plain":
            trained = load_drafter(new, second)
            example.run(engine, second, trained, PROMPTS, tmp_path / "example", rounds=2)
            # Steps this small change few drafts: the weights themselves are compared.
            found = on_worker(engine, sum_of_weights)
            assert found == pytest.approx(float(trained.fc.weight.detach().abs().sum()), rel=1e-6)
            assert found != sum_of(tensors(new))
            check(second, tmp_path / "example" / "drafter")


def sum_of_weights(worker: Any) -> float:
    return float(worker.get_draft_model().drafter.fc.weight.abs().sum())


def sum_of(named: list[tuple[str, torch.Tensor]]) -> float:
    return float(dict(named)["fc.weight"].abs().sum())


def texts(engine: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


def tensors(checkpoint: Path) -> list[tuple[str, torch.Tensor]]:
    return list(load_file(checkpoint / "model.safetensors").items())


def tensor_by_tensor(worker: Any, checkpoint: Path) -> None:
    for pair in tensors(checkpoint):
        worker.get_draft_model().load_weights([pair])


def try_what_does_not_fit(worker: Any, checkpoint: Path) -> None:
    """Calls whose last tensor is wrong."""
    others, name = dict(tensors(checkpoint)), "fc.weight"
    weight = others.pop(name)
    for wrong, message in (
        ((name, weight[:-1]), f"{name}' has shape"),
        (("layers.7.mlp.up_proj.weight", weight), "'layers.7.mlp.up_proj.weight' does not"),
        ((name, torch.full_like(weight, torch.nan)), "not finite"),
    ):
        with pytest.raises(DFlashError, match=f"the drafter keeps its weights: .*{message}"):
            worker.get_draft_model().load_weights([*others.items(), wrong])


class Transfer(WeightTransferEngine):
    """What vLLM's dense transfer engines do around their transport."""

    init_transfer_engine = receive_weights = shutdown = lambda self, *_: None

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: Any) -> None:
        self.model.load_weights(update_info.items())


def transfer(worker: Any, checkpoint: Path) -> None:
    """A trainer's update of the drafter, in two parts; one that is refused comes before."""
    # The worker itself; what the engine calls is a wrapper with attributes of its own.
    worker, named = worker.worker, tensors(checkpoint)
    worker.weight_transfer_engine = Transfer(
        None, worker.vllm_config, torch.device("cpu"), worker.model_runner.get_model()
    )
    assert worker.supports_draft_weight_updates()
    worker.start_draft_weight_update()
    with pytest.raises(DFlashError, match="the drafter keeps its weights"):
        worker.update_weights({"nonsense": torch.zeros(3)})
    worker.start_draft_weight_update()
    worker.update_weights(dict(named[:7]))
    worker.update_weights(dict(named[7:]))
    worker.finish_weight_update()


def reload(worker: Any, target: Path, drafter: Path) -> None:
    """Both models in one stream."""
    ours = [(f"draft.{name}", tensor) for name, tensor in tensors(drafter)]
    worker.reload_weights(weights_iterator=iter([*tensors(target), *ours]))


def lose(worker: Any) -> None:
    """What sleep level 2 leaves of the drafter's weights, and what wakes it up."""
    model = worker.get_draft_model()
    stacked = model.context_weight
    for tensor in (
        *model.drafter.parameters(), *model.drafter.buffers(), model.context_bias,
        *(stacked if isinstance(stacked, tuple) else [stacked]),
    ):  # fmt: skip
        if tensor is not None:
            tensor.data.zero_()
    new_weights.restore(model)
