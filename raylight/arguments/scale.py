"""The number and place of workers: resolves every spelling of it, and compares it with the available resources."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from raylight.contract.kinds import Value

Count: TypeAlias = Any
"""A number of workers: "auto", a number, or (min, max)."""


@dataclass(frozen=True, slots=True)
class Available:
    """The available resources."""

    num_gpus_here: int = 0
    """GPUs of this machine."""
    ray_address: bool | str | None = None
    """Whether a Ray cluster is connected (True) or named (its address). Falsy: Ray, if needed, is started here."""
    cluster_gpus: float | None = None
    """GPUs of that cluster; None: not known, because nobody has connected yet."""
    cluster_cpus: float | None = None
    """CPUs of that cluster; None: not known."""
    started_here: bool = False
    """raylight started that Ray, on this machine."""
    autoscales: bool = False
    """Whether the cluster adds nodes on demand: asking for more than there is now is then no mistake."""

    @property
    def is_foreign(self) -> bool:
        """Whether workers run on a Ray that others started, and gave its GPUs."""
        return bool(self.ray_address) and not self.started_here

    @property
    def gpus(self) -> float | None:
        """The GPUs that Ray workers can have; None: not known."""
        return self.cluster_gpus if self.ray_address else self.num_gpus_here


@dataclass(frozen=True, slots=True)
class Scale:
    """`num_workers` is "auto", and `use_gpu` None, only if that depends on a cluster that is not connected yet;
    `shortage` says what is missing if more was asked for than there is."""

    num_workers: int | tuple[int, int] | str
    use_gpu: bool | None
    resources_per_worker: dict[str, float]
    shortage: str | None = None


def resolve_scale(given: dict[str, Value], available: Available, mistakes: list[str]) -> Scale:
    """`given`: those of num_workers, use_gpu, resources_per_worker, devices, gpus, num_nodes and accelerator that the
    user passed, each of the right type. Appends what contradicts itself to `mistakes`."""
    use_gpu, reason = _find_use_gpu(given, mistakes)
    source, count = _find_count(given, available, mistakes)
    resources = given.get("resources_per_worker", {})
    if count == "auto":
        scale = _scale_automatically(use_gpu, reason, resources, available)
    elif _runs_here(source, count, use_gpu, available):
        scale = _scale_here(f"{source}={given[source]}", use_gpu, resources, available)
    else:
        scale = _scale_out(source, count, use_gpu, resources, available)
        scale = replace(scale, shortage=_find_shortage(source, given, scale, available))
    return scale


def _find_use_gpu(given: dict[str, Value], mistakes: list[str]) -> tuple[bool | None, str]:
    """Whether workers have GPUs (None: nothing was said), and which argument says so."""
    says: dict[str, bool] = {}
    if "use_gpu" in given:
        says[f"use_gpu={given['use_gpu']}"] = given["use_gpu"]
    if given.get("accelerator", "auto") != "auto":
        says[f"accelerator={given['accelerator']!r}"] = given["accelerator"] == "gpu"
    if "gpus" in given:
        says[f"gpus={given['gpus']}"] = given["gpus"] != 0
    if "GPU" in given.get("resources_per_worker", {}):
        says[f"resources_per_worker with GPU: {given['resources_per_worker']['GPU']:g}"] = (
            given["resources_per_worker"]["GPU"] > 0
        )
    for text, says_gpu in says.items():
        if says_gpu != next(iter(says.values())):
            mistakes.append(f"{next(iter(says))} and {text} contradict each other: one asks for GPUs, one for none")
            return None, ""
    return next(((says_gpu, text) for text, says_gpu in says.items()), (None, ""))


def _find_count(given: dict[str, Value], available: Available, mistakes: list[str]) -> tuple[str, Count]:
    """Which argument says how many workers, and how many in all: "auto", a number, or (min, max)."""
    sources = [name for name in ("num_workers", "devices", "gpus") if given.get(name, "auto") != "auto"]
    sources = [name for name in sources if not (name == "gpus" and given["gpus"] == 0)]
    num_nodes = given.get("num_nodes", 1)
    if len(sources) > 1:
        texts = " and ".join(f"{name}={given[name]}" for name in sources)
        mistakes.append(f"{texts} all say how many workers there are: pass one of them")
    source = sources[0] if sources else "num_workers"
    count = given[source] if sources else "auto"
    if num_nodes == 1:
        return source, count
    if source == "num_workers":
        mistakes.append(
            f"num_nodes={num_nodes} counts nodes and num_workers the workers of all nodes: leave num_nodes out, or "
            f"pass devices=N, the workers of each node, in place of num_workers"
        )
        return source, count
    if not available.ray_address:
        mistakes.append(
            f"num_nodes={num_nodes} needs a Ray cluster, and none is connected: start one (`ray up` or `ray start "
            f"--head`) and set RAY_ADDRESS to its address"
        )
    return source, count * num_nodes


def _runs_here(source: str, count: Count, use_gpu: bool | None, available: Available) -> bool:
    """Whether the work is done in this process: for num_workers=0, and for a single device, as in Lightning, unless
    its GPU is one of a cluster."""
    if source == "num_workers":
        return count == 0
    return count == 1 and (not available.ray_address or use_gpu is False or (use_gpu is None and available.gpus == 0))


def _scale_automatically(use_gpu: bool | None, reason: str, resources: dict[str, float], available: Available) -> Scale:
    """A worker for each GPU of the cluster, else of this machine; with one or none here, in this process."""
    if use_gpu is False:
        return Scale(0, False, resources)
    if available.gpus is None:
        return Scale("auto", use_gpu, resources)
    num_workers = int(available.gpus / (resources.get("GPU") or 1.0))
    if available.ray_address and available.cluster_cpus is not None and not available.autoscales:
        num_workers = min(num_workers, int(available.cluster_cpus / (resources.get("CPU") or 1.0)))
    if num_workers == 0 and use_gpu and available.ray_address:
        return Scale(
            0, True, resources, f"{reason} asks for a GPU for each worker, and the Ray cluster has no room for one. "
            "Where it adds nodes on demand, say how many workers: num_workers=N. To train on CPU workers: "
            "num_workers=N, use_gpu=False."
        )  # fmt: skip
    if num_workers == 0 or (num_workers == 1 and not available.ray_address):
        return _scale_here(reason, use_gpu, resources, available)
    return _scale_out("num_workers", num_workers, True, resources, available)


def _scale_here(asked: str, use_gpu: bool | None, resources: dict[str, float], available: Available) -> Scale:
    if not use_gpu:
        return Scale(0, available.num_gpus_here > 0 if use_gpu is None else False, resources)
    if available.num_gpus_here:
        return Scale(0, True, resources)
    return Scale(
        0, True, resources, f"{asked} asks for a GPU, and this machine has none. What runs here: num_workers=0, "
        f"use_gpu=False for this process, or num_workers=N, use_gpu=False for CPU workers.{_say_cluster(available)}"
    )  # fmt: skip


def _scale_out(
    source: str, count: Count, use_gpu: bool | None, resources: dict[str, float], available: Available
) -> Scale:
    if use_gpu is None and available.gpus is not None:
        use_gpu = available.gpus > 0
    needs = {"CPU": 1.0} | resources
    if use_gpu:
        needs.setdefault("GPU", 1.0)
    return Scale(count, use_gpu, needs)


def _find_shortage(source: str, given: dict[str, Value], scale: Scale, available: Available) -> str | None:
    if available.autoscales:
        return None
    least = scale.num_workers[0] if isinstance(scale.num_workers, tuple) else int(scale.num_workers)
    num_nodes = given.get("num_nodes", 1)
    asked = f"{source}={given[source]}" + (f", num_nodes={num_nodes}" if num_nodes > 1 else "")
    where = "the Ray cluster" if available.ray_address else "this machine"
    # A Ray that raylight starts here has as many CPUs as raylight says.
    reach = {"GPU": available.gpus, "CPU": available.cluster_cpus if available.ray_address else None}
    for kind in ("GPU", "CPU"):
        there, each = reach[kind], scale.resources_per_worker.get(kind, 0.0)
        if there is None or least * each <= there:
            continue
        fits = int(there / each) // num_nodes
        text = f"{asked} asks for {_count(least * each, kind)}, and {where} has {_count(there, kind)}."
        if fits:
            most = f", {given[source][1]}" if isinstance(scale.num_workers, tuple) else ""
            runs = f"{source}=({fits}{most})" if most else f"{source}={fits}"
            text += f" What runs here: {runs}" + (f", num_nodes={num_nodes}." if num_nodes > 1 else ".")
        if kind == "GPU":
            text += f" To train on CPU workers: num_workers={least}, use_gpu=False.{_say_cluster(available)}"
        return text
    return None


def _count(number: float, kind: str) -> str:
    if not number:
        return "none"
    return f"{number:g} {kind}" + ("" if number == 1 else "s")


def _say_cluster(available: Available) -> str:
    return "" if available.ray_address else " For the GPUs of a Ray cluster, set RAY_ADDRESS to its address."
