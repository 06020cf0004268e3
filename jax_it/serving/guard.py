"""What holds for every path: keys, errors in one shape, limits of bodies, the access log."""

import asyncio
import hmac
import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from jax_it.errors import shorten
from jax_it.serving import page
from jax_it.serving.admission import Server
from jax_it.serving.errors import ApiError

OPEN_PATHS = ("/health", *page.FILES)  # without a key


def add_error_handlers(app: FastAPI) -> None:
    """Give all errors OpenAI's shape."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_of_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        what = {404: "there is no such path", 405: "the path does not take this method"}
        message = what.get(error.status_code, str(error.detail))
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return respond(ApiError(500, "the server has a bug, or a part of it failed; its log says more"))


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """Return the first error of a body: the one of an unknown field, if there is one."""
    found = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    path = [str(each) for each in found["loc"] if each != "body"]
    # The kinds of value that a field may have are part of pydantic's path, and not of the body.
    names = [each for each in path if "[" not in each and each not in ("str", "constrained-str", "function-after")]
    param = shorten(".".join(names), 100) or None
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}", param, "unknown_field")
    if found["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found.get('ctx', {}).get('error', found['msg'])}")
    if not names and found["type"] == "model_attributes_type":
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    message = found["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param)


class Guard:
    """Ask for a key, give each request an id, and log it."""

    def __init__(self, app: ASGIApp, server: Server):
        self._app, self._server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        log: dict[str, Any] = {}
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {}).update(id=request_id, log=log)
        began, status = time.monotonic(), 0

        async def note(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            async with asyncio.timeout(self._server.limits.timeout):  # of a client that reads nothing
                await send(message)

        due = asyncio.get_running_loop().time() + self._server.limits.body_timeout
        is_whole, size = False, 0

        async def receive_in_time() -> Any:
            nonlocal is_whole, size
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            is_whole = not message.get("more_body")
            size += len(message.get("body", b""))
            if size > self._server.limits.max_body:
                raise HTTPException(413, f"the body is larger than {self._server.limits.max_body} bytes")
            return message

        try:
            if self._is_allowed(scope):
                await self._app(scope, receive_in_time, note)
            else:
                error = ApiError(401, "a valid key is needed: send Authorization: Bearer KEY", code="invalid_api_key")
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, note)
        finally:
            self._server.log.write(scope, status, request_id, time.monotonic() - began, log)

    def _is_allowed(self, scope: Scope) -> bool:
        """Compare the request's key with all keys, in constant time."""
        if not self._server.keys or scope["path"] in OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        found = [hmac.compare_digest(key.strip(), each) for each in self._server.keys]
        return scheme.lower() == b"bearer" and any(found)
