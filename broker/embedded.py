"""A private PostgreSQL for those who gave no database of their own.

It finds PostgreSQL's programs, makes a database below the data directory, runs the server as a child of this
process and takes it along when this process ends. The data directory holds:

- `postgres/`: the database's files; from then on they decide which major version of PostgreSQL is used.
- `lock`: held by the process that owns the directory, and holding its pid. There is one owner at a time.
- `postgres.lock`: held by every process of the server, backends and initdb included: so it is known whether
  one is alive, whatever became of their owner and of their pids.
- `postgres.log`: what the server says; emptied at a start once it has passed 10 MB.
- `socket/`: the only way in (there is no TCP port), closed to other accounts; who comes through is trusted.
  Where its path is too long for a socket, `/tmp/wonderq-<hash>` takes its place.

Promised: a commit is durable; a kill -9 of the owner, of the server or of a half-done first start loses
nothing and does not stand in the way of the next start; permissions outside the data directory are never
changed. On Linux the server ends at once after its owner, however that died; elsewhere, before the next one
starts. Not promised: backups, upgrades to another major version, access from another machine.
"""

import asyncio
import fcntl
import hashlib
import math
import os
import pwd
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from broker.installation import EmbeddedError, Installation, clean_environ, copy_programs, find_installation

_NAME = "wonderq"  # of the database, and of its owner, the superuser
_PORT = 5432  # nothing but a part of the socket's name
_SOCKET = f".s.PGSQL.{_PORT}"
_SOCKET_PATH_BYTES = 100  # kernels take 107 (Linux) or 103 (macOS)
_LOG_BYTES = 10 * 1024 * 1024
# Fast shutdown; immediate shutdown, which costs a recovery and loses nothing; and what cannot be refused.
# Their sum leaves the broker two of the ten seconds within which it must stop.
_STOP_SIGNALS = ((signal.SIGINT, 5.0), (signal.SIGQUIT, 2.0), (signal.SIGKILL, 1.0))

_SETTINGS = {
    "listen_addresses": "",
    "port": str(_PORT),
    "max_connections": "100",
    "shared_buffers": "128MB",
    "wal_level": "replica",
    "max_wal_size": "2GB",
    "checkpoint_completion_target": "0.9",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",  # a statement may hold what a client sent
    "log_checkpoints": "off",
    "log_destination": "stderr",
    "logging_collector": "off",
}

# Becomes the server's process. An interpreter of its own, because Python code between fork and exec may
# deadlock where there are threads. The order matters: a change of account clears the death signal, and an owner
# that died before the signal was asked for shows by its pid alone. SIGINT is PostgreSQL's fast shutdown.
_LAUNCHER = """
import ctypes, os, signal, sys
owner, uid, gid, folder, *command = sys.argv[1:]
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGINT, 0, 0, 0)
    if os.getppid() != int(owner):
        sys.exit("the owner of this server has ended")
os.chdir(folder)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execv(command[0], command)
"""


class _Account(NamedTuple):
    uid: int
    gid: int
    name: str


class _Running(NamedTuple):
    pid: int
    socket_dir: Path


def conninfo_of_running(data_dir: Path) -> str | None:
    """Return the connection URL of the server that runs in `data_dir` now, or none, for tools that join it.

    Raises EmbeddedError where this account may not look into the directory.
    """
    try:
        running = _running(data_dir.absolute() / "postgres")
    except PermissionError as error:
        raise EmbeddedError(
            f"This account may not read {error.filename}: run the command as the account of the broker, or give "
            "--database-url."
        ) from error
    return _conninfo(running.socket_dir) if running else None


class EmbeddedPostgres:
    """One PostgreSQL server and the data directory it lives in.

    `settings` are further server settings, passed on its command line. Call `start` in the main thread: on
    Linux the server is shut down when the thread that started it ends. The event loop may differ from call to
    call. A process forked (not spawned) by the owner keeps the directory owned until it ends as well.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        settings: Mapping[str, str] | None = None,
        installation: Installation | None = None,
    ) -> None:
        self._data_dir = data_dir.absolute()
        self._pgdata = self._data_dir / "postgres"
        self._log = self._data_dir / "postgres.log"
        self._socket_dir = _socket_folder(self._data_dir)
        self._settings = _SETTINGS | dict(settings or {})
        self._installation = installation
        self._lock: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The server's process while it lives."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    async def start(self) -> str:
        """Start the server, after making its database at the first start; return a connection URL.

        A server that a killed owner left is stopped first. Crash recovery is waited for as long as the server
        lives. Raises EmbeddedError where the directory has another owner, cannot be used, or the server does
        not come up; nothing is left running then.
        """
        if self._lock is not None:
            raise EmbeddedError(f"The PostgreSQL in {self._data_dir} was started already: stop it first.")
        try:
            self._lock = _own(self._data_dir)
            return await self._start_owned()
        except OSError as error:
            await self.stop()
            raise EmbeddedError(
                f"The embedded PostgreSQL cannot use {error.filename or self._data_dir} "
                f"({error.strerror or error}): put that right, or choose another --data-dir."
            ) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Stop the server and give the data directory back; within 8 seconds; any number of times."""
        if self._lock is None:
            return
        if self._process is not None and await self._end(lambda: self.pid):
            shutil.rmtree(self._socket_dir, ignore_errors=True)
        lock, self._lock = self._lock, None
        if lock is not None:  # another call of stop may have come first
            os.close(lock)

    async def wait_ended(self) -> int:
        """Wait until the server has ended for whatever reason; return its exit code, negative for a signal."""
        process = self._process
        assert process is not None, "call start first"
        await _until(lambda: process.poll() is not None, poll_seconds=0.1)
        return int(process.returncode)

    async def _start_owned(self) -> str:
        account = _account_for(self._pgdata)
        if not await self._end(lambda: (running := _running(self._pgdata)) and running.pid):
            raise EmbeddedError(f"An older PostgreSQL in {self._data_dir} does not stop: end its processes first.")
        for half_done in ("postgres.new", "postgresql.new"):
            shutil.rmtree(self._data_dir / half_done, ignore_errors=True)
        if self._log_bytes() > _LOG_BYTES:
            os.truncate(self._log, 0)
        installation = await asyncio.to_thread(self._choose_installation)
        if os.geteuid() == 0:
            installation = await self._within_reach(installation, account)
        if not self._pgdata.exists():
            await self._initialise(installation, account)
        elif self._pgdata.stat().st_uid == 0:
            _give(self._pgdata, account)  # a backup that root put back
        await self._launch(installation, account)
        return _conninfo(self._socket_dir)

    def _choose_installation(self) -> Installation:
        if not self._pgdata.exists():
            return self._installation or find_installation()
        try:
            major = int((self._pgdata / "PG_VERSION").read_text())
        except (FileNotFoundError, ValueError):
            raise EmbeddedError(
                f"{self._pgdata} is no PostgreSQL data directory: move it away, or choose another --data-dir."
            ) from None
        return self._installation or find_installation(major=major)

    async def _within_reach(self, installation: Installation, account: _Account) -> Installation:
        """Return programs that the account can run: these, or else their copy in the data directory."""
        if await self._can_run(installation, account):
            return installation
        copy = await asyncio.to_thread(copy_programs, installation, self._data_dir)
        if await self._can_run(copy, account):
            return copy
        raise EmbeddedError(
            f"The account {account.name} can run neither the PostgreSQL in {installation.bin_dir} nor its copy "
            f"in {copy.bin_dir}: name one that it can run in BROKER_PG_BIN, or give --database-url."
        )

    async def _can_run(self, installation: Installation, account: _Account) -> bool:
        script = '{ "$1" --version && "$2" --version; } >/dev/null 2>&1 || exit 3'
        programs = [str(installation.bin_dir / program) for program in ("postgres", "initdb")]
        code = await self._run(account, ["/bin/sh", "-c", script, "sh", *programs])
        if code not in (0, 3):  # the launcher itself has failed, since it begins in the data directory
            raise EmbeddedError(
                f"PostgreSQL does not run as root, and the account {account.name} cannot enter "
                f"{self._data_dir}: choose a --data-dir below folders that every account may enter, such as "
                "/var/lib/wonderq."
            )
        return code == 0

    async def _initialise(self, installation: Installation, account: _Account) -> None:
        """Make the database in a side folder and rename it when all is done, so that none is half done."""
        side = self._data_dir / "postgres.new"
        side.mkdir(mode=0o700)
        _give(side, account)
        syncs = self._settings.get("fsync") != "off"
        initdb = [str(installation.bin_dir / "initdb"), "-D", str(side), "-U", _NAME, "-A", "trust"]
        initdb += ["--encoding=UTF8", "--locale=C", "--data-checksums", "--no-instructions"]
        initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if installation.major >= 17 else []
        initdb += [] if syncs else ["--no-sync"]
        single = [str(installation.bin_dir / "postgres"), "--single", "-D", str(side), *self._options()]
        single += ["-c", "exit_on_error=on", "postgres"]
        log_bytes = self._log_bytes()
        for command, text in ((initdb, ""), (single, f"CREATE DATABASE {_NAME}\n")):
            if await self._run(account, command, text) != 0:
                raise self._failure("could not make its database", log_bytes)
        side.rename(self._pgdata)
        if syncs:
            await asyncio.to_thread(os.sync)

    async def _launch(self, installation: Installation, account: _Account) -> None:
        _make_private(self._socket_dir, account)
        log_bytes = self._log_bytes()
        command = [str(installation.bin_dir / "postgres"), "-D", str(self._pgdata), *self._options()]
        process = self._process = self._spawn(account, command)
        await _until(lambda: process.poll() is not None or _is_ready(self._pgdata, process.pid))
        if process.poll() is not None:
            raise self._failure(f"ended while it was starting (exit code {process.returncode})", log_bytes)

    def _options(self) -> list[str]:
        quoted = str(self._socket_dir).replace('"', '""')
        settings = self._settings | {"unix_socket_directories": f'"{quoted}"'}
        return [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    async def _run(self, account: _Account, command: Sequence[str], text: str = "") -> int:
        process = self._spawn(account, command, stdin=subprocess.PIPE)
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(text.encode())
            await _until(lambda: process.poll() is not None)
            return int(process.returncode)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _spawn(
        self, account: _Account, command: Sequence[str], stdin: int = subprocess.DEVNULL
    ) -> "subprocess.Popen[bytes]":
        numbers = [str(number) for number in (os.getpid(), account.uid, account.gid)]
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *numbers, str(self._data_dir)]
        # No older server is alive here, so the pid in the postmaster.pid that one left may be a stranger's, whom
        # PostgreSQL takes for that server, unless told that it is its own grandparent.
        stale = {"PG_GRANDPARENT_PID": pid for pid in _read_pid_file(self._pgdata)[:1]}  # noqa: B035
        with _open_private(self._log) as log, _open_private(self._data_dir / "postgres.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            return subprocess.Popen(  # noqa: S603 - our own programs, and no shell
                [*launcher, *command],
                stdin=stdin,
                stdout=log,
                stderr=log,
                env=clean_environ() | stale,
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )

    async def _end(self, find_pid: Callable[[], int | None]) -> bool:
        """Stop the server by ever harder signals; return whether none of its processes is alive any more."""
        for number, seconds in _STOP_SIGNALS:
            if self._is_gone():
                return True
            if (pid := find_pid()) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if await _until(self._is_gone, seconds):
                return True
        return False

    def _is_gone(self) -> bool:
        if self.pid is not None:
            return False
        with suppress(FileNotFoundError), _open_private(self._data_dir / "postgres.lock") as lock:
            return _try_lock(lock.fileno())
        return True  # somebody has removed the directory

    def _log_bytes(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0

    def _failure(self, what: str, log_bytes: int) -> EmbeddedError:
        lines = os.fsdecode(self._log.read_bytes()[log_bytes:]).splitlines()[-12:]
        return EmbeddedError(
            f"The embedded PostgreSQL {what}: mend what its log names, or give a database of your own by "
            f"--database-url. The last lines of {self._log}:\n" + "\n".join(lines)
        )


def _own(data_dir: Path) -> int:
    """Make the data directory where there is none, and become its only owner; return the lock."""
    missing = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o711 if os.geteuid() == 0 else 0o700)  # root's server runs as another account
    lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    if not _try_lock(lock):
        owner = os.pread(lock, 20, 0).decode().strip()
        os.close(lock)
        raise EmbeddedError(
            f"The data directory {data_dir} is in use by process {owner or 'unknown'}: stop that one first, or "
            "choose another --data-dir."
        )
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_private(path: Path) -> BinaryIO:
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def _account_for(pgdata: Path) -> _Account:
    """Choose who runs the server: this account, or for root, which PostgreSQL refuses, one without rights."""
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid(), str(os.geteuid()))
    if pgdata.exists() and (owner := pgdata.stat()).st_uid != 0:
        return _Account(owner.st_uid, owner.st_gid, str(owner.st_uid))
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return _Account(entry.pw_uid, entry.pw_gid, name)
    raise EmbeddedError(
        "PostgreSQL does not run as root, and there is no account postgres or nobody: create one of them, or "
        "start the broker as an ordinary user."
    )


def _give(path: Path, account: _Account) -> None:
    if os.geteuid() == 0:
        for inner in (path, *path.rglob("*")):
            os.chown(inner, account.uid, account.gid, follow_symlinks=False)


def _make_private(folder: Path, account: _Account) -> None:
    """Make the socket's folder, empty, for this account alone; refuse one that somebody else made before."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        _give(folder, account)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid:
        raise EmbeddedError(f"{folder} is not a folder of the account {account.name}: remove it first.")
    folder.chmod(0o700)
    for left_over in folder.iterdir():
        left_over.unlink()


def _socket_folder(data_dir: Path) -> Path:
    path = os.fsencode(data_dir / "socket" / _SOCKET)
    if len(path) <= _SOCKET_PATH_BYTES and b"," not in path:  # libpq takes a comma for the next host
        return data_dir / "socket"
    return Path("/tmp") / f"wonderq-{hashlib.sha256(path).hexdigest()[:16]}"  # noqa: S108 - see _make_private


def _is_ready(pgdata: Path, pid: int) -> bool:
    lines = _read_pid_file(pgdata)
    return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() == "ready"


def _read_pid_file(pgdata: Path) -> list[str]:
    """Return the lines: pid, directory, start, port, socket's folder, address, shared memory, state."""
    try:
        return os.fsdecode((pgdata / "postmaster.pid").read_bytes()).splitlines()
    except FileNotFoundError:
        return []


def _running(pgdata: Path) -> _Running | None:
    """Find the server that listens now. The kernel tells its pid: the one in the file may be a stranger's."""
    lines = _read_pid_file(pgdata)
    if len(lines) > 4 and lines[4]:
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.settimeout(1)
            client.connect(os.path.join(lines[4], _SOCKET))
            if sys.platform != "linux":
                return _Running(client.getsockopt(0, 2), Path(lines[4]))  # macOS: SOL_LOCAL, LOCAL_PEERPID
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            return _Running(struct.unpack("3i", credentials)[0], Path(lines[4]))
    return None


def _conninfo(folder: Path) -> str:
    # Each of the parameters keeps a PG* variable of the caller's environment from having a say here.
    return (
        f"postgresql://{_NAME}@/{_NAME}?host={quote(os.fsencode(folder), safe='')}&port={_PORT}&hostaddr="
        "&options=&sslmode=disable&gssencmode=disable&channel_binding=disable&target_session_attrs=any"
    )


async def _until(condition: Callable[[], bool], seconds: float = math.inf, poll_seconds: float = 0.01) -> bool:
    """Wait for a condition that no event of the loop announces; return whether it came in time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(poll_seconds)
    return True
