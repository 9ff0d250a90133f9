"""Entropy-coded storage of an ONNX file: ``.aqz``, and back to the same bytes.

Weight integers, packed ones unpacked first, are coded layer by layer with canonical Huffman
codes, as symbols or as gaps between values that are not zero, whichever is smaller (Deep
Compression, Han et al. 2016, section 4). The scale of an integer bias is not stored where it is the
product of its layer's other two. The rest of the file, and what does not gain, is LZMA.

The file: ``AQZ1``, SHA-256 of the ONNX file (32 bytes), length of the LZMA part (uint32), the
LZMA part (index as JSON, a zero byte, the model without the coded tensors), the coded streams.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import lzma
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from autoquant.compress.bank import PLANES, pack, unpack
from autoquant.errors import PackageError
from autoquant.task import Array

MAGIC = b"AQZ1"
LONGEST = 16  # bits of a code
_FAR = 255  # gap symbol: so many zeros, and no value
LEAST_CODED = 64  # weights below which a tensor stays in the LZMA part
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]


def code_lengths(counts: Array) -> Array:
    """Bits of each symbol's Huffman code, 0 for those that do not occur; at most `LONGEST`.

    A sole symbol has one bit. Codes that come out longer are found again for flatter counts.
    """
    counts = np.asarray(counts, np.int64)
    while True:
        lengths = np.zeros(len(counts), np.uint8)
        heap = [(int(n), i, [i]) for i, n in enumerate(counts) if n]
        heapq.heapify(heap)
        if len(heap) == 1:
            lengths[heap[0][1]] = 1
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            members = a[2] + b[2]
            lengths[members] += 1
            heapq.heappush(heap, (a[0] + b[0], a[1], members))
        if lengths.max(initial=0) <= LONGEST:
            return lengths
        counts = np.where(counts > 0, counts // 2 + 1, 0)


def _codes(lengths: Array) -> Array:
    """Canonical codes: by length, then by symbol. Raises PackageError for lengths of no code."""
    codes, code, before = np.zeros(len(lengths), np.uint32), 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if not length:
            continue
        code <<= length - before
        if code >> length:
            raise PackageError("a code table is damaged: it is no prefix code")
        codes[symbol], before = code, length
        code += 1
    return codes


def encode(symbols: Array, lengths: Array) -> bytes:
    """The symbols (flat, below ``len(lengths)``) as bits, high bit first, padded to a byte."""
    codes, widths = _codes(lengths)[symbols], lengths[symbols].astype(np.int64)
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for place in range(int(widths.max(initial=0))):
        has = widths > place
        bits[ends[has] - 1 - place] = (codes[has] >> place) & 1
    return np.packbits(bits).tobytes()


def decode(data: bytes, lengths: Array, count: int) -> Array:
    """Undo `encode`: ``count`` symbols, uint8. Raises PackageError for bits of no code.

    The code that would begin at each bit is looked up for all bits at once; what is left to do
    one after the other is a walk from code to code.
    """
    if not count:
        return np.zeros(0, np.uint8)
    codes = _codes(lengths)
    symbol_at = np.zeros(1 << LONGEST, np.uint8)
    length_at = np.zeros(1 << LONGEST, np.uint8)
    for symbol in np.flatnonzero(lengths):
        room = LONGEST - int(lengths[symbol])
        start = int(codes[symbol]) << room
        symbol_at[start : start + (1 << room)] = symbol
        length_at[start : start + (1 << room)] = lengths[symbol]
    raw = np.frombuffer(data + bytes(3), np.uint8).astype(np.uint32)
    words = (raw[:-2] << 16) | (raw[1:-1] << 8) | raw[2:]  # 24 bits from each byte
    windows = ((words[:, None] >> (8 - np.arange(8, dtype=np.uint32))) & 0xFFFF).reshape(-1)
    steps = length_at[windows].tolist()
    places, place, end = [0] * count, 0, 8 * len(data)
    for i in range(count):
        if place >= end:
            raise PackageError("a coded tensor is damaged: it ends early")
        places[i] = place
        step = steps[place]
        if not step:
            raise PackageError("a coded tensor is damaged: it holds bits of no code")
        place += step
    if place > end:
        raise PackageError("a coded tensor is damaged: it ends early")
    return np.asarray(symbol_at[windows[np.array(places)]])


def _table(lengths: Array) -> list[int]:
    return [int(n) for n in np.trim_zeros(lengths, "b")]


def _huffman(symbols: Array) -> tuple[list[Any], bytes]:
    """[count, bytes, code lengths] and the stream."""
    lengths = code_lengths(np.bincount(symbols, minlength=1))
    data = encode(symbols, lengths)
    return [len(symbols), len(data), _table(lengths)], data


def _gaps(symbols: Array, zero: int) -> tuple[Array, Array]:
    """Zeros before each other value (`_FAR`: so many, and no value), and those values."""
    places = np.flatnonzero(symbols != zero)
    between = np.diff(places, prepend=-1) - 1
    far, rest = between // _FAR, between % _FAR
    ends = np.cumsum(far + 1)
    gaps = np.full(int(ends[-1]) if len(ends) else 0, _FAR, np.uint8)
    gaps[ends - 1] = rest
    return gaps, symbols[places]


def _from_gaps(gaps: Array, values: Array, zero: int, count: int) -> Array:
    near = gaps != _FAR
    places = np.cumsum(np.where(near, gaps.astype(np.int64) + 1, _FAR))[near] - 1
    if len(places) != len(values) or (len(places) and places[-1] >= count):
        raise PackageError("a coded tensor is damaged: its gaps go beyond its end")
    found = np.full(count, zero, np.uint8)
    found[places] = values
    return found


def _code(symbols: Array) -> tuple[list[Any], bytes]:
    """The smaller of both forms: ``["h", part]`` or ``["g", zero, count, part, part]``."""
    part, data = _huffman(symbols)
    plain: tuple[list[Any], bytes] = ["h", part], data
    zero = int(np.bincount(symbols).argmax())
    gaps, values = _gaps(symbols, zero)
    if 2 * len(values) >= len(symbols) or not len(values):
        return plain
    (first, before), (second, after) = _huffman(gaps), _huffman(values)
    sparse = ["g", zero, len(symbols), first, second], before + after
    sizes = [len(d) + len(lzma.compress(json.dumps(i).encode())) for i, d in (plain, sparse)]
    return sparse if sizes[1] < sizes[0] else plain


def _decoded(form: Sequence[Any], stream: _Stream) -> Array:
    if form[0] == "h":
        return stream.part(form[1])
    zero, count, first, second = form[1:]
    gaps = stream.part(first)
    if not 0 <= count <= 256 * (len(gaps) + 1) + 8 * len(stream.data):
        raise PackageError("the index is damaged: a tensor is longer than its code")
    return _from_gaps(gaps, stream.part(second), zero, count)


class _Stream:
    """Coded bytes, read from front to back."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def part(self, about: Sequence[Any]) -> Array:
        count, size, table = about
        if not 0 <= count <= 8 * size or len(table) > 256 or max(table, default=0) > LONGEST:
            raise PackageError("the index is damaged: a code table does not fit its stream")
        piece = self.data[self.place : self.place + size]
        if len(piece) != size:
            raise PackageError("the file ends early")
        self.place += size
        return decode(piece, np.array(table, np.uint8), count)


def _blobs(model: onnx.ModelProto) -> Iterator[tuple[list[TensorProto], int, list[int]]]:
    """What is coded: the planes of a width or one int8 tensor, its bits, sizes of its parts."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = {node.input[0]: node.input[1] for node in model.graph.node if node.op_type == "Split"}
    taken: set[str] = set()
    for bits in PLANES:
        planes = [known.get(f"packed{bits}.{i}") for i in range(len(PLANES[bits]))]
        found = [p for p in planes if p is not None and p.HasField("raw_data")]
        split = known.get(sizes.get(f"packed{bits}.w", ""))
        if len(found) != len(planes) or split is None:
            continue
        taken.update(p.name for p in found)
        yield found, bits, [int(n) for n in numpy_helper.to_array(split)]
    for tensor in model.graph.initializer:
        if (
            tensor.data_type == TensorProto.INT8
            and tensor.HasField("raw_data")
            and tensor.name not in taken
            and len(tensor.raw_data) >= LEAST_CODED
        ):
            yield [tensor], 8, [len(tensor.raw_data)]


def _bias_scales(model: onnx.ModelProto) -> list[tuple[TensorProto, bytes]]:
    """Scales of biases, and the products of the scales of their layers' inputs and weights."""
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = {
        node.output[0]: known[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[1] in known
    }
    found: list[tuple[TensorProto, bytes]] = []
    inputs: set[str] = set()
    for node in model.graph.node:
        first = [scales[name] for name in node.input[:3] if name in scales]
        if len(first) == 3 and all(t.data_type == TensorProto.FLOAT for t in first):
            x, weight = (np.frombuffer(t.raw_data, np.float32) for t in first[:2])
            inputs.update(t.name for t in first[:2])
            if len(x) == 1 and len(weight):
                found.append((first[2], (weight * x).tobytes()))
    return [(tensor, scale) for tensor, scale in found if tensor.name not in inputs]


def _pieces(sizes: Sequence[int]) -> list[int]:
    """Sizes of what is coded by a table of its own: small parts go with the one before."""
    found: list[int] = []
    for size in sizes:
        if found and size < LEAST_CODED:
            found[-1] += size
        else:
            found.append(size)
    return found


def compress(data: bytes) -> bytes:
    """An ONNX file as ``.aqz``. Raises PackageError where ``data`` is no ONNX file."""
    model = _parsed(data)
    index: list[Any] = []
    streams: list[bytes] = []
    for tensors, bits, sizes in _blobs(model):
        if bits == 8:
            values = np.frombuffer(tensors[0].raw_data, np.int8)
        else:
            blobs = [np.frombuffer(t.raw_data, np.uint8) for t in tensors]
            values = unpack(blobs, bits, sum(sizes))
        symbols = (values.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
        forms, start = [], 0
        for size in _pieces(sizes):
            form, stream = _code(symbols[start : start + size])
            forms.append(form)
            streams.append(stream)
            start += size
        index.append([[t.name for t in tensors], bits, forms])
        for tensor in tensors:
            tensor.raw_data = b""
    for tensor, scale in _bias_scales(model):
        if tensor.raw_data == scale:
            tensor.raw_data = b""
    rest = model.SerializeToString(deterministic=True)
    found = _joined(data, index, rest, streams)
    try:
        exact = decompress(found) == data
    except PackageError:
        exact = False
    return found if exact else _joined(data, [], data, [])  # written by other tools: as it is


def _joined(data: bytes, index: list[Any], rest: bytes, streams: list[bytes]) -> bytes:
    text = json.dumps(index, separators=(",", ":")).encode() + b"\0" + rest
    packed = lzma.compress(text, format=lzma.FORMAT_RAW, filters=_FILTERS)
    head = MAGIC + hashlib.sha256(data).digest() + len(packed).to_bytes(4, "little")
    return head + packed + b"".join(streams)


def decompress(data: bytes) -> bytes:
    """The ONNX file of an ``.aqz``, byte by byte. Raises PackageError for a damaged one."""
    if data[:4] != MAGIC:
        raise PackageError("not a compressed model: it does not begin with AQZ1")
    end = 40 + int.from_bytes(data[36:40], "little")
    if len(data) < end:
        raise PackageError("the file ends early")
    try:
        text = lzma.decompress(data[40:end], format=lzma.FORMAT_RAW, filters=_FILTERS)
        head, _, rest = text.partition(b"\0")
        index = json.loads(head)
        if index:
            rest = _filled(rest, index, _Stream(data[end:]))
    except PackageError:
        raise
    except (lzma.LZMAError, ValueError, TypeError, KeyError, IndexError, EOFError) as error:
        raise PackageError(f"damaged: {' '.join(str(error).split())[:120]}") from None
    if hashlib.sha256(rest).digest() != data[4:36]:
        raise PackageError("damaged: the model in it has another hash than it had")
    return rest


def _filled(rest: bytes, index: Sequence[Any], stream: _Stream) -> bytes:
    model = _parsed(rest)
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    for names, bits, forms in index:
        symbols = np.concatenate([_decoded(form, stream) for form in forms])
        values = (symbols.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
        blobs = (values,) if bits == 8 else pack(values, bits)
        for name, blob in zip(names, blobs, strict=True):
            known[name].raw_data = blob.tobytes()
    for tensor, scale in _bias_scales(model):
        if not tensor.raw_data:
            tensor.raw_data = scale
    return bytes(model.SerializeToString(deterministic=True))


def _parsed(data: bytes) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's DecodeError, which has no types
        raise PackageError("no ONNX file") from None
    return model


def stored_bytes(model: bytes) -> int:
    """Size of an ONNX file's ``.aqz``."""
    return len(compress(model))


def coded_bytes(values: Array) -> int:
    """Bytes that integers of one tensor take in `compress`, its code tables left out."""
    symbols = values.reshape(-1).astype(np.int16)
    symbols -= symbols.min(initial=0)
    counts = np.bincount(symbols, minlength=1)
    gaps, rest = _gaps(symbols, int(counts.argmax()))
    plain = _huffman_bytes(counts)
    if not len(rest) or 2 * len(rest) >= len(symbols):
        return plain
    return min(plain, _huffman_bytes(np.bincount(gaps)) + _huffman_bytes(np.bincount(rest)))


def _huffman_bytes(counts: Array) -> int:
    return -(-int(code_lengths(counts).astype(np.int64) @ counts) // 8)
