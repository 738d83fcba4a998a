"""What is private to torch and Lightning, and used all the same: it is still there, and does what it is used for."""

import ast
import inspect
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.mixins import hparams_mixin
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, LinearLR, SequentialLR, StepLR
from torch.utils.data import DataLoader
from toys import fit, ignoring, points, small, trainer

from lightning_gan_stability import MLP, _compat
from lightning_gan_stability._compat import (
    Float32Buffers,
    NoExchange,
    allow_unused_parameters,
    averaged_model,
    buffer_names,
    check_on_train_epoch_end,
    computed_weights,
    exchanged_parameters,
    fused_devices,
    given_hyperparameters,
    grid_sample_transposed,
    has_comm_hook,
    has_old_spectral_norm,
    has_old_weight_norm,
    is_compiled,
    is_spectral_norm,
    is_wrapped_by_compile,
    lerp_,
    loader_of,
    mark_dynamic,
    mode_of,
    norms,
    original_module,
    register_like,
    save_triggers,
    saves_by_time,
    scheduler_parts,
    shares_data,
    to_device,
    trainer_of,
    unscales_itself,
    version,
    without_fsdp_hooks,
)
from lightning_gan_stability.distributed import own_gradients

FUNCTIONS = {
    name: function
    for name, function in inspect.getmembers(_compat, lambda x: inspect.isfunction(x) or inspect.isclass(x))
    if function.__module__ == _compat.__name__ and not name.startswith("_")
}

#: The private names that each function relies on, which `test_<function>...` below tries.
RELIES_ON = {
    "is_spectral_norm": {"_SpectralNorm"},
    "has_old_spectral_norm": {"_forward_pre_hooks"},
    "has_old_weight_norm": {"_forward_pre_hooks"},
    "computed_weights": {"_forward_pre_hooks"},
    "register_like": {"_non_persistent_buffers_set"},
    "buffer_names": {"_buffers"},
    "Float32Buffers": {"_apply"},
    "lerp_": {"_foreach_lerp_"},
    "norms": {"_foreach_norm"},
    "without_fsdp_hooks": {"_forward_pre_hooks", "_forward_hooks"},
    "version": {"_version"},
    "NoExchange": {"_c10d_functional", "_c10d_functional_autograd"},  # and torch.utils._python_dispatch
    "is_compiled": {"_compiled_call_impl", "_modules", "_orig_mod"},
    "original_module": {"_modules", "_orig_mod"},
    "mark_dynamic": {"_dynamo"},
    "scheduler_parts": {"_schedulers"},
    "trainer_of": {"_trainer"},
    "is_wrapped_by_compile": {"_compiler_ctx"},
    "given_hyperparameters": {"_given_hyperparameters"},
    "allow_unused_parameters": {"_ddp_kwargs"},
    "fused_devices": {"_get_fused_kernels_supported_devices"},
    "unscales_itself": {"_step_supports_amp_scaling"},
    "has_comm_hook": {"_comm_hooks"},
    "exchanged_parameters": {"_module_parameters"},
    "saves_by_time": {"_train_time_interval"},
    "shares_data": {"_accelerator_connector"},
    "save_triggers": {"_every_n_train_steps", "_should_save_on_train_epoch_end"},
    "check_on_train_epoch_end": {"_check_on_train_epoch_end"},
    "averaged_model": {"_average_model"},
    "loader_of": {"_data_source"},
    "mode_of": {"_mode"},
    "to_device": {"_on_before_batch_transfer"},
    "grid_sample_transposed": set(),  # an operator of torch.ops.aten, which has no promise of stability either
}


def private_names(function):
    """The private names in a function's body: names, attributes, imports and strings."""
    for node in ast.walk(ast.parse(inspect.getsource(function))):
        found = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name", ast.Constant: "value"}.get(type(node))
        name = found and getattr(node, found)
        if isinstance(name, str) and name.startswith("_") and name.isidentifier() and not hasattr(_compat, name):
            yield name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_says_what_it_relies_on(name):
    assert set(private_names(FUNCTIONS[name])) == RELIES_ON[name]


def test_every_function_has_a_test():
    assert FUNCTIONS.keys() == RELIES_ON.keys()
    tests = [name for name in globals() if name.startswith("test_")]
    for name in FUNCTIONS:
        assert [test for test in tests if test.startswith(f"test_{name.strip('_')}_")], name


def test_every_private_name_stands_in_one_of_them():
    """The file has no other use for private names than these functions, and no helper hides one."""
    body = ast.parse(inspect.getsource(_compat)).body
    outside = [node for node in body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    attributes = {n.attr for node in outside for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    assert not {name for name in attributes if name.startswith("_")}
    for name, helper in inspect.getmembers(_compat, inspect.isfunction):
        if helper.__module__ == _compat.__name__ and name not in FUNCTIONS:
            assert set(private_names(helper)) <= {"__self__", "__module__"}


# ---------- torch: networks


def old(norm, layer):
    """A layer with one of the older normalizations, which newer torch warns of."""
    with ignoring():
        return norm(layer)


def test_is_spectral_norm_knows_the_parametrization():
    """`torch.nn.utils.parametrizations._SpectralNorm` is the class of what `spectral_norm` registers."""
    layer = parametrizations.spectral_norm(nn.Linear(2, 2))
    assert is_spectral_norm(layer.parametrizations.weight[0])
    assert [m for m in layer.modules() if is_spectral_norm(m)] == [layer.parametrizations.weight[0]]
    orthogonal = parametrizations.orthogonal(nn.Linear(2, 2))
    assert not any(map(is_spectral_norm, orthogonal.modules()))
    assert not any(map(is_spectral_norm, old(nn.utils.spectral_norm, nn.Linear(2, 2)).modules()))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1)])
def test_has_old_spectral_norm_finds_the_hook(layer):
    """`nn.Module._forward_pre_hooks` is a dict whose values are the hooks that `torch.nn.utils` has registered."""
    assert not has_old_spectral_norm(layer)
    assert has_old_spectral_norm(old(nn.utils.spectral_norm, layer))
    assert not has_old_weight_norm(layer)
    nn.utils.remove_spectral_norm(layer)
    assert not has_old_spectral_norm(layer)


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Conv2d(2, 2, 1), nn.ConvTranspose1d(2, 2, 1)])
def test_has_old_weight_norm_finds_the_hook(layer):
    """As of `has_old_spectral_norm`."""
    assert not has_old_weight_norm(layer)
    assert has_old_weight_norm(old(nn.utils.weight_norm, layer))
    assert not has_old_spectral_norm(layer)
    nn.utils.remove_weight_norm(layer)
    assert not has_old_weight_norm(layer)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_has_old_norms_is_not_for_the_newer_ones(norm):
    layer = norm(nn.Linear(2, 2))
    assert not has_old_weight_norm(layer)
    assert not has_old_spectral_norm(layer)
    assert computed_weights(layer) == []


def test_has_old_spectral_norm_finds_it_among_other_hooks():
    layer = nn.Linear(2, 2)
    layer.register_forward_pre_hook(lambda *args: None)
    old(nn.utils.spectral_norm, layer)
    layer.register_forward_pre_hook(lambda *args: None, prepend=True)
    assert has_old_spectral_norm(layer)


def test_computed_weights_are_attributes_and_no_parameters():
    """The hooks of `torch.nn.utils` in `_forward_pre_hooks` have the `name` of the weight that they compute."""
    assert computed_weights(old(nn.utils.spectral_norm, nn.Bilinear(2, 2, 2))) == ["weight"]
    assert computed_weights(old(lambda m: nn.utils.weight_norm(m, "weight_hh_l0"), nn.LSTM(2, 2))) == ["weight_hh_l0"]
    both = old(lambda m: nn.utils.weight_norm(nn.utils.weight_norm(m, "weight"), "bias"), nn.Linear(2, 2))
    assert computed_weights(both) == ["weight", "bias"]
    for name in ("weight", "bias"):
        assert name not in dict(both.named_parameters())
        assert isinstance(getattr(both, name), torch.Tensor)
    assert computed_weights(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("persistent", [True, False])
def test_register_like_keeps_what_is_in_the_state_dict(persistent):
    """`nn.Module._non_persistent_buffers_set` has the names of the buffers that a state dict lacks."""
    original, module = nn.Module(), nn.Module()
    original.register_buffer("a", torch.zeros(1), persistent=persistent)
    register_like(module, "a", torch.ones(2), original)
    assert torch.equal(module.a, torch.ones(2))
    assert dict(module.named_buffers()).keys() == {"a"}
    assert module.state_dict().keys() == original.state_dict().keys() == ({"a"} if persistent else set())


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_lerp_moves_each_tensor_in_place(weight, dtype):
    """`torch._foreach_lerp_` is `torch.lerp` for lists."""
    starts = [torch.tensor([0.0, 8.0], dtype=dtype), torch.tensor([[4.0]], dtype=dtype)]
    ends = [torch.tensor([16.0, 0.0], dtype=dtype), torch.tensor([[-4.0]], dtype=dtype)]
    moved = [start.clone() for start in starts]
    places = [tensor.data_ptr() for tensor in moved]
    assert lerp_(moved, ends, weight) is None
    for start, end, now in zip(starts, ends, moved, strict=True):
        assert torch.equal(now, start + weight * (end - start))
    assert [tensor.data_ptr() for tensor in moved] == places
    assert torch.equal(ends[0], torch.tensor([16.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norms_are_those_of_each_tensor(dtype):
    """`torch._foreach_norm` is `torch.linalg.vector_norm` for lists; stacked, it is what torch clips by."""
    tensors = [torch.tensor([3.0, 4.0], dtype=dtype), torch.tensor([[12.0]], dtype=dtype), torch.zeros(2, dtype=dtype)]
    found = norms(tensors)
    assert [norm.item() for norm in found] == [5.0, 12.0, 0.0]
    assert {norm.dtype for norm in found} == {dtype}
    random = [torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (5, 700, 3)]
    assert torch.equal(torch.linalg.vector_norm(torch.stack(norms(random))), nn.utils.get_total_norm(random))


def test_buffer_names_include_those_that_are_none():
    """`nn.Module._buffers` holds a module's own buffers by name, also before they are there."""
    layer = nn.BatchNorm1d(2, track_running_stats=False)
    assert buffer_names(layer) == ["running_mean", "running_var", "num_batches_tracked"]
    assert buffer_names(nn.Sequential(nn.BatchNorm1d(2))) == []


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_Float32Buffers_keeps_digits(cast):
    """`nn.Module._apply` is what all casts of a module and of those around it go through."""

    class Counts(Float32Buffers):
        def __init__(self):
            super().__init__()
            self.sum = nn.Buffer(torch.tensor(1 / 3))

    inner = Counts()
    outer = nn.Sequential(inner, nn.Linear(1, 1))
    getattr(outer, cast)()
    assert inner.sum.dtype == (torch.float64 if cast == "double" else torch.float32)
    assert outer[1].weight.dtype == getattr(torch, cast)
    assert inner.sum.item() == pytest.approx(1 / 3, abs=1e-3 if cast in ("half", "bfloat16") else 1e-7)
    assert inner.to("meta").sum.device.type == "meta"


class Sharded:
    """Stands for FSDP's state of a layer: its hooks are methods of a class of a module of FSDP's."""

    __module__ = "torch.distributed.fsdp.anything"

    def __init__(self, log):
        self.log = log

    def before(self, module, args):
        self.log.append("fsdp before")

    def after(self, module, args, output):
        self.log.append("fsdp after")


class Mine:
    """Has hooks that are methods, too."""

    def __init__(self, log):
        self.log = log

    def before(self, module, args):
        self.log.append("mine")


def hooked():
    """A network with hooks of FSDP between others, and what they write to."""
    log = []
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    layer, sharded = network[0], Sharded(log)
    layer.register_forward_pre_hook(lambda *args: log.append("first"))
    layer.register_forward_pre_hook(sharded.before)
    layer.register_forward_pre_hook(Mine(log).before)
    layer.register_forward_pre_hook(lambda *args: log.append("last"))
    layer.register_forward_hook(lambda *args: log.append("output"))
    layer.register_forward_hook(sharded.after)
    network.register_forward_pre_hook(sharded.before)
    return network, log


EVERY = ["fsdp before", "first", "fsdp before", "mine", "last", "output", "fsdp after"]


def test_without_fsdp_hooks_other_hooks_run():
    """`nn.Module._forward_pre_hooks` and `_forward_hooks` are what a forward pass looks through."""
    network, log = hooked()
    network(torch.zeros(1, 2))
    assert log == EVERY
    log.clear()
    with without_fsdp_hooks(network):
        network(torch.zeros(1, 2))
    assert log == ["first", "mine", "last", "output"]


@pytest.mark.parametrize("error", [None, KeyError])
def test_without_fsdp_hooks_puts_them_back_in_their_order(error):
    network, log = hooked()
    tables = [table for m in network.modules() for table in (m._forward_pre_hooks, m._forward_hooks)]
    before = [list(table.items()) for table in tables]
    try:
        with without_fsdp_hooks(network):
            assert [list(table.items()) for table in tables] != before
            if error:
                raise error
    except KeyError:
        assert error
    assert [list(table.items()) for table in tables] == before
    network(torch.zeros(1, 2))
    assert log == EVERY


def test_without_fsdp_hooks_handles_still_remove():
    network, log = hooked()
    handle = network[0].register_forward_hook(Sharded(log).after)
    with without_fsdp_hooks(network):
        pass
    handle.remove()
    network(torch.zeros(1, 2))
    assert log == EVERY


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def hooks(network):
    return [h for m in network.modules() for t in (m._forward_pre_hooks, m._forward_hooks) for h in t.values()]


def test_without_fsdp_hooks_of_fsdp_itself(mesh):
    """Layers that `fully_shard` has sharded keep the weights that are in place, and are sharded again afterwards."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard(network[0], mesh=mesh)
    fully_shard(network, mesh=mesh)
    before = hooks(network)
    assert len(before) == 4
    with without_fsdp_hooks(network):
        assert hooks(network) == []
    assert hooks(network) == before
    assert network(torch.zeros(1, 2)).shape == (1, 2)


def test_without_fsdp_hooks_of_a_group_of_layers(mesh):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard([network[0], network[1]], mesh=mesh)
    with without_fsdp_hooks(network):
        assert hooks(network) == []


def test_version_counts_changes_in_place():
    p = nn.Parameter(torch.ones(2))
    before = version(p)
    with torch.no_grad():
        p * 2
        assert version(p) == before
        p.copy_(torch.zeros(2))
    assert version(p) > before


def collectives():
    """What processes say to each other: in place, as functions, and in the middle of a backward pass."""
    yield lambda: dist.all_reduce(torch.ones(1))
    yield lambda: dist.all_gather([torch.ones(1)], torch.ones(1))
    yield lambda: dist.broadcast(torch.ones(1), 0)
    yield lambda: dist.barrier()
    yield lambda: functional_collectives.all_reduce(torch.ones(1), "sum", dist.group.WORLD).sum()

    def backward():
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(lambda gradient: dist.all_reduce(gradient.clone()))
        torch.autograd.grad(y, x)

    yield backward


@pytest.mark.parametrize("number", range(6))
def test_NoExchange_raises_where_a_process_would_wait(mesh, number):
    exchange = [*collectives()][number]
    exchange()
    with NoExchange(), pytest.raises(RuntimeError, match="would wait for other processes"):
        exchange()
    with NoExchange():
        assert nn.Linear(2, 1)(torch.ones(3, 2)).shape == (3, 1)
    exchange()


# ---------- torch: compilation


def test_is_compiled_in_place():
    """`nn.Module.compile` sets `_compiled_call_impl`."""
    network = MLP([2, 4, 1])
    assert not is_compiled(network)
    network.compile(backend="eager")
    assert is_compiled(network)
    assert not any(is_compiled(m) for m in network.children())
    assert network(torch.zeros(3, 2)).shape == (3, 1)


def test_is_compiled_by_a_wrapper():
    """`torch.compile(network)` has the network as its submodule `_orig_mod` in `nn.Module._modules`."""
    network = MLP([2, 4, 1])
    wrapped = torch.compile(network, backend="eager")
    assert is_compiled(wrapped)
    assert not is_compiled(network)
    assert not is_compiled(nn.Sequential(wrapped))


def test_original_module_is_what_was_wrapped():
    """As of `is_compiled`."""
    network = MLP([2, 4, 1])
    assert original_module(network) is network
    assert original_module(torch.compile(network, backend="eager")) is network
    network.compile(backend="eager")
    assert original_module(network) is network


@pytest.mark.parametrize(("mark", "expected"), [(True, 1), (False, 2)])
def test_mark_dynamic_makes_one_graph_of_two_sizes(mark, expected):
    """`torch._dynamo.maybe_mark_dynamic`; without it Dynamo learns from the second size that there is more than one."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    network = nn.Linear(2, 2)
    network.compile(backend=backend)
    for n in (5, 7):
        x = torch.zeros(n, 2)
        if mark:
            mark_dynamic(x)
        assert network(x).shape == (n, 2)
    assert len(graphs) == expected


def test_mark_dynamic_also_takes_a_batch_of_one():
    """It wishes, and does not insist: sizes 0 and 1 get graphs of their own without an error."""
    torch.compiler.reset()
    network = nn.Linear(2, 2)
    network.compile(backend="eager")
    for n in (1, 5, 1):
        x = torch.zeros(n, 2)
        mark_dynamic(x)
        assert network(x).shape == (n, 2)


def test_grid_sample_transposed_is_the_gradient_by_the_input():
    """`torch.ops.aten.grid_sampler_2d_backward`, which is called with bilinear, zeros, and corners not aligned."""
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    grid = 2.4 * torch.rand(2, 6, 7, 2, dtype=torch.float64) - 1.2
    y = torch.nn.functional.grid_sample(x, grid, "bilinear", "zeros", align_corners=False)
    gradient = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(grid_sample_transposed(gradient, grid, x.shape), expected, rtol=0, atol=1e-14)


# ---------- torch: schedulers


def test_scheduler_parts_are_those_it_was_made_of():
    """`SequentialLR._schedulers` and `ChainedScheduler._schedulers`."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 1.0)
    first, second = ConstantLR(optimizer), LinearLR(optimizer)
    assert scheduler_parts(SequentialLR(optimizer, [first, second], [3])) == [first, second]
    assert scheduler_parts(ChainedScheduler([first, second])) == [first, second]
    assert scheduler_parts(StepLR(optimizer, 1)) == []


# ---------- Lightning


def test_trainer_of_a_module():
    """`LightningModule._trainer`, which `LightningModule.trainer` sets and raises without."""
    module = BoringModel()
    with pytest.raises(RuntimeError, match="not attached to a `Trainer`"):
        _ = module.trainer
    assert trainer_of(module) is None
    run = trainer(fast_dev_run=1)
    module.trainer = run
    assert trainer_of(module) is run


class Look(Callback):
    """Keeps what a function of Trainer and module returns, the earlier the better."""

    def __init__(self, function):
        self.function, self.seen = function, {}

    def setup(self, trainer, pl_module, stage):
        self.seen["setup"] = self.function(trainer, pl_module)

    def on_fit_start(self, trainer, pl_module):
        self.seen["on_fit_start"] = self.function(trainer, pl_module)


def test_is_wrapped_by_compile_in_a_run():
    """`LightningModule._compiler_ctx` is set when the Trainer takes the module out of its wrapper."""
    assert not is_wrapped_by_compile(BoringModel())
    look = Look(lambda run, module: is_wrapped_by_compile(module))
    run = trainer(max_steps=1, limit_val_batches=0, callbacks=[look])
    for module, expected in ((torch.compile(BoringModel(), backend="eager"), True), (BoringModel(), False)):
        with ignoring():
            run.fit(module)
        assert look.seen == {"setup": expected, "on_fit_start": expected}


class Configured(LightningModule):
    """Looks at what its hyperparameters would be while it is made."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.seen = given_hyperparameters()


def test_given_hyperparameters_are_the_config():
    """`hparams_mixin._given_hyperparameters`, which LightningCLI sets while it makes a module."""
    assert given_hyperparameters() is None
    with ignoring():
        cli = LightningCLI(Configured, BoringDataModule, run=False, args=["--model.width=5"])
    assert cli.model.seen["width"] == 5
    assert given_hyperparameters() is None
    assert Configured().seen is None


def test_given_hyperparameters_are_what_save_hyperparameters_keeps():
    class Saving(LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()

    with hparams_mixin._given_hyperparameters_context({"width": 7}, "somebody"):
        assert given_hyperparameters()["width"] == 7
        assert Saving().hparams["width"] == 7


@pytest.mark.parametrize("choice", [True, False])
def test_allow_unused_parameters_leaves_the_user_a_choice(choice):
    """`DDPStrategy._ddp_kwargs` are the arguments that go to DistributedDataParallel."""
    strategy = DDPStrategy(find_unused_parameters=choice)
    allow_unused_parameters(strategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": choice}


def test_allow_unused_parameters_is_what_ddp_gets(mesh):
    strategy = DDPStrategy(static_graph=False)
    allow_unused_parameters(strategy)
    strategy.parallel_devices = [torch.device("cpu")]
    assert strategy._setup_model(nn.Linear(1, 1)).find_unused_parameters is True


def test_fused_devices_are_where_adam_can_be_fused():
    """`torch.utils._foreach_utils._get_fused_kernels_supported_devices`."""
    assert {"cpu", "cuda"} <= {*fused_devices()}
    assert "meta" not in fused_devices()


@pytest.mark.parametrize("fused", [True, False])
def test_unscales_itself_is_what_fused_optimizers_do(fused):
    """`Optimizer._step_supports_amp_scaling`, which a gradient scaler's `step` looks at."""
    p = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([p], fused=fused)
    assert unscales_itself(optimizer) is fused
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(p.grad.item()))
    scaler.step(optimizer)
    assert seen == [4.0 if fused else 1.0]


def test_has_comm_hook_of_ddp(mesh):
    """`DistributedDataParallel._comm_hooks`, to which `register_comm_hook` adds."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    assert not has_comm_hook(model)
    model.register_comm_hook(None, own_gradients())
    assert has_comm_hook(model)
    with pytest.raises(RuntimeError, match="register_comm_hook"):
        model.register_comm_hook(None, own_gradients())


def test_exchanged_parameters_of_ddp(mesh):
    """`DistributedDataParallel._module_parameters`, of which the reducer takes those that require a gradient."""
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    model = nn.parallel.DistributedDataParallel(layer)
    assert [id(p) for p in exchanged_parameters(model)] == [id(layer.weight)]


def test_saves_by_time_is_a_setting_of_checkpoints():
    """`ModelCheckpoint._train_time_interval`."""
    assert saves_by_time(ModelCheckpoint(train_time_interval=timedelta(minutes=1)))
    assert not saves_by_time(ModelCheckpoint(every_n_train_steps=5))
    assert not saves_by_time(ModelCheckpoint())
    assert not saves_by_time(Callback())


def test_save_triggers_are_those_that_a_checkpoint_was_given():
    """`ModelCheckpoint._every_n_train_steps` and `ModelCheckpoint._should_save_on_train_epoch_end`."""
    run = trainer()
    assert save_triggers(ModelCheckpoint(every_n_train_steps=5), run)[0] == 5
    assert save_triggers(ModelCheckpoint(every_n_epochs=5), run)[0] == 0
    for setting in (True, False):
        assert save_triggers(ModelCheckpoint(save_on_train_epoch_end=setting), run) == (0, setting)
    assert save_triggers(ModelCheckpoint(), trainer(check_val_every_n_epoch=2)) == (0, False)


def test_check_on_train_epoch_end_says_in_which_hook_a_stopping_checks():
    """`EarlyStopping._check_on_train_epoch_end`, which both hooks look at, and nobody else."""
    run = trainer()
    run.state.fn = TrainerFn.FITTING
    run.callback_metrics["x"] = torch.tensor(1.0)
    stop = EarlyStopping("x", check_on_train_epoch_end=True)
    stop.best_score = torch.tensor(0.0)
    assert check_on_train_epoch_end(stop, False) is True
    stop.on_train_epoch_end(run, None)
    assert stop.wait_count == 0
    stop.on_validation_end(run, None)
    assert stop.wait_count == 1
    assert check_on_train_epoch_end(stop, True) is False
    stop.on_validation_end(run, None)
    assert stop.wait_count == 1
    stop.on_train_epoch_end(run, None)
    assert stop.wait_count == 2


TRAIN, VAL = (DataLoader(torch.zeros(4, 32)) for _ in range(2))


class Bare(BoringModel):
    """Has no loaders, and takes whatever those that it is given make of a batch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    train_dataloader = LightningModule.train_dataloader
    val_dataloader = LightningModule.val_dataloader


class Own(BoringModel):
    def train_dataloader(self):
        return TRAIN

    def val_dataloader(self):
        return VAL


class Data(LightningDataModule):
    def train_dataloader(self):
        return TRAIN

    def val_dataloader(self):
        return VAL


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides")
def test_averaged_model_is_there_in_a_fit():
    """It is there in a fit, and moves by β̄ = (1 − β) θ + β θ̄."""
    averaging, found = EMAWeightAveraging(decay=0.5), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            average = [p.clone() for p in averaged_model(averaging).module.parameters()]
            found.append((average, [p.detach().clone() for p in module.parameters()]))

    assert averaged_model(averaging) is None
    fit(small(), points(3), callbacks=[averaging, Look()])
    for (before, _), (after, now) in pairwise(found):
        for old, new, weight in zip(before, after, now, strict=True):
            assert torch.allclose(new, 0.5 * old + 0.5 * weight)


def loaders(run, module):
    return loader_of(run, "train"), loader_of(run, "val")


@pytest.mark.parametrize(
    ("module", "arguments", "expected"),
    [
        (Bare, (TRAIN,), (TRAIN, [])),
        (Bare, (TRAIN, VAL), (TRAIN, VAL)),
        (Bare, ({"a": TRAIN}, [VAL, VAL]), ({"a": TRAIN}, [VAL, VAL])),
        (Bare, (None, None, Data()), (TRAIN, VAL)),
        (Own, (), (TRAIN, VAL)),
    ],
    ids=["given", "both", "several", "datamodule", "module"],
)
def test_loader_of_a_run_before_the_loop_has_asked(module, arguments, expected):
    """`_FitLoop._data_source` and `_EvaluationLoop._data_source`, which Trainer fills before any hook is called."""
    look = Look(loaders)
    with ignoring():
        trainer(max_steps=1, limit_val_batches=0, callbacks=[look]).fit(module(), *arguments)
    assert look.seen == {"setup": expected, "on_fit_start": expected}


def test_loader_of_gives_the_object_itself():
    look = Look(loaders)
    with ignoring():
        trainer(max_steps=1, limit_val_batches=0, callbacks=[look]).fit(Bare(), TRAIN, VAL)
    train, val = look.seen["setup"]
    assert train is TRAIN
    assert val is VAL


def test_loader_of_a_trainer_that_has_not_run():
    assert loader_of(trainer(), "train") == loader_of(trainer(), "val") == []


@pytest.mark.parametrize(("options", "shared"), [({}, True), ({"use_distributed_sampler": False}, False)])
def test_shares_data_unless_told_otherwise(options, shared):
    """`_AcceleratorConnector.use_distributed_sampler`, which `_DataConnector` asks."""
    assert shares_data(trainer(**options)) == shared


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
def test_mode_of_a_combined_loader(mode):
    """`CombinedLoader._mode`."""
    assert mode_of(CombinedLoader({"a": TRAIN}, mode)) == mode


def test_to_device_is_what_a_training_step_gets():
    """`LightningModule._on_before_batch_transfer`, which the loop calls beside `Strategy.batch_to_device`."""

    class Hooks(BoringModel):
        def __init__(self):
            super().__init__()
            self.got = []

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch

        def training_step(self, batch, batch_idx):
            self.got.append(batch.clone())
            return super().training_step(batch, batch_idx)

    look, module = Look(lambda run, _: to_device(run, torch.zeros(4, 32, dtype=torch.float64))), Hooks()
    with ignoring():
        trainer(max_steps=1, limit_val_batches=0, callbacks=[look]).fit(module, DataLoader(torch.zeros(4, 32)))
    assert torch.equal(look.seen["on_fit_start"], torch.full((4, 32), 2.0, dtype=torch.float64))
    assert torch.equal(module.got[0], torch.full((1, 32), 2.0))
