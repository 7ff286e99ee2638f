"""Commands about models: `weights` and `selftest`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from virnucpro_core.cli.connections import connect
from virnucpro_core.cli.output import AsJson, print_facts, print_json, print_line, print_note, print_table
from virnucpro_core.errors import VirnucproError, WeightsError
from virnucpro_core.recipe import Dtype
from virnucpro_core.settings import load_settings

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

    from virnucpro_core.embedding.checkpoint import Checkpoint
    from virnucpro_core.embedding.verdicts import Verdict

PANEL = "Models"
ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A checkpoint's folder, its name below the model root, or a Hub repository with --revision.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="COMMIT", help="The Hub repository's commit, all 40 hex digits.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.", show_default="the GPU, if there is one"),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        metavar="DTYPE",
        help=f"Precision of the forward pass: {', '.join(get_args(Dtype))}; a CPU computes float32 only.",
        show_default="float16 on a GPU, float32 on a CPU",
    ),
]

weights = typer.Typer(no_args_is_help=True, help="Make, fetch, register and inspect FastESM2 weights.")


def add_commands(app: typer.Typer) -> None:
    app.add_typer(weights, name="weights", rich_help_panel=PANEL)
    app.command(rich_help_panel=PANEL)(selftest)


@weights.command()
def demo(
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="FOLDER",
            help="Where to write them.",
            show_default="the folder `demo` below the model root",
        ),
    ] = None,
    layers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Transformer layers; FastESM2_650 has 33.")
    ] = 2,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Equal seeds give equal bytes.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write random weights in FastESM2's shape, to try the pipeline without the model hub.

    Embeddings made with them mean nothing. Every recipe and manifest says that they were used.
    """
    from virnucpro_core.embedding.demonstration import write_demo_weights

    checkpoint = write_demo_weights(folder or load_settings().model_root / "demo", layers=layers, seed=seed)
    print_note("These weights are RANDOM: embeddings made with them mean nothing.")
    show_checkpoint(checkpoint, as_json)


@weights.command()
def fetch(
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="Owner and name on the Hub, as Synthyra/FastESM2_650.")
    ],
    revision: Annotated[
        str,
        typer.Option(
            metavar="COMMIT", help="The commit, all 40 hex digits: a branch may mean other weights tomorrow."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Fetch config.json and model.safetensors of one pinned revision into the model root.

    Nothing else is fetched: no code, no pickles, no tokenizer. What does not fit FastESM2 to the last tensor
    is refused. On a host that cannot reach the Hub, copy the two files into a folder and name that.
    """
    from virnucpro_core.embedding.checkpoint import fetch_weights

    show_checkpoint(fetch_weights(repository, revision, load_settings().model_root), as_json)


@weights.command()
def add(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The name that submissions and DAG runs will use.")
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The checkpoint's folder, where the workers find it too.")
    ],
    as_json: AsJson = False,
) -> None:
    """Register a checkpoint in the ledger under a name. A name means the same weights for ever.

    A folder below the model root is kept relative to it, so that workers may have their model root elsewhere.
    """
    from virnucpro_core.embedding.checkpoint import inspect_checkpoint
    from virnucpro_core.ledger.database import in_transaction

    checkpoint = inspect_checkpoint(folder)
    with connect("owner") as ledger:
        in_transaction(ledger, register, name, checkpoint, load_settings().model_root)
    show_checkpoint(checkpoint, as_json, name=name)


@weights.command()
def show(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A registered name or a checkpoint's folder.",
            show_default="all that are registered",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the registered models, or one of them, or check and describe a checkpoint's folder."""
    if model is not None and (Path(model).is_dir() or "/" in model):
        from virnucpro_core.embedding.checkpoint import inspect_checkpoint

        show_checkpoint(inspect_checkpoint(model), as_json)
        return
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.queries import list_models

    with connect() as ledger:
        models = in_transaction(ledger, list_models)
    found = [describe_model(row) for row in models if model in (None, row.name)]
    if model is not None and not found:
        raise WeightsError(
            f"no model is registered as {model!r}, and it is no folder",
            where="models",
            todo="List the registered ones with `virnucpro weights show`.",
        )
    if as_json:
        print_json(found if model is None else found[0])
    elif model is not None:
        print_facts(found[0])
    else:
        columns = ("name", "sha256", "layers", "demonstration", "selftest", "folder")
        print_table(columns, [[facts[column] for column in columns] for facts in found])


def selftest(
    model: ModelOption,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: AsJson = False,
) -> None:
    """Run the eleven acceptance checks on this host with these weights; exit 0 if all pass, 1 if not.

    The checks run the real extraction on six proteins of 20 to 1201 residues, and compare it with
    transformers' EsmModel in float32. The verdict is kept in the model's folder (selftest.json) and, where a
    ledger is set up, with every model of these weights. A twelfth check in fp8 compares 192 proteins and their
    nearest neighbours; workers compute in fp8 only where it passed.
    """
    from virnucpro_core.embedding.loading import find_checkpoint
    from virnucpro_core.embedding.selftest import run_selftest

    checkpoint = find_checkpoint(model, revision)
    verdict = run_selftest(checkpoint.folder, device=device, dtype=dtype)
    if as_json:
        print_json(verdict.to_json())
    else:
        for check in verdict.checks:
            print_line(f"[{'PASS' if check.passed else 'FAIL'}] {check.name}: {check.detail}")
    try:
        keep_verdict(checkpoint, verdict)
    except VirnucproError as error:
        # A model's folder is often read-only. The host is accepted nevertheless, but FP8 goes by the file there.
        print_note(f"The verdict could not be kept: {error}")
        if dtype == "fp8":
            print_note("Without it FP8 stays refused.")
            raise typer.Exit(1) from error
    if not verdict.passed:
        raise typer.Exit(1)


def register(tx: Connection, name: str, checkpoint: Checkpoint, model_root: Path) -> None:
    """Enter a checkpoint, and the self-tests' verdicts that its folder holds."""
    from virnucpro_core.ledger.registration import keep_selftest
    from virnucpro_core.models import register_checkpoint

    register_checkpoint(tx, name, checkpoint, model_root)
    verdicts = find_verdicts(checkpoint)
    if verdicts:
        keep_selftest(tx, checkpoint.sha256, verdicts)


def keep_verdict(checkpoint: Checkpoint, verdict: Verdict) -> None:
    """Keep a self-test's verdict in the checkpoint's folder, and in the ledger if one is set up."""
    from virnucpro_core.embedding.verdicts import keep_verdict as keep_beside_weights
    from virnucpro_core.ledger.database import in_transaction
    from virnucpro_core.ledger.registration import keep_selftest

    keep_beside_weights(checkpoint.folder, verdict)
    settings = load_settings()
    if settings.owner_database_url or settings.database_url:
        with connect("owner") as ledger:
            if not in_transaction(ledger, keep_selftest, checkpoint.sha256, find_verdicts(checkpoint)):
                print_note(
                    "No model is registered with these weights, so the verdict is kept in their folder only; "
                    "`virnucpro weights add NAME FOLDER` registers one."
                )


def find_verdicts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The self-tests' verdicts on these weights, by execution class, that their folder holds."""
    from virnucpro_core.embedding.verdicts import read_verdicts

    verdicts: dict[str, Any] = dict(read_verdicts(checkpoint.folder))
    return {
        name: verdict for name, verdict in verdicts.items() if verdict["weights_sha256"] == checkpoint.sha256
    }


def describe_model(row: Row[Any]) -> dict[str, object]:
    """A registered model, as people and scripts see it."""
    return {
        "name": row.name,
        "sha256": row.weights_sha256,
        "layers": row.layers,
        "token_dropout": row.token_dropout,
        "demonstration": row.demonstration,
        "selftest": describe_verdicts(row.selftest or {}),
        "folder": row.path,
        "added_at": row.added_at,
    }


def describe_verdicts(verdicts: dict[str, Any]) -> str:
    """For each precision `passed` if every self-test did, on whatever device, else `FAILED`."""
    if not verdicts:
        return "not run"
    by_dtype: dict[str, bool] = {}
    for verdict in verdicts.values():
        dtype = (verdict["execution"] or {}).get("dtype", "not loaded")
        by_dtype[dtype] = by_dtype.get(dtype, True) and verdict["passed"]
    return ", ".join(
        f"{dtype} {'passed' if passed else 'FAILED'}" for dtype, passed in sorted(by_dtype.items())
    )


def show_checkpoint(checkpoint: Checkpoint, as_json: bool, name: str | None = None) -> None:
    """Print what a checkpoint's folder holds."""
    facts: dict[str, object] = {
        "folder": str(checkpoint.folder.absolute()),
        "sha256": checkpoint.sha256,
        "layers": checkpoint.layers,
        "token_dropout": checkpoint.token_dropout,
        "demonstration": checkpoint.demonstration,
        "selftest": describe_verdicts(find_verdicts(checkpoint)),
    }
    if name is not None:
        facts = {"name": name, **facts}
    print_json(facts) if as_json else print_facts(facts)
