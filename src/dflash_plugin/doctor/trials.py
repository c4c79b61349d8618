"""Runs a drafter under other settings than the checkpoint's, over the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dflash_plugin.doctor.acceptance import BlockAcceptance, measure, with_config
from dflash_plugin.doctor.comparison import Comparison, Judgement, compare
from dflash_plugin.doctor.known_blocks import KnownBlocks
from dflash_plugin.doctor.texts import Texts
from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.model import Drafter

# Share of the texts by which a setting is dropped that is clearly no gain, and fewest of them.
FEW_SHARE, FEWEST = 3, 4
# Chance below which a gain among few tokens is looked at among all.
WORTH_A_LOOK = 0.05
Tell = Callable[[str], None]


class Setting(NamedTuple):
    """A way to run the drafter.

    Attributes:
        label: what is other than the checkpoint says.
        config: with that.
        fix: how to make it so.
        rank: 0 is a usual mistake; of settings that accept alike the lowest rank is the cause.
    """

    label: str
    config: DrafterConfig
    fix: str
    rank: int = 1


class Tried(NamedTuple):
    """What became of a setting.

    Attributes:
        setting: it.
        compared: with the checkpoint's settings; the last and most exact comparison.
        acceptance: over all tokens; None where few tokens or few texts told enough.
        agree: known drafts that agree; None where the checkpoint's own settings give them all.
        restores: whether it gives the known answers and the checkpoint's settings do not.
    """

    setting: Setting
    compared: Comparison | None = None
    acceptance: BlockAcceptance | None = None
    agree: int | None = None
    restores: bool = False

    @property
    def judgement(self) -> Judgement:
        """Whether it accepts more; only what was measured over all tokens can."""
        if self.compared is None or self.acceptance is None:
            return "no more"
        return self.compared.judged()


class Search(NamedTuple):
    """The settings of one check.

    Attributes:
        name, looked_at: of the check.
        settings: to try; those that equal the checkpoint's are left out.
        well: what the checkpoint says, with which the finding begins where none is better.
        finer: settings to try next, by what became of the first ones.
        blind: what cannot be told from these texts.
    """

    name: str
    looked_at: str
    settings: Sequence[Setting]
    well: str
    finer: Callable[[Sequence[Tried]], Sequence[Setting]] | None = None
    blind: Sequence[str] = ()


class Trials:
    """Tries settings of a drafter over the same blocks.

    A setting is compared on a part of the texts first, with drafts chosen among the texts' tokens,
    then on all texts, and what looks like a gain among all tokens.

    Args:
        drafter: as it is configured, bound to the target of ``texts``.
        texts: greedy texts of the target.
        known: the checkpoint's known answers, if it has any.
    """

    def __init__(self, drafter: Drafter, texts: Texts, known: KnownBlocks | None) -> None:
        self.drafter = drafter
        self.texts = texts
        self.known = known
        tokens = [texts.batch.tokens, *([known.texts.batch.tokens] if known else [])]
        self.tokens: Tensor = torch.cat([each.flatten() for each in tokens]).unique()
        count = len(texts.sequences)
        few = max(FEWEST, count // FEW_SHARE)
        self.parts = [texts.first(few), texts] if few < count else [texts]
        self.base = measure(drafter, texts)
        self._bases = [measure(drafter, part, among=self.tokens) for part in self.parts]
        self._with_one: tuple[DrafterConfig, BlockAcceptance] | None = None
        self.by_record = known is not None and not known.agreement(drafter).whole

    def distinct(self, settings: Iterable[Setting], tried: Iterable[Tried] = ()) -> list[Setting]:
        """Settings that are neither the checkpoint's nor among each other or the tried ones."""
        found: list[Setting] = []
        seen = [self.drafter.config, *(each.setting.config for each in tried)]
        for setting in settings:
            if setting.config not in seen:
                seen.append(setting.config)
                found.append(setting)
        return found

    def by_known_answers(self, setting: Setting) -> Tried:
        """Try a setting on the known answers, which the checkpoint's settings do not give."""
        assert self.known is not None
        drafter = with_config(self.drafter, setting.config)
        found = self.known.agreement(drafter, self.tokens)
        if not (found.whole and self.known.agreement(drafter).whole):
            return Tried(setting, agree=found.right)
        acceptance = measure(drafter, self.texts)
        compared = compare(acceptance, self.base)
        return Tried(setting, compared, acceptance, found.right, restores=True)

    def by_acceptance(self, setting: Setting) -> Tried:
        """Try a setting on the texts."""
        drafter = with_config(self.drafter, setting.config)
        compared = None
        for part, base in zip(self.parts, self._bases, strict=True):
            compared = compare(measure(drafter, part, among=self.tokens), base)
            if compared.is_loss():
                return Tried(setting, compared)
        assert compared is not None
        if compared.chance > WORTH_A_LOOK:
            return Tried(setting, compared)
        acceptance = measure(drafter, self.texts)
        return Tried(setting, compare(acceptance, self.base), acceptance)

    def on_top(self, one: Setting, other: Setting) -> Comparison:
        """What ``other`` adds where ``one`` is set already."""
        changed = {
            field: getattr(other.config, field)
            for field in type(other.config).model_fields
            if getattr(other.config, field) != getattr(self.drafter.config, field)
        }
        both = one.config.model_copy(update=changed)
        if self._with_one is None or self._with_one[0] != one.config:
            self._with_one = one.config, self._few_tokens(one.config)
        return compare(self._few_tokens(both), self._with_one[1])

    def _few_tokens(self, config: DrafterConfig) -> BlockAcceptance:
        return measure(with_config(self.drafter, config), self.texts, among=self.tokens)
