"""The configuration: one YAML file -> validated models; every error names file, line, key, value, what was expected.

The models are the truth: the samples in `configs/` are tested against them, and `json_schema()` gives editors
the same rules. Durations carry their unit ("10 ms"), so that none is ever guessed.
"""

from .groups import GroupConfig, TagConfig
from .monitors import CycleConfig, FeedbackConfig, MonitorConfig, OutputsConfig, monitor_of
from .servers import ServerConfig
from .telemetry import LogConfig, MetricsConfig
from .units import duration_ns, with_unit
from .whole import Config, StoreConfig, json_schema, load, parse

__all__ = [
    "Config", "CycleConfig", "FeedbackConfig", "GroupConfig", "LogConfig", "MetricsConfig", "MonitorConfig",
    "OutputsConfig", "ServerConfig", "StoreConfig", "TagConfig", "duration_ns", "json_schema", "load", "monitor_of",
    "parse", "with_unit",
]
