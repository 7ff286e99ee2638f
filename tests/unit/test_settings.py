"""Settings: what the environment says, and where secrets and inputs may lie."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from pydantic import SecretStr

from virnucpro_core.errors import SettingsError
from virnucpro_core.settings import Settings, load_settings

pytestmark = pytest.mark.unit

SECRETS = sorted(
    name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
)


def test_every_url_is_a_secret() -> None:
    assert {name for name in Settings.model_fields if name.endswith("_url")} == set(SECRETS)
    assert len(SECRETS) == 6


@pytest.mark.parametrize("name", SECRETS)
def test_each_secret_may_come_from_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("postgresql://me:hidden@host/base\n")
    monkeypatch.setenv(f"VIRNUCPRO_{name.upper()}_FILE", str(tmp_path / "secret"))
    settings = Settings()
    assert getattr(settings, name) == SecretStr("postgresql://me:hidden@host/base")
    assert "hidden" not in f"{settings!r}{settings}{settings.model_dump()}{settings.model_dump_json()}"


@pytest.mark.parametrize("name", SECRETS)
def test_a_secrets_file_that_cannot_be_read_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"VIRNUCPRO_{name.upper()}_FILE", str(tmp_path / "missing"))
    with pytest.raises(SettingsError, match="could not be read") as caught:
        Settings()
    assert caught.value.where == str(tmp_path / "missing")


def test_a_secrets_file_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(b"\xff\xfep\x00")
    monkeypatch.setenv("VIRNUCPRO_BROKER_URL_FILE", str(tmp_path / "secret"))
    with pytest.raises(SettingsError, match="broker_url could not be read: it is no text"):
        Settings()


@pytest.mark.parametrize(
    "url", ["mysql://me:hidden@host/base", "host=db password=hidden", "postgresql:/me:hidden@host"]
)
def test_a_secret_in_a_wrong_setting_is_not_told(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRNUCPRO_DATABASE_URL", url)
    with pytest.raises(SettingsError) as caught:
        Settings().database_url_for("dag")
    assert "hidden" not in str(caught.value)


def test_inputs_are_read_from_the_current_folder_and_home_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Settings().input_roots == (tmp_path, Path("/home/somebody"))


def test_a_user_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def know_nobody(_: int) -> pwd.struct_passwd:
        raise KeyError

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", know_nobody)
    assert Settings().input_roots == (tmp_path,)


def test_the_root_of_all_folders_counts_only_if_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/")
    assert Settings().input_roots == ()
    monkeypatch.setenv("VIRNUCPRO_INPUT_ROOTS", "/")
    assert Settings().input_roots == (Path("/"),)


def test_roots_are_joined_as_paths_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRNUCPRO_INPUT_ROOTS", os.pathsep.join(["/data", "", "relative"]))
    monkeypatch.setenv("VIRNUCPRO_INBOX", "/inbox")
    monkeypatch.setenv("VIRNUCPRO_OUTPUT_ROOT", "/output")
    assert Settings().input_folders == (
        Path("/data"),
        Path("relative"),
        Path("/inbox"),
        Path("/output/spool"),
    )


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRNUCPRO_MAX_EXPANSION", "0")
    load_settings.cache_clear()
    with pytest.raises(SettingsError, match="VIRNUCPRO_MAX_EXPANSION"):
        load_settings()
    load_settings.cache_clear()


@pytest.mark.parametrize(
    "name", ["LATE_HOURS", "KEEP_CHUNKS_DAYS", "LEASE_SECONDS", "STUCK_SECONDS", "REPUBLISH_SECONDS"]
)
def test_a_time_without_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay would fail of it, or the DAG, long after it was set."""
    monkeypatch.setenv(f"VIRNUCPRO_{name}", "inf")
    load_settings.cache_clear()
    with pytest.raises(SettingsError, match=f"VIRNUCPRO_{name}: .*less than or equal"):
        load_settings()
    load_settings.cache_clear()


@pytest.mark.parametrize(("lease", "heartbeat"), [("2", None), ("60", "60")])
def test_a_lease_that_no_heartbeat_keeps_alive_is_refused(
    lease: str, heartbeat: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRNUCPRO_LEASE_SECONDS", lease)
    if heartbeat is not None:
        monkeypatch.setenv("VIRNUCPRO_HEARTBEAT_SECONDS", heartbeat)
    load_settings.cache_clear()
    with pytest.raises(SettingsError, match=r"would lose each chunk") as caught:
        load_settings()
    assert "VIRNUCPRO_HEARTBEAT_SECONDS" in caught.value.where
