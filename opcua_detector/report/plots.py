"""The plots of the report as SVG texts that stand inside the page: no font, no link, no address of another file."""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..api import Float64, UInt8
from ..evaluation import Evaluation, Replay, in_words
from .timeaxis import Stretches
from .transitions import TransitionMap

WIDTH_IN: Final = 10.6
LINE_BINS: Final = 1000  # stretches of a line; the page is about as many pixels wide
HEAT_BINS: Final = 500
LONGEST_NAME: Final = 34
LANE_IN: Final = 0.05  # height of the lane of the ground truth
LEAST_SHARE: Final = 0.05  # a tag that never carried more of a score is no row of the heat map
BARS: Final = 180  # at most so many bars of days
COLOURS: Final[Mapping[str, str]] = {  # Okabe and Ito (2008): told apart by colour-blind people too
    "line": "#1f4e79", "alert": "#e69f00", "truth": "#7a3b8f", "limit": "#c8321e", "slow": "#009e73",
    "silent": "#d9d9d9", "usual": "#dcefe3", "text": "#333333", "grid": "#e6e6e6"}
_RC: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none", "svg.hashsalt": "opcua-detector", "text.parse_math": False, "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5, "axes.titlesize": 7.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.edgecolor": "#999999", "axes.linewidth": 0.6, "axes.labelcolor": "#333333",
    "xtick.color": "#555555", "ytick.color": "#555555", "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "path.simplify": True,
    "path.simplify_threshold": 0.2, "axes.spines.top": False, "axes.spines.right": False,
    "axes.unicode_minus": False}
ID_MARK: Final = "figure-id-"  # stands before each id of an SVG; the page puts its number there


def clean(text: str) -> str:
    """Return a text without what no page may hold: control characters, halves of characters, turns of direction."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cs", "Cf", "Co", "Cn") else c for c in text)


def short(text: str, most: int = LONGEST_NAME) -> str:
    """Return a name cut to what fits beside a plot, its end kept, since that is what tells tags apart."""
    text = clean(text)
    return text if len(text) <= most else f"{text[:most // 2 - 2]}...{text[-(most - most // 2 - 1):]}"


@dataclass(frozen=True)
class Shades:
    """What is shaded behind every plot over time: (x, width) of each span.

    alerts : an alert stands; truth : ground truth says that something is wrong; silent : no verdict
    """

    alerts: Sequence[tuple[float, float]]
    truth: Sequence[tuple[float, float]]
    silent: Sequence[tuple[float, float]]


@contextmanager
def _canvas(height_in: float, width_in: float = WIDTH_IN) -> Iterator[tuple[Any, list[str]]]:
    """Give a figure to draw on; its SVG is in the list afterwards."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    made: list[str] = []
    settings: Any = _RC
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's own font draws the text
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, made
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        made.append(_inline(buffer.getvalue()))


def _inline(svg: str) -> str:
    """Return an SVG file as a part of a page: without prologue and addresses of namespaces, its ids its own."""
    body = svg[svg.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    head, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    # Only marks and clips are referred to; the other ids name layers of the drawing program.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', rest))
    rest = re.sub(r' id="([^"]*)"', lambda m: f' id="{ID_MARK}{m[1]}"' if m[1] in used else "", rest)
    rest = re.sub(r'(url\(#|href="#)', lambda m: m[1] + ID_MARK, rest)
    rest = re.sub(r'(?<= d=")[^"]*', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0]), rest)
    return f'<svg {box[0]} role="img">' + rest.strip()


def _over_time(
    axes: Any, stretches: Stretches, shades: Shades, height_in: float, *, labels: bool, holes: bool = True,
) -> None:
    """Lay out the time axis of a plot of about this height and shade what is shaded."""
    axes.set_xlim(0, stretches.axis.length)
    places, texts = stretches.axis.ticks()
    axes.set_xticks(places, texts if labels else [""] * len(places))
    across = axes.get_xaxis_transform()
    lane = LANE_IN / height_in
    for spans, colour, alpha, low, height in (
            (shades.silent, COLOURS["silent"], 0.6, 0.0, 1.0), (shades.alerts, COLOURS["alert"], 0.45, 0.0, 1.0),
            (shades.truth, COLOURS["truth"], 1.0, 1.0 - lane, lane)):
        if spans:
            axes.broken_barh(spans, (low, height), transform=across, facecolor=colour, alpha=alpha, linewidth=0,
                             zorder=0.6 if height == 1.0 else 3)
    for x, seconds in stretches.axis.holes:
        axes.axvline(x, color="#888888", linewidth=0.8, linestyle=(0, (1, 2)), zorder=0.7)
        if holes:
            axes.annotate(f"hole of {in_words(seconds)}", (x, 0.5), xycoords=across, rotation=90, fontsize=6,
                          color="#666666", ha="right", va="center")


def score_plot(said: Replay, stretches: Stretches, shades: Shades) -> str:
    """Score and slow lamp over time, with the limit."""
    with _canvas(2.5) as (figure, made):
        axes = figure.add_subplot()
        x, y = stretches.line(said.score)
        axes.plot(x, y, color=COLOURS["line"], linewidth=0.8, label="score")
        if not np.isnan(said.slow).all():
            axes.plot(*stretches.line(said.slow), color=COLOURS["slow"], linewidth=0.9, label="slow lamp")
        axes.axhline(1.0, color=COLOURS["limit"], linewidth=1.1, linestyle="--", label="limit")
        top = max(1.3, float(np.nanmax([np.nanmax(said.score, initial=0.0), np.nanmax(said.slow, initial=0.0)])) * 1.1)
        if top > 4:
            axes.set_yscale("symlog", linthresh=1.0, linscale=0.6)
            ticks = [0, 0.5, 1, *[t for t in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if t <= top]]
            axes.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
            axes.minorticks_off()
        axes.set_ylim(0, top)
        axes.set_ylabel("score (1 = limit)")
        _over_time(axes, stretches, shades, 1.9, labels=True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=7.5, borderaxespad=0)
    return made[0]


@dataclass(frozen=True)
class Trend:
    """One tag over time: its name, values float64[n], valid uint8[n], usual range in its unit or None."""

    name: str
    unit: str
    values: Float64
    valid: UInt8
    usual: tuple[float, float] | None


def trend_plot(trends: Sequence[Trend], stretches: Stretches, shades: Shades) -> str:
    """Trends of tags, one above the other."""
    with _canvas(0.35 + 0.82 * len(trends)) as (figure, made):
        every = figure.subplots(len(trends), 1, squeeze=False)[:, 0]
        for i, (axes, trend) in enumerate(zip(every, trends, strict=True)):
            x, y = stretches.line(trend.values, trend.valid)
            if trend.usual is not None:
                axes.axhspan(*trend.usual, color=COLOURS["usual"], linewidth=0, zorder=0.5)
            axes.plot(x, y, color=COLOURS["line"], linewidth=0.7)
            _value_range(axes, y, trend.usual)
            axes.locator_params(axis="y", nbins=3)
            axes.set_title(short(trend.name, 60) + (f"  [{short(trend.unit, 20)}]" if trend.unit else ""), pad=2)
            missing = stretches.spans((trend.valid == 0).astype(np.uint8))
            if missing:
                axes.broken_barh(missing, (0.0, 0.07), transform=axes.get_xaxis_transform(), facecolor="#777777",
                                 linewidth=0, zorder=3)
            _over_time(axes, stretches, shades, 0.55, labels=i == len(trends) - 1, holes=False)
            axes.tick_params(axis="x", length=0 if i < len(trends) - 1 else 3)
    return made[0]


def _value_range(axes: Any, y: Float64, usual: tuple[float, float] | None) -> None:
    """Show all values; one that is far outside of the others must not flatten them, so it may leave the picture."""
    known = y[np.isfinite(y)]
    if usual is not None:
        known = np.append(known, usual)
    if len(known) == 0:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no valid value", transform=axes.transAxes, ha="center", va="center", color="#777777")
        return
    low, high = float(known.min()), float(known.max())
    room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + 1.6 * room)
    if max(abs(low), abs(high)) >= 1e5 or (high - low) < 1e-3:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=True)


def heat(said: Replay, tags: Sequence[str]) -> tuple[list[str], Float64]:
    """Return (tags that ever carried a part of the score worth showing, strength float64[n_tags, n_bins] of 0..1).

    The strength is the share of the score, paler below the limit and none below half of it.
    """
    peak = np.nan_to_num(said.peak)
    fade = np.where(peak >= 0.5, np.minimum(peak, 1.0) ** 2, 0.0)
    strength = (fade[:, None] * said.lead[:, [said.tags.index(name) for name in tags]]).T
    shown = np.flatnonzero(strength.max(axis=1, initial=0.0) >= LEAST_SHARE)
    return [tags[i] for i in shown.tolist()], np.asarray(strength[shown], np.float64)


def heat_plot(tags: Sequence[str], strength: Float64, stretches: Stretches, shades: Shades) -> str:
    """Share of each tag in the score over time; tags and strength as `heat` gives them."""
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("heat", ["#ffffff", "#fdd49e", "#ef6548", "#7f0000"])
    rows_in = 0.16 * len(tags) + 0.1
    with _canvas(max(1.2, 0.6 + rows_in)) as (figure, made):
        axes = figure.add_subplot()
        axes.grid(False)
        edges = stretches.axis.place(stretches.borders)
        image = axes.pcolorfast(edges, np.arange(len(tags) + 1), strength, cmap=colours, vmin=0.0, vmax=1.0)
        for line in range(1, len(tags)):
            axes.axhline(line, color="#eeeeee", linewidth=0.5)
        axes.set_yticks(np.arange(len(tags)) + 0.5, [short(name) for name in tags],
                        fontsize=7 if len(tags) <= 60 else 6)
        axes.tick_params(axis="y", length=0)
        height = max(0.6, rows_in)
        _over_time(axes, stretches, Shades((), shades.truth, ()), height, labels=True)
        axes.set_ylim(len(tags), -1.3 * LANE_IN / height * len(tags) if shades.truth else 0)
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=12, shrink=min(1.0, 1.2 / height), anchor=(0, 1))
        bar.set_ticks([0, 0.5, 1.0], labels=["0 %", "50 %", "100 %"])
        bar.outline.set_visible(False)
    return made[0]


def transition_plot(one: TransitionMap) -> str:
    """From-level x to-level: what is learnt, and what this recording makes of it."""
    from matplotlib.colors import ListedColormap

    levels = len(one.learnt)
    kind = np.zeros((levels, levels), np.int64)
    kind[one.learnt] = 1
    kind[one.learnt & (one.made > 0)] = 2
    kind[~one.learnt & (one.made > 0)] = 3
    with _canvas(3.5, 3.45) as (figure, made):
        axes = figure.add_subplot()
        axes.grid(False)
        axes.imshow(kind, origin="lower", cmap=ListedColormap(["#ffffff", "#d5dde5", COLOURS["line"], "#d55e00"]),
                    vmin=0, vmax=3, interpolation="none", extent=(-0.5, levels - 0.5, -0.5, levels - 0.5))
        picked = np.unique(np.linspace(0, levels - 2, min(levels - 1, 5)).round().astype(int))
        texts = _edge_texts(one.edges[picked])
        axes.set_xticks(picked + 0.5, texts)
        axes.set_yticks(picked + 0.5, texts)
        unit = f" [{short(one.unit, 12)}]" if one.unit else ""
        axes.set_ylabel(f"now{unit}")
        axes.set_xlabel(f"{in_words(one.step_s)} later{unit}")
        axes.set_title(short(one.column, 40))
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
    return made[0]


def _edge_texts(edges: Float64) -> list[str]:
    span = float(edges.max() - edges.min())
    digits = 4 if span <= 0 else max(0, min(6, 1 - int(np.floor(np.log10(span)))))
    edges = np.round(edges, digits) + 0.0  # no minus before a 0
    return [f"{edge:.{digits}f}" if 1e-4 < abs(edge) < 1e6 or edge == 0 else f"{edge:.2e}" for edge in edges]


def spread_plot(score: Float64, truth: UInt8 | None) -> str:
    """How much of the time the score stands at or above each level, of healthy and of faulty rows."""
    known = ~np.isnan(score)
    if truth is None or not truth.any():
        parts = [("all rows", known, COLOURS["line"])]
    else:
        parts = [("rows that are healthy", known & (truth == 0), COLOURS["line"]),
                 ("rows with a known fault", known & (truth != 0), COLOURS["truth"])]
    with _canvas(2.6, 5.2) as (figure, made):
        axes = figure.add_subplot()
        lowest = 1.0
        for label, rows, colour in parts:
            n = int(rows.sum())
            if n:
                share = np.unique(np.concatenate([np.geomspace(1.0 / n, 1.0, 160), np.linspace(1.0 / n, 1.0, 40)]))
                axes.plot(np.quantile(score[rows], np.clip(1.0 - share, 0, 1)), 100 * share, color=colour,
                          linewidth=1.2, label=label)
                lowest = min(lowest, 1.0 / n)
        axes.axvline(1.0, color=COLOURS["limit"], linewidth=1.1, linestyle="--", label="limit")
        axes.set_yscale("log")
        axes.set_ylim(max(100 * lowest, 1e-4), 130)
        ticks = [t for t in (100, 10, 1, 0.1, 0.01, 0.001, 0.0001) if t >= max(100 * lowest, 1e-4)]
        axes.set_yticks(ticks, [f"{t:g} %" for t in ticks])
        axes.minorticks_off()
        top = float(np.nanmax(score[known]))
        if top > 4:
            axes.set_xscale("symlog", linthresh=1.0, linscale=0.8)
            wanted = [0, 0.5, 1, *[t for t in (2, 5, 10, 20, 50, 100, 1000) if t <= top * 1.3]]
            axes.set_xticks(wanted, [f"{t:g}" for t in wanted])
            axes.minorticks_off()
        axes.set_xlim(0, max(1.2, top * 1.05))
        axes.set_xlabel("score")
        axes.set_ylabel("time at or above it")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=7, borderaxespad=0)
    return made[0]


def error_plot(names: Sequence[str], ratio: Float64) -> str:
    """Mean error of each tag on quiet rows, as a multiple of what the fit held out."""
    with _canvas(max(1.6, 0.75 + 0.17 * len(names)), 5.2) as (figure, made):
        axes = figure.add_subplot()
        at = np.arange(len(names))
        shown = np.clip(ratio, 0.1, 100.0)
        colours = [COLOURS["alert"] if r > 2.0 else COLOURS["line"] for r in ratio]
        axes.barh(at, shown - 1.0, left=1.0, height=0.62, color=colours, linewidth=0)
        axes.axvline(1.0, color="#333333", linewidth=0.8)
        axes.axvline(2.0, color=COLOURS["limit"], linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        low, high = min(0.4, float(shown.min()) * 0.8), max(3.0, float(shown.max()) * 1.3)
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlim(low, high)
        axes.set_yticks(at, [short(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("error now / error in the healthy record")
    return made[0]


def day_plot(found: Evaluation) -> str:
    """False alarms (all alerts, where no ground truth is) per day beside the budget; many days as means of several."""
    days = found.days
    width = -(-len(days) // BARS)
    groups = [days[i:i + width] for i in range(0, len(days), width)]
    hours = np.array([sum(d.hours for d in g) for g in groups])
    count = np.array([sum(d.false_alarms for d in g) for g in groups])
    # A day of which only some hours were recorded counts as it is, or one alert in them would tower.
    value: NDArray[np.float64] = np.where(hours >= 12 * width, count * 24 / hours, count / width)
    with _canvas(1.9) as (figure, made):
        axes = figure.add_subplot()
        axes.bar(np.arange(len(groups)), value, width=0.8, linewidth=0,
                 color=[COLOURS["alert"] if v > found.budget_per_day else COLOURS["line"] for v in value])
        axes.axhline(found.budget_per_day, color=COLOURS["limit"], linewidth=1.1, linestyle="--", label="budget")
        picked = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), 9)).round().astype(int))
        axes.set_xticks(picked, [groups[i][0].day for i in picked])
        axes.set_xlim(-0.6, max(len(groups) - 0.4, 13.4))
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, max(1.0, float(value.max()), found.budget_per_day) * 1.15)
        what = "alerts" if found.point is None else "false alarms"
        axes.set_ylabel(f"{what} a day" if width == 1 else f"{what} a day, mean of {width} days")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=7.5, borderaxespad=0)
    return made[0]
