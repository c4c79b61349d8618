"""How a server is split up or extended: what the plugin does not run with, told before it loads."""

from __future__ import annotations

from typing import Any

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.errors import DFlashError
from dflash_plugin.sglang.compat import argument, current, has_dp_attention

LEAVE_OUT = "leave it out"
# Argument, the value that is plain, its flag, and why no other is taken.
PLAIN = (
    (
        *("attn_cp_size", 1, "--attn-cp-size"),
        "dflash-plugin injects whole prompts, of which each rank would have a part",
    ),
    (
        *("dcp_size", 1, "--dcp-size"),
        "the drafter's cache is not shared out over the ranks by position",
    ),
    (
        *("enable_prefill_cp", False, "--enable-prefill-cp"),
        "dflash-plugin injects whole prompts, of which each rank would have a part",
    ),
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
    stages = _value(server_args, "pp_size", 1)
    if stages > 1:
        raise DFlashError(
            f"--pp-size is {stages}, and DFlash in SGLang reads hidden states of the whole target in "
            "one process, SGLang's own too: split the target with --tp-size instead"
        )
    if has_dp_attention(server_args):
        raise DFlashError(
            "--enable-dp-attention or --attn-dp-size is set, which dflash-plugin does not run with: "
            + _fix(version.native_dp_attention, "0.5.23", "--dp-size alone replicates the server")
        )
    mode = _value(server_args, "disaggregation_mode", "null")
    if mode not in (None, "null"):
        raise DFlashError(
            f"--disaggregation-mode is {mode!r}, and dflash-plugin does not send the drafter's cache "
            f"between servers: {_fix(version.native_disaggregation, '0.5.18')}"
        )
    for name, plain, flag, why in PLAIN:
        value = _value(server_args, name, plain)
        if value not in (None, plain):
            raise DFlashError(
                f"{flag} is {value}, and {why}: {LEAVE_OUT}; DFLASH_PLUGIN=off leaves the drafter to "
                "the engine"
            )
    if _value(server_args, "enable_two_batch_overlap", False):
        raise DFlashError(
            "--enable-two-batch-overlap is set, and SGLang does not split verify passes of DFlash, "
            f"its own neither: {LEAVE_OUT}"
        )
    has_lora = _value(server_args, "enable_lora", None)
    if has_lora is None:
        has_lora = bool(_value(server_args, "lora_paths", None))
    if has_lora and not version.lora:
        raise DFlashError(
            "--enable-lora or --lora-paths is set, and this SGLang takes no adapters under DFlash: "
            f"{LEAVE_OUT}, or install SGLang 0.5.19 or newer"
        )


def splits(config: DrafterConfig, ranks: int) -> bool:
    """Whether a drafter's heads and inner width can be shared out over tensor-parallel ranks.

    Where they cannot, every rank holds the whole drafter.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    by_heads = heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
    return by_heads and config.intermediate_size % ranks == 0


def _value(server_args: Any, name: str, plain: Any) -> Any:
    """An argument; ``plain`` in a version without it."""
    return argument(server_args, name) if hasattr(server_args, name) else plain


def _fix(is_native: bool, since: str, instead: str = "") -> str:
    fix = f"{LEAVE_OUT} ({instead})" if instead else LEAVE_OUT
    if is_native:
        return f"{fix}, or set DFLASH_PLUGIN=off to use SGLang's own DFlash"
    return f"{fix}; SGLang's own DFlash has it from {since} on"
