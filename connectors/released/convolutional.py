"""Layouts of connectors made of convolutions: Honeybee and MobileVLM.

Source: `honeybee/projectors/projectors.py` of https://github.com/khanrc/honeybee, whose
blocks are timm's `RegStage`; `mobilevlm/model/vision_projector.py` of
https://github.com/Meituan-AutoML/MobileVLM, whose blocks are torchvision's
`InvertedResidual`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from connectors.errors import VlmError
from connectors.released.hints import Hint, Hints
from connectors.released.keys import ROW, SQUARE, Pair, pair
from connectors.released.layout import Layout
from connectors.released.mlps import stack
from connectors.released.weights import Plan, Weights, link

__all__ = ["CONVOLUTIONAL"]

_BEE = "abstractor."
_POSITIONS = f"{_BEE}pos_emb"
_MOBILE = "mm_projector."


def _before(weights: Weights) -> list[str]:
    """Write the links that Honeybee has in front of each of its projectors."""
    links = [link("norm", eps=1e-6)] if f"{_BEE}prenorm.weight" in weights else []
    if _POSITIONS not in weights:
        if weights.hints["positions"]:
            raise VlmError(
                f"'{_POSITIONS}' is missing, which Honeybee's projectors have; pass positions=False if this has none"
            )
        return links
    _, count, _ = weights.shape(_POSITIONS, 3)
    side = math.isqrt(count)
    if side**2 == count:
        return [*links, link("position", grid=(side, side))]
    if math.isqrt(count - 1) ** 2 == count - 1:
        raise VlmError(
            f"'{_POSITIONS}' has {count} places, one of them for CLS, which Honeybee drops when it loads such a file; "
            "pass cls_position=False to drop it"
        )
    raise VlmError(f"'{_POSITIONS}' has {count} places, which are no square grid as layout 'honeybee' needs")


def _without_cls(tensors: Mapping[str, Tensor], hints: Hints) -> dict[str, Tensor]:
    found = dict(tensors)
    if not hints["cls_position"] and _POSITIONS in found:
        count = found[_POSITIONS].shape[1]
        if math.isqrt(count - 1) ** 2 != count - 1:
            raise VlmError(f"cls_position=False contradicts '{_POSITIONS}', which has {count} places and none of CLS")
        found[_POSITIONS] = found[_POSITIONS][:, 1:]
    return found


def _honeybee(weights: Weights) -> Plan:
    out_dim, hidden = weights.shape(f"{_BEE}readout.0.weight")
    depth = weights.count(f"{_BEE}net.0.b")
    in_dim = weights.shape(f"{_BEE}net.0.b1.conv1.conv.weight", 4)[1] if depth else hidden
    eos = weights.shape(f"{_BEE}eos_tokens", 3)[1] if f"{_BEE}eos_tokens" in weights else 0
    sizes = {"hidden": hidden, "depth": depth, "mlp_depth": weights.count(f"{_BEE}readout."), "eos": eos}
    return Plan(
        "+".join([*_before(weights), link("c_abstractor", grid=weights.hints["grid"], **sizes)]), in_dim, out_dim
    )


def _honeybee_mlp(weights: Weights) -> Plan:
    recipe, in_dim, out_dim = stack(weights, f"{_BEE}net.", "silu")
    return Plan("+".join([*_before(weights), recipe]), in_dim, out_dim)


def _stage(number: int, ours: str) -> list[Pair]:
    block = f"{_BEE}net.{number}.b{{+1}}."
    own = f"c_abstractor.{ours}.{{}}."
    return [
        pair(f"{block}conv{{}}.conv", f"{own}conv{{}}"),
        pair(f"{block}conv{{}}.bn", f"{own}norm{{}}"),
        pair(f"{block}se.fc{{}}", f"{own}se.fc{{}}"),
        pair(f"{block}downsample.conv", f"{own}shortcut.conv"),
        pair(f"{block}downsample.bn", f"{own}shortcut.norm"),
    ]


def _mobilevlm(weights: Weights) -> Plan:
    out_dim, in_dim = weights.shape(f"{_MOBILE}model.mlp.1.weight")
    return Plan("ldp", in_dim, out_dim)


def _mobilevlm_v2(weights: Weights) -> Plan:
    out_dim, in_dim = weights.shape(f"{_MOBILE}mlp.mlp.0.weight")
    return Plan(link("ldp_v2", grid=weights.hints["grid"]), in_dim, out_dim)


_BEFORE = (pair(f"{_BEE}prenorm", "norm.norm"), pair(_POSITIONS, "position.table", move=SQUARE))
_KEPT = {"positions": Hint("", usual=True), "cls_position": Hint("", usual=True)}

CONVOLUTIONAL = (
    Layout(
        name="honeybee",
        source="Honeybee's `CAbstractor`; grid=(12, 12) in the models of 144 tokens, (16, 16) in those of 256",
        used_by="Honeybee",
        roots=("",),
        parts=(_BEE,),
        marks=(f"{_BEE}readout.0.weight",),
        pairs=[
            *_BEFORE,
            *_stage(0, "before"),
            *_stage(2, "after"),
            pair(f"{_BEE}readout.{{}}", "c_abstractor.mlp.{}"),
            pair(f"{_BEE}eos_tokens", "c_abstractor.eos", move=ROW),
        ],
        plan=_honeybee,
        hints={
            "grid": Hint("c_abstractor", (12, 12), asked=True),
            **_KEPT,
        },
        prepare=_without_cls,
    ),
    Layout(
        name="honeybee-mlp",
        source="Honeybee's `MLPProjector`",
        used_by="Honeybee's control",
        roots=("",),
        parts=(_BEE,),
        marks=(f"{_BEE}net.0.weight",),
        pairs=[*_BEFORE, pair(f"{_BEE}net.{{}}", "mlp.layers.{}")],
        plan=_honeybee_mlp,
        hints=_KEPT,
        prepare=_without_cls,
    ),
    Layout(
        name="mobilevlm",
        source="MobileVLM's `LDPNetProjector`",
        used_by="MobileVLM",
        roots=("model.", ""),
        parts=(_MOBILE,),
        marks=(f"{_MOBILE}model.mlp.1.weight", f"{_MOBILE}model.mb_block.1.block.0.0.weight"),
        pairs=[
            pair(f"{_MOBILE}model.mlp.1", "ldp.mlp.0"),
            pair(f"{_MOBILE}model.mlp.3", "ldp.mlp.2"),
            *(
                pair(f"{_MOBILE}model.mb_block.{{+1}}.block.{theirs}", f"ldp.blocks.{{}}.{ours}")
                for theirs, ours in {
                    "0.0": "depthwise",
                    "0.1": "norm1",
                    "1.fc1": "se.fc1",
                    "1.fc2": "se.fc2",
                    "2.0": "pointwise",
                    "2.1": "norm2",
                }.items()
            ),
        ],
        plan=_mobilevlm,
    ),
    Layout(
        name="mobilevlm-v2",
        source="MobileVLM's `LDPNetV2Projector`, whose grid is 12x12",
        used_by="MobileVLM V2",
        roots=("model.", ""),
        parts=(_MOBILE,),
        marks=(f"{_MOBILE}mlp.mlp.0.weight", f"{_MOBILE}peg.peg.0.weight"),
        pairs=[pair(f"{_MOBILE}mlp.mlp.{{}}", "ldp_v2.mlp.{}"), pair(f"{_MOBILE}peg.peg.0", "ldp_v2.peg")],
        plan=_mobilevlm_v2,
        hints={"grid": Hint("ldp_v2", (12, 12))},
    ),
)
