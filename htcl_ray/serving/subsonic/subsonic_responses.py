"""Replies of the OpenSubsonic API, as typed models, and how they are written as JSON or XML.

After the specification at https://opensubsonic.netlify.app: a failure is HTTP 200 with `status` "failed" and one of its
error codes.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Annotated, Any, Generic, Literal, Self, TypeVar
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from htcl_ray import __version__
from htcl_ray.schemas import METADATA_COLUMNS
from htcl_ray.search.results import SearchResults

PROTOCOL = "1.16.1"
FORMS = (None, "", "json", "xml")
NAMESPACE = "http://subsonic.org/restapi"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Code(IntEnum):
    """Error codes of the specification that this server gives."""

    GENERIC = 0
    MISSING = 10
    NO_TOKENS = 41
    NO_PASSWORDS = 42
    CONFLICTING = 43
    INVALID_KEY = 44
    NOT_FOUND = 70


class Genre(BaseModel):
    """One of several."""

    name: str


class Entry(BaseModel):
    """A song, as the specification's `Child`; what is not known is left out."""

    id: str
    title: str = Field(description="The song's id where it has no title.")
    isDir: Literal[False] = False
    isVideo: Literal[False] = False
    type: Literal["music"] = "music"
    mediaType: Literal["song"] = "song"
    album: str | None = None
    artist: str | None = None
    year: int | None = None
    genre: str | None = Field(None, description="The first of `genres`.")
    genres: list[Genre] | None = None
    moods: list[str] | None = None

    @classmethod
    def of(cls, song: dict[str, Any]) -> Self:
        """Of a row with the service's metadata columns."""
        genres = [Genre(name=name) for name in song["genre"] or ()]
        return cls(
            id=song["song_id"],
            title=song["title"] or song["song_id"],
            genre=genres[0].name if genres else None,
            genres=genres or None,
            **{
                column.traits.player: None if song[column.name] == [] else song[column.name]
                for column in METADATA_COLUMNS
                if column.traits.player
            },
        )


class SonicMatch(BaseModel):
    """A song and how near it is: (1 + score) / 2, so that 1 is the same and 0 the opposite."""

    entry: Entry
    similarity: float = Field(ge=0, le=1)


class Body(BaseModel):
    """What every reply holds."""

    status: Literal["ok", "failed"] = "ok"
    version: str = Field(PROTOCOL, description="Of the Subsonic protocol.")
    type: Literal["htcl"] = "htcl"
    serverVersion: str = __version__
    openSubsonic: Literal[True] = True


class SonicMatches(Body):
    """Songs, in order."""

    sonicMatch: list[SonicMatch]

    @classmethod
    def of(cls, answer: SearchResults) -> Self:
        """The reply that carries an answer."""
        return cls(
            sonicMatch=[
                SonicMatch(entry=Entry.of(song), similarity=round((1 + hit.score) / 2, 6))
                for hit, song in zip(answer.hits, answer.metadata, strict=True)
            ]
        )


class Extension(BaseModel):
    """Something that this server does beyond the protocol."""

    name: str
    versions: list[int]


class Extensions(Body):
    """What this server offers."""

    openSubsonicExtensions: list[Extension]


class Token(BaseModel):
    """Whose key it is."""

    username: str


class TokenInfo(Body):
    """The key that was sent."""

    tokenInfo: Token


class Error(BaseModel):
    """What went wrong."""

    code: int
    message: str


class Failed(Body):
    """Every reply that is not a success."""

    status: Literal["ok", "failed"] = "failed"
    error: Error

    @classmethod
    def of(cls, code: Code, message: str) -> Self:
        """The reply of a failure."""
        return cls(error=Error(code=code, message=message.encode("utf-8", "backslashreplace").decode()))


Held = TypeVar("Held")


class Reply(BaseModel, Generic[Held]):
    """The envelope of every reply."""

    model_config = ConfigDict(serialize_by_alias=True)

    body: Annotated[Held, Field(alias="subsonic-response")]


def write(body: Body, form: str | None) -> Response:
    """A reply in the form that `f` asks for: json (default) or xml; any other form is a failure, as JSON."""
    if form == "xml":
        return Response(as_xml(body.model_dump(mode="json", exclude_none=True)), media_type="application/xml")
    if form not in FORMS:
        body = Failed.of(
            Code.GENERIC, f"f is '{form[:20]}', which this server does not write; expected json or xml"
        )  # jsonp would let any web page read the reply
    return Response(
        Reply(**{"subsonic-response": body}).model_dump_json(exclude_none=True), media_type="application/json"
    )


def as_xml(body: dict[str, Any]) -> bytes:
    """The same content as XML: numbers, texts and truths are attributes, all else elements."""
    root = _element("subsonic-response", body)
    root.set("xmlns", NAMESPACE)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _element(name: str, content: Any) -> ElementTree.Element:
    element = ElementTree.Element(name)
    if not isinstance(content, dict):
        element.text = _text(content)
        return element
    for key, value in content.items():
        if isinstance(value, list):
            element.extend(_element(key, part) for part in value)
        elif isinstance(value, dict):
            element.append(_element(key, value))
        else:
            element.set(key, _text(value))
    return element


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _NOT_XML.sub("\ufffd", str(value))  # characters that XML has no way to write
