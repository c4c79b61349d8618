"""Whether one way to draft accepts more than another, over the same blocks of the same texts."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dflash_plugin.doctor.acceptance import BlockAcceptance

# Share of τ - 1, and number of tokens, that a setting has to gain.
MATTERS, SMALLEST = 0.03, 0.03
# Share of τ - 1 that rounding, or a block that is shorter than it could be, may cost.
COSTLY = 0.15
# Chance of such a gain between settings that accept alike. A search tries some hundred settings, of
# which few are a gain: below SURE one is decided, below NEAR it may be one. NEARLY is the share of
# the needed gain from which on it may be one.
SURE, NEAR, NEARLY = 2e-4, 2e-3, 2 / 3
FLIPS = 20_000

Judgement = Literal["more", "undecided", "no more"]
ORDER: tuple[Judgement, ...] = ("no more", "undecided", "more")


class Gain(NamedTuple):
    """How many more drafts one setting accepts than another.

    Attributes:
        base_tau, tau: of the first and of the other setting.
        error: standard error of the difference.
        chance: probability of at least this gain if the two accepted alike.
    """

    base_tau: float
    tau: float
    error: float
    chance: float

    @property
    def tokens(self) -> float:
        """By how much the other setting's τ is higher."""
        return self.tau - self.base_tau

    def judged(self, matters: float = MATTERS) -> Judgement:
        """Whether the gain is beyond chance, and at least a share ``matters`` of τ - 1."""
        needed = max(matters * (self.base_tau - 1), SMALLEST)
        if self.chance < SURE and self.tokens >= needed:
            return "more"
        if self.chance < SURE or (self.chance < NEAR and self.tokens >= NEARLY * needed):
            return "undecided"
        return "no more"

    def reaches(self, share: float, smallest: float = SMALLEST) -> bool:
        """Whether a gain of this share of τ - 1 is within two standard errors."""
        return self.tokens + 2 * self.error >= max(share * (self.base_tau - 1), smallest)

    def __str__(self) -> str:
        return f"{self.tokens:+.2f} ± {2 * self.error:.2f}"


class Comparison(NamedTuple):
    """Acceptance of two settings over the blocks that both can be judged by.

    Attributes:
        accepted: gain of the drafts that are accepted.
        drawn: gain if the drafts were drawn from the drafter's probabilities instead, which varies
            less from block to block; None where these are not known.
        blocks: compared.
        same: every block accepts as many drafts with either.
        leading: gain of the drafts that both have, where the other setting has more of them; else
            None.
    """

    accepted: Gain
    drawn: Gain | None
    blocks: int
    same: bool
    leading: Gain | None = None

    @property
    def gain(self) -> float:
        """Tokens by which the other setting's τ is higher."""
        return self.accepted.tokens

    @property
    def error(self) -> float:
        """Standard error of the gain."""
        return self.accepted.error

    @property
    def chance(self) -> float:
        """Probability of such a gain, by the sharper of the two, if the settings accept alike."""
        return min(gain.chance for gain in self._gains())

    def judged(self, matters: float = MATTERS) -> Judgement:
        """Whether the other setting accepts more, beyond chance and by a share of τ - 1.

        A longer block may commit more whatever it was trained with, by its further drafts. Where
        these are all that it gains, they have to be worth ``COSTLY``.

        Args:
            matters: the share.
        """
        found = max((gain.judged(matters) for gain in self._gains()), key=ORDER.index)
        if self.leading is None or found == "no more":
            return found
        further = max((gain.judged(COSTLY) for gain in self._gains()), key=ORDER.index)
        if further == "undecided" and not self.accepted.reaches(COSTLY):
            further = "no more"
        alike = min(found, self.leading.judged(matters), key=ORDER.index)
        return max(alike, further, key=ORDER.index)

    @property
    def by_length(self) -> bool:
        """Whether the other setting drafts more, and is no better in what both draft."""
        return self.leading is not None and self.leading.judged() == "no more"

    def is_loss(self) -> bool:
        """Whether the other setting accepts less, by a standard error."""
        sharper = self.drawn or self.accepted
        return sharper.tokens + sharper.error < 0

    def may_gain(self, share: float) -> bool:
        """Whether a gain of this share of τ - 1 is within two standard errors."""
        return not self.same and self.accepted.reaches(share, 0.1)

    def _gains(self) -> list[Gain]:
        # Probabilities alone are no acceptance.
        return [self.accepted, *([self.drawn] if self.drawn and self.gain > 0 else [])]

    def __str__(self) -> str:
        chance = f"p {self.chance:.4f}" if self.chance >= SURE else f"p < {SURE}"
        sharper = min(self._gains(), key=lambda gain: gain.chance)
        drawn = "" if sharper is self.accepted else f"; were drafts drawn, {sharper}"
        length = ", by its further drafts alone" if self.by_length else ""
        return (
            f"τ from {self.accepted.base_tau:.2f} to {self.accepted.tau:.2f} ({self.accepted}, "
            f"{self.blocks} blocks{drawn}, {chance}){length}"
        )


def compare(other: BlockAcceptance, base: BlockAcceptance) -> Comparison:
    """Compare two settings block by block.

    Args:
        other, base: measured over the same blocks. Where one drafts more tokens, blocks with fewer
            tokens behind them in their text are left out.
    """
    drafts = [one.hits.shape[1] for one in (other, base)]
    keep = torch.ones(len(base.hits), dtype=torch.bool, device=base.hits.device)
    if base.room is not None and drafts[0] != drafts[1]:
        whole = base.room >= max(drafts)
        keep = whole if whole.any() else keep
    stretches = torch.arange(len(keep)) if base.stretches is None else base.stretches.cpu()
    stretches = stretches[keep.cpu()]
    drawn = leading = None
    if other.expected is not None and base.expected is not None:
        drawn = _gain(other.expected[keep], base.expected[keep], stretches)
    ours, theirs = other.runs[keep], base.runs[keep]
    if drafts[0] > drafts[1]:
        leading = _gain(ours.clamp(max=drafts[1]), theirs, stretches)
    return Comparison(
        _gain(ours, theirs, stretches), drawn, len(ours), bool((ours == theirs).all()), leading
    )


def _gain(ours: Tensor, theirs: Tensor, stretches: Tensor) -> Gain:
    """The gain of one number of drafts a block over another, both float [N].

    Neighboring blocks overlap and go together, so that the gains of a stretch of text are summed
    up. If the settings accept alike, each sum might as well have had the other sign.
    """
    gains = (ours - theirs).double().cpu()
    _, index = stretches.unique(return_inverse=True)
    count = int(index.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, gains)
    around = sums - torch.bincount(index, minlength=count) * gains.mean()
    error = around.square().sum().sqrt().item() / len(gains)
    return Gain(1 + theirs.mean().item(), 1 + ours.mean().item(), error, _chance(sums))


def _chance(sums: Tensor) -> float:
    total = sums.sum()
    if total <= 0:
        return 1.0
    reached = (_signs(len(sums)) @ sums.float() >= total.float() - 1e-4).sum().item()
    return (1 + reached) / (1 + FLIPS)


@cache
def _signs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (FLIPS, count), generator=generator).float() * 2 - 1
