"""The compose file and the image: valid, pinned, guarded, and the same that this project installs and runs natively."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
sys.path.insert(0, str(INFRA / "native"))
from compose import Compose  # noqa: E402 - a script's neighbour

DIGEST = re.compile(r"^[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}$")


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New secrets, as a newcomer makes them."""
    folder = tmp_path_factory.mktemp("secrets") / "made"
    subprocess.run([sys.executable, str(INFRA / "services" / "make_secrets.py"), str(folder)], check=True)
    return folder


@pytest.fixture
def variables(secrets: Path) -> dict[str, str]:
    lines = (secrets / "environment").read_text(encoding="utf-8").splitlines()
    return {**dict(line.split("=", 1) for line in lines), "BMM_SECRETS": str(secrets)}


def test_it_is_a_compose_file(said: dict[str, Any], variables: dict[str, str]) -> None:
    """By the specification, once variables and merge keys are in place as compose puts them."""
    text = yaml.safe_dump(said, sort_keys=False)
    # The parser knows a tag or a digest; engines take both, and go by the digest.
    text = re.sub(r"(image: [\w./-]+):[\w.-]+(@sha256:)", r"\1\2", text)

    def value(found: re.Match[str]) -> str:
        return variables.get(found[1]) or found[2] or ""

    text = re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", value, text)
    parsed = PyCompose.from_yaml(text)
    assert set(parsed.service_names()) == set(said["services"])
    with pytest.raises(ValueError, match=r"healthcheck\.interval"):
        PyCompose.from_yaml(text.replace("interval: 10s", "interval: [often]"))


def test_images_are_pinned_by_digest_or_built_here(said: dict[str, Any]) -> None:
    built = {"bmm", "objects"}
    for name, service in said["services"].items():
        if "build" in service:
            assert service["build"]["target"] in built
        else:
            assert DIGEST.match(service["image"]), name
    bases = [line.split()[1] for line in (INFRA / "Dockerfile").read_text().splitlines() if line.startswith("FROM ")]
    outside = [base for base in bases if base != "python"]
    assert len(outside) == 2
    assert [base for base in outside if not DIGEST.match(base)] == []
    stages = re.findall(r"^FROM .* AS (\w+)$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert built <= set(stages)


def test_every_service_is_guarded(said: dict[str, Any]) -> None:
    for name, service in said["services"].items():
        assert not str(service["user"]).startswith(("0", "root")), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}, name
        assert "privileged" not in service, name
        if name != "buckets":
            assert service["healthcheck"]["test"][0] == "CMD", name
        for published in service.get("ports", []):
            assert published.startswith("127.0.0.1:"), name


def test_no_secret_has_a_value_in_the_file(said: dict[str, Any]) -> None:
    secret = re.compile(r"PASSWORD|SECRET|AUTH_STRING|KEY_ID|ROOT_USER$")
    asked = 0
    for name, service in said["services"].items():
        for key, value in service.get("environment", {}).items():
            if secret.search(key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{name}: {key}"
                asked += 1
            assert not re.search(r"://\w+:(?!\$\{\w+:\?)[^@/]+@", str(value)), f"{name}: {key}"
    assert asked > 10


def test_data_is_published_nowhere(said: dict[str, Any]) -> None:
    assert said["networks"]["data"] == {"internal": True}
    for name in ("postgres", "objects"):
        assert said["services"][name]["networks"] == ["data"]
        assert "ports" not in said["services"][name]
    assert said["services"]["dask-scheduler"].get("ports") is None


def test_mounts_and_files_that_it_names_exist(said: dict[str, Any]) -> None:
    for service in said["services"].values():
        for word in [*map(str, service.get("command", [])), *service.get("healthcheck", {}).get("test", [])]:
            if word.startswith("infra/"):
                assert (ROOT / word).is_file(), word
        for volume in service.get("volumes", []):
            if volume.startswith("./"):
                assert (INFRA / volume.split(":")[0]).is_file(), volume
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


def test_native_words_are_the_files_own(variables: dict[str, str], tmp_path: Path, said: dict[str, Any]) -> None:
    """Addresses, ports, mounts and variables change as they must, and nothing else."""
    kept = Compose(variables, tmp_path)
    names = kept.names()
    assert set(names) == set(said["services"])
    for name in names:
        for needed in kept.service(name).needs:
            assert names.index(needed) < names.index(name)
    worker = kept.service("worker")
    assert worker.command == ["prefect", "worker", "start", "--type", "process", "--pool", "bmm", "--with-healthcheck"]
    assert worker.environment["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert worker.environment["PREFECT_API_AUTH_STRING"] == variables["PREFECT_LOGIN"]
    assert worker.environment["PREFECT_HOME"] == str(tmp_path / "volumes" / "worker" / "prefect")
    assert worker.environment["DASK_DISTRIBUTED__COMM__TLS__CA_FILE"] == f"{variables['BMM_SECRETS']}/tls/ca.pem"
    assert worker.environment["BMM_STORE"] == "s3://bmm/store"
    assert worker.healthcheck == ["python", "infra/services/healthy.py", "http://127.0.0.1:8080/health"]
    prefect = kept.service("prefect")
    assert prefect.command[-4:] == ["--host", "127.0.0.1", "--port", "4200"]
    database = prefect.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    password = variables["PREFECT_DATABASE_PASSWORD"]
    assert database == f"postgresql+asyncpg://prefect:{password}@127.0.0.1:5432/prefect"
    assert (kept.replicas("dask-worker"), kept.replicas("mlflow")) == (2, 1)
    assert kept.service("dask-worker", 1).healthcheck[-1] == "http://127.0.0.1:8791/health"
    assert kept.path("/experts/mail") == INFRA / "experts" / "mail"

    moved = Compose(variables, tmp_path, free_ports=True)
    port = moved.address("http://prefect:4200/api").removesuffix("/api").rpartition(":")[2]
    assert port not in ("4200", "")
    assert moved.service("prefect").healthcheck[-1] == f"http://127.0.0.1:{port}/api/ready"
    assert moved.service("prefect").environment["PREFECT_SERVER_UI_API_URL"] == f"http://127.0.0.1:{port}/api"
    assert password in moved.service("prefect").environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    for name in names:
        service = moved.service(name)
        text = " ".join([*service.command, *service.environment.values(), *service.healthcheck])
        assert not re.search(r"(?<!\w)(5432|9000|4200|5000|8786|8787|8790|8080)(?!\w)", text), name
        # Roles of the databases are called like the servers.
        hosts = re.sub(r"//\w+:\w+@", "//", text)
        assert not re.search(r"(?<!s3:)//(postgres|objects|prefect|mlflow|dask-scheduler)\b", hosts), name


def test_without_secrets_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"needs POSTGRES_PASSWORD: run infra/services/make_secrets.py"):
        Compose({}, tmp_path).service("postgres")


def test_the_image_installs_what_runs_in_it(said: dict[str, Any]) -> None:
    """Every Python module and command that a service names comes with the extras that the image installs."""
    assert "'.[infra,cluster]'" in (INFRA / "Dockerfile").read_text()
    for module in ("asyncpg", "psycopg2", "boto3", "flask_wtf", "cryptography"):
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    programs = {service["command"][0] for service in said["services"].values() if "build" in service}
    assert programs == {"server", "python", "prefect", "dask"}
