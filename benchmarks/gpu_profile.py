"""Part `profile`: where the time of a step goes, by torch.profiler, at the size that was slowest over its floor."""

from __future__ import annotations

from typing import Any

import torch
from gpu_run import Outcome, Run
from gpu_speed import Size, inputs, step_of
from torch.profiler import ProfilerActivity

STEPS = 3
TOP = 15
OURS = "partial_fc::"  # ranges of the head: gather, select, forward_tiles, ...
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def profile(run: Run) -> None:
    measured = [row for row in run.of("speed") if row.get("ratio")]
    if measured:
        row = max(measured, key=lambda row: row["ratio"])
        size = Size(row["N"], row["C"], row["D"], row["r"], row["bf16"])
    else:
        size = Size(32, 1000, 32, 0.1, True) if run.quick else Size(1024, 1_000_000, 512, 0.1, True)
    run.measure(str(size), lambda: profiled(run, size), 5.0)


def profiled(run: Run, size: Size) -> Outcome:
    """Figures of one step: kernels (operations on a CPU) by their own time, ranges, launches, copies, waits."""
    cuda = run.device.type == "cuda"
    step, _ = step_of(size, *inputs(size, run.device))
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    events = profiler.key_averages()
    kernels, ranges, counts = [], [], dict.fromkeys((*LAUNCHES, *COPIES, *WAITS), 0.0)
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        range_of_user = getattr(event, "is_user_annotation", False) or event.key.startswith(OURS)
        if event.key in counts:
            counts[event.key] += event.count / STEPS
        if event.key.startswith(OURS) and not on_device:
            host, device = event.cpu_time_total, getattr(event, "device_time_total", 0.0)
            ranges.append({"range": event.key, "host_ms": host / 1e3 / STEPS, "device_ms": device / 1e3 / STEPS})
        elif on_device == cuda and not range_of_user:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append({"kernel": event.key, "ms": own / 1e3 / STEPS, "calls": event.count / STEPS})
    kernels.sort(key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in kernels)
    figures: dict[str, Any] = {
        "kernels": kernels[:TOP],
        "ranges": sorted(ranges, key=lambda row: -row["device_ms" if cuda else "host_ms"]),
        "device_ms": total,
        "launches": sum(counts[name] for name in LAUNCHES),
        "copies": sum(counts[name] for name in COPIES),
        "waits": sum(counts[name] for name in WAITS) - cuda / STEPS,  # the one that ends the profile
    }
    what = "kernels" if cuda else "operations"
    text = f"{total:.2f} ms of {what} a step, {sum(row['calls'] for row in kernels):.0f} of them"
    if cuda:
        text += f"; {figures['launches']:.0f} launches, {figures['copies']:.0f} copies, {figures['waits']:.1f} waits"
    return Outcome("", text, figures)
