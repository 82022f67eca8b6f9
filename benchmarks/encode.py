"""Encode against what users run today: LLaVA's tower, or the library's own model called bare.

python benchmarks/encode.py [--against tower] [--layer -2] [--dtype bfloat16] [--batch 4] [--rounds 5] [--device cuda]
python benchmarks/encode.py --against library [--encoder timm:vit_base_patch16_224]

LLaVA's `clip_encoder.py` runs all blocks of CLIP ViT-L/14 at 336 px, keeps all hidden states and uses one. The bare
library call is the last layer's tokens of an untouched model: what cannot be undercut, and must not be exceeded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from paired import added_memory, describe_machine, measure, memory_in_fresh_process, table
from torch import Tensor, nn

from vlm_encoders import Encoder, create_encoder

OURS = "vlm-encoders"


def llava_tower(layer: int) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """Make the whole tower of CLIP ViT-L/14 at 336 px and LLaVA's way to call it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    tower = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=336, patch_size=14, hidden_act="quick_gelu"))
    # The blocks behind the feature layer keep their own random weights: they change no token that is used.
    return tower, lambda model, pixels: model(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]


def library_model(encoder: Encoder) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor]]:
    """Make the library's own model, and the shortest call of it."""
    spec = encoder.spec
    if spec.backend == "transformers":
        network: Any = encoder.get_submodule("network")
        return type(network)(network.config), lambda model, pixels: model(pixels).last_hidden_state
    if spec.backend == "timm":
        import timm

        bare = timm.create_model(spec.source, num_classes=0)
        return bare, lambda model, pixels: model.forward_features(pixels)
    import open_clip

    visual: Any = open_clip.create_model(spec.source).visual
    if hasattr(visual, "trunk"):
        return visual.trunk, lambda model, pixels: model.forward_features(pixels)
    # The call of the tower itself pools and projects: that is no tokens.
    reading = {"indices": [spec.num_layers - 1], "intermediates_only": True, "normalize_intermediates": spec.final_norm}
    if not spec.stages:
        reading["output_fmt"] = "NLC"
    return visual, lambda model, pixels: _tokens(model.forward_intermediates(pixels, **reading)["image_intermediates"])


def _tokens(layers: list[Tensor]) -> Tensor:
    return layers[0].flatten(2).transpose(1, 2) if layers[0].ndim == 4 else layers[0]


def build(options: argparse.Namespace) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor], Encoder]:
    """Make both sides with the same random weights."""
    torch.manual_seed(0)
    if options.against == "tower":
        encoder = create_encoder("clip-vit-l-14-336", pretrained=False, feature_layer=options.layer)
        theirs, call = llava_tower(options.layer)
    else:
        encoder = create_encoder(options.encoder, pretrained=False, feature_layer=-1)
        theirs, call = library_model(encoder)
    left = theirs.load_state_dict(encoder.get_submodule("network").state_dict(), strict=False)
    if left.unexpected_keys:
        raise SystemExit(f"the towers differ: {left.unexpected_keys[:3]}")
    dtype = getattr(torch, options.dtype)
    return theirs.to(options.device, dtype).eval(), call, encoder.to(options.device, dtype).eval()


def compare(theirs: Tensor, ours: Tensor) -> str:
    """Say how far two outputs are apart, prefix tokens left out; pooled ones cannot be compared."""
    if theirs.shape != ours.shape:
        theirs = theirs.reshape(len(theirs), -1, theirs.shape[-1])[:, -ours.shape[1] :]
    if theirs.shape != ours.shape:
        return "of another shape"
    return "bit-equal" if torch.equal(theirs, ours) else f"apart by {(theirs - ours).abs().max():.1e}"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=("tower", "library"), default="tower")
    parser.add_argument("--encoder", default="clip-vit-l-14-336", help="with --against library")
    parser.add_argument("--layer", type=int, default=-2, help="with --against tower")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", default=None)
    options = parser.parse_args()
    model, call, encoder = build(options)
    today = "LLaVA-style tower" if options.against == "tower" else f"{encoder.spec.backend}, bare"
    shape = (options.batch, *encoder.pixel_shape)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(options.device, getattr(torch, options.dtype))
    variants = {
        today: torch.no_grad()(lambda: call(model, pixels)),
        OURS: torch.no_grad()(lambda: encoder(pixels).tokens),
    }
    if options.memory_of:
        print(added_memory(variants[options.memory_of], options.device))
        return
    tokens = compare(variants[today](), variants[OURS]())
    seconds = measure(variants, options.rounds, options.device)
    memory = {name: memory_in_fresh_process(name) for name in variants}
    extra = {name: f"{size / 2**20:.0f} MiB ({size / memory[today]:.2f})" for name, size in memory.items()}
    layer = f"layer {encoder.spec.feature_layer} of {encoder.spec.num_layers}"
    print(f"{encoder.spec.name}, {layer}, {options.dtype}, batch {options.batch}; tokens {tokens}")
    print(describe_machine(options.device))
    print(table(seconds, today, extra))


if __name__ == "__main__":
    main()
