"""Config class of Step-3.7 for vLLM, so that a checkpoint needs no remote code.

Why vLLM 0.32 needs one: transformers 5.19's native ``Step3p7TextConfig`` hides ``num_attention_heads`` behind
per-layer values, on which vLLM stops (AmbiguousGlobalPerLayerAttributeError), and vLLM's own ``Step3p5Config`` cuts
``layer_types`` to the trunk's layers although its MTP layers index the entries beyond.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.transformers_utils.configs.step3p5 import Step3p5Config


class Step3p7VisionConfig(PreTrainedConfig):
    """The vision tower, in the hub's spelling (``width``, ``layers``, ``heads``)."""

    model_type = "perception_encoder"

    def __init__(
        self,
        width: int = 1536,
        layers: int = 47,
        heads: int = 16,
        image_size: int = 728,
        patch_size: int = 14,
        mlp_ratio: float = 8960 / 1536,
        num_channels: int = 3,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        use_cls_token: bool = False,
        use_ln_pre: bool = True,
        use_ln_post: bool = False,
        use_abs_posemb: bool = True,
        use_rope2d: bool = True,
        ls_init_value: float = 0.1,
        output_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.width = width
        self.layers = layers
        self.heads = heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.mlp_ratio = mlp_ratio
        self.num_channels = num_channels
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.use_cls_token = use_cls_token
        self.use_ln_pre = use_ln_pre
        self.use_ln_post = use_ln_post
        self.use_abs_posemb = use_abs_posemb
        self.use_rope2d = use_rope2d
        self.ls_init_value = ls_init_value
        self.output_dim = output_dim
        super().__init__(**kwargs)


class Step3p7TextConfig(Step3p5Config):
    """vLLM's text config with the per-layer lists whole, MTP layers included."""

    def __init__(
        self,
        layer_types: list[str] | None = None,
        rope_theta: float | list[float] = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(layer_types=layer_types, **kwargs)
        self.layer_types = layer_types
        # After the base class, which would standardise them; vLLM's model wants the hub's one theta a layer.
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling


class Step3p7Config(PreTrainedConfig):
    """Wrapper of the text and vision configs, as in the hub's ``config.json``."""

    model_type = "step3p7"

    def __init__(
        self,
        text_config: dict[str, Any] | Step3p7TextConfig | None = None,
        vision_config: dict[str, Any] | Step3p7VisionConfig | None = None,
        image_token_id: int = 128001,
        projector_bias: bool = False,
        understand_projector_stride: int = 2,
        **kwargs: Any,
    ) -> None:
        text = text_config or {}
        vision = vision_config or {}
        self.text_config = Step3p7TextConfig(**text) if isinstance(text, dict) else text
        self.vision_config = Step3p7VisionConfig(**vision) if isinstance(vision, dict) else vision
        self.image_token_id = image_token_id
        self.projector_bias = projector_bias
        self.understand_projector_stride = understand_projector_stride
        self.hidden_size = self.text_config.hidden_size
        self.max_position_embeddings = self.text_config.max_position_embeddings
        super().__init__(**kwargs)


def register() -> None:
    """Make vLLM, and through it transformers' Auto classes, read ``model_type: step3p7`` with our class."""
    _CONFIG_REGISTRY[Step3p7Config.model_type] = Step3p7Config
