"""A real browser without a window, spoken to by the DevTools protocol over two pipes: what a page says, asks for and
shows.

    with Browser() as browser:
        seen = browser.open(path, width=390); seen.complaints, seen.requests, seen.evaluated
        with browser.page(address) as page: page.drop("#zone", file); page.wait("done"); page.seen().complaints

Installs nothing: `find_browser` says which of the usual programs there is.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
]


def find_browser() -> str | None:
    """The path of an installed browser that speaks the protocol."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


@dataclass
class Seen:
    """complaints: errors, warnings and messages of the page's console, and exceptions. requests: what it asked for, but
    for itself."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    evaluated: Any = None
    screenshot: bytes = b""


class Browser:
    def __enter__(self) -> Browser:
        program = find_browser()
        assert program is not None
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self.write = os.pipe()
        self.read, answers = os.pipe()
        # the browser reads commands from descriptor 3 and writes answers to 4
        shell = f'exec 3<&{theirs} 4>&{answers}; exec "$@"'
        command = [
            "bash",
            "-c",
            shell,
            "-",
            program,
            *OPTIONS,
            f"--user-data-dir={self.profile.name}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs, answers), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        self.buffer, self.number = b"", 0
        self.events: list[dict[str, Any]] = []
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)
        self.profile.cleanup()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError("the browser does not answer")
            part = os.read(self.read, 1 << 20)
            assert part, "the browser ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """The answer to a command; events that come before it are kept."""
        self.number += 1
        message = {
            "id": self.number,
            "method": method,
            "params": parameters,
            **({"sessionId": session} if session else {}),
        }
        os.write(self.write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 100
        while (answer := self._receive(deadline)).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(
        self, page: Path, width: int = 1100, height: int = 900, evaluate: str = "null", screenshot: bool = False
    ) -> Seen:
        """Load the page in a window of that size, then evaluate a piece of script in it."""
        with self.page(page.as_uri(), width, height) as opened:
            evaluated = opened.evaluate(evaluate)
            shot = opened.screenshot() if screenshot else b""
            seen = opened.seen()
        seen.evaluated, seen.screenshot = evaluated, shot
        return seen

    @contextlib.contextmanager
    def page(self, address: str, width: int = 1100, height: int = 900) -> Iterator[Page]:
        """Load the page at an address in a window of that size."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.ask(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.ask("Emulation.setDeviceMetricsOverride", session, mobile=width < 600, **size)
        self.events.clear()
        self.ask("Page.navigate", session, url=address)
        deadline = time.monotonic() + 100
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(deadline))
        own = address if address.startswith("file:") else "/".join(address.split("/")[:3])
        yield Page(self, session, own)
        self.ask("Target.closeTarget", targetId=target)


@dataclass
class Page:
    """A page that is open in a browser. It is used by scripts, and as a person does: by clicks, drops and keys."""

    browser: Browser
    session: str
    address: str
    """What requests for the page's own parts begin with."""

    def evaluate(self, script: str) -> Any:
        """The value of a piece of script in the page."""
        return self.browser.ask(
            "Runtime.evaluate", self.session, expression=script, returnByValue=True, awaitPromise=True
        )["result"].get("value")

    def wait(self, script: str, seconds: float = 100) -> Any:
        """The value of a piece of script as soon as there is one."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, f"it did not come: {script}; {self.evaluate('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def click(self, selector: str) -> None:
        self._at(selector, lambda place: [self._mouse(kind, place) for kind in ("mousePressed", "mouseReleased")])

    def type(self, selector: str, text: str) -> None:
        self.click(selector)
        self.browser.ask("Input.insertText", self.session, text=text)

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in the input that the selector finds."""
        root = self.browser.ask("DOM.getDocument", self.session)["root"]["nodeId"]
        node = self.browser.ask("DOM.querySelector", self.session, nodeId=root, selector=selector)["nodeId"]
        self.browser.ask("DOM.setFileInputFiles", self.session, nodeId=node, files=[str(file)])

    def drop(self, selector: str, file: Path) -> None:
        """Drag a file from outside to the middle of an element, and drop it."""
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}

        def drag(place: dict[str, float]) -> None:
            for kind in ("dragEnter", "dragOver", "drop"):
                self.browser.ask("Input.dispatchDragEvent", self.session, type=kind, data=data, **place)

        self._at(selector, drag)

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        shot = self.browser.ask("Page.captureScreenshot", self.session, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def seen(self) -> Seen:
        """What the page has said and asked for so far."""
        seen = Seen()
        for event in self.browser.events:
            self._note(event, seen)
        return seen

    def _mouse(self, kind: str, place: dict[str, float]) -> None:
        self.browser.ask("Input.dispatchMouseEvent", self.session, type=kind, button="left", clickCount=1, **place)

    def _at(self, selector: str, act: Callable[[dict[str, float]], object]) -> None:
        middle = self.wait(
            f"""(() => {{
                const element = document.querySelector({json.dumps(selector)});
                if (!element) return null;
                element.scrollIntoView({{block: "center"}});
                const box = element.getBoundingClientRect();
                return box.width ? {{x: box.x + box.width / 2, y: box.y + box.height / 2}} : null;
            }})()"""
        )
        act(middle)

    def _note(self, event: dict[str, Any], seen: Seen) -> None:
        what, about = event.get("method"), event.get("params", {})
        if what == "Log.entryAdded":
            seen.complaints.append(about["entry"]["text"])
        elif what == "Runtime.consoleAPICalled":
            seen.complaints.append(" ".join(str(each.get("value")) for each in about["args"]))
        elif what == "Runtime.exceptionThrown":
            seen.complaints.append(str(about["exceptionDetails"].get("exception", {}).get("description")))
        elif what == "Network.requestWillBeSent" and not about["request"]["url"].startswith(
            ("data:", "blob:", self.address)
        ):
            seen.requests.append(about["request"]["url"])
