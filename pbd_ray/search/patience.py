"""Storage that fails: what is tried again, how often, and the one line that ends it.

Failures that may pass by themselves (an object store that is busy or out of reach, a network file system
that stumbles) are tried again a few times, each time with the reason in the log. The clients' own retries
are off or short (`storage`), so this is the one place that waits, and its bound is known.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable
from time import sleep
from typing import TypeVar

from pbd_ray.config import RunError, UserError, one_line

log = logging.getLogger(__name__)

TRIES = 5
FIRST_WAIT_SECONDS = 0.5
"""Between the first two tries; doubled after each."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_DENIED_BY_AWS = re.compile(
    r"AWS Error (ACCESS_DENIED|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|MISSING_AUTHENTICATION_TOKEN"
    r"|NO_SUCH_BUCKET|REQUEST_EXPIRED|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT"
    r"|UNKNOWN \(HTTP status (301|400|401|403)\)) "
)
"""pyarrow hands on what S3 answered in the text alone; codes that it has no name for are UNKNOWN."""

T = TypeVar("T")


class StorageError(RunError):
    """The storage of a run failed for good, or is full."""


class StorageDenied(UserError):
    """The storage may not be used like this: no permission, no such bucket, no directory."""


def patiently(action: Callable[[], T], what: str) -> T:
    """The result of a storage operation that may be repeated, tried again where its failure may pass.

    Args:
        what: the operation and its file, as in "write /runs/1/summary.json".

    Raises:
        FileNotFoundError: as `action` raises it, at once.
        StorageDenied: trying again would not help.
        StorageError: the storage is full, or the last try has failed.
    """
    tries = 1
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            problem = f"cannot {what}: {one_line(error)}"
            if error.errno in _DENIED or _DENIED_BY_AWS.search(str(error)):
                raise StorageDenied(problem) from None
            if error.errno in _FULL:
                raise StorageError(f"{problem}; with space the same command goes on from here") from None
            if tries == TRIES:
                raise StorageError(
                    f"{problem} (tried {TRIES} times); the same command goes on from here"
                ) from None
        wait_seconds = FIRST_WAIT_SECONDS * 2 ** (tries - 1)
        log.warning("%s; trying again in %g s", problem, wait_seconds)
        sleep(wait_seconds)
        tries += 1
