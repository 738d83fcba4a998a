"""Ten thousand Dirac-GANs with random rates, losses and optimizers: how far from the equilibrium they end.

    python examples/benchmarks/dirac.py                 # four minutes on one core
    python examples/benchmarks/dirac.py --check 20      # the first ones by the callback too
    python examples/benchmarks/dirac.py --smoke         # seconds; only shows that it runs

"Which Training Methods for GANs do actually Converge?", https://arxiv.org/abs/1801.04406: the data are the point 0, the
generator is the point θ, and the discriminator is l(x) = ψx, so that every gradient has a closed form. Games start at
(1, 1) and have 5,000 steps, the discriminator's first. Drawn by seed: both learning rates log-uniform in 1e-5 … 1e-1,
SGD, or Adam with β₁ from 0, 0.5, 0.9 and β₂ 0.999; the loss from `NonSaturating`, `Hinge`, `Wasserstein`,
`LeastSquares`. A game ends well if (θ, ψ) is at most 0.1 from the equilibrium, (0, 0), with θ's average where there is
one. With `LeastSquares` and labels 0 and 1 no game can: every θ with ψ = 0 is at rest, because this discriminator is 0
on the data and cannot tell that they are real.

The rule of `Autopilot(when="always")` is written down here for two numbers, without a Trainer, a network or a tensor,
and from its description; `--check` compares it with the callback.
"""

import argparse
import logging
import math
import random
import statistics
import warnings
from copy import copy
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from health import Point
from jobs import finish
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

import lightning_gan_stability as package
from lightning_gan_stability import Autopilot, GANModule
from lightning_gan_stability.monitors import steering
from lightning_gan_stability.monitors.autopilot import KEPT

STEPS = 5000
SEARCH = Autopilot().search
LOSSES = ["NonSaturating", "Hinge", "Wasserstein", "LeastSquares"]
CHUNK = 250  # games of a row in the file of results


class Game(NamedTuple):
    """What is drawn."""

    g_lr: float
    d_lr: float
    optimizer: str
    beta1: float
    loss: str


def draw(seed: int) -> Game:
    """The game of a seed."""
    source = random.Random(seed)
    rates = [10 ** source.uniform(-5, -1) for _ in range(2)]
    return Game(*rates, source.choice(["SGD", "Adam"]), source.choice([0.0, 0.5, 0.9]), source.choice(LOSSES))


# ---------- the game in closed form


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def gradients(loss: str, theta: float, psi: float) -> tuple[float, float]:
    """∂L_G/∂θ and ∂L_D/∂ψ, without penalties."""
    logit = psi * theta
    if loss == "NonSaturating":
        return -psi * sigmoid(-logit), theta * sigmoid(logit)
    if loss == "Hinge":
        return -psi, theta if logit > -1 else 0.0
    if loss == "Wasserstein":
        return -psi, theta
    return (logit - 1) * psi, logit * theta


class Adam:
    """Adam, or SGD without betas, for one number."""

    def __init__(self) -> None:
        self.first = self.second = 0.0
        self.steps = 0

    def step(self, gradient: float, rate: float, betas: tuple[float, float] | None) -> float:
        """What is added to the number."""
        if betas is None:
            return -rate * gradient
        self.steps += 1
        self.first += (1 - betas[0]) * (gradient - self.first)
        self.second += (1 - betas[1]) * (gradient**2 - self.second)
        size = math.sqrt(self.second / (1 - betas[1] ** self.steps)) + 1e-8
        return -rate * self.first / (1 - betas[0] ** self.steps) / size


class State:
    """What training moves."""

    def __init__(self) -> None:
        self.theta = self.psi = self.average = 1.0
        self.g, self.d = Adam(), Adam()
        self.steps = self.updates = 0  # of both players' batches, and of the average

    def copy(self) -> "State":
        other = copy(self)
        other.g, other.d = copy(self.g), copy(self.d)
        return other

    def play(self, loss: str, settings: dict[str, float], fall: float) -> bool:
        """One step of each player; whether all numbers are finite."""
        betas = (
            [(settings[f"{player}_beta1"], settings[f"{player}_beta2"]) for player in "gd"]
            if "g_beta1" in settings
            else [None, None]
        )
        times = int(settings["d_steps"])  # of the discriminator; its penalties are due once in as many batches
        gamma = times * (settings["r1"] + settings["r2"]) if self.steps % times == 0 else 0.0
        for _ in range(times):
            gradient = gradients(loss, self.theta, self.psi)[1] + gamma * self.psi
            self.psi += self.d.step(gradient, settings["d_lr"] * fall, betas[1])
        self.theta += self.g.step(gradients(loss, self.theta, self.psi)[0], settings["g_lr"] * fall, betas[0])
        self.steps += 1
        return math.isfinite(self.psi) and math.isfinite(self.theta)

    def follow(self) -> None:
        """The average's half-life is a fiftieth of its steps so far."""
        half_life = self.updates / 50
        keep = 0.5 ** (1 / half_life) if half_life else 0.0
        self.average += (1 - keep) * (self.theta - self.average)
        self.updates += 1

    @property
    def distance(self) -> float:
        """The energy distance of one point to another is twice their distance; the mean of the average's and θ's."""
        return abs(self.theta) + abs(self.average)

    def went(self, theta: float) -> float:
        """The energy distance from samples of before."""
        return abs(self.theta - theta) + abs(self.average - theta)


def own_settings(game: Game) -> dict[str, float]:
    rates = {"g_lr": game.g_lr, "d_lr": game.d_lr}
    betas = {f"{player}_beta{i}": beta for player in "gd" for i, beta in ((1, game.beta1), (2, 0.999))}
    return rates | (betas if game.optimizer == "Adam" else {}) | {"r1": 0.0, "r2": 0.0, "d_steps": 1}


# ---------- the rule


class Pilot:
    """`Autopilot(when="always")` for one game.

    Args:
        game: what was drawn.
        steps: of the run.
    """

    def __init__(self, game: Game, steps: int) -> None:
        self.game, self.horizon, self.step = game, steps, 0
        self.state, self.own = State(), own_settings(game)
        self.settings = self.own
        self.races = self.returns = 0
        self.history: list[float] = []
        self.best: tuple[float, State, dict[str, float]] | None = None
        self.moved = -1

    def run(self) -> float:
        """The distance from the equilibrium at the end, of the average."""
        self.race(self.candidates(self.own))
        while self.step < self.horizon:
            if not self.train(1):
                if not self.act(went_wrong=True):
                    return math.inf
            elif self.step % max(1, self.horizon // 50) == 0:
                self.look()
        return math.hypot(self.state.average, self.state.psi)

    def train(self, n: int, turn: int | None = None) -> bool:
        """Some steps; in a turn of a race, rates fall at its end too."""
        end = self.step + n
        while self.step < min(end, self.horizon):
            left = 1 - self.step / self.horizon
            if turn is not None:
                left = min(left, (end - self.step) / turn)
            self.step += 1
            if not self.state.play(self.game.loss, self.settings, min(1.0, left / 0.5)):
                return False
            self.state.follow()
        return True

    def race(self, candidates: list[dict[str, float]]) -> None:
        """Successive halving."""
        self.races += 1
        start, before = self.state.copy(), self.settings
        length, legs = 2, len(candidates)
        for kept in KEPT[:-1]:
            legs, length = legs + min(kept, len(candidates)) * length, 2 * length
        leg = max(1, round(SEARCH * self.horizon / legs))
        runners: list[tuple[float, State, dict[str, float]]] = [(0.0, start, settings) for settings in candidates]
        for turn, kept in enumerate(KEPT):
            ended = []
            for _, state, settings in runners:
                if self.step >= self.horizon:
                    break
                self.state, self.settings = state.copy(), settings
                finite = self.train(leg * 2**turn, leg * 2**turn)
                ended.append((self.state.distance if finite else math.inf, self.state, settings))
            # who has not moved loses
            ended.sort(key=lambda one: (one[1].went(start.theta) <= 0.02 * start.distance, one[0]))
            runners = [one for one in ended[:kept] if math.isfinite(one[0])]
            if len(runners) < 2:
                break
        if runners:
            score, state, self.settings = runners[0]
            self.state, self.history = state.copy(), [score]
            self.best = (score, state, self.settings)
        else:
            self.state, self.settings = start, before

    def look(self) -> None:
        """Measure; act if something is wrong. Real data have no distance to themselves: nothing is near enough."""
        if self.state.steps == self.moved:
            return
        self.moved = self.state.steps
        distance = self.state.distance
        before = min(self.history[1:], default=math.inf)  # the first one is of rates that had fallen
        self.history.append(distance)
        past = self.history[1:]
        recent, earlier = past[-10:], past[:-10]
        wrong = distance > 4 * before and past[-2] > 4 * before
        stuck = bool(earlier) and min(recent) > 0.9 * min(earlier) and min(past) > 0
        if distance < before and (self.best is None or distance <= 4 * self.best[0]):
            self.best = (distance, self.state.copy(), self.settings)
        if wrong or stuck:
            self.act(wrong)

    def act(self, went_wrong: bool) -> bool:
        """Race again, from the best state with calmer settings if it went wrong."""
        may_race = self.races < 3 and self.horizon - self.step > 2 * round(SEARCH * self.horizon)
        if not may_race and not (self.best and went_wrong and self.returns < 3):
            return False
        if self.best and went_wrong:
            score, state, settings = self.best
            self.state, self.settings = state.copy(), settings
            calmer = self.calmer(settings)
            if may_race:
                self.race(calmer)
            else:
                self.returns += 1
                self.settings = calmer[min(1, len(calmer) - 1)]
                self.best = (score, self.state.copy(), self.settings)
        else:
            self.race(self.candidates(self.settings))
        return True

    # ---------- what to try

    def candidates(self, now: dict[str, float]) -> list[dict[str, float]]:
        found = [now]
        if self.game.optimizer == "Adam":
            for g_lr, d_lr, beta1, beta2, gamma in steering.PORTFOLIO:
                betas = {f"{player}_beta{i}": beta for player in "gd" for i, beta in ((1, beta1), (2, beta2))}
                penalty = {"r1": gamma, "r2": gamma, "d_steps": steering.D_STEPS}
                found.append({"g_lr": g_lr, "d_lr": d_lr} | betas | penalty)
        else:
            mean = math.sqrt(now["g_lr"] * now["d_lr"])
            for g, d, gamma in steering.AROUND:
                found.append(now | {"g_lr": g * mean, "d_lr": d * mean, "r1": gamma, "r2": gamma})
        return steering.distinct(steering.within(settings, now, steering.LIMITS) for settings in found)

    def calmer(self, now: dict[str, float]) -> list[dict[str, float]]:
        found = [now]
        for g, d, gamma in steering.CALMER:
            weights = {name: max(gamma * now[name], 0.1) for name in ("r1", "r2")}
            found.append(now | {"g_lr": g * now["g_lr"], "d_lr": d * now["d_lr"]} | weights)
        return steering.distinct(steering.within(settings, now, steering.LIMITS) for settings in found)


def plain(game: Game, steps: int) -> float:
    """The distance from the equilibrium at the end."""
    state, settings = State(), own_settings(game)
    for _ in range(steps):
        if not state.play(game.loss, settings, 1.0):
            return math.inf
    return math.hypot(state.theta, state.psi)


# ---------- the package


def through_trainer(game: Game, steps: int) -> float:
    """The same by the callback."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    seed_everything(0, verbose=False)
    line = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    point = Point().double()
    for number in (*line.parameters(), *point.parameters()):
        nn.init.ones_(number)

    def make(rate: float) -> Any:
        if game.optimizer == "SGD":
            return lambda parameters: torch.optim.SGD(parameters, lr=rate)
        return lambda parameters: torch.optim.Adam(parameters, lr=rate, betas=(game.beta1, 0.999))

    gan = GANModule(point, line, 1, getattr(package, game.loss)(), make(game.g_lr), make(game.d_lr))
    data = DataLoader([torch.zeros(1, 1, dtype=torch.float64)] * steps, batch_size=None)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    pilot = Autopilot(when="always", n_samples=50)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, limit_val_batches=0, enable_progress_bar=False, callbacks=[pilot], **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(gan, data)
    assert gan.generator_ema is not None
    return math.hypot(gan.generator_ema.theta.item(), line.weight.item())


def chunk(first: int, games: int, steps: int) -> dict[str, Any]:
    """Some games, plainly and with the rule."""
    start = process_time()
    drawn = [draw(seed) for seed in range(first, first + games)]
    ends = {"plain": [plain(game, steps) for game in drawn], "autopilot": [Pilot(game, steps).run() for game in drawn]}
    return ends | {"seconds": process_time() - start}


def table(rows: list[dict[str, Any]]) -> str:
    """How many end within 0.1 of the equilibrium, by optimizer and loss."""
    games = [draw(row["first"] + i) for row in rows for i in range(row["games"])]
    ends = {name: [end for row in rows for end in row[name]] for name in ("plain", "autopilot")}
    groups = sorted({(game.optimizer, game.loss) for game in games})
    lines = [
        "| optimizer, loss | games | plain | with the rule | median distance, plain | with the rule |",
        "|---" * 6 + "|",
    ]
    for group in [*groups, None]:
        mine = [i for i, game in enumerate(games) if group in (None, (game.optimizer, game.loss))]
        cells = [", ".join(group) if group else "all", f"{len(mine):,}"]
        cells += [f"{sum(end[i] <= 0.1 for i in mine):,}" for end in ends.values()]
        cells += [f"{statistics.median(end[i] for i in mine):.2g}" for end in ends.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--check", type=int, default=0, help="games to play through a Trainer too")
    parser.add_argument("--results", type=Path, default=Path("runs/dirac.jsonl"))
    parser.add_argument("--smoke", action="store_true", help="ten games, a few steps")
    arguments = parser.parse_args()
    steps, games = (500, 10) if arguments.smoke else (STEPS, arguments.games)
    for seed in range(1 if arguments.smoke else arguments.check):
        game = draw(seed)
        ours, theirs = Pilot(game, steps).run(), through_trainer(game, steps)
        print(f"{seed}: {ours:.9g} in closed form, {theirs:.9g} through a Trainer; {game}")
    size = min(CHUNK, games)
    jobs = [{"first": first, "games": size, "steps": steps} for first in range(0, games, size)]
    rows = finish(chunk, jobs, arguments.jobs, None if arguments.smoke else arguments.results)
    print(
        f"\n{games:,} games of {steps:,} steps, {sum(row['seconds'] for row in rows):.0f} CPU seconds\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
