"""What a study tells its user: notices, through `logging`, and errors with a remedy."""

from __future__ import annotations

import logging

# Tells which runs are kept, done again or skipped. The command prints it; other callers see it
# where they configure `logging`.
notice = logging.getLogger(__name__).info


class StudyError(Exception):
    """A mistake of the user, or a state of the files, with a remedy in the message."""


def quiet_libraries() -> None:
    """Turn off the progress bars and advice of the libraries below; errors are still shown."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
