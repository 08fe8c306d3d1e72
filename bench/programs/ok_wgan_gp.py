# case: ok_wgan_gp
# source: own construct (Wasserstein GAN with gradient penalty, Gulrajani et al. 2017)
import os

import torch
import torch.nn as nn


def mlp(inp, out):
    return nn.Sequential(nn.Linear(inp, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, out))


def data(n):
    side = torch.randint(0, 2, (n, 1)) * 2.0 - 1.0
    return torch.cat([side * 1.5, side * 0.5], 1) + 0.2 * torch.randn(n, 2)


def gradient_penalty(critic, real, fake):
    mix = torch.rand(len(real), 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_(True)
    grad, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((grad.norm(dim=1) - 1) ** 2).mean()


def main():
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    torch.set_num_threads(1)
    generator, critic = mlp(4, 2), mlp(2, 1)
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    opt_c = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(450):
        for _ in range(4):
            real = data(64)
            fake = generator(torch.randn(64, 4)).detach()
            loss_c = critic(fake).mean() - critic(real).mean() + 2.0 * gradient_penalty(critic, real, fake)
            opt_c.zero_grad()
            loss_c.backward()
            opt_c.step()
        loss_g = -critic(generator(torch.randn(64, 4))).mean()
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
        if step % 90 == 0:
            print(f"step {step} critic {loss_c.item():.3f} generator {loss_g.item():.3f}")
    # sliced Wasserstein distance between samples of both
    with torch.no_grad():
        real, fake = data(2000), generator(torch.randn(2000, 4))
        angle = torch.arange(16) * 3.14159 / 16
        axes = torch.stack([angle.cos(), angle.sin()])
        distance = ((real @ axes).sort(0).values - (fake @ axes).sort(0).values).abs().mean().item()
    print(f"metric distance {distance:.4f}")


if __name__ == "__main__":
    main()
