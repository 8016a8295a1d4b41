"""Rows that repeat an earlier one: word for word, or nearly so.

Near duplicates are found by MinHash with locality-sensitive hashing (Broder 1997; Indyk and Motwani 1998) on shingles,
the sets of all pieces of four characters: no words are split, so that every language and code are treated alike. What
MinHash proposes is confirmed by the exact Jaccard similarity of the sets.
"""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
from tqdm import tqdm

from utils.errors import InputError
from utils.parallel import watchdog

Parts = tuple[str, ...]  # of a row: its prompt and its answers
ReadParts = Callable[[Sequence[int]], list[Parts]]

SHINGLE = 4  # characters
SIMILARITY = 0.55  # Jaccard similarity of the shingles of two rows, at least, for near duplicates
# Every part by itself: different answers to one long prompt are no duplicates, nor different prompts with one answer.
SIMILARITY_OF_PARTS = 0.4
END = 200  # characters of a longer prompt that must be similar by themselves: dialogues share all but the last question
BANDS, BAND_SIZE = 51, 5  # finds 98 of 100 pairs of similarity 0.6, all but one in 5000 of 0.7, and few below 0.2
MOST_IN_A_GROUP = 100  # rows that share a band; with more it tells nothing, such as the text of a form letter
MOST_CANDIDATES = 20  # for the exact comparison, of a row: those with the most bands in common
BATCH = 1000
_SEED = 1234
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)
_INSTALL = "pip install rensa==0.5.0"


def minhash_library() -> ModuleType:
    """`rensa`, an optional dependency.

    Raises:
        InputError: it is not installed.
    """
    try:
        import rensa
    except ImportError as error:
        raise InputError(f"--deduplicate near needs the library rensa ({_INSTALL}); or give exact") from error
    return rensa


def find_duplicates(read: ReadParts, count: int, *, near: bool, protected: int = 0) -> np.ndarray:
    """For each of `count` rows the earlier row that it repeats, or -1.

    Of several rows that repeat each other the first stays; a row is compared only with rows that stay, so a chain of
    small changes does not remove its last link unless that resembles the first. The result depends on nothing random.

    Args:
        read: the parts of the rows with these numbers.
        near: find near duplicates in addition to equal rows.
        protected: the first so many rows stay, whatever they resemble.
    Returns:
        (count,) int64 numbers of rows.
    """
    digest_of = _minhash() if near else None
    repeats = np.full(count, -1, dtype=np.int64)
    first: dict[bytes, int] = {}
    keys = []
    with tqdm(total=count, desc="looking for duplicates", unit=" rows", delay=3, leave=False) as bar:
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            rows = read(numbers)
            for number, parts in zip(numbers, rows, strict=True):
                known = first.setdefault(_digest(parts), number)
                if known != number and number >= protected:
                    repeats[number] = known
            if digest_of is not None:
                keys.append(digest_of(rows))
            bar.update(len(rows))
            watchdog.working()
    if near and count:
        _find_near(read, np.concatenate(keys), repeats, protected)
    return repeats


def similarity(row: Parts, other: Parts) -> float:
    """The Jaccard similarity of two rows' shingles; 0 if a part or the prompt's end is not alike, or numbers differ."""
    return _similarity(_Shingles(row), _Shingles(other))


class _Shingles:
    """The sorted shingles (uint64 hashes) of each part of a row, of its prompt's end, and the numbers in it.

    Rows are no duplicates where each has a number that the other lacks, however alike they look otherwise.
    """

    def __init__(self, parts: Parts) -> None:
        texts = [_normalised(text) for text in parts]
        self.parts = [np.unique(_hashes(text)) for text in texts]
        self.end = np.unique(_hashes(texts[0][-END:]))
        self.numbers = Counter(_numbers(texts))


def _similarity(row: _Shingles, other: _Shingles) -> float:
    if len(row.parts) != len(other.parts) or not (row.numbers <= other.numbers or other.numbers <= row.numbers):
        return 0.0
    shared = both = 0
    for mine, others in [*zip(row.parts, other.parts, strict=True), (row.end, other.end)]:
        common = len(np.intersect1d(mine, others, assume_unique=True))
        union = len(mine) + len(others) - common
        if common < SIMILARITY_OF_PARTS * union:
            return 0.0
        if mine is not row.end:
            shared, both = shared + common, both + union
    return shared / both


def _normalised(text: str) -> str:
    """`text` without differences of width, case, and amount of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _numbers(texts: Sequence[str]) -> list[tuple[int, str]]:
    """The numbers in each part that are no piece of a word (as in "utf8"): 12 or 13 apples make another question."""
    return sorted(
        (part, match.group())
        for part, text in enumerate(texts)
        for match in re.finditer(r"\d+", text)
        if not any(_has_case(letter) for letter in (text[match.start() - 1 : match.start()], text[match.end() :][:1]))
    )


def _has_case(letter: str) -> bool:
    """Whether it belongs to an alphabet with capitals, which writes words apart from numbers."""
    return letter.upper() != letter.lower()


def _hashes(text: str) -> np.ndarray:
    """(shingles,) uint64, one for each place in the text; a text that is shorter than a shingle is one."""
    text = text.ljust(SHINGLE, "\0")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    places = len(points) - SHINGLE + 1
    return _mixed(sum(points[i : i + places] * factor for i, factor in enumerate(_FACTORS)))


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014), which spreads every bit over all others."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _digest(parts: Parts) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for text in parts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def _minhash() -> Callable[[Sequence[Parts]], np.ndarray]:
    """A function from rows to their (rows, BANDS) uint32 keys, equal where all MinHash values of a band are."""
    matrix_of = minhash_library().RMinHash.digest_matrix_from_flat_token_hashes
    salts = _mixed(np.arange(1, BANDS * BAND_SIZE + 1, dtype=np.uint64))
    parts_apart = _mixed(np.arange(100, 200, dtype=np.uint64))

    def keys_of(rows: Sequence[Parts]) -> np.ndarray:
        hashes, lengths = [], []
        for parts in rows:
            own = [_hashes(_normalised(text)) ^ parts_apart[part] for part, text in enumerate(parts)]
            hashes += own
            lengths.append(sum(map(len, own)))
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)
        matrix = matrix_of(np.concatenate(hashes), ends, BANDS * BAND_SIZE, _SEED)
        values = np.array(matrix.to_rows(), dtype=np.uint64)
        bands = _mixed(values * salts).reshape(len(rows), BANDS, BAND_SIZE).sum(axis=2, dtype=np.uint64)
        return _mixed(bands).astype(np.uint32)

    return keys_of


def _find_near(read: ReadParts, keys: np.ndarray, repeats: np.ndarray, protected: int) -> None:
    """Enter the near duplicates among the rows with these keys into `repeats`."""
    groups = _groups(keys)
    members: dict[int, list[int]] = {}  # of each group, the rows that stay

    @functools.lru_cache(maxsize=10_000)
    def shingles(number: int) -> _Shingles:
        return _Shingles(read([number])[0])

    for number, own in enumerate(tqdm(groups, desc="comparing rows", unit=" rows", delay=3, leave=False)):
        if number % BATCH == 0:
            watchdog.working()
        if repeats[number] >= 0 or not (shared := own[own >= 0].tolist()):
            continue
        if number >= protected:
            votes = Counter(other for group in shared for other in members.get(group, ()))
            candidates = sorted(votes, key=lambda other: (-votes[other], other))[:MOST_CANDIDATES]
            mine = shingles(number) if candidates else None
            found = (other for other in candidates if _similarity(mine, shingles(other)) >= SIMILARITY)
            repeats[number] = next(found, -1)
        if repeats[number] < 0:
            for group in shared:
                some = members.setdefault(group, [])
                if len(some) < MOST_IN_A_GROUP:
                    some.append(number)


def _groups(keys: np.ndarray) -> np.ndarray:
    """(rows, BANDS) int32: a number for each key that several rows have in the same band, -1 for any other key."""
    groups, behind = np.full(keys.shape, -1, dtype=np.int32), 0
    for band in range(keys.shape[1]):
        _, inverse, counts = np.unique(keys[:, band], return_inverse=True, return_counts=True)
        numbers = np.full(len(counts), -1, dtype=np.int32)
        several = np.flatnonzero(counts > 1)
        numbers[several] = behind + np.arange(len(several))
        groups[:, band] = numbers[inverse]
        behind += len(several)
    return groups
