"""What the server says of an uploaded file.

Knows: names and types on the wire. Does not know: requests that use it (`api_requests`), HTTP.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class UploadedMedia(BaseModel):
    """A checked file on the server; sizes in pixels as displayed, times as seconds since 1970."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    """`media-` and the first 32 hexadecimal digits of the content's SHA-256."""
    object: Literal["media"] = "media"
    type: Literal["image", "video"]
    bytes: int
    width: int
    height: int
    duration: float | None = None
    """Seconds; None for a picture."""
    fps: float | None = None
    created_at: int
    expires_at: int
    """Unless it is used before: each use begins the time anew."""

    @property
    def url(self) -> str:
        """Goes wherever a request takes the URL of a picture or video."""
        return f"media://{self.id}"


class DeletedMedia(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    object: Literal["media"] = "media"
    deleted: Literal[True] = True
