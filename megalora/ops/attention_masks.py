"""Parts of Triton's attention kernels: which probabilities are kept (megalora.ops.probability_dropout).

A call of Philox gives 16 bits for each of eight keys. The order of keys in a tile is such that hardly anything is
exchanged between threads: what a thread draws stands where its share of a product on tensor cores needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(query, block, key, site, step):
    """Return the words that a query draws for a block of eight keys, [..., 2, 2] (megalora.ops.probability_dropout):
    Philox 4x32-10 of query and block, int64, broadcast against each other to [...].
    """
    a, d = (query & 0xFFFFFFFF).to(tl.uint32), (query >> 32).to(tl.uint32)
    b, c = block.to(tl.uint32), tl.cast(step, tl.uint32)
    key, other = tl.cast(key, tl.uint32), site
    for _ in tl.static_range(10):
        # One product of 64 bits: its halves by themselves would be an instruction each.
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, c = (second >> 32).to(tl.uint32) ^ b ^ key, (first >> 32).to(tl.uint32) ^ d ^ other
        b, d = second.to(tl.uint32), first.to(tl.uint32)
        key = tl.add(key, 0x9E3779B9, sanitize_overflow=False)
        other = tl.add(other, 0xBB67AE85, sanitize_overflow=False)
    # Joined at once, two words in one: Triton computes a tensor in the layout of its use if that is its only use.
    pairs = tl.join(a.to(tl.uint64) | (b.to(tl.uint64) << 32), c.to(tl.uint64) | (d.to(tl.uint64) << 32))
    return tl.join(pairs.to(tl.uint32), (pairs >> 32).to(tl.uint32))


@triton.jit
def _lanes(words):
    """Return the halves of words, [..., 2] from the low one on, each in the upper half of 32 bits."""
    return tl.join(words << 16, words)


@triton.jit
def order_of(N: tl.constexpr, SPREAD: tl.constexpr):
    """Return the keys of a tile by their column in products [queries, keys], [N].

    SPREAD: for keep. Of each 32 columns of a row a thread holds 8 j + 2 l and 8 j + 2 l + 1 (l its lane in four, j
    from 0 to 3). Keys 8 l + 2 j and 8 l + 2 j + 1 stand there, so that all eight keys of a block are one thread's.
    """
    column = tl.arange(0, N)
    if SPREAD:
        column = (column & -31) | ((column & 6) << 2) | ((column >> 2) & 6)
    return column


@triton.jit
def keep(query, block, key, site, step, threshold, M: tl.constexpr, N: tl.constexpr, SPREAD: tl.constexpr):
    """Return which probabilities [M, N] are kept, keys in order_of: query [M] int64, the numbers of the tokens; block
    int64, that of the first eight keys.
    """
    lanes = _lanes(_words(query[:, None], (block + tl.arange(0, N // 8))[None, :], key, site, step))
    if SPREAD:
        lanes = tl.permute(tl.reshape(lanes, (M, N // 32, 4, 2, 2, 2)), (0, 1, 3, 4, 2, 5))
    return tl.reshape(lanes, (M, N)) >= (tl.cast(threshold, tl.uint32) << 16)


@triton.jit
def turned_order_of(N: tl.constexpr, SPREAD: tl.constexpr):
    """Return the keys of a tile by their row in products [keys, queries], [N].

    SPREAD: for turned_keep. A warp holds 16 neighbouring rows, a thread r and r + 8 of them. There stand the two keys
    of one word, and the eight of two blocks in one warp: what a thread draws for others, it hands on within its warp.
    """
    row = tl.arange(0, N)
    if SPREAD:
        row = (row & 4) * (N // 8) | (row & -16) >> 1 | (row & 3) << 1 | (row & 8) >> 3
    return row


@triton.jit
def turned_keep(query, block, key, site, step, threshold, M: tl.constexpr, N: tl.constexpr, SPREAD: tl.constexpr):
    """Return which probabilities [N, M] are kept, keys in turned_order_of; else as keep."""
    if not SPREAD:
        return tl.trans(keep(query, block, key, site, step, threshold, M, N, False))
    words = _words(query[None, :], (block + tl.arange(0, N // 8))[:, None], key, site, step)
    words = tl.reshape(tl.permute(words, (2, 3, 0, 1)), (1, 4, N // 8, M))
    # A scan over one element changes nothing, but has a layout of its own: without it each of four threads would draw
    # all that the four need.
    words = tl.associative_scan(words, 0, _either)
    words = tl.permute(tl.reshape(words, (4, 2, N // 16, M)), (2, 1, 0, 3))
    lanes = tl.permute(_lanes(words), (0, 4, 1, 2, 3))  # [N / 16, half, 2, word, M]
    return tl.reshape(lanes, (N, M)) >= (tl.cast(threshold, tl.uint32) << 16)


@triton.jit
def _either(a, b):
    return a
