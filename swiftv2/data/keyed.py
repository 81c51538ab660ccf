"""The only source of randomness: every draw is named by what it is for, never by what was drawn before it.

The helpers below use the raw words of the bit generator, whose stream numpy keeps fixed, and not `Generator.permutation`
or `Generator.choice`, whose streams may change with numpy's version: an order must outlive the environment it began in.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def generator(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """A generator whose stream depends on the arguments and on nothing else.

    Args:
        seed: the run's seed.
        purpose: what is drawn, such as `order` or `mask`.
        ids: epoch, step, clip: whatever tells one draw of this purpose from another.
    """
    name = repr((int(seed), str(purpose), tuple(int(i) for i in ids)))
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8")))


def uniform(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1) that belongs to a name (for draws over things that have names, such as subjects)."""
    digest = hashlib.blake2b(repr((int(seed), str(purpose), str(name))).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def permutation(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """A random order of range(count), shape (count,)."""
    return np.argsort(_words(rng, count), kind="stable").astype(np.int64)


def choose(rng: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """`size` different numbers of range(count), ascending, shape (size,)."""
    if not 0 <= size <= count:
        raise ValueError(f"{size} of {count} cannot be chosen")
    return np.sort(permutation(rng, count)[:size])


def _words(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    words = rng.bit_generator.random_raw(count) if count else np.empty(0)
    return np.asarray(words, dtype=np.uint64)
