"""Names of identities for formats that have numbers alone: identities.json beside the data, a list of strings; `data convert` leaves it."""

import json
from pathlib import Path

from partial_fc.training.errors import UserError

NAMES = "identities.json"


def read_names(path: Path, numbers: list[str]) -> list[str]:
    """Names of the identities `numbers` by the list in `path`; the numbers themselves where there is none that fits."""
    if not path.is_file():
        return numbers
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        chosen = [names[int(number)] for number in numbers if int(number) >= 0]
    except (ValueError, IndexError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no list of the names of {len(numbers):,} identities ({error}); mend or remove it"
        ) from error
    if not isinstance(names, list) or len(chosen) != len(numbers) or not all(isinstance(name, str) for name in chosen):
        raise UserError(f"{path} is no list of the names of {len(numbers):,} identities; mend or remove it")
    return chosen
