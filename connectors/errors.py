"""The errors of both packages: one sentence that says what to do."""

__all__ = ["DuplicateNameError", "TokenShapeError", "UnknownNameError", "VlmError"]


class VlmError(ValueError):
    """A caller's mistake, told in one sentence: what was asked, what came, what to do."""


class TokenShapeError(VlmError):
    """Tokens of a shape that the next part cannot take."""


class UnknownNameError(VlmError, KeyError):
    """A name that no registry knows."""

    # KeyError prints the repr of its argument; the sentence must stay readable.
    __str__ = ValueError.__str__


class DuplicateNameError(VlmError):
    """A name that is registered already."""
