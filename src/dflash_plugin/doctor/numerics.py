"""Checks of numbers: known answers by layer, rounded weights, dtypes, quantized targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dflash_plugin.checkpoints.io import Checkpoint
from dflash_plugin.checkpoints.reference_drafts import first_values, layer_outputs
from dflash_plugin.checkpoints.tensors import checkpoint_tensors, load_tensors
from dflash_plugin.doctor.acceptance import (
    BlockAcceptance,
    block_hidden,
    block_positions,
    blocks_of,
    measure,
)
from dflash_plugin.doctor.comparison import COSTLY, Comparison, compare
from dflash_plugin.doctor.known_blocks import KnownBlocks, close
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.texts import Texts
from dflash_plugin.drafter.config import DraftWeights
from dflash_plugin.drafter.model import Drafter
from dflash_plugin.transformers.loading import bind_drafter

# Root-mean-square difference from float32, as a share, that a rounded run may have.
RUN_TOLERANCE = 0.1
# A tensor's distinct values a row, as a share of those of the same tensor in other layers.
DISTINCT_SHARE = 1 / 3


@torch.inference_mode()
def check_known(drafter: Drafter, known: KnownBlocks | None) -> Check:
    """Draft the checkpoint's known answers, and name the first layer that differs."""
    looked_at = "drafts and hidden values of the recorded prompts, against the float32 core's"
    if known is None:
        return Check(
            name="known answers",
            status="note",
            looked_at=looked_at,
            finding="there is no known_answer.json beside the drafter",
        )
    found = known.agreement(drafter)
    evidence = {"agree": found.right, "compared": found.compared, "hidden_agree": found.exact}
    check = Check(
        name="known answers",
        status="ok",
        looked_at=looked_at,
        finding=f"{found.right} of {found.compared} drafts agree",
        evidence=evidence,
    )
    if found.whole:
        return check
    if known.is_float32:
        where = first_difference(drafter, known)
        check.evidence["first_difference"] = where
    else:
        where = "which layer can be told in float32: run again with --dtype float32"
    return check.fault(
        f"{check.finding}; first difference: {where}",
        "fetch the drafter's files again, or the target that it was made for",
        Certainty.LIKELY,
    )


def first_difference(drafter: Drafter, known: KnownBlocks) -> str:
    """Where a float32 run leaves the record, from the target's layers to the drafter's.

    Args:
        drafter: float32, bound to the target.
        known: read by a float32 target.
    """
    config, answers = drafter.config, known.record.answers
    features = known.texts.features(config.target_layer_ids)
    parts = features.chunk(len(config.target_layer_ids), dim=-1)
    for row, answer in enumerate(answers):
        for layer, part, recorded in zip(
            config.target_layer_ids, parts, answer.features, strict=False
        ):
            if not close(first_values(part[row, len(answer.prompt) - 1]), recorded):
                return f"output of target layer {layer}"
    with layer_outputs(drafter) as outputs:
        block_hidden(drafter, known.texts, known.blocks(drafter))
    first = config.block_size - config.num_draft_tokens
    for row, answer in enumerate(answers):
        for index, (output, recorded) in enumerate(zip(outputs, answer.layers, strict=False)):
            if not close(first_values(output[row, first]), recorded):
                return f"draft layer {index}"
    if answers[0].layers:
        head = "head" if drafter.candidate_selector is None else "head, selector"
        return f"behind the draft layers: norm, {head} or block size"
    return "anywhere: the record holds no values by layer"


def check_weights(checkpoint: Checkpoint) -> Check:
    """Weights of one layer that were rounded to fewer values than those of the others."""
    counts = {
        name: distinct_values(tensor)
        for name, tensor in checkpoint.tensors.items()
        if name.startswith("layers.") and tensor.dim() == 2
    }
    usual = _usual(counts)
    rounded = [name for name, count in counts.items() if count < DISTINCT_SHARE * usual[name]]
    check = Check(
        name="weights",
        status="ok",
        looked_at="distinct values in a row of each weight, against the same weight of other "
        "layers",
        finding="no layer was rounded more than the others",
        evidence={"distinct_values_a_row": statistics.median(counts.values())},
    )
    if not rounded:
        return check
    layers = sorted({int(name.split(".")[1]) for name in rounded})
    return check.fault(
        f"draft layer {', '.join(map(str, layers))} was quantized: {rounded[0]} holds "
        f"{counts[rounded[0]]:.0f} values a row, the other layers' {usual[rounded[0]]:.0f}",
        "fetch or export the drafter again without quantization",
        Certainty.LIKELY,
        evidence={name: counts[name] for name in rounded},
    )


def distinct_values(weight: Tensor, rows: int = 16) -> float:
    """Median number of distinct values in some rows of a weight [out, in]."""
    picked = weight[:: max(1, len(weight) // rows)][:rows].float()
    return float(statistics.median(len(row.unique()) for row in picked))


def _usual(counts: Mapping[str, float]) -> dict[str, float]:
    """Of every tensor, the count that most layers have of its kind."""
    kinds: dict[str, list[float]] = {}
    for name, count in counts.items():
        kinds.setdefault(name.split(".", 2)[2], []).append(count)
    # With two layers the median lies between them; the larger half tells what is usual.
    return {name: statistics.median_high(kinds[name.split(".", 2)[2]]) for name in counts}


def check_quantized_target(target: PreTrainedModel) -> Check:
    """Whether the target is quantized, which its features feel, or its head, which drafts do."""
    head = target.get_output_embeddings()
    rounded_head = not (isinstance(head, nn.Linear) and head.weight.element_size() > 1)
    quantized = getattr(target.config, "quantization_config", None)
    check = Check(
        name="quantized target",
        status="ok",
        looked_at="quantization_config of the target, and its output head",
        finding="neither is quantized",
    )
    if not quantized and not rounded_head:
        return check
    method = (
        quantized.get("quant_method")
        if isinstance(quantized, dict)
        else getattr(quantized, "quant_method", None)
    )
    name = str(getattr(method, "value", method) or "unknown")
    what = f"the target is quantized ({name}), its head {'too' if rounded_head else 'is not'}"
    if not quantized:
        what = f"the target's head is quantized ({type(head).__name__})"
    return check.note(
        f"{what}: a drafter trained on the unquantized target reads "
        + ("features that are a little off" if quantized else "the right features")
        + (" and drafts with another head than its own training's" if rounded_head else ""),
        "run doctor on the unquantized target too; where its τ is much higher, train the drafter "
        "on the quantized one"
        + (", or leave the head out of the quantization" if rounded_head else ""),
        {"quant_method": name, "head": type(head).__name__},
    )


def check_fp8(
    texts: Texts, base: BlockAcceptance, weights: DraftWeights, rounded: Callable[[], Drafter]
) -> Check:
    """What rounding the drafter's weights to FP8 costs.

    Args:
        texts, base: acceptance with the checkpoint's weights on these texts.
        weights: what the engine is told.
        rounded: gives the drafter with FP8 weights.
    """
    looked_at = f"draft_weights: {weights}"
    if weights == "checkpoint":
        return Check(
            name="draft weights",
            status="ok",
            looked_at=looked_at,
            finding="the checkpoint's own weights draft",
        )
    fp8 = measure(rounded(), texts)
    check = Check(
        name="draft weights",
        status="ok",
        looked_at=f"{looked_at}, against the checkpoint's weights",
        finding=f"τ {fp8.tau:.2f} with FP8 weights, {base.tau:.2f} without",
        evidence={"tau": round(base.tau, 3), "tau_fp8": round(fp8.tau, 3)},
    )
    compared = compare(base, fp8)
    if compared.judged(COSTLY) != "more":
        return _close(check, compared)
    return check.fault(
        check.finding,
        "leave draft_weights at checkpoint",
        Certainty.MEASURED,
        base.tau - fp8.tau,
    )


def _close(check: Check, compared: Comparison) -> Check:
    """The check, with a note where the loss is close to what counts as a fault."""
    if compared.judged(COSTLY) == "no more":
        return check
    return check.note(f"{check.finding}: close to what counts as a fault ({compared})")


def check_dtype(
    texts: Texts,
    drafter: Drafter,
    stored: str,
    reference: Callable[[], PreTrainedModel] | None,
) -> Check:
    """What running in this dtype costs, and the first layer that it changes by much.

    Args:
        texts: read by the target as it is run.
        drafter: as it is run.
        stored: dtype of the checkpoint.
        reference: gives the target in float32, or None to leave the comparison out.
    """
    name = str(texts.target.dtype).removeprefix("torch.")
    check = Check(
        name="dtype",
        status="ok",
        looked_at=f"target and drafter in {name}, the drafter stored as {stored}",
        finding=f"{name} is exact enough",
        evidence={"dtype": name, "stored": stored},
    )
    if texts.target.dtype == torch.float32:
        check.finding = "float32: nothing is rounded"
        return check
    if reference is None:
        return check.note(f"{name} was not compared with float32")
    target = reference()
    exact = Drafter(drafter.config)
    tensors = checkpoint_tensors(drafter).items()
    load_tensors(exact, {k: v.float() if v.is_floating_point() else v for k, v in tensors})
    exact.to(target.device).eval()
    bind_drafter(exact, target)
    whole = texts.on(target)
    as_run, in_float32 = measure(drafter, texts), measure(exact, whole)
    differs, error = largest_step(drafter, texts, exact, whole)
    check.evidence |= {
        "tau": round(as_run.tau, 3),
        "tau_float32": round(in_float32.tau, 3),
        "first_difference": differs,
        "relative_error": error,
    }
    check.looked_at += ", against both in float32"
    compared = compare(in_float32, as_run)
    if compared.judged(COSTLY) != "more":
        return _close(check, compared)
    return check.fault(
        f"{name} takes τ from {in_float32.tau:.2f} to {as_run.tau:.2f}; first difference: "
        f"{differs or 'none above the tolerance'}",
        "run target and drafter in "
        + ("bfloat16 (--dtype bfloat16)" if name == "float16" else "float32"),
        Certainty.MEASURED,
        in_float32.tau - as_run.tau,
    )


@torch.inference_mode()
def largest_step(
    drafter: Drafter, texts: Texts, exact: Drafter, whole: Texts
) -> tuple[str | None, dict[str, float]]:
    """The first layer that is not finite or off by ``RUN_TOLERANCE``, and the errors by layer."""
    errors: dict[str, float] = {}
    mask = torch.arange(texts.batch.tokens.shape[1], device=texts.batch.tokens.device)
    mask = mask < texts.batch.lengths[:, None]
    for layer in sorted(drafter.config.target_layer_ids):
        ours, theirs = texts.layer(layer)[mask], whole.layer(layer)[mask]
        errors[f"target layer {layer}"] = relative_error(ours, theirs)
    outputs = [_layers(one, on) for one, on in ((drafter, texts), (exact, whole))]
    for index, (ours, theirs) in enumerate(zip(*outputs, strict=True)):
        errors[f"draft layer {index}"] = relative_error(ours, theirs)
    first = next((name for name, error in errors.items() if not error <= RUN_TOLERANCE), None)
    return first, {name: round(error, 4) for name, error in errors.items()}


def _layers(drafter: Drafter, texts: Texts) -> list[Tensor]:
    anchors, valid = block_positions(texts)
    size = drafter.config.block_size
    with layer_outputs(drafter) as outputs:
        block_hidden(drafter, texts, blocks_of(drafter, texts, anchors, valid))
    return [output.unflatten(1, (-1, size))[valid] for output in outputs]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Mean over rows [N, ...] of the root-mean-square difference, as a share of the row's own.

    A few channels of a target can be thousands of times as large as the rest: they are counted with
    the rest, since the drafter's projection reads them all.
    """
    found, exact = found.float().flatten(1), exact.float().flatten(1)
    difference = (found - exact.to(found.device)).square().mean(dim=1).sqrt()
    return float((difference / exact.to(found.device).square().mean(dim=1).sqrt()).mean())
