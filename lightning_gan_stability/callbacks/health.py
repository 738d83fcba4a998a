"""Why a GAN does not train: cheap signals of every step, and verdicts with advice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_gan_stability.callbacks.base import Remembering, check_bool, check_positive_int, evaluation
from lightning_gan_stability.callbacks.quality import real_batches
from lightning_gan_stability.doors import dtype_of, generator

if TYPE_CHECKING:
    from lightning_gan_stability import GANModule

Evidence: TypeAlias = dict[str, float]
Window: TypeAlias = Mapping[str, float]

SIGNALS = ("accuracy", "gap", "d_loss", "g_loss", "d_norm", "g_norm")
LEVELS = (1, 4, 16)  # steps between the positions that a rotation is looked for in
POINTS = 64  # positions at each level
ADVICE = {
    "vanishing_gradient": "The discriminator is too good. Use the NonSaturating or Relativistic loss, or add R1Penalty "
    "or SpectralNorm.",
    "exploding_gradient": "Add R1Penalty and R2Penalty, or set `clip_norm`.",
    "noisy_gradient": "Use larger batches or `accumulate`, add GeneratorEMA, or lower the generator's learning rate.",
    "weak_discriminator": "Add UpdateRatio(d_steps=2) or AdaptiveUpdateRatio, raise the discriminator's learning rate, "
    "or weaken its penalties.",
    "oscillation": "The players circle. Add R1Penalty, Extragradient or Lookahead, or use OptimisticAdam.",
    "overfitting_discriminator": "The discriminator learns the data by heart. Add LeCam or ConsistencyPenalty, or get "
    "more data.",
    "not_finite": "Lower the learning rates, set `clip_norm`, add R1Penalty, or CollapseDetector(action='rollback').",
    "loss_tells_nothing": "For information: do not select by loss. Use ModelCheckpoint(monitor='quality/fid').",
}


# ---------- decisions, from the windows so far, the last one at the end


def vanishing_gradient(windows: Sequence[Window]) -> Evidence | None:
    """The generator's gradient is below a thousandth of its largest, and the discriminator nearly always right."""
    now, largest = windows[-1], max((w["g_norm"] for w in windows if math.isfinite(w["g_norm"])), default=0.0)
    ratio = now["g_norm"] / largest if largest else math.nan
    if (ratio < 1e-3 or now["g_norm"] == 0) and now["accuracy"] > 0.95:
        return {"g_norm": now["g_norm"], "of_largest": ratio, "accuracy": now["accuracy"]}
    return None


def exploding_gradient(windows: Sequence[Window]) -> Evidence | None:
    """The generator's gradient is more than a hundred times its median so far."""
    before = sorted(w["g_norm"] for w in windows[:-1] if math.isfinite(w["g_norm"]))
    ratio = windows[-1]["g_norm"] / max(before[len(before) // 2], 1e-12) if len(before) >= 5 else math.nan
    return {"g_norm": windows[-1]["g_norm"], "of_median": ratio} if ratio > 100 else None


def noisy_gradient(windows: Sequence[Window]) -> Evidence | None:
    """The norm of the generator's gradient varies, within a window, by more than three times its mean."""
    spread = windows[-1]["g_spread"]
    return {"g_norm": windows[-1]["g_norm"], "spread": spread} if spread > 3 else None


def weak_discriminator(windows: Sequence[Window]) -> Evidence | None:
    """The discriminator guesses, though generated samples have other means or deviations than real ones."""
    now = windows[-1]
    if now["accuracy"] < 0.55 and now["apart"] > 0.1 + now["apart_by_chance"]:
        return {"accuracy": now["accuracy"], "gap": now["gap"], "apart": now["apart"]}
    return None


def overfitting_discriminator(windows: Sequence[Window]) -> Evidence | None:
    """r_v = (D(train) − D(held out)) / (D(train) − D(fake)) is above 0.6, and more than chance."""
    now = windows[-1]
    if now["r_v"] > 0.6 and now["r_v_by_chance"] < 0.3:
        return {"r_v": now["r_v"], "train": now["train_logit"], "held_out": now["held_out_logit"]}
    return None


def rotation(positions: Tensor) -> Evidence | None:
    """Whether the players circle: how the directions of their moves, k moves apart, are alike.

    C(k) = E cos∠(u_t, u_{t+k}) of the moves u is cos ωk for a rotation by ω per move, and below e^(−λk) if it damps or
    wanders. A trough below −½ and then a peak above ½ are a period; moves of the last half that are not smaller than
    nine tenths of the first half's do not damp.

    Args:
        positions: (n, d) of both players' parameters, every so many steps.
    """
    moves = positions.double().diff(dim=0)
    norms = moves.norm(dim=1)
    if len(moves) < POINTS or not bool((norms > 0).all() and norms.isfinite().all()):
        return None
    directions = moves / norms[:, None]
    alike = directions @ directions.T
    course = torch.stack([alike.diagonal(k).mean() for k in range(len(moves) // 2 + 1)])
    trough = int(course.argmin())
    half = len(moves) // 2
    amplitude = (norms[half:].square().mean() / norms[:half].square().mean()).sqrt().item()
    peak = course[trough:].max().item()
    if course[trough] < -0.5 and peak > 0.5 and amplitude > 0.9 and trough > 1:
        return {"trough": course[trough].item(), "peak": peak, "period": 2.0 * trough, "amplitude": amplitude}
    return None


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's ρ: the correlation of ranks, ties at their mean.

    Example:
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
    """
    from scipy.stats import spearmanr  # type: ignore[import-untyped]  # slow to import

    return float(spearmanr(x, y).statistic)


def loss_tells_nothing(losses: Sequence[float], fids: Sequence[float]) -> Evidence | None:
    """Over eight measurements or more, a lower generator loss does not go with a lower FID: ρ < 0.3."""
    if len(fids) < 8 or len(set(losses)) < 2 or len(set(fids)) < 2:
        return None
    rho = rank_correlation(losses, fids)
    return {"rank_correlation": rho, "measurements": float(len(fids))} if rho < 0.3 else None


DECISIONS = {
    "vanishing_gradient": vanishing_gradient,
    "exploding_gradient": exploding_gradient,
    "noisy_gradient": noisy_gradient,
    "weak_discriminator": weak_discriminator,
    "overfitting_discriminator": overfitting_discriminator,
}


@final
class HealthMonitor(Remembering):
    """Watches every step for the failures that make GANs hard to train, and says what to add.

    * ``vanishing_gradient``: the generator's gradient below 10⁻³ of its largest, accuracy above 95 %. "Towards
      Principled Methods for Training Generative Adversarial Networks", https://arxiv.org/abs/1701.04862.
    * ``exploding_gradient``, ``noisy_gradient``: above 100 times its median; varying by more than 3 times its mean.
    * ``weak_discriminator``: accuracy below 55 %, though means and deviations of fake samples differ from
      those of real ones (squared distance over the real variance above 0.1 and chance).
    * ``oscillation``: the joint moves of both players turn with a period, and do not get smaller (:func:`rotation`).
      "The Numerics of GANs", https://arxiv.org/abs/1705.10461.
    * ``overfitting_discriminator``: r_v above 0.6 (:func:`overfitting_discriminator`), if there is held-out data.
      "Training Generative Adversarial Networks with Limited Data", https://arxiv.org/abs/2006.06676.
    * ``not_finite``: a loss or gradient was not finite.
    * ``loss_tells_nothing``: the rank correlation of generator loss and FID is below 0.3; for information.

    Signals are kept on the device and averaged over ranks every ``every`` steps; a verdict takes ``patience`` of these
    in a row. It is a warning when it comes up first, in ``verdicts`` (``step``, ``verdict``, ``evidence``, ``advice``),
    in the log as ``health/<verdict>`` (1 or 0), and in the table at the end of the fit. A run is the same with and
    without the monitor. Costs a copy of 256 numbers and a few scalars per step, and three forward passes of a batch per
    ``every`` steps.

    Args:
        every: steps between decisions.
        patience: decisions in a row that a verdict takes.
        held_out: look at held-out data too, if the run has a validation loader.

    Raises:
        ValueError: if an argument has a bad value.

    Example:
        >>> HealthMonitor(every=200).verdicts
        []
    """

    watches = True

    def __init__(self, every: int = 100, patience: int = 3, held_out: bool = True) -> None:
        super().__init__()
        check_positive_int("every", every)
        check_positive_int("patience", patience)
        check_bool("held_out", held_out)
        self.every = every
        self.patience = patience
        self.held_out = held_out
        self._clear()

    def _clear(self) -> None:
        self.verdicts: list[dict[str, Any]] = []
        self._windows: list[dict[str, float]] = []
        self._rows: list[Tensor] = []  # of signals, since the last decision
        self._positions: list[Tensor] = []
        self._counts: dict[str, int] = {}  # decisions in a row
        self._fids: list[tuple[float, float]] = []  # generator loss and FID at each measurement
        self._held: Tensor | None = None
        self._held_labels: Tensor | None = None

    def _forget(self, module: GANModule) -> None:
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on."""
        return super().state_dict() | {
            "verdicts": self.verdicts,
            "windows": self._windows,
            "rows": torch.stack(self._rows).cpu() if self._rows else None,
            "positions": torch.stack(self._positions).cpu() if self._positions else None,
            "counts": self._counts,
            "fids": self._fids,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        super().load_state_dict(state_dict)
        self.verdicts, self._windows = list(state_dict["verdicts"]), list(state_dict["windows"])
        self._rows, self._positions = (
            [*(state_dict[k] if state_dict[k] is not None else [])] for k in ("rows", "positions")
        )
        self._counts, self._fids = dict(state_dict["counts"]), [tuple(pair) for pair in state_dict["fids"]]

    # ---------- what the Trainer calls

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fetch a batch of held-out data."""
        super().on_train_start(trainer, pl_module)
        module: GANModule = pl_module  # type: ignore[assignment]
        self._first = module.iteration
        val = trainer.fit_loop.epoch_loop.val_loop._data_source
        self._held = self._held_labels = None
        if self.held_out and val.instance is not None and val.is_defined() and val.dataloader():
            with module._rewound():
                batches = [module.unpack(batch) for batch in real_batches(trainer, "val", 256 * trainer.world_size)]
            self._held = torch.cat([real for real, _ in batches])
            labels = [part for _, part in batches if part is not None]
            self._held_labels = torch.cat(labels) if labels else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep this step's signals; decide if it is time."""
        module: GANModule = pl_module  # type: ignore[assignment]
        self._rows.append(_signals(module))
        self._positions = [*self._positions[1 - POINTS * LEVELS[-1] - LEVELS[-1] :], _position(module)]
        if module.iteration % self.every == 0:
            self._decide(trainer, module, batch)
        self._iteration = module.iteration

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note a loss or gradient that was not finite; the table says what came before it."""
        if isinstance(exception, FloatingPointError):
            self._say(trainer, "not_finite", {})
            self._print()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        self._print()

    # ---------- deciding

    def _decide(self, trainer: Trainer, module: GANModule, batch: Any) -> None:
        window = self._window(trainer, module, batch)
        self._windows.append(window)
        found = {name: decision(self._windows) for name, decision in DECISIONS.items()}
        found["oscillation"] = self._rotation()
        fid = trainer.callback_metrics.get("quality/fid")
        if fid is not None and math.isfinite(fid) and (not self._fids or self._fids[-1][1] != float(fid)):
            self._fids.append((window["g_loss"], float(fid)))
        found["loss_tells_nothing"] = loss_tells_nothing(*zip(*self._fids, strict=True)) if self._fids else None
        for name, evidence in found.items():
            self._counts[name] = self._counts.get(name, 0) + 1 if evidence is not None else 0
            if evidence is not None and self._counts[name] == self.patience:
                self._say(trainer, name, evidence)
        state = {f"health/{name}": float(count >= self.patience) for name, count in self._counts.items()}
        module.log_dict(state, on_step=True, on_epoch=False)

    def _window(self, trainer: Trainer, module: GANModule, batch: Any) -> dict[str, float]:
        rows = torch.stack([row.to(module.device) for row in self._rows])
        norms = rows[:, SIGNALS.index("g_norm")]
        norms = norms[norms.isfinite()]
        spread = norms.std(correction=0) / norms.mean() if len(norms) > 1 else norms.new_tensor(0.0)
        values = dict(zip(SIGNALS, _mean(rows), strict=True)) | {"g_spread": spread} | self._probe(module, batch)
        self._rows = []
        reduced = trainer.strategy.reduce(torch.stack([v.float() for v in values.values()]), reduce_op="mean")
        return dict(zip(values, reduced.tolist(), strict=True))

    def _probe(self, module: GANModule, batch: Any) -> dict[str, Tensor]:
        """How far fake samples are from real ones, and logits of training, held-out and fake samples."""
        real, labels = module.unpack(batch)
        n = len(real)
        latents = torch.randn(n, module.latent_dim, generator=generator("health")).to(dtype_of(module, torch.float32))
        with module._rewound(), evaluation(module):
            fake = module.sample(n, labels, latents.to(module.device))
            pairs = [(real, labels), (fake, labels)] + ([] if self._held is None else [(self._held, self._held_labels)])
            logits = [module.loss._direction * module.discriminate(*pair).float().flatten() for pair in pairs]
        x, y = real.float().flatten(1), fake.float().flatten(1)
        total = x.var(0, correction=0).sum().clamp(min=1e-12)
        apart = (x.mean(0) - y.mean(0)).square().sum() + (
            x.std(0, correction=0) - y.std(0, correction=0)
        ).square().sum()
        train, made, held = (logits[0], logits[1], logits[-1] if self._held is not None else logits[0])
        gap = (train.mean() - made.mean()).abs().clamp(min=1e-12)
        chance = (train.var(correction=0) / len(train) + held.var(correction=0) / len(held)).sqrt() / gap
        return {
            "apart": torch.where(total > 1e-12, apart / total, 0.0),  # of a single point there is no measure
            "apart_by_chance": apart.new_tensor(8 / n),
            "r_v": (train.mean() - held.mean()) / gap,
            "r_v_by_chance": chance,
            "train_logit": train.mean(),
            "held_out_logit": held.mean(),
        }

    def _rotation(self) -> Evidence | None:
        for level in LEVELS:
            positions = self._positions[::-1][::level][: POINTS + 1][::-1]
            found = rotation(torch.stack([p.cpu() for p in positions])) if len(positions) > POINTS else None
            if found is not None:
                return found | {"period": found["period"] * level}
        return None

    def _say(self, trainer: Trainer, verdict: str, evidence: Evidence) -> None:
        if any(said["verdict"] == verdict for said in self.verdicts):
            return
        advice = ADVICE[verdict]
        self.verdicts.append({"step": trainer.global_step, "verdict": verdict, "evidence": evidence, "advice": advice})
        say = rank_zero_info if verdict == "loss_tells_nothing" else rank_zero_warn
        say(f"{verdict} at step {trainer.global_step}: {_text(evidence)}. {advice}")

    @rank_zero_only
    def _print(self) -> None:
        """A row for each verdict."""
        if not self.verdicts:
            print(f"HealthMonitor: no trouble seen in {self._iteration - self._first} steps.")
            return
        print("HealthMonitor\n  since step  verdict                    evidence; advice")
        for said in self.verdicts:
            print(f"  {said['step']:>10}  {said['verdict']:<25}  {_text(said['evidence'])}; {said['advice']}")


def _text(evidence: Evidence) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in evidence.items()) or "a loss or gradient"


@torch.no_grad()
def _signals(module: GANModule) -> Tensor:
    """One step's :data:`SIGNALS`; NaN where a player did not move."""
    now, nan = module._now, torch.tensor(math.nan, device=module.device)
    values = dict.fromkeys(SIGNALS, nan)
    if now.judged is not None and "d" in module.moved:
        real, fake = now.judged
        values["accuracy"] = module.loss.accuracy(real, fake)
        values["gap"] = module.loss._direction * (real.mean() - fake.mean())
    for player in module.moved:
        values[f"{player}_loss"] = now.terms[player].get(f"{player}/adversarial", nan)
        values[f"{player}_norm"] = now.logs.get(f"{player}/grad_norm", nan)
    return torch.stack([torch.as_tensor(value, device=module.device).float().detach() for value in values.values()])


@torch.no_grad()
def _position(module: GANModule) -> Tensor:
    """At most 128 entries of each player's two largest parameters, scaled to a common size."""
    parts = []
    for player in ("d", "g"):
        largest = sorted(module._moving(player), key=Tensor.numel, reverse=True)[:2]
        parts += [p.detach().flatten()[:: max(1, math.ceil(p.numel() / 64))].float() for p in largest]
    return torch.cat(parts)


def _mean(rows: Tensor) -> Tensor:
    """The mean of each column over finite entries; NaN without any."""
    finite = rows.isfinite()
    return rows.where(finite, rows.new_zeros(())).sum(0) / finite.sum(0)
