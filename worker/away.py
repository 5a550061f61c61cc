"""Why Redis does not answer, in words for people."""

from __future__ import annotations

import ssl

from producer.message import clean_text


def trouble(error: BaseException) -> str:
    """The kind of an error and, where a certificate was refused, the way out.

    Nothing else of its text: that can hold the address with its password.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            said = clean_text(cause.verify_message)
            return f"{type(error).__name__}: certificate refused: {said}; see REDIS_TLS_CA and REDIS_TLS_VERIFY"
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
