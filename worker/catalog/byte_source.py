"""
Where the bytes of a model file come from: the disk, or a server that gives just the range it is asked for.
"""

from __future__ import annotations

import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # public, but exported lazily

from common.errors import ModelMissing

_ANSWER_S = 10.0  # without a byte for this long, the server is out of reach
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")


class ByteSource(Protocol):
    """A file that is read in parts. Every member raises ModelMissing if it cannot be read, and says why."""

    @property
    def name(self) -> str:
        """Path or address, for messages."""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""

    def read(self, start: int, length: int) -> bytes:
        """Give *length* bytes from byte *start* on; fewer only where the file ends."""


@dataclass(frozen=True)
class FileBytes:
    """A local file; opened for each read, so that nobody has to close it."""

    path: Path

    @property
    def name(self) -> str:
        """Its path."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        try:
            status = self.path.stat()
        except (OSError, ValueError) as error:  # ValueError: no path can be called that
            raise self._unreadable(error) from error
        if not stat.S_ISREG(status.st_mode):
            # Reading a pipe or a device could wait forever.
            raise self._unreadable("it is no file")
        return status.st_size

    def read(self, start: int, length: int) -> bytes:
        """Give *length* bytes from byte *start* on; fewer only where the file ends."""
        length = min(length, self.size - start)
        if length <= 0:
            return b""
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, why: Exception | str) -> ModelMissing:
        what = getattr(why, "strerror", None) or why
        return ModelMissing(f"{self.path} cannot be read: {what}. Fetch the model again, or correct its path.")


class HttpBytes:
    """A file behind HTTP range requests, one for each read; never takes more than it asked for."""

    def __init__(self, client: httpx.Client, url: str) -> None:
        self._client = client
        self._url = url
        self._size: int | None = None  # every answer says it

    @property
    def name(self) -> str:
        """Its address."""
        return self._url

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        if self._size is None:
            self.read(0, 1)
        assert self._size is not None  # noqa: S101 - _take sets it, or raises
        return self._size

    def read(self, start: int, length: int) -> bytes:
        """Give *length* bytes from byte *start* on; fewer only where the file ends."""
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        try:
            with self._client.stream("GET", self._url, headers=headers, timeout=_ANSWER_S) as answer:
                return self._take(answer, start, length)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreadable(
                f"{type(error).__name__} {error}".strip(), "Check the network (or HF_ENDPOINT), then try again."
            ) from error

    def _take(self, answer: httpx.Response, start: int, length: int) -> bytes:
        if answer.status_code not in (httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise self._unreadable(*_refusal(answer.status_code))
        given = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if given is None or (given[1] is not None and int(given[1]) != start):
            raise self._unreadable("the server does not say which bytes it gives", _FETCH_IT)
        self._size = int(given[3])
        due = max(0, min(length, self._size - start))
        taken = bytearray()
        for chunk in answer.iter_raw():
            taken += chunk
            if len(taken) >= due:
                break
        if len(taken) < due:
            raise self._unreadable(f"the server gave {len(taken)} of {due} bytes", "Try again.")
        return bytes(taken[:due])

    def _unreadable(self, why: str, cure: str) -> ModelMissing:
        return ModelMissing(f"{self._url} cannot be read: {why}. {cure}")


_FETCH_IT = "Fetch the whole file, and name it with path in the catalogue."


def _refusal(status: int) -> tuple[str, str]:
    """Say why there are no bytes, and what to do."""
    match status:
        case httpx.codes.OK:
            return "the server gives whole files only, no ranges", _FETCH_IT
        case httpx.codes.UNAUTHORIZED | httpx.codes.FORBIDDEN:
            return f"the server refuses ({status})", "Accept the terms on the model's page, and set HF_TOKEN."
        case httpx.codes.NOT_FOUND:
            return "there is no such file", "Check the repository, the revision and the file's name."
        case _:
            return f"the server answers {status}", "Try again later."


def hub_client() -> httpx.Client:
    """Make a client that asks the hub as the hub's own library does (HF_TOKEN); whoever makes it closes it."""
    return httpx.Client(headers=build_hf_headers(), follow_redirects=True)


def hub_bytes(client: httpx.Client, repo: str, file: str, *, revision: str | None = None) -> ByteSource:
    """
    Find one file of a hub repository: in the cache, or else at the hub (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE count).

    Raises
    ------
    ModelMissing
        It is not in the cache and HF_HUB_OFFLINE is set, or no repository can be called that.
    """
    try:
        cached = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError as error:
        raise ModelMissing(f"{repo} is no name of a repository: {error} Correct repo in the catalogue.") from None
    if isinstance(cached, str):
        return FileBytes(Path(cached))
    if huggingface_hub.is_offline_mode():
        raise ModelMissing(
            f"{repo}/{file} is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or fetch the file."
        )
    return HttpBytes(client, huggingface_hub.hf_hub_url(repo, file, revision=revision))
