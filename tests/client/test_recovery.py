"""A plant that goes on while it is not heard: what comes back is a gap, and no alert."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from running import content, until, write

from opcua_detector.api import Record
from opcua_detector.app import fit_config, group_tags
from opcua_detector.client import LinkState, session
from opcua_detector.config import GroupConfig, load
from opcua_detector.nodes import State
from opcua_detector.service import Service
from sim_server.processes import make
from sim_server.testing import running_plant

SEED = 0
CUTS = 20
OUTAGES_S = (0.0, 0.05, 0.4, 1.0)  # of different length, so that the plant has gone on by anything


def healthy(group: GroupConfig) -> Record:
    """Rows of the plant that the server plays."""
    return Record.from_rows(make("lorenz", seed=SEED).simulate(60_000), group_tags(group), group.period)


@pytest.mark.timeout(300)
async def test_twenty_reconnects_to_a_plant_that_goes_on_raise_no_alert_with_the_usual_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FIRST_DELAY_S", 0.05)
    with running_plant("lorenz", history_rows=0, seed=SEED) as plant:
        given = content(plant.endpoint)
        del given["monitors"][0]["methods"], given["monitors"][0]["windows"]
        file = write(tmp_path, given)
        for fitted in await asyncio.to_thread(fit_config, load(file), file, healthy):
            fitted.model.save(fitted.path)
        service = Service(load(file), file)
        await service.start()
        try:
            run, link, feed = service.runs["lorenz"], service.sessions["plant"], service.feeds["lorenz"]
            await until(lambda: run.state == State.NORMAL, "the first score")
            for k in range(CUTS):
                gaps = feed.counters()["gaps"]
                if OUTAGES_S[k % len(OUTAGES_S)]:
                    for name in ("FIRST_DELAY_S", "LAST_DELAY_S"):  # cuts in quick succession would prolong it
                        monkeypatch.setattr(session, name, 2 * OUTAGES_S[k % len(OUTAGES_S)])
                link.fail("cut by the test")
                await until(lambda k=k: link.counters["reconnects"] == k + 1, "the connection to be back")
                target = run.scored + 20
                await until(lambda n=target: run.scored >= n and run.state == State.NORMAL, "scores after a reconnect")
                assert feed.counters()["gaps"] > gaps
            assert run.monitor.verdict.event_no == 0 and not run.alerts
            assert link.state is LinkState.CONNECTED and link.counters["lost"] == CUTS
            assert set(feed.tag_states().values()) == {""} and feed.frame_errors == 0
        finally:
            await service.stop()
