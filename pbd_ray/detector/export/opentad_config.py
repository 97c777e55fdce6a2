"""The config with which OpenTAD builds a detector of ours, in the names of its `configs/adatad`.

OpenTAD is github.com/sming256/OpenTAD. What its modules cannot be is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pbd_ray.config import DetectorConfig
from pbd_ray.data.annotations import AGNOSTIC_CLASSES
from pbd_ray.detector.bundle import BundleError
from pbd_ray.detector.videomae import NORM_EPS, PIXEL_MEAN, PIXEL_STD

_NMS_METHODS = {"hard": 0, "linear": 1, "gaussian": 2}
_SMALLEST_DROP_PATH = 1e-6

_TIOUS = {
    "sliding": [0.3, 0.4, 0.5, 0.6, 0.7],
    "resize": [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95],
}
"""THUMOS14's and ActivityNet's thresholds."""
_WIDTH = 110

_HEADER = '''"""{title}

Set the paths below, then in a checkout of OpenTAD:

    torchrun --nproc_per_node=1 tools/test.py THIS_FOLDER/config.py --checkpoint THIS_FOLDER/checkpoint.pth
"""

annotation_path = "annotations.json"  # ActivityNet's form, with the frame count of every video as `frame`
class_map = "{{{{ fileDirname }}}}/category_idx.txt"  # the file beside this one
data_path = "videos"
subset = "validation"
'''


def opentad_config(config: DetectorConfig, classes: Sequence[str], title: str) -> str:
    """A whole config.py for `tools/test.py`.

    Args:
        config: of a detector without gaps, so `backbone.depth` counts the blocks that are there.
        title: one line for its docstring.

    Raises:
        BundleError: naming the first value that OpenTAD's modules cannot have.
    """
    _refuse(config)
    sections = {
        "dataset": {"test": _dataset(config, tuple(classes) == AGNOSTIC_CLASSES)},
        "model": opentad_model(config, len(classes)),
        "solver": {"test": {"batch_size": 1, "num_workers": 1}, "amp": False, "ema": True},
        "inference": {"load_from_raw_predictions": False, "save_raw_prediction": False},
        "post_processing": _post_processing(config),
        "evaluation": {
            "type": "mAP",
            "subset": _Variable("subset"),
            "tiou_thresholds": _TIOUS[config.grid.kind],
            "ground_truth_filename": _Variable("annotation_path"),
        },
        "work_dir": "exps/pbd_ray",
    }
    lines = (f"{name} = {_source(value)}\n" for name, value in sections.items())
    return "\n".join((_HEADER.format(title=title), *lines))


def opentad_model(config: DetectorConfig, num_classes: int) -> dict[str, Any]:
    """The `model` section."""
    grid, backbone, head = config.grid, config.backbone, config.head
    chunks = grid.window_frames // backbone.chunk_frames
    steps = grid.feature_steps
    vit: dict[str, Any] = {
        "type": "VisionTransformerCP",
        "img_size": backbone.position_table_pixels,
        "patch_size": backbone.patch_pixels,
        "embed_dims": backbone.embed_dim,
        "depth": backbone.depth,
        "num_heads": backbone.num_heads,
        "mlp_ratio": backbone.mlp_ratio,
        "qkv_bias": True,
        "num_frames": backbone.chunk_frames,
        "tubelet_size": backbone.tubelet_frames,
        "drop_path_rate": backbone.drop_path,
        "norm_cfg": {"type": "LN", "eps": NORM_EPS},
        "use_mean_pooling": not backbone.final_norm,
        "return_feat_map": True,
        "with_cp": False,
    }
    before = {"type": "Rearrange", "keys": ["frames"], "t1": chunks}
    after = {"type": "Rearrange", "keys": ["feats"], "t1": chunks}
    return {
        "type": "ActionFormer",
        "backbone": {
            "type": "mmaction.Recognizer3D",
            "backbone": vit,
            "data_preprocessor": {
                "type": "mmaction.ActionDataPreprocessor",
                "mean": list(PIXEL_MEAN),
                "std": list(PIXEL_STD),
                "format_shape": "NCTHW",
            },
            "custom": {
                "pretrain": None,
                "pre_processing_pipeline": [{**before, "ops": "b n c (t1 t) h w -> (b t1) n c t h w"}],
                "post_processing_pipeline": [
                    {"type": "Reduce", "keys": ["feats"], "ops": "b n c t h w -> b c t", "reduction": "mean"},
                    {**after, "ops": "(b t1) c t -> b c (t1 t)"},
                    {"type": "Interpolate", "keys": ["feats"], "size": steps},
                ],
                "norm_eval": False,
                "freeze_backbone": False,
            },
        },
        "projection": {
            "type": "Conv1DTransformerProj",
            "in_channels": backbone.embed_dim,
            "out_channels": head.channels,
            "arch": (head.embedding_layers, head.stem_layers, head.levels - 1),
            "conv_cfg": {"kernel_size": 3, "proj_pdrop": head.dropout},
            "norm_cfg": {"type": "LN"},
            "attn_cfg": {"n_head": head.num_heads, "n_mha_win_size": head.attention_window_steps},
            # At 0 OpenTAD leaves out the learned residual scales with the drop path.
            "path_pdrop": head.drop_path or _SMALLEST_DROP_PATH,
            "use_abs_pe": head.position_table,
            "max_seq_len": steps,
        },
        "neck": {
            "type": "FPNIdentity",
            "in_channels": head.channels,
            "out_channels": head.channels,
            "num_levels": head.levels,
        },
        "rpn_head": {
            "type": "ActionFormerHead",
            "num_classes": num_classes,
            "in_channels": head.channels,
            "feat_channels": head.channels,
            "num_convs": head.head_layers,
            "cls_prior_prob": head.class_prior,
            "prior_generator": {
                "type": "PointGenerator",
                "strides": [2**level for level in range(head.levels)],
                "regression_range": [tuple(pair) for pair in head.regression_ranges],
            },
            "loss_normalizer": head.normalizer_init,
            "loss_normalizer_momentum": head.normalizer_momentum,
            "center_sample": "radius",
            "center_sample_radius": head.center_radius,
            "label_smoothing": head.label_smoothing,
            "loss_weight": head.boundary_weight,
            "loss": {"cls_loss": {"type": "FocalLoss"}, "reg_loss": {"type": "DIOULoss"}},
        },
    }


def _dataset(config: DetectorConfig, class_agnostic: bool) -> dict[str, Any]:
    grid = config.grid
    sliding = grid.kind == "sliding"
    scale = grid.window_frames // grid.feature_steps
    load = {"type": "LoadFrames", "num_clips": 1, "scale_factor": scale}
    side = grid.test_short_side_pixels
    dataset: dict[str, Any] = {
        "type": "ThumosSlidingDataset" if sliding else "AnetResizeDataset",
        "ann_file": _Variable("annotation_path"),
        "subset_name": _Variable("subset"),
        "class_map": _Variable("class_map"),
        "data_path": _Variable("data_path"),
        "filter_gt": False,
        "test_mode": True,
        "class_agnostic": class_agnostic,
        "pipeline": [
            {"type": "PrepareVideoInfo", "format": "mp4"},
            {"type": "mmaction.DecordInit", "num_threads": 4},
            {**load, "method": "sliding_window" if sliding else "resize"},
            {"type": "mmaction.DecordDecode"},
            {"type": "mmaction.Resize", "scale": (-1, max(side, grid.crop_pixels))},
            {"type": "mmaction.CenterCrop", "crop_size": grid.crop_pixels},
            {"type": "mmaction.FormatShape", "input_format": "NCTHW"},
            {"type": "ConvertToTensor", "keys": ["imgs"]},
            {"type": "Collect", "inputs": "imgs", "keys": ["masks"]},
        ],
    }
    if not sliding:
        return {**dataset, "resize_length": grid.feature_steps}
    return {
        **dataset,
        "feature_stride": grid.stride_frames * scale,
        "sample_stride": 1,
        "window_size": grid.feature_steps,
        "window_overlap_ratio": grid.overlap,
    }


def _post_processing(config: DetectorConfig) -> dict[str, Any]:
    rules = config.postprocess
    return {
        "pre_nms_thresh": rules.score_threshold,
        "pre_nms_topk": rules.pre_nms_top,
        "nms": {
            "use_soft_nms": rules.nms != "hard",
            "method": _NMS_METHODS[rules.nms],
            "sigma": rules.sigma,
            "iou_threshold": rules.iou_threshold,
            "min_score": rules.min_score,
            "multiclass": rules.per_class,
            "max_seg_num": rules.max_detections,
            "voting_thresh": rules.voting_iou,
        },
        "save_dict": True,
    }


class _Variable(str):
    """The name of a variable of the config, in the place of its value."""


def _source(value: object, indent: int = 0) -> str:
    """A value as Python source: `dict(...)` and lists, on one line where it fits."""
    if isinstance(value, dict):
        start, end, items = "dict(", ")", [f"{key}={{}}" for key in value]
        parts = list(value.values())
    elif isinstance(value, list):
        start, end, items, parts = "[", "]", ["{}"] * len(value), value
    else:
        return str(value) if isinstance(value, _Variable) else repr(value)
    line = start + ", ".join(i.format(_source(part)) for i, part in zip(items, parts, strict=True)) + end
    if len(line) + indent <= _WIDTH:
        return line
    inner = " " * (indent + 4)
    lines = [
        f"{inner}{item.format(_source(part, indent + 4))},\n" for item, part in zip(items, parts, strict=True)
    ]
    return f"{start}\n{''.join(lines)}{' ' * indent}{end}"


def _refuse(config: DetectorConfig) -> None:
    grid, backbone, window = config.grid, config.backbone, config.head.attention_window_steps
    coarsest = 2 ** (config.head.levels - 1)
    if backbone.activation != "gelu":
        raise BundleError(f"opentad: backbone.activation is {backbone.activation}, OpenTAD's is gelu")
    if grid.window_frames % grid.feature_steps:
        raise BundleError(
            f"opentad: grid.window_frames {grid.window_frames} is not a multiple of grid.feature_steps "
            f"{grid.feature_steps}, as OpenTAD needs"
        )
    if window in (0, 1) or (window > 1 and grid.feature_steps % (coarsest * (window // 2) * 2)):
        raise BundleError(
            f"opentad: head.attention_window_steps {window} does not divide grid.feature_steps "
            f"{grid.feature_steps} at the coarsest stride {coarsest}, as OpenTAD needs"
        )
