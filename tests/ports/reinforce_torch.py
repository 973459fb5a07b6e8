"""REINFORCE, as in pytorch/examples, without dropout: a policy learns to keep a pole upright from its own episodes."""

from collections import deque

import numpy as np
import torch
from ports.data import CartPole
from torch import nn
from torch.nn import functional as F


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine1 = nn.Linear(4, 32)
        self.affine2 = nn.Linear(32, 2)

    def forward(self, x):
        x = F.relu(self.affine1(x))
        action_scores = self.affine2(x)
        return F.log_softmax(action_scores, dim=-1)


def finish_episode(optimizer, rewards, saved_log_probs, gamma=0.99):
    R, returns = 0, deque()
    for r in rewards[::-1]:
        R = r + gamma * R
        returns.appendleft(R)
    returns = torch.tensor(returns)
    returns = (returns - returns.mean()) / (returns.std() + np.finfo(np.float32).eps)
    policy_loss = torch.stack([-log_prob * R for log_prob, R in zip(saved_log_probs, returns, strict=True)]).sum()
    optimizer.zero_grad()
    policy_loss.backward()
    optimizer.step()
    return policy_loss.item()


def build():
    return (Policy(),)


def train(policy):
    env = CartPole(seed=0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    losses, rewarded = [], []
    for _ in range(20):
        state, saved_log_probs, rewards = env.reset(), [], []
        for _ in range(60):  # no endless episode
            log_probs = policy(torch.from_numpy(state))
            action = torch.multinomial(log_probs.exp(), 1).item()
            saved_log_probs.append(log_probs[action])
            state, reward, done = env.step(action)
            rewards.append(reward)
            if done:
                break
        losses.append(finish_episode(optimizer, rewards, saved_log_probs))
        rewarded.append(sum(rewards))
    return losses, rewarded


if __name__ == "__main__":
    print(*train(*build()))
