"""Packed rows laid out side by side, to be looked at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megalora.data import PackedRows


class Stacked(NamedTuple):
    """input_ids, labels, position_ids [R, S]; lengths: of the documents of each row, with the padding tail."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    lengths: tuple[tuple[int, ...], ...]


def stacked(rows: PackedRows) -> Stacked:
    every = [rows.row(index) for index in range(rows.rows)]
    arrays = (np.stack([getattr(row, name) for row in every]) for name in ("input_ids", "labels", "position_ids"))
    return Stacked(*arrays, tuple(row.lengths for row in every))
