"""What torch allocates on a CPU while a function runs."""

from __future__ import annotations

import json

import torch
from torch.profiler import ProfilerActivity, profile


def peak(run, folder) -> tuple[torch.Tensor, int]:
    """(the result, the most bytes beyond those at the start that are allocated at once)"""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        out = run()
    profiled.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held, most = 0, 0
    for event in sorted((one for one in events if one.get("name") == "[memory]"), key=lambda one: one["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return out, most
