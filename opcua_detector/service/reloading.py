"""Takes in what `fit` has written while the service runs; whatever is wrong with it, the last good model stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from ..app import model_path, open_monitor, record_model, registry_of
from ..config import Config
from ..config import load as load_config
from ..errors import DetectorError
from ..feedback.live import LiveFeedback
from ..model import load as load_model
from ..store import AuditEntry, Store
from .delivery import MonitorRun
from .startup import config_hash

log = logging.getLogger(__name__)


class Reloading:
    """Reloads of one service, one at a time.

    Parameters
    ----------
    runs : the monitors in operation, filled when the service starts
    counters : `models_refused` and `configs_refused` are counted here
    """

    def __init__(self, config: Config, config_file: Path, runs: Mapping[str, MonitorRun],
                 counters: dict[str, int]) -> None:
        self._config, self._config_file, self._runs, self._counters = config, config_file, runs, counters
        self._hash = config_hash(config_file)
        self._one_at_a_time = asyncio.Lock()

    async def all(self, feedback: LiveFeedback, store: Store) -> dict[str, str]:
        """Take the model files as they are now; return monitor -> what became of it.

        A file that cannot be read, or whose model does not fit the configuration, changes nothing: the model in force
        stays, the error is logged and counted, and the Quality node tells of it until a reload finds a good file.

        The configuration itself is not taken in: that needs a new start. Where it was changed it is checked, and what
        was found stands under the name of the file.
        """
        async with self._one_at_a_time:
            told = await asyncio.to_thread(self._look_at_config)
            for name, run in self._runs.items():
                try:
                    told[name] = await self._one(run, feedback, store)
                    run.refused = ""
                except Exception as error:  # a file from elsewhere: whatever it does, the model in force goes on
                    self._counters["models_refused"] += 1
                    what = error.what if isinstance(error, DetectorError) else repr(error)
                    log.error("monitor %s: the model is not taken, the one before stays in force: %s", name,
                              error if isinstance(error, DetectorError) else what)
                    run.refused = f"the new model file is not taken: {what}"
                    told[name] = f"kept {run.monitor.model.model_id}: {what}"
            return told

    async def _one(self, run: MonitorRun, feedback: LiveFeedback, store: Store) -> str:
        path = model_path(self._config_file, run.config)
        model = await asyncio.to_thread(load_model, path)
        open_monitor(run.config, self._config.group(run.config.group), model, registry_of(self._config))
        before, name = run.monitor.model.model_id, run.config.name
        if model.model_id == before:
            return f"unchanged {before}"
        await feedback.replace(run, model)
        record_model(store, model, path)
        store.record_audit(AuditEntry("service", "model reloaded", {
            "monitor": name, "before": before, "model_id": model.model_id}), timeout_s=None)
        log.warning("monitor %s: model %s in place of %s", name, model.model_id, before)
        return f"took {model.model_id}"

    def _look_at_config(self) -> dict[str, str]:
        """Check a configuration that was changed meanwhile: an error is better found now than at the next start."""
        found = config_hash(self._config_file)
        if found == self._hash:
            return {}
        try:
            load_config(self._config_file)
        except DetectorError as error:
            self._counters["configs_refused"] += 1
            log.error("the configuration has an error; the service goes on with the one it started with, and would not "
                      "start again: %s", error)
            return {str(self._config_file): f"kept: {error.what}"}
        log.warning("%s has changed: it takes effect at the next start", self._config_file)
        return {str(self._config_file): "changed: it takes effect at the next start"}
