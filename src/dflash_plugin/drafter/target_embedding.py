"""What a drafter borrows of its target's input embedding: the stored rows and a factor.

Gemma's rows are multiplied by the square root of the width before its first layer. Some modules do
so themselves (Transformers, SGLang's Gemma 3 and 4), others leave it to the model around them
(vLLM). Drafters of such targets are trained on the product: z-lab's loop and ModelOpt call the
target's module in Transformers, and the MLX backend of PyPI dflash 0.1.0 multiplies by the target's
``embed_scale``. A norm of the rows (Muse Glimmer) is left out, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def embedding_factor(target: Any) -> float:
    """The factor on the rows of a target's embedding, as its module in Transformers has it.

    Args:
        target: the target's text configuration.
    """
    kind = str(target.model_type)
    if "gemma" in kind:
        return math.sqrt(target.hidden_size)
    return float(target.scale_emb) if kind == "minicpm3" else 1.0


def stored_rows(embedding: nn.Module) -> Callable[[Tensor], Tensor]:
    """Looks up rows as they are stored, whatever the target's module does to them.

    Args:
        embedding: the target's; an engine's sharded one is called, and gives its rows as stored.
    """
    if not isinstance(embedding, nn.Embedding):
        return embedding

    def look_up(tokens: Tensor) -> Tensor:
        return F.embedding(tokens, embedding.weight)

    return look_up
