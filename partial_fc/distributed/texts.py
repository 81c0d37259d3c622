"""Words of every rank, on the way to an error."""

from __future__ import annotations

import torch

from partial_fc.distributed.ranks import Ranks, all_gather_mesh


def gather_texts(text: str, ranks: Ranks, device: torch.device) -> list[str]:
    """Return every rank's text. Two collectives, for errors."""
    mine = torch.tensor(list(text.encode(errors="replace")), dtype=torch.uint8, device=device)
    lengths = all_gather_mesh(torch.tensor([len(mine)], device=device), ranks).flatten().tolist()
    padded = mine.new_zeros(max(lengths))
    padded[: len(mine)] = mine
    rows = all_gather_mesh(padded, ranks).tolist()
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
