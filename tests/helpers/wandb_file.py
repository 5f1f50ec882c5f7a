"""Read back what wandb wrote offline: the records that `wandb sync` would send.

The file has LevelDB's log format. After 7 bytes come blocks of 32 KiB, which hold chunks of (checksum,
length, type) and bytes. A record is one chunk, or a first one, middle ones and a last one.
"""

import struct

from wandb.proto.wandb_internal_pb2 import Record

HEAD, BLOCK, CHUNK = 7, 2**15, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path):
    """The records of a .wandb file, in order."""
    content, at, parts = path.read_bytes(), HEAD, []
    while at + CHUNK.size <= len(content):
        if BLOCK - at % BLOCK < CHUNK.size:  # no room for another chunk: zeros
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = CHUNK.unpack_from(content, at)
        if kind == 0:
            return
        parts = [
            *(parts if kind in (MIDDLE, LAST) else []),
            content[at + CHUNK.size : at + CHUNK.size + length],
        ]
        at += CHUNK.size + length
        if kind in (WHOLE, LAST):
            yield Record.FromString(b"".join(parts))
