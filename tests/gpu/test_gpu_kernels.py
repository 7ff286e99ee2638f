"""The fused plan's kernels, each against torch in float32, and what happens where they do not compile."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from torch.nn import functional

from tests.merged_bytes import write_proteins
from virnucpro_core.embedding.checkpoint import HEAD_WIDTH, HEADS, MLP_WIDTH, inspect_checkpoint
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.loading import build_model, explain_missing, load_fast_esm, open_weights
from virnucpro_core.embedding.model import rotate, rotation
from virnucpro_core.embedding.packing import plan_tiles
from virnucpro_core.errors import ExecutionError
from virnucpro_core.recipe import EMBEDDING_WIDTH

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("virnucpro_core.embedding.kernels")
products = pytest.importorskip("virnucpro_core.embedding.products")
fp8 = pytest.importorskip("virnucpro_core.embedding.fp8")
fused = pytest.importorskip("virnucpro_core.embedding.fused")

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SIZES = (3, 64, 65, 130, 1026, 200, 1)
BOUNDS = np.cumsum((0, *SIZES)).astype(np.int32)
ROWS = int(BOUNDS[-1])


@pytest.fixture(autouse=True)
def _needs_hopper() -> None:
    if missing := explain_missing(CUDA):
        pytest.skip(missing)


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return (scale * torch.randn(*shape, device=CUDA, generator=generator)).half()


def test_the_product_with_gelu() -> None:
    rows, weight, bias = (
        draw(ROWS, EMBEDDING_WIDTH),
        draw(MLP_WIDTH, EMBEDDING_WIDTH, scale=0.06),
        draw(MLP_WIDTH),
    )
    expected = functional.gelu(functional.linear(rows.float(), weight.float(), bias.float()))
    computed = products.linear_gelu(rows, weight, bias).float()
    torch.testing.assert_close(computed, expected, rtol=1e-3, atol=2e-4)


def test_the_product_with_rotary() -> None:
    rows, weight, bias = (
        draw(ROWS, EMBEDDING_WIDTH),
        draw(3 * EMBEDDING_WIDTH, EMBEDDING_WIDTH, scale=0.03),
        draw(3 * EMBEDDING_WIDTH),
    )
    positions = (torch.arange(ROWS, device=CUDA) % 1026).int()
    straight = functional.linear(rows.float(), weight.float(), bias.float()).view(ROWS, 3, HEADS, HEAD_WIDTH)
    turned = rotate(straight[:, :2], *rotation(positions))
    expected = torch.cat((turned, straight[:, 2:]), dim=1).view(ROWS, -1)
    projected = products.linear_rotary(rows, weight, bias, positions, fused.rotation_tables(1026, CUDA))
    torch.testing.assert_close(projected.float(), expected, rtol=1e-3, atol=4e-3)


def widen(scaled: Any) -> Tensor:
    return scaled.values.float() * scaled.scales[:, None]


def test_fp8_products_are_those_of_the_rounded_numbers() -> None:
    rows = kernels.norm_scaled(
        draw(ROWS, EMBEDDING_WIDTH), *(draw(EMBEDDING_WIDTH, seed=seed).float() for seed in (1, 2, 3))
    )
    weight, bias = fp8.quantise(draw(MLP_WIDTH, EMBEDDING_WIDTH, scale=0.06)), draw(MLP_WIDTH)
    expected = functional.gelu(functional.linear(widen(rows), widen(weight), bias.float()))
    computed = products.linear_gelu(rows, weight, bias).float()
    assert float((computed - expected).norm() / expected.norm()) < 2e-3
    # 448 stands for the peak: half a step of FP8 is 1/16 of the number, or of the smallest normal one, 2^-6.
    peak = 2 * float(expected.max())
    narrow = products.linear_gelu(rows, weight, bias, peak)
    torch.testing.assert_close(narrow.float() * peak / 448, computed, rtol=1 / 15, atol=peak / 448 * 2**-10)
    hidden, out = draw(ROWS, EMBEDDING_WIDTH), fp8.quantise(draw(EMBEDDING_WIDTH, MLP_WIDTH), peak / 448)
    expected = hidden.float() + functional.linear(narrow.float(), widen(out))
    products.add_linear(hidden, narrow, out)
    # 160 additions to sums that keep 14 bits.
    assert float((hidden.float() - expected).norm() / expected.norm()) < 160 * 2**-14


def test_the_bound_of_a_linear_map_holds_for_the_worst_row() -> None:
    layer_norm = torch.nn.LayerNorm(EMBEDDING_WIDTH, eps=1e-5, device=CUDA)
    with torch.no_grad():
        layer_norm.weight.copy_(draw(EMBEDDING_WIDTH, seed=1).float())
        layer_norm.bias.copy_(draw(EMBEDDING_WIDTH, seed=2).float())
        weight, bias = draw(MLP_WIDTH, EMBEDDING_WIDTH, scale=0.06), draw(MLP_WIDTH)
        bound = fp8.bound_linear(layer_norm, weight, bias)
        # The input that points along a row of the weight gets furthest.
        worst = layer_norm(1e3 * weight.float() * layer_norm.weight)
        reached = functional.linear(worst, weight.float(), bias.float()).abs().max()
    assert 0.9 * bound < float(reached) <= bound


def test_a_scaled_norm_fills_the_range_of_fp8() -> None:
    hidden = draw(ROWS, EMBEDDING_WIDTH, scale=30)
    hidden[3] = 0.0
    shift, weight, bias = (draw(EMBEDDING_WIDTH, seed=seed).float() for seed in (1, 2, 3))
    shift.zero_()
    bias.zero_()
    exact = kernels.norm(hidden, shift, weight, bias, torch.float32)
    scaled = kernels.norm_scaled(hidden, shift, weight, bias)
    assert set(scaled.values.float().abs().amax(dim=1).tolist()) == {0.0, 448.0}
    steps = exact.abs().amax(dim=1, keepdim=True) / 448 * 2**-10
    assert bool(((widen(scaled) - exact).abs() <= exact.abs() / 15 + steps).all())


def test_attention_stays_within_a_sequence() -> None:
    projected = draw(ROWS, 3 * EMBEDDING_WIDTH)
    projected[BOUNDS[2] : BOUNDS[3]] = torch.nan
    attended = kernels.attend(projected, torch.from_numpy(plan_tiles(BOUNDS)).to(CUDA)).float()
    for begin, end in zip(BOUNDS.tolist(), BOUNDS.tolist()[1:], strict=False):
        parts = projected[begin:end].float().view(-1, 3, HEADS, HEAD_WIDTH).permute(1, 2, 0, 3)
        expected = functional.scaled_dot_product_attention(*parts).transpose(0, 1).reshape(end - begin, -1)
        torch.testing.assert_close(attended[begin:end], expected, rtol=1e-3, atol=2e-3, equal_nan=True)
    assert int(attended.isnan().any(dim=1).sum()) == SIZES[2]


def test_attention_in_fp8_is_that_in_half_precision_rounded() -> None:
    projected, tiles = draw(ROWS, 3 * EMBEDDING_WIDTH), torch.from_numpy(plan_tiles(BOUNDS)).to(CUDA)
    exact = kernels.attend(projected, tiles).float()
    peak = float(projected[:, 2 * EMBEDDING_WIDTH :].abs().max())
    narrow = kernels.attend(projected, tiles, peak).float() * peak / 448
    torch.testing.assert_close(narrow, exact, rtol=1 / 15, atol=peak / 448 * 2**-10)


def test_the_norm_adds_the_shift() -> None:
    hidden = draw(ROWS, EMBEDDING_WIDTH, scale=30)
    shift, weight, bias = (draw(EMBEDDING_WIDTH, seed=seed).float() for seed in (1, 2, 3))
    expected = functional.layer_norm(hidden.float() + shift, (EMBEDDING_WIDTH,), weight, bias, 1e-5)
    wide = kernels.norm(hidden, shift, weight, bias, torch.float32)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(kernels.norm(hidden, shift, weight, bias), wide.half())


def test_pooling_leaves_out_both_ends() -> None:
    normed = draw(ROWS, EMBEDDING_WIDTH).float()
    pooled = kernels.pool(normed, torch.from_numpy(BOUNDS).to(CUDA), len(SIZES) - 1)
    for row, begin, end in zip(pooled, BOUNDS.tolist(), BOUNDS.tolist()[1:], strict=False):
        torch.testing.assert_close(row, normed[begin + 1 : end - 1].mean(dim=0), rtol=1e-5, atol=1e-6)


COUNT_COMPILATIONS = """
import sys
from pathlib import Path
from triton import knobs
from tests.fixtures_gpu import load_under
from virnucpro_core.embedding.execution import KernelPlan
from virnucpro_core.embedding.extraction import extract

compiled = []
# It is told of every kernel that is compiled, or read from the cache on disk.
knobs.compilation.listener = lambda src, **_: compiled.append(src.name)
checkpoint, dtype, plan, fasta = sys.argv[1:]
model = load_under(Path(checkpoint), dtype, KernelPlan(plan))
loaded = len(compiled)
assert not extract(fasta, model).failures
print(loaded, *compiled[loaded:])
"""


@pytest.mark.parametrize(("dtype", "plan"), [("float16", "packed-fused"), ("fp8", "packed-fp8")])
def test_all_kernels_are_compiled_when_a_model_is_loaded(
    demo_checkpoint: Path, make_proteins: Callable[..., list[str]], tmp_path: Path, dtype: str, plan: str
) -> None:
    fasta = write_proteins(tmp_path / "proteins.fasta", make_proteins(*[1, 20, 165, 333, 1024] * 30))
    ended = subprocess.run(
        [sys.executable, "-c", COUNT_COMPILATIONS, str(demo_checkpoint), dtype, plan, str(fasta)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, *later = ended.stdout.split()
    assert int(loaded) > 0
    assert later == []


@triton.jit
def _refuse(out):
    triton.language.static_assert(out is None)


def test_kernels_that_do_not_compile_are_replaced_and_logged(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "attend", lambda projected, _: _refuse[(1,)](projected))
    with capture_logs() as logs:
        assert load_fast_esm(demo_checkpoint, device="cuda").plan is KernelPlan.PACKED_VARLEN
    [entry] = logs
    assert (entry["event"], entry["plan"]) == ("fused_kernels_failed", KernelPlan.PACKED_VARLEN)
    assert "do not compile" in entry["reason"]
    weights = open_weights(inspect_checkpoint(demo_checkpoint))
    with pytest.raises(ExecutionError):
        build_model(weights, CUDA, "float16", KernelPlan.PACKED_FUSED)
