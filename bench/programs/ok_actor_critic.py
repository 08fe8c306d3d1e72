# case: ok_actor_critic
# source: own construct (advantage actor-critic on a small grid)
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

torch.manual_seed(int(os.environ.get("SEED", "0")))
torch.set_num_threads(1)

SIZE, LIMIT, ENVS = 5, 20, 32
MOVES = torch.tensor([[0, 1], [0, -1], [1, 0], [-1, 0]])


class Grid:
    """Walk to the goal; -0.05 for every step, 1 at the goal."""

    def __init__(self, n):
        self.n = n
        self.pos = torch.randint(0, SIZE, (n, 2))
        self.goal = torch.randint(0, SIZE, (n, 2))
        self.time = torch.zeros(n, dtype=torch.long)

    def observe(self):
        return torch.cat([F.one_hot(self.pos, SIZE).flatten(1), F.one_hot(self.goal, SIZE).flatten(1)], 1).float()

    def step(self, action):
        self.pos = (self.pos + MOVES[action]).clamp(0, SIZE - 1)
        self.time += 1
        reached = (self.pos == self.goal).all(1)
        done = reached | (self.time >= LIMIT)
        reward = torch.where(reached, 1.0, -0.05)
        fresh = torch.randint(0, SIZE, (2, self.n, 2))
        self.pos = torch.where(done[:, None], fresh[0], self.pos)
        self.goal = torch.where(done[:, None], fresh[1], self.goal)
        self.time = torch.where(done, 0, self.time)
        return reward, done, reached


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4 * SIZE, 64), nn.Tanh())
        self.policy = nn.Linear(64, 4)
        self.value = nn.Linear(64, 1)

    def forward(self, obs):
        h = self.body(obs)
        return torch.distributions.Categorical(logits=self.policy(h)), self.value(h).squeeze(1)


model = ActorCritic()
optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, alpha=0.99, eps=1e-5)
env = Grid(ENVS)
for update in range(500):
    logps, values, rewards, dones, entropy = [], [], [], [], 0.0
    for _ in range(5):
        dist, value = model(env.observe())
        action = dist.sample()
        reward, done, _ = env.step(action)
        logps.append(dist.log_prob(action))
        values.append(value)
        rewards.append(reward)
        dones.append(done.float())
        entropy = entropy + dist.entropy().mean() / 5
    with torch.no_grad():
        future = model(env.observe())[1]
    actor_loss, critic_loss = 0.0, 0.0
    for logp, value, reward, done in zip(reversed(logps), reversed(values), reversed(rewards), reversed(dones)):
        future = reward + 0.95 * future * (1 - done)
        advantage = future - value
        actor_loss = actor_loss - (logp * advantage.detach()).mean() / 5
        critic_loss = critic_loss + advantage.pow(2).mean() / 5
    loss = actor_loss + 0.5 * critic_loss - 0.01 * entropy
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    if update % 100 == 0:
        print("update", update, "reward", torch.stack(rewards).mean().item(), "entropy", entropy.item())

hits = episodes = 0
env = Grid(200)
with torch.no_grad():
    for _ in range(40):
        _, done, reached = env.step(model(env.observe())[0].probs.argmax(1))
        hits += reached.sum().item()
        episodes += done.sum().item()
print(f"metric success {hits / episodes:.4f}")
