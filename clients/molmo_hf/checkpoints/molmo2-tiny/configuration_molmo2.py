"""Molmo2's configuration classes, native to transformers 5 and readable by 4.57.

Knows: the fields of a released `config.json`, and one of ours, `bidirectional`.
Does not know: files, tokenizers. Self-contained, so that an export can carry it.

On disk stand `rope_theta`, `rope_scaling` and `rope_scaling_layers` as released; in memory
`rope_parameters` holds the same facts, which is where transformers 5 and vLLM look for them.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

BIDIRECTIONAL_KINDS = ("all", "none")


class Molmo2VitConfig(PretrainedConfig):
    """The vision tower: a ViT without final norm, as released (SigLIP) without class token.

    `class_token` and `pre_norm` are ours, for towers of CLIP and DINOv2; absent where they are
    false, as in a released file.
    """

    model_type = "molmo2"
    base_config_key = "vit_config"

    def __init__(
        self,
        hidden_size: int = 1152,
        intermediate_size: int = 4304,
        num_hidden_layers: int = 27,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        head_dim: int = 72,
        hidden_act: str = "gelu_pytorch_tanh",
        layer_norm_eps: float = 1e-6,
        image_default_input_size: tuple[int, int] = (378, 378),
        image_patch_size: int = 14,
        image_num_pos: int = 729,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        initializer_range: float = 0.02,
        float32_attention: bool = True,
        class_token: bool = False,
        pre_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.image_default_input_size = list(image_default_input_size)
        self.image_patch_size = image_patch_size
        self.image_num_pos = image_num_pos
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.initializer_range = initializer_range
        self.float32_attention = float32_attention
        self.class_token = class_token
        self.pre_norm = pre_norm
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As released, with our own fields only where they say something."""
        fields = super().to_dict()
        for name in ("class_token", "pre_norm"):
            if not fields[name]:
                del fields[name]
        return fields

    @property
    def image_num_patch(self) -> tuple[int, int]:
        """Patches (rows, columns) of one crop."""
        height, width = self.image_default_input_size
        return height // self.image_patch_size, width // self.image_patch_size


class Molmo2AdapterConfig(PretrainedConfig):
    """Pooling and projector between vision tower and decoder."""

    model_type = "molmo2"
    base_config_key = "adapter_config"

    def __init__(
        self,
        vit_layers: tuple[int, ...] = (-3, -9),
        pooling_attention_mask: bool = True,
        hidden_size: int = 1152,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 16,
        head_dim: int = 72,
        float32_attention: bool = True,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        hidden_act: str = "silu",
        intermediate_size: int = 18944,
        text_hidden_size: int = 3584,
        image_feature_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vit_layers = list(vit_layers)
        self.pooling_attention_mask = pooling_attention_mask
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.float32_attention = float32_attention
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.hidden_act = hidden_act
        self.intermediate_size = intermediate_size
        self.text_hidden_size = text_hidden_size
        self.image_feature_dropout = image_feature_dropout
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class Molmo2TextConfig(PretrainedConfig):
    """The decoder: Qwen3-type (pre-norm, norm per head) or OLMo3-type (post-norm, full norm)."""

    model_type = "molmo2_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers' own form

    def __init__(
        self,
        hidden_size: int = 3584,
        num_attention_heads: int = 28,
        num_key_value_heads: int | None = 4,
        head_dim: int = 128,
        vocab_size: int = 152064,
        additional_vocab_size: int = 128,
        qkv_bias: bool = True,
        num_hidden_layers: int = 48,
        intermediate_size: int = 18944,
        hidden_act: str = "silu",
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        residual_dropout: float = 0.0,
        max_position_embeddings: int = 4096,
        rope_theta: float = 1_000_000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_scaling_layers: list[int] | None = None,
        use_qk_norm: bool = False,
        qk_norm_type: str = "olmo",
        layer_norm_eps: float = 1e-6,
        norm_after: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.additional_vocab_size = additional_vocab_size
        self.qkv_bias = qkv_bias
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.residual_dropout = residual_dropout
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        # transformers 5 keeps all rope facts here; `to_dict` writes the released fields.
        self.rope_parameters = {
            "rope_type": "default",
            **(rope_scaling or {}),
            "rope_theta": rope_theta,
        }
        self.rope_scaling_layers = rope_scaling_layers
        self.use_qk_norm = use_qk_norm
        self.qk_norm_type = qk_norm_type
        self.layer_norm_eps = layer_norm_eps
        self.norm_after = norm_after
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        kwargs.pop("rope_parameters", None)  # a file that carries it says nothing new
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Keep transformers 5 from rewriting the rope fields: they are complete already."""
        return kwargs

    def to_dict(self) -> dict[str, Any]:
        """As released: `rope_theta` and `rope_scaling`, which every reader understands."""
        fields = super().to_dict()
        rope = dict(fields.pop("rope_parameters"))
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        return fields


class Molmo2Config(PretrainedConfig):
    """Molmo2 as a whole.

    `bidirectional` is ours: "all" — all visual tokens of a prompt see each other, as the released
    models compute; "none" — causal everywhere. Absent in a released file, where it means "all".
    """

    model_type = "molmo2"
    sub_configs = {  # noqa: RUF012 - transformers' own form
        "vit_config": Molmo2VitConfig,
        "adapter_config": Molmo2AdapterConfig,
        "text_config": Molmo2TextConfig,
    }

    def __init__(
        self,
        vit_config: Molmo2VitConfig | dict[str, Any] | None = None,
        adapter_config: Molmo2AdapterConfig | dict[str, Any] | None = None,
        text_config: Molmo2TextConfig | dict[str, Any] | None = None,
        image_start_token_id: int | None = None,
        low_res_image_start_token_id: int | None = None,
        image_end_token_id: int | None = None,
        image_low_res_id: int | None = None,
        image_patch_id: int | None = None,
        image_col_id: int | None = None,
        frame_start_token_id: int | None = None,
        frame_end_token_id: int | None = None,
        use_frame_special_tokens: bool = True,
        initializer_range: float = 0.02,
        bidirectional: str = "all",
        **kwargs: Any,
    ) -> None:
        if bidirectional not in BIDIRECTIONAL_KINDS:
            raise ValueError(
                f"bidirectional is {bidirectional!r}, allowed are {BIDIRECTIONAL_KINDS}: "
                "set the one that the checkpoint was trained with"
            )
        self.vit_config = _part(Molmo2VitConfig, vit_config)
        self.adapter_config = _part(Molmo2AdapterConfig, adapter_config)
        self.text_config = _part(Molmo2TextConfig, text_config)
        base = self.text_config.vocab_size  # special token i has id base + i
        self.image_start_token_id = _or(image_start_token_id, base)
        self.image_end_token_id = _or(image_end_token_id, base + 1)
        self.image_patch_id = _or(image_patch_id, base + 2)
        self.image_high_res_id = self.image_patch_id
        self.image_col_id = _or(image_col_id, base + 3)
        self.low_res_image_start_token_id = _or(low_res_image_start_token_id, base + 4)
        self.image_low_res_id = _or(image_low_res_id, base + 6)
        self.frame_start_token_id = _or(frame_start_token_id, base + 7)
        self.frame_end_token_id = _or(frame_end_token_id, base + 8)
        self.use_frame_special_tokens = use_frame_special_tokens
        self.initializer_range = initializer_range
        self.bidirectional = bidirectional
        self.use_cache = kwargs.pop("use_cache", True)
        if bidirectional == "none":
            self.is_mm_prefix_lm = False  # vLLM reads this name
        kwargs.pop("is_mm_prefix_lm", None)
        kwargs.pop("image_high_res_id", None)
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def visual_token_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that see each other when `bidirectional` is "all"."""
        return (
            self.image_patch_id,
            self.image_col_id,
            self.image_start_token_id,
            self.low_res_image_start_token_id,
            self.frame_start_token_id,
            self.image_end_token_id,
            self.frame_end_token_id,
            self.image_low_res_id,
        )


def _part(cls: type[PretrainedConfig], value: PretrainedConfig | dict[str, Any] | None) -> Any:
    if value is None:
        return cls()
    return cls(**value) if isinstance(value, dict) else value


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
