"""What an error of a value that is not finite says: samples, layer and term; and that asking changes nothing."""

import gc
import logging
import math
import re
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from toys import fit, points, sgd, small, tensors, weights

from lightning_gan_stability import (
    MLP,
    Alternating,
    Extragradient,
    FakePool,
    GANCallback,
    GANModule,
    LeCam,
    R1Penalty,
    Regularizer,
    Simultaneous,
    Tokenizer,
    Unrolling,
    Wasserstein,
)
from lightning_gan_stability.finite import Turn, in_weights, listed

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def error_of(module, batches, **kwargs):
    """What the run's error says, in one line."""
    with pytest.raises(FloatingPointError) as caught:
        fit(module, batches, **kwargs)
    return str(caught.value)


ADVICE = "lower the learning rate of `{0}_optimizer`, or of the other player's, set `clip_norm`, or add R1Penalty."


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


class Times(nn.Module):
    """x · c."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


class First(nn.Module):
    """The first column, with the gradient of all of them."""

    def forward(self, x):
        return x[:, :1]


def marked(n_batches, marks, batch_size=8, value=-1.0):
    """Batches of ones, the last of which has another value in the first column of some rows."""
    batches = [torch.ones(batch_size, 2) for _ in range(n_batches)]
    batches[-1][marks, 0] = value
    return batches


class Positive(nn.Module):
    """A generator of positive samples."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, latents):
        return self.net(latents).square() + 1


def judge(*layers, **kwargs):
    """A GAN with a discriminator of given layers, which see samples above 0 but for the marked ones."""
    torch.manual_seed(0)
    return GANModule(Positive(), nn.Sequential(*layers), latent_dim=4, **kwargs)


# ---------- the data


def test_samples_that_are_not_finite_are_named():
    found = error_of(small(), marked(3, [3, 7], value=math.nan))
    assert found == (
        "Not finite in the discriminator's update at step 2: `d/adversarial`, `d/grad_norm`. The data are not finite: "
        "`real`, in samples 3 and 7 of 8. Repair these samples, or leave them out."
    )


class Sound(GANModule):
    """Samples with two leaves, and a condition with one."""

    def unpack(self, batch):
        return {"wave": batch["wave"], "mel": [batch["mel"]]}, {"text": batch["text"]}

    def generate(self, network, n, condition, latents):
        made = network(latents)
        return {"wave": made[:, :1], "mel": [made[:, 1:]]}

    def discriminate(self, network, sample, condition):
        return network(torch.cat([sample["wave"], sample["mel"][0] + condition["text"]], 1))


@pytest.mark.parametrize(
    ("leaf", "rows", "text"),
    [
        ("wave", [5], "`real.wave`, in sample 5 of 8."),
        ("mel", range(8), "`real.mel.0`, in all 8 samples."),
        ("mel", range(7), "`real.mel.0`, in samples 0, 1, 2, 3, 4 and 2 more of 8."),
        ("text", [0, 1], "`condition.text`, in samples 0 and 1 of 8."),
    ],
)
def test_the_leaf_of_a_tree_is_named(leaf, rows, text):
    batch = {name: torch.ones(8, 1) for name in ("wave", "mel", "text")}
    batch[leaf][[*rows]] = math.inf
    module = Sound(MLP([4, 2]), MLP([2, 1]), 4)
    assert f"The data are not finite: {text} Repair" in error_of(module, [batch])


def test_rows_are_those_of_the_whole_batch_with_micro_batches():
    assert "`real`, in sample 7 of 8." in error_of(small(accumulate=3), marked(1, [7], value=math.nan))


# ---------- weights


class Breaks(Callback):
    """Gives a weight a value that is not finite before a step."""

    def __init__(self, name, step=1):
        self.name, self.step = name, step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == self.step:
            module.get_parameter(self.name).data.view(-1)[0] = math.inf


def test_weights_that_are_not_finite_already_are_named():
    found = error_of(small(), points(3), callbacks=[Breaks("discriminator.layers.2.weight")])
    assert found == (
        "Not finite in the discriminator's update at step 1: `d/adversarial`, `d/grad_norm`. Weights are not finite "
        "already: `discriminator.layers.2.weight`. They were loaded so, or a step along finite gradients was too "
        "large. L" + ADVICE.format("d")[1:]
    )


def test_after_a_delay_weights_are_named_and_what_to_do():
    """As where values wait until they are logged: steps have been taken when they are looked at."""
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=lambda outputs: outputs.fake.mean() * math.nan)
    look, module.engine.check_finite = module.engine.check_finite, lambda: None
    fit(module, points(3))
    with pytest.raises(FloatingPointError) as caught:
        look()
    assert str(caught.value) == (
        "Not finite in the generator's update at step 0: `g/extra`, `g/grad_norm`. Steps have been taken since, "
        "because on cpu values are looked at when they are logged, and weights are not finite by now: "
        "`generator.layers.0.weight`, `generator.layers.0.bias`, `discriminator.layers.0.weight` and "
        "`discriminator.layers.0.bias`. Go on from the last checkpoint with Trainer(log_every_n_steps=1), and the "
        "error will name the layer and the samples. L" + ADVICE.format("g")[1:]
    )


def test_of_many_weights_some_are_named():
    module = small()
    assert in_weights(module) is None
    for p in module.parameters():
        p.data.fill_(math.nan)
    assert (
        "`generator.layers.0.weight`, `generator.layers.0.bias`, `generator.layers.2.weight`, "
        "`generator.layers.2.bias`, `discriminator.layers.0.weight` and 3 more." in in_weights(module).text
    )


# ---------- forward


def test_the_layer_and_the_samples_are_named():
    module = judge(nn.Sequential(Times(1.0), Log()), nn.Linear(2, 1))
    found = error_of(module, marked(2, [1, 4]))
    assert (
        "`d/grad_norm`. First in the forward pass of `discriminator.0.1` (Log), whose inputs are finite, in real "
        "samples 1 and 4 of 8. Lower the learning rate of `d_optimizer`" in found
    )


class Poke(nn.Module):
    """Sets rows to -1 (or another value)."""

    def __init__(self, rows, value=-1.0):
        super().__init__()
        self.rows, self.value = rows, value

    def forward(self, x):
        x = x.clone()
        x[self.rows] = self.value
        return x


def test_the_generator_and_its_samples_are_named():
    torch.manual_seed(0)
    module = GANModule(nn.Sequential(Positive(), Poke([2]), Log()), MLP([2, 1]), 4)
    found = error_of(module, points(1))
    assert "update at step 0: `d/adversarial`, `d/grad_norm`. First in the forward pass of `generator.2` (Log)" in found
    assert "whose inputs are finite, in generated sample 2 of 8. Lower" in found


@pytest.mark.parametrize("plan", [("d", "g"), ("g", "d")])
def test_a_discriminator_that_breaks_on_generated_samples(plan):
    torch.manual_seed(0)
    discriminator = nn.Sequential(Log(), nn.Linear(2, 1))
    module = GANModule(nn.Sequential(Positive(), Poke([6])), discriminator, 4, plan=plan)
    found = error_of(module, marked(1, []))
    assert f"update at step 0: `{plan[0]}/adversarial`" in found
    assert "of `discriminator.0` (Log), whose inputs are finite, in generated sample 6 of 8." in found


def test_rows_of_a_layer_are_those_of_the_whole_batch_with_micro_batches():
    module = judge(Log(), nn.Linear(2, 1), accumulate=3)
    # of three micro-batches the first has samples 0 to 2, the second 3 to 5
    found = error_of(module, marked(1, [4]))
    assert "`discriminator.0` (Log), whose inputs are finite, in real sample 4 of 8." in found


@pytest.mark.parametrize(("rows", "text"), [([1, 4, 7], "samples 1, 4 and 7"), ([4, 7], "samples 4 and 7")])
def test_rows_of_a_layer_are_those_of_all_micro_batches(rows, text):
    module = judge(Log(), nn.Linear(2, 1), accumulate=3)
    found = error_of(module, marked(1, rows))
    assert f"`discriminator.0` (Log), whose inputs are finite, in real {text} of 8." in found


def test_rows_of_a_gradient_are_those_of_all_micro_batches():
    module = judge(nn.Linear(2, 2), Root(), nn.Linear(2, 1), accumulate=3)
    with torch.no_grad():
        module.discriminator[0].weight.copy_(torch.eye(2))
        module.discriminator[0].bias.zero_()
    found = error_of(module, marked(1, [1, 4], value=0.0))
    assert "first in the backward pass of `discriminator.1` (Root), in samples 1 and 4 of 8." in found


class Between(nn.Module):
    """Breaks between its layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.last = Times(1.0), function, nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def test_what_breaks_between_layers_is_the_layer_around_them():
    module = judge(Between(torch.log), nn.Flatten())
    found = error_of(module, marked(1, [0]))
    assert "of `discriminator.0` (Between), whose inputs are finite, in real sample 0 of 8." in found


class Aside(nn.Module):
    """Judges by one layer, after another of which nothing comes into what it returns."""

    def __init__(self, judge):
        super().__init__()
        self.aside, self.judge, self.last = Log(), judge, nn.Linear(2, 1)

    def forward(self, x):
        self.unread = self.aside(x - 2)
        return self.last(self.judge(x))


def test_a_layer_that_no_loss_reads_is_not_blamed_for_another():
    found = error_of(judge(Aside(Root())), marked(2, [2]))
    assert "First in the forward pass of `discriminator.0.judge` (Root), whose inputs are finite, in real" in found


@pytest.mark.filterwarnings("ignore:`discriminate` returned two tensors")
def test_a_layer_that_no_loss_reads_is_not_blamed_for_a_term():
    class Features(GANModule):
        def discriminate(self, network, sample, condition):
            return network.judge(sample), network.aside(sample - 9)

    torch.manual_seed(0)
    layers = nn.ModuleDict({"judge": nn.Linear(2, 1), "aside": nn.Sequential(nn.Linear(2, 2), Log())})

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.judge, self.aside = layers["judge"], layers["aside"]

    class Broken(Extra, Features):
        pass

    module = Broken(Positive(), Both(), 4, extra=lambda outputs: (-outputs.fake.square()).log().mean())
    found = error_of(module, points(1))
    assert "All layers that come into it return finite values: `g/extra` itself is not finite." in found


class Attend(nn.Module):
    """Has a layer that returns -∞, of which softmax leaves nothing."""

    def __init__(self):
        super().__init__()
        self.log = Log()

    def forward(self, x):
        return x * self.log(torch.tensor([[0.0, 1.0]], device=x.device).expand(len(x), -1)).softmax(1).mean()


def test_infinity_of_which_nothing_is_left_is_no_suspect():
    module = judge(Attend(), Log(), nn.Linear(2, 1))
    assert "`discriminator.1` (Log), whose inputs are finite, in real sample 3 of 8" in error_of(module, marked(1, [3]))


class Covered(nn.Module):
    """Takes -∞ from one layer into a softmax, and what is left of it into another layer."""

    def __init__(self):
        super().__init__()
        self.cover, self.judge, self.last = Log(), Root(), nn.Linear(2, 1)

    def forward(self, x):
        covered = self.cover(torch.cat([x.square() + 1, torch.zeros_like(x)], 1))
        return self.last(self.judge(x * covered.softmax(1)[:, :2]))


def test_infinity_of_which_nothing_comes_into_another_layer_is_no_suspect():
    found = error_of(judge(Covered()), marked(2, [2]))
    assert "First in the forward pass of `discriminator.0.judge` (Root), whose inputs are finite, in real" in found


class Scores(nn.Module):
    def forward(self, x, mask):
        return (x + mask).softmax(1)


class Masked(nn.Module):
    """Lets no value through in one row, of which softmax makes NaN."""

    def __init__(self):
        super().__init__()
        self.scores = Scores()

    def forward(self, x):
        mask = torch.zeros_like(x)
        mask[2] = -math.inf
        return self.scores(x, mask)


def test_a_layer_that_a_mask_enters():
    found = error_of(judge(Masked(), nn.Linear(2, 1)), marked(1, []))
    assert "of `discriminator.0.scores` (Scores), whose inputs are finite, in real sample 2 of 8." in found


def test_one_of_several_discriminators():
    torch.manual_seed(0)
    parts = {"a": MLP([2, 1]), "b": nn.Sequential(Log(), nn.Linear(2, 1))}
    module = GANModule(Positive(), nn.ModuleDict(parts), 4)
    assert "of `discriminator.b.0` (Log), whose inputs are finite, in real sample 1" in error_of(module, marked(1, [1]))


class Half(nn.Module):
    """x · 10⁴ in float16."""

    def forward(self, x):
        return x.half() * 1e4


class Full(nn.Module):
    def forward(self, x):
        return x.float()


def test_what_is_too_large_for_float16():
    module = judge(Half(), Full(), nn.Linear(2, 1))
    found = error_of(module, marked(1, [7], value=8.0))
    assert found.endswith(
        "First in the forward pass of `discriminator.0` (Half), whose inputs are finite, in real sample 7 of 8 "
        "(float16 ends at 65504). Use precision='bf16-mixed' or '32-true'."
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision):
    module = judge(Log(), nn.Linear(2, 1))
    found = error_of(module, marked(1, [7]), precision=precision)
    assert "`discriminator.0` (Log), whose inputs are finite, in real sample 7 of 8." in found


@pytest.mark.parametrize("share_fake", [False, True])
def test_shared_samples(share_fake):
    torch.manual_seed(0)
    module = GANModule(nn.Sequential(Positive(), Poke([2]), Log()), MLP([2, 1]), 4)
    found = error_of(module, points(1), callbacks=[Alternating(share_fake=share_fake)])
    assert "First in the forward pass of `generator.2` (Log), whose inputs are finite, in generated sample 2" in found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks for it
def test_compiled_networks():
    module = judge(Log(), nn.Linear(2, 1), compile={"backend": "eager"})
    found = error_of(module, marked(2, [3]))
    assert "`discriminator.0` (Log), whose inputs are finite, in real sample 3 of 8" in found


class Random(nn.Module):
    """-1 in rows that torch's default generator draws, which it notes."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        low = torch.rand(len(x)) < 0.2
        self.rows.append(low.nonzero().flatten().tolist())
        return x * (1 - 2.0 * low[:, None])


def test_it_is_taken_again_with_the_same_draws():
    layer = Random()
    module = judge(layer, Log(), nn.Linear(2, 1))
    found = error_of(module, marked(1, [], batch_size=64))
    drawn = layer.rows[0]
    assert 0 < len(drawn) < 64
    assert f"`discriminator.1` (Log), whose inputs are finite, in real samples {listed(drawn)} of 64." in found


class Distance(nn.Module):
    def forward(self, x):
        return (-x.square() - 1).sqrt().mean()


class Coder(nn.Module):
    """Returns a loss beside its samples."""

    def __init__(self):
        super().__init__()
        self.net, self.distance = nn.Linear(2, 2), Distance()

    def forward(self, x):
        made = self.net(x)
        return made, {"codebook": self.distance(made)}


def test_a_loss_that_the_generator_returns():
    module = Tokenizer(Coder(), MLP([2, 1]), losses={"codebook": 0.25})
    assert error_of(module, points(1)) == (
        "Not finite in the generator's update at step 0: `g/codebook`, `g/grad_norm`. First in the forward pass of "
        "`generator.distance` (Distance), whose inputs are finite. L" + ADVICE.format("g")[1:]
    )
    # which the discriminator's loss does not depend on
    module = Tokenizer(Coder(), nn.Sequential(Log(), nn.Linear(2, 1)), losses={"codebook": 0.25})
    with torch.no_grad():
        module.generator.net.weight.zero_()
        module.generator.net.bias.fill_(1.0)
    found = error_of(module, marked(1, [2]))
    assert "`d/grad_norm`. First in the forward pass of `discriminator.0` (Log), whose inputs are finite, in" in found


def test_the_second_players_turn_is_taken_again_with_its_own_draws():
    class Beside(GANModule):
        def auxiliary_losses(self, player, outputs):
            return {"beside": self.beside(outputs.fake).mean()} if player == "g" else {}

    torch.manual_seed(0)
    module, layer = Beside(nn.Sequential(Positive(), nn.Dropout(0.0)), MLP([2, 1]), 4), Random()
    module.discriminator.layers.append(nn.Dropout())  # draws in the discriminator's turn
    module.beside = nn.Sequential(layer, Log())
    found = error_of(module, points(1, batch_size=64))
    drawn = layer.rows[0]
    assert 0 < len(drawn) < 64
    assert "`g/beside`" in found
    assert f"of `beside.1` (Log), whose inputs are finite, in samples {listed(drawn)} of 64." in found


# ---------- terms


class Extra(GANModule):
    """A loss of its own."""

    def __init__(self, *args, extra, player="g", **kwargs):
        super().__init__(*args, **kwargs)
        self.extra, self.of = extra, player

    def auxiliary_losses(self, player, outputs):
        return {"good": outputs.fake.mean(), "extra": self.extra(outputs)} if player == self.of else {}


def test_a_term_that_is_not_finite_in_itself():
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=lambda outputs: (-outputs.fake.square()).log().mean())
    assert error_of(module, points(1)) == (
        "Not finite in the generator's update at step 0: `g/extra`. All layers return finite values: "
        "`g/extra` itself is not finite. Look there for a logarithm of 0, a root of a negative number, a division by "
        "0, or a large `exp`."
    )


def test_a_factor_that_is_not_finite():
    class Weighed(GANModule):
        def adversarial_weight(self, player, outputs):
            return torch.tensor(math.nan)

    found = error_of(Weighed(MLP([4, 2]), MLP([2, 1]), 4), points(1))
    assert "`d/grad_norm`. All layers return finite values, and `d/adversarial` is finite: the factor that" in found
    assert found.endswith("Look at `adversarial_weight`, and at the callbacks that weigh terms.")


class Inverse(Regularizer):
    """A penalty that divides by 0."""

    differentiates = ()
    second_order = False

    def penalty(self, module, outputs):
        return 1 / (outputs.real_logits - outputs.real_logits)


@pytest.mark.parametrize("separate", [False, True])
def test_a_penalty_that_is_not_finite_in_itself(separate):
    found = error_of(small(), points(1), callbacks=[R1Penalty(), Inverse(every=2, separate=separate)])
    assert "at step 0: `d/inverse`, `d/grad_norm`. All layers return finite values: `d/inverse` itself is not" in found


# ---------- gradients

ROOT = "Look there for a root or norm at 0, or a division by 0, and add a small ε: under the root, below the fraction."


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def with_root(layer):
    """Samples whose first column is 0 have a root at 0."""
    first = nn.Linear(2, 2, bias=False)
    first.weight.data.copy_(torch.eye(2))
    return judge(first, Square(), layer, nn.Linear(2, 1))


def test_the_layer_that_a_gradient_breaks_in():
    assert error_of(with_root(Root()), marked(1, [1, 4], value=0.0)) == (
        "Not finite in the discriminator's update at step 0: `d/grad_norm`. All values are finite, and the gradient of "
        "`d/adversarial` is not: first in the backward pass of `discriminator.2` (Root), in samples 1 and 4 of 8. "
        + ROOT
    )


def test_a_layer_whose_gradient_is_masked_later_is_no_suspect():
    first = nn.Linear(2, 2, bias=False)
    first.weight.data.copy_(torch.eye(2))
    # ReLU takes what the last root passes back at 0 for 0; the first one's goes on
    module = judge(first, Square(), Root(), nn.Sequential(Times(-1.0), nn.ReLU()), Root(), nn.Linear(2, 1))
    found = error_of(module, marked(1, [1, 4], value=0.0))
    assert "first in the backward pass of `discriminator.2` (Root)" in found


class Inside(nn.Module):
    """A root of what an inner layer returns."""

    def __init__(self):
        super().__init__()
        self.inner = Times(1.0)

    def forward(self, x):
        return self.inner(x).sqrt()


def test_a_gradient_that_breaks_between_layers():
    found = error_of(with_root(Inside()), marked(1, [5], value=0.0))
    assert "first in the backward pass of `discriminator.2` (Inside), in sample 5 of 8. Look" in found


class Residual(nn.Module):
    """A root beside an inner layer, of the same tensor."""

    def __init__(self):
        super().__init__()
        self.inner = Times(1.0)

    def forward(self, x):
        return self.inner(x) + x.sqrt()


def test_a_layer_is_no_suspect_for_what_others_do_with_its_input():
    found = error_of(with_root(Residual()), marked(1, [5], value=0.0))
    assert "first in the backward pass of `discriminator.2` (Residual), in sample 5 of 8. Look" in found


def test_a_gradient_that_breaks_in_the_generator_on_the_way_of_the_discriminators():
    first = nn.Linear(4, 2, bias=False)
    first.weight.data.zero_()
    module = GANModule(nn.Sequential(first, Square(), Root()), MLP([2, 1]), 4)
    found = error_of(module, points(1))
    assert "step 0: `g/grad_norm`. All values are finite, and the gradient of `g/adversarial` is not" in found
    assert "first in the backward pass of `generator.2` (Root), in all 8 samples." in found


class Scaled(nn.Module):
    """A parameter with a root, at 0."""

    def __init__(self):
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.zeros(())), nn.Linear(2, 1)

    def forward(self, x):
        return self.last(x * self.scale.sqrt())


def test_a_parameter_whose_own_gradient_breaks():
    found = error_of(judge(Scaled(), nn.Flatten()), points(1))
    assert "`d/adversarial` by `discriminator.0.scale` is not: first in `discriminator.0` (Scaled). Look" in found


def test_a_gradient_that_breaks_in_the_term_itself():
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=lambda outputs: (outputs.fake - outputs.fake).sqrt().mean())
    assert error_of(module, points(1)) == (
        "Not finite in the generator's update at step 0: `g/grad_norm`. All values are finite, and the gradient of "
        "`g/extra` is not: first where the term is computed, in no layer. " + ROOT
    )


class Norm(Regularizer):
    """‖∇D‖, whose gradient at 0 there is none of."""

    def penalty(self, module, outputs):
        (slope,) = torch.autograd.grad(outputs.real_logits.sum(), outputs.real, create_graph=True)
        return slope.square().sum(1).sqrt()


@pytest.mark.parametrize("separate", [False, True])
def test_a_penalty_with_a_norm_at_zero(separate):
    module = judge(nn.Linear(2, 1), d_optimizer=sgd(0.0))
    module.discriminator[0].weight.data.zero_()
    found = error_of(module, points(1), callbacks=[Norm(separate=separate)] + [R1Penalty()] * (not separate))
    assert found == (
        "Not finite in the discriminator's update at step 0: `d/grad_norm`. All values are finite, and the gradient of "
        "`d/norm` is not. " + ROOT
    )


def test_the_layer_in_whose_gradient_a_penalty_breaks():
    found = error_of(with_root(Root()), marked(1, [1, 4], value=0.0), callbacks=[R1Penalty()])
    assert (
        "`d/r1`, `d/grad_norm`. First in the gradient that `d/r1` takes, in the backward pass of `discriminator.2` "
        "(Root), in samples 1 and 4 of 8. " + ROOT in found
    )


def test_gradients_that_are_too_large_for_a_norm():
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=lambda outputs: 1e30 * outputs.fake.sum())
    found = error_of(module, points(1))
    assert re.search(r"`g/grad_norm`\. Each gradient is finite, and too large for a norm: up to \de\+3\d\. L", found)


# ---------- steps of other forms: only what is sure


def test_a_player_whose_opponent_has_moved_meanwhile_is_not_taken_again():
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=lambda outputs: (-outputs.fake.square()).log().mean())
    found = error_of(module, points(1), callbacks=[Simultaneous()])
    assert found == (
        "Not finite in the generator's update at step 0: `g/extra`. The data and the weights are finite. L"
        + ADVICE.format("g")[1:]
    )


@pytest.mark.parametrize("rule", [Simultaneous, Extragradient, Unrolling])
def test_what_comes_first_under_other_rules_is_named(rule):
    found = error_of(judge(Log(), nn.Linear(2, 1)), marked(2, [3]), callbacks=[rule()])
    assert "First in the forward pass of `discriminator.0` (Log), whose inputs are finite, in real sample 3" in found


def half_a_step():
    """Extragradient's second look breaks, where the generator's samples are negative."""
    generator = nn.Linear(4, 2)
    generator.weight.requires_grad_(False).zero_()
    generator.bias.data.fill_(0.1)
    discriminator = nn.Sequential(Log(), nn.Linear(2, 1))
    discriminator[1].weight.data.fill_(-1.0)
    return GANModule(generator, discriminator, 4, loss=Wasserstein(), g_optimizer=sgd(1.0), d_optimizer=sgd(0.0))


def test_weights_half_a_step_ahead_are_those_that_are_looked_at():
    module = half_a_step()
    found = error_of(module, marked(1, []), callbacks=[Extragradient()])
    assert "First in the forward pass of `discriminator.0` (Log), whose inputs are finite, in all 8 generated" in found
    assert weights(module.generator).tolist() == pytest.approx([0.0] * 8 + [0.1] * 2)


def test_an_objective_of_a_rules_own_is_not_taken_again():
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=lambda outputs: (-outputs.fake.square()).log().mean())
    found = error_of(module, points(1), callbacks=[Unrolling(steps=1)])
    assert found.endswith("`g/extra`. The data and the weights are finite. L" + ADVICE.format("g")[1:])
    assert "`real`, in sample 3 of 8." in error_of(small(), marked(1, [3], value=math.nan), callbacks=[Unrolling()])


# ---------- the error stands


class Once(nn.Module):
    """Raises in its third pass, after both of the discriminator's turn."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("x"), AssertionError()])
def test_what_the_second_look_raises_hides_nothing(error):
    module = judge(Once(error), Log(), nn.Linear(2, 1))
    assert error_of(module, marked(1, [3])) == (
        "Not finite in the discriminator's update at step 0: `d/adversarial`, `d/grad_norm`. The data and the weights "
        "are finite. L" + ADVICE.format("d")[1:]
    )
    assert module.discriminator[0].calls == 2  # the third one is put back
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_data_that_cannot_be_taken_apart_again_leave_the_error_as_it_was():
    class Twice(GANModule):
        seen = 0

        def unpack(self, batch):
            Twice.seen += 1
            if Twice.seen > 2:
                raise RuntimeError("no more")
            return super().unpack(batch)

        def auxiliary_losses(self, player, outputs):
            return {"broken": outputs.fake.mean() * math.nan} if player == "g" else {}

    assert error_of(Twice(MLP([4, 2]), MLP([2, 1]), 4), points(1)) == (
        "Not finite in the generator's update at step 0: `g/broken`, `g/grad_norm`. If the data are finite, "
        + ADVICE.format("g")
    )


def test_values_that_are_finite_when_they_are_taken_again():
    class Wrong(nn.Module):
        calls = 0

        def forward(self, x):
            Wrong.calls += 1
            return x * (math.nan if Wrong.calls == 1 else 1.0)

    found = error_of(judge(Wrong(), nn.Linear(2, 1)), points(1))
    assert "Taken again, on the same 8 samples and with the same noise, all values and gradients are finite" in found


# ---------- without a trace


class Everything(GANModule):
    """Draws, counts, has statistics and vectors, and breaks in a step."""

    def auxiliary_losses(self, player, outputs):
        return {"broken": self.noise.rand(8).mean() * (math.nan if self.iteration == 3 else 1.0)}


def everything():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), Random(), nn.Dropout(), nn.Linear(8, 2))
    first = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(2, 8))
    discriminator = nn.Sequential(first, Random(), nn.Dropout(), nn.utils.spectral_norm(nn.Linear(8, 1)))
    return Everything(generator, discriminator, 4, plan=("g", "d"))


def state_of(module):
    """All of it, without what no test could compare."""
    layers = {
        (name, key): deepcopy(value)
        for name, layer in module.named_modules()
        for key, value in vars(layer).items()
        if isinstance(value, int | float | list | str)
    }
    callbacks = [deepcopy(callback.state_dict()) for callback in module.trainer.callbacks]
    return {
        "tensors": {name: value.clone() for name, value in tensors(module.state_dict()).items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "optimizers": [deepcopy(optimizer.state_dict()) for optimizer in module.trainer.optimizers],
        "randomness": (torch.get_rng_state(), module.noise.randomness()),
        "layers": layers,
        "callbacks": callbacks,
        "adversarial": module.adversarial,
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Looks:
    """Notes what a module is before and after the second look."""

    def __init__(self, module):
        self.module, self.states, self.explain = module, [], module.engine.explain
        module.engine.explain = self

    def __call__(self, error):
        self.states.append(state_of(self.module))
        self.explain(error)
        self.states.append(state_of(self.module))


@pytest.mark.parametrize("player", ["g", "d"])
def test_the_second_look_leaves_no_trace(player):
    module = everything()
    module.plan = (player, "d" if player == "g" else "g")
    look = Looks(module)
    callbacks = [R1Penalty(), LeCam(), FakePool(size=8)]
    found = error_of(module, points(5), callbacks=callbacks)
    assert f"at step 3: `{player}/broken`. All layers return finite values: `{player}/broken` itself" in found
    before, after = look.states[:2]
    assert before["callbacks"][1]
    for key in before:
        assert same(before[key], after[key]), key


def test_the_second_look_at_gradients_leaves_no_trace():
    module = with_root(Root())
    look = Looks(module)
    assert "backward pass of `discriminator.2` (Root)" in error_of(module, marked(1, [1], value=0.0))
    before, after = look.states[:2]
    for key in before:
        assert same(before[key], after[key]), key


def test_batches_are_kept_no_longer_than_their_step():
    held = {"step": [], "end": []}

    class See(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            held["step"].append(self.turns())

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.batch = batch

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            held["end"].append(self.turns())

        def turns(self):
            return sum(isinstance(owner, Turn) for owner in gc.get_referrers(self.batch))

    fit(small(), points(3), callbacks=[See()])
    assert held == {"step": [1, 2] * 3, "end": [0] * 3}


# ---------- a run that is rescued


class Rescues(GANCallback):
    """Steps back from so many steps."""

    rescues = True

    def __init__(self, times):
        self.times = times

    def rescue(self, trainer, module):
        self.times -= 1
        if self.times < 0:
            return False
        module.extra = lambda outputs: outputs.fake.mean()
        return True


def passes(module):
    """How often the networks run, counted outside of what is put back."""
    count = []
    for network in (module.generator, module.discriminator):
        network.register_forward_hook(lambda *_: count.append(1))
    return count


def test_a_run_that_is_rescued_names_the_samples(caplog):
    module = judge(Log(), nn.Linear(2, 1))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit(module, [*marked(2, [3]), torch.ones(8, 2)], callbacks=[Rescues(1)])
    told = [record.getMessage() for record in caplog.records if "Put back after" in record.getMessage()]
    assert len(told) == 1
    assert "`discriminator.0` (Log), whose inputs are finite, in real sample 3 of 8." in told[0]
    assert module.iteration == 2


def test_a_run_that_is_rescued_takes_a_turn_again_once():
    broken = lambda outputs: (-outputs.fake.square()).log().mean()  # noqa: E731
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=broken)
    count = passes(module)
    fit(module, points(3), callbacks=[Rescues(1)])
    assert len(count) == 3 * 5 + 2  # of D's turn: G, D, D; of G's: G, D, and once more
    assert module.iteration == 2


def test_a_run_that_nobody_rescues_is_explained():
    broken = lambda outputs: (-outputs.fake.square()).log().mean()  # noqa: E731
    module = Extra(MLP([4, 2]), MLP([2, 1]), 4, extra=broken)
    rescues = Rescues(0)
    found = error_of(module, points(3), callbacks=[rescues])
    assert "`g/extra`. All layers return finite values" in found
    assert rescues.times == -1
    module = judge(Log(), nn.Linear(2, 1))
    assert "`discriminator.0` (Log), whose inputs are finite, in real sample 3" in error_of(
        module, marked(2, [3]), callbacks=[Rescues(0)]
    )


def test_weights_that_a_rule_has_put_back_are_not_looked_at():
    """Those half a step ahead, where values broke, are gone when nobody has rescued the run."""
    found = error_of(half_a_step(), marked(1, []), callbacks=[Extragradient(), Rescues(0)])
    assert found.endswith("`d/grad_norm`. The data and the weights are finite. L" + ADVICE.format("d")[1:])
