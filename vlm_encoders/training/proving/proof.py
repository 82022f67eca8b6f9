"""The proof that a run trains what its stage says, and nothing else.

A tower that does not train, and one that moves although it is frozen, raise nothing by themselves. They are
looked for where they cannot hide: in the gradients behind the backward pass, and in the bytes of all tensors
before and after a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from vlm_encoders.training.proving.causes import BELOW_FLOAT32, no_gradient_cause, not_finite_cause, not_moved_cause
from vlm_encoders.training.proving.gradients import Gradient, GradientRecord
from vlm_encoders.training.proving.held import ProofError, check_flags, check_modules, check_optimizer, held_ids
from vlm_encoders.training.proving.ledger import Ledger, Row
from vlm_encoders.training.proving.tensor_warnings import tensor_warnings
from vlm_encoders.vlm.stages import Part

if TYPE_CHECKING:
    from vlm_encoders.vlm.model import VisionLanguageModel

__all__ = ["PROOF_STEPS", "Proof", "ProofError"]

PROOF_STEPS = (1, 10)
"""Steps of a run, or of its continuation, after which all is proved."""


class Proof:
    """Holds a model to its stage through the first ten steps and at the end.

    All weights are hashed before the run, and again after steps 1 and 10 and at the end; of what trains, no more
    than shows that it moved, but for step 10. A GB takes about 0.7 s of one core, and all cores share the tensors:
    14 GB, 7 B parameters in bfloat16, take 10 s on one and 1 s on sixteen. The first ten steps cost one look at
    the gradients besides, later ones nothing, unless no batch has held an image so far.

    Attributes:
        frozen: SHA-256 of each part's frozen tensors as the run found them.
        warnings: what is odd and no error, in sentences.

    Args:
        model: the model before its first step and before it is wrapped, in the modes that it trains in.
        resumed: whether the run goes on from a checkpoint, so that steps at next to no learning rate may be all.

    Raises:
        ProofError: something trains that the stage froze.
    """

    def __init__(self, model: VisionLanguageModel, *, resumed: bool = False) -> None:
        self._resumed = resumed
        self.warnings: list[str] = []
        self._model = model
        self._ledger = Ledger(model)
        check_modules(self._ledger)
        check_flags(self._ledger, "before the first step")
        self.frozen: dict[Part, str] = self._ledger.frozen_by_part()
        self._watch = self._ledger.watch(self._check_loss)
        self._gradients = GradientRecord(self._ledger.trained_names)
        self._gradient: Gradient = _own_gradient
        self._optimizer: Optimizer | None = None
        self._steps = 0
        self._looks = 0
        self._late: set[str] = set()
        self._chances = PROOF_STEPS[-1]

    def attach(self, optimizer: Optimizer | None, *, gradient: Gradient | None = None) -> None:
        """Take the optimizer, once the model is wrapped and before the first step.

        Args:
            optimizer: that of the run; None where it holds other tensors than the model's.
            gradient: gives a parameter's gradient where `.grad` does not hold it.

        Raises:
            ProofError: what trains is in no group of the optimizer, or what is frozen is in one.
        """
        self._ledger.refresh()
        self._gradient = gradient or _own_gradient
        self._optimizer = optimizer
        if optimizer is not None:
            check_optimizer(self._ledger, optimizer)

    def after_backward(self, step: int) -> None:
        """Look at gradients, learning rates and modes, before the gradients are clipped.

        Args:
            step: number of the step under way, from 1.

        Raises:
            ProofError: a gradient is not finite, something was frozen or unfrozen since the stage was
                applied, or a frozen module acts as in training.
        """
        if self._steps >= PROOF_STEPS[-1] and not self._late:
            return
        self._looks += 1
        check_flags(self._ledger, f"at step {step}")
        watch, parameters = self._watch, self._ledger.parameters()
        flags = [watch.images, watch.answered]
        watch.images, watch.answered = self._gradients.add(parameters, self._gradient, flags, self._model.device)
        if self._optimizer is not None:
            self._gradients.add_rates(parameters, self._optimizer)
        self._check_in_place(step)
        broken = self._gradients.not_finite()
        if broken:
            raise ProofError(
                f"at step {step} the gradient of '{broken[0]}' of the {self._ledger.row_of(broken[0]).name} is not "
                f"finite, as that of {len(broken)} of {len(self._gradients.greatest)} tensors: "
                f"{not_finite_cause(watch, parameters.items())}"
            )

    def after_step(self, step: int) -> list[str]:
        """Prove, after steps 1 and 10, that what trains has a gradient and moves and that all else does not.

        Args:
            step: number of the step that was taken, from 1.

        Returns:
            New warnings.

        Raises:
            ProofError: it is not so; unit, tensor and likely cause are named.
        """
        self._steps += 1
        if self._steps > PROOF_STEPS[-1]:
            self._prove_late(f"after step {step}")
        if self._steps not in PROOF_STEPS:
            return []
        known, last, when = len(self.warnings), self._steps == PROOF_STEPS[-1], f"after step {step}"
        self._check_still(when)
        for row in self._ledger.rows:
            if row.trained and not self._waits(row, when, last=last):
                self._check_moved(row, when, last=last)
            elif row.frozen and row.part == "encoder" and self._watch.calls[row.name].graph and not last:
                self.warnings.append(
                    f"{when} the frozen {row.name} keeps a graph for gradients, which costs memory and trains nothing; "
                    "look for enable_input_require_grads, or inputs that require a gradient"
                )
        if last:
            self._end_watch()
            if self._looks:
                self.warnings += tensor_warnings(self._ledger, self._gradients, self._steps, when)
        return self.warnings[known:]

    def check(self, model: VisionLanguageModel | None = None) -> dict[Part, bool]:
        """Prove at the end of a run that what trains moved and all else did not.

        Returns:
            Whether each part moved.

        Raises:
            ProofError: it is not so.
        """
        self._watch.remove()
        self._check_still("at the end of the run")
        for row in self._ledger.rows:
            if row.trained:
                self._check_moved(row, "at the end of the run", last=True, end=True)
        return self._ledger.moved_parts()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._watch.remove()

    def _prove_late(self, when: str) -> None:
        """Prove, once a batch holds an image, what had seen none in the first ten steps."""
        if not self._late or not self._watch.images:
            return
        self._chances -= 1
        for row in self._ledger.rows:
            if row.name in self._late and not self._waits(row, when, last=not self._chances):
                self._check_moved(row, when, last=False)
                self._late.remove(row.name)
        self._end_watch()

    def _end_watch(self) -> None:
        if not self._late:
            self._watch.remove()

    def _check_loss(self) -> None:
        for row in reversed(self._ledger.rows):
            cause = row.trained and no_gradient_cause(row.name, self._watch.calls[row.name], self._watch, zero=False)
            if cause:
                what = f"at step {self._steps + 1} the loss has no gradient for the {row.name}, which is to be trained"
                raise ProofError(f"{what}: {cause}")

    def _check_in_place(self, step: int) -> None:
        for unit, calls in self._watch.calls.items():
            if calls.in_place:
                raise ProofError(
                    f"at step {step} the {unit} changed what it was given in place, so that kept tokens would "
                    "be others the next time; write x = x + y in place of x += y"
                )

    def _check_still(self, when: str) -> None:
        check_flags(self._ledger, when)
        moved = self._ledger.moved_still()
        if not moved:
            return
        row, parameter = self._ledger.row_of(moved[0]), self._ledger.parameters().get(moved[0])
        if parameter is None:
            cause = "it is a buffer that its module writes to, as a batch norm in train mode does"
        elif id(parameter) in held_ids(self._optimizer):
            cause = "the optimizer holds it, so build that of what trains alone"
        else:
            cause = "the optimizer does not hold it, so look for code that writes to it in place"
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        raise ProofError(
            f"{when} frozen weights of the {row.name} had moved, '{moved[0]}'{more}: {cause}, and do not use this "
            "run's checkpoints"
        )

    def _waits(self, row: Row, when: str, *, last: bool) -> bool:
        """Refuse a unit without a gradient; True where later batches may still bring one."""
        greatest = self._gradients.of(row.evidence)
        self._check_silent(row, when)
        if greatest > 0 or not self._looks:
            # An engine that keeps gradients to itself is proved by the weights alone.
            return False
        zero = greatest == 0
        cause = no_gradient_cause(row.name, self._watch.calls[row.name], self._watch, zero=zero)
        if cause is None:
            if last:
                self._late.add(row.name)
                self.warnings.append(f"{when} the {row.name} has had no gradient, as no batch held an image so far")
            return True
        calls = self._watch.calls[row.name]
        if zero and not last and row.part != "llm" and calls.tracked:
            # A connector that begins at 0 lets nothing through before its own first step, and an image may close
            # its sample.
            behind = row.part == "encoder" and self._ledger.trains("connector")
            if behind or not self._watch.answered:
                return True
        kind = "a gradient of exactly 0" if zero else "no gradient"
        raise ProofError(f"{when} the {row.name}, which is to be trained, has {kind}: {cause}")

    def _check_silent(self, row: Row, when: str) -> None:
        """Refuse a module of a unit that trains which ran without gradients and got none by another way."""
        calls, names = self._watch.calls[row.name], set(row.trained)
        if not self._looks or not calls.tracked or (row.part != "llm" and not self._watch.images):
            return
        for path in sorted(calls.silent):
            own = [name for name in names if name.rpartition(".")[0] == path]
            if own and self._gradients.of(own) <= 0:
                raise ProofError(
                    f"{when} '{path}' of the {row.name}, which is to be trained, has no gradient: its forward ran "
                    f"without gradients, turned off by {calls.untracked_by}; take that away, or freeze it by its policy"
                )

    def _check_moved(self, row: Row, when: str, *, last: bool, end: bool = False) -> None:
        if self._ledger.moves(row):
            return
        rates = self._rates(row.trained)
        fastest = max(rates, default=1.0)
        if fastest < BELOW_FLOAT32 and (self._resumed or not end) and (fastest or not last):
            # A warm-up may begin, and the tail of a resumed run end, at 0 or below what float32 adds to a weight.
            if last:
                self.warnings.append(f"{when} the {row.name} has not moved yet, at learning rates up to {fastest:g}")
            return
        if row.part != "llm" and self._watch.batches and not self._watch.images:
            if not end:
                # An engine shows no gradients to wait for.
                return
            cause = "no batch held an image; give data with images, or freeze it by its policy"
        else:
            zero = 0 < self._looks <= PROOF_STEPS[-1] and self._gradients.of(row.evidence) <= 0
            cause = not_moved_cause(rates, self._ledger.dtypes(row.trained), self._steps, zero=zero)
        raise ProofError(f"{when} the {row.name}, which is to be trained, has not moved: {cause}")

    def _rates(self, names: list[str]) -> list[float]:
        return [self._gradients.rates[name] for name in names if name in self._gradients.rates]


def _own_gradient(parameter: nn.Parameter) -> Tensor | None:
    return parameter.grad
