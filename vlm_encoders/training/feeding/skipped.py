"""Samples that cannot be made: what one is, and how many a run may leave out."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from connectors.errors import VlmError
from vlm_encoders.training.progress import trim_log, write_log

__all__ = ["BAD_SAMPLES_FILE", "BadSample", "BadSamples", "is_system_failure"]

BAD_SAMPLES_FILE = "bad_samples.jsonl"

_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.ENOTCONN,
}  # fmt: skip


class BadSample(NamedTuple):
    """A sample that cannot be made.

    Attributes:
        key: what it is known by in every epoch.
        id: its id, where it has one that can be read.
        sentence: its name, what is wrong and what to do.
    """

    key: str
    id: str
    sentence: str


def is_system_failure(error: BaseException) -> bool:
    """Say whether the machine is at fault, not the sample: memory, disk, open files or the file system."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in _SYSTEM):
            return True
        if isinstance(cause, RuntimeError) and "allocate memory" in str(cause):
            return True
        cause = cause.__cause__
    return False


class BadSamples:
    """The bad samples that one process has met, and the log of those of all.

    A sample that is met again, in a later epoch or after a resume, counts once. The log
    is one file for all processes, a line a sample, and the cap is on its samples.

    Args:
        output: folder of the log.
        policy: "error" to stop at the first, "skip" to leave them out.
        limit: samples that may be left out, over all processes.
        rank: this process.
        step: steps that are done; what an interrupted run logged later is met again.
        known: keys of the samples that this process had left out by then.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        policy: Literal["error", "skip"],
        limit: int,
        rank: int = 0,
        step: int = 0,
        known: Iterable[str] = (),
    ) -> None:
        self.path = Path(output) / BAD_SAMPLES_FILE
        self.policy = policy
        self.limit = limit
        self.rank = rank
        self.known = dict.fromkeys(known)
        if rank == 0 and policy == "skip":
            trim_log(self.path, step)

    def take(self, samples: Sequence[BadSample], step: int) -> None:
        """Count and log what a batch of step `step`, from 1, leaves out.

        Raises:
            VlmError: the policy is "error", more than the cap are left out, or the log cannot be written.
        """
        for sample in samples:
            if self.policy == "error":
                raise VlmError(sample.sentence)
            if sample.key in self.known:
                continue
            self.known[sample.key] = None
            write_log(self.path, {"step": step, "rank": self.rank, **sample._asdict()})
            count = len(self._logged() | self.known.keys())
            if count > self.limit:
                raise VlmError(
                    f"{count} samples cannot be made, max_bad_samples={self.limit} may be left out; the last: "
                    f"{sample.sentence}; see '{self.path}' for all, mend the data or raise max_bad_samples"
                )

    def _logged(self) -> set[str]:
        # A line that another process is writing may not be whole yet.
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return {str(json.loads(line)["key"]) for line in lines if line.endswith("}\n")}
