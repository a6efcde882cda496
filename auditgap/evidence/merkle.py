"""A Merkle tree of a run's cells, hashed as RFC 6962, section 2.1, hashes it: a leaf with 0x00 before
it, a pair of nodes with 0x01, so that none passes for the other.

    leaves = [leaf(data) for data in ...]
    root(leaves)                                        # 32 bytes
    path = proof(leaves, 3)                             # the nodes beside leaf 3, from it upwards
    root_through(leaves[3], 3, len(leaves), path) == root(leaves)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(b"\x00" + data).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The tree's hash; of no leaf that of nothing."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    k = _split(len(leaves))
    return _node(root(leaves[:k]), root(leaves[k:]))


def proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """What stands beside leaf `index` on its way to the root, from below."""
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*proof(leaves[:k], index), root(leaves[k:])]
    return [*proof(leaves[k:], index - k), root(leaves[:k])]


def root_through(found: bytes, index: int, n: int, path: Sequence[bytes]) -> bytes:
    """The root of the tree of `n` leaves in which the leaf `found` stands at `index`, beside `path`.

    Raises ValueError where there is no such place, or the path has another length.
    """
    if not 0 <= index < n or (n == 1) != (not path):
        raise ValueError("no such place in a tree of that size")
    if n == 1:
        return found
    k, beside = _split(n), path[-1]
    if index < k:
        return _node(root_through(found, index, k, path[:-1]), beside)
    return _node(beside, root_through(found, index - k, n - k, path[:-1]))


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(n: int) -> int:
    """The largest power of two below n."""
    return 1 << ((n - 1).bit_length() - 1)
