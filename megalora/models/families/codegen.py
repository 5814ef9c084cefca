"""CodeGen: GPT-J with q, v and k in one linear, by the four shards on which it was trained."""

from dataclasses import dataclass

from megalora.models.families.gptj import GPTJ_FIELDS, GPTJ_FILES, GPTJ_HARMLESS, gptj_like
from megalora.models.family import Family, Fields
from megalora.models.parts import head_dim
from megalora.models.spec import Fused, Linear, ModelSpec, Piece

SHARDS = 4


@dataclass(frozen=True)
class ByShard:
    """For each shard of `heads` heads their q, then their v, then their k, of `size` rows each."""

    heads: int
    size: int

    def pieces(self, part: str, start: int, stop: int) -> list[Piece]:
        """Return the rows of heads [start, stop) of output `part`, in order."""
        block, found = self.heads * self.size, []
        while start < stop:
            shard, head = divmod(start, self.heads)
            count = min(stop - start, self.heads - head)
            first = (3 * shard + "qvk".index(part)) * block + head * self.size
            found.append(Piece(first, 1, count * self.size, 0))
            start += count
        return found

    def unit(self, part: str) -> int:
        """Return the rows of one head."""
        return self.size


def read(hf: Fields) -> ModelSpec:
    size, heads = hf.hidden_size, hf.num_attention_heads
    if heads % SHARDS:
        hf.fail(f"num_attention_heads ({heads}) is not a multiple of {SHARDS}", "correct it")
    qkv = Fused(Linear("attn.qkv_proj", size, 3 * size), ByShard(heads // SHARDS, head_dim(hf)))
    return gptj_like(hf, qkv, qkv, qkv)


FAMILY = Family(
    ("codegen",), read, reads=GPTJ_FIELDS, harmless=GPTJ_HARMLESS, files=GPTJ_FILES, rotates=False,
    published=("codegen-350M", "codegen-2B", "codegen-6B"),
)
