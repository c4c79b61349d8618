"""Block sizes that may have been meant, and the number of speculative tokens."""

from __future__ import annotations

from pathlib import Path

from dflash_plugin.doctor.acceptance import measure, shortened
from dflash_plugin.doctor.comparison import COSTLY, compare
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.trials import Search, Setting, Trials

POWERS = (2, 4, 8, 16, 32)
# Sizes above and below the checkpoint's.
NEIGHBORS = (-2, -1, 1, 2)
# Share of the blocks that must have as many tokens behind them as a block drafts.
ENOUGH = 1 / 3


def block_sizes(trials: Trials) -> list[int]:
    """Sizes to try, as far as the texts can tell them."""
    config = trials.drafter.config
    anchor_rows = config.block_size - config.num_draft_tokens
    room = trials.base.room
    assert room is not None
    largest = int(room.float().quantile(1 - ENOUGH)) + anchor_rows
    sizes = {*POWERS, *(config.block_size + step for step in NEIGHBORS)}
    if trials.known is not None:
        sizes.add(len(trials.known.record.answers[0].drafts) + anchor_rows)
    smallest = config.convolution.kernel_size if config.convolution else 2
    return sorted(size for size in sizes if smallest <= size <= largest)


def search_block(trials: Trials, directory: Path) -> Search:
    """Another block size than in training."""
    config = trials.drafter.config
    sizes = block_sizes(trials)
    settings = [
        Setting(
            f"block size {size} instead of {config.block_size}",
            config.model_copy(update={"block_size": size}),
            f"set block_size to {size} in {directory / 'config.json'}",
            0 if size in POWERS else 2,
        )
        for size in sizes
    ]
    return Search(
        "block size",
        f"block size {config.block_size} ({config.num_draft_tokens} drafts) against "
        f"{', '.join(str(size) for size in sizes if size != config.block_size)}",
        settings,
        str(config.block_size),
        blind=[f"block sizes above {max([*sizes, config.block_size])}"],
    )


def search_anchor(trials: Trials, directory: Path) -> Search:
    """The anchor's row predicts a token, or does not."""
    config = trials.drafter.config
    own, path = config.sample_from_anchor, directory / "config.json"
    text = "true" if own else "false"
    other = "false" if own else "true"
    settings = [
        Setting(
            f"sample_from_anchor {other} instead of {text}",
            config.model_copy(update={"sample_from_anchor": not own}),
            f"set sample_from_anchor to {other} in {path}",
        )
    ]
    return Search(
        "anchor",
        f"sample_from_anchor {text} against {other}",
        [] if config.selector is not None else settings,
        f"sample_from_anchor {text}",
    )


def with_requested(trials: Trials, found: Check, requested: int | None) -> Check:
    """The check of the block size, and what the requested number of speculative tokens costs.

    Args:
        trials: of the drafter.
        found: by ``search_block``.
        requested: what the engine is told, or None.
    """
    config = trials.drafter.config
    drafts = config.num_draft_tokens
    if requested is None or requested == drafts:
        return found
    found.looked_at += f", with {requested} speculative tokens"
    if requested > drafts:
        return found.fault(
            f"{requested} speculative tokens are asked for but a block of {config.block_size} "
            f"drafts {drafts}",
            f"--num-speculative-tokens {drafts} (SGLang: --speculative-num-draft-tokens "
            f"{drafts + 1})",
            Certainty.SURE,
            evidence={**found.evidence, "requested": requested, "drafts": drafts},
        )
    return found if found.status == "fault" else _shortened(trials, found, requested)


def _shortened(trials: Trials, found: Check, requested: int) -> Check:
    """What a block costs that is cut to fewer drafts than it was trained with."""
    config = trials.drafter.config
    cut, whole = measure(shortened(trials.drafter, requested), trials.texts), trials.base
    found.evidence["tau_by_drafts"] = {
        requested: round(cut.tau, 3),
        config.num_draft_tokens: round(whole.tau, 3),
    }
    compared = compare(whole, cut)
    finding = (
        f"blocks cut to {requested} of {config.num_draft_tokens} drafts: τ {cut.tau:.2f} instead "
        f"of {whole.tau:.2f}"
    )
    if compared.judged(COSTLY) != "more":
        close = compared.judged(COSTLY) == "undecided"
        return found.note(f"{finding}{', close to what counts as a fault' if close else ''}")
    return found.fault(
        finding,
        f"--num-speculative-tokens {config.num_draft_tokens} (SGLang: "
        f"--speculative-num-draft-tokens {config.num_draft_tokens + 1}), and adaptive "
        "verification (docs/adaptive.md) where verifying all of them does not pay",
        Certainty.MEASURED,
        compared.gain,
    )
