"""Charts: SVG pictures, drawn without a display; equal arguments give equal bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from virnucpro_core.htmlreport.lengths import Lengths
from virnucpro_core.htmlreport.sampling import Floats, Projection, Sample
from virnucpro_core.htmlreport.speed import Speed

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and in the reader's own font
    "svg.hashsalt": "virnucpro",  # else ids are random
    "text.parse_math": False,  # a `$` in a worker's name is a `$`
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
}
BAR, BEYOND = "#2f6f9f", "#c2703d"
WIDTH, HEIGHT = 7.2, 2.6  # inches
DOTS = 130  # per inch, of the parts that are pixels
BIN_RESIDUES = 32
MOST_BINS = 60
LONGEST_NAME = 40  # characters of a worker's name in a legend
PIXELS_FROM = 400
"""Points from which they are drawn as pixels: a picture's size then does not grow with them."""


def draw_lengths(lengths: Lengths) -> bytes:
    """A histogram of all records' lengths; those that were cut are one bar of another colour."""
    limit = lengths.limit
    starts = np.arange(0, limit + 1, BIN_RESIDUES)
    counts = np.add.reduceat(lengths.counts[: limit + 1], starts)
    with drawing() as (figure, axes):
        axes.bar(starts, counts, width=BIN_RESIDUES, align="edge", color=BAR)
        axes.bar(
            [limit + BIN_RESIDUES], lengths.counts[-1:], width=2 * BIN_RESIDUES, align="edge", color=BEYOND
        )
        axes.set_xlabel(f"residues (orange: more than {limit:,}, cut)")
        axes.set_ylabel("records")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        return save(figure)


def draw_speed(speed: Speed) -> bytes:
    """Tokens per second over time, the workers' shares on top of each other."""
    unit, seconds = ("minutes", 60) if speed.seconds > 300 else ("seconds", 1)
    unit, seconds = ("hours", 3600) if speed.seconds > 3 * 3600 else (unit, seconds)
    edges = speed.edges / seconds
    colours = mpl.colormaps["tab10"]
    with drawing(right=0.74) as (figure, axes):
        below: Floats = np.zeros(len(edges) - 1)
        for place, (name, rates) in enumerate(speed.rates.items()):
            axes.stairs(
                below + rates,
                edges,
                baseline=below,
                fill=True,
                color=colours(place % 10),
                label=name.encode("unicode_escape").decode()[:LONGEST_NAME],
            )
            below = below + rates
        axes.set_xlabel(f"{unit} since the first chunk was begun")
        axes.set_ylabel("tokens/s")
        axes.set_ylim(bottom=0)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.75, 0.97), frameon=False, fontsize=7
        )
        return save(figure)


def draw_norms(sample: Sample) -> bytes:
    """A histogram of the sampled rows' norms."""
    low, high = float(sample.norms.min()), float(sample.norms.max())
    margin = max(high - low, 1e-3 * max(high, 1.0)) * 0.02
    with drawing() as (figure, axes):
        bins = min(MOST_BINS, max(10, len(sample.norms) // 20))
        axes.hist(sample.norms, bins=bins, range=(low - margin, high + margin), color=BAR)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("Euclidean norm of an embedding")
        axes.set_ylabel("rows")
        return save(figure)


def draw_projection(projection: Projection, lengths: Lengths | None) -> bytes:
    """The sampled rows on their first two principal components, coloured by the records' lengths if known."""
    with drawing(height=4.6) as (figure, axes):
        points = axes.scatter(
            projection.points[:, 0],
            projection.points[:, 1],
            c=BAR if lengths is None else np.minimum(lengths.sampled, lengths.limit),
            s=float(np.clip(8_000 / len(projection.points), 6, 40)),
            linewidths=0,
            cmap=None if lengths is None else "viridis",
            rasterized=len(projection.points) >= PIXELS_FROM,
        )
        if lengths is not None:
            figure.colorbar(points, ax=axes, label=f"residues (at most {lengths.limit:,})")
        first, second = projection.shares
        axes.set_xlabel(f"first component ({first:.1%} of the variance)")
        axes.set_ylabel(f"second component ({second:.1%})")
        return save(figure)


@contextmanager
def drawing(*, height: float = HEIGHT, right: float = 0.98) -> Iterator[tuple[Figure, Axes]]:
    """A figure and its axes, in our style."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.1, 0.5 / height, right - 0.1, 1 - 0.62 / height))
        yield figure, axes


def save(figure: Figure) -> bytes:
    """The figure as SVG, without the time."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", dpi=DOTS, metadata={"Date": None})
    return file.getvalue()
