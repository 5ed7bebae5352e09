"""The errors of gradcore.

GradCoreError
├── SelectionError    a pattern that matches no module
├── CaptureError      a module, batch or loss that cannot be captured as asked
└── PlanMismatch      two artefacts whose capture plans disagree
"""

from __future__ import annotations


class GradCoreError(Exception):
    """Base class: every error gradcore raises on purpose is one of these."""


class SelectionError(GradCoreError):
    """A module pattern matches nothing; the message lists close matches."""


class CaptureError(GradCoreError):
    """A module, batch or loss cannot be captured as asked; the message names it."""


class PlanMismatch(GradCoreError):
    """Two capture plans disagree; the message names the field, both values and the remedy."""
