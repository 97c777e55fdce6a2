"""Questions to a run directory: nothing is started and nothing is written."""

from __future__ import annotations

from pbd_ray.config import Recipe, UserError
from pbd_ray.report.explain import explain_text
from pbd_ray.search.ledger import Ledger
from pbd_ray.search.owner import refuse_held
from pbd_ray.search.verify import verify


def refuse_early(recipe: Recipe) -> None:
    """Refuse at once, before torch and Ray are loaded, what would be refused after that.

    Raises:
        LedgerError: the run directory holds another experiment, or a plan that is none, or a driver on this
            machine writes it.
    """
    ledger = Ledger.refuse_other(recipe.run_dir, recipe)
    ledger.plan(recipe)
    refuse_held(ledger.storage)


def print_problems(run_dir: str) -> int:
    """Check every hash of a run directory, one line for each that does not hold.

    Returns:
        The exit status: 0 if all is well, else 1.

    Raises:
        LedgerError: it is not a run directory.
    """
    problems = verify(run_dir)
    if not problems:
        rounds = Ledger.existing(run_dir).committed()[1:]  # the first is the teacher
        print(f"{run_dir}: {len(rounds)} rounds, all hashes hold")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def print_explanation(run_dir: str, round: str) -> None:
    """Why a committed round dropped the block it dropped.

    Args:
        round: its number, as the user wrote it.

    Raises:
        UserError: there is no such round, or no run.
    """
    if not round.isdecimal():
        raise UserError(f"--explain: ROUND '{round}' is not a number")
    storage = Ledger.existing(run_dir).storage
    summary = storage.read_json("summary.json")
    if summary is None:
        raise UserError(f"{storage.uri('summary.json')} is missing: no round is committed yet")
    try:
        print(explain_text(summary, int(round)))
    except (KeyError, TypeError) as error:
        raise UserError(f"{storage.uri('summary.json')}: not a summary: {error}") from None
