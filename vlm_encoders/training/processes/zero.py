"""DeepSpeed's ZeRO: the engine that holds gradients and optimizer state in shares, and in stage 3 the weights.

The engine averages, clips and steps by itself, so the tokens of a step are counted before its first backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from connectors.errors import VlmError
from vlm_encoders.training.processes.turns import Turns, require_finite
from vlm_encoders.training.step import StepResult

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim import Optimizer

    from vlm_encoders.training.config import TrainConfig

__all__ = [
    "fill_parameter", "link_state", "load_state", "settle_weights", "start_engine", "state_of", "take_engine_step",
    "whole_parameter",
]  # fmt: skip

_MOMENTS = ("exp_avg", "exp_avg_sq")


def start_engine(
    accelerator: Accelerator, module: nn.Module, optimizer: Optimizer, config: TrainConfig
) -> tuple[nn.Module, Optimizer]:
    """Wrap a module by DeepSpeed's engine, as accelerate's configuration and the settings say.

    Raises:
        VlmError: they contradict each other.
    """
    import deepspeed

    settings = _engine_settings(accelerator, config)
    module.even = True  # type: ignore[assignment]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    if settings["zero_optimization"]["stage"] == 3 and module.model.newline is not None:  # type: ignore[union-attr]
        # It is read where images are laid out, not where its own module runs.
        for reader in (module, module.model):
            deepspeed.zero.register_external_parameter(reader, module.model.newline)  # type: ignore[union-attr]
    return engine, optimizer


def take_engine_step(
    accelerator: Accelerator, engine: Any, batches: Iterator[dict[str, Any] | None], *, accumulation: int
) -> StepResult:
    """Run the batches of a step by the engine, which then moves the weights; see `take_step`.

    Raises:
        VlmError: a batch cannot be made, nothing is supervised, or loss or gradient is not finite. The weights
            have moved by then if it is the gradient.
    """
    turns = Turns(accelerator, batches)
    mine = [turns.next() for _ in range(accumulation)]
    for batch in mine:
        if batch is not None:
            turns.add(batch, torch.zeros(()), int((batch["labels"][:, 1:] != -100).sum()))
    _, supervised, tokens = turns.totals()
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for turn, batch in enumerate(mine):
        loss, _ = engine(batch)
        total += loss.detach()
        # The engine averages over processes; what is wanted is the sum over the tokens of all.
        engine.backward(loss * (accelerator.num_processes / supervised), scale_wrt_gas=False)
        if turn == accumulation - 1:
            mean = float(accelerator.reduce(total, reduction="sum")) / supervised
            require_finite({"loss": mean})
        engine.step()
    norm = float(engine.get_global_grad_norm())
    require_finite({"gradient norm": norm})
    return StepResult(mean, norm, tokens, supervised)


def whole_parameter(parameter: Tensor) -> Tensor:
    """Give a parameter that stage 3 holds in shares, whole; all processes take part."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def fill_parameter(parameter: Tensor, whole: Tensor) -> None:
    """Put a value into a parameter that stage 3 holds in shares; all processes take part."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(whole)


def settle_weights(engine: Any) -> None:
    """Take weights that were put into the module into the engine's own copy of them."""
    if engine.zero_optimization_stage() < 3:
        engine.optimizer.refresh_fp32_params()
        return
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            safe_set_full_fp32_param(parameter, whole_parameter(parameter).float())


def link_state(engine: Any) -> None:
    """Let each parameter know where its part of the optimizer's state lies."""
    if engine.zero_optimization_stage() < 3 and len(engine.optimizer.optimizer.state):
        # DeepSpeed does it inside its first step, when only the first group of parameters has a state.
        engine.optimizer._hp_optimizer_states_linked = False  # noqa: SLF001
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


def state_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Give the optimizer's state of a parameter, whole; all processes take part."""
    from deepspeed.utils import safe_get_full_optimizer_state

    steps = [values["step"] for values in optimizer.state.values()]
    if not steps:
        return {}
    return {"step": steps[0].clone(), **{key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS}}


def load_state(engine: Any, optimizer: Optimizer, parameters: dict[str, nn.Parameter], state: dict[str, Any]) -> None:
    """Put a state of `full_optimizer_state` into the engine's optimizer."""
    from deepspeed.utils import safe_set_full_optimizer_state

    for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
        group.update(saved)
    if not state["state"]:
        return
    zero = engine.optimizer
    third = engine.zero_optimization_stage() == 3
    step = next(iter(state["state"].values()))["step"]
    for share in zero.fp32_partitioned_groups_flat if third else zero.single_partition_of_fp32_groups:
        moments = {key: torch.zeros_like(share) for key in _MOMENTS}
        optimizer.state[share] = {"step": torch.as_tensor(step).clone().to(share.device), **moments}
    link_state(engine)
    for name, values in state["state"].items():
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameters[name], values[key].to(parameters[name].device), key)


def _engine_settings(accelerator: Accelerator, config: TrainConfig) -> dict[str, Any]:
    settings: dict[str, Any] = _without_auto(copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config))
    for key in ("optimizer", "scheduler"):
        if key in settings:
            raise VlmError(f"the DeepSpeed configuration has a {key} of its own; take it out, the settings say it")
    for key in ("fp16", "bf16"):
        if settings.pop(key, {}).get("enabled"):
            raise VlmError(
                f"the DeepSpeed configuration has {key} enabled, which would train in half precision; take it out, and "
                'set mixed_precision = "bf16" in the settings'
            )
    stage = settings.setdefault("zero_optimization", {}).setdefault("stage", 2)
    if stage not in {2, 3}:
        raise VlmError(f"the DeepSpeed configuration has ZeRO stage {stage}; set it to 2 or 3, or launch without it")
    if stage == 3:
        _check_third(config)
    return settings | {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "train_batch_size": config.batch_size * config.gradient_accumulation * accelerator.num_processes,
        "gradient_clipping": config.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _check_third(config: TrainConfig) -> None:
    if config.frozen_parts != "sharded":
        raise VlmError(
            'ZeRO-3 shards frozen parts too, the settings say frozen_parts = "replicated"; set it to "sharded", or use '
            "ZeRO-2 or FSDP2"
        )
    for name in ("chunk_tokens", "token_cache"):
        if getattr(config, name) is not None:
            raise VlmError(
                f"with {name} the encoder does not run equally often on all processes, which ZeRO-3 waits for; leave "
                "it out, or use FSDP2"
            )


def _without_auto(value: Any) -> Any:
    """Leave out what the configuration leaves to others."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
