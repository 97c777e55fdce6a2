"""One Tune trial per run of an ablation: it runs the whole round loop in its own process.

At the size at which an ablation is affordable, starting Ray Train for every learning rate would cost more
than the training. What a run needs it gets as values; its results go to its directory.
"""

from __future__ import annotations

from typing import Any

from ray import tune


def run_trial(config: dict[str, Any], tasks: dict[str, Any], shared: Any) -> None:
    """Reports every line of progress as `line`, and at the end why the run `failed`, or None."""
    import torch

    from pbd_ray.search.ablation_run import attempt

    task = tasks[config["run"]]
    torch.set_num_threads(task.recipe.execution.threads_per_worker)
    reason = attempt(task, shared, lambda line: tune.report({"line": line}))
    tune.report({"line": "ended", "failed": reason})
