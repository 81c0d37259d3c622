"""A real browser without a window, spoken to by the DevTools protocol over two pipes: what a page says, asks for and
shows.

    with Browser() as browser: seen = browser.open(path, width=390); seen.complaints, seen.requests, seen.evaluated

Installs nothing: `find_browser` says which of the usual programs there is.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
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
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.ask("Emulation.setDeviceMetricsOverride", session, mobile=width < 600, **size)
        self.events.clear()
        self.ask("Page.navigate", session, url=page.as_uri())
        deadline = time.monotonic() + 100
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive(deadline))
        seen = Seen()
        seen.evaluated = self.ask(
            "Runtime.evaluate", session, expression=evaluate, returnByValue=True, awaitPromise=True
        )["result"].get("value")
        if screenshot:
            shot = self.ask("Page.captureScreenshot", session, captureBeyondViewport=True)
            seen.screenshot = base64.b64decode(shot["data"])
        for event in self.events:
            self._note(event, page.as_uri(), seen)
        self.ask("Target.closeTarget", targetId=target)
        return seen

    @staticmethod
    def _note(event: dict[str, Any], uri: str, seen: Seen) -> None:
        what, about = event.get("method"), event.get("params", {})
        if what == "Log.entryAdded":
            seen.complaints.append(about["entry"]["text"])
        elif what == "Runtime.consoleAPICalled":
            seen.complaints.append(" ".join(str(each.get("value")) for each in about["args"]))
        elif what == "Runtime.exceptionThrown":
            seen.complaints.append(str(about["exceptionDetails"].get("exception", {}).get("description")))
        elif what == "Network.requestWillBeSent" and not about["request"]["url"].startswith(("data:", uri)):
            seen.requests.append(about["request"]["url"])
