"""The fine-tuning loop: one student, with or without a teacher.

It serves both jobs: with a teacher it aligns a shallower student (paper, section 3.3), without one it
fits the uncompressed detector. It knows nothing of processes: a rank hands in its share of each global
batch and a `Collective` that sums over ranks, so losses are those of the global batch whatever the
number of ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pbd_ray.compression.alignment import alignment_terms
from pbd_ray.compression.blocks import Model, from_detector, to_detector
from pbd_ray.compression.lora import merge_lora, prepare_student
from pbd_ray.compression.precision import Autocast, autocast_context
from pbd_ray.compression.schedule import ema_decay, learning_rate
from pbd_ray.config import AlignmentConfig, DetectorConfig, RunError
from pbd_ray.data.dataset import WindowBatch
from pbd_ray.detector.detector import Detector, DetectorOutput
from pbd_ray.detector.losses import (
    Targets,
    assign_targets,
    detection_losses,
    updated_normalizer,
)
from pbd_ray.detector.points import pyramid_mask

_LEAST_VARIANCE = 1e-12


class Diverged(RunError):
    """A loss is not finite; the message says at which step and with which learning rate."""


class Collective(Protocol):
    """What the loop needs of the other ranks."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""

    def gather(self, table: pa.Table) -> pa.Table:
        """The rows of all ranks, in the order of ranks, on every rank."""


@dataclass(frozen=True)
class OneProcess:
    """The collective of a run without ranks."""

    rank: int = 0
    world_size: int = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def gather(self, table: pa.Table) -> pa.Table:
        return table


ONE_PROCESS = OneProcess()


@dataclass(frozen=True)
class LossTerms:
    """Losses of one step or their mean over an epoch; `total` is what is minimised."""

    focal: float
    boundary: float
    feature: float
    class_kl: float
    boundary_distillation: float
    total: float


class FineTuning:
    """State of one fine-tuning run: student with adapters, EMA, optimiser, step counter.

    EMA runs over the trained tensors themselves (LoRA factors A and B separately, as the release does).
    The best model so far is kept beside the current one, so that one checkpoint resumes everything.

    Args:
        guide_config: architecture of the teacher; None: the student's.
    """

    def __init__(
        self,
        student: Model,
        teacher: Model | None,
        detector_config: DetectorConfig,
        num_classes: int,
        config: AlignmentConfig,
        backbone_lr: float,
        steps_per_epoch: int,
        seed_key: tuple[int, ...],
        *,
        guide_config: DetectorConfig | None = None,
        autocast: Autocast = "none",
        device: torch.device = torch.device("cpu"),
        collective: Collective = ONE_PROCESS,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.config = config
        self.backbone_lr = backbone_lr
        self.steps_per_epoch = steps_per_epoch
        self.seed_key = seed_key
        self.device = device
        self.collective = collective
        self.student = to_detector(student, detector_config, num_classes)
        generator = torch.Generator().manual_seed(_seed(*seed_key, 0))
        prepare_student(self.student, config, generator)
        self.student.backbone.checkpointing = config.optimizer.activation_checkpointing
        self.student.to(device)
        self.teacher: Detector | None = None
        if teacher is not None:
            guide = to_detector(teacher, guide_config or detector_config, num_classes)
            self.teacher = guide.to(device).requires_grad_(False)
        self.wrapped = wrap(self.student)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.student, config))
        self.autocast = autocast
        half = autocast == "float16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)
        self.step = 0
        self.ema = {name: value.detach().clone() for name, value in self._trained().items()}
        self.best: dict[str, Tensor] = dict(self.ema)

    @torch.no_grad()
    def standardize_features(self, batches: Iterable[WindowBatch]) -> None:
        """Set the backbone's final norm so that every channel of the features has mean 0 and deviation 1.

        An image ViT's channels differ little over a video and lie far from 0, and a fresh head does not
        learn on such features. Before the first step only.

        Args:
            batches: this rank's share; the moments are those of all ranks.
        """
        backbone = self.student.eval().backbone
        sums = torch.zeros(3, backbone.config.embed_dim, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(self.device)
            with autocast_context(self.autocast, self.device):
                features = backbone(batch.frames)
            valid = features.transpose(1, 2)[batch.mask].double().cpu()  # (real steps, d)
            sums += torch.stack([valid.sum(0), valid.square().sum(0), torch.full_like(valid[0], len(valid))])
        total, squares, count = self.collective.sum(sums)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=_LEAST_VARIANCE).sqrt()
        norm = backbone.norm
        norm.bias.copy_((norm.bias.double().cpu() - mean) / deviation)
        norm.weight.copy_(norm.weight.double().cpu() / deviation)
        self.ema = {name: value.detach().clone() for name, value in self._trained().items()}
        self.best = dict(self.ema)

    def train_step(self, batch: WindowBatch) -> LossTerms:
        """One optimiser step on this rank's share of a global batch.

        Raises:
            Diverged: the loss or the gradient is not finite.
        """
        rates = self.rates()
        for group in self.optimizer.param_groups:
            group["lr"] = rates["backbone" if group["name"] == "backbone" else "head"]
        batch = batch.to(self.device)
        counts = self._global_counts(batch)
        self._update_normalizer(counts.positives)
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = batch.split(self.config.optimizer.accumulation_steps)
        sums = torch.zeros(6, dtype=torch.float64)
        with _seeded(_seed(*self.seed_key, 1, self.step, self.collective.rank), self.device):
            for index, micro in enumerate(micro_batches):
                with self._maybe_no_sync(last=index == len(micro_batches) - 1):
                    terms = self._losses(micro, counts)
                    # DDP averages gradients over ranks; the terms are shares of the global loss.
                    self.scaler.scale(terms[-1] * self.collective.world_size).backward()
                sums += torch.stack([term.detach() for term in terms]).double().cpu()
        losses = LossTerms(*self.collective.sum(sums).tolist())
        self._require_finite("loss", losses.total)
        self._apply_gradients()
        self._update_ema()
        self.step += 1
        return losses

    def rates(self) -> dict[str, float]:
        """Learning rates of `backbone` (what of it trains) and `head` at the next step."""
        options = self.config.optimizer
        peaks = {"backbone": self.backbone_lr, "head": options.head_lr}
        return {
            name: learning_rate(self.step, peak, options, self.steps_per_epoch)
            for name, peak in peaks.items()
        }

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs, as named tensors (no pickle): trained tensors, EMA, best EMA,
        optimiser moments, loss normaliser, scaler scale and step."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step)}
        if self.scaler.is_enabled():
            scaler = self.scaler.state_dict()
            tensors["scaler"] = torch.tensor([scaler["scale"], scaler["_growth_tracker"]])
        tensors["normalizer"] = self.normalizer.detach()
        for name, value in self._trained().items():
            tensors[f"student/{name}"] = value.detach()
            tensors[f"ema/{name}"] = self.ema[name]
            tensors[f"best/{name}"] = self.best[name]
            for key, moment in self.optimizer.state.get(value, {}).items():
                tensors[f"optimizer/{key}/{name}"] = moment
        return {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; the tensors handed in are left as they are."""
        self.step = int(tensors["step"])
        if "scaler" in tensors:
            scale, growth = tensors["scaler"].tolist()
            kept = {"scale": scale, "_growth_tracker": int(growth)}
            self.scaler.load_state_dict(self.scaler.state_dict() | kept)
        with torch.no_grad():
            self.normalizer.copy_(tensors["normalizer"])
            for name, value in self._trained().items():
                value.copy_(tensors[f"student/{name}"])
                self.ema[name] = tensors[f"ema/{name}"].to(self.device, copy=True)
                self.best[name] = tensors[f"best/{name}"].to(self.device, copy=True)
                moments = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    stored = tensors.get(f"optimizer/{key}/{name}")
                    if stored is not None:
                        moments[key] = stored.to("cpu" if key == "step" else self.device, copy=True)
                if moments:
                    self.optimizer.state[value] = moments

    def remember_best(self) -> None:
        """The current EMA is the best so far."""
        self.best = {name: value.clone() for name, value in self.ema.items()}

    @contextlib.contextmanager
    def ema_student(self) -> Iterator[Detector]:
        """The student in eval mode with EMA weights; the trained weights come back afterwards."""
        trained = self._trained()
        kept = {name: value.detach().clone() for name, value in trained.items()}
        _copy_into(trained, self.ema)
        try:
            yield self.student.eval()
        finally:
            _copy_into(trained, kept)

    def best_model(self) -> Model:
        """The best EMA weights, LoRA merged. Ends the run: the student cannot train after it."""
        _copy_into(self._trained(), self.best)
        merge_lora(self.student)
        return from_detector(self.student)

    @property
    def normalizer(self) -> Tensor:
        """The head's loss normaliser: counts are summed over ranks before it moves, so all ranks agree."""
        return self.student.head.loss_normalizer

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    def _losses(self, batch: WindowBatch, counts: _Counts) -> tuple[Tensor, ...]:
        """This micro-batch's share of every global loss term, the total last."""
        config, head = self.config, self.student.config.head
        with autocast_context(self.autocast, self.device):
            output = self.wrapped(batch.frames, batch.mask, with_block_outputs=config.feature_loss)
            guide = self._guide(batch)
        targets = self._targets(batch)
        supervised = detection_losses(
            output, batch.segments, batch.labels, head, self.normalizer, targets=targets
        )
        positive = targets.positive(output.mask)
        terms = alignment_terms(output, guide, positive, config, counts.valid_points, counts.positives)
        # A mean over windows: this micro-batch's share of it.
        terms = replace(terms, feature=terms.feature * (len(batch.mask) / counts.windows))
        total = supervised.total + terms.weighted(config)
        return supervised.focal, supervised.boundary, terms.feature, terms.class_kl, terms.boundary, total

    @torch.no_grad()
    def _guide(self, batch: WindowBatch) -> DetectorOutput | None:
        if self.teacher is None or not (self.config.feature_loss or self.config.prediction_loss):
            return None
        guide: DetectorOutput = self.teacher(
            batch.frames, batch.mask, with_block_outputs=self.config.feature_loss
        )
        return guide

    def _targets(self, batch: WindowBatch) -> Targets:
        head = self.student.config.head
        return assign_targets(
            self.student.head.points,
            batch.segments,
            batch.labels,
            self.student.num_classes,
            head.center_radius,
        )

    def _global_counts(self, batch: WindowBatch) -> _Counts:
        valid = pyramid_mask(batch.mask, self.student.config.head.levels)
        positive = self._targets(batch).positive(valid)
        local = torch.tensor([positive.sum(), valid.sum(), len(batch.mask)], dtype=torch.float64)
        positives, valid_points, windows = self.collective.sum(local).tolist()
        return _Counts(max(positives, 1.0), max(valid_points, 1.0), windows)

    def _update_normalizer(self, positives: float) -> None:
        momentum = self.student.config.head.normalizer_momentum
        self.normalizer.copy_(updated_normalizer(self.normalizer, torch.tensor(positives), momentum))

    def _apply_gradients(self) -> None:
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trained, self.config.optimizer.clip_norm)
        # A scaler skips such a step and goes on with a lower scale, as long as the scale can be to blame.
        if not self.scaler.is_enabled() or self.scaler.get_scale() < 1:
            self._require_finite("gradient norm", float(norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(f"{what} {value} at step {self.step} with learning rate {self.backbone_lr:g}")

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = ema_decay(self.step, self.config.optimizer)
        for name, value in self._trained().items():
            self.ema[name].lerp_(value.detach(), 1 - decay)

    def _maybe_no_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return contextlib.nullcontext() if last or no_sync is None else no_sync()


@dataclass(frozen=True)
class _Counts:
    """Over the global batch."""

    positives: float
    valid_points: float
    windows: float


def _parameter_groups(student: Detector, config: AlignmentConfig) -> list[dict[str, Any]]:
    """Backbone group (decayed, norms and biases too), head weights (decayed), head norms, biases, scales."""
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": [], "head_no_decay": []}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("backbone."):
            groups["backbone"].append(parameter)
        elif parameter.ndim > 1 and "scale" not in name:
            groups["head"].append(parameter)
        else:
            groups["head_no_decay"].append(parameter)
    decay = config.optimizer.weight_decay
    return [
        {"name": name, "params": params, "weight_decay": 0.0 if name == "head_no_decay" else decay}
        for name, params in groups.items()
        if params
    ]


def _copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Drop path and dropout draw from torch's global generator: seed it for one step, then restore it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
