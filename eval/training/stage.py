"""A training loop that resumes bit for bit: optimiser, averaged weights, schedule, log and checkpoint."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from eval.common.files import expecting, recovered, replacing, write_json


SHARES = (10, 25, 50, 100)  # per cent of the steps after which the averaged weights are kept
DECAY = 0.5  # last fraction of the run in which the learning rate falls to zero
WARM_UP = 200  # steps
AVERAGING = 0.999


class _Around(torch.nn.Module):
    """A model as a module of its own, as capturing replaces a module's forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments):
        return self.model(*arguments)


class Stage:
    """One training, in a folder of its own: `settings.json`, `log.csv`, `checkpoint/` and what `keep` writes.

    Args:
        settings: what the weights depend on; `steps`, `batch`, `seed`, `learning_rate`, `mixed_precision` and, if it is there,
            `compile` are read here. A folder of other settings is refused.
        every: steps between a log row with a checkpoint and the next.
        keep: (model with averaged weights, per cent of the steps done), called after each of `SHARES`.
    """

    def __init__(
        self,
        folder: Path,
        model: torch.nn.Module,
        settings: Mapping[str, Any],
        every: int,
        keep: Callable[[torch.nn.Module, int], None],
    ):
        self.folder, self.settings, self.every, self.keep, self.step = folder, settings, every, keep, 0
        self._claim()
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass failed on an MMDiT (PyTorch 2.11, H200)
        uncached = AutocastKwargs(cache_enabled=False)  # a graph that is captured must cast the weights at each replay
        self.accelerator = Accelerator(mixed_precision=settings["mixed_precision"], kwargs_handlers=[uncached])
        self.device = self.accelerator.device
        optimizer = torch.optim.AdamW(
            model.parameters(), settings["learning_rate"], betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.ema = EMAModel(self.parameters, decay=AVERAGING, use_ema_warmup=True, foreach=True)
        self._resume()

    @property
    def parameters(self):
        """Of the model as it was given."""
        return list(self.accelerator.unwrap_model(self.model).parameters())

    def _claim(self):
        path, settings = self.folder / "settings.json", json.loads(json.dumps(self.settings))
        if not path.exists():
            return write_json(path, settings)
        with expecting("settings of a training", path, "remove the folder, and the training begins anew"):
            found = json.loads(path.read_text())
        if changed := sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key)):
            told = ", ".join(f"{key} {found.get(key)!r}, not {settings.get(key)!r}" for key in changed)
            raise ValueError(f"Expected {self.folder} to be of this training, but it has {told}: name another --run.")

    def _rate(self, step):
        left = (self.settings["steps"] - step) / max(1, DECAY * self.settings["steps"])
        return min(1.0, (step + 1) / WARM_UP, max(left, 0.01))

    def _resume(self):
        path = recovered(self.folder / "checkpoint")
        if path.exists():
            with expecting("a whole checkpoint", path, "remove it, and the training begins anew"):
                self.accelerator.load_state(path)
                self.ema.load_state_dict(torch.load(path / "ema.pt", map_location=self.device))
            self.step = self.schedule.last_epoch

    def graphed(self, *arguments: Any) -> torch.nn.Module:
        """The model for arguments of these shapes, captured with its backward pass into CUDA graphs: small networks wait for
        the launches of their kernels otherwise. With `compile`, what is captured are inductor's kernels. Elsewhere the model
        itself."""
        if self.device.type != "cuda":
            return self.model
        model = torch.compile(self.model) if self.settings.get("compile") else self.model
        with self.accelerator.autocast():
            return torch.cuda.make_graphed_callables(_Around(model), arguments, allow_unused_input=True)

    def save(self) -> None:
        """The checkpoint that a next start goes on from."""
        with replacing(self.folder / "checkpoint") as part:
            self.accelerator.save_state(part)
            torch.save(self.ema.state_dict(), part / "ema.pt")

    def generator(self, step: int) -> torch.Generator:
        """The only source of randomness of a step, so that a resumed run repeats an unbroken one."""
        return torch.Generator(self.device).manual_seed(hash((self.settings["seed"], step)) % 2**63)

    def train(
        self,
        loss_of: Callable[[int], Tensor],
        validate: Callable[[torch.nn.Module], Tensor],
    ) -> None:
        """Up to the last step, from the checkpoint if there is one: the loss of a step's number, and the number to log of the
        averaged model."""
        steps, first = self.settings["steps"], self.step
        marks = {math.ceil(steps * share / 100): share for share in SHARES}
        running, started = torch.zeros((), device=self.device), time.perf_counter()
        with tqdm(total=steps, initial=first, desc=self.folder.name, mininterval=1) as bar:
            while self.step < steps:
                loss = self._one_step(loss_of)
                running = loss if self.step == first + 1 else torch.lerp(running, loss, 0.02)
                bar.update()
                if self.step in marks:
                    self.averaged(lambda model: self.keep(model, marks[self.step]))
                if self.step % self.every == 0 or self.step == steps:
                    bar.set_postfix(loss=f"{running.item():.4f}")
                    pace = (self.step - first) / (time.perf_counter() - started)
                    validation = self.averaged(validate)
                    self._log(running.item(), float(validation), pace)
                    self.save()

    def _one_step(self, loss_of):
        with self.accelerator.autocast():
            loss = loss_of(self.step)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.step(self.parameters)
        self.step += 1
        return loss.detach()

    def averaged(self, function: Callable[[torch.nn.Module], Any]) -> Any:
        """`function` of the model with averaged weights in place, without gradients."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            with torch.no_grad(), self.accelerator.autocast():
                return function(self.accelerator.unwrap_model(self.model).eval())
        finally:
            self.ema.restore(self.parameters)
            self.model.train()

    def _log(self, loss, validation, pace):
        """A row for each log step; those of steps that a killed run took in vain are taken away."""
        row = {
            "step": self.step,
            "samples": self.step * self.settings["batch"],
            "loss": round(loss, 5),
            "validation": round(validation, 5),
            "learning_rate": float(f"{self.schedule.get_last_lr()[0]:.2e}"),
            "steps_per_second": round(pace, 2),
        }
        path = self.folder / "log.csv"
        rows = pd.read_csv(path).query("step < @self.step").to_dict("records") if path.exists() else []
        with replacing(path) as part:
            pd.DataFrame([*rows, row]).to_csv(part, index=False)
