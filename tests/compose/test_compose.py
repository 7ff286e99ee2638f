"""The deployment for real: images, containers, a job through the DAG while each container is restarted once."""

from __future__ import annotations

import random
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.compose.deployment import ONE_SHOTS, Deployment
from tests.compose.engine import Engine, find_compose, running_engine
from tests.compose.images import PROJECT, can_pull, make_ours, make_servers
from virnucpro_core.features.manifests import read_manifest
from virnucpro_core.stack.airflow import ask
from virnucpro_core.stack.demo import trigger

pytestmark = [pytest.mark.system, pytest.mark.timeout(5400)]

GRAFANA = "grafana/grafana:12.1.0"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
RECORDS = 1000
BAD = {100: ">empty\n", 500: ">digits\nMKV1AG\n", 900: ">\nMKVAG\n"}  # a record each that must fail
WEIGHTS = """
from virnucpro_core.embedding.demonstration import write_demo_weights
write_demo_weights("/data/models/demo", layers=1)
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """The project's image, newly built."""
    return make_ours(engine)


@pytest.fixture(scope="module")
def deployment(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The whole of docker-compose.yml with the CPU profile, up and healthy, with demonstration weights."""
    compose = find_compose(engine)
    stand_ins = make_servers(engine)
    absent = set() if can_pull(engine, GRAFANA) else {"grafana"}
    folder = tmp_path_factory.mktemp("compose")
    deployment = Deployment.prepare(
        engine,
        compose,
        folder,
        absent,
        VIRNUCPRO_IMAGE=image,
        VIRNUCPRO_DTYPE="float32",
        VIRNUCPRO_CHUNK_TOKENS="5000",
        OMP_NUM_THREADS="1",
        **stand_ins,
    )
    write_fasta(folder / "input" / "many.fasta")
    try:
        deployment.up()
        deployment.wait_healthy([name for name in deployment.services() if name not in ONE_SHOTS])
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
        else:
            deployment.engine.run("docker", "restart", "--time", "60", deployment.container(service))
        if service == "postgres":
            deployment.wait_healthy([service])
    deployment.wait_until(
        lambda: deployment.query("SELECT state FROM jobs") != [["running"]], "done", deployment.services()
    )
    assert deployment.query("SELECT state, error FROM jobs") == [["succeeded", ""]]
    lasting = [name for name in deployment.services() if name not in ONE_SHOTS]
    deployment.wait_healthy(lasting)
    with deployment.airflow() as airflow:
        path = f"/dags/virnucpro_ingest/dagRuns/{run}"
        deployment.wait_until(
            lambda: ask(airflow, "GET", path)["state"] in ("success", "failed"), "ended", ["scheduler"]
        )
        assert ask(airflow, "GET", path)["state"] == "success"

    (file,) = deployment.folder.glob("output/results/many-*/many_ESM.pt")
    counts = read_manifest(file.with_name("many.manifest.json")).counts
    assert counts.records == RECORDS == counts.embeddings + sum(counts.failures.values())
    assert counts.failures == {"empty": 1, "invalid_residue": 1, "no_id": 1}
    inside = f"/data/output/{file.relative_to(deployment.folder / 'output')}"
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
    secrets = {file.name: file.read_text() for file in (deployment.folder / "secrets").iterdir()}
    assert len(secrets) > 10
    for service in deployment.services():
        found = deployment.inspect(service)
        assert found["Config"]["User"].split(":")[0] not in ("", "0", "root"), service
        shown = str(found)
        assert not [name for name, text in secrets.items() if text in shown], service
    for file in (deployment.folder / "secrets").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_pages_want_the_generated_logins(deployment: Deployment) -> None:
    airflow, flower = deployment.url("AIRFLOW_PORT"), deployment.url("FLOWER_PORT")
    assert httpx.get(f"{airflow}/api/v2/dags").status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(f"{flower}/workers").status_code == httpx.codes.UNAUTHORIZED
    password = deployment.secret("flower.conf").split("admin:")[1].split("'")[0]
    assert httpx.get(f"{flower}/workers", auth=("admin", password)).status_code == httpx.codes.OK


def test_prometheus_scrapes_the_ledger_s_metrics(deployment: Deployment) -> None:
    prometheus = deployment.url("PROMETHEUS_PORT")

    def jobs() -> list[Any]:
        query = {"query": 'virnucpro_jobs{state="succeeded"}'}
        found: list[Any] = httpx.get(f"{prometheus}/api/v1/query", params=query).json()["data"]["result"]
        return found

    deployment.wait_until(lambda: bool(jobs()), "scraped by Prometheus", ["metrics", "prometheus"])
    rules = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    assert rules


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
    (deployment.folder / "input" / "some.fasta").write_text("".join(make_records(150, seed=8)))
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


def test_ledger_is_restored_from_its_backup(deployment: Deployment) -> None:
    backup = deployment.folder / "virnucpro.dump"
    roles = "/docker-entrypoint-initdb.d/roles.sql"
    in_postgres = [*deployment.compose, "exec", "-T", "postgres"]

    def with_file(direction: str, *command: str) -> None:
        script = f'file=$1; shift; exec "$@" {direction} "$file"'
        deployment.engine.run("sh", "-euc", script, "sh", str(backup), *in_postgres, *command, folder=PROJECT)

    before = deployment.query("SELECT * FROM jobs ORDER BY id")
    with_file(">", "pg_dump", "--username=postgres", "--format=custom", "virnucpro")
    deployment.run("stop")
    deployment.run("up", "-d", "postgres")
    deployment.wait_healthy(["postgres"])
    for command in (
        ["dropdb", "--username=postgres", "--force", "--if-exists", "virnucpro"],
        ["psql", "--username=postgres", "--quiet", f"--file={roles}"],
    ):
        deployment.engine.run(*in_postgres, *command, folder=PROJECT)
    with_file("<", "pg_restore", "--username=postgres", "--dbname=virnucpro", "--exit-on-error")
    deployment.up()
    deployment.wait_healthy([name for name in deployment.services() if name not in ONE_SHOTS])
    assert deployment.query("SELECT * FROM jobs ORDER BY id") == before
    assert deployment.ask("verify", "1")["passed"]


def test_rotated_passwords_replace_the_old_ones(deployment: Deployment) -> None:
    old = deployment.secret("worker_password")
    deployment.engine.run(
        *("python3", str(PROJECT / "deploy" / "make_secrets.py"), "--rotate", "all"), **deployment.variables
    )
    assert deployment.secret("worker_password") != old
    assert old not in deployment.secret("worker_database_url")
    roles = "/docker-entrypoint-initdb.d/roles.sql"
    deployment.run("exec", "-T", "postgres", "psql", "--username=postgres", "--quiet", f"--file={roles}")
    deployment.run("restart", "--timeout", "60")
    deployment.wait_healthy([name for name in deployment.services() if name not in ONE_SHOTS])
    with deployment.airflow() as airflow:
        assert airflow.get("/dags").status_code == httpx.codes.OK


def test_it_is_taken_down_without_a_trace(deployment: Deployment) -> None:
    deployment.down()
    project = deployment.compose[deployment.compose.index("--project-name") + 1]
    for kind in (["ps", "--all"], ["volume", "ls"], ["network", "ls"]):
        listed = deployment.engine.run(
            "docker", *kind, "--quiet", "--filter", f"label=com.docker.compose.project={project}"
        )
        assert listed.stdout == ""


def test_image_holds_no_secret_and_no_test(engine: Engine, image: str) -> None:
    listed = engine.run("docker", "run", "--rm", image, "find", "/app", "-maxdepth", "1").stdout.split()
    packages = {"virnucpro_core", "workers", "dags", "migrations"}
    built = {"build", "virnucpro_pipeline.egg-info"}  # by pip
    files = {"README.md", "pyproject.toml", "constraints.txt"}
    assert {Path(name).name for name in listed} - built == {"app"} | packages | files
