"""Training loops of six recipes in plain torch, written from the papers and the authors' code, without this package.

`test_recipes.py` compares the package with them in float64.

Every loop trains the given networks in place for len(batches) steps and returns a dict of lists, one entry per step:
floats, or None where the recipe does not compute that term in that step. Nothing here draws a random number, changes
train or eval mode, or sets requires_grad; a player's gradients are set to None at the start of its own step.
"""

import torch
import torch.nn.functional as F
from torch.optim import Adam, AdamW


def record(logs, **values):
    """Append the values of one step to the logs, tensors as floats."""
    for name, value in values.items():
        logs.setdefault(name, []).append(value.item() if isinstance(value, torch.Tensor) else value)


def vocoder(
    generator,
    discriminators,
    batches,
    mel,
    steps_per_epoch,
    lr=2e-4,
    betas=(0.8, 0.99),
    weight_decay=0.01,
    decay=0.999,
    feature_weight=2.0,
    mel_weight=45.0,
):
    """HiFi-GAN: D then G, one generator pass for both. A batch is (condition, waveform).

    `discriminators` maps names to modules that return (logits, [feature maps]); every map in the list is matched.
    """
    logs = {}
    parameters_d = [p for discriminator in discriminators.values() for p in discriminator.parameters()]
    optimizer_g = AdamW(generator.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    optimizer_d = AdamW(parameters_d, lr=lr, betas=betas, weight_decay=weight_decay)
    for step, (condition, real) in enumerate(batches):
        fake = generator(condition)

        optimizer_d.zero_grad()
        loss_d = 0.0
        for discriminator in discriminators.values():
            logits_real, _ = discriminator(real)
            logits_fake, _ = discriminator(fake.detach())
            loss_d = loss_d + ((1 - logits_real) ** 2).mean() + (logits_fake**2).mean()
        loss_d.backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        adversarial, features = 0.0, 0.0
        for discriminator in discriminators.values():
            _, maps_real = discriminator(real)
            logits_fake, maps_fake = discriminator(fake)
            adversarial = adversarial + ((1 - logits_fake) ** 2).mean()
            for map_real, map_fake in zip(maps_real, maps_fake, strict=True):
                features = features + (map_real.detach() - map_fake).abs().mean()
        spectrum = (mel(fake) - mel(real)).abs().mean()
        loss_g = adversarial + feature_weight * features + mel_weight * spectrum
        loss_g.backward()
        optimizer_g.step()

        record(
            logs,
            loss_d=loss_d,
            loss_g=loss_g,
            adversarial=adversarial,
            features=features,
            mel=spectrum,
            lr=optimizer_g.param_groups[0]["lr"],
        )
        if (step + 1) % steps_per_epoch == 0:
            for optimizer in (optimizer_g, optimizer_d):
                optimizer.param_groups[0]["lr"] *= decay
    return logs


def tokenizer(
    autoencoder,
    discriminator,
    last_layer,
    batches,
    disc_start,
    disc_weight,
    order="taming",
    lr=4.5e-6,
    lr_d=None,
    betas=(0.5, 0.9),
    codebook_weight=1.0,
    nll=lambda real, fake: (real - fake).abs().mean(),
):
    """VQGAN: hinge loss, adaptive weight, and no discriminator at all before batch number `disc_start` (from 0).

    `autoencoder(x)` returns (reconstruction, codebook loss); `last_layer` is the weight tensor of its last layer. order
    "taming": autoencoder step, then a second forward of the updated autoencoder for D; "dg": D then G, one pass.
    """
    logs = {}
    optimizer_g = Adam(autoencoder.parameters(), lr=lr, betas=betas)
    optimizer_d = Adam(discriminator.parameters(), lr=lr if lr_d is None else lr_d, betas=betas)

    def step_d(real, fake):
        optimizer_d.zero_grad()
        loss = 0.5 * (F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake.detach())).mean())
        loss.backward()
        optimizer_d.step()
        return loss

    for step, real in enumerate(batches):
        started = step >= disc_start
        loss_d, adversarial, weight = None, None, None
        fake, codebook = autoencoder(real)
        if started and order == "dg":
            loss_d = step_d(real, fake)

        optimizer_g.zero_grad()
        reconstruction = nll(real, fake)
        loss_g = reconstruction + codebook_weight * codebook.mean()
        if started:
            adversarial = -discriminator(fake).mean()
            (grad_nll,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
            (grad_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
            ratio = grad_nll.norm() / (grad_adversarial.norm() + 1e-4)
            weight = disc_weight * ratio.clamp(0.0, 1e4).detach()
            loss_g = loss_g + weight * adversarial
        loss_g.backward()
        optimizer_g.step()

        if started and order == "taming":
            fake_again, _ = autoencoder(real)
            loss_d = step_d(real, fake_again)
        record(
            logs,
            loss_d=loss_d,
            loss_g=loss_g,
            nll=reconstruction,
            codebook=codebook.mean(),
            adversarial=adversarial,
            weight=weight,
        )
    return logs


class Pool:
    """CycleGAN's image pool; `draws(i)` gives (u, v) in [0, 1) for the i-th image asked of this pool (from 0)."""

    def __init__(self, size, draws):
        self.size, self.draws, self.images, self.asked = size, draws, [], 0

    def ask(self, images):
        """For each image: store and return it; or, once full, swap it with a stored one or return it unstored."""
        returned = []
        for image in images.detach():
            u, v = self.draws(self.asked)
            self.asked += 1
            if len(self.images) < self.size:
                self.images.append(image)
            elif self.size > 0 and u > 0.5:
                slot = int(v * self.size)
                image, self.images[slot] = self.images[slot], image
            returned.append(image)
        return torch.stack(returned)


def translation(
    g_ab,
    g_ba,
    d_a,
    d_b,
    batches,
    pool_draws,
    pool_size=50,
    lr=2e-4,
    betas=(0.5, 0.999),
    cycle_weight=10.0,
    identity_weight=0.5,
):
    """CycleGAN: both generators, then both discriminators on pooled fakes. A batch is (images of A, images of B).

    `pool_draws(pool, i)` gives (u, v) of the i-th image asked of pool 0 (domain A) or 1 (domain B).

    `d_a` judges images of domain A (real A against g_ba(B)) and `d_b` those of B: the authors' names are swapped.
    """
    logs = {}
    optimizer_g = Adam([*g_ab.parameters(), *g_ba.parameters()], lr=lr, betas=betas)
    optimizer_d = Adam([*d_a.parameters(), *d_b.parameters()], lr=lr, betas=betas)
    pool_a, pool_b = (Pool(pool_size, lambda i, pool=pool: pool_draws(pool, i)) for pool in (0, 1))

    def judge(discriminator, real, fake):
        return 0.5 * (((discriminator(real) - 1) ** 2).mean() + (discriminator(fake) ** 2).mean())

    for real_a, real_b in batches:
        optimizer_g.zero_grad()
        fake_b = g_ab(real_a)
        cycle_a = (g_ba(fake_b) - real_a).abs().mean()
        fake_a = g_ba(real_b)
        cycle_b = (g_ab(fake_a) - real_b).abs().mean()
        identity_b = (g_ab(real_b) - real_b).abs().mean()
        identity_a = (g_ba(real_a) - real_a).abs().mean()
        adversarial_b = ((d_b(fake_b) - 1) ** 2).mean()
        adversarial_a = ((d_a(fake_a) - 1) ** 2).mean()
        loss_g = (
            adversarial_b
            + adversarial_a
            + cycle_weight * (cycle_a + cycle_b)
            + cycle_weight * identity_weight * (identity_a + identity_b)
        )
        loss_g.backward()
        optimizer_g.step()

        optimizer_d.zero_grad()
        loss_d_b = judge(d_b, real_b, pool_b.ask(fake_b))
        loss_d_a = judge(d_a, real_a, pool_a.ask(fake_a))
        (loss_d_a + loss_d_b).backward()
        optimizer_d.step()
        record(
            logs,
            loss_g=loss_g,
            adversarial_a=adversarial_a,
            adversarial_b=adversarial_b,
            cycle_a=cycle_a,
            cycle_b=cycle_b,
            identity_a=identity_a,
            identity_b=identity_b,
            loss_d_a=loss_d_a,
            loss_d_b=loss_d_b,
        )
    return logs


def table(
    generator,
    critic,
    batches,
    latents,
    alphas,
    pac,
    columns,
    penalise="all",
    lr=2e-4,
    lr_d=None,
    betas=(0.5, 0.9),
    weight_decay=1e-6,
    penalty_weight=10.0,
):
    """CTGAN: critic then generator on the same rows and condition. A batch is (rows, condition), a latent (zD, zG).

    `generator(z, condition)` returns (rows, logits); `critic` takes (groups, pac * width). `columns` holds the (start,
    end) of each discrete column in the logits; the condition holds their one-hots in this order, zero except in the
    chosen column. An alpha, (groups, 1), belongs to the real rows. `penalise`: norm over "all" or "data" alone.
    """
    logs = {}
    optimizer_g = Adam(generator.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    optimizer_d = Adam(critic.parameters(), lr=lr if lr_d is None else lr_d, betas=betas, weight_decay=weight_decay)

    def judge(rows):
        return critic(rows.reshape(len(rows) // pac, -1))

    for (real, condition), (latent_d, latent_g), alpha in zip(batches, latents, alphas, strict=True):
        optimizer_d.zero_grad()
        fake = generator(latent_d, condition)[0].detach()
        loss_d = judge(torch.cat([fake, condition], 1)).mean() - judge(torch.cat([real, condition], 1)).mean()
        weight = alpha.repeat_interleave(pac, dim=0)
        between = (weight * real + (1 - weight) * fake).requires_grad_(True)
        both = torch.cat([between, condition], 1)
        (grad,) = torch.autograd.grad(judge(both).sum(), both if penalise == "all" else between, create_graph=True)
        norms = grad.reshape(len(real) // pac, -1).norm(dim=1)
        penalty = ((norms - 1) ** 2).mean()
        (loss_d + penalty_weight * penalty).backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        fake, logits = generator(latent_g, condition)
        adversarial = -judge(torch.cat([fake, condition], 1)).mean()
        entropy, offset = 0.0, 0
        for start, end in columns:
            wanted = condition[:, offset : offset + end - start]
            chosen = wanted.sum(1)
            losses = F.cross_entropy(logits[:, start:end], wanted.argmax(1), reduction="none")
            entropy = entropy + (chosen * losses).sum() / len(real)
            offset += end - start
        (adversarial + entropy).backward()
        optimizer_g.step()
        record(logs, loss_d=loss_d, penalty=penalty, adversarial=adversarial, entropy=entropy)
    return logs


def balanced(
    generator,
    losses,
    batches,
    weights,
    lr=3e-4,
    betas=(0.5, 0.9),
    total_norm=1.0,
    decay=0.999,
    epsilon=1e-12,
    per_item=True,
    rescale=True,
):
    """EnCodec's loss balancer on the generator's output. A batch is (input, target).

    `losses` maps names to callables (output, target) -> scalar and `weights` the same names to numbers. The gradients
    with respect to the output are scaled by their averaged norms, added, and sent through the generator once.
    """
    logs = {}
    optimizer = Adam(generator.parameters(), lr=lr, betas=betas)
    sums = dict.fromkeys(losses, 0.0)
    counts = dict.fromkeys(losses, 0.0)
    total_weight = sum(weights[name] for name in losses)
    for given, target in batches:
        optimizer.zero_grad()
        output = generator(given)
        combined = torch.zeros_like(output)
        for name, loss in losses.items():
            value = loss(output, target)
            (grad,) = torch.autograd.grad(value, output, retain_graph=True)
            norm = grad.flatten(1).norm(dim=1).mean().item() if per_item else grad.norm().item()
            sums[name] = decay * sums[name] + norm
            counts[name] = decay * counts[name] + 1.0
            average = sums[name] / counts[name]
            if rescale:
                combined = combined + weights[name] / total_weight * total_norm / (epsilon + average) * grad
            else:
                combined = combined + weights[name] * grad
            record(logs, **{name: value, name + "_norm": norm, name + "_average": average})
        output.backward(combined)
        optimizer.step()
        record(logs, combined_norm=combined.flatten(1).norm(dim=1).mean() if per_item else combined.norm())
    return logs


def lazy(
    generator,
    discriminator,
    batches,
    latents,
    gamma,
    interval,
    order="gd",
    lr=2e-3,
    lr_d=None,
    betas=(0.0, 0.99),
    eps=1e-8,
    correct=True,
    touch=False,
):
    """StyleGAN2's G main, D main and, when step % interval == 0, a separate R1 step of D right after D main.

    A batch is the real images, a latent (zG, zD). order "gd": G main first; "dg": G main last. `correct` rescales D's
    Adam (lr * r, beta ** r, r = k / (k + 1)). `touch` adds 0 * logits to the penalty, as stylegan2-ada-pytorch does:
    parameters that the penalty does not reach then get a zero gradient instead of None, which Adam would skip.
    """
    logs = {}
    ratio = interval / (interval + 1) if correct else 1.0
    lr_d = lr if lr_d is None else lr_d
    optimizer_g = Adam(generator.parameters(), lr=lr, betas=betas, eps=eps)
    optimizer_d = Adam(discriminator.parameters(), lr=lr_d * ratio, betas=tuple(b**ratio for b in betas), eps=eps)

    def step_g(latent):
        optimizer_g.zero_grad()
        loss = F.softplus(-discriminator(generator(latent))).mean()
        loss.backward()
        optimizer_g.step()
        return loss

    for step, (real, (latent_g, latent_d)) in enumerate(zip(batches, latents, strict=True)):
        if order == "gd":
            loss_g = step_g(latent_g)

        optimizer_d.zero_grad()
        fake = generator(latent_d).detach()
        loss_d = F.softplus(discriminator(fake)).mean() + F.softplus(-discriminator(real)).mean()
        loss_d.backward()
        optimizer_d.step()

        penalty = None
        if step % interval == 0:
            optimizer_d.zero_grad()
            point = real.detach().clone().requires_grad_(True)
            logits = discriminator(point)
            (grad,) = torch.autograd.grad(logits.sum(), point, create_graph=True)
            penalty = gamma / 2 * (grad**2).flatten(1).sum(1).mean()
            (interval * penalty + (0 * logits.mean() if touch else 0)).backward()
            optimizer_d.step()

        if order == "dg":
            loss_g = step_g(latent_g)
        record(logs, loss_g=loss_g, loss_d=loss_d, penalty=penalty)
    return logs
