"""Read the tensors of a TensorFlow checkpoint without TensorFlow.

A checkpoint is an index file, a sorted string table in LevelDB's format whose values are `BundleEntryProto` messages,
and a data file with the raw little-endian tensors. Only checkpoints in one data file with uncompressed blocks are read,
which is what TensorFlow's saver writes by default. Nothing is executed, and every offset is checked.

Formats: tensorflow/core/protobuf/tensor_bundle.proto; github.com/google/leveldb/blob/main/doc/table_format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from htcl_ray.errors import MismatchError

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_BYTES = 48
UNCOMPRESSED = 0
FLOAT32 = 1
"""Value of `DT_FLOAT` in TensorFlow's enumeration of types."""
MAX_VARINT_BYTES = 10
DTYPE, SHAPE, SHARD, OFFSET, SIZE = 1, 2, 3, 4, 5
"""Field numbers of BundleEntryProto."""


def read_checkpoint(index: Path, data: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read all float32 tensors, by name. Raises MismatchError for a file that is damaged or in another format."""
    try:
        table, raw = index.read_bytes(), data.read_bytes()
    except OSError as error:
        raise MismatchError(f"{error.filename} cannot be read; expected a TensorFlow checkpoint") from None
    try:
        return dict(_tensors(table, raw))
    except (IndexError, ValueError, UnicodeDecodeError) as error:
        raise MismatchError(
            f"{index} and {data.name} are no TensorFlow checkpoint that this reader knows ({error}); "
            "expected an index of version 1 in one data file"
        ) from None


def _tensors(table: bytes, raw: bytes) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    for name, value in _table_entries(table):
        if not name:  # the header of the bundle
            continue
        fields = dict(_fields(value))
        if fields.get(DTYPE) != FLOAT32 or fields.get(SHARD, 0) != 0:
            continue
        dimensions = [
            dict(_fields(_bytes(part))) for field, part in _fields(_bytes(fields.get(SHAPE, b""))) if field == 2
        ]
        shape = [_number(dimension.get(1, 0)) for dimension in dimensions]
        start, size = _number(fields.get(OFFSET, 0)), _number(fields.get(SIZE, 0))
        if size != 4 * math.prod(shape) or start + size > len(raw):
            raise ValueError(f"{name.decode()} has shape {shape} and {size} bytes from {start} of {len(raw)}")
        yield name.decode(), np.frombuffer(raw, "<f4", size // 4, start).astype(np.float32).reshape(shape)


def _table_entries(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a sorted string table, by its index block."""
    footer = table[-FOOTER_BYTES:]
    if len(footer) != FOOTER_BYTES or not footer.endswith(MAGIC):
        raise ValueError("the index does not end with the number of a sorted string table")
    place = 0
    handles = []
    for _ in range(4):  # offset and size of the block of meta data, then of the index block
        number, place = _varint(footer, place)
        handles.append(number)
    for _, handle in _block_entries(table, *handles[2:]):
        start, place = _varint(handle, 0)
        yield from _block_entries(table, start, _varint(handle, place)[0])


def _block_entries(table: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block, whose keys share prefixes with the keys before them."""
    block, kind = table[start : start + size], table[start + size]
    if kind != UNCOMPRESSED or len(block) != size:
        raise ValueError(f"the block at {start} is compressed or cut off")
    restarts = int.from_bytes(block[-4:], "little")
    end, place, key = size - 4 * (restarts + 1), 0, b""
    while place < end:
        shared, place = _varint(block, place)
        added, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + added]
        place += added
        yield key, block[place : place + length]
        place += length


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values of a protocol buffer: integers, and bytes for fields of variable or fixed length."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        value: int | bytes
        match tag & 7:
            case 0:
                value, place = _varint(message, place)
            case 1:
                value, place = message[place : place + 8], place + 8
            case 2:
                length, place = _varint(message, place)
                value, place = message[place : place + length], place + length
            case 5:
                value, place = message[place : place + 4], place + 4
            case other:
                raise ValueError(f"a field of wire type {other}")
        if place > len(message):
            raise ValueError("a message is cut off")
        yield tag >> 3, value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes in place of a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number in place of bytes")
    return value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, the lowest first, and the place after it."""
    number = 0
    for count in range(MAX_VARINT_BYTES):
        byte = data[place + count]
        number |= (byte & 127) << (7 * count)
        if byte < 128:
            return number, place + count + 1
    raise ValueError(f"an integer of more than {MAX_VARINT_BYTES} bytes")
