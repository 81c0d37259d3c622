"""Whole numbers as people write them: 1000000, 1_000_000, 1e6, 1000000.0."""

from __future__ import annotations

import argparse
from decimal import Decimal, InvalidOperation

MOST_DIGITS = 30  # 1e999999999 would be a number of a gigabyte


def whole_number(text: str) -> int | None:
    """Return the whole number that a text is; None for any other text. ValueError for a number that is not whole."""
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        return None
    if not number.is_finite() or number.adjusted() > MOST_DIGITS or number != number.to_integral_value():
        raise ValueError("give a whole number")
    return int(number)


def whole(text: str | int) -> int:
    """The type of an option of a command that takes a whole number; jsonargparse gives it the default, too."""
    try:
        number = whole_number(str(text))
    except ValueError:
        number = None
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return number
