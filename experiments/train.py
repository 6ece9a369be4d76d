"""The training loop: batches, loss, optimizer, schedule; validation and checkpoints on the way."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from variants._adapter import Adapter

from . import batches
from .loss import count_tokens, training_loss
from .measure import measure, most_bytes
from .record import Metrics, Terminated, load_checkpoint, pack, save_checkpoint, some, unpack
from .tasks import Example

if TYPE_CHECKING:
    from .job import Run


@contextlib.contextmanager
def stopping(patient: bool) -> Iterator[list[int]]:
    """The signals (interrupt, terminate) that have come; a second one stops at once.

    With `patient` it does not: torchrun passes on what its processes got from the terminal too.
    """
    came: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if came and not patient:
            raise KeyboardInterrupt
        came.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Diverged(ArithmeticError):
    """A loss or a gradient that is not finite."""


class Trainer:
    """The loop: batches, loss, optimizer, schedule; validation and checkpoints on the way."""

    def __init__(
        self, run: "Run", adapter: Adapter, train: list[Example], scored: list[Example]
    ) -> None:
        self.run, self.adapter, self.examples, self.team = run, adapter, train, run.team
        self.validation = run.scorer.examples(run.prepared.splits.validation)
        self.validation = self.validation[: run.settings.eval.limit_during]
        self.settings, self.optim = run.settings.train, run.settings.optim
        self.steps: int = self.settings.steps  # type: ignore[assignment]
        self.model, self.device = run.loaded.model, run.device
        self.optimizer = adapter.optimizer(
            run.prepared.lr,
            steps=self.steps,
            weight_decay=self.optim.weight_decay,
            betas=(self.optim.beta1, self.optim.beta2),
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        self.step, self.seconds, self.eval_s = 0, 0.0, 0.0
        self.begun = False
        self.window = [0.0, 0.0, 0]  # summed loss and penalty, and steps, since the last row
        self.tokens = {"seen": 0, "trained": 0}
        self.measured: dict[str, Any] = {}
        self.durations: list[float] = []
        resumed = self._resume()
        after = self.step if resumed else None
        self.metrics = self.team.first(Metrics, run.path / "metrics.jsonl", after)

    def train(self) -> None:
        """Every step that is left. Raises `Diverged` at the first number that is not finite."""
        try:
            self.begin()
            with stopping(patient=self.team.size > 1) as stop:
                while self.step < self.steps:
                    self._advance()
                    signum = self.team.most(stop[0] if stop else 0)
                    if signum and self.step < self.steps:
                        self.leave(signum)
        finally:
            self.end()

    def begin(self) -> None:
        """What comes before the first step that is left, once."""
        if self.begun:
            return
        self.begun = True
        self.run.screen.phase("training", self.steps, done=self.step)
        if not self.measured:
            self.measured = self._measure()
        if self.step == 0 and self.settings.eval_every:
            self._validate()

    def end(self) -> None:
        """What comes after the last step, however it ended."""
        self.team.first(lambda: self.metrics.close())

    def _advance(self) -> None:
        """One step, and what is due after it."""
        began = time.perf_counter()
        batch, tokens = self.batch()
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for part in batches.split(batch, self.settings.accumulate):
            loss += self._backward(self.team.part(part), tokens)
        loss = self.team.sum(loss)
        self.team.reduce(self.adapter)
        loss_value, norm = self.learn(batch, tokens, loss)
        self.follow(time.perf_counter() - began, loss_value, norm)

    def follow(self, seconds: float, loss: float, norm: float) -> None:
        """What is due after a step that took so long."""
        self.durations.append(seconds)
        self.seconds += seconds
        self.run.screen.step(self.step, loss)
        if self._due(self.settings.log_every):
            self._log(norm)
        if self._due(self.settings.eval_every):
            self._validate()
        if self._due(self.settings.checkpoint_every):
            self._save()

    def leave(self, signum: int) -> None:
        """Ends the run between two steps, with a checkpoint of this one."""
        where = ""
        if self.settings.checkpoint_every:
            self._save()
            where = f"after step {self.step} of {self.steps}"
        self.team.leave((Terminated if signum == signal.SIGTERM else KeyboardInterrupt)(where))

    def _due(self, every: int | None) -> bool:
        """Each `every` steps and after the last; 0: never."""
        return bool(every) and (self.step % every == 0 or self.step == self.steps)

    def batch(self) -> tuple[list[Example], int]:
        """The items of the next step, and what their loss is averaged over."""
        found = self.items(self.step)
        self.team.seed(self.run.settings.seed, self.step)
        return found, count_tokens(found)

    def items(self, step: int) -> list[Example]:
        """The items of step `step`, from 0."""
        size: int = self.settings.batch_size  # type: ignore[assignment]
        chosen = batches.order(len(self.examples), size, step, self.run.settings.seed)
        return [self.examples[i] for i in chosen]

    def learn(self, batch: list[Example], tokens: int, loss: Tensor) -> tuple[float, float]:
        """One step of the optimizer, by the gradients of `loss`; (loss, gradient norm)."""
        penalty = self.adapter.penalty()
        if penalty is not None:
            penalty.backward()
        norm = self._clip()
        values = torch.stack([loss, norm, loss.new_zeros(()) if penalty is None else penalty])
        loss_value, norm_value, penalty_value = values.detach().tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            what = "loss" if not math.isfinite(loss_value) else "gradient"
            raise Diverged(f"the {what} of step {self.step + 1} is not finite")
        factor = schedule(self.optim.schedule, self.optim.warmup, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens["seen"] += sum(len(e.ids) for e in batch)
        self.tokens["trained"] += tokens
        self.window = [self.window[0] + loss_value, self.window[1] + penalty_value,
                       self.window[2] + 1]  # fmt: skip
        return loss_value, norm_value

    def _backward(self, part: Any, tokens: int) -> Tensor:
        pad_id = self.run.loaded.tokenizer.pad_token_id
        batch = batches.collate(part, pad_id, self.device)
        with self.run.scorer.cast():
            loss = training_loss(self.run.loaded, batch, tokens)
        loss.backward()
        return loss.detach()

    def _clip(self) -> Tensor:
        limit = self.optim.clip or math.inf
        return torch.nn.utils.clip_grad_norm_(self.adapter.parameters(), limit)

    def _log(self, norm: float) -> None:
        loss, penalty, count = self.window
        row: dict[str, Any] = {"step": self.step, "loss": loss / count, "grad_norm": norm,
                               "lr": self.optimizer.param_groups[0]["lr"]}  # fmt: skip
        state = self.adapter.allocation_state
        if self.adapter.choice.allocation.penalized:
            row["penalty"] = penalty / count
        if self.adapter.choice.allocation.scheduled and state is not None:
            row["budget"] = state["budget"]
            row["ranks"] = list(self.adapter.ranks().values())
        self._row(row | {"seconds": self.seconds})
        self.window = [0.0, 0.0, 0]

    def _row(self, row: dict[str, Any]) -> None:
        self.team.first(lambda: self.metrics.add(row))
        self.run.tracker.log(row)

    def _validate(self) -> None:
        began = time.perf_counter()
        scores = self.run.scorer.quick(self.validation)
        self.eval_s += time.perf_counter() - began
        row = {f"validation/{k}": v for k, v in scores.items()}
        self._row({"step": self.step, **row, "seconds": self.seconds})
        self.run.screen.note(self.step, ", ".join(f"{k} {v:.3g}" for k, v in scores.items()))

    def learning(self) -> dict[str, float]:
        """The mean of each validation score over the steps (the area under its curve)."""
        found = {}
        for key in ("loss", "exact"):
            points = [(row["step"], row[f"validation/{key}"]) for row in self.metrics.rows
                      if f"validation/{key}" in row]  # fmt: skip
            if len(points) > 1 and points[-1][0] > points[0][0]:
                area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2
                           for a, b in pairwise(points))  # fmt: skip
                found[f"mean_{key}"] = area / (points[-1][0] - points[0][0])
        return found

    def _measure(self) -> dict[str, Any]:
        """What the first batch keeps for backward and takes at most, its FLOPs; changes nothing.

        Of several processes each measures its part; the first one's counts.
        """
        part = self.team.part(batches.split(self.items(0), self.settings.accumulate)[0])
        state = self.adapter.state()
        self.model.train()

        def backward() -> None:
            with torch.random.fork_rng():
                self._backward(part, count_tokens(part))
            self.optimizer.zero_grad()

        found, most = measure(backward, self.model), most_bytes(backward, self.model)
        self.adapter.set_state(state)  # which an allocation may have noted the gradient in
        tokens = sum(len(e.ids) for e in part)
        return {"saved_activation_bytes": found["saved_bytes"], "step_peak_bytes": most,
                "flops_per_token": found["flops"] / tokens}  # fmt: skip

    def _save(self) -> None:
        self.team.agree(self.adapter.parameters())
        self.team.first(self._write)

    def _write(self) -> None:
        tensors = {f"adapter.{k}": t for k, t in self.adapter.tensors().items()}
        state = {
            "optimizer": self.optimizer.state_dict(),
            "adapter": self.adapter.state(),
            "rng": {"cpu": torch.get_rng_state()},
            "window": self.window,
            "seconds": self.seconds,
            "durations": self.durations[-1000:],
            "eval_s": self.eval_s,
            "tokens": self.tokens,
            "measured": self.measured,
        }
        if self.device.type == "cuda":
            state["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        plain = pack(state, "state", tensors)
        cpu = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
        save_checkpoint(self.run.checkpoints, self.step, cpu, plain)

    def _resume(self) -> bool:
        """Continues from the newest whole checkpoint, if there is one."""
        torch.manual_seed(self.run.settings.seed)  # of dropout, the adapter's and the model's own
        found = self.team.tell(load_checkpoint, self.run.checkpoints)
        if found is None:
            return False
        step, tensors, plain = found
        state = unpack(plain, tensors)
        prefix = "adapter."
        self.adapter.restore({k.removeprefix(prefix): t for k, t in tensors.items()
                              if k.startswith(prefix)})  # fmt: skip
        initial = [group["initial_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, initial, strict=True):
            group["initial_lr"] = lr
        self.adapter.set_state(_to(state["adapter"], self.device))
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step, self.seconds, self.eval_s = step, state["seconds"], state["eval_s"]
        self.window, self.tokens = state["window"], state["tokens"]
        self.measured = state["measured"]
        self.durations = state["durations"]
        self.run.screen.say(f"resumed after step {step} of {self.steps}")
        if self.run.changed:
            note = (f"resumed after step {step} with other code than began it: "
                    f"{some(self.run.changed)} changed; without {self.run.checkpoints} it begins "
                    f"anew")  # fmt: skip
            self.adapter.notes.append(note)
            self.run.screen.say(note)
            self.run.note_environment(changed=self.run.changed)  # for the next attempt too
        return True


def schedule(name: str, warmup: float, step: int, steps: int) -> float:
    """The factor of the learning rate at `step` (from 0): a linear warm-up, then the named rule.

    `warmup` below 1 is a share of the steps. cosine and linear end at zero after the last step.
    """
    warm = round(warmup * steps) if warmup < 1 else int(warmup)
    if step < warm:
        return (step + 1) / warm
    if name == "constant":
        return 1.0
    left = 1 - (step - warm) / max(1, steps - warm)
    return left if name == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return [_to(v, device) for v in value] if isinstance(value, list) else value
