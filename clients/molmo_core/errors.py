"""The one error tree.

    MolmoError
      InvalidRequest            400   what the caller sent cannot be served
        UnknownField            400
        ControlTokenInText      400
        PromptTooLong           400
        TooManyMedia            400
        InvalidMedia            400   not an image/video, truncated, empty, too large a canvas
        InvalidExample          400   a row of a dataset cannot be made a training example
      Unauthorised              401   no key, or one that is not good here
        Forbidden               403   a good key, for something else
      NotFound                  404   unknown path or checkpoint
        ModelNotFound           404   no model of that name is served
        MediaNotFound           404   no uploaded file of that id, or its time is over
      PayloadTooLarge           413
      RateLimited               429   more than the caller's key allows; carries Retry-After
      EngineRefused             4xx   the engine answered the request with a client error
      EngineFailed              502   the engine broke on this request
      EngineUnavailable         503   starting, restarting or draining; carries Retry-After
      Busy                      503   the queue is full; carries Retry-After
      DeadlineExceeded          504
      CheckpointError           500   a checkpoint folder cannot be used
      DataError                 500   training data, or what is said of them, cannot be used
      TrainingError             500   a training run cannot start or go on
      KeyStoreError             500   the file of API keys cannot be used, or a key not be made
      BatchStoreError           503   files and batches cannot be kept: the disk is full, …
      UnsupportedEngine         500   the installed vLLM is not the one that was tested

A message says what was got, what is allowed and what to do. Knows: HTTP statuses and OpenAI's
error envelope. Does not know: who raises and who answers.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MolmoError(Exception):
    """Root of everything a user, a client or a file can cause.

    `param` names the request field at fault; `retry_after_s` is sent as `Retry-After`.
    """

    status: int = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def envelope(self) -> dict[str, Any]:
        """OpenAI's error body."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(MolmoError):
    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class UnknownField(InvalidRequest):
    code = "unknown_parameter"


class ControlTokenInText(InvalidRequest):
    code = "control_token_in_text"


class PromptTooLong(InvalidRequest):
    code = "context_length_exceeded"


class TooManyMedia(InvalidRequest):
    code = "too_many_media"


class InvalidMedia(InvalidRequest):
    code = "invalid_media"


class InvalidExample(InvalidRequest):
    code = "invalid_example"


class Unauthorised(MolmoError):
    status = 401
    code = "invalid_api_key"
    type = "invalid_request_error"


class Forbidden(Unauthorised):
    status = 403
    code = "forbidden"
    type = "permission_error"


class NotFound(MolmoError):
    status = 404
    code = "not_found"
    type = "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MediaNotFound(NotFound):
    code = "media_not_found"


class PayloadTooLarge(MolmoError):
    status = 413
    code = "payload_too_large"
    type = "invalid_request_error"


class RateLimited(MolmoError):
    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"


class EngineRefused(MolmoError):
    """The engine answered with a client error that the gateway had not foreseen."""

    status = 400
    code = "engine_refused"
    type = "invalid_request_error"


class EngineFailed(MolmoError):
    status = 502
    code = "engine_failed"


class EngineUnavailable(MolmoError):
    status = 503
    code = "engine_unavailable"


class Busy(MolmoError):
    status = 503
    code = "busy"


class DeadlineExceeded(MolmoError):
    status = 504
    code = "deadline_exceeded"


class CheckpointError(MolmoError):
    code = "checkpoint_error"


class DataError(MolmoError):
    code = "data_error"


class TrainingError(MolmoError):
    code = "training_error"


class KeyStoreError(MolmoError):
    code = "key_store_error"


class BatchStoreError(MolmoError):
    status = 503
    code = "batch_store_error"


class UnsupportedEngine(MolmoError):
    code = "unsupported_engine"
