"""Which subnetwork of a transformer computes a variable: circuit and subnetwork probes."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probing import beside, evaluate, plots
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
    from probing._sweep import fit_many

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
    "fit_many",
    "Masks",
    "overlap",
    "export_pruned",
    "pruned_state_dict",
    "Site",
    "find_sites",
    "Readout",
    "beside",
    "evaluate",
    "plots",
    "ProbingError",
    "ConfigError",
    "ReadoutError",
    "SiteError",
    "MaskError",
    "DataError",
]

# Names are imported when first used: `trace probe --help` must not wait for torch.
_HOME = {
    "CircuitModel": "probing._circuit",
    "CircuitConfig": "probing._configs",
    "CircuitProbeConfig": "probing._configs",
    "ResidualUpdateModelConfig": "probing._configs",
    "SubnetworkProbeConfig": "probing._configs",
    "ProbeData": "probing._data",
    "ConfigError": "probing._errors",
    "DataError": "probing._errors",
    "MaskError": "probing._errors",
    "ProbingError": "probing._errors",
    "ReadoutError": "probing._errors",
    "SiteError": "probing._errors",
    "export_pruned": "probing._export",
    "pruned_state_dict": "probing._export",
    "TrainPlan": "probing._fit",
    "fit": "probing._fit",
    "Masks": "probing._masks",
    "overlap": "probing._masks",
    "CircuitProbe": "probing._probes",
    "SubnetworkProbe": "probing._probes",
    "Readout": "probing._readout",
    "ResidualUpdateModel": "probing._readout",
    "Site": "probing._sites",
    "find_sites": "probing._sites",
    "fit_many": "probing._sweep",
}


def __getattr__(name: str) -> Any:
    if name in ("beside", "evaluate", "plots"):
        return import_module(f"probing.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'probing' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
