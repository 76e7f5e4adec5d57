"""The embedded PostgreSQL, with real servers, real kills and real data directories.

Below pytest's own temporary folder, closed to other accounts, the server of a broker that root started could not
reach its data; so each test has an open folder of its own. Where a test is about a crash, fsync stays on.
"""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from broker.embedded import EmbeddedPostgres, conninfo_of_running
from broker.installation import EmbeddedError, Installation, find_installation
from conftest import data_folder

FAST = {"fsync": "off"}
PROJECT = Path(__file__).parent.parent
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and the death signal of Linux")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another account")

# A broker in small: it starts the server, says so, and waits to be killed. `edit` may change the module before.
OWNER = """
import asyncio, sys
from pathlib import Path
from broker import embedded

async def main():
    {edit}
    postgres = embedded.EmbeddedPostgres(Path(sys.argv[1]))
    url = await postgres.start()
    print(postgres.pid, url, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await postgres.stop()

asyncio.run(main())
"""

Make = Callable[..., EmbeddedPostgres]
StartOwner = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def folder() -> Iterator[Path]:
    with data_folder("/tmp") as path:
        path.chmod(0o711)
        yield path


@pytest.fixture
def folder_on_disk() -> Iterator[Path]:
    """Where initdb takes its time."""
    with tempfile.TemporaryDirectory(prefix="wonderq-test-", dir="/tmp", ignore_cleanup_errors=True) as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
async def make(folder: Path) -> AsyncIterator[Make]:
    made: list[EmbeddedPostgres] = []

    def build(data_dir: Path = folder / "data", **arguments: Any) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(data_dir, **{"settings": FAST} | arguments))
        return made[-1]

    yield build
    for postgres in made:
        await postgres.stop()


@pytest.fixture
def start_owner(folder: Path) -> Iterator[StartOwner]:
    owners: list[subprocess.Popen[str]] = []

    def start(edit: str = "pass", python: str = sys.executable, **arguments: Any) -> "subprocess.Popen[str]":
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [python, "-c", OWNER.format(edit=edit), str(folder / "data")]
        environ = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}
        owners.append(subprocess.Popen(command, env=environ, cwd="/", **(pipes | arguments)))
        return owners[-1]

    yield start
    for owner in owners:
        owner.communicate()  # the end of its input is its order to stop


async def read_line(owner: "subprocess.Popen[str]") -> tuple[int, str]:
    assert owner.stdout is not None
    line = await asyncio.to_thread(owner.stdout.readline)
    pid, url = line.split()
    return int(pid), url


async def becomes_true(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True


def processes_of(data_dir: Path, program: str = "") -> list[int]:
    """Pids of PostgreSQL's programs that work in this data directory, or were told to."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            cwd = os.readlink(entry / "cwd")
        except OSError:
            continue
        works_here = cwd.startswith(str(data_dir / "postgres")) or any(
            word.startswith(os.fsencode(data_dir / "postgres")) for word in command
        )
        if works_here and command[0].endswith(program.encode()):
            found.append(int(entry.name))
    return found


def owner_of_data(data_dir: Path) -> int:
    return (data_dir / "postgres").stat().st_uid


async def fetch(url: str, query: str) -> Any:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        row = await (await connection.execute(query)).fetchone()
        return row[0] if row and len(row) == 1 else row


async def execute(url: str, *statements: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        for statement in statements:
            await connection.execute(statement)


async def test_what_was_stored_before_a_stop_is_there_after_the_next_start(make: Make) -> None:
    first = make(settings=None)
    await execute(await first.start(), "CREATE TABLE kept AS SELECT 7 AS number")
    await first.stop()
    assert await fetch(await make(settings=None).start(), "SELECT number FROM kept") == 7


async def test_the_database_is_durable_utf8_checksummed_and_closed_to_the_network(make: Make, folder: Path) -> None:
    url = await make(settings=None).start()
    names = ("fsync", "data_checksums", "full_page_writes", "synchronous_commit")
    for name in names:
        assert await fetch(url, f"SHOW {name}") == "on", name
    for name, value in {"listen_addresses": "", "jit": "off", "timezone": "UTC", "wal_level": "replica"}.items():
        assert await fetch(url, f"SHOW {name}") == value
    assert await fetch(
        url,
        "SELECT current_database(), current_user::text, pg_encoding_to_char(encoding), datcollate "
        "FROM pg_database WHERE datname = current_database()",
    ) == ("wonderq", "wonderq", "UTF8", "C")
    socket_folder = folder / "data" / "socket"
    assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    assert socket_folder.stat().st_uid == owner_of_data(folder / "data")


async def test_settings_reach_the_server(make: Make) -> None:
    url = await make(settings={"fsync": "off", "work_mem": "5MB", "max_connections": "17"}).start()
    assert await fetch(url, "SHOW work_mem") == "5MB"
    assert await fetch(url, "SHOW max_connections") == "17"
    assert await fetch(url, "SHOW fsync") == "off"


async def test_a_second_owner_is_told_which_process_owns_the_directory(make: Make, start_owner: StartOwner) -> None:
    owner = start_owner()
    _, url = await read_line(owner)
    second = make()
    with pytest.raises(EmbeddedError, match=rf"in use by process {owner.pid}: .* --data-dir"):
        await second.start()
    await second.stop()
    assert await fetch(url, "SELECT 1") == 1, "the refused owner has disturbed the first"


async def test_a_former_owner_s_stop_does_not_touch_the_next_owner_s_server(make: Make, folder: Path) -> None:
    former, present = make(), make()
    await former.start()
    await former.stop()
    url = await present.start()
    began = time.monotonic()
    await former.stop()
    assert time.monotonic() - began < 4, "it has waited for a server that is not its own"
    assert conninfo_of_running(folder / "data") == url
    with pytest.raises(EmbeddedError, match="in use by process"):
        await former.start()
    assert await fetch(url, "SELECT 1") == 1


async def test_a_server_that_runs_is_not_started_twice(make: Make) -> None:
    postgres = make()
    url = await postgres.start()
    with pytest.raises(EmbeddedError, match="started already"):
        await postgres.start()
    assert await fetch(url, "SELECT 1") == 1


async def test_kill_of_the_server_is_noticed_and_loses_no_committed_row(make: Make) -> None:
    postgres = make(settings=None)
    url = await postgres.start()
    await execute(url, "CREATE TABLE numbers (number int PRIMARY KEY)")
    acknowledged: list[int] = []
    enough = asyncio.Event()

    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            while True:
                await connection.execute("INSERT INTO numbers VALUES (%s)", [len(acknowledged)])
                acknowledged.append(len(acknowledged))
                if len(acknowledged) == 100:
                    enough.set()

    writer = asyncio.create_task(write())
    await asyncio.wait_for(enough.wait(), 30)
    pid = postgres.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.wait_for(postgres.wait_ended(), 10) == -signal.SIGKILL
    assert postgres.pid is None
    with pytest.raises(psycopg.OperationalError):
        await asyncio.wait_for(writer, 10)
    await postgres.stop()
    url = await make(settings=None).start()
    assert await fetch(url, "SELECT count(*) FROM numbers") in (len(acknowledged), len(acknowledged) + 1)
    assert await fetch(url, "SELECT max(number) FROM numbers") >= acknowledged[-1]


@on_linux
async def test_a_start_waits_for_a_backend_that_outlived_its_server(
    make: Make, start_owner: StartOwner, folder: Path
) -> None:
    """A backend at work does not notice that its server has died, and PostgreSQL will not start beside it.

    It is halted here, so that it is at work for as long as the test needs.
    """
    owner = start_owner()
    pid, url = await read_line(owner)
    async with await psycopg.AsyncConnection.connect(url) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        owner.kill()
        owner.wait()
        assert await becomes_true(lambda: processes_of(folder / "data") == [backend])
        start = asyncio.create_task(make(settings=None).start())
        assert not await becomes_true(start.done, seconds=1), "it has not waited for the backend"
        os.kill(backend, signal.SIGCONT)
        assert await fetch(await start, "SELECT 1") == 1
        assert backend not in processes_of(folder / "data")


@on_linux
async def test_kill_of_the_owner_takes_the_server_along(make: Make, start_owner: StartOwner, folder: Path) -> None:
    owner = start_owner()
    pid, url = await read_line(owner)
    await execute(url, "CREATE TABLE kept AS SELECT 7 AS number")
    assert pid in processes_of(folder / "data")
    owner.kill()
    assert await becomes_true(lambda: not processes_of(folder / "data"))
    assert await fetch(await make().start(), "SELECT number FROM kept") == 7


@on_linux
async def test_an_orphan_server_is_stopped_by_the_next_owner(make: Make, start_owner: StartOwner, folder: Path) -> None:
    owner = start_owner(edit="embedded._LAUNCHER = embedded._LAUNCHER.replace('prctl(1,', 'prctl(-1,')")
    orphan, url = await read_line(owner)
    await execute(url, "CREATE TABLE kept AS SELECT 7 AS number")
    owner.kill()
    owner.wait()
    assert await fetch(url, "SELECT 1") == 1, "there is no orphan to test with"
    postgres = make(settings=None)
    assert await fetch(await postgres.start(), "SELECT number FROM kept") == 7
    assert orphan != postgres.pid
    assert orphan not in processes_of(folder / "data")


@on_linux
async def test_a_first_start_whose_owner_was_killed_half_way_leaves_nothing_half_done(
    make: Make, start_owner: StartOwner, folder: Path
) -> None:
    data = folder / "data"
    owner = start_owner()
    assert await becomes_true((data / "postgres.new" / "PG_VERSION").exists)
    owner.kill()
    owner.wait()
    assert (data / "postgres.new").exists()
    assert not (data / "postgres").exists()
    assert await fetch(await make(settings=None).start(), "SELECT 1") == 1
    assert not (data / "postgres.new").exists()


@on_linux
async def test_a_first_start_whose_initdb_was_killed_says_so_and_the_next_one_succeeds(
    folder_on_disk: Path, make: Make
) -> None:
    data = folder_on_disk / "data"
    start = asyncio.create_task(make(data, settings=None).start())
    assert await becomes_true((data / "postgres.new" / "PG_VERSION").exists)
    (initdb,) = processes_of(data, "/initdb")
    os.kill(initdb, signal.SIGKILL)
    with pytest.raises(EmbeddedError, match="could not make its database"):
        await start
    assert not (data / "postgres").exists()
    assert await fetch(await make(data, settings=None).start(), "SELECT 1") == 1


@on_linux
async def test_a_start_that_is_cancelled_leaves_no_process_and_no_owner(make: Make, folder: Path) -> None:
    start = asyncio.create_task(make().start())
    assert await becomes_true((folder / "data" / "postgres.new" / "PG_VERSION").exists)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert await becomes_true(lambda: not processes_of(folder / "data"))
    assert await fetch(await make().start(), "SELECT 1") == 1


@pytest.mark.parametrize("name", ["n" * 120, 'a, "b" %2F\\ ö', "plain"])
async def test_any_path_will_do_and_no_socket_folder_stays(make: Make, folder: Path, name: str) -> None:
    data = folder / name
    postgres = make(data)
    url = await postgres.start()
    assert await fetch(url, "SELECT current_database()") == "wonderq"
    assert conninfo_of_running(data) == url
    socket_folder = Path((await fetch(url, "SHOW unix_socket_directories")).strip('"').replace('""', '"'))
    assert len(os.fsencode(socket_folder)) <= 100
    assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    await postgres.stop()
    assert not socket_folder.exists()


async def test_a_socket_folder_that_somebody_else_made_is_refused(make: Make, folder: Path) -> None:
    postgres = make(folder / ("n" * 120))
    url = await postgres.start()
    socket_folder = Path((await fetch(url, "SHOW unix_socket_directories")).strip('"'))
    await postgres.stop()
    socket_folder.symlink_to(folder)
    try:
        with pytest.raises(EmbeddedError, match=f"{socket_folder} is not a folder of the account"):
            await postgres.start()
    finally:
        socket_folder.unlink()


async def test_a_pid_file_that_names_a_living_stranger_stops_nobody(make: Make, folder: Path) -> None:
    data = folder / "data"
    postgres = make()
    await postgres.start()
    pid_file = data / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines(keepends=True)
    await postgres.stop()
    # The stranger must belong to the server's account: PostgreSQL ignores those of others by itself.
    account = {"user": owner_of_data(data)} if os.geteuid() == 0 else {}
    stranger = subprocess.Popen(["sleep", "600"], **account)  # type: ignore[call-overload]
    try:
        pid_file.write_text("".join([f"{stranger.pid}\n", *lines[1:]]))
        assert conninfo_of_running(data) is None
        assert await fetch(await make().start(), "SELECT 1") == 1
        assert stranger.poll() is None, "the stranger was taken for a server and killed"
    finally:
        stranger.kill()
        stranger.wait()


@pytest.mark.skipif(not DEBIAN_15.exists(), reason="needs PostgreSQL 15")
async def test_data_made_by_postgresql_15_are_opened_by_15_ever_after(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BROKER_PG_BIN", raising=False)
    assert find_installation().major > 15, "nothing newer is installed that could be taken by mistake"
    monkeypatch.setenv("BROKER_PG_BIN", str(DEBIAN_15))
    first = make()
    await execute(await first.start(), "CREATE TABLE kept AS SELECT 7 AS number")
    await first.stop()
    monkeypatch.delenv("BROKER_PG_BIN")
    url = await make().start()
    assert await fetch(url, "SELECT number FROM kept") == 7
    assert (await fetch(url, "SHOW server_version")).startswith("15.")


async def test_data_of_a_version_that_is_not_installed_are_left_alone_with_advice(make: Make, folder: Path) -> None:
    pgdata = folder / "data" / "postgres"
    pgdata.mkdir(parents=True)
    (pgdata / "PG_VERSION").write_text("99\n")
    (folder / "data").chmod(0o711)
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 99, which made the data .*BROKER_PG_BIN"):
        await make().start()
    (pgdata / "PG_VERSION").unlink()
    with pytest.raises(EmbeddedError, match="is no PostgreSQL data directory"):
        await make().start()
    assert pgdata.exists()


def test_the_installation_that_the_operator_names_comes_first(folder: Path) -> None:
    found = find_installation({})
    assert found.major >= 15
    assert "pginstall" in str(found.bin_dir), "the wheel comes before the system"
    named = folder / "named"
    named.mkdir()
    for program in ("postgres", "initdb"):
        (named / program).symlink_to(found.bin_dir / program)
    assert find_installation({"BROKER_PG_BIN": str(named)}) == Installation(named, found.major)
    with pytest.raises(EmbeddedError, match="BROKER_PG_BIN names"):
        find_installation({"BROKER_PG_BIN": str(folder)})


def test_a_version_that_no_place_has_is_asked_for_by_name() -> None:
    with pytest.raises(EmbeddedError, match=r"PostgreSQL 99, .* was not found \(but .*\d\d.*\): .*--database-url"):
        find_installation({}, major=99)


async def test_postgres_variables_of_the_environment_have_no_say(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    junk = {
        "PGDATA": "/nowhere",
        "PGHOST": "nowhere.invalid",
        "PGPORT": "1",
        "PGHOSTADDR": "192.0.2.1",
        "PGUSER": "nobody-at-all",
        "PGDATABASE": "nothing",
        "PGOPTIONS": "-c no_such_setting=1",
        "PGSSLMODE": "verify-full",
        "PGCHANNELBINDING": "require",
        "PGTARGETSESSIONATTRS": "standby",
        "PGTZ": "Mars/Olympus",
        "PG_TEST_TIMEOUT_DEFAULT": "x",
    }
    for name, value in junk.items():
        monkeypatch.setenv(name, value)
    postgres = make()
    url = await postgres.start()
    monkeypatch.delenv("PGTZ")  # which is for clients to obey, and would be
    assert await fetch(url, "SELECT current_user::text") == "wonderq"
    if sys.platform == "linux":
        environ = Path(f"/proc/{postgres.pid}/environ").read_bytes().split(b"\0")
        assert not [entry for entry in environ if entry.startswith(b"PG")]


@on_linux
async def test_stop_leaves_no_process_and_may_be_repeated(make: Make, folder: Path) -> None:
    postgres = make()
    await postgres.stop()
    url = await postgres.start()
    assert postgres.pid in processes_of(folder / "data")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("SELECT 1")
        await postgres.stop()
        assert not processes_of(folder / "data")
        assert postgres.pid is None
        assert await postgres.wait_ended() == 0
    await postgres.stop()
    assert conninfo_of_running(folder / "data") is None
    assert await fetch(await postgres.start(), "SELECT 1") == 1


@on_linux
async def test_a_server_that_hangs_is_ended_within_eight_seconds(make: Make, folder: Path) -> None:
    postgres = make()
    await postgres.start()
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGSTOP)
    began = time.monotonic()
    await postgres.stop()
    assert time.monotonic() - began < 9.5, "the broker as a whole has ten seconds to stop"
    assert postgres.pid is None
    assert not processes_of(folder / "data")
    assert await fetch(await make().start(), "SELECT 1") == 1


def test_start_and_stop_may_belong_to_different_event_loops(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder / "data", settings=FAST)
    url = asyncio.run(postgres.start())
    try:
        assert asyncio.run(fetch(url, "SELECT 1")) == 1
    finally:
        asyncio.run(postgres.stop())
    assert postgres.pid is None


async def test_a_start_that_fails_shows_the_end_of_the_log_and_what_to_do(make: Make) -> None:
    mistaken = {"fsync": "off", "work_mem": "plenty"}
    with pytest.raises(EmbeddedError, match=r'make its database: .*--database-url(?s:.*)"work_mem": "plenty"'):
        await make(settings=mistaken).start()
    postgres = make()
    await postgres.start()
    await postgres.stop()
    with pytest.raises(EmbeddedError, match=r'while it was starting .*--database-url(?s:.*)"work_mem": "plenty"'):
        await make(settings=mistaken).start()


async def test_a_log_that_grew_large_is_emptied_at_the_next_start(make: Make, folder: Path) -> None:
    log = folder / "data" / "postgres.log"
    postgres = make()
    await postgres.start()
    await postgres.stop()
    size = log.stat().st_size
    await postgres.start()
    await postgres.stop()
    assert log.stat().st_size > size, "a log of ordinary size is appended to"
    os.truncate(log, 10 * 1024 * 1024 + 1)
    await postgres.start()
    assert log.stat().st_size < 100_000


@as_root
async def test_programs_that_the_server_s_account_cannot_read_are_copied_once(make: Make, folder: Path) -> None:
    found = find_installation({})
    package = found.bin_dir.parent.parent
    closed = folder / "closed"
    shutil.copytree(found.bin_dir.parent, closed / package.name / found.bin_dir.parent.name)
    shutil.copytree(package.with_name(f"{package.name}.libs"), closed / f"{package.name}.libs")
    closed.chmod(0o700)
    installation = Installation(closed / found.bin_dir.relative_to(package.parent), found.major)
    postgres = make(installation=installation)
    assert await fetch(await postgres.start(), "SELECT 1") == 1
    await postgres.stop()
    (copy,) = (folder / "data").glob("postgresql-*")
    inode = copy.stat().st_ino
    assert await fetch(await postgres.start(), "SELECT 1") == 1
    assert copy.stat().st_ino == inode, "the programs were copied again"
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


@as_root
async def test_a_data_directory_that_the_server_s_account_cannot_reach_is_refused(make: Make, folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedError, match=r"the account \w+ cannot enter .*closed/data: choose a --data-dir"):
        await make(closed / "data").start()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert not (closed / "data" / "postgres").exists()


@as_root
async def test_files_that_root_put_back_from_a_backup_are_given_to_the_server(make: Make, folder: Path) -> None:
    postgres = make()
    await execute(await postgres.start(), "CREATE TABLE kept AS SELECT 7 AS number")
    await postgres.stop()
    pgdata = folder / "data" / "postgres"
    for path in (pgdata, *pgdata.rglob("*")):
        os.chown(path, 0, 0)
    assert await fetch(await postgres.start(), "SELECT number FROM kept") == 7


@as_root
@pytest.mark.skipif(not (DEBIAN_15.exists() and Path("/usr/bin/python3").exists()), reason="needs Debian's programs")
async def test_an_ordinary_user_starts_the_server_as_itself(start_owner: StartOwner, folder: Path) -> None:
    folder.chmod(0o777)
    owner = start_owner(python="/usr/bin/python3", user="nobody", group="nogroup", extra_groups=[])
    pid, url = await read_line(owner)
    data = folder / "data"
    assert data.stat().st_uid == (data / "postgres").stat().st_uid == Path(f"/proc/{pid}").stat().st_uid != 0
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    assert await fetch(url, "SELECT 1") == 1
    await asyncio.to_thread(owner.communicate, "")
    assert owner.returncode == 0
    assert not processes_of(data)


async def test_tools_join_the_server_that_runs_now_and_no_other(make: Make, folder: Path) -> None:
    data = folder / "data"
    assert conninfo_of_running(data) is None
    postgres = make(settings=None)
    url = await postgres.start()
    assert conninfo_of_running(data) == url
    assert postgres.pid is not None
    os.kill(postgres.pid, signal.SIGKILL)
    await postgres.wait_ended()
    assert (data / "postgres" / "postmaster.pid").exists()
    assert conninfo_of_running(data) is None
    await postgres.stop()
    assert conninfo_of_running(data) is None
