"""What `check-data` says: the report on the screen, and everything as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from connectors.errors import VlmError
from vlm_encoders.cli.console import print_card

if TYPE_CHECKING:
    from vlm_encoders.training.feeding.findings import DataCheck, LengthSummary

__all__ = ["print_report", "write_json"]

WIDTH = 40


def print_report(name: str, check: DataCheck, *, show: int, first: bool, decoded: bool) -> None:
    """Print what conversations hold, how long they are, and what is wrong with them.

    Args:
        name: of the data.
        check: the outcome.
        show: examples of each kind of finding.
        first: whether nothing stands above it.
        decoded: whether the images were decoded.
    """
    if not first:
        typer.echo("")
    print_card(_card(name, check, decoded=decoded))
    _print_lengths(check)
    _print_findings(check, show)
    typer.echo("")
    if check.errors:
        typer.echo(f"{check.bad_samples} of {check.samples} samples have errors; a run would stop, or leave them out")
    elif check.warnings:
        typer.echo(f"no errors; {check.warnings} warnings")
    else:
        typer.echo("nothing is wrong")


def _card(name: str, check: DataCheck, *, decoded: bool) -> dict[str, str]:
    card = {
        "data": name,
        "samples": f"{check.samples}, {check.text_only} of text alone, {check.answers} answers",
        "images": f"{check.images}, {check.files} different, {'decoded whole' if decoded else 'headers read'}",
    }
    if check.formats:
        card["formats"] = _counts(check.formats)
    if check.notes:
        card["of note"] = _counts(check.notes)
    if check.largest is not None:
        (height, width), image = check.largest
        card["largest"] = f"{height}x{width} px, {image}"
    return card


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _print_lengths(check: DataCheck) -> None:
    from vlm_encoders.training.feeding.findings import summarise

    if check.lengths is None:
        return
    summary = summarise(check.lengths, check.indices, check.max_length)
    if summary is None:
        return
    context = "" if check.max_length is None else f", {summary.over} over the context of {check.max_length}"
    lengths = f"median {summary.median}, 95% up to {summary.p95}, longest {summary.longest} (sample "
    with_images = [tokens for tokens in check.lengths.image_tokens if tokens]
    images = f"{summary.image_share:.1%} of all"
    if with_images:
        images += f", {sum(with_images) / len(with_images):.0f} a sample that has images"
    typer.echo("")
    print_card(
        {
            "tokens": f"{lengths}{summary.longest_index}){context}",
            "supervised": f"{summary.supervised_share:.1%} of all",
            "of images": images,
        }
    )
    typer.echo("")
    _print_bars(summary, check.max_length)


def _print_bars(summary: LengthSummary, max_length: int | None) -> None:
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    digits = len(str(summary.bars[-1].last))
    most = max(bar.samples for bar in summary.bars)
    told = max_length is None
    for first, last, samples in summary.bars:
        if not told and max_length is not None and first > max_length:
            typer.echo(f"{'-' * (2 * digits + 3)} context {max_length}")
            told = True
        bar = block * max(round(WIDTH * samples / most), bool(samples))
        words = f"{bar} {samples} ({samples / summary.counted:.1%})" if samples else ""
        typer.echo(f"{first:>{digits}} - {last:>{digits}}  {words}".rstrip())


def _print_findings(check: DataCheck, show: int) -> None:
    from vlm_encoders.training.feeding.findings import ERRORS, WARNINGS

    kinds = check.kinds
    for title, group in (("errors", ERRORS), ("warnings", WARNINGS)):
        found = [kind for kind in group if kinds[kind]]
        if not found:
            continue
        typer.echo("")
        typer.echo(f"{title}:")
        for kind in found:
            typer.echo(f"  {kind}: {kinds[kind]}")
            shown = [finding for finding in check.findings if finding.kind == kind][:show]
            for finding in shown:
                typer.echo(f"    {finding.sample}: {finding.text}")
            if show and kinds[kind] > show:
                typer.echo(f"    and {kinds[kind] - show} more")


def write_json(path: Path, checks: list[tuple[str, DataCheck]]) -> None:
    """Write everything that was found.

    Raises:
        VlmError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            json.dump([_as_dict(name, check) for name, check in checks], file)
            file.write("\n")
    except OSError as error:
        raise VlmError(f"the report cannot be written to '{path}': {error.strerror}; give another --json") from error


def _as_dict(name: str, check: DataCheck) -> dict[str, Any]:
    from vlm_encoders.training.feeding.findings import ERRORS, summarise

    told: dict[str, Any] = {
        "data": name,
        "samples": check.samples,
        "bad_samples": check.bad_samples,
        "errors": check.errors,
        "warnings": check.warnings,
        "text_only": check.text_only,
        "answers": check.answers,
        "images": check.images,
        "different_images": check.files,
        "formats": dict(check.formats),
        "notes": dict(check.notes),
        "largest": None if check.largest is None else {"size": check.largest[0], "image": check.largest[1]},
        "kinds": dict(check.kinds),
    }
    if check.lengths is not None:
        summary = summarise(check.lengths, check.indices, check.max_length)
        bars = [] if summary is None else [bar._asdict() for bar in summary.bars]
        told["context"] = check.max_length
        told["lengths"] = None if summary is None else summary._asdict() | {"bars": bars}
        told["by_sample"] = {
            "index": check.indices,
            "tokens": check.lengths.tokens,
            "supervised": check.lengths.supervised,
            "image_tokens": check.lengths.image_tokens,
        }
    told["findings"] = [
        {"severity": "error" if finding.kind in ERRORS else "warning", **asdict(finding)} for finding in check.findings
    ]
    return told
