"""Anomaly detection that lives next to the PLC.

Samples OPC UA tags, scores them in one low-latency loop with methods learnt from healthy rows alone, and writes
scores and explanations back as nodes that any HMI shows. The command line is `opcua-detector`; on rows of your own,
without a server: `fit`, `load` and `Detector` (`opcua_detector.detector`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detector import Detector, fit, load

__version__ = "0.1.0"
__all__ = ["Detector", "__version__", "fit", "load"]


def __getattr__(name: str) -> Any:
    """Import the detector when it is first asked for: `import opcua_detector` alone stays light."""
    if name in ("Detector", "fit", "load"):
        from . import detector

        return getattr(detector, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
