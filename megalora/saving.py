"""What a run saves of itself while it trains, and what it goes on from."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from megalora.card import write_card
from megalora.checkpoint.adapter.peft import write_peft
from megalora.checkpoint.adapter.shards import AdapterCheckpoint, read_adapter, save_adapter
from megalora.checkpoint.layout import Layout
from megalora.checkpoint.run.background import BackgroundSaves, HostCopy, SaveReport, WriteShard
from megalora.checkpoint.run.folder import export_folder
from megalora.checkpoint.run.state import CheckpointWriter
from megalora.errors import UserError
from megalora.identity import base_format_of
from megalora.optimizer import MOMENTS
from megalora.parallel.collectives import gather_objects, on_first, together
from megalora.parallel.mesh import ParallelMesh, own_group
from megalora.parallel.split import Split
from megalora.training import Trainer

_LONG_WAIT = 1.0  # seconds for the checkpoint before that are worth a word
_LONGEST = datetime.timedelta(minutes=30)  # that a rank waits for the others' files


class RunSaver:
    """The checkpoints of a run: adapters, optimizer and the trainer's numbers. Every rank has one (collective).

    parameters, splits  the trained parameters of this rank, by name, and where they lie in the whole tensors
    lora_config         fields of LoraConfig.to_dict(), and more of PEFT's
    identity            what must not change between the parts of one run
    first               called on the first rank before it writes a checkpoint, in the saving thread
    enabled             False: it never saves
    Raises UserError, on every rank, where output_dir cannot be written.
    """

    def __init__(
        self,
        output_dir: str | Path,
        save_total_limit: int | None,
        *,
        mesh: ParallelMesh,
        parameters: Mapping[str, nn.Parameter],
        splits: Mapping[str, Split],
        lora_config: Mapping[str, Any],
        trainer: Trainer,
        identity: Mapping[str, str],
        first: Callable[[], None],
        enabled: bool = True,
    ):
        self._mesh, self._parameters, self._splits = mesh, parameters, splits
        self._lora_config, self._trainer, self._identity, self._first = lora_config, trainer, identity, first
        group = own_group(mesh.world, _LONGEST) if enabled else mesh.world
        writer = CheckpointWriter(
            output_dir,
            writes=mesh.replicas.is_first,
            is_main=mesh.world.is_first,
            gather=lambda value: gather_objects(value, group),
            save_total_limit=save_total_limit,
        )
        if enabled:
            on_first(writer.check_writable, mesh.world)
        everything = [p for p in parameters.values() for _ in range(1 + len(MOMENTS))]
        self._copies = HostCopy(everything if enabled and writer.writes else ())
        self._waited: dict[int, float] = {}  # seconds for the save before, by step
        self._saves = BackgroundSaves(writer)
        self._writer = writer

    def spare(self, step: int) -> None:
        """Keep the checkpoint of `step`, whatever save_total_limit says, in place of the one spared before."""
        self._writer.spared = step

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that failed: all ranks must `settle` after the same step."""
        return self._saves.failed

    def save(self, step: int, numbers: Mapping[str, Any]) -> Path:
        """Begin the checkpoint after `step` steps, once the one before is complete; return the folder that it will be.

        numbers  plain values that `restore` gives back, the same on every rank
        """
        begun = time.perf_counter()
        self.settle()
        self._waited[step] = time.perf_counter() - begun
        return self._saves.start(step, lambda: self._snapshot(step, numbers), self._identity)

    def settle(self) -> None:
        """Wait until no save is under way. Raises its error, on every rank."""
        with together(self._mesh.world):
            self._saves.wait()

    def notes(self) -> list[str]:
        """Return a line on each checkpoint that was completed since the last call."""
        return [self._note(report) for report in self._saves.finished()]

    def _note(self, report: SaveReport) -> str:
        waited = self._waited.pop(report.step)
        line = (
            f"checkpoint {report.folder}: complete in {report.total:.2f} s, of which training stood still "
            f"{1e3 * report.stalled:.0f} ms"
        )
        if waited > _LONG_WAIT:
            line += f", and {waited:.1f} s for the one before it: saves take longer than --save_steps steps"
        return line

    def _snapshot(self, step: int, numbers: Mapping[str, Any]) -> WriteShard:
        mesh, trainer = self._mesh, self._trainer
        self._copies.start()
        tensors = self._copies.take(self._parameters)
        moments = {name: self._copies.take(state) for name, state in trainer.optimizer.state().items()}
        state = {"step": step, **trainer.state(), **numbers, "identity": dict(self._identity)}
        layout = Layout(mesh.tp.size, mesh.pp.size, mesh.tp.rank, mesh.pp.rank)

        def write(folder: Path) -> Path:
            if mesh.world.is_first:
                self._first()
            self._copies.wait()
            return save_adapter(folder, tensors, self._splits, layout, self._lora_config, moments, state)

        return write

    def __enter__(self) -> RunSaver:
        self._saves.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._saves.__exit__(*error)


def restore(trainer: Trainer, checkpoint: AdapterCheckpoint, splits: Mapping[str, Split]) -> None:
    """Restore the moments of this rank's parameters and the trainer's numbers, as they were. Raises UserError."""
    moments = {
        name: {key: splits[name].slice(whole) for key, whole in parts.items()}
        for name, parts in (checkpoint.optimizer or {}).items()
        if name in splits
    }
    try:
        trainer.load_state(checkpoint.trainer, moments)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        where = checkpoint.where
        raise UserError(f"checkpoint {where}: lacks state of the run ({error!r})", "take an older one") from None


def export(
    checkpoint: Path,
    output_dir: str,
    model_path: str,
    experts: Mapping[str, int],
    mesh: ParallelMesh,
    write_tokenizer: Callable[[Path], None],
    card: str,
) -> Path:
    """Write the adapter of a checkpoint as a PEFT folder beside the checkpoints; return that. Collective.

    experts          how many experts each parameter of several holds (ModelSpec.expert_counts)
    write_tokenizer  called on the first rank: writes the run's tokenizer and chat template into a folder
    card             the text of its model card
    """
    folder = export_folder(output_dir)

    def write() -> None:
        adapter = read_adapter(checkpoint)
        fields = {**adapter.lora_config, "inference_mode": True}
        write_peft(folder, adapter.tensors, fields, model_path, experts, base_format_of(adapter))
        write_tokenizer(folder)
        write_card(folder, card)

    on_first(write, mesh.world)
    return folder
