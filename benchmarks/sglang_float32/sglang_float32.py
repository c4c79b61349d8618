"""A plugin for engines that compare texts in float32, which SGLang's CUDA layers do not take.

It gives the target SGLang's own torch versions of norms, activations and rotations.
"""

from typing import Any

from dflash_plugin.serving.after_import import after_import

ACTIVATIONS = ("SiluAndMul", "GeluAndMul")
NORMS = ("RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm", "Gemma4RMSNorm")


def register() -> None:
    """Replace them in this process."""
    from sglang.srt.layers import activation, layernorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    layers = [getattr(activation, name) for name in ACTIVATIONS]
    layers += [getattr(layernorm, name) for name in NORMS]
    for layer in (*layers, RotaryEmbedding):
        layer.forward_cuda = layer.forward_native
    after_import("sglang.srt.models.utils", _norm_heads_apart)
    after_import("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe", _activate_in_torch)


def _norm_heads_apart(module: Any) -> None:
    """Leave out the kernel that norms queries and keys at once."""
    module.can_use_fused_inplace_qknorm = lambda *_: False


def _activate_in_torch(module: Any) -> None:
    """Activate what experts compute as ``SiluAndMul`` does."""

    def silu_and_mul(x: Any, out: Any, **_: Any) -> None:
        from torch.nn import functional as F

        gate, up = x.chunk(2, dim=-1)
        out.copy_(F.silu(gate) * up)

    module.silu_and_mul = silu_and_mul
