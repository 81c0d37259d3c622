"""The page in a real browser, at the width of a screen and of a phone: drop an image, see the right name.

python -m pytest tests/training/serve/test_page.py --basetemp=SHOTS leaves screenshots in SHOTS.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page
from served import NAMES, Pairs, make_gallery, picture, recogniser, serving

from partial_fc.training.gallery import Gallery
from partial_fc.training.serve.app import make_app

SCREEN, PHONE = 1100, 390
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter(image => image.complete && !image.naturalWidth).length"
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return make_gallery(tmp_path_factory.mktemp("page") / "people")


@pytest.fixture(scope="module")
def address(gallery: Gallery) -> Iterator[str]:
    with serving(make_app(recogniser(gallery, bytes=100_000), Pairs())) as found:  # type: ignore[arg-type]
        yield found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for identity in (0, 1, 100):
        for sample in (8, 9):
            picture(identity, sample).save(folder / f"{identity}-{sample}.png")
    (folder / "text.png").write_text("this is no picture")
    (folder / "large.png").write_bytes(b"\0" * 100_001)
    return folder


def check(page: Page, shot: Path, allowed: int = 0) -> None:
    """The page fits its window, has no broken picture, said nothing, and asked nobody else. It is kept as a picture."""
    shot.write_bytes(page.screenshot())
    assert page.evaluate(WIDER) <= 0
    assert page.evaluate(BROKEN) == 0
    seen = page.seen()
    assert len(seen.complaints) == allowed and seen.requests == [], seen


@pytest.mark.parametrize("width", [SCREEN, PHONE])
def test_an_image_is_dropped_and_the_right_name_is_seen(browser, address, files, width, tmp_path):
    with browser.page(address, width=width) as page:
        page.wait("document.querySelector('#status').textContent.includes('6 identities, threshold 0.800')")
        for identity in (1, 0):
            page.drop("#search-drop", files / f"{identity}-9.png")
            page.wait(f"document.querySelector('.answer')?.textContent === {NAMES[identity]!r}")
            page.wait("document.querySelectorAll('#matches img').length === 5")
        assert page.evaluate("document.querySelectorAll('#matches li').length") == 5
        first = page.evaluate("document.querySelector('#matches li').innerText")
        assert "Ada" in first and "cosine 0.9" in first
        assert "the threshold is 0.800" in page.evaluate("document.querySelector('#found').innerText")
        check(page, tmp_path / "found.png")


def test_a_stranger_is_nobody_and_names_are_text(browser, address, files, tmp_path):
    with browser.page(address) as page:
        page.choose("#search-file", files / "100-8.png")
        page.wait("document.querySelector('.answer')?.textContent === 'nobody'")
        names = page.evaluate("[...document.querySelectorAll('#matches .name')].map(each => each.textContent)")
        assert set(names) < set(NAMES) and len(names) == 5
        assert page.evaluate("document.querySelectorAll('#matches b').length") == 0
        check(page, tmp_path / "nobody.png")


def test_a_bad_file_is_refused_in_words(browser, address, files, tmp_path):
    with browser.page(address) as page:
        page.wait("document.querySelector('#status').textContent.includes('6 identities')")
        page.drop("#search-drop", files / "large.png")
        page.wait("document.querySelector('#error').textContent.includes('100,001 bytes; at most 100,000')")
        check(page, tmp_path / "large.png")
        page.drop("#search-drop", files / "text.png")
        page.wait("document.querySelector('#error').textContent.includes('is not an image')")
        assert page.evaluate("document.querySelector('#found').textContent") == ""
        page.drop("#search-drop", files / "0-9.png")
        page.wait("document.querySelector('.answer')?.textContent === 'Ada'")
        assert page.evaluate("document.querySelector('#error').hidden")
        check(page, tmp_path / "mended.png", allowed=1)  # browsers note every answer that is an error


@pytest.mark.parametrize("width", [SCREEN, PHONE])
def test_two_images_are_compared(browser, address, files, width, tmp_path):
    with browser.page(address, width=width) as page:
        page.click("#tab-compare")
        page.drop("#first-drop", files / "0-8.png")
        page.drop("#second-drop", files / "1-8.png")
        page.wait("document.querySelector('.answer')?.textContent === 'not the same identity'")
        page.drop("#second-drop", files / "0-9.png")
        page.wait("document.querySelector('.answer')?.textContent === 'the same identity'")
        check(page, tmp_path / "compared.png")


@pytest.mark.parametrize("width", [SCREEN, PHONE])
def test_likely_duplicates_are_browsed(browser, address, width, tmp_path):
    with browser.page(address, width=width) as page:
        page.click("#tab-duplicates")
        page.wait("document.querySelectorAll('#pairs li').length === 10")
        text = page.evaluate("document.querySelector('#pairs li').innerText")
        assert "Ada L. <i>" in text and "of class rows 0.710, of mean images 0.930" in text
        assert page.evaluate("document.querySelectorAll('#pairs li:first-child img').length") == 4
        page.click("#more")
        page.wait("document.querySelectorAll('#pairs li').length === 12")
        page.wait("document.querySelector('#more').hidden")
        shot = tmp_path / "duplicates.png"
        # two pictures of a class are there, the others are answered with 404, which browsers note
        check(page, shot, allowed=len([each for each in page.seen().complaints if "404" in each]))


def test_an_image_is_enrolled_from_the_page(browser, files, tmp_path):
    made = make_gallery(tmp_path / "people", count=2)
    with serving(make_app(recogniser(made, writable=True))) as address, browser.page(address) as page:
        page.wait("document.querySelector('#status').textContent.includes('2 identities')")
        page.drop("#search-drop", files / "100-8.png")
        page.wait("document.querySelector('.answer')?.textContent === 'nobody'")
        page.type("#enrol-name", "Mary")
        page.click("#enrol button")
        page.wait("document.querySelector('.answer')?.textContent === 'Mary'")
        page.wait("document.querySelector('#status').textContent.includes('3 identities')")
        check(page, tmp_path / "enrolled.png")
    assert "Mary" in Gallery.open(made.folder).identities


def test_a_token_is_asked_for_or_taken_from_the_address(browser, gallery, files, tmp_path):
    with serving(make_app(recogniser(gallery), token=TOKEN)) as address:
        with browser.page(address) as page:
            page.wait("!document.querySelector('#token').hidden")
            page.type("#token-text", TOKEN)
            page.click("#token button")
            page.wait("document.querySelector('#status').textContent.includes('6 identities')")
            page.drop("#search-drop", files / "0-9.png")
            page.wait("document.querySelectorAll('#matches img').length === 5")
            check(page, tmp_path / "token.png", allowed=1)  # the answer that asks for the token
        with browser.page(f"{address}/#token={TOKEN}") as page:
            page.wait("document.querySelector('#status').textContent.includes('6 identities')")
            assert page.evaluate("location.href") == f"{address}/"
            check(page, tmp_path / "address.png")


def test_the_interface_is_described_on_a_page_of_its_own(browser, address, tmp_path):
    for width in (SCREEN, PHONE):
        with browser.page(f"{address}/docs", width=width) as page:
            page.wait("document.querySelectorAll('.operation').length === 9")
            text = page.evaluate("document.body.innerText")
            assert "POST /api/search" in text and "required" in text and "429" not in text
            check(page, tmp_path / f"docs-{width}.png")
