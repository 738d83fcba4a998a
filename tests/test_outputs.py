"""Trees of tensors, micro-batches and their outputs, logits of several discriminators, and the record of a step."""

import re
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

from lightning_gan_stability import GANOutputs, NonSaturating, StepRecord
from lightning_gan_stability.outputs import (
    Pair,
    Unpacked,
    batch_size,
    concatenate,
    detach,
    detached,
    differentiable,
    entries,
    micro_batches,
    same_structure,
    shapes,
    take_rows,
    tree_leaves,
    tree_map,
)


class Video(NamedTuple):
    frames: torch.Tensor
    sound: torch.Tensor


class Keyed(dict):
    """A dict of another type, such as the batches of some libraries."""


def numbers(*shape, start=0.0):
    return torch.arange(start, start + torch.Size(shape).numel()).reshape(shape)


A, B = numbers(4, 2), numbers(4, start=100.0)
TREES = {
    "tensor": (A, [A]),
    "dict": ({"b": B, "a": A}, [A, B]),
    "list": ([B, A], [B, A]),
    "named tuple": (Video(B, A), [B, A]),
    "nested": ({"y": [B, {"z": A}], "x": Video(A, B)}, [A, B, B, A]),
    "with None": ({"b": B, "n": None, "a": [None, A]}, [A, B]),
    "None": (None, []),
    "nothing": ({}, []),
}
tree_cases = pytest.mark.parametrize(("tree", "leaves"), TREES.values(), ids=TREES)


def equal(tree, other):
    """Whether two trees are of the same types, keys and values, without the code that is tested."""
    if isinstance(tree, torch.Tensor):
        return isinstance(other, torch.Tensor) and tree.dtype == other.dtype and torch.equal(tree, other)
    if type(tree) is not type(other):
        return False
    if isinstance(tree, dict):
        return tree.keys() == other.keys() and all(equal(tree[key], other[key]) for key in tree)
    if isinstance(tree, list | tuple):
        return len(tree) == len(other) and all(map(equal, tree, other))
    return tree == other


# ---------- trees


@tree_cases
def test_leaves_come_in_the_order_of_sorted_keys(tree, leaves):
    assert equal(tree_leaves(tree), leaves)


@tree_cases
def test_a_map_keeps_the_tree(tree, leaves):
    seen = []

    def double(x):
        seen.append(x)
        return 2 * x

    doubled = tree_map(double, tree)
    assert equal(seen, leaves)
    assert equal(tree_leaves(doubled), [2 * leaf for leaf in leaves])
    assert equal(tree_map(lambda x: x / 2, doubled), tree)
    assert same_structure(doubled, tree)


def test_a_map_keeps_the_order_of_insertion():
    assert [*tree_map(lambda x: x, {"b": B, "a": A})] == ["b", "a"]


def test_trees_are_matched_by_key():
    found = tree_map(lambda x, y: y - x, {"b": B, "a": A}, {"a": A + 1, "b": B + 2})
    assert equal(found, {"b": torch.full_like(B, 2), "a": torch.full_like(A, 1)})


@pytest.mark.parametrize("other", [{"a": A}, {"a": A, "c": B}, [A, B], {"a": A, "b": None}, {"a": A, "b": [B]}])
def test_trees_of_other_structure_do_not_match(other):
    tree = {"a": A, "b": B}
    assert not same_structure(tree, other)
    assert not same_structure(other, tree)


@pytest.mark.parametrize("other", [{"a": A}, {"a": A, "c": B}, [A, B]])
def test_maps_of_trees_with_other_keys_are_refused(other):
    with pytest.raises(ValueError, match=r"mismatch|Expected"):
        tree_map(lambda x, y: y, {"a": A, "b": B}, other)


def test_same_structure_does_not_look_at_shapes():
    assert same_structure({"a": A, "b": B}, {"b": A[:1], "a": B.long()})
    assert same_structure(None, None)
    assert not same_structure(None, A)
    assert not same_structure(A, [A])
    assert not same_structure([A], Video(A, B))
    assert not same_structure([A], [A, A])


@pytest.mark.parametrize("other", [OrderedDict(b=B, a=A), {"a": A, "b": B}])
def test_same_structure_of_ordered_dicts(other):
    """Real samples and samples of these types match by key, and differences are refused as ones of shape."""
    assert same_structure(OrderedDict(a=A, b=B), other)


@tree_cases
def test_rows_of_all_leaves(tree, leaves):
    assert equal(tree_leaves(take_rows(tree, 1, 3)), [leaf[1:3] for leaf in leaves])


@tree_cases
def test_shapes(tree, leaves):
    # tuples of numbers are trees themselves
    assert str(shapes(tree)) == str(tree_map(lambda x: (2,) if x.dim() == 2 else (), tree))
    assert str(shapes(tree, 0)) == str(tree_map(lambda x: (4, 2) if x.dim() == 2 else (4,), tree))


@tree_cases
def test_batch_size(tree, leaves):
    if leaves:
        assert batch_size(tree) == 4
    else:
        with pytest.raises(ValueError, match=r"with one batch size as their first dimension, got none\.$"):
            batch_size(tree)


@pytest.mark.parametrize(
    ("tree", "got"),
    [
        ([A, B[:3]], "a torch.float32 tensor of shape (4, 2), a torch.float32 tensor of shape (3,)."),
        (torch.tensor(1.0), "a torch.float32 tensor of shape ()."),
        ({"a": A, "b": torch.tensor(4)}, "shape (4, 2), a torch.int64 tensor of shape ()."),
        ({"a": A, "b": "four"}, "shape (4, 2), a str."),
        ([[1, 2, 3]], "a int, a int, a int."),
        ("four", "a str."),
        (Keyed(a=A), "a Keyed with keys ['a']."),
    ],
)
def test_batch_size_says_what_it_cannot_be_of(tree, got):
    with pytest.raises(ValueError, match=r"All leaves must be tensors with one batch size .*" + re.escape(got)):
        batch_size(tree)


def test_batch_size_may_be_zero():
    assert batch_size({"a": A[:0], "b": B[:0]}) == 0


def test_detach_and_differentiable():
    x = torch.ones(2, requires_grad=True)
    tree = {"a": 2 * x, "b": [None, 3 * x]}
    for found, requires_grad in ((detach(tree), False), (differentiable(tree), True)):
        assert equal(detach(found), {"a": torch.full((2,), 2.0), "b": [None, torch.full((2,), 3.0)]})
        for leaf in tree_leaves(found):
            assert leaf.is_leaf
            assert leaf.requires_grad == requires_grad
    assert tree["a"].grad_fn is not None
    assert not x.detach().requires_grad


def test_detach_leaves_other_things_as_they_are():
    thing = object()
    assert detach({"a": thing, "n": 3})["a"] is thing


# ---------- logits


def test_entries_by_name():
    assert equal(entries(B), {"": B})
    assert equal(entries([A, B]), {"0": A, "1": B})
    assert equal(entries({"x": A, "y": B}), {"x": A, "y": B})
    assert equal(entries(OrderedDict(x=A)), {"x": A})


def outputs(real, fake):
    return GANOutputs(A, A, real, fake)


def test_pairs_of_one_discriminator():
    ((name, real, fake),) = outputs(A, B).pairs()
    assert name == ""
    assert real is A
    assert fake is B


def test_pairs_are_matched_by_key():
    pairs = outputs({"x": A, "y": B}, {"y": B + 1, "x": A + 1}).pairs()
    assert [pair.name for pair in pairs] == ["x", "y"]
    for pair in pairs:
        assert isinstance(pair, Pair)
        assert torch.equal(pair.fake, pair.real + 1)
    assert [pair.name for pair in outputs([A, B], [B, A]).pairs()] == ["0", "1"]


@pytest.mark.parametrize(("real", "fake", "side"), [(None, A, "real"), (A, None, "fake"), (None, None, "real")])
def test_pairs_need_both_sides(real, fake, side):
    with pytest.raises(ValueError, match=f"These outputs have no {side} logits: in the generator's step"):
        outputs(real, fake).pairs()


@pytest.mark.parametrize(
    ("real", "fake", "names"),
    [
        ({"x": A}, {"y": A}, "['x'] for real samples and ['y']"),
        ([A, A], [A], "['0', '1'] for real samples and ['0']"),
        (A, [A], "[''] for real samples and ['0']"),
    ],
)
def test_pairs_must_be_of_the_same_discriminators(real, fake, names):
    with pytest.raises(ValueError, match=re.escape(f"`discriminate` returned logits {names} for generated ones")):
        outputs(real, fake).pairs()


def test_outputs_are_replaced_and_not_changed():
    before = outputs(A, None)
    after = before.replace(fake_logits=B, extras={"loss": A})
    assert before.fake_logits is None
    assert before.extras == {}
    assert after.fake_logits is B
    assert after.real_logits is A
    assert GANOutputs(A, A).extras is not GANOutputs(A, A).extras
    with pytest.raises(TypeError, match="other"):
        before.replace(other=1)
    with pytest.raises(AttributeError):
        before.other = 1


def test_detached_outputs_have_no_graph_anywhere():
    x = torch.ones(2, 1, requires_grad=True)
    fields = {name: {name: 2 * x} for name in GANOutputs.__dataclass_fields__}
    found = detached(GANOutputs(**fields))
    # which nobody reads after the penalties
    assert found.real_activations == found.fake_activations == {}
    assert found.real_augmented is found.fake_augmented is None
    for name in {name for name in fields if not name.endswith(("_activations", "_augmented"))}:
        assert torch.equal(getattr(found, name)[name], 2 * x)
        assert not getattr(found, name)[name].requires_grad


# ---------- micro-batches


def parts_of(n, parts, pack=1, condition=None):
    real = {"a": numbers(n, 2), "b": numbers(n)}
    return list(micro_batches(Unpacked(real, condition), parts, pack))


@pytest.mark.parametrize("pack", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [3, 4, 7, 12, 13])
def test_micro_batches_are_the_batch(n, parts, pack):
    found = parts_of(n, parts, pack, condition=numbers(n))
    rows = n // pack * pack
    assert len(found) <= parts
    assert [start for _, start, _ in found] == [0, *(stop for *_, stop in found[:-1])]
    assert found[-1][2] == rows
    for part, start, stop in found:
        assert stop > start
        assert (stop - start) % pack == 0
        assert torch.equal(part.real["a"], numbers(n, 2)[start:stop])
        assert torch.equal(part.real["b"], numbers(n)[start:stop])
        assert torch.equal(part.condition, numbers(n)[start:stop])
    sizes = [stop - start for _, start, stop in found]
    assert max(sizes) <= pack * -(-rows // pack // parts)  # no more memory than it takes


@pytest.mark.parametrize(
    ("n", "parts", "pack", "sizes"),
    [(8, 2, 1, [4, 4]), (8, 1, 1, [8]), (2, 5, 1, [1, 1]), (7, 2, 2, [4, 2]), (12, 3, 4, [4, 4, 4])],
)
def test_sizes_of_micro_batches(n, parts, pack, sizes):
    assert [stop - start for _, start, stop in parts_of(n, parts, pack)] == sizes


@pytest.mark.parametrize(("n", "parts", "sizes"), [(7, 3, [3, 2, 2]), (9, 4, [3, 3, 3]), (10, 4, [3, 3, 2, 2])])
def test_micro_batches_are_as_equal_as_can_be(n, parts, sizes):
    assert sorted((stop - start for _, start, stop in parts_of(n, parts)), reverse=True) == sizes


def part(rows, **kwargs):
    """Outputs of some rows of a batch whose values tell where they are from."""
    rows = torch.tensor(rows, dtype=torch.float32)
    trees = {"latents": rows[:, None], "condition": [rows], "real_features": {"f": rows}, "fake_features": (rows,)}
    return GANOutputs({"x": rows}, {"x": -rows}, [rows, 2 * rows], [3 * rows, 4 * rows], **trees, **kwargs)


def test_outputs_are_concatenated_leaf_by_leaf():
    x = torch.ones((), requires_grad=True)
    first, second = part([0, 1], extras={"row": x * torch.ones(2)}), part([2], extras={"row": x * torch.ones(1)})
    whole = concatenate([first, second], [2 / 3, 1 / 3])
    expected = part([0, 1, 2], extras={"row": torch.ones(3)})
    for name in GANOutputs.__dataclass_fields__:
        assert equal(getattr(whole, name), getattr(expected, name)), name
    assert not whole.extras["row"].requires_grad


def test_what_is_not_there_stays_away():
    whole = concatenate([GANOutputs(A, A), GANOutputs(A, A)], [0.5, 0.5])
    assert whole.real_logits is whole.latents is whole.condition is whole.real_features is None
    assert whole.extras == {}


def test_scalar_extras_are_averaged_by_share():
    extras = [{"loss": torch.tensor(v), "more": [torch.tensor(2 * v)], "none": None} for v in (1.0, 5.0)]
    whole = concatenate([part([0, 1, 2], extras=extras[0]), part([3], extras=extras[1])], [0.75, 0.25])
    assert equal(whole.extras, {"loss": torch.tensor(2.0), "more": [torch.tensor(4.0)], "none": None})


def test_averages_of_micro_batches_are_those_of_the_batch():
    """Means over rows, which is what losses are, of a batch in parts of different sizes."""
    values = torch.randn(7, generator=torch.Generator().manual_seed(0))
    batch = Unpacked(values, None)
    found = [(p.real, (stop - start) / 7) for p, start, stop in micro_batches(batch, 3)]
    parts = [GANOutputs(x, x, extras={"mean": x.mean(), "square": x.square()}) for x, _ in found]
    whole = concatenate(parts, [share for _, share in found])
    torch.testing.assert_close(whole.extras["mean"], values.mean())
    assert torch.equal(whole.extras["square"], values.square())


@pytest.mark.parametrize(
    ("extra", "got"),
    [
        (torch.zeros(3), "a torch.float32 tensor of shape (3,)"),
        (torch.zeros(1, 2), "a torch.float32 tensor of shape (1, 2)"),
        ("text", "a str"),
    ],
)
def test_other_extras_are_refused(extra, got):
    parts = [part([0, 1], extras={"extra": extra}), part([2, 3], extras={"extra": extra})]
    with pytest.raises(
        ValueError, match=r"must be scalars or have one row .*" + re.escape(f"got {got} in a micro-bat")
    ):
        concatenate(parts, [0.5, 0.5])


def test_numbers_are_scalar_extras():
    parts = [part([0, 1], extras={"usage": 0.25}), part([2, 3], extras={"usage": 0.75})]
    assert concatenate(parts, [0.5, 0.5]).extras["usage"] == 0.5


def test_one_part_is_the_whole():
    x = torch.ones(2, requires_grad=True)
    whole = concatenate([GANOutputs(2 * x, x, extras={"anything": "text"})], [1.0])
    assert torch.equal(whole.real, 2 * x)
    assert not whole.real.requires_grad
    assert whole.extras == {"anything": "text"}


# ---------- the record of a step


def test_a_record_notes_terms_and_the_discriminators_logits():
    record = StepRecord()
    record.add("d", outputs(A, B), {"adversarial": torch.tensor(1.0), "r1": torch.tensor(2.0)})
    record.add("g", outputs(None, A), {"adversarial": torch.tensor(3.0)})
    assert record.terms == {"d": {"adversarial": 1.0, "r1": 2.0}, "g": {"adversarial": 3.0}}
    assert record.values == {"d/adversarial": 1.0, "d/r1": 2.0, "g/adversarial": 3.0}
    assert len(record.pairs) == 1
    assert record.pairs[0].real is A
    assert record.pairs[0].fake is B


def test_records_share_nothing():
    first, second = StepRecord(), StepRecord()
    first.add("d", outputs(A, B), {"adversarial": A})
    first.moved.add("d")
    first.gradient_norms["d"] = A
    assert second == StepRecord()
    assert (second.terms, second.values, second.moved, second.pairs) == ({"d": {}, "g": {}}, {}, set(), [])


REAL = torch.tensor([1.0, 3.0, -2.0, 4.0])
FAKE = torch.tensor([-1.0, -1.0, 1.0, 3.0])  # with 3 of 4 and 2 of 4 judged right


def test_the_logits_of_one_discriminator():
    record = StepRecord()
    record.add("d", outputs(REAL, FAKE), {})
    record.add_logits(NonSaturating())
    assert {name: value.item() for name, value in record.values.items()} == {
        "d/real_logit": 1.5,
        "d/fake_logit": 0.5,
        "d/accuracy": 5 / 8,
    }


def test_the_logits_of_several_discriminators_and_their_mean():
    record = StepRecord()
    record.add("d", outputs({"x": REAL, "y": REAL[:, None] + 1}, {"x": FAKE, "y": FAKE[:, None] - 3}), {})
    record.add_logits(NonSaturating())
    assert {name: value.item() for name, value in record.values.items()} == {
        "d/real_logit/x": 1.5,
        "d/fake_logit/x": 0.5,
        "d/accuracy/x": 5 / 8,
        "d/real_logit/y": 2.5,
        "d/fake_logit/y": -2.5,
        "d/accuracy/y": 6 / 8,  # a logit of 0 is not judged right
        "d/real_logit": 2.0,
        "d/fake_logit": -1.0,
        "d/accuracy": 11 / 16,
    }


def test_a_list_of_one_discriminator_has_no_names():
    record = StepRecord()
    record.add("d", outputs([REAL], [FAKE]), {})
    record.add_logits(NonSaturating())
    assert set(record.values) == {"d/real_logit", "d/fake_logit", "d/accuracy"}


def test_accuracy_is_that_of_the_loss():
    class Never(NonSaturating):
        def accuracy(self, real_logits, fake_logits):
            return torch.tensor(0.25)

    record = StepRecord()
    record.add("d", outputs(REAL, FAKE), {})
    record.add_logits(Never())
    assert record.values["d/accuracy"] == 0.25
