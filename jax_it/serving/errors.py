"""Errors in OpenAI's shape."""

from typing import Any


class ApiError(Exception):
    """An answer that is an error: `{"error": {"message", "type", "param", "code"}}` with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": _type(self.status), "param": self.param, "code": self.code}}


def _type(status: int) -> str:
    """Return OpenAI's name for errors of this HTTP status."""
    named = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
    return named.get(status, "server_error" if status >= 500 else "invalid_request_error")
