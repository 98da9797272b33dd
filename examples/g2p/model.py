"""A pronouncer: letters -> bidirectional LSTM -> additive attention <- LSTM over phones.

The decoder's LSTM reads the phones alone and attends with its states (Luong et al. 2015,
arXiv:1508.04025, without input feeding), so training attends for all phones of a word in one call.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from arguments import command
from data import BOUNDARY, NUM_LETTERS, NUM_PHONES, PAD, PHONES
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from additive_attn import AdditiveAttention

State = tuple[Tensor, Tensor]


class PlainMemory(NamedTuple):
    key: Tensor
    value: Tensor
    lengths: Tensor

    def expand(self, beams: int) -> PlainMemory:
        return PlainMemory(*(x.repeat_interleave(beams, dim=0) for x in self))


class PlainAttention(nn.Module):
    """The same layer written out: the energies of all pairs at once, then mask and softmax."""

    def __init__(self, input_dim: int, hidden_dim: int, *, key_dim: int) -> None:
        super().__init__()
        self.query_layer = nn.Linear(input_dim, hidden_dim)
        self.key_layer = nn.Linear(key_dim, hidden_dim)
        self.energy_layer = nn.Linear(hidden_dim, 1)

    def forward(
        self, query: Tensor, key: Tensor, *, lengths: Tensor, need_weights: bool = True
    ) -> tuple[Tensor, Tensor]:
        return self._attend(query, self.project(key, lengths=lengths))

    def project(self, key: Tensor, *, lengths: Tensor) -> PlainMemory:
        return PlainMemory(self.key_layer(key), key, lengths)

    def step(
        self, query: Tensor, memory: PlainMemory, need_weights: bool = True
    ) -> tuple[Tensor, Tensor]:
        out, weights = self._attend(query[:, None], memory)
        return out[:, 0], weights[:, 0]

    def _attend(self, query: Tensor, memory: PlainMemory) -> tuple[Tensor, Tensor]:
        energy = torch.tanh(self.query_layer(query)[:, :, None] + memory.key[:, None])
        score = self.energy_layer(energy).squeeze(-1)
        position = torch.arange(memory.key.shape[1], device=query.device)
        padding = position >= memory.lengths[:, None]
        weights = torch.softmax(score.masked_fill(padding[:, None], float("-inf")), dim=-1)
        return weights @ memory.value, weights


@dataclass
class Config:
    layer: str = "fused"
    hidden: int = 256
    dropout: float = 0.2


class Pronouncer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        attention = {"plain": PlainAttention, "fused": AdditiveAttention}[config.layer]
        self.letters = nn.Embedding(NUM_LETTERS, hidden // 2, padding_idx=PAD)
        self.phones = nn.Embedding(NUM_PHONES, hidden // 2, padding_idx=PAD)
        self.encoder = nn.LSTM(hidden // 2, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, 2 * hidden)
        self.decoder = nn.LSTM(hidden // 2, hidden, batch_first=True)
        self.attention = attention(hidden, hidden, key_dim=2 * hidden)
        self.mix = nn.Linear(3 * hidden, hidden)
        self.output = nn.Linear(hidden, NUM_PHONES)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, letters: Tensor, lengths: Tensor, phones: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, NUM_PHONES) of the phone after each of `phones` (B, T).

        With `need_weights` also the alignment (B, T, L), else None.
        """
        encoded, state = self.encode(letters, lengths)
        states, _ = self.decoder(self.dropout(self.phones(phones)), state)
        context, weights = self.attention(
            states, encoded, lengths=lengths.to(letters.device), need_weights=need_weights
        )
        return self._logits(states, context), weights

    def encode(self, letters: Tensor, lengths: Tensor) -> tuple[Tensor, State]:
        """Encoded letters (B, L, 2 * hidden) and the decoder's first state."""
        embedded = self.dropout(self.letters(letters))
        packed = pack_padded_sequence(
            embedded, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        encoded, (last, _) = self.encoder(packed)
        encoded, _ = pad_packed_sequence(encoded, batch_first=True)
        first = self.bridge(torch.cat([last[0], last[1]], dim=-1)).tanh()
        h, c = first[None].chunk(2, dim=-1)
        return self.dropout(encoded), (h.contiguous(), c.contiguous())

    def _logits(self, states: Tensor, context: Tensor) -> Tensor:
        mixed = self.mix(torch.cat([states, context], dim=-1)).tanh()
        return self.output(self.dropout(mixed))

    @torch.no_grad()
    def search(self, letters: Tensor, lengths: Tensor, beam: int = 1) -> list[list[int]]:
        """The best phones of each word by beam search; `beam=1` is the greedy choice.

        Hypotheses compete by their total log-probability; the winner is the best per phone.
        """
        batch, longest = len(letters), 2 * letters.shape[1] + 5
        encoded, state = self.encode(letters, lengths)
        # A word's beams share its keys, so choosing among them copies no key.
        memory = self.attention.project(encoded, lengths=lengths.to(letters.device)).expand(beam)
        h, c = (part.repeat_interleave(beam, dim=1) for part in state)
        history = letters.new_full((batch * beam, 1), BOUNDARY)
        ended = torch.zeros(batch * beam, dtype=torch.bool, device=letters.device)
        # All hypotheses of a word are equal at first: only the first one may be extended then.
        score = encoded.new_full((batch, beam), float("-inf"))
        score[:, 0] = 0.0
        first_row = beam * torch.arange(batch, device=letters.device)[:, None]
        only_pad = encoded.new_full((NUM_PHONES,), float("-inf"))
        only_pad[PAD] = 0.0

        while history.shape[1] <= longest and not ended.all():
            states, (h, c) = self.decoder(self.phones(history[:, -1:]), (h, c))
            context, _ = self.attention.step(states[:, 0], memory, need_weights=False)
            log_prob = self._logits(states[:, 0], context).log_softmax(dim=-1)
            log_prob[:, PAD] = float("-inf")
            log_prob[ended] = only_pad
            total = score[:, :, None] + log_prob.view(batch, beam, NUM_PHONES)
            score, best = total.flatten(1).topk(beam)
            rows = (first_row + best // NUM_PHONES).flatten()
            phone = (best % NUM_PHONES).flatten()
            h, c = h[:, rows], c[:, rows]
            history = torch.cat([history[rows], phone[:, None]], dim=1)
            ended = ended[rows] | (phone == BOUNDARY)

        size = (history[:, 1:] != PAD).sum(1).view(batch, beam)
        winner = first_row[:, 0] + (score / size).argmax(dim=1)
        return history[winner, 1:].tolist()


def save(path: Path, model: Pronouncer, **facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = {"config": asdict(model.config), "phones": PHONES, **facts}
    torch.save({**checkpoint, "state_dict": model.state_dict()}, path)


def load(path: Path, layer: str | None = None) -> tuple[Pronouncer, dict[str, Any]]:
    """A saved model in evaluation mode, and what was saved with it.

    Both layers have the same parameters, so `layer` may differ from the one that was trained.
    """
    if not path.exists():
        raise SystemExit(f"There is no model at {path}. To train one: {command('train.py')}")
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        same = checkpoint["phones"] == PHONES
    except Exception as error:  # torch raises many kinds for files of other formats
        raise SystemExit(f"{path} is no model of train.py ({type(error).__name__}).") from None
    if not same:
        raise SystemExit(f"{path} was trained on other phones than those of data.py: train again.")
    config = Config(**checkpoint["config"])
    config.layer = layer or config.layer
    model = Pronouncer(config)
    model.load_state_dict(checkpoint.pop("state_dict"))
    return model.eval(), checkpoint
