"""Training steps of applied adversarial recipes in plain torch, written from the authors' code, without this package.

They add to `recipe_references`, whose rules hold here: a loop trains the given networks in place for one step per
batch and returns a dict of lists, one entry per step: floats, or None where a term does not run. Nothing here draws a
random number, changes train or eval mode, or sets requires_grad of a parameter; a player's gradients are set to None
at the start of its own step. Networks are called in the order of the authors' code, so that buffers agree as well.

Terms in the logs are unweighted, loss_g is their weighted sum, and the learning rate is the one that the step used.
"""

import math

import torch
import torch.nn.functional as F
from recipe_references import record
from torch.optim import Adam, AdamW


def towards(logits, target):
    """Binary cross-entropy of logits with one constant target, mean over all logits."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def scale_rates(optimizers, factor):
    """Multiply the learning rate of every group of the optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= factor


def average(averages, network, decay):
    """Move a dict of averaged parameters towards those of the network."""
    for name, parameter in network.named_parameters():
        averages[name] = decay * averages[name] + (1 - decay) * parameter.detach()


# Spectra


def slaney_filters(sample_rate, n_fft, n_mels, f_min=0.0, f_max=None):
    """Slaney's mel filterbank with filters of equal area, (n_mels, n_fft // 2 + 1) in float64.

    Mel is linear up to 1 kHz (15 mel, 200 / 3 Hz each) and logarithmic above (27 mel for a factor of 6.4).
    """

    def to_mel(hertz):
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    def to_hertz(mel):
        return 200 * mel / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    low, high = to_mel(f_min), to_mel(sample_rate / 2 if f_max is None else f_max)
    corners = [to_hertz(low + (high - low) * i / (n_mels + 1)) for i in range(n_mels + 2)]
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    filters = []
    for left, centre, right in zip(corners, corners[1:], corners[2:], strict=False):
        rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
        filters.append(torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left))
    return torch.stack(filters)


def hifi_mel(x, sample_rate, n_fft, hop, n_mels, f_max=None, f_min=0.0, window=None):
    """HiFi-GAN's log-mel spectrogram of (n, 1, t) or (n, t), (n, n_mels, t // hop) if hop divides t.

    `f_max` is 8,000 for the generator's input and None, half the sample rate, for the loss.
    """
    window = n_fft if window is None else window
    x = x.reshape(len(x), 1, -1)
    margin = (n_fft - hop) // 2
    padded = F.pad(x, (margin, margin), mode="reflect")[:, 0]
    taper = torch.hann_window(window, dtype=x.dtype, device=x.device)
    spectrum = torch.stft(padded, n_fft, hop, window, taper, center=False, return_complex=True)
    magnitude = (spectrum.real**2 + spectrum.imag**2 + 1e-9).sqrt()
    filters = slaney_filters(sample_rate, n_fft, n_mels, f_min, f_max).to(x)
    return (filters @ magnitude).clamp(min=1e-5).log()


def dac_mel_distance(
    x,
    y,
    sample_rate,
    windows=(32, 64, 128, 256, 512, 1024, 2048),
    mels=(5, 10, 20, 40, 80, 160, 320),
):
    """DAC's mel loss of two waveforms, (n, 1, t): the sum over windows of the L1 distance of log10 magnitudes."""
    total = 0.0
    for window, n_mels in zip(windows, mels, strict=True):
        taper = torch.hann_window(window, dtype=x.dtype, device=x.device)
        filters = slaney_filters(sample_rate, window, n_mels).to(x)
        levels = []
        for wave in (x, y):
            flat = wave.reshape(-1, wave.shape[-1])
            spectrum = torch.stft(
                flat, window, window // 4, window, taper, center=True, pad_mode="reflect", return_complex=True
            )
            levels.append((filters @ spectrum.abs()).clamp(min=1e-5).log10())
        total = total + (levels[0] - levels[1]).abs().mean()
    return total


# Training steps


def codec(
    generator,
    discriminators,
    data,
    mel_distance,
    *,
    lr=1e-4,
    betas=(0.8, 0.99),
    weight_decay=0.01,
    decay=0.999996,
    clip_d=10.0,
    clip_g=1e3,
    mel_weight=15.0,
    feature_weight=2.0,
    adversarial_weight=1.0,
    commitment_weight=0.25,
    codebook_weight=1.0,
):
    """DAC: D then G, one generator pass for both, gradients clipped, rates lowered at every step.

    Args:
        generator: maps a waveform to (reconstruction, {"commitment": scalar, "codebook": scalar}).
        discriminators: names to modules that return (logits, [feature maps without the logits]).
        data: one waveform, (n, 1, t), per step.
        mel_distance: callable (reconstruction, waveform) -> scalar.
    """
    logs = {}
    parameters_g = list(generator.parameters())
    parameters_d = [p for discriminator in discriminators.values() for p in discriminator.parameters()]
    optimizer_g = AdamW(parameters_g, lr=lr, betas=betas, weight_decay=weight_decay)
    optimizer_d = AdamW(parameters_d, lr=lr, betas=betas, weight_decay=weight_decay)

    def judge(wave):
        wave = wave - wave.mean(-1, keepdim=True)
        wave = 0.8 * wave / (wave.abs().amax(-1, keepdim=True) + 1e-9)
        return [discriminator(wave) for discriminator in discriminators.values()]

    for real in data:
        used = optimizer_g.param_groups[0]["lr"]
        fake, quantizer = generator(real)

        optimizer_d.zero_grad()
        judged_fake, judged_real = judge(fake.detach()), judge(real)
        loss_d = sum((logits**2).mean() for logits, _ in judged_fake)
        loss_d = loss_d + sum(((1 - logits) ** 2).mean() for logits, _ in judged_real)
        loss_d.backward()
        norm_d = torch.nn.utils.clip_grad_norm_(parameters_d, clip_d)
        optimizer_d.step()
        scale_rates([optimizer_d], decay)

        optimizer_g.zero_grad()
        mel = mel_distance(fake, real)
        judged_fake, judged_real = judge(fake), judge(real)
        adversarial = sum(((1 - logits) ** 2).mean() for logits, _ in judged_fake)
        features = 0.0
        for (_, maps_fake), (_, maps_real) in zip(judged_fake, judged_real, strict=True):
            for map_fake, map_real in zip(maps_fake, maps_real, strict=True):
                features = features + (map_fake - map_real.detach()).abs().mean()
        loss_g = (
            mel_weight * mel
            + feature_weight * features
            + adversarial_weight * adversarial
            + commitment_weight * quantizer["commitment"]
            + codebook_weight * quantizer["codebook"]
        )
        loss_g.backward()
        norm_g = torch.nn.utils.clip_grad_norm_(parameters_g, clip_g)
        optimizer_g.step()
        scale_rates([optimizer_g], decay)

        record(
            logs,
            loss_d=loss_d,
            loss_g=loss_g,
            adversarial=adversarial,
            features=features,
            mel=mel,
            commitment=quantizer["commitment"],
            codebook=quantizer["codebook"],
            norm_d=norm_d,
            norm_g=norm_g,
            lr=used,
        )
    return logs


def super_resolution(
    generator,
    discriminator,
    data,
    *,
    lr=1e-4,
    perceptual=None,
    sharpen=None,
    weight=0.1,
    ema_decay=0.999,
    betas=(0.9, 0.99),
    milestones=(),
    factor=0.5,
    every=1,
    start=0,
):
    """Real-ESRGAN: G, then D on the same output with two backward passes, then the average of G's parameters.

    Args:
        generator: maps small images to large ones.
        discriminator: returns logits, usually one per pixel.
        data: one (small images, large images) per step.
        lr: of both players.
        perceptual: callable (output, target) -> scalar, or None.
        sharpen: makes the target of G's losses from the large images, or None; D sees them as they are.
        weight: of the adversarial term of G; D's loss is not weighted.
        ema_decay: of the average, which starts as a copy of G.
        betas: of both players' Adam.
        milestones: numbers of iterations after which both rates are multiplied by `factor`.
        factor: see `milestones`.
        every: G steps only in iterations, counted from 1, that this divides; D steps in every one.
        start: G does not step in the first `start` iterations.

    Returns:
        The logs, and a dict from the names of G's parameters to their averages.
    """
    logs = {}
    optimizer_g = Adam(generator.parameters(), lr=lr, betas=betas)
    optimizer_d = Adam(discriminator.parameters(), lr=lr, betas=betas)
    averages = {name: parameter.detach().clone() for name, parameter in generator.named_parameters()}
    for iteration, (small, large) in enumerate(data, start=1):
        used = optimizer_g.param_groups[0]["lr"]
        target = large if sharpen is None else sharpen(large).detach()
        loss_g, pixel, perceived, adversarial = None, None, None, None

        optimizer_g.zero_grad()
        output = generator(small)
        if iteration % every == 0 and iteration > start:
            pixel = (output - target).abs().mean()
            loss_g = pixel
            if perceptual is not None:
                perceived = perceptual(output, target)
                loss_g = loss_g + perceived
            adversarial = towards(discriminator(output), 1.0)
            loss_g = loss_g + weight * adversarial
            loss_g.backward()
            optimizer_g.step()

        optimizer_d.zero_grad()
        loss_d_real = towards(discriminator(large), 1.0)
        loss_d_real.backward()
        loss_d_fake = towards(discriminator(output.detach()), 0.0)
        loss_d_fake.backward()
        optimizer_d.step()

        average(averages, generator, ema_decay)
        if iteration in milestones:
            scale_rates([optimizer_g, optimizer_d], factor)
        record(
            logs,
            loss_g=loss_g,
            pixel=pixel,
            perceptual=perceived,
            adversarial=adversarial,
            loss_d_real=loss_d_real,
            loss_d_fake=loss_d_fake,
            lr=used,
        )
    return logs, averages


def paired_translation(generator, discriminator, data, *, lr=2e-4, weight=100.0, betas=(0.5, 0.999)):
    """pix2pix: D on pairs, then G, one generator pass for both. A batch is (source images, target images).

    `discriminator` takes the source and an image, joined along the channels, and returns logits.
    """
    logs = {}
    optimizer_g = Adam(generator.parameters(), lr=lr, betas=betas)
    optimizer_d = Adam(discriminator.parameters(), lr=lr, betas=betas)
    for source, target in data:
        fake = generator(source)

        optimizer_d.zero_grad()
        loss_d_fake = towards(discriminator(torch.cat([source, fake.detach()], 1)), 0.0)
        loss_d_real = towards(discriminator(torch.cat([source, target], 1)), 1.0)
        loss_d = 0.5 * (loss_d_fake + loss_d_real)
        loss_d.backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        adversarial = towards(discriminator(torch.cat([source, fake], 1)), 1.0)
        pixel = (fake - target).abs().mean()
        loss_g = adversarial + weight * pixel
        loss_g.backward()
        optimizer_g.step()
        record(
            logs,
            loss_d=loss_d,
            loss_d_real=loss_d_real,
            loss_d_fake=loss_d_fake,
            loss_g=loss_g,
            adversarial=adversarial,
            pixel=pixel,
        )
    return logs


def esrgan(
    generator,
    discriminator,
    data,
    *,
    lr=1e-4,
    perceptual=None,
    weight=5e-3,
    pixel_weight=1e-2,
    perceptual_weight=1.0,
    detach_d=False,
    detach_g=False,
    half=0.5,
    betas=(0.9, 0.99),
    milestones=(),
    factor=0.5,
):
    """ESRGAN: G, then D on the same output, both with the relativistic average cross-entropy.

    With r and f the logits of reals and fakes, D's loss is half * (BCE(r - mean f, 1) + BCE(f - mean r, 0)), and G's
    has the targets exchanged. A batch is (small images, large images).

    Args:
        generator: maps small images to large ones.
        discriminator: returns logits, one per image or more.
        data: one (small images, large images) per step.
        lr: of both players.
        perceptual: callable (output, target) -> scalar, or None.
        weight: of the adversarial term of G; D's loss is not weighted.
        pixel_weight: of the L1 distance.
        perceptual_weight: of the perceptual term.
        detach_d: the mean that is subtracted is a constant in D's step. The authors' code does so, with two backward
            passes and the fakes judged twice, which changes buffers of D alone.
        detach_g: the same in G's step; the authors' code does not.
        half: weight of each of the two terms, 0.5 in the authors' code, 1 in the paper.
        betas: of both players' Adam.
        milestones: numbers of iterations after which both rates are multiplied by `factor`.
        factor: see `milestones`.
    """
    logs = {}
    optimizer_g = Adam(generator.parameters(), lr=lr, betas=betas)
    optimizer_d = Adam(discriminator.parameters(), lr=lr, betas=betas)
    for iteration, (small, large) in enumerate(data, start=1):
        used = optimizer_g.param_groups[0]["lr"]

        optimizer_g.zero_grad()
        output = generator(small)
        pixel = (output - large).abs().mean()
        loss_g = pixel_weight * pixel
        perceived = None
        if perceptual is not None:
            perceived = perceptual(output, large)
            loss_g = loss_g + perceptual_weight * perceived
        logits_real = discriminator(large).detach()
        logits_fake = discriminator(output)
        mean_fake = logits_fake.mean().detach() if detach_g else logits_fake.mean()
        adversarial = half * (towards(logits_real - mean_fake, 0.0) + towards(logits_fake - logits_real.mean(), 1.0))
        loss_g = loss_g + weight * adversarial
        loss_g.backward()
        optimizer_g.step()

        optimizer_d.zero_grad()
        logits_fake = discriminator(output.detach())
        logits_real = discriminator(large)
        if detach_d:
            loss_d_real = half * towards(logits_real - logits_fake.mean().detach(), 1.0)
            loss_d_real.backward()
            logits_fake = discriminator(output.detach())
            loss_d_fake = half * towards(logits_fake - logits_real.mean().detach(), 0.0)
            loss_d_fake.backward()
        else:
            loss_d_real = half * towards(logits_real - logits_fake.mean(), 1.0)
            loss_d_fake = half * towards(logits_fake - logits_real.mean(), 0.0)
            (loss_d_real + loss_d_fake).backward()
        optimizer_d.step()

        if iteration in milestones:
            scale_rates([optimizer_g, optimizer_d], factor)
        record(
            logs,
            loss_g=loss_g,
            pixel=pixel,
            perceptual=perceived,
            adversarial=adversarial,
            loss_d=loss_d_real + loss_d_fake,
            loss_d_real=loss_d_real,
            loss_d_fake=loss_d_fake,
            lr=used,
        )
    return logs


def activate(raw, spans, gumbel, temperature=0.2):
    """CTGAN's output activation: tanh on scalars, softmax of (logits + Gumbel noise) / temperature on one-hots.

    `spans` are (start, end, kind) with kind "tanh" or "softmax", in order and without gaps; `gumbel` has the shape of
    `raw`, and its values on scalars are not used.
    """
    parts = []
    for start, end, kind in spans:
        if kind == "tanh":
            parts.append(torch.tanh(raw[:, start:end]))
        else:
            parts.append(torch.softmax((raw[:, start:end] + gumbel[:, start:end]) / temperature, dim=1))
    return torch.cat(parts, dim=1)


def table(
    generator,
    critic,
    data,
    latents,
    conditions,
    alphas,
    pac,
    spans,
    condition_spans,
    gumbels,
    *,
    lr=2e-4,
    betas=(0.5, 0.9),
    weight_decay=1e-6,
    penalty_weight=10.0,
    temperature=0.2,
):
    """CTGAN: critic, then generator with a new latent, condition and noise.

    Args:
        generator: maps (latent, condition) to raw outputs, (n, width).
        critic: maps (n / pac, pac * (width + conditions)) to (n / pac, 1).
        data: one (encoded real rows, their conditions) per step; in the authors' code these conditions are those of
            the critic's fakes in another order.
        latents: one (critic's step, generator's step) per step.
        conditions: the same; a condition is zero except for a one in the category of the column it picks.
        alphas: one (n / pac, 1) per step, the weight of the reals. The conditions are interpolated with the rows, and
            the norm is that of the gradient with respect to both over all rows of a pack.
        pac: rows that the critic sees at once.
        spans: (start, end, kind) of the outputs, see `activate`.
        condition_spans: ((start, end) in the outputs, (start, end) in the condition) of every discrete column.
        gumbels: noise of the two steps, like `latents`.
        lr: of both players, as are `betas` and `weight_decay`.
        betas: see `lr`.
        weight_decay: see `lr`.
        penalty_weight: of the penalty, which is logged without it.
        temperature: of the softmax.
    """
    logs = {}
    optimizer_g = Adam(generator.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    optimizer_d = Adam(critic.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)

    def judge(rows):
        return critic(rows.reshape(len(rows) // pac, -1))

    steps = zip(data, latents, conditions, alphas, gumbels, strict=True)
    for (rows, condition_real), (latent_d, latent_g), (condition_d, condition_g), alpha, (noise_d, noise_g) in steps:
        optimizer_d.zero_grad()
        rows_fake = activate(generator(latent_d, condition_d), spans, noise_d, temperature).detach()
        fake, real = torch.cat([rows_fake, condition_d], 1), torch.cat([rows, condition_real], 1)
        mean_fake, mean_real = judge(fake).mean(), judge(real).mean()
        loss_d = mean_fake - mean_real
        share = alpha.reshape(-1, 1).repeat_interleave(pac, dim=0)
        between = (share * real + (1 - share) * fake).requires_grad_(True)
        (grad,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
        norms = grad.reshape(len(rows) // pac, -1).norm(dim=1)
        penalty = ((norms - 1) ** 2).mean()
        (loss_d + penalty_weight * penalty).backward()
        optimizer_d.step()

        optimizer_g.zero_grad()
        raw = generator(latent_g, condition_g)
        rows_fake = activate(raw, spans, noise_g, temperature)
        adversarial = -judge(torch.cat([rows_fake, condition_g], 1)).mean()
        entropy = 0.0
        for (start, end), (first, last) in condition_spans:
            wanted = condition_g[:, first:last]
            entropy = entropy - (wanted * torch.log_softmax(raw[:, start:end], dim=1)).sum() / len(raw)
        loss_g = adversarial + entropy
        loss_g.backward()
        optimizer_g.step()
        record(
            logs,
            loss_d=loss_d,
            logits_real=mean_real,
            logits_fake=mean_fake,
            penalty=penalty,
            loss_g=loss_g,
            adversarial=adversarial,
            entropy=entropy,
        )
    return logs


def magvit2(
    autoencoder,
    discriminator,
    data,
    *,
    lr=1e-4,
    perceptual=None,
    form="hinge",
    betas=(0.5, 0.9),
    adversarial_weight=0.1,
    perceptual_weight=1.0,
    codebook_weight=0.1,
    commitment_weight=0.25,
    lecam_weight=0.05,
    lecam_decay=0.999,
    ema_decay=0.999,
):
    """Open-MAGVIT2's tokenizer: autoencoder, then D on the same output, with LeCam and a fixed adversarial weight.

    Args:
        autoencoder: maps images to (reconstruction, {"codebook": scalar, "commitment": scalar}); the codebook term is
            the entropy loss there.
        discriminator: returns logits, (n, 1, h, w) or any shape that starts with n.
        data: one batch of images per step.
        lr: of both players.
        perceptual: callable (images, reconstruction) -> distances whose mean is added to the L1 distance, or None.
        form: of D's loss, "hinge" with the factor 0.5 (the authors' setting) or "non_saturating" on mean logits.
        betas: of both players' Adam.
        adversarial_weight: of G's non-saturating loss on the mean logit of each image.
        perceptual_weight: of the perceptual term.
        codebook_weight: of the codebook term.
        commitment_weight: of the commitment term.
        lecam_weight: of LeCam, whose averages start at 0, are updated before use, and compare with every logit.
        lecam_decay: of the averages.
        ema_decay: of the average of the autoencoder's parameters, which starts as a copy.

    Returns:
        The logs, and a dict from the names of the autoencoder's parameters to their averages.
    """
    logs = {}
    optimizer_g = Adam(autoencoder.parameters(), lr=lr, betas=betas)
    optimizer_d = Adam(discriminator.parameters(), lr=lr, betas=betas)
    averages = {name: parameter.detach().clone() for name, parameter in autoencoder.named_parameters()}
    anchor_real, anchor_fake = 0.0, 0.0
    for real in data:
        fake, quantizer = autoencoder(real)

        optimizer_g.zero_grad()
        nll = (real - fake).abs().mean()
        if perceptual is not None:
            nll = nll + perceptual_weight * perceptual(real, fake).mean()
        adversarial = F.softplus(-discriminator(fake).flatten(1).mean(1)).mean()
        loss_g = (
            nll
            + adversarial_weight * adversarial
            + codebook_weight * quantizer["codebook"]
            + commitment_weight * quantizer["commitment"]
        )
        loss_g.backward()
        optimizer_g.step()

        optimizer_d.zero_grad()
        logits_real, logits_fake = discriminator(real), discriminator(fake.detach())
        anchor_real = lecam_decay * anchor_real + (1 - lecam_decay) * logits_real.mean().item()
        anchor_fake = lecam_decay * anchor_fake + (1 - lecam_decay) * logits_fake.mean().item()
        lecam = (F.relu(logits_real - anchor_fake) ** 2).mean() + (F.relu(anchor_real - logits_fake) ** 2).mean()
        if form == "hinge":
            judged = 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
        else:
            judged = (
                F.softplus(-logits_real.flatten(1).mean(1)).mean() + F.softplus(logits_fake.flatten(1).mean(1)).mean()
            )
        loss_d = judged + lecam_weight * lecam
        loss_d.backward()
        optimizer_d.step()

        average(averages, autoencoder, ema_decay)
        record(
            logs,
            loss_g=loss_g,
            nll=nll,
            adversarial=adversarial,
            codebook=quantizer["codebook"],
            commitment=quantizer["commitment"],
            loss_d=loss_d,
            judged=judged,
            lecam=lecam,
            anchor_real=anchor_real,
            anchor_fake=anchor_fake,
        )
    return logs, averages
