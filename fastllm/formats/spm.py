"""SentencePiece's BPE: the neighbours whose union is the token of the highest score are joined first.

The `tokenizers` library orders merges by pair, SentencePiece by the score of the result and then by place,
leftmost first; the two differ where different pairs make the same token or tokens share a score, so this is
written out here.

A join never crosses a pair of characters that no token contains side by side. Text is therefore cut at such
pairs first (in practice: before almost every space), and each piece is worked out once and remembered.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

_CACHED_PIECES_MAX = 20_000
_CACHED_CHARS_MAX = 64  # longer pieces are rarely met again


class ScoreMerger:
    """Turns text (spaces already written as U+2581) into token ids.

    Args:
        vocab: text -> id of every token that plain text may become.
        scores: score per id; higher joins first.
        byte_ids: id of the token for each of the 256 bytes, or None where there is none.
        unknown_id: stands for a character without a token, when its bytes have none either.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        scores: Sequence[float],
        byte_ids: Sequence[int | None],
        unknown_id: int | None,
    ) -> None:
        self._vocab = vocab
        self._scores = scores
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id
        self._cache: dict[str, list[int]] = {}
        # Every two characters that stand side by side in some token.
        self._neighbours = {text[i : i + 2] for text in vocab if len(text) > 1 for i in range(len(text) - 1)}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        ids: list[int] = []
        cache, neighbours = self._cache, self._neighbours
        start = 0
        cuts = [i for i in range(1, len(text)) if text[i - 1 : i + 1] not in neighbours]
        cuts.append(len(text))
        for end in cuts:
            piece = text[start:end]
            start = end
            if (known := cache.get(piece)) is None:
                known = self._merge(piece)
                if len(piece) <= _CACHED_CHARS_MAX:
                    if len(cache) >= _CACHED_PIECES_MAX:
                        cache.clear()
                    cache[piece] = known
            ids += known
        return ids

    def _merge(self, piece: str) -> list[int]:
        if (whole := self._vocab.get(piece)) is not None and len(piece) == 1:
            return [whole]
        vocab, scores = self._vocab, self._scores
        n = len(piece)
        # symbol i is piece[i:end[i]]; a symbol joined into its left neighbour has end[i] == i
        end = list(range(1, n + 1))
        before = list(range(-1, n - 1))
        queue: list[tuple[float, int, int, int]] = []  # (-score, left, right, length of the union)

        def offer(left: int, right: int) -> None:
            union = vocab.get(piece[left : end[right]])
            if union is not None:
                heapq.heappush(queue, (-scores[union], left, right, end[right] - left))

        for i in range(1, n):
            offer(i - 1, i)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if end[left] != right or end[right] == right or end[right] - left != length:
                continue  # one of the two has been joined to something else since
            end[left], end[right] = end[right], right
            if end[left] < n:
                before[end[left]] = left
                offer(left, end[left])
            if before[left] >= 0:
                offer(before[left], left)

        ids: list[int] = []
        i = 0
        while i < n:
            token = vocab.get(piece[i : end[i]])
            if token is not None:
                ids.append(token)
            else:
                ids += self._spell(piece[i : end[i]])
            i = end[i]
        return ids

    def _spell(self, character: str) -> list[int]:
        """A character that is no token, as the tokens of its UTF-8 bytes."""
        ids = [self._byte_ids[byte] for byte in character.encode("utf-8")]
        spelled = [i for i in ids if i is not None]
        if len(spelled) == len(ids):
            return spelled
        return [] if self._unknown_id is None else [self._unknown_id]
