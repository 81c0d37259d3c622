"""The index of a gallery's rows, by faiss on the CPU: exact, or by short codes where there are many rows.

fewer than FLAT_BELOW rows    every query is compared with every row
more                          every query is compared with a code of every row, 4 bits for each 4 numbers (product
                              quantisation after a random rotation; Jégou et al. 2011, André et al. 2017), and the
                              `candidates` rows with the best codes are compared exactly

    row [D] ── rotate ──> [P], P a multiple of 8 ── the nearest of 16 centres for each 4 numbers ──> code [P / 8] bytes

Codes, and neither cells (IVF) nor a graph (HNSW): embeddings of recognisers have few clusters, so that a query at a
cosine of 0.5 to its identity is often not in the cell next to it, and most cells have to be visited to find it
(docs/embeddings-and-galleries.md has figures); and faiss cannot remove rows from a graph.

So many candidates are compared that TARGET of SAMPLE queries find their nearest row, which is measured when the codes
are made. The queries are drawn at a cosine of SIMILAR to a row, where strangers are. Cosines are always exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from partial_fc.training.errors import UserError
from partial_fc.training.gallery.segments import Codes, Floats, Integers, Rows

FLAT_BELOW = 100_000  # rows that are compared one by one
GROWTH = 16  # codes are made anew when there are so many times more rows than they were made for
TRAINED_BY = 20_000  # rows that centres are computed from
PART = 4  # numbers of a part of a row that has centres of its own
CENTRES = 16  # for each part
SAMPLE = 512  # queries by which the number of candidates is chosen
SIMILAR = 0.3  # cosine of a query to the row that it is drawn at
MIXED = 64  # rows whose sum, with random signs, is the rest of a query
TARGET = 0.99
FEWEST = 64  # candidates
BLOCK = 16_384  # rows that are compared at a time where all are
COMPARED_BYTES = 64 << 20  # of candidates that are compared at a time

Fetch = Callable[[Integers], Floats]
"""Returns the embeddings `[n, D]` of the rows of some numbers `[n]`."""


def faiss_module() -> Any:
    """Return faiss. UserError that says what to install."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise UserError("a gallery needs faiss: pip install 'partial_fc[gallery]'") from error
    return faiss


@dataclass
class Coder:
    """Makes codes: rotation float32 `[D, P]` with orthonormal rows, centres float32 `[P / 4, 16, 4]`."""

    rotation: Floats
    centres: Floats

    @classmethod
    def of(cls, sample: Floats, seed: int = 0) -> Coder:
        """Return a coder for rows like those of `sample` `[n, D]`."""
        width = sample.shape[1]
        if len(sample) < CENTRES:  # faiss wants a row for each centre
            sample = np.resize(sample, (CENTRES, width))
        padded = -(-width // (2 * PART)) * 2 * PART
        gaussian = np.random.default_rng(seed).standard_normal((padded, padded))
        rotation = np.ascontiguousarray(np.linalg.qr(gaussian)[0][:width], dtype=np.float32)
        index = _product_index(padded)
        index.pq.cp.seed = seed
        index.pq.cp.min_points_per_centroid = 1  # no warning about small samples
        index.train(np.ascontiguousarray(sample @ rotation))
        centres = faiss_module().vector_to_array(index.pq.centroids)
        return cls(rotation, centres.reshape(padded // PART, CENTRES, PART))

    @property
    def size(self) -> int:
        """Bytes of a code."""
        return self.rotation.shape[1] // (2 * PART)

    def rotated(self, embeddings: Floats) -> Floats:
        """Return embeddings `[n, D]` as `[n, P]`; products stay the same."""
        return np.ascontiguousarray(embeddings @ self.rotation)

    def codes(self, embeddings: Floats) -> Codes:
        """Return the codes of embeddings `[n, D]`, uint8 `[n, size]`."""
        index = self.empty_index()  # faiss frees its quantizer with it
        codes: Codes = index.pq.compute_codes(self.rotated(embeddings))
        return codes

    def empty_index(self) -> Any:
        """Return an IndexPQ with these centres, and no rows."""
        index = _product_index(self.rotation.shape[1])
        faiss_module().copy_array_to_vector(np.ascontiguousarray(self.centres).ravel(), index.pq.centroids)
        index.is_trained = True
        return index


def _product_index(width: int) -> Any:
    faiss = faiss_module()
    return faiss.IndexPQ(width, width // PART, 4, faiss.METRIC_INNER_PRODUCT)


class Index:
    """An index of unit rows of `dimension` numbers, known by their rising numbers.

    coder: makes codes; None for exact search. fetch: gives the rows that are compared exactly.
    """

    def __init__(self, dimension: int, fetch: Fetch, coder: Coder | None = None, candidates: int = FEWEST) -> None:
        faiss = faiss_module()
        self.dimension = dimension
        self.coder = coder
        self.candidates = candidates
        self.numbers: Integers = np.empty(0, dtype=np.int64)
        self._fetch = fetch
        self._index: Any = faiss.IndexFlatIP(dimension) if coder is None else faiss.IndexPQFastScan(coder.empty_index())

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, rows: Rows) -> None:
        """Add rows, whose numbers are above those that are here."""
        embeddings = np.ascontiguousarray(rows.embeddings)
        if len(rows):
            self._index.add(embeddings if self.coder is None else self.coder.rotated(embeddings))
            self.numbers = np.concatenate((self.numbers, rows.numbers))

    def fill(self, numbers: Integers, codes: Codes) -> None:
        """Put rows of known codes `[n, size]` into an index that is empty."""
        assert self.coder is not None and not len(self)
        faiss = faiss_module()
        index = self.coder.empty_index()
        faiss.copy_array_to_vector(np.ascontiguousarray(codes).ravel(), index.codes)
        index.ntotal = len(codes)
        self._index = faiss.IndexPQFastScan(index)
        self.numbers = numbers

    def remove(self, numbers: Integers) -> None:
        """Remove the rows of these numbers, which are here."""
        if len(numbers):
            places = np.searchsorted(self.numbers, numbers)
            self._index.remove_ids(places)  # those behind move up
            self.numbers = np.delete(self.numbers, places)

    def search(self, queries: Floats, depth: int, wider: int = 1) -> tuple[Floats, Integers]:
        """Return cosines and row numbers `[m, depth]` for unit queries `[m, D]`, best first; −1 where none is left.

        wider: compare so many times more candidates than usual.
        """
        depth = min(depth, len(self))
        if self.coder is None:
            cosines, places = self._index.search(np.ascontiguousarray(queries), depth)
            return cosines, self._numbers_at(places)
        candidates = max(wider * self.candidates, 4 * depth)
        if candidates >= len(self):
            return self._compared_with_all(queries, depth)
        step = max(1, COMPARED_BYTES // (4 * self.dimension * candidates))
        parts = [self._compared(queries[a : a + step], depth, candidates) for a in range(0, len(queries), step)]
        return np.concatenate([cosines for cosines, _ in parts]), np.concatenate([numbers for _, numbers in parts])

    def _compared(self, queries: Floats, depth: int, candidates: int) -> tuple[Floats, Integers]:
        assert self.coder is not None
        _, places = self._index.search(self.coder.rotated(queries), candidates)
        numbers = self._numbers_at(places)
        unique, back = np.unique(numbers, return_inverse=True)
        rows = self._fetch(unique[unique >= 0])[back.reshape(numbers.shape) - int(unique[0] < 0)]
        cosines = np.einsum("mcd,md->mc", rows, queries)
        cosines[numbers < 0] = -np.inf
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :depth]
        return np.take_along_axis(cosines, best, 1), np.take_along_axis(numbers, best, 1)

    def _compared_with_all(self, queries: Floats, depth: int) -> tuple[Floats, Integers]:
        """Return the best of all rows; faiss leaves out rows with the worst codes."""
        best = np.empty((len(queries), 0), dtype=np.float32)
        numbers = np.empty((len(queries), 0), dtype=np.int64)
        for start in range(0, len(self), BLOCK):
            here = self.numbers[start : start + BLOCK]
            best = np.concatenate((best, queries @ self._fetch(here).T), axis=1)
            numbers = np.concatenate((numbers, np.broadcast_to(here, (len(queries), len(here)))), axis=1)
            kept = np.argsort(-best, axis=1, kind="stable")[:, :depth]
            best, numbers = np.take_along_axis(best, kept, 1), np.take_along_axis(numbers, kept, 1)
        return best, numbers

    def _numbers_at(self, places: Integers) -> Integers:
        return np.where(places < 0, -1, self.numbers[places.clip(0)])


def similar_queries(rows: Floats, others: Floats, seed: int = 0) -> Floats:
    """Return a unit query `[m, D]` at cosine SIMILAR to each of the unit `rows` `[m, D]`.

    The rest of a query has the variances of the embeddings: it is a sum of `others` `[n, D]` with random signs.
    """
    rng = np.random.default_rng(seed)
    signs = rng.choice(np.array([-1, 1], dtype=np.float32), (len(rows), min(MIXED, len(others))))
    rest = signs @ others[rng.permutation(len(others))[: signs.shape[1]]]
    rest -= np.einsum("nd,nd->n", rest, rows)[:, None] * rows
    rest /= np.linalg.norm(rest, axis=1, keepdims=True).clip(1e-6)
    queries: Floats = (SIMILAR * rows + (1 - SIMILAR**2) ** 0.5 * rest).astype(np.float32)
    return queries


def exact_nearest(queries: Floats, batches: Iterable[Rows]) -> Floats:
    """Return the cosine of each of `queries` `[m, D]` to its nearest row, by comparison with all rows."""
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    for rows in batches:
        best = np.maximum(best, (queries @ rows.embeddings.T).max(1))
    return best


def choose_candidates(index: Index, queries: Floats, nearest: Floats) -> tuple[int, float]:
    """Set and return the number of candidates at which TARGET of `queries` `[m, D]` find a row as near as `nearest`.

    nearest: cosines of the nearest rows `[m]`. Also returns the share found.
    """
    index.candidates = min(FEWEST, len(index))
    while True:
        cosines, _ = index.search(queries, 1)
        recall = float((cosines[:, 0] >= nearest - 1e-5).mean())
        if recall >= TARGET or index.candidates >= len(index):
            return index.candidates, recall
        index.candidates = min(len(index), index.candidates * 3 // 2)
