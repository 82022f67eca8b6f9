"""What a check of conversations finds: counts, faults by kind, and lengths in a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from connectors.tokens import Grid
    from vlm_encoders.training.feeding.image_check import ImageFacts
    from vlm_encoders.training.feeding.lengths import DataLengths

__all__ = ["ERRORS", "WARNINGS", "DataCheck", "Finding", "LengthBar", "LengthSummary", "summarise"]

ERRORS = (
    "record",
    "missing image",
    "broken image",
    "image over the limit",
    "cannot be counted",
    "nothing supervised",
    "longer than the context",
)
"""Kinds of findings at which a run stops, or leaves the sample out."""
WARNINGS = ("animated image", "large image", "wrong extension")
"""Kinds of findings with which a run goes on."""

_BARS = 8


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with one sample.

    Attributes:
        kind: one of `ERRORS` or `WARNINGS`.
        index: place of the sample, from 0.
        sample: the sample in words.
        text: what is wrong and what to do.
    """

    kind: str
    index: int
    sample: str
    text: str


@dataclass
class DataCheck:
    """What conversations hold, and what is wrong with them.

    Attributes:
        max_length: tokens that the context takes; None where it is not known.
        samples: conversations.
        text_only: those without an image.
        answers: turns that are learned.
        images: image references; a picture used twice counts twice.
        files: different images.
        formats: format -> images.
        notes: what is no fault -> images.
        largest: (height, width), px, of the image of the most pixels, and its name.
        findings: all that is wrong, in the order of the samples.
        indices: place of each sample of `lengths`.
        lengths: of the samples whose structure is right; None where none were counted.
    """

    max_length: int | None = None
    samples: int = 0
    text_only: int = 0
    answers: int = 0
    images: int = 0
    files: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    largest: tuple[Grid, str] | None = None
    findings: list[Finding] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    lengths: DataLengths | None = None

    @property
    def kinds(self) -> Counter[str]:
        """How often each kind of finding came."""
        return Counter(finding.kind for finding in self.findings)

    @property
    def errors(self) -> int:
        """Findings at which a run would stop."""
        kinds = self.kinds
        return sum(kinds[kind] for kind in ERRORS)

    @property
    def warnings(self) -> int:
        """Findings with which a run would go on."""
        kinds = self.kinds
        return sum(kinds[kind] for kind in WARNINGS)

    @property
    def bad_samples(self) -> int:
        """Samples with an error."""
        return len({finding.index for finding in self.findings if finding.kind in ERRORS})

    def add_image(self, facts: ImageFacts, name: str) -> None:
        """Count an image that is met for the first time."""
        self.files += 1
        if facts.size is None:
            return
        self.formats[facts.format or "other"] += 1
        self.notes.update(facts.notes)
        if self.largest is None or facts.size[0] * facts.size[1] > self.largest[0][0] * self.largest[0][1]:
            self.largest = facts.size, name


class LengthBar(NamedTuple):
    """One bar of a histogram: samples of `first` to `last` tokens."""

    first: int
    last: int
    samples: int


class LengthSummary(NamedTuple):
    """Lengths in a few numbers; all are LLM tokens, but for the shares and counts.

    Attributes:
        counted: samples whose length is known.
        mean: of their lengths.
        median: half of the samples are no longer.
        p95: 95 of 100 samples are no longer.
        longest: of all.
        longest_index: place of the first that is so long.
        supervised_share: part of all tokens that is learned.
        image_share: part of all tokens that stands for images.
        over: samples that are longer than the context.
        bars: the histogram.
    """

    counted: int
    mean: float
    median: int
    p95: int
    longest: int
    longest_index: int
    supervised_share: float
    image_share: float
    over: int
    bars: tuple[LengthBar, ...]


def summarise(lengths: DataLengths, indices: Sequence[int], max_length: int | None) -> LengthSummary | None:
    """Give lengths in a few numbers; None where no sample could be counted.

    Args:
        lengths: of the samples.
        indices: their places.
        max_length: tokens that the context takes.
    """
    known = sorted((tokens, index) for tokens, index in zip(lengths.tokens, indices, strict=True) if tokens is not None)
    if not known:
        return None
    tokens = [length for length, _ in known]
    total, longest = sum(tokens), tokens[-1]
    return LengthSummary(
        counted=len(tokens),
        mean=total / len(tokens),
        median=tokens[(len(tokens) - 1) // 2],
        p95=tokens[-(-95 * len(tokens) // 100) - 1],
        longest=longest,
        longest_index=min(index for length, index in known if length == longest),
        supervised_share=sum(lengths.supervised) / total,
        image_share=sum(lengths.image_tokens) / total,
        over=sum(length > max_length for length in tokens) if max_length is not None else 0,
        bars=tuple(_bars(tokens, max_length)),
    )


def _bars(tokens: Sequence[int], max_length: int | None) -> list[LengthBar]:
    """Cut the lengths into bars of equal width, one of which ends at the context where that is near."""
    longest = tokens[-1]
    near = max_length is not None and max_length <= 4 * longest <= 16 * max_length
    width = _width(max_length if near and max_length is not None else longest)
    counts = Counter((length - 1) // width for length in tokens)
    return [LengthBar(bar * width + 1, (bar + 1) * width, counts[bar]) for bar in range((longest - 1) // width + 1)]


def _width(span: int) -> int:
    """Divide a span into about eight: exactly where it divides, else by a round number."""
    if span % _BARS == 0:
        return span // _BARS
    rough = max(1, span / _BARS)
    size: int = 10 ** (len(str(int(rough))) - 1)
    return next(step * size for step in (1, 2, 5, 10) if step * size >= rough)
