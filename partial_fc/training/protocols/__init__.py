"""Evaluation protocols of the literature: functions from embeddings to figures, and tasks that run them on files.

    verify_embeddings      pairs of images, one identity or two: LFW, CFP-FP, AgeDB ten-fold accuracy, TAR at FAR
    score_templates        templates of images and video frames: IJB-B, IJB-C       TAR at FAR from 1e-6, scores
    identify_embeddings    probes against a gallery and distractors: 1:N, MegaFace  rank-k, DIR at FPIR
    retrieve_embeddings    queries against a gallery: products, re-identification   CMC, mAP, Recall@k, mAP@R

All of them work in the same way. Every rank holds all `n` embeddings of `D` numbers:

    embeddings [n, D]   ── scale to unit length ──>  each rank takes a share of the work, in blocks and tiles
    partial results     ── reduce over ranks ──>     the same `Result` on every rank

`rank`, `world` and `reduce` are those of `evaluation.evaluate_embeddings`. `reduce` also receives float tensors; each
entry of these is set by one rank and is 0 on the others, so the sum is exact.

Where things are:

    verification_bin.py, templates.py, identification.py, retrieval.py    one protocol each
    result.py         `Result`, the form in which every protocol returns its figures
    pairs.py          scores of listed pairs, for verification and templates
    tiling.py         how work is shared among ranks, for identification and retrieval
    pickled.py        reads the pickles in `.bin` files without running them
    images.py         data sets of listed images, alignment by five points, labels from file names
    tasks.py          a protocol on one data set, ready to be measured repeatedly
    task_files.py     tasks from files and from the settings of a run

A new protocol is one file with its function, a subclass of `Task` in tasks.py, and a function in task_files.py that
reads its files. Its command line is in cli/protocols.py, its entry in the settings is a field of `EvaluationConfig`.
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
