"""The parts of a joint of encoders: specs from their names, and names from built ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from connectors.errors import VlmError
from connectors.registry import nearest
from vlm_encoders.encoders.joint_name import JointName, PartName, write_joint
from vlm_encoders.registry import chosen_spec
from vlm_encoders.spec import EncoderSpec, Resize

__all__ = ["joint_origin", "own_options", "part_spec"]

_FIELDS = ("resize", "revision", "exact_pixels")
_KNOWN = (*_FIELDS, "image_size", "feature_layer", "final_norm", "pretrained", "attn_implementation")


def own_options(joint: JointName, name: str, known: Sequence[str]) -> dict[str, Any]:
    """Give the options of a joint itself.

    Raises:
        VlmError: one is unknown.
    """
    for key in joint.options:
        if key not in known:
            raise VlmError(f"{name}: {joint.kind} has no option '{key}'; {nearest(key, list(known))}")
    return dict(joint.options)


def part_spec(part: PartName) -> EncoderSpec:
    """Make the spec of a part with its options.

    Raises:
        UnknownNameError: nothing has this name.
        VlmError: an option does not fit the encoder.
    """
    options = dict(part.options)
    for key, kind in (("final_norm", bool), ("exact_pixels", bool), ("image_size", int | tuple)):
        if key in options and not isinstance(options[key], kind):
            use = "true or false" if kind is bool else "a side or HEIGHTxWIDTH in px"
            raise VlmError(f"{part.name}: {key}={options[key]} is not understood; give {use}")
    if "resize" in options and options["resize"] not in get_args(Resize):
        raise VlmError(f"{part.name}: resize '{options['resize']}' is unknown; use {', '.join(get_args(Resize))}")
    for key in options:
        # What is left goes to the backend, which is not asked before it builds: a slip must not wait for that.
        close = [] if key in _KNOWN else get_close_matches(key, _KNOWN, n=1, cutoff=0.75)
        if close:
            raise VlmError(f"{part.name}: it has no option '{key}'; did you mean {close[0]}")
    fields: dict[str, Any] = {key: options.pop(key) for key in _FIELDS if key in options}
    if "pretrained" in options:
        fields["weights"] = options.pop("pretrained")
    chosen: dict[str, Any] = {key: options.pop(key, None) for key in ("image_size", "feature_layer", "final_norm")}
    return chosen_spec(part.name, fields=fields, options=options, **chosen)


def joint_origin(kind: str, origins: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Give what `create_encoder` makes of a joint of built encoders again.

    Args:
        kind: "fused" or "multiscale".
        origins: of the parts; a joint with a part of random weights gets random ones as a whole.
        options: of the joint; None is left out.

    Returns:
        The joint's origin; empty where a part has none, or an option has no written form.
    """
    parts = []
    for origin in origins:
        chosen = {key: value for key, value in origin.items() if key not in {"name", "pretrained", "dtype"}}
        if isinstance(origin.get("pretrained"), str):
            chosen["pretrained"] = origin["pretrained"]
        if "image_size" in chosen:
            height, width = chosen["image_size"]
            chosen["image_size"] = height if height == width else (height, width)
        parts.append(PartName(origin.get("name", ""), chosen))
    own = {key: value for key, value in options.items() if value is not None}
    name = write_joint(JointName(kind, own, tuple(parts))) if parts and all(part.name for part in parts) else None
    if name is None:
        return {}
    pretrained = all(origin.get("pretrained", False) is not False for origin in origins)
    return {"name": name, "pretrained": pretrained, "dtype": origins[0]["dtype"]}
