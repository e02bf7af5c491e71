"""Write new secrets for the services: `python infra/services/make_secrets.py FOLDER`.

The folder gets `environment` (passwords, as NAME=value lines), `tls/` (a certificate authority of the Dask cluster's
own, and one certificate for all its processes) and `kustomization.yaml`, which makes Kubernetes secrets of both. Only
their owner may read them. What is there already is kept, so it is safe to run again.
"""

from __future__ import annotations

import os
import secrets
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAYS = 825
KUSTOMIZATION = """\
secretGenerator:
  - name: passwords
    envs: [environment]
  - name: dask-tls
    files: [dask_ca=tls/ca.pem, dask_certificate=tls/certificate.pem, dask_key=tls/key.pem]
"""
USER = 10001
"""Whom containers run as where root makes the secrets; else as whoever does."""
PASSWORDS = ("POSTGRES_PASSWORD", "PREFECT_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD", "MLFLOW_PASSWORD")


def main() -> int:
    """Write what is missing."""
    if len(sys.argv) != 2:
        print("usage: python infra/services/make_secrets.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    for place in (folder, folder / "tls"):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    _write(folder / "environment", _passwords().encode())
    _write(folder / "kustomization.yaml", KUSTOMIZATION.encode())
    if not (folder / "tls" / "key.pem").exists():
        for name, content in _certificates().items():
            _write(folder / "tls" / name, content)
    if os.getuid() == 0:
        # Containers do not run as root, and read the certificates.
        for path in (folder / "tls", *(folder / "tls").iterdir()):
            os.chown(path, USER, 0)
    return 0


def _passwords() -> str:
    # Letters and digits alone: they stand in URLs.
    said = {name: secrets.token_hex(20) for name in PASSWORDS}
    said["PREFECT_LOGIN"] = f"bmm:{secrets.token_hex(20)}"
    said["MLFLOW_SESSION_KEY"] = secrets.token_hex(32)
    said["OBJECTS_KEY_ID"] = f"bmm{secrets.token_hex(8)}"
    said["OBJECTS_SECRET"] = secrets.token_hex(20)
    said["BMM_UID"] = str(os.getuid() or USER)
    return "".join(f"{name}={value}\n" for name, value in said.items())


def _certificates() -> dict[str, bytes]:
    now = datetime.now(UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "dask")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"bmm-{name}")]) for name in keys}
    made = {}
    for name, key in keys.items():
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=DAYS))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
        )
        made[name] = builder.sign(keys["ca"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    private = keys["dask"].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # The authority's own key is thrown away: a new certificate means a new authority.
    return {"ca.pem": made["ca"], "certificate.pem": made["dask"], "key.pem": private}


def _write(path: Path, content: bytes) -> None:
    if path.exists():
        return
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)


if __name__ == "__main__":
    sys.exit(main())
