"""The embedded encoder's row in the encoder table, brought by an entry point like any plugin's."""

from vlm_encoders.spec import EncoderSpec
from vlm_encoders.tiny.weights_folder import encoder_folder

__all__ = ["SPEC"]

SPEC = EncoderSpec(
    name="tiny-digits",
    family="vit",
    backend="timm",
    source="vit_tiny_patch16_224",
    weights=str(encoder_folder()),
    image_size=(64, 64),
    positions="a learned table, which timm resamples for another size in float32, antialiased and bicubic",
    stride=8,
    dim=128,
    heads=4,
    mlp_dim=512,
    num_layers=4,
    final_norm=True,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="crop",
    parameters=826_240,
    licence="CC-BY-4.0",
    reference="https://doi.org/10.24432/C50P49",
    options=(
        ("img_size", (64, 64)),
        ("patch_size", 8),
        ("embed_dim", 128),
        ("depth", 4),
        ("num_heads", 4),
        ("class_token", False),
        ("global_pool", ""),
    ),
)
