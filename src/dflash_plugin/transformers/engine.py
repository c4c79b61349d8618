"""The Transformers engine: continuous batching of draft and verify passes over static buffers.

A step drafts one block per running request and verifies all of them in one target pass. Requests
join and leave between steps. Source of the loop: Algorithm 1 of arXiv 2602.06036.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dflash_plugin.adaptive.policy import VerifyLenPolicy, choose_verify_lens
from dflash_plugin.adaptive.tree_tokens import TreeTokens
from dflash_plugin.decoding.draft_sampling import LEARN_EVERY, AcceptanceEstimate, DraftSampling
from dflash_plugin.decoding.sampling import is_limited, probabilities
from dflash_plugin.decoding.verify import FinishReason, Verdict, commit, verify, verify_greedy
from dflash_plugin.decoding.verify_tree import verify_tree_sampled, walk
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.drafter.static_store import StaticStore
from dflash_plugin.drafter.tree import propose_tree
from dflash_plugin.errors import DFlashError
from dflash_plugin.transformers.graphs import Graphs
from dflash_plugin.transformers.loading import bind_drafter
from dflash_plugin.transformers.positions import check_positions
from dflash_plugin.transformers.requests import Request, Result
from dflash_plugin.transformers.rotation import check_rotation
from dflash_plugin.transformers.rows import MAX_STOP_IDS, RowTensors
from dflash_plugin.transformers.static_cache import TargetPass
from dflash_plugin.transformers.target import Target
from dflash_plugin.transformers.trees import (
    TreePass,
    TreeRows,
    move_path,
    refuse_trees,
    tree_sizes,
)

PREFILL_TOKENS = 8192
KEYS_STEP = 64
OnTokens = Callable[[int, list[int]], None]


@dataclass
class _Running:
    index: int
    request: Request
    result: Result
    length: int


class _Sampling(NamedTuple):
    """How the requests of a pass sample, as far as the host must know.

    Attributes:
        greedy: none does.
        limited: one is limited by top-k, top-p or min-p.
        learns: the pass adds to the estimate of which drafts are accepted.
    """

    greedy: bool
    limited: bool
    learns: bool


class Engine:
    """Generates with a target, and with a drafter if one is given.

    The model's attention implementation is switched to the engine's; the model stays usable by
    itself.

    Args:
        model: any decoder-only causal language model of Transformers whose state is attention
            keys and values, recurrent states, or both.
        drafter: from ``load_drafter``, or None to decode one token a pass.
        max_batch: requests that run at the same time.
        max_length: longest prompt + output.
        draft_sampling: how drafts of requests with a temperature are made, lossless whichever:
            "probabilistic" draws them from the drafter's distribution, "greedy" takes its likeliest
            tokens, "auto" takes what is accepted most (``decoding.draft_sampling``).
        cuda_graphs: run draft and verify from CUDA graphs on a GPU.
        adaptive: verify the number of drafts per request that commits most tokens per second, none
            where none pays; the text stays the same.
        tree_rows: verify so many likely tokens beside each block's chain (``decoding.draft_tree``);
            0 verifies the chain alone. "auto" does, too, unless ``adaptive`` is set: then trees are
            among the passes that it chooses from.
        record_drafts: keep what each pass drafted, which costs a copy from the device.

    Attributes:
        policy: chooses the verify length, or None; its ``summary`` returns what it has learned.

    Raises:
        DFlashError: target and drafter do not fit each other, or the target cannot be run; or an
            option has no such value, or does not go with another.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        drafter: Drafter | None = None,
        *,
        max_batch: int = 1,
        max_length: int = 2048,
        draft_sampling: DraftSampling = "auto",
        cuda_graphs: bool = True,
        adaptive: bool = False,
        tree_rows: TreeRows = "auto",
        record_drafts: bool = False,
    ) -> None:
        if max_batch < 1:
            raise DFlashError(f"max_batch is {max_batch}: give at least 1")
        self.drafter = drafter
        self.max_batch = max_batch
        self.max_length = max_length
        if draft_sampling not in get_args(DraftSampling):
            raise DFlashError(
                f"draft_sampling is {draft_sampling!r}: give one of "
                + ", ".join(map(repr, get_args(DraftSampling)))
            )
        self.draft_sampling = draft_sampling
        self.record_drafts = record_drafts
        self.num_drafts = drafter.config.num_draft_tokens if drafter else 0
        rows = self.num_drafts + 1
        has_drafter = drafter is not None
        self.tree_sizes = tree_sizes(tree_rows, adaptive, has_drafter, max_batch, rows)
        check_rotation(model.config.get_text_config(), max_length, rows)
        check_positions(model.config.get_text_config(), max_length, rows)
        widest = rows + max(self.tree_sizes, default=0)
        length = max_length + max(widest, drafter.config.block_size if drafter else 0) + 1
        length = -(-length // KEYS_STEP) * KEYS_STEP
        self.layer_ids = drafter.config.target_layer_ids if drafter else ()
        if drafter is not None:
            bind_drafter(drafter, model)
        normed = drafter is None or drafter.config.last_layer_normed
        self.target = Target(model, max_batch, length, self.layer_ids, normed)
        if self.tree_sizes and self.target.recurrent is not None:
            refuse_trees(tree_rows, self.target.config.model_type)
            self.tree_sizes = ()
        self.device = self.target.device
        if drafter is not None:
            drafter.store = self.store = StaticStore(
                drafter,
                max_batch,
                length,
                drafter.norm.weight.dtype,
                self.device,
            )
        self.graphs = Graphs(self.device, cuda_graphs)
        self.vocabulary = self.target.embedding.shape[0]
        self.acceptance = AcceptanceEstimate(self.num_drafts, self.device)
        self.steps = 0
        self.stop_ids = _default_stop_ids(model)
        self.policy: VerifyLenPolicy | None = None
        self.expected_tokens = TreeTokens(self.num_drafts, self.tree_sizes)
        if adaptive and drafter is not None:
            sizes = {min(1 << n, max_batch) for n in range(max_batch.bit_length() + 1)}
            verify_lens = choose_verify_lens(rows, 0, None)
            verify_lens += tuple(rows + beside for beside in self.tree_sizes)
            expected = self.expected_tokens.expected
            self.policy = VerifyLenPolicy(verify_lens, sorted(sizes), expected=expected, block=rows)
        self.state = RowTensors(
            max_batch,
            rows,
            len(self.layer_ids) * self.target.config.hidden_size,
            self.target.dtype,
            self.device,
            max(self.tree_sizes, default=0),
        )

    def generate(
        self, requests: Iterable[Request], on_tokens: OnTokens | None = None
    ) -> list[Result]:
        """Run requests to their end, at most ``max_batch`` at a time.

        Args:
            requests: in the order in which they are admitted.
            on_tokens: called with a request's index and its newly committed tokens, as they come.

        Returns:
            Results in the order of the requests.

        Raises:
            DFlashError: a request is empty or too long; nothing has run by then.
        """
        pending = list(requests)
        for index, request in enumerate(pending):
            self._check(index, request)
        results = [Result() for _ in pending]
        waiting = deque(
            _Running(i, request, results[i], len(request.prompt))
            for i, request in enumerate(pending)
        )
        rows: list[_Running | None] = []
        with torch.inference_mode():
            while waiting or any(rows):
                self._admit(rows, waiting, on_tokens)
                self._compact(rows)
                if rows:
                    self._step(rows, on_tokens)
        return results

    def _check(self, index: int, request: Request) -> None:
        if not len(request.prompt):
            raise DFlashError(f"request {index} has an empty prompt: give at least one token")
        if request.max_new_tokens < 1:
            raise DFlashError(
                f"request {index} has max_new_tokens={request.max_new_tokens}: give at least 1"
            )
        total = len(request.prompt) + request.max_new_tokens
        if total > self.max_length:
            raise DFlashError(
                f"request {index} needs {len(request.prompt)} prompt + {request.max_new_tokens} "
                f"new tokens = {total} but max_length is {self.max_length}: raise max_length or "
                "shorten the request"
            )
        limit = self.target.num_positions
        if limit is not None and total > limit:
            raise DFlashError(
                f"request {index} needs {len(request.prompt)} prompt + {request.max_new_tokens} "
                f"new tokens = {total} but the target has {limit} positions "
                "(max_position_embeddings): shorten the request"
            )
        stops = self.stop_ids if request.stop_ids is None else request.stop_ids
        if len(stops) > MAX_STOP_IDS:
            raise DFlashError(
                f"request {index} has {len(stops)} stop tokens: give at most {MAX_STOP_IDS}"
            )
        outside = [token for token in request.prompt if not 0 <= token < self.vocabulary]
        if outside:
            raise DFlashError(
                f"request {index} has token {outside[0]} outside the target's vocabulary of "
                f"{self.vocabulary}: use the target's own tokenizer"
            )

    def _admit(
        self,
        rows: list[_Running | None],
        waiting: deque[_Running],
        on_tokens: OnTokens | None,
    ) -> None:
        """Prefill waiting requests into free rows, in groups of like length.

        A prefill delays all running requests, so a large batch waits until a sixteenth of its rows
        is free.
        """
        free = [row for row, slot in enumerate(rows) if slot is None]
        free += range(len(rows), self.max_batch)
        if len(free) < min(len(waiting), self.max_batch // 16):
            return
        joining = [waiting.popleft() for _ in range(min(len(waiting), len(free)))]
        if joining and self.policy is not None:
            self.policy.read_prompts(len(joining), sum(slot.length for slot in joining))
        joining.sort(key=lambda slot: slot.length)
        while joining:
            size = 1
            while size < len(joining) and self._may_join(
                size + 1, joining[0].length, joining[size].length
            ):
                size += 1
            group, indices = joining[:size], free[:size]
            joining, free = joining[size:], free[size:]
            rows.extend([None] * (max(indices) + 1 - len(rows)))
            self._prefill(group, torch.as_tensor(indices, device=self.device), on_tokens)
            for index, slot in zip(indices, group, strict=True):
                rows[index] = None if slot.result.finish_reason else slot

    def _may_join(self, count: int, shortest: int, longest: int) -> bool:
        """Whether so many prompts run in one pass; recurrent layers take no padding."""
        fits = count * longest <= PREFILL_TOKENS
        return fits and (shortest == longest or self.target.recurrent is None)

    def _prefill(self, group: list[_Running], rows: Tensor, on_tokens: OnTokens | None) -> None:
        """Run prompts into ``rows`` and commit each request's first token."""
        lengths = [slot.length for slot in group]
        tokens = torch.zeros(len(group), max(lengths), dtype=torch.int64)
        positions = torch.full_like(tokens, -1)
        for row, slot in enumerate(group):
            tokens[row, : slot.length] = torch.as_tensor(slot.request.prompt)
            positions[row, : slot.length] = torch.arange(slot.length)
        last_logits = self._run_prompts(
            tokens.to(self.device), positions.to(self.device), lengths, rows
        )
        self.state.load(rows, [slot.request for slot in group], self.stop_ids)
        sampling = self.state.sampling.of_rows(rows)
        verdict = verify(
            rows.new_zeros(len(group), 0),
            probabilities(last_logits[:, None], sampling, _sampling_of(group).limited),
            None,
            sampling.seed,
            self.state.lengths[rows] - 1,
        )
        committed, _, reason = commit(
            verdict.tokens,
            verdict.num_accepted + 1,
            self.state.stops[rows],
            self.state.remaining[rows],
        )
        self.state.anchors[rows] = verdict.next_token
        self.state.remaining[rows] -= committed
        self.state.feature_positions[rows] = -1
        outcome = torch.stack([reason.long(), verdict.next_token], dim=1).tolist()
        for slot, (code, token) in zip(group, outcome, strict=True):
            self._record(slot, [token], code, on_tokens)

    def _run_prompts(
        self, tokens: Tensor, positions: Tensor, lengths: list[int], rows: Tensor
    ) -> Tensor:
        """Fill both caches from prompts [B, T], in chunks; the last position's logits [B, V]."""
        last = torch.as_tensor(lengths, device=self.device) - 1
        chunk = max(1, PREFILL_TOKENS // len(lengths))
        last_logits: Tensor | None = None
        for start in range(0, max(lengths), chunk):
            end = min(start + chunk, max(lengths))
            ending = sorted({n - 1 - start for n in lengths if start < n <= end}) or [0]
            columns = torch.as_tensor(ending, device=self.device)
            part = positions[:, start:end]
            target_pass = TargetPass(
                self.target.kv, part, self._num_keys(end), rows, is_start=start == 0
            )
            logits, features = self.target.forward(tokens[:, start:end], target_pass, columns)
            self.target.advance([end - start] * len(lengths))
            column = torch.searchsorted(columns, last - start).clamp(max=len(ending) - 1)
            chosen = logits[torch.arange(len(lengths), device=self.device), column]
            here = (last >= start) & (last < end)
            last_logits = (
                chosen if last_logits is None else torch.where(here[:, None], chosen, last_logits)
            )
            if self.drafter is not None and features is not None:
                self.store.rows = rows
                self.drafter.inject(features, part)
        assert last_logits is not None
        return last_logits

    def _step(self, rows: list[_Running | None], on_tokens: OnTokens | None) -> None:
        """Draft and verify one block for every running request."""
        running = [slot for slot in rows if slot is not None]
        batch = self._batch_bucket(len(rows))
        longest = max(slot.length for slot in running)
        self.steps += 1
        way = _sampling_of(running, learns=self.steps % LEARN_EVERY == 0)
        verify_len = self.num_drafts + 1 + max(self.tree_sizes, default=0)
        if self.policy is not None:
            verify_len = self.policy.choose(len(running), time.monotonic())
        is_tree = verify_len > self.num_drafts + 1
        num_keys = self._num_keys(longest + max(verify_len, self.num_drafts + 1) + 1)
        if self.drafter is not None and verify_len > 1:
            self.graphs.run(
                ("draft", batch, num_keys, way[:2], verify_len if is_tree else 0),
                lambda: self._draft(batch, num_keys, way, verify_len),
            )
        elif self.drafter is not None:
            self.graphs.run(("inject", batch, num_keys), lambda: self._inject(batch, num_keys))
        if is_tree:
            self.graphs.run(
                ("verify", batch, num_keys, way, verify_len),
                lambda: self._verify_tree(batch, num_keys, way, verify_len),
            )
        elif self.target.recurrent is not None:
            # A graph would not keep what the recurrent layers need to take tokens back.
            self._verify(batch, num_keys, way, verify_len)
        else:
            self.graphs.run(
                ("verify", batch, num_keys, way, verify_len),
                lambda: self._verify(batch, num_keys, way, verify_len),
            )
        outcomes = self.state.outcome[: len(rows)].tolist()
        # A row that is idle or has ended has no state to keep.
        self.target.advance(
            [
                accepted + 1 if slot is not None and code == FinishReason.NONE else 0
                for slot, (_, code, accepted, *_) in zip(rows, outcomes, strict=True)
            ]
        )
        if self.policy is not None:
            passed = [row for row, slot in zip(outcomes, rows, strict=True) if slot is not None]
            self._learn(verify_len, passed)
        drafts = (
            self.state.drafts[: len(rows), : verify_len - 1].tolist()
            if self.record_drafts
            else None
        )
        for row, outcome in enumerate(outcomes):
            slot = rows[row]
            if slot is None:
                continue
            if drafts is not None:
                slot.result.drafted.append(drafts[row])
            committed, code, accepted, *tokens = outcome
            slot.result.committed.append(committed)
            slot.result.accepted.append(accepted)
            if is_tree:
                slot.result.accepted_rows.append(self._path(outcome))
            slot.length += accepted + 1
            self._record(slot, tokens[:committed], code, on_tokens)
            if slot.result.finish_reason:
                rows[row] = None

    def _learn(self, verify_len: int, outcomes: list[list[int]]) -> None:
        """Take the outcomes of a step into what the policy expects."""
        beside = verify_len - self.num_drafts - 1
        if beside > 0:
            paths = [self._path(outcome) for outcome in outcomes]
            self.expected_tokens.observe_trees(beside, paths)
        else:
            self.expected_tokens.observe_chain(verify_len - 1, [outcome[2] for outcome in outcomes])

    def _path(self, outcome: list[int]) -> list[int]:
        """Accepted rows of a tree."""
        start = 3 + self.num_drafts + 2
        return outcome[start : start + outcome[2]]

    def _inject(self, batch: int, num_keys: int) -> None:
        """Inject the features that the last verification committed."""
        assert self.drafter is not None
        self.store.rows, self.store.num_keys = None, num_keys
        self.drafter.inject(self.state.features[:batch], self.state.feature_positions[:batch])

    def _draft(self, batch: int, num_keys: int, way: _Sampling, verify_len: int) -> None:
        """Inject the features that the last verification committed, then draft a block."""
        assert self.drafter is not None
        self._inject(batch, num_keys)
        anchors, positions = self.state.anchors[:batch], self.state.lengths[:batch]
        hidden = self.drafter.draft(anchors, positions)
        sampling = factors = None
        if not way.greedy and self.draft_sampling != "greedy":
            sampling = self.state.sampling_of(batch)
        if sampling is not None and self.draft_sampling == "auto":
            factors = self.acceptance.factors(sampling, self.state.seeded[:batch])
        proposal = self.drafter.propose(
            hidden,
            anchors,
            positions,
            sampling,
            factors,
            way.limited,
        )
        self.state.drafts[:batch] = proposal.tokens
        beside = verify_len - self.num_drafts - 1
        if beside > 0:
            temperature = None if way.greedy else self.state.sampling.temperature[:batch]
            tree = propose_tree(self.drafter, proposal, hidden, anchors, beside, temperature)
            self.state.keep_tree(tree)
        for name, probs in (("draft_probs", proposal.probs), ("own_probs", proposal.own_probs)):
            if probs is None:
                continue
            if getattr(self.state, name) is None:
                shape = self.max_batch, self.num_drafts, self.vocabulary
                setattr(self.state, name, probs.new_zeros(shape))
            getattr(self.state, name)[:batch] = self.drafter.target_probabilities(
                probs, self.vocabulary, proposal.candidates
            )

    def _verify(self, batch: int, num_keys: int, way: _Sampling, rows: int) -> None:
        """Run the target over anchors and the first drafts, accept, and advance every row.

        Args:
            batch: B.
            num_keys: slots that the pass looks at.
            way: how the requests sample.
            rows: of each request, the anchor's among them.
        """
        drafts = self.state.drafts[:batch, : rows - 1]
        tokens = torch.cat([self.state.anchors[:batch, None], drafts], dim=1)
        offsets = torch.arange(rows, device=self.device)
        positions = self.state.lengths[:batch, None] + offsets
        target_pass = TargetPass(self.target.kv, positions, num_keys)
        logits, features = self.target.forward(tokens, target_pass)
        if way.greedy:
            verdict = verify_greedy(drafts, logits.argmax(dim=-1))
        else:
            probs = probabilities(logits, self.state.sampling_of(batch), way.limited)
            verdict = self._verify_sampled(drafts, probs, way)
        self._advance(batch, verdict, features)

    def _verify_sampled(self, drafts: Tensor, probs: Tensor, way: _Sampling) -> Verdict:
        """Verify chains of requests that sample, and learn how drafts are best made.

        Args:
            drafts: int64 [B, n].
            probs: [B, n + 1, V], of the target.
            way: how the requests sample.
        """
        batch, count = drafts.shape
        sampling, positions = self.state.sampling_of(batch), self.state.lengths[:batch]
        draft_probs = self.state.draft_probs
        if draft_probs is not None:
            draft_probs = draft_probs[:batch, :count]
        verdict = verify(drafts, probs, draft_probs, sampling.seed, positions)
        if way.learns and self.state.own_probs is not None:
            self.acceptance.observe(
                sampling,
                probs[:, :-1],
                self.state.own_probs[:batch, :count],
                verdict.num_accepted,
                # An idle row stands at position 0.
                (positions > 0) & ~self.state.seeded[:batch],
            )
        return verdict

    def _verify_tree(self, batch: int, num_keys: int, way: _Sampling, rows: int) -> None:
        """Run the target over draft trees, walk down, and advance every row.

        Args:
            batch: B.
            num_keys: slots that the pass looks at.
            way: how the requests sample.
            rows: of each tree, the anchor's among them.
        """
        tree, lengths = self.state.tree_of(batch, rows), self.state.lengths[:batch]
        target_pass = TreePass(self.target.kv, tree, lengths, num_keys)
        # A row without a token is never reached.
        logits, features = self.target.forward(tree.tokens.clamp(min=0), target_pass)
        if way.greedy:
            verdict, path = walk(tree, logits.argmax(dim=-1), self.num_drafts)
        else:
            sampling, chain = self.state.sampling_of(batch), self.num_drafts + 1
            probs = probabilities(logits, sampling, way.limited)
            of_chain = self._verify_sampled(tree.tokens[:, 1:chain], probs[:, :chain], way)
            verdict, path = verify_tree_sampled(tree, of_chain, probs, sampling.seed, lengths)
        move_path(self.target.kv, path, lengths)
        if features is not None:
            index = path.clamp(min=0)[..., None].expand(-1, -1, features.shape[-1])
            features = features.gather(1, index)
        self.state.outcome[:batch, self.num_drafts + 4 :] = path
        self._advance(batch, verdict, features)

    def _advance(self, batch: int, verdict: Verdict, features: Tensor | None) -> None:
        """Commit what a pass accepted.

        Args:
            batch: B.
            verdict: of the pass.
            features: [B, rows, width], at the positions from the anchors on; rows that were not
                accepted are dropped.
        """
        rows = verdict.tokens.shape[1]
        offsets = torch.arange(rows, device=self.device)
        advance = verdict.num_accepted + 1
        committed, finished, reason = commit(
            verdict.tokens, advance, self.state.stops[:batch], self.state.remaining[:batch]
        )
        if features is not None:
            self.state.features[:batch, :rows] = features
            positions = self.state.lengths[:batch, None] + offsets
            kept = (offsets < advance[:, None]) & ~finished[:, None]
            self.state.feature_positions[:batch] = -1
            self.state.feature_positions[:batch, :rows] = torch.where(kept, positions, -1)
        self.state.anchors[:batch] = verdict.next_token
        # A finished row idles at position 0 until another request takes it.
        self.state.lengths[:batch] = torch.where(finished, 0, self.state.lengths[:batch] + advance)
        self.state.remaining[:batch] -= committed
        self.state.outcome[:batch, : rows + 3] = torch.cat(
            [
                torch.stack([committed, reason.long(), verdict.num_accepted], dim=1),
                verdict.tokens,
            ],
            dim=1,
        )

    def _record(
        self, slot: _Running, tokens: list[int], code: int, on_tokens: OnTokens | None
    ) -> None:
        slot.result.tokens.extend(tokens)
        if code != FinishReason.NONE:
            slot.result.finish_reason = FinishReason(code).name.lower()
        if on_tokens is not None:
            on_tokens(slot.index, tokens)

    def _compact(self, rows: list[_Running | None]) -> None:
        """Fill free rows from the end where that makes the next step's batch smaller."""
        count = sum(slot is not None for slot in rows)
        if count and self._batch_bucket(count) < self._batch_bucket(len(rows)):
            for row in range(count):
                if rows[row] is None:
                    source = max(i for i, slot in enumerate(rows) if slot is not None)
                    self._move_row(source, row)
                    rows[row], rows[source] = rows[source], None
        while rows and rows[-1] is None:
            rows.pop()

    def _move_row(self, source: int, destination: int) -> None:
        self.target.move_row(source, destination)
        if self.drafter is not None:
            self.store.kv.move_row(source, destination)
        self.state.move(source, destination)

    def _batch_bucket(self, size: int) -> int:
        """Batch that a step runs at: exact without graphs, a power of two with them."""
        if not self.graphs.enabled:
            return size
        return min(1 << (size - 1).bit_length(), self.max_batch)

    def _num_keys(self, needed: int) -> int:
        """Slots that a pass looks at, rounded up so that few graphs cover all lengths."""
        step = KEYS_STEP
        if self.graphs.enabled:
            step = max(256, 1 << (needed - 1).bit_length())
        return min(-(-needed // step) * step, self.target.kv.length)


def _sampling_of(slots: list[_Running], learns: bool = False) -> _Sampling:
    params = [slot.request.sampling for slot in slots]
    greedy = all(one.temperature == 0 for one in params)
    return _Sampling(greedy, is_limited(params), learns and not greedy)


def _default_stop_ids(model: PreTrainedModel) -> list[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def generate_timed(
    engine: Engine, requests: Sequence[Request], on_tokens: OnTokens | None = None
) -> tuple[list[Result], float]:
    """``engine.generate`` and its wall time in seconds, device work included."""
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    results = engine.generate(requests, on_tokens)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return results, time.perf_counter() - start
