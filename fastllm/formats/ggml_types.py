"""The tensor types that a GGUF file can hold: their numbers, names and block sizes.

All of them can be listed; which of them can be run is for the layers above to say.
"""

from __future__ import annotations

from enum import IntEnum


class GGMLType(IntEnum):
    """Tensor types by the number that a GGUF file stores."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# (weights in a block, bytes of a block). The terms are the fields of a block by size: packed weights first,
# scales and minimums last; a block in the file may hold them in another order.
BLOCK_SIZES: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.BF16: (1, 2),
    GGMLType.F64: (1, 8),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.Q4_0: (32, 16 + 2),
    GGMLType.Q4_1: (32, 16 + 2 + 2),
    GGMLType.Q5_0: (32, 16 + 4 + 2),
    GGMLType.Q5_1: (32, 16 + 4 + 2 + 2),
    GGMLType.Q8_0: (32, 32 + 2),
    GGMLType.Q8_1: (32, 32 + 2 + 2),
    GGMLType.Q2_K: (256, 64 + 16 + 2 + 2),
    GGMLType.Q3_K: (256, 64 + 32 + 12 + 2),
    GGMLType.Q4_K: (256, 128 + 12 + 2 + 2),
    GGMLType.Q5_K: (256, 128 + 32 + 12 + 2 + 2),
    GGMLType.Q6_K: (256, 128 + 64 + 16 + 2),
    GGMLType.Q8_K: (256, 256 + 32 + 4),
    GGMLType.IQ1_S: (256, 32 + 16 + 2),
    GGMLType.IQ1_M: (256, 32 + 16 + 8),
    GGMLType.IQ2_XXS: (256, 64 + 2),
    GGMLType.IQ2_XS: (256, 64 + 8 + 2),
    GGMLType.IQ2_S: (256, 64 + 16 + 2),
    GGMLType.IQ3_XXS: (256, 64 + 32 + 2),
    GGMLType.IQ3_S: (256, 64 + 32 + 8 + 4 + 2),
    GGMLType.IQ4_NL: (32, 16 + 2),
    GGMLType.IQ4_XS: (256, 128 + 4 + 2 + 2),
    GGMLType.TQ1_0: (256, 48 + 4 + 2),
    GGMLType.TQ2_0: (256, 64 + 2),
    GGMLType.MXFP4: (32, 16 + 1),
    GGMLType.NVFP4: (64, 32 + 4),
    GGMLType.Q1_0: (128, 16 + 2),
    GGMLType.Q2_0: (64, 16 + 2),
}

# Numbers that once had a meaning; named so that an error can say what the file needs.
REMOVED_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
