"""Prometheus, the real one, on a real run: the dashboard's queries and the rules. Both from Debian's packages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from monitoring import dashboard
from tests import ledger_jobs
from virnucpro_core.gpus import GpuUse
from virnucpro_core.ledger.database import in_transaction
from virnucpro_core.ledger.workers import beat
from virnucpro_core.stack.processes import ServerProcess, choose_port

if TYPE_CHECKING:
    from tests.fixtures_pipeline import Pipeline

pytestmark = [pytest.mark.integration, pytest.mark.system]
pytest_plugins = ["tests.fixtures_pipeline"]

RULES = dashboard.FILE.parents[2] / "prometheus"
MAY_BE_EMPTY = "ALERTS"  # where nothing fires


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt install prometheus)")
    return found


def answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


class Prometheus:
    """A Prometheus with the committed configuration, which asks one address every second."""

    def __init__(self, folder: Path, target: str) -> None:
        self.url = f"http://127.0.0.1:{choose_port()}"
        text = (RULES / "prometheus.yml").read_text()
        assert "metrics:9464" in text
        for old, new in (
            ("metrics:9464", target),
            ("15s", "1s"),
            ("14s", "1s"),
            ("rules.yml", str(RULES / "rules.yml")),
        ):
            text = text.replace(old, new)
        configuration = folder / "prometheus.yml"
        configuration.write_text(text)
        options = [
            f"--config.file={configuration}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self.process = ServerProcess(
            "prometheus", [tool("prometheus"), *options], log=folder / "prometheus.log"
        )

    def ask(self, query: str) -> list[dict[str, object]]:
        """The series that a query finds now."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        found: list[dict[str, object]] = answer["data"]["result"]
        return found


@pytest.fixture
def prometheus(pipeline: Pipeline, tmp_path: Path) -> Iterator[Prometheus]:
    """One that watches the pipeline's ledger by `virnucpro metrics`."""
    port = choose_port()
    argv = [sys.executable, "-m", "virnucpro_core.cli", "metrics", "--port", str(port)]
    watcher = Prometheus(tmp_path, f"127.0.0.1:{port}")
    with ServerProcess("metrics", argv, log=tmp_path / "metrics.log") as metrics, watcher.process:
        metrics.start(lambda: answers(f"http://127.0.0.1:{port}/metrics"))
        watcher.process.start(lambda: answers(f"{watcher.url}/-/ready"))
        yield watcher


def test_every_query_of_the_dashboard_finds_a_real_run(
    pipeline: Pipeline, small_fasta: Path, prometheus: Prometheus
) -> None:
    pipeline.wait_until(lambda: prometheus.ask("virnucpro_ledger_up == 1"))
    # This machine may have no GPU: a worker's heartbeat that tells of one.
    worker = in_transaction(pipeline.ledger, ledger_jobs.start_worker, "gpu0-aaaa1111@test", "other", 600)
    options = {"progress": None, "lease_seconds": 600, "gpu": GpuUse(0.9, 1, 2), "gpu_memory_peak": 1}
    assert in_transaction(pipeline.ledger, beat, worker, **options)
    pipeline.start_relay()
    pipeline.start_workers()
    job = pipeline.wait_for(pipeline.submit(small_fasta).job_id)
    assert job.state == "succeeded"
    done = f"sum(increase(virnucpro_sequences_total[5m])) > 0 and sum(virnucpro_sequences_total) == {job.records}"
    pipeline.wait_until(lambda: prometheus.ask(done))
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    assert len(queries) > 20
    found = {query: prometheus.ask(query) for query in queries}
    assert [query for query in queries if not found[query] and MAY_BE_EMPTY not in query] == []


def test_rules_find_what_a_real_ledger_says(pipeline: Pipeline, prometheus: Prometheus) -> None:
    """Whatever else they wait for, the rules' own expressions find what the ledger says."""
    worker = in_transaction(pipeline.ledger, ledger_jobs.start_worker, "silent@test", "extract", -1)
    registered = in_transaction(pipeline.ledger, ledger_jobs.register, ledger_jobs.scan())
    chunk, *_ = in_transaction(pipeline.ledger, ledger_jobs.pending_chunks, registered.job_id)
    in_transaction(pipeline.ledger, ledger_jobs.claim, chunk, worker)
    fires = 'ALERTS{alertname="VirnucproLeaseNotTakenBack"}'
    pipeline.wait_until(lambda: prometheus.ask(fires))


def test_the_rules_and_the_configuration_are_valid() -> None:
    promtool = tool("promtool")
    for command in (["check", "rules", "rules.yml"], ["check", "config", "prometheus.yml"]):
        subprocess.run([promtool, *command], cwd=RULES, check=True)


def test_each_rule_fires_when_it_should_and_only_then() -> None:
    subprocess.run([tool("promtool"), "test", "rules", "rules_test.yml"], cwd=RULES, check=True)


def test_every_rule_has_a_test() -> None:
    rules, tests = ((RULES / name).read_text() for name in ("rules.yml", "rules_test.yml"))
    alerts = [line.split()[-1] for line in rules.splitlines() if "alert: " in line]
    assert alerts
    assert [alert for alert in alerts if alert not in tests] == []
