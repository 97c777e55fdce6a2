"""What is known of a bundle's accuracy without running it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pbd_ray.detector.bundle import CONFIG_FILE, Bundle, BundleError
from pbd_ray.search.ledger import Ledger


def known_test_map(directory: Path, bundle: Bundle) -> Mapping[float, float] | None:
    """mAP by tIoU on the test videos: of the committed round that the bundle is of, where it lies in a run
    directory, else what the job that fitted it wrote into it; None: neither.

    Raises:
        LedgerError: the run directory is not what was committed.
        BundleError: the bundle's facts have a `test_map` that is none.
    """
    folder = directory.resolve()
    for run in (folder.parent, *folder.parents[2:3]):
        if not Path(run, "recipe.yaml").is_file():
            continue
        ledger = Ledger.existing(str(run))
        for record in ledger.committed():
            if Path(run, ledger.round(record.round).bundle) == folder:
                return record.evaluation.map
    written = bundle.facts.get("test_map")
    try:
        return None if written is None else {float(tiou): float(value) for tiou, value in written.items()}
    except (AttributeError, TypeError, ValueError):
        where = f"{directory / CONFIG_FILE}: facts.test_map"
        raise BundleError(f"{where} is {written!r:.80}, expected mAP by tIoU") from None
