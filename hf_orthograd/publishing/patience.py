"""Calls to the Hub that wait out faults which pass."""

import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError
from transformers.utils import logging


logger = logging.get_logger(__name__)
Result = TypeVar("Result")
# the client raises a RuntimeError, from the real one, where a large file could not be uploaded
FAULTS = (HTTPError, OSError, RuntimeError)
_TRIES = 5


def patiently(call: Callable[[], Result]) -> Result:
    """Calls again after a fault that passes: a lost connection, a timeout, a server that is overloaded or down."""
    for tries in range(1, _TRIES):
        try:
            return call()
        except FAULTS as error:
            if not _passes(error):
                raise
            seconds = 2 ** (tries - 1)
            logger.warning(f"The Hub did not answer as it should ({error}). Trying again in {seconds} s.")
            time.sleep(seconds)
    return call()


def _passes(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):  # there was no answer
        return True
    wraps = isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__ is not None
    return wraps and _passes(error.__cause__)
