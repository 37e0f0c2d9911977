"""The library's log follows the `log_level` of a run, as that of transformers does."""

import logging


def follow(level: int) -> None:
    """Shows what the library logs from this level on; where nobody takes the log, on standard error, as transformers does.

    Args:
        level (`int`): As `TrainingArguments.get_process_log_level()` gives it.
    """
    logger = logging.getLogger(__package__)
    logger.setLevel(level)
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler())
