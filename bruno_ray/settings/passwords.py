"""Passwords in the address of a study's storage: used, and written nowhere.

Whatever is kept or shown has `***` in their place. A process that reads such an address back, to resume a run or to
show it, takes the password from the whole address: the one that this process was given, or BRUNO_STUDY__STORAGE.
"""

import os
import re

from bruno_ray.errors import StudyError

MASK = "***"
VARIABLE = "BRUNO_STUDY__STORAGE"

_IN_LOGIN = re.compile(r"(://[^:/@\s]*:)[^@\s]*(?=@)")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:password|passwd|pwd|secret|token)[^=&\s]*=)[^&\s]+", re.IGNORECASE)

_given: dict[str, str] = {}
"""Whole addresses that this process has used, by what is shown of them."""


def without_password(text: str) -> str:
    """An address, or a text that holds some, fit to be kept or shown."""
    return _IN_QUERY.sub(rf"\1{MASK}", _IN_LOGIN.sub(rf"\1{MASK}", text))


def with_password(address: str) -> str:
    """The whole of an address that may be masked. Raises `StudyError` where nobody has given the password."""
    masked = without_password(address)
    if masked != address:
        _given[masked] = address
    if MASK not in address:
        return address
    if address not in _given:
        told = os.environ.get(VARIABLE, "")
        if without_password(told) != address:
            raise StudyError(
                f"the password of the study's storage {address} is not kept with the run: set {VARIABLE} to the whole"
                " address"
            )
        return told
    return _given[address]
