"""Draws one part of a mixture: its documents, tokenized, cut or packed to samples, without repeats, on two sides.

A text longer than a sample gives up to four windows of it; shorter ones are packed, the last one cut. A conversation
gives its beginning. What has pictures is never cut. Each document goes to one side whole, so that nothing of a held-out
sample's documents is seen in calibration.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from step128_checkpoint.calibration.building.documents import Document
from step128_checkpoint.calibration.building.encoding import Encoder, RenderingError, TokenIds
from step128_checkpoint.calibration.building.mixture import IMAGE_KINDS, Part
from step128_checkpoint.calibration.samples import HELD_OUT_SHARE

_MOST_WINDOWS = 4  # of one document: many files say more than one file's length
# Documents in a row that gave nothing new: the source has run dry. Pictures take longer to make.
_GIVE_UP_AFTER, _GIVE_UP_AFTER_PICTURES = 2000, 100

SaveImages = Callable[[Document], list[str]]


@dataclass(frozen=True)
class Draft:
    """A finished sample of a part: token ids int32 [T], its pictures' file names, and its side."""

    ids: TokenIds
    images: tuple[str, ...]
    held_out: bool


@dataclass
class _Side:
    """What is being packed for one side, and how many of its samples are finished."""

    held_out: bool
    quota: int = 0
    finished: int = 0
    pieces: list[TokenIds] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces))


class PartDraw:
    """Draws samples of one part on demand; ``drafts`` are those drawn so far, ``left_out`` counts unused documents."""

    def __init__(
        self,
        part: Part,
        documents: Iterator[Document],
        encoder: Encoder,
        tokens_per_sample: int,
        seen: set[bytes],
        save_images: SaveImages,
        seed: int,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            part: what is drawn.
            documents: of its source, shuffled.
            encoder: of the checkpoint.
            tokens_per_sample: longest sample, the part's length factor not yet applied.
            seen: keys of documents already used, shared by all parts.
            save_images: stores a document's pictures and returns their names.
            seed: of the windows that are chosen.
        """
        self.part = part
        self.drafts: list[Draft] = []
        self.exhausted = False
        self.left_out = 0
        self._rendered = False
        self._documents, self._encoder, self._seen, self._save_images = documents, encoder, seen, save_images
        self._size = tokens_per_sample * part.length_factor
        self._random = random.Random(f"{seed}/windows/{part.name}")
        self._sides = (_Side(held_out=False), _Side(held_out=True))
        self._separator = encoder.encode(Document("", text="\n\n")).ids

    def fill(self, wanted: int, on_sample: Callable[[], None]) -> None:
        """Draw until there are ``wanted`` samples, or the source has run dry (then ``exhausted``)."""
        held_out = max(1, round(wanted / HELD_OUT_SHARE)) if wanted >= 2 else 0
        for side, quota in zip(self._sides, (wanted - held_out, held_out), strict=True):
            side.quota = max(quota, side.finished)
        patience = _GIVE_UP_AFTER_PICTURES if self.part.kind in IMAGE_KINDS else _GIVE_UP_AFTER
        fruitless = 0
        while len(self.drafts) < wanted and not self.exhausted:
            document = next(self._documents, None)
            if document is None or fruitless >= patience:
                self._finish(on_sample)
                return
            used = self._add(document, on_sample)
            fruitless = 0 if used else fruitless + 1
            self.left_out += not used

    def _finish(self, on_sample: Callable[[], None]) -> None:
        """The source ran dry: what is half packed becomes samples, and one is held out if none was."""
        self.exhausted = True
        for side in self._sides:
            if side.pieces and side.finished < side.quota:
                self._emit(side, on_sample)
        if len(self.drafts) >= 2 and not any(draft.held_out for draft in self.drafts):
            last = self.drafts[-1]
            self.drafts[-1] = Draft(last.ids, last.images, held_out=True)

    def _add(self, document: Document, on_sample: Callable[[], None]) -> bool:
        """Use a document; returns whether it gave anything."""
        try:
            encoded = self._encoder.encode(document)
        except RenderingError:
            if self._rendered:
                return False
            raise
        self._rendered = True
        room = self._size - len(self._begin)
        if not len(encoded.ids) or encoded.key in self._seen or self._does_not_fit(len(encoded.ids), room):
            return False
        self._seen.add(encoded.key)
        side = self._neediest_side()
        if self.part.kind == "long" or (not document.images and len(encoded.ids) >= room):
            for window in self._windows(encoded.ids, room):
                if side.finished < side.quota:
                    self._store(side, np.concatenate([self._begin, window]), (), on_sample)
            return True
        gap = self._separator if side.pieces and not document.messages else self._separator[:0]
        if document.images and side.tokens + len(encoded.ids) > self._size:
            self._emit(side, on_sample)
            if side.finished >= side.quota:
                return True
        side.pieces += [gap if side.pieces else self._begin, encoded.ids]
        side.images += self._save_images(document) if document.images else []
        if side.tokens >= self._size:
            self._emit(side, on_sample)
        return True

    @property
    def _begin(self) -> TokenIds:
        """A chat template writes its own begin token, if there is one."""
        return self._encoder.begin if self.part.kind in ("text", "code", "long") else self._encoder.begin[:0]

    def _does_not_fit(self, tokens: int, room: int) -> bool:
        if self.part.kind == "long":
            return tokens < room / 2
        return self.part.kind in IMAGE_KINDS and tokens > room

    def _windows(self, ids: TokenIds, room: int) -> list[TokenIds]:
        if self.part.kind not in ("text", "code"):
            return [ids[:room]]
        count = len(ids) // room
        chosen = sorted(self._random.sample(range(count), min(count, _MOST_WINDOWS)))
        return [ids[room * i : room * (i + 1)] for i in chosen]

    def _neediest_side(self) -> _Side:
        """The side whose quota is the least filled, so that neither waits for the other at the end."""
        open_sides = [side for side in self._sides if side.finished < side.quota]
        return min(open_sides, key=lambda side: (side.finished + side.tokens / self._size) / side.quota)

    def _emit(self, side: _Side, on_sample: Callable[[], None]) -> None:
        if side.pieces:
            self._store(side, np.concatenate(side.pieces)[: self._size], tuple(side.images), on_sample)
            side.pieces, side.images = [], []

    def _store(self, side: _Side, ids: TokenIds, images: tuple[str, ...], on_sample: Callable[[], None]) -> None:
        self.drafts.append(Draft(ids, images, side.held_out))
        side.finished += 1
        on_sample()
