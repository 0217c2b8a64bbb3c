"""What Vast.ai's API can answer instead of what was asked, one class per reaction of the caller.

VastError
|-- VastUnavailableError  no usable answer in time: could not ask, which says nothing about what exists
|-- VastQuotaError        the account's quota is used up until `until`; asking before is no use
|-- VastCreditError       the account has no credit: nothing is rented until somebody adds some
|-- VastAuthError         the key is wrong or lacks the permission
|-- VastRefusedError      the API understood and said no; `code` is its word for why
|   `-- OfferTakenError   somebody else rented the machine between search and create
|-- CreateFailedError     creation failed although the contract exists: `contract_id` must be destroyed
`-- CreateUncertainError  creation may have happened; look for it in the list before trying again
"""

from cluster.errors import ClusterError


class VastError(ClusterError):
    """Base; `message` carries the API's own words."""


class VastUnavailableError(VastError):
    """Raised when the deadline of a call passes without a usable answer (time-outs, 429, 5xx, garbage)."""


class VastQuotaError(VastError):
    """Raised at once, without a retry."""

    def __init__(self, message: str, until: float) -> None:
        super().__init__(message)
        self.until = until
        """Unix seconds; the end of the day in UTC where the API does not say."""


class VastCreditError(VastError):
    """Raised at once by whatever would cost money."""


class VastAuthError(VastError):
    """Raised at once on 401 and 403, and on the API's words for them."""


class VastRefusedError(VastError):
    """Raised on any other 4xx, and on `success: false`."""

    def __init__(self, message: str, code: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        """Of HTTP."""

    @property
    def means_gone(self) -> bool:
        """Whether the instance that was asked about does not exist."""
        return self.status in (404, 410) or self.code == "no_such_instance"


class OfferTakenError(VastRefusedError):
    """Raised by create; the next offer may do."""


class CreateFailedError(VastError):
    """Raised by create when the answer is an error and names a contract, as with a bid that is too low."""

    def __init__(self, message: str, contract_id: int) -> None:
        super().__init__(message)
        self.contract_id = contract_id


class CreateUncertainError(VastError):
    """Raised by create when the request was sent and no usable answer came back."""
