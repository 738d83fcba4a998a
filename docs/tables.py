"""The tables of the documentation as data, which tests compare with the package, and their rendering."""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import lightning_gan_stability
from lightning_gan_stability import metrics
from lightning_gan_stability.advice import COLLAPSE, HEALTH, MEMORIZATION

ROOT = Path(__file__).parent.parent

# ---------- methods


class Paper(NamedTuple):
    """A paper by its number on arXiv, and the part of a method that comes from it, if not all of it does."""

    number: str
    label: str = ""

    @property
    def link(self) -> str:
        """The label and the number, which leads to the paper."""
        return f"{self.label} [{self.number}](https://arxiv.org/abs/{self.number})".strip()


@dataclass(frozen=True)
class Method:
    """One row: a method under one or several names, its papers, its formula and its tests.

    Args:
        names: public names of the package, or of its metrics.
        papers: the papers that define it; the docstring names them too.
        formula: the formula, and the convention where papers and codes differ.
        tests: ``file::test`` of those that compare it with something outside the code.
        instead_of_none: arguments with the default None for which an instance has a value, the one to be shown.
    """

    names: Sequence[str]
    papers: Sequence[Paper]
    formula: str
    tests: Sequence[str]
    instead_of_none: Sequence[str] = ()

    @property
    def objects(self) -> list[Any]:
        """The classes and functions of these names."""
        return [getattr(lightning_gan_stability, name, None) or getattr(metrics, name) for name in self.names]

    @property
    def defaults(self) -> dict[str, Any]:
        """Arguments and their defaults, by the signatures; where None stands for a value, that value."""
        found: dict[str, Any] = {}
        for kind in self.objects:
            for name, default in defaults_of(kind).items():
                if name in self.instead_of_none:
                    default = getattr(kind(), name)
                if default is not None:
                    found.setdefault(name, default)
        return found


def defaults_of(kind: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a signature that have a default."""
    parameters = inspect.signature(kind).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


METHODS: dict[str, list[Method]] = {
    "Losses": [
        Method(
            ["Minimax"],
            [Paper("1406.2661")],
            "L_D = E_r sp(−l) + E_f sp(l), L_G = −E_f sp(l); no ½",
            ["test_losses.py::test_minimax_optimum_is_log4_minus_2js"],
        ),
        Method(
            ["NonSaturating"],
            [Paper("1406.2661"), Paper("1606.03498", "smoothing")],
            "L_D = E_r [α sp(−l) + (1 − α) sp(l)] + E_f sp(l), L_G = E_f sp(−l); no ½; α is `real_label`, fake "
            "labels stay 0",
            ["test_losses.py::test_smoothed_optimum_is_alpha_p_over_p_plus_q"],
        ),
        Method(
            ["LeastSquares"],
            [Paper("1611.04076")],
            "L_D = ½ E_r (l − b)² + ½ E_f (l − a)², L_G = ½ E_f (l − c)²; of logits, with the paper's ½",
            ["test_losses.py::test_least_squares_optimum", "test_losses.py::test_least_squares_generator_is_pearson"],
        ),
        Method(
            ["Wasserstein"],
            [Paper("1701.07875")],
            "L_D = E_f l − E_r l, L_G = −E_f l; the Lipschitz constraint is another entry",
            ["test_losses.py::test_wasserstein_is_the_difference_of_means"],
        ),
        Method(
            ["Hinge"],
            [Paper("1705.02894")],
            "L_D = E_r max(0, 1 − l) + E_f max(0, 1 + l), L_G = −E_f l; no ½",
            ["test_losses.py::test_hinge_optimum_is_twice_one_minus_tv"],
        ),
        Method(
            ["BoundaryEquilibrium"],
            [Paper("1703.10717")],
            "L_D = 𝓛(x) − k 𝓛(G(z)), L_G = 𝓛(G(z)), k ← clip(k + λ (γ 𝓛(x) − 𝓛(G(z))), 0, 1); 𝓛 is the mean "
            "absolute error of a reconstruction, by one discriminator; k is updated after the step of D",
            ["test_losses.py::test_began_k_has_its_closed_form"],
        ),
        Method(
            ["Relativistic"],
            [Paper("1807.00734"), Paper("2501.05441")],
            "L_D = E sp(−(l_r − l_f)), L_G = E sp(l_r − l_f); pairs by index",
            ["test_losses.py::test_relativistic_optimum_is_log_ratio_up_to_a_constant"],
        ),
        Method(
            ["RelativisticAverage"],
            [Paper("1807.00734")],
            "L_D = ½ [E_r sp(−(l − m_f)) + E_f sp(l − m_r)], L_G with real and fake exchanged; with this ½; the "
            "gradient flows through the means m",
            ["test_losses.py::test_values_per_element"],
        ),
        Method(
            ["FDivergence"],
            [Paper("1606.00709")],
            "L_D = −E_r g(v) + E_f f∗(g(v)), L_G = −E_f f∗(g(v)), or −E_f g(v) if not `saturating`; v is the logit; "
            "eight divergences",
            ["test_losses.py::test_f_divergence_identity"],
        ),
    ],
    "Penalties": [
        Method(
            ["R1Penalty"],
            [Paper("1801.04406")],
            "d: γ/2 · E_r ‖∇ₓD(x)‖², with the paper's ½ (the authors' code has none: its 10 is 20 here)",
            [
                "test_regularizers.py::test_one_step_on_a_linear_critic",
                "test_dirac.py::test_r1_contracts_at_the_rate_of_its_eigenvalues",
            ],
        ),
        Method(
            ["R2Penalty"],
            [Paper("1801.04406"), Paper("2501.05441")],
            "d: γ/2 · E_f ‖∇ₓD(x)‖², the rest as for R1",
            [
                "test_regularizers.py::test_one_step_on_a_linear_critic",
                "test_dirac.py::test_a_relativistic_loss_with_r1_and_r2_doubles_gamma",
            ],
        ),
        Method(
            ["GradientPenalty"],
            [Paper("1704.00028"), Paper("1709.08894", "one-sided"), Paper("1902.03984", "zero-centred")],
            "d: weight · E(‖∇ₓD(x̂)‖ − target)², no ½; x̂ = αx + (1 − α)G(z), one α for each sample; one-sided: "
            "max(0, ‖∇ₓD(x̂)‖ − target)²",
            [
                "test_regularizers.py::test_one_step_on_a_linear_critic",
                "test_regularizers.py::test_zero_centred_on_interpolates",
            ],
        ),
        Method(
            ["DRAGANPenalty"],
            [Paper("1705.07215")],
            "d: weight · E(‖∇ₓD(x̂)‖ − target)², no ½; x̂ = x + ½·α·std(x)·u, as in the authors' code: std is that "
            "of all values of the batch, u ~ U[0, 1)",
            [
                "test_penalties.py::test_perturbed_points_against_numpy",
                "test_regularizers.py::test_one_step_on_a_linear_critic",
            ],
        ),
        Method(
            ["ApproximateR1Penalty", "ApproximateR2Penalty"],
            [Paper("2501.08316")],
            "d: weight · E(l(x) − l(x + σ n))², n ~ N(0, I), over real samples (R1) or generated ones (R2); γ ≈ 2 · "
            "weight · σ²",
            ["test_regularizers.py::test_approximate_penalties_on_a_linear_critic"],
        ),
        Method(
            ["LeCam"],
            [Paper("2104.03310")],
            "d: weight · E[relu(l(x) − α_F)² + relu(α_R − l(G(z)))²], α running means of the logits of each "
            "discriminator; with the relu of the authors' code",
            ["test_regularizers.py::test_lecam_against_the_authors_recursion"],
        ),
        Method(
            ["ConsistencyPenalty"],
            [Paper("1910.12027"), Paper("2002.04724", "balanced and latent")],
            'd: weight · E(l(x) − l(T(x)))² over real samples; `"balanced"`: plus the same over generated ones; '
            '`"latent"` (weight 20): of l(G(z)) and l(G(z + δ)), δ ~ N(0, `radius`²), and with `player="g"` (weight '
            "0.5) −weight · E(G(z) − G(z + δ))², a mean over values",
            [
                "test_regularizers.py::test_consistency_of_mirrored_and_moved_images",
                "test_regularizers.py::test_latent_consistency_of_both_players",
            ],
            instead_of_none=["weight", "radius"],
        ),
        Method(
            ["OrthogonalPenalty"],
            [Paper("1809.11096")],
            "the loss of `player`: weight · Σ ‖(W Wᵀ) ⊙ (1 − I)‖_F² over weight matrices (out, rest), without the ½ "
            "of the authors' code; `off_diagonal=False`: ‖W Wᵀ − I‖_F²",
            ["test_penalties.py::test_orthogonality_and_its_gradient"],
        ),
        Method(
            ["PathLengthPenalty"],
            [Paper("1912.04958")],
            "g: weight · E(‖J_zᵀ y‖ − a)², a the running mean of the lengths, y noise of variance 1 / pixels; with "
            "respect to z itself, or to w; `include_batch`: a has the batch in it, as in the authors' code",
            [
                "test_regularizers.py::test_path_length_against_a_linear_generator",
                "test_stylegan2.py::test_stylegan2_equals_its_reference",
            ],
        ),
        Method(
            ["ModeSeeking"],
            [Paper("1903.05628")],
            "g: weight / (mean distance of G(z₁) and G(z₂) / mean distance of z₁ and z₂ + 10⁻⁵); mean absolute "
            "distances over the batch",
            ["test_regularizers.py::test_mode_seeking_of_a_scaled_identity"],
        ),
        Method(
            ["LogitDrift"],
            [Paper("1710.10196")],
            "d: weight · E_r l², no ½",
            ["test_regularizers.py::test_logit_drift"],
        ),
        Method(
            ["FeatureMatching"],
            [Paper("1512.09300"), Paper("1711.11585", "the form"), Paper("2010.05646")],
            "g: weight · Σ over discriminators and layers of the mean of abs(F(x) − F(G(z))), real features without "
            "gradient, both augmented by the same draws; `layer_weights`, `discriminator_weights`",
            [
                "test_feature_matching.py::test_the_sum_of_mean_absolute_differences",
                "test_feature_matching.py::test_named_layers_are_those_that_a_discriminator_returns",
            ],
        ),
        Method(
            ["Reconstruction"],
            [Paper("1611.07004")],
            "g: weight · mean of abs(G(x) − x), or another `distance`, of whatever lies at `sample` and `target`; "
            "summed over leaves",
            ["test_reconstruction.py::test_distances", "test_recipes.py::test_recipe_equals_its_reference"],
        ),
    ],
    "Recipes": [
        Method(
            ["Tokenizer"],
            [Paper("2012.09841")],
            "L_D = ½ (E_r max(0, 1 − l) + E_f max(0, 1 + l)), L_G = −E_f l + codebook; reads what it reconstructs",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["Codec"],
            [Paper("2306.06546")],
            "L_D = Σ (E_r (1 − l)² + E_f l²), L_G = Σ E_f (1 − l)² + ¼ commitment + codebook; discriminators see "
            "waveforms without mean, at a peak of 0.8",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["Vocoder"],
            [Paper("2010.05646")],
            "L_D = Σ (E_r (1 − l)² + E_f l²), L_G = Σ E_f (1 − l)², of waveforms made from spectrograms",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["SuperResolution"],
            [Paper("2107.10833")],
            "L_G = 0.1 E_f sp(−l), before L_D = E_r sp(−l) + E_f sp(l)",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["PairedTranslation"],
            [Paper("1611.07004")],
            "L_D = ½ (E_r sp(−l) + E_f sp(l)), L_G = E_f sp(−l), of source and image together",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["UnpairedTranslation"],
            [Paper("1703.10593")],
            "L_G = Σ E_f (1 − l)², before L_D = ½ Σ (E_r (1 − l)² + E_f l²), over two domains; cycles and identities "
            "are extras",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["TableSynthesis"],
            [Paper("1907.00503"), Paper("1712.04086", "packs")],
            "L_D = E_f l − E_r l, L_G = −E_f l + cross entropy of the requested category; Gumbel-softmax at 0.2",
            ["test_recipes.py::test_recipe_equals_its_reference"],
        ),
        Method(
            ["LogMelSpectrogram"],
            [Paper("2010.05646")],
            "log max(M abs(STFT x), floor), with Slaney's filters of equal areas; magnitudes √(re² + im² + 10⁻⁹), or "
            "plain ones if `center`",
            ["test_audio.py::test_the_spectrogram_is_that_of_hifi_gan"],
        ),
        Method(
            ["MelDistance"],
            [Paper("2306.06546"), Paper("2010.05646", "one window")],
            "Σ over windows of the mean absolute difference of logarithmic mel spectrograms",
            [
                "test_audio.py::test_the_mel_distance_is_that_of_dac",
                "test_audio.py::test_the_mel_distance_is_that_of_hifi_gan",
            ],
        ),
        Method(
            ["STFTDistance"],
            [Paper("1910.11480")],
            "mean over windows of ‖Y − X‖ / ‖Y‖ + E abs(log Y − log X), of magnitudes X of the sample and Y of the "
            "target",
            ["test_audio.py::test_the_stft_distance_is_that_of_numpy"],
        ),
    ],
    "Update rules": [
        Method(
            ["Alternating"],
            [Paper("1406.2661")],
            "each player of `module.plan` in turn, D first; the default rule; factor 1: it rotates; "
            "`share_fake`: samples are made once, before either steps",
            ["test_xy.py::test_alternating_cycles", "test_sharing.py::test_shared_samples_by_hand"],
        ),
        Method(
            ["Simultaneous"],
            [Paper("1705.10461")],
            "both gradients before either step; factor √(1 + η²): it diverges",
            ["test_xy.py::test_simultaneous_diverges"],
        ),
        Method(
            ["Extragradient"],
            [Paper("1802.10551"), Paper("1905.11373", "the same batch twice")],
            "w½ = w + u(v(w)), w ← w + u(v(w½)), u any optimizer's step; factor √(1 − η² + η⁴)",
            ["test_xy.py::test_extragradient", "test_update_rules.py::test_extragradient_with_any_optimizer"],
        ),
        Method(
            ["Unrolling"],
            [Paper("1611.02163")],
            "d/dθ L_G(θ, ψ_K(θ)) after K = `steps` steps of D's own optimizer, through which the gradient flows; "
            '`objective="saddle"`: the paper\'s −L_D',
            [
                "test_unrolling.py::test_gradient_for_every_inner_optimizer",
                "test_xy.py::test_unrolled_simultaneously",
                "test_xy.py::test_published_numbers_of_unrolling",
            ],
        ),
        Method(
            ["ConsensusOptimization"],
            [Paper("1705.10461")],
            "w = v + γ Jᵥᵀv, the gradient of γ/2 · ‖v‖² added to both players', with the paper's ½; factor √((1 − "
            "ηγ)² + η²)",
            ["test_update_rules.py::test_consensus_against_the_dense_jacobian", "test_xy.py::test_consensus"],
        ),
        Method(
            ["CompetitiveGradientDescent"],
            [Paper("1905.12103"), Paper("1910.05852", "`adaptive`")],
            "(I + η_g η_d D_θψ D_ψθ) dθ = ∇_θ L_G − η_d D_θψ ∇_ψ L_D; θ ← θ − η_g dθ; likewise ψ; zero-sum losses "
            "alone; factor 1/√(1 + η²)",
            [
                "test_update_rules.py::test_competitive_against_the_dense_solution",
                "test_xy.py::test_competitive_is_the_proximal_point",
            ],
        ),
    ],
    "Optimizers": [
        Method(
            ["OptimisticSGD"],
            [Paper("1711.00141")],
            "w ← w − 2η gₜ + η gₜ₋₁, a plain first step",
            ["test_xy.py::test_optimistic"],
        ),
        Method(
            ["OptimisticAdam"],
            [Paper("1711.00141")],
            "the same with Adam's direction; weight decay as in Adam, not AdamW",
            ["test_optim.py::test_optimistic_adam"],
        ),
        Method(
            ["NegativeMomentum"],
            [Paper("1807.04740")],
            "Δₜ₊₁ = β Δₜ − η gₜ, w ← w + Δₜ₊₁: heavy ball, β in (−1, 1)",
            ["test_xy.py::test_alternating_negative_momentum_converges"],
        ),
    ],
    "Balance": [
        Method(
            ["UpdateRatio"],
            [Paper("1701.07875")],
            "D steps on `d_steps` batches, G `g_steps` times on the last of them; `warm_up`: 100 steps of D for the "
            "first 25 cycles and every 500th",
            ["test_update_ratio.py::test_ratio", "test_update_ratio.py::test_warm_up_is_the_wasserstein_gans"],
        ),
        Method(
            ["AdaptiveUpdateRatio"],
            [Paper("2008.12463", '`"loss_change"`')],
            'above `high` D pauses, below `low` G pauses; the `rule` compares `"accuracy"`, `"loss_change"` (log r_g '
            '/ r_d), `"logit_gap"` (E l(x) − E l(G(z))) or `"gradient_norm"`; each rule has its own `low`, `high` '
            "and `hysteresis`, here those of accuracy",
            [
                "test_update_ratio.py::test_loss_change",
                "test_update_ratio.py::test_logit_gap_is_hypergans_rule",
                "test_update_ratio.py::test_gradient_norm_is_symmetric",
            ],
            instead_of_none=["low", "high", "hysteresis"],
        ),
        Method(
            ["AdversarialStart"],
            [Paper("2012.09841"), Paper("1910.11480")],
            "before the start D neither runs nor steps; G's adversarial terms rise over `ramp` batches; or when "
            "the mean of `monitor` over `window` batches has not improved for `patience` of them",
            [
                "test_adversarial_start.py::test_across_the_start_by_hand",
                "test_adversarial_start.py::test_a_plateau",
            ],
        ),
        Method(
            ["AdaptiveAdversarialWeight"],
            [Paper("2012.09841")],
            "weight · clamp(‖∇_W L_other‖ / (‖∇_W L_adversarial‖ + 10⁻⁴), 0, max), W the parameters of one layer",
            [
                "test_adversarial_weight.py::test_the_ratio_of_gradient_norms",
                "test_recipes.py::test_recipe_equals_its_reference",
            ],
        ),
        Method(
            ["LossBalancer"],
            [Paper("2210.13438")],
            "total_norm · w_i / Σ w_j / (n̄_i + 10⁻¹²), n̄ the running mean of the norm of a term's gradient by a sample",
            [
                "test_adversarial_weight.py::test_the_self_test_of_the_authors",
                "test_recipes.py::test_recipe_equals_its_reference",
            ],
        ),
        Method(
            ["FakePool"],
            [Paper("1612.07828"), Paper("1703.10593", "the rule")],
            "once `size` samples are stored, D sees one of them with `probability`, and the new one replaces it; "
            "otherwise D sees the new one, which is not stored",
            ["test_fake_pool.py::test_the_rule", "test_recipes.py::test_recipe_equals_its_reference"],
        ),
    ],
    "Augmentation, schedules": [
        Method(
            ["DiffAugment"],
            [Paper("2006.10738")],
            "colour, translation by up to an eighth of the size, cutout of a half, of every real and generated image",
            [
                "test_augment.py::test_colours_of_diff_augment",
                "test_augment.py::test_translations_of_diff_augment",
                "test_augment.py::test_boxes_of_diff_augment",
                "test_augment.py::test_distributions_of_diff_augment",
            ],
        ),
        Method(
            ["AugmentPipe"],
            [Paper("2006.06676")],
            "each transform with probability `p` times its multiplier; one resampling for all of geometry",
            [
                "test_augment.py::test_rotations",
                "test_augment.py::test_colours",
                "test_augment.py::test_bands",
                "test_augment.py::test_distributions",
                "test_augment.py::test_probabilities",
            ],
        ),
        Method(
            ["AdaptiveAugmentation"],
            [Paper("2006.06676")],
            "p ← max(p + sign(r − `target`) · n / `speed`, 0), r = E sign(l(x)) over `interval` batches of n samples",
            [
                "test_augment.py::test_p_follows_the_rule",
                "test_augment.py::test_overfitting_comes_to_its_target",
            ],
        ),
        Method(
            ["AugmentationSchedule"],
            [Paper("2501.05441")],
            "the probability of an `AugmentPipe` follows a `Schedule`",
            ["test_augment.py::test_augmentation_schedule"],
        ),
        Method(
            ["InstanceNoise"],
            [Paper("1610.04490"), Paper("1701.04862")],
            "D sees x + σ ε; σ falls from `std` to 0 over `steps` batches",
            ["test_augment.py::test_instance_noise"],
        ),
        Method(
            ["Schedule"],
            [Paper("2501.05441")],
            "v(t) = start + ½ (1 − cos(π t / steps)) (end − start), with warm-up and hold, or in a line",
            ["test_schedules.py::test_cosine", "test_schedules.py::test_values_of_the_published_presets"],
        ),
        Method(
            ["OptimizerSchedule"],
            [Paper("2501.05441")],
            "numbers of parameter groups follow a `Schedule`, set before every batch",
            ["test_schedules.py::test_optimizers_step_with_the_numbers_of_their_batch"],
        ),
    ],
    "Normalization, averages, packs": [
        Method(
            ["SpectralNorm"],
            [Paper("1802.05957")],
            "W̄ = factor · W / σ(W); a kernel is the matrix (out, in · height · width), of a transposed convolution "
            "in groups torch's (out / groups, in · height · width); `n_power_iterations` per forward pass in train "
            "mode",
            ["test_spectral_norm.py::test_singular_values_are_the_factor"],
        ),
        Method(
            ["WeightClipping"],
            [Paper("1701.07875")],
            "every parameter that is not frozen to [−limit, limit], after each step, biases included",
            ["test_spectral_norm.py::test_weights_are_clipped_after_every_step"],
        ),
        Method(
            ["GeneratorEMA"],
            [Paper("1806.04498")],
            "θ̄ ← β θ̄ + (1 − β) θ after steps of G; β = ½^(1/`half_life`), or `decay`; buffers are those of G; a "
            "run starts from a copy of G, with `restart=False` from the average that the module has",
            ["test_averaging.py::test_average_follows_its_recursion"],
            instead_of_none=["decay"],
        ),
        Method(
            ["Lookahead"],
            [Paper("2006.14567")],
            "every k steps of G s ← s + α (w − s), w ← s, both players together",
            [
                "test_xy.py::test_lookahead_over_simultaneous",
                "test_averaging.py::test_lookahead_pulls_both_players_together",
            ],
        ),
        Method(
            ["Packed"],
            [Paper("1712.04086")],
            "one logit for m samples, concatenated along features or channels; a pack counts as one sample in "
            "losses and penalties",
            ["test_layers.py::test_a_step_is_that_of_a_plain_gan_whose_samples_are_packs"],
        ),
        Method(
            ["MinibatchStdDev"],
            [Paper("1710.10196"), Paper("1912.04958", "groups of")],
            "further channels: √(Var + 10⁻⁸) over a group of samples i, i + N / G, ..., the mean over its pixels and "
            "channels; the variance divides by G",
            [
                "test_layers.py::test_minibatch_deviations_are_those_of_strided_groups",
                "test_layers.py::test_minibatch_deviations_equal_numpy",
            ],
        ),
    ],
    "Samples": [
        Method(
            ["DiscriminatorRejection"],
            [Paper("1810.06758")],
            "accepted with a / (a + (1 − a) e^γ), a = exp(l − l_M), l_M the largest l; the paper's σ(F), without its ε",
            [
                "test_rejection.py::test_gamma_as_a_percentile",
                "test_rejection.py::test_rejection_draws_from_the_data",
                "test_rejection.py::test_one_in_m_is_accepted",
                "test_rejection.py::test_gamma_as_in_the_paper",
            ],
        ),
        Method(
            ["MetropolisHastings"],
            [Paper("1811.11357")],
            "from x to x′ with min(1, exp(l(x′) − l(x))), `steps` times, starting from a generated sample where the "
            "paper takes a real one; l calibrated by logistic regression",
            [
                "test_rejection.py::test_chains_end_in_the_data",
                "test_rejection.py::test_one_step_of_a_chain",
                "test_rejection.py::test_calibrated_logits",
            ],
        ),
    ],
    "Metrics": [
        Method(
            ["frechet_distance", "frechet_from_moments", "FrechetDistance"],
            [Paper("1706.08500")],
            "‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½), unbiased covariances, float64",
            [
                "test_metrics.py::test_frechet_distance_is_that_of_scipy",
                "test_metrics.py::test_frechet_distance_is_that_of_torchmetrics",
                "test_metrics.py::test_frechet_distance_of_gaussians",
            ],
        ),
        Method(
            ["kernel_distance", "KernelDistance"],
            [Paper("1801.01401")],
            "unbiased MMD² with the kernel (a·b/d + 1)³; one estimate from all samples, or the mean over `subsets`",
            ["test_metrics.py::test_kernel_distance_is_that_of_torchmetrics_and_torch_fidelity"],
        ),
        Method(
            ["precision_recall", "PrecisionRecall"],
            [Paper("1904.06991")],
            "shares within the k-th neighbour's distance; the distance itself is within, a sample is not its own "
            "neighbour",
            ["test_metrics.py::test_precision_and_recall_are_those_of_torch_fidelity"],
        ),
        Method(
            ["density_coverage", "DensityCoverage"],
            [Paper("2002.09797")],
            "real balls around a fake sample, divided by k; share of balls that hold one; the k-th neighbour itself "
            "is outside",
            ["test_metrics.py::test_neighbours_are_those_of_prdc"],
        ),
        Method(
            ["mode_coverage"],
            [Paper("1611.02163")],
            "modes with `least` (⌈0.064 n/K⌉) samples within `radius` standard deviations; reverse KL Σ p log(K p) "
            "in nats",
            ["test_metrics.py::test_modes_by_centres", "test_metrics.py::test_a_perfect_generator"],
        ),
        Method(
            ["bin_difference"],
            [Paper("1805.12462")],
            "share of K-means bins that differ by a two-proportion z-test, Jensen–Shannon divergence of the "
            "histograms in nats",
            [
                "test_metrics.py::test_bins_of_equal_distributions_differ_by_chance",
                "test_metrics.py::test_bins_of_a_lost_mode_differ",
            ],
        ),
        Method(
            ["birthday_support"],
            [Paper("1706.08224")],
            "s²/(2 log 2), s the median number of samples that are drawn until two are duplicates",
            ["test_metrics.py::test_birthdays"],
        ),
        Method(
            ["expected_best"],
            [Paper("1711.10337")],
            "Σ xᵢ C(n − 1 − i, k − 1) / C(n, k) over the n values in order, best first: the expected best of k trials",
            ["test_sweep.py::test_the_best_of_k_is_that_of_all_choices"],
        ),
        Method(
            ["pairwise_diversity"],
            [],
            "mean Euclidean distance of two distinct samples",
            ["test_metrics.py::test_diversity"],
        ),
        Method(
            ["latent_sensitivity"],
            [],
            "mean over samples of ‖∂G/∂z‖_F",
            [
                "test_metrics.py::test_sensitivity_against_differences",
                "test_metrics.py::test_sensitivity_of_a_linear_generator",
            ],
        ),
        Method(
            ["memorization_test"],
            [Paper("2004.05675")],
            "rank test of distances to the nearest training sample, of generated against held-out samples; for the "
            "`quantile` nearest, the negative hypergeometric number of generated ones that are nearer",
            [
                "test_memorization.py::test_p_values_are_those_of_all_permutations",
                "test_memorization.py::test_a_tenth_of_copies_is_found",
            ],
        ),
        Method(
            ["copying_test"],
            [Paper("1705.07663")],
            "distances of training and of held-out samples to the nearest generated one, whose order is random without "
            "copies; negative hypergeometric number of training samples before the r-th held-out one, r = 1, 2, 4, 8",
            [
                "test_memorization.py::test_p_values_of_copying_are_those_of_all_labels",
                "test_memorization.py::test_no_generator_that_copies_nothing_is_accused",
            ],
        ),
        Method(
            ["condition_dependence"],
            [Paper("1310.2926")],
            "bias-corrected squared distance correlation of conditions and samples; permutation tests of shuffled "
            "pairs, and of exchanged real and generated samples",
            [
                "test_conditions.py::test_the_correlation_of_gaussians",
                "test_conditions.py::test_the_p_value_is_that_of_all_permutations",
                "test_conditions.py::test_the_p_value_of_less_dependence_is_that_of_all_exchanges",
            ],
        ),
        Method(
            ["class_report"],
            [],
            "for each class, the share of samples whose `k` nearest real ones are of it, and the mean distance of two "
            "over that of real ones; Fisher's exact test and a permutation test",
            [
                "test_conditions.py::test_majorities_are_those_of_scikit_learn",
                "test_conditions.py::test_p_values_of_shares_are_those_of_fisher",
                "test_conditions.py::test_diversity_and_its_p_value",
            ],
        ),
        Method(
            ["find_giveaways"],
            [Paper("1610.06545"), Paper("2003.01826", "spectrum")],
            "numbers of single samples whose ROC curve has an area of at least `separation`; Mann–Whitney tests at "
            "`level`, by Bonferroni",
            [
                "test_giveaways.py::test_equal_distributions_give_nothing_away",
                "test_giveaways.py::test_statistics_are_those_of_scikit_learn",
                "test_giveaways.py::test_decibels_are_those_of_numpy",
            ],
        ),
        Method(
            ["checkpoint_fluctuation"],
            [],
            "⅔ mean of (x_t − ½ (x_{t−1} + x_{t+1}))² over checkpoints t, over the variance of samples",
            [
                "test_fluctuation.py::test_values_are_those_of_numpy",
                "test_fluctuation.py::test_independent_checkpoints_have_their_variance",
            ],
        ),
        Method(
            ["LogMelDistance"],
            [],
            "`MelDistance`, averaged over samples",
            ["test_paired_metrics.py::test_the_distance_is_the_mean_over_samples_of_unequal_batches"],
        ),
        Method(
            ["CodebookUsage"],
            [],
            "share of codes that were used, averaged over codebooks",
            ["test_paired_metrics.py::test_several_books_are_averaged"],
        ),
        Method(
            ["CodebookPerplexity"],
            [Paper("1711.00937")],
            "exp(−Σ p log p) of the shares of codes, averaged over codebooks",
            ["test_paired_metrics.py::test_the_perplexity_is_that_of_scipy"],
        ),
        Method(
            ["marginal_distances"],
            [],
            "each column's Kolmogorov–Smirnov statistic, or total variation if it is discrete",
            ["test_table_metrics.py::test_marginals_by_hand"],
        ),
        Method(
            ["correlation_difference"],
            [],
            "mean absolute difference of the associations of pairs: Pearson's r, Cramér's V, correlation ratio η",
            [
                "test_table_metrics.py::test_two_discrete_columns_have_cramers_v",
                "test_table_metrics.py::test_a_discrete_and_a_continuous_column_have_the_correlation_ratio",
            ],
        ),
        Method(
            ["efficacy"],
            [Paper("1907.00503")],
            "mean score on real rows of three models that learned from synthetic rows, over that after real ones",
            ["test_table_metrics.py::test_real_rows_are_worth_as_much_as_real_rows"],
        ),
        Method(
            ["energy_distance"],
            [],
            "2 E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ over all pairs",
            ["test_autopilot.py::test_the_energy_distance_is_that_of_scipy"],
        ),
        Method(
            ["Inception"],
            [Paper("1706.08500")],
            "extractor: torch-fidelity's network, images rounded to 8 bits",
            ["test_quality.py::test_inception_of_a_local_file"],
        ),
        Method(
            ["DigitClassifier"],
            [],
            "extractor for scikit-learn's 8×8 digits, trained at the first use",
            ["test_quality.py::test_the_classifier_is_right_on_digits_that_it_has_not_seen"],
        ),
        Method(
            ["RandomConvolutions"],
            [],
            "extractor: three layers of fixed random convolutions, averaged over cells, and the samples' own averages",
            ["test_autopilot.py::test_random_convolutions_tell_a_texture_from_its_mean"],
        ),
    ],
    "Monitors": [
        Method(
            ["QualityMonitor"],
            [Paper("1711.10337")],
            "the metrics above every `every` steps; networks in eval mode, the generator's average if there is one, "
            "the same latents each time",
            ["test_quality.py::test_values_are_those_of_the_functions_on_the_same_samples"],
        ),
        Method(
            ["CollapseDetector"],
            [],
            "acts after `patience` measurements in a row that are bad and show no progress; the docstring defines both",
            [
                "test_collapse.py::test_going_back_is_as_if_it_had_not_happened",
                "test_collapse.py::test_a_rollback_restores_all_that_training_moves",
            ],
        ),
        Method(
            ["Autopilot"],
            [Paper("1603.06560", "successive halving"), Paper("1711.09846"), Paper("1711.10337")],
            "settings are compared from one state; the best 4, 2 and 1 continue for twice the steps each; judged by "
            "the energy distance of the average and of the generator to held-out samples; rates fall at the end",
            [
                "test_autopilot.py::test_a_race_tries_each_setting_from_the_same_state_and_counts_its_batches",
                "test_autopilot.py::test_the_winner_goes_on_from_where_it_was",
                "test_autopilot.py::test_a_healthy_run_is_the_same_with_it",
            ],
        ),
        Method(
            ["ScaleLearningRate"],
            [],
            "a remedy: multiplies the learning rates of one player, or of both, by `factor`",
            ["test_collapse.py::test_remedies_add_up"],
        ),
        Method(
            ["ScalePenalty"],
            [],
            "a remedy: multiplies the weights of all regularizers by `factor`",
            ["test_collapse.py::test_remedies_add_up"],
        ),
        Method(
            ["HealthMonitor"],
            [Paper("1701.04862", "vanishing"), Paper("1705.10461", "oscillation"), Paper("2006.06676", "overfitting")],
            "verdicts from gradients, accuracy, means and deviations of samples, the steps of both players, shares of "
            "the generator's terms in its gradient, and codes; most take `patience` decisions in a row",
            [
                "test_health.py::test_oscillation_has_the_period_of_the_dirac_gan",
                "test_health.py::test_a_rotation_has_its_period",
                "test_health_reconstruction.py::test_shares_are_those_of_the_gradients_by_the_samples",
                "test_health_reconstruction.py::test_perplexity_by_hand",
            ],
        ),
        Method(
            ["MemorizationMonitor"],
            [],
            "`copying_test` every `every` steps, with all training samples; the i-th look speaks at the level "
            "6 `false_alarms` / (π i)²",
            [
                "test_memorization_monitor.py::test_copies_are_said_with_their_share",
                "test_memorization_monitor.py::test_a_perfect_generator_is_never_accused",
                "test_memorization_monitor.py::test_the_pairs_are_the_nearest",
            ],
        ),
        Method(
            ["PairedMonitor"],
            [],
            "metrics of torchmetrics on generated samples and their targets, in every validation",
            ["test_paired_monitor.py::test_values_are_those_of_samples_by_hand"],
        ),
        Method(
            ["TableMonitor"],
            [],
            "marginals, correlations and efficacy of as many synthetic rows as there are real ones, in each validation",
            ["test_paired_monitor.py::test_tables_are_measured_by_the_functions"],
        ),
        Method(
            ["SampleLogger"],
            [],
            "a picture of the same `n` latents and conditions every `every` steps: images, points, vectors, series, "
            "sound, volumes, tables, or by a function",
            [
                "test_samples.py::test_a_frozen_generator_gives_the_same_picture_each_time",
                "test_samples.py::test_networks_batches_and_functions_that_draw_go_on_as_without",
                "test_samples.py::test_sources_generated_samples_and_targets_stand_in_columns",
            ],
        ),
    ],
}

# ---------- strategies and precisions

COLUMNS = ("DDP", "shards", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "compiled")
# The cells that are not "yes". Rows are those of tests/test_compose.py, which has an instance of each.
STRATEGIES: dict[str, dict[str, str]] = {
    "Alternating": {},
    "Alternating, shared": {},
    "Simultaneous": {"16-mixed": "refused"},
    "Extragradient": {"16-mixed": "refused"},
    "Unrolling": {},
    "Unrolling, first order": {},
    "Unrolling, saddle, checkpoint, simultaneous": {"16-mixed": "refused"},
    "ConsensusOptimization": {"shards": "refused", "16-mixed": "refused"},
    "CompetitiveGradientDescent": {"shards": "refused", "16-mixed": "refused"},
    "CompetitiveGradientDescent, adaptive": {"shards": "refused", "16-mixed": "refused"},
    "R1Penalty": {},
    "R2Penalty": {},
    "GradientPenalty": {},
    "GradientPenalty, zero-centred": {},
    "DRAGANPenalty": {},
    "ApproximateR1Penalty": {},
    "ApproximateR2Penalty": {},
    "LeCam": {},
    "ConsistencyPenalty, real": {},
    "ConsistencyPenalty, balanced": {},
    "ConsistencyPenalty, latent": {},
    "OrthogonalPenalty": {},
    "LogitDrift": {},
    "PathLengthPenalty": {},
    "ModeSeeking": {},
    "FeatureMatching": {},
    "Reconstruction": {},
    "Lookahead": {},
    "AdaptiveUpdateRatio": {},
    "WeightClipping": {},
    "SampleLogger": {},
    "HealthMonitor": {},
    "QualityMonitor": {},
    "MemorizationMonitor": {},
    "PairedMonitor": {},
    "CollapseDetector": {},
    "Autopilot": {"shards": "refused"},
    "R1Penalty, separate": {},
    "AdversarialStart": {},
    "AdaptiveAdversarialWeight": {"shards": "refused"},
    "LossBalancer": {},
    "FakePool": {},
    "AdaptiveAugmentation": {},
    "AugmentationSchedule": {},
    "InstanceNoise": {},
    "OptimizerSchedule": {},
    "GeneratorEMA": {},
    "UpdateRatio": {},
    "SpectralNorm": {},
}


def works(method: str, column: str) -> str:
    """A cell: "yes", "refused" or "not tried"."""
    return STRATEGIES[method].get(column, "yes")


# ---------- recipes


@dataclass(frozen=True)
class Recipe:
    """What to add to a run that goes wrong.

    Args:
        symptom: how it goes wrong.
        name: the class to add.
        arguments: its arguments as an entry of ``trainer.callbacks``; None: it is not a callback, or the table has no
            entry.
        configs: config files that use it.
        text: text of the cell, with a placeholder for the entry or the name.
    """

    symptom: str
    name: str
    arguments: dict[str, Any] | None
    configs: Sequence[str] = ()
    text: str = "{}"

    @property
    def entry(self) -> str:
        """The entry as one line of YAML, or the name alone."""
        if self.arguments is None:
            return self.name
        entry = {"class_path": self.name} | ({"init_args": self.arguments} if self.arguments else {})
        return yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=math.inf).strip()


RECIPES = [
    Recipe("Losses oscillate", "R1Penalty", {"gamma": 1.0}, ["configs/digits.yaml"]),
    Recipe(
        "D explodes on generated samples",
        "R2Penalty",
        {"gamma": 1.0},
        ["configs/ring.yaml", "configs/r3gan.yaml"],
        "{} beside R1",
    ),
    Recipe("Modes are lost", "Packed", None, ["configs/ring_pacgan.yaml"], "no callback: the discriminator is {}"),
    Recipe(
        "Modes are lost, by a penalty",
        "R1Penalty",
        {"gamma": 1.0},
        ["configs/digits.yaml", "configs/ring.yaml"],
        "{} and R2, with the Relativistic loss",
    ),
    Recipe(
        "Modes are lost, of points in a few dimensions",
        "Unrolling",
        {"steps": 10},
        ["configs/ring_unrolled.yaml"],
        "{}, or the first",
    ),
    Recipe(
        "The Wasserstein loss needs a constraint",
        "GradientPenalty",
        {"weight": 0.1},
        ["configs/wgan_gp.yaml"],
        "{} (images: 10)",
    ),
    Recipe(
        "The same, as in the first paper on the Wasserstein loss",
        "WeightClipping",
        {"limit": 0.01},
        ["configs/wgan.yaml"],
    ),
    Recipe("D is too steep", "SpectralNorm", {"networks": "discriminator"}, ["configs/sngan.yaml"]),
    Recipe("D's logits drift away", "LogitDrift", {"weight": 0.001}),
    Recipe("Penalties cost too much", "R1Penalty", {"gamma": 1.0, "every": 16}),
    Recipe("Second derivatives are not available", "ApproximateR1Penalty", {"weight": 100.0, "sigma": 0.01}),
    Recipe("D is behind", "UpdateRatio", {"d_steps": 5}, ["configs/wgan.yaml"]),
    Recipe("The players take turns in being ahead", "AdaptiveUpdateRatio", {"rule": "accuracy"}),
    Recipe("Training diverges because of the game's dynamics", "Extragradient", {}, ["configs/extragradient.yaml"]),
    Recipe(
        "The same, by a pull towards stationary points",
        "ConsensusOptimization",
        {"gamma": 10.0},
        ["configs/consensus.yaml"],
    ),
    Recipe("The same, by slow weights of both players", "Lookahead", {"k": 5}, ["configs/lookahead.yaml"]),
    Recipe("Samples flicker from step to step", "GeneratorEMA", {"decay": 0.999}, ["configs/sngan.yaml"]),
    Recipe(
        "There is little data",
        "DiffAugment",
        None,
        [],
        "no callback: `augment` is {}; or `ConsistencyPenalty`, `AdaptiveAugmentation`: [guide](image_gans.md)",
    ),
    Recipe("Samples look like training data", "MemorizationMonitor", None, [], "{}, with held-out data"),
    Recipe("The latents have no influence", "ModeSeeking", {"weight": 1.0}),
    Recipe("Reconstruction gets worse when D starts", "AdversarialStart", None, [], "{}: [guide](reconstruction.md)"),
    Recipe("The adversarial loss dominates the others", "AdaptiveAdversarialWeight", None, [], "{} or `LossBalancer`"),
    Recipe("The run collapsed overnight", "CollapseDetector", None, ["configs/ring_collapse.yaml"], "{}, below"),
]


# ---------- gammas


def gamma_rows() -> list[list[str]]:
    """A row for each config with R1, and R2 if it has that: config, loss, penalties, γ, their other arguments."""
    rows = []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        callbacks = config.get("trainer", {}).get("callbacks", [])  # a sweep has none
        entries = [entry for entry in callbacks if isinstance(entry, dict)]
        penalties = [entry for entry in entries if entry["class_path"] in ("R1Penalty", "R2Penalty")]
        if penalties:
            names, given = zip(*((entry["class_path"], entry["init_args"]) for entry in penalties), strict=True)
            others = {name: value for name, value in given[0].items() if name != "gamma"}
            rows.append(
                [
                    code(f"configs/{path.name}"),
                    code(config["model"].get("init_args", config["model"])["loss"]),
                    ", ".join(map(code, names)),
                    ", ".join(dict.fromkeys(scheduled(arguments["gamma"]) for arguments in given)),
                    ", ".join(code(f"{name}={literal(value)}") for name, value in others.items()),
                ]
            )
    return rows


def scheduled(value: float | dict[str, float]) -> str:
    """A number, or the first and last value of a schedule."""
    return f"{value['start']:g} to {value['end']:g}" if isinstance(value, dict) else f"{value:g}"


# ---------- checkpoints


@dataclass(frozen=True)
class Part:
    """A part of a checkpoint.

    Args:
        paths: keys of the checkpoint that lead to it, each with those inside of it.
        text: what it holds.
        writer: who writes it.
    """

    paths: Sequence[tuple[str, ...]]
    text: str
    writer: str


CHECKPOINT = [
    Part(
        [("state_dict",)],
        "both networks, the generator's average (`generator_ema`), the vectors and the factor of spectral norm, the "
        "buffers of the loss",
        "Lightning",
    ),
    Part(
        [("state_dict", "_extra_state")],
        "`iteration`, the steps of each player, the number of the last draw of noise, the name of the loss and its "
        "arguments",
        "`GANModule`",
    ),
    Part([("optimizer_states",), ("lr_schedulers",)], "those of both players", "Lightning"),
    Part([("hyper_parameters",)], "the plain arguments of the module", "Lightning"),
    Part(
        [("callbacks",)],
        "running means, slow weights, cycles, the start found at a plateau, a pool of samples, measurements, events, "
        "the healthy state to roll back to",
        "each callback",
    ),
    Part([("loops",)], "epoch, batch, `global_step`", "Lightning"),
    Part(
        [("loops", "fit_loop", "state_dict", "combined_loader")],
        "the position in the data, of the data modules here and of loaders with `state_dict` and `load_state_dict`",
        "Lightning",
    ),
    Part(
        [("Ring",)],
        "the position again, which outlasts the end of an epoch, under the name of the data module's class",
        "the data module",
    ),
]


# ---------- on the pages


def code(text: str) -> str:
    """The text as code."""
    return f"`{text}`"


def literal(value: Any) -> str:
    """A default as one writes it in Python, without a zero in front of an exponent."""
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("e-0", "e-")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Raises:
        ValueError: if a cell contains a separator or a line break.
    """
    lines = [head, ["---"] * len(head), *rows]
    for cell in (cell for line in lines for cell in line):
        if "|" in cell or "\n" in cell:
            raise ValueError(f"A cell of a table must not have a | or a line break, got {cell!r}.")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def method_table(section: str) -> str:
    """The methods of a section."""
    rows = [
        [
            ", ".join(map(code, method.names)),
            ", ".join(paper.link for paper in method.papers),
            method.formula,
            ", ".join(code(f"{name}={literal(value)}") for name, value in method.defaults.items()),
            ", ".join(map(code, method.tests)),
        ]
        for method in METHODS[section]
    ]
    return table(["Method", "Paper", "Formula and convention", "Default", "Test"], rows)


def strategy_table() -> str:
    """What works with what."""
    rows = [[code(method), *(works(method, column) for column in COLUMNS)] for method in STRATEGIES]
    return table(["Method", *COLUMNS], rows)


def advice_table() -> str:
    """What the monitors advise."""
    by_monitor = {
        "HealthMonitor": HEALTH,
        "CollapseDetector": COLLAPSE,
        "MemorizationMonitor": {"memorization": MEMORIZATION},
    }
    rows = [[code(name), code(verdict), text] for name, said in by_monitor.items() for verdict, text in said.items()]
    return table(["Monitor", "Verdict", "Its advice"], rows)


def recipe_table() -> str:
    """What to add by symptom."""
    rows = [
        [recipe.symptom, recipe.text.format(code(recipe.entry)), ", ".join(map(code, recipe.configs))]
        for recipe in RECIPES
    ]
    return table(["Symptom", "Entry", "Config"], rows)


def gamma_table() -> str:
    """Which γ the configs have."""
    return table(["Config", "Loss", "Penalties", "γ", "With"], gamma_rows())


def checkpoint_table() -> str:
    """What is in a checkpoint."""
    rows = [
        [
            ", ".join(code(first + "".join(f'["{key}"]' for key in rest)) for first, *rest in part.paths),
            part.text,
            part.writer,
        ]
        for part in CHECKPOINT
    ]
    return table(["Entry", "What it holds", "Written by"], rows)


TABLES: dict[str, Callable[[], str]] = {
    **{f"methods: {section}": partial(method_table, section) for section in METHODS},
    "strategies": strategy_table,
    "advice": advice_table,
    "recipes": recipe_table,
    "gammas": gamma_table,
    "checkpoint": checkpoint_table,
}
PLACEHOLDER = re.compile(r"^\{\{ *(.*?) *\}\}$", flags=re.MULTILINE)


def fill(markdown: str) -> str:
    """The page with tables instead of lines such as ``{{ strategies }}``.

    Raises:
        ValueError: if there is no table of this name.
    """

    def rendered(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"There is no table {match[1]!r}, but there are {', '.join(TABLES)}.")
        return TABLES[match[1]]()

    return PLACEHOLDER.sub(rendered, markdown)
