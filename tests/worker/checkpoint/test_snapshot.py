from __future__ import annotations

import mmap
import random
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import raylight.worker.checkpoint.snapshot as snapshot_module
from raylight.contract.errors import InvalidArguments, StorageError
from raylight.contract.messages import Saved, SaveFailed
from raylight.storage.checkpoints import Manifest, commit, verify
from raylight.storage.filesystem import Storage
from raylight.worker.checkpoint.restore import load_state
from raylight.worker.checkpoint.snapshot import Snapshots, State, share

DIRECTORY = "checkpoints/step-00000001"


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 5))


class Training:
    """A small run: what the loop does, without the loop."""

    def __init__(self, seed: int = 0):
        self.net = make_net(seed)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.num_steps = 0

    def owned(self) -> list[Tensor]:
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return [*self.net.parameters(), *state]

    def state(self) -> State:
        return State(
            model=self.net.state_dict(),
            replicated={"optimizers": [self.optimizer.state_dict()], "loop": {"step": self.num_steps}},
            own={"rng": torch.get_rng_state()},
            module={"hyper_parameters": {"width": 40}},
        )

    def load(self, state: State) -> None:
        self.net.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.replicated["optimizers"][0])
        self.num_steps = state.replicated["loop"]["step"]
        torch.set_rng_state(state.own["rng"])

    def step(self, snapshots: Snapshots | None = None) -> bool:
        loss = self.net(torch.randn(16, 20)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        whole = snapshots.wait() if snapshots is not None else True
        self.optimizer.step()
        self.num_steps += 1
        return whole

    def take(self, snapshots: Snapshots, directory: str = DIRECTORY, **options) -> bool:
        options = {"weights_only": False, **options}
        return snapshots.take(
            directory, self.num_steps, 0, self.state(), {"loss": 0.5}, optimizer_owned=self.owned(), **options
        )


def clone(state: State) -> State:
    def copy(value):
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: copy(item) for key, item in value.items()}
        return [copy(item) for item in value] if isinstance(value, list) else value

    return State(copy(state.model), copy(state.replicated), copy(state.own), copy(state.module))


def assert_same(left, right, path: str = "state") -> None:
    if isinstance(left, Tensor):
        assert torch.equal(left, right), path
        assert left.dtype == right.dtype, path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert left == right, path


def assert_same_state(left: State, right: State) -> None:
    for name in ("model", "replicated", "own", "module"):
        assert_same(getattr(left, name), getattr(right, name), name)


def committed(storage: Storage, saved: list[Saved]):
    files = tuple(file for message in saved for file in message.files)
    manifest = Manifest(step=saved[0].step, epoch=0, files=files, world_size=len(saved))
    checkpoint = commit(storage, saved[0].directory, manifest)
    assert verify(checkpoint) == []  # sizes and digests
    return checkpoint


def finish(snapshots: Snapshots) -> Saved:
    (message,) = snapshots.close()
    assert isinstance(message, Saved), message
    return message


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path)


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Copies that are put off wait until it is set."""
    opened = threading.Event()
    original = snapshot_module._copy_in_one_thread

    def copy(item):
        assert opened.wait(30)
        original(item)

    monkeypatch.setattr(snapshot_module, "_copy_in_one_thread", copy)
    return opened


class OpensWhenWaitedFor(threading.Event):
    """The copy begins no sooner than `wait` waits for its end."""

    def __init__(self, gate: threading.Event):
        super().__init__()
        self.gate = gate

    def wait(self, timeout: float | None = None) -> bool:
        self.gate.set()
        return super().wait(timeout)


class GatedFiles:
    """Storage whose writes wait until `opened` is set; `reached` tells that one does."""

    def __init__(self, storage: Storage):
        self.storage, self.opened, self.reached = storage, threading.Event(), threading.Event()

    def open_write(self, path: str):
        self.reached.set()
        assert self.opened.wait(30)
        return self.storage.open_write(path)


class FullDisk:
    """Storage that fails after `room` bytes of a file."""

    def __init__(self, storage: Storage, room: int):
        self.storage, self.room = storage, room

    def open_write(self, path: str):
        file = self.storage.open_write(path)
        write, left = file.write, [self.room]

        def limited(chunk):
            left[0] -= len(chunk)
            if left[0] < 0:
                raise StorageError(f"no space left for {path}")
            return write(chunk)

        file.write = limited
        return file


# ---- sharing


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_share_gives_each_name_to_one_rank_and_balances_bytes(world_size):
    rng = random.Random(world_size)
    sizes = {f"tensor {index}": rng.choice([0, 4, 1000, 10**6, 10**7]) for index in range(300)}
    shares = [share(sizes.items(), world_size, rank) for rank in range(world_size)]
    assert sorted(name for names in shares for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_share_does_not_depend_on_the_order_of_names():
    sizes = [(f"t{index}", index % 5) for index in range(50)]
    backwards = list(reversed(sizes))
    assert [share(sizes, 3, rank) for rank in range(3)] == [share(backwards, 3, rank) for rank in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_write_each_tensor_once_and_together_everything(storage, tmp_path, world_size):
    training = Training()
    training.step()
    expected = clone(training.state())
    saved = []
    for rank in range(world_size):
        snapshots = Snapshots(storage, rank, world_size)
        assert training.take(snapshots)
        saved.append(finish(snapshots))
    models = [
        torch.load(tmp_path / DIRECTORY / f"model-{rank:05d}-of-{world_size:05d}.pt", weights_only=True)
        for rank in range(world_size)
    ]
    assert sorted(name for model in models for name in model) == sorted(expected.model)
    checkpoint = committed(storage, saved)
    for rank in range(world_size):
        assert_same_state(load_state(checkpoint, rank, world_size), expected)
    assert [name for name in checkpoint.file_names if name == "module.pt"] == ["module.pt"]


def test_a_snapshot_tells_the_size_of_the_group_that_it_was_taken_in(storage):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 1, 2)
    assert training.take(snapshots)
    snapshots.rank, snapshots.world_size = 0, 1  # a worker died meanwhile
    assert finish(snapshots).world_size == 2


def test_large_tensors_are_balanced_over_ranks_by_bytes(storage):
    net = nn.Sequential(*(nn.Linear(100, 100) for _ in range(8)))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 100)).sum().backward()
    optimizer.step()
    owned = [*net.parameters(), *(v for values in optimizer.state.values() for v in values.values())]
    sizes = []
    for rank in range(3):
        snapshots = Snapshots(storage, rank, 3)
        state = State(model=net.state_dict(), replicated={"optimizers": [optimizer.state_dict()]})
        snapshots.take(DIRECTORY, 1, 0, state, {}, False, owned)
        sizes.append(sum(file.size for file in finish(snapshots).files))
    assert max(sizes) < 1.15 * min(sizes)


def test_running_statistics_are_those_of_rank_0_all(storage):
    """They drift apart until the ranks' next forward pass; a mixture of them was on no rank."""
    training = Training()
    training.step()
    buffers = dict(training.net.named_buffers())
    saved = []
    for rank in range(3):
        with torch.no_grad():
            for buffer in buffers.values():
                buffer.fill_(rank + 1)
        snapshots = Snapshots(storage, rank, 3)
        training.take(snapshots)
        saved.append(finish(snapshots))
    model = load_state(committed(storage, saved), 0, 3).model
    assert {float(model[name].max()) for name in buffers} == {1.0}


def test_frozen_parameters_are_shared_out(storage):
    net = nn.Sequential(*(nn.Linear(100, 100) for _ in range(8))).requires_grad_(False)
    sizes = []
    for rank in range(2):
        snapshots = Snapshots(storage, rank, 2)
        state = State(model=net.state_dict(), parameters=list(net.parameters()))
        snapshots.take(DIRECTORY, 1, 0, state, {}, False, [])
        sizes.append(sum(file.size for file in finish(snapshots).files))
    assert max(sizes) < 1.15 * min(sizes)


def test_a_tensor_that_a_callback_holds_on_rank_0_alone_is_saved(storage):
    training = Training()
    training.step()
    average = torch.randn(5000)
    saved = []
    for rank in range(2):
        state = training.state()
        state.replicated["callbacks"] = {"average": {"weights": average}} if rank == 0 else {}
        snapshots = Snapshots(storage, rank, 2)
        snapshots.take(DIRECTORY, 1, 0, state, {}, False, training.owned())
        saved.append(finish(snapshots))
    loaded = load_state(committed(storage, saved), 1, 2)
    assert torch.equal(loaded.replicated["callbacks"]["average"]["weights"], average)


def test_tied_weights_are_stored_once_and_come_back_tied(storage):
    net = nn.Sequential(nn.Linear(300, 300, bias=False), nn.Linear(300, 300, bias=False))
    net[1].weight = net[0].weight
    snapshots = Snapshots(storage, 0, 1)
    snapshots.take(DIRECTORY, 1, 0, State(model=net.state_dict()), {}, True, list(net.parameters()))
    saved = finish(snapshots)
    assert saved.files[0].size < 1.1 * net[0].weight.nbytes
    model = load_state(committed(storage, [saved]), 0, 1).model
    assert model["0.weight"].data_ptr() == model["1.weight"].data_ptr()


# ---- files


def test_files_open_with_plain_torch_load(storage, tmp_path):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    training.take(snapshots)
    saved = finish(snapshots)
    assert [file.path for file in saved.files] == ["model-00000-of-00001.pt", "training-00000-of-00001.pt", "module.pt"]
    folder = tmp_path / DIRECTORY
    model = torch.load(folder / "model-00000-of-00001.pt", weights_only=True)
    fresh = make_net(seed=9)
    fresh.load_state_dict(model, strict=True)
    assert_same(dict(fresh.state_dict()), dict(training.net.state_dict()))
    assert model._metadata == training.net.state_dict()._metadata
    assert torch.load(folder / "module.pt", weights_only=True) == {"hyper_parameters": {"width": 40}}
    assert torch.load(folder / "training-00000-of-00001.pt", weights_only=True).keys() == {
        "replicated", "shared", "tensors", "own",
    }  # fmt: skip
    assert (saved.step, saved.epoch, saved.metrics, saved.weights_only) == (1, 0, {"loss": 0.5}, False)
    assert saved.stall_s > 0
    assert saved.write_s > 0


def test_weights_alone_leave_out_what_training_needs(storage):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    training.take(snapshots, weights_only=True)
    saved = finish(snapshots)
    assert [file.path for file in saved.files] == ["model-00000-of-00001.pt", "module.pt"]
    assert saved.weights_only
    loaded = load_state(committed(storage, [saved]), 0, 1)
    assert_same(dict(loaded.model), dict(training.net.state_dict()))
    assert (loaded.replicated, loaded.own) == ({}, {})


ODD_TENSORS = {
    "bf16": torch.randn(7, 3).bfloat16(),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "complex": torch.randn(4, dtype=torch.complex64),
    "conjugated": torch.randn(4, dtype=torch.complex64).conj(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.randn(600, 500).T,
    "expanded": torch.randn(1, 4).expand(3, 4),
    "sliced": torch.randn(10, 10)[2:8:2, 1:7],
    "sparse": torch.eye(3).to_sparse(),
    "parameter": nn.Parameter(torch.randn(3)),
    "large": torch.randn(700_000),
    "large half": torch.randn(1_000_001).half(),
    "uint8": torch.arange(255, dtype=torch.uint8),
    "float8": torch.randn(4).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("late", [True, False])
def test_every_kind_of_tensor_is_saved(storage, late):
    owned = [tensor for tensor in ODD_TENSORS.values() if tensor.layout == torch.strided] if late else []
    state = State(model=dict(ODD_TENSORS), replicated={"state": dict(ODD_TENSORS)})
    snapshots = Snapshots(storage, 0, 1)
    snapshots.take(DIRECTORY, 1, 0, state, {}, False, owned)
    loaded = load_state(committed(storage, [finish(snapshots)]), 0, 1)
    for found in (loaded.model, loaded.replicated["state"]):
        for name, tensor in ODD_TENSORS.items():
            assert found[name].dtype == tensor.dtype, name
            left, right = (found[name].to_dense(), tensor.to_dense()) if name == "sparse" else (found[name], tensor)
            assert torch.equal(left.float() if name == "float8" else left, right.float() if name == "float8" else right)
    assert loaded.model["channels last"].is_contiguous(memory_format=torch.channels_last)


def test_what_a_state_dict_holds_beside_tensors_is_saved(storage):
    class Vocabulary(nn.Linear):
        def get_extra_state(self):
            return {"words": ["a", "b"], "counts": torch.arange(3)}

        def set_extra_state(self, state):
            self.extra = state

    net = Vocabulary(2, 2)
    saved = []
    for rank in range(2):
        snapshots = Snapshots(storage, rank, 2)
        snapshots.take(DIRECTORY, 1, 0, State(model=net.state_dict()), {}, True, list(net.parameters()))
        saved.append(finish(snapshots))
    other = Vocabulary(2, 2)
    other.load_state_dict(load_state(committed(storage, saved), 0, 2).model)
    assert other.extra["words"] == ["a", "b"]
    assert torch.equal(other.extra["counts"], torch.arange(3))


def test_values_that_cannot_be_loaded_safely_are_all_named_before_anything_is_written(storage, tmp_path):
    training = Training()
    state = training.state()
    state.replicated["callbacks"] = {"mine": {"function": make_net}}
    state.own["sampler"] = object()
    state.module["hyper_parameters"]["loss"] = nn.MSELoss()
    state.model = OrderedDict(state.model, broken=torch.empty(2, device="meta"))
    snapshots = Snapshots(storage, 0, 1)
    with pytest.raises(InvalidArguments) as raised:
        snapshots.take(DIRECTORY, 1, 0, state, {}, False, training.owned())
    assert len(raised.value.mistakes) == 4
    for place in ("replicated['callbacks']['mine']['function']", "own['sampler']", "['loss']", "model['broken']"):
        assert place in str(raised.value)
    assert snapshots.close() == []
    assert list(tmp_path.iterdir()) == []
    assert training.take(snapshots)
    finish(snapshots)


def test_torch_save_of_the_users_own_keeps_its_checksums(storage):
    files = GatedFiles(storage)
    training = Training()
    snapshots = Snapshots(files, 0, 1)
    training.take(snapshots)
    assert files.reached.wait(30)
    assert torch.serialization.get_crc32_options()
    files.opened.set()
    finish(snapshots)
    assert torch.serialization.get_crc32_options()


def file_of(storage, tensors: dict[str, torch.Tensor]) -> Path:
    snapshots = Snapshots(storage, 0, 1)
    snapshots.take(DIRECTORY, 1, 0, State(model=tensors), {}, True, [])
    finish(snapshots)
    return Path(storage.local_path(f"{DIRECTORY}/model-00000-of-00001.pt"))


def test_large_tensors_lie_on_pages(storage):
    """So that the disk fetches them from memory by itself."""
    tensors = {f"layer{index}": torch.randn(1 << 18) for index in range(3)}
    content = file_of(storage, tensors).read_bytes()
    for tensor in tensors.values():
        assert content.index(tensor.numpy().tobytes()) % mmap.PAGESIZE == 0


def test_many_small_tensors_do_not_swell_the_file(storage):
    """Each costs some 200 bytes in torch's archive, and would cost a page."""
    tensors = {f"layer{index}": torch.randn(300) for index in range(1000)}
    path = file_of(storage, tensors)
    torch.save(tensors, path.with_name("torch.pt"))
    assert path.stat().st_size < 1.05 * path.with_name("torch.pt").stat().st_size


# ---- copies that are put off


def test_what_an_optimizer_owns_is_copied_before_its_step(storage, gate):
    training = Training()
    training.step()
    expected = clone(training.state())
    snapshots = Snapshots(storage, 0, 1)
    assert training.take(snapshots)
    assert snapshots.poll() == []
    forward = training.net(torch.randn(16, 20))  # changes the running mean and the RNG, which are copied by now
    forward.sum().backward()
    snapshots._in_flight.copied = OpensWhenWaitedFor(gate)
    assert snapshots.wait()
    for _ in range(3):
        training.optimizer.step()
    assert_same_state(load_state(committed(storage, [finish(snapshots)]), 0, 1), expected)


def test_wait_does_nothing_where_nothing_is_pending(storage):
    snapshots = Snapshots(storage, 0, 1)
    assert snapshots.wait()
    assert snapshots.poll() == []
    training = Training()
    training.take(snapshots)
    assert snapshots.wait()
    assert snapshots.wait()
    finish(snapshots)


@pytest.mark.parametrize("target", ["parameter", "optimizer state"])
def test_a_write_by_user_code_throws_the_snapshot_away_and_the_next_is_taken_in_one_piece(storage, gate, target):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    assert training.take(snapshots, "checkpoints/one")
    weight = training.net[0].weight
    written = weight if target == "parameter" else training.optimizer.state[weight]["exp_avg"]
    with torch.no_grad():
        written.mul_(2.0)
    gate.set()
    assert not training.step(snapshots)

    gate.clear()  # a copy that is put off would hang
    expected = clone(training.state())
    assert training.take(snapshots, "checkpoints/two")
    with torch.no_grad():
        written.mul_(2.0)
    gate.set()  # the thread has no copy to make, but nothing should depend on it
    assert training.step(snapshots)
    failed, saved = snapshots.close()
    assert isinstance(failed, SaveFailed)
    assert failed.directory == "checkpoints/one"
    name = "model['0.weight']" if target == "parameter" else "replicated['optimizers'][0]['state'][0]['exp_avg']"
    assert f"{name} was written to outside optimizer.step" in failed.reason
    assert_same_state(load_state(committed(storage, [saved]), 0, 1), expected)


def test_a_write_to_what_another_rank_saves_is_noticed_by_all_ranks(storage):
    training = Training()
    training.step()
    ranks = [Snapshots(storage, rank, 3) for rank in range(3)]
    for snapshots in ranks:
        training.take(snapshots)
    with torch.no_grad():
        training.net[4].bias.add_(1)
    assert [snapshots.wait() for snapshots in ranks] == [False, False, False]
    for snapshots in ranks:
        (message,) = snapshots.close()
        assert isinstance(message, SaveFailed)


def test_poll_settles_a_snapshot_that_no_step_follows(storage):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    training.take(snapshots)
    messages = []
    while not messages:
        messages = snapshots.poll()
    assert isinstance(messages[0], Saved)
    assert snapshots.wait()


def test_each_of_many_snapshots_holds_the_step_it_names(storage):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    expected: dict[str, State] = {}
    saved: list[Saved] = []
    while len(saved) < 15:
        directory = f"checkpoints/{training.num_steps}"
        state = clone(training.state())
        if training.take(snapshots, directory):
            expected[directory] = state
        assert training.step(snapshots)
        saved += snapshots.poll()
    saved += snapshots.close()
    assert [message.directory for message in saved] == list(expected)
    for message in saved:
        loaded = load_state(committed(storage, [message]), 0, 1)
        assert_same_state(loaded, expected[message.directory])
        assert loaded.replicated["loop"]["step"] == message.step


def test_a_run_resumed_from_a_snapshot_is_bit_identical(storage):
    torch.manual_seed(7)
    training = Training()
    for _ in range(5):
        training.step()
    snapshots = Snapshots(storage, 0, 1)
    training.take(snapshots)
    for _ in range(5):
        training.step(snapshots)
    checkpoint = committed(storage, [finish(snapshots)])

    other = Training(seed=3)
    other.step()  # so that it has optimizer state of its own
    other.load(load_state(checkpoint, 0, 1))
    for _ in range(5):
        other.step()
    assert_same(dict(other.net.state_dict()), dict(training.net.state_dict()))
    assert_same(other.optimizer.state_dict(), training.optimizer.state_dict())


# ---- one at a time


def test_a_snapshot_is_skipped_while_one_is_in_flight_and_waited_for_at_the_end(storage):
    files = GatedFiles(storage)
    training = Training()
    training.step()
    snapshots = Snapshots(files, 0, 1)
    assert training.take(snapshots, "checkpoints/one")
    training.step(snapshots)
    assert not training.take(snapshots, "checkpoints/two")
    assert snapshots.poll() == []
    threading.Thread(target=files.opened.set).start()
    expected = clone(training.state())
    assert training.take(snapshots, "checkpoints/last", wait=True)
    training.optimizer.step()  # what comes after, user code at the end of the run say, is not in it
    saved = snapshots.close()
    assert [message.directory for message in saved] == ["checkpoints/one", "checkpoints/last"]
    assert_same_state(load_state(committed(storage, saved[1:]), 0, 1), expected)


def test_host_buffers_are_made_once_and_never_grow(storage):
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    snapshots.reserve(training.state(), False, training.owned())

    def addresses() -> dict[str, int]:
        return {path: buffer.data_ptr() for path, buffer in snapshots._buffers._buffers.items()}

    reserved = addresses()
    for weights_only in (False, True, False, False):
        assert training.take(snapshots, weights_only=weights_only)
        assert isinstance(training.step(snapshots), bool)
        while not snapshots.poll():
            pass
        assert addresses() == reserved
    state = training.state()
    num_bytes = sum(t.nbytes for t in [*state.model.values(), state.own["rng"]])
    num_bytes += sum(v.nbytes for s in training.optimizer.state.values() for v in s.values())
    assert sum(buffer.nbytes for buffer in snapshots._buffers._buffers.values()) == num_bytes


def test_buffers_follow_a_state_that_changes_and_let_go_of_the_old(storage):
    snapshots = Snapshots(storage, 0, 1)
    for size, names in ((400_000, "abc"), (500_000, "ab"), (300_000, "d")):
        state = State(model={name: torch.randn(size) for name in names})
        snapshots.take(DIRECTORY, 1, 0, state, {}, False, list(state.model.values()))
        loaded = load_state(committed(storage, [finish(snapshots)]), 0, 1)
        assert_same(dict(loaded.model), state.model)
        assert sum(b.nbytes for b in snapshots._buffers._buffers.values()) == 4 * size * len(names)


# ---- failures


@pytest.mark.parametrize("room", [0, 100, 3000, 12_000])
def test_a_write_that_fails_is_reported_with_its_cause_and_the_next_works(storage, tmp_path, room):
    training = Training()
    training.step()
    snapshots = Snapshots(FullDisk(storage, room), 0, 1)
    assert training.take(snapshots)
    snapshots._in_flight.thread.join()
    assert training.step(snapshots)
    (failed,) = snapshots.close()
    assert isinstance(failed, SaveFailed)
    assert "no space left" in failed.reason
    assert failed.directory == DIRECTORY
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".")]
    snapshots.files = storage
    assert training.take(snapshots)
    finish(snapshots)


def test_a_copy_that_fails_does_not_stop_training(storage, monkeypatch):
    def fail(copy):
        raise MemoryError("no memory")

    monkeypatch.setattr(snapshot_module, "_copy_in_one_thread", fail)
    training = Training()
    training.step()
    snapshots = Snapshots(storage, 0, 1)
    training.take(snapshots)
    assert training.step(snapshots)
    (failed,) = snapshots.close()
    assert failed == SaveFailed(DIRECTORY, 1, "MemoryError: no memory")


def test_close_gives_up_a_write_that_does_not_end(storage, tmp_path):
    files = GatedFiles(storage)
    training = Training()
    snapshots = Snapshots(files, 0, 1)
    training.take(snapshots)
    assert files.reached.wait(30)
    thread = snapshots._in_flight.thread
    (failed,) = snapshots.close(timeout_s=0.01)
    assert "not written within 0.01 s" in failed.reason
    files.opened.set()
    thread.join(30)
    assert not thread.is_alive()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_in_another_place_what_is_still_being_written_counts_for_nothing(storage):
    training, files = Training(), GatedFiles(storage)
    snapshots = Snapshots(files, 0, 2)
    training.take(snapshots)
    snapshots.move(0, 1)
    files.opened.set()
    (message,) = snapshots.close()
    assert isinstance(message, SaveFailed)  # or the driver of a group of one took half a checkpoint for a whole one
    training.take(snapshots)
    assert {file.path for file in finish(snapshots).files} >= {"model-00000-of-00001.pt"}


def test_in_another_place_what_was_written_in_the_old_one_is_no_share(storage):
    training = Training()
    snapshots = Snapshots(storage, 1, 2)
    training.take(snapshots, "checkpoints/step-1")
    snapshots.wait()
    training.take(snapshots, "checkpoints/step-2", wait=True)  # the result of the first waits to be polled
    snapshots.move(0, 2)
    assert [type(message) for message in snapshots.close()] == [SaveFailed, SaveFailed]
