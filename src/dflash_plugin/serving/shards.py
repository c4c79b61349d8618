"""Whether tensor-parallel ranks can share a drafter out."""

from __future__ import annotations

from dflash_plugin.drafter.config import DrafterConfig


def indivisible(config: DrafterConfig, ranks: int) -> str | None:
    """What of a drafter some ranks cannot share out, or None where each gets a part.

    Args:
        config: the drafter's.
        ranks: the tensor-parallel degree.
    """
    heads = config.num_key_value_heads
    if config.num_attention_heads % ranks:
        return f"the drafter's {config.num_attention_heads} attention heads"
    # Fewer heads than ranks are repeated.
    if max(heads, ranks) % min(heads, ranks):
        return f"the drafter's {heads} key/value heads"
    if config.intermediate_size % ranks:
        return f"the drafter's intermediate_size {config.intermediate_size}"
    return None
