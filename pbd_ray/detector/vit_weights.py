"""Start the backbone from a pretrained vision transformer, of video or of images.

One loader for all layouts (`vit_layouts`): blocks are the same everywhere. A video ViT (VideoMAE) has
our tubelets and positions. An image ViT is inflated: its patch kernels are spread over the tubelet, its
positions repeated over time and the tokens before its patches dropped, so that a still video gives in
every frame what the blocks make of the image's patches.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from pbd_ray.config import BackboneConfig
from pbd_ray.detector.pretrained import Import, ImportReport, PretrainedError, Source, read_weights
from pbd_ray.detector.videomae import VideoMAE
from pbd_ray.detector.vit_embedding import take_embedding
from pbd_ray.detector.vit_facts import check_facts, read_facts
from pbd_ray.detector.vit_layouts import Layout, recognise, refuse_foreign_parts, refuse_part


def load_backbone(backbone: VideoMAE, source: Source) -> ImportReport:
    """Start the backbone from a ViT; the names of the tensors tell the layout.

    VideoMAE in the names of its release, of mmaction2 and OpenTAD, and of transformers; image ViTs in
    the names of timm and of transformers' DINOv2. Layer scale is folded into the output projections, and
    the key bias, which softmax does not see, left out. Blocks the backbone has dropped are ignored. The
    file's norm after the last block is kept where the backbone has `final_norm`; a norm after the mean
    over tokens (`fc_norm`) only where it carries `unused_norm`.

    Args:
        source: a .safetensors file, a PyTorch checkpoint, or what has been read already. What the tensors
            do not show (number of heads, activation, norm epsilon, normalisation of the pixels) is taken
            from a config in or beside the file, and where there is none taken to be the backbone's.

    Raises:
        PretrainedError: unreadable file, another architecture, sizes that do not fit, a missing or an
            unknown key.
    """
    file = read_weights(source)
    layout, facts = recognise(file), read_facts(file)
    check_facts(file.source, facts, backbone.config)
    work = Import(file.source, file.tensors)
    _check_blocks(work, layout, backbone)
    _ignore_others(work, layout)
    left = _take_norms(work, layout, backbone)
    take_embedding(work, layout, facts, backbone)
    for index in range(backbone.config.depth):
        if index in backbone.kept_blocks:
            _take_block(work, layout, index, backbone.config)
        else:
            for key in work.tensors:
                if key.startswith(layout.block(index)):
                    work.ignore(key, f"block {index} is dropped")
    image = work.tensors[f"{layout.prefix}{layout.patches}.weight"].ndim == 4
    plain = not _has_any(work, layout, layout.attention_biases) and not _has_any(work, layout, layout.scales)
    if image and plain and facts.architecture is None and not work.unknown():
        raise PretrainedError(
            f"{work.source}: has neither {layout.attention_biases[0]} nor layer scale, as timm's post-norm "
            "blocks: put its config.json, which says what it is, beside the file"
        )
    return work.write(backbone, left)


def backbone_tensors(backbone: VideoMAE, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a backbone without gaps under the names of a layout: the inverse of `load_backbone`.

    Only for layouts without a position table, with a projection each and biases of query and value.
    `unused_norm` is left out.
    """
    assert layout.positions is None and len(layout.attention) == 3 and len(layout.attention_biases) == 2
    state, tensors = backbone.state_dict(), {}
    same = {"patch_embed": layout.patches}
    if backbone.config.final_norm:
        same["norm"] = layout.final_norm
    for index in backbone.kept_blocks:
        ours, theirs = f"blocks.{index}.", f"{layout.blocks}.{index}."
        names = zip(
            ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"),
            (*layout.norms, layout.outputs[0], layout.hidden, layout.outputs[1]),
            strict=True,
        )
        same |= {f"{ours}{our_name}": f"{theirs}{name}" for our_name, name in names}
        projections = state[f"{ours}attn.qkv.weight"].chunk(3)
        for name, weight in zip(layout.attention, projections, strict=True):
            tensors[f"{theirs}{name}.weight"] = weight
        for our_name, name in zip(("q_bias", "v_bias"), layout.attention_biases, strict=True):
            tensors[f"{theirs}{name}"] = state[f"{ours}attn.{our_name}"]
    for our_name, name in same.items():
        for part in ("weight", "bias"):
            tensors[f"{name}.{part}"] = state[f"{our_name}.{part}"]
    return {f"{layout.prefix}{name}": tensor.clone() for name, tensor in tensors.items()}


def _check_blocks(work: Import, layout: Layout, backbone: VideoMAE) -> None:
    config = backbone.config
    start = re.compile(rf"{re.escape(layout.prefix + layout.blocks)}\.(\d+)\.")
    indices = {int(match[1]) for key in work.tensors if (match := start.match(key))}
    if indices != set(range(config.depth)):
        raise PretrainedError(f"{work.source}: has {len(indices)} blocks, backbone.depth is {config.depth}")
    kernel = work.tensors[f"{layout.prefix}{layout.patches}.weight"]
    if kernel.ndim not in (4, 5) or kernel.shape[1] != 3 or kernel.shape[-1] != kernel.shape[-2]:
        raise PretrainedError(f"{work.source}: its patch embedding has shape {list(kernel.shape)}")
    if kernel.shape[0] != config.embed_dim:
        raise PretrainedError(
            f"{work.source}: has width {kernel.shape[0]}, backbone.embed_dim is {config.embed_dim}"
        )


def _ignore_others(work: Import, layout: Layout) -> None:
    for key in work.tensors:
        name = key.removeprefix(layout.prefix)
        for start, reason in layout.others:
            if name.startswith(start):
                work.ignore(key, reason)
        if name in layout.prefix_tokens:
            work.ignore(key, "the backbone has no tokens besides the patches")
    refuse_foreign_parts(work.source, work.unknown())
    names = [f"{layout.block(0)}{name}.weight" for name in (layout.hidden, layout.outputs[1])]
    hidden, output = (tuple(work.tensors[name].shape) if name in work.tensors else () for name in names)
    if len(hidden) == len(output) == 2 and hidden[0] == 2 * output[1]:
        refuse_part(work.source, names[0], "a gated MLP (SwiGLU)")


def _take_norms(work: Import, layout: Layout, backbone: VideoMAE) -> list[str]:
    """Norms outside the blocks; returns the state_dict keys that stay as they are."""
    config, left = backbone.config, []
    pooled = f"{layout.prefix}{layout.pooled_norm}"
    if f"{pooled}.weight" not in work.tensors:
        pooled = layout.pooled_norm  # transformers' and mmaction2's classifiers have it outside
    has_pooled = f"{pooled}.weight" in work.tensors
    final = f"{layout.prefix}{layout.final_norm}"
    for part in ("weight", "bias"):
        if config.unused_norm and has_pooled:
            work.values[f"fc_norm.{part}"] = work.take(f"{pooled}.{part}")
        elif config.unused_norm:
            left.append(f"fc_norm.{part}")
        if config.final_norm and has_pooled and f"{final}.{part}" not in work.tensors:
            # It saw means over tokens: it says nothing about single tokens, so ours starts anew.
            left.append(f"norm.{part}")
        elif config.final_norm:
            work.values[f"norm.{part}"] = work.take(f"{final}.{part}")
        work.ignore(f"{final}.{part}", "backbone.final_norm is off")
        work.ignore(f"{pooled}.{part}", "a norm after the mean over tokens, which no forward uses")
    return left


def _take_block(work: Import, layout: Layout, index: int, config: BackboneConfig) -> None:
    theirs, ours, values = layout.block(index), f"blocks.{index}.", work.values
    dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
    for our_name, name in zip(("norm1", "norm2"), layout.norms, strict=True):
        for part in ("weight", "bias"):
            values[f"{ours}{our_name}.{part}"] = work.take(f"{theirs}{name}.{part}", dim)
    parts = len(layout.attention)
    values[f"{ours}attn.qkv.weight"] = torch.cat(
        [work.take(f"{theirs}{name}.weight", 3 * dim // parts, dim) for name in layout.attention]
    )
    values[f"{ours}attn.q_bias"], values[f"{ours}attn.v_bias"] = _attention_biases(work, layout, index, dim)
    values[f"{ours}mlp.fc1.weight"] = work.take(f"{theirs}{layout.hidden}.weight", hidden, dim)
    values[f"{ours}mlp.fc1.bias"] = work.take(f"{theirs}{layout.hidden}.bias", hidden)
    scales = layout.scales if _has_any(work, layout, layout.scales) else None
    for branch, (our_name, width) in enumerate((("attn.proj", dim), ("mlp.fc2", hidden))):
        name = layout.outputs[branch]
        weight = work.take(f"{theirs}{name}.weight", dim, width)
        bias = work.take(f"{theirs}{name}.bias", dim)
        if scales is not None:
            scale = work.take(f"{theirs}{scales[branch]}", dim)
            weight, bias = weight * scale[:, None], bias * scale
        values[f"{ours}{our_name}.weight"], values[f"{ours}{our_name}.bias"] = weight, bias


def _attention_biases(work: Import, layout: Layout, index: int, dim: int) -> tuple[Tensor, Tensor]:
    """Of query and value; 0 where no block of the file has any."""
    if not _has_any(work, layout, layout.attention_biases):
        return torch.zeros(dim), torch.zeros(dim)
    names = [f"{layout.block(index)}{name}" for name in layout.attention_biases]
    if len(names) == 1:
        query, _, value = work.take(names[0], 3 * dim).chunk(3)
        return query, value
    for key in names[1:-1]:
        work.ignore(key, "key biases: softmax does not see a constant added to all keys")
    return work.take(names[0], dim), work.take(names[-1], dim)


def _has_any(work: Import, layout: Layout, names: tuple[str, ...] | None) -> bool:
    """Whether any block of the file has a tensor of one of these names."""
    start = f"{layout.prefix}{layout.blocks}."
    return names is not None and any(
        key.startswith(start) and key.endswith(tuple(f".{name}" for name in names)) for key in work.tensors
    )
