"""Readings of a Trainer's run: verified, and with observers measuring beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from eos_monitor.callbacks.losses import MeasuredLoss
from eos_monitor.callbacks.monitor_settings import MonitorSettings
from eos_monitor.callbacks.observer import Observers
from eos_monitor.callbacks.pending_reading import PendingReading
from eos_monitor.callbacks.reading_context import ReadingContext
from eos_monitor.callbacks.trainer_sandbox import TrainerSandbox
from eos_monitor.forecast.lookahead import Settings
from eos_monitor.isolation.fingerprint import Fingerprint, fingerprint
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.verification import Verification
from eos_monitor.readings.reading import Measurement


class TrainerGauge:
    """Collects the probe from a Trainer's batches, and measures on it.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        loss: The loss that is measured.
        settings: What the monitor was told.
        engine: Takes the readings.
        observers: They measure beside a reading that is ready.
        say: Called with what cannot be verified, in words.
        owners: Objects that are no part of the run that is verified.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        *,
        loss: MeasuredLoss,
        settings: MonitorSettings,
        engine: Engine,
        observers: Observers,
        say: Callable[[str], None],
        owners: tuple[Any, ...],
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._loss = loss
        self._settings = settings
        self._engine = engine
        self._observers = observers
        self._say = say
        self._owners = owners
        self._verification = Verification(settings.verify)

    def collect(self, batch: Any, batch_idx: int) -> None:
        """Offer a training batch to the probe."""
        samples = self._engine.samples
        if samples.seen == 0 and not self._sees_all_in_a_step():
            self._engine.start_small()
        if samples.collecting:
            if self._trainer.current_epoch > 0 and batch_idx == 0:
                samples.close()  # the first epoch had fewer samples than were asked for
            self._engine.collect(batch)
            if batch_idx + 1 >= self._trainer.num_training_batches:
                samples.close()

    def measure(self, batch: Any, step: int, ahead: Callable[[int], Settings | None]) -> PendingReading | None:
        """Take a reading before ``step``; None if it failed.

        Args:
            batch: Batch of the step; None after the last one.
            step: Optimizer step.
            ahead: n -> what the schedulers will have set n steps from the one to come.
        """
        beside = 0.0

        def measure() -> Measurement | None:
            nonlocal beside
            with self._observers.in_effect():
                measurement = self._measurement(batch, step)
                if measurement is not None:
                    beside = self._measure_beside(batch, step, measurement, ahead)
                return measurement

        measurement = self._verification.around(self._fingerprint, self._engine, self._say, measure)
        return None if measurement is None else PendingReading(measurement, beside)

    def _measurement(self, batch: Any, step: int) -> Measurement | None:
        trainer = self._trainer
        module = self._module
        return self._engine.measure(
            module,
            self._loss.function,
            self._loss.optimizers,
            step=step,
            batch=batch,
            full_batch=self._is_full_batch(),
            accumulate=trainer.accumulate_grad_batches if module.automatic_optimization else 1,
            sandbox=lambda: TrainerSandbox(trainer, module),
        )

    def _measure_beside(
        self, batch: Any, step: int, measurement: Measurement, ahead: Callable[[int], Settings | None]
    ) -> float:
        """Let observers measure beside a reading; return the seconds to be added to its own."""
        if not self._observers or not measurement.reading.ready or self._engine.off is not None:
            return 0.0  # no reading that is charged, or written
        began = time.perf_counter()
        context = self._engine.guard.run(
            "measuring beside a reading",
            lambda: ReadingContext(
                trainer=self._trainer,
                pl_module=self._module,
                loss_fn=self._loss.function,
                optimizers=self._loss.optimizers,
                batches=self._engine.samples.on(self._module.device, batch),  # may want memory
                step=step,
                measurement=measurement,
                modes=self._engine.eigenvectors,
                verdict=self._engine.verdict,
                ahead=ahead,
            ),
        )
        if context is not None:
            self._observers.measure(context)
        # Around every reading the time is already that of all of it.
        return 0.0 if self._settings.verify == "always" else time.perf_counter() - began

    def _fingerprint(self) -> Fingerprint:
        trainer = self._trainer
        schedulers = {f"lr_schedulers[{i}]": config.scheduler for i, config in enumerate(trainer.lr_scheduler_configs)}
        return fingerprint(self._module, trainer.optimizers, also=schedulers, leave_out=(trainer, *self._owners))

    def _is_full_batch(self) -> bool:
        told = self._settings.probe.full_batch
        if told is not None:
            return told
        samples = self._engine.samples
        batches = self._trainer.num_training_batches
        if samples.kind == "batch":
            return bool(batches == 1) and self._sees_all_in_a_step()
        collected = samples.kind == "fixed" and samples.seen == batches and samples.complete
        return bool(collected and self._sees_all_in_a_step())

    def _sees_all_in_a_step(self) -> bool:
        """Whether an epoch is one step, and every epoch of the same data; or whether that is what the user told."""
        if self._settings.probe.full_batch is not None:
            return self._settings.probe.full_batch
        batches = self._trainer.num_training_batches
        one_step_an_epoch = batches == 1 or self._trainer.accumulate_grad_batches >= batches
        return bool(one_step_an_epoch) and same_data_each_epoch(self._trainer.train_dataloader, batches)


def same_data_each_epoch(loader: Any, batches: int) -> bool:
    """Whether every epoch of so many batches is of the same samples; of a loader of a kind of its own, if it is whole.

    Args:
        loader: The training DataLoader, or a collection of some.
        batches: Batches that an epoch uses, fewer than there are under ``limit_train_batches``.
    """
    if isinstance(loader, Mapping):
        return all(same_data_each_epoch(one, batches) for one in loader.values())
    if isinstance(loader, (list, tuple)) and not all(isinstance(one, Tensor) for one in loader):
        return all(same_data_each_epoch(one, batches) for one in loader)
    if not isinstance(loader, DataLoader):
        return not hasattr(loader, "__len__") or len(loader) <= batches
    if isinstance(loader.dataset, IterableDataset):
        return False  # nobody knows what it yields next
    batched = loader.batch_sampler
    if batched is not None and type(batched) is not BatchSampler:
        return False
    sampler: Any = loader.sampler if batched is None else batched.sampler
    if type(sampler) is SequentialSampler:
        return True
    size = len(loader.dataset)  # type: ignore[arg-type]
    drawn_once = type(sampler) in (RandomSampler, DistributedSampler) and not getattr(sampler, "replacement", False)
    dropped = batched is not None and batched.drop_last and len(sampler) % batched.batch_size != 0
    replicas = getattr(sampler, "num_replicas", 1)
    return drawn_once and len(sampler) * replicas == size and not dropped and len(loader) <= batches


def first_double_backward(device: torch.device) -> None:
    """Pay autograd's lazy initialization now, so that it is not charged to the first reading."""
    with torch.inference_mode(False), torch.enable_grad():
        w = torch.zeros(2, 2, device=device, requires_grad=True)
        loss = nn.functional.linear(torch.ones(1, 2, device=device), w).tanh().square().sum()
        (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
        torch.autograd.grad(gradient.sum(), w)
