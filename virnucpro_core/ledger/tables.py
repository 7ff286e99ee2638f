"""The ledger's tables. Constraints keep out every state that must not be.

Times are the database's. A chunk's lease lives as long as its worker's heartbeat; the lease token, drawn
from one sequence, fences off whoever held the chunk before.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, Identity, Index, Sequence, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from virnucpro_core.failures import FailureReason
from virnucpro_core.ledger.base import NOW, Base, hex64, one_of
from virnucpro_core.ledger.rejections import RejectionReason
from virnucpro_core.ledger.setbacks import SetbackKind

LEASE_TOKENS = Sequence("lease_tokens", metadata=Base.metadata)


class Model(Base):
    """A registered name for weights."""

    __tablename__ = "models"
    __table_args__ = (hex64("weights_sha256"), CheckConstraint("layers > 0", name="layers_positive"))

    name: Mapped[str] = mapped_column(primary_key=True)
    path: Mapped[str]
    weights_sha256: Mapped[str]
    layers: Mapped[int]
    token_dropout: Mapped[bool]
    demonstration: Mapped[bool]
    config: Mapped[dict[str, Any]]
    selftest: Mapped[dict[str, Any] | None]
    added_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Input(Base):
    """Content, by the sha256 of the file as it lies on disk; `location` is where ranges are read from."""

    __tablename__ = "inputs"
    __table_args__ = (
        hex64("sha256"),
        one_of("compression", "plain", "gzip", "bgzip", "zstd"),
        CheckConstraint("size > 0 AND records > 0 AND residues >= 0", name="not_empty"),
    )

    sha256: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    compression: Mapped[str]
    location: Mapped[str]
    records: Mapped[int]
    residues: Mapped[int]
    registered_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Stage(Base):
    """A step that every job takes, in the order of `position`; `queue` says which workers run it."""

    __tablename__ = "stages"

    name: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(unique=True)
    queue: Mapped[str]


class Job(Base):
    """One input under one recipe. Counters cover the current generation; `seconds` adds up what its chunks took.

    `stage_since` is when it came to its stage, or was resumed in it. `times_failed` counts in all generations.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("input_sha256", "recipe_sha256"),
        hex64("recipe_sha256"),
        one_of("state", "running", "succeeded", "failed", "cancelled"),
        CheckConstraint("generation >= 1", name="generation_positive"),
        CheckConstraint("chunks_left BETWEEN 0 AND chunks_total", name="chunks_left_in_range"),
        CheckConstraint(
            "embeddings >= 0 AND failed >= 0 AND embeddings + failed <= records", name="records_conserved"
        ),
        CheckConstraint(
            "state <> 'succeeded' OR (chunks_left = 0 AND embeddings + failed = records)",
            name="success_is_complete",
        ),
        CheckConstraint("(finished_at IS NULL) = (state = 'running')", name="finished_unless_running"),
        CheckConstraint("(error IS NULL) = (state <> 'failed')", name="failed_says_why"),
        CheckConstraint(
            "(execution_class IS NULL) = (execution IS NULL)", name="execution_class_is_described"
        ),
        Index("ix_jobs_state", "state", postgresql_where=text("state = 'running'")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    input_sha256: Mapped[str] = mapped_column(ForeignKey("inputs.sha256"))
    recipe_sha256: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(ForeignKey("models.name"))
    generation: Mapped[int] = mapped_column(server_default="1")
    state: Mapped[str] = mapped_column(server_default="running")
    stage: Mapped[str] = mapped_column(ForeignKey("stages.name"))
    stage_since: Mapped[datetime] = mapped_column(server_default=NOW)
    chunks_total: Mapped[int]
    chunks_left: Mapped[int]
    records: Mapped[int]
    embeddings: Mapped[int] = mapped_column(server_default="0")
    failed: Mapped[int] = mapped_column(server_default="0")
    truncated: Mapped[int] = mapped_column(server_default="0")
    unknown: Mapped[int] = mapped_column(server_default="0")
    residues_done: Mapped[int] = mapped_column(server_default="0")
    tokens: Mapped[int] = mapped_column(server_default="0")
    seconds: Mapped[float] = mapped_column(server_default="0")
    times_failed: Mapped[int] = mapped_column(server_default="0")
    execution_class: Mapped[str | None]
    execution: Mapped[dict[str, Any] | None]
    error: Mapped[str | None]
    forced_by: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    finished_at: Mapped[datetime | None]


class Submission(Base):
    """Somebody asks for a job: where the file lies, what to call the result, who asked.

    `error` says why its nucleotides could not be merged; the job does not fail for it.
    """

    __tablename__ = "submissions"
    __table_args__ = (
        UniqueConstraint("job_id", "path", "label", "nucleotide_path"),
        one_of("label", "", "host", "viral"),
        CheckConstraint("max_failed_share BETWEEN 0 AND 1", name="share_is_a_share"),
        CheckConstraint(
            "(published_at IS NULL) = (published_generation IS NULL)", name="published_names_generation"
        ),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    path: Mapped[str]
    stem: Mapped[str]
    label: Mapped[str] = mapped_column(server_default="")
    nucleotide_path: Mapped[str] = mapped_column(server_default="")
    nucleotide_sha256: Mapped[str] = mapped_column(server_default="")
    requested_by: Mapped[str]
    max_failed_share: Mapped[float]
    submitted_at: Mapped[datetime] = mapped_column(server_default=NOW)
    error: Mapped[str | None]
    published_generation: Mapped[int | None]
    published_at: Mapped[datetime | None]


class Worker(Base):
    """One process that runs chunks. It holds its leases until `lease_expires_at`.

    `silent` is one whose lease ran out, `stuck` one that made no progress, `gone` one that retired or was replaced.
    What its GPU said with the last heartbeat is NULL on a CPU.
    """

    __tablename__ = "workers"
    __table_args__ = (
        one_of("state", "live", "stuck", "silent", "gone"),
        Index("uq_workers_live_node", "node", unique=True, postgresql_where=text("state = 'live'")),
        Index("ix_workers_lease", "lease_expires_at", postgresql_where=text("state = 'live'")),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    node: Mapped[str]
    queue: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    device: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="live")
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    heartbeat_at: Mapped[datetime] = mapped_column(server_default=NOW)
    lease_expires_at: Mapped[datetime]
    progress: Mapped[int] = mapped_column(server_default="0")
    progress_at: Mapped[datetime] = mapped_column(server_default=NOW)
    gpu_utilization: Mapped[float | None]
    gpu_memory_used: Mapped[int | None]
    gpu_memory_total: Mapped[int | None]
    gpu_memory_peak: Mapped[int | None]


class Tally(Base):
    """How much of something a worker has done. It only rises, whatever becomes of the jobs that it was done for."""

    __tablename__ = "tallies"
    __table_args__ = (CheckConstraint("value >= 0", name="value_not_negative"),)

    worker_id: Mapped[int] = mapped_column(ForeignKey("workers.id"), primary_key=True)
    stage: Mapped[str] = mapped_column(ForeignKey("stages.name"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    label: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class Chunk(Base):
    """A unit of work of one stage. Extract chunks are byte ranges; later stages cover the whole input.

    `attempts` counts claims; `deaths` counts those that ended without a word, with their worker's process.
    """

    __tablename__ = "chunks"
    __table_args__ = (
        UniqueConstraint("job_id", "stage", "ordinal"),
        one_of("state", "pending", "running", "done", "failed"),
        CheckConstraint(
            "byte_end > byte_start AND first_record >= 1 AND records >= 1", name="range_not_empty"
        ),
        CheckConstraint(
            "(state = 'running') = (lease_token IS NOT NULL) AND (state <> 'running' OR worker_id IS NOT NULL)",
            name="lease_while_running",
        ),
        CheckConstraint(
            "CASE WHEN state = 'done' THEN embeddings + failed = records"
            " ELSE embeddings IS NULL AND failed IS NULL END",
            name="records_conserved",
        ),
        CheckConstraint("state <> 'failed' OR error IS NOT NULL", name="failed_says_why"),
        CheckConstraint("deaths BETWEEN 0 AND attempts", name="deaths_are_attempts"),
        Index("ix_chunks_worker_id", "worker_id", postgresql_where=text("state = 'running'")),
        Index("ix_chunks_suspect", "job_id", postgresql_where=text("deaths > 0")),
        Index("ix_chunks_failed", "job_id", postgresql_where=text("state = 'failed'")),
        Index(
            "ix_chunks_done_by",
            "worker_id",
            "finished_at",
            postgresql_where=text("state = 'done' AND stage = 'extract'"),
        ),
        Index(
            "ix_chunks_done",
            "job_id",
            "finished_at",
            "id",
            postgresql_where=text("state = 'done' AND stage = 'extract'"),
        ),
        Index(
            "ix_chunks_with_failures",
            "finished_at",
            postgresql_where=text("stage = 'extract' AND failed > 0"),
        ),
        Index(
            "ix_chunks_set_back",
            "job_id",
            postgresql_where=text("state = 'pending' AND error IS NOT NULL"),
        ),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    stage: Mapped[str] = mapped_column(ForeignKey("stages.name"))
    ordinal: Mapped[int]
    byte_start: Mapped[int]
    byte_end: Mapped[int]
    virtual_start: Mapped[int | None]
    first_record: Mapped[int]
    records: Mapped[int]
    residues: Mapped[int]
    sha256: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="pending")
    attempts: Mapped[int] = mapped_column(server_default="0")
    deaths: Mapped[int] = mapped_column(server_default="0")
    lease_token: Mapped[int | None]
    worker_id: Mapped[int | None] = mapped_column(ForeignKey("workers.id"))
    claimed_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    error: Mapped[str | None]
    embeddings: Mapped[int | None]
    failed: Mapped[int | None]
    truncated: Mapped[int] = mapped_column(server_default="0")
    unknown: Mapped[int] = mapped_column(server_default="0")
    tokens: Mapped[int] = mapped_column(server_default="0")
    seconds: Mapped[float | None]


class Setback(Base):
    """An attempt on a chunk that came to nothing, or whose result was lost. One that ended well is its chunk's row.

    It outlives its chunk, which may be halved: what it was about is the range of records.
    """

    __tablename__ = "setbacks"
    __table_args__ = (
        one_of("kind", *SetbackKind),
        CheckConstraint("first_record >= 1 AND records >= 1 AND attempt >= 1", name="range_not_empty"),
        Index("ix_setbacks_job", "job_id", "generation", "stage", "first_record"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    generation: Mapped[int]
    stage: Mapped[str] = mapped_column(ForeignKey("stages.name"))
    chunk_id: Mapped[int]
    first_record: Mapped[int]
    records: Mapped[int]
    attempt: Mapped[int]
    worker_id: Mapped[int] = mapped_column(ForeignKey("workers.id"))
    claimed_at: Mapped[datetime]
    ended_at: Mapped[datetime] = mapped_column(server_default=NOW)
    kind: Mapped[str]
    error: Mapped[str]


class FailureRow(Base):
    """One record without an embedding, in one generation."""

    __tablename__ = "failures"
    __table_args__ = (
        one_of("reason", *FailureReason),
        CheckConstraint("record >= 1", name="record_positive"),
        Index("ix_failures_reason", "job_id", "generation", "reason", "record"),
    )

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    record: Mapped[int] = mapped_column(primary_key=True)
    record_id: Mapped[str]
    reason: Mapped[str]
    detail: Mapped[str]


class Artifact(Base):
    """A file written once, below the output root, with its checksum."""

    __tablename__ = "artifacts"
    __table_args__ = (
        hex64("sha256"),
        CheckConstraint("bytes > 0 AND rows >= 0", name="not_empty"),
        Index("ix_artifacts_job", "job_id", "generation", "stage", "ordinal"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    generation: Mapped[int]
    stage: Mapped[str] = mapped_column(ForeignKey("stages.name"))
    ordinal: Mapped[int]
    kind: Mapped[str]
    path: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str]
    bytes: Mapped[int]
    rows: Mapped[int]
    execution: Mapped[dict[str, Any] | None]
    written_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Waiter(Base):
    """One run that waits for a job; `token` names the run's task instance and attempt."""

    __tablename__ = "waiters"

    token: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[int] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    since: Mapped[datetime] = mapped_column(server_default=NOW)


class Rejection(Base):
    """How many messages were refused for a reason; they were no hints of ours."""

    __tablename__ = "rejections"
    __table_args__ = (
        one_of("reason", *RejectionReason),
        CheckConstraint("messages > 0", name="messages_positive"),
    )

    reason: Mapped[str] = mapped_column(primary_key=True)
    messages: Mapped[int]
    last_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Outbox(Base):
    """A message that is due: one row per chunk that waits to be claimed. Claiming deletes it.

    However often it is sent, or put off, `since` is when the wait began. `put_off` counts the workers that had it
    and may not run the chunk.
    """

    __tablename__ = "outbox"
    __table_args__ = (
        Index(
            "ix_outbox_due",
            *("queue", "put_off", "chunk_id"),
            postgresql_where=text("published_at IS NULL"),
        ),
        Index("ix_outbox_delayed", "queue", "due_at", postgresql_where=text("published_at IS NULL")),
        Index(
            "ix_outbox_published", "queue", "published_at", postgresql_where=text("published_at IS NOT NULL")
        ),
        Index("ix_outbox_since", "queue", "since"),
    )

    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    chunk_id: Mapped[int] = mapped_column(ForeignKey("chunks.id", ondelete="CASCADE"), unique=True)
    queue: Mapped[str]
    since: Mapped[datetime] = mapped_column(server_default=NOW)
    due_at: Mapped[datetime] = mapped_column(server_default=NOW)
    put_off: Mapped[int] = mapped_column(server_default="0")
    published_at: Mapped[datetime | None]
