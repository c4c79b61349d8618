"""Whether prompts reach the target as they did in training: chat template, thinking mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dflash_plugin.checkpoints.reference_drafts import ReferenceDrafts
from dflash_plugin.doctor.acceptance import BlockAcceptance
from dflash_plugin.doctor.report import Certainty, Check
from dflash_plugin.doctor.texts import Form

# By how much another form must be better, as a share of τ - 1, since its texts are others.
SHARE = 1.3
# Share of the training record's τ - 1 below which it is looked for.
LOW = 0.75


def special_tokens(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Special tokens that all prompts hold, in the order of the first one."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    written = [tokenizer.convert_ids_to_tokens(list(prompt)) for prompt in prompts]
    common = special.intersection(*written) if written else set()
    return list(dict.fromkeys(token for token in written[0] if token in common)) if common else []


def check_template(
    tokenizer: Any,
    form: Form,
    prompts: Sequence[Sequence[int]],
    record: ReferenceDrafts | None,
    measured: Callable[[], dict[str, BlockAcceptance]],
    expected: float | None,
) -> Check:
    """Compare the form of the prompts with the known answers', and acceptance over all forms.

    Args:
        tokenizer: the target's.
        form: how prompts reach the target.
        prompts: token ids in that form.
        record: the checkpoint's known answers, whose prompts are formed as in training.
        measured: gives acceptance by form, ``form`` among them; the known answers' prompts as
            "known answers" where they are formed otherwise.
        expected: τ of the training record.
    """
    trained = special_tokens(tokenizer, [a.prompt for a in record.answers]) if record else []
    present = special_tokens(tokenizer, prompts)
    missing = [token for token in trained if token not in present]
    by_form = measured()
    own = by_form[form]
    check = Check(
        name="chat template",
        status="ok",
        looked_at=f"prompts with {form}, against the other forms and the known answers' prompts",
        finding=f"{form}: τ {own.tau:.2f}",
        evidence={
            "tau": {name: round(found.tau, 3) for name, found in by_form.items()},
            "special_tokens": present,
            "special_tokens_in_training": trained,
        },
    )
    templated = bool(getattr(tokenizer, "chat_template", None))
    low = expected is None or own.tau - 1 < LOW * (expected - 1)
    if missing and not present:
        fix = (
            "send chats (/v1/chat/completions), or put the chat template around each prompt"
            if templated
            else "copy chat_template.jinja of the original model into the target's directory"
        )
        finding = (
            f"prompts reach the target with {form}, but the drafter was trained with one: its "
            f"known answers hold {' '.join(missing[:3])}"
        )
        if low or not templated:
            return check.fault(finding, fix, Certainty.LIKELY)
        # Texts may be as easy without a template, if that is meant.
        return check.note(f"{finding}; τ is {own.tau:.2f} all the same", fix)
    best = max(by_form, key=lambda name: by_form[name].tau)
    if not (low and _beyond_chance(by_form[best], own)):
        return check
    finding = f"τ is {by_form[best].tau:.2f} with {best} and {own.tau:.2f} with {form}"
    fix = f"serve with {best}, or train the drafter on texts with {form}"
    # Some texts are easier than others; only a low τ makes that a fault.
    if expected is None:
        return check.note(finding, fix)
    return check.fault(finding, fix, Certainty.LIKELY, by_form[best].tau - own.tau)


def _beyond_chance(better: BlockAcceptance, base: BlockAcceptance) -> bool:
    """Of different texts."""
    error = sum(one.runs.var().item() / len(one.runs) for one in (better, base)) ** 0.5
    gain = better.tau - base.tau
    return gain > 3 * error and better.tau - 1 >= SHARE * (base.tau - 1)
