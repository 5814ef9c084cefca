"""How soon `megalora board` shows many long runs, and a step after it was written, in a real headless Chromium.

    python benchmarks/board.py [--runs 10] [--steps 100000] [--again 5]

Opening: from the browser being given the address to the loss curves of all runs being drawn; first with a server that
has just started, then again. Updating: from a line being written to metrics.jsonl to its step standing in the page.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from browser import Page, browser  # noqa: E402  # where the tests have it
from runs_on_disk import make_run  # noqa: E402
from server import started  # noqa: E402

LOSS = "(typeof state === 'undefined' ? {} : state.plots.get('loss') || {}).chart"


def line(step: int, run: int) -> str:
    """As a run of the trainer writes it: some 250 bytes."""
    record = {"time": 1.7e9 + step, "step": step, "epoch": step / 1e4, "loss": 1 / step + run + random.random() / 50}
    record |= {"learning_rate": 1e-4, "grad_norm": random.random(), "tokens_per_second": 5e4, "memory_gib": 40.5}
    record |= {"phases": {"forward": random.random(), "backward": random.random(), "optimizer": 0.01}}
    return json.dumps(record) + "\n"


def seconds_to_open(page: Page, address: str, runs: int, last: int) -> float:
    page.open("about:blank")
    begun = time.perf_counter()
    page.open(address)
    page.wait(f"{LOSS} && {LOSS}.series.length === {runs + 1} && {LOSS}.data[0].at(-1) >= {last}", 120)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--again", type=int, default=5, help="how often it is opened, and a step written")
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs"
        for run in range(options.runs):
            made = make_run(folder / f"run{run}", evaluations=100)
            (made / "metrics.jsonl").write_text("".join(line(step, run) for step in range(1, options.steps + 1)))
        size = sum(file.stat().st_size for file in folder.rglob("metrics.jsonl")) / 1e6
        print(f"{options.runs} runs of {options.steps:,} steps, {size:.0f} MB of metrics", flush=True)
        with started("board", folder, "--port", 0) as server, browser(Path(scratch) / "profile") as page:
            page.screen(1200, 800)
            address = f"http://127.0.0.1:{server.port}/"
            for number in range(options.again):
                seconds = seconds_to_open(page, address, options.runs, options.steps)
                print(f"open{'' if number else ', the first time'}: {seconds:.2f} s", flush=True)
            for number in range(options.again):
                step = options.steps + 1 + number
                begun = time.perf_counter()
                with (folder / "run0" / "metrics.jsonl").open("a") as file:
                    file.write(line(step, 0))
                page.wait(f"{LOSS}.data[0].at(-1) === {step}")
                print(f"a step shows after {time.perf_counter() - begun:.2f} s", flush=True)
                time.sleep(1 + random.random())


if __name__ == "__main__":
    main()
