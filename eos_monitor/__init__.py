"""A stability gauge for training runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded on first use (PEP 562), so that a TensorBoard server that imports the package does not import torch.
_PLACES = {
    "EdgeOfStabilityMonitor": "callbacks.edge_of_stability",
    "CFLMonitor": "callbacks.cfl_monitor",
    "PerturbationMonitor": "callbacks.perturbation_monitor",
    "StabilityActions": "callbacks.actions",
    "StabilityProbe": "monitor.probe",
    "Probe": "readings.settings",
    "Solver": "readings.settings",
    "measure_stability": "readings.gauge",
    "StabilityReading": "readings.reading",
    "critical_curvature": "limits.thresholds",
    "CriticalCurvature": "limits.thresholds",
    "register_critical_curvature": "limits.thresholds",
    "check_critical_curvature": "limits.threshold_check",
    "HessianOperator": "curvature.hessian",
    "lanczos": "curvature.lanczos",
    "spectral_density": "curvature.density",
    "Spectrum": "curvature.lanczos",
    "batch_sharpness": "curvature.batch_sharpness",
    "directional_ratio": "curvature.directional",
    "critical_learning_rate": "curvature.critical_learning_rate",
    "preflight": "forecast.preflight",
    "estimate_cfl": "cfl.tiers",
    "CFLEstimate": "cfl.estimate",
    "ActivationRegimes": "cfl.regimes",
    "InstabilityDetector": "verdicts.detector",
    "Verdict": "verdicts.detector",
    "Alert": "alerts.alert",
    "JSONLinesSink": "alerts.sinks",
    "WebhookSink": "alerts.sinks",
}

__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
