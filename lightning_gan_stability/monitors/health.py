"""HealthMonitor: why a GAN does not train, from cheap signals of every step, with advice for each verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, TypeAlias

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gan_stability._checks import check_bool, check_integer
from lightning_gan_stability.advice import HEALTH
from lightning_gan_stability.callback import Cadence, GANCallback
from lightning_gan_stability.finite import NotFinite
from lightning_gan_stability.layers import evaluation
from lightning_gan_stability.module import GANModule
from lightning_gan_stability.monitors.giveaway import strongest_giveaway
from lightning_gan_stability.monitors.latents import fixed_latents
from lightning_gan_stability.monitors.real_data import RealData, loader_to_read, rebatched
from lightning_gan_stability.monitors.shares import (
    CELLS,
    Kind,
    by_book,
    codebook_collapse,
    codes_of,
    count,
    dominant_adversarial,
    head_start,
    known_size,
    perplexities,
    shares,
    silent_adversarial,
    squared_norms,
    worst_books,
)
from lightning_gan_stability.outcome import Outcome, Trouble, in_words
from lightning_gan_stability.outputs import (
    PLAYERS,
    GANOutputs,
    Logits,
    Player,
    Sample,
    Terms,
    Unpacked,
    batch_size,
    entries,
    tree_leaves,
)
from lightning_gan_stability.protocols import GANProtocol

Evidence: TypeAlias = dict[str, float]
Window: TypeAlias = Mapping[str, float]

SIGNALS = ("accuracy", "gap", "d_loss", "g_loss", "reconstruction", "d_norm", "g_norm")
LEVELS, POINTS = (1, 4, 16), 64  # steps between the positions that a rotation is looked for in; how many at each
KEPT = (POINTS + 1) * LEVELS[-1]
HELD_OUT = 256  # samples of held-out data, per process
LIKELY, YOUTH, EARLY = 0.95, 500, 5  # an accuracy, and the steps and windows before any search for a give-away
AT_ONCE = ("head_start", "giveaway")  # verdicts that need no patience


# ---------- decisions, from the windows so far, the last one at the end


def vanishing_gradient(windows: Sequence[Window]) -> Evidence | None:
    """The generator's gradient is below a thousandth of its largest, and the discriminator nearly always right."""
    now, largest = windows[-1], max((w["g_norm"] for w in windows if math.isfinite(w["g_norm"])), default=0.0)
    ratio = now["g_norm"] / largest if largest else math.nan
    if (ratio < 1e-3 or now["g_norm"] == 0) and now["accuracy"] > 0.95:
        return {"g_norm": now["g_norm"], "of_largest": ratio, "accuracy": now["accuracy"]}
    return None


def exploding_gradient(windows: Sequence[Window]) -> Evidence | None:
    """The generator's gradient is above 100 times its size at first, and 100 times its median or that ten windows ago.

    The size ten windows ago is compared too because an early explosion raises the median itself. A gradient that
    returns to its earlier size does not count as an explosion.
    """
    before = [w["g_norm"] for w in windows[:-1] if math.isfinite(w["g_norm"])] or [math.inf]
    usual = max(median(before[:3]), min(median(before), median(before[-10:][:3])), 1e-12)
    ratio = windows[-1]["g_norm"] / usual
    return {"g_norm": windows[-1]["g_norm"], "of_usual": ratio} if len(before) >= 3 and ratio > 100 else None


def noisy_gradient(windows: Sequence[Window]) -> Evidence | None:
    """The norm of the generator's gradient varies, within a window, by more than three times its mean."""
    spread = windows[-1]["g_spread"]
    return {"g_norm": windows[-1]["g_norm"], "spread": spread} if spread > 3 else None


def weak_discriminator(windows: Sequence[Window]) -> Evidence | None:
    """The discriminator guesses, although generated samples differ from real ones in means or standard deviations.

    Nor do the samples improve: neither these differences nor the FID, if measured, fell by a tenth in the last windows.
    """
    now, before = windows[-1], windows[-4:-1]
    closer = any(now.get(sign, math.nan) < 0.9 * w.get(sign, 0.0) for w in before for sign in ("apart", "fid"))
    if now["accuracy"] < 0.55 and now["apart"] > 0.1 + now["apart_by_chance"] and not closer:
        return {"accuracy": now["accuracy"], "gap": now["gap"], "apart": now["apart"]}
    return None


def overfitting_discriminator(windows: Sequence[Window]) -> Evidence | None:
    """r_v = (D(train) − D(held out)) / (D(train) − D(fake)) is above 0.6, and more than chance."""
    now = windows[-1]
    if now["r_v"] > 0.6 and now["r_v_by_chance"] < 0.3:
        return {"r_v": now["r_v"], "train": now["train_logit"], "held_out": now["held_out_logit"]}
    return None


def not_finite(windows: Sequence[Window]) -> Evidence | None:
    """A gradient overflows on most steps; a gradient scaler skips these silently, so that training stands still."""
    return {"overflows": share} if (share := windows[-1]["overflows"]) > 0.5 else None


def rotation(positions: Tensor) -> Evidence | None:
    """Whether the players circle, from the similarity of the directions of moves that are k moves apart.

    For a rotation by ω per move, C(k) = E cos∠(u_t, u_{t+k}) of the moves u is cos ωk; for damped or random motion it
    is below e^(−λk). A trough below −½ followed by a peak above ½ counts as a period. Moves count as undamped if those
    of the last half are at least nine tenths as large as those of the first. Positions are (n, d), of both players,
    taken at regular intervals.
    """
    moves = positions.double().diff(dim=0)
    norms = moves.norm(dim=1)
    if len(moves) < POINTS or not bool((norms > 0).all() and norms.isfinite().all()):
        return None
    directions = moves / norms[:, None]
    alike = directions @ directions.T
    course = torch.stack([alike.diagonal(k).mean() for k in range(len(moves) // 2 + 1)])
    trough = int(course.argmin())
    first, last = norms.chunk(2)
    amplitude = (last.square().mean() / first.square().mean()).sqrt().item()
    peak = course[trough:].max().item()
    if course[trough] < -0.5 and peak > 0.5 and amplitude > 0.9 and trough > 1:
        return {"trough": course[trough].item(), "peak": peak, "period": 2.0 * trough, "amplitude": amplitude}
    return None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of ranks, with ties at their mean rank.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    from scipy.stats import spearmanr  # slow to import

    return float(spearmanr(x, y).statistic)


def loss_tells_nothing(losses: Sequence[float], fids: Sequence[float]) -> Evidence | None:
    """Over eight or more measurements, a lower generator loss does not go with a lower FID: ρ < 0.3."""
    if len(fids) < 8 or len(set(losses)) < 2 or len(set(fids)) < 2:
        return None
    rho = rank_correlation(losses, fids)
    return {"rank_correlation": rho, "measurements": float(len(fids))} if rho < 0.3 else None


# And what each decides from: where it is NaN because a player did not move, there is nothing to decide.
DECISIONS: dict[str, tuple[Callable[[Sequence[Window]], Evidence | None], str]] = {
    "vanishing_gradient": (vanishing_gradient, "g_norm"),
    "exploding_gradient": (exploding_gradient, "g_norm"),
    "noisy_gradient": (noisy_gradient, "g_norm"),
    "weak_discriminator": (weak_discriminator, "accuracy"),
    "overfitting_discriminator": (overfitting_discriminator, "r_v"),
    "silent_adversarial": (silent_adversarial, "adversarial_share"),
    "dominant_adversarial": (dominant_adversarial, "adversarial_share"),
    "head_start": (head_start, "adversarial_share"),
    "codebook_collapse": (codebook_collapse, "perplexity"),
    "not_finite": (not_finite, "overflows"),
}


class HealthMonitor(GANCallback):
    """Detects, on every step, the failures that make GANs hard to train, and advises what to add.

    * ``vanishing_gradient``: the generator's gradient is below 10⁻³ of its largest, and accuracy above 95 %. "Towards
      Principled Methods for Training Generative Adversarial Networks", https://arxiv.org/abs/1701.04862.
    * ``exploding_gradient``: the gradient is above 100 times its usual size. ``noisy_gradient``: it varies by more than
      3 times its mean.
    * ``weak_discriminator``: accuracy is below 55 %, although means and standard deviations of fake samples differ from
      those of real ones (squared distance over the real variance above 0.1 and chance) and do not approach them.
    * ``oscillation``: the joint moves of both players rotate with a period and are not damped (:func:`rotation`).
      "The Numerics of GANs", https://arxiv.org/abs/1705.10461.
    * ``overfitting_discriminator``: r_v is above 0.6 (:func:`overfitting_discriminator`), with held-out data only.
      "Training Generative Adversarial Networks with Limited Data", https://arxiv.org/abs/2006.06676.
    * ``silent_adversarial``, ``dominant_adversarial``: for generators with a reconstruction loss. The adversarial terms
      (including feature matching) have less than 1 % of the generator's gradient with respect to its samples while
      accuracy is above 95 % (or less than 0.01 % while it is above 75 %);
      or they have more than 90 %, and the reconstruction is a fifth worse than it was.
    * ``head_start``: accuracy is above 95 % at the step at which the adversarial loss starts without a ramp, or the
      reconstruction loss more than doubles from there on; reported at once.
    * ``codebook_collapse``: of the codes in ``extras`` (integer tensors named like "codes", "tokens" or "indices"),
      after step 500, effectively less than a tenth of the codebook is used, or less than a quarter of what was used
      before, or a single code. Each codebook is checked separately.
      "Neural Discrete Representation Learning", https://arxiv.org/abs/1711.00937.
    * ``giveaway``: accuracy is above 95 %, and a single statistic of a sample tells generated from training samples
      (:func:`~lightning_gan_stability.metrics.find_giveaways`, which runs once, after step 500).
    * ``not_finite``: a loss or gradient was not finite, or a gradient scaler skips more than half of the steps.
    * ``loss_tells_nothing``: the rank correlation of generator loss and FID is below 0.3; for information.

    Signals are kept on the device and averaged over ranks every ``every`` steps. A verdict needs ``patience`` of these
    decisions in a row. It gives a warning when it first appears, an entry in ``verdicts`` (``step``, ``verdict``,
    ``evidence``, ``advice``), the logged value ``health/<verdict>`` (1 or 0), and a row in the table at the end of the
    run. If the generator's loss has other terms than the adversarial one, the monitor also logs ``g/share/<term>``:
    ‖∇_x L_i‖ / Σ_j ‖∇_x L_j‖ for the terms with all their weights, 0 for one that does not depend on the samples. For
    codebooks it logs ``g/perplexity/<codes>``, the lowest of all books. A run is the same with and without the monitor.
    It costs a copy of 256 numbers and a few scalars per step, forward passes every ``every`` steps, and for shares one
    backward pass from each term to the samples, on one batch in ``every``. Compiled networks have no shares, because
    compiled graphs run only once; a warning says so.

    Args:
        every: steps between decisions.
        patience: number of decisions in a row before a verdict.
        held_out: also evaluate held-out data, if the run has a validation loader.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> HealthMonitor(every=200).verdicts
        []
    """

    rolled_back = False

    verdicts: list[dict[str, Any]]
    windows: list[dict[str, float]]
    rows: list[Tensor]
    positions: Tensor | None
    positions_seen: int
    counts: dict[str, int]
    fids: list[tuple[float, float]]
    squares: dict[str, Tensor]
    kinds: dict[str, Kind]
    measured: dict[str, int]
    counted: dict[str, Tensor]
    cells: dict[str, int]
    largest: dict[str, int]
    finding: dict[str, Any] | None

    def __init__(self, every: int = 100, patience: int = 3, held_out: bool = True) -> None:
        super().__init__()
        self.every = check_integer("every", every)
        self.patience = check_integer("patience", patience)
        self.held_out = check_bool("held_out", held_out)
        self.add_state("verdicts", [])
        self.add_state("windows", [])
        self.add_state("rows", [])  # rows of signals since the last decision
        self.add_state("positions", None)  # the last positions, (KEPT, d); each replaces the one KEPT steps before it
        self.add_state("positions_seen", 0)
        self.add_state("counts", {})  # number of decisions in a row
        self.add_state("fids", [])  # generator loss and FID at each measurement
        self.add_state("squares", {})  # squared norms of terms' gradients in this window
        self.add_state("kinds", {})  # kinds of these terms
        self.add_state("measured", {})  # iteration of each measurement
        self.add_state("counted", {})  # number of uses of each code in this window, (books, cells + 1)
        self.add_state("cells", {})  # number of cells for codes
        self.add_state("largest", {})  # largest code seen so far
        self.add_state("finding", None)  # a give-away, {} if none was found
        self._refused = False  # graphs allow only one backward pass
        self._codes: int | None = None  # number of codes in the generator's codebook
        self._held: list[Unpacked] = []  # held-out data, in main memory
        self._followed: list[nn.Parameter] = []  # each player's two largest parameters, the discriminator's first
        self._watched = 0

    # ---------- what the Trainer calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fetch a batch of held-out data."""
        super().on_train_start(trainer, pl_module)
        module: GANModule = pl_module  # type: ignore[assignment]
        self._watched, self._refused, self._codes = 0, False, known_size(module.generator)
        moving = [sorted(module.trainable_parameters(p), key=Tensor.numel, reverse=True)[:2] for p in PLAYERS]
        self._followed = [p for two in moving for p in two]
        with isolate_rng():
            self._held = _held_out(trainer) if self.held_out else []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep this step's signals; make a decision if one is due."""
        module: GANModule = pl_module  # type: ignore[assignment]
        plain = [name for name, kind in self.kinds.items() if kind == "reconstruction"]
        self.rows.append(_signals(module, plain))
        self._keep(_position(self._followed))
        if trainer.global_step % self.every == 0:
            self._decide(trainer, module, batch)
        self._watched += 1

    def watch_terms(self, module: GANProtocol, player: Player, outputs: GANOutputs, terms: Terms) -> None:
        """Count codes; measure each term's gradient once between two decisions."""
        if player == "d" or not module.noise.in_step:
            return
        self._count_codes(module, outputs)
        names = [name for name in terms if self.measured.get(name, module.iteration) == module.iteration]
        if not names or {*terms} == {"adversarial"} or self._refused:
            return
        if module.reruns_graphs:
            self._measure(module, outputs, terms, names)
            return
        self._refused = True
        rank_zero_info(
            "HealthMonitor leaves out the shares of terms in the generator's gradient, and the verdicts that take them "
            "(silent_adversarial, dominant_adversarial, head_start): graphs of compiled networks run backward once, "
            "for the loss. Train some steps with compile=False to see them."
        )

    def _measure(self, module: GANProtocol, outputs: GANOutputs, terms: Terms, names: list[str]) -> None:
        try:
            found = squared_norms(module, outputs, terms, names)
        except RuntimeError as error:  # from functions whose graphs allow only one backward pass
            self._refused = True
            rank_zero_warn(f"HealthMonitor leaves out the shares of terms, whose gradients it cannot take: {error}")
            return
        for name, (square, kind) in found.items():
            self.squares[name] = self.squares.get(name, 0.0) + square
            self.kinds[name], self.measured[name] = kind, module.iteration

    def _count_codes(self, module: GANProtocol, outputs: GANOutputs) -> None:
        for name, codes in codes_of(outputs.extras):
            rows = by_book(codes, tree_leaves(outputs.fake)[0].dim())
            if name not in self.counted or len(self.counted[name]) != len(rows):
                cells = self.cells.setdefault(name, max(CELLS, self._codes or 0))
                self.counted[name] = torch.zeros(len(rows), cells + 1, dtype=torch.long, device=module.device)
            count(self.counted[name], rows)

    def logged(self, trainer: Trainer) -> dict[str, Cadence]:
        """A key for each verdict, updated every ``every`` steps."""
        return {f"health/{name}": self.every for name in HEALTH}

    def _keep(self, position: Tensor) -> None:
        if self.positions is None or self.positions.shape[1] != len(position):
            self.positions, self.positions_seen = position.new_zeros(KEPT, len(position)), 0
        self.positions[self.positions_seen % KEPT] = position
        self.positions_seen += 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record a loss or gradient that was not finite, for the table at the end of the run."""
        if isinstance(exception, NotFinite):
            self._say(trainer, "not_finite", {})

    def outcome(self, trainer: Trainer) -> Outcome:
        """The verdicts, and the number of steps observed."""
        troubles = [
            Trouble(
                said["step"],
                said["verdict"],
                _text(said["evidence"]),
                said["advice"],
                lasts=self._lasts(said["verdict"]),
            )
            for said in self.verdicts
        ]
        return Outcome(troubles=troubles, watched=self._watched)

    # ---------- deciding

    def _decide(self, trainer: Trainer, module: GANModule, batch: Any) -> None:
        window = self._window(trainer, module, batch)
        news = self._note_quality(trainer, window)
        self.windows.append(window)
        found = {name: f(self.windows) for name, (f, sign) in DECISIONS.items() if not math.isnan(window[sign])}
        found["oscillation"] = trainer.strategy.broadcast(self._rotation())  # from rank 0, where networks are sharded
        if news:
            found["loss_tells_nothing"] = loss_tells_nothing(*zip(*self.fids, strict=True))
        if (giveaway := self._giveaway(trainer, module)) is not None:
            found["giveaway"] = giveaway or None
        for name, evidence in found.items():
            self.counts[name] = self.counts.get(name, 0) + 1 if evidence is not None else 0
            if evidence is not None and self.counts[name] == self._patience_for(name):
                self._say(trainer, name, evidence)
        self._log(trainer)

    def _lasts(self, verdict: str) -> bool:
        """Whether the verdict holds at the last decision; verdicts for information do not count."""
        needed = self._patience_for(verdict)
        return verdict != "loss_tells_nothing" and self.counts.get(verdict, needed) >= needed

    def _patience_for(self, verdict: str) -> int:
        return 1 if verdict in AT_ONCE else self.patience

    def _log(self, trainer: Trainer) -> None:
        # not by `module.log`, which reaches the loggers on every `log_every_n_steps`-th step alone
        state = {f"health/{name}": float(self.counts.get(name, 0) >= self._patience_for(name)) for name in HEALTH}
        state |= {f"g/{name}": value for name, value in self.windows[-1].items() if name.startswith("share/")}
        state |= worst_books(self.windows[-1])
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in state.items()})
        for logger in trainer.loggers:
            logger.log_metrics(state, step=trainer.global_step)

    def _note_quality(self, trainer: Trainer, window: dict[str, float]) -> bool:
        """Add the last FID to a window; return whether it is a new measurement of a generator that has changed."""
        fid = float(trainer.callback_metrics.get("quality/fid", math.nan))
        new = math.isfinite(fid + window["g_loss"]) and (not self.fids or self.fids[-1][1] != fid)
        self.fids = [*self.fids, (window["g_loss"], fid)][-32:] if new else self.fids
        window |= {"fid": self.fids[-1][1]} if self.fids else {}
        return new

    def _window(self, trainer: Trainer, module: GANModule, batch: Any) -> dict[str, float]:
        rows, self.rows = torch.stack(self.rows), []
        norms = rows[:, SIGNALS.index("d_norm") :]
        g = norms[norms[:, 1].isfinite(), 1]
        spread = ((g / g.mean()).square().mean() - 1).clamp(min=0).sqrt()
        overflows = norms.isinf().sum() / norms.isnan().logical_not().sum()
        values = dict(zip(SIGNALS, _mean(rows), strict=True)) | {"g_spread": spread, "overflows": overflows}
        alone = rows[:, SIGNALS.index("g_loss")].isnan().cumprod(0).bool()  # before the adversarial loss started
        values["accuracy_before"] = _mean(rows[alone])[SIGNALS.index("accuracy")]
        values |= self._probe(module, batch)
        reduced = trainer.strategy.reduce(torch.stack([v.float() for v in values.values()]), reduce_op="mean")
        window = dict(zip(values, reduced.tolist(), strict=True))
        return window | self._shares(trainer, module) | self._perplexities(trainer, module)

    def _shares(self, trainer: Trainer, module: GANModule) -> dict[str, float]:
        """Shares of the generator's gradient, for terms that were measured on samples that they depend on."""
        kinds = trainer.strategy.broadcast({name: self.kinds[name] for name in self.squares})
        zero = torch.zeros((), device=module.device)
        squares = [self.squares.get(name, zero) for name in kinds]
        self.squares, self.measured = {}, {}
        nothing = {"adversarial_share": math.nan, "reconstruction_share": math.nan}
        if not squares:
            return nothing
        found = shares(trainer.strategy.reduce(torch.stack(squares), reduce_op="sum"), kinds)
        others = sum(found[f"share/{name}"] for name, kind in kinds.items() if kind != "adversarial")
        return found if others > 0 else found | nothing

    def _perplexities(self, trainer: Trainer, module: GANModule) -> dict[str, float]:
        """The effective number of codes used in each codebook, where there are enough of them to tell."""
        found: dict[str, float] = {}
        sizes = trainer.strategy.broadcast({name: tuple(counts.shape) for name, counts in self.counted.items()})
        for name, (books, cells) in sizes.items():
            counts = self.counted.get(name)
            if counts is None or counts.shape != (books, cells):
                counts = torch.zeros(books, cells, dtype=torch.long, device=module.device)
            counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu()
            if counts[:, -1].any():
                self.cells[name] = 4 * (cells - 1)
            elif counts.any():
                self.largest[name] = max(self.largest.get(name, 0), int(counts.sum(0).nonzero().max()))
                codes = max(self._codes or 0, self.largest[name] + 1)
                if int(counts.sum(1).min()) >= codes:
                    keys = [f"perplexity/{name}"] if books == 1 else [f"perplexity/{name}/{i}" for i in range(books)]
                    found |= dict(zip(keys, perplexities(counts), strict=True)) | {f"codes/{name}": float(codes)}
        self.counted = {}
        lowest = min((value for key, value in found.items() if key.startswith("perplexity/")), default=math.nan)
        return found | {"perplexity": lowest, "step": float(trainer.global_step)}

    def _giveaway(self, trainer: Trainer, module: GANModule) -> Evidence | None:
        """The finding, or an empty one; None if nothing was checked because D is not always right."""
        last = self.windows[-self.patience :]
        always = len(last) == self.patience and all(window["accuracy"] > LIKELY for window in last)
        if self.finding is None and always and trainer.global_step >= YOUTH and len(self.windows) >= EARLY:
            found = strongest_giveaway(trainer, module)
            self.finding = {} if found is None else {"auc": found.auc, "p_value": found.p_value}
            if found is not None:
                self._say(trainer, "giveaway", self.finding, f"{found.sentence} {HEALTH['giveaway']}")
        if self.finding is None:
            return None
        return self.finding if always else {}

    def _probe(self, module: GANModule, batch: Any) -> dict[str, Tensor]:
        """The distance of fake samples to real ones, and logits of training, held-out and fake samples."""
        with isolate_rng(), module.noise.of("health"):  # a user's `unpack` may draw
            real, condition = module.unpack(batch)
        n = batch_size(real)
        # the networks as they train, not the average
        networks = module.generator, module.discriminator
        with module.noise.of("health"), module.frozen_buffers(), evaluation(*networks):
            fake = module.sample(n, condition, fixed_latents(module, n, "health"))
            held = [move_data_to_device(part, module.device) for part in rebatched(self._held, n)]  # as training has it
            parts = [[(real, condition)], [(fake, condition)], *([held] if held else [])]
            logits = [
                module.loss.direction * torch.cat([_flat_logits(module.logits(*pair)) for pair in pairs])
                for pairs in parts
            ]
        x, y = _flat_samples(real), _flat_samples(fake)
        total = x.var(0, correction=0).sum().clamp(min=1e-12)
        moments = [torch.cat([s.mean(0), s.std(0, correction=0)]) for s in (x, y)]
        apart = (moments[0] - moments[1]).square().sum()
        train, made, other = logits[0], logits[1], logits[-1 if self._held else 0]
        gap = (train.mean() - made.mean()).abs().clamp(min=1e-12)
        chance = (train.var(correction=0) / len(train) + other.var(correction=0) / len(other)).sqrt() / gap
        return {
            "apart": torch.where(total > 1e-12, apart / total, 0.0),  # undefined for a single point
            "apart_by_chance": apart.new_tensor(8 / n),
            "r_v": (train.mean() - other.mean()) / gap,
            "r_v_by_chance": chance,
            "train_logit": train.mean(),
            "held_out_logit": other.mean(),
        }

    def _rotation(self) -> Evidence | None:
        if self.positions is None:
            return None
        for level in LEVELS:
            steps = [level * i for i in range(POINTS + 1) if level * i < min(self.positions_seen, KEPT)]
            rows = [(self.positions_seen - 1 - step) % KEPT for step in reversed(steps)]
            found = rotation(self.positions[rows].cpu())
            if found is not None:
                return found | {"period": found["period"] * level}
        return None

    def _say(self, trainer: Trainer, verdict: str, evidence: Evidence, advice: str = "") -> None:
        if any(said["verdict"] == verdict for said in self.verdicts):
            return
        step, advice = trainer.global_step, advice or HEALTH[verdict]
        self.verdicts.append({"step": step, "verdict": verdict, "evidence": evidence, "advice": advice})
        say = rank_zero_info if verdict == "loss_tells_nothing" else rank_zero_warn
        say(f"{verdict} at step {step}: {_text(evidence)}. {advice}")


def _held_out(trainer: Trainer) -> list[Unpacked]:
    """This rank's samples of the first validation loader, and their conditions."""
    parts = RealData(trainer, loader_to_read(trainer, "val"), HELD_OUT * trainer.world_size)
    return [move_data_to_device(part, "cpu") for part in parts]


def _flat_logits(logits: Logits) -> Tensor:
    return torch.cat([entry.float().flatten() for entry in entries(logits).values()])


def _flat_samples(sample: Sample) -> Tensor:
    return torch.cat([leaf.float().reshape(len(leaf), -1) for leaf in tree_leaves(sample)], 1)


def _text(evidence: Evidence) -> str:
    return in_words(evidence) or "a loss or gradient"


@torch.no_grad()
def _signals(module: GANModule, reconstructions: Sequence[str]) -> Tensor:
    """One step's :data:`SIGNALS`; NaN where a player did not move, infinite where they are not finite.

    Args:
        module: whose step.
        reconstructions: names of terms of the generator's loss, whose values are added up.
    """
    record, nan = module.last_step, torch.tensor(math.nan, device=module.device)
    values: dict[str, Tensor] = {}
    if record.pairs and "d" in record.moved:
        loss = module.loss
        values["accuracy"] = torch.stack([loss.accuracy(real, fake) for _, real, fake in record.pairs]).mean()
        gaps = [real.mean() - fake.mean() for _, real, fake in record.pairs]
        values["gap"] = loss.direction * torch.stack(gaps).mean()
    for player in record.moved:
        found = {"loss": record.terms[player].get("adversarial"), "norm": record.gradient_norms.get(player)}
        values |= {f"{player}_{name}": value for name, value in found.items() if value is not None}
    terms = record.terms["g"]
    if reconstructions and all(name in terms for name in reconstructions):
        values["reconstruction"] = torch.stack([terms[name].float() for name in reconstructions]).sum()
    infinite = torch.full_like(nan, math.inf)
    known = {name: torch.where(value.isfinite(), value.detach().float(), infinite) for name, value in values.items()}
    return torch.stack([known.get(name, nan) for name in SIGNALS])


def _position(parameters: list[nn.Parameter]) -> Tensor:
    """At most 64 entries of each, or of this process's shard of it."""
    parts = [(p.to_local() if isinstance(p, DTensor) else p).detach().flatten() for p in parameters]
    return torch.cat([part[:: max(1, math.ceil(len(part) / 64))].float() for part in parts])


def _mean(rows: Tensor) -> Tensor:
    """The mean of each column over finite entries; NaN without any."""
    finite = rows.isfinite()
    return rows.where(finite, rows.new_zeros(())).sum(0) / finite.sum(0)
