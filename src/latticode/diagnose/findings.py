"""Findings of a diagnosis: what is wrong with a part of a quantizer, by which threshold, and what to change."""

from __future__ import annotations

from typing import Any

from latticode.diagnose.parts import Finding, Part

LEAST_USAGE, LEAST_PERPLEXITY = 0.5, 0.1  # of what as many tokens could use
PER_CODE = 5  # tokens; with fewer the usage is bounded by them


def findings(part: Part, numbers: dict[str, Any]) -> list[Finding]:
    """What is wrong with a part, by its `measure`. A cause hides what follows from it: the least used codes are told
    only where no channel explains them."""
    return part.defects(numbers) or _collapsed(part, numbers)


def _collapsed(part: Part, numbers: dict[str, Any]) -> list[Finding]:
    most = numbers["possible"]
    usage, even = numbers["usage"] / most, numbers["perplexity"] / (most * numbers["size"])
    for name, value, threshold in (("usage", usage, LEAST_USAGE), ("perplexity", even, LEAST_PERPLEXITY)):
        if value < threshold:
            text = (
                f"the codebook is collapsed: {numbers['usage']:.2%} of {numbers['size']:,} codes are used, the "
                f"perplexity is {numbers['perplexity']:.3g}; {name} is {value:.2%} of what {numbers['tokens']:,} "
                "tokens allow"
            )
            return [Finding("collapsed", part.name, [], value, threshold, text, part.revived(numbers["entropy_bits"]))]
    return []


def notes(numbers: dict[str, Any]) -> list[str]:
    """What limits a finding without being a defect: too few tokens for the number of codes."""
    if numbers["tokens"] >= PER_CODE * numbers["size"]:
        return []
    return [
        f"{numbers['part']}: {numbers['tokens']:,} tokens cannot use more than {numbers['possible']:.1%} of "
        f"{numbers['size']:,} codes on average, however even; no defect"
    ]


__all__ = ["Finding", "findings", "notes"]
