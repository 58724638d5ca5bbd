"""A pool of gloo ranks that lives as long as the test run: a process start costs seconds, a call milliseconds."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class Ranks:
    """Calls a top-level function on every rank. An error or a hang fails the call and ends the group; the next call starts anew.

    world: number of ranks. timeout: seconds per call.
    """

    def __init__(self, world, timeout=60):
        self.world, self.timeout, self.members = world, timeout, []

    def __call__(self, function, *args):
        if not self.members:
            self.start()
        for _, pipe in self.members:
            pipe.send_bytes(pickle.dumps((function, args)))  # not `send`: torch would share the memory of tensors
        results, deadline = {}, time.monotonic() + self.timeout
        while len(results) < self.world:
            for rank, (process, pipe) in enumerate(self.members):
                if rank not in results and pipe.poll(0.01):
                    results[rank], error = pickle.loads(pipe.recv_bytes())
                    if error:
                        self.stop()
                        raise RuntimeError(f"rank {rank}: {error}")
                elif rank not in results and (time.monotonic() > deadline or not process.is_alive()):
                    self.stop()
                    raise TimeoutError(f"{function.__name__}: rank {rank} hangs or died; ranks {sorted(results)} had answered")
        return [results[rank] for rank in range(self.world)]

    def start(self):
        spawn = multiprocessing.get_context("spawn")
        meeting = Path(tempfile.mkdtemp()) / "ranks"
        for rank in range(self.world):
            here, there = spawn.Pipe()
            process = spawn.Process(target=serve, args=(rank, self.world, meeting.as_uri(), self.timeout, there), daemon=True)
            process.start()
            there.close()
            self.members.append((process, here))
        for rank, (_, pipe) in enumerate(self.members):
            ready = pipe.poll(5 * self.timeout)  # imports take long on a busy machine, and no call should pay for them
            try:
                if not ready or pipe.recv_bytes() != b"ready":
                    raise EOFError
            except EOFError:
                self.stop()
                raise TimeoutError(f"rank {rank} did not start") from None

    def stop(self):
        for process, _ in self.members:
            process.kill()
            process.join()
        self.members = []


def serve(rank, world, meeting, timeout, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=5 * timeout))
    pipe.send_bytes(b"ready")
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (function(*args), None)
        except Exception:  # whatever it is, the test should show it
            answer = (None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
