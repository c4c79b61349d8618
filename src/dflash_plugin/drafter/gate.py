"""The gate on a draft layer's attention, which Laguna's drafters have.

Source: ``DFlashLagunaForCausalLM`` of vLLM 0.33 and SGLang 0.5.23.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dflash_plugin.drafter.config import DrafterConfig
from dflash_plugin.drafter.interfaces import LayerFactory


class AttentionGate(nn.Module):
    """Scales attention by softplus, in float32, of a projection of the attention's input.

    Args:
        config: of the drafter; ``attention_gate`` says how many factors a head has.
        factory: makes the projection, sharded by heads.
        name: of the attention in a checkpoint.
    """

    def __init__(self, config: DrafterConfig, factory: LayerFactory, name: str) -> None:
        super().__init__()
        factors = 1 if config.attention_gate == "per-head" else config.head_dim
        self.projection = factory.column_linear(
            config.hidden_size, [config.num_attention_heads * factors], False, f"{name}.g_proj"
        )

    def forward(self, attended: Tensor, x: Tensor) -> Tensor:
        """Gated attention.

        Args:
            attended: [..., heads, head_dim], of this shard.
            x: [..., hidden], what the attention was given.

        Returns:
            [..., heads, head_dim].
        """
        gate = F.softplus(self.projection(x).float()).to(attended.dtype)
        gated: Tensor = attended * gate.unflatten(-1, (attended.shape[-2], -1))
        return gated
