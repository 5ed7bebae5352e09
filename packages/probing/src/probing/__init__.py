"""Which subnetwork of a transformer computes a variable: circuit and subnetwork probes."""

from probing._circuit import CircuitModel
from probing._configs import CircuitConfig, ResidualUpdateModelConfig
from probing._errors import ConfigError, DataError, MaskError, ProbingError, ReadoutError, SiteError
from probing._masks import Masks, overlap
from probing._readout import Readout, ResidualUpdateModel
from probing._sites import Site, find_sites

__all__ = [
    "CircuitModel",
    "CircuitConfig",
    "ResidualUpdateModel",
    "ResidualUpdateModelConfig",
    "Masks",
    "overlap",
    "Site",
    "find_sites",
    "Readout",
    "ProbingError",
    "ConfigError",
    "ReadoutError",
    "SiteError",
    "MaskError",
    "DataError",
]
