"""The deployment for real: images, containers, a job through the DAG while each container is restarted once."""

from __future__ import annotations

import random
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.compose.deployment import IMAGE, ONE_SHOTS, Deployment
from tests.compose.engine import Engine, find_compose, running_engine
from tests.compose.images import build_variables, can_pull, default_image, make_servers
from virnucpro_core.features.manifests import read_manifest
from virnucpro_core.stack.airflow import ask
from virnucpro_core.stack.demo import trigger

pytestmark = [pytest.mark.system, pytest.mark.timeout(5400)]

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RECORDS = 1000
BAD = {100: ">empty\n", 500: ">digits\nMKV1AG\n", 900: ">\nMKVAG\n"}  # a record each that must fail
RUNS = "/dags/virnucpro_ingest/dagRuns?run_type=manual"  # the night's may begin beside them
WEIGHTS = """
from virnucpro_core.embedding.demonstration import write_demo_weights
write_demo_weights("/data/models/demo", layers=1)
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def deployment(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The whole of docker-compose.yml with the CPU profile: built, up and healthy, with demonstration weights."""
    compose = find_compose(engine)
    stand_ins = make_servers(engine)
    absent = set() if can_pull(engine, default_image("GRAFANA_IMAGE")) else {"grafana"}
    folder = tmp_path_factory.mktemp("compose") / "virnucpro"
    with build_variables(engine) as variables:
        deployment = Deployment.prepare(
            engine,
            compose,
            folder,
            absent,
            VIRNUCPRO_DTYPE="float32",
            VIRNUCPRO_CHUNK_TOKENS="5000",
            OMP_NUM_THREADS="1",
            **stand_ins,
            **variables,
        )
        deployment.run("build")
    write_fasta(folder / "data" / "input" / "many.fasta")
    try:
        deployment.up()
        deployment.wait_healthy()
        deployment.command("python", "-c", WEIGHTS)
        deployment.command("virnucpro", "weights", "add", "demo", "/data/models/demo")
        yield deployment
    finally:
        deployment.down()


def make_records(number: int, seed: int) -> list[str]:
    """Proteins of 200 to 400 residues."""
    draw = random.Random(seed)
    return [
        f">protein_{k}\n{''.join(draw.choices(RESIDUES, k=draw.randint(200, 400)))}\n" for k in range(number)
    ]


def write_fasta(path: Path) -> None:
    """A thousand proteins, three of them bad: minutes of work for one core."""
    records = make_records(RECORDS, seed=7)
    for number, record in BAD.items():
        records[number] = record
    path.write_text("".join(records))


def wait_for_run(deployment: Deployment, run: str, watched: str) -> str:
    """How a run of the DAG ended; the log of a service tells why it did not."""
    path = f"/dags/virnucpro_ingest/dagRuns/{run}"
    with deployment.airflow() as airflow:

        def state() -> str:
            return str(ask(airflow, "GET", path)["state"])

        deployment.wait_until(lambda: state() in ("success", "failed"), "ended", [watched])
        return state()


def test_job_survives_the_restart_of_every_container(deployment: Deployment) -> None:
    with deployment.airflow() as airflow:
        run = trigger(airflow, Path("/data/input/many.fasta"))
    deployment.wait_until(
        lambda: deployment.query("SELECT 1 FROM chunks WHERE state = 'done'") != [],
        "at work",
        ["scheduler", "worker-cpu"],
    )
    for service in deployment.services():
        state = deployment.query("SELECT state, chunks_left FROM jobs")
        assert state[0][0] == "running", f"the job ended before {service} was restarted: give it more records"
        if service in ONE_SHOTS:
            deployment.run("up", "-d", "--no-deps", service)
            # Its server is restarted, too: one that is still at work would be right to fail.
            deployment.wait_until(
                lambda one=service: deployment.inspect(one)["State"]["Status"] == "exited", "over", [service]
            )
        else:
            deployment.engine.run("docker", "restart", "--time", "60", deployment.container(service))
        if service == "postgres":
            deployment.wait_healthy([service])
    deployment.wait_until(
        lambda: deployment.query("SELECT state FROM jobs") != [["running"]], "done", deployment.services()
    )
    assert deployment.query("SELECT state, error FROM jobs") == [["succeeded", ""]]
    deployment.wait_healthy()
    assert wait_for_run(deployment, run, "scheduler") == "success"

    (file,) = deployment.folder.glob("data/output/results/many-*/many_ESM.pt")
    counts = read_manifest(file.with_name("many.manifest.json")).counts
    assert counts.records == RECORDS == counts.embeddings + sum(counts.failures.values())
    assert counts.failures == {"empty": 1, "invalid_residue": 1, "no_id": 1}
    inside = f"/{file.relative_to(deployment.folder)}"
    (verdict,) = deployment.ask("validate", inside)
    assert (verdict["passed"], verdict["rows"]) == (True, counts.embeddings)
    assert deployment.ask("verify", "1")["passed"]
    committed = deployment.query(
        "SELECT count(*), count(DISTINCT ordinal) FROM artifacts WHERE stage = 'extract'"
    )
    assert committed[0][0] == committed[0][1]


def test_one_shots_ended_well_and_all_others_are_healthy(deployment: Deployment) -> None:
    for service in deployment.services():
        if service in ONE_SHOTS:
            assert deployment.inspect(service)["State"]["ExitCode"] == 0
        else:
            assert deployment.health(service) == "healthy"


def test_no_container_of_ours_runs_as_root_or_shows_a_secret(deployment: Deployment) -> None:
    """Neither in what the engine says of it, nor in its processes' arguments, nor in its log."""
    files = list((deployment.folder / "secrets").iterdir())
    tokens = {token for file in files for token in re.findall(r"[\w-]{40,}", file.read_text())}
    assert len(tokens) == 12  # six of roles and the broker, three keys, three logins
    for service in deployment.services():
        found = deployment.inspect(service)
        assert found["Config"]["User"].split(":")[0] not in ("", "0", "root"), service
        shown = [str(found), deployment.engine.run("docker", "logs", deployment.container(service)).stdout]
        if service not in ONE_SHOTS:
            shown.append(deployment.engine.run("docker", "top", deployment.container(service)).stdout)
        assert not [place for place, text in enumerate(shown) if any(token in text for token in tokens)], (
            service
        )
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_pages_want_the_generated_logins(deployment: Deployment) -> None:
    airflow, flower = deployment.url("AIRFLOW_PORT"), deployment.url("FLOWER_PORT")
    assert httpx.get(f"{airflow}/api/v2/dags").status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(f"{flower}/workers").status_code == httpx.codes.UNAUTHORIZED
    password = deployment.secret("flower.conf").split("admin:")[1].split("'")[0]
    assert httpx.get(f"{flower}/workers", auth=("admin", password)).status_code == httpx.codes.OK


def test_grafana_wants_the_generated_login(deployment: Deployment) -> None:
    if "grafana" in deployment.absent:
        pytest.skip("no registry gives Grafana's image: it was not started")
    page, login = (
        f"{deployment.url('GRAFANA_PORT')}/api/org",
        ("admin", deployment.secret("grafana_password")),
    )
    assert httpx.get(page).status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(page, auth=login).status_code == httpx.codes.OK


def test_prometheus_scrapes_the_ledger_s_metrics(deployment: Deployment) -> None:
    prometheus = deployment.url("PROMETHEUS_PORT")

    def jobs() -> list[Any]:
        query = {"query": 'virnucpro_jobs{state="succeeded"}'}
        found: list[Any] = httpx.get(f"{prometheus}/api/v1/query", params=query).json()["data"]["result"]
        return found

    deployment.wait_until(lambda: bool(jobs()), "scraped by Prometheus", ["metrics", "prometheus"])
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    assert rules


def test_checks_of_health_look_at_the_work(deployment: Deployment) -> None:
    """Flower answers without the broker, and the metrics without the ledger: that is not health."""
    assert deployment.checks_well("flower")
    assert deployment.checks_well("metrics")
    deployment.run("stop", "broker", "postgres")
    assert not deployment.checks_well("flower")
    assert not deployment.checks_well("metrics")
    deployment.run("start", "postgres", "broker")
    deployment.wait_healthy()
    assert deployment.checks_well("flower")
    assert deployment.checks_well("metrics")


def test_each_role_of_the_ledger_has_its_own_rights(deployment: Deployment) -> None:
    granted = deployment.query("""
        SELECT has_table_privilege('virnucpro_dag', 'jobs', 'INSERT'),
               has_table_privilege('virnucpro_dag', 'artifacts', 'INSERT'),
               has_table_privilege('virnucpro_worker', 'artifacts', 'INSERT'),
               has_table_privilege('virnucpro_worker', 'submissions', 'INSERT'),
               has_database_privilege('airflow', 'virnucpro', 'CONNECT')
    """)
    assert granted == [["t", "f", "t", "f", "f"]]


def test_selftest_passes_in_the_workers_container(deployment: Deployment) -> None:
    said = deployment.run(
        *(
            "run",
            "--rm",
            "-T",
            "--no-deps",
            "worker-cpu",
            "virnucpro",
            "selftest",
            "--model",
            "/data/models/demo",
        )
    )
    assert said.count("[PASS]") == 11
    assert "[FAIL]" not in said


def test_drained_worker_loses_nothing(deployment: Deployment) -> None:
    """It finishes or hands back what it has in hand, retires, and ends with 0; no attempt is counted."""
    (deployment.folder / "data" / "input" / "some.fasta").write_text("".join(make_records(150, seed=8)))
    (submitted,) = deployment.ask("submit", "/data/input/some.fasta", "--model", "demo")
    job = submitted["job"]
    running = f"SELECT 1 FROM chunks WHERE job_id = {job} AND state = 'running'"
    deployment.wait_until(lambda: deployment.query(running) != [], "at work", ["worker-cpu"])
    deployment.run("stop", "worker-cpu")
    assert deployment.inspect("worker-cpu")["State"]["ExitCode"] == 0
    assert deployment.query("SELECT node FROM workers WHERE state = 'live' AND queue = 'extract'") == []
    assert deployment.query(running) == []
    deployment.run("start", "worker-cpu")
    deployment.wait_until(
        lambda: deployment.query(f"SELECT state FROM jobs WHERE id = {job}") == [["succeeded"]],
        "done",
        ["worker-cpu"],
    )
    assert deployment.query(f"SELECT DISTINCT attempts, deaths FROM chunks WHERE job_id = {job}") == [
        ["1", "0"]
    ]


def test_upkeep_takes_nothing_that_is_young(deployment: Deployment) -> None:
    with deployment.airflow() as airflow:
        runs = ask(airflow, "GET", RUNS)["total_entries"]
        assert runs
        deployment.follow("Keep it running")
        assert ask(airflow, "GET", RUNS)["total_entries"] == runs


def test_all_is_restored_on_a_new_machine(deployment: Deployment) -> None:
    """Nothing is there but the project, its image and the backup."""
    what = [
        "SELECT id, state, error FROM jobs ORDER BY id",
        "SELECT stage, ordinal, path, sha256 FROM artifacts ORDER BY id",
    ]
    before = [deployment.query(sql) for sql in what]
    assert all(before)
    with deployment.airflow() as airflow:
        ask(airflow, "POST", "/variables", key="hidden", value="by the Fernet key")
        runs = ask(airflow, "GET", RUNS)["dag_runs"]
        assert runs
    deployment.follow("Back up")
    deployment.down()
    for name in ("data", "secrets"):
        shutil.rmtree(deployment.folder / name)
    (deployment.folder / ".env").unlink()

    deployment.follow("Restore")
    deployment.wait_healthy()
    assert [deployment.query(sql) for sql in what] == before
    assert deployment.ask("verify", "1")["passed"]
    with deployment.airflow() as airflow:
        assert ask(airflow, "GET", "/variables/hidden")["value"] == "by the Fernet key"
        restored = ask(airflow, "GET", RUNS)["dag_runs"]
        assert {run["dag_run_id"]: run["state"] for run in restored} == {
            run["dag_run_id"]: run["state"] for run in runs
        }


def test_secrets_are_rotated_while_a_run_waits(deployment: Deployment) -> None:
    (deployment.folder / "data" / "input" / "last.fasta").write_text("".join(make_records(20, seed=9)))
    deployment.run("stop", "worker-cpu")
    with deployment.airflow() as airflow:
        run = trigger(airflow, Path("/data/input/last.fasta"))
    deferred = f"SELECT 1 FROM task_instance WHERE state = 'deferred' AND run_id = '{run}'"
    deployment.wait_until(
        lambda: deployment.query(deferred, "airflow") != [], "waiting", ["scheduler", "triggerer"]
    )
    old = {name: deployment.secret(name) for name in ("airflow_fernet_key", "worker_password")}
    deployment.follow("Rotate secrets")
    assert old["worker_password"] not in deployment.secret("worker_database_url")
    assert old["airflow_fernet_key"] == deployment.secret("airflow_fernet_key")
    deployment.run("start", "worker-cpu")
    deployment.wait_healthy()
    assert wait_for_run(deployment, run, "triggerer") == "success"


def test_what_airflow_hides_is_hidden_by_a_new_key(deployment: Deployment) -> None:
    old = deployment.secret("airflow_fernet_key")
    deployment.follow("Rotate the Fernet key")
    assert old not in deployment.secret("airflow_fernet_key")
    deployment.run("restart", "api-server")  # which has seen both
    deployment.wait_healthy()
    with deployment.airflow() as airflow:
        assert ask(airflow, "GET", "/variables/hidden")["value"] == "by the Fernet key"


def test_it_is_taken_down_without_a_trace(deployment: Deployment) -> None:
    deployment.down()
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        listed = deployment.engine.run(
            "docker", *kind, "--quiet", "--filter", f"label=com.docker.compose.project={deployment.project}"
        )
        assert listed.stdout == ""


def test_image_holds_no_secret_and_no_test(deployment: Deployment) -> None:
    listed = deployment.engine.run(
        "docker", "run", "--rm", IMAGE, "find", "/app", "-maxdepth", "1"
    ).stdout.split()
    packages = {"virnucpro_core", "workers", "dags", "migrations"}
    built = {"build", "virnucpro_pipeline.egg-info"}  # by pip
    files = {"README.md", "pyproject.toml", "constraints.txt"}
    assert {Path(name).name for name in listed} - built == {"app"} | packages | files
