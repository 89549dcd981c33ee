"""Responses of the OpenSubsonic API, as typed models, and their serialisation as JSON or XML.

Source: the specification at https://opensubsonic.netlify.app, in which an error is HTTP 200 with `status` "failed" and
one of its error codes.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Annotated, Any, Generic, Literal, Self, TypeVar
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from htcl_ray import __version__
from htcl_ray.schemas import ESTIMATED, METADATA_COLUMNS
from htcl_ray.search.results import SearchResults

PROTOCOL = "1.16.1"
FORMATS = (None, "", "json", "xml")
NAMESPACE = "http://subsonic.org/restapi"
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Code(IntEnum):
    """Error codes of the specification that this server uses."""

    GENERIC = 0
    MISSING = 10
    NO_TOKENS = 41
    NO_PASSWORDS = 42
    CONFLICTING = 43
    INVALID_KEY = 44
    NOT_FOUND = 70


class Genre(BaseModel):
    """One genre of a song."""

    name: str = Field(description="Name of the genre.")


class Entry(BaseModel):
    """A song, the `Child` of the specification; unknown fields are absent."""

    id: str = Field(description="Id of the song.")
    title: str = Field(description="Title of the song; its id where it has no title.")
    isDir: Literal[False] = Field(False, description="Always false: the entry is a song.")
    isVideo: Literal[False] = Field(False, description="Always false: the entry is audio.")
    type: Literal["music"] = Field("music", description="Type of the media.")
    mediaType: Literal["song"] = Field("song", description="Type of the entry.")
    album: str | None = Field(None, description="Album of the song.")
    artist: str | None = Field(None, description="Artist of the song.")
    year: int | None = Field(None, description="Year of release.")
    genre: str | None = Field(None, description="First genre of the song.")
    genres: list[Genre] | None = Field(None, description="All genres of the song.")
    moods: list[str] | None = Field(None, description="Moods of the song.")

    @classmethod
    def of(cls, song: dict[str, Any]) -> Self:
        """Entry of a song, from a row with the metadata columns of the search service.

        Estimated values are left out, because the protocol has no mark for them.
        """
        song = {**song, **dict.fromkeys(song[ESTIMATED] or ())}
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
    """A song and its similarity to the song of the request."""

    entry: Entry = Field(description="The song.")
    similarity: float = Field(ge=0, le=1, description="(1 + score) / 2: 1 for equal vectors, 0 for opposite ones.")


class Body(BaseModel):
    """Fields of every response."""

    status: Literal["ok", "failed"] = Field("ok", description="Whether the request succeeded.")
    version: str = Field(PROTOCOL, description="Version of the Subsonic protocol.")
    type: Literal["htcl"] = Field("htcl", description="Name of the server software.")
    serverVersion: str = Field(__version__, description="Version of the server software.")
    openSubsonic: Literal[True] = Field(True, description="Always true: the server supports OpenSubsonic.")


class SonicMatches(Body):
    """Songs in order: by similarity, or along a path."""

    sonicMatch: list[SonicMatch] = Field(description="The songs.")

    @classmethod
    def of(cls, results: SearchResults) -> Self:
        """Response with the results of a search."""
        return cls(
            sonicMatch=[
                SonicMatch(entry=Entry.of(song), similarity=round((1 + hit.score) / 2, 6))
                for hit, song in zip(results.hits, results.metadata, strict=True)
            ]
        )


class Extension(BaseModel):
    """An extension of the Subsonic protocol."""

    name: str = Field(description="Name of the extension.")
    versions: list[int] = Field(description="Supported versions of the extension.")


class Extensions(Body):
    """Extensions that this server supports."""

    openSubsonicExtensions: list[Extension] = Field(description="The extensions.")


class Token(BaseModel):
    """Owner of an API key."""

    username: str = Field(description="Name of the API key.")


class TokenInfo(Body):
    """Information about the API key of the request."""

    tokenInfo: Token = Field(description="Owner of the key.")


class Error(BaseModel):
    """An error."""

    code: int = Field(description="Error code of the specification.")
    message: str = Field(description="What is wrong, what was expected, and what to do.")


class Failed(Body):
    """Response of a request that failed."""

    status: Literal["ok", "failed"] = Field("failed", description="Always failed.")
    error: Error = Field(description="The error.")

    @classmethod
    def of(cls, code: Code, message: str) -> Self:
        """Response of an error."""
        return cls(error=Error(code=code, message=message.encode("utf-8", "backslashreplace").decode()))


Held = TypeVar("Held")


class Reply(BaseModel, Generic[Held]):
    """Envelope of every response."""

    model_config = ConfigDict(serialize_by_alias=True)

    body: Annotated[Held, Field(alias="subsonic-response")]


def write(body: Body, form: str | None) -> Response:
    """Serialise a response in the format of the parameter `f`: json (default) or xml; any other is an error."""
    if form == "xml":
        return Response(as_xml(body.model_dump(mode="json", exclude_none=True)), media_type="application/xml")
    if form not in FORMATS:
        body = Failed.of(
            Code.GENERIC, f"f is '{form[:20]}', which this server does not write; expected json or xml"
        )  # jsonp would let any web page read the response
    return Response(
        Reply(**{"subsonic-response": body}).model_dump_json(exclude_none=True), media_type="application/json"
    )


def as_xml(body: dict[str, Any]) -> bytes:
    """Serialise a response as XML: numbers, strings and booleans become attributes, everything else elements."""
    root = _element("subsonic-response", body)
    root.set("xmlns", NAMESPACE)
    xml: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return xml


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
    return _NOT_XML.sub("\ufffd", str(value))  # XML cannot represent these characters
