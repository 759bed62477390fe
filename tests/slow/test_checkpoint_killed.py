"""Checkpoints of processes that are killed, and of two that save and restore together."""

import os
import socket

from test_checkpoint import Checkpoints, child, latest, make_mesh, restore, same, state_of, steps

KILLED = """
from pathlib import Path
from test_checkpoint import Checkpoints, latest, restore, state_of
folder = Path(sys.argv[1])
last = latest(folder)
state, step = state_of(0, scale=512), 0
if last is not None:
    state, _, step = restore(folder, state)
with Checkpoints(folder) as saved:
    for step in range(step + 1, step + 1000):
        saved.save(step, state_of(step, scale=512), {"from": step})
        print(step, flush=True)
"""


def test_killed_at_any_moment_it_leaves_a_whole_checkpoint(tmp_path, capfd):
    last = 0
    for lines, entries in ((1, 1), (2, 4), (2, 9), (3, 12)):
        process = child(KILLED, tmp_path, JAX_NUM_CPU_DEVICES="1")
        told = [int(process.stdout.readline()) for _ in range(lines)]
        assert told[0] == last + 1
        # However fast it is, until this much of a checkpoint is there under its passing name.
        while sum(len(names) for at, _, names in os.walk(tmp_path) if "-tmp" in at) < entries:
            assert process.poll() is None
        process.kill()
        told += map(int, process.communicate()[0].split())
        last = latest(tmp_path) or 0
        assert last >= told[-1] - 1  # a save that starts has seen the end of the one before
        if last:
            state, extra, step = restore(tmp_path, state_of(0, scale=512))
            assert same(state, state_of(last, scale=512))
            assert (extra, step) == ({"from": last}, last)
    assert last > 0
    assert "warning" not in capfd.readouterr().err  # no kill leaves damage under a final name
    with Checkpoints(tmp_path) as saved:
        saved.save(last + 1, state_of(last + 1), {})
    assert set(steps(tmp_path)) == {str(last), str(last + 1)}


TOGETHER = """
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
from pathlib import Path
from jax.experimental.multihost_utils import sync_global_devices
import test_checkpoint
from runtime import checkpoint
from test_checkpoint import Checkpoints, latest, make_mesh, restore, state_of
folder = Path(sys.argv[1])
with checkpoint.lock(folder), Checkpoints(folder, keep=3) as saved:
    for step in (1, 2, 3):
        saved.save(step, state_of(step, make_mesh(1, 4, 1), scale=16), {"from": step})
if jax.process_index() == 0:
    for file in test_checkpoint.files(folder / "3"):
        if "ocdbt.process_1" in str(file):
            file.write_bytes(bytes(len(file.read_bytes())))
else:  # what one of them cannot read, none takes
    load = checkpoint._load
    checkpoint._load = lambda path, *rest: 1 / (path.name != "2") and load(path, *rest)
sync_global_devices("damaged")
state, extra, step = restore(folder, state_of(0, make_mesh(2, 1, 2), scale=16))
whole = state_of(step, make_mesh(2, 1, 2), scale=16)
for ours, true in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
    for a, b in zip(ours.addressable_shards, true.addressable_shards, strict=True):
        assert jax.device_get(a.data).tobytes() == jax.device_get(b.data).tobytes()
print(latest(folder), step, extra)
"""


def test_two_processes_save_and_skip_together_and_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [child(TOGETHER, tmp_path, address, i, JAX_NUM_CPU_DEVICES="2") for i in range(2)]
    try:
        said = [process.communicate(timeout=100)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert all("3 1 {'from': 1}\n" in out for out in said), said
    state, _, step = restore(tmp_path, state_of(0, make_mesh(2, 2, 2), scale=16))
    assert step == 2 and same(state, state_of(2, scale=16))
