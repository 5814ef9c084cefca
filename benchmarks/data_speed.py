"""Rows to tokens: megalora's cache against `datasets.map` with the same tokenizer and template.

    python benchmarks/data_speed.py --tokenizer DIR [--rows 1000000] [--repeats 1] [--parts map megalora again]

Writes rows of one question and one reply, about 300 tokens together, of words of this repository's texts. Then, one
after another, each in a process of its own, on all cores that this process may use:

    map          datasets.map with apply_chat_template(tokenize=True), batched (faster than row by row): ids alone
    map, labels  the same, and the prompt's ids for the labels: what megalora does as well
    megalora     the first start: tokens, labels and packed rows in the cache
    again        the second start: found and verified; memory is what the process has grown by since before

Seconds are those of the work, without imports, the tokenizer's loading and (for map) reading the JSON file. CPU seconds
are those of the process and its workers: on a busy machine they tell more. A round ends with how many times the rows of
`map` the first start makes in a second, and in a second of CPU. Needs `pip install datasets`; 6 KB of disk a row.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SEQ_LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description="rows to tokens against datasets.map")
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "data_speed")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="in this order")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        print(json.dumps(PARTS[options.part](options)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    write_rows(options.folder / "rows.jsonl", options.rows)
    print(f"{options.rows:,} rows, {len(os.sched_getaffinity(0))} cores")
    for _ in range(options.repeats):
        seconds = {}
        for part in options.parts:
            if part == "megalora":
                shutil.rmtree(options.folder / "cache", ignore_errors=True)
            found = seconds[part] = run(part, options)
            rate = options.rows / found["seconds"]
            memory = f", {found['megabytes']:,.0f} MB more than before" if "megabytes" in found else ""
            print(
                f"{part:12}  {found['seconds']:8.1f} s  {found['cpu_seconds']:8.1f} CPU s  {rate:10,.0f} rows/s  "
                f"{found['tokens'] / options.rows:.0f} tokens a row{memory}",
                flush=True,
            )
        if "map" in seconds and "megalora" in seconds:
            wall, cpu = (seconds["map"][name] / seconds["megalora"][name] for name in ("seconds", "cpu_seconds"))
            print(f"megalora / map: {wall:.2f} times the rows a second, {cpu:.2f} times a CPU second", flush=True)
    if not options.keep:
        shutil.rmtree(options.folder)


def run(part: str, options: argparse.Namespace) -> dict[str, float]:
    """One part in a process of its own."""
    command = [sys.executable, __file__, "--part", part]
    for name in ("tokenizer", "folder"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(path: Path, rows: int) -> None:
    files = sorted([*ROOT.glob("*.md"), *ROOT.glob("megalora/**/*.py")])
    words = [word for file in files for word in file.read_text(encoding="utf-8").split()]
    words = [word for word in words if "<" not in word]  # no tags of thinking
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            asked = " ".join(draw.choices(words, k=draw.randint(10, 60)))
            said = " ".join(draw.choices(words, k=draw.randint(50, 170)))
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages}) + "\n")


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returns, and the seconds that it took."""
    before, start = _cpu_seconds(), time.perf_counter()
    made = work()
    return made, {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def by_map(options: argparse.Namespace, rows_to_ids: Callable[[Any, dict], dict]) -> dict[str, float]:
    import datasets
    import pyarrow.compute
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    cache = options.folder / "datasets"
    shutil.rmtree(cache, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True, trust_remote_code=False)
    rows = datasets.load_dataset(
        "json", data_files=str(options.folder / "rows.jsonl"), split="train", cache_dir=str(cache)
    )
    cores = len(os.sched_getaffinity(0))

    def work() -> Any:
        found = functools.partial(rows_to_ids, tokenizer)
        return rows.map(found, batched=True, remove_columns=["messages"], num_proc=cores)

    made, found = timed(work)
    tokens = pyarrow.compute.sum(pyarrow.compute.list_value_length(made.data.column("input_ids"))).as_py()
    shutil.rmtree(cache, ignore_errors=True)
    return found | {"tokens": tokens}


def ids_alone(tokenizer: Any, rows: dict) -> dict:
    return {"input_ids": tokenizer.apply_chat_template(rows["messages"], tokenize=True, return_dict=False)}


def ids_and_labels(tokenizer: Any, rows: dict) -> dict:
    whole = tokenizer.apply_chat_template(rows["messages"], tokenize=True, return_dict=False)
    asked = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    prompts = tokenizer.apply_chat_template([messages[:-1] for messages in rows["messages"]], **asked)
    labels = [[-100] * len(prompt) + ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
    return {"input_ids": whole, "labels": labels}


def by_megalora(options: argparse.Namespace) -> dict[str, float]:
    import megalora.data.loader  # noqa: F401 (torch, as a rank has it)
    from megalora.data import ChatTemplate, DataSettings, load_dataset, load_tokenizer

    template = ChatTemplate(load_tokenizer(options.tokenizer))
    settings = DataSettings(SEQ_LENGTH, data_cache=options.folder / "cache")
    before = _resident()
    rows, found = timed(lambda: load_dataset(options.folder / "rows.jsonl", template, settings, 1))
    return found | {"tokens": rows.tokens, "megabytes": (_resident() - before) / 1e6}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


PARTS = {
    "map": lambda options: by_map(options, ids_alone),
    "map, labels": lambda options: by_map(options, ids_and_labels),
    "megalora": by_megalora,
    "again": by_megalora,
}

if __name__ == "__main__":
    main()
