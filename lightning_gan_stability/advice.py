"""What to do about each trouble that a monitor names: the one place where it is written.

Where methods against one trouble were measured beside each other, advice names them in that order, the best first. The
measurements are in docs/measured.md, and tests/test_advice.py compares both.
"""

#: Of images, where it has been measured; Unrolling is behind there, but holds the modes of the ring as well as Packed.
KEEP_MODES = "wrap the discriminator in Packed, or add R1Penalty and R2Penalty with the Relativistic loss"
OF_POINTS = "Unrolling(10) helps as well where samples are points in a few dimensions."

#: By the verdicts of HealthMonitor.
HEALTH = {
    "vanishing_gradient": "Use the NonSaturating or Relativistic loss, or add R1Penalty or SpectralNorm.",
    "exploding_gradient": "Add R1Penalty and R2Penalty, or set `clip_norm`.",
    "noisy_gradient": "Use larger batches or `accumulate`, add GeneratorEMA, or lower the generator's learning rate.",
    "weak_discriminator": "Add UpdateRatio(d_steps=2), raise `d_optimizer`'s learning rate, or weaken D's penalties.",
    "oscillation": "The players circle. Add R1Penalty, Extragradient or Lookahead, or use OptimisticAdam.",
    "overfitting_discriminator": "D learns the data by heart. Show it augmented images (`augment`: DiffAugment), or "
    "add ConsistencyPenalty('balanced'), AdaptiveAugmentation, or more data.",
    "silent_adversarial": "Raise the weight of the adversarial loss (`g_weight`), or add AdaptiveAdversarialWeight.",
    "dominant_adversarial": "Lower the adversarial weight, or fix its share by AdaptiveAdversarialWeight or "
    "LossBalancer, or let D rest: AdaptiveUpdateRatio(generator_rests='adversarial').",
    "head_start": "Let D train later (a smaller `discriminator_first` of AdversarialStart) or more slowly "
    "(`d_optimizer`), or let the adversarial weight rise over more steps (its `ramp`).",
    "codebook_collapse": "Codes lie idle: restart those that are not used, let the codebook follow a moving average, "
    "normalize codes or make them shorter, or lower the weight of the commitment loss.",
    "giveaway": "The discriminator can win by one number of a sample: take the difference out of the data, or let the "
    "generator make it.",
    "not_finite": "Lower the learning rates, set `clip_norm`, add R1Penalty, or CollapseDetector(action='rollback').",
    "loss_tells_nothing": "For information: do not select by loss. Let ModelCheckpoint monitor 'quality/fid'.",
}

#: By the verdicts of CollapseDetector.
COLLAPSE = {
    "collapse": f"To keep modes, {KEEP_MODES}. {OF_POINTS}",
    "partial collapse": f"To keep modes, {KEEP_MODES}, or lower the learning rates. {OF_POINTS}",
    "mode hopping": "Wrap the discriminator in Packed, or let it learn faster (`d_optimizer`), with a higher gamma of "
    f"R1Penalty and R2Penalty. {OF_POINTS}",
    "divergence": "Lower the learning rates, set `clip_norm`, or add R1Penalty.",
    "no variation": f"Compare both players' learning rates, {KEEP_MODES}.",
    "never learned": "Compare both players' learning rates, add R1Penalty, and look at the data as they are loaded.",
    "ignored condition": "Let `discriminate` see the condition beside the sample, or add a loss between both.",
    "class collapse": "Add R1Penalty and R2Penalty; look at the number of samples of the class, and at its labels.",
}

#: Of MemorizationMonitor.
MEMORIZATION = (
    "Look at the pictures of the nearest pairs. Train on more data, let the discriminator see augmented samples "
    "(`GANModule(augment=...)` or AdaptiveAugmentation), take a smaller generator, or stop earlier."
)

#: By the verdicts of all of them.
ADVICE: dict[str, str] = {**HEALTH, **COLLAPSE, "memorization": MEMORIZATION}
