"""Better samples from a trained GAN: the discriminator chooses among what the generator makes."""

from __future__ import annotations

import abc
import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gan_stability._checks import check, check_finite, check_integer, is_number
from lightning_gan_stability.layers import MinibatchStdDev, evaluation
from lightning_gan_stability.outputs import Condition, Sample, batch_size, entries, take_rows, tree_leaves, tree_map

if TYPE_CHECKING:
    from typing_extensions import Self

    from lightning_gan_stability.protocols import GANProtocol


LARGE = 50.0  # F from which a sample is as good as sure to be accepted, where F itself may be infinite


class Rejection(abc.ABC):
    """Draws from the data's density p by choosing among samples of the generator's density q.

    What is read of the discriminator are the log odds that a sample is real, log p/q up to a constant. Its logits are
    these at the optimum of :class:`~lightning_gan_stability.Minimax`, of
    :class:`~lightning_gan_stability.NonSaturating` without label smoothing, and of
    :class:`~lightning_gan_stability.Relativistic`. With any other loss, with several discriminators or logits for
    patches, :meth:`calibrate` it. That helps with these too, since a discriminator that has been held back by
    penalties, or has not seen the average that samples are drawn from, is not at its optimum.

    Give it to :meth:`GANModule.sample`. What it has learned is of one module: make another for another one, and after
    more training. A condition stays with its sample: x is drawn from p(x | condition), if the discriminator sees the
    condition. Samples carry no graph.

    Args:
        batch_size: candidates that are made and judged at once.

    Attributes:
        slopes: of the log odds in the mean logit of each discriminator, (discriminators,); None before
            :meth:`calibrate`.
        acceptance: the share of candidates that were accepted in the last call; NaN before the first.
    """

    def __init__(self, batch_size: int = 256) -> None:
        self.batch_size = check_integer("batch_size", batch_size)
        self.slopes: Tensor | None = None
        self.acceptance = math.nan

    @torch.no_grad()
    def calibrate(self, module: GANProtocol, real: Sample, condition: Condition = None) -> Self:
        """Learn the log odds from logits, by a logistic regression of real samples against generated ones.

        Args:
            module: whose discriminator is calibrated.
            real: samples (n, ...) that the discriminator was not trained with; some hundred or more.
            condition: theirs, (n, ...), which the generated samples are made with too.

        Returns:
            Itself.

        Raises:
            ValueError: if the discriminator tells all real samples from all generated ones.
            MisconfigurationException: if there is nothing to choose from, or no logit for each sample; see
                :meth:`sample`.
        """
        from sklearn.linear_model import LogisticRegression  # slow to import

        _check(module)
        n, logits = batch_size(real), []
        real, condition = (tree_map(lambda leaf: leaf.to(module.device), tree) for tree in (real, condition))
        for start in range(0, n, self.batch_size):
            stop = min(n, start + self.batch_size)
            told = take_rows(condition, start, stop)
            parts = take_rows(real, start, stop), module.sample(stop - start, told)
            logits.append(torch.stack([mean_logits(module, part, told) for part in parts]))
        columns = torch.cat(logits, 1).flatten(0, 1).double().cpu()  # all real rows, and then all generated ones
        scale = columns.std(0).clamp(min=torch.finfo(torch.float32).tiny)
        values, labels = ((columns - columns.mean(0)) / scale).numpy(), torch.arange(2 * n) < n
        regression = LogisticRegression(C=1e6).fit(values, labels.numpy())
        if regression.score(values, labels.numpy()) == 1:
            raise ValueError(
                f"The discriminator tells all of {n} real samples from as many generated ones, so that none of these "
                "passes for real: give more real samples, which it was not trained with, or train the generator on."
            )
        self.slopes = (torch.from_numpy(regression.coef_[0]) / scale).float()
        return self

    def log_odds(self, module: GANProtocol, sample: Sample, condition: Condition = None) -> Tensor:
        """Log p/q of samples, up to a constant, (n,).

        Raises:
            ValueError: if the discriminator's logits are not finite.
            MisconfigurationException: if the logits are none, and have not been calibrated.
        """
        loss = type(module.loss).__name__
        if self.slopes is None and not module.loss.log_ratio:
            raise MisconfigurationException(
                f"Logits of {loss} are no ratio of densities: call `calibrate(module, real)` with real samples that "
                "the discriminator was not trained with."
            )
        logits = mean_logits(module, sample, condition, one=self.slopes is None)
        if not bool(logits.isfinite().all()):
            raise ValueError("The discriminator's logits of generated samples are not finite.")
        return logits[:, 0] if self.slopes is None else logits @ self.slopes.to(logits)

    @abc.abstractmethod
    def sample(self, module: GANProtocol, n: int, condition: Condition = None) -> Sample:
        """Draw samples (n, ...).

        Args:
            module: whose generator makes the candidates, its average in eval mode if there is one; the discriminator
                judges in eval mode, without augmentations.
            n: how many.
            condition: (n, ...), one for each.

        Raises:
            MisconfigurationException: if the generator takes no latents, so that there is nothing to choose from; if
                the discriminator judges several samples together; or if its logits have to be calibrated.
        """

    def propose(self, module: GANProtocol, rows: Tensor, condition: Condition) -> tuple[Sample, Tensor]:
        """A candidate for each of some rows, and its log odds."""
        told = tree_map(lambda leaf: leaf[rows.to(leaf.device)], condition)
        candidates = module.sample(len(rows), told)
        return candidates, self.log_odds(module, candidates, told)


class DiscriminatorRejection(Rejection):
    """Discriminator rejection sampling: a candidate is accepted with the probability p(x) / (M q(x)).

    With a(x) = exp(l(x) − l_M), l the log odds and l_M the largest, that is a / (a + (1 − a) exp(γ)): a for γ = 0,
    where accepted samples have the density p and a share of 1/M is accepted. "Discriminator Rejection Sampling",
    https://arxiv.org/abs/1810.06758, where it is σ(F) with F = log a − log(1 − a) − γ. l_M is the largest of
    ``burn_in`` candidates before the first sample, and of all since. Draws 1/``acceptance`` candidates for a sample.

    Args:
        gamma: γ; below 0 more samples are accepted, whose density lies between p and q; above 0 fewer.
        percentile: γ is this percentile of F in each batch of candidates, in [0, 100), so that the better part is
            accepted however large M is: 80 to 95 in the paper. None: ``gamma``.
        burn_in: candidates that l_M is looked for in; the paper has 10,000.
        log_bound: l_M, if it is known; None: it is looked for.
        patience: candidates in a row without one that is accepted, after which it gives up.
        batch_size: candidates that are made and judged at once.

    Attributes:
        log_bound: l_M; None before the first sample.

    Raises:
        ValueError: if an argument has a bad value.
        RuntimeError: from ``sample``, if hardly anything is accepted; see ``patience``.
        MisconfigurationException: from ``sample``, if the generator takes no latents, the discriminator judges several
            samples together, its logits have to be calibrated, or networks are sharded.

    Example:
        >>> from lightning_gan_stability import MLP, GANModule
        >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).eval()
        >>> gan.sample(5, reject=DiscriminatorRejection(burn_in=100)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        gamma: float = 0.0,
        percentile: float | None = None,
        burn_in: int = 10_000,
        log_bound: float | None = None,
        patience: int = 10_000,
        batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size)
        self.gamma = check_finite("gamma", gamma)
        if percentile is not None:
            check(is_number(percentile) and 0 <= percentile < 100, "percentile", "in [0, 100)", percentile)
            check(gamma == 0, "gamma", "left out where there is a `percentile`, which chooses it", gamma)
        self.percentile = percentile
        self.burn_in = check_integer("burn_in", burn_in)
        self.log_bound = None if log_bound is None else check_finite("log_bound", log_bound)
        self.patience = check_integer("patience", patience)
        self._known = log_bound is not None

    def calibrate(self, module: GANProtocol, real: Sample, condition: Condition = None) -> Self:
        """Learn the log odds from logits; see :meth:`Rejection.calibrate`. l_M is looked for anew."""
        if self._known:
            raise ValueError("`log_bound` is of log odds that are known: leave it out, or do not calibrate others.")
        self.log_bound = None
        return super().calibrate(module, real, condition)

    @torch.no_grad()
    def sample(self, module: GANProtocol, n: int, condition: Condition = None) -> Sample:
        """Draw samples (n, ...); see :meth:`Rejection.sample`."""
        _check(module)
        if module.device_mesh is not None:
            raise MisconfigurationException(
                "DiscriminatorRejection draws until chance has accepted enough, which is another number of passes on "
                "each process, and sharded networks need the same: use MetropolisHastings, or load a checkpoint in one "
                "process."
            )
        if self.log_bound is None:
            self._look_for_bound(module, n, condition)
        chosen: Sample = None
        pending = torch.arange(n, device=module.device)
        drawn, accepted, waited = 0, 0, 0
        while len(pending):
            rows = pending[torch.arange(self.batch_size, device=module.device) % len(pending)]
            candidates, odds = self.propose(module, rows, condition)
            self._raise_bound(odds)
            assert self.log_bound is not None
            share = acceptance(odds, self.log_bound, self.gamma, self.percentile)
            good = module.noise.rand(len(rows), dtype=odds.dtype) < share
            places = good.nonzero().flatten()
            drawn, accepted = drawn + len(rows), accepted + len(places)
            waited = 0 if len(places) else waited + len(rows)
            if waited >= self.patience:
                raise RuntimeError(
                    f"The discriminator accepted {accepted:,} of {drawn:,} candidates, and none of the last "
                    f"{waited:,}: set `percentile=80`, call `calibrate(module, real)`, or use MetropolisHastings."
                )
            # a row that has several takes the first
            taken = dict(reversed([*zip(rows[places].tolist(), places.tolist(), strict=True)]))
            chosen = _put(chosen, candidates, n, taken)
            pending = torch.tensor([row for row in pending.tolist() if row not in taken], device=module.device)
        self.acceptance = accepted / drawn
        return chosen

    def _look_for_bound(self, module: GANProtocol, n: int, condition: Condition) -> None:
        for start in range(0, self.burn_in, self.batch_size):
            rows = torch.arange(start, min(self.burn_in, start + self.batch_size), device=module.device) % n
            self._raise_bound(self.propose(module, rows, condition)[1])

    def _raise_bound(self, odds: Tensor) -> None:
        if not self._known:
            self.log_bound = max(float(odds.max()), -math.inf if self.log_bound is None else self.log_bound)


class MetropolisHastings(Rejection):
    """Metropolis–Hastings GAN: a Markov chain for each sample, whose candidates are samples of the generator.

    From x it goes to x′ with the probability min(1, exp(l(x′) − l(x))), l the log odds; after ``steps`` of these its
    state is the sample. The stationary density is p. After K steps the total variation from it is (1 − 1/M)^K at most,
    M the largest p/q. "Metropolis-Hastings Generative Adversarial Networks", https://arxiv.org/abs/1811.11357. Chains
    begin with a generated sample, not with a real one as in the paper, so that no real sample can be returned. Makes
    and judges ``steps`` + 1 candidates for a sample, and needs no bound.

    Args:
        steps: K; the paper has 640.
        batch_size: chains that go on at once.

    Raises:
        ValueError: if an argument has a bad value.
        MisconfigurationException: from ``sample``, if the generator takes no latents, the discriminator judges several
            samples together, or its logits have to be calibrated.

    Example:
        >>> from lightning_gan_stability import MLP, GANModule
        >>> gan = GANModule(MLP([16, 32, 2]), MLP([2, 32, 1]), latent_dim=16).eval()
        >>> gan.sample(5, reject=MetropolisHastings(steps=10)).shape
        torch.Size([5, 2])
    """

    def __init__(self, steps: int = 640, batch_size: int = 256) -> None:
        super().__init__(batch_size)
        self.steps = check_integer("steps", steps)

    @torch.no_grad()
    def sample(self, module: GANProtocol, n: int, condition: Condition = None) -> Sample:
        """Draw samples (n, ...); see :meth:`Rejection.sample`."""
        _check(module)
        chosen: Sample = None
        accepted = 0
        for start in range(0, n, self.batch_size):
            rows = torch.arange(start, min(n, start + self.batch_size), device=module.device)
            state, odds = self.propose(module, rows, condition)
            for _ in range(self.steps):
                candidates, new = self.propose(module, rows, condition)
                moves = module.noise.rand(len(rows), dtype=odds.dtype) < (new - odds).exp()
                state = tree_map(partial(_moved, moves), state, candidates)
                odds = torch.where(moves, new, odds)
                accepted += int(moves.sum())
            chosen = _put(chosen, state, n, {row: i for i, row in enumerate(rows.tolist())})
        self.acceptance = accepted / (n * self.steps)
        return chosen


def acceptance(log_odds: Tensor, log_bound: float, gamma: float = 0.0, percentile: float | None = None) -> Tensor:
    """The probability with which discriminator rejection sampling accepts samples, a / (a + (1 − a) exp(γ)).

    Args:
        log_odds: l, (n,).
        log_bound: l_M; a = exp(l − l_M), and 1 above it.
        gamma: γ.
        percentile: of F = log a − log(1 − a), for γ; None: ``gamma``.

    Example:
        >>> acceptance(torch.tensor([0.0, 1.0, 2.0]), log_bound=1.0)
        tensor([0.3679, 1.0000, 1.0000])
    """
    difference = (log_odds - log_bound).clamp(max=0)
    f = difference - torch.log(-torch.expm1(difference))
    if percentile is not None:
        gamma = float(f.clamp(max=LARGE).quantile(percentile / 100))
    return torch.sigmoid(f - gamma)


def mean_logits(module: GANProtocol, sample: Sample, condition: Condition = None, one: bool = False) -> Tensor:
    """The mean logit of each sample by each discriminator, in eval mode, (n, discriminators).

    Args:
        module: whose discriminators.
        sample: (n, ...).
        condition: theirs.
        one: refuse several logits for a sample.

    Raises:
        MisconfigurationException: if there are several and must not be.
    """
    with evaluation(module):  # type: ignore[arg-type]  # a protocol of one
        logits = [*entries(module.logits(sample, condition)).values()]
    if one and (len(logits) > 1 or logits[0].dim() > 1):
        raise MisconfigurationException(
            "The discriminator gives a sample several logits, which are no ratio of densities: call "
            "`calibrate(module, real)` with real samples that it was not trained with."
        )
    return torch.stack([entry.float().reshape(len(entry), -1).mean(1) for entry in logits], 1)


def _check(module: GANProtocol) -> None:
    """Refuse modules of which there is nothing to choose, or no logit for a sample."""
    if module.latent_dim is None:
        raise MisconfigurationException(
            "The generator takes no latents (`latent_dim` is None), so it has one sample for each condition and there "
            "is nothing to choose from: remove `reject`."
        )
    together = next((kind for kind in module.discriminator.modules() if isinstance(kind, MinibatchStdDev)), None)
    if module.packing > 1 or together is not None:
        what = "Packed" if together is None else type(together).__name__
        raise MisconfigurationException(
            f"The discriminator judges several samples together ({what}), so that none has odds of its own: remove "
            "`reject`, or train a discriminator without it."
        )


def _put(chosen: Sample, candidates: Sample, n: int, taken: dict[int, int]) -> Sample:
    """The samples so far, (n, ...), with some candidates in their rows; ``taken`` says from where."""
    if chosen is None:
        chosen = tree_map(lambda leaf: leaf.new_empty(n, *leaf.shape[1:]), candidates)
    if taken:
        device = tree_leaves(candidates)[0].device
        rows, places = (torch.tensor([*part], device=device) for part in (taken.keys(), taken.values()))
        tree_map(lambda leaf, made: leaf.index_copy_(0, rows, made[places]), chosen, candidates)
    return chosen


def _moved(moves: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """A leaf whose rows have moved or not."""
    return torch.where(moves.reshape(-1, *[1] * (old.dim() - 1)), new, old)
