"""The commands `partial-fc gallery ...`: enrol identities, search for them. They run in one process.

partial-fc gallery build people --run runs/mine --data FOLDER
partial-fc gallery calibrate people --split holdout --far 1e-3
partial-fc gallery add people --images ada1.jpg ada2.jpg --identity Ada
partial-fc gallery search people photo.jpg
partial-fc gallery remove people Ada

Images are embedded by the backbone of `--run`, by default the one that the gallery was built with; `--embeddings` takes
what `partial-fc embed` wrote.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from partial_fc.training.cli.gallery_sources import SHOWN, Source, add_sources, open_backbone, open_source
from partial_fc.training.cli.parser import CommandParser, add_traceback
from partial_fc.training.data import UnreadableImage
from partial_fc.training.data.safe_files import read_whole
from partial_fc.training.embedding import Embedder
from partial_fc.training.embedding_files import valid_text
from partial_fc.training.enrol_data import (
    first_of_each,
    joined,
    labels_of,
    some_identities,
)
from partial_fc.training.errors import UserError
from partial_fc.training.export.export import config_of_run
from partial_fc.training.files import replacing
from partial_fc.training.gallery import Answer, Enrolment, Gallery
from partial_fc.training.gallery.calibration import smallest_rate
from partial_fc.training.run import CONFIG, RunFolder, check_new_file
from partial_fc.training.run_data import data_of_run
from partial_fc.training.whole_numbers import whole

USAGE = """usage: partial-fc gallery COMMAND GALLERY ...

commands:
{commands}

`partial-fc gallery COMMAND --help` explains every setting.
"""


def gallery_command(arguments: list[str]) -> int:
    """`partial-fc gallery COMMAND`: run one of COMMANDS; return its exit code. Raises UserError for mistakes."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, (text, _) in COMMANDS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] not in COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; choose one of: {', '.join(COMMANDS)}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "gallery runs in one process; start it without a launcher (embed a large data set on several ranks by "
            "`partial-fc embed`, and give it with --embeddings)"
        )
    COMMANDS[arguments[0]][1](arguments[1:])
    return 0


def _parser(name: str, description: str) -> CommandParser:
    parser = CommandParser(f"gallery {name}", description)
    parser.add_argument("gallery", metavar="GALLERY", help="folder of the gallery")
    return parser


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--far",
        type=float,
        default=None,
        metavar="SHARE",
        help="set the threshold at which this share of comparisons with another identity is accepted, such as 1e-4",
    )
    parser.add_argument(
        "--fpir",
        type=float,
        default=None,
        metavar="SHARE",
        help="instead: at which this share of searches by identities that are not enrolled finds somebody",
    )


# ------------------------------------------------------------------------------------------------ build, add, remove


def build_command(arguments: list[str]) -> None:
    """`partial-fc gallery build GALLERY --run RUN --data D`: make a gallery of a data set."""
    parser = _parser("build", "Make a gallery of the identities of a data set, or of embeddings.")
    add_sources(parser)
    parser.add_argument(
        "--per_identity",
        choices=("mean", "all"),
        default="mean",
        help="keep the mean of an identity's embeddings (default), or all of them",
    )
    parser.add_argument(
        "--index",
        choices=("auto", "exact", "codes"),
        default="auto",
        help="how it is searched: exactly, or by codes; auto (default) takes codes from 100,000 embeddings on",
    )
    parser.add_argument(
        "--no_thumbnails", action="store_true", help="do not keep a small picture beside each embedding"
    )
    _add_calibration(parser)
    options = parser.parse_args(arguments)
    source = open_source(options, None)
    with_thumbnail = _thumbnails(options.per_identity, options.no_thumbnails)
    gallery = Gallery.build_from(
        options.gallery,
        source.enrolments(None, with_thumbnail),
        dimension=source.dimension,
        backbone=source.backbone,
        per_identity=options.per_identity,
        preprocessing=source.preprocessing,
        source=source.where,
        index=options.index,
    )
    source.report_unreadable()
    print(_described(gallery))
    if options.far is not None or options.fpir is not None:
        _calibrate(gallery, source, options)
    elif gallery.threshold is None:
        print(
            f"it has no threshold yet, so every search finds somebody: partial-fc gallery calibrate {options.gallery} "
            f"{_calibrated_by(source)}"
        )


def _calibrated_by(source: Source) -> str:
    """Return options for `calibrate`: the identities that the run has held out, with a FAR that so many allow."""
    if source.where is not None and (Path(source.where) / CONFIG).is_file():
        with contextlib.suppress(UserError, OSError):  # such as data that have moved
            run = RunFolder(source.where)
            config = config_of_run(run)
            for name, dataset in data_of_run(run, config, training=False).evaluation.items():
                labels = dataset.labels.numpy()
                labels = labels[some_identities(labels)]
                least = smallest_rate(len(labels) * (len(np.unique(labels)) - 1))
                if name != "seen" and least is not None:  # "seen" are new images of identities that were trained on
                    return f"--split {name} --far {max(least, 1e-4):g}"
    return "--data HELD_OUT --far 1e-3, by identities that were not trained on"


def _thumbnails(per_identity: str, none: bool) -> Callable[[str], bool]:
    """Return whether an image of an identity gets a thumbnail: of means the first of each identity."""
    if none:
        return lambda name: False
    return first_of_each() if per_identity == "mean" else lambda name: True


def _described(gallery: Gallery) -> str:
    return f"{gallery.folder}: {len(gallery):,} identities ({gallery.per_identity} of their images), {gallery.index}"


def add_command(arguments: list[str]) -> None:
    """`partial-fc gallery add GALLERY`: enrol more identities, or more images of them."""
    parser = _parser("add", "Enrol the identities of a data set, of embeddings, or images of one identity.")
    add_sources(parser)
    parser.add_argument("--images", nargs="+", default=None, metavar="FILE", help="instead: images of one identity")
    parser.add_argument("--identity", default=None, metavar="NAME", help="name of the identity of --images")
    parser.add_argument(
        "--existing",
        choices=("refuse", "extend", "replace"),
        default="refuse",
        help="what to do about identities that are enrolled: refuse all (default), add the images to theirs, or "
        "replace theirs",
    )
    options = parser.parse_args(arguments)
    gallery = Gallery.open(options.gallery)
    if (options.images is None) != (options.identity is None):
        raise UserError("give --images and --identity together")
    if options.images is not None:
        if options.data is not None or options.embeddings is not None:
            raise UserError("give either --images, --data or --embeddings")
        embedder, _ = open_backbone(options, gallery)
        enrolments: Iterator[Enrolment] = iter([_enrolment_of_files(embedder, options.images, options.identity)])
        names = [options.identity]
        source = None
    else:
        source = open_source(options, gallery)
        source.check(gallery)
        names = source.names()
        enrolments = source.enrolments(None, _thumbnails(gallery.per_identity, False))
    if options.existing == "refuse":
        gallery.check_new(names)  # before anything is embedded
    alike: list[str] = []
    gallery.add_from(_looked_up(gallery, enrolments, alike), existing=options.existing)
    if source is not None:
        source.report_unreadable()
    for line in alike[:SHOWN]:
        print(line)
    if len(alike) > SHOWN:
        print(f"and {len(alike) - SHOWN:,} more like these")
    print(_described(gallery))


def _looked_up(gallery: Gallery, enrolments: Iterator[Enrolment], alike: list[str]) -> Iterator[Enrolment]:
    """Yield the enrolments; note in `alike` identities that look like others that are enrolled."""
    noted: set[tuple[str, str]] = set()
    for enrolment in enrolments:
        if gallery.threshold is not None:
            for name, answer in zip(enrolment.identities, gallery.search(enrolment.embeddings, 1), strict=True):
                found = answer.identity
                if found is not None and found != name and (name, found) not in noted:
                    noted.add((name, found))
                    alike.append(
                        f"note: an image of {name!r} looks like {found!r}, enrolled before (cosine "
                        f"{answer.matches[0].cosine:.3f}); are they the same?"
                    )
        yield enrolment


def _enrolment_of_files(embedder: Embedder, files: Sequence[str], identity: str) -> Enrolment:
    images = [_image_file(path) for path in files]
    embeddings = _embedded(embedder, images, files)
    pictures = [valid_text(str(Path(path).absolute())) for path in files]
    return Enrolment(embeddings, [identity] * len(files), pictures, [_thumbnail(embedder, each) for each in images])


def _thumbnail(embedder: Embedder, image: bytes) -> bytes:
    from partial_fc.training.data.augment import to_float
    from partial_fc.training.enrol_data import thumbnail_of

    return thumbnail_of(to_float(embedder.decode(image)[None])[0])


def _image_file(path: str) -> bytes:
    try:
        return read_whole(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"the image {path} cannot be read: {reason}") from error


def _embedded(embedder: Embedder, images: Sequence[bytes], names: Sequence[str]) -> npt.NDArray[np.float32]:
    try:
        return embedder.embed(images, names)
    except UnreadableImage as error:
        raise UserError(f"the image {error.path} cannot be read: {error.reason}") from error


def remove_command(arguments: list[str]) -> None:
    """`partial-fc gallery remove GALLERY NAME ...`: remove identities."""
    parser = _parser("remove", "Remove identities: all that are named, or none.")
    parser.add_argument("identities", nargs="*", metavar="NAME", help="names of identities")
    parser.add_argument("--names", default=None, metavar="FILE", help="a text file with one name a line")
    add_traceback(parser)
    options = parser.parse_intermixed_args(arguments)  # names may come after options
    names = list(options.identities)
    if options.names is not None:
        try:
            names += [line for line in Path(options.names).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--names {options.names} cannot be read: {error}") from error
    if not names:
        raise UserError("no identity is named; give names, or a file of them with --names")
    gallery = Gallery.open(options.gallery)
    gallery.remove(names)
    print(f"{len(set(names)):,} removed; {_described(gallery)}")


# ------------------------------------------------------------------------------------------------ calibrate, search


def calibrate_command(arguments: list[str]) -> None:
    """`partial-fc gallery calibrate GALLERY --data D --far 1e-4`: set the threshold."""
    parser = _parser(
        "calibrate",
        "Set the threshold by a data set that was not trained on; or by hand. Of a large data set 20,000 images of "
        "whole identities are used.",
    )
    add_sources(parser)
    _add_calibration(parser)
    parser.add_argument("--threshold", type=float, default=None, metavar="COSINE", help="instead: set this threshold")
    options = parser.parse_args(arguments)
    gallery = Gallery.open(options.gallery)
    if options.threshold is not None:
        if options.far is not None or options.fpir is not None:
            raise UserError("give one of --far, --fpir and --threshold")
        gallery.set_threshold(options.threshold)
        print(f"{options.gallery}: the threshold is {options.threshold}")
        return
    if options.far is None and options.fpir is None:
        raise UserError("give --far, --fpir or --threshold")
    source = open_source(options, gallery)
    source.check(gallery)
    _calibrate(gallery, source, options)


def _calibrate(gallery: Gallery, source: Source, options: argparse.Namespace) -> None:
    if options.far is not None and options.fpir is not None:
        raise UserError("give either --far or --fpir")
    chosen = some_identities(labels_of(source.names()))
    images = joined(source.enrolments(chosen, lambda name: False), source.dimension)
    print(gallery.calibrate(images.embeddings, images.identities, options.far, fpir=options.fpir).summary())


def search_command(arguments: list[str]) -> None:
    """`partial-fc gallery search GALLERY IMAGE ...`: who is it?"""
    parser = _parser("search", "Find the identities nearest to images, or nobody if none reaches the threshold.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    add_sources(parser)
    parser.add_argument("-k", type=whole, default=5, help="identities to show for each image (default 5)")
    parser.add_argument(
        "--threshold", type=float, default=None, metavar="COSINE", help="use this one instead of the gallery's"
    )
    parser.add_argument(
        "--results", default=None, metavar="FILE", help="write the answers to this new file, a JSON object a line"
    )
    options = parser.parse_intermixed_args(arguments)  # images may come after options
    if options.k < 1:
        raise UserError(f"-k is {options.k}; give at least 1")
    gallery = Gallery.open(options.gallery)
    if not len(gallery):
        raise UserError(f"the gallery {options.gallery} is empty; add identities: partial-fc gallery add")
    if bool(options.images) == (options.data is not None or options.embeddings is not None):
        raise UserError("give image files, or a data set with --data, or embeddings with --embeddings")
    if options.results is not None:
        check_new_file(Path(options.results), "--results")
    if options.images:
        embedder, _ = open_backbone(options, gallery)
        embeddings = _embedded(embedder, [_image_file(path) for path in options.images], options.images)
        queries: Iterator[Enrolment] = iter([Enrolment(embeddings, [""] * len(embeddings), options.images)])
        source = None
    else:
        source = open_source(options, gallery)
        source.check(gallery)
        queries = source.enrolments(None, lambda name: False)
    _answer(gallery, queries, options, labelled=source is not None)
    if source is not None:
        source.report_unreadable()


def _answer(gallery: Gallery, queries: Iterator[Enrolment], options: argparse.Namespace, labelled: bool) -> None:
    """Search for all queries; print the answers, or of a data set how many were right, and write them if asked."""
    if options.results is not None:
        Path(options.results).parent.mkdir(parents=True, exist_ok=True)
    writing = contextlib.nullcontext() if options.results is None else replacing(Path(options.results))
    with writing as file:
        counts = _answers(gallery, queries, options, labelled, file)
    if labelled:
        print(_summary(counts))


def _answers(
    gallery: Gallery, queries: Iterator[Enrolment], options: argparse.Namespace, labelled: bool, file: IO[bytes] | None
) -> dict[str, int]:
    """Print and write the answers; return how many of each kind there are."""
    counts = dict.fromkeys(("right", "wrong", "nobody", "stranger found", "stranger refused"), 0)
    enrolled = set(gallery.identities)
    for enrolment in queries:
        answers = gallery.search(enrolment.embeddings, options.k)
        for place, answer in enumerate(answers):
            if options.threshold is not None:
                answer = Answer(answer.matches, options.threshold)
            picture = None if enrolment.pictures is None else enrolment.pictures[place]
            if labelled:
                counts[_outcome(answer, enrolment.identities[place], enrolled)] += 1
            else:
                print(_line(picture, answer))
            if file is not None:
                record = _record(picture, enrolment.identities[place], answer)
                file.write(json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
    return counts


def _outcome(answer: Answer, identity: str, enrolled: set[str]) -> str:
    if identity not in enrolled:
        return "stranger refused" if answer.nobody else "stranger found"
    return "nobody" if answer.nobody else "right" if answer.identity == identity else "wrong"


def _summary(counts: dict[str, int]) -> str:
    known = counts["right"] + counts["wrong"] + counts["nobody"]
    strangers = counts["stranger found"] + counts["stranger refused"]
    lines = [f"{known + strangers:,} searches"]
    if known:
        lines.append(
            f"  {known:,} of enrolled identities: {counts['right'] / known:.2%} right, {counts['wrong'] / known:.2%} "
            f"another, {counts['nobody'] / known:.2%} nobody"
        )
    if strangers:
        lines.append(
            f"  {strangers:,} of others: {counts['stranger refused'] / strangers:.2%} nobody, "
            f"{counts['stranger found'] / strangers:.2%} found somebody"
        )
    return "\n".join(lines)


def _line(picture: str | None, answer: Answer) -> str:
    """Return the answer to one image: the identity or nobody, then all that was found."""
    found = ", ".join(f"{match.identity} {match.cosine:.3f}" for match in answer.matches)
    threshold = "no threshold" if answer.threshold is None else f"threshold {answer.threshold:.3f}"
    return f"{picture}: {'nobody' if answer.nobody else answer.identity} ({threshold}; {found})"


def _record(picture: str | None, identity: str, answer: Answer) -> dict[str, Any]:
    return {
        "image": picture,
        **({"of": identity} if identity else {}),
        "identity": answer.identity,
        "nobody": answer.nobody,
        "threshold": answer.threshold,
        "matches": [
            {"identity": match.identity, "cosine": round(match.cosine, 6), "picture": match.picture}
            for match in answer.matches
        ],
    }


def info_command(arguments: list[str]) -> None:
    """`partial-fc gallery info GALLERY`: what it is."""
    parser = _parser("info", "What a gallery holds, how it is searched, and its threshold.")
    parser.add_argument("--identities", action="store_true", help="print the name of every identity")
    add_traceback(parser)
    options = parser.parse_args(arguments)
    gallery = Gallery.open(options.gallery)
    manifest = gallery.manifest
    print(_described(gallery))
    print(f"backbone {manifest.backbone}" + ("" if manifest.source is None else f" ({manifest.source})"))
    print(
        f"embeddings of {manifest.dimension} numbers; "
        + ", ".join(f"{k} {v}" for k, v in manifest.preprocessing.items())
    )
    if manifest.threshold is None:
        print("no threshold")
    elif manifest.calibration is None:
        print(f"threshold {manifest.threshold}, set by hand")
    else:
        found = manifest.calibration
        print(
            f"threshold {manifest.threshold:.4f}, by {found['images']:,} images of {found['identities']:,} identities"
        )
    if options.identities:
        print("\n".join(sorted(gallery.identities)))


COMMANDS: dict[str, tuple[str, Callable[[list[str]], None]]] = {
    "build": ("make a gallery of a data set, or of embeddings", build_command),
    "add": ("enrol more identities, or more images of them", add_command),
    "remove": ("remove identities", remove_command),
    "calibrate": ("set the threshold for a false accept rate", calibrate_command),
    "search": ("find the identities nearest to images, or nobody", search_command),
    "info": ("what a gallery holds", info_command),
}
"""name -> (line of help, function)"""
