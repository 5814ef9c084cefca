"""The most that is held at once, by the nodes, against what a step really holds."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.ops import extension
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.planning.nodes import Workload, chunk_nodes, peak_bytes
from megalora.planning.shapes import shape_of

LENGTH, TILE = 4096, 512
FIELDS = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


class Held(TorchDispatchMode):
    """Bytes of all tensors that operations made and that are still there; `most` of them at once."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


@pytest.mark.skipif(not extension.has_kernels("cpu"), reason="torch's own operations hold more")
@pytest.mark.parametrize(
    "recompute", ["none", "norms", "selective", "mlp", "layer", "full", ("full", "layer", "mlp", "none")]
)
def test_the_peak_is_what_a_step_holds(recompute):
    config = config_from_dict(FIELDS)
    lora = resolve_lora(LoraConfig.from_dict({"r": 4, "target_modules": "all-linear"}), config)
    stage = Stage(
        config, range(4), Placement(Axis(), False, torch.float32, "cpu"), lora, recompute=recompute, tile=TILE
    )
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(0.01)
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    for group in stage.groups:
        group.matrix.whole.zero_()
    stage.refresh_adapters()
    ids = torch.arange(LENGTH) % 96
    bounds = torch.tensor([0, LENGTH], dtype=torch.int32)
    batch = Batch(ids, ids.roll(-1), torch.arange(LENGTH), bounds, torch.arange(LENGTH))
    inputs = training_inputs(batch, config, stage.place, seed=1, step=0)
    with Held() as held:
        stage(None, inputs).backward()
    work = Workload(1, LENGTH, element=4, recompute=recompute, tile=TILE)
    nodes = chunk_nodes(shape_of(config, lora, 1, "cpu"), range(4), work, first=True, last=True)
    assert peak_bytes(nodes) == pytest.approx(held.most, rel=0.03)
