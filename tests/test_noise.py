"""Noise is a function of its key alone: seed, rank, iteration, whether a step is taken, and number of the draw."""

import hashlib
import itertools

import pytest
import torch
from torch import nn
from toys import small

from lightning_gan_stability.noise import Noise, Randomness, generator, seed_of


class Clock:
    """What noise asks of a GANModule."""

    def __init__(self, rank=0, iteration=0, dtype=torch.float32):
        self.global_rank, self.iteration, self.device = rank, iteration, torch.device("cpu")
        self.layer = nn.Linear(1, 1).to(dtype)

    def parameters(self):
        return self.layer.parameters()


def noise(seed=0, **kwargs):
    return Noise(seed, Clock(**kwargs))


def state():
    """Where torch's default generator stands."""
    return torch.default_generator.get_state()


def draw_and_fail(source):
    source.randn(2)
    torch.rand(2)
    raise KeyError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ---------- keys


def test_a_seed_is_the_hash_of_its_key():
    """As written down here: a checkpoint of today goes on with the same noise in a later version."""
    key = (0, "train", 1)
    digest = hashlib.blake2b(b"(0, 'train', 1)", digest_size=8).digest()
    assert seed_of(*key) == int.from_bytes(digest, "big") // 2
    assert 0 <= seed_of(*key) < 2**63
    assert generator(*key).initial_seed() == seed_of(*key)
    expected = torch.randn(3, generator=torch.Generator().manual_seed(seed_of(*key)))
    assert torch.equal(torch.randn(3, generator=generator(*key)), expected)


def test_keys_that_look_alike_differ():
    keys = [
        (),
        (0,),
        (0, 0),
        (0, 1),
        (1, 0),
        ("0",),
        ((0, 0),),
        (True,),
        (False,),
        (None,),
        ("a", "b"),
        ("ab",),
        (0.0,),
    ]
    assert len({seed_of(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("in_step", [False, True])
def test_a_draw_is_that_of_a_generator_with_its_key(in_step):
    source = noise(3, rank=2, iteration=5)

    def drawn():
        return source.randn(2, 3), source.rand(4), source.randn(1)

    if in_step:
        with source.of_step():
            found = drawn()
    else:
        found = drawn()
    sources = [torch.Generator().manual_seed(seed_of(3, 2, 5, in_step, draw)) for draw in range(3)]
    assert torch.equal(found[0], torch.randn(2, 3, generator=sources[0]))
    assert torch.equal(found[1], torch.rand(4, generator=sources[1]))
    assert torch.equal(found[2], torch.randn(1, generator=sources[2]))


def everything():
    """The first two draws of all seeds, ranks and iterations below 3, within a step and outside of one."""
    for seed, rank, iteration in itertools.product(range(3), repeat=3):
        source = noise(seed, rank=rank, iteration=iteration)
        yield source.randn(4)
        yield source.randn(4)
        source = noise(seed, rank=rank, iteration=iteration)
        with source.of_step():
            yield source.randn(4)
            yield source.randn(4)


def test_every_part_of_the_key_counts_and_nothing_else():
    first = list(everything())
    assert len({tuple(draw.tolist()) for draw in first}) == len(first) == 4 * 27
    torch.manual_seed(17)
    torch.rand(5)
    for before, now in zip(first, everything(), strict=True):
        assert torch.equal(before, now)


def test_torchs_own_generator_is_left_alone():
    source, before = noise(), state()
    source.randn(3)
    source.rand(3)
    source.randn_like({"a": torch.zeros(2, 3)})
    assert torch.equal(before, state())


def test_the_clock_is_asked_at_each_draw():
    source = noise()
    source.randn(2)
    source.clock.iteration, source.clock.global_rank = 4, 1
    expected = noise(iteration=4, rank=1)
    expected.draw = 1
    assert torch.equal(source.randn(2), expected.randn(2))


def test_a_module_is_a_clock():
    gan, expected = small(noise_seed=7), noise(7, iteration=3)
    gan.iteration = 3
    assert torch.equal(gan.noise.randn(5, 4), expected.randn(5, 4))
    gan.noise_seed = 8
    assert gan.noise_seed == gan.noise.seed == 8


# ---------- values


def test_values_are_normal_and_uniform():
    source = noise()
    normal, uniform = source.randn(200, 100), source.rand(200, 100)
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert abs((normal.abs() < 1).double().mean() - 0.6827) < 0.02
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_normal_values_are_the_same_in_lower_precision(dtype):
    single, other = noise().randn(1000), noise().randn(1000, dtype=dtype)
    assert other.dtype == dtype
    if dtype == torch.float64:
        assert abs(other.std() - 1) < 0.1
    else:
        assert torch.equal(other, single.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uniform_values_are_below_one(dtype):
    values = noise().rand(20_000, dtype=dtype)
    assert values.dtype == dtype
    assert 0 <= values.min() < values.max() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_type_is_that_of_the_module(dtype):
    source = noise(dtype=dtype)
    assert source.randn(2, 3).dtype == source.rand(2, 3).dtype == dtype
    assert source.randn(2, dtype=torch.float16).dtype == torch.float16


def test_the_type_of_a_module_without_parameters():
    source = noise()
    source.clock.layer = nn.Identity()
    assert source.randn(1).dtype == torch.get_default_dtype()


def test_noise_like_a_tree():
    sample = {"b": torch.zeros(4, 2, 3), "a": [torch.zeros(4, dtype=torch.float64), None]}
    for draw in (Noise.randn_like, Noise.rand_like):
        found = draw(noise(), sample)
        assert found.keys() == sample.keys()
        assert found["b"].shape == (4, 2, 3)
        assert found["a"][0].shape == (4,)
        assert found["a"][0].dtype == torch.float64
        assert found["a"][1] is None
    plain = torch.zeros(4, 2)
    assert torch.equal(noise().randn_like(plain), noise().randn(4, 2))
    assert torch.equal(noise().rand_like(plain), noise().rand(4, 2))


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None])
def test_n_is_checked(n):
    for draw in (noise().randn, noise().rand):
        with pytest.raises(ValueError, match="`n` must be a positive integer"):
            draw(n)


# ---------- steps


def test_a_step_seeds_torch_and_puts_it_back():
    source, before = noise(3, rank=1, iteration=2), state()
    with source.of_step():
        found = torch.rand(4)
    assert torch.equal(before, state())
    torch.rand(1)
    with source.of_step():
        assert torch.equal(torch.rand(4), found)
    expected = torch.Generator().manual_seed(seed_of(3, 1, 2, True))
    assert torch.equal(found, torch.rand(4, generator=expected))


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 1}, {"iteration": 1}])
def test_torch_is_seeded_by_all_of_the_key(change):
    found = []
    for source in (noise(), noise(**change)):
        with source.of_step():
            found.append(torch.rand(4))
    assert not torch.equal(*found)


def test_a_step_that_fails_leaves_no_trace():
    source = noise()
    source.randn(1)
    before = source.randomness()
    with pytest.raises(KeyError), source.of_step():
        draw_and_fail(source)
    assert not source.in_step
    assert source.randomness().equals(before)
    assert source.draw == 1


def test_draws_count_from_zero_in_a_step_and_go_on_after_it():
    source = noise()
    for _ in range(5):
        source.randn(1)
    with source.of_step():
        assert source.draw == 0
        source.randn(1)
        source.randn(1)
    assert source.draw == 2
    assert not source.in_step


def test_in_step():
    source = noise()
    assert not source.in_step
    with source.of_step():
        assert source.in_step
        with source.of("look"):
            assert not source.in_step
        assert source.in_step
    with source.of("look"):
        assert not source.in_step
    assert not source.in_step


# ---------- looks


def test_a_look_leaves_no_trace():
    source = noise()
    source.randn(1)
    before = source.randomness()
    with source.of("validation", 0, 3):
        source.randn(2)
        torch.rand(2)
        assert not source.randomness().equals(before)
    assert source.randomness().equals(before)
    with pytest.raises(KeyError), source.of("validation", 0, 3):
        draw_and_fail(source)
    assert source.randomness().equals(before)


def test_a_look_in_the_middle_of_a_step_leaves_no_trace():
    def drawn(look):
        source = noise()
        with source.of_step():
            found = [source.randn(2), torch.rand(2)]
            if look:
                with source.of("look"):
                    source.randn(2)
                    torch.rand(2)
            found += [source.randn(2), torch.rand(2)]
        return torch.cat(found), source.draw

    (found, draws), (expected, _) = drawn(True), drawn(False)
    assert torch.equal(found, expected)
    assert draws == 2


def test_looks_are_functions_of_their_key():
    found = []
    for key in (("a",), ("b",), ("a", 0), ("a", 1), ("a",)):
        source = noise()
        source.randn(3)
        torch.rand(1)
        with source.of(*key):
            found.append((*source.randn(2).tolist(), *torch.rand(2).tolist()))
    assert found[0] == found[4]
    assert len(set(found)) == 4


# ---------- rows


def draws(source):
    return source.randn(3, 2), source.rand(3), source.randn(3, dtype=torch.bfloat16)


def test_a_look_at_a_given_iteration_is_the_same_each_time():
    def look(source, **kwargs):
        with source.of("look", **kwargs):
            return source.randn(3), source.of_batch(torch.rand, 3), torch.randn(3)

    first, later = noise(iteration=2), noise(iteration=7)
    for a, b, other in zip(look(first, iteration=0), look(later, iteration=0), look(later), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(b, other)
    for a, b in zip(look(first), look(noise(iteration=9), iteration=2), strict=True):
        assert torch.equal(a, b)


def test_rows_are_those_of_the_whole_draw():
    source = noise()
    source.draw = 4
    whole = source.randn(7, 2), source.rand(7), source.randn(7, dtype=torch.bfloat16)
    for start in (0, 2, 4):
        with source.rows(start, start + 3, total=7, draw=4):
            for part, expected in zip(draws(source), whole, strict=True):
                assert torch.equal(part, expected[start : start + 3])
        assert source.draw == 7


def test_draws_of_another_size_are_whole():
    """A scalar or a row that all samples share is the same in every micro-batch."""
    source, expected = noise(), noise().randn(1, 2)
    for start in (0, 3):
        with source.rows(start, start + 3, total=6, draw=0):
            assert torch.equal(source.randn(1, 2), expected)


def test_rows_end_with_their_context():
    source = noise()
    with pytest.raises(KeyError), source.rows(3, 6, total=6, draw=0):
        raise KeyError
    assert torch.equal(source.randn(3, 2), noise().randn(3, 2))


def test_rows_of_a_step_that_failed_are_forgotten():
    source = noise()
    with pytest.raises(KeyError), source.of_step(), source.rows(3, 6, total=6, draw=0):
        raise KeyError
    assert torch.equal(source.randn(3, 2), noise().randn(3, 2))


def test_a_look_in_a_micro_batch_leaves_no_trace():
    source, whole = noise(), noise().randn(6, 2)
    with source.rows(3, 6, total=6, draw=0):
        with source.of("look"):
            source.randn(3)
        assert torch.equal(source.randn(3, 2), whole[3:])


# ---------- replay


def test_a_replay_draws_the_same_again():
    source = noise()
    source.randn(1)
    dropout = nn.Dropout()
    with source.replay():
        first = torch.cat([source.randn(2), dropout(torch.ones(20)), torch.rand(2)])
    assert torch.equal(torch.cat([source.randn(2), dropout(torch.ones(20)), torch.rand(2)]), first)


def test_a_replay_starts_where_it_is_told_and_uses_nothing_up():
    source = noise()
    start = source.randomness()
    first = torch.cat([source.randn(2), torch.rand(2)])
    source.randn(5)
    before = source.randomness()
    assert not before.equals(start)
    with source.replay(start):
        assert source.randomness().equals(start)
        assert torch.equal(torch.cat([source.randn(2), torch.rand(2)]), first)
    assert source.randomness().equals(before)
    with pytest.raises(KeyError), source.replay(start):
        draw_and_fail(source)
    assert source.randomness().equals(before)


def test_replays_in_replays():
    source = noise()
    start = source.randomness()
    with source.replay():
        a = source.randn(2)
        with source.replay(start):
            assert torch.equal(source.randn(2), a)
        b = source.randn(2)
    assert torch.equal(source.randn(2), a)
    assert torch.equal(source.randn(2), b)


def test_restore_goes_on_from_there():
    source = noise()
    start = source.randomness()
    first = torch.cat([source.randn(2), torch.rand(2)])
    source.restore(start)
    assert torch.equal(torch.cat([source.randn(2), torch.rand(2)]), first)


def test_randomness_is_a_look_and_not_the_thing():
    source = noise()
    start = source.randomness()
    assert start.equals(source.randomness())
    torch.rand(1)
    assert not start.equals(source.randomness())
    source.restore(start)
    source.randn(1)
    assert not start.equals(source.randomness())


def test_randomness_of_devices_counts_where_both_have_one():
    cpu = state()
    one, other = torch.zeros(1), torch.ones(1)
    assert not Randomness(0, cpu, one).equals(Randomness(0, cpu, other))
    assert Randomness(0, cpu, one).equals(Randomness(0, cpu, one.clone()))
    assert Randomness(0, cpu, one).equals(Randomness(0, cpu, None))
