"""A run set up: at its beginning, or where a checkpoint left it."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from connectors.errors import VlmError
from vlm_encoders.training.config import TrainConfig
from vlm_encoders.training.feeding.batches import Samples
from vlm_encoders.training.feeding.feed import Feed, make_feed
from vlm_encoders.training.feeding.lengths import DataLengths, data_lengths, file_key
from vlm_encoders.training.feeding.order import StepBatches, make_order
from vlm_encoders.training.kept.token_cache import with_token_cache
from vlm_encoders.training.masters import hold_masters
from vlm_encoders.training.optim import build_optimizer
from vlm_encoders.training.processes.distributed import make_accelerator, prepare
from vlm_encoders.training.processes.first import on_first
from vlm_encoders.training.processes.gather import load_optimizer_state
from vlm_encoders.training.processes.sharding import is_engine
from vlm_encoders.training.proving.proof import Proof
from vlm_encoders.training.recompute import recompute_blocks
from vlm_encoders.training.rng import restore_random_state
from vlm_encoders.training.run import Run
from vlm_encoders.training.schedule import build_schedule, go_on
from vlm_encoders.training.state import RunState, restore_weights
from vlm_encoders.training.step import SummedLoss
from vlm_encoders.vlm.text_packing import try_packing

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vlm_encoders.training.feeding.stream import ConversationStream
    from vlm_encoders.vlm.model import VisionLanguageModel
    from vlm_encoders.vlm.processor import VLMProcessor

__all__ = ["start_run"]


def start_run(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples | ConversationStream,
    config: TrainConfig,
    state: RunState | None,
    *,
    eval_dataset: Samples | None = None,
) -> Run:
    """Set up a run at its beginning, or where a checkpoint left it.

    Raises:
        VlmError: nothing trains, or in half precision; data and settings contradict each other; or the
            checkpoint is of another run. The model then has no hook or wrapper left on it.
    """
    with ExitStack() as undo:
        run = _set_up(model, processor, dataset, eval_dataset, config, state, undo)
        undo.pop_all()
    return run


def _set_up(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    dataset: Samples | ConversationStream,
    eval_dataset: Samples | None,
    config: TrainConfig,
    state: RunState | None,
    undo: ExitStack,
) -> Run:
    from accelerate.utils import set_seed

    accelerator = make_accelerator(config)
    world = accelerator.num_processes
    model.train()
    hold_masters(model, config.mixed_precision)
    recompute = undo.enter_context(recompute_blocks(model)) if config.gradient_checkpointing else None
    autocast = torch.bfloat16 if config.mixed_precision == "bf16" else None
    if config.pack_tokens is not None:
        device = model.device.type
        with torch.autocast(device, dtype=autocast) if autocast else nullcontext():
            # All processes here, before weights are shared: rows of one sample alone would not try it.
            try_packing(model.llm)
    optimizer: Optimizer = build_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    order = _order(dataset, config, accelerator, 0 if state is None else state.step)
    samples, total = (None, config.steps) if order is None else (order.length, order.steps)
    if total is None:
        raise VlmError("a stream has no length, so epochs cannot be counted; set steps")
    if state is not None:
        state.check_settings(config, world, samples)
        # Before it is wrapped: each process brings all of it, and takes its share as of a new run.
        restore_weights(model, state.weights)
    set_seed(config.seed, device_specific=True)
    proof = Proof(model, resumed=state is not None)
    undo.callback(proof.close)
    if state is not None:
        state.check_frozen(proof.frozen)
    if config.token_cache is not None:
        model.encoder.to(accelerator.device)
    kept = with_token_cache(dataset, model, processor, config, accelerator)
    unseen = eval_dataset
    if eval_dataset is not None:
        unseen = with_token_cache(eval_dataset, model, processor, config, accelerator)
    module, optimizer = prepare(accelerator, SummedLoss(model, autocast), optimizer, config)
    # The engine's optimizer holds shares of its own.
    proof.attach(None if is_engine(module) else optimizer)
    run = Run(
        config=config,
        samples=samples,
        model=model,
        processor=processor,
        eval_dataset=unseen,
        module=module,
        accelerator=accelerator,
        optimizer=optimizer,
        schedule=_schedule(optimizer, config, total),
        proof=proof,
        recompute=recompute,
        feed=_feed(kept, processor, config, accelerator, state, order),
        total=total,
    )
    if state is not None:
        _go_on(run, state)
    return run


def _schedule(optimizer: Optimizer, config: TrainConfig, total: int) -> LambdaLR:
    return build_schedule(
        optimizer,
        kind=config.schedule,
        total=total,
        warmup_ratio=config.warmup_ratio,
        floor=config.floor_ratio,
        decay_ratio=config.decay_ratio,
    )


def _feed(
    dataset: Any,
    processor: VLMProcessor,
    config: TrainConfig,
    accelerator: Accelerator,
    state: RunState | None,
    order: StepBatches | None,
) -> Feed:
    rank, world = accelerator.process_index, accelerator.num_processes
    return make_feed(
        dataset,
        processor,
        config,
        rank=rank,
        world=world,
        device=accelerator.device,
        start_step=0 if state is None else state.step,
        state=None if state is None else state.feed_of(rank, world),
        order=order,
    )


def _go_on(run: Run, state: RunState) -> None:
    """Bring a run to where a checkpoint left it; the weights are there already."""
    state.check_schedule(run.schedule.lr_lambdas[0])
    load_optimizer_state(run.module, run.optimizer, state.optimizer)
    go_on(run.schedule, state.step)
    run.step, run.tokens, run.best = state.step, state.tokens, state.best
    run.losses, run.factors = list(state.losses), list(state.factors)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    if world == state.world:
        restore_random_state(state.random[rank])
    else:
        # The states belong to as many processes as there were: new ones, as much a function of seed and step.
        torch.manual_seed(run.config.seed + 7919 * state.step + rank)


def _order(
    dataset: Samples | ConversationStream, config: TrainConfig, accelerator: Accelerator, start: int
) -> StepBatches | None:
    """Give the order of samples that can be indexed, None for a stream."""
    length = getattr(dataset, "__len__", None)
    if length is None:
        return None
    lengths = None
    if config.pack_tokens is not None or config.group_by_length:
        lengths = _lengths(dataset, config, accelerator)
    rank, world = accelerator.process_index, accelerator.num_processes
    order = make_order(length(), config, lengths=lengths, start=start, rank=rank, world=world)
    longer = getattr(order, "longer", 0)
    if longer and accelerator.is_main_process:
        warnings.warn(
            f"{longer} of {order.length} samples are longer than pack_tokens={config.pack_tokens}, so each is a pack "
            "of its own; raise pack_tokens",
            stacklevel=2,
        )
    return order


def _lengths(dataset: Any, config: TrainConfig, accelerator: Accelerator) -> DataLengths:
    key = file_key(config.data, config.images) if Path(config.data).is_file() else config.data
    count = partial(data_lengths, dataset, key=key, cache=config.output, workers=os.cpu_count() or 1)

    def first() -> None:
        lengths = count()
        if config.on_bad_sample == "error" and lengths.problems:
            index, sentence = next(iter(lengths.problems.items()))
            raise VlmError(
                f"{dataset.path}, {dataset.name(index)}: {sentence}; {len(lengths.problems)} of {len(lengths)} samples "
                'cannot be made, vlm-encoders check-data lists them; mend them, or set on_bad_sample = "skip"'
            )

    # The first process counts and keeps them; the others read what it kept.
    on_first(accelerator, first)
    return count()
