"""The V1 runner's proposer, which serves on a CPU: vLLM's own class around this drafter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.dflash import DFlashProposer

from dflash_plugin.kernels.select_path import Limits
from dflash_plugin.serving.draft_tokens import block_noise, select_drafts
from dflash_plugin.serving.new_weights import route
from dflash_plugin.vllm.model import EngineDrafter
from dflash_plugin.vllm.names import BLOCK
from dflash_plugin.vllm.options import required_spec
from dflash_plugin.vllm.protocols import SamplingMetadata, VllmConfig
from dflash_plugin.vllm.surface import surface
from dflash_plugin.vllm.target import require_hidden_states

NO_SLOT = -1
# vLLM samples greedily at lower temperatures.
MIN_TEMPERATURE = 1e-5


class Proposer(DFlashProposer):
    """Drafts a block per request; written for correctness, not speed."""

    model: EngineDrafter

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        settings = vllm_config.speculative_config
        if settings.rejection_sample_method == BLOCK:
            # This runner verifies draft by draft, and would draw no drafts beside another method.
            settings.rejection_sample_method = "standard"
        super().__init__(vllm_config, device, runner)
        self.spec = required_spec(vllm_config)
        require_hidden_states(vllm_config.model_config)

    def load_model(self, target_model: nn.Module) -> None:
        """Load the drafter and bind it to the target.

        Raises:
            DFlashError: vLLM's proposer lacks an attribute that this class uses.
        """
        super().load_model(target_model)
        route(target_model, self.model)
        surface().verify_object(self)

    def _maybe_share_embeddings(self, target_language_model: nn.Module) -> None:
        self.model.bind(target_language_model)

    def _maybe_share_lm_head(self, target_language_model: nn.Module) -> None:
        """Nothing to do: ``bind`` has taken the head with the embedding."""

    def set_inputs_first_pass(
        self,
        target_token_ids: Tensor,
        next_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        token_indices_to_sample: Tensor | None,
        cad: CommonAttentionMetadata,
        num_rejected_tokens_gpu: Tensor | None,
    ) -> tuple[int, Tensor, CommonAttentionMetadata]:
        """Fill the buffers for injection and for the block.

        Args:
            target_token_ids: int [T], tokens of the target's pass.
            next_token_ids: int [batch], anchor tokens of the blocks.
            target_positions: int [T], or [axes, T] of a target whose rotation has several axes.
            target_hidden_states: [T, hidden], context rows.
            token_indices_to_sample: unused.
            cad: metadata of the target's pass.
            num_rejected_tokens_gpu: int [batch], rejected rows at the end of each request's rows.

        Returns:
            The number of block rows, the rows int32 [batch * K] that draft, and metadata of the
            block's pass.
        """
        self.model.follow_target()
        batch, total = cad.batch_size(), target_token_ids.shape[0]
        anchor_drafts = self.spec.config.sample_from_anchor
        drafts = self.num_speculative_tokens
        rows = drafts + (not anchor_drafts)
        self.model.model.lay_out(rows)
        starts = cad.query_start_loc.long()
        counts = starts.diff()
        rejected = torch.zeros_like(counts)
        if num_rejected_tokens_gpu is not None:
            rejected = num_rejected_tokens_gpu.long()
        last = starts[1:] - 1 - rejected
        request = torch.repeat_interleave(torch.arange(batch, device=counts.device), counts)
        if target_positions.dim() == 1:
            positions = target_positions.long()
        else:
            # A drafter counts tokens, as the cache does. An image has many tokens at one position.
            first = cad.seq_lens.long() - counts - starts[:-1]
            positions = torch.arange(total, device=counts.device) + first[request]
        is_context = torch.arange(total, device=counts.device) <= last[request]
        slots = self._slots(cad, request, positions)
        self._dflash_num_context = total
        self._dflash_hidden_states = target_hidden_states
        self._context_positions_buffer[:total] = positions
        self._context_slot_mapping_buffer[:total] = torch.where(is_context, slots, NO_SLOT)

        anchors = positions[last] + 1
        block = anchors[:, None] + torch.arange(rows, device=counts.device)
        owner = torch.arange(batch, device=counts.device)[:, None].expand_as(block)
        limit = self.max_model_len
        fits = block < limit
        block = block.clamp(max=limit - 1)
        block_slots = torch.where(fits, self._slots(cad, owner, block), NO_SLOT)
        size = batch * rows
        tokens = torch.full_like(block, self.parallel_drafting_token_id)
        tokens[:, 0] = next_token_ids
        self.input_ids[:size] = tokens.flatten()
        self.positions[:size] = block.flatten()
        self._slot_mapping_buffer[:size] = block_slots.flatten()
        sample = torch.arange(size, device=counts.device).view(batch, rows)[:, rows - drafts :]

        lengths = cad.seq_lens - rejected.to(cad.seq_lens.dtype) + rows
        upper = cad.seq_lens_cpu_upper_bound
        metadata = CommonAttentionMetadata(
            query_start_loc=self.arange[: batch + 1] * rows,
            seq_lens=lengths.clamp(max=limit),
            query_start_loc_cpu=torch.from_numpy(self.token_arange_np[: batch + 1]).clone() * rows,
            seq_lens_cpu_upper_bound=None if upper is None else (upper + rows).clamp(max=limit),
            num_reqs=cad.num_reqs,
            num_actual_tokens=size,
            max_query_len=rows,
            max_seq_len=min(cad.max_seq_len + rows, limit),
            block_table_tensor=cad.block_table_tensor,
            slot_mapping=self._slot_mapping_buffer[:size],
            causal=self.dflash_causal,
        )
        return size, sample.flatten().to(torch.int32), metadata

    def _sample_draft_tokens(
        self, hidden_states: Tensor, sampling_metadata: SamplingMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Draft tokens and, where they are sampled, their distributions.

        Args:
            hidden_states: [batch * K, hidden], of the rows that draft.
            sampling_metadata: sampling parameters of the requests.

        Returns:
            Tokens int64 [batch * K] and distributions float32 [batch * K, vocabulary], or None
            where the best tokens are taken.
        """
        if self.spec.config.selector is None:
            made: tuple[Tensor, Tensor | None] = super()._sample_draft_tokens(
                hidden_states, sampling_metadata
            )
            return made
        drafts = self.num_speculative_tokens
        batch, rows = len(hidden_states) // drafts, drafts + 1
        anchors = self.input_ids[: batch * rows : rows].long()
        temperature, u, limits = None, None, None
        if self._enable_probabilistic_draft_probs and not sampling_metadata.all_greedy:
            given = sampling_metadata.temperature
            temperature = torch.where(given < MIN_TEMPERATURE, 0.0, given)
            seeds = torch.randint(1 << 62, (batch,), device=given.device)
            u = block_noise(seeds, torch.zeros_like(seeds), drafts)
            limits = limits_of(sampling_metadata)
        drafter, found = self.model.drafter, self.model.candidates(hidden_states)
        path = select_drafts(drafter, found, anchors, temperature, u, limits)
        if path.probs is None:
            return path.tokens.flatten(), None
        of_candidates = path.probs.flatten(0, 1)
        vocabulary = self.model.vocab_size
        probs = drafter.target_probabilities(of_candidates, vocabulary, found.tokens)
        return path.tokens.flatten(), probs

    def _slots(self, cad: CommonAttentionMetadata, request: Tensor, positions: Tensor) -> Tensor:
        """Cache slots of positions of requests, both [...]."""
        table = cad.block_table_tensor
        block = (positions // self.block_size).clamp(max=table.shape[1] - 1)
        slot: Tensor = table[request, block].long() * self.block_size + positions % self.block_size
        return slot


def limits_of(metadata: SamplingMetadata) -> Limits | None:
    """What drafts of a batch are drawn within; None where no request has top-k or top-p.

    vLLM refuses min-p beside a drafter.
    """
    top_k, top_p = metadata.top_k, metadata.top_p
    if top_k is None and top_p is None:
        return None
    off = torch.zeros_like(metadata.temperature)
    return Limits(
        off.long() if top_k is None else top_k.long(),
        off + 1 if top_p is None else top_p,
        off,
    )
