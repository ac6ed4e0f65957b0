"""What a checkpoint costs the training loop: 604 MB of state (201 MB of weights with Adam), local disk.

Savers take turns, each window of steps with a save beside one without, so that a drift of the machine falls on all.
Blocked is the time inside the save and before `optimizer.step`; lost is how much longer the window took; slowed is the
difference, what the write behind the loop costs the steps. One copy is torch's copy of the same bytes into memory that
is kept. raylight also digests, syncs and renames what it writes, which torch.save, Lightning and Ray Train do not: what
they leave in the page cache a thread syncs behind them, as the kernel would some seconds later, so that everybody's
window holds the work of the disk (`--leave-cached` lets them off). `--threads 1` leaves a core to the writer, as a
machine does that trains on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks import checkpoint_savers as savers
from benchmarks.checkpoint_savers import Run, Saver, empty
from benchmarks.figures import Figure, show
from raylight.contract.messages import Saved
from raylight.storage.checkpoints import Manifest, commit, find_checkpoint
from raylight.storage.filesystem import Storage
from raylight.worker.checkpoint.restore import apply_weights, load_state
from raylight.worker.checkpoint.snapshot import Snapshots, State

NUM_ROUNDS, NUM_STEPS, NUM_CAPPED_ROUNDS = 7, 20, 2
RIVALS = {
    "raylight": savers.Raylight,
    "torch.save": savers.TorchSave,
    "Lightning": savers.Lightning,
    "Lightning async": savers.LightningAsync,
    "DCP async": savers.DCPAsync,
    "DCP async, kept": savers.DCPAsyncKeptBuffers,
}
Window = dict[str, float]


def measure_window(run: Run, saver: Saver, sync: bool) -> Window:
    """One save and the steps that follow it; seconds."""
    blocked, written = 0.0, 0.0
    syncing = threading.Thread(target=os.sync)

    def before_step() -> None:
        nonlocal blocked
        began = perf_counter()
        saver.before_step()
        blocked += perf_counter() - began

    started = perf_counter()
    saver.save()
    blocked += perf_counter() - started
    for _ in range(NUM_STEPS):
        run.step(before_step)
        if not written and not saver.is_writing():
            written = perf_counter() - started
            if sync:
                syncing.start()
    total = perf_counter() - started
    if not written:
        saver.finish()
        written = perf_counter() - started
    else:
        saver.finish()
    if syncing.ident is not None:
        syncing.join()
    return {"blocked": blocked, "total": total, "written": written}


def measure_copy(run: Run, kept: list[torch.Tensor]) -> float:
    started = perf_counter()
    for target, source in zip(kept, run.owned(), strict=True):
        target.copy_(source.detach())
    return perf_counter() - started


def compare(kinds: dict[str, Callable[[Run, Path], Saver]], folder: Path, sync: bool) -> dict[str, Any]:
    """Windows of each saver, interleaved, with a window that saves nothing beside each."""
    run = Run.make()
    kept = [tensor.detach().clone() for tensor in run.owned()]
    all_savers = {name: kind(run, folder) for name, kind in kinds.items()}
    nothing = savers.Nothing(run, folder)
    windows: dict[str, list[Window]] = {name: [] for name in kinds}
    copies, steps = [], []
    for index in range(NUM_ROUNDS + 1):
        for turn, (name, saver) in enumerate(all_savers.items()):
            print(f"checkpoint: round {index} of {NUM_ROUNDS}, {name}", flush=True)
            pair = [saver, nothing] if (index + turn) % 2 else [nothing, saver]
            measured = {one: measure_window(run, one, sync) for one in pair}
            empty(folder)
            copy = measure_copy(run, kept)
            if index == 0:
                continue  # the first save of each makes its buffers
            window, without = measured[saver], measured[nothing]
            window["lost"] = window["total"] - without["total"]
            window["slowed"] = window["lost"] - window["blocked"]
            windows[name].append(window)
            copies.append(copy)
            steps.append(without["total"] / NUM_STEPS)
    for saver in all_savers.values():
        saver.close()
    return {"windows": windows, "copy": statistics.median(copies), "step": statistics.median(steps)}


def median(windows: list[Window], key: str) -> float:
    return statistics.median(window[key] for window in windows)


def figures_of(found: dict[str, Any]) -> list[Figure]:
    copy, windows = found["copy"], found["windows"]
    figures = [
        Figure("a step without a save", found["step"] * 1e3, "ms"),
        Figure("one copy of the state", copy * 1e3, "ms"),
    ]
    for name, its in windows.items():
        figures += [
            Figure(f"{name}: blocked", median(its, "blocked") * 1e3, "ms"),
            Figure(f"{name}: lost in all", median(its, "lost") * 1e3, "ms"),
            Figure(f"{name}: steps slowed by", median(its, "slowed") * 1e3, "ms"),
            Figure(f"{name}: on disk after", median(its, "written"), "s"),
        ]
    ours = windows["raylight"]
    figures.append(Figure("raylight blocked, in copies", median(ours, "blocked") / copy, "copies", at_most=1.3))
    for name in windows:
        if "async" in name:
            pairs = zip(ours, windows[name], strict=True)
            more = statistics.median(mine["slowed"] - its["slowed"] for mine, its in pairs)
            figures.append(Figure(f"raylight slows steps more than {name}, by", more * 1e3, "ms", at_most=0.0))
    return figures


# ---- Ray Train


def train_function(config: dict[str, Any]) -> None:
    torch.set_num_threads(config["num_threads"])
    kinds = {"raylight": savers.Raylight, "Ray Train async": savers.RayTrainAsync}
    found = compare(kinds, Path(config["folder"]), config["sync"])
    Path(config["result"]).write_text(json.dumps(found))


def compare_ray_train(folder: Path, sync: bool) -> dict[str, Any]:
    """The same two savers inside one Ray Train worker with all cores."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    num_threads = torch.get_num_threads()
    root = str(Path(__file__).resolve().parents[1])
    ray.init(
        num_cpus=num_threads + 1, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )  # fmt: skip
    try:
        result = folder / "result.json"
        local = folder / "local"
        local.mkdir()
        TorchTrainer(
            train_function,
            train_loop_config={
                "folder": str(local),
                "result": str(result),
                "num_threads": num_threads,
                "sync": sync,
            },
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": num_threads}),
            run_config=ray.train.RunConfig(
                storage_path=str(folder / "ray"), checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1)
            ),
        ).fit()
        return json.loads(result.read_text())
    finally:
        ray.shutdown()


# ---- memory


def status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def measure_memory(name: str) -> float:
    """Peak of resident memory over three saves, above that of the same steps without, in copies of the state."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        run = Run.make()
        for _ in range(3):
            run.step(lambda: None)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status_bytes("VmRSS")
        saver = RIVALS[name](run, folder)
        for _ in range(3):
            saver.save()
            for _ in range(3):
                run.step(saver.before_step)
            saver.finish()
            empty(folder)
        saver.close()
        return (status_bytes("VmHWM") - before) / run.num_bytes()


def measure_all_memory() -> list[Figure]:
    figures = []
    for name in RIVALS:
        print(f"checkpoint: memory of {name}", flush=True)
        command = [sys.executable, "-m", "benchmarks.checkpoint", "--memory-of", name]
        exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # freed tensors go back, and do not leave holes
        output = subprocess.run(command, env=exact, check=True, capture_output=True, text=True).stdout
        copies = float(output.split()[-1])
        limit = 1.05 if name == "raylight" else None
        figures.append(Figure(f"{name}: peak memory beside the run's", copies, "copies", at_most=limit))
    return figures


# ---- throughput


def timed(function: Callable[[], object]) -> float:
    started = perf_counter()
    function()
    return perf_counter() - started


def measure_throughput(folder: Path) -> list[Figure]:
    run = Run.make()
    storage, path = Storage(folder), folder / "torch.pt"
    ours = savers.Raylight(run, folder)
    times: dict[str, list[float]] = {}
    for index in range(NUM_ROUNDS):
        print(f"checkpoint: throughput, {index + 1} of {NUM_ROUNDS}", flush=True)
        empty(folder)
        measured = {
            "torch.save": timed(lambda: torch.save(run.state(), path)),
            "torch.save, synced": timed(lambda: save_synced(run, path)),
            "raylight save": timed(lambda: save_ours(run, ours.snapshots, storage)),
        }
        loads = {
            "torch.load": lambda: load_torch(run, path),
            "raylight load": lambda: load_ours(run, folder / "step", digests=False),
            "raylight load, digests": lambda: load_ours(run, folder / "step", digests=True),
        }
        for name, load in loads.items():
            forget(folder)
            measured[f"{name}, from the disk"] = timed(load)
            measured[name] = timed(load)
        for name, seconds in measured.items():
            times.setdefault(name, []).append(seconds)
    megabytes = run.num_bytes() / 1e6
    figures = [Figure(name, megabytes / statistics.median(its), "MB/s") for name, its in times.items()]

    def ratio(mine: str, its: str) -> float:
        return statistics.median(theirs / own for own, theirs in zip(times[mine], times[its], strict=True))

    return [
        *figures,
        # torch.save alone leaves the bytes in memory; what is compared is what a power cut would leave
        Figure("raylight save over torch.save", ratio("raylight save", "torch.save"), "times"),
        Figure("raylight save over it synced", ratio("raylight save", "torch.save, synced"), "times", at_least=1.0),
        Figure("raylight load over torch.load", ratio("raylight load", "torch.load"), "times", at_least=1.0),
        Figure(
            "raylight load over it, from the disk",
            ratio("raylight load, from the disk", "torch.load, from the disk"),
            "times",
            at_least=1.0,
        ),
    ]


def forget(folder: Path) -> None:
    """Empties the page cache of what lies under `folder`."""
    for path in folder.rglob("*.pt"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_synced(run: Run, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(run.state(), file)
        file.flush()
        os.fsync(file.fileno())


def save_ours(run: Run, snapshots: Snapshots, storage: Storage) -> None:
    snapshots.take("step", 1, 0, run.raylight_state(), {}, False, run.owned(), wait=True)
    (saved,) = snapshots.close()
    assert isinstance(saved, Saved)
    commit(storage, "step", Manifest(step=1, epoch=0, files=saved.files))


def load_torch(run: Run, path: Path) -> None:
    state = torch.load(path, weights_only=True)
    run.net.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])


def load_ours(run: Run, path: Path, digests: bool) -> None:
    state = load_state(find_checkpoint(path, digests=digests), 0, 1)
    apply_weights(run.net, state.model)
    run.optimizer.load_state_dict(state.replicated["optimizers"][0])


# ---- object storage


def measure_capped_storage() -> list[Figure]:
    """One rank, and two that write a half each, to an S3 server that gives every connection 1 MB/s, so that this and
    not the server's own speed is the limit. A rank uploads several parts of a file at once, by pyarrow's threads, of
    which each process has as many."""
    import pyarrow

    from tests.faults_storage import FaultProxy, s3_server

    weights = {f"layer{index}": torch.randn(1 << 20) for index in range(144)}
    state = State(model=weights, parameters=list(weights.values()))
    num_threads = pyarrow.io_thread_count()
    times: dict[int, list[float]] = {1: [], 2: []}
    with s3_server() as port:
        proxy = FaultProxy(port, bytes_per_s=1e6)
        for index in range(NUM_CAPPED_ROUNDS):
            for world_size, its in times.items():
                print(f"checkpoint: capped storage, {index + 1} of {NUM_CAPPED_ROUNDS}, {world_size} ranks", flush=True)
                pyarrow.set_io_thread_count(num_threads * world_size)  # both ranks are in this process
                storage = Storage(proxy.uri(f"{index}-{world_size}"))
                its.append(save_on([Snapshots(storage, rank, world_size) for rank in range(world_size)], state))
        proxy.close()
    megabytes = sum(tensor.nbytes for tensor in state.model.values()) / 1e6
    one, two = (megabytes / statistics.median(its) for its in times.values())
    return [
        Figure("one rank", one, "MB/s"),
        Figure("two ranks", two, "MB/s"),
        Figure("two ranks over one", two / one, "times", at_least=1.6),
    ]


def save_on(ranks: list[Snapshots], state: State) -> float:
    started = perf_counter()
    for snapshots in ranks:
        snapshots.take("step", 1, 0, state, {}, True, [], wait=True)
    for snapshots in ranks:
        (saved,) = snapshots.close()
        assert isinstance(saved, Saved), saved
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--memory-of", choices=RIVALS, help="measure the memory of one saver and print it")
    parser.add_argument("--without-ray", action="store_true", help="leave Ray Train out")
    parser.add_argument("--only", help="the parts whose title contains this, such as throughput")
    parser.add_argument("--leave-cached", action="store_true", help="do not sync what a saver has not synced itself")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that train")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sync = not options.leave_cached
    if options.memory_of:
        print(measure_memory(options.memory_of))
        return
    parts = [
        ("Checkpoint of 604 MB: what the loop pays", lambda folder: figures_of(compare(RIVALS, folder, sync))),
        ("Checkpoint of 604 MB: inside a Ray Train worker", lambda folder: figures_of(compare_ray_train(folder, sync))),
        ("Checkpoint of 604 MB: memory", lambda folder: measure_all_memory()),
        ("Checkpoint of 604 MB: throughput on a local disk", measure_throughput),
        ("Checkpoint of 604 MB: S3 at 1 MB/s a connection", lambda folder: measure_capped_storage()),
    ]
    for title, measure in parts:
        if ("Ray Train" in title and options.without_ray) or (options.only or "") not in title:
            continue
        with tempfile.TemporaryDirectory() as folder:
            show(title, measure(Path(folder)))


if __name__ == "__main__":
    main()
