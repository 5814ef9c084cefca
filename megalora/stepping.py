"""The steps of a run: train, log, save, evaluate, and leave when a signal asks for it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megalora import __version__
from megalora.building import Engine
from megalora.card import adapter_card, versions
from megalora.checkpoint.adapter.engines import engines_caution
from megalora.checkpoint.adapter.peft import dropout_caution, peft_caution
from megalora.checkpoint.run.folder import export_folder, remove_export
from megalora.checkpoint.run.state import iteration_folder, note_best
from megalora.cluster.preemption import CTRL_C, Preemption
from megalora.cluster.watch import Watch
from megalora.data import steps_ahead
from megalora.errors import Interrupted, Preempted, UserError
from megalora.flags import FinetuneArguments
from megalora.flags.writing import settings_text
from megalora.hub import push
from megalora.model_paths import public_name
from megalora.monitor import Monitor, Timers
from megalora.monitor.evaluations import Evaluations
from megalora.monitor.meter import Meter
from megalora.parallel.collectives import all_reduce, gather_objects, on_first, together
from megalora.parallel.mesh import ParallelMesh
from megalora.planning.devices import device_of
from megalora.planning.layouts import predicted
from megalora.planning.nodes import Workload
from megalora.profiling import Profiler, model_words, recorded_steps, write_profile
from megalora.runs.curves import write_curves
from megalora.saving import RunSaver, export
from megalora.starting import Beginning
from megalora.summary import generate_command, layout_of
from megalora.tasks import TASKS
from megalora.training import StepResult


@dataclass
class Session:
    """A run that is built and opened: `run` does its steps. Every rank has one (collective).

    loss, evaluation_loss, saved  what the last step, the last evaluation and the last save of this start gave
    """

    arguments: FinetuneArguments
    beginning: Beginning
    engine: Engine
    work: Workload
    mesh: ParallelMesh
    monitor: Monitor
    saver: RunSaver
    meter: Meter
    timers: Timers
    watch: Watch
    profiler: Profiler
    preemption: Preemption
    table: Mapping[str, Mapping[str, Any]]
    loss: float | None = None
    evaluation_loss: float | None = None
    saved: Path | None = None
    evaluations: Evaluations = field(default_factory=Evaluations)
    _saved_steps: set[int] = field(default_factory=set)

    def run(self) -> None:
        """Do all steps that are left, and export the adapter. Raises UserError and Preempted, on every rank."""
        begun, train, trainer = self.beginning, self.arguments.train, self.engine.trainer
        first, total = begun.first_step, begun.total_steps
        if first:
            self.meter.go_on(begun.start.checkpoint.trainer)
        batches = steps_ahead(begun.loader.step, first, total)
        self._take_up_evaluations()
        if not first:
            self._reply(0)
        if first < total:  # an adapter of fewer steps could be mistaken for this run's
            on_first(lambda: remove_export(train.output_dir), self.mesh.world)
        steps = train.profile_steps if train.profile else 0
        profiled = recorded_steps(steps, first, total, self.engine.stage.uses_graphs)
        for number in range(first, total):
            if self._stops_early():
                break
            self.watch.step(number)
            with self.profiler.step(number in profiled, self.mesh.world):
                with self.watch("data"):
                    batch = next(batches)
                result = trainer.step(number, batch, alarm=self._alarm())
            step, leaving = number + 1, result.alarm and number + 1 < total
            if result.alarm:  # if nothing has failed, a signal asks to leave
                self._raise_what_failed()
            self._log(step, result, profiled)
            if train.save and (leaving or _every(train.save_steps, step) or step == total):
                self._save(step)
            if _every(train.eval_steps, step) or step == total:
                self._reply(step)
                self._evaluate(step)
            if leaving:
                self._leave(step)
            self._note_saves()
        self._finish()

    def _alarm(self) -> bool:
        """Return whether all ranks must look, after this step, at what this one has noticed."""
        return self.saver.failed or self.monitor.failed or self.preemption.asked

    def _raise_what_failed(self) -> None:
        """Wait for the save under way. Raises, on every rank, what could not be written. Collective."""
        self.saver.settle()
        with together(self.mesh.world):
            self.monitor.check()

    # ---- after a step

    def _log(self, step: int, result: StepResult, profiled: Sequence[int]) -> None:
        self.loss = result.loss
        self.meter.count(result.tokens)
        if result.skipped:
            self.monitor.note(f"step {step} skipped: {result.skipped}")
        if profiled and step - 1 == profiled[-1]:
            with self.meter.apart(self.timers):
                self.monitor.note(self._write_profile())
        train = self.arguments.train
        first = step == 1 and train.logging_first_step
        if first or step % train.logging_steps == 0 or step == self.beginning.total_steps:
            self.monitor.step(self.meter.record(step, result, self.timers) | self._busiest_expert())
        else:
            self.monitor.progress(step)

    def _busiest_expert(self) -> dict[str, float]:
        """Return the largest share of a layer's choices that one expert got since the last logged step; nothing for a
        model without experts. Collective."""
        if not self.beginning.config.has_experts:
            return {}
        found = 0.0
        for load in self.engine.stage.take_expert_loads():
            load = all_reduce(load, self.mesh.replicas).double()
            found = max(found, (load.max() / load.sum().clamp_min(1)).item())
        return {"busiest_expert": max(gather_objects(found, self.mesh.pp))}

    def _save(self, step: int) -> None:
        begun = self.beginning
        carried = {"settings": begun.settings, **begun.template.record}
        with self.watch("checkpoint"):
            self.saved = self.saver.save(step, self.meter.state() | carried)
        self._saved_steps.add(step)

    def _reply(self, step: int) -> None:
        """Write the replies to the sample prompts, where there are any. Collective."""
        if self.beginning.samples is not None:
            with self.meter.apart(self.timers):
                try:
                    self.monitor.replies(step, self.beginning.samples.replies(self.engine.stage))
                except UserError as error:  # logits that are not finite: whether the run goes on, its steps decide
                    self.monitor.note(f"step {step}: no replies to the sample prompts: {error.message}")

    def _evaluate(self, step: int) -> None:
        """Evaluate, where there are rows for it. Collective."""
        if not self.beginning.evaluations:
            return
        with self.meter.apart(self.timers):
            report = self._measured()
            self.monitor.evaluation({"step": step, **report})
        loss = self.evaluation_loss = report["loss"]
        train = self.arguments.train
        if self.evaluations.add(step, loss) and train.keep_best:
            if step not in self._saved_steps:
                self._save(step)
            self.saver.spare(step)
        if self.evaluations.exhausted(train.early_stopping_patience) and train.save and step not in self._saved_steps:
            self._save(step)  # the run ends here

    def _measured(self) -> dict[str, Any]:
        """Return the metrics of all evaluation rows together, and of each set by its name. Collective."""
        task, labels = TASKS[self.beginning.lora.config.task_type], self.beginning.config.labels
        width, sets = task.width(labels), dict[str, Any]()
        whole, count = [0.0] * width, 0.0
        for name, loader in self.beginning.evaluations.items():
            steps = (loader.step(i) for i in range(loader.steps_per_epoch))
            sums, labelled = self.engine.trainer.measure(steps, width)
            whole, count = [a + b for a, b in zip(whole, sums, strict=True)], count + labelled
            if name:
                sets[name] = task.report(sums, labelled, labels)
        report = task.report(whole, count, labels)
        if self.beginning.scored is not None:
            try:
                report["rouge_l"], of_sets = self.beginning.scored.scores(self.engine.stage)
            except UserError as error:  # logits that are not finite: whether the run goes on, its steps decide
                self.monitor.note(f"no replies to the evaluation rows: {error.message}")
                return report | sets
            for name in sets:
                sets[name] |= {"rouge_l": of_sets[name]}
        return report | sets

    def _note_saves(self) -> None:
        for note in self.saver.notes():
            self.monitor.note(note)

    def _export(self, checkpoint: Path) -> Path:
        arguments = self.arguments
        return export(
            checkpoint,
            arguments.train.output_dir,
            public_name(arguments.model.model_path),
            self.beginning.config.expert_counts,
            self.mesh,
            self.beginning.template.write,
            self._card(checkpoint),
        )

    def _card(self, checkpoint: Path) -> str:
        """Return the model card of a checkpoint of this run."""
        arguments, lora = self.arguments, self.beginning.lora
        losses: dict[str, Any] = {"exported checkpoint": checkpoint.name}
        if self.loss is not None:
            losses["last training loss"] = f"{self.loss:.4f}"
        if self.evaluation_loss is not None:
            losses["last evaluation loss"] = f"{self.evaluation_loss:.4f}"
        if self.evaluations.best is not None:
            best = self.evaluations.best
            losses["lowest evaluation loss"] = f"{best.loss:.4f}, of step {best.step}"
        base = public_name(arguments.model.model_path)
        table = {**self.table, "model": {**self.table["model"], "path": base}}
        sections = {**table, "results": losses, "versions": versions()}
        return adapter_card(base, lora.config.task_type, sections, settings_text(arguments), __version__)

    def _write_profile(self) -> str:
        """Write the recorded steps beside what they were predicted to take; return a note. Collective."""
        arguments, begun, stage, mesh = self.arguments, self.beginning, self.engine.stage, self.mesh
        layout = layout_of(arguments, self.work, stage, mesh)
        recorded, device = self.profiler.collect(mesh.world), torch.device(stage.place.device)
        folder = Path(arguments.train.output_dir) / "profile"
        plan = predicted(begun.config, begun.lora, layout, self.engine.cut.layers, device)
        model, kind = model_words(begun.config), device_of(device).name
        return on_first(lambda: write_profile(folder, recorded, plan, model, kind), mesh.world)

    # ---- the ends

    def _take_up_evaluations(self) -> None:
        """Go on from the evaluations of earlier starts, and make the one before which such a start was stopped, after
        its save. Collective."""
        begun, train = self.beginning, self.arguments.train
        if not begun.continues:
            return
        first = begun.first_step
        due = _every(train.eval_steps, first) or first >= begun.total_steps
        if due and first and on_first(lambda: self.monitor.last_replies, self.mesh.world) < first:
            self._reply(first)
        if not begun.evaluations:
            return
        made = on_first(lambda: self.monitor.earlier_evaluations, self.mesh.world)
        self.evaluations, self._saved_steps = Evaluations(made), {first}
        if self.evaluations.best is not None and train.keep_best:
            self.saver.spare(self.evaluations.best.step)
        last = made[-1][0] if made else 0
        if last < first and due:
            self._evaluate(first)

    def _stops_early(self) -> bool:
        patience, best = self.arguments.train.early_stopping_patience, self.evaluations.best
        if not self.evaluations.exhausted(patience):
            return False
        lowest = "none was a finite number" if best is None else f"the lowest is {best.loss:.4f}, of step {best.step}"
        self.monitor.note(f"stopped early: no lower evaluation loss in the last {patience} evaluations; {lowest}")
        return True

    def _leave(self, step: int) -> None:
        self.saver.settle()
        if self.saved is not None:
            self._export(self.saved)
        kept = "with nothing saved (--save false)"
        if self.saved is not None:
            kept = f"saved in {self.saved}: the same command goes on from there"
        signal = self.preemption.signal_name or "a signal"
        kind = Interrupted if signal == CTRL_C else Preempted
        raise kind(f"stopped by {signal} after step {step} of {self.beginning.total_steps}, {kept}")

    def _finish(self) -> None:
        first, total = self.beginning.first_step, self.beginning.total_steps
        self._raise_what_failed()
        self._note_saves()
        if first >= total:
            of = f"of {total}" if first == total else f"and {total} steps are asked for"
            self.monitor.note(f"nothing to do: the run is complete at step {first} {of}")
            if self.beginning.continues:  # it may have been stopped before the export, and an older one may be there
                self.saved = Path(self.beginning.start.checkpoint.where)
        elif self.evaluations.exhausted(self.arguments.train.early_stopping_patience) and self.beginning.continues:
            self.saved = self.saved or Path(self.beginning.start.checkpoint.where)
        if self.saved is not None:
            best = self._best_saved()
            chosen = best or self.saved
            self.monitor.note(f"adapter: {chosen}, and for peft: {self._export(chosen)}")
            step = None if best is None else self.evaluations.best.step
            on_first(lambda: note_best(self.arguments.train.output_dir, step), self.mesh.world)
            config = self.beginning.config
            lora = self.beginning.lora
            task = lora.config.task_type
            caution = peft_caution(config.model_type, lora.adapters, config.routers, config.in_stacks)
            served = engines_caution(lora.config.to_dict(), lora.adapters) if task == "CAUSAL_LM" else None
            for note in (caution, dropout_caution(lora.config.to_dict(), lora.adapters), served):
                if note is not None:
                    self.monitor.note(note)
            self._push()
            command = generate_command(self.arguments, self.mesh, task, config.prefix is not None)
            self.monitor.note(f"try it: {command}")
        self._draw()
        self.monitor.note(f"look at it: megalora board {shlex.quote(self.arguments.train.output_dir)}")

    def _draw(self) -> None:
        """Draw the curves, where matplotlib is there for it. What is in the way is no fault of the run."""
        if self.mesh.world.is_first:
            try:
                picture = write_curves(self.arguments.train.output_dir)
            except (OSError, UserError) as error:
                self.monitor.note(f"the curves are not drawn: {error}")
            else:
                if picture is not None:
                    self.monitor.note(f"curves: {picture}")

    def _push(self) -> None:
        """Put the export into the repository that push_to_hub names. Raises UserError, on every rank. Collective."""
        train = self.arguments.train
        if train.push_to_hub is not None:
            folder = export_folder(train.output_dir)
            self.monitor.note(f"pushed: {on_first(lambda: push(folder, train.push_to_hub), self.mesh.world)}")

    def _best_saved(self) -> Path | None:
        """Return the checkpoint with the lowest evaluation loss where it is to be kept and is there. Collective."""
        best = self.evaluations.best
        if best is None or not self.arguments.train.keep_best:
            return None
        folder = iteration_folder(self.arguments.train.output_dir, best.step)
        there = on_first(folder.is_dir, self.mesh.world)
        if not there:
            self.monitor.note(f"the checkpoint with the lowest evaluation loss, of step {best.step}, is not there")
        return folder if there else None


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
