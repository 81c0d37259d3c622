"""The index of a gallery's rows, by faiss on the CPU: exact, or by cells where there are many rows.

fewer than FLAT_BELOW rows    every query is compared with every row
more                          spherical k-means puts the rows into about 2·√n cells (IVF); a query is compared with the
                              rows of the `probes` cells whose centres are nearest to it

Cells and not a graph (HNSW): rows come and go in cells without a rebuild, while faiss cannot remove rows from a graph.
So many cells are visited that TARGET of the 10 nearest rows of SAMPLE rows are found, which is measured when the cells
are made. The cosines of what is found are exact in both.

centres [cells, D] ── assign ──>  the cell of each row, stored beside it, so that opening a gallery computes nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.errors import UserError
from partial_fc.training.gallery.segments import Floats, Integers, Rows

FLAT_BELOW = 100_000  # rows that are compared one by one
ROWS_OF_A_CELL = 64  # rows that k-means looks at for each cell
ITERATIONS = 10  # of k-means
GROWTH = 16  # cells are made anew when there are so many times more rows than they were made for
SAMPLE = 256  # rows by which the number of visited cells is chosen
NEAREST = 10  # of their nearest rows are looked for
TARGET = 0.98


def faiss_module() -> Any:
    """Return faiss. UserError that says what to install."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("a gallery needs faiss: pip install 'partial_fc[gallery]'") from error
    return faiss


class Index:
    """An index of unit rows of `dimension` numbers, by their numbers; centres: of the cells, None for exact search."""

    def __init__(self, dimension: int, centres: Floats | None = None, probes: int = 1) -> None:
        self._faiss = faiss_module()
        self.dimension = dimension
        self.cells = 0 if centres is None else len(centres)
        self.probes = probes
        flat = self._faiss.IndexFlatIP(dimension)
        if centres is None:
            self._index: Any = self._faiss.IndexIDMap(flat)
        else:
            flat.add(centres)
            self._index = self._faiss.IndexIVFFlat(flat, dimension, len(centres), self._faiss.METRIC_INNER_PRODUCT)
            self._index.train(centres)  # the centres are there, so this computes nothing
        self._flat = flat  # faiss holds a bare pointer to it

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def reserve(self, rows_of_cells: npt.NDArray[np.int64]) -> None:
        """Take the memory for so many rows of each cell `[cells]` at once; lists that grow take up to twice as much."""
        lists = self._index.invlists
        for cell, count in enumerate(rows_of_cells.tolist()):
            lists.resize(cell, count)
            lists.resize(cell, 0)

    def add(self, rows: Rows) -> None:
        """Add rows, whose cells are known if there are cells."""
        if not len(rows):
            return
        embeddings = np.ascontiguousarray(rows.embeddings)
        numbers = np.ascontiguousarray(rows.numbers)
        if not self.cells:
            self._index.add_with_ids(embeddings, numbers)
            return
        cells = rows.cells.astype(np.int64)
        if cells.min() < 0 or cells.max() >= self.cells:
            raise UserError("a row of the gallery is in no cell of its index; restore the gallery from a copy")
        pointer = self._faiss.swig_ptr
        self._index.add_core(len(numbers), pointer(embeddings), pointer(numbers), pointer(cells))

    def remove(self, numbers: Integers) -> None:
        """Remove the rows of these numbers."""
        if len(numbers):
            self._index.remove_ids(np.ascontiguousarray(numbers))

    def search(self, queries: Floats, depth: int, wider: int = 1) -> tuple[Floats, Integers]:
        """Return cosines and row numbers `[m, depth]` for unit queries `[m, D]`, best first; −1 where none is left.

        wider: visit so many times more cells than usual.
        """
        options: dict[str, Any] = {}
        if self.cells:
            probes = min(self.cells, self.probes * wider)
            options["params"] = self._faiss.SearchParametersIVF(nprobe=probes)
        cosines, numbers = self._index.search(np.ascontiguousarray(queries), depth, **options)
        return cosines, numbers


def make_centres(sample: Floats, count: int, seed: int = 0) -> Floats:
    """Return `count` centres `[count, D]` of unit length for the rows of a sample."""
    faiss = faiss_module()
    means = faiss.Kmeans(
        sample.shape[1],
        count,
        niter=ITERATIONS,
        spherical=True,
        seed=seed,
        max_points_per_centroid=ROWS_OF_A_CELL,
        min_points_per_centroid=1,
    )
    means.train(np.ascontiguousarray(sample))
    centres: Floats = np.ascontiguousarray(means.centroids, dtype=np.float32)
    return centres


def assign(centres: Floats, embeddings: Floats) -> npt.NDArray[np.int32]:
    """Return the cell of each of the embeddings `[n, D]`."""
    flat = faiss_module().IndexFlatIP(centres.shape[1])
    flat.add(centres)
    cells: npt.NDArray[np.int32] = flat.search(np.ascontiguousarray(embeddings), 1)[1][:, 0].astype(np.int32)
    return cells


def choose_probes(index: Index, queries: Floats, exact: Integers) -> tuple[int, float]:
    """Set and return the number of visited cells that finds TARGET of the `exact` nearest rows, and the share found.

    queries [m, D]: rows of the index. exact [m, NEAREST]: the numbers of their nearest other rows; −1 where there are
    fewer.
    """
    index.probes = 1
    while True:
        _, found = index.search(queries, exact.shape[1] + 1)
        hits = ((found[:, None, :] == exact[:, :, None]) & (exact[:, :, None] >= 0)).any(2).sum()
        recall = float(hits / max(1, (exact >= 0).sum()))
        if recall >= TARGET or index.probes >= index.cells:
            return index.probes, recall
        index.probes = min(index.cells, 2 * index.probes)


def exact_neighbours(queries: Floats, own: Integers, batches: Sequence[Rows] | Any) -> Integers:
    """Return the numbers `[m, NEAREST]` of the rows nearest to `queries` `[m, D]`, without the row `own` itself."""
    best = np.full((len(queries), NEAREST), -np.inf, dtype=np.float32)
    numbers = np.full((len(queries), NEAREST), -1, dtype=np.int64)
    for rows in batches:
        cosines = queries @ rows.embeddings.T
        cosines[own[:, None] == rows.numbers[None, :]] = -np.inf
        every = np.concatenate((best, cosines), axis=1)
        of_all = np.concatenate((numbers, np.broadcast_to(rows.numbers, cosines.shape)), axis=1)
        chosen = np.argpartition(-every, NEAREST - 1, axis=1)[:, :NEAREST]
        best = np.take_along_axis(every, chosen, axis=1)
        numbers = np.take_along_axis(of_all, chosen, axis=1)
    return np.where(np.isfinite(best), numbers, -1)
