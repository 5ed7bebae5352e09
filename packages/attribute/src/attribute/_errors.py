"""The errors of attribute.

AttributionError
├── DataError      a dataset that cannot be read, rendered or tokenised as asked
├── ModelError     a model that cannot be loaded or measured
└── RunError       a run folder that cannot be written, continued or queried
"""

from __future__ import annotations


class AttributionError(Exception):
    """Base class: every error attribute raises on purpose is one of these."""


class DataError(AttributionError):
    """A dataset that cannot be read, rendered or tokenised as asked."""


class ModelError(AttributionError):
    """A model that cannot be loaded, or whose loss cannot be measured."""


class RunError(AttributionError):
    """A run folder that cannot be written, continued or queried as asked."""
