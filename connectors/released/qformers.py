"""Layouts of Q-Formers: BLIP-2 and InstructBLIP, as transformers and as LAVIS save them.

The norm behind their vision transformer, `post_layernorm` or `ln_vision`, is the encoder's
final norm and no part of the connector.

Source: `Blip2QFormerModel` and `InstructBlipQFormerModel` of transformers; LAVIS,
`lavis/models/blip2_models` of https://github.com/salesforce/LAVIS.
"""

from __future__ import annotations

from functools import partial

from connectors.released.hints import Hint
from connectors.released.keys import ROW, Pair, pair
from connectors.released.layout import Layout
from connectors.released.weights import Plan, Weights, link

__all__ = ["QFORMERS"]


def _qformer(weights: Weights, kind: str, stem: str, middle: str, last: str) -> Plan:
    layer = f"{stem}encoder.layer."
    _, queries, dim = weights.shape("query_tokens", 3)
    layers = weights.count(layer)
    reads = weights.numbers(layer, inside=".crossattention.")
    _, in_dim = weights.shape(f"{layer}0.crossattention.{middle}.key.weight")
    ffn, _ = weights.shape(f"{layer}0.intermediate_query.dense.weight")
    heads, _ = weights.heads(f"{layer}0.attention.{middle}.query.weight")
    words = {}
    if kind == "instruct_qformer":
        vocab, _ = weights.shape(f"{stem}embeddings.word_embeddings.weight")
        positions, _ = weights.shape(f"{stem}embeddings.position_embeddings.weight")
        words = {"vocab": vocab, "positions": positions}
    every = reads[1] if len(reads) > 1 else layers
    sizes = {"queries": queries, "dim": dim, "layers": layers, "heads": heads, "cross_every": every, "ffn": ffn}
    recipe = f"keep_prefix+{link(kind, **sizes, dropout=weights.hints['dropout'], **words)}+linear"
    out_dim, _ = weights.shape(f"{last}.weight")
    return Plan(recipe, in_dim, out_dim)


def _qformer_pairs(kind: str, stem: str, middle: str, norm: str) -> list[Pair]:
    theirs, ours = f"{stem}encoder.layer.{{}}.", f"{kind}.layers.{{}}."
    pairs = [pair("query_tokens", f"{kind}.queries", move=ROW), pair(f"{stem}{norm}", f"{kind}.norm")]
    for each, own in (("attention", "self"), ("crossattention", "cross")):
        pairs += [
            pair(f"{theirs}{each}.{middle}.{word}", f"{ours}{own}_attention.{word[0]}_proj")
            for word in ("query", "key", "value")
        ]
        pairs.append(pair(f"{theirs}{each}.output.dense", f"{ours}{own}_attention.out_proj"))
        pairs.append(pair(f"{theirs}{each}.output.LayerNorm", f"{ours}{own}_norm"))
    for tail, own in (("_query", "ffn"), *((("", "text_ffn"),) if kind == "instruct_qformer" else ())):
        pairs.append(pair(f"{theirs}intermediate{tail}.dense", f"{ours}{own}.0"))
        pairs.append(pair(f"{theirs}output{tail}.dense", f"{ours}{own}.2"))
        pairs.append(pair(f"{theirs}output{tail}.LayerNorm", f"{ours}{own}_norm"))
    if kind == "instruct_qformer":
        pairs.append(pair(f"{stem}embeddings.word_embeddings", f"{kind}.token_embedding"))
        pairs.append(pair(f"{stem}embeddings.position_embeddings", f"{kind}.position_embedding"))
    return pairs


def _qformer_layout(name: str, source: str, used_by: str, kind: str, last: str, *, lavis: bool = True) -> Layout:
    stem, middle = ("Qformer.bert.", "self") if lavis else ("qformer.", "attention")
    plain = "layernorm" if kind == "qformer" else "embeddings.layernorm"
    words = f"{stem}embeddings.word_embeddings."
    places = {f"{stem}embeddings.position_ids": 512}
    return Layout(
        name=name,
        source=source,
        used_by=used_by,
        roots=("",),
        parts=("query_tokens", f"{stem.split('.', maxsplit=1)[0]}.", f"{last}."),
        marks=("query_tokens", f"{stem}encoder.layer.0.crossattention.{middle}.key.weight", f"{last}.weight")
        + ((f"{words}weight",) if kind == "instruct_qformer" else ()),
        pairs=[
            *_qformer_pairs(kind, stem, middle, "embeddings.LayerNorm" if lavis else plain),
            pair(last, "linear.proj"),
        ],
        plan=partial(_qformer, kind=kind, stem=stem, middle=middle, last=last),
        hints={"heads": Hint(kind, 12, asked=True), "dropout": Hint(kind, 0.0)},
        never=() if kind == "instruct_qformer" else (words,),
        constants=places if lavis else {},
        old_constants={} if lavis or kind == "qformer" else places,
    )


_HF_LAST = "language_projection"

QFORMERS = (
    _qformer_layout(
        "blip-2-hf",
        "`Blip2ForConditionalGeneration` of transformers",
        "BLIP-2 with OPT or FlanT5",
        "qformer",
        _HF_LAST,
        lavis=False,
    ),
    _qformer_layout(
        "instructblip-hf",
        "`InstructBlipForConditionalGeneration` of transformers",
        "InstructBLIP with Vicuna or FlanT5",
        "instruct_qformer",
        _HF_LAST,
        lavis=False,
    ),
    _qformer_layout("blip-2-opt-lavis", "LAVIS's `Blip2OPT`", "BLIP-2 with OPT", "qformer", "opt_proj"),
    _qformer_layout("blip-2-t5-lavis", "LAVIS's `Blip2T5`", "BLIP-2 with FlanT5", "qformer", "t5_proj"),
    _qformer_layout(
        "instructblip-lavis",
        "LAVIS's `Blip2VicunaInstruct`",
        "InstructBLIP with Vicuna",
        "instruct_qformer",
        "llm_proj",
    ),
    _qformer_layout(
        "instructblip-t5-lavis", "LAVIS's `Blip2T5Instruct`", "InstructBLIP with FlanT5", "instruct_qformer", "t5_proj"
    ),
)
