"""ConvNeXt by timm: ImageNet-22k, and the image towers of OpenCLIP.

Four stages of convolutions, so any size is taken. Tokens are the last stage's; the norm
that timm has behind its pooling is no part of them.
"""

from __future__ import annotations

from dataclasses import replace

from vlm_encoders.spec import EncoderSpec, Stage

__all__ = ["SPECS"]

_WIDTHS = {"t": 96, "s": 96, "b": 128, "l": 192, "xl": 256, "xxl": 384}
_IMAGENET = EncoderSpec(
    name="convnext-t-224",
    family="convnext",
    backend="timm",
    source="convnext_tiny.fb_in22k",
    weights="timm/convnext_tiny.fb_in22k",
    image_size=(224, 224),
    positions="convolutions alone",
    packs=True,
    stride=32,
    dim=768,
    stages=tuple(Stage(96 << place, 4 << place) for place in range(4)),
    num_layers=4,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    resize="crop",
    crop_pct=0.875,
    parameters=27_818_592,
    licence="Apache-2.0",
    reference="https://arxiv.org/abs/2201.03545",
)
_CLIP = replace(
    _IMAGENET,
    family="convnext-clip",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    crop_pct=1.0,
    reference="https://github.com/mlfoundations/open_clip",
)


def _row(base: EncoderSpec, name: str, source: str, parameters: int, side: int = 224) -> EncoderSpec:
    width = _WIDTHS[name.removesuffix(f"-{side}").rpartition("-")[2]]
    return replace(
        base,
        name=name,
        source=source,
        weights=f"timm/{source}",
        image_size=(side, side),
        dim=8 * width,
        stages=tuple(Stage(width << place, 4 << place) for place in range(4)),
        parameters=parameters,
    )


SPECS = (
    _IMAGENET,
    _row(_IMAGENET, "convnext-s-224", "convnext_small.fb_in22k", 49_453_152),
    _row(_IMAGENET, "convnext-b-224", "convnext_base.fb_in22k", 87_564_416),
    _row(_IMAGENET, "convnext-l-224", "convnext_large.fb_in22k", 196_227_264),
    _row(_IMAGENET, "convnext-xl-224", "convnext_xlarge.fb_in22k", 348_143_872),
    _row(_CLIP, "convnext-clip-b-256", "convnext_base.clip_laion2b_augreg", 87_564_416, 256),
    _row(_CLIP, "convnext-clip-b-320", "convnext_base.clip_laiona_augreg_320", 87_564_416, 320),
    _row(_CLIP, "convnext-clip-l-256", "convnext_large_mlp.clip_laion2b_augreg", 196_227_264, 256),
    _row(_CLIP, "convnext-clip-l-320", "convnext_large_mlp.clip_laion2b_ft_soup_320", 196_227_264, 320),
    _row(_CLIP, "convnext-clip-xxl-256", "convnext_xxlarge.clip_laion2b_soup", 843_391_872, 256),
)
