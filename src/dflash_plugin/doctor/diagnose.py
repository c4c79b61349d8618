"""All checks of a pair of target and drafter, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.io import Checkpoint, load_checkpoint, load_config
from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts, load_record
from dflash_plugin.doctor import block_trials, config_trials, layer_trials, numerics
from dflash_plugin.doctor.acceptance import (
    BlockAcceptance,
    decoded_tau,
    measure,
    shortened,
)
from dflash_plugin.doctor.cause import search
from dflash_plugin.doctor.chat_template import check_template, special_tokens
from dflash_plugin.doctor.configuration import check_configuration
from dflash_plugin.doctor.known_blocks import KnownBlocks
from dflash_plugin.doctor.probe import Question
from dflash_plugin.doctor.report import Check, Diagnosis
from dflash_plugin.doctor.server import InspectedServer, check_server
from dflash_plugin.doctor.server_setup import check_setup
from dflash_plugin.doctor.texts import PROMPTS, Form, Texts, encode_as, forms, write_texts
from dflash_plugin.doctor.trials import Tell, Trials
from dflash_plugin.drafter.config import Dialect, DraftWeights
from dflash_plugin.drafter.fp8_linear import quantize_drafter
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.errors import DFlashError
from dflash_plugin.prompts import Prompt
from dflash_plugin.serving.acceptance import probable_cause
from dflash_plugin.serving.drafter_spec import Options, expected_acceptance
from dflash_plugin.transformers.loading import bound, load_target

# Share of the training record's τ - 1 that the texts here, which are others, should reach.
LOW = 0.5
# What is as near to that share is no fault.
CLOSE = 0.05
# Bytes that outputs of layers which are only looked at may take.
MEMORY = 2 << 30
# Prompts that are also put to the target in other forms.
FEW = 3


class DoctorOptions(BaseModel):
    """How the drafter is meant to run.

    Attributes:
        dialect: overrides detection.
        num_speculative_tokens: what the engine is told.
        draft_weights: "fp8" rounds the drafter.
        raw: prompts reach the target without the chat template.
        thinking: ``enable_thinking`` of the chat template; None leaves it alone.
        compare_float32: load the target a second time, in float32, where it runs in another dtype.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dialect: Dialect | None = None
    num_speculative_tokens: int | None = None
    draft_weights: DraftWeights = "checkpoint"
    raw: bool = False
    thinking: bool | None = None
    compare_float32: bool = True


class TargetTexts:
    """A loaded target and what it answered, which all checks of its drafters share.

    Args:
        directory: the target's.
        target, tokenizer: from ``load_target``.
        prompts: what is asked.
        max_new_tokens: of an answer.
    """

    def __init__(
        self,
        directory: Path,
        target: PreTrainedModel,
        tokenizer: Any,
        prompts: Sequence[Prompt] | None = None,
        max_new_tokens: int = 64,
    ) -> None:
        self.directory = directory
        self.target = target
        self.tokenizer = tokenizer
        self.prompts = prompts or [Prompt.user(text) for text in PROMPTS]
        self.max_new_tokens = max_new_tokens
        self._texts: dict[tuple[tuple[int, ...], ...], Texts] = {}
        self._known: list[KnownBlocks] = []

    def encoded(self, form: Form) -> list[list[int]]:
        """The prompts in a form."""
        return [encode_as(self.tokenizer, prompt, form) for prompt in self.prompts]

    def answers(self, prompts: Sequence[Sequence[int]]) -> Texts:
        """What the target answers, written once."""
        key = tuple(tuple(prompt) for prompt in prompts)
        if key not in self._texts:
            self._texts[key] = write_texts(self.target, prompts, self.max_new_tokens)
        return self._texts[key]

    def known(self, record: ReferenceDrafts | None) -> KnownBlocks | None:
        """A record's prompts, read once by the target; None where there is nothing recorded."""
        if record is None or not record.answers:
            return None
        if not self._known or self._known[0].record != record:
            self._known = [KnownBlocks.of(self.target, record)]
        return self._known[0]

    def float32(self) -> PreTrainedModel:
        """The target, loaded in float32."""
        return load_target(self.directory, torch.float32, self.target.device)[0]


def diagnose(
    on: TargetTexts,
    directory: Path,
    options: DoctorOptions | None = None,
    server: InspectedServer | None = None,
    tell: Tell = lambda _: None,
) -> Diagnosis:
    """Find out why a drafter's acceptance is low.

    Args:
        on: the target.
        directory: the drafter's checkpoint.
        options: how it is meant to run.
        server: one that runs the pair.
        tell: called with the name of each check before it runs.

    Raises:
        DFlashError: the target answers nothing, or the drafter reads its last layer before the
            final norm.
    """
    options = options or DoctorOptions()
    tell("reading the checkpoint")
    first = check_configuration(directory, on.directory, options.dialect)
    found = Diagnosis(target=str(on.directory), drafter=str(directory), checks=[first])
    if first.status != "fault":
        checkpoint = load_checkpoint(directory, on.target.dtype, options.dialect)
        num_layers = on.target.config.get_text_config().num_hidden_layers
        if checkpoint.config.reads_before_norm(num_layers):
            raise DFlashError(
                f"target_layer_ids {list(checkpoint.config.target_layer_ids)} name the target's "
                "last layer, which this drafter reads before the final norm, and doctor does not: "
                "use inspect"
            )
        found.checks += _measured(on, checkpoint, options, server, tell)
    return found


def _measured(
    on: TargetTexts,
    checkpoint: Checkpoint,
    options: DoctorOptions,
    server: InspectedServer | None,
    tell: Tell,
) -> list[Check]:
    """Every check that drafts."""
    config, where = checkpoint.config, checkpoint.directory
    tell("the target answers")
    form = prompt_form(options, on.tokenizer)
    prompts = on.encoded(form)
    texts = on.answers(prompts)
    drafter = bound(checkpoint, on.target)
    record = load_record(where)
    known = on.known(record)
    num_layers = on.target.config.get_text_config().num_hidden_layers
    tell("the target reads its answers")
    near = [
        *layer_trials.shifted(config, num_layers),
        *layer_trials.neighbors(config.target_layer_ids, num_layers),
    ]
    layers = {i for ids in near for i in ids} | set(config.target_layer_ids)
    far = layers | set(layer_trials.coarse_layers(num_layers))
    texts.prepare(far if len(far) * texts.layer_bytes() <= MEMORY else layers)
    if known is not None:
        known.texts.prepare(far)
    tell("acceptance as configured")
    trials = Trials(drafter, texts, known)
    trials.parts[0].prepare(far)
    expected = expected_acceptance(where, Options())
    requested = options.num_speculative_tokens
    if requested is None and server is not None:
        requested = server.drafts
    checks = [check_acceptance(trials.base, expected)]
    searches = [
        config_trials.search_dialect(trials, checkpoint),
        block_trials.search_block(trials, where),
        layer_trials.search_layers(trials, where),
        layer_trials.search_order(trials, where),
        config_trials.search_mask(trials, on.tokenizer, where),
        config_trials.search_attention(trials, where),
        config_trials.search_rope(trials, where),
        block_trials.search_anchor(trials, where),
        config_trials.search_norms(trials, where),
    ]
    for found in search(trials, searches, tell):
        if found.name == "block size":
            found = block_trials.with_requested(trials, found, requested)
        checks.append(found)
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("weights", lambda: numerics.check_weights(checkpoint)),
        ("known answers", lambda: numerics.check_known(drafter, known)),
        (
            "dtype",
            lambda: numerics.check_dtype(
                texts, drafter, stored_dtype(where, options), on.float32 if options.compare_float32
                else None,
            ),
        ),
        (
            "draft weights",
            lambda: numerics.check_fp8(
                texts, trials.base, options.draft_weights, lambda: _fp8(checkpoint, on.target)
            ),
        ),
        ("quantized target", lambda: numerics.check_quantized_target(on.target)),
        (
            "chat template",
            lambda: check_template(
                on.tokenizer,
                form,
                prompts,
                record,
                lambda: _by_form(on, drafter, form, texts, record),
                expected,
            ),
        ),
    ]  # fmt: skip
    for name, check in steps:
        tell(name)
        checks.append(check())
    if server is not None:
        tell("sending the prompts to the server")
        probe = server.probe(questions(texts), lambda: decoded_tau(_cut(drafter, server), texts))
        if server.speculates:
            checks += check_setup(server.again(), config)
        checks += check_server(server, trials.base.tau, expected, probe)
    return checks


def prompt_form(options: DoctorOptions, tokenizer: Any) -> Form:
    """How prompts reach the target.

    Raises:
        DFlashError: ``thinking`` where the chat template knows none.
    """
    known = forms(tokenizer)
    if options.raw:
        return "no template"
    if options.thinking is None:
        return known[0]
    form: Form = "thinking on" if options.thinking else "thinking off"
    if form not in known:
        raise DFlashError("the target's chat template has no enable_thinking: leave --thinking out")
    return form


def questions(texts: Texts) -> list[Question]:
    """The texts as questions to a server."""
    pairs = (texts.sequences[index] for index in range(len(texts.sequences)))
    return [
        Question(tokens[:prompt].tolist(), tokens[prompt:].tolist()) for tokens, prompt in pairs
    ]


def _cut(drafter: Drafter, server: InspectedServer) -> Drafter:
    """The drafter with as many drafts as the server makes, and no more than a block has."""
    drafts = drafter.config.num_draft_tokens
    return shortened(drafter, min(server.drafts or drafts, drafts))


def stored_dtype(directory: Path, options: DoctorOptions) -> str:
    """Dtype of the checkpoint's file."""
    return load_config(directory, options.dialect).dtype


def _fp8(checkpoint: Checkpoint, target: PreTrainedModel) -> Drafter:
    drafter = bound(checkpoint, target)
    quantize_drafter(drafter)
    return drafter


def check_acceptance(base: BlockAcceptance, expected: float | None) -> Check:
    """τ as configured, against the training record."""
    record = (
        "no training.json tells what to expect"
        if expected is None
        else f"{expected:.2f} in training"
    )
    check = Check(
        name="acceptance",
        status="ok",
        looked_at="a block at every fourth position of the target's greedy answers",
        finding=f"τ {base.tau:.2f} as configured, {record}",
        evidence={
            "tau": round(base.tau, 3),
            "by_position": base.by_position,
            "blocks": len(base.hits),
            "tau_of_training": expected,
        },
    )
    if expected is None or base.tau - 1 >= (LOW + CLOSE) * (expected - 1):
        return check
    if base.tau - 1 >= (LOW - CLOSE) * (expected - 1):
        return check.note(f"{check.finding}: close to the half that counts as a fault")
    return check.fault(
        f"τ is {base.tau:.2f} and was {expected:.2f} in training: "
        f"{probable_cause(base.by_position)}",
        "run doctor with --data on prompts like those of training; if τ stays low, fetch or train "
        "the drafter again",
    )


def _by_form(
    on: TargetTexts, drafter: Drafter, usual: Form, texts: Texts, record: ReferenceDrafts | None
) -> dict[str, BlockAcceptance]:
    """Acceptance over the first prompts in every form; over the record's, if formed otherwise."""
    few = texts.first(min(FEW, len(texts.sequences)))
    found: dict[str, BlockAcceptance] = {usual: measure(drafter, few)}
    others: dict[str, list[list[int]]] = {
        form: on.encoded(form)[:FEW] for form in forms(on.tokenizer) if form != usual
    }
    if record:
        recorded = [answer.prompt for answer in record.answers[:FEW]]
        if set(special_tokens(on.tokenizer, recorded)) - set(
            special_tokens(on.tokenizer, on.encoded(usual))
        ):
            others["known answers"] = recorded
    for form, prompts in others.items():
        try:
            found[form] = measure(drafter, on.answers(prompts))
        except DFlashError:
            continue  # every answer was empty, so that there is nothing to measure
    return found
