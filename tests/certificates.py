"""Certificates for tests: an authority of their own, and files that can be replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import trustme

from cluster.config import TlsFiles


@dataclass
class Authority:
    """Signs certificates into a directory."""

    directory: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    @property
    def ca_file(self) -> Path:
        file = self.directory / "ca.pem"
        self.ca.cert_pem.write_to_path(str(file))
        return file

    def issue(self, name: str, *identities: str, checks_clients: bool = False) -> TlsFiles:
        """NAME.pem and NAME.key for these host names; written again by a second call."""
        made = self.ca.issue_cert(*(identities or ("localhost", "127.0.0.1")))
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(str(key))
        return TlsFiles(cert=cert, key=key, ca=self.ca_file if checks_clients else None)
