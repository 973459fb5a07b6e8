"""A word language model with an LSTM, as in pytorch/examples: a hidden state that is carried over, a rate that falls."""

import math

import jax.numpy as jnp
from ports.data import TEXT

import minitorch_jax as mt
from minitorch_jax import nn, optim

WORDS = TEXT.lower().replace(",", " ,").replace(".", " .").split()
VOCAB = sorted(set(WORDS))
BPTT = 6


class RNNModel(nn.Module):
    def __init__(self, ntoken, ninp=24, nhid=24, nlayers=2, dropout=0.2, tie_weights=True):
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        if tie_weights:
            self.decoder.tie("weight", self.encoder, "weight")
        self.init_weights()
        self.nhid, self.nlayers = nhid, nlayers

    def init_weights(self):
        nn.init.uniform_(self.encoder, "weight", -0.1, 0.1)
        nn.init.zeros_(self.decoder, "bias")

    def forward(self, input, hidden):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        decoded = self.decoder(self.drop(output))
        return decoded.reshape(-1, len(VOCAB)), hidden

    def init_hidden(self, bsz):
        return jnp.zeros((self.nlayers, bsz, self.nhid)), jnp.zeros((self.nlayers, bsz, self.nhid))


def batchify(words, bsz):
    data = jnp.array([VOCAB.index(word) for word in words])
    nbatch = len(data) // bsz
    return data[: nbatch * bsz].reshape(bsz, nbatch).T


def get_batch(source, i):
    return source[i : i + BPTT], source[i + 1 : i + 1 + BPTT].reshape(-1)


def criterion(model, data, targets, hidden):
    output, hidden = model(data, hidden)
    return nn.functional.cross_entropy(output, targets), hidden


def evaluate(model, source):
    model.eval()
    total_loss, hidden = 0.0, model.init_hidden(source.shape[1])
    for i in range(0, len(source) - BPTT, BPTT):
        loss, hidden = criterion(model, *get_batch(source, i), hidden)
        total_loss += float(loss)
    return total_loss


def build():
    return (RNNModel(len(VOCAB)),)


@mt.jit
def train_step(model, opt, data, targets, hidden):
    opt.zero_grad()
    loss, hidden = mt.backward(criterion, model, data, targets, hidden, has_aux=True)
    nn.utils.clip_grad_norm_(model, 0.25)
    opt.step()
    return loss, hidden


def train(model):
    model.compile()  # one program for evaluation
    train_data, val_data = batchify(WORDS, 3), batchify(WORDS[-40:], 2)
    opt, best_val_loss, losses, ppl = optim.SGD([model], lr=20.0), None, [], []
    for _ in range(5):
        model.train()
        hidden = model.init_hidden(3)
        for i in range(0, len(train_data) - BPTT, BPTT):
            loss, hidden = train_step(model, opt, *get_batch(train_data, i), hidden)
            losses.append(float(loss))
        val_loss = evaluate(model, val_data)
        ppl.append(math.exp(val_loss / 3))
        if not best_val_loss or val_loss < best_val_loss:
            best_val_loss = val_loss
        else:
            opt.lr /= 4.0
    return losses, [*ppl, opt.lr]


if __name__ == "__main__":
    print(*train(*build()))
