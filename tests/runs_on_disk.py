"""Output folders as runs leave them, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

LOG = """\
2026-11-28 23:50:13 ---- rank 0 on host, process 7
2026-11-28 23:50:14 the adapter is new
2026-11-28 23:50:15 step 1/40 (epoch 0.05)  loss 6.1798  lr 5.000e-03  grad norm 8.5895  548 tokens/s
2026-11-28 23:50:15 step 1 by phase: forward 0.031s  backward 0.031s
2026-11-28 23:50:15 step 10: to 'Who are you?' it says 'an error'
2026-11-28 23:50:15 step 10: evaluation loss 3.8739, perplexity 48.13
"""


def metrics_line(step: int) -> str:
    record = {"step": step, "loss": 1 / step, "learning_rate": 1e-3, "phases": {"forward": 0.25}}
    return json.dumps(record) + "\n"


def make_run(folder: Path, steps: int = 0, evaluations: int = 0, learning_rate: float = 0.001) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(map(metrics_line, range(1, steps + 1))))
    evaluated = (json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, evaluations + 1))
    (folder / "eval_metrics.jsonl").write_text("".join(evaluated))
    replies = [{"prompt": "Who <b>are</b> you?", "image": "a/<i>.png", "response": "{step}", "finish_reason": "stop"}]
    told = ({"step": s, "replies": [r | {"response": f"I am {s}."} for r in replies]} for s in range(evaluations and 3))
    (folder / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    (folder / "run.yaml").write_text(
        f"# megalora 0, started in {folder.parent}; flags that are not here have their defaults\n"
        f"learning_rate: {learning_rate}\noutput_dir: {folder.name}\ninput_names: [a, b]\nsave: true\n"
    )
    (folder / "logs" / "rank_00000.log").write_text(LOG)
    other = "2026-11-28 23:50:16 nothing of note\n2026-11-28 23:50:17 rank 1 died\n"
    (folder / "logs" / "rank_00001.log").write_text(other)
    return folder
