"""Several processes of one run: how they meet, wait for each other, and end together."""

import contextlib
import dataclasses
import faulthandler
import json
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from runtime import errors, files
from runtime.errors import UserError, at_least

MAY_DIFFER = frozenset({"--process-id", "--coordinator", "--quiet", "--data.cache"})
SAVE, STOP = 1, 2  # what may be wished for after a step
PATIENCE = 60  # seconds to wait for the other processes at the start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The flags of a program that can be several processes."""

    distributed: bool = False
    """One of several processes, which a scheduler (Slurm, Cloud TPU, GKE, Open MPI) has started."""
    coordinator: str | None = None
    """host:port of the first of several processes, where no scheduler says so."""
    processes: Annotated[int | None, at_least(1)] = None
    """How many processes there are, with --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0, with --coordinator."""


def start(config: Config = Config(), devices: int | None = None) -> None:
    """Prepares the devices, before any is touched: joins the other processes, or emulates `devices`
    on the CPU. Programs are cached for the next start, but those of several processes on CPUs."""
    coordinator, processes, process_id = config.coordinator, config.processes, config.process_id
    together = (coordinator, processes, process_id)
    if any(flag is not None for flag in together) and None in together:
        raise UserError("--coordinator, --processes and --process-id are given together")
    if coordinator is not None and not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator {coordinator}: expected host:port of the first process")
    if process_id is not None and not 0 <= process_id < processes:
        raise UserError(f"--process-id {process_id}: expected one of 0 to {processes - 1}")
    if process_id == 0:
        try:  # gRPC would share a port with the first process of another run
            socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
        except (OSError, OverflowError) as error:
            remedy = "name another port, the same for all processes"
            raise UserError(f"--coordinator {coordinator}: {error}: {remedy}") from None
    jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # Else accelerators round the operands of float32 products to fewer bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    if devices is not None:
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # its compiler alone is asked for
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if (emulated := jax.config.jax_num_cpu_devices) > 1:
        # Threads of XLA's pool: with too few, programs in flight wait for each other without end.
        os.environ.setdefault("NPROC", str(max(4 * emulated, os.cpu_count() or 1)))
    if not (config.distributed or coordinator):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would replace our handlers
    where = coordinator or "the coordinator that the scheduler names"

    def unmet(reason: str) -> UserError:
        remedy = "start all of them, and let --coordinator name the first"
        return UserError(f"the processes could not meet at {where} ({reason}): {remedy}")

    # When jax's own time is up it aborts the process.
    silence = unmet(f"it or another one did not answer in {PATIENCE} s")
    late = threading.Timer(PATIENCE, _leave, [silence])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            *together, initialization_timeout=2 * PATIENCE,
            heartbeat_timeout_seconds=int(os.environ.get("HEARTBEAT_TIMEOUT", 100)),
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise unmet(str(error).strip().splitlines()[0][:200]) from None
    finally:
        late.cancel()
    if jax.default_backend() == "cpu":
        # In programs that are read from there, processes have met in different collectives.
        jax.config.update("jax_compilation_cache_dir", None)


def _leave(error: UserError) -> NoReturn:
    errors.tell(error)
    os._exit(2)  # a tidy end would wait for processes that may never come


@contextlib.contextmanager
def exit_with_peers() -> Iterator[None]:
    """Ends this process when it fails or another one has ended: it is a mistake to go on alone.

    A process that waits at a barrier for one that died is ended by jax itself, in its own words.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            remedy = "--plan tells what fits; --remat full, more --microbatches, kept targets"
            remedy += " (targets.py), --optim.name adafactor and --optim.freeze need less"
            error = UserError(f"out of memory ({files.printable(error, 160)}): {remedy}")
        if jax.process_count() == 1:
            raise error from None
        if not isinstance(error, UserError):
            cause = str(error).splitlines()[0][:160]
            remedy = "start all of them again, and they go on from what was saved"
            error = UserError(f"another process has ended or is out of reach ({cause}): {remedy}")
        _leave(error)


def gather(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What JSON can hold, of each process."""
    content = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    sizes = process_allgather(np.int32(content.size))
    rows = process_allgather(np.pad(content, (0, int(sizes.max()) - content.size)))
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, sizes, strict=True)]


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuses what is not the same in all processes; the first difference is named."""
    first, *others = gather(facts)
    for number, other in enumerate(others, 1):
        words = f"{{}} is {{}} in process 0, but {{}} in process {number}"
        for difference in files.changes(first, other, MAY_DIFFER, words=words):
            remedy = "start all with the same command, program and files, and one --out"
            raise UserError(f"{difference}: {remedy}")


def stop_signals() -> list[signal.Signals]:
    """Those that ask a run to stop: Slurm and clouds send one of the latter before they kill."""
    kinds = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
    return kinds[: -1 if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else None]  # nohup


def end_at_once() -> None:
    """Before it trains, a process that is asked to stop ends with status 130, even while it waits
    in native code, for another process say, where no handler of Python runs."""

    def wait() -> None:
        while os.read(reader, 1)[0] not in stop_signals():
            pass
        time.sleep(1)  # for a tidy end, where Python gets to it
        errors.run(lambda: signal.default_int_handler(signal.SIGINT, None))

    for kind in stop_signals()[1:]:
        signal.signal(kind, signal.default_int_handler)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=wait, daemon=True).start()


def greatest(wish: int, mesh: jax.sharding.Mesh) -> jax.Array | None:
    """The greatest wish of several processes, in an array that nobody has waited for."""
    if jax.process_count() == 1:
        return None
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    wishes = jax.make_array_from_callback((mesh.size,), place, lambda _: np.array([wish]))
    return block_on_cpu(_max(wishes))


_max = jax.jit(jnp.max)


class Interruption(contextlib.ExitStack):
    """What is to be done after a step: SAVE, when so many minutes have gone by, or STOP, after one
    of `stop_signals` or a deadline; a second signal is taken at its word."""

    def __init__(self, deadline: float = math.inf, save_minutes: float | None = None):
        super().__init__()
        self.deadline, self.pause = deadline, 60 * (save_minutes or math.inf)
        self.asked, self.last_save = False, time.monotonic()

    def wish(self) -> int:
        now = time.monotonic()
        if self.asked or now > self.deadline:
            return STOP
        return SAVE if now > self.last_save + self.pause else 0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # others may not
            signal.set_wakeup_fd(-1)  # of `end_at_once`
            for kind in stop_signals():
                self.callback(signal.signal, kind, signal.signal(kind, self.ask))
        return self

    def ask(self, *_: Any) -> None:
        self.asked = True
        self.close()


def watched(items: Iterable[Any], minutes: float) -> Iterator[Any]:
    """The items. Where the work on one takes so many minutes (0 is no limit), the stacks of all
    threads are printed and the process ends with status 1, even if it waits in native code."""
    try:
        for item in items:
            if minutes:
                faulthandler.dump_traceback_later(60 * minutes, exit=True)
            yield item
    finally:
        faulthandler.cancel_dump_traceback_later()


def block_on_cpu(result: Any) -> Any:
    """Blocks on CPUs: two programs of several processes could enter different collectives there."""
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(result)
    return result
