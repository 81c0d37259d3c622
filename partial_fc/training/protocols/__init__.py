"""Evaluation protocols of the field, each a function on embeddings; `partial_fc.training.cli.protocols` has the commands.

    verify_embeddings      pairs of images, same or not: LFW, CFP-FP, AgeDB            ten-fold accuracy, TAR at FAR
    score_templates        templates of images and video frames: IJB-B, IJB-C          TAR at FAR from 1e-6, scores of every pair
    identify_embeddings    probes against a gallery and distractors: 1:N, MegaFace     rank-k, DIR at FPIR
    retrieve_embeddings    queries against a gallery: products, re-identification      CMC, mAP, Recall@k, R-precision, mAP@R

All of them, for `n` embeddings of `D` numbers that every rank holds:

    embeddings [n, D]   ── unit length ──>   a share of the work for each rank   ── blocks, tiles ──>   counts, or a number of each row
    sum over ranks      ── reduce ──>        the same `Result` on every rank

`rank`, `world` and `reduce` are those of `evaluation.evaluate_embeddings`; `reduce` is also given float tensors, in which each entry is
filled in by one rank and 0 on the others, so that their sum is exact.
"""

from partial_fc.training.protocols.identification import identify_embeddings
from partial_fc.training.protocols.result import Result
from partial_fc.training.protocols.retrieval import retrieve_embeddings
from partial_fc.training.protocols.templates import (
    Templates,
    pool_templates,
    read_pairs,
    read_templates,
    score_templates,
)
from partial_fc.training.protocols.verification_bin import PairImages, read_pair_images, verify_embeddings

__all__ = [
    "PairImages",
    "Result",
    "Templates",
    "identify_embeddings",
    "pool_templates",
    "read_pair_images",
    "read_pairs",
    "read_templates",
    "retrieve_embeddings",
    "score_templates",
    "verify_embeddings",
]
