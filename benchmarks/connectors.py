"""Each connector against the class of transformers that has the same weights.

python benchmarks/connectors.py [qformer perceiver ...] [--batch 4] [--dtype bfloat16] [--device cuda] [--rounds 7]

Sizes are those of released models. Both sides hold the same weights, once. The ratio is theirs to ours: above 1 ours is
faster. MiB are the tensors that a call makes, at their peak.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from paired import describe_machine, measure, tensor_memory
from torch import Tensor, nn

from connectors import Chain, TokenSpec, VisualTokens, build_connector

THEIRS, OURS = "theirs", "ours"

QFORMER_KEYS = {
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.": "layers.",
    r"\.attention\.attention\.": ".self_attention.",
    r"\.attention\.output\.dense\.": ".self_attention.out_proj.",
    r"\.attention\.output\.LayerNorm\.": ".self_norm.",
    r"\.crossattention\.attention\.": ".cross_attention.",
    r"\.crossattention\.output\.dense\.": ".cross_attention.out_proj.",
    r"\.crossattention\.output\.LayerNorm\.": ".cross_norm.",
    r"\.query\.": ".q_proj.",
    r"\.key\.": ".k_proj.",
    r"\.value\.": ".v_proj.",
    r"\.intermediate_query\.dense\.": ".ffn.0.",
    r"\.output_query\.dense\.": ".ffn.2.",
    r"\.output_query\.LayerNorm\.": ".ffn_norm.",
}
PERCEIVER_KEYS = {
    r"^modality_projection\.": "links.0.",
    r"^perceiver_resampler\.": "links.1.",
    r"latents$": "queries",
    r"\.layers\.": ".blocks.",
    r"\.input_latents_norm\.": ".query_norm.",
    r"\.input_context_norm\.": ".context_norm.",
    r"\.self_attn\.o_proj\.": ".attention.out_proj.",
    r"\.self_attn\.": ".attention.",
    r"\.post_attention_layernorm\.": ".ffn_norm.",
    r"\.mlp\.": ".ffn.",
}
FLAMINGO_KEYS = {
    r"^latents$": "queries",
    r"^layer_norm\.": "norm.",
    r"\.0\.context_layer_norm\.": ".context_norm.",
    r"\.0\.latents_layer_norm\.": ".query_norm.",
    r"\.0\.output_proj\.": ".attention.out_proj.",
    r"\.0\.([qk])_layer_norm\.": r".attention.\1_norm.",
    r"\.0\.([qkv])_proj\.": r".attention.\1_proj.",
    r"\.1\.ln\.": ".ffn_norm.",
    r"\.1\.fc\.": ".ffn.0.",
    r"\.1\.c_proj\.": ".ffn.2.",
    r"^": "links.0.",
}
MLP_KEYS = {r"layer_norm\.": "norm.", r"linear_1\.": "layers.0.", r"linear_2\.": "layers.2."}


@dataclass
class Case:
    """One comparison.

    Attributes:
        against: the class, in words.
        recipe: of ours.
        spec: the tokens of one view.
        dim: width that goes out.
        theirs: the module that holds the weights.
        call: runs it on all tokens of a view, prefix first.
        keys: patterns that make its keys ours.
        transposed: whether it keeps its matrices the other way round.
        of_map: whether the tokens are a view of a feature map, as a convolutional encoder gives them.
    """

    against: str
    recipe: str
    spec: TokenSpec
    dim: int
    theirs: nn.Module
    call: Callable[[Tensor], Tensor]
    keys: dict[str, str]
    transposed: bool = False
    of_map: bool = False

    def build(self) -> Chain:
        """Make ours around the weights of theirs."""
        with torch.device("meta"):
            ours = build_connector(self.recipe, self.spec, self.dim)
        state = {}
        for name, tensor in self.theirs.state_dict().items():
            key = name
            for pattern, new in self.keys.items():
                key = re.sub(pattern, new, key)
            state[key] = tensor.T if self.transposed and tensor.ndim == 2 else tensor
        ours.load_state_dict(state, assign=True)
        return ours.eval()


def grid_of(rows: int, columns: int, dim: int, prefix: int = 0) -> TokenSpec:
    """State the tokens of a grid."""
    return TokenSpec(rows * columns, dim, (rows, columns), prefix)


def configure(vision: dict[str, Any], text: dict[str, Any], **rest: Any) -> Any:
    """Make what transformers' small classes read of a configuration."""
    return SimpleNamespace(vision_config=SimpleNamespace(**vision), text_config=SimpleNamespace(**text), **rest)


def mlp() -> Case:
    """LLaVA-1.5's, 7B."""
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    known = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True, "vision_feature_layer": -2}
    theirs = LlavaMultiModalProjector(configure({"hidden_size": 1024}, {"hidden_size": 4096}, **known))
    keys = {r"^": "links.0.", **MLP_KEYS}
    return Case("LlavaMultiModalProjector", "mlp", grid_of(24, 24, 1024), 4096, theirs, theirs, keys)


def pixel_shuffle() -> Case:
    """InternVL's two permutes, behind the cut of CLS."""
    from transformers.models.internvl.modeling_internvl import InternVLModel

    def call(hidden: Tensor) -> Tensor:
        picture = hidden[:, 1:, :].reshape(len(hidden), 32, 32, -1)
        return InternVLModel.pixel_shuffle(None, picture, 0.5).reshape(len(hidden), 256, -1)

    spec = grid_of(32, 32, 1024, 1)
    return Case("InternVLModel.pixel_shuffle", "pixel_shuffle", spec, 4096, nn.Identity(), call, {})


def internvl() -> Case:
    """InternVL's path from hidden states to the LLM, 8B."""
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    config = configure({"hidden_size": 1024}, {"hidden_size": 4096}, downsample_ratio=0.5, projector_hidden_act="gelu")
    theirs, fold = InternVLMultiModalProjector(config), pixel_shuffle()

    def call(hidden: Tensor) -> Tensor:
        return theirs(fold.call(hidden))

    keys = {r"^": "links.1.", **MLP_KEYS}
    return Case("InternVL's fold and projector", "pixel_shuffle+mlp:norm=layer", fold.spec, 4096, theirs, call, keys)


def idefics3() -> Case:
    """Idefics3's, 8B."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    theirs = Idefics3Connector(configure({"hidden_size": 1152}, {"hidden_size": 4096}, scale_factor=2))
    keys = {r"^modality_projection\.": "links.1."}
    recipe = "pixel_shuffle+linear:bias=false"
    return Case("Idefics3Connector", recipe, grid_of(26, 26, 1152), 4096, theirs, theirs, keys)


def resize() -> Case:
    """LLaVA-OneVision's pooling of a video's frames, behind its MLP."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    holder: Any = SimpleNamespace(config=configure({"image_size": 384, "patch_size": 14}, {}))

    def call(hidden: Tensor) -> Tensor:
        return LlavaOnevisionModel.apply_pooling(holder, hidden)

    spec = grid_of(27, 27, 3584)
    return Case("LLaVA-OneVision's apply_pooling", "resize:factor=2", spec, 3584, nn.Identity(), call, {})


def pooled_projector() -> Case:
    """Gemma 3's, 4B."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

    vision = {"hidden_size": 1152, "layer_norm_eps": 1e-6, "image_size": 896, "patch_size": 14}
    theirs = Gemma3MultiModalProjector(configure(vision, {"hidden_size": 2560}, mm_tokens_per_image=256))
    keys = {r"^mm_input_projection_weight": "links.0.proj.weight", r"^mm_soft_emb_norm": "links.0.norm"}
    spec = grid_of(64, 64, 1152)
    return Case("Gemma3MultiModalProjector", "pooled_projector", spec, 2560, theirs, theirs, keys, transposed=True)


def got_ocr2() -> Case:
    """GOT-OCR2's, behind SAM, whose tokens are a view of its map."""
    from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2MultiModalProjector

    theirs = GotOcr2MultiModalProjector(configure({"output_channels": 256}, {"hidden_size": 1024}))

    def call(hidden: Tensor) -> Tensor:
        found: Tensor = theirs(hidden.transpose(1, 2).unflatten(2, (64, 64)))
        return found

    keys = {
        r"^conv_upsampler1\.": "links.0.conv.",
        r"^conv_upsampler2\.": "links.1.conv.",
        r"^multimodal_projector\.": "links.2.proj.",
    }
    recipe = "conv:dim=512+conv:dim=1024+linear"
    return Case("GotOcr2MultiModalProjector", recipe, grid_of(64, 64, 256), 1024, theirs, call, keys, of_map=True)


def patch_merger() -> Case:
    """Qwen2-VL's, 7B; its tokens come block by block, and are put so once, outside the time; ours come row by row."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

    theirs = PatchMerger(dim=3584, context_dim=1280)

    blocks: list[Tensor] = []

    def call(hidden: Tensor) -> Tensor:
        batch, _, dim = hidden.shape
        if not blocks:
            blocks.append(hidden.view(batch, 12, 2, 12, 2, dim).transpose(2, 3).reshape(-1, dim))
        found: Tensor = theirs(blocks[0]).view(batch, 144, 3584)
        return found

    keys = {r"^ln_q\.": "links.0.norm.", r"^mlp\.": "links.0.layers."}
    return Case("Qwen2-VL's PatchMerger", "patch_merger", grid_of(24, 24, 1280), 3584, theirs, call, keys)


def qformer() -> Case:
    """BLIP-2's, on the tokens of a CLIP ViT-L/14 at 336 px."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    return _qformer(Blip2QFormerModel(Blip2QFormerConfig(encoder_hidden_size=1024)), grid_of(24, 24, 1024))


def qformer_eva() -> Case:
    """BLIP-2's, on the tokens of EVA-CLIP ViT-g/14 at 336 px, CLS among them."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    return _qformer(Blip2QFormerModel(Blip2QFormerConfig()), TokenSpec(577, 1408))


def _qformer(theirs: Any, spec: TokenSpec) -> Case:
    theirs.queries = nn.Parameter(torch.zeros(32, 768))

    def call(hidden: Tensor) -> Tensor:
        queries = theirs.queries.expand(len(hidden), -1, -1)
        found: Tensor = theirs(query_embeds=queries, encoder_hidden_states=hidden).last_hidden_state
        return found

    keys = {**QFORMER_KEYS, r"^": "links.0."}
    return Case(f"Blip2QFormerModel, {spec.num_tokens}x{spec.dim}", "qformer", spec, 768, theirs, call, keys)


def instruct_qformer() -> Case:
    """InstructBLIP's, with the empty instruction."""
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    theirs: Any = InstructBlipQFormerModel(InstructBlipQFormerConfig(vocab_size=30523))
    theirs.queries = nn.Parameter(torch.zeros(32, 768))

    def call(hidden: Tensor) -> Tensor:
        ids = torch.tensor([[101, 102]], device=hidden.device).expand(len(hidden), -1)
        queries = theirs.queries.expand(len(hidden), -1, -1)
        out = theirs(input_ids=ids, query_embeds=queries, encoder_hidden_states=hidden)
        found: Tensor = out.last_hidden_state[:, :32]
        return found

    keys = {
        **QFORMER_KEYS,
        r"^embeddings\.layernorm\.": "norm.",
        r"^embeddings\.word_embeddings\.": "token_embedding.",
        r"^embeddings\.position_embeddings\.": "position_embedding.",
        r"\.intermediate\.dense\.": ".text_ffn.0.",
        r"\.output\.dense\.": ".text_ffn.2.",
        r"\.output\.LayerNorm\.": ".text_ffn_norm.",
        r"^": "links.0.",
    }
    return Case("InstructBlipQFormerModel", "instruct_qformer", TokenSpec(257, 1408), 768, theirs, call, keys)


def perceiver() -> Case:
    """Idefics2's whole connector, 8B."""
    from transformers import Idefics2Config
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    text = {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336}
    vision = {"hidden_size": 1152}
    config = Idefics2Config(text_config=text, vision_config=vision, perceiver_config={"hidden_size": 4096})
    theirs = Idefics2Connector(config)

    def call(hidden: Tensor) -> Tensor:
        found: Tensor = theirs(hidden, torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device))
        return found

    recipe = "gated_mlp:hidden=14336+perceiver"
    return Case("Idefics2Connector", recipe, grid_of(24, 24, 1152), 4096, theirs, call, PERCEIVER_KEYS)


def flamingo() -> Case:
    """IDEFICS's, 9B."""
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config={"embed_dim": 1280}, perceiver_config={"qk_layer_norms_perceiver": True})
    theirs = IdeficsPerceiverResampler(config, 1280, 6, 16, 96, 64)
    recipe, spec = "flamingo:heads=16,head_dim=96,activation=relu,qk_norm=true", TokenSpec(257, 1280)
    return Case("IdeficsPerceiverResampler", recipe, spec, 1280, theirs, theirs, FLAMINGO_KEYS)


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        mlp,
        pixel_shuffle,
        internvl,
        idefics3,
        resize,
        pooled_projector,
        patch_merger,
        got_ocr2,
        qformer,
        qformer_eva,
        instruct_qformer,
        perceiver,
        flamingo,
    )
}


def prepare(name: str, options: argparse.Namespace) -> tuple[Case, dict[str, Callable[[], Tensor]]]:
    """Draw the weights, norms and biases too, and give both sides as calls."""
    torch.manual_seed(0)
    case, dtype = CASES[name](), getattr(torch, options.dtype)
    with torch.no_grad():
        for parameter in case.theirs.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    case.theirs.to(options.device, dtype).eval()
    ours, spec = case.build(), case.spec
    shape = (options.batch, spec.num_prefix + spec.num_tokens, spec.dim)
    hidden = torch.randn(shape).to(options.device, dtype)
    if case.of_map:
        hidden = hidden.transpose(1, 2).contiguous().transpose(1, 2)
    cut = spec.num_prefix
    visual = VisualTokens(hidden[:, cut:], spec.grid, hidden[:, :cut] if cut else None)
    today: Callable[[], Tensor] = torch.no_grad()(lambda: case.call(hidden))
    return case, {THEIRS: today, OURS: torch.no_grad()(lambda: ours(visual).tokens)}


def compare(name: str, options: argparse.Namespace) -> str:
    """Measure one case and write its row."""
    case, variants = prepare(name, options)
    theirs, ours = (variants[side]().float() for side in (THEIRS, OURS))
    apart = "bit-equal" if torch.equal(theirs, ours) else f"{(theirs - ours).abs().max() / theirs.abs().max():.1e}"
    seconds = measure(variants, options.rounds, options.device)
    ratios = [one / other for one, other in zip(seconds[THEIRS], seconds[OURS], strict=True)]
    memory = {side: tensor_memory(call, options.device) / 2**20 for side, call in variants.items()}
    median = {side: statistics.median(times) * 1000 for side, times in seconds.items()}
    return (
        f"| `{case.recipe}` | {case.against} | {apart} | {median[THEIRS]:.1f} | {median[OURS]:.1f} | "
        f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} | "
        f"{memory[THEIRS]:.1f} | {memory[OURS]:.1f} |"
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if unknown := set(options.names) - CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    print(f"{options.dtype}, batch {options.batch}; {describe_machine(options.device)}\n")
    print("| ours | theirs | apart | theirs, ms | ours, ms | theirs / ours | spread | MiB theirs | MiB ours |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for name in options.names or CASES:
        print(compare(name, options), flush=True)


if __name__ == "__main__":
    main()
