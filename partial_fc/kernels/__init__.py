"""Kernels in Triton, twins of plain PyTorch: the same numbers to rounding, in fewer passes over memory.

choice      which of them serve a forward, by a written rule; nothing here is asked on the plain path
launch      calls one; where it fails, plain PyTorch takes its place from there on
trial       tries each where it is first used; one that gives other numbers than plain PyTorch is not used
rows        class rows: directions before the products, gradients behind them, the step of an optimizer
device/     what runs on the card. Nothing but `launch.device_code` imports it, and with it triton

`PartialFC(..., kernels="auto")` and the environment variable `PARTIAL_FC_KERNELS` switch them. docs/kernels.md has a
table of what is served.
"""
