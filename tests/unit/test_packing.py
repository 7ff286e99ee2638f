"""Batches keep every sequence, and a pack lays each out as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virnucpro_core import get_batch_indices
from virnucpro_core.embedding.packing import LONGEST, TILE_QUERIES, build_pack, plan_tiles
from virnucpro_core.sequences.residues import CLS, EOS, PAD

pytestmark = pytest.mark.unit

lengths_of_sequences = st.lists(st.integers(1, 3000), max_size=200)
sequences = st.lists(st.lists(st.integers(3, 30), min_size=1, max_size=40), min_size=1, max_size=20)


@given(lengths_of_sequences, st.integers(1, 5000))
def test_every_sequence_is_in_one_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = get_batch_indices(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] + 2 for index in batch) <= budget


def test_no_sequences_make_no_batches() -> None:
    assert get_batch_indices([]) == []


def test_batches_are_filled() -> None:
    assert get_batch_indices([98] * 40, 2000) == [list(range(20)), list(range(20, 40))]


def test_what_a_batch_has_no_room_for_is_replaced_by_the_longest_that_fits() -> None:
    assert get_batch_indices([700, 20, 600, 250, 280, 30], 1000) == [[0, 4], [2, 3, 5, 1]]


@given(lengths_of_sequences, st.integers(1, 5000))
def test_batches_begin_with_the_longest_that_is_left(lengths: list[int], budget: int) -> None:
    left = sorted(lengths, reverse=True)
    for batch in get_batch_indices(lengths, budget):
        taken = [lengths[index] for index in batch]
        assert taken == sorted(taken, reverse=True)
        assert taken[0] == left[0]
        for length in taken:
            left.remove(length)
        room = budget - sum(length + 2 for length in taken)
        assert all(length + 2 > room for length in left)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_tiles_cover_every_row_once(sizes: list[int]) -> None:
    bounds = np.cumsum([0, *sizes]).astype(np.int32)
    tiles = plan_tiles(bounds)
    assert tiles.dtype == np.int32
    rows = []
    for begin, length, query in tiles.tolist():
        assert (begin, begin + length) in zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
        rows += range(begin + query, begin + min(query + TILE_QUERIES, length))
    assert rows == list(range(sum(sizes)))


@given(sequences, st.integers(0, 2500))
def test_a_pack_holds_each_sequence_between_bos_and_eos(residues: list[list[int]], rows: int) -> None:
    tokens = np.concatenate(residues).astype(np.uint8)
    offsets = np.cumsum([0, *map(len, residues)])
    members = np.arange(len(residues))[::-1]
    pack = build_pack(tokens, offsets, members, rows)

    assert len(pack.tokens) == len(pack.positions) == max(rows, len(tokens) + 2 * len(residues))
    assert pack.bounds[-1] == len(pack.tokens)
    assert np.diff(pack.bounds).max() <= pack.longest
    for place, member in enumerate(members):
        segment = slice(pack.bounds[place], pack.bounds[place + 1])
        assert pack.tokens[segment].tolist() == [CLS, *residues[member], EOS]
        assert pack.positions[segment].tolist() == list(range(len(residues[member]) + 2))
    padding = pack.tokens[pack.bounds[len(residues)] :]
    assert (padding == PAD).all()
    assert (np.diff(pack.bounds)[len(residues) :] <= LONGEST).all()


@given(sequences)
def test_the_pieces_of_a_pack_are_its_residues(residues: list[list[int]]) -> None:
    tokens = np.concatenate(residues).astype(np.uint8)
    offsets = np.cumsum([0, *map(len, residues)])
    pack = build_pack(tokens, offsets, np.arange(len(residues)), 900)
    cuts = np.split(pack.tokens, np.cumsum(pack.pieces))
    assert [piece.tolist() for piece in cuts[1:-1:2]] == residues


def test_a_pack_is_not_padded_without_a_size() -> None:
    pack = build_pack(np.array([4, 5], dtype=np.uint8), np.array([0, 2]), np.array([0]))
    assert pack.tokens.tolist() == [CLS, 4, 5, EOS]
