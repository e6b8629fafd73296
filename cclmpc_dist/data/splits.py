"""Is a patient or an image in both splits, of one corpus or of several."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from cclmpc_dist.data.columns import chunks
from cclmpc_dist.data.index import DTYPES, TRAIN, VAL, Index
from cclmpc_dist.data.reader import Reader
from cclmpc_dist.errors import InputError

Place = tuple[int, int]  # corpus, row


class Splits:
    """What is told of the samples while they are read: 8 bytes of hash each of patient and image, and of corpora that
    together have one split only nothing. By chance two of 10 million agree in fewer than one corpus in 100,000."""

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = indexes
        self.first = np.cumsum([0, *map(len, indexes)])
        self.split = np.concatenate([np.empty(0, np.uint8), *(index["split"] for index in indexes)])
        if len(np.unique(self.split)) < 2:
            self.split = np.empty(0, np.uint8)
        self.images, self.patients = np.zeros(self.split.shape, np.uint64), np.zeros(self.split.shape, np.uint64)

    def image(self, corpus: int, row: int, image: np.ndarray) -> None:
        """Of a sample; empty ones are alike without being the same."""
        if len(self.images) and image.dtype in DTYPES and image.size and image.min() != image.max():
            self.images[self.first[corpus] + row] = _hash(np.ascontiguousarray(image).data)

    def patient(self, corpus: int, row: int, patient: str) -> None:
        if len(self.patients):
            self.patients[self.first[corpus] + row] = _hash(patient.encode())

    def problems(self) -> Iterator[str]:
        """One line for each sample of which one in the other split is told before it."""
        for at, other in self._met(self.patients, named=True):
            here, there = self._other(at, other)
            what = "with another --val-last" if at[0] == other[0] else "without one of them"
            yield f"{here}: its patient{self._patient(at)} is in the other split too (case {there}): shard again {what}"
        for at, other in self._met(self.images, named=False):
            here, there = self._other(at, other)
            yield f"{here}: its image is that of case {there} in the other split: leave one of them out and shard again"

    def _patient(self, at: Place) -> str:
        """The name, after a space; nothing where the sample cannot be read again, as of a server that is gone."""
        try:
            return f" {Reader(self.indexes[at[0]]).meta(at[1])['patient']}"
        except InputError:
            return ""

    def _other(self, at: Place, other: Place) -> tuple[str, str]:
        """A sample and one of the other split, in words."""
        index, elsewhere = self.indexes[at[0]], self.indexes[other[0]]
        here = f"{index.shard_name(int(index['shard'][at[1]]))}: case {index.key(at[1])}"
        return here, elsewhere.key(other[1]) + (f" of {elsewhere.path}" if index is not elsewhere else "")

    def _met(self, hashes: np.ndarray, named: bool) -> Iterator[tuple[Place, Place]]:
        """Each sample that is in the other split too, and the first that was there. `named`: what two corpora share
        counts only where it is not but a case's name."""
        seen: dict[tuple[int, int], list[Place]] = defaultdict(list)
        for position in _shared(hashes, self.split).tolist():
            corpus = int(np.searchsorted(self.first, position, "right")) - 1
            at, value, split = (corpus, position - int(self.first[corpus])), int(hashes[position]), self.split[position]
            for other in seen[value, VAL if split == TRAIN else TRAIN]:
                if other[0] == corpus or not named or (self._named(at, value) and self._named(other, value)):
                    yield at, other
                    break
            seen[value, int(split)].append(at)

    def _named(self, at: Place, patient: int) -> bool:
        return _hash(self.indexes[at[0]].key(at[1]).encode()) != patient


def _hash(data: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _shared(hashes: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Ascending positions of what is in both splits."""
    train = _among(hashes, split == TRAIN, hashes[split == VAL])
    val = _among(hashes, split == VAL, hashes[train])
    return np.sort(np.concatenate([train, val]))


def _among(hashes: np.ndarray, where: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions where a hash is one of those wanted; 0 is none."""
    wanted, found = np.unique(wanted[wanted > 0]), [np.empty(0, np.int64)]
    for part in chunks(len(hashes)) if len(wanted) else ():
        at = np.minimum(np.searchsorted(wanted, hashes[part]), len(wanted) - 1)
        found.append(part.start + np.flatnonzero((wanted[at] == hashes[part]) & where[part]))
    return np.concatenate(found)
