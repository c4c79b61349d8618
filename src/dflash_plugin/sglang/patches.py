"""What is replaced in SGLang while our worker's passes run.

Functions and classes of modules are patched from the table in ``seams``. The methods of live
objects (the target's worker, both model runners) are replaced on those objects alone, so that the
other workers of the process keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from dflash_plugin.kernels.uniforms import Stream
from dflash_plugin.sglang import penalties, sampling
from dflash_plugin.sglang.adaptive import AdaptiveVerifier
from dflash_plugin.sglang.compat import current
from dflash_plugin.sglang.protocols import (
    ForwardBatchLike,
    LogitsOutputLike,
    SamplingInfoLike,
)
from dflash_plugin.sglang.surface import surface
from dflash_plugin.sglang.verify_graphs import enable_ragged_runners
from dflash_plugin.sglang.verify_input import compacting_input, cut_position_axes, take_output

# Where SGLang's worker looks up the functions that it verifies with.
WORKER_MODULE = "sglang.srt.speculative.dflash_worker_v2"


class RunningWorker(Protocol):
    """Our worker, as far as the patches use it."""

    verifier: AdaptiveVerifier | None
    step: Any
    in_graph: bool
    target_worker: Any
    _draft_block_tokens_buf: Tensor

    def adjust_logits(self, logits: Tensor, info: Any, rows: int) -> None:
        """Apply what the target's own sampling applies to its logits, in place."""
        ...

    def accept(self, candidates: Tensor, logits: Tensor, info: Any) -> tuple[Tensor, Tensor]:
        """Accepted drafts and the token after them."""
        ...

    def accept_greedy(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Accepted drafts of a cut pass without requests that sample, and the token after them."""
        ...


# The functions below are called by name and are not told whose pass runs.
_running: ContextVar[RunningWorker | None] = ContextVar("running worker", default=None)


@contextmanager
def routing_to(worker: RunningWorker) -> Iterator[None]:
    """Let the patched functions of SGLang's worker module call our worker during its pass."""
    token = _running.set(worker)
    try:
        yield
    finally:
        _running.reset(token)


def route_verification() -> None:
    """Patch the functions and the class with which SGLang's worker verifies.

    Their signatures are the same from 0.5.17 to 0.5.23, while the worker's body around them changed
    in every release.
    """

    def routed(ours: Callable[..., Any]) -> Callable[[Any], Any]:
        def make(native: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(native)
            def call(*args: Any, **kwargs: Any) -> Any:
                worker = _running.get()
                return native(*args, **kwargs) if worker is None else ours(worker, *args, **kwargs)

            return call

        return make

    def adjust(
        worker: RunningWorker,
        *,
        next_token_logits: Tensor,
        sampling_info: SamplingInfoLike,
        draft_token_num: int,
    ) -> None:
        worker.adjust_logits(next_token_logits, sampling_info, draft_token_num)

    def accept(
        worker: RunningWorker,
        *,
        candidates: Tensor,
        next_token_logits: Tensor,
        sampling_info: SamplingInfoLike,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        return worker.accept(candidates, next_token_logits, sampling_info)

    def greedily(native: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(native)
        def call(*, candidates: Tensor, target_predict: Tensor) -> Any:
            verifier = running_verifier()
            if verifier is None or verifier.cut is None:
                return native(candidates=candidates, target_predict=target_predict)
            worker = _running.get()
            assert worker is not None
            return worker.accept_greedy(candidates)

        return call

    def running_verifier() -> AdaptiveVerifier | None:
        worker = _running.get()
        return None if worker is None else worker.verifier

    plans_kv_writes = current().plans_kv_writes
    for name, make in (
        ("apply_dflash_verify_logits_adjustments", routed(adjust)),
        ("compute_dflash_sampling_correct_drafts_and_bonus", routed(accept)),
        ("compute_dflash_correct_drafts_and_bonus", greedily),
        ("is_dflash_sampling_verify_available", routed(lambda worker: True)),
        (
            "DFlashVerifyInput",
            lambda native: compacting_input(native, running_verifier, plans_kv_writes),
        ),
    ):
        surface().patch(WORKER_MODULE, name, make)
    enable_ragged_runners()
    cut_position_axes()


@contextmanager
def replacing_penalties(info: SamplingInfoLike, gathered: penalties.Penalties) -> Iterator[None]:
    """Give a prefill's sampler the penalties of what its requests have already written."""
    kept = info.penalizer_orchestrator
    info.penalizer_orchestrator = None
    additive = -(gathered.frequency * gathered.counts + gathered.presence * (gathered.counts > 0))
    if gathered.stop is not None:
        additive.masked_fill_((gathered.remaining > 0) & gathered.stop, float("-inf"))
    info.acc_additive_penalties = additive
    info.acc_scaling_penalties = torch.where(gathered.counts > 0, gathered.repetition, 1.0)
    try:
        yield
    finally:
        info.penalizer_orchestrator = kept
        penalties.without_native(info)


def watch_target_passes(worker: RunningWorker) -> None:
    """Note whether the target's last pass was a captured one, and take what a cut pass gives.

    SGLang's worker keeps the first to itself, and reads the output as whole blocks.
    """
    target = worker.target_worker
    native = target.forward_batch_generation

    @wraps(native)
    def forward(*args: Any, **kwargs: Any) -> Any:
        result = native(*args, **kwargs)
        worker.in_graph = bool(result.can_run_cuda_graph)
        cut = None if worker.verifier is None else worker.verifier.cut
        if cut is not None:
            take_output(result.logits_output, cut, worker._draft_block_tokens_buf)
        return result

    target.forward_batch_generation = forward


def seed_first_tokens(runner: Any, noise: sampling.Noise) -> None:
    """Draw the token after a prompt with its request's seed, where the request gave one.

    SGLang itself reads seeds only under --enable-deterministic-inference.

    Args:
        runner: the target's.
        noise: seeds of the batch's requests that gave none.
    """
    native = runner.sample

    @wraps(native)
    def sample(logits_output: LogitsOutputLike, forward_batch: ForwardBatchLike) -> Any:
        info = forward_batch.sampling_info
        given = sampling.kept_seeds(info)
        if given is None or forward_batch.return_logprob or info.has_custom_logit_processor:
            return native(logits_output, forward_batch)
        runner._preprocess_logits(logits_output, info)
        assert logits_output.next_token_logits is not None
        logits = logits_output.next_token_logits[:, None]
        params = sampling.tensors(info, noise.seeds(given, logits.shape[0]))
        probs = sampling.distribution(logits, params, info)
        positions = forward_batch.seq_lens.long()[:, None]
        return sampling.draw(probs, params, positions, Stream.NEXT)[:, 0]

    runner.sample = sample


def skip_unread_embedding(worker: RunningWorker, target: Any, runner: Any) -> None:
    """Leave out the embedding of every block that SGLang's worker makes for the draft pass.

    Our drafter embeds tokens inside its pass.

    Args:
        worker: whose decode steps they are.
        target: the target model, whose embedding SGLang's worker asks for first in every step.
        runner: the drafter's.
    """
    embedding, draft = target.get_input_embeddings, runner.forward

    @wraps(embedding)
    def get_input_embeddings() -> Any:
        step = worker.step
        if step is None or step.has_embedding:  # A target may ask in its own pass.
            return embedding()
        step.has_embedding = True
        return _one_number_each

    @wraps(draft)
    def forward(forward_batch: ForwardBatchLike, *args: Any, **kwargs: Any) -> Any:
        if worker.step is not None:
            forward_batch.input_embeds = None
        return draft(forward_batch, *args, **kwargs)

    target.get_input_embeddings = get_input_embeddings
    runner.forward = forward


def _one_number_each(tokens: Tensor) -> Tensor:
    """In place of embeddings that nothing reads."""
    return tokens[..., None]


def skip_unused_drafts(runner: Any, worker: RunningWorker) -> None:
    """Run no draft pass in steps that verify no draft, and shorter blocks where steps ask for them.

    Args:
        runner: the drafter's.
        worker: whose steps they are.
    """
    native = runner.forward

    @wraps(native)
    def forward(forward_batch: ForwardBatchLike, *args: Any, **kwargs: Any) -> Any:
        verifier = worker.verifier
        if verifier is None or worker.step is None:
            return native(forward_batch, *args, **kwargs)
        if not verifier.skips_draft:
            short = verifier.running_short
            run = native if short is None else partial(short.run, native)
            return run(forward_batch, *args, **kwargs)
        nothing = forward_batch.positions.new_zeros(len(forward_batch.positions), 1)
        return SimpleNamespace(
            logits_output=SimpleNamespace(hidden_states=nothing), can_run_graph=True
        )

    runner.forward = forward
