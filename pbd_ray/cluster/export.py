"""A bundle for other programs, each export with its certificate: what `jobs/export.py` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pbd_ray.cluster.inputs import check_bundle
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.output import check_output
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.compression.blocks import from_detector, to_detector, without_gaps
from pbd_ray.config import ConfigError, Recipe, RunError, changed, one_line
from pbd_ray.data.annotations import Split
from pbd_ray.data.source import load_split
from pbd_ray.detector.bundle import Bundle, load_bundle
from pbd_ray.detector.export.format import Format, Forward
from pbd_ray.detector.export.formats import FORMATS
from pbd_ray.detector.whole_folder import whole_folder
from pbd_ray.metrics.cost import cost_report
from pbd_ray.report.model_card import CardFacts, model_card
from pbd_ray.search.certificate import CERTIFICATE, Certificate, certificates_text, wrote
from pbd_ray.search.hashing import weights_hash
from pbd_ray.search.known_map import known_test_map
from pbd_ray.search.parity import Parity, compare_on_random_pixels, compare_on_videos

Compare = Callable[[Sequence[Forward]], tuple[Parity, ...]]


def run_export(directory: str, names: str, output: Path, recipe: Recipe | None) -> None:
    """Write a bundle in one format or several, a folder each, and certify what was written.

    Args:
        names: formats, with commas between them.
        recipe: with data: the certificates compare on its selection videos; None: on random pixels.

    Raises:
        UserError: what the user can mend. RunError: an export that is too far from the bundle. Nothing is
            written then, of no format.
    """
    formats = _formats(names)
    check_output(output)
    for format in formats:
        folder = output / format.name
        if folder.exists() and not wrote(folder):
            raise ConfigError(f"--output {output}: {folder} is there and is no export")
    bundle = load_bundle(directory)
    model = from_detector(bundle.detector)
    digest = weights_hash(model.weights)
    test_map = known_test_map(Path(directory), bundle)
    cost = cost_report(bundle.detector)
    origin = _origin(bundle, digest)
    card = CardFacts(bundle.config, bundle.classes, origin.depth, origin.kept_blocks, cost, test_map, digest)
    compare = _comparison(bundle, directory, recipe)
    plain = _without_gaps(bundle, origin)
    try:
        with ExitStack() as stack:
            folders = [stack.enter_context(whole_folder(output / format.name)) for format in formats]
            for format, folder in zip(formats, folders, strict=True):
                say(f"writing {format.name}")
                format.write(plain, folder)
            say("comparing what was written with the bundle")
            exports = [format.read(folder, plain) for format, folder in zip(formats, folders, strict=True)]
            certificates = [
                Certificate(format, digest, origin.kept_blocks, parity)
                for format, parity in zip(formats, compare(exports), strict=True)
            ]
            print(certificates_text(certificates), flush=True)
            for certificate, folder in zip(certificates, folders, strict=True):
                excess = certificate.parity.excess(certificate.format.tolerance)
                if excess is not None:
                    raise RunError(f"{certificate.format.name}: {excess}; nothing is written")
                (folder / "README.md").write_text(model_card(certificate.format.name, card), encoding="utf-8")
                text = json.dumps(certificate.to_json(folder), indent=2, allow_nan=False)
                (folder / CERTIFICATE).write_text(f"{text}\n", encoding="utf-8")
    except BrokenPipeError:  # nobody reads the table any more
        raise
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {one_line(error)}") from None
    for format in formats:
        say(f"{output / format.name}")


def _formats(names: str) -> list[Format]:
    unknown = [name for name in names.split(",") if name not in FORMATS]
    if unknown:
        raise ConfigError(f"--format {names}: '{unknown[0]}' is not one of {', '.join(FORMATS)}")
    return [FORMATS[name] for name in dict.fromkeys(names.split(","))]


@dataclass(frozen=True)
class _Origin:
    """The bundle of a run that an export goes back to, which may be an export itself."""

    weights: str
    depth: int
    kept_blocks: tuple[int, ...]


def _origin(bundle: Bundle, digest: str) -> _Origin:
    match bundle.facts.get("exported_from"):
        case {"weights": str(weights), "depth": int(depth), "kept_blocks": [*kept]} if len(kept) == len(
            bundle.kept_blocks
        ):
            return _Origin(weights, depth, tuple(kept))
    return _Origin(digest, bundle.config.backbone.depth, bundle.kept_blocks)


def _without_gaps(bundle: Bundle, origin: _Origin) -> Bundle:
    model, config = without_gaps(from_detector(bundle.detector), bundle.config)
    detector = to_detector(model, config, len(bundle.classes))
    facts = {**bundle.facts, "exported_from": {**asdict(origin), "kept_blocks": list(origin.kept_blocks)}}
    return Bundle(detector, config, bundle.classes, model.kept_blocks, facts)


def _comparison(bundle: Bundle, directory: str, recipe: Recipe | None) -> Compare:
    """How exports are compared with the bundle; what is wrong with the recipe shows here, before any work."""
    if recipe is None:
        return lambda exports: compare_on_random_pixels(bundle.detector, exports, bundle.config.grid)
    recipe = changed(recipe, {"execution.backend": "local", "execution.loggers": ()})  # the files are here
    torch.set_num_threads(recipe.execution.threads_per_worker)
    whole = load_split(recipe, say)
    nothing = whole.fit.select(())
    split = Split(fit=nothing, selection=whole.selection, test=nothing)  # only these videos need be there
    check_bundle(recipe, split, bundle, directory)
    split, source, _ = usable_videos(recipe, split)
    tious, batch = recipe.experiment.evaluation.tious, recipe.execution.window_batch
    return lambda exports: compare_on_videos(
        bundle.detector, exports, bundle.config, split.selection, source, batch, tious
    )
