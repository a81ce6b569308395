"""What of a monitor's channels is averaged with what: the views that make up its score.

A channel is one residual of one column. A *term* is the mean over some channels and one trailing window; a *view* is a
weighted sum of the logarithms of its terms; the score is the largest view over its own limit. The leading views rank
(they look at all tags at once); those beside them only alarm: one for each tag, so that a fault of one tag among many
is not averaged away, and one for each tag of every other method.

The rules were chosen on simulated plants and on the design halves of the public data (`detector.md` 8; windows as a
geometric mean instead of a single one: SKAB AUC .871 -> .906, ASD .749 -> .786).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from .api import Channel

Role = Literal["leading", "beside", "fixed", "lamp"]

LINEAR_WINDOWS: Final = (8, 12, 18)  # rows
NONLINEAR_WINDOWS: Final = (10, 100, 1000)
SLOW_WINDOW: Final = 1000  # rows of the second lamp
MOST_OF_RECORD: Final = 4  # no window is longer than this part of the healthy record
LONG_WINDOWS: Final = 2  # the longest so many windows are used one by one for the methods beside
ERROR_KINDS: Final = ("forecast", "relation", "affine")
PREDICTED: Final = "predicted/"  # and the tag: views of one tag's predictors
FIXED_KINDS: Final = ("range", "rate", "stuck")


@dataclass(frozen=True)
class View:
    """One way to look at the channels.

    name : "all", "slow", "<method>/<tag>" or the like
    tag : the tag it looks at, empty for all
    role : "leading" ranks, "beside" only alarms, "fixed" has 1.0 as its limit by itself, "lamp" is only shown
    groups : channels of each mean; windows : indices of windows; each group meets each window
    """

    name: str
    tag: str
    role: Role
    groups: tuple[tuple[int, ...], ...]
    windows: tuple[int, ...]

    @property
    def terms(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """(channels, window index) of each term, in the order of the kernel."""
        return tuple((group, w) for group in self.groups for w in self.windows)


@dataclass(frozen=True)
class Part:
    """The channels of one method: its label in the monitor, whether they are the product's own predictors, whether
    the plant showed itself nonlinear to it (None: it cannot tell)."""

    label: str
    channels: tuple[Channel, ...]
    tags: tuple[str, ...]  # tag of each channel
    predicts: bool
    nonlinear: bool | None = None


def is_nonlinear(parts: Sequence[Part]) -> bool:
    """Whether the plant is to be judged as a nonlinear one (`detector.md` 8, plant gate)."""
    told = [part.nonlinear for part in parts if part.nonlinear is not None]
    return told[0] if told else True


def choose_windows(wanted: Sequence[int], nonlinear: bool, rows: int) -> tuple[int, ...]:
    """Return the averaging windows in rows, ascending: those wanted, or the default, none too long for the record."""
    most = max(3, rows // MOST_OF_RECORD)
    windows = [*wanted] if wanted else [*(NONLINEAR_WINDOWS if nonlinear else LINEAR_WINDOWS)]
    if not wanted and SLOW_WINDOW not in windows:
        windows.append(SLOW_WINDOW)
    return tuple(sorted({w for w in windows if w <= most} or {most}))


def compose(parts: Sequence[Part], windows: Sequence[int], nonlinear: bool, wanted: bool) -> tuple[View, ...]:
    """Return the views.

    Parameters
    ----------
    windows : rows, see `choose_windows`; wanted: they were configured
    """
    every = tuple(range(len(windows)))
    short = tuple(i for i, w in enumerate(windows) if w <= LINEAR_WINDOWS[-1])
    ranks = every if wanted or nonlinear else short or every
    views: list[View] = []
    leading = _predictors(parts, nonlinear)
    if leading:
        views.append(View("all", "", "leading", tuple(leading.values()), ranks))
        if nonlinear and len(ranks) > 1:
            views.append(View("quick", "", "beside", tuple(leading.values()), ranks[:1]))
        views.append(View("slow", "", "lamp", tuple(leading.values()), every[-1:]))
        owner = [tag for part in parts for tag in part.tags]
        if len({owner[c] for group in leading.values() for c in group}) > 1:
            for tag in dict.fromkeys(owner):
                own = tuple(own for group in leading.values() if (own := tuple(c for c in group if owner[c] == tag)))
                if own:
                    views.append(View(f"{PREDICTED}{tag}", tag, "beside", own, ranks))
    views += _others(parts, every[-LONG_WINDOWS:], nonlinear, bool(leading))
    return tuple(views)


def _predictors(parts: Sequence[Part], nonlinear: bool) -> dict[str, tuple[int, ...]]:
    """Return kind -> channels of the groups of the leading view, each averaged over all tags.

    Linear plant: forecasts and relations. Nonlinear: forecasts (together with the affine maps AUC fell by .001 on
    Lorenz and rose by .02 on the throttle with noise), the affine maps where no other method forecasts.
    """
    of_kind: dict[str, list[int]] = {}
    at = 0
    for part in parts:
        for c, channel in enumerate(part.channels, start=at):
            if part.predicts and channel.kind in ERROR_KINDS:
                of_kind.setdefault(channel.kind, []).append(c)
        at += len(part.channels)
    wanted = ("forecast", "relation") if "relation" in of_kind and not nonlinear else ("forecast",)
    return {kind: tuple(of_kind[kind]) for kind in wanted if kind in of_kind} or {
        kind: tuple(found) for kind, found in of_kind.items()}


def _others(parts: Sequence[Part], windows: tuple[int, ...], nonlinear: bool, beside: bool) -> list[View]:
    """Return the views of all that is no predictor of ours: each tag and window by itself."""
    views: list[View] = []
    at = 0
    for part in parts:
        groups: dict[tuple[str, bool], list[int]] = {}
        for c, (channel, tag) in enumerate(zip(part.channels, part.tags, strict=True), start=at):
            if not (part.predicts and channel.kind in ERROR_KINDS):
                groups.setdefault((tag, channel.kind in FIXED_KINDS), []).append(c)
        at += len(part.channels)
        if part.predicts and not nonlinear:
            groups = {key: found for key, found in groups.items() if key[1]}  # transitions explain, they do not alarm
        for (tag, fixed), found in groups.items():
            if fixed:
                views += [View(f"{part.label}/{tag}", tag, "fixed", ((c,),), (0,)) for c in found]
            else:
                views += [View(f"{part.label}/{tag}", tag, "beside" if beside else "leading", (tuple(found),), (w,))
                          for w in windows]
    return views


def method_labels(parts: Sequence[Part], view: View) -> Mapping[str, int]:
    """Return label -> number of channels of it that the view looks at."""
    label = np.repeat([part.label for part in parts], [len(part.channels) for part in parts])
    names = [str(label[c]) for group in view.groups for c in group]
    return {name: names.count(name) for name in dict.fromkeys(names)}
