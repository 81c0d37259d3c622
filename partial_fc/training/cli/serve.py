"""The command `partial-fc serve`: a gallery behind a local web page and a small HTTP interface.

partial-fc serve runs/quickstart --gallery people
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from partial_fc.training.cli.parser import CommandParser, add_checkpoint, add_traceback, check_at_least
from partial_fc.training.data.safe_files import MAX_IMAGE_BYTES
from partial_fc.training.embedding import MAX_PIXELS, Embedder
from partial_fc.training.errors import UserError
from partial_fc.training.export.export import config_of_run
from partial_fc.training.gallery import Gallery
from partial_fc.training.run import CONFIG, RunFolder
from partial_fc.training.serve.duplicates import Duplicates
from partial_fc.training.serve.recogniser import Recogniser
from partial_fc.training.serve.server import (
    TOKEN_VARIABLE,
    address_of,
    bind,
    check_installed,
    make_server,
    token_for,
)
from partial_fc.training.serve.uploads import Limits
from partial_fc.training.whole_numbers import whole


def serve_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "serve",
        "Serve a gallery: a page on which a person searches by an image, compares two and looks at likely duplicates, "
        "and the same as an HTTP interface. Only programs of this machine can reach it, unless --host says otherwise; "
        f"then a token is needed: of --token_file or {TOKEN_VARIABLE}, or a new one that is printed.",
    )
    parser.add_argument("source", metavar="RUN", help="folder of a run, or one that export-backbone wrote")
    parser.add_argument("--gallery", required=True, metavar="DIR", help="the gallery, of `partial-fc gallery build`")
    add_checkpoint(parser)
    parser.add_argument(
        "--audit", default=None, metavar="DIR", help="folder of `partial-fc audit` (default RUN/audit, if there is one)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=whole, default=8000, help="port (default 8000); 0 for any that is free")
    parser.add_argument("--token_file", default=None, metavar="FILE", help="file with the token that requests carry")
    parser.add_argument(
        "--writable", action="store_true", help="let requests add and remove identities (default: they only search)"
    )
    limits = Limits()
    parser.add_argument(
        "--max_bytes", type=whole, default=limits.bytes, help=f"most bytes of an image (default {limits.bytes})"
    )
    parser.add_argument(
        "--max_pixels", type=whole, default=limits.pixels, help=f"most pixels of an image (default {limits.pixels})"
    )
    add_traceback(parser)
    return parser


def serve_command(arguments: list[str]) -> None:
    """`partial-fc serve RUN --gallery DIR`: answer requests until asked to stop. Raises UserError for mistakes."""
    options = serve_parser().parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("serve runs in one process; start it without a launcher")
    for name, most in (("max_bytes", MAX_IMAGE_BYTES), ("max_pixels", MAX_PIXELS)):
        check_at_least(options, name, 1)
        if getattr(options, name) > most:
            raise UserError(f"--{name} is {getattr(options, name)}; at most {most} are read of any image")
    check_installed()
    from partial_fc.training.serve.app import make_app

    listener = bind(options.host, options.port)
    with listener:
        token, new = token_for(listener, options.token_file)
        gallery = Gallery.open(options.gallery)
        limits = Limits(options.max_bytes, options.max_pixels)
        embedder = Embedder.open(
            options.source,
            flip=bool(gallery.preprocessing.get("flip", False)),
            checkpoint=options.checkpoint,
            max_pixels=limits.pixels,
        )
        recogniser = Recogniser(embedder, gallery, limits=limits, writable=options.writable)
        duplicates = _duplicates(Path(options.source), options.audit)
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
        app = make_app(recogniser, duplicates, token=token)
        address = address_of(listener, options.host)
        print(f"{len(gallery):,} identities, {gallery.index}")
        if gallery.threshold is None:
            print("the gallery has no threshold, so it never answers nobody; set one: partial-fc gallery calibrate")
        if new:
            print(f"token: {token}")
        elif token is not None:
            print("requests need the token that was given")
        print(f"open {address}/{f'#token={token}' if new else ''} in a browser; Ctrl-C ends the service", flush=True)
        make_server(app).run(sockets=[listener])


def _duplicates(source: Path, audit: str | None) -> Duplicates | None:
    """Return the pairs of the audit in the folder `audit`, or else in that of the run; None if it has none."""
    is_run = (source / CONFIG).is_file()
    if audit is None and not (is_run and (source / "audit").is_dir()):
        return None
    if not is_run:
        raise UserError(f"--audit shows pictures of a run's training data, but {source} is no run; give its run folder")
    return Duplicates(Path(audit) if audit is not None else source / "audit", config_of_run(RunFolder(source)))
