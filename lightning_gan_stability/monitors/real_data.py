"""Reads real data of a run as the run itself does, without advancing the run's loaders."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_gan_stability._compat import loader_of, mode_of, shares_data, to_device
from lightning_gan_stability.data.streams import Stream
from lightning_gan_stability.noise import generator, seed_of
from lightning_gan_stability.outputs import Unpacked, batch_size, shapes, take_rows, tree_leaves, tree_map

Split: TypeAlias = Literal["train", "val"]
LARGE = 1000  # values: arrays with more of them are shared by copies, as nobody counts in them


class RealData:
    """This rank's share of n real samples of a loader, batch by batch, on its device: the same ones each time.

    The sampler determines which samples there are and how often. A random choice of these is read, in batches as large
    as the loader's, with its workers and its ``collate_fn``. A loader that is not a ``DataLoader`` gives its first
    batches. Loaders, data sets and samplers are not advanced, and neither are their generators. Read the data while
    random states are isolated.

    Args:
        trainer: the run's Trainer.
        loader: any iterable of batches, or a dict or list of such iterables.
        n: number of samples of all ranks; None: all.

    Raises:
        MisconfigurationException: if the loader cannot be read without advancing it.
    """

    def __init__(self, trainer: Trainer, loader: Any, n: int | None) -> None:
        self.trainer, self.loader = trainer, loader
        self.n = n

    def __iter__(self) -> Iterator[Unpacked]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        left = math.inf if self.n is None else len(range(rank, self.n, world))
        _seed_everything("real", rank)
        module: Any = self.trainer.lightning_module
        with closing(from_start(self.loader, self.n, rank, world)) as batches:
            for batch in batches if left > 0 else ():
                unpacked = Unpacked(*module.unpack(to_device(self.trainer, batch)))
                size = batch_size(unpacked.real)
                if size > left:
                    unpacked = take_rows(unpacked, 0, int(left))
                yield unpacked
                left -= size
                if left <= 0:
                    return


def loader_to_read(trainer: Trainer, split: Split) -> Any:
    """The loader of a split: the first of several validation loaders; an empty list if there is none.

    The Trainer may cut training data short in the same way in every epoch, by ``overfit_batches``, or by
    ``limit_train_batches`` if the order of samples is fixed. Then this returns only what the run trains on.
    """
    loader = loader_of(trainer, split)
    return _first_of(loader) if split == "val" else _trained_on(trainer, loader)


def loader_of_stage(trainer: Trainer, split: Split) -> tuple[Any, str]:
    """The loader to compare with, and its name: that of the split in a fit, that of the test in a test.

    ``trainer.validate`` may be called without training data; then its validation data are used instead.
    """
    stage = trainer.state.fn
    if stage == "test":
        return _first_of(loader_of(trainer, "test")), "test"
    if stage == "fit":
        return loader_to_read(trainer, split), split
    if split == "train":
        try:
            loader = loader_to_read(trainer, split)
        except Exception as error:  # of a data module that has been set up for validation alone
            rank_zero_info(f"No training data to compare with ({error}): compared with validation data.")
        else:
            if not isinstance(loader, list) or loader:
                return loader, split
    return _first_of(loader_of(trainer, "validate")), "val"


def _first_of(loader: Any) -> Any:
    """The first of several loaders."""
    while isinstance(loader, Mapping | list | tuple) and len(loader):
        loader = next(iter(loader.values() if isinstance(loader, Mapping) else loader))
    return loader


# ---------- a run that trains on a part of its data


@dataclass
class _First:
    """A loader of which a run reads only the first batches."""

    loader: Any
    batches: int


def _trained_on(trainer: Trainer, loader: Any) -> Any:
    """What a run trains on in every epoch, or the whole loader if epochs have different samples."""
    limit = trainer.limit_train_batches
    whole = limit == 0 or (isinstance(limit, float) and limit == 1.0)
    if whole or trainer.fast_dev_run:  # type: ignore[attr-defined]  # which tries the code of a whole run
        return loader
    if isinstance(loader, Stream):
        return loader  # an epoch begins where the last one ended
    if isinstance(loader, CombinedLoader):
        return CombinedLoader(tree_map(partial(_trained_on, trainer), loader.iterables), mode_of(loader))
    if _are_several(loader):
        return tree_map(partial(_trained_on, trainer), loader)
    if _is_loader(loader) and not isinstance(loader.dataset, IterableDataset):
        return _first_rows(trainer, loader)
    # others may go through other samples in each epoch, unless they are to be learned by heart
    return _First(loader, _limited(trainer, loader)) if overfits(trainer) else loader


def _first_rows(trainer: Trainer, loader: Any) -> Any:
    """A loader of the rows that all ranks together train on, if they are the same in every epoch."""
    by_heart, batched = overfits(trainer), loader.batch_sampler
    world = trainer.world_size if shares_data(trainer) else 1
    if batched is not None and type(batched) is not BatchSampler:
        if not by_heart and type(batched) not in (list, tuple):
            return loader
        n = _limited(trainer, loader) * world
        batches, _ = _indices(batched, loader.dataset, n)
        return _like(loader, loader.dataset, loader.num_workers, {"batch_sampler": batches[:n]})
    sampler = loader.sampler if batched is None else batched.sampler
    # Lightning puts a sequential one in the place of any other sampler, but not within batch samplers
    replaced = by_heart and type(loader.sampler) is not SequentialSampler
    if replaced or type(sampler) is SequentialSampler:
        order: Any = range(len(loader.dataset))
    elif type(sampler) is DistributedSampler and not sampler.shuffle:
        order, world = range(len(loader.dataset)), sampler.num_replicas
    elif type(sampler) in (list, tuple, range):
        order = sampler
    else:
        return loader
    size = 1 if batched is None else batched.batch_size
    each = math.ceil(len(order) / world) / size  # batches of a rank
    n = _limited(trainer, math.floor(each) if batched is not None and batched.drop_last else math.ceil(each))
    rows = order[: n * size * world]
    how = {"sampler": rows, "batch_size": None if batched is None else size}
    return _like(loader, loader.dataset, loader.num_workers, how)


def overfits(trainer: Trainer) -> bool:
    """Whether a run is to memorize some batches: ``Trainer(overfit_batches=...)``.

    Example:
        >>> overfits(Trainer(overfit_batches=1))
        True
    """
    return bool(trainer.overfit_batches)  # type: ignore[attr-defined]


def _limited(trainer: Trainer, of: Any) -> int:
    """The number of batches in an epoch, given a number of them or a loader."""
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return limit
    return int((of if isinstance(of, int) else len(of)) * limit)


def rebatched(parts: Iterable[Any], size: int) -> Iterator[Any]:
    """Batches of one size, from parts of any sizes; parts whose samples have different shapes are not joined.

    Example:
        >>> [len(part) for part in rebatched([torch.zeros(3), torch.zeros(4)], 5)]
        [5, 2]
    """
    waiting: Any = None
    for part in parts:
        if waiting is not None and shapes(waiting) != shapes(part):
            yield waiting
        elif waiting is not None:
            part = tree_map(lambda *leaves: torch.cat(leaves), waiting, part)
        n = batch_size(part)
        whole = n // size * size
        for start in range(0, whole, size):
            yield take_rows(part, start, start + size)
        waiting = take_rows(part, whole, n) if whole < n else None
    if waiting is not None:
        yield waiting


# ---------- batches of any loader


def from_start(loader: Any, n: int | None, rank: int, world: int) -> Generator[Any]:
    """Batches of one rank's share of at least n samples of a loader, without advancing it.

    Args:
        loader: any iterable of batches, or a dict or list of such iterables.
        n: number of samples of all ranks; None: all.
        rank: the rank.
        world: number of ranks.
    """
    if isinstance(loader, Stream):
        return (loader.batch(position) for position in range(len(loader)))
    if isinstance(loader, _First):
        batches = from_start(loader.loader, n, rank, world)
        return (batch for _, batch in zip(range(loader.batches), batches, strict=False))
    if isinstance(loader, CombinedLoader):
        return _of_several(loader, n, rank, world)
    if _are_several(loader):
        return _of_several(CombinedLoader(loader, "max_size_cycle"), n, rank, world)
    if _is_loader(loader):
        if isinstance(loader.dataset, IterableDataset):
            return _of_iterable_dataset(loader)
        return _of_map_dataset(loader, n, rank, world)
    return _of_others(loader)


def _are_several(loader: Any) -> bool:
    """Whether it is a dict or list with loaders in it."""
    several = isinstance(loader, Mapping) or type(loader) in (list, tuple)
    return several and any(map(_is_loader, tree_leaves(loader)))


def _is_loader(thing: Any) -> bool:
    """Whether it is a ``DataLoader``, or has what one has."""
    return all(hasattr(thing, name) for name in ("dataset", "batch_sampler", "collate_fn", "num_workers"))


@dataclass
class _Share:
    """A loader that is read from its start each time."""

    loader: Any
    n: int | None
    rank: int
    world: int

    def __iter__(self) -> Iterator[Any]:
        return from_start(self.loader, self.n, self.rank, self.world)

    def __len__(self) -> int:
        return len(self.loader)


def _of_several(loader: CombinedLoader, n: int | None, rank: int, world: int) -> Generator[Any]:
    """Batches of several loaders, combined as they are in the run."""
    mode, parts = mode_of(loader), tree_leaves(loader.iterables)
    each = math.ceil(n / len(parts)) if n is not None and mode == "sequential" else n
    read = CombinedLoader(tree_map(lambda part: _Share(part, each, rank, world), loader.iterables), mode)
    return (batch for batch, *_ in read)


def _of_map_dataset(loader: Any, n: int | None, rank: int, world: int) -> Generator[Any]:
    """A random choice of what the sampler gives in an epoch, read from the data set in new batches."""
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    batched = type(sampler) is BatchSampler and loader.batch_sampler is not None
    size = sampler.batch_size if batched else None
    indices, shared = _indices(sampler.sampler if batched else sampler, loader.dataset, n)
    order = torch.randperm(len(indices), generator=generator("real")).tolist()
    order = order[:n] if batched else order
    mine = [indices[i] for i in (order if shared else order[rank::world])]
    if shared and batched and n is not None:
        mine = mine[: len(range(rank, n, world))]
    parts = mine if size is None else [mine[i : i + size] for i in range(0, len(mine), size)]
    if loader.num_workers == 0:
        yield from _fetched(loader, parts)
    elif parts:
        how = {"sampler": parts, "batch_size": None} if loader.batch_sampler is None else {"batch_sampler": parts}
        yield from _like(loader, loader.dataset, min(loader.num_workers, len(parts)), how)


def _indices(sampler: Any, dataset: Any, n: int | None) -> tuple[Sequence[Any], bool]:
    """What a sampler gives in an epoch, in any order, and whether it is a rank's share."""
    whole = type(sampler) in (SequentialSampler, DistributedSampler)
    whole |= type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source)
    if whole:
        return range(len(dataset)), False
    shared = hasattr(sampler, "num_replicas") or hasattr(getattr(sampler, "sampler", None), "num_replicas")
    with isolate_rng(), _untouched(sampler, dataset) as copy:
        _seed_everything("rows")
        sized = _has_length(sampler)
        if n is None and not sized:
            raise MisconfigurationException(
                f"All samples of a loader are to be read, and its sampler {type(sampler).__name__} has no length, so "
                "that it may never end: give it `__len__`, or a number of real samples."
            )
        return list(islice(copy, None if sized else n)), shared


def repeated_share(loader: Any, n: int | None = None) -> float:
    """The share of the rows of an epoch that samplers repeat; for several loaders the largest one.

    0 if the rows are not known, as in streams and custom loaders.

    Args:
        loader: any iterable of batches, or a dict or list of such iterables.
        n: number of rows to check if a sampler has no end.

    Example:
        >>> repeated_share(DataLoader(range(3), sampler=[0, 0, 1, 2])), repeated_share(DataLoader(range(3)))
        (0.25, 0.0)
    """
    if isinstance(loader, CombinedLoader):
        loader = loader.iterables
    if not _is_loader(loader):
        parts = tree_leaves(loader) if _are_several(loader) else []
        return max((repeated_share(part, n) for part in parts if _is_loader(part)), default=0.0)
    if isinstance(loader.dataset, IterableDataset):
        return 0.0
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    plain = type(sampler) is BatchSampler
    of_batches = loader.batch_sampler is not None and not plain
    found, _ = _indices(sampler.sampler if plain else sampler, loader.dataset, n)
    if isinstance(found, range):
        return 0.0
    # a batch of rows is a list or a tensor, if it is the sampler that makes batches
    batches = ([*one] if of_batches or isinstance(one, list | Tensor | np.ndarray) else [one] for one in found)
    names = [repr(index) for batch in batches for index in batch]  # some cannot be hashed, or are other objects
    return 1 - len({*names}) / max(len(names), 1)


def _has_length(sampler: Any) -> bool:
    try:
        return len(sampler) >= 0
    except (TypeError, NotImplementedError):  # which torch's own classes raise for what has none
        return False


def _fetched(loader: Any, parts: Sequence[Any]) -> Iterator[Any]:
    """Batches of a data set that this process reads; the data set's own generators are restored."""
    dataset, collate = loader.dataset, loader.collate_fn
    with _put_back(_generators_of(dataset, collate)):
        for part in parts:
            if loader.batch_sampler is None:
                found = dataset[part]
            elif getattr(dataset, "__getitems__", None):
                found = dataset.__getitems__(part)
            else:
                found = [dataset[index] for index in part]
            yield collate(found)


def _of_iterable_dataset(loader: Any) -> Generator[Any]:
    """Batches of a copy of the data set: that of new workers, or one that is made here."""
    how = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
    if loader.num_workers:
        yield from _like(loader, loader.dataset, loader.num_workers, how)
        return
    with _refused_if_stuck(loader.dataset):
        dataset = _copied(loader.dataset)
    yield from _like(loader, dataset, 0, how)


def _like(loader: Any, dataset: Any, num_workers: int, how: dict[str, Any]) -> DataLoader[Any]:
    """A new loader, with its own workers and the same seeds each time."""
    own = generator("workers")
    options = {"collate_fn": loader.collate_fn, "num_workers": num_workers, "generator": own}
    if num_workers:
        options |= {name: getattr(loader, name) for name in ("timeout", "worker_init_fn", "multiprocessing_context")}
    return DataLoader(dataset, **how, **options)


def _of_others(loader: Any) -> Generator[Any]:
    """Batches of a loader that is only known to be iterable."""
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        state = deepcopy(loader.state_dict())
        try:
            yield from loader
        finally:
            loader.load_state_dict(state)
        return
    if type(loader) in (list, tuple):
        yield from loader
        return
    with _refused_if_stuck(loader):
        copy = _copied(loader)
    yield from copy


@contextmanager
def _refused_if_stuck(data: Any) -> Iterator[None]:
    """Refuse data that cannot be copied, and so cannot be read twice."""
    try:
        yield
    except Exception as error:
        raise MisconfigurationException(
            f"A monitor would take the batches that it reads from {type(data).__name__} away from training, since it "
            f"cannot be copied ({error}): give it `state_dict` and `load_state_dict`, use num_workers=1 or more, or "
            "let `__iter__` make what it goes through."
        ) from error


# ---------- what an object holds


def _copied(thing: Any, *kept: Any) -> Any:
    """A deep copy that shares large arrays and the objects in ``kept`` with the original."""
    memo = {id(part): part for part in kept}
    for part in _parts_of(thing, *kept):
        if (isinstance(part, Tensor) and part.numel() > LARGE) or (isinstance(part, np.ndarray) and part.size > LARGE):
            memo[id(part)] = part
    return deepcopy(thing, memo)


@contextmanager
def _untouched(thing: Any, *kept: Any) -> Iterator[Any]:
    """A copy that shares locks and the like; if that is impossible the object itself, whose generators are restored."""
    try:
        copy = _copied(thing, *kept)
    except Exception:
        try:
            copy = _copied(thing, *kept, *_handles_of(thing))
        except Exception:  # of what is known only by name
            with _put_back(_generators_of(thing)):
                yield thing
            return
    yield copy


def _handles_of(thing: Any) -> list[Any]:
    """What an object holds that has no copies, such as locks: it has no attributes, and nothing iterates over it."""
    found = []
    for part in _parts_of(thing):
        if isinstance(part, ModuleType) or not (hasattr(part, "__dict__") or isinstance(part, Iterable)):
            try:
                deepcopy(part)
            except Exception:
                found.append(part)
    return found


RandomSource: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def _generators_of(*things: Any) -> list[RandomSource]:
    return [part for part in _parts_of(*things) if isinstance(part, RandomSource)]


@contextmanager
def _put_back(generators: list[RandomSource]) -> Iterator[None]:
    """Restore the state of generators."""
    before = [_state(one) for one in generators]
    try:
        yield
    finally:
        for one, state in zip(generators, before, strict=True):
            _set_state(one, state)


def _state(one: RandomSource) -> Any:
    if isinstance(one, np.random.Generator):
        return deepcopy(one.bit_generator.state)
    return one.getstate() if isinstance(one, random.Random) else one.get_state()


def _set_state(one: RandomSource, state: Any) -> None:
    if isinstance(one, np.random.Generator):
        one.bit_generator.state = state
    elif isinstance(one, random.Random):
        one.setstate(state)
    else:
        one.set_state(state)


def _parts_of(*things: Any) -> Iterator[Any]:
    """Objects and what they hold in attributes, lists, tuples and dicts; only the first element of a long list."""
    seen: set[int] = set()
    waiting = [*things]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, str | bytes | int | float | type | None) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, Mapping):
            waiting += islice(thing.values(), LARGE)
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += islice(thing, LARGE if len(thing) <= LARGE else 1)
        elif isinstance(thing, partial):
            waiting += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, MethodType):
            waiting.append(thing.__self__)
        elif isinstance(thing, FunctionType):
            waiting += [cell.cell_contents for cell in thing.__closure__ or () if cell != CellType()]
        if not isinstance(thing, Tensor | np.ndarray | ModuleType):
            waiting += getattr(thing, "__dict__", {}).values()


def _seed_everything(*key: object) -> None:
    seed = seed_of(*key)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
