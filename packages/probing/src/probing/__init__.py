"""Which subnetwork of a transformer computes a variable: circuit and subnetwork probes."""

from probing._configs import ResidualUpdateModelConfig
from probing._errors import ConfigError, DataError, MaskError, ProbingError, ReadoutError, SiteError
from probing._readout import Readout, ResidualUpdateModel

__all__ = [
    "ResidualUpdateModel",
    "ResidualUpdateModelConfig",
    "Readout",
    "ProbingError",
    "ConfigError",
    "ReadoutError",
    "SiteError",
    "MaskError",
    "DataError",
]
