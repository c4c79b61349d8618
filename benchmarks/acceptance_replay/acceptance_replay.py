"""A plugin for engines with made-up weights: acceptance and confidences come from recorded traces.

A trace (``tools/record_traces.py``) knows of every position of real texts how sure the drafter
was of each draft and how many stood. Each request of an engine walks through such a text: a pass
commits as many tokens as the trace says, or as were verified, and the draft pass is as sure as the
trace was there, so that confidence and outcome belong together. Tokens mean nothing. The prompt
decides the text and where in it a request begins, so that a request commits the same number of
tokens in every pass of whole blocks, in every engine and at every load.

Traces of short blocks are put together to longer ones: the block at a position, and behind its last
draft the block that begins there. Texts are drawn so that whole blocks commit ``REPLAY_TAU`` tokens
a pass, the easier a text the more often (weights exp(c · τ) of each text's own τ).

Environment: ``REPLAY_TRACES``, a file of traces; ``REPLAY_DRAFTS``, of the drafter's whole block,
whatever an engine makes of it; ``REPLAY_TAU``, also several with commas between: the first token
of a prompt tells which, counted from 0.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from dflash_plugin.kernels import with_twin
from dflash_plugin.kernels.language import tl, triton
from dflash_plugin.kernels.reference import MIN_CONFIDENCE

# Requests that a replay keeps apart, at most; a last row takes what padding writes.
SLOTS = 1024
# Texts are drawn ahead, which a captured pass cannot do.
DRAWN = 1 << 16
ANY_TOKEN = 1000


class Texts(NamedTuple):
    """Texts, as drawn; every ``period`` of them belong together.

    Attributes:
        right: int64 [positions], drafts that stand at each position.
        starts, ends: int64 [texts], the positions of each text.
        period: texts of one acceptance length.
        apart: texts between one and the one that follows it.
    """

    right: Tensor
    starts: Tensor
    ends: Tensor
    period: int
    apart: int


class Places(NamedTuple):
    """Where each request is; the last row takes what padding, of slot -1, writes.

    Attributes:
        place: int64 [slots], the position.
        end: int64 [slots], of the request's text.
        text: int64 [slots].
        begun: bool [slots], the request has verified drafts.
    """

    place: Tensor
    end: Tensor
    text: Tensor
    begun: Tensor


@triton.jit
def _kernel(
    slots,
    verified,
    right,
    starts,
    ends,
    places,
    place_ends,
    texts,
    begun,
    stood,
    requests,
    last,
    PERIOD: tl.constexpr,
    APART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lives = request < requests
    slot = tl.load(slots + request, mask=lives, other=-1)
    slot = tl.where(slot < 0, last, slot)
    count = tl.load(verified + request, mask=lives, other=0)
    place = tl.load(places + slot)
    found = tl.minimum(tl.load(right + place), count)
    steps = (tl.load(begun + slot) != 0) | (count > 0)
    tl.store(stood + request, found, mask=lives)
    tl.store(begun + slot, steps, mask=lives)
    place += tl.where(steps, found + 1, 0)
    done = place >= tl.load(place_ends + slot)
    text = tl.load(texts + slot)
    text = text - text % PERIOD + (text % PERIOD + tl.where(done, APART, 0)) % PERIOD
    tl.store(texts + slot, text, mask=lives)
    tl.store(places + slot, tl.where(done, tl.load(starts + text), place), mask=lives)
    tl.store(place_ends + slot, tl.load(ends + text), mask=lives)


@with_twin
def walk(slots: Tensor, verified: Tensor, texts: Texts, at: Places) -> Tensor:
    """Drafts int64 [B] that stand, of those verified, and step on; one launch.

    A request's first step begins where drafts are verified, so that it does not matter how an
    engine divides the prompt.

    Args:
        slots: int64 [B], of requests.
        verified: int64 [B].
        texts: what the requests walk through.
        at: where they are; it changes.
    """
    stood = torch.empty_like(verified)
    count = len(slots)
    block = min(128, triton.next_power_of_2(count))
    _kernel[(triton.cdiv(count, block),)](
        slots,
        verified,
        texts.right,
        texts.starts,
        texts.ends,
        at.place,
        at.end,
        at.text,
        at.begun,
        stood,
        count,
        len(at.place) - 1,
        PERIOD=texts.period,
        APART=texts.apart,
        BLOCK=block,
    )
    return stood


def walk_naive(slots: Tensor, verified: Tensor, texts: Texts, at: Places) -> Tensor:
    """``walk`` in PyTorch."""
    place = at.place[slots]
    stood = torch.minimum(texts.right[place], verified)
    steps = at.begun[slots] | (verified > 0)
    at.begun[slots] = steps
    place = place + (stood + 1) * steps
    done, text = place >= at.end[slots], at.text[slots]
    text = text - text % texts.period + (text % texts.period + done * texts.apart) % texts.period
    at.text[slots] = text
    at.place[slots] = torch.where(done, texts.starts[text], place)
    at.end[slots] = texts.ends[text]
    return stood


class Replay:
    """Where each request is in its text, on the device.

    Args:
        path: traces.
        drafts: K, of the engine's blocks.
        taus: tokens that a pass of whole blocks commits, over the texts as they are drawn; each has
            texts of its own.
        device: of the state.
    """

    def __init__(
        self, path: Path, drafts: int, taus: Sequence[float], device: torch.device
    ) -> None:
        from dflash_plugin.adaptive.simulation.traces import Traces

        traces = longer(Traces.load(path), drafts)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.cat(
            [
                torch.multinomial(
                    weights(traces, tau), DRAWN, replacement=True, generator=generator
                )
                for tau in taus
            ]
        )
        self.confidence = traces.confidence.float().to(device)
        starts, ends = (part[drawn].to(device) for part in (traces.starts[:-1], traces.starts[1:]))
        self.texts = Texts(traces.right.long().to(device), starts, ends, DRAWN, SLOTS + 1)
        # Texts do not begin together.
        share = torch.rand(len(drawn), generator=generator).to(device)
        self.begins = starts + (share * (ends - starts)).long()
        text = torch.arange(SLOTS + 1, device=device)
        begun = torch.zeros(SLOTS + 1, dtype=torch.bool, device=device)
        self.at = Places(self.begins[text].clone(), ends[text].clone(), text, begun)

    def begin(self, slots: Tensor, requests: Tensor) -> None:
        """Let slots walk through the texts of new requests.

        Args:
            slots: int64 [B].
            requests: int64 [B], at least 0, by which the requests are told apart; what is above
                ``DRAWN`` tells which of the texts' τ they follow.
        """
        drawn, at = requests % len(self.texts.starts), self.at
        at.text[slots] = drawn
        at.place[slots], at.end[slots] = self.begins[drawn], self.texts.ends[drawn]
        at.begun.index_fill_(0, slots, False)

    def commit(self, slots: Tensor, verified: Tensor) -> Tensor:
        """Drafts int64 [B] that stand, of those verified, and step on.

        Args:
            slots: int64 [B], of requests.
            verified: int64 [B].
        """
        return walk(slots, verified, self.texts, self.at)

    def confidences(self, slots: Tensor, places: Tensor) -> Tensor:
        """Log-odds float32 [T] of drafts at places [T] of the blocks of slots [T]."""
        return self.confidence[self.at.place[slots], places]


def longer(traces: Any, drafts: int) -> Any:
    """Traces of blocks of ``drafts`` drafts, made of shorter ones behind each other."""
    count, size = traces.num_drafts, len(traces.right)
    lengths = traces.starts[1:] - traces.starts[:-1]
    end = torch.repeat_interleave(traces.starts[1:], lengths)
    confidence = torch.full((size, drafts), MIN_CONFIDENCE)
    right, stands = torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool)
    for first in range(0, drafts, count):
        place = torch.arange(size) + first
        inside = place < end
        place, part = place.clamp(max=size - 1), min(count, drafts - first)
        sure = traces.confidence[place, :part].float()
        confidence[:, first : first + part] = torch.where(inside[:, None], sure, MIN_CONFIDENCE)
        here = torch.where(inside & stands, traces.right[place], 0).clamp(max=part)
        right, stands = right + here, stands & (here == part)
    return type(traces)(confidence, right, traces.starts)


def weights(traces: Any, tau: float) -> Tensor:
    """How often each text is drawn [R], so that all of them together commit ``tau`` a pass.

    Raises:
        ValueError: no weights do.
    """
    length = (traces.starts[1:] - traces.starts[:-1]).double()
    steps = torch.tensor(traces.passes()).double()

    def drawn(c: float) -> Tensor:
        return torch.softmax(c * length / steps, dim=0)

    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        chance = drawn(middle)
        found = float((chance * length).sum() / (chance * steps).sum())
        low, high = (middle, high) if found < tau else (low, middle)
    if abs(found - tau) > 0.01:
        raise ValueError(
            f"REPLAY_TAU is {tau}, which these texts do not reach: the most is {found}"
        )
    return drawn((low + high) / 2)


def settings(traces: Path, drafts: int, taus: Sequence[float]) -> dict[str, str]:
    """Environment of an engine's process."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "REPLAY_TRACES": str(traces.resolve()),
        "REPLAY_DRAFTS": str(drafts),
        "REPLAY_TAU": ",".join(map(str, taus)),
        # That it is above zero lets SGLang ask.
        "SGLANG_SIMULATE_ACC_LEN": str(taus[0]),
    }


_replays: list[Replay] = []


def request_of(prompt: Sequence[int]) -> int:
    """What ``Replay.begin`` tells a prompt's request by."""
    several = "," in os.environ["REPLAY_TAU"]
    return crc32(array("q", prompt).tobytes()) % DRAWN + DRAWN * (prompt[0] if several else 0)


def without_waiting(numbers: list[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device, which the host does not wait for."""
    on_host = torch.tensor(numbers, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def replay_on(device: torch.device) -> Replay:
    """This process's, made once, as the environment asks."""
    if not _replays:
        path = Path(os.environ["REPLAY_TRACES"])
        taus = [float(tau) for tau in os.environ["REPLAY_TAU"].split(",")]
        _replays.append(Replay(path, int(os.environ["REPLAY_DRAFTS"]), taus, device))
    return _replays[0]


def put(found: Tensor, places: Tensor, out: Tensor) -> None:
    """Write what was found for each draft, block by block, into the block's row.

    Args:
        found: [N].
        places: int64 [N], of each draft in its block, from 0 on.
        out: [B, K]; blocks may have fewer drafts than K.
    """
    out[(places == 0).cumsum(dim=0) - 1, places] = found


def into_vllm() -> None:
    """Acceptance after the rejection sampler, confidences after the estimator's own work."""
    from dflash_plugin.serving.after_import import after_import

    def sampler(module: Any) -> None:
        native = module.rejection_sample

        def rejection_sample(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            starts, slots = args[2], args[4]
            sampled, count = native(logits, *args, **kwargs)
            verified = (starts[1:] - starts[:-1] - 1).long()
            count.copy_(replay_on(logits.device).commit(slots, verified) + 1)
            return sampled.fill_(ANY_TOKEN), count

        module.rejection_sample = rejection_sample

    def sure(estimator: Any, slots: Tensor, places: Tensor) -> Tensor:
        feature = replay_on(slots.device).confidences(slots, places)
        chance = torch.sigmoid(estimator.slope * feature + estimator.intercepts[places])
        estimator.features[slots, places] = feature
        estimator.predictions[slots, places] = chance
        return chance

    def estimating(module: Any) -> None:
        native = module.OnlineAcceptanceEstimator

        class Estimator(native):
            """Padding's slot is -1, the last row, which here is no request's."""

            def __init__(self, size: int, *args: Any, **kwargs: Any) -> None:
                super().__init__(size + 1, *args, **kwargs)
                replay_on(self.device)
                Estimator.latest = self

            def predict(
                self, logits: Tensor, slots: Tensor, places: Tensor, chances: Tensor, heat: Tensor
            ) -> None:
                super().predict(logits, slots, places, chances, heat)
                places = places.long()
                put(sure(self, slots, places), places, chances)

        module.OnlineAcceptanceEstimator = Estimator
        from dflash_plugin.kernels import predict_acceptance as ours

        own = ours.predict_acceptance

        def predict_acceptance(*args: Any) -> None:
            own(*args)
            sure(Estimator.latest, args[2], args[3].long())

        ours.predict_acceptance = predict_acceptance

    def states(module: Any) -> None:
        native = module.RequestState.add_request

        def add_request(
            self: Any, req_id: str, prompt_len: int, all_token_ids: list[int], *args: Any, **kw: Any
        ) -> Any:
            found = native(self, req_id, prompt_len, all_token_ids, *args, **kw)
            # A preempted request goes on in its text from the beginning.
            request, slot = request_of(all_token_ids[:prompt_len]), self.req_id_to_index[req_id]
            place = without_waiting([slot, request], self.device)
            replay_on(self.device).begin(place[:1], place[1:])
            return found

        module.RequestState.add_request = add_request

    place = "vllm.v1.worker.gpu.spec_decode."
    after_import("vllm.v1.worker.gpu.states", states)
    after_import(f"{place}rejection_sampler", sampler)
    after_import(f"{place}acceptance_estimator", estimating)


def into_sglang() -> None:
    """In the place of SGLang's forced acceptance; set ``SGLANG_SIMULATE_ACC_LEN`` beside.

    Confidences are put in before a pass, and not by its captured draft pass.
    """
    from dflash_plugin.serving.after_import import after_import

    def worker(module: Any) -> None:
        state: dict[str, Any] = {}
        native = module.DFlashWorkerV2.forward_batch_generation

        def forward(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            slots = state["slots"] = batch.req_pool_indices.long()
            if batch.forward_mode.is_extend():
                prompts = [request_of(request.origin_input_ids) for request in batch.reqs]
                replay_on(slots.device).begin(slots, without_waiting(prompts, slots.device))
            verifier = getattr(self, "verifier", None)
            state["drafted"] = getattr(self, "draft_len", self.block_size)
            if verifier is not None and not batch.forward_mode.is_extend():
                sure(verifier.predictor, slots)
                if verifier.running_short is not None:
                    verifier.predictor.leave_out(len(slots), verifier.draft_len - 1)
            return native(self, batch, *args, **kwargs)

        def accept(
            *,
            candidates: Tensor,
            accept_len: Tensor,
            commit_lens: Tensor,
            bonus: Tensor,
            out_tokens: Tensor,
            **_: Any,
        ) -> None:
            slots = state["slots"]
            verified = (candidates[:, 1 : state["drafted"]] >= 0).sum(dim=1)
            stood = replay_on(candidates.device).commit(slots, verified)
            accept_len.copy_(stood)
            commit_lens.copy_(stood + 1)
            bonus.fill_(ANY_TOKEN)
            out_tokens.fill_(ANY_TOKEN)

        module.DFlashWorkerV2.forward_batch_generation = forward
        module.apply_dflash_simulated_acceptance = accept

    def sure(chances: Any, slots: Tensor) -> None:
        # Few launches: the engines' own drafters do this inside a captured pass.
        replay, count = replay_on(slots.device), len(slots)
        confidences = chances.confidences[:count]
        torch.index_select(
            replay.confidence, 0, replay.at.place.index_select(0, slots), out=confidences
        )
        slope, offsets, _ = chances.model.state
        torch.sigmoid(torch.addcmul(offsets, confidences, slope), out=chances.predictions[:count])

    def estimating(module: Any) -> None:
        def predict(self: Any, *_: Any) -> None:
            """The draft pass's own confidences mean nothing."""

        module.AcceptancePredictor.predict = predict

    after_import("sglang.srt.speculative.dflash_worker_v2", worker)
    after_import("dflash_plugin.sglang.acceptance_probs", estimating)
