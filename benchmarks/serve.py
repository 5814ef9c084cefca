"""Tokens a second of a replica that serves requests as they come, beside one that is given all prompts at once.

    python benchmarks/serve.py                       Llama-3.1-8B's shape in bfloat16, random weights: a GPU
    python benchmarks/serve.py --tiny                a shape for a CPU, to try the script

Without HTTP: what `megalora serve` adds in the thread that computes, three adapters in the batch included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch

from megalora.adapters.config import LoraConfig
from megalora.adapters.shared import share
from megalora.building import build_stage, load_adapter, resolve_lora, trained_shapes
from megalora.generation import replica as replicas
from megalora.generation.replica import Replica
from megalora.generation.requests import Prompt, Reply, Request
from megalora.generation.sampling import Sampling
from megalora.models.config import config_from_dict
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = LLAMA_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ADAPTERS = 3


class Ear:
    """Notes when the first token of each reply came, and the replies."""

    def __init__(self):
        self.first: dict[int, float] = {}
        self.replies: dict[int, Reply] = {}

    def hear(self, prompt: Prompt, token_id: int, logprobs: object) -> None:
        self.first.setdefault(prompt.number, time.perf_counter())

    def left(self, prompt: Prompt) -> bool:
        return False

    def done(self, prompt: Prompt, reply: Reply) -> None:
        self.replies[prompt.number] = reply


class Inbox:
    """Gives all requests as soon as there are slots, then no more."""

    def __init__(self, requests: Sequence[Request]):
        self._left = list(requests)

    def wait(self, seconds: float) -> list[Request] | None:
        return self.take(len(self._left)) or None

    def waiting(self) -> bool:
        return bool(self._left)

    def take(self, count: int) -> list[Request]:
        taken, self._left = self._left[:count], self._left[count:]
        return taken

    def changing(self) -> bool:
        return False

    def change(self) -> None:
        """Return that no adapter comes or goes."""

    def changed(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of a replica that serves.")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=200)
    parser.add_argument("--new_tokens", type=int, default=128)
    options = parser.parse_args()
    replicas.WORTH_KEEPING = 1 << 30  # every prompt is fed whole, though it has been fed before
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    mesh, config = build_mesh(0, 1), config_from_dict(TINY if options.tiny else LLAMA_8B)
    lora = resolve_lora(LoraConfig.from_dict({"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}), config)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device) * deviation

    shapes = trained_shapes(lora, config)
    adapters = [(lora, {name: drawn(shape, 0.02).cpu() for name, shape in shapes.items()}) for _ in range(ADAPTERS)]
    shared = share(adapters)
    stage, _ = build_stage(config, mesh, shared.lora, Placement(mesh.tp, False, dtype, device))
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "lora_" not in name:
                parameter.copy_(1.0 if "norm" in name else drawn(tuple(parameter.shape), 0.02))
    load_adapter(stage, shared.tensors, "here")
    stage.share_adapters(shared.owners)
    ids = torch.randint(10, config.vocab_size, (options.clients, options.prompt_tokens)).tolist()
    context = options.prompt_tokens + options.new_tokens

    def timed(name: str, work: Callable[[], list[Reply]]) -> list[Reply]:
        work()  # warm: recordings of the decoding steps, libraries
        start = time.perf_counter()
        replies = work()
        seconds = time.perf_counter() - start
        tokens = sum(len(reply.token_ids) for reply in replies)
        print(f"{name:34s} {tokens / seconds:9.0f} tokens/s", flush=True)
        return replies

    def new_replica(listened: bool) -> Replica:
        return Replica(stage, mesh.pp, mesh.tp, context, Sampling(), (), listened_to=listened)

    def served(replica: Replica, adapters: Sequence[int], count: int) -> tuple[list[Reply], float]:
        requests = [
            Request(Prompt(i, ids[i], adapters[i % len(adapters)]), Sampling(), options.new_tokens, frozenset())
            for i in range(count)
        ]
        ear, start = Ear(), time.perf_counter()
        replica.serve(Inbox(requests), ear, mesh.world)
        return [ear.replies[i] for i in range(count)], min(ear.first.values()) - start

    given = new_replica(False)
    prompts = [Prompt(i, some) for i, some in enumerate(ids)]
    expected = timed("all prompts at once, base", lambda: given.replies(prompts, options.new_tokens))
    server = new_replica(True)
    server.reserve(options.clients, context)
    base = timed("served, base", lambda: served(server, [0], options.clients)[0])
    equal = sum(a == b for a, b in zip(base, expected, strict=True))
    print(f"replies equal to those of all at once: {equal} of {len(expected)}")
    order = range(ADAPTERS + 1)
    mixed = timed("served, base and 3 adapters mixed", lambda: served(server, order, options.clients)[0])
    for adapter in order:
        alone = served(server, [adapter], options.clients)[0]
        rows = range(adapter, options.clients, ADAPTERS + 1)
        same = sum(mixed[i] == alone[i] for i in rows)
        print(f"adapter {adapter}: {same} of {len(rows)} replies of the mixed batch equal its own batch")
    one = timed("served, one client", lambda: served(server, [1], 1)[0])
    assert len(one) == 1
    firsts = sorted(served(server, [1], 1)[1] for _ in range(5))
    print(f"first token of a {options.prompt_tokens}-token prompt when idle: {firsts[2] * 1e3:.1f} ms (median of 5)")


if __name__ == "__main__":
    main()
