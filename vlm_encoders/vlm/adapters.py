"""Low-rank adapters by peft, each inside the modules of its own unit and nowhere else."""

from __future__ import annotations

import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from connectors.errors import VlmError
from vlm_encoders.vlm.blocks import is_adapter
from vlm_encoders.vlm.policy import PartPolicy
from vlm_encoders.vlm.quantize import is_quantized
from vlm_encoders.vlm.units import Unit, units_of

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = [
    "adapted",
    "add_adapters",
    "check_adapters",
    "has_adapter",
    "inject_saved",
    "injected_adapters",
    "merge_adapters",
]


def has_adapter(llm: nn.Module) -> bool:
    """Say whether an LLM is wrapped by peft."""
    # A wrapped LLM means that peft is loaded; importing it for the others would take seconds.
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(llm, peft.PeftModel)


def adapted(module: nn.Module) -> bool:
    """Say whether a unit's module has adapters."""
    return any(is_adapter(name) for name, _ in module.named_parameters())


def check_adapters(unit: Unit) -> None:
    """Refuse a policy that the unit's weights or adapters cannot follow, before anything is changed.

    Raises:
        VlmError: the LLM is quantised and the policy is for one that is not, or the reverse; the unit has
            adapters of another kind; or there is no layer to adapt.
    """
    policy, quantized = unit.policy, is_quantized(unit.module)
    if policy.mode == "qlora" and not quantized:
        raise VlmError(
            f"it trains the {unit.name} by QLoRA, but its weights are not quantised; load it by quantize='nf4', or "
            "use mode 'lora'"
        )
    if policy.trains and policy.mode != "qlora" and quantized:
        raise VlmError(
            f"it has mode '{policy.mode}' for the {unit.name}, whose weights are quantised; use mode 'qlora', or load "
            "it without quantize"
        )
    if not policy.adapts:
        return
    found, wanted = _settings(unit.module), _wanted(policy)
    if found is not None and found != wanted:
        merge = (
            "model.llm = model.llm.merge_and_unload()"
            if unit.part == "llm"
            else f"merge_adapters(model, '{unit.name}')"
        )
        what = "LLM" if unit.part == "llm" else unit.name
        if found["r"] != wanted["r"]:
            said = f"of rank {found['r']}, the stage asks for {wanted['r']}"
        else:
            differ = [key for key in wanted if found[key] != wanted[key]]
            said = "with " + ", ".join(f"{key} {found[key]}, the stage asks for {wanted[key]}" for key in differ)
        raise VlmError(f"the {what} has adapters {said}; merge them first: {merge}")
    if found is None and unit.part != "llm" and not _targets(unit.module):
        raise VlmError(f"it trains adapters on the {unit.name}, which has no linear layers; use mode 'train'")


def add_adapters(model: VisionLanguageModel, unit: Unit) -> None:
    """Put the adapters of a unit's policy on its linear layers, in float32; none where it has them already.

    An LLM is wrapped by peft. Into encoder and connector they are injected layer by layer, by the exact names
    of the unit's own layers, so that none of another part or encoder of the same names is touched. Layers whose
    weights are read without a call get none: those of `nn.MultiheadAttention`, and `qkv` of timm's EVA, BEiT and
    Swin V2.
    """
    if adapted(unit.module):
        return
    if unit.part == "llm":
        from peft import get_peft_model

        config = _config({**_wanted(unit.policy), "targets": "all-linear"}, task_type="CAUSAL_LM")
        with warnings.catch_warnings():
            # peft asks transformers for a name that is soon to go.
            warnings.simplefilter("ignore", FutureWarning)
            model.llm = get_peft_model(model.llm, config)
        return
    _inject(unit.module, {**_wanted(unit.policy), "targets": _targets(unit.module)})


def merge_adapters(model: VisionLanguageModel, name: str) -> None:
    """Add the adapters of a unit, such as "encoder.1" or "llm", to its weights, and take them away.

    Raises:
        VlmError: the model has no such unit, or it is quantised.
    """
    named = {unit.name: unit for unit in units_of(model, None)}
    if name not in named:
        raise VlmError(f"the model has no unit '{name}' to merge adapters of; it has {', '.join(named)}")
    unit = named[name]
    if is_quantized(unit.module):
        raise VlmError("adapters cannot be merged into 4-bit weights without loss; load the LLM without quantize first")
    if unit.part == "llm":
        if has_adapter(model.llm):
            model.llm = model.llm.merge_and_unload()  # type: ignore[operator]
        return
    for path, layer in _layers(unit.module):
        layer.merge()
        parent, _, last = path.rpartition(".")
        setattr(unit.module.get_submodule(parent), last, layer.get_base_layer())
    vars(unit.module).pop("peft_config", None)


def injected_adapters(model: VisionLanguageModel) -> dict[str, dict[str, Any]]:
    """Give, for each encoder or connector with adapters, by its path, what makes the same ones again."""
    found = {}
    for unit in units_of(model, None):
        if unit.part != "llm" and (settings := _settings(unit.module)) is not None:
            found[unit.path] = {**settings, "targets": [path for path, _ in _layers(unit.module)]}
    return found


def inject_saved(model: VisionLanguageModel, saved: dict[str, dict[str, Any]]) -> None:
    """Put adapters on again as `injected_adapters` told of them; their values are still to be loaded."""
    for path, settings in saved.items():
        module = model.get_submodule(path)
        if not adapted(module):
            _inject(module, settings)


def _inject(module: nn.Module, settings: dict[str, Any]) -> None:
    from peft import inject_adapter_in_model

    # One expression over whole names: a list would match by suffix.
    exact = "|".join(re.escape(target) for target in settings["targets"])
    inject_adapter_in_model(_config({**settings, "targets": exact}), module)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()


def _config(settings: dict[str, Any], **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        use_dora=settings["dora"],
        use_rslora=settings["rslora"],
        target_modules=settings["targets"],
        **more,
    )


def _wanted(policy: PartPolicy) -> dict[str, Any]:
    return {
        "r": policy.lora_rank,
        "alpha": policy.alpha,
        "dropout": policy.lora_dropout,
        "dora": policy.mode == "dora",
        "rslora": policy.mode == "rslora",
    }


def _settings(module: nn.Module) -> dict[str, Any] | None:
    """Give the settings of the adapters that a module has; None where it has none."""
    configs = getattr(module, "peft_config", None)
    if not configs or not adapted(module):
        return None
    config = next(iter(configs.values()))
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "dora": config.use_dora,
        "rslora": config.use_rslora,
    }


def _targets(module: nn.Module) -> list[str]:
    read = {id(each) for part in module.modules() for each in _read_directly(part)}
    return [
        path for path, each in module.named_modules() if path and isinstance(each, nn.Linear) and id(each) not in read
    ]


def _read_directly(module: nn.Module) -> list[nn.Module]:
    """Give the layers whose weights a module reads without calling them."""
    if isinstance(module, nn.MultiheadAttention):
        return list(module.children())
    # timm's EVA, BEiT and Swin V2 join a bias of their own to the weight.
    joined = getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False)
    layer = getattr(module, "qkv", None)
    return [layer] if joined and isinstance(layer, nn.Module) else []


def _layers(module: nn.Module) -> list[tuple[str, Any]]:
    """Give the layers of a module that peft has put in place of linear ones, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, each) for path, each in module.named_modules() if isinstance(each, BaseTunerLayer)]
