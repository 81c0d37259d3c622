"""The class rows of a forward that is not the usual one: gathered from the shard, kernels, elsewhere than on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.at_once import RowsAtOnce
from partial_fc.softmax.gathered_rows import GatheredRows
from partial_fc.softmax.inputs import LossOptions, RowGradientSink, Selection
from partial_fc.softmax.kernel_rows import KernelRows
from partial_fc.softmax.row_tiles import RowTiles
from partial_fc.softmax.ruled import rows_of_classes
from partial_fc.softmax.streamed_rows import StreamedRows


def other_rows(
    weight: Tensor,
    bias: Tensor | None,
    selection: Selection,
    options: LossOptions,
    sink: RowGradientSink,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs_grad: bool,
) -> RowTiles:
    """Return the rows of this forward. dtypes: of the statistics, of the matrix products."""
    margin, device, (stats, product) = options.margin, selection.batch.embeddings.device, dtypes
    index = rows_of_classes(None if selection.copied else selection.rows, margin.centers)
    given = margin.normalize, stats, sink.workspace, "" if selection.rows is None else "selected "
    if weight.device != device:
        return StreamedRows(weight, None if bias is None else bias.to(device), *given, device=device)
    by_kernels = selection.kernels is not None and selection.kernels.rows
    kind = KernelRows if by_kernels else GatheredRows if device.type == "cpu" else RowsAtOnce
    rows = kind(weight, bias, *given, index=index, needs_grad=needs_grad)
    if isinstance(rows, RowsAtOnce):
        rows.measure(product, whole_gradient=needs_grad and sink.begin_update is None)
    if isinstance(rows, KernelRows) and selection.directions is not None:
        rows.know(*selection.directions)
    return rows
