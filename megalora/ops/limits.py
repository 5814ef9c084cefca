"""What the compiled kernels take, at most: csrc/kernel_limits.h for Python, which says more of each.

Python needs them where nothing is compiled, too (a plan for other machines). tests/ops/test_limits.py compares them
with those that the library was built with.
"""

ALIGNMENT = 16  # bytes on which rows start, of CUDA kernels
OCTET = 8  # sizes of rows are multiples of so many elements, of CUDA kernels

# Ranks that the LoRA kernels take on CUDA, of all branches of an input together.
LARGEST_RANK = 192
LARGEST_RANK_GATED_DOWN = 64  # where the down-projection makes x = silu(gate) * up itself
LARGEST_RANK_BACKWARD = 48  # of dx and dA in one pass
LARGEST_RANK_GATED_BACKWARD = 16  # of the pass that goes on to gate and up: of each of its factors
MOST_BRANCHES = 4  # that read one input
SHARED_MEMORY = 163 << 10  # bytes that a block may ask for

LARGEST_NORM = 16384  # elements of a row of RMSNorm on CUDA

LARGEST_FP8_ROW = 65536  # elements of a row that is quantised to e4m3 on CUDA
LARGEST_FP8_BRANCH = 512  # columns of z that are quantised behind it
TURNED = 16  # codes are turned in squares of so many bytes
LEAST_NF4_TO_E4M3_ROWS = 2  # that NF4 is made e4m3 of on CUDA
COLUMN_SCALE_ROWS = 64  # that one block of scale_columns goes through, and leaves one sum of

MOST_SKINNY_ROWS = 4  # of skinny_linear and fp8_skinny_linear
MOST_NF4_ROWS = 32  # for which products on CUDA decode NF4 on the fly
MOST_NF4_PARTS = 8  # of several weights in one of them
# Of linears that norm what they read, on CUDA: elements of a row, and of all rows.
LARGEST_NORMED_ROW = 8192
MOST_NORMED = 20480
# Attention over the cache on CUDA: query heads of one key/value head, and the sizes of a head.
MOST_QUERIES_PER_HEAD = 8
SMALL_HEAD_DIM = 64
LARGE_HEAD_DIM = 128
