"""The live service: from a configuration to rows, verdicts, outputs and a store, until it is stopped.

    service = Service(config, config_file)      # nothing happens yet
    await service.run(stop)                     # start (any problem raises before the first row), live, stop

    whole      `Service`: start and shutdown order, what a row sets off, and the look at the time
    startup    before the first row: models, store, nodes of the servers, every code path run once
    delivery   `MonitorRun`: what is told of one monitor, and the words for when there is no verdict
    outputs    what is written on which server, by which of several instances, and what a server missed
    alerting   alerts: into the store, explained off the loop, numbered
    outages    a lost connection: one alarm, gaps filled from history
    reloading  model files that `fit` has written meanwhile

Feedback is answered in `feedback.live`, metrics are made in `telemetry`; what a service shares with the commands that
need no server stands in `opcua_detector.app`.
"""

from .delivery import MonitorRun, known
from .outputs import Writing, writing_of
from .startup import check_nodes, retention_of, set_apart_what_stays
from .whole import Service

__all__ = [
    "MonitorRun", "Service", "Writing", "check_nodes", "known", "retention_of", "set_apart_what_stays", "writing_of",
]
