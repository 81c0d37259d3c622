"""Where class rows and their optimizer state are kept: in memory that costs nothing until it is used, or in files.

The rows stay tensors of the CPU `[C_local, ...]`, so all code that goes over them in blocks is the same; `RowStore`
(store.py) gives the memory behind them, and the values of rows that nobody has touched yet.
"""
