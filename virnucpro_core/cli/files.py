"""Commands on files alone, without a service: `extract`, `merge`, `validate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from virnucpro_core.cli.output import (
    AsJson,
    format_counts,
    print_facts,
    print_json,
    print_line,
    show_progress,
)
from virnucpro_core.cli.weights import DeviceOption, DtypeOption, ModelOption, RevisionOption
from virnucpro_core.errors import ArtifactError
from virnucpro_core.features.files import check_writable
from virnucpro_core.recipe import ResiduePolicy

if TYPE_CHECKING:
    from virnucpro_core.features.manifests import Manifest

PANEL = "Files (no service needed)"
NAMED = 5  # errors of one file that its line names

OutOption = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")]
NucleotidesOption = Annotated[
    bool,
    typer.Option("--allow-nucleotides", help="Take a file that looks like nucleotides for proteins."),
]


def add_commands(app: typer.Typer) -> None:
    for command in (extract, merge, validate):
        app.command(rich_help_panel=PANEL)(command)


def extract(
    fasta: Annotated[
        Path,
        typer.Argument(metavar="FASTA", help="Proteins: FASTA, plain or compressed by gzip, bgzip or zstd."),
    ],
    out: OutOption,
    model: ModelOption,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    residues: Annotated[
        ResiduePolicy,
        typer.Option(
            help="What a letter outside the vocabulary does: become `<unk>`, or fail its record (strict)."
        ),
    ] = "unknown",
    allow_nucleotides: NucleotidesOption = False,
    as_json: AsJson = False,
) -> None:
    """Embed the proteins of a FASTA file with FastESM2, on this host.

    Writes FILE, `{'proteins': [...], 'data': [...]}` with one float32 row of 1280 numbers per protein in
    input order; FILE.json, the manifest (input, recipe, counts, checksum); and FILE.failures.jsonl with the
    records that have no embedding, if there are any. A failed record does not fail the command.
    """
    check_writable(out)
    # Loaded late, as every heavy import of the commands: it brings torch.
    from virnucpro_core.embedding.extraction import extract as extract_proteins
    from virnucpro_core.embedding.fast_esm import check_target, failures_path, keep_result, manifest_path
    from virnucpro_core.embedding.loading import load_fast_esm
    from virnucpro_core.features.manifests import read_manifest

    check_target(out, fasta)
    loaded = load_fast_esm(model, revision, device, dtype)
    with show_progress((f"embedding {fasta.name}", None), counts=True) as (bar,):
        extraction = extract_proteins(
            fasta, loaded, residues=residues, allow_nucleotides=allow_nucleotides, on_progress=bar.advance
        )
    keep_result(out, fasta, extraction, loaded.recipe(residues=residues))
    facts = describe_result(read_manifest(manifest_path(out)), out)
    facts["failures_path"] = str(failures_path(out)) if extraction.failures else None
    facts["seconds"] = round(extraction.seconds, 3)
    facts["tokens_per_second"] = round(extraction.counts.tokens / max(extraction.seconds, 1e-9))
    print_result(facts, as_json)


def merge(
    nucleotides: Annotated[
        Path, typer.Argument(metavar="NUCLEOTIDES", help="A `*_DNABERT_S.pt` file: 768 numbers a sequence.")
    ],
    proteins: Annotated[
        Path, typer.Argument(metavar="PROTEINS", help="A `*_ESM.pt` file: 1280 numbers a sequence.")
    ],
    out: OutOption,
    label: Annotated[
        Literal["host", "viral"] | None,
        typer.Option(help="What the sequences are: adds `labels`, [0] for host and [1] for viral."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Join nucleotide and protein embeddings into one file of 2048 numbers a sequence, nucleotides first.

    The k-th row of an id meets the k-th row of that id on the other side. Sides that do not match are
    refused, and the first difference is named: no sequence is skipped.
    """
    from virnucpro_core.features.merging import merge_data

    written = merge_data(nucleotides, proteins, out, label)
    print_result(
        {"path": str(out), "sha256": written.sha256, "rows": written.rows, "bytes": written.bytes}, as_json
    )


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="`*_ESM.pt` files.")],
    as_json: AsJson = False,
) -> None:
    """Check `*_ESM.pt` files: shapes, dtype, NaN, Inf, rows of zeros, and their manifest's checksum.

    The manifest is FILE.json, or `<stem>.manifest.json` for `<stem>_ESM.pt` and its shards; without one, the
    content alone is checked, and the output says so. Exit 0 if every file is valid, 6 if not.
    """
    checked = [check_file(file) for file in files]
    if as_json:
        print_json(checked)
    else:
        for found in checked:
            print_line(f"[{'PASS' if found['passed'] else 'FAIL'}] {found['path']}: {summarise(found)}")
    if not all(found["passed"] for found in checked):
        raise typer.Exit(ArtifactError.exit_code)


def check_file(path: Path) -> dict[str, object]:
    """Reopen a `*_ESM.pt` file: its rows, its errors, and the manifest it was compared with, if any."""
    from virnucpro_core.features.exports import read_pt
    from virnucpro_core.features.manifests import find_faults
    from virnucpro_core.features.validation import validate_embeddings

    errors: list[str] = []
    rows = 0
    manifest_path = None
    try:
        proteins, data = read_pt(path)
        rows = len(proteins)
        errors += validate_embeddings(proteins, data)
        errors += [f"{name}: all zero" for name, row in zip(proteins, data, strict=True) if not row.any()]
        found = find_manifest(path)
        if found is not None:
            manifest_path, manifest = found
            errors += find_faults(manifest, path.parent)
    except ArtifactError as error:
        errors.append(str(error))
    return {
        "path": str(path),
        "passed": not errors,
        "rows": rows,
        "manifest": None if manifest_path is None else str(manifest_path),
        "errors": errors,
    }


def find_manifest(path: Path) -> tuple[Path, Manifest] | None:
    """The manifest that names a `.pt` file, where it lies, reduced to that one file."""
    from virnucpro_core.features.manifests import read_manifest

    stem = path.name.rpartition("_ESM.")[0]
    for candidate in (path.with_name(f"{path.name}.json"), path.with_name(f"{stem}.manifest.json")):
        try:
            there = candidate.exists()
        except OSError:
            continue  # as no file can have so long a name
        if there:
            manifest = read_manifest(candidate)
            named = tuple(file for file in manifest.files if file.name == path.name)
            if named:
                return candidate, replace(manifest, files=named)
    return None


def summarise(found: dict[str, object]) -> str:
    """One line about a file: its errors, or what was checked."""
    errors = cast("list[str]", found["errors"])
    if errors:
        more = f"; and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
        return "; ".join(errors[:NAMED]) + more
    checksum = (
        "checksum as in its manifest" if found["manifest"] else "no manifest to compare a checksum with"
    )
    return f"{found['rows']:,} rows, {checksum}"


def describe_result(manifest: Manifest, out: Path) -> dict[str, object]:
    """The figures of a result, as a person and a script read them."""
    counts = manifest.counts
    return {
        "path": str(out),
        "sha256": manifest.files[0].sha256,
        "records": counts.records,
        "embeddings": counts.embeddings,
        "failures": dict(counts.failures),
        "truncated": counts.truncated,
        "unknown": counts.unknown,
        "tokens": counts.tokens,
        "demonstration": manifest.recipe.demonstration,
    }


def print_result(facts: dict[str, object], as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    failures = facts.get("failures")
    if isinstance(failures, dict):
        facts = facts | {"failures": format_counts(failures)}
    print_facts(facts)
