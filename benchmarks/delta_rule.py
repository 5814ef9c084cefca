"""Linear attention between its linears (Qwen3-Next, Qwen3.5) on one GPU: kernels against plain torch.

    python benchmarks/delta_rule.py                  # checks against float64, times, and the kernels of one case
    python benchmarks/delta_rule.py --tune           # the same, and each kernel with other warps, stages and tiles
    python benchmarks/delta_rule.py --only check     # or times, kernels, tune

Checks: errors of the result and of the gradient of each input, for heads of several models and documents of all
lengths, in units of the exact one's norm, beside those of plain torch, which rounds what it reads and writes to
bfloat16 and computes in float32. A repetition, key head by key head too, must have the same bits. The script ends with
an error where a kernel is more than 2.5 times as far off. Times: medians of a layer's forward and backward (which
computes forward again), and the memory that each holds beside its inputs and results.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from common import record, where_of  # noqa: E402
from delta_cases import HEADS, LAYOUTS, apart, by_kernels, drawn, in_torch, widened  # noqa: E402  # where the tests are

from megalora.ops import delta_mixer as op  # noqa: E402
from megalora.ops import fused_delta as fused  # noqa: E402
from megalora.ops.delta_rule import Documents  # noqa: E402

PARTS = "check", "times", "kernels"
REPEATS = 10
NINE, TWENTY_SEVEN = op.Heads(16, 2, 128, 128), op.Heads(16, 3, 128, 128)
PACKED = (0, 12, 700, 1633, 1890, 2901, 3000, 3777, 4096)
CASES = {
    "Qwen3.5-9B, 1 x 4096": (NINE, (0, 4096)),
    "Qwen3.5-9B, 2 x 2048": (NINE, (0, 2048, 4096)),
    "Qwen3.5-9B, 8 documents of 4096": (NINE, PACKED),
    "Qwen3.5-9B, tensor parallel 4, 1 x 4096": (op.Heads(4, 2, 128, 128), (0, 4096)),
    "Qwen3.5-27B, 1 x 4096": (TWENTY_SEVEN, (0, 4096)),
    "Qwen3.5-9B, 1 x 16384": (NINE, (0, 16384)),
}
COLUMNS = "layer", "pass", "kernels, ms", "plain torch, ms", "times", "kernels, MiB", "plain torch, MiB"
# Warps and stages; tiles have entries of their own.
LAUNCHES = {
    "solve": [(4, 1), (8, 1)], "scan": [(4, 1), (4, 2), (4, 3), (8, 2)], "output": [(4, 1), (8, 1)],
    "output_backward": [(4, 1), (8, 1)], "scan_backward": [(4, 1), (4, 2), (4, 3), (8, 2)],
    "system_backward": [(4, 1), (8, 1)], "query_backward": [(4, 1), (4, 2), (8, 1)],
    "key_backward": [(4, 1), (4, 2), (8, 1)], "convolution": [(4, 1), (8, 1)], "convolution_backward": [(4, 1), (8, 1)],
}  # fmt: skip
TILES = {
    "STATE_COLUMNS": ([16, 32, 64], ("scan", "scan_backward")),
    "ROWS": ([dict.fromkeys(fused.ROWS, rows) for rows in (8, 16, 32)], tuple(fused.ROWS)),
}


def check(device: torch.device) -> bool:
    """Print the errors of all heads and documents; return whether all are what they should be."""
    good = True
    for (name, heads), (layout, bounds) in itertools.product(HEADS.items(), LAYOUTS.items()):
        y, weights, grad = drawn(heads, bounds[-1], torch.bfloat16, str(device))
        ours = by_kernels(y, weights, grad, heads, bounds)
        exact = in_torch(y.double(), widened(weights), grad.double(), heads, bounds)
        plain = in_torch(y, weights, grad, heads, bounds)
        errors = {part: (apart(x, exact[part]), apart(plain[part], exact[part])) for part, x in ours.items()}
        again = by_kernels(y, weights, grad, heads, bounds)
        with mock.patch.object(fused, "MOST_ROWS", 1):
            by_head = by_kernels(y, weights, grad, heads, bounds)
        same = all(torch.equal(x, again[part]) and torch.equal(x, by_head[part]) for part, x in ours.items())
        right = same and all(mine <= 2.5 * theirs for mine, theirs in errors.values())
        told = "  ".join(f"{part} {mine:.1e}/{theirs:.1e}" for part, (mine, theirs) in errors.items())
        words = "" if right else ("   WRONG" if same else "   NOT THE SAME BITS")
        print(f"{name:6s} {layout:7s} kernels/torch: {told}{words}", flush=True)
        good &= right
    return good


def milliseconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the median over `repeats` runs of five times in a row, of which the host's part is hidden."""
    found = []
    for _ in range(repeats + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(5):
            work()
        ended.record()
        torch.cuda.synchronize()
        found.append(begun.elapsed_time(ended) / 5)
    return statistics.median(found[2:])


def held(work: Callable[[], object]) -> float:
    """Return the MiB that are allocated at most beside what was before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def passes(mixer, heads, bounds, device: torch.device) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward, backward) of a layer with random numbers."""
    y, weights, grad = drawn(heads, bounds[-1], torch.bfloat16, str(device))
    documents = Documents.of(bounds, device)
    y.requires_grad_()
    out = mixer(y, heads, weights, documents)
    return lambda: mixer(y, heads, weights, documents), lambda: torch.autograd.grad(out, y, grad, retain_graph=True)


def times(device: torch.device) -> list[list[str]]:
    """Print and return the rows of all cases."""
    rows = []
    for name, (heads, bounds) in CASES.items():
        found = {}
        for kind, mixer in (("kernels", fused.fused_delta_mixer), ("torch", op._Mixer.apply)):
            repeats = REPEATS if kind == "kernels" else 3
            both = passes(mixer, heads, bounds, device)
            found[kind] = [(milliseconds(work, repeats), held(work)) for work in both]
        for i, direction in enumerate(("forward", "backward")):
            (mine, room), (theirs, their_room) = found["kernels"][i], found["torch"][i]
            figures = [f"{mine:.3f}", f"{theirs:.2f}", f"{theirs / mine:.1f}", f"{room:.0f}", f"{their_room:.0f}"]
            rows.append([name, direction, *figures])
            print("  ".join(f"{one:>{width}s}" for one, width in zip(rows[-1], (40, 8, 9, 9, 6, 7, 7), strict=True)))
        mine, theirs = (sum(one[0] for one in found[kind]) for kind in ("kernels", "torch"))
        print(f"{name:>40s}  together {mine:.3f} ms, plain torch {theirs:.2f}: {theirs / mine:.1f} times", flush=True)
    return rows


def kernel_times(work: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Return the microseconds of each of our kernels in one run of `work`, by the name of its launch."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    found = {event.key: event.self_device_time_total / repeats for event in profile.key_averages()}
    return {name: sum(time for key, time in found.items() if key == f"{name}_kernel") for name in fused.LAUNCHES}


def kernels(device: torch.device) -> None:
    """Print the times of the kernels of a layer; those of forward run in backward too."""
    for name in list(CASES)[:3]:
        forward, backward = passes(fused.fused_delta_mixer, *CASES[name], device)
        for direction, work in (("forward", forward), ("backward", backward)):
            each = kernel_times(work)
            told = "  ".join(f"{kernel} {time:.0f}" for kernel, time in each.items() if time)
            print(f"{name}, {direction}, us: {told}  together {sum(each.values()):.0f}", flush=True)


@contextmanager
def launched(name: str, warps: int, stages: int) -> Iterator[None]:
    with mock.patch.dict(fused.LAUNCHES, {name: (warps, stages)}):
        yield


def tune(device: torch.device) -> None:
    """Print the time of each kernel with other warps, stages and tiles, where the GPU takes them."""
    for case in list(CASES)[:3:2]:
        _, backward = passes(fused.fused_delta_mixer, *CASES[case], device)
        forward, _ = passes(fused.fused_delta_mixer, *CASES[case], device)
        for name, options in LAUNCHES.items():
            for tile, choices in [(tile, c) for tile, (c, of) in TILES.items() if name in of] or [("", [None])]:
                for choice, (warps, stages) in itertools.product(choices, options):
                    changed = mock.patch.object(fused, tile, choice) if tile else mock.patch.dict({})
                    work = forward if name == "output" else backward
                    try:
                        with changed, launched(name, warps, stages):
                            told = f"{kernel_times(work, 3)[name]:.0f} us"
                    except Exception as error:  # noqa: BLE001  # more shared memory or registers than there are
                        told = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
                    print(f"{case}  {name} {tile} {choice or ''} warps {warps} stages {stages}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "tune"), default=list(PARTS))
    parser.add_argument("--tune", action="store_true", help="also try other warps, stages and tiles of each kernel")
    parser.add_argument("--output", type=Path, help="JSON file for the times, as in benchmarks/results/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU here\nhint: on a CPU run tests/ops/test_fused_delta.py")
    device = torch.device("cuda")
    wanted = {*options.only, *(["tune"] if options.tune else [])}
    print(f"{where_of(device)}, torch {torch.__version__}")
    good = check(device) if "check" in wanted else True
    rows = times(device) if "times" in wanted else []
    if "kernels" in wanted:
        kernels(device)
    if "tune" in wanted:
        tune(device)
    if options.output and rows:
        about = "A layer of linear attention between its linears, bfloat16, random numbers; backward repeats forward."
        record(options.output, "Linear attention by kernels", about, where_of(device), COLUMNS, rows, {"rows": rows})
    if not good:
        raise SystemExit("error: kernels are off, or do not repeat their bits (lines marked above)")


if __name__ == "__main__":
    main()
