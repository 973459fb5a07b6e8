"""REINFORCE, as in pytorch/examples, without dropout: a policy learns to keep a pole upright from its own episodes."""

from collections import deque

import jax
import numpy as np
from ports.data import CartPole

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.nn import functional as F


class Policy(nn.Module):
    def __init__(self):
        self.affine1 = nn.Linear(4, 32)
        self.affine2 = nn.Linear(32, 2)

    def forward(self, x):
        x = F.relu(self.affine1(x))
        action_scores = self.affine2(x)
        return F.log_softmax(action_scores, dim=-1)


@mt.jit
def select_action(policy, state):
    return jax.random.categorical(mt.next_key(), policy(state))


def policy_loss(policy, states, actions, returns):
    log_probs = policy(states)[np.arange(len(actions)), actions]
    return (-log_probs * returns).sum()


@mt.jit
def train_step(policy, optimizer, states, actions, returns):
    optimizer.zero_grad()
    loss = mt.backward(policy_loss, policy, states, actions, returns)
    optimizer.step()
    return loss


def finish_episode(policy, optimizer, rewards, states, actions, gamma=0.99):
    R, returns = 0, deque()
    for r in rewards[::-1]:
        R = r + gamma * R
        returns.appendleft(R)
    returns = np.array(returns, np.float32)
    returns = (returns - returns.mean()) / (returns.std(ddof=1) + np.finfo(np.float32).eps)
    returns = np.pad(returns, (0, len(states) - len(returns)))  # no return for steps after the end
    return train_step(policy, optimizer, states, actions, returns)


def build():
    return (Policy(),)


def train(policy):
    env = CartPole(seed=0)
    optimizer = optim.Adam([policy], lr=1e-2)
    losses, rewarded = [], []
    for _ in range(20):
        state, rewards = env.reset(), []
        states, actions = np.zeros((60, 4), np.float32), np.zeros(60, int)  # of one length: one program
        for i in range(60):  # no endless episode
            states[i], actions[i] = state, select_action(policy, state)
            state, reward, done = env.step(actions[i])
            rewards.append(reward)
            if done:
                break
        losses.append(finish_episode(policy, optimizer, rewards, states, actions))
        rewarded.append(sum(rewards))
    return losses, rewarded


if __name__ == "__main__":
    print(*train(*build()))
