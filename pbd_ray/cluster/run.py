"""The main jobs from a recipe to their results: what the scripts in `jobs/` call."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from pbd_ray.cluster.backend import alone_in_cluster, backend, backend_steps, fit_uncompressed
from pbd_ray.cluster.detecting import detected_rows
from pbd_ray.cluster.holder import job_finished, submission_id
from pbd_ray.cluster.inputs import check_bundle, given_teacher
from pbd_ray.cluster.metrics_export import TEST_MAP
from pbd_ray.cluster.monitoring import say
from pbd_ray.cluster.output import check_output
from pbd_ray.cluster.places import check_places
from pbd_ray.cluster.preflight import usable_videos
from pbd_ray.cluster.reporting import write_report
from pbd_ray.cluster.session import sigterm_as_interrupt
from pbd_ray.compression.blocks import from_detector, to_detector
from pbd_ray.config import ConfigError, Recipe
from pbd_ray.data.annotations import Split, detections_to_json
from pbd_ray.data.source import load_split
from pbd_ray.data.video_classes import named, scored_against
from pbd_ray.detector.bundle import load_bundle, save_bundle
from pbd_ray.report.detection_report import Measures, evaluate_detections, publish
from pbd_ray.report.forecast import outcome_text
from pbd_ray.report.page import REPORT
from pbd_ray.report.rounds import depths_info, frontier_table, headline_name, rounds_text
from pbd_ray.report.search_cost import whole_stages
from pbd_ray.search.controller import compress
from pbd_ray.search.evaluation import detections_of, evaluate, headline_interval
from pbd_ray.search.footprint import compression_footprint, teacher_footprint
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.owner import Owner, owned
from pbd_ray.search.packing import Packing, model_of
from pbd_ray.search.standing import standing
from pbd_ray.search.state import Summary
from pbd_ray.search.storage import Storage
from pbd_ray.search.summary import summary_to_json
from pbd_ray.search.sweeping import measuring


def run_compression(recipe: Recipe) -> Summary:
    """Compress as the recipe says, or go on with what its run directory holds; print and write the results.

    Raises:
        UserError: what the user can mend, with nothing half-written.
    """
    storage = Ledger.refuse_other(recipe.run_dir, recipe).storage
    finished = job_finished(recipe.execution.ray_address)
    with sigterm_as_interrupt(), owned(storage, submission_id(), finished) as owner:
        return _compress(recipe, storage, owner)


def _compress(recipe: Recipe, storage: Storage, owner: Owner) -> Summary:
    split = load_split(recipe, say)
    teacher = given_teacher(recipe, split)
    # Ray before the videos: it forgets the code of a submitted job whose driver takes a minute to connect.
    with backend(recipe, recipe.execution.train_workers), alone_in_cluster(recipe, storage, owner):
        check_places(recipe, storage, compression_footprint(recipe.experiment, split).total)
        split, source, left_out = usable_videos(recipe, split, Ledger(storage).quarantine())
        packing = Packing(recipe.experiment.detector, split.fit.classes)
        ledger = Ledger.open(storage, recipe, owner)
        ledger.record_quarantine(left_out)
        if teacher is None and ledger.teacher.read_bundle() is None:
            with measuring(ledger.teacher, "fit", recipe.execution) as measured:
                fitted = fit_uncompressed(recipe, split, source, ledger.scratch_uri())
                measured |= fitted.measured
            teacher = packing.files(fitted.model, {"experiment": recipe.experiment.name})
        with backend_steps(recipe, split, source, ledger.scratch_uri()) as steps:
            summary = compress(
                recipe,
                split,
                teacher,
                steps,
                ledger,
                to_bundle=packing.files,
                from_bundle=model_of,
                cost=packing.cost,
                report=say,
                publish=lambda: _publish_round(ledger),
            )
    _publish(recipe, ledger, summary)
    return summary


def run_teacher(recipe: Recipe, output: Path, command: str) -> None:
    """Fit the uncompressed detector, evaluate it once on the test videos, and write its bundle.

    Interrupted and started again it goes on at its epoch: what that needs lies in `<output>.fit`
    until the bundle is written.

    Args:
        command: how the job was called; kept in the bundle's facts.

    Raises:
        UserError: what the user can mend; also an `output` that is there already.
    """
    check_output(output)
    if output.exists():
        raise ConfigError(f"--output {output} is there already")
    scratch = output.absolute().with_name(f"{output.name}.fit")
    split = load_split(recipe, say)
    with backend(recipe, recipe.execution.train_workers):
        needed = teacher_footprint(recipe.experiment, len(split.fit.classes))
        check_places(recipe, Storage.at(str(scratch)), needed.total)
        files = Ledger(Storage.at(str(scratch)))  # no run directory, but it must go on with the same videos
        split, source, left_out = usable_videos(recipe, split, files.quarantine())
        files.record_quarantine(left_out)
        fitted = fit_uncompressed(recipe, split, source, str(scratch))
        with backend_steps(recipe, split, source, str(scratch)) as steps:
            rows = detected_rows(recipe, split, steps, fitted.model)
    experiment = recipe.experiment
    rules, seed = experiment.evaluation, experiment.seed
    cost = Packing(experiment.detector, split.fit.classes).cost(fitted.model)
    quality = evaluate(split.test, rows, None, rules, seed, fitted.model, cost)
    interval = headline_interval(split.test, rows, rules, seed)
    facts = {
        "command": command,
        "experiment": experiment.name,
        "seed": seed,
        "epoch": fitted.epoch,
        "test_videos": len(split.test.videos),
        "test_map": {f"{tiou:g}": value for tiou, value in quality.map.items()},
        "test_average_map": quality.average_map,
        "test_headline": [quality.headline_map, interval.low, interval.high],
        "quarantined": dict(left_out.reasons),
    }
    detector = to_detector(fitted.model, experiment.detector, len(split.fit.classes))
    save_bundle(output, detector, split.fit.classes, facts)
    shutil.rmtree(scratch, ignore_errors=True)
    shown = ", ".join(f"mAP@{tiou:g} {value:.4f}" for tiou, value in quality.map.items())
    say(f"teacher on {len(split.test.videos)} test videos: {shown}, average {quality.average_map:.4f}")
    headline = headline_name(rules.headline_tiou)
    say(f"{headline} {quality.headline_map:.4f} [{interval.low:.4f}, {interval.high:.4f}]")
    say(f"bundle: {output}")


def run_detector(recipe: Recipe, directory: str | Path, measures: Measures, output: Path) -> None:
    """Run a bundle's detector on the recipe's test videos, as the evaluation of a round does; write the
    detections and their report.

    Raises:
        UserError: what the user can mend, with nothing written.
    """
    whole = load_split(recipe, say)
    nothing = whole.fit.select(())
    split = Split(fit=nothing, selection=nothing, test=whole.test)  # only these videos need be there
    bundle = load_bundle(directory)
    check_bundle(recipe, split, bundle, str(directory))
    with backend(recipe, workers=1), tempfile.TemporaryDirectory() as scratch:
        split, source, left_out = usable_videos(recipe, split)
        with backend_steps(recipe, split, source, scratch) as steps:
            rows = detected_rows(recipe, split, steps, from_detector(bundle.detector))
    truth, detections = scored_against(split.test), named(split.test, detections_of(rows))
    facts = {
        "subset": recipe.experiment.data.test_subset,
        "kept_blocks": list(bundle.kept_blocks),
        "quarantined": dict(left_out.reasons),
    }
    report = evaluate_detections(truth, detections, measures, facts)
    predictions = json.dumps(detections_to_json(detections, truth.classes)).encode()
    publish(report, output, say, {"predictions.json": predictions})


def _publish_round(ledger: Ledger) -> None:
    """The run as it stands, for those who look."""
    write_report(ledger)
    summary = ledger.storage.read_json("summary.json")
    assert summary is not None, "it has just been written"
    last = summary["rounds"][-1] if summary["rounds"] else summary["teacher"]
    TEST_MAP.set(summary["teacher"]["headline_map"], model="teacher")
    TEST_MAP.set(last["headline_map"], model="last")


def _publish(recipe: Recipe, ledger: Ledger, summary: Summary) -> None:
    """The frontier beside summary.json, and the table of rounds in the log."""
    headline = headline_name(recipe.experiment.evaluation.headline_tiou)
    depths = depths_info(summary_to_json(summary))
    ledger.storage.write_table("frontier.parquet", frontier_table(depths))
    print(rounds_text(depths, headline), flush=True)
    last = standing((summary.teacher, *summary.rounds))[-1]
    if (plan := ledger.plan(recipe)) is not None:
        records = (summary.teacher, *summary.rounds)
        say(outcome_text(plan, whole_stages({record.round: record.measured for record in records})))
    for name in (REPORT, "summary.json", ledger.round(last.round).bundle):
        say(f"{ledger.storage.uri(name)}")
