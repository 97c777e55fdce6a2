"""Where a command may write what people keep. A Ray job runs in a copy of the code that Ray deletes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pbd_ray.config import ConfigError, Recipe, changed


def inside_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def check_output(output: Path) -> None:
    """Refuse, before any work, a path that cannot become a directory of results.

    Raises:
        ConfigError: it is a URI, or relative inside a Ray job; something else than a directory is there or on
            the way there.
    """
    if re.match(r"[a-z][a-z0-9]+:/", str(output)):
        raise ConfigError(f"--output {output}: a directory, not a URI")
    check_lasting("--output", str(output))
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"--output {output}: {there} is not a directory")


def with_lasting_run_dir(recipe: Recipe) -> Recipe:
    """The recipe, its run directory in a place that outlives the job: `~/runs/NAME` of the driver's node
    where a Ray job's recipe has none.

    Raises:
        ConfigError: it names a relative path, and this is a Ray job.
    """
    if recipe.execution.run_dir is None and inside_job():
        return changed(recipe, {"run_dir": str(Path.home() / recipe.run_dir)})
    check_lasting("run_dir", recipe.run_dir)
    return recipe


def check_lasting(what: str, path: str) -> None:
    """Refuse a path that would not outlive the job.

    Args:
        what: names the path in the message.

    Raises:
        ConfigError: it is relative, and this is a Ray job.
    """
    if inside_job() and "://" not in path and not Path(path).is_absolute():
        raise ConfigError(
            f"{what} {path}: a Ray job runs in a copy of the code that is deleted; name an absolute path"
        )
