"""Layouts of perceiver resamplers: Idefics2, IDEFICS and OpenFlamingo.

Source: `Idefics2Connector` and `IdeficsPerceiverResampler` of transformers;
`open_flamingo/src/helpers.py` of https://github.com/mlfoundations/open_flamingo.
"""

from __future__ import annotations

from functools import partial

from connectors.errors import VlmError
from connectors.released.hints import Hint
from connectors.released.keys import HALVES, Pair, pair
from connectors.released.layout import Layout
from connectors.released.weights import Plan, Weights, link

__all__ = ["RESAMPLERS"]

_IDEFICS2 = "connector."
_PERCEIVER = "connector.perceiver_resampler."
_IDEFICS = "perceiver_resampler."
_FLAMINGO = "perceiver."


def _idefics2(weights: Weights) -> Plan:
    hidden, in_dim = weights.shape(f"{_IDEFICS2}modality_projection.up_proj.weight")
    queries, out_dim = weights.shape(f"{_PERCEIVER}latents")
    depth = weights.count(f"{_PERCEIVER}layers.")
    heads, head_dim = weights.heads(f"{_PERCEIVER}layers.0.self_attn.q_proj.weight")
    kv_wide, _ = weights.shape(f"{_PERCEIVER}layers.0.self_attn.k_proj.weight")
    if kv_wide % head_dim:
        raise VlmError(
            f"heads={heads} contradicts the weights: heads of width {head_dim} do not divide {kv_wide} rows of keys"
        )
    sizes = {"queries": queries, "depth": depth, "heads": heads, "head_dim": head_dim, "kv_heads": kv_wide // head_dim}
    mlp = link("gated_mlp", hidden=hidden, activation=weights.hints["activation"])
    return Plan(f"{mlp}+{link('perceiver', **sizes)}", in_dim, out_dim)


def _idefics2_pairs() -> list[Pair]:
    theirs, ours = f"{_PERCEIVER}layers.{{}}.", "perceiver.blocks.{}."
    maps = ("gate_proj", "up_proj", "down_proj")
    return [
        *(pair(f"{_IDEFICS2}modality_projection.{name}", f"gated_mlp.{name}") for name in maps),
        *(pair(f"{theirs}mlp.{name}", f"{ours}ffn.{name}") for name in maps),
        *(pair(f"{theirs}self_attn.{name}_proj", f"{ours}attention.{name}_proj") for name in "qkv"),
        pair(f"{theirs}self_attn.o_proj", f"{ours}attention.out_proj"),
        pair(f"{theirs}input_latents_norm", f"{ours}query_norm"),
        pair(f"{theirs}input_context_norm", f"{ours}context_norm"),
        pair(f"{theirs}post_attention_layernorm", f"{ours}ffn_norm"),
        pair(f"{_PERCEIVER}latents", "perceiver.queries"),
        pair(f"{_PERCEIVER}norm", "perceiver.norm"),
    ]


def _flamingo(weights: Weights, stem: str, blocks: str, asks: str, up: str) -> Plan:
    queries, dim = weights.shape(f"{stem}latents")
    heads, head_dim = weights.heads(f"{stem}{blocks}.0.{asks}.weight")
    ffn, _ = weights.shape(f"{stem}{blocks}.0.{up}.weight")
    sizes = {"queries": queries, "depth": weights.count(f"{stem}{blocks}."), "heads": heads, "head_dim": head_dim}
    wide = {} if ffn == 4 * dim else {"ffn": ffn}
    qk_norm = weights.count(f"{stem}{blocks}.", inside=".0.q_layer_norm.") > 0
    return Plan(link("flamingo", **sizes, activation=weights.hints["activation"], **wide, qk_norm=qk_norm), dim, dim)


def _flamingo_pairs(stem: str, blocks: str, names: dict[str, str]) -> list[Pair]:
    theirs, ours = f"{stem}{blocks}.{{}}.", "flamingo.blocks.{}."
    return [pair(f"{stem}latents", "flamingo.queries")] + [
        pair(f"{theirs}{each}", f"{ours}{own}") for each, own in names.items()
    ]


RESAMPLERS = (
    Layout(
        name="idefics2",
        source="`Idefics2Connector` of transformers",
        used_by="Idefics2: 16 heads of width 96",
        roots=("model.", ""),
        parts=(_IDEFICS2,),
        marks=(f"{_PERCEIVER}latents", f"{_IDEFICS2}modality_projection.up_proj.weight"),
        pairs=_idefics2_pairs(),
        plan=_idefics2,
        hints={"heads": Hint("perceiver", 16, asked=True), "activation": Hint("gated_mlp", "silu")},
    ),
    Layout(
        name="idefics",
        source="`IdeficsPerceiverResampler` of transformers; its tokens go to cross-attention in the LLM",
        used_by="IDEFICS 9B and 80B: 16 heads of width 96",
        roots=("model.", ""),
        parts=(_IDEFICS,),
        marks=(f"{_IDEFICS}latents", f"{_IDEFICS}blocks.0.0.q_proj.weight"),
        pairs=[
            *_flamingo_pairs(
                _IDEFICS,
                "blocks",
                {
                    "0.context_layer_norm": "context_norm",
                    "0.latents_layer_norm": "query_norm",
                    **{f"0.{name}_proj": f"attention.{name}_proj" for name in "qkv"},
                    **{f"0.{name}_layer_norm": f"attention.{name}_norm" for name in "qk"},
                    "0.output_proj": "attention.out_proj",
                    "1.ln": "ffn_norm",
                    "1.fc": "ffn.0",
                    "1.c_proj": "ffn.2",
                },
            ),
            pair(f"{_IDEFICS}layer_norm", "flamingo.norm"),
        ],
        plan=partial(_flamingo, stem=_IDEFICS, blocks="blocks", asks="0.q_proj", up="1.fc"),
        hints={"heads": Hint("flamingo", 16, asked=True), "activation": Hint("flamingo", "relu")},
    ),
    Layout(
        name="openflamingo",
        source="open_flamingo's `PerceiverResampler`; its tokens go to cross-attention in the LLM",
        used_by="OpenFlamingo: 8 heads of width 64",
        roots=("", "module."),
        parts=(_FLAMINGO,),
        marks=(f"{_FLAMINGO}latents", f"{_FLAMINGO}layers.0.0.to_kv.weight"),
        pairs=[
            *_flamingo_pairs(
                _FLAMINGO,
                "layers",
                {
                    "0.norm_media": "context_norm",
                    "0.norm_latents": "query_norm",
                    "0.to_q": "attention.q_proj",
                    "0.to_out": "attention.out_proj",
                    "1.0": "ffn_norm",
                    "1.1": "ffn.0",
                    "1.3": "ffn.2",
                },
            ),
            pair(
                f"{_FLAMINGO}layers.{{}}.0.to_kv",
                "flamingo.blocks.{}.attention.k_proj",
                "flamingo.blocks.{}.attention.v_proj",
                move=HALVES,
            ),
            pair(f"{_FLAMINGO}norm", "flamingo.norm"),
        ],
        plan=partial(_flamingo, stem=_FLAMINGO, blocks="layers", asks="0.to_q", up="1.1"),
        hints={"heads": Hint("flamingo", 8, asked=True), "activation": Hint("flamingo", "gelu")},
    ),
)
