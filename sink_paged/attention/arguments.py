# SPDX-License-Identifier: Apache-2.0
"""What a kernel is told: offsets of its arguments in one block of memory.

Every argument has 8 bytes: an address, a stride in bytes, a count or, marked so, a
float64. The counters that the threads advance come first, on a cache line of their own.
"""

import struct
from itertools import count

ITEM, THREAD = 0, 8
COUNTERS = struct.Struct("@2q48x")

_offset = count(COUNTERS.size, 8)

# Of both kernels
CACHE = next(_offset)
CACHE_BLOCK = next(_offset)
CACHE_HEAD = next(_offset)
KIND = next(_offset)
KV_HEADS = next(_offset)
HEAD_SIZE = next(_offset)
BLOCK_SIZE = next(_offset)
COMMON = 7

_offset = count(COUNTERS.size + 8 * COMMON, 8)

# Of `store`
KEY = next(_offset)
KEY_TOKEN = next(_offset)
KEY_HEAD = next(_offset)
VALUE = next(_offset)
VALUE_TOKEN = next(_offset)
VALUE_HEAD = next(_offset)
SLOTS = next(_offset)
NUM_TOKENS = next(_offset)
SHARE = next(_offset)
STORE = struct.Struct(f"@2q48x{COMMON + 9}q")

_offset = count(COUNTERS.size + 8 * COMMON, 8)

# Of `attend`
QUERY = next(_offset)
QUERY_TOKEN = next(_offset)
QUERY_HEAD = next(_offset)
OUTPUT = next(_offset)
OUTPUT_TOKEN = next(_offset)
OUTPUT_HEAD = next(_offset)
STARTS = next(_offset)
SEQ_LENS = next(_offset)
TABLE = next(_offset)
TABLE_ROW = next(_offset)
COLUMNS = next(_offset)
ROTATION = next(_offset)
ROTATION_ROW = next(_offset)
ROTARY_DIM = next(_offset)
INTERLEAVED = next(_offset)
REQUESTS = next(_offset)
HEADS = next(_offset)
SINKS = next(_offset)
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
SCALE = next(_offset)  # float64
SOFT_CAP = next(_offset)  # float64
ATTEND = struct.Struct(f"@2q48x{COMMON + 30}q2d")
