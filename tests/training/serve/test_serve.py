"""The service finds identities, compares, enrols and refuses; nothing that it says names a file of the machine."""

from __future__ import annotations

import asyncio
import errno
import http.client
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from served import NAMES, Answer, Pairs, ask, embedder, encoded, form, make_gallery, picture, png, recogniser, serving

from partial_fc.training.cli import serve
from partial_fc.training.cli.main import main
from partial_fc.training.errors import UserError
from partial_fc.training.gallery import Gallery
from partial_fc.training.serve.app import BESIDE_IMAGES, make_app
from partial_fc.training.serve.guard import Guard
from partial_fc.training.serve.recogniser import Recogniser
from partial_fc.training.serve.server import TOKEN_VARIABLE, bind
from partial_fc.training.serve.uploads import Limits, Refused, thumbnail_of

ROOT = Path(__file__).parents[3]
TOKEN = "a-token-of-some-length"
SMALL = {"bytes": 100_000, "pixels": 1_000_000}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return make_gallery(tmp_path_factory.mktemp("served") / "people")


@pytest.fixture(scope="module")
def address(gallery: Gallery) -> Iterator[str]:
    with serving(make_app(recogniser(gallery, **SMALL))) as found:
        yield found


@pytest.fixture
def writable(tmp_path: Path) -> Iterator[tuple[str, Gallery]]:
    made = make_gallery(tmp_path / "people", count=3)
    with serving(make_app(recogniser(made, writable=True, **SMALL))) as found:
        yield found, made


def check_says_no_path(answer: Answer, gallery: Gallery) -> None:
    text = answer.body + repr(answer.headers).encode()
    for path in (str(gallery.folder), gallery.folder.parent.name, str(ROOT), "/tmp", "site-packages", "Traceback"):
        assert path.encode() not in text, text[:2000]


# ---------------------------------------------------------------------------------------------------- what it does


def test_a_known_identity_is_found_and_a_stranger_is_nobody(address, gallery):
    for identity, name in enumerate(NAMES):
        answer = ask(address, "POST", "/api/search?k=3", image=png(identity, sample=9))
        assert answer.status == 200, answer.body
        found = answer.json
        assert found["answer"] == name and found["threshold"] == pytest.approx(0.8)
        assert found["matches"][0]["identity"] == name
        assert len({each["identity"] for each in found["matches"]}) == 3
        cosines = [each["cosine"] for each in found["matches"]]
        assert cosines == sorted(cosines, reverse=True) and cosines[0] > 0.9 > 0.8 > cosines[1]
        check_says_no_path(answer, gallery)
    stranger = ask(address, "POST", "/api/search", image=png(100)).json
    assert stranger["answer"] is None and len(stranger["matches"]) == 5


def test_pictures_of_matches_are_small_pngs(address, gallery):
    found = ask(address, "POST", "/api/search", image=png(0, 9)).json
    answer = ask(address, "GET", found["matches"][0]["picture"])
    assert (answer.status, answer.headers["content-type"]) == (200, "image/png")
    shown = np.asarray(Image.open(io.BytesIO(answer.body)).convert("RGB").resize((4, 4)))
    assert np.abs(shown.astype(int) - np.asarray(picture(0).resize((4, 4)))).max() < 8
    check_says_no_path(answer, gallery)
    assert ask(address, "GET", "/api/pictures/123456").status == 404
    assert ask(address, "GET", "/api/pictures/9223372036854775807").status == 404


def test_two_images_are_compared(address):
    same = ask(address, "POST", "/api/compare", first=png(7, 1), second=png(7, 2)).json
    other = ask(address, "POST", "/api/compare", first=png(7, 1), second=png(8, 2)).json
    assert same["same"] is True and other["same"] is False and same["cosine"] > 0.9 > other["cosine"]
    a, b = embedder().embed([png(7, 1), png(8, 2)]).astype(np.float64)
    assert other["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


def test_the_status_and_names(address, gallery):
    said = ask(address, "GET", "/api/status").json
    assert (said["identities"], said["embedding_size"], said["writable"], said["duplicates"]) == (6, 48, False, None)
    assert said["limits"] == SMALL
    page = ask(address, "GET", "/api/identities?offset=1&limit=2").json
    assert page == {"total": 6, "identities": sorted(NAMES)[1:3]}
    assert ask(address, "GET", "/api/duplicates").status == 404


def test_without_a_threshold_nothing_is_called_the_same(tmp_path):
    made = make_gallery(tmp_path / "people", threshold=None, count=2)
    with serving(make_app(recogniser(made))) as address:
        assert ask(address, "GET", "/api/status").json["threshold"] is None
        compared = ask(address, "POST", "/api/compare", first=png(0), second=png(0, 1)).json
        assert compared["same"] is None and compared["threshold"] is None
        assert ask(address, "POST", "/api/search", image=png(0, 9)).json["threshold"] is None


def test_an_empty_gallery_answers_nobody(tmp_path):
    made = make_gallery(tmp_path / "people", count=1)
    made.remove([NAMES[0]])
    with serving(make_app(recogniser(made))) as address:
        found = ask(address, "POST", "/api/search", image=png(0)).json
        assert (found["answer"], found["matches"]) == (None, [])


# ---------------------------------------------------------------------------------------------------- changes


def test_identities_are_added_extended_and_removed(writable):
    address, gallery = writable
    before = ask(address, "POST", "/api/search", image=png(20, 9)).json
    assert before["answer"] is None
    added = ask(address, "POST", "/api/identities", identity=" Mary ", image=png(20, 1))
    assert (added.status, added.json) == (201, {"total": 4, "identities": ["Mary"]})
    found = ask(address, "POST", "/api/search", image=png(20, 9)).json
    assert found["answer"] == "Mary"
    assert ask(address, "GET", found["matches"][0]["picture"]).status == 200
    again = ask(address, "POST", "/api/identities", identity="Mary", image=png(20, 2))
    assert again.status == 409 and "enrolled already; send existing=extend" in again.error
    assert ask(address, "POST", "/api/identities", identity="Mary", image=png(20, 2), existing="extend").status == 201
    check_says_no_path(again, gallery)
    gone = ask(address, "DELETE", "/api/identities?identity=Mary")
    assert (gone.status, gone.json["total"]) == (200, 3)
    assert ask(address, "POST", "/api/search", image=png(20, 9)).json["answer"] is None
    missing = ask(address, "DELETE", "/api/identities?identity=Mary")
    assert missing.status == 404 and missing.error == "no identity of that name is enrolled"
    assert sorted(Gallery.open(gallery.folder).identities) == sorted(NAMES[:3])


@pytest.mark.parametrize("name", ["", "   ", "a" * 201, "two\nlines", "nothing\0"])
def test_what_is_no_name_is_not_enrolled(writable, name):
    address, gallery = writable
    answer = ask(address, "POST", "/api/identities", identity=name, image=png(20))
    assert answer.status == 422 and answer.error
    assert len(gallery) == 3


def test_a_service_that_may_not_change_the_gallery_does_not(address, gallery):
    for answer in (
        ask(address, "POST", "/api/identities", identity="Mary", image=png(20)),
        ask(address, "DELETE", "/api/identities?identity=Ada"),
    ):
        assert answer.status == 403 and "--writable" in answer.error
    assert len(gallery) == len(NAMES)


def test_searches_and_changes_at_once(writable):
    """Searches see each identity wholly or not at all; of adds of one name one succeeds."""
    address, gallery = writable

    def add(number: int) -> int:
        return ask(address, "POST", "/api/identities", identity=f"new {number % 6}", image=png(50 + number % 6)).status

    def search(number: int) -> tuple[int, str | None]:
        answer = ask(address, "POST", "/api/search", image=png(number % 3, 9))
        return answer.status, answer.json["answer"]

    with ThreadPoolExecutor(8) as threads:
        added = [threads.submit(add, number) for number in range(12)]
        searched = [threads.submit(search, number) for number in range(24)]
    assert sorted(each.result() for each in added) == [201] * 6 + [409] * 6
    assert [each.result() for each in searched] == [(200, NAMES[number % 3]) for number in range(24)]
    assert len(Gallery.open(gallery.folder)) == 9
    for number in range(6):
        found = ask(address, "POST", "/api/search", image=png(50 + number, 9)).json
        assert found["answer"] == f"new {number}"


def test_changes_of_others_are_seen(writable):
    address, gallery = writable
    other = Gallery.open(gallery.folder)
    other.add(embedder().embed([png(30)]), ["from elsewhere"])
    other.set_threshold(0.5)
    found = ask(address, "POST", "/api/search", image=png(30, 9)).json
    assert (found["answer"], found["threshold"]) == ("from elsewhere", 0.5)


def test_a_full_disk_changes_nothing(writable, monkeypatch):
    address, gallery = writable

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(gallery.folder))

    monkeypatch.setattr(os, "replace", full)
    answer = ask(address, "POST", "/api/identities", identity="Mary", image=png(20))
    assert answer.status == 503 and "cannot be read or changed at the moment" in answer.error
    check_says_no_path(answer, gallery)
    monkeypatch.undo()
    assert sorted(Gallery.open(gallery.folder).identities) == sorted(NAMES[:3])
    assert ask(address, "POST", "/api/search", image=png(1, 9)).json["answer"] == NAMES[1]
    assert ask(address, "POST", "/api/identities", identity="Mary", image=png(20)).status == 201


def test_a_gallery_that_is_gone_is_an_answer_without_its_place(writable):
    address, gallery = writable
    shutil.rmtree(gallery.folder)
    for answer in (ask(address, "POST", "/api/search", image=png(0)), ask(address, "GET", "/api/status")):
        assert answer.status == 503 and "the log of the service has the reason" in answer.error
        check_says_no_path(answer, gallery)


# ---------------------------------------------------------------------------------------------------- bad images


def bomb(width: int, height: int) -> bytes:
    """A PNG that says to have so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


GIF_BOMB = b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\2\2\x4c\1\0;"
BAD_IMAGES = {
    "empty": (b"", 422, "is empty"),
    "text": (b"GET / HTTP/1.1", 415, "is not an image"),
    "page": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "send one of JPEG, PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "is not an image"),
    "too many bytes": (b"\0" * 100_001, 413, "100,001 bytes; at most 100,000"),
    "too many pixels": (encoded(Image.new("L", (1001, 1000))), 413, "more than 1,000,000 pixels"),
    "a bomb": (bomb(60_000, 60_000), 413, "more than 1,000,000 pixels"),
    "a bomb of 4 gigapixels a side": (bomb(2**31 - 1, 2**31 - 1), 413, "more than 1,000,000 pixels"),
    "a bomb as GIF": (GIF_BOMB, 413, "more than 1,000,000 pixels"),
    "cut": (png(0)[:-200], 422, "is damaged"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_refused_in_words(address, gallery, kind):
    data, status, words = BAD_IMAGES[kind]
    for answer in (
        ask(address, "POST", "/api/search", image=data),
        ask(address, "POST", "/api/compare", first=png(0), second=data),
    ):
        assert answer.status == status and words in answer.error, answer.body
        check_says_no_path(answer, gallery)


def test_every_kind_of_image_is_read(address):
    for kind, mode in (("JPEG", "RGB"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGBA"), ("PPM", "RGB")):
        image = picture(2, 9).convert(mode)
        found = ask(address, "POST", "/api/search", image=encoded(image, kind)).json
        assert found["answer"] == NAMES[2], kind


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "I;16", "I", "F"])
def test_a_thumbnail_of_every_mode(mode):
    image = Image.new(mode.replace("LA", "LA"), (300, 200))
    data = encoded(image, "TIFF")
    small = Image.open(io.BytesIO(thumbnail_of(data)))
    assert small.size == (128, 85) and small.format == "PNG"


def test_a_thumbnail_keeps_nothing_else_of_the_file():
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    data = encoded(picture(0), "JPEG", exif=exif, comment=b"a secret")
    assert b"where I live" in data and b"a secret" in data
    small = thumbnail_of(data)
    assert b"where I live" not in small and b"a secret" not in small
    with pytest.raises(Refused, match="is damaged"):
        thumbnail_of(data[:200])


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/api/search", {}),
        ("/api/search", {"picture": png(0)}),
        ("/api/search", {"image": "text"}),
        ("/api/search?k=0", {"image": png(0)}),
        ("/api/search?k=101", {"image": png(0)}),
        ("/api/search?k=all", {"image": png(0)}),
        ("/api/compare", {"first": png(0)}),
    ],
)
def test_a_bad_request_is_refused_in_words(address, gallery, path, parts):
    answer = ask(address, "POST", path, **parts)
    assert answer.status == 422 and answer.error
    check_says_no_path(answer, gallery)


def test_what_is_not_there_and_not_done(address):
    assert ask(address, "GET", "/api/nothing").status == 404
    assert ask(address, "GET", "/../../etc/passwd").status == 404
    assert ask(address, "GET", "/page/../app.py").status == 404
    answer = ask(address, "PUT", "/api/search")
    assert answer.status == 405 and answer.headers["allow"] == "POST"
    assert ask(address, "PUT", "/api/identities").headers["allow"] == "DELETE, GET, POST"


# ---------------------------------------------------------------------------------------------------- who, and how much


def raw(address: str, head: str, body: bytes = b"") -> Answer:
    """The answer to a request of which only this is sent."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=100)
    connection.connect()
    connection.sock.sendall(head.replace("\n", "\r\n").encode() + b"\r\n" + body)
    answer = http.client.HTTPResponse(connection.sock)
    answer.begin()
    try:
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def test_a_request_of_a_gigabyte_is_refused_before_it_is_read(address):
    head = f"POST /api/search HTTP/1.1\nHost: localhost\nContent-Type: {form(image=b'')[1]}\nContent-Length: {2**30}\n"
    answer = raw(address, head)
    assert answer.status == 413 and f"at most {2 * 100_000 + BESIDE_IMAGES:,} bytes" in answer.error
    assert answer.headers["connection"] == "close"


def test_a_request_that_does_not_say_its_length_is_counted(address):
    head = (
        f"POST /api/search HTTP/1.1\nHost: localhost\nContent-Type: {form(image=b'')[1]}\nTransfer-Encoding: chunked\n"
    )
    body = form(image=b"\0" * 300_000)[0]
    answer = raw(address, head, f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
    assert answer.status == 413 and "the request is too large" in answer.error


def test_only_names_of_this_machine_and_pages_of_this_service_may_ask(address):
    assert ask(address, "GET", "/api/status", {"Host": "evil.example:8000"}).status == 400
    assert ask(address, "GET", "/", {"Host": "evil.example"}).status == 400
    assert ask(address, "GET", "/api/status", {"Host": "["}).status == 400
    assert ask(address, "GET", "/api/status", {"Host": "localhost:1"}).status == 200
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = ask(address, "POST", "/api/search", headers, image=png(0))
        assert answer.status == 403 and "another site" in answer.error
    assert ask(address, "POST", "/api/search", {"Origin": address}, image=png(0)).status == 200


def test_a_token_is_asked_for(gallery):
    with serving(make_app(recogniser(gallery), token=TOKEN)) as address:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer \xe9"},
        ):
            answer = ask(address, "GET", "/api/status", headers)
            assert answer.status == 401 and "Authorization: Bearer" in answer.error
            assert answer.headers["www-authenticate"] == "Bearer"
            assert ask(address, "POST", "/api/search", headers, image=png(0)).status == 401
        right = {"Authorization": f"Bearer {TOKEN}", "Host": "recogniser.example"}
        assert ask(address, "GET", "/api/status", right).status == 200
        assert ask(address, "POST", "/api/search", right, image=png(0, 9)).json["answer"] == "Ada"
        assert ask(address, "GET", "/").status == 200, "the page itself says nothing, and asks for the token"
        spec = ask(address, "GET", "/openapi.json").json
        assert spec["security"] == [{"token": []}]


def test_browsers_are_told_to_keep_others_out(address):
    for path in ("/", "/docs", "/api/status", "/api/nothing"):
        headers = ask(address, "GET", path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert "server" not in headers


def test_a_sender_that_is_slow_is_not_waited_for():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def slow() -> dict[str, Any]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    said: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        said.append(message)

    guard = Guard(app, token=None, most_bytes=1000, seconds=0.2)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, slow, send))
    assert said[0]["status"] == 408 and b"did not arrive within" in said[1]["body"]


def test_too_many_requests_at_once_are_told_to_ask_again():
    """As every other error, also for the page; connections that only stay open count for nothing."""
    said: list[list[dict[str, Any]]] = []

    async def ask_of(guard: Guard) -> None:
        answer: list[dict[str, Any]] = []
        said.append(answer)

        async def send(message: Any) -> None:
            answer.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        await guard(scope, lambda: asyncio.sleep(0, {"type": "http.request"}), send)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def many() -> None:
        guard = Guard(app, token=None, most_bytes=1000, at_once=3)
        for _ in range(2):
            await asyncio.gather(*(ask_of(guard) for _ in range(5)))

    asyncio.run(many())
    assert [answer[0]["status"] for answer in said] == [200, 200, 200, 503, 503] * 2
    assert json.loads(said[3][1]["body"]) == {"error": "the service is busy; ask again in a moment"}
    assert (b"connection", b"close") in said[3][0]["headers"]


def test_an_error_of_the_service_is_not_told(gallery, monkeypatch):
    made = recogniser(gallery)
    monkeypatch.setattr(Recogniser, "search", lambda *_: 1 / 0)
    with serving(make_app(made)) as address:
        answer = ask(address, "POST", "/api/search", image=png(0))
    assert answer.status == 500 and answer.error == "the service has failed; its log has the reason"


# ---------------------------------------------------------------------------------------------------- its description


def test_the_description_names_every_error_and_no_place(address, gallery):
    answer = ask(address, "GET", "/openapi.json")
    check_says_no_path(answer, gallery)
    spec = answer.json
    assert sorted(spec["paths"]) == [
        "/api/compare", "/api/duplicates", "/api/duplicates/{number}/{place}", "/api/identities",
        "/api/pictures/{row}", "/api/search", "/api/status",
    ]  # fmt: skip
    for operations in spec["paths"].values():
        for said in operations.values():
            for status, response in said["responses"].items():
                if int(status) >= 400:
                    assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Problem"}
    page = ask(address, "GET", "/docs")
    assert b"docs.js" in page.body and b"//" not in page.body


@pytest.mark.slow
def test_requests_made_from_the_description_find_nothing_wrong(tmp_path):
    """schemathesis: requests that fit the description and requests that do not, answered as it says.

    A description cannot say which bytes are an image, so that it makes none: searches are refused.
    """
    made = make_gallery(tmp_path / "people")
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += ["--exclude-checks", "positive_data_acceptance", "--max-examples", "30", "--seed", "1", "--no-color"]
    with serving(make_app(recogniser(made, writable=True, **SMALL), Pairs())) as address:  # type: ignore[arg-type]
        command += [f"{address}/openapi.json"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert ask(address, "POST", "/api/search", image=png(0, 9)).status == 200, "it still answers"
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "9 selected / 9 total" in result.stdout


# ---------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def started(monkeypatch) -> list[Any]:
    """What the command would serve; it does not wait for requests."""
    apps: list[Any] = []

    class Server:
        def __init__(self, app: Any) -> None:
            apps.append(app)

        def run(self, sockets: list[Any]) -> None:
            assert sockets[0].getsockname()

    monkeypatch.setattr(serve, "make_server", Server)
    monkeypatch.setattr(serve.Embedder, "open", lambda *_, **settings: embedder(flip=settings["flip"]))
    return apps


def test_the_command_says_where_to_look(started, gallery, capsys):
    assert main(["serve", "run", "--gallery", str(gallery.folder), "--port", "0"]) == 0
    said = capsys.readouterr().out
    assert "6 identities, exact search among 6 embeddings" in said
    assert "open http://127.0.0.1:" in said and "token" not in said
    assert len(started) == 1


def test_beyond_this_machine_a_token_is_made_or_taken(started, gallery, capsys, tmp_path, monkeypatch):
    command = ["serve", "run", "--gallery", str(gallery.folder), "--port", "0", "--host", "0.0.0.0"]
    assert main(command) == 0
    said = capsys.readouterr().out
    token = said.split("token: ")[1].split()[0]
    assert len(token) >= 32 and f"/#token={token}" in said
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert main([*command, "--token_file", str(tmp_path / "token")]) == 0
    said = capsys.readouterr().out
    assert "requests need the token that was given" in said and TOKEN not in said
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    assert main(command) == 2
    assert "the token is not 16 or more letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind",
    ["port in use", "port too large", "no such host", "no gallery", "no gallery there", "other backbone", "other width",
     "no token file", "no package", "several ranks", "no limit", "too high a limit", "audit without a run"],
)  # fmt: skip
def test_a_mistake_is_one_line(kind, started, gallery, tmp_path, capsys, monkeypatch):
    arguments = ["serve", "run", "--gallery", str(gallery.folder), "--port", "0"]
    expected = ""
    listener = None
    if kind == "port in use":
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        arguments, expected = (
            [*arguments, "--port", str(port)],
            f"port {port} of 127.0.0.1 is in use; give another --port",
        )
    elif kind == "port too large":
        arguments, expected = [*arguments, "--port", "70000"], "--port is 70000; give a number from 0 to 65535"
    elif kind == "no such host":
        arguments, expected = [*arguments, "--host", "no such host"], "--host no such host is no name or address"
    elif kind == "no gallery":
        arguments, expected = ["serve", "run"], "--gallery"
    elif kind == "no gallery there":
        arguments, expected = ["serve", "run", "--gallery", str(tmp_path), "--port", "0"], str(tmp_path)
    elif kind == "other backbone":
        monkeypatch.setattr(serve.Embedder, "open", lambda *_, **__: embedder(digest="others"))
        expected = "was built with another backbone"
    elif kind == "other width":
        monkeypatch.setattr(serve.Embedder, "open", lambda *_, **__: embedder(dimension=7))
        expected = "has embeddings of 48 numbers, but the backbone gives 7"
    elif kind == "no token file":
        arguments, expected = [*arguments, "--token_file", str(tmp_path / "none")], "cannot be read"
    elif kind == "no package":
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        expected = "serving needs the package uvicorn, which is missing: pip install 'partial_fc[serve]'"
    elif kind == "several ranks":
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr("partial_fc.training.cli.main.find_ranks", lambda: None)
        expected = "serve runs in one process"
    elif kind == "no limit":
        arguments, expected = [*arguments, "--max_bytes", "0"], "--max_bytes is 0; give at least 1"
    elif kind == "too high a limit":
        arguments, expected = [*arguments, "--max_pixels", "999999999"], "at most 89478485 are read of any image"
    else:
        arguments, expected = [*arguments, "--audit", str(tmp_path)], "run is no run; give its run folder"
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("partial-fc: error: ") and said.err.count("\n") == 1 and expected in said.err, said.err
    assert started == [] and "open http" not in said.out
    if listener is not None:
        listener.close()


def test_a_recogniser_needs_a_gallery_of_its_backbone(gallery):
    with pytest.raises(UserError, match="was built with flip False, but now it is True"):
        Recogniser(embedder(flip=True), gallery, limits=Limits(), writable=False)


def test_answers_are_json(address):
    assert json.loads(ask(address, "GET", "/api/status").body)["version"]
