"""With other tensors in place a module gives what it would give with these weights, to the bit, and nothing moves."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from toys import ignoring, small

from lightning_gan_stability.layers import has_spectral_norm
from lightning_gan_stability.substitution import FrozenBuffers, Substitution


class Tied(nn.Module):
    """Two layers that share a weight, which is also used by itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) @ self.first.weight


class Counting(nn.Module):
    """Counts its forward passes in buffers, in place and by assignment."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("moved", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.moved += 1
        self.replaced = self.replaced + 1
        return self.scale * x * self.moved * self.replaced


class Tokens(nn.Module):
    """Looks indices up and uses a method of its own beside `forward`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def features(self, x):
        return self.table(x.argmax(1) % 3)

    def forward(self, x):
        return self.features(x) * x


def old(norm, *layers):
    with ignoring():
        return nn.Sequential(*(norm(layer) if isinstance(layer, nn.Linear) else layer for layer in layers))


def linears():
    return nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)


def normalized(norm):
    return nn.Sequential(*(norm(layer) if isinstance(layer, nn.Linear) else layer for layer in linears()))


NETWORKS = {
    "linear": lambda: nn.Sequential(*linears()),
    "tied": Tied,
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Softplus(), nn.Linear(6, 4)),
    "batch norm in eval mode": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6).eval(), nn.Linear(6, 4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 4)),
    "spectral norm": lambda: normalized(parametrizations.spectral_norm),
    "weight norm": lambda: normalized(parametrizations.weight_norm),
    "older spectral norm": lambda: old(nn.utils.spectral_norm, *linears()),
    "older weight norm": lambda: old(nn.utils.weight_norm, *linears()),
    "buffers": lambda: nn.Sequential(nn.Linear(4, 4), Counting(), nn.Tanh()),
    "tokens": Tokens,
}


def made(name):
    torch.manual_seed(1)
    return NETWORKS[name]()


def others(parameters):
    """Other values for parameters, as leaves of a graph."""
    generator = torch.Generator().manual_seed(2)
    return [(p + 0.3 * torch.randn(p.shape, generator=generator)).detach().requires_grad_() for p in parameters]


def everything(network):
    """Whatever a run could change: parameters and buffers, plain weights of the older normalizations, and modes."""
    tensors = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers())
    tensors |= {f"{name} plain": m.__dict__.get("weight") for name, m in network.named_modules()}
    return {name: (t, t if t is None else t.detach().clone()) for name, t in tensors.items()}, [
        m.training for m in network.modules()
    ]


def assert_same(before, after):
    """The same objects with the same values."""
    (tensors, modes), (now, modes_now) = before, after
    assert modes == modes_now
    assert tensors.keys() == now.keys()
    for name, (tensor, value) in tensors.items():
        assert now[name][0] is tensor, name
        assert value is None or torch.equal(now[name][1], value), name


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def derivatives(output, tensors):
    """A value, its gradient, and the gradient of the gradient's norm, which needs second derivatives."""
    value = output.square().sum()
    first = torch.autograd.grad(value, tensors, create_graph=True, allow_unused=True)
    norm = sum(g.square().sum() for g in first if g is not None)
    second = torch.autograd.grad(norm, tensors, allow_unused=True)
    return [output, *first, *second]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_those_of_a_network_with_these_weights(name):
    network, reference = made(name), made(name)
    weights = others(network.parameters())
    with torch.no_grad():
        for parameter, weight in zip(reference.parameters(), weights, strict=True):
            parameter.copy_(weight)
    for layer in reference.modules():
        if has_spectral_norm(layer):
            layer.eval()  # its singular vectors stay as they are
    expected = derivatives(reference(X), list(reference.parameters()))
    run = Substitution(network, list(network.parameters()))
    for _ in range(2):
        assert_same_bits(derivatives(run(weights, network, X), weights), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_those_of_a_functional_call(name):
    network, reference = made(name), made(name)
    weights = others(network.parameters())
    for layer in reference.modules():
        if has_spectral_norm(layer):
            layer.eval()
    names = dict(zip((n for n, _ in reference.named_parameters()), weights, strict=True))
    expected = derivatives(functional_call(reference, names, (X,)), weights)
    found = Substitution(network, list(network.parameters()))(weights, network, X)
    assert_same_bits(derivatives(found, weights), expected)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_moves(name, error):
    """Parameters, buffers, modes, and what the older normalizations keep: the same objects with the same values."""
    network = made(name)
    network(X)

    def run_and_fail():
        network(X)
        raise KeyError

    run = Substitution(network, list(network.parameters()))
    before = everything(network)
    if error:
        with pytest.raises(KeyError):
            run(others(network.parameters()), run_and_fail)
    else:
        run(others(network.parameters()), network, X)
    assert_same(before, everything(network))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_forward_pass_afterwards_is_as_if_nothing_had_been(name):
    network, reference = made(name), made(name)
    Substitution(network, list(network.parameters()))(others(network.parameters()), network, X)
    for _ in range(2):
        assert torch.equal(network(X), reference(X))
    for a, b in zip(network.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["older spectral norm", "older weight norm"])
def test_older_normalizations_keep_their_weight(name):
    network = made(name)
    network(X)
    layer = network[0]
    before, value = layer.weight, layer.weight.detach().clone()
    seen = []

    def look():
        network(X)
        seen.append(layer.weight)

    Substitution(network, list(network.parameters()))(others(network.parameters()), look)
    assert seen[0] is not before
    assert not torch.equal(seen[0], value)
    assert layer.weight is before
    assert torch.equal(layer.weight, value)


def test_batch_norm_uses_the_batch_and_forgets_it():
    network = made("batch norm")
    network(X)
    norm = network[1]
    before = [buffer.clone() for buffer in norm.buffers()]
    weights = others(network.parameters())
    found = Substitution(network, list(network.parameters()))(weights, network[:2], X)
    hidden = nn.functional.linear(X, weights[0], weights[1])
    mean, std = hidden.mean(0), (hidden.var(0, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(found, (hidden - mean) / std * weights[2] + weights[3])
    for a, b in zip(norm.buffers(), before, strict=True):
        assert torch.equal(a, b)


def test_any_function_runs_with_these_weights():
    network = made("tokens")
    weights = others(network.parameters())
    run = Substitution(network, list(network.parameters()))
    expected = nn.functional.embedding(X.argmax(1) % 3, weights[0])
    assert torch.equal(run(weights, network.features, X), expected)
    assert torch.equal(run(weights, lambda: network.table.weight), weights[0])
    assert run(weights, lambda *args: args, 1, 2) == (1, 2)
    assert run(weights, lambda: None) is None


def test_some_parameters_are_replaced_and_others_are_not():
    network = made("linear")
    bias = torch.full((4,), 7.0, requires_grad=True)
    found = Substitution(network, [network[2].bias])([bias], network, X)
    torch.testing.assert_close(found, network(X) - network[2].bias + 7)
    found.sum().backward()
    assert torch.equal(bias.grad, torch.full((4,), 8.0))
    assert network[0].weight.grad is not None  # which took part as itself
    assert network[2].bias.grad is None


def test_a_shared_weight_is_replaced_everywhere():
    network = made("tied")
    run = Substitution(network, [network.first.weight])
    weight = torch.eye(4)
    assert run([weight], lambda: network.second.weight is weight and network.first.weight is weight)
    assert network.first.weight is network.second.weight


def test_the_order_of_tensors_is_that_of_parameters():
    network = made("linear")
    parameters = list(network.parameters())[::-1]
    weights = others(parameters)
    expected = Substitution(network, parameters[::-1])(weights[::-1], network, X)
    assert torch.equal(Substitution(network, parameters)(weights, network, X), expected)


def test_gradients_reach_through_steps_of_a_descent():
    """What unrolling does: two steps, and the gradient of what comes of them, by the weights that they began with."""
    network = made("linear")
    start = [p.detach().clone().requires_grad_() for p in network.parameters()]

    def unrolled(loss):
        weights = start
        for _ in range(2):
            gradients = torch.autograd.grad(loss(weights), weights, create_graph=True)
            weights = [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]
        return torch.autograd.grad(loss(weights), start)

    run = Substitution(network, list(network.parameters()))
    found = unrolled(lambda weights: run(weights, network, X).square().mean())

    def by_hand(weights):
        hidden = torch.tanh(X @ weights[0].T + weights[1])
        return (hidden @ weights[2].T + weights[3]).square().mean()

    for a, b in zip(found, unrolled(by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in network.parameters())


def test_substitutions_within_substitutions():
    gan = small()
    g, d = ([*network.parameters()] for network in (gan.generator, gan.discriminator))
    new_g, new_d = others(g), others(d)
    run_g, run_d = gan.substitute(g), gan.substitute(d)
    z = torch.randn(5, 4)
    found = run_d(new_d, lambda: gan.logits(run_g(new_g, gan.generator, z)))
    assert torch.equal(found, gan.substitute([*g, *d])([*new_g, *new_d], lambda: gan.logits(gan.generator(z))))
    copies = [deepcopy(network) for network in (gan.generator, gan.discriminator)]
    for network, weights in zip(copies, (new_g, new_d), strict=True):
        torch.nn.utils.vector_to_parameters(torch.cat([w.flatten() for w in weights]), network.parameters())
    assert torch.equal(found, copies[1](copies[0](z)).squeeze(1))


# ---------- buffers


def test_buffers_of_a_part_may_be_frozen_alone():
    network = nn.ModuleList([Counting(), Counting()])
    run = Substitution(network, [network[0].scale], frozen=network[0])
    run([torch.ones(4)], lambda: [m(X) for m in network])
    assert network[0].moved == network[0].replaced == 0
    assert network[1].moved == network[1].replaced == 1


def test_frozen_buffers_pass_their_values_on():
    network, x = Counting(), torch.ones(2, 4)
    network(x)
    frozen = FrozenBuffers(network)
    for _ in range(2):
        with frozen():
            assert torch.equal(network(x), 4 * x)
            assert torch.equal(network(x), 9 * x)
        assert network.moved == network.replaced == 1


def test_frozen_buffers_come_back_after_an_error():
    network = nn.Sequential(nn.BatchNorm1d(4), parametrizations.spectral_norm(nn.Linear(4, 4)))
    before = everything(network)
    with pytest.raises(KeyError), FrozenBuffers(network)():
        raise KeyError(network(X))
    assert_same(before, everything(network))


def test_frozen_buffers_stop_power_iterations_and_not_their_gradient():
    network = parametrizations.spectral_norm(nn.Linear(4, 4))
    network.parametrizations.weight[0]._u.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # the iterations have not converged
    u = network.parametrizations.weight[0]._u.clone()
    with FrozenBuffers(network)():
        network(X).sum().backward()
    assert torch.equal(network.parametrizations.weight[0]._u, u)
    assert network.parametrizations.weight[0].training
    assert network.parametrizations.weight.original.grad.abs().sum() > 0
    network(X)
    assert not torch.equal(network.parametrizations.weight[0]._u, u)


def test_frozen_buffers_that_are_not_there_yet():
    """Layers that set a buffer on their first batch (ActNorm, codebooks)."""

    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", None)

        def forward(self, x):
            self.mean = x.mean(0) if self.mean is None else self.mean
            return x - self.mean

    layer = Lazy()
    with FrozenBuffers(layer)():
        layer(X)
    assert layer.mean is None


# ---------- what is refused


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_refused(layer):
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": layer(2, 2)})
    with pytest.raises(ValueError, match=f"^{layer.__name__} keeps its own list of weights, which cannot be replaced"):
        Substitution(network, list(network["b"].parameters()))
    Substitution(network, list(network["a"].parameters()))


class Checkpointed(nn.Module):
    def __init__(self, reentrant=False):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(4, 4), reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_are_refused(reentrant):
    """Reentrant ones would go back through the weights that were there before, and say nothing."""
    network = Checkpointed(reentrant)
    run = Substitution(network, list(network.parameters()))
    with pytest.raises(RuntimeError, match=r"Activation checkpoints \(torch.utils.checkpoint\) run a layer again when"):
        run(others(network.parameters()), network, X)
    # and work as ever outside
    network(X.clone().requires_grad_()).sum().backward()
    assert torch.equal(network.layer.bias.grad, torch.full((4,), 8.0))


def test_other_hooks_of_saved_tensors_stay_in_place():
    network, weights = made("linear"), others(made("linear").parameters())
    run = Substitution(network, list(network.parameters()))
    expected = derivatives(run(weights, network, X), weights)
    with torch.autograd.graph.save_on_cpu():
        found = run(weights, network, X)
    assert_same_bits(derivatives(found, weights), expected)
    with torch.autograd.graph.save_on_cpu():
        network(X)
