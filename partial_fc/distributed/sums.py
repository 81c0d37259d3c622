"""Numbers `[n]` of which every rank has a part and needs the sum, or the largest: gathered, or reduced on the way.

                    a rank sends and receives, in a ring   steps    numbers are added
    all-gather      n (k − 1)                              k − 1    by every rank, in the order of the ranks
    all-reduce      2 n (k − 1) / k                        2(k − 1) on the way

So few numbers of few ranks are gathered, which takes half the steps; above `MOST_GATHERED` bytes of all ranks they are
reduced, which takes as many bytes at a thousand ranks as at four. The sum has the same bits on every rank either way:
gathered numbers are added in one order, and the backends add up each part on one rank, or in one tree, and send the
result to all (gloo, NCCL; DistributedDataParallel rests on it, too). Between the two it may differ in the last bits.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from partial_fc.distributed.ranks import MOST_GATHERED, all_gather, naming_the_missing


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None, what: str = "an exchange") -> Tensor:
    """Return the sum of all ranks' tensors of one shape; itself without a group."""
    if group is None:
        return tensor
    if tensor.nbytes * dist.get_world_size(group) <= MOST_GATHERED:
        return all_gather(tensor, group, what).sum(0)
    return reduced(tensor.clone(), group, what)


def reduced(
    tensor: Tensor, group: dist.ProcessGroup, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce it in place over the ranks, whatever its size; return it."""
    with naming_the_missing(what, group):
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def shared_out(tensor: Tensor, group: dist.ProcessGroup, what: str) -> Tensor:
    """Return `[k, n, ...]`: what each of the k ranks has in this rank's n of the rows of a tensor `[k · n, ...]`."""
    out = tensor.new_empty(dist.get_world_size(group), len(tensor) // dist.get_world_size(group), *tensor.shape[1:])
    with naming_the_missing(what, group):
        dist.all_to_all_single(out.view(tensor.shape), tensor.contiguous(), group=group)
    return out
