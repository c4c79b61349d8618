"""How a server is split up or extended: what the plugin does not run with, told before it loads."""

from __future__ import annotations

from typing import Any

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.serving.shards import indivisible
from dflash_plugin.sglang.compat import argument, current, has_dp_attention

LEAVE_OUT = "leave it out"
IN_PARTS = "dflash-plugin injects whole prompts, of which each rank would have a part"
# Argument, its flag, the value that is plain, and why no other is taken.
REQUIRED_ARGUMENTS = (
    ("attn_cp_size", "--attn-cp-size", 1, IN_PARTS),
    ("enable_prefill_cp", "--enable-prefill-cp", False, IN_PARTS),
    ("dcp_size", "--dcp-size", 1, "the drafter's cache is whole on every rank"),
)


def check(server_args: Any) -> None:
    """Refuse what the plugin does not run with.

    Args:
        server_args: SGLang's ``ServerArgs``.

    Raises:
        DFlashError: names the flag, its value and what to do; ``DFLASH_PLUGIN=off`` only where this
            version of SGLang serves DFlash with it.
    """
    version = current()
    stages = argument(server_args, "pp_size")
    if stages > 1:
        raise DFlashError(
            f"--pp-size is {stages}, and DFlash in SGLang, its own too, reads hidden states of the "
            "whole target on each rank: split the target with --tp-size instead"
        )
    if has_dp_attention(server_args):
        raise DFlashError(
            "--enable-dp-attention or --attn-dp-size is set, and dflash-plugin does not run so: "
            + _fix(version.native_dp_attention, "0.5.23", "--dp-size alone replicates the server")
        )
    mode = argument(server_args, "disaggregation_mode")
    if mode not in (None, "null"):
        raise DFlashError(
            f"--disaggregation-mode is {mode!r}, and dflash-plugin does not send the drafter's "
            f"cache between servers: {_fix(version.native_disaggregation, '0.5.18')}"
        )
    for name, flag, plain, why in REQUIRED_ARGUMENTS:
        value = argument(server_args, name)
        if value not in (None, plain):
            raise DFlashError(
                f"{flag} is {value}, and {why}: {LEAVE_OUT}; DFLASH_PLUGIN=off leaves the drafter "
                "to the engine"
            )
    if argument(server_args, "enable_two_batch_overlap"):
        raise DFlashError(
            "--enable-two-batch-overlap is set, and SGLang does not split verify passes of DFlash, "
            f"its own neither: {LEAVE_OUT}"
        )
    has_lora = argument(server_args, "enable_lora")
    if has_lora is None:
        has_lora = bool(argument(server_args, "lora_paths"))
    if has_lora and not version.lora:
        raise DFlashError(
            "--enable-lora or --lora-paths is set, and this SGLang takes no adapters under DFlash: "
            f"{LEAVE_OUT}, or install SGLang 0.5.19 or newer"
        )


def splits(config: DrafterConfig, ranks: int) -> bool:
    """Whether a drafter's heads and inner width can be shared out over tensor-parallel ranks.

    Where they cannot, every rank holds the whole drafter.
    """
    return indivisible(config, ranks) is None


def why_whole(config: DrafterConfig, ranks: int) -> str:
    """Why a drafter cannot be shared out over tensor-parallel ranks."""
    return (
        f"its {config.num_attention_heads} heads, {config.num_key_value_heads} key/value heads and "
        f"intermediate size {config.intermediate_size} do not divide by {ranks} ranks"
    )


def heads_for_ranks(config: DrafterConfig, ranks: int) -> dict[str, int]:
    """Heads of the staged draft model, of which SGLang counts those of one rank.

    Where every rank holds the whole drafter, as many times its heads: its cache and attention on
    one rank then have all of them.
    """
    copies = 1 if splits(config, ranks) else ranks
    return {
        "num_attention_heads": copies * config.num_attention_heads,
        "num_key_value_heads": copies * config.num_key_value_heads,
    }


def _fix(is_native: bool, since: str, instead: str = "") -> str:
    fix = f"{LEAVE_OUT} ({instead})" if instead else LEAVE_OUT
    if is_native:
        return f"{fix}, or set DFLASH_PLUGIN=off to use SGLang's own DFlash"
    return f"{fix}; SGLang's own DFlash has it from {since} on"
