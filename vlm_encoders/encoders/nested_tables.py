"""Where VLMs keep their vision towers, and how code other than transformers' names the parts of a tower."""

from __future__ import annotations

__all__ = [
    "DEEPER",
    "INTERN_ENTRIES",
    "INTERN_KEYS",
    "INTERN_SPLITS",
    "LIKE_SIGLIP",
    "LLAVA",
    "LLAVA_PREFIX",
    "PLACES",
    "SIGLIP_ENTRIES",
]

# Where each VLM of transformers keeps its vision tower; the tower's own model_type stands in its vision_config.
PLACES = {
    **dict.fromkeys(("aya_vision", "cohere2_vision", "gemma3", "got_ocr2", "granite4_vision"), "vision_tower"),
    **dict.fromkeys(("internvl", "lfm2_vl", "llava", "llava_next", "llava_next_video"), "vision_tower"),
    **dict.fromkeys(("llava_onevision", "mistral3", "paligemma", "shieldgemma2", "vipllava"), "vision_tower"),
    **dict.fromkeys(("glm4v", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), "visual"),
    **dict.fromkeys(("aimv2", "altclip", "chinese_clip", "clip", "metaclip_2", "siglip", "siglip2"), "vision_model"),
    **dict.fromkeys(("deepseek_vl", "idefics2", "idefics3", "llama4", "mllama", "smolvlm"), "vision_model"),
    **dict.fromkeys(("blip", "blip-2", "instructblip"), "vision_model"),
    **dict.fromkeys(("lighton_ocr", "sam2", "sam2_video"), "vision_encoder"),
    "sam3": r"vision_encoder\.backbone",
    "sam3_vision_model": "backbone",
    "sam3_video": r"detector_model\.vision_encoder\.backbone",
    "video_llava": "image_tower",
}
# These are SigLIP's tower, but for the places of patches in views of another size.
LIKE_SIGLIP = ("idefics2_vision", "idefics3_vision", "smolvlm_vision")
SIGLIP_ENTRIES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout"),
)
# Configs that hold the tower's deeper than in their vision_config.
DEEPER = {
    "sam3": "vision_config.backbone_config",
    "sam3_vision_model": "backbone_config",
    "sam3_video": "detector_config.vision_config.backbone_config",
}
LLAVA = ("llava", "llava_gemma", "llava_llama", "llava_mistral", "llava_mixtral", "llava_mpt", "llava_qwen")
LLAVA_PREFIX = ((r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", ""),)
# InternViT of OpenGVLab's own code, in the words of transformers' InternVLVisionModel.
INTERN_KEYS = (
    (r"^embeddings\.class_embedding$", "embeddings.cls_token"),
    (r"^embeddings\.position_embedding$", "embeddings.position_embeddings"),
    (r"^embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
    (r"^encoder\.layers\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.(q_norm|k_norm)\.", r".attention.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls1$", ".lambda_1"),
    (r"\.ls2$", ".lambda_2"),
)
INTERN_SPLITS = (
    (r"(.*)\.attn\.qkv\.(weight|bias)", tuple(rf"\1.attention.{part}_proj.\2" for part in ("q", "k", "v"))),
)
INTERN_ENTRIES = {
    **{entry: entry for entry in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    **{entry: entry for entry in ("hidden_act", "norm_type", "layer_norm_eps", "image_size", "patch_size")},
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
}
