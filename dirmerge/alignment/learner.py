"""One run of the learning: its steps, its guard, and its state in a file."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirmerge import ops
from dirmerge.alignment import guard
from dirmerge.alignment.guard import Reading
from dirmerge.alignment.heads import CallableHead, Head, as_head, read_pair, write_pair
from dirmerge.alignment.learned import Learned, LearnProgress
from dirmerge.alignment.losses import alignment_loss, entropy, etf_targets, rotation_loss, rotation_target
from dirmerge.alignment.model import AlignmentTask, Batch, Model, autocast, device_of, paired
from dirmerge.alignment.weights import ScaledUpdates
from dirmerge.errors import CheckpointError
from dirmerge.linalg import seed_for
from dirmerge.recipe.align import LearnOptions

_VERSION = 2
# Newton–Schulz steps of a retraction: the steps are so small that one restores orthogonality to rounding.
# Where it does not, the step is taken again with the op's own number.
_QUICK, _TOLERANCE = 1, 1e-5


@dataclass(eq=False)
class _TaskState:
    """State of one task: its rotation, class means, targets and predictions."""

    task: AlignmentTask
    head: Head | CallableHead
    batches: Sequence[Batch]
    start_map: Tensor | None
    watched: list[int]
    rotation: Tensor | None = None
    first: Tensor | None = None  # Adam's moments, in the Lie algebra
    second: Tensor | None = None
    targets: Tensor | None = None
    means: Tensor | None = None
    seen: Tensor | None = None
    goal: Tensor | None = None  # R*
    start: Tensor | None = None  # predictions at the start
    best: Tensor | None = None  # best rotation
    reference: Tensor | None = None  # predictions of the fine-tune


class Learner:
    """One run of the learning."""

    def __init__(
        self,
        base: Model,
        weights: ScaledUpdates,
        tasks: Sequence[AlignmentTask],
        options: LearnOptions,
        maps: Sequence[Tensor] | None,
        own: Iterable[Model | torch.nn.Module] | None = None,
    ) -> None:
        names = [task.name for task in tasks]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"tasks must have different names, got {', '.join(names) or 'no task'}")
        if maps is not None and len(maps) != len(tasks):
            raise ValueError(f"maps must have one matrix per task, got {len(maps)} for {len(tasks)} tasks")
        self.weights = weights
        self.options = options
        self.device = device_of(base)
        self.names = names
        self.tasks = []
        for t, task in enumerate(tasks):
            batches = task.batch_list()
            count = min(options.watch, len(batches))
            watched = [round(i * (len(batches) - 1) / max(1, count - 1)) for i in range(count)]
            start_map = None if maps is None else maps[t].detach().to(self.device)
            head = as_head(task.head).on(self.device)
            self.tasks.append(_TaskState(task, head, batches, start_map, watched))
        self.own = own
        self.scales = weights.start.clone()
        self.first = torch.zeros_like(self.scales)
        self.second = torch.zeros_like(self.scales)
        self.best_scales = self.scales.clone()
        self.best_step = 0
        self.best_score = (-math.inf, -math.inf)
        self.step = 0
        self.stopped: str | None = None
        self.history: list[Reading] = []

    def begin(self) -> None:
        """Measures sizes, class means, predictions and loss at the start, which the guard compares later."""
        with torch.no_grad():
            for state in self.tasks:
                self._begin_task(state)
            if self.own is not None:
                self._ask(self.own)
        reading = self._look()
        self._keep(reading)

    def _begin_task(self, state: _TaskState) -> None:
        z = torch.cat([self._features(state, state.batches[i]) for i in state.watched])
        d, options = z.shape[1], self.options
        if state.start_map is not None:
            if state.start_map.shape != (d, d):
                shape = tuple(state.start_map.shape)
                raise ValueError(f"task {state.task.name}: its map must have shape ({d}, {d}), got {shape}")
            state.start_map = state.start_map.to(z.dtype)
        mapped, _ = self._mapped(state, z)
        logits = state.head.logits(mapped)
        classes, predicted = logits.shape[1], logits.argmax(1)
        state.start = predicted.cpu()
        if options.rotate or options.alpha > 0:
            seed = seed_for(state.task.name, options.seed)
            state.targets = etf_targets(
                state.head,
                classes,
                d,
                mode=options.targets,
                nearest_polar=options.nearest_polar,
                seed=seed,
            ).to(z)
        if options.rotate:
            eye = torch.eye(d, dtype=z.dtype, device=self.device)
            state.rotation, state.goal, state.best = eye, eye.clone(), eye.clone()
            state.first, state.second = torch.zeros_like(eye), torch.zeros_like(eye)
            state.means = torch.zeros(classes, d, dtype=z.dtype, device=self.device)
            state.seen = torch.zeros(classes, dtype=torch.bool, device=self.device)
            self._average(state, mapped, predicted)
            self._aim(state)

    def _ask(self, own: Iterable[Model | torch.nn.Module]) -> None:
        """Runs every task's fine-tune on its watched batches, for the classes it predicts."""
        states = {state.task.name: state for state in self.tasks}
        # enumerate() would hold a fine-tune while the next one is made.
        for task, source in paired([state.task for state in self.tasks], own):
            state = states[task.name]
            model = source if isinstance(source, Model) else Model(source)
            with autocast(self.device, self.options.bf16):
                z = torch.cat([task.read(model, state.batches[i]) for i in state.watched])
            state.reference = state.head.logits(z.to(self.device)).argmax(1).cpu()
            del source, model  # before the next one is made

    def go(self, path: Path | None, progress: Callable[[LearnProgress], None] | None) -> Learned:
        """Runs the remaining steps, saves the state at every check, and returns the best state."""
        began = time.perf_counter()
        while self.step < self.options.steps and self.stopped is None:
            self.weights.set(self.scales)
            loss = self.advance()
            checked = self.step % self.options.check_every == 0 or self.step == self.options.steps
            if checked or not math.isfinite(loss):
                reading = self._look()
                if reading.within and math.isfinite(loss):
                    self._keep(reading)
                else:
                    self.history.append(reading)
                    limits = (self.options.min_agreement, self.options.max_shift)
                    self.stopped = guard.complaint(reading, self.history[0], self.names, *limits)
                if path is not None:
                    self.save(path)
            if progress is not None:
                seconds = time.perf_counter() - began
                progress(LearnProgress(self.step, self.options.steps, loss, seconds))
        return self._result(time.perf_counter() - began)

    def advance(self) -> float:
        """Runs one step: forward and backward of one batch per task, then updates λ and the rotations."""
        total = 0.0
        for state in self.tasks:
            if state.rotation is not None:
                state.rotation.requires_grad_(True)
            z = self._features(state, state.batches[self._index(state)])
            loss, _ = self._loss(state, z, learning=True)
            (loss / len(self.tasks)).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.step += 1
        direction = _adam(self.weights.gradient(), self.first, self.second, self.step)
        self.scales = self.scales - self.options.lr_scale * direction
        for state in self.tasks:
            if state.rotation is not None:
                self._rotate(state)
        return total / len(self.tasks)

    def _rotate(self, state: _TaskState) -> None:
        assert state.rotation is not None  # the caller's condition
        assert state.first is not None
        assert state.second is not None
        rotation = state.rotation.detach()
        gradient = state.rotation.grad
        assert gradient is not None  # every loss contains the rotation
        product = rotation.mT @ gradient
        direction = _adam((product - product.mT) / 2, state.first, state.second, self.step)
        if bool(torch.isfinite(direction).all()):
            # The op takes the skew part of Rᵀ(R direction), which is the direction itself.
            rate, ascent = self.options.lr_rotation, rotation @ direction
            moved = ops.rotation_step(rotation, ascent, rate=rate, steps=_QUICK)
            if float(moved.deviation) > _TOLERANCE:
                moved = ops.rotation_step(rotation, ascent, rate=rate)
            rotation = moved.rotation
        state.rotation = rotation
        if self.step % self.options.refresh == 0:
            self._aim(state)

    def _index(self, state: _TaskState) -> int:
        """Returns the number of this step's batch. The order of an epoch follows from its number alone."""
        epoch, position = divmod(self.step, len(state.batches))
        seed = seed_for(f"{state.task.name}:{epoch}", self.options.seed)
        order = torch.randperm(len(state.batches), generator=torch.Generator().manual_seed(seed))
        return int(order[position])

    def _features(self, state: _TaskState, batch: Batch) -> Tensor:
        with autocast(self.device, self.options.bf16):
            return state.task.read(self.weights.model, batch)

    def _mapped(self, state: _TaskState, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features after the start map, and after the start map and the rotation."""
        mapped = z if state.start_map is None else z @ state.start_map
        return mapped, mapped if state.rotation is None else mapped @ state.rotation

    def _loss(self, state: _TaskState, z: Tensor, *, learning: bool) -> tuple[Tensor, Tensor]:
        """Returns the loss of one task's features and the predicted classes."""
        mapped, turned = self._mapped(state, z)
        logits = state.head.logits(turned)
        predicted = logits.detach().argmax(1)
        loss = entropy(logits)
        if self.options.alpha > 0:
            assert state.targets is not None  # _begin_task
            loss = loss + self.options.alpha * alignment_loss(turned, state.targets, predicted)
        if state.rotation is not None:
            assert state.goal is not None  # _begin_task
            if learning:
                self._average(state, mapped.detach(), predicted)
            loss = loss + self.options.beta * rotation_loss(state.rotation, state.goal)
        return loss, predicted

    @torch.no_grad()
    def _average(self, state: _TaskState, z: Tensor, predicted: Tensor) -> None:
        """Updates the running means of the batch's classes; the first mean of a class is taken unchanged."""
        assert state.means is not None  # _begin_task
        assert state.seen is not None
        classes = state.means.shape[0]
        counts = torch.bincount(predicted, minlength=classes)
        sums = torch.zeros_like(state.means).index_add_(0, predicted, z.to(state.means))
        present = counts > 0
        means = sums / counts.clamp(min=1).unsqueeze(1)
        keep = torch.where(state.seen, self.options.ema, 0.0).unsqueeze(1)
        moved = keep * state.means + (1 - keep) * means
        state.means = torch.where(present.unsqueeze(1), moved, state.means)
        state.seen = state.seen | present

    def _aim(self, state: _TaskState) -> None:
        assert state.means is not None  # _begin_task
        assert state.seen is not None
        assert state.targets is not None
        if int(state.seen.sum()) > 1 and bool(torch.isfinite(state.means).all()):
            eye = torch.eye(state.means.shape[1], dtype=state.means.dtype, device=self.device)
            state.goal = rotation_target(state.means, state.targets, state.seen, eye)

    @torch.no_grad()
    def _look(self) -> Reading:
        """Measures loss and predictions on the watched batches, at the current λ and rotations."""
        self.weights.set(self.scales)
        total = 0.0
        predictions = []
        for state in self.tasks:
            z = torch.cat([self._features(state, state.batches[i]) for i in state.watched])
            loss, predicted = self._loss(state, z, learning=False)
            total += float(loss)
            predictions.append(predicted.cpu())
        start = [state.start for state in self.tasks if state.start is not None]
        limits = (self.options.min_agreement, self.options.max_shift)
        known = [state.reference for state in self.tasks if state.reference is not None]
        return guard.read(self.step, total / len(self.tasks), start, predictions, *limits, known or None)

    def _keep(self, reading: Reading) -> None:
        """Records an accepted reading, and stores the state if it is the best so far."""
        self.history.append(reading)
        if reading.score > self.best_score:
            self.best_score, self.best_step = reading.score, reading.step
            self.best_scales = self.scales.clone()
            for state in self.tasks:
                if state.rotation is not None:
                    state.best = state.rotation.detach().clone()

    def _result(self, seconds: float) -> Learned:
        self.weights.set(self.best_scales)
        matrices: list[Tensor | None] = []
        for state in self.tasks:
            matrix = state.start_map
            if state.best is not None:
                matrix = state.best if matrix is None else matrix @ state.best
            matrices.append(matrix)
        pairs = zip(self.tasks, matrices, strict=True)
        # A head stays where the caller has it.
        heads = [
            head if matrix is None else head.folded(matrix)
            for head, matrix in ((as_head(state.task.head), matrix) for state, matrix in pairs)
        ]
        return Learned(
            model=self.weights.merged(),
            scales=self.weights.scales_of(self.best_scales),
            matrices=matrices,
            heads=heads,
            best_step=self.best_step,
            steps=self.step,
            stopped=self.stopped,
            history=self.history,
            seconds=seconds,
        )

    def fingerprint(self) -> str:
        """Returns the hash of options, tasks, heads and maps: a state fits only a run of the same hash."""
        options = {k: v for k, v in self.options.to_plain().items() if k != "steps"}
        options["own"] = self.own is not None
        digest = hashlib.sha256(repr(sorted(options.items())).encode())
        digest.update(repr([self.weights.groups, self.weights.names, self.weights.components]).encode())
        digest.update(self.weights.start.cpu().numpy().tobytes())
        for state in self.tasks:
            digest.update(repr([state.task.name, len(state.batches)]).encode())
            if isinstance(state.head, Head):
                digest.update(state.head.weight.detach().cpu().float().contiguous().numpy().tobytes())
            if state.start_map is not None:
                digest.update(state.start_map.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        """Returns every tensor of the state, by name."""
        found = {name: getattr(self, name) for name in ("scales", "first", "second", "best_scales")}
        for t, state in enumerate(self.tasks):
            for name in _SAVED:
                value = getattr(state, name)
                if value is not None:
                    found[f"{t}.{name}"] = value.detach()
        return found

    def save(self, path: Path) -> None:
        """Writes the whole state; a run resumed from it ends with the same result, bit for bit."""
        content = {
            "version": _VERSION,
            "run": self.fingerprint(),
            "step": self.step,
            "best_step": self.best_step,
            "best_score": self.best_score,
            "stopped": self.stopped,
            "history": [reading.to_dict() for reading in self.history if math.isfinite(reading.loss)],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pair(path, {name: value.cpu() for name, value in self._tensors().items()}, content)

    def restore(self, path: Path) -> None:
        """Restores a saved state.

        Raises:
            CheckpointError: the file is damaged, or belongs to another run.
        """
        tensors, content = read_pair(path)
        if content.get("version") != _VERSION or content.get("run") != self.fingerprint():
            raise CheckpointError(
                f"{path}: is the state of another run (other options, models, heads or tasks); remove it, or "
                "choose another file"
            )
        self.begin()  # for the shapes that everything must have
        expected = self._tensors()
        if tensors.keys() != expected.keys():
            odd = sorted(tensors.keys() ^ expected.keys())[0]
            raise CheckpointError(f"{path}: tensor {odd!r} is missing, or not one of a state")
        for name, value in expected.items():
            found = tensors[name]
            if found.shape != value.shape or found.dtype != value.dtype:
                raise CheckpointError(
                    f"{path}: tensor {name!r} must be {value.dtype} {tuple(value.shape)}, got {found.dtype} "
                    f"{tuple(found.shape)}"
                )
            index, _, field_name = name.rpartition(".")
            setattr(self.tasks[int(index)] if index else self, field_name, found.to(value.device))
        try:
            self.step, self.best_step = int(content["step"]), int(content["best_step"])
            self.stopped = content["stopped"]
            agreed, loss = content["best_score"]
            self.best_score = (float(agreed), float(loss))
            self.history = [_reading(plain) for plain in content["history"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path.with_suffix('.json')}: is no state of a run: {error}") from error


def _reading(plain: Any) -> Reading:
    lists = {key: tuple(value) for key, value in plain.items() if isinstance(value, list)}
    return Reading(**{**plain, **lists})


_SAVED = ("start", "rotation", "first", "second", "targets", "means", "seen", "goal", "best", "reference")


def _adam(gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
    """Returns Adam's direction and moves its moments in place; β = (0.9, 0.999), ε = 1e-8."""
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.001)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
