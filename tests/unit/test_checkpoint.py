"""A checkpoint is FastESM2 to the last tensor, or it is refused with its faults named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from virnucpro_core.embedding.checkpoint import (
    check_tensors,
    expected_tensors,
    fetch_weights,
    inspect_checkpoint,
)
from virnucpro_core.embedding.demonstration import write_demo_weights
from virnucpro_core.errors import WeightsError

pytestmark = pytest.mark.unit

ONE_LAYER_SHA256 = "5a69acf037983b5117187747f6d9d871dce64b574722bf10247efb2a3f4fa0b9"


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demonstration checkpoint with one layer; read only."""
    return write_demo_weights(tmp_path_factory.mktemp("one_layer") / "demo", layers=1).folder


@pytest.fixture
def changed(one_layer: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the checkpoint with some fields of config.json or some tensors replaced; None removes one."""

    def change(
        config: dict[str, Any] | None = None, tensors: dict[str, np.ndarray[Any, Any] | None] | None = None
    ) -> Path:
        fields = json.loads((one_layer / "config.json").read_text()) | (config or {})
        fields = {name: value for name, value in fields.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        weights = tmp_path / "model.safetensors"
        if tensors is None:
            weights.symlink_to(one_layer / "model.safetensors")
        else:
            kept = load_file(one_layer / "model.safetensors") | tensors
            save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, weights)
        return tmp_path

    return change


def test_demonstration_weights_are_the_same_bytes_everywhere(one_layer: Path) -> None:
    checkpoint = inspect_checkpoint(one_layer)
    assert checkpoint.sha256 == ONE_LAYER_SHA256
    assert (checkpoint.layers, checkpoint.token_dropout, checkpoint.demonstration) == (1, True, True)


def test_another_seed_gives_other_weights(one_layer: Path, tmp_path: Path) -> None:
    assert (
        write_demo_weights(tmp_path / "other", layers=1, seed=1).sha256
        != inspect_checkpoint(one_layer).sha256
    )


def test_demonstration_weights_are_written_once(tmp_path: Path) -> None:
    write_demo_weights(tmp_path, layers=1)
    before = (tmp_path / "model.safetensors").stat()
    write_demo_weights(tmp_path, layers=1)
    assert (tmp_path / "model.safetensors").stat().st_ino == before.st_ino
    with pytest.raises(WeightsError, match="another checkpoint"):
        write_demo_weights(tmp_path, layers=2)


def test_names_without_prefix_are_accepted(one_layer: Path, tmp_path: Path) -> None:
    shutil.copy(one_layer / "config.json", tmp_path)
    tensors = load_file(one_layer / "model.safetensors")
    unprefixed = {
        name.removeprefix("esm."): tensor for name, tensor in tensors.items() if name.startswith("esm.")
    }
    save_file(unprefixed, tmp_path / "model.safetensors")
    assert inspect_checkpoint(tmp_path).prefix == ""


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"hidden_size": 320}, "hidden_size is 320 instead of 1280"),
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"token_dropout": None}, "token_dropout is not stated"),
        ({"num_hidden_layers": 2}, "16 missing"),
    ],
)
def test_another_configuration_is_refused(
    changed: Callable[..., Path], config: dict[str, Any], named: str
) -> None:
    with pytest.raises(WeightsError, match=named):
        inspect_checkpoint(changed(config=config))


@pytest.mark.parametrize(
    ("name", "tensor", "named"),
    [
        ("esm.encoder.layer.0.LayerNorm.bias", None, r"1 missing \(esm.encoder.layer.0.LayerNorm.bias\)"),
        ("esm.encoder.layer.0.extra.bias", np.zeros(3, np.float32), "1 unknown"),
        ("esm.encoder.layer.0.LayerNorm.bias", np.zeros(3, np.float32), r"of another shape \(.* \(3,\)\)"),
        ("esm.encoder.layer.0.LayerNorm.bias", np.zeros(1280, np.float16), "not float32"),
        (
            "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq",
            np.ones(32, np.float32),
            "differs from rotary base",
        ),
    ],
)
def test_other_tensors_are_refused(
    changed: Callable[..., Path], name: str, tensor: np.ndarray[Any, Any] | None, named: str
) -> None:
    with pytest.raises(WeightsError, match=named):
        inspect_checkpoint(changed(tensors={name: tensor}))


def test_a_full_model_uses_531_tensors() -> None:
    assert len(expected_tensors(33)) == 531
    assert (
        check_tensors({f"esm.{name}": shape for name, shape in expected_tensors(33).items()}, 33, where="")
        == "esm."
    )


def test_a_cut_off_file_is_refused(one_layer: Path, tmp_path: Path) -> None:
    shutil.copy(one_layer / "config.json", tmp_path)
    whole = (one_layer / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="cannot be read"):
        inspect_checkpoint(tmp_path)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no readable config\.json"):
        inspect_checkpoint(tmp_path / "absent")
    for content in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(WeightsError, match="not JSON"):
            inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(WeightsError, match="no object"):
        inspect_checkpoint(tmp_path)


def test_pickled_weights_are_not_read(one_layer: Path, tmp_path: Path) -> None:
    shutil.copy(one_layer / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize("revision", ["main", "", "888b364d", "Z" * 40])
def test_only_a_pinned_revision_is_fetched(revision: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not pinned"):
        fetch_weights("Synthyra/FastESM2_650", revision, tmp_path)


REPOSITORY, REVISION = "Synthyra/FastESM2_650", "0123456789" * 4


@pytest.fixture
def hub(one_layer: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Barrier]:
    """A hub with one revision of one repository, which sends no weights before two have asked for them."""
    both = Barrier(2, timeout=60)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.find()

        def do_GET(self) -> None:
            path = self.find()
            if path is not None and path.suffix == ".safetensors":
                both.wait()
            if path is not None:
                self.wfile.write(path.read_bytes())

        def find(self) -> Path | None:
            folder, _, name = self.path.rpartition("/")
            path = one_layer / name if folder == f"/{REPOSITORY}/resolve/{REVISION}" else None
            self.send_response(404 if path is None else 200)
            self.send_header("Content-Length", str(0 if path is None else path.stat().st_size))
            self.send_header("ETag", f'"{name}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            return path

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        Thread(target=server.serve_forever, daemon=True).start()
        yield both
        server.shutdown()


def test_two_that_fetch_the_same_revision_at_once_both_have_it(
    hub: Barrier, one_layer: Path, tmp_path: Path
) -> None:
    """As the children of several GPUs do that load a model by its name on the Hub."""
    with ThreadPoolExecutor(2) as pool:
        fetching = [pool.submit(fetch_weights, REPOSITORY, REVISION, tmp_path) for _ in range(2)]
        fetched = [future.result() for future in fetching]
    assert fetched[0] == fetched[1] == fetch_weights(REPOSITORY, REVISION, tmp_path)
    assert fetched[0].sha256 == ONE_LAYER_SHA256
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(WeightsError, match="cannot be fetched"):
        fetch_weights(REPOSITORY, "f" * 40, tmp_path)
