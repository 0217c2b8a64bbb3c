"""Nothing that costs or destroys happens without a yes."""

from bruno_ray.terminal import ask_yes, can_ask
from cluster.errors import RefusedError


def agree(question: str, yes: bool) -> None:
    """Returns when the user agrees, or has agreed beforehand with ``--yes``. Raises `RefusedError`."""
    if yes:
        return
    if not can_ask():
        raise RefusedError(f"nothing was done: {question.rstrip('?')}? cannot be asked without a terminal; add --yes")
    if not ask_yes(question):
        raise RefusedError("nothing was done: it was not agreed to")
