"""How the ranks of a loss are named and compared, outside of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class NamedRanks:
    """Base of `Ranks`."""

    group: dist.ProcessGroup | None
    replica_group: dist.ProcessGroup | None
    mesh: DeviceMesh | None
    host_group: dist.ProcessGroup | None

    def global_rank(self, flat: int) -> int:
        """Return the global rank of the `flat`-th rank of the mesh."""
        if self.mesh is not None:
            return int(self.mesh.mesh.flatten()[flat])
        return flat if self.group is None else dist.get_global_rank(self.group, flat)

    def name(self, flat: int) -> str:
        """Return how an error names the `flat`-th rank of the mesh."""
        return f"rank {self.global_rank(flat)}"

    def place_of_counts(self, device: torch.device) -> torch.device:
        """Return where the ranks exchange what their hosts must know; device: that of the rows."""
        return device if self.host_group is None else torch.device("cpu")

    def same_as(self, other: NamedRanks) -> bool:
        return (self.group, self.replica_group) == (other.group, other.replica_group)

    def __deepcopy__(self, memo: dict[int, object]) -> NamedRanks:
        return self  # immutable, and process groups cannot be copied
