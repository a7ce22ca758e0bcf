"""Module kinds of other libraries that compute the same as torch's, by dotted name; none is imported here.

transformers' norms compute in float32 for every dtype. Those of Gemma scale by 1 + weight, which has the same gradient
as scaling by weight.
"""

from ngd_dist.layers.base import Layer
from ngd_dist.layers.groupnorm import GroupNorm
from ngd_dist.layers.layernorm import ChannelLayerNorm, ChannelRMSNorm, LayerNorm, RMSNorm
from ngd_dist.layers.linear import Linear, TransposedLinear

__all__ = ["LAYERS_BY_NAME"]

TRANSFORMERS_RMS_NORMS = (
    "deepseek_v2.modeling_deepseek_v2.DeepseekV2RMSNorm",
    "deepseek_v3.modeling_deepseek_v3.DeepseekV3RMSNorm",
    "gemma.modeling_gemma.GemmaRMSNorm",
    "gemma2.modeling_gemma2.Gemma2RMSNorm",
    "gemma3.modeling_gemma3.Gemma3RMSNorm",
    "glm4.modeling_glm4.Glm4RMSNorm",
    "gpt_oss.modeling_gpt_oss.GptOssRMSNorm",
    "granite.modeling_granite.GraniteRMSNorm",
    "llama.modeling_llama.LlamaRMSNorm",
    "mistral.modeling_mistral.MistralRMSNorm",
    "mixtral.modeling_mixtral.MixtralRMSNorm",
    "olmo2.modeling_olmo2.Olmo2RMSNorm",
    "phi3.modeling_phi3.Phi3RMSNorm",
    "qwen2.modeling_qwen2.Qwen2RMSNorm",
    "qwen2_moe.modeling_qwen2_moe.Qwen2MoeRMSNorm",
    "qwen3.modeling_qwen3.Qwen3RMSNorm",
    "qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm",
    "smollm3.modeling_smollm3.SmolLM3RMSNorm",
    "mt5.modeling_mt5.MT5LayerNorm",
    "t5.modeling_t5.T5LayerNorm",
    "umt5.modeling_umt5.UMT5LayerNorm",
)

LAYERS_BY_NAME: dict[str, type[Layer]] = {
    "timm.layers.linear.Linear": Linear,
    "timm.layers.norm.GroupNorm": GroupNorm,
    "timm.layers.norm.GroupNorm1": GroupNorm,
    "timm.layers.norm.LayerNorm": LayerNorm,
    "timm.layers.norm.LayerNormFp32": LayerNorm,
    "timm.layers.norm.LayerNorm2d": ChannelLayerNorm,
    "timm.layers.norm.LayerNorm2dFp32": ChannelLayerNorm,
    "timm.layers.norm.LayerNormExp2d": ChannelLayerNorm,
    "timm.layers.norm.RmsNorm": RMSNorm,
    "timm.layers.norm.RmsNormFp32": RMSNorm,
    "timm.layers.norm.RmsNorm2d": ChannelRMSNorm,
    "timm.layers.norm.RmsNorm2dFp32": ChannelRMSNorm,
    "torchvision.models.convnext.LayerNorm2d": ChannelLayerNorm,
    "transformers.pytorch_utils.Conv1D": TransposedLinear,
    **{f"transformers.models.{name}": RMSNorm for name in TRANSFORMERS_RMS_NORMS},
}
