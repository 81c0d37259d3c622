"""Texts without secrets: what trackers say of an error may contain an address with a password, or a key."""

from __future__ import annotations

import os
import re

NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
"""In the names of variables and arguments whose values are secrets."""
LEAST = 6  # letters of a value that is taken out of texts; shorter ones would take ordinary words out
USER = re.compile(r"(?<=://)[^/@\s]+@")


def without_secrets(text: str) -> str:
    """Return `text` without the user in addresses, and without the values of variables that hold secrets."""
    text = USER.sub("", text)
    for name, value in os.environ.items():
        if NAME.search(name) and len(value) >= LEAST:
            text = text.replace(value, "***")
    return text


def one_line(error: BaseException) -> str:
    """Return an error in one line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    return without_secrets(text)
