"""Every knob of the product, typed.

A recipe has two parts. `experiment` decides the result: it is hashed, and a run directory only ever
holds rounds of one experiment. `execution` says where and with what it runs: paths, workers, logging;
it may differ from one start to the next.

Units stand in the names: `_seconds`, `_frames` (frames of the video file), `_steps` (the input or
feature grid), `_pixels`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


Trainable = Literal["lora", "full", "head", "lora_only", "none"]
"""What fine-tuning trains (`compression/lora.py`)."""


class UserError(ValueError):
    """What a user can cause and mend: jobs print the message, one line, and exit with status 2."""


class RunError(RuntimeError):
    """The run cannot go on, though nothing the user wrote is wrong. What is committed stays, and the
    same command goes on from there: jobs print the message, one line, and exit with status 1."""


def one_line(problem: object) -> str:
    """An error, or what else says what went wrong, as text on one line."""
    return " ".join(str(problem).split())


class ConfigError(UserError):
    """A recipe, an override or a path in it is wrong."""


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SyntheticConfig(Section):
    """The embedded data set (`data/synthetic.py`)."""

    seed: int = 0
    fit_videos: Count = 96
    selection_videos: Count = 24
    test_videos: Count = 48
    short_side_pixels: Count = 48
    fps: Count = 20
    min_duration_seconds: Positive = 18.0
    max_duration_seconds: Positive = 40.0


class DataConfig(Section):
    """Which videos play which part. Test videos are read once a committed round and choose nothing."""

    source: Literal["files", "synthetic"] = "files"
    synthetic: SyntheticConfig | None = None
    classes: tuple[str, ...] | None = None
    """Class names in label order; None: every label of the annotations, sorted."""
    class_agnostic: bool = False
    """Train and predict one class, 'action' (ActivityNet); an external classifier names the actions."""
    fit_subset: str = "training"
    selection_subset: str | None = None
    """None: `selection_fraction` of the fit videos is drawn and taken out of the fit set."""
    selection_fraction: Fraction = 0.1
    split_seed: Annotated[int, Field(ge=0)] | None = None
    """Draws the selection videos; None: `experiment.seed` does. Runs with several seeds that start from one
    teacher must share it, or some choose by videos that their teacher was trained on."""
    test_subset: str = "validation"
    blocked_videos: tuple[str, ...] = ()
    """Videos the evaluation leaves out (ActivityNet's blocked list)."""
    min_instance_fraction: Fraction = 0.0
    """Training instances shorter than this fraction of the video are left out (ActivityNet 0.01)."""
    max_quarantined: Fraction = 0.05
    """Of the fit, the selection and the test videos, the share of each that may be left out because the files
    cannot be used; with more the run refuses to start. 0: every video must be usable."""

    @model_validator(mode="after")
    def _synthetic_has_settings(self) -> DataConfig:
        if (self.source == "synthetic") != (self.synthetic is not None):
            raise ValueError("data.synthetic goes with data.source=synthetic, and only with it")
        return self


class GridConfig(Section):
    """How a video becomes the detector's input grid, and its pixels (design, section 2)."""

    kind: Literal["sliding", "resize"] = "sliding"
    """sliding: windows of `window_frames` input frames, every `stride_frames`-th video frame.
    resize: the whole video as `window_frames` frames at the centres of equal bins."""
    window_frames: Count = 768
    stride_frames: Count = 4
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    feature_steps: Count = 768
    """Length of the feature sequence the head sees."""
    truncation_keep: Fraction = 0.75
    """Share of an instance that must lie inside a training window for it to stay."""
    truncation_tries: Count = 200
    crop_ratio: tuple[Fraction, Fraction] = (0.9, 1.0)
    """A training video no longer than the window is cropped to a share of itself in this range."""
    train_short_side_pixels: Count = 182
    test_short_side_pixels: Count = 160
    crop_pixels: Count = 160
    augmentation: Literal["full", "flip", "none"] = "full"
    """full: random resized crop, flip, photometric and geometric jitter; flip: centre crop and flip."""

    @model_validator(mode="after")
    def _crops_are_a_range(self) -> GridConfig:
        if self.crop_ratio[0] > self.crop_ratio[1]:
            raise ValueError(f"crop_ratio {list(self.crop_ratio)} must ascend")
        return self


class BackboneConfig(Section):
    """VideoMAE (tubelet embedding, pre-norm transformer blocks)."""

    embed_dim: Count = 384
    depth: Count = 12
    num_heads: Count = 6
    mlp_ratio: Positive = 4.0
    patch_pixels: Count = 16
    tubelet_frames: Count = 2
    chunk_frames: Count = 16
    """Attention runs inside chunks of this many input frames."""
    position_table_pixels: Count = 224
    """Image size the sin-cos position table is made for; interpolated bicubically to `crop_pixels`."""
    drop_path: Fraction = 0.1
    activation: Literal["gelu", "relu"] = "gelu"
    final_norm: bool = False
    """A LayerNorm after the last block, as image ViTs have; VideoMAE's feature map has none."""
    unused_norm: bool = False
    """Carry the release's unused `fc_norm` (2 * embed_dim parameters), which the paper counts."""

    @model_validator(mode="after")
    def _divisible(self) -> BackboneConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.chunk_frames % self.tubelet_frames:
            raise ValueError(
                f"chunk_frames {self.chunk_frames} is not a multiple of tubelet_frames {self.tubelet_frames}"
            )
        if self.position_table_pixels % self.patch_pixels:
            raise ValueError(
                f"position_table_pixels {self.position_table_pixels} is not a multiple of patch_pixels "
                f"{self.patch_pixels}"
            )
        return self


class HeadConfig(Section):
    """ActionFormer neck and heads."""

    channels: Count = 512
    num_heads: Count = 4
    attention_window_steps: int = -1
    """Local attention window; -1: global attention."""
    embedding_layers: Count = 2
    stem_layers: Count = 2
    levels: Count = 6
    position_table: bool = False
    head_layers: Count = 2
    """Convolutions before the class and boundary outputs."""
    dropout: Fraction = 0.0
    drop_path: Fraction = 0.1
    center_radius: Positive = 1.5
    regression_ranges: tuple[tuple[NonNegative, NonNegative], ...] = (
        (0, 4),
        (4, 8),
        (8, 16),
        (16, 32),
        (32, 64),
        (64, 10000),
    )
    label_smoothing: Fraction = 0.0
    boundary_weight: Positive = 1.0
    normalizer_init: Positive = 100.0
    normalizer_momentum: Fraction = 0.9
    class_prior: Annotated[float, Field(gt=0, lt=1)] = 0.01

    @model_validator(mode="after")
    def _divisible(self) -> HeadConfig:
        if self.channels % self.num_heads:
            raise ValueError(f"channels {self.channels} is not a multiple of num_heads {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _one_range_a_level(self) -> HeadConfig:
        if len(self.regression_ranges) != self.levels:
            raise ValueError(
                f"regression_ranges has {len(self.regression_ranges)} entries for {self.levels} levels"
            )
        return self


class PostprocessConfig(Section):
    """From head outputs to detections."""

    score_threshold: NonNegative = 0.001
    """Before NMS, per window; 0 keeps everything."""
    pre_nms_top: Count = 2000
    nms: Literal["gaussian", "linear", "hard"] = "gaussian"
    sigma: Positive = 0.7
    iou_threshold: Fraction = 0.1
    """Used by linear and hard NMS."""
    min_score: NonNegative = 0.0
    """Gaussian and linear NMS stop at this decayed score."""
    per_class: bool = True
    max_detections: Count = 2000
    voting_iou: Fraction = 0.0
    """Segment voting threshold of the class-agnostic case; 0: no voting."""
    external_top_classes: Annotated[int, Field(ge=0)] = 0
    """Multiply scores by an external video classifier's probability of its top classes; 0: off."""


class DetectorConfig(Section):
    """The whole detector; also what a bundle's config.json holds."""

    grid: GridConfig = GridConfig()
    backbone: BackboneConfig = BackboneConfig()
    head: HeadConfig = HeadConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    @model_validator(mode="after")
    def _shapes_fit(self) -> DetectorConfig:
        if self.grid.window_frames % self.backbone.chunk_frames:
            raise ValueError(
                f"grid.window_frames {self.grid.window_frames} is not a multiple of "
                f"backbone.chunk_frames {self.backbone.chunk_frames}"
            )
        if self.grid.crop_pixels % self.backbone.patch_pixels:
            raise ValueError(
                f"grid.crop_pixels {self.grid.crop_pixels} is not a multiple of "
                f"backbone.patch_pixels {self.backbone.patch_pixels}"
            )
        coarsest = 2 ** (self.head.levels - 1)
        if self.grid.feature_steps % coarsest:
            raise ValueError(
                f"grid.feature_steps {self.grid.feature_steps} is not a multiple of the coarsest "
                f"stride {coarsest} ({self.head.levels} levels)"
            )
        return self


class OptimizerConfig(Section):
    """AdamW with linear warm-up and cosine, per iteration (design, section 2)."""

    epochs: Count = 60
    schedule_epochs: Count = 65
    """Length of the cosine; training stops after `epochs`."""
    warmup_epochs: NonNegative = 5
    head_lr: Positive = 1e-4
    weight_decay: NonNegative = 0.05
    clip_norm: Positive = 1.0
    batch_size: Count = 2
    """Global batch, whatever the number of workers."""
    accumulation_steps: Count = 1
    ema_decay: Fraction = 0.999
    ema_warmup: bool = False
    """Use min(ema_decay, (1 + t) / (10 + t)): short schedules need it to show what was learned."""
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _cosine_covers_epochs(self) -> OptimizerConfig:
        if self.schedule_epochs < self.epochs:
            raise ValueError(f"schedule_epochs {self.schedule_epochs} is shorter than epochs {self.epochs}")
        return self


class TeacherConfig(Section):
    """Where the uncompressed detector comes from."""

    source: str = "train"
    """'train' fits one in the run; 'shipped' is the demo's bundle; else the path of a bundle directory, or
    of a whole detector's checkpoint from OpenTAD (.pth, .safetensors). Such a file does not name its
    classes: with it `data.classes` must list them in the order of OpenTAD's class map."""
    start: Literal["random", "motion", "pretrained"] = "random"
    """Backbone of a teacher that is trained: random; random with half of the tubelet kernels as temporal
    differences, so that a small model finds motion soon; or `execution.pretrained_weights` (with
    `detector.backbone.final_norm` that norm is then fitted to the fit videos, and a head can learn on
    what comes out of it)."""
    trainable: Literal["full", "head"] = "full"
    """head: the backbone stays as it starts; far cheaper, for pretrained weights and little data."""
    backbone_lr: Positive = 1e-4
    optimizer: OptimizerConfig = OptimizerConfig()
    select_every_epochs: Count = 1


class RacingConfig(Section):
    """When a candidate need not be scored to the end (`compression/racing.py`)."""

    error_rate: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Chance in a round that the best candidate is stopped on the way."""
    min_videos: Annotated[int, Field(ge=5)] = 10
    """No candidate is stopped before so many videos."""
    min_instances: Count = 5
    """No candidate is stopped before so many instances of every class, or all there are of it."""
    replicates: Annotated[int, Field(ge=100)] = 400
    """Subsamples of the videos from which the standard error of an mAP difference comes."""


class ScoringConfig(Section):
    """How candidates are scored (design, section 2, scoring criteria)."""

    criterion: Literal["map", "train_loss", "mse"] = "map"
    map_tiou: Annotated[float, Field(gt=0, le=1)] | Literal["average"] = 0.5
    saturation: Fraction = 0.98
    """Ties of `map` go to average mAP, then the lower index. Above this undropped score, and where all score
    0, the training loss is measured as well and decides between the two."""
    video_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the fit videos that score, drawn once by seed (the release offers this)."""
    drops: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Drop these blocks, one a round, in this order, instead of scoring: for controls and ablations."""
    loss_terms: Literal["supervised", "total"] = "supervised"
    """train_loss only: focal + DIoU, or these and the alignment losses."""
    racing: RacingConfig | None = RacingConfig()
    """`off` (or null) scores every candidate on every video, as the paper does; `on` is the default."""
    delta: NonNegative = 0.005
    """Candidates whose score is within this of the best, in the criterion's units, are reported as ties."""

    @field_validator("racing", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        # YAML reads a bare on or off as a truth value.
        return RacingConfig() if value is True else None if value is False else value


class LogGrid(Section):
    """`count` values from `low` to `high`, equally far apart on a log scale, to five digits."""

    low: Positive
    high: Positive
    count: Count

    @model_validator(mode="after")
    def _rises(self) -> LogGrid:
        if self.count < 2 or self.high <= self.low:
            raise ValueError(f"{self.count} values from low {self.low:g} to high {self.high:g} are no grid")
        return self

    def values(self) -> tuple[float, ...]:
        ratio = self.high / self.low
        return tuple(
            float(f"{self.low * ratio ** (step / (self.count - 1)):.5g}") for step in range(self.count)
        )


class HalvingConfig(Section):
    """Successive halving of the learning-rate grid (arXiv 1502.07943, algorithm 1), in rungs."""

    first_epochs: Count = 1
    """Epochs to the end of the first rung. The better half by selection mAP goes on to twice as many, and
    so on; the last one left trains to the end of its schedule."""


class AlignmentConfig(Section):
    """LoRA fine-tuning of the shallower student against the uncompressed teacher (paper, section 3.3)."""

    trainable: Trainable = "lora"
    rank: Count | None = None
    """LoRA rank; None: embed_dim / 4."""
    learning_rates: tuple[Positive, ...] = (1e-5, 3.1623e-5, 1e-4, 3.1623e-4, 1e-3)
    """Grid of the backbone group (LoRA, norms, patch embedding), log-spaced in [1e-5, 1e-3]. In a recipe
    `{low: 1.0e-5, high: 1.0e-3, count: 5}` is this list."""
    halving: HalvingConfig | None = None
    """`on` or `{first_epochs: n}`: not every learning rate trains to the end."""
    rounds: Literal["every", "last"] = "every"
    """last: all blocks go first and the student is aligned once, in round `max_drops`: one-shot dropping, the
    paper's control (supplement, Table B)."""
    prior_steps: Count | None = None
    """From round 2 on, only learning rates within so many steps of the grid of the one that the round before
    chose; None: the whole grid in every round, as the paper does."""
    optimizer: OptimizerConfig = OptimizerConfig()
    later_epochs: Count | None = None
    """Epochs of the rounds that drop more than half of `max_drops`, with the end of the cosine as far behind
    them as in the others (the paper's ActivityNet trains 8, then 15); None: as many in all."""
    feature_loss: bool = True
    prediction_loss: bool = True
    temperature: Positive = 3.5
    boundary_loss: Literal["diou", "giou"] = "diou"
    feature_weight: NonNegative = 1.0
    class_weight: NonNegative = 1.0
    boundary_weight: NonNegative = 1.0
    select_every_epochs: Count = 1
    """Selection mAP is measured after every this many epochs, and always after the last."""

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _log_grid(cls, value: object) -> object:
        return LogGrid.model_validate(value).values() if isinstance(value, dict) else value

    @field_validator("halving", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        return HalvingConfig() if value is True else None if value is False else value

    @model_validator(mode="after")
    def _grid_is_a_set(self) -> AlignmentConfig:
        if not self.learning_rates and self.trainable != "none":
            raise ValueError("learning_rates is empty")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise ValueError(f"learning_rates has a value twice: {list(self.learning_rates)}")
        return self

    @model_validator(mode="after")
    def _a_rung_ends_before_the_run(self) -> AlignmentConfig:
        for key, epochs in (("optimizer.epochs", self.optimizer.epochs), ("later_epochs", self.later_epochs)):
            if self.halving is not None and epochs is not None and self.halving.first_epochs >= epochs:
                raise ValueError(
                    f"halving.first_epochs {self.halving.first_epochs} is not less than {key} {epochs}"
                )
        return self


class GuardrailsConfig(Section):
    """What a student may not lose even where its mAP holds: judged on the selection videos against the
    teacher, with intervals (`metrics/guards.py`)."""

    max_class_loss: Positive | None = None
    """How much of its AP at `evaluation.headline_tiou` a class may lose."""
    max_false_negative_rise: Positive | None = None
    """How much the share of missed instances may rise in a DETAD bucket (coverage, length, number)."""
    detad: Literal["thumos14", "activitynet"] = "thumos14"
    """Whose buckets and thresholds."""


class StoppingConfig(Section):
    """When to stop dropping, and which rounds do not stand. The first rule met ends the run."""

    max_drops: int | None = None
    """None: depth / 4, the paper's rule."""
    target_macs_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    target_latency_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    tolerance: NonNegative | None = None
    """A round whose headline mAP on selection videos is more than this below the teacher's, by a
    non-inferiority test, is rolled back: `inferior` alone does that, `undecided` goes on (paper: the student
    no longer recovers)."""
    guardrails: GuardrailsConfig = GuardrailsConfig()
    """A round that breaks one is rolled back as well."""
    runner_ups: Annotated[int, Field(ge=0)] = 1
    """After a roll-back, how many other candidates of the same scores are tried before the run stops."""

    @property
    def judges(self) -> bool:
        """Whether rounds are judged on the selection videos, and may be rolled back."""
        rails = self.guardrails
        limits = (self.tolerance, rails.max_class_loss, rails.max_false_negative_rise)
        return any(limit is not None for limit in limits)


class EvaluationConfig(Section):
    tious: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    headline_tiou: Annotated[float, Field(gt=0, le=1)] | Literal["average"] = 0.5
    bootstrap_replicates: Count = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    noninferiority_margin: Positive = 0.01


class Experiment(Section):
    """Everything that decides the result; hashed, must match on resume."""

    name: str
    seed: Annotated[int, Field(ge=0)] = 0
    autocast: Literal["none", "float16", "bfloat16"] = "none"
    """Precision of matrix products in every forward: training, scoring, evaluation, latency."""
    paper_protocol: bool = False
    """As the paper's release does: all of `data.fit_subset` is trained and scored on, and the test videos
    choose epoch and learning rate; the report says so."""
    data: DataConfig
    detector: DetectorConfig = DetectorConfig()
    teacher: TeacherConfig = TeacherConfig()
    scoring: ScoringConfig = ScoringConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    stopping: StoppingConfig = StoppingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _thresholds_are_measured(self) -> Experiment:
        for key, tiou in (
            ("scoring.map_tiou", self.scoring.map_tiou),
            ("evaluation.headline_tiou", self.evaluation.headline_tiou),
        ):
            if tiou != "average" and tiou not in self.evaluation.tious:
                raise ValueError(f"{key} {tiou} is not among evaluation.tious {list(self.evaluation.tious)}")
        return self

    @model_validator(mode="after")
    def _drops_leave_a_block(self) -> Experiment:
        depth, given = self.detector.backbone.depth, self.scoring.drops
        if not 0 <= self.max_drops < depth:
            raise ValueError(f"stopping.max_drops {self.max_drops} must leave a block of {depth}")
        if given is not None and (len(set(given)) < len(given) or max(given, default=0) >= depth):
            raise ValueError(f"scoring.drops {list(given)} must be different blocks of 0..{depth - 1}")
        if given is not None and self.max_drops > len(given):
            raise ValueError(f"stopping.max_drops {self.max_drops} is more than scoring.drops {list(given)}")
        return self

    @model_validator(mode="after")
    def _the_last_round_is_known(self) -> Experiment:
        if self.alignment.rounds == "every":
            return self
        for rule in ("target_macs_ratio", "target_latency_ratio"):
            value = getattr(self.stopping, rule)
            if value is not None:
                raise ValueError(f"alignment.rounds last needs stopping.{rule} to be null, got {value:g}")
        if self.stopping.judges:  # rounds that were never aligned
            raise ValueError("alignment.rounds last needs stopping.tolerance and .guardrails to be null")
        return self

    @property
    def max_drops(self) -> int:
        """The most blocks this run drops: `stopping.max_drops`, by default all of `scoring.drops` or
        depth / 4."""
        if self.stopping.max_drops is not None:
            return self.stopping.max_drops
        given = self.scoring.drops
        return self.detector.backbone.depth // 4 if given is None else len(given)

    def alignment_after(self, drops: int) -> AlignmentConfig:
        """How a student that has lost so many blocks is aligned: `alignment`, `later_epochs` applied."""
        config, epochs = self.alignment, self.alignment.later_epochs
        if epochs is None or 2 * drops <= self.max_drops:
            return config
        longer = epochs - config.optimizer.epochs
        schedule = {"epochs": epochs, "schedule_epochs": config.optimizer.schedule_epochs + longer}
        return config.model_copy(update={"optimizer": config.optimizer.model_copy(update=schedule)})


class Execution(Section):
    """Where and with what it runs; may differ from one start to the next."""

    run_dir: str | None = None
    """Local path or s3://, gs:// URI; None: runs/<experiment name>, in a Ray job below the home directory."""
    data_root: str | None = None
    """Directory of the video files, a path every node sees."""
    annotations: str | None = None
    pretrained_weights: str | None = None
    """VideoMAE (its release, mmaction2, OpenTAD, transformers) or an image ViT (timm, transformers'
    DINOv2), as .safetensors or a PyTorch checkpoint; the names of the tensors tell which."""
    external_classifier: str | None = None
    """What names class-agnostic detections for mAP: JSON of the probabilities of every video's classes,
    `{"class": [name], "results": {video: [probability]}}` as CUHK's files for ActivityNet. Every test video
    must be there; where fit or selection videos are not, class-agnostic AP scores them."""
    cache_dir: str | None = None
    """Node-local directory for generated and decoded videos; None: the system's temporary directory."""
    cache_gigabytes: NonNegative = 8.0
    """Decoded frames kept there at most; 0: decode anew every time."""
    backend: Literal["ray", "local"] = "ray"
    """local: the same loop in this process, without Ray."""
    ray_address: str | None = None
    """None: the cluster this job runs in, else a new local one."""
    device: Literal["cpu", "cuda"] = "cpu"
    max_workers: Count = 2
    """Scoring workers at most."""
    cpus_per_worker: Positive = 1
    """May be a fraction, where more trials than CPUs should run at once."""
    gpus_per_worker: NonNegative = 0
    threads_per_worker: Count = 1
    """torch threads in every worker: part of the exactness conditions."""
    slices_per_worker: Count = 4
    """Target number of video slices a scoring worker pulls."""
    train_workers: Count = 1
    """Ray Train workers per learning rate (DDP)."""
    max_concurrent_learning_rates: Count | None = None
    """None: as many as the cluster's free resources hold."""
    window_batch: Count = 4
    """Windows of one video in one forward pass."""
    candidate_batch: Count = 1
    """Candidates whose streams run through the student's blocks as one batch; more than 1 on GPUs only."""
    task_retries: Annotated[int, Field(ge=0)] = 2
    resource_wait_seconds: Positive = 600.0
    progress_seconds: Positive = 10.0
    max_device_hours: Positive | None = None
    """Stop before a round that would take the run beyond so many hours of GPUs held (of CPUs, where `device`
    is cpu). With a higher cap the same command goes on."""
    price_per_device_hour: NonNegative | None = None
    """For `--plan`: what an hour of a GPU, or of a CPU, costs."""
    loggers: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    """What Ray Tune's candidates and learning rates are logged to, besides its own files."""
    tensorboard_dir: str | None = None
    """Directory on the driver's node for TensorBoard's files; None: `tensorboard` in the run directory."""

    @property
    def decoding_threads(self) -> int:
        """Threads of a scoring worker that decode ahead: what torch leaves of the worker's CPUs.

        A worker of one CPU decodes in line, as a second thread would only take what the first one uses.
        Beside a GPU there is always one: the thread that runs torch mostly waits there.
        """
        left = int(self.cpus_per_worker) - self.threads_per_worker
        return max(1 if self.device == "cuda" else 0, left)


class Recipe(Section):
    """One run: what to do, and where."""

    experiment: Experiment
    execution: Execution = Execution()

    @model_validator(mode="after")
    def _gpu_needs_device(self) -> Recipe:
        if self.execution.gpus_per_worker and self.execution.device == "cpu":
            raise ValueError("execution.gpus_per_worker is set but execution.device is cpu")
        if self.execution.device == "cuda" and not self.execution.gpus_per_worker:
            raise ValueError("execution.device is cuda but execution.gpus_per_worker is 0")
        return self

    @model_validator(mode="after")
    def _candidates_share_a_batch_on_gpus_only(self) -> Recipe:
        execution = self.execution
        if execution.device == "cpu" and execution.candidate_batch > 1:
            raise ValueError(
                f"execution.candidate_batch {execution.candidate_batch} must be 1 where execution.device is "
                "cpu: scores on CPU are equal bit for bit whichever candidates are alive"
            )
        return self

    @model_validator(mode="after")
    def _loggers_have_what_they_log(self) -> Recipe:
        execution = self.execution
        if execution.loggers and execution.backend == "local":
            raise ValueError("execution.loggers are Ray Tune's: execution.backend must be ray")
        if "tensorboard" in execution.loggers and execution.tensorboard_dir is None and "://" in self.run_dir:
            raise ValueError(
                "execution.loggers tensorboard needs execution.tensorboard_dir where run_dir is a URI, "
                f"got {self.run_dir}"
            )
        return self

    @model_validator(mode="after")
    def _every_rank_has_a_window(self) -> Recipe:
        workers = self.execution.train_workers
        for key in ("teacher", "alignment"):
            size = getattr(self.experiment, key).optimizer.batch_size
            if size < workers:
                raise ValueError(f"{key}.optimizer.batch_size {size} is less than train_workers {workers}")
        return self

    @property
    def run_dir(self) -> str:
        """Where the run is written: `execution.run_dir`, by default `runs/` and the experiment's name."""
        return self.execution.run_dir or f"runs/{self.experiment.name}"

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def shipped_recipes() -> tuple[str, ...]:
    """Names of the recipes inside the package."""
    folder = resources.files("pbd_ray.recipes")
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file and apply `key=value` overrides.

    A key is a dotted path (`experiment.alignment.optimizer.epochs=3`); the leading `experiment.` or
    `execution.` may be left out where the rest says it (`run_dir=/data/run`, `seed=1`). Values are YAML.

    Raises:
        ConfigError: unknown recipe, unreadable file, unknown key or refused value, naming it.
    """
    source, raw = _read(name_or_path)
    for override in overrides:
        key, value = parse_override(override)
        _assign(raw, _full_key(key), value, override)
    return _validated(raw, source)


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of a `key=value` whose value is YAML.

    Raises:
        ConfigError: it is of another form.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override '{override}' is not of the form key=value")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override '{override}': '{text}' is not a YAML value") from None


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with other values.

    Args:
        changes: by key, as overrides name them.

    Raises:
        ConfigError: together they are no recipe.
    """
    raw = recipe.model_dump(mode="json")
    for key, value in changes.items():
        _assign(raw, _full_key(key), value, f"{key}={value}")
    return _validated(raw, f"recipe {recipe.experiment.name}")


def experiment_hash(experiment: Experiment) -> str:
    """SHA-256 of the experiment's canonical JSON."""
    text = json.dumps(experiment.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(ours: Experiment, theirs: Experiment) -> tuple[str, ...]:
    """Lines `key: ours -> theirs` for every leaf in which two experiments differ."""
    a, b = dict(_leaves(ours.model_dump(mode="json"))), dict(_leaves(theirs.model_dump(mode="json")))
    return tuple(
        f"{k}: {a.get(k)} -> {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)
    )


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _validated(raw: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{source}: {first_problem(error)}") from None


def _read(name_or_path: str) -> tuple[str, dict[str, Any]]:
    if name_or_path in shipped_recipes():
        text = resources.files("pbd_ray.recipes").joinpath(f"{name_or_path}.yaml").read_text()
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(
                f"recipe '{name_or_path}' is neither a file nor one of: {', '.join(shipped_recipes())}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name_or_path}: cannot be read: {one_line(error)}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{name_or_path}: expected a mapping with 'experiment' and 'execution'")
    # A YAML alias is one object in two places: an override of one must not change the other.
    return name_or_path, _unshared(raw)


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(child) for key, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value


def _full_key(key: str) -> str:
    first = key.split(".")[0]
    if first in Recipe.model_fields:
        return key
    if first in Execution.model_fields:
        return f"execution.{key}"
    return f"experiment.{key}"


def _assign(raw: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        child = node[parent]
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': {parent} is a value, not a section")
        node = child
    node[leaf] = value


def first_problem(error: ValidationError, within: str = "") -> str:
    """The first thing that is wrong, as `key: what, got value`.

    Args:
        within: path of the section that was validated; empty: the whole recipe.
    """
    problem = error.errors(include_url=False)[0]
    key = ".".join(part for part in (within, *map(str, problem["loc"])) if part) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f", got {value!r}"
    return f"{key}: {message}{shown}"
