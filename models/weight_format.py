"""How an exported model stores its large weights: the formats of ``kernels/packed_weight.h``, made here.

================ ========= ==========================================================================
format           bits      a block of 32 numbers
================ ========= ==========================================================================
``float32``      32        as it is, row by row: the reference
``bfloat16``     16        rounded
``int8``         8.5       8-bit codes with one float16 scale
``gguf``         4.5 … 16  the blocks of a GGUF file, their bits untouched: Q4_0, Q4_1, Q8_0 and BF16; what
                           is stored otherwise, as all of a Hugging Face folder is, becomes ``int8``
================ ========= ==========================================================================

All but ``float32`` are packed: 16 rows side by side, so that one register holds one column of them.
"""

from __future__ import annotations

import gguf
import numpy as np

from config.serving_config import WeightFormat
from models.checkpoint_error import CheckpointError
from models.network_config import NetworkConfig
from models.weight_map import Blocks, Bytes, Floats, WeightSource

PANEL_ROWS = 16
BLOCK_COLUMNS = 32
MATRICES = ("embed_tokens", "qkv", "output", "gate_up", "down", "head")  # what is packed; all else stays float32
UNMEASURED: WeightFormat = "bfloat16"
# What ``--weights auto`` takes, by the checkpoint's digest: of the formats whose greedy text agrees with float32's for
# at least 26 of 48 tokens in the mean, the fastest. ``python -m benchmarks.quality`` and ``make bench`` measured both.
RECOMMENDED: dict[str, WeightFormat] = {
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53": "gguf",  # SmolLM2-135M-Instruct.Q4_1.gguf
}
Kind = gguf.GGMLQuantizationType
HALVES = {Kind.BF16: 0, Kind.Q8_0: 1, Kind.Q4_0: 1, Kind.Q4_1: 2}  # float16 numbers in front of a GGUF block's codes


def can_be_packed(config: NetworkConfig) -> bool:
    """Whether the rows of all matrices are whole numbers of blocks."""
    shapes = config.weight_shapes().items()
    return all(shape[1] % BLOCK_COLUMNS == 0 for name, shape in shapes if name.rpartition(".")[2] in MATRICES)


def block_kind(source: WeightSource, name: str, weights: WeightFormat) -> Kind:
    """What blocks one matrix of a checkpoint or of its part has in a packed format.

    Raises:
        CheckpointError: its rows are no whole number of blocks.
    """
    columns = source.config.weight_shapes()[name][1]
    if columns % BLOCK_COLUMNS:
        raise CheckpointError(
            f"{source.source}: {name} has rows of {columns} numbers; packed weights need a multiple of "
            f"{BLOCK_COLUMNS}: export with --weights float32"
        )
    stored = source.block_kind(name) if weights == "gguf" else None
    if stored is not None:
        return stored
    return Kind.BF16 if weights == "bfloat16" else Kind.Q8_0


def row_bytes(kind: Kind, columns: int) -> int:
    """How long a row of ``columns`` numbers is."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    return columns // numbers * size


def read_blocks(source: WeightSource, name: str, weights: WeightFormat) -> Blocks:
    """One matrix of a checkpoint or of its part in a packed format, its rows still in their order.

    Raises:
        CheckpointError: its rows are no whole number of blocks.
    """
    kind = block_kind(source, name, weights)
    stored = source.read_blocks(name) if weights == "gguf" else None
    return quantised(source.read(name), kind) if stored is None else stored


def quantised(value: Floats, kind: Kind) -> Blocks:
    """Numbers ``[N, K]`` as GGUF stores them in ``kind``."""
    return Blocks(kind, gguf.quants.quantize(value, kind).view(np.uint8))


def panels(blocks: Blocks, columns: int) -> Bytes:
    """Rows of ``columns`` numbers side by side in panels of 16: uint8 ``[N, bytes of a row]``."""
    whole = len(blocks.rows) // PANEL_ROWS * PANEL_ROWS
    parts = [part for part in (blocks.rows[:whole], blocks.rows[whole:]) if len(part)]
    packed: Bytes = np.concatenate([_panels(part, blocks.kind, columns) for part in parts])
    return packed


def _panels(rows: Bytes, kind: Kind, columns: int) -> Bytes:
    """The same for whole panels, or for one of fewer rows."""
    height = min(PANEL_ROWS, len(rows))
    split = rows.reshape(len(rows) // height, height, columns // BLOCK_COLUMNS, -1).swapaxes(1, 2)
    halves, codes = np.split(split, [2 * HALVES[kind]], axis=3)  # [panels, blocks, height, bytes]
    if kind == Kind.Q8_0:
        codes = codes ^ np.uint8(0x80)  # from -128 … 127 to 0 … 255
    return np.concatenate((_side_by_side(codes, 4), _side_by_side(halves, 2)), axis=2).reshape(rows.shape)


def _side_by_side(block: Bytes, item: int) -> Bytes:
    """Blocks ``[…, rows, bytes]`` with the first ``item`` bytes of every row in front: ``[…, rows * bytes]``."""
    *outer, height, size = block.shape
    items = block.reshape(*outer, height, size // item, item).swapaxes(-3, -2)
    return items.reshape(*outer, height * size)
