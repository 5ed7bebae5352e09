"""Which subnetwork of a transformer computes a variable: circuit and subnetwork probes."""

from probing import beside, evaluate
from probing._circuit import CircuitModel
from probing._configs import CircuitConfig, CircuitProbeConfig, ResidualUpdateModelConfig, SubnetworkProbeConfig
from probing._data import ProbeData
from probing._errors import ConfigError, DataError, MaskError, ProbingError, ReadoutError, SiteError
from probing._export import export_pruned, pruned_state_dict
from probing._fit import TrainPlan, fit
from probing._masks import Masks, overlap
from probing._probes import CircuitProbe, SubnetworkProbe
from probing._readout import Readout, ResidualUpdateModel
from probing._sites import Site, find_sites

__all__ = [
    "CircuitModel",
    "CircuitConfig",
    "ResidualUpdateModel",
    "ResidualUpdateModelConfig",
    "CircuitProbe",
    "CircuitProbeConfig",
    "SubnetworkProbe",
    "SubnetworkProbeConfig",
    "ProbeData",
    "TrainPlan",
    "fit",
    "Masks",
    "overlap",
    "export_pruned",
    "pruned_state_dict",
    "Site",
    "find_sites",
    "Readout",
    "beside",
    "evaluate",
    "ProbingError",
    "ConfigError",
    "ReadoutError",
    "SiteError",
    "MaskError",
    "DataError",
]
