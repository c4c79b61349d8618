"""What a DFlash drafter is, independent of the dialect its checkpoint is written in."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dflash_plugin.errors import DFlashError

Dialect = Literal["z-lab", "speculators", "specforge", "modelopt"]
DraftWeights = Literal["checkpoint", "fp8"]
"""What the draft pass multiplies by: the checkpoint's weights, or FP8 copies of them."""
DTYPES = ("float32", "bfloat16", "float16")
# Far above any head, far below what its table of rotations costs.
WIDEST_HEAD = 1 << 16


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class LayerAttention(BaseModel):
    """How one draft layer's queries see the context and their own block.

    Attributes:
        sliding_window: number of positions a query sees, itself included; None sees all.
        causal: whether a block position is kept from seeing later positions of its block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sliding_window: int | None = Field(default=None, gt=0)
    causal: bool = False


class RopeConfig(BaseModel):
    """Rotary position embedding.

    Attributes:
        theta: base of the frequencies.
        type: a type that ``transformers.modeling_rope_utils`` knows (default, linear, yarn, ...).
        parameters: what that type needs (factor, beta_fast, mscale, ...), in Transformers' names.
        partial_rotary_factor: share of the head dimension that is rotated.
        interleaved: rotate neighboring pairs (GPT-J style) instead of halves (NeoX style).
        max_position_embeddings: longest position the drafter was made for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    theta: float = Field(default=10000.0, gt=0)
    type: str = "default"
    parameters: dict[str, Any] = Field(default_factory=dict)
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1)
    interleaved: bool = False
    max_position_embeddings: int = Field(default=32768, gt=0)

    @model_validator(mode="after")
    def _known_type(self) -> RopeConfig:
        # Imported here: the command line reads names from this module and starts without torch.
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        known = sorted({"default", *ROPE_INIT_FUNCTIONS} - {"dynamic", "proportional"})
        _require(
            self.type in known,
            f"rope type is {self.type!r}: the known types are {', '.join(known)}",
        )
        factor = self.parameters.get("factor")
        _require(
            self.type in ("default", "longrope")
            or (isinstance(factor, int | float) and math.isfinite(factor) and factor >= 1),
            f"rope factor is {factor!r}: type {self.type!r} needs a number of at least 1",
        )
        _require(
            self.type != "default" or factor in (None, 1),
            f"rope factor is {factor!r} but the rope type is 'default': name the type that the "
            "drafter was trained with as rope_type",
        )
        return self


class ConvolutionConfig(BaseModel):
    """The convolutions of a DFlash 2 drafter's sublayers, see ``convolution``.

    Attributes:
        kernel_size: taps, that of the row itself among them.
        group_size: channels that share one dynamic coefficient a tap.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel_size: int = Field(gt=0)
    group_size: int = Field(gt=0)


class SelectorConfig(BaseModel):
    """The candidate selector of a DFlash 2 drafter, see ``selector``.

    Attributes:
        rank: width of a token's codebook rows.
        top_k: candidates a position.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(gt=0)
    top_k: int = Field(ge=2)


class LatentAttentionConfig(BaseModel):
    """Multi-head latent attention (MLA) of the draft layers, see ``latent_attention``.

    Attributes:
        q_lora_rank: width of the latent that queries are expanded from; None projects them at once.
        kv_lora_rank: width of the latent that keys and values are expanded from.
        qk_nope_head_dim: values of a head's queries and keys that are not rotated.
        qk_rope_head_dim: values that are rotated; all heads share those of the keys.
        v_head_dim: values of a head's values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    q_lora_rank: int | None = Field(default=None, gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(ge=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def stored_head_dim(self) -> int:
        """Width at which a head's keys and values are stored; the narrower of them is padded."""
        return max(self.qk_head_dim, self.v_head_dim)


class DrafterConfig(BaseModel):
    """A drafter, validated; every dialect reads into this and writes from it.

    Attributes:
        dialect: the dialect it was read from.
        block_size: anchor + masks, the rows of one draft pass.
        sample_from_anchor: the anchor's row predicts a token too, so that a block drafts
            ``block_size`` tokens instead of ``block_size - 1``.
        mask_token_id: token whose embedding fills the positions to be drafted.
        target_layer_ids: 0-based target layers whose *outputs* are the context features, in the
            order in which ``fc`` expects them; -1 is the embedding output. This is z-lab's
            counting; speculators' ids are one larger.
        last_layer_normed: what the output of the target's last layer is, if it is read: behind the
            target's final norm, as Transformers gives hidden states, or before it.
        norm_per_tap: RMS norm over each target layer's output before ``fc``.
        norm_context: each draft layer norms context rows with its own attention norm, as it does
            block rows, before it projects them to keys and values.
        num_target_layers: layers of the target that it was made for, if the checkpoint says so.
        target_hidden_size: width of one target layer's output.
        vocab_size: the target's vocabulary; 0 where the checkpoint does not say and has no tensor
            with a row a token, see ``checkpoints/vocabulary``.
        draft_vocab_size: rows of an own, reduced head; None when drafts are over ``vocab_size``.
        layers: one entry per draft layer.
        window_from: a sliding window counts back from each query ("query", z-lab and SpecForge) or
            from the block's anchor ("anchor", speculators).
        latent_attention: of layers with latent attention; ``head_dim`` is then its
            ``stored_head_dim``, and every head has keys and values of its own.
        qk_norm: RMS norm over each head of q and k before rotation.
        attention_bias, attention_output_bias, mlp_bias: whether those linears carry a bias.
        attention_sinks: one learned logit per head that joins the softmax without a value.
        attention_value_scale: factor on V, None for 1.
        attention_gate: the attention's result is scaled by softplus of a projection of its input,
            one factor a head or one a channel; None has no gate.
        norm_style: "rms" multiplies by the weight, "gemma" by 1 + weight.
        own_embedding, own_head: the checkpoint carries them; otherwise they are the target's.
        own_mask_embedding: the checkpoint carries a vector that replaces the mask's embedding.
        embedding_scale: factor on the stored rows of the embedding, the drafter's own or the
            target's; None is the target's own factor on the target's rows, 1 on the drafter's.
        logit_scale, logit_softcap: ``softcap * tanh(scale * logits / softcap)``.
        convolution, selector: what makes a drafter DFlash 2; both or neither.
        dtype: torch dtype name of the weights.
        quantization: how the checkpoint holds its weights, which are dequantised when they are
            loaded: the method and its layouts, such as "compressed-tensors W4A16"; None where they
            are plain.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dialect: Dialect = "z-lab"
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    hidden_act: str = "silu"
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    norm_style: Literal["rms", "gemma"] = "rms"
    layers: tuple[LayerAttention, ...] = Field(min_length=1)
    window_from: Literal["query", "anchor"] = "query"
    rope: RopeConfig = Field(default_factory=RopeConfig)
    latent_attention: LatentAttentionConfig | None = None
    qk_norm: bool = True
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attention_sinks: bool = False
    attention_value_scale: float | None = None
    attention_gate: Literal["per-head", "per-element"] | None = None

    block_size: int = Field(ge=2)
    sample_from_anchor: bool = False
    mask_token_id: int = Field(ge=0)
    target_layer_ids: tuple[int, ...] = Field(min_length=1)
    last_layer_normed: bool = True
    norm_per_tap: bool = False
    norm_context: bool = False
    num_target_layers: int | None = None
    target_hidden_size: int = Field(gt=0)
    vocab_size: int = Field(ge=0)
    draft_vocab_size: int | None = None
    own_embedding: bool = False
    own_head: bool = False
    own_mask_embedding: bool = False
    embedding_scale: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    convolution: ConvolutionConfig | None = None
    selector: SelectorConfig | None = None
    dtype: str = "bfloat16"
    quantization: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> DrafterConfig:
        from transformers.activations import ACT2FN

        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _require(
            heads % kv_heads == 0,
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}: "
            "correct one of them",
        )
        width = "head_dim" if self.latent_attention is None else "qk_rope_head_dim"
        _require(
            self.rope_head_dim <= WIDEST_HEAD,
            f"{width} is {self.rope_head_dim}: a head has at most {WIDEST_HEAD} values",
        )
        rotary = int(self.rope_head_dim * self.rope.partial_rotary_factor)
        _require(
            rotary % 2 == 0 and rotary > 0,
            f"{width} {self.rope_head_dim} with partial_rotary_factor "
            f"{self.rope.partial_rotary_factor} rotates {rotary} values: make that an even number",
        )
        _require(
            self.hidden_act in ACT2FN,
            f"hidden_act is {self.hidden_act!r}: name an activation that Transformers has, "
            "such as 'silu'",
        )
        _require(
            self.dtype in DTYPES,
            f"dtype is {self.dtype!r}: the supported ones are {', '.join(DTYPES)}",
        )
        self._check_vocabulary()
        self._check_target_layers()
        self._check_dflash2()
        self._check_latent_attention()
        for name in ("embedding_scale", "logit_scale", "attention_value_scale", "logit_softcap"):
            value = getattr(self, name)
            _require(
                value is None or (math.isfinite(value) and value > 0),
                f"{name} is {value!r}: give a positive number or leave it out",
            )
        return self

    def _check_vocabulary(self) -> None:
        if self.vocab_size == 0:
            by_token = ("own_embedding", "own_head", "draft_vocab_size", "selector")
            named = [name for name in by_token if getattr(self, name)]
            _require(
                not named,
                f"vocab_size is missing, but {', '.join(named)} of this drafter has a row a token: "
                "add the target's vocab_size to config.json",
            )
            return
        _require(
            self.own_mask_embedding or self.mask_token_id < self.vocab_size,
            f"mask_token_id is {self.mask_token_id}, outside the vocabulary of {self.vocab_size}: "
            "give an id below vocab_size or a mask_embedding tensor",
        )
        if self.draft_vocab_size is None:
            return
        _require(
            0 < self.draft_vocab_size <= self.vocab_size,
            f"draft_vocab_size is {self.draft_vocab_size}: it must be between 1 and vocab_size "
            f"{self.vocab_size}",
        )
        _require(
            self.own_head,
            f"draft_vocab_size is {self.draft_vocab_size} but there is no lm_head.weight: a "
            "reduced vocabulary needs its own head",
        )

    def _check_target_layers(self) -> None:
        ids = self.target_layer_ids
        for position, layer in enumerate(ids):
            _require(
                layer >= -1,
                f"target layer id {layer} is below -1 (the embedding output): give ids from -1 up",
            )
            _require(
                layer not in ids[:position],
                f"target layer id {layer} is listed twice in {list(ids)}: list each layer once",
            )
            _require(
                self.num_target_layers is None or layer < self.num_target_layers,
                f"target layer id {layer} is out of range: the target has num_target_layers "
                f"{self.num_target_layers}, so ids end at {(self.num_target_layers or 0) - 1}",
            )

    def _check_dflash2(self) -> None:
        convolution, selector = self.convolution, self.selector
        _require(
            (convolution is None) == (selector is None),
            f"convolution is {convolution!r} and selector is {selector!r}: a DFlash 2 drafter has "
            "both, a DFlash drafter neither",
        )
        if convolution is None or selector is None:
            return
        _require(
            self.hidden_size % convolution.group_size == 0,
            f"conv_group_size is {convolution.group_size}, which does not divide hidden_size "
            f"{self.hidden_size}: correct one of them",
        )
        _require(
            convolution.kernel_size <= self.block_size,
            f"conv_kernel_size is {convolution.kernel_size}, more than block_size "
            f"{self.block_size}: correct one of them",
        )
        _require(
            selector.top_k <= self.vocab_size,
            f"selector_top_k is {selector.top_k}, more than vocab_size {self.vocab_size}: correct "
            "one of them",
        )
        _require(
            self.draft_vocab_size is None,
            f"draft_vocab_size is {self.draft_vocab_size}, but the selector of a DFlash 2 drafter "
            "chooses among all of the target's tokens: leave draft_vocab_size out",
        )
        _require(
            not self.sample_from_anchor,
            "sample_from_anchor is true, but a DFlash 2 drafter drafts from its mask rows alone: "
            "leave sample_from_anchor out",
        )

    def _check_latent_attention(self) -> None:
        latent = self.latent_attention
        if latent is None:
            return
        wanted = {
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": latent.stored_head_dim,
            "qk_norm": False,
            "attention_sinks": False,
            "attention_value_scale": None,
            "norm_style": "rms",
        }
        for name, value in wanted.items():
            _require(
                getattr(self, name) == value,
                f"{name} is {getattr(self, name)!r}, but in layers with latent attention (MLA) it "
                f"is {value!r}: correct it",
            )
        partial = self.rope.partial_rotary_factor
        _require(
            partial == 1.0,
            f"partial_rotary_factor is {partial}, but latent attention (MLA) rotates all of "
            "qk_rope_head_dim: leave it out",
        )

    def require_target(self, hidden_size: int, num_layers: int) -> None:
        """Check the drafter against a target's width and layers.

        Raises:
            DFlashError: names the first thing that does not fit.
        """
        if self.target_hidden_size != hidden_size:
            raise DFlashError(
                f"the drafter reads features {self.target_hidden_size} wide but the target's "
                f"hidden_size is {hidden_size}: use the drafter made for this target"
            )
        outside = [layer for layer in self.target_layer_ids if layer >= num_layers]
        if outside:
            counts = (
                f", or add num_target_layers {num_layers} to config.json if ids count boundaries"
                if self.num_target_layers is None and max(outside) == num_layers
                else ""
            )
            raise DFlashError(
                f"the drafter reads target layer {outside[0]} but the target has {num_layers} "
                f"layers (0 to {num_layers - 1}): use the drafter made for this target{counts}"
            )

    def other_depth(self, num_layers: int) -> str | None:
        """What a target's number of layers makes doubtful, or None."""
        if self.num_target_layers in (None, num_layers):
            return None
        return f"made for a target of {self.num_target_layers} layers, this one has {num_layers}"

    @property
    def rope_head_dim(self) -> int:
        """Width of the part of a head that the rotation is made for."""
        latent = self.latent_attention
        return self.head_dim if latent is None else latent.qk_rope_head_dim

    @property
    def attention_scale(self) -> float:
        """Factor on products of queries and keys.

        With latent attention, scaled rotation has a share in it, ``mscale_all_dim`` (DeepSeek;
        SpecForge, pull request 758).
        """
        latent, rope = self.latent_attention, self.rope
        if latent is None:
            return float(self.head_dim**-0.5)
        scale = float(latent.qk_head_dim**-0.5)
        weight = rope.parameters.get("mscale_all_dim")
        if rope.type == "default" or not weight:
            return scale
        return scale * float(0.1 * weight * math.log(rope.parameters.get("factor", 1.0)) + 1.0) ** 2

    def reads_before_norm(self, num_layers: int) -> bool:
        """Whether a feature is the output of the last of a target's layers before its final norm.

        Args:
            num_layers: of the target.
        """
        return not self.last_layer_normed and num_layers - 1 in self.target_layer_ids

    @property
    def num_draft_tokens(self) -> int:
        """Tokens that one block drafts: the number of speculative tokens."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1


def build_config(values: dict[str, Any]) -> DrafterConfig:
    """A validated configuration from field values.

    Raises:
        DFlashError: names the first field that is wrong, its value and what it must be.
    """
    try:
        return DrafterConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error":
            raise DFlashError(message) from None
        field = ".".join(str(part) for part in first["loc"])
        raise DFlashError(f"{field} is {first['input']!r}: {message}") from None


def spread_layers(num_target_layers: int, count: int) -> tuple[int, ...]:
    """``count`` target layers from the second to the third last, evenly (PyPI dflash 0.1.0)."""
    if count == 1:
        return (num_target_layers // 2,)
    span = num_target_layers - 4
    return tuple(round(1 + i * span / (count - 1)) for i in range(count))
