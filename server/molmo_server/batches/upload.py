"""A form with one file, written to the disk as it arrives.

Knows: forms in pieces. Does not know: where files are kept, what callers are told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from molmo_core.errors import InvalidRequest, PayloadTooLarge

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_FILE = "file"
_MAX_FIELDS = 8
_MAX_FIELD_BYTES = 1024
_MAX_NAME_CHARS = 255


@dataclass(kw_only=True)
class Upload:
    filename: str | None = None
    """As the caller named it, without what cannot be shown; None: no file has come."""
    fields: dict[str, str] = field(default_factory=dict)


async def receive_file(
    pieces: AsyncIterator[bytes], content_type: str, part: BinaryIO, *, max_bytes: int
) -> Upload:
    """Write the form's `file` to `part`; raises InvalidRequest, PayloadTooLarge, OSError."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("the form's content-type has no boundary; add it")
    form = _Form(max_bytes)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for piece in pieces:
            parser.write(piece)
            for data in form.taken():
                await asyncio.to_thread(part.write, data)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(
            f"the form cannot be read ({error}); send multipart/form-data with a field 'file'"
        ) from error
    if not form.has_ended:
        raise InvalidRequest("the form was cut short; send it whole")
    return form.upload


class _Form:
    """What the parser calls, part by part."""

    def __init__(self, max_bytes: int) -> None:
        self.upload = Upload()
        self.has_ended = False
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._taken: list[bytes] = []
        self._header, self._value = bytearray(), bytearray()
        self._disposition = b""
        self._name, self._is_file, self._text = "", False, bytearray()
        self._n_parts = 0

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self.on_part_begin,
            "on_header_field": self.on_header_field,
            "on_header_value": self.on_header_value,
            "on_header_end": self.on_header_end,
            "on_headers_finished": self.on_headers_finished,
            "on_part_data": self.on_part_data,
            "on_part_end": self.on_part_end,
            "on_end": self.on_end,
        }

    def taken(self) -> list[bytes]:
        """Pieces of the file since the last call."""
        taken, self._taken = self._taken, []
        return taken

    def on_part_begin(self) -> None:
        self._n_parts += 1
        if self._n_parts > _MAX_FIELDS:
            raise InvalidRequest(f"the form has more than {_MAX_FIELDS} fields; send fewer")
        self._disposition, self._text = b"", bytearray()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def on_headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = b"filename" in options
        if self._is_file != (self._name == _FILE):
            what = "a file" if self._is_file else "text"
            raise InvalidRequest(
                f"got {what} in the field {self._name[:60]!r}; send one file, in the field 'file'",
                param=self._name[:60] or None,
            )
        if self._is_file:
            if self.upload.filename is not None:
                raise InvalidRequest("the form has several files; send one", param=_FILE)
            self.upload.filename = _shown(options[b"filename"].decode(errors="replace"))
        elif self._name in self.upload.fields:
            raise InvalidRequest(
                f"the field {self._name[:60]!r} is there twice; send one", param=self._name[:60]
            )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._n_bytes += end - start
            if self._n_bytes > self._max_bytes:
                raise PayloadTooLarge(
                    f"the file has more than {self._max_bytes:,} bytes, which is what can be "
                    "stored; send several smaller ones, or delete some that are not needed",
                    param=_FILE,
                )
            self._taken.append(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"the field {self._name[:60]!r} has more than {_MAX_FIELD_BYTES} bytes; send less",
                param=self._name[:60],
            )

    def on_part_end(self) -> None:
        if not self._is_file:
            self.upload.fields[self._name] = self._text.decode(errors="replace")

    def on_end(self) -> None:
        self.has_ended = True


def _shown(name: str) -> str:
    letters = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return letters[:_MAX_NAME_CHARS] or _FILE
