"""Settings: one typed object, read once from the environment (prefix VIRNUCPRO_).

A secret may be given as a file instead: `VIRNUCPRO_DATABASE_URL_FILE=/run/secrets/database_url`.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from virnucpro_core.errors import SettingsError
from virnucpro_core.recipe import Dtype, ResiduePolicy
from virnucpro_core.sizes import CHUNK_TOKENS, EXPORT_ROWS, MAX_EXPANSION

PREFIX = "VIRNUCPRO_"

YEAR = 365 * 24 * 3600
"""In seconds: as good as for ever. PostgreSQL and Airflow refuse what is beyond their own bounds, `inf` above all, and
the relay would die of it with each look."""

DatabaseRole = Literal["owner", "dag", "worker"]


def default_input_roots() -> tuple[Path, ...]:
    """The current folder and the home folder, of which neither counts where it is the root of all folders.

    Raises:
        SettingsError: the current folder was removed, or may not be entered.
    """
    home = os.path.expanduser("~")  # noqa: PTH111 - a container's user may have none: that raises nothing here
    try:
        folders = (Path.cwd(), Path(home))
    except OSError as error:
        raise SettingsError(
            f"there is no current folder: {error.strerror}", where="the shell", todo="Change to another one."
        ) from error
    return tuple(folder for folder in folders if folder.is_absolute() and folder != Path(folder.anchor))


def is_url(text: str) -> bool:
    """Whether a text is a URL, with a port that is a number if it names one."""
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    return bool(parts.scheme) and "://" in text


def is_kept_in_file(setting: str) -> bool:
    """Whether a setting may hold a secret, or what an environment cannot hold."""
    return setting.endswith("_url") or setting == "notifier_options"


class SecretFileSource(PydanticBaseSettingsSource):
    """Reads secret settings from the files that `<NAME>_FILE` variables name."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002 - pydantic's signature
        file_name = os.environ.get(f"{PREFIX}{field_name.upper()}_FILE")
        if not file_name or not is_kept_in_file(field_name):
            return None, field_name, False
        try:
            return Path(file_name).read_text().strip(), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise SettingsError(
                f"the secret {field_name} could not be read: {why}",
                where=file_name,
                todo=f"Correct {PREFIX}{field_name.upper()}_FILE or the file's permissions.",
            ) from error

    def __call__(self) -> dict[str, Any]:
        found = {}
        for name, field in self.settings_cls.model_fields.items():
            value, _, _ = self.get_field_value(field, name)
            if value is not None:
                found[name] = value
        return found


class Settings(BaseSettings):
    """Every setting of the pipeline. Field `x` is the variable `VIRNUCPRO_X`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    database_url: SecretStr | None = Field(
        None, description="PostgreSQL URL of the ledger, for every role without its own."
    )
    owner_database_url: SecretStr | None = Field(
        None, description="URL of the role that owns the schema (migrations)."
    )
    dag_database_url: SecretStr | None = Field(
        None, description="URL of the role that registers and reads (Airflow, submit)."
    )
    worker_database_url: SecretStr | None = Field(
        None, description="URL of the role that claims and commits (workers, relay)."
    )
    airflow_database_url: SecretStr | None = Field(
        None,
        description="postgresql+psycopg:// URL of Airflow's own tables, where `make up` shall not start a server.",
    )
    broker_url: SecretStr | None = Field(
        None, description="Redis or Valkey URL of Celery's broker, with a database of its own."
    )

    inbox: Path = Field(Path("inbox"), description="Folder that the nightly run takes FASTA files from.")
    input_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        default_factory=default_input_roots,
        description="Folders, joined by ':', that inputs are read from, with all below them; the inbox is always "
        "one. Elsewhere nothing is read, wherever `..` and symbolic links lead. Default: the current folder and "
        "the home folder.",
    )
    output_root: Path = Field(Path("output"), description="Folder below which all results are written.")
    model_root: Path = Field(Path("models"), description="Folder below which checkpoints lie, a folder each.")

    model: str | None = Field(None, description="Name of the model that a run uses when it names none.")
    dtype: Dtype = Field("float16", description="Precision of the forward pass; a CPU computes float32 only.")
    residues: ResiduePolicy = Field(
        "unknown", description="`strict` fails a record with a letter outside the vocabulary."
    )
    max_failed_share: float = Field(
        0.05, ge=0, le=1, description="Share of failed records above which a run is reported as failed."
    )
    cancel_unwatched: bool = Field(
        False, description="Cancel a job when the last run that waits for it is killed."
    )

    late_hours: float = Field(
        6.0,
        gt=0,
        le=YEAR // 3600,
        description="Hours after its logical date that a run is late; somebody is told.",
    )
    notifier: str | None = Field(
        None,
        description="Path of the class of Airflow's that tells people of a run that failed or is late, such as "
        "airflow.providers.smtp.notifications.smtp.SmtpNotifier; it needs an `async_notify`.",
    )
    notifier_options: Annotated[dict[str, Any], NoDecode] = Field(
        default_factory=dict,
        description="Its arguments as JSON; texts are templates that may hold {{ run_id }} and {{ what }}. Passwords "
        "belong in the Airflow connection that they name.",
    )

    max_expansion: float = Field(
        MAX_EXPANSION,
        ge=1,
        description="How many times its own size a compressed input may unpack to; the first 64 MiB are free.",
    )
    chunk_tokens: int = Field(
        CHUNK_TOKENS, ge=1, description="Token budget of a chunk: several seconds of a GPU's work."
    )
    export_rows: int = Field(
        EXPORT_ROWS, ge=1, description="Rows in one .pt file; larger results come in numbered shards."
    )
    keep_chunks_days: float = Field(
        7.0, ge=0, le=36_500, description="Days that chunk artifacts are kept after a job succeeded."
    )

    lease_seconds: float = Field(
        15.0, gt=0, le=YEAR, description="A worker silent for longer loses its chunk."
    )
    heartbeat_seconds: float = Field(
        3.0,
        gt=0,
        validate_default=True,
        description="Time between a worker's heartbeats; less than the lease, which several should fit into.",
    )
    stuck_seconds: float = Field(
        600.0, gt=0, le=YEAR, description="A worker whose progress stands still for longer is stuck."
    )
    max_attempts: int = Field(
        4,
        ge=1,
        description="Errors of one chunk before its job fails. A worker that dies is none: what kills is halved.",
    )
    window_per_worker: int = Field(
        2, ge=1, description="Messages kept published for each live worker of a queue."
    )
    republish_seconds: float = Field(
        20.0, gt=0, le=YEAR, description="A published message that nobody claimed for longer is sent again."
    )

    @field_validator("input_roots", mode="before")
    @classmethod
    def split_folders(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @field_validator("heartbeat_seconds")
    @classmethod
    def keep_lease_alive(cls, value: float, others: ValidationInfo) -> float:
        lease = others.data.get("lease_seconds")  # not there if it is wrong itself
        if lease is not None and value >= lease:
            raise ValueError(
                f"workers would lose each chunk: the lease of {lease:g} s ends before {value:g} s"
            )
        return value

    @field_validator("notifier_options", mode="before")
    @classmethod
    def read_json(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic's signature
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, SecretFileSource(settings_cls)

    def database_url_for(self, role: DatabaseRole) -> str:
        """The ledger's URL for one role, with SQLAlchemy's driver named.

        Raises:
            SettingsError: if neither the role's own URL nor `VIRNUCPRO_DATABASE_URL` is set.
        """
        secret: SecretStr | None = getattr(self, f"{role}_database_url") or self.database_url
        if secret is None:
            raise SettingsError(
                "no database is named",
                where=f"{PREFIX}DATABASE_URL",
                todo="Run this in the folder of a running stack (`make up` starts one), or set it to a PostgreSQL URL.",
            )
        scheme, separator, rest = secret.get_secret_value().partition("://")
        if not separator or scheme.split("+")[0] not in ("postgresql", "postgres"):
            # Without "://" all of it may be the password.
            shown = repr(scheme) if separator else "what has no ://"
            raise SettingsError(
                f"the ledger needs a URL of PostgreSQL, not {shown}",
                where=f"{PREFIX}DATABASE_URL",
                todo="Give a URL that begins with postgresql://.",
            )
        return f"postgresql+psycopg://{rest}"

    def require_broker_url(self) -> str:
        """The broker's URL.

        Raises:
            SettingsError: if `VIRNUCPRO_BROKER_URL` is not set, or cannot be read.
        """
        if self.broker_url is None:
            raise SettingsError(
                "no broker is named",
                where=f"{PREFIX}BROKER_URL",
                todo="Run this in the folder of a running stack (`make up` starts one), or set it to a redis:// URL.",
            )
        url = self.broker_url.get_secret_value()
        if not is_url(url):
            raise SettingsError(
                "the broker's URL cannot be read",  # nor is it shown: all of it may be the password
                where=f"{PREFIX}BROKER_URL",
                todo="Give redis://:password@host:port/number, the password percent-encoded.",
            )
        return url

    def require_model(self, name: str | None = None) -> str:
        """The model asked for, or the configured one; never a silent default.

        Raises:
            SettingsError: if no model is named anywhere.
        """
        chosen = name or self.model
        if not chosen:
            raise SettingsError(
                "no model is named",
                where=f"{PREFIX}MODEL",
                todo="Set it, or name a model by --model, or in Airflow's form. `virnucpro weights show` lists those "
                "that are registered, `virnucpro weights add NAME FOLDER` registers one.",
            )
        return chosen

    @property
    def input_folders(self) -> tuple[Path, ...]:
        """All folders that inputs are read from: the roots, the inbox and the spool."""
        return (*self.input_roots, self.inbox, self.spool_root)

    @property
    def spool_root(self) -> Path:
        """Where uncompressed copies of gzip and zstd inputs lie, by sha256."""
        return self.output_root / "spool"


@cache
def load_settings() -> Settings:
    """The process's settings, read once.

    Raises:
        SettingsError: naming each variable that is wrong.
    """
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(
            f"{PREFIX}{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()
        )
        raise SettingsError("settings are wrong", where=faults, todo="Correct these variables.") from error
