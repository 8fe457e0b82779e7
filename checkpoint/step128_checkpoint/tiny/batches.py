"""Rows of tokens to train on: pieces of library files, and rows of whole dialogues."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tokenizer import ASSISTANT_TURN, TURN_END

ROW_TOKENS = 512
LOOKAHEAD = 2  # row j of an MTP layer embeds token j+1 and predicts token j+2
# Weight of a dialogue's tokens in the loss: what the assistant says is to be learnt, the prompts only have to be read.
ASSISTANT_WEIGHT, PROMPT_WEIGHT = 4.0, 0.1


class Batches:
    """Random rows [rows, ROW_TOKENS + LOOKAHEAD] int64, the same for the same seed."""

    def __init__(self, tokenizer: Tokenizer, files: list[str], dialogues: list[str], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.length = ROW_TOKENS + LOOKAHEAD
        code = [token for item in tokenizer.encode_batch(files) for token in item.ids]
        self.code = torch.tensor(code, dtype=torch.int32)
        self.dialogues = self._pack([item.ids for item in tokenizer.encode_batch(dialogues)])
        self._turn = tokenizer.encode(ASSISTANT_TURN).ids
        self._turn_end = tokenizer.token_to_id(TURN_END)
        self._order = torch.empty(0, dtype=torch.long)
        self._dialogue_order = torch.empty(0, dtype=torch.long)

    def _pack(self, texts: list[list[int]]) -> Tensor:
        """Rows that begin with a dialogue's first token, as a served prompt does; the last dialogue is cut off."""
        rows, row = [], []
        for text in texts:
            row += text
            if len(row) >= self.length:
                rows.append(row[: self.length])
                row = []
        return torch.tensor(rows, dtype=torch.int32)

    def take(self, code_rows: int, dialogue_rows: int) -> Tensor:
        """A batch without replacement, dialogues last; starts over when the text is used up."""
        starts = []
        for _ in range(code_rows):
            if not len(self._order):
                # Every pass cuts the text at other places.
                offset = int(torch.randint(ROW_TOKENS, (), generator=self.generator))
                count = (len(self.code) - self.length - offset) // ROW_TOKENS
                self._order = torch.randperm(count, generator=self.generator) * ROW_TOKENS + offset
            starts.append(int(self._order[0]))
            self._order = self._order[1:]
        rows = [self.code[at : at + self.length] for at in starts]
        for _ in range(dialogue_rows):
            if not len(self._dialogue_order):
                self._dialogue_order = torch.randperm(len(self.dialogues), generator=self.generator)
            rows.append(self.dialogues[self._dialogue_order[0]])
            self._dialogue_order = self._dialogue_order[1:]
        return torch.stack(rows).long()

    def weights(self, batch: Tensor, code_rows: int) -> Tensor:
        """Weight of each token of a batch [rows, n] in the loss, float32; the first `code_rows` rows are code."""
        weights = torch.ones(batch.shape)
        for row in range(code_rows, len(batch)):
            speaking, ids = False, batch[row].tolist()
            for at, token in enumerate(ids):
                weights[row, at] = ASSISTANT_WEIGHT if speaking else PROMPT_WEIGHT
                opened = ids[max(0, at + 1 - len(self._turn)) : at + 1] == self._turn
                speaking = opened or (speaking and token != self._turn_end)
        return weights
