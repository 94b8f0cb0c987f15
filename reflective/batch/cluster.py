"""Batch work over the machines of a Ray cluster: as many replicas of the model as it has GPUs, one journal.

A part, the rows of one of a job's windows, is read beside the driver, travels to a replica by Ray's object store, and comes back
as results that the driver alone writes into its journal: whole or not at all, and once. Parts are the local command's, and
depend on the input and the job alone, so that the output has its bytes, and either goes on with what the other has begun.

Ray replaces a replica that dies, here or with its machine; parts that were lost with it are done in a further pass over the
input, by as many replicas as there is then room for. A part is never sent to a replica twice by Ray itself: where its machine
does not come back, it would wait for that for ever.
"""

import logging
import os
import pickle
import re
import socket
import traceback
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ..utils.records import Record, check_unchanged, open_file
from .journal import WHOLE_ROW, Result
from .progress import Meter, Tally
from .run import Job, Load, Report, Work

try:
    import ray
    from ray import data
    from ray.data.block import BlockMetadata
    from ray.data.exceptions import SystemException
    from ray.util.annotations import RayDeprecationWarning
except ImportError as error:
    raise ImportError("--ray needs Ray: pip install 'reflective-kernels[ray]'") from error

LOCAL = "local"
ADDRESS = re.compile(r"local|auto|[\w.-]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
SHARE = 0.01  # of a CPU that a replica books: it lies where there are some, and never waits for those that Ray's own tasks have
PASSES = 3  # in a row that bring nothing, after which a run is given up
# Of this process and of a cluster of its own.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
CONNECT = 10.0  # seconds in which a cluster's port answers


class Cluster:
    """A ``run.Run`` on a Ray cluster.

    Args:
        address: of its head, ``HOST:PORT``; ``auto``: the one that this machine is of; ``local``: one of its own on this
            machine, which ends with the run. Where the process is connected already, that cluster is taken.
        replicas: of the model, each with one GPU where the cluster has any; None: one a GPU, or one a machine.

    Raises:
        ValueError: no such address, less than one replica.
    """

    def __init__(self, address: str = LOCAL, replicas: int | None = None) -> None:
        if address.startswith("ray://"):
            raise ValueError(
                f"ray: {address!r} is for Ray's client, which is no part of the cluster; start the command on one of the "
                "cluster's machines, with auto or the address of its head, HOST:PORT"
            )
        if not ADDRESS.fullmatch(address):
            raise ValueError(f"ray: expected HOST:PORT, auto or local, found {address!r}")
        if replicas is not None and replicas < 1:
            raise ValueError(f"replicas={replicas}; expected 1 or more")
        self.address, self.replicas = address, replicas

    def __call__(self, load: Load, job: Job, work: Work, report: Report) -> int:
        """Do all of a job, and write its output.

        Returns, raises: as ``run.here``; and ConnectionError: no cluster. OSError: no room for the replicas; it was given up;
            a replica failed as a local run would not.
        """
        with _connected(self.address), _quiet():
            room, gpus = self.room()
            if self.replicas and self.replicas > room:
                raise OSError(f"replicas={self.replicas}: the cluster has {room} GPU(s), and each replica needs one")
            identity = None
            if work.journal.count() or not len(work.source):  # else the first part says whose results they are
                identity = _introduced(load, job, gpus)
                work.journal.agree(identity)
            with work.meter() as meter:
                _Passes(self, gpus, load, job, work, meter, identity).run()
                return work.finish(meter, report)

    def room(self) -> tuple[int, int]:
        """Replicas for which the cluster has room now, and GPUs of each."""
        if gpus := int(ray.cluster_resources().get("GPU", 0)):
            return min(self.replicas or gpus, gpus), 1
        machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        return self.replicas or max(1, len(machines)), 0


def _introduced(load: Load, job: Job, gpus: int) -> dict[str, Any]:
    """What results depend on, as a replica says before it has any part.

    Raises:
        OSError: it died.
    """
    introduce = ray.remote(num_cpus=SHARE, num_gpus=gpus)(_introduce)
    try:
        return _checked(ray.get(introduce.remote(load, job, _threads()))).identity
    except ray.exceptions.RayError as error:
        raise OSError(f"ray: a replica could not be started: {_last_line(error)}") from error


class _Passes:
    """Passes over the input until all of its parts are done."""

    def __init__(
        self,
        cluster: Cluster,
        gpus: int,
        load: Load,
        job: Job,
        work: Work,
        meter: Meter,
        identity: dict[str, Any] | None,
    ) -> None:
        self.cluster, self.gpus, self.load, self.job, self.work, self.meter = cluster, gpus, load, job, work, meter
        self.identity, self.total = identity, len(work.source)
        self.ended: set[int] = set()  # parts, by the numbers of their first rows
        self.begun: dict[int, set[tuple[int, int]]] = {}  # what is there of other parts, which a local run has left
        self.rows = 0  # of the parts that ended
        if work.journal.count():
            self._look()

    def run(self) -> None:
        """Raises OSError where nothing comes any more; see ``Cluster.__call__``."""
        vain = 0
        while left := self.total - self.rows:
            error = None
            try:
                for done in self._found(left):
                    self._keep(done)
            except (ray.exceptions.RayError, SystemException) as raised:
                error = raised
            check_unchanged(self.work.source)
            lost = self.total - self.rows
            vain = vain + 1 if lost == left else 0
            if vain == PASSES:
                why = f" ({_last_line(error)})" if error else ""
                raise OSError(
                    f"ray: {lost:,} rows could not be done, their replicas died {PASSES} times in a row{why}; what is done is "
                    f"kept in {self.work.journal.file}, and the same command goes on there"
                ) from error
            if lost:
                self.meter.say(f"{lost:,} rows were lost with replicas that died, and are begun again")

    def _look(self) -> None:
        """What the journal has of each part."""
        for window in self.job.windows(self.work.source):
            done = self.work.journal.done(window[0].number, window[-1].number)
            if all(_is_done(record, done) for record in window):
                self.ended.add(window[0].number)
                self.rows += len(window)
            elif done:
                self.begun[window[0].number] = done

    def _found(self, rows: int) -> Iterator["_Done"]:
        """What comes of parts that have not ended, of ``rows``, in any order."""
        room, gpus = self.cluster.room()
        if gpus < self.gpus:  # without, bits would be others
            raise OSError(f"ray: the cluster has lost its GPUs; what is done is kept in {self.work.journal.file}")
        replicas = min(room, rows)
        self.meter.say(f"{replicas} replica(s) of the model on a cluster of {len(ray.nodes())} machine(s)")
        parts = _Parts(self.work.source.path.absolute(), self.job, frozenset(self.ended), self.begun)
        found = data.read_datasource(
            parts, override_num_blocks=1, num_cpus=0,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},  # where the file is
        ).map_batches(
            _Replica, fn_constructor_args=(self.load, self.job, _threads()), batch_size=1, batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=replicas, max_tasks_in_flight_per_actor=2), num_cpus=SHARE, num_gpus=gpus,
            max_restarts=-1, max_task_retries=0,
        )  # fmt: skip
        for row in found.iter_rows():
            yield _checked(pickle.loads(row["part"]))

    def _keep(self, done: "_Done") -> None:
        if self.identity is None:
            self.work.journal.agree(done.identity)
            self.identity = done.identity
        if done.identity != self.identity:
            other = [f"{name} is {done.identity[name]} on {done.place}, {self.identity[name]} elsewhere"
                     for name in self.identity if done.identity[name] != self.identity[name]]  # fmt: skip
            raise ValueError(f"ray: replicas differ ({'; '.join(other)}); all machines need the same model")
        if done.part in self.ended:
            return
        self.work.journal.keep(done.results)
        self.ended.add(done.part)
        self.rows += done.rows
        self.meter.expect(done.tally.rows, done.tally.tokens)
        self.meter.advance(done.tally.rows, done.tally.tokens, done.tally.broken)


def _is_done(record: Record, done: Collection[tuple[int, int]]) -> bool:
    """Whether there are results of a record, or of each of its responses."""
    responses = record.fields.get("responses")
    return (record.number, WHOLE_ROW) in done or (
        isinstance(responses, list)
        and bool(responses)
        and all((record.number, i) in done for i in range(len(responses)))
    )


def _last_line(error: BaseException) -> str:
    """What went wrong, of a message with a traceback in it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _threads() -> int:
    """Threads that a local run has, of which the bits of a CPU's sums may depend; Ray gives a replica one."""
    import torch

    return torch.get_num_threads()


# -- on the cluster's machines ---------------------------------------------------------------------------------------------


class _Done(NamedTuple):
    """What a replica has made of a part; ``part``: the number of its first row; ``place``: the machine's name."""

    part: int
    rows: int
    results: list[Result]
    tally: Tally
    identity: dict[str, Any]
    place: str


class _Failed(NamedTuple):
    """What a replica failed at, as a local run would; pickled, and with where it was in words."""

    error: bytes
    told: str


class _Parts(data.Datasource):
    """Parts of a file that have not ``ended``, read one at a time and no faster than they are needed."""

    def __init__(self, path: Path, job: Job, ended: Collection[int], begun: dict[int, set[tuple[int, int]]]) -> None:
        super().__init__()
        self.path, self.job, self.ended, self.begun = path, job, ended, begun

    def get_name(self) -> str:
        return "Parts"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **settings: Any) -> list[data.ReadTask]:
        about = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [data.ReadTask(self._read, about)]

    def _read(self) -> Iterator[pa.Table]:
        for window in self.job.windows(open_file(self.path)):
            if window[0].number not in self.ended:
                yield _table((window, self.begun.get(window[0].number, set())))


class _Replica:
    """The model in an actor. What it fails at it says, for else Ray would take it for dead, and begin another."""

    def __init__(self, load: Load, job: Job, threads: int) -> None:
        self.job, self.failed = job, None
        try:
            import torch

            torch.set_num_threads(threads)
            self.model = load()
            self.identity = job.begin(self.model)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            self.failed = _failed(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        return _table(self.done(*pickle.loads(table["part"][0].as_py())))

    def done(self, window: list[Record], done: Collection[tuple[int, int]]) -> _Done | _Failed:
        if self.failed:
            return self.failed
        tally, results = Tally(), []
        try:
            if window:
                for some in self.job.results(self.model, window, done, tally):
                    results += some
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
            return _failed(error)
        part = window[0].number if window else 0
        return _Done(part, len(window), results, tally, self.identity, socket.gethostname())


def _introduce(load: Load, job: Job, threads: int) -> _Done | _Failed:
    return _Replica(load, job, threads).done([], ())


def _table(part: Any) -> pa.Table:
    """A table of one row, and so a block, of which nothing else is part."""
    return pa.table({"part": pa.array([pickle.dumps(part)], pa.large_binary())})


def _failed(error: BaseException) -> _Failed:
    told = f"on {socket.gethostname()}:\n{''.join(traceback.format_exception(error))}"
    try:
        given = pickle.dumps(error.with_traceback(None))
        pickle.loads(given)
    except Exception:  # noqa: BLE001  # there are errors that cannot be pickled, or come back as something else
        given = pickle.dumps(OSError(f"ray: a replica failed {told}"))
    return _Failed(given, told)


def _checked(found: _Done | _Failed) -> _Done:
    """Raises what a replica raised."""
    if isinstance(found, _Failed):
        raise pickle.loads(found.error) from RuntimeError(found.told)
    return found


# -- the driver's connection -----------------------------------------------------------------------------------------------


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Within, this process is the driver of the cluster at ``address``.

    Raises:
        ConnectionError: there is none, or it lets nobody in.
    """
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        # Ray starts a process for every CPU, needed or not.
        settings |= {"num_cpus": 1, "include_dashboard": False}
    elif address != "auto":
        _check_answers(address)
    added = ENVIRONMENT.keys() - os.environ.keys()
    os.environ.update({name: ENVIRONMENT[name] for name in added})
    try:
        try:
            ray.init(address, **settings)
        except Exception as error:
            raise ConnectionError(f"ray: no cluster at {address!r}: {error}") from error
        yield
    finally:
        ray.shutdown()
        for name in added:
            os.environ.pop(name, None)


def _check_answers(address: str) -> None:
    """Raises ConnectionError where nothing listens at ``address``: Ray would try for a minute, and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"ray: no cluster at {address!r}: {error}; give HOST:PORT of its head, or local"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, Ray Data is set up for parts, and says nothing: of what goes wrong ``_Passes`` tells."""
    log = logging.getLogger("ray.data")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.")
            warnings.filterwarnings("ignore", category=RayDeprecationWarning)  # max_task_retries, see pyproject.toml
            context = data.DataContext.get_current().copy()
            context.target_max_block_size = 1  # bytes: each part is a block, and no two are put together
            context.max_errored_blocks = -1  # lost parts are left out
            context.max_consecutive_actor_init_deaths = PASSES
            context.execution_no_progress_timeout_s = -1  # of long texts a part may take hours
            context.enable_progress_bars = context.print_on_execution_start = False
            with data.DataContext.current(context):
                yield
    finally:
        log.setLevel(level)
