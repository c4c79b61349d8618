"""A plugin for engines that compare texts in float32, which SGLang's CUDA layers do not take.

It gives the target SGLang's own torch versions of norms, activation and rotation.
"""


def register() -> None:
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    for layer in (SiluAndMul, RMSNorm, RotaryEmbedding):
        layer.forward_cuda = layer.forward_native
