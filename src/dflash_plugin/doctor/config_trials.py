"""Checks that try other settings than the checkpoint's, and keep those that raise acceptance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from dflash_plugin.checkpoints.dialects import DIALECTS, read_config
from dflash_plugin.checkpoints.dialects.rope import read_rope
from dflash_plugin.checkpoints.io import Checkpoint, expected_tensors
from dflash_plugin.doctor.acceptance import (
    STRIDE,
    KnownBlocks,
    far_above,
    measure,
    shortened,
    with_config,
)
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.texts import Texts
from dflash_plugin.drafter.config import DrafterConfig, LayerAttention, RopeConfig, spread_layers
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError

THETAS = (1e4, 1e5, 5e5, 1e6, 5e6, 1e7)
BLOCK_SIZES = (4, 8, 10, 16, 32)
MASK_TOKENS = 32


class Setting(NamedTuple):
    """A way to run the drafter.

    Attributes:
        label: what is other than the checkpoint says.
        config: with that.
        fix: how to make it so.
    """

    label: str
    config: DrafterConfig
    fix: str


class Tried(NamedTuple):
    """What became of a setting.

    Attributes:
        setting: it.
        score: known drafts that agree where the checkpoint's own settings do not give the known
            answers; else τ where drafts are chosen among the texts' tokens.
        restores: whether it gives the known answers and the checkpoint's settings do not.
    """

    setting: Setting
    score: float
    restores: bool


class Trials:
    """Tries settings of a drafter over the same blocks.

    Every one is screened by a cheap score, and the best of a check by acceptance over all tokens.

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
        self.base = measure(drafter, texts)
        self.by_record = known is not None and not known.agreement(drafter).whole
        self.screened = self._score(drafter, None)[0]

    def check(
        self, name: str, looked_at: str, settings: Iterable[Setting], well: str, cap: bool = False
    ) -> Check:
        """Find a setting that is the right one.

        It is, if it gives the known answers and the checkpoint's does not, or if it raises
        acceptance beyond chance and by much.

        Args:
            name, looked_at: of the check.
            settings: to try; those that equal the checkpoint's are left out.
            well: the finding where none is better.
            cap: count no more drafts than the checkpoint's block has.
        """
        drafts = self.drafter.config.num_draft_tokens if cap else None
        tried = [self._try(setting, drafts) for setting in self._distinct(settings)]
        evidence: dict[str, Any] = {
            "tau": round(self.base.tau, 3),
            "screened_by": "known drafts that agree" if self.by_record else "τ among few tokens",
            "screened": {
                "as configured": round(self.screened, 3),
                **{each.setting.label: round(each.score, 3) for each in tried},
            },
        }
        restoring = [each for each in tried if each.restores]
        best = max(restoring or tried, key=lambda each: each.score, default=None)
        fine = Check(name=name, status="ok", looked_at=looked_at, finding=well, evidence=evidence)
        if best is None or not (best.restores or best.score > self.screened):
            return fine
        drafter = with_config(self.drafter, best.setting.config)
        restores = best.restores and self.known is not None and self.known.agreement(drafter).whole
        acceptance = measure(drafter, self.texts)
        if drafts is not None:
            acceptance = acceptance.first(drafts)
        fine.evidence["tau_with"] = {best.setting.label: round(acceptance.tau, 3)}
        if not (restores or far_above(acceptance, self.base)):
            return fine
        proof = " and gives the known answers" if restores else ""
        return fine.fault(
            f"{best.setting.label} takes τ from {self.base.tau:.2f} to {acceptance.tau:.2f}{proof}",
            best.setting.fix,
            Certainty.SURE if restores else Certainty.MEASURED,
            acceptance.tau - self.base.tau,
        )

    def _distinct(self, settings: Iterable[Setting]) -> list[Setting]:
        found: list[Setting] = []
        seen = [self.drafter.config]
        for setting in settings:
            if setting.config not in seen:
                seen.append(setting.config)
                found.append(setting)
        return found

    def _try(self, setting: Setting, drafts: int | None) -> Tried:
        return Tried(setting, *self._score(with_config(self.drafter, setting.config), drafts))

    def _score(self, drafter: Drafter, drafts: int | None) -> tuple[float, bool]:
        """The score, and whether the known answers are there, as far as few tokens tell."""
        if self.known is not None and self.by_record:
            found = self.known.agreement(drafter, self.tokens)
            return float(found.right), found.whole
        accepted = measure(drafter, self.texts, 2 * STRIDE, self.tokens)
        return (accepted if drafts is None else accepted.first(drafts)).tau, False


def shifted(config: DrafterConfig, num_layers: int) -> list[tuple[int, ...]]:
    """Target layer ids that may have been meant: each one lower, each one higher, the default."""
    ids = config.target_layer_ids
    found = [tuple(i + step for i in ids) for step in (-1, 1)]
    if num_layers > 4 and len(ids) > 1:
        found.append(spread_layers(num_layers, len(ids)))
    return [
        each
        for each in found
        if min(each) >= -1 and max(each) < num_layers and len(set(each)) == len(ids)
    ]


def orders(ids: Sequence[int]) -> list[tuple[int, ...]]:
    """Orders in which the features may have been meant: all of up to three, else likely ones."""
    if len(ids) <= 3:
        return list(permutations(ids))
    found = [tuple(sorted(ids)), tuple(reversed(ids))]
    found += [(*ids[first:], *ids[:first]) for first in range(1, len(ids))]
    for one, other in combinations(range(len(ids)), 2):
        swapped = list(ids)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        found.append(tuple(swapped))
    return found


def check_layers(trials: Trials, directory: Path) -> Check:
    """Target layers one too low or too high."""
    config = trials.drafter.config
    num_layers = trials.texts.target.config.get_text_config().num_hidden_layers
    return trials.check(
        "target layers",
        f"target layers {list(config.target_layer_ids)} against every id one lower and one higher "
        "and the default spread",
        [_with_layers(config, ids, directory) for ids in shifted(config, num_layers)],
        f"{list(config.target_layer_ids)} are right: no shift is better",
    )


def check_order(trials: Trials, directory: Path) -> Check:
    """Features in another order than ``fc`` expects."""
    config = trials.drafter.config
    return trials.check(
        "feature order",
        f"the order {list(config.target_layer_ids)} in which fc reads features, against others",
        [_with_layers(config, ids, directory) for ids in orders(config.target_layer_ids)],
        "no other order is better",
    )


def _with_layers(config: DrafterConfig, ids: tuple[int, ...], directory: Path) -> Setting:
    written = [i + 1 for i in ids] if config.dialect == "speculators" else list(ids)
    key = "aux_hidden_state_layer_ids" if config.dialect == "speculators" else "target_layer_ids"
    return Setting(
        f"reading target layers {list(ids)} instead of {list(config.target_layer_ids)}",
        config.model_copy(update={"target_layer_ids": ids}),
        f"set {key} to {written} in {directory / 'config.json'}",
    )


def mask_tokens(tokenizer: Any, embedding: Tensor) -> dict[int, str]:
    """Tokens that may stand for "to be drafted", by id; those with equal embeddings once."""
    roles = ("mask_token", "pad_token", "unk_token", "bos_token", "eos_token")
    named = [getattr(tokenizer, role, None) for role in roles]
    words = [str(word) for word in named if word] + list(tokenizer.get_added_vocab())
    found: dict[int, str] = {}
    for word in words[:MASK_TOKENS]:
        token = tokenizer.convert_tokens_to_ids(word)
        if isinstance(token, int) and 0 <= token < embedding.shape[0]:
            found.setdefault(token, word)
    if not found:
        return found
    rows = embedding[torch.tensor(list(found), device=embedding.device)]
    _, groups = rows.unique(dim=0, return_inverse=True)
    first: dict[int, int] = {}
    for group, token in zip(groups.tolist(), found, strict=True):
        first.setdefault(group, token)
    return {token: found[token] for token in first.values()}


def check_mask(trials: Trials, tokenizer: Any, directory: Path) -> Check:
    """Another token than the one that stood for "to be drafted" in training."""
    config = trials.drafter.config
    looked_at = f"mask token {config.mask_token_id} against the tokenizer's special tokens"
    if config.own_mask_embedding:
        return Check(
            name="mask token",
            status="ok",
            looked_at=looked_at,
            finding="the checkpoint carries the mask's embedding, so that no token is looked up",
        )
    embedding = trials.texts.target.get_input_embeddings().weight
    settings = [
        Setting(
            f"mask token {token} {word!r} instead of {config.mask_token_id}",
            config.model_copy(update={"mask_token_id": token}),
            f"set mask_token_id to {token} in {directory / 'config.json'}",
        )
        for token, word in mask_tokens(tokenizer, embedding).items()
    ]
    return trials.check(
        "mask token", looked_at, settings, f"{config.mask_token_id} is right: no other is better"
    )


def check_rope(trials: Trials, directory: Path) -> Check:
    """Rotation with another base, scaling or pairing than in training."""
    config = trials.drafter.config
    own = config.rope
    target = target_rope(trials.texts.target)
    plain = {"type": "default", "parameters": {}}
    changes: list[tuple[str, dict[str, Any], str]] = []
    if target is not None:
        changes.append(
            (
                f"the target's rotation (theta {target.theta:g}, {target.type})",
                {"theta": target.theta, "type": target.type, "parameters": target.parameters},
                f"set rope_theta to {target.theta:g} and rope_scaling as in the target's",
            )
        )
    changes += [
        (f"rope theta {theta:g} instead of {own.theta:g}", {"theta": theta},
         f"set rope_theta to {theta:g}")
        for theta in THETAS
    ]  # fmt: skip
    changes += [
        ("rope without scaling", plain, "remove rope_scaling"),
        (
            f"{'NeoX' if own.interleaved else 'interleaved'} rotation",
            {"interleaved": not own.interleaved},
            f"set is_neox_style to {'true' if own.interleaved else 'false'}",
        ),
    ]
    settings = [
        Setting(
            label,
            config.model_copy(update={"rope": own.model_copy(update=change)}),
            f"{fix} in {directory / 'config.json'}",
        )
        for label, change, fix in changes
    ]
    found = trials.check(
        "rope",
        f"theta {own.theta:g}, type {own.type}, {'interleaved' if own.interleaved else 'NeoX'} "
        "against the target's and common values",
        settings,
        "no other rotation is better",
    )
    if target is not None:
        found.evidence["target"] = {"theta": target.theta, "type": target.type}
    return found


def target_rope(target: Any) -> RopeConfig | None:
    """The target's rotation, where a drafter can have such a one."""
    text = target.config.get_text_config()
    try:
        return RopeConfig(**read_rope(text.to_dict(), default_theta=10000.0))
    except (DFlashError, ValidationError):
        return None


def check_attention(trials: Trials, directory: Path) -> Check:
    """A window that is too small, or causality unlike training."""
    config = trials.drafter.config
    text = trials.texts.target.config.get_text_config()
    length = int(trials.texts.batch.lengths.max())
    windows = {layer.sliding_window for layer in config.layers}
    shown = ", ".join(f"window {w}" if w else "full" for w in sorted(windows, key=lambda w: w or 0))

    def layers(**change: Any) -> DrafterConfig:
        changed = tuple(layer.model_copy(update=change) for layer in config.layers)
        return config.model_copy(update={"layers": changed})

    flipped = tuple(
        LayerAttention(sliding_window=layer.sliding_window, causal=not layer.causal)
        for layer in config.layers
    )
    path = directory / "config.json"
    settings = [
        Setting(
            f"no window instead of {shown}",
            layers(sliding_window=None),
            f"set sliding_window to what the drafter was trained with in {path}: more than "
            f"{max((w or 0) for w in windows)}, or layer_types to full_attention",
        ),
        Setting(
            "the other causality in every layer",
            config.model_copy(update={"layers": flipped}),
            f"set is_causal to {'false' if config.layers[0].causal else 'true'} in {path}",
        ),
    ]
    window = getattr(text, "sliding_window", None)
    if window:
        settings.append(
            Setting(
                f"the target's window of {window} in every layer",
                layers(sliding_window=window),
                f"set sliding_window to {window} and layer_types to sliding_attention in {path}",
            )
        )
    other = "anchor" if config.window_from == "query" else "query"
    if any(windows):
        settings.append(
            Setting(
                f"a window that counts from the {other}",
                config.model_copy(update={"window_from": other}),
                "convert the checkpoint to the dialect that it was trained in",
            )
        )
    found = trials.check(
        "window and causality",
        f"{shown}, {'causal' if config.layers[0].causal else 'not causal'}, against no window, the "
        "target's window and the other causality",
        settings,
        "no other attention is better",
    )
    longer = [w for w in windows if w and w >= length]
    if longer and found.status == "ok":
        found.finding += f"; texts of {length} tokens cannot tell about a window of {longer[0]}"
    return found


def check_dialect(trials: Trials, checkpoint: Checkpoint) -> Check:
    """A file that means something else when it is read as another dialect."""
    config = trials.drafter.config
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    settings = []
    for dialect in DIALECTS:
        try:
            other = read_config(checkpoint.raw, shapes, dialect)
        except DFlashError:
            continue
        other = other.model_copy(update={"dialect": config.dialect, "dtype": config.dtype})
        if expected_tensors(other) == expected_tensors(config):
            settings.append(
                Setting(
                    f"reading config.json as {dialect} instead of {config.dialect}",
                    other,
                    f"dflash-plugin convert {checkpoint.directory} FIXED --to {dialect} --dialect "
                    f"{dialect}, or serve it with the plugin's option dialect: {dialect}",
                )
            )
    return trials.check(
        "dialect",
        f"config.json read as {config.dialect}, against every other dialect that can read it",
        settings,
        f"{config.dialect} is right: no other reading is better",
    )


def check_block(trials: Trials, requested: int | None, directory: Path) -> Check:
    """Another block size than in training, or another number of speculative tokens."""
    config = trials.drafter.config
    drafts = config.num_draft_tokens
    looked_at = f"block size {config.block_size} ({drafts} drafts)"
    if requested is not None:
        looked_at += f" with {requested} speculative tokens"
    if requested is not None and requested > drafts:
        return Check(
            name="block size",
            status="fault",
            looked_at=looked_at,
            finding=f"{requested} speculative tokens are asked for but a block of "
            f"{config.block_size} drafts {drafts}",
            evidence={"requested": requested, "drafts": drafts},
            fix=f"--num-speculative-tokens {drafts} (SGLang: --speculative-num-draft-tokens "
            f"{drafts + 1})",
            certainty=Certainty.SURE,
        )
    anchor_rows = config.block_size - drafts
    sizes = set(BLOCK_SIZES)
    if trials.known is not None:
        sizes.add(len(trials.known.record.answers[0].drafts) + anchor_rows)
    smaller, larger = (
        [
            Setting(
                f"block size {size} instead of {config.block_size}",
                config.model_copy(update={"block_size": size}),
                f"set block_size to {size} in {directory / 'config.json'}",
            )
            for size in sorted(sizes)
            if (size < config.block_size) == below and size != config.block_size
        ]
        for below in (True, False)
    )
    well = f"{config.block_size} is right: no other size is better"
    found = trials.check("block size", looked_at, smaller, well)
    # Longer blocks promise more by their length alone: they count no further than the checkpoint's.
    above = trials.check("block size", looked_at, larger, well, cap=True)
    for name in ("screened", "tau_with"):
        if name in above.evidence:
            found.evidence.setdefault(name, {}).update(above.evidence[name])
    if found.status == "fault" or above.status == "fault":
        return found if found.status == "fault" else above
    if requested is not None and requested < drafts:
        return _shortened(trials, found, requested)
    return found


def _shortened(trials: Trials, found: Check, requested: int) -> Check:
    """What a block costs that is cut to fewer drafts than it was trained with."""
    config = trials.drafter.config
    cut, whole = measure(shortened(trials.drafter, requested), trials.texts), trials.base
    found.evidence["tau_by_drafts"] = {
        requested: round(cut.tau, 3),
        config.num_draft_tokens: round(whole.tau, 3),
    }
    finding = (
        f"blocks cut to {requested} of {config.num_draft_tokens} drafts: τ {cut.tau:.2f} instead "
        f"of {whole.tau:.2f}"
    )
    if not far_above(whole, cut):
        return found.note(finding, found.fix)
    return found.fault(
        finding,
        f"--num-speculative-tokens {config.num_draft_tokens} (SGLang: "
        f"--speculative-num-draft-tokens {config.num_draft_tokens + 1}), and adaptive "
        "verification (docs/adaptive.md) where verifying all of them does not pay",
        Certainty.MEASURED,
        whole.tau - cut.tau,
    )
