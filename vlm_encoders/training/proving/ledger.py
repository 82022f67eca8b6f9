"""What of a model trains and what does not, unit by unit, with the hashes of all its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlm_encoders.training.processes.sharding import local, reshard
from vlm_encoders.training.proving.causes import stirring_modules
from vlm_encoders.training.proving.watch import Watch
from vlm_encoders.vlm.blocks import chosen_parameters
from vlm_encoders.vlm.fingerprint import joined_hash, tensor_hashes
from vlm_encoders.vlm.stages import PARTS, Part
from vlm_encoders.vlm.units import unit_parameters, units

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["Ledger", "Row"]


@dataclass
class Row:
    """One unit as it stands before the first step.

    Attributes:
        name: of the unit.
        part: the part that it is, or belongs to.
        path: name of its module in the model.
        module: its module.
        frozen: its policy trains nothing of it.
        trained: names of the tensors that train.
        still: names of those that must not move, the buffers that are saved too.
        lacking: names of those that the policy trains and that require no gradient.
        held: names of its modules that are in eval mode while the model trains.
    """

    name: str
    part: Part
    path: str
    module: nn.Module
    frozen: bool
    trained: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    held: set[str] = field(default_factory=set)

    @property
    def evidence(self) -> list[str]:
        """Names of the tensors that show whether the unit trains: the vector at row ends does not stand for others."""
        return [name for name in self.trained if name != "connector.newline"] or self.trained


class Ledger:
    """The units of a model, and the hashes of their tensors.

    Tensors are remembered by name, so that what something unfreezes during the run is still held to its hash, and
    so that a model which is sharded later is the same one.

    Args:
        model: the model before its first step, in the modes that it trains in.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.rows = _rows(model)
        self._owner = {name: row for row in self.rows for name in (*row.trained, *row.still)}
        self._before = self._hashes(self._owner)

    @property
    def trained_names(self) -> list[str]:
        """Names of all that trains, unit by unit."""
        return [name for row in self.rows for name in row.trained]

    def row_of(self, name: str) -> Row:
        """Give the unit of a tensor."""
        return self._owner[name]

    def trains(self, part: Part) -> bool:
        """Say whether anything of a part trains."""
        return any(row.trained for row in self.rows if row.part == part)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Give the model's parameters as they are now, tied ones by each of their names."""
        return dict(self._model.named_parameters(remove_duplicate=False))

    def watch(self, cut_off: Callable[[], None]) -> Watch:
        """Watch the forward passes of all units; `cut_off` is called for a loss that hangs on none of them."""
        trained = {row.name: _trained_modules(row) for row in self.rows if row.trained}
        outputs = {row.name: row.module for row in self.rows if row.part != "llm"}
        return Watch(self._model, trained, outputs, cut_off)

    def refresh(self) -> None:
        """Hash again what wrapping for several processes may have sharded or sent."""
        if _several():
            self._before = self._hashes(self._owner)

    def frozen_by_part(self) -> dict[Part, str]:
        """Give one hash a part of all that must not move."""
        return {
            part: joined_hash({name: self._before[name] for row in self.rows if row.part == part for name in row.still})
            for part in PARTS
        }

    def moved_still(self) -> list[str]:
        """Name what moved although it must not, on any process."""
        names = [name for row in self.rows for name in row.still]
        now = self._hashes(names)
        return self._chosen(names, [now[name] != self._before[name] for name in names])

    def moves(self, row: Row) -> bool:
        """Say whether anything of a unit that trains has moved; the smallest tensors are asked first."""
        tensors = self._tensors(row.evidence)
        names = sorted(tensors, key=lambda name: tensors[name].numel())
        moved = any(tensor_hashes({name: tensors[name]})[name] != self._before[name] for name in names)
        return bool(self._chosen([row.name], [moved]))

    def unmoved(self, row: Row) -> list[str]:
        """Name what of a unit trains and has not moved."""
        now = self._hashes(row.trained)
        moved = self._chosen(row.trained, [now[name] != self._before[name] for name in row.trained])
        return [name for name in row.trained if name not in set(moved)]

    def moved_parts(self) -> dict[Part, bool]:
        """Say of each part whether anything of it moved."""
        moved = {row.name: bool(row.trained) and self.moves(row) for row in self.rows}
        return {part: any(moved[row.name] for row in self.rows if row.part == part) for part in PARTS}

    def dtypes(self, names: Iterable[str]) -> list[torch.dtype]:
        """Give the dtypes of parameters."""
        parameters = self.parameters()
        return [parameters[name].dtype for name in names]

    def stirring(self, row: Row) -> tuple[str, str] | None:
        """Give a frozen module in train mode that acts otherwise there than in eval, and what it does.

        All of a frozen unit is frozen; of one that trains, what stood in eval when the run began.
        """
        if not self._model.training:
            return None
        found = stirring_modules(row.module, row.path)
        return next((each for each in found if row.frozen or each[0] in row.held), None)

    def _tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        if _several():
            # What was gathered for a forward pass alone may still be whole.
            reshard(self._model)
        present: Mapping[str, Tensor] = {**dict(self._model.named_buffers()), **self.parameters()}
        # DeepSpeed keeps its shares beside the parameters.
        return {name: local(getattr(present[name], "ds_tensor", present[name])) for name in names if name in present}

    def _hashes(self, names: Iterable[str]) -> dict[str, str]:
        wanted = list(names)
        return dict.fromkeys(wanted, "") | tensor_hashes(self._tensors(wanted))

    def _chosen(self, names: list[str], marks: list[bool]) -> list[str]:
        """Give the names that are marked on any process."""
        if _several() and names:
            whole = torch.tensor(marks, dtype=torch.float32, device=self._model.device)
            torch.distributed.all_reduce(whole, op=torch.distributed.ReduceOp.MAX)
            marks = [value > 0 for value in whole.tolist()]
        return [name for name, mark in zip(names, marks, strict=True) if mark]


def _rows(model: VisionLanguageModel) -> list[Row]:
    rows: list[Row] = []
    placed: set[str] = set()
    for unit in units(model):
        row = Row(unit.name, unit.part, unit.path, unit.module, not unit.policy.trains)
        named = list(unit_parameters(model, unit))
        chosen = chosen_parameters(unit, named)
        for name, parameter in named:
            (row.trained if parameter.requires_grad and id(parameter) in chosen else row.still).append(name)
        # Without a layout that writes it, nothing could train the vector at row ends.
        idle = set() if model.newline is not None else {"connector.newline"}
        row.lacking = [name for name, each in named if id(each) in chosen and name in row.still and name not in idle]
        if model.training:
            row.held = {name for name, each in unit.module.named_modules(prefix=unit.path) if not each.training}
        placed |= {*row.trained, *row.still}
        rows.append(row)
    for part in PARTS:
        mine = [row for row in rows if row.part == part]
        # What a fused encoder holds beside its encoders.
        mine[0].still += [name for name, _ in model.part_parameters(part) if name not in placed]
        for path, module in model.part_module(part).named_modules(prefix=part):
            row = next((each for each in mine if f"{path}.".startswith(f"{each.path}.")), mine[0])
            # The statistics of what trains move with it.
            if row.frozen or not module.training:
                row.still += [f"{path}.{name}" for name in _kept_buffers(module)]
    return rows


def _kept_buffers(module: nn.Module) -> list[str]:
    # What no state dict holds is derived: rotary frequencies that follow the length of the text are not weights.
    derived = module._non_persistent_buffers_set  # noqa: SLF001
    return [name for name, _ in module.named_buffers(recurse=False) if name not in derived]


def _trained_modules(row: Row) -> dict[str, nn.Module]:
    named = row.module.named_modules(prefix=row.path)
    return {name: each for name, each in named if any(own.requires_grad for own in each.parameters(recurse=False))}


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
