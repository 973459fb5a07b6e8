"""A word language model with an LSTM, as in pytorch/examples: a hidden state that is carried over, a rate that falls."""

import math

import torch
from ports.data import TEXT
from torch import nn

WORDS = TEXT.lower().replace(",", " ,").replace(".", " .").split()
VOCAB = sorted(set(WORDS))
BPTT = 6


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp=24, nhid=24, nlayers=2, dropout=0.2, tie_weights=True):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.weight = self.encoder.weight
        self.init_weights()
        self.nhid, self.nlayers = nhid, nlayers

    def init_weights(self):
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, input, hidden):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        decoded = self.decoder(self.drop(output))
        return decoded.view(-1, len(VOCAB)), hidden

    def init_hidden(self, bsz):
        return torch.zeros(self.nlayers, bsz, self.nhid), torch.zeros(self.nlayers, bsz, self.nhid)


def repackage_hidden(h):
    return tuple(v.detach() for v in h)


def batchify(words, bsz):
    data = torch.tensor([VOCAB.index(word) for word in words])
    nbatch = len(data) // bsz
    return data[: nbatch * bsz].view(bsz, nbatch).t().contiguous()


def get_batch(source, i):
    return source[i : i + BPTT], source[i + 1 : i + 1 + BPTT].reshape(-1)


criterion = nn.CrossEntropyLoss()


@torch.no_grad()
def evaluate(model, source):
    model.eval()
    total_loss, hidden = 0.0, model.init_hidden(source.shape[1])
    for i in range(0, len(source) - BPTT, BPTT):
        data, targets = get_batch(source, i)
        output, hidden = model(data, hidden)
        total_loss += criterion(output, targets).item()
    return total_loss


def build():
    return (RNNModel(len(VOCAB)),)


def train(model):
    train_data, val_data = batchify(WORDS, 3), batchify(WORDS[-40:], 2)
    lr, best_val_loss, losses, ppl = 20.0, None, [], []
    for _ in range(5):
        model.train()
        hidden = model.init_hidden(3)
        for i in range(0, len(train_data) - BPTT, BPTT):
            data, targets = get_batch(train_data, i)
            model.zero_grad()
            hidden = repackage_hidden(hidden)
            output, hidden = model(data, hidden)
            loss = criterion(output, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-lr)
            losses.append(loss.item())
        val_loss = evaluate(model, val_data)
        ppl.append(math.exp(val_loss / 3))
        if not best_val_loss or val_loss < best_val_loss:
            best_val_loss = val_loss
        else:
            lr /= 4.0
    return losses, [*ppl, lr]


if __name__ == "__main__":
    print(*train(*build()))
