"""The page: a report's contents as one HTML file that loads nothing and runs nothing.

All that came from outside (file names, record ids) is escaped by Jinja2. The charts are images of their own, so
nothing in them can run either, and the page's policy forbids scripts and any request.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from virnucpro_core.formats import format_time
from virnucpro_core.htmlreport.charts import draw_lengths, draw_norms, draw_projection, draw_speed
from virnucpro_core.htmlreport.contents import Contents
from virnucpro_core.htmlreport.sampling import SEED

TEMPLATE = "report.html.j2"


def render(contents: Contents) -> str:
    """The report as HTML; equal contents give equal text."""
    environment = Environment(
        loader=PackageLoader("virnucpro_core.htmlreport", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "when": format_time, "flat": flatten}
    return environment.get_template(TEMPLATE).render(
        c=contents,
        job=contents.job,
        charts={name: as_link(picture) for name, picture in draw_charts(contents).items()},
        seed=SEED,
    )


def draw_charts(contents: Contents) -> dict[str, bytes]:
    """The charts that there is something to draw in, by name."""
    charts = {}
    if contents.lengths is not None:
        charts["lengths"] = draw_lengths(contents.lengths)
    if contents.speed is not None:
        charts["speed"] = draw_speed(contents.speed)
    sample = contents.sample
    if sample is not None and len(sample.norms):
        charts["norms"] = draw_norms(sample)
    if sample is not None and sample.projection is not None:
        charts["projection"] = draw_projection(sample.projection, contents.lengths)
    return charts


def as_link(picture: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"


def format_number(value: float | None, digits: int = 0) -> str:
    """`12,345`; a hyphen for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def flatten(value: object, name: str = "") -> list[tuple[str, str]]:
    """JSON as lines of a dotted name and a value."""
    if isinstance(value, Mapping):
        prefix = f"{name}." if name else ""
        return [line for key, inner in value.items() for line in flatten(inner, f"{prefix}{key}")]
    return [(name, str(value))]
