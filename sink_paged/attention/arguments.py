# SPDX-License-Identifier: Apache-2.0
"""What a kernel is told: offsets of its arguments in one block of memory.

Every argument has 8 bytes: an address, a stride, a count or, marked so, a float64. What
changes from call to call comes first, and begins with the counters that the threads
advance, on a cache line of their own; what a layer keeps follows.
"""

import struct
from itertools import count

ITEM, THREAD = 0, 8
_COUNTERS = "@2q48x"
_FIRST = struct.calcsize(_COUNTERS)

# Of each call of `attend`; strides of query and output in elements
_offset = count(_FIRST, 8)
QUERY = next(_offset)
QUERY_TOKEN = next(_offset)
QUERY_HEAD = next(_offset)
OUTPUT = next(_offset)
OUTPUT_TOKEN = next(_offset)
OUTPUT_HEAD = next(_offset)
STARTS = next(_offset)
SEQ_LENS = next(_offset)
TABLE = next(_offset)
TABLE_ROW = next(_offset)  # bytes
COLUMNS = next(_offset)
REQUESTS = next(_offset)
ATTEND_CALL = struct.Struct(f"{_COUNTERS}12q")

# Of each call of `store`; strides in elements
_offset = count(_FIRST, 8)
KEY = next(_offset)
KEY_TOKEN = next(_offset)
KEY_HEAD = next(_offset)
VALUE = next(_offset)
VALUE_TOKEN = next(_offset)
VALUE_HEAD = next(_offset)
SLOTS = next(_offset)
NUM_TOKENS = next(_offset)
SHARE = next(_offset)
STORE_CALL = struct.Struct(f"{_COUNTERS}9q")

# Of a layer; strides in bytes
LAYER = ATTEND_CALL.size
_offset = count(LAYER, 8)
CACHE = next(_offset)
CACHE_BLOCK = next(_offset)
CACHE_HEAD = next(_offset)
CACHE_KIND = next(_offset)
KIND = next(_offset)  # of queries, new keys and values, outputs
KV_HEADS = next(_offset)
HEAD_SIZE = next(_offset)
BLOCK_SIZE = next(_offset)
CACHE_LAYER = struct.Struct("@8q")

# Of a layer that `store` writes
_offset = count(LAYER + CACHE_LAYER.size, 8)
KEY_SCALE = next(_offset)  # float64
VALUE_SCALE = next(_offset)  # float64
STORE_LAYER = struct.Struct(f"{CACHE_LAYER.format}2d")

# Of a layer that `attend` reads
_offset = count(LAYER + CACHE_LAYER.size, 8)
GROUP = next(_offset)  # query heads that share a kv head
ROTATION = next(_offset)
ROTATION_ROW = next(_offset)
ROTARY_DIM = next(_offset)
INTERLEAVED = next(_offset)
SINKS = next(_offset)
PINNED = next(_offset)  # blocks that hold them
RECENT = next(_offset)
SLOPES = next(_offset)
SINK_LOGITS = next(_offset)
TILE_TOKENS = next(_offset)
MAX_ROWS = next(_offset)
MATRIX_TILES = next(_offset)
THREADS = next(_offset)
SCRATCH = next(_offset)
SCRATCH_BYTES = next(_offset)
ARRIVALS = next(_offset)
PARTIALS = next(_offset)
PARTIAL_BYTES = next(_offset)
SCALE = next(_offset)  # float64, of products of queries and keys as they are read
SUM_SCALE = next(_offset)  # float64, of sums of values as they are read
SOFT_CAP = next(_offset)  # float64
ATTEND_LAYER = struct.Struct(f"{CACHE_LAYER.format}19q3d")
SIZE = LAYER + ATTEND_LAYER.size
