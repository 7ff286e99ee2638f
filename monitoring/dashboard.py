"""The Grafana dashboard, as code: `python -m monitoring.dashboard` writes the file that Grafana is given.

Built by Grafana's own library, which knows the schema of what it makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode

FILE = Path(__file__).parent / "grafana" / "dashboards" / "virnucpro.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="virnucpro")
"""As grafana/provisioning/datasources/prometheus.yml names it."""

GREEN, ORANGE, RED = "green", "orange", "red"
FAILED = 'virnucpro_sequences_total{outcome!="embedded"}'

Query = tuple[str, str]
"""An expression, and how its series are called: `{{label}}` stands for a label's value."""


def number(title: str, query: str, unit: str, *steps: tuple[float, str], first: str = GREEN) -> stat.Panel:
    """The present value, coloured by the step that it has reached."""
    thresholds = [Threshold(None, first), *(Threshold(value, colour) for value, colour in steps)]
    return (
        stat.Panel()
        .title(title)
        .datasource(SOURCE)
        .unit(unit)
        .height(4)
        .span(4)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(thresholds))
        .with_target(prometheus.Dataquery().expr(query).instant().ref_id("A").datasource(SOURCE))
    )


def lines(
    title: str, unit: str, queries: Sequence[Query], text: str, *, stacked: bool = False
) -> timeseries.Panel:
    """A graph over time."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .height(8)
        .span(8)
        .draw_style(GraphDrawStyle.LINE)
        .fill_opacity(40 if stacked else 5)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)  # noqa: FBT003 - the library's signature
        )
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for ref_id, (query, legend) in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(
            prometheus.Dataquery().expr(query).legend_format(legend).range().ref_id(ref_id).datasource(SOURCE)
        )
    return panel


def overview() -> list[stat.Panel]:
    share = f"sum(increase({FAILED}[24h])) / (sum(increase(virnucpro_sequences_total[24h])) > 0) or vector(0)"
    return [
        number("Running jobs", 'virnucpro_jobs{state="running"}', units.Short),
        number("Chunks that wait", 'sum(virnucpro_chunks{state="pending"})', units.Short),
        number("Oldest that waits", "max(virnucpro_oldest_pending_seconds)", units.Seconds, (43_200, ORANGE)),
        number(
            "Live workers", "count(virnucpro_worker_info) or vector(0)", units.Short, (1, GREEN), first=RED
        ),
        number("Failed in 24 h", share, units.PercentUnit, (0.01, ORANGE), (0.05, RED)),
        number("Space left", "min(virnucpro_disk_free_bytes)", units.BytesIEC),
    ]


def queues() -> list[timeseries.Panel]:
    return [
        lines(
            "Chunks",
            units.Short,
            [('virnucpro_chunks{state!="done"}', "{{queue}} {{state}}")],
            "Of running jobs, in the stage that each job is in; and those that jobs failed of.",
            stacked=True,
        ),
        lines(
            "Age of the queues",
            units.Seconds,
            [
                ("virnucpro_oldest_pending_seconds", "{{queue}}"),
                ("virnucpro_merge_lag_seconds", "in {{stage}}"),
            ],
            "How long the oldest chunk has waited, and the oldest job been in a stage after extraction.",
        ),
        lines(
            "Messages",
            units.Short,
            [
                ("virnucpro_outbox_sent", "{{queue}} in the broker"),
                ("virnucpro_outbox_unsent", "{{queue}} unsent"),
            ],
            "A few are in the broker, the rest wait in the ledger. None in the broker: look at the relay.",
        ),
    ]


def work() -> list[timeseries.Panel]:
    quantile = "histogram_quantile({}, sum by (stage, le) (rate(virnucpro_chunk_seconds_bucket[15m])))"
    return [
        lines(
            "Sequences",
            units.RecordsPerSecond,
            [("rate(virnucpro_sequences_total[5m])", "{{outcome}}")],
            "Embedded, or failed for a reason, in each second.",
        ),
        lines(
            "Share of failures",
            units.PercentUnit,
            [
                (
                    f"sum(increase({FAILED}[1h])) / (sum(increase(virnucpro_sequences_total[1h])) > 0)",
                    "of the last hour",
                )
            ],
            "Sequences that failed, of all that were done.",
        ),
        lines(
            "Tokens per second",
            units.Short,
            [
                ("virnucpro_tokens_per_second", "{{node}}"),
                ("rate(virnucpro_tokens_total[5m])", "all, by the clock"),
            ],
            "Of each worker in its last chunk, and of all together, pauses included.",
        ),
        lines(
            "Residues",
            units.Short,
            [("increase(virnucpro_residues_total[1h])", "in the last hour")],
            "Residues that were extracted.",
        ),
        lines(
            "Seconds of a chunk",
            units.Seconds,
            [(quantile.format(0.5), "{{stage}}, half"), (quantile.format(0.95), "{{stage}}, 95 %")],
            "Half of the chunks, and 95 % of them, took at most so long.",
        ),
        lines(
            "Padding efficiency",
            units.PercentUnit,
            [
                ("rate(virnucpro_tokens_total[15m]) / (rate(virnucpro_positions_total[15m]) > 0)", "lately"),
                ("virnucpro_padding_efficiency", "in all"),
            ],
            "Tokens of sequences as a share of all that models took in.",
        ),
    ]


def workers() -> list[timeseries.Panel]:
    return [
        lines(
            "GPU utilisation",
            units.PercentUnit,
            [("virnucpro_gpu_utilization_ratio", "{{node}}")],
            "Share of time in which the GPU computed.",
        ),
        lines(
            "GPU memory",
            units.BytesIEC,
            [
                ("virnucpro_gpu_mem_used_bytes", "{{node}} in use"),
                ("virnucpro_gpu_mem_peak_bytes", "{{node}} peak"),
                ("virnucpro_gpu_mem_total_bytes", "{{node}} in all"),
            ],
            "In use by anybody, the most that our worker has had, and what there is.",
        ),
        lines(
            "Age of heartbeat and progress",
            units.Seconds,
            [
                ("virnucpro_worker_heartbeat_age_seconds", "{{node}} heartbeat"),
                ("virnucpro_worker_progress_age_seconds", "{{node}} progress"),
            ],
            "A worker without a heartbeat loses its chunk, and so does one without progress.",
        ),
        lines(
            "Chunks in hand",
            units.Seconds,
            [("virnucpro_lease_seconds", "{{node}}")],
            "How long each worker has held its chunk.",
        ),
    ]


def faults() -> list[timeseries.Panel]:
    return [
        lines(
            "Dealt with",
            units.Short,
            [
                ("increase(virnucpro_setbacks_total[1h])", "chunk {{kind}}"),
                ("increase(virnucpro_lease_expired_total[1h])", "worker {{reason}}"),
                ("increase(virnucpro_duplicate_commit_rejected_total[1h])", "duplicate result"),
                ("increase(virnucpro_messages_rejected_total[1h])", "message refused: {{reason}}"),
            ],
            "Faults of the last hour that cost a repetition and nothing else.",
        ),
        lines(
            "Not dealt with",
            units.Short,
            [
                ("virnucpro_leases_overdue", "leases that nobody takes back"),
                ('virnucpro_jobs{state="failed"}', "failed jobs"),
                ("1 - virnucpro_ledger_up", "ledger away"),
            ],
            "What a person should look at.",
        ),
        lines(
            "Space for results",
            units.BytesIEC,
            [("virnucpro_disk_free_bytes", "left"), ("virnucpro_disk_size_bytes", "in all")],
            "Of the file system of the output folder.",
        ),
        lines(
            "Alerts",
            units.Short,
            [('sum by (alertname) (ALERTS{alertname=~"Virnucpro.*", alertstate="firing"})', "{{alertname}}")],
            "Those of prometheus/rules.yml that fire.",
            stacked=True,
        ),
    ]


def build() -> str:
    """The dashboard as the JSON that Grafana reads."""
    board = (
        dashboard.Dashboard("VirNucPro")
        .uid("virnucpro")
        .description("Queues, work, workers and GPUs of the VirNucPro pipeline, as its ledger has them.")
        .tags(["virnucpro"])
        .readonly()
        .refresh("30s")
        .time("now-12h", "now")
        .timezone("browser")
    )
    for panel in overview():
        board = board.with_panel(panel)
    for title, panels in (
        ("Queues", queues()),
        ("Work", work()),
        ("Workers and GPUs", workers()),
        ("Faults", faults()),
    ):
        board = board.with_row(dashboard.Row(title))
        for graph in panels:
            board = board.with_panel(graph)
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(build(), encoding="utf-8")
