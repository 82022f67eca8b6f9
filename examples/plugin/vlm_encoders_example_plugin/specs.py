"""The encoders of this plugin, as data: `vlm-encoders list` reads it without torch."""

from vlm_encoders.spec import EncoderSpec

__all__ = ["SPECS"]

SPECS = (
    EncoderSpec(
        name="example-vit-tiny",
        family="vit",
        backend="timm",
        source="vit_tiny_patch16_224",
        weights="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        image_size=(224, 224),
        stride=16,
        dim=192,
        heads=3,
        mlp_dim=768,
        num_layers=12,
        num_prefix=1,
        final_norm=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        resize="crop",
        crop_pct=0.9,
        parameters=5_524_416,
        licence="Apache-2.0",
        reference="https://arxiv.org/abs/2106.10270",
    ),
)
