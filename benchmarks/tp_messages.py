"""What a tensor-parallel message and its product take: one after the other by collectives, or beside (the exchange).

    torchrun --nproc_per_node 2 benchmarks/tp_messages.py

The linears of an 8B layer cut over the ranks, sequence parallelism, 8192 tokens: the gather before q k v, and gate up;
the scatter after o, and down. Milliseconds, the slowest rank's. On CPUs there are the collectives alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import where_of

from megalora.cluster.environment import environment_int
from megalora.cluster.launch import choose_device, distributed
from megalora.parallel.exchange import Exchange, gather_product, product_scatter
from megalora.parallel.mesh import Axis
from megalora.parallel.peer_memory import choose_exchange

HIDDEN, ROOM = 4096, 64
# (name, in_features, out_features) of one rank's share, times the number of ranks
GATHERS = (("q k v", HIDDEN + ROOM, 6144), ("gate up", HIDDEN + ROOM, 28672))
SCATTERS = (("o", 4096, HIDDEN), ("down", 14336, HIDDEN))


def milliseconds(work: Callable[[], object], axis: Axis, device: torch.device, repeats: int) -> float:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        work()
    finish()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    finish()
    mean = torch.tensor(1e3 * (time.perf_counter() - start) / repeats, device=device)
    dist.all_reduce(mean, dist.ReduceOp.MAX, group=axis.group)
    return mean.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    device, _ = choose_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with distributed(device, tp=environment_int("WORLD_SIZE", 1), pp=1) as mesh:
        axis, own = mesh.tp, options.tokens // mesh.tp.size
        nbytes = options.tokens * (HIDDEN + ROOM) * dtype.itemsize
        exchange, note = choose_exchange(None, mesh, True, device, nbytes)
        ways: list[tuple[str, Exchange | None]] = [("collective, product", None)]
        ways += [("beside", exchange)] if exchange is not None else []
        table = []
        for gathers, linears in ((True, GATHERS), (False, SCATTERS)):
            for name, inputs, outputs in linears:
                inputs, outputs = (inputs, outputs // axis.size) if gathers else (inputs // axis.size, outputs)
                weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * 0.02
                x = torch.randn(own if gathers else options.tokens, inputs, device=device, dtype=dtype)
                whole = torch.randn(options.tokens, inputs, device=device, dtype=dtype)

                def product(rows: torch.Tensor, out: torch.Tensor | None, weight=weight) -> torch.Tensor:
                    return torch.mm(rows, weight.t(), out=out)

                def run(way: Exchange | None, x=x, product=product, outputs=outputs, gathers=gathers) -> object:
                    call = gather_product if gathers else product_scatter
                    return call(x, product, outputs, axis, way)

                cells = [milliseconds(lambda p=product, w=whole: p(w, None), axis, device, options.repeats)]
                cells += [milliseconds(lambda w=way: run(w), axis, device, options.repeats) for _, way in ways]
                table.append(
                    f"| {'gather' if gathers else 'scatter'}, {name} | {' | '.join(f'{c:.3f}' for c in cells)} |"
                )
        if mesh.rank == 0:
            print(f"| {options.tokens} tokens | product alone | {' | '.join(name for name, _ in ways)} |")
            print("|---|---|" + "---|" * len(ways), *table, sep="\n")
            print(f"{axis.size} x {where_of(device)}, torch {torch.__version__}", *([note] if note else []), sep="\n")


if __name__ == "__main__":
    main()
