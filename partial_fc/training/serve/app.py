"""The HTTP interface: FastAPI's routes around a `Recogniser`, and the page.

    GET  /                            the page: search, compare, duplicates
    GET  /docs, /openapi.json         this interface, for people and for programs
    GET  /api/status                  what is served, and its limits
    POST /api/search                  image -> nearest identities, the answer
    POST /api/compare                 two images -> cosine, same or not
    GET  /api/identities              names; POST adds an image, DELETE removes an identity
    GET  /api/pictures/ROW            picture of a row of the gallery
    GET  /api/duplicates              pairs of the audit; /api/duplicates/CLASS/PLACE a picture

Every error is {"error": "a sentence"}. No answer names a file or folder of this machine. The page and its parts come
with the package: nothing is loaded from elsewhere.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteException
from starlette.routing import Route

import partial_fc
from partial_fc.training.errors import UserError
from partial_fc.training.serve.duplicates import PICTURES, AuditedClass, Duplicates
from partial_fc.training.serve.guard import Guard
from partial_fc.training.serve.recogniser import LONGEST_NAME, Recogniser
from partial_fc.training.serve.uploads import Refused

log = logging.getLogger("partial_fc.serve")

PAGE = Path(__file__).parent / "page"
PARTS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
}
BESIDE_IMAGES = 64 * 1024  # bytes of a request that are not of its images
MOST_RESULTS = 100
MOST_ROW = 2**63 - 1


class Problem(BaseModel):
    """Why a request was not answered."""

    error: str


class Limited(BaseModel):
    """What an image may have."""

    bytes: int
    pixels: int


class Status(BaseModel):
    """What is served."""

    version: str
    identities: int
    embedding_size: int
    backbone: str = Field(description="digest of the weights")
    threshold: float | None = Field(description="the cosine from which an identity counts as found")
    index: str = Field(description="how the gallery is searched")
    writable: bool = Field(description="whether identities may be added and removed")
    duplicates: int | None = Field(description="pairs that the audit found; null without an audit")
    limits: Limited


class MatchFound(BaseModel):
    identity: str
    cosine: float = Field(ge=-1, le=1)
    picture: str | None = Field(description="path of its picture, if one was enrolled")


class SearchResult(BaseModel):
    answer: str | None = Field(description="the identity; null: nobody reaches the threshold")
    threshold: float | None
    matches: list[MatchFound] = Field(description="the nearest identities, best first, each once")


class Comparison(BaseModel):
    cosine: float = Field(ge=-1, le=1)
    threshold: float | None
    same: bool | None = Field(description="whether the cosine reaches the threshold; null without one")


class Identities(BaseModel):
    total: int
    identities: list[str]


class ClassShown(BaseModel):
    identity: str
    images: int
    pictures: list[str]


class PairShown(BaseModel):
    a: ClassShown
    b: ClassShown
    row_cosine: float | None = Field(description="of the rows of the two classes in the head; null: not near")
    mean_cosine: float | None = Field(description="of the mean directions of their images; null: not near")


class PairsShown(BaseModel):
    total: int
    pairs: list[PairShown]


Image = Annotated[UploadFile, File(description="an image: JPEG, PNG, BMP, WebP, GIF, TIFF or PPM")]
Offset = Annotated[int, Query(ge=0, le=MOST_ROW)]
Limit = Annotated[int, Query(ge=1, le=MOST_RESULTS)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of the errors that every operation has, and of these."""
    words = {
        400: "the request cannot be read, or the host is not of this machine",
        401: "a token is needed",
        403: "not allowed here, or from a page of another site",
        404: "not found",
        408: "the request took too long to arrive",
        409: "the identity is enrolled already",
        413: "too many bytes or pixels",
        415: "not an image that can be read",
        422: "a parameter is wrong, or the image is damaged",
        503: "the gallery cannot be read or changed at the moment, or too many ask at once",
    }
    return {each: {"model": Problem, "description": words[each]} for each in sorted({400, 401, 503, *statuses})}


OF_IMAGES = problems(403, 408, 413, 415, 422, 503)
PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}, "description": "the picture"}}


def make_app(recogniser: Recogniser, duplicates: Duplicates | None = None, *, token: str | None = None) -> FastAPI:
    """Return the application. token: what requests to /api/ must carry; None for none."""
    app = FastAPI(
        title="partial_fc",
        version=partial_fc.__version__,
        description="Search a gallery of identities by an image, and compare images.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(
        Guard,  # type: ignore[arg-type]  # its messages are dicts, as those of all servers
        token=token,
        most_bytes=2 * recogniser.limits.bytes + BESIDE_IMAGES,
    )
    _add_errors(app)
    _add_page(app)
    _add_search(app, recogniser, duplicates)
    _add_identities(app, recogniser)
    _add_duplicates(app, duplicates)
    if token is not None:
        _describe_token(app)
    return app


def _add_search(app: FastAPI, recogniser: Recogniser, duplicates: Duplicates | None) -> None:
    @app.get("/api/status", responses=problems(503), tags=["service"])
    def status() -> Status:
        """What is served, and the limits on images."""
        gallery = recogniser.gallery
        return Status(
            version=partial_fc.__version__,
            identities=len(gallery),
            embedding_size=gallery.dimension,
            backbone=gallery.backbone,
            threshold=recogniser.threshold,
            index=gallery.index,
            writable=recogniser.writable,
            duplicates=None if duplicates is None else len(duplicates.pairs),
            limits=Limited(bytes=recogniser.limits.bytes, pixels=recogniser.limits.pixels),
        )

    @app.post("/api/search", responses=OF_IMAGES, tags=["images"])
    def search(image: Image, k: Annotated[int, Query(ge=1, le=MOST_RESULTS)] = 5) -> SearchResult:
        """The k identities nearest to an image, and the answer: the best one, or nobody."""
        found = recogniser.search(_content(image, recogniser), k)
        matches = [
            MatchFound(
                identity=each.identity,
                cosine=each.cosine,
                picture=f"/api/pictures/{each.row}" if recogniser.has_picture(each.row) else None,
            )
            for each in found.matches
        ]
        return SearchResult(answer=found.identity, threshold=found.threshold, matches=matches)

    @app.post("/api/compare", responses=OF_IMAGES, tags=["images"])
    def compare(first: Image, second: Image) -> Comparison:
        """The cosine of two images, and whether it reaches the gallery's threshold."""
        cosine = recogniser.compare(_content(first, recogniser), _content(second, recogniser))
        threshold = recogniser.threshold
        return Comparison(cosine=cosine, threshold=threshold, same=None if threshold is None else cosine >= threshold)


def _add_identities(app: FastAPI, recogniser: Recogniser) -> None:
    @app.get("/api/identities", responses=problems(422, 503), tags=["gallery"])
    def identities(offset: Offset = 0, limit: Limit = MOST_RESULTS) -> Identities:
        """The names of the enrolled identities, sorted."""
        names = recogniser.identities()
        return Identities(total=len(names), identities=names[offset : offset + limit])

    @app.post("/api/identities", status_code=201, responses=OF_IMAGES | problems(409), tags=["gallery"])
    def add(
        identity: Annotated[str, Form(max_length=LONGEST_NAME, min_length=1)],
        image: Image,
        existing: Annotated[str, Form(pattern="^(refuse|extend|replace)$")] = "refuse",
    ) -> Identities:
        """Enrol an image of an identity. existing: what to do if the identity is enrolled already."""
        recogniser.add(identity, _content(image, recogniser), existing)
        return Identities(total=len(recogniser.gallery), identities=[identity.strip()])

    @app.delete("/api/identities", responses=problems(403, 404, 422, 503), tags=["gallery"])
    def remove(identity: Annotated[str, Query(max_length=LONGEST_NAME, min_length=1)]) -> Identities:
        """Remove an identity."""
        recogniser.remove(identity)
        return Identities(total=len(recogniser.gallery), identities=[identity])

    @app.get("/api/pictures/{row}", responses=PNG | problems(404, 422, 503), response_class=Response, tags=["gallery"])
    def picture(row: Annotated[int, InPath(ge=0, le=MOST_ROW)]) -> Response:
        """The picture of a row of the gallery, as `matches` names it."""
        return _png(recogniser.picture(row))


def _add_duplicates(app: FastAPI, duplicates: Duplicates | None) -> None:
    @app.get("/api/duplicates", responses=problems(404, 422), tags=["audit"])
    def pairs(offset: Offset = 0, limit: Limit = 20) -> PairsShown:
        """Pairs of identities of the training set that may be one, as `partial-fc audit` found them."""
        if duplicates is None:
            raise Refused(404, "there is no audit to show; write one with `partial-fc audit RUN`")
        shown = [
            PairShown(a=_shown(each.a), b=_shown(each.b), row_cosine=each.row_cosine, mean_cosine=each.mean_cosine)
            for each in duplicates.pairs[offset : offset + limit]
        ]
        return PairsShown(total=len(duplicates.pairs), pairs=shown)

    @app.get(
        "/api/duplicates/{number}/{place}", responses=PNG | problems(404, 422), response_class=Response, tags=["audit"]
    )
    def picture_of_class(
        number: Annotated[int, InPath(ge=0, le=MOST_ROW)], place: Annotated[int, InPath(ge=0, lt=PICTURES)]
    ) -> Response:
        """A picture of a class of the audit."""
        return _png(None if duplicates is None else duplicates.picture(number, place))


def _shown(each: AuditedClass) -> ClassShown:
    paths = [f"/api/duplicates/{each.number}/{place}" for place in range(min(each.images, PICTURES))]
    return ClassShown(identity=each.name, images=each.images, pictures=paths)


def _png(found: bytes | None) -> Response:
    if found is None:
        raise Refused(404, "there is no such picture")
    return Response(found, media_type="image/png")


def _content(image: UploadFile, recogniser: Recogniser) -> bytes:
    return image.file.read(recogniser.limits.bytes + 1)  # one more than is allowed, so that too many are noticed


def _add_page(app: FastAPI) -> None:
    def part(name: str, kind: str) -> Any:
        content = (PAGE / name).read_bytes()

        def answer() -> Response:
            return Response(content, media_type=kind)

        return answer

    for path, (name, kind) in PARTS.items():
        app.add_api_route(path, part(name, kind), methods=["GET"], include_in_schema=False)


def _add_errors(app: FastAPI) -> None:
    """Answer every error with a `Problem`."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse({"error": error.message}, error.status)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteException)
        if isinstance(error.__cause__, Refused):  # FastAPI wraps what interrupts the reading of a body
            return await refused(request, error.__cause__)
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one of the operations at this path alone
            headers["Allow"] = ", ".join(sorted(_methods_at(app, request.url.path)))
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"][1:])
        text = "it is no file; send it as a file of a form" if "UploadFile" in first["msg"] else first["msg"]
        return JSONResponse({"error": f"{place or 'the request'}: {text}"}, 422)

    async def gallery_failed(request: Request, error: Exception) -> Response:
        log.error("%s", error)  # its words may name a file of this machine
        text = "the gallery cannot be read or changed at the moment; the log of the service has the reason"
        return JSONResponse({"error": text}, 503)

    async def failed(request: Request, error: Exception) -> Response:
        log.exception("a request failed", exc_info=error)
        return JSONResponse({"error": "the service has failed; its log has the reason"}, 500)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(StarletteException, http)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(UserError, gallery_failed)
    app.add_exception_handler(Exception, failed)


def _methods_at(app: FastAPI, path: str) -> set[str]:
    """Return the methods of all operations at a path."""
    here = [each for each in app.routes if isinstance(each, Route) and each.path_regex.match(path)]
    return {method for each in here for method in each.methods or ()}


def _describe_token(app: FastAPI) -> None:
    """Say in openapi.json that requests carry a token."""
    original = app.openapi

    def described() -> dict[str, Any]:
        schema = original()
        schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        return schema

    app.openapi = described  # type: ignore[method-assign]
