"""Everything that can go wrong and that a user can do something about.

    BrunoError
    |-- SettingsError     a value in the config file, environment or command line makes no sense
    |-- PromptError       a prompt set is missing, empty, one-sided, overlapping or lacks a column
    |-- ModelError        a model cannot be loaded, is not a chat model or has an unknown architecture
    |-- StudyError        the study's storage cannot be reached or holds another study
    |   `-- NoStudyError  it holds no study yet: the search has not begun
    |-- WorkerError       workers died more often than the run tolerates
    |-- TrialError        one trial cannot be scored (NaN in its logits); the study goes on
    |-- ServerError       a server with OpenAI's API cannot be asked
    |   `-- JudgeError    it is the judge, or its answers say nothing; a run goes on without its figures
    `-- OutputError       a run directory or model folder cannot be written or read

Every message is one line and ends with what to do next. The command line prints it and exits
with code 2; anything that is not a ``BrunoError`` is a defect and keeps its traceback.
"""

SERVER_FAILED = "the server could not be started: "
"""Begins what `serve` says of it, and what a program says whose server did not start."""


class BrunoError(Exception):
    """Base of all errors that the command line turns into one line and exit code 2."""


class SettingsError(BrunoError):
    """Raised while settings are read, before anything is loaded."""


class PromptError(BrunoError):
    """Raised while prompt sets are loaded and checked, before a model is loaded."""


class ModelError(BrunoError):
    """Raised while a model is loaded or its modules are looked up."""


class StudyError(BrunoError):
    """Raised when a study cannot be opened, continued or taken over."""


class NoStudyError(StudyError):
    """Raised when a study is to be read that nobody has begun."""


class WorkerError(BrunoError):
    """Raised when no worker is left, or a batch of trials has lost its worker twice."""


class TrialError(BrunoError):
    """Raised for one trial whose scores are not numbers; recorded as a failed trial."""


class ServerError(BrunoError):
    """Raised when a server of chat completions cannot be reached, is too slow, or answers with something else."""


class JudgeError(ServerError):
    """Raised when a judge cannot be reached, is too slow, or gives no probabilities for yes and no."""


class OutputError(BrunoError):
    """Raised before anything is written where it must not be, or when a run cannot be read."""


LONGEST_LINE = 300
"""Characters of another library's message that are repeated in one of ours."""


def first_line(error: BaseException | str) -> str:
    """What an error (or a text) says, as the first line that says something; of a silent error its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines:
        return lines[0][:LONGEST_LINE].rstrip(".")
    return "" if isinstance(error, str) else type(error).__name__
