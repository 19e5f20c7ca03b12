"""The one PyTorch model of Molmo2: decoder, fusion, mask, generation.

Knows: tensors in, logits out; the same class serves training, export and reference inference.
Does not know: tokenizers, files, prompts. Weight names are those of the released checkpoints.
Self-contained, so that an export can carry it.

Shapes: B rows, S tokens, D width, V base vocabulary, T keys (cached and new).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .configuration_molmo2 import Molmo2Config, Molmo2TextConfig
from .modeling_molmo2_vision import Molmo2VisionBackbone

EXAMPLE_STRIDE = 100_000
"""Sub-segment ids of packed example k are k · 100 000 and up."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""An attention of its own: (B, heads, S, D) and twice (B, kv heads, T, D) → (B, heads, S, D).

In a mask's place it says who sees whom without S · T values; it scales scores by 1 / √D.
"""


@dataclass
class Molmo2Output(ModelOutput):
    """`logits` (B, S, V); `loss` only when `labels` were given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: Tensor | None = None


class RMSNorm(nn.Module):
    """Normalised in float32, cast back, then scaled."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rope_frequencies(config: Molmo2TextConfig, *, is_scaled: bool) -> tuple[Tensor, float]:
    """Inverse frequencies (head_dim / 2,) and the factor on cos and sin."""
    rope, dim = config.rope_parameters, config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    periods = rope["rope_theta"] ** exponents
    kind = rope["rope_type"]
    if kind == "default" or not is_scaled:
        return 1.0 / periods, 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r}, allowed are 'default' and 'yarn'")

    def dim_of(rotations: float) -> float:
        length = rope["original_max_position_embeddings"]
        return (
            dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
        )

    low = max(math.floor(dim_of(rope.get("beta_fast") or 32.0)), 0)
    high = min(math.ceil(dim_of(rope.get("beta_slow") or 1.0)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1.0 - ramp.clamp(0, 1)  # 1: the frequency stays, 0: it is stretched by `factor`
    inverse = (1.0 - kept) / (rope["factor"] * periods) + kept / periods
    return inverse, rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32 on x (B, heads, S, head_dim); cos, sin (B, 1, S, head_dim)."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


class Molmo2Embedding(nn.Module):
    """Base vocabulary and the extra rows behind it."""

    def __init__(self, config: Molmo2TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size))
        self.new_embedding = nn.Parameter(
            torch.zeros(config.additional_vocab_size, config.hidden_size)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, torch.cat([self.embedding, self.new_embedding]))


class Molmo2Attention(nn.Module):
    def __init__(self, config: Molmo2TextConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.sizes = [n * config.head_dim for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
        self.att_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.qkv_bias)
        self.attn_out = nn.Linear(self.sizes[0], config.hidden_size, bias=False)
        self.norms_heads = config.qk_norm_type == "qwen3"
        self.q_norm = self.k_norm = None
        if config.use_qk_norm:
            q_dim, k_dim = (self.head_dim,) * 2 if self.norms_heads else self.sizes[:2]
            self.q_norm = RMSNorm(q_dim, config.layer_norm_eps)
            self.k_norm = RMSNorm(k_dim, config.layer_norm_eps)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, its heads, S, head_dim), as they are attended."""
        q, k, v = self.att_proj(x).split(self.sizes, dim=-1)
        if self.q_norm is not None and not self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(*t.shape[:-1], -1, self.head_dim) for t in (q, k, v))
        if self.q_norm is not None and self.norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Attend | None,
        cache: Cache | None,
    ) -> Tensor:
        q, k, v = self.project(x, rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        # Under autocast a CPU attends in float32: its bfloat16 kernel took 2.1 times as long.
        is_widened = q.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if is_widened:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(
            q.device.type, enabled=not is_widened and torch.is_autocast_enabled(q.device.type)
        ):
            out = self._attended(q, k, v, mask)
        return self.attn_out(out.transpose(1, 2).flatten(2))

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Attend | None) -> Tensor:
        if callable(mask):
            return mask(q, k, v)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=self.n_heads != self.n_kv_heads
        )


class Molmo2Mlp(nn.Module):
    """SwiGLU; `ff_proj` stacks the value first and the gate second."""

    def __init__(self, config: Molmo2TextConfig) -> None:
        super().__init__()
        self.ff_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.ff_out = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.ff_proj(x).chunk(2, dim=-1)
        return self.ff_out(self.act(gate) * value)


class Molmo2DecoderLayer(nn.Module):
    """Norm before each part (Qwen3 type) or after it (OLMo3 type)."""

    def __init__(self, config: Molmo2TextConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Molmo2Attention(config, layer)
        self.mlp = Molmo2Mlp(config)
        self.attn_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.ff_norm = RMSNorm(config.hidden_size, config.layer_norm_eps)
        self.norm_after = config.norm_after
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Attend | None,
        cache: Cache | None,
    ) -> Tensor:
        if self.norm_after:
            x = x + self.dropout(self.attn_norm(self.self_attn(x, rope, mask, cache)))
            return x + self.dropout(self.ff_norm(self.mlp(x)))
        x = x + self.dropout(self.self_attn(self.attn_norm(x), rope, mask, cache))
        return x + self.dropout(self.mlp(self.ff_norm(x)))


class Molmo2Decoder(nn.Module):
    def __init__(self, config: Molmo2TextConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = Molmo2Embedding(config)
        self.emb_drop = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(
            Molmo2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_eps)
        scaled = config.rope_scaling_layers
        self.is_scaled = [
            scaled is None or layer in scaled for layer in range(config.num_hidden_layers)
        ]

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        mask: Tensor | Attend | None,
        cache: Cache | None = None,
    ) -> Tensor:
        ropes = {kind: self._rope(position_ids, kind) for kind in set(self.is_scaled)}
        x = self.emb_drop(x)
        for block, is_scaled in zip(self.blocks, self.is_scaled, strict=True):
            x = block(x, ropes[is_scaled], mask, cache)
        return self.ln_f(x)

    def _rope(self, position_ids: Tensor, is_scaled: bool) -> tuple[Tensor, Tensor]:
        inverse, factor = rope_frequencies(self.config, is_scaled=is_scaled)
        angles = position_ids[:, :, None].float() * inverse.to(position_ids.device)
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        return angles.cos() * factor, angles.sin() * factor


class Tokens(NamedTuple):
    """What decides who sees whom, tensors of one shape. `place` counts along the row."""

    place: Tensor
    valid: Tensor  # bool: not padding
    visual: Tensor  # bool: sees visual tokens behind it
    subsegment: Tensor  # of packed rows and message trees, otherwise 0


def sees(query: Tokens, key: Tokens) -> Tensor:
    """Who sees whom, element by element of what is broadcast; padding sees itself.

    allowed = valid(k) and (k ≤ q, or both visual in the same packed example)
              and subsegment(q) ≤ subsegment(k)
    """
    is_before = key.place <= query.place
    same_example = query.subsegment // EXAMPLE_STRIDE == key.subsegment // EXAMPLE_STRIDE
    both = query.visual & key.visual & same_example
    allowed = key.valid & (is_before | both) & (query.subsegment <= key.subsegment)
    return allowed | (query.place == key.place)


def attention_mask(
    valid: Tensor, visual: Tensor | None = None, subsegments: Tensor | None = None
) -> Tensor:
    """Who `sees` whom, (B, 1, S, S): query rows, key columns.

    `valid`, `visual` are boolean (B, S); `subsegments` (B, S) of packed rows and message trees.
    Rows of padding see everything, as released.
    """
    tokens = Tokens(
        place=torch.arange(valid.shape[1], device=valid.device).expand_as(valid),
        valid=valid,
        visual=torch.zeros_like(valid) if visual is None else visual,
        subsegment=torch.zeros_like(valid, dtype=torch.long)
        if subsegments is None
        else subsegments,
    )
    allowed = sees(Tokens(*(t[:, :, None] for t in tokens)), Tokens(*(t[:, None] for t in tokens)))
    return (allowed | ~valid[:, :, None])[:, None]


class Molmo2Model(nn.Module):
    """Decoder and vision backbone, and how their outputs meet."""

    def __init__(self, config: Molmo2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = Molmo2Decoder(config.text_config)
        self.vision_backbone = Molmo2VisionBackbone(config.vit_config, config.adapter_config)

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Token embeddings, with the next image feature *added* at each `<im_patch>`.

        Raises ValueError when the numbers of features and of `<im_patch>` tokens differ.
        """
        x = self.transformer.wte(input_ids)
        if features is None:
            return x
        places = (input_ids.flatten() == self.config.image_patch_id).nonzero().squeeze(-1)
        if len(places) != len(features):
            raise ValueError(
                f"{len(features)} image features for {len(places)} <im_patch> tokens: "
                "text and pixels must come from the same processor call"
            )
        flat = x.flatten(0, 1).index_add(0, places, features.to(x.dtype))
        return flat.view_as(x)


class Molmo2PreTrainedModel(PreTrainedModel):
    config_class = Molmo2Config
    base_model_prefix = "model"
    _no_split_modules = ("Molmo2DecoderLayer", "Molmo2VisionBlock")
    _supports_sdpa = True
    main_input_name = "input_ids"

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Molmo2Embedding):
            nn.init.normal_(module.embedding, std=std)
            nn.init.normal_(module.new_embedding, std=std)
        elif isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class Molmo2ForConditionalGeneration(Molmo2PreTrainedModel, GenerationMixin):
    """Molmo2 with its language head over the base vocabulary: extra tokens are never predicted."""

    _tied_weights_keys = {"lm_head.weight": "model.transformer.wte.embedding"}  # noqa: RUF012
    accepts_loss_kwargs = False  # transformers' Trainer divides the loss by its accumulated steps

    def __init__(self, config: Molmo2Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = Molmo2Model(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def image_features(
        self,
        pixel_values: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_num_crops: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_token_pooling: Tensor | None = None,
        video_grids: Tensor | None = None,
    ) -> Tensor | None:
        """Features of all media of the batch in order; pooling indices count per image or video."""
        if pixel_values is not None and pixel_values_videos is not None:
            raise ValueError("images and video in one call: the model knows one kind at a time")
        if pixel_values is not None:
            tokens = image_grids[:, 0] * image_grids[:, 1] + image_grids[:, 2] * image_grids[:, 3]
            crops, pooling = pixel_values, image_token_pooling
            n_crops = image_num_crops
        elif pixel_values_videos is not None:
            tokens = video_grids.prod(-1)
            crops, pooling = pixel_values_videos, video_token_pooling
            n_crops = video_grids[:, 0]
        else:
            return None
        first_patch = (n_crops.cumsum(0) - n_crops) * crops.shape[1]
        offset = torch.repeat_interleave(first_patch, tokens)[:, None]
        pooling = torch.where(pooling >= 0, pooling + offset, pooling)
        weight = self.model.vision_backbone.image_vit.patch_embedding.weight
        return self.model.vision_backbone(crops.to(weight.dtype), pooling)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        pixel_values: Tensor | None = None,
        image_token_pooling: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_num_crops: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_token_pooling: Tensor | None = None,
        video_grids: Tensor | None = None,
        **ignored: Any,
    ) -> Molmo2Output:
        """Compute logits (B, S, V), of the last `logits_to_keep` positions when that is positive.

        `attention_mask` (B, past + S) marks real tokens. `token_type_ids` is accepted for the
        released interface; which tokens are visual follows from the ids, so that leaving it out
        cannot change the mask. `labels` (B, S) with −100 for no loss, not shifted. The rest are
        the processor's tensors. Unknown keyword arguments are refused.
        """
        unknown = set(ignored) - IGNORED_INPUTS
        if unknown:
            raise TypeError(f"unknown inputs {sorted(unknown)}; see the signature of forward()")
        features = self.image_features(
            pixel_values,
            image_token_pooling,
            image_grids,
            image_num_crops,
            pixel_values_videos,
            video_token_pooling,
            video_grids,
        )
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        valid = _valid_keys(input_ids, attention_mask, past)
        if position_ids is None:
            position_ids = (valid.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        mask = self._mask(input_ids, valid, past)
        x = self.model.embed(input_ids, features)
        hidden = self.model.transformer(x, position_ids, mask, past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return Molmo2Output(loss, logits, past_key_values, hidden)

    def _mask(self, input_ids: Tensor, valid: Tensor, past: int) -> Tensor:
        if past:
            new = input_ids.shape[1]
            causal = torch.ones(new, past + new, dtype=torch.bool, device=valid.device)
            return (causal.tril(past)[None] & valid[:, None, :])[:, None]
        visual = None
        if self.config.bidirectional == "all":
            ids = torch.tensor(self.config.visual_token_ids, device=input_ids.device)
            visual = torch.isin(input_ids, ids)
        return attention_mask(valid, visual)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Refuse to repeat media: transformers would repeat crops one by one, out of order."""
        if expand_size > 1 and any(kwargs.get(name) is not None for name in MEDIA_INPUTS):
            raise ValueError(
                f"{expand_size} answers or beams for one prompt with media; one is allowed: "
                "repeat the text and its media in the batch instead"
            )
        expanded: tuple[Tensor, dict[str, Any]] = super()._expand_inputs_for_generation(
            expand_size=expand_size, **kwargs
        )
        return expanded

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Media with the first step only; afterwards the tokens that are not cached yet."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs: dict[str, Any] = {
            "input_ids": input_ids[:, past:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if past == 0:
            inputs |= {k: kwargs[k] for k in MEDIA_INPUTS if kwargs.get(k) is not None}
        return inputs


MEDIA_INPUTS = frozenset(
    [
        "pixel_values",
        "image_token_pooling",
        "image_grids",
        "image_num_crops",
        "pixel_values_videos",
        "video_token_pooling",
        "video_grids",
    ]
)
# What transformers' generation passes along and this model derives itself.
IGNORED_INPUTS = frozenset(
    ["cache_position", "return_dict", "output_attentions", "output_hidden_states"]
)


def _valid_keys(input_ids: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    if attention_mask is not None:
        return attention_mask.bool()
    rows, new = input_ids.shape
    return torch.ones(rows, past + new, dtype=torch.bool, device=input_ids.device)
