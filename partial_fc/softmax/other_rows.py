"""The class rows of a forward that is not the usual one: sub-centers, kernels, or elsewhere than on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_fc.softmax.at_once import RowsAtOnce
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
    """Return them. dtypes: of the statistics, of the matrix products."""
    margin, device, (stats, product) = options.margin, selection.batch.embeddings.device, dtypes
    index = rows_of_classes(None if selection.picked else selection.rows, margin.centers)
    prefix = "" if selection.rows is None else "selected "
    given = index, margin.normalize, stats, sink.workspace, needs_grad, prefix
    if weight.device != device:
        return StreamedRows(weight, None if bias is None else bias.to(device), *given, device=device)
    if selection.kernels is not None and selection.kernels.rows:
        rows: RowTiles = KernelRows(weight, bias, *given)
    else:
        rows = (RowTiles if device.type == "cpu" else RowsAtOnce)(weight, bias, *given)
    if isinstance(rows, RowsAtOnce):
        rows.measure(product, whole_gradient=needs_grad and sink.begin_update is None)
    if isinstance(rows, KernelRows) and selection.directions is not None:
        rows.know(*selection.directions)
    return rows
